"Gives jobs out to processes until the time is up, and writes each row as it comes."
import json,math,shutil,tempfile,time
from pathlib import Path
from birds_bundle import decode_each
from birds_plan import cost,each_study,jobs,key,trials
from birds_pool import Pool,start_mps,stop_mps

def read_rows(*files):
    "Rows of the files that exist; a line that a killed process left unfinished is none"
    res = []
    for f in files:
        if not f.exists(): continue
        for line in f.read_text().splitlines():
            try: res.append(json.loads(line))
            except json.JSONDecodeError: pass
    return res

def add_row(file, row):
    "Append a row, on a line of its own whatever stands before it"
    whole = not file.exists() or file.read_bytes()[-1:] in (b'',b'\n')
    with open(file, 'a') as f: f.write('\n'*(not whole)+json.dumps(row)+'\n')

def plan_epochs(c, rate, workers, n, seconds):
    "Epochs at which each worker can make its waves of runs after the stage `select`, within the bounds"
    e = c['epochs']
    tried = {key(j) for options in trials(c, 2).values() for runs in options.values() for j in runs}
    waves = e['waves'] + math.ceil(len(tried)/workers)*(1-c['valid_pct'])
    return max(e['from'], min(e['to'], int(.92*seconds*rate/workers/n/waves)//2*2))

def measure(pool, c, warm, seconds, until):
    "The faster memory layout and the images a second that all workers make with it"
    rates = {}
    for i,layout in enumerate(c['layouts']):
        at = time.time()+warm/(1+i) # the first time, the device's libraries are loaded too
        for conn in pool.workers: conn.send(('speed',layout,at,seconds))
        rates[layout] = sum(pool.gather(pool.workers, min(until, at+30)).values())
        print(f'{layout}: {rates[layout]:.0f} images/s in {len(pool.workers)} processes', flush=True)
    best = max(rates, key=rates.get)
    return best,rates[best] or 100.*len(pool.workers)

def serve(pool, c, epochs, rows, file, deadline, n, rate, about):
    "Give out jobs until nothing is left that can end in time"
    done = {key(r):r for r in rows if 'stage' in r and 'error' not in r}
    busy,spent,failed = {},[],{}
    while True:
        now = time.time()
        speed = sum(o for o,_ in spent)/sum(o for _,o in spent) if len(spent)>=5 else .85*rate/max(1, len(pool.workers))
        for conn in [o for o in pool.workers if o not in busy]:
            taken,tried = {key(j) for j,_ in busy.values()},done|failed
            fits = lambda j: c.get('keep') or now+cost(c, j, n)/speed*1.05+2<deadline
            j = next((o for o in jobs(c, epochs, tried) if key(o) not in taken and fits(o)), None)
            if j is None: break
            conn.send(('run',j,deadline))
            busy[conn] = j,now
        if not busy: return
        if now>=deadline: return
        for conn,what,value in pool.answers(list(busy), deadline):
            if what not in ('run','failed'): continue # an answer that came too late
            j,start = busy.pop(conn)
            if what=='failed':
                value = dict(error=value)
                pool.drop(conn)
                if deadline-time.time()>60: pool.add()
            if value is None: continue
            if 'error' in value: failed[key(j)] = j|dict(accuracy=0.) # not chosen, and nothing waits for it
            else:
                done[key(j)] = j|value
                spent.append((cost(c, j, n),time.time()-start))
            row,kept = j|value|about|way_of(c, j),value.get('kept')
            add_row(own_file(file, j), {k:v for k,v in row.items() if k not in ('study','kept')})
            if kept: shutil.rmtree(kept, ignore_errors=True) # not before its row is written
            print(f'{deadline-time.time():4.0f} s left | {said(row)}', flush=True)

def way_of(c, j):
    "How a run was computed, where its study says it"
    own = c['studies'][j['study']] if 'study' in j else c
    return {k:own[k] for k in ('precision','folded') if k in own}

def own_file(file, j):
    "Where a row belongs: of several studies each has its file"
    return file.with_name(f"{j['study']}.jsonl") if 'study' in j else file

def said(r):
    "A row in one line"
    what = f"{r.get('study', '')} {r['stage']} {r['row']}, {r['compute']}, {r['epochs']} epochs, lr {r['lr']}, {r['args']}, seed {r['seed']}: "
    if 'error' in r: return what+r['error']
    return what + f"{r['accuracy']:.4f}, ece {r['ece']:.3f}, train {r['train_accuracy']:.4f}, {r['seconds']:.0f} s"

def known_rows(c, bundle, file):
    "What has been run; of several studies each row bears the name of its own"
    if 'studies' not in c: return read_rows(bundle/file.name, file)
    own = {o:(bundle/f'{o}.jsonl',file.with_name(f'{o}.jsonl')) for o in c['studies']}
    return [r|dict(study=name) for name,files in own.items() for r in read_rows(*files)]

def run(c, bundle, out, seconds, device, workers, begin):
    "All of it, until the time is up"
    deadline,file,gpu = begin+seconds-3,out/f"{c['name']}.jsonl",device=='cuda'
    out.mkdir(parents=True, exist_ok=True)
    rows = known_rows(c, bundle, file)
    info = json.loads((bundle/'info.json').read_text())
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        mps = start_mps(tmp) if gpu else None
        print(f'MPS: {"on" if mps else "off"}', flush=True)
        data = decode_each(c, bundle, tmp)
        if not gpu: # one run takes up to an hour there
            for o in (c,*each_study(c).values()): o |= dict(keep=str(out/'killed'), commit=info['commit'])
        args,n = (bundle,data,c,device),{name:int((~test).sum()) for name,(_,_,test) in data.items()}
        if 'studies' not in c: n = n[c['name']]
        pool,ready = begin_pool(workers, args, mps, min(deadline, time.time()+(90 if gpu else 400)))
        try:
            if not ready and mps and time.time()<deadline-60:
                stop_mps(mps)
                mps = None
                pool,ready = begin_pool(workers, args, mps, deadline)
            if not ready: return print('No worker came up.')
            print(f'{len(ready)} workers after {time.time()-begin:.0f} s', flush=True)
            plan = next((o for o in rows if 'plan' in o), None) if 'studies' not in c else None
            if plan: c['layouts'] = [plan['layout']]
            elif not gpu and 'layouts' in c: c['layouts'] = c['layouts'][:1]
            layout,rate = ('channels_last',c['rate']*len(pool.workers)) if 'studies' in c else measure(pool, c, *((8,2.5) if gpu else (0,.1)), deadline)
            how = dict(layout=layout, workers=len(pool.workers), mps=mps is not None)
            if 'studies' in c: epochs = None # each has its own
            else:
                epochs = plan['plan'] if plan else plan_epochs(c, rate, len(pool.workers), n, deadline-time.time())
                add_row(file, dict(plan=epochs, rate=round(rate), **how))
            for conn in pool.workers: conn.send(('layout',layout))
            print(f'{epochs} epochs, {how}, after {time.time()-begin:.0f} s', flush=True)
            how |= dict(precision=c.get('precision') or ('tf32' if gpu else 'fp32'), **info, **next(iter(ready.values())))
            serve(pool, c, epochs, rows, file, deadline, n, rate, how)
        finally:
            pool.close()
            stop_mps(mps)
    print(f'{len(known_rows(c, bundle, file))} rows after {time.time()-begin:.0f} s')

def begin_pool(n, args, mps, until):
    "Workers that came up in time, and what each says about itself"
    pool = Pool(n, args, mps)
    ready = pool.gather(pool.workers, until)
    for conn in [o for o in pool.workers if o not in ready]: pool.drop(conn)
    return pool,ready
