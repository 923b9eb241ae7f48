"""Real birds, whole network: what each method is worth when plain training knows its training images by heart.

    python benchmarks/cekd/birds.py prepare --data-dir DIR --bundle BUNDLE
    python benchmarks/cekd/birds.py run --bundle BUNDLE --out OUT --seconds 500
    python benchmarks/cekd/birds.py table --out OUT
    python benchmarks/cekd/birds.py run --bundle BUNDLE --out OUT --config birds200 # all 200 species, a step of the kit in benchmarks/gpu

`prepare` puts pictures, weights and the package into one folder, for a machine without network; DIR holds `CUB_200_2011.tgz` and
`weights-efficientnet-lite.tgz`. `run` chooses settings on a held-out part of train, then reads the official test part; it goes on from
`birds.jsonl` in OUT and in BUNDLE, and ends when the time is up. On processors a run that was ended goes on at
its last epoch, which lies in `killed` in OUT; frozen norms are computed there within their convolutions (`folded.py`), which gives
the same function faster. `table` writes tables and figure from the rows.

`birds.json` says what is run, in which order, and by which rule settings are chosen. One pass is one image forward and backward through
the network. *Equal compute*: every method has the passes of plain training, so one that runs clean and mixed images has half the epochs.
*Equal epochs*: such a method has all the epochs, and twice the passes. *Double compute*: one without a clean pass, with twice the passes.
SnapMix's look at the unmixed image adds a third of a pass, which is not counted. A second branch adds less than a pass: the table says
what by multiply-adds. Runs of one seed begin at the same weights and see the same crops in the same order. The test part is read once,
after the last epoch of a run of the stage `final`. Seconds are those of a run beside those of the other processes."""
import io,json,math,os,shutil,subprocess,sys,tarfile,tempfile,threading,time
import multiprocessing as mp
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
import numpy as np
from fastcore.script import call_parse

here = Path(__file__).resolve().parent

def read_config(name):
    "A study by the name of its file; one that has a `base` says only what differs from it, one with `studies` is several in one queue"
    c = json.loads((here/f'{name}.json').read_text())
    if 'studies' in c: c['studies'] = {o:read_config(o) for o in c['studies']}
    return (read_config(c['base']) if 'base' in c else {}) | c | dict(name=name)

def each_study(c): return c['studies'] if 'studies' in c else {c['name']:c}

config = read_config('birds')

# What to run

def job(c, stage, row, seed, compute, epochs, lr, target):
    "Everything that defines a run, as plain data"
    r = c['rows'][row]
    args = dict(r.get('args', {}))
    if 'cekd' in r.get('methods', []) and args.get('w_cross', 1): args = {'target':target} | args
    passes,net = r.get('passes', 1),dict(branches=1, mix=None, methods=[], smoothing=0.)
    more = {'cost':r['cost']} if 'cost' in r else {}
    n = {'equal compute': epochs/passes, 'equal epochs': epochs, 'double compute': 2*epochs/passes}[compute]
    return dict(stage=stage, row=row, seed=seed, compute=compute, epochs=max(1, round(n)), passes=passes, lr=lr, args=args,
        **{k:r.get(k, v) for k,v in net.items()}, **more)

KEY = ('stage','row','seed','epochs','lr','branches','mix','methods','args','smoothing')
FORMER = dict(alpha='w_cross') # arguments by the names that recorded rows have
def key(j):
    "What tells runs apart; the same for recorded rows whose arguments have since been renamed"
    study = {'study':j['study']} if 'study' in j else {} # of several
    return json.dumps({k:j[k] for k in KEY}|study|dict(args={FORMER.get(k, k):v for k,v in j['args'].items()}), sort_keys=True)

def trials(c, epochs):
    "Runs of the stage `select` by what they decide: `{name: {option: [a run for each seed]}}`"
    s = c['select']
    mid,first = s['lr']['options'][0],s['target']['options'][0]
    one = lambda row,seed,lr=mid,target=first: job(c, 'select', row, seed, 'equal compute', epochs, lr, target)
    return dict(lr={o:[one(s['lr']['row'], i, lr=o) for i in s['seeds']] for o in s['lr']['options']},
        target={o:[one(s['target']['row'], i, target=o) for i in s['seeds']] for o in s['target']['options']},
        best={o:[one(r, i) for i in s['seeds']] for o,r in s['best']['rows'].items()})

def choose(tried, done):
    "The option with the highest mean accuracy over its runs, the first of equal ones or where none is asked for; None while runs are missing"
    if not all(key(j) in done for runs in tried.values() for j in runs): return None
    mean = {o: sum(done[key(j)].get('accuracy', 0.) for j in runs)/max(len(runs), 1) for o,runs in tried.items()}
    return max(mean, key=mean.get)

def rows_of(c, i, run, done):
    "Rows of a block; of one that takes the best of the block before, none until all of that has been run"
    block = c['final'][i]
    if 'best' not in block: return block['rows']
    mean = {}
    for row in rows_of(c, i-1, run, done):
        own = [done.get(key(run(o, row, s))) for o in c['final'][:i] for s in o['seeds']]
        if None in own: return []
        mean[row] = sum(o.get('accuracy', 0.) for o in own)
    best = [o for o in sorted(mean, key=mean.get, reverse=True) if o not in block['with']]
    return block['with']+best[:block['best']] if best else []

def ranked(c, epochs, done):
    "What is to run now, each with its rank: the stage `select` at 0, and the blocks of `final` that have their settings"
    tried = trials(c, epochs)
    todo = [(0,j) for each in zip(*(runs for options in tried.values() for runs in options.values())) for j in each]
    lr,target,best = (choose(o, done) for o in tried.values())
    def run(block, row, seed): return job(c, block.get('stage', 'final'), row, seed, block['compute'], epochs, lr, target)
    for i,block in enumerate(c['final']):
        rows = rows_of(c, i, run, done)
        for seed in block['seeds']:
            for name in rows:
                if lr is None or 'BEST' in name and best is None: continue
                row = name.replace('BEST', best or '')
                if target is None and 'cekd' in c['rows'][row].get('methods', []): continue
                todo.append((i+1,run(block, row, seed)))
    return todo

def jobs(c, epochs, done):
    "What is left to run now, in order of priority; of several studies the first blocks first"
    if 'studies' not in c: todo = ranked(c, epochs, done)
    else: todo = sorted((o for name in c['studies'] for o in ranked_in(c, name, done)), key=lambda o: o[0])
    res = {}
    for _,j in todo: res.setdefault(key(j), j)
    return [j for k,j in res.items() if k not in done]

def ranked_in(c, name, done):
    "The same of one study of several: its jobs bear its name"
    one,mine = c['studies'][name],[r for r in done.values() if r.get('study')==name]
    own = {key({k:v for k,v in r.items() if k!='study'}):r for r in mine}
    return [(rank+one.get('later', 0),j|dict(study=name)) for rank,j in ranked(one, one['epochs']['from'], own)]

def cost(c, j, n):
    "What a run costs, in images of plain training on two branches"
    if 'study' in j: c,n = c['studies'][j['study']],n[j['study']]
    extra = c['mixes'][j['mix']]['prob']/3 if j['mix'] and 'SnapMix' in j['mix'] and j['passes']==1 else 0
    return j['epochs']*(j['passes']+extra)*n*c.get('cost', 1)*j.get('cost', 1)*(1-c['valid_pct'] if j['stage']=='select' else 1)

# The bundle

CONFIGS = ('birds','birds_search','long',*json.loads((here/'long.json').read_text())['studies'])
FILES = ('birds.py','birds_train.py','variants.py','folded.py','long_train.py','goes_on.py','graphed.py','graph_check.py',*[f'{o}.json' for o in CONFIGS]) # What a machine needs of this folder

def unpack(file, to):
    with tarfile.open(file) as f: f.extractall(to, filter='data')

def square(file, size, quality, form='JPEG'):
    "The middle square of a picture, `size` pixels wide, as JPEG or WEBP"
    from PIL import Image
    im = Image.open(file).convert('RGB')
    (w,h),s = im.size,min(im.size)
    x,y = (w-s)//2,(h-s)//2
    out = io.BytesIO()
    im = im.crop((x,y,x+s,y+s)).resize((size,size), Image.LANCZOS)
    im.save(out, form, quality=quality, **(dict(optimize=True, progressive=True) if form=='JPEG' else dict(method=4)))
    return out.getvalue()

def pack(c, data_dir, bundle):
    "Pictures, and weights with the counters that the files leave out, in one folder; the number of pictures"
    bundle.mkdir(parents=True, exist_ok=True)
    n,archives = 0,{}
    for o in each_study(c).values():
        kept = archives.setdefault(o.get('data', 'birds'), o)
        if o['classes']>kept['classes']: archives[o.get('data', 'birds')] = o
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for o in ARCHIVES:
            if (data_dir/o).is_file(): unpack(data_dir/o, tmp)
        for kind,o in archives.items(): n += (pack_cifar if kind=='cifar' else pack_birds)(o, tmp, bundle/f'{kind}.npz')
        for o in each_study(c).values(): pack_weights(o, tmp/'weights', bundle)
    note_commit(bundle)
    return n

ARCHIVES = ('CUB_200_2011.tgz','cifar100-mini.tgz','weights-efficientnet-lite.tgz','weights.tgz')

def pack_birds(c, folder, file):
    read = lambda f: dict(o.split(' ', 1) for o in (folder/'CUB_200_2011'/f).read_text().splitlines())
    names,labels,train = (read(o) for o in ('images.txt','image_class_labels.txt','train_test_split.txt'))
    ids = [i for i in names if int(labels[i])<=c['classes']]
    jpegs = [square(folder/'CUB_200_2011'/'images'/names[i], c['stored'], c['quality'], c.get('form', 'JPEG')) for i in ids]
    label,test = np.array([int(labels[i])-1 for i in ids], np.int16),np.array([train[i]=='0' for i in ids])
    return pack_files(file, jpegs, label, test)

def pack_cifar(c, folder, file):
    root = folder/'cifar100-mini'
    names = sorted(o.name for o in (root/'train').iterdir())[:c['classes']]
    files = [(part,k,o) for part in ('train','test') for k,name in enumerate(names) for o in sorted((root/part/name).iterdir())]
    label,test = np.array([k for _,k,_ in files], np.int16),np.array([part=='test' for part,_,_ in files])
    return pack_files(file, [o.read_bytes() for _,_,o in files], label, test)

def pack_files(file, files, label, test):
    "Write encoded pictures and what is known of them; how many there are"
    np.savez(file, jpegs=np.frombuffer(b''.join(files), np.uint8), ends=np.cumsum([len(o) for o in files]), label=label, test=test)
    return len(files)

def pack_weights(c, folder, bundle):
    "The files of weights that a study needs, with what they leave out: the counters of batch normalisation"
    import timm,torch
    own = [dict(arch=c['arch'], weights=c['weights'])] if c['weights'] else []
    for o in own+list(c.get('teachers', {}).values()):
        sd = torch.load(folder/o['weights'], map_location='cpu', weights_only=True)
        want = timm.create_model(o['arch']).state_dict()
        if not set(want)&set(sd): sd = dict(zip((k for k in want if not k.endswith('num_batches_tracked')), (v for k,v in sd.items() if not k.endswith('num_batches_tracked'))))
        lost = [k for k in want if k not in sd and not k.endswith('num_batches_tracked')]
        wrong = [k for k in want if k in sd and sd[k].shape!=want[k].shape]
        if lost or wrong: sys.exit(f"birds: {o['weights']} lacks {(lost+wrong)[0]}.")
        torch.save({k:sd.get(k, v) for k,v in want.items()}, bundle/o['weights'])

def note_commit(bundle):
    "Write which code the folder was made with"
    git = lambda *o: subprocess.run(['git',*o], cwd=here, capture_output=True, text=True).stdout.strip()
    commit = git('rev-parse','HEAD') + '+'*bool(git('status','--porcelain','../../cekd_fastai','.'))
    (bundle/'info.json').write_text(json.dumps(dict(commit=commit)))
    return commit

def prepare(c, data_dir, bundle):
    "Pictures, weights and the code in one folder"
    n,root = pack(c, data_dir, bundle),here.parents[1]
    ignore = shutil.ignore_patterns('__pycache__')
    for o in ('cekd_fastai','cekd'): shutil.rmtree(bundle/'src'/o, ignore_errors=True)
    shutil.copytree(root/'cekd_fastai', bundle/'src'/'cekd_fastai', ignore=ignore)
    (bundle/'src'/'cekd').mkdir()
    for o in FILES: shutil.copy(here/o, bundle/'src'/'cekd'/o)
    commit = note_commit(bundle)
    size = sum(o.stat().st_size for o in bundle.rglob('*') if o.is_file())
    print(f'{n} pictures, {size/2**20:.1f} MiB in {bundle}, commit {commit[:8]}')

def decode(bundle, classes, file, data='birds'):
    "Write the pictures of the first classes as one array; labels, and which are test pictures"
    from PIL import Image
    d = np.load(bundle/f'{data}.npz')
    blob,ends,label,test = d['jpegs'].tobytes(),d['ends'],d['label'],d['test']
    keep = np.flatnonzero(label<classes)
    def one(i): return np.asarray(Image.open(io.BytesIO(blob[ends[i-1] if i else 0:ends[i]])).convert('RGB')).transpose(2,0,1)
    with ThreadPoolExecutor(os.cpu_count()) as ex: ims = np.stack(list(ex.map(one, keep)))
    np.save(file, ims)
    return label[keep].astype(int),test[keep]

def decode_each(c, bundle, folder):
    "File of pictures, labels, and which are test pictures, by study; those of one kind are decoded once, for the study with most classes"
    res,whole = {},{}
    for name,o in sorted(each_study(c).items(), key=lambda o: -o[1]['classes']):
        file,kind = folder/f'{name}.npy',o.get('data', 'birds')
        if kind not in whole: whole[kind] = res[name] = (file,*decode(bundle, o['classes'], file, kind))
        else:
            pixels,label,test = whole[kind]
            keep = label<o['classes']
            np.save(file, np.load(pixels, mmap_mode='r')[keep])
            res[name] = file,label[keep],test[keep]
    return res

# Several processes on one GPU

MPS_TOOLS = ('nvidia-cuda-mps-control','/usr/local/nvidia/bin/nvidia-cuda-mps-control')
MPS_TEST = """import ctypes
c,p,d,n = ctypes.CDLL('libcuda.so.1'),ctypes.c_void_p(),ctypes.c_int(),ctypes.c_size_t(1<<20)
for f in (lambda: c.cuInit(0), lambda: c.cuDeviceGet(ctypes.byref(d), 0), lambda: c.cuDevicePrimaryCtxRetain(ctypes.byref(p), d),
    lambda: c.cuCtxSetCurrent(p), lambda: c.cuMemAlloc_v2(ctypes.byref(p), n)):
    if r := f(): raise SystemExit(r)
"""

def quiet(cmd, env, seconds, **kw):
    "Exit code of a command that says nothing"
    return subprocess.run(cmd, env=os.environ|env, timeout=seconds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kw).returncode

def start_mps(folder):
    "Let kernels of several processes run side by side, where the driver's tool works; its environment, None without"
    tool = next((o for o in map(shutil.which, MPS_TOOLS) if o), None)
    if tool is None: return None
    env = dict(CUDA_MPS_PIPE_DIRECTORY=str(folder/'pipe'), CUDA_MPS_LOG_DIRECTORY=str(folder/'log'), MPS_TOOL=tool)
    for o in ('pipe','log'): (folder/o).mkdir(exist_ok=True)
    try:
        if quiet([tool,'-d'], env, 10): return None
        if not quiet([sys.executable,'-c',MPS_TEST], env, 20): return env
    except (subprocess.TimeoutExpired,OSError): pass
    stop_mps(env)
    return None

def stop_mps(env):
    if env is None: return
    try: quiet([env['MPS_TOOL']], env, 5, input=b'quit\n')
    except (subprocess.TimeoutExpired,OSError): pass

def about(device):
    "Versions and machine of this process"
    import fastai,platform,timm,torch,torchvision
    versions = {o.__name__:o.__version__ for o in (torch,torchvision,fastai,timm)} | dict(python=platform.python_version())
    gpu = torch.cuda.get_device_name() if device=='cuda' else None
    return dict(versions=versions, machine=dict(platform=platform.platform(), cores=os.cpu_count(), gpu=gpu))

def short(e): return dict(error=f'{type(e).__name__}: {str(e)[:300]}')

def begin_bench(bundle, data, c, device):
    "What runs the jobs of a study, or of several"
    if 'studies' in c: return import_module('long_train').Several(bundle, data, c, device)
    return import_module(c.get('trainer', 'birds_train')).Bench(bundle, *data[c['name']], c, device)

def end_with_parent():
    "End this process as soon as the one that began it has ended, since nobody would hear its answer"
    def watch():
        wait([mp.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

def work(conn, src, *args):
    "A worker: answers each message with one, but for `layout`"
    end_with_parent()
    try:
        sys.path[:0] = src
        bench = begin_bench(*args)
        conn.send(('ready',about(args[-1])))
        while True:
            what,*rest = conn.recv()
            try:
                if what=='layout': bench.layout = rest[0]
                else: conn.send((what,getattr(bench, what)(*rest)))
            except Exception as e: conn.send((what,short(e)))
    except (EOFError,KeyboardInterrupt): pass
    except Exception as e: conn.send(('failed',short(e)['error']))

class Pool:
    "Worker processes, each with a pipe"
    def __init__(self, n, args, env):
        self.ctx,self.args,self.env,self.workers = mp.get_context('spawn'),args,env or {},{}
        for _ in range(n): self.add()

    def add(self):
        mine,theirs = self.ctx.Pipe()
        was = {k:os.environ.get(k) for k in self.env}
        os.environ.update(self.env)
        p = self.ctx.Process(target=work, args=(theirs,[str(here),str(here.parent)],*self.args), daemon=True)
        p.start()
        for k,v in was.items(): os.environ.pop(k) if v is None else os.environ.update({k:v})
        theirs.close()
        self.workers[mine] = p

    def drop(self, conn):
        self.workers.pop(conn).kill()
        conn.close()

    def answers(self, conns, until):
        "What these workers say, as it comes: `(conn, what, value)`; `failed` for one that ended"
        for conn in wait(conns, max(0, until-time.time())):
            try: what,value = conn.recv()
            except (EOFError,OSError): what,value = 'failed','the process ended'
            yield conn,what,value

    def gather(self, conns, until):
        "One answer of each that comes in time"
        res,conns = {},list(conns)
        while conns and time.time()<until:
            for conn,what,value in self.answers(conns, until):
                conns.remove(conn)
                if what=='failed' or isinstance(value, dict) and 'error' in value:
                    print(f'worker: {value}', flush=True)
                    self.drop(conn)
                else: res[conn] = value
        return res

    def close(self):
        for conn in list(self.workers): self.drop(conn)

# The queue

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
    e,s = c['epochs'],c['select']
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
    busy,spent,failed = {},[],set()
    while True:
        now = time.time()
        speed = sum(o for o,_ in spent)/sum(o for _,o in spent) if len(spent)>=5 else .85*rate/max(1, len(pool.workers))
        for conn in [o for o in pool.workers if o not in busy]:
            taken = {key(j) for j,_ in busy.values()}|failed
            fits = lambda j: c.get('keep') or now+cost(c, j, n)/speed*1.05+2<deadline
            j = next((o for o in jobs(c, epochs, done) if key(o) not in taken and fits(o)), None)
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
                if deadline-time.time()>60 or about.get('device')=='cpu': pool.add()
            if value is None: continue
            if 'error' in value: failed.add(key(j))
            else:
                done[key(j)] = j|value
                spent.append((cost(c, j, n),time.time()-start))
            row,kept = j|value|about,value.get('kept')
            add_row(own_file(file, j), {k:v for k,v in row.items() if k not in ('study','kept')})
            if kept: shutil.rmtree(kept, ignore_errors=True) # not before its row is written
            print(f'{deadline-time.time():4.0f} s left | {said(row)}', flush=True)

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

# What came out

def spread(a, form='.1f'):
    "Mean, with its standard error where there are several"
    return f'{np.mean(a):{form}}' + (f' ± {np.std(a, ddof=1)/math.sqrt(len(a)):.1f}' if len(a)>1 else '')
def pct(a): return spread(100*np.asarray(a))

def paired(a, b):
    "Differences of two rows by seed in points, `{seed: accuracy}` each: mean, standard error, and each"
    d = [100*(a[s]-b[s]) for s in sorted(a.keys()&b.keys())]
    if not d: return ''
    return f"{spread(d, '+.1f')} ({', '.join(f'{o:+.1f}' for o in d)})"

def md(cells):
    cells = [cells[0],['---']*len(cells[0]),*cells[1:]]
    return '\n'.join(f"| {' | '.join(map(str, o))} |" for o in cells)

def grouped(rows):
    "Rows of the stage `final` by compute and name, best mean first"
    res = {}
    for r in rows:
        if r.get('stage')=='final' and 'accuracy' in r: res.setdefault((r['compute'],r['row']), {})[r['seed']] = r
    order,mean = ['equal compute','equal epochs','double compute'],lambda v: np.mean([r['accuracy'] for r in v.values()])
    return dict(sorted(res.items(), key=lambda o: (order.index(o[0][0]), -mean(o[1]))))

HEAD = ['method','budget','epochs','passes an image','GMAC an image','accuracy %','mean branch %','calibration error %','train %']
HEAD += ['seconds','seeds']

def teacher_lines(rows):
    "One line for each teacher: what it knows of the test part; of a seed whose rows had several sets of teachers, that of most rows"
    sets,each = {},{}
    for r in rows:
        if r.get('stage')=='final' and 'teachers' in r and not {'wrong','labelled'}&r['args'].keys():
            sets.setdefault(r['seed'], []).append(tuple(r['teachers'].items()))
    for seed,o in sets.items():
        for k,v in max(o, key=o.count): each.setdefault(k, {})[seed] = v
    named = lambda k: 'the teachers together' if k=='ensemble' else f'teacher {k}'
    return [[named(k),*['']*4,pct(list(v.values())),*['']*4,len(v),'',''] for k,v in each.items()]

def gpu_of(r): return r.get('machine', {}).get('gpu')

def seconds_of(rs):
    "Mean of the seconds, those on a GPU where some of the runs were there"
    return np.mean([r['seconds'] for r in rs if gpu_of(r)] or [r['seconds'] for r in rs])

def where(rows):
    "In words, which runs were made on a GPU, and which were not"
    gpus,others = list(filter(None, map(gpu_of, rows))),[r for r in rows if gpu_of(r) is None]
    if not gpus: return ''
    half = sum(r.get('precision')=='bf16' for r in others)
    more = '' if not half else ' in bfloat16' if half==len(others) else f' ({half} of them in bfloat16)'
    return f', on one {gpus[-1]}' + (f", {len(others)} of {len(rows)} runs on processors{more}" if others else '')

def final_table(rows, gmacs, c=config):
    "One line for each method and budget: level, calibration, and paired differences from the two rows that all are held against"
    against = c.get('against', ['plain','2 branches, label smoothing'])
    g,cells = grouped(rows),[HEAD+[f'against {o}' for o in against],*teacher_lines(rows)]
    acc = {k:{s:r['accuracy'] for s,r in v.items()} for k,v in g.items()}
    plain,bar = (('equal compute',o) for o in against)
    for k,v in g.items():
        rs = list(v.values())
        r,mean = rs[0],lambda k: np.mean([o[k] for o in rs])
        passes = r['epochs']*r['passes']
        level = [pct([o['accuracy'] for o in rs]),pct([np.mean(o['each']) for o in rs]),f"{100*mean('ece'):.1f}",f"{100*mean('train_accuracy'):.1f}"]
        diffs = [paired(acc[k], acc[o]) if o in acc and o!=k else '' for o in (plain,bar)]
        gmac = 3*passes*gmacs[r['branches']]*(1+('css' in r['methods'])) # backward costs twice as much as forward; CSS has two networks
        cells.append([k[1],k[0],r['epochs'],passes,f'{gmac:.1f}',*level,f'{seconds_of(rs):.0f}',len(rs),*diffs])
    return md(cells)

def select_table(rows, c=config):
    "One line for each setting that was tried on the held-out part; best first, and held against rivals, where the study names some"
    res,against = {},c['select'].get('against', [])
    for r in rows:
        if r.get('stage')!='select' or 'accuracy' not in r: continue
        res.setdefault((r['row'],r['lr'],r['args'].get('target', ''),r['epochs']), {})[r['seed']] = r
    acc = {k:{s:r['accuracy'] for s,r in v.items()} for k,v in res.items()}
    if against: res = dict(sorted(res.items(), key=lambda o: -np.mean(list(acc[o[0]].values()))))
    rivals = [next((v for k,v in acc.items() if k[0]==o), {}) for o in against]
    cells = [['method','rate','target','epochs','accuracy % (held-out)','train %','seeds',*(f'against {o}' for o in against)]]
    for what,v in res.items():
        diffs = ['' if acc[what] is o else paired(acc[what], o) for o in rivals]
        cells.append([*what,pct(list(acc[what].values())),f"{100*np.mean([o['train_accuracy'] for o in v.values()]):.1f}",len(v),*diffs])
    return md(cells)

def figure(rows, file):
    "Accuracy of every seed over methods, one panel for each budget"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    g = grouped(rows)
    level = lambda n: np.mean([r['accuracy'] for (_,m),v in g.items() if m==n for r in v.values()])
    names = sorted({n for _,n in g}, key=level)
    fig,ax = plt.subplots(figsize=(7,.3*len(names)+1.2), dpi=80)
    for compute,dy,color in (('equal compute',0,'C0'),('equal epochs',.2,'C1'),('double compute',-.2,'C2')):
        at = [(names.index(n)+dy,[100*r['accuracy'] for r in v.values()]) for (o,n),v in g.items() if o==compute]
        if not at: continue
        x,y = [a for _,v in at for a in v],[y for y,v in at for _ in v]
        ax.scatter(x, y, s=14, color=color, alpha=.6, label=compute)
        ax.scatter([np.mean(v) for _,v in at], [y for y,_ in at], s=90, color=color, marker='|')
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlabel('accuracy on the official test part, %')
    ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(file)
    plt.close(fig)

def forward_gmacs(c, rows=()):
    "Multiply-adds of a forward pass of one image, by number of branches, in milliards"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from cekd_fastai.all import branch_net
    res = {}
    for n in sorted({1,2}|{r['branches'] for r in rows if 'branches' in r}):
        net = branch_net(c['arch'], c['classes'], n, pretrained=False).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as count: net(torch.zeros(1,3,c['size'],c['size']))
        res[n] = count.get_total_flops()/2e9
    return res

def table(c, out, whole=None):
    "Write tables and figure where the documentation finds them; `whole` is the queue that the study was run in"
    name,whole = c['name'],whole or c['name']
    rows = read_rows(out/f'{name}.jsonl')
    full = [r for r in rows if 'accuracy' in r]
    if not full: return print(f'No rows yet in {out/f"{name}.jsonl"}.')
    info = {k:([r for r in full if gpu_of(r)] or full)[-1][k] for k in ('versions','machine')}
    tables = dict(select=('candidates on a held-out fifth of train',select_table(rows, c)),
        final=('official test part',final_table(rows, forward_gmacs(c, rows), c)))
    for part,(what,text) in tables.items():
        if text.count('\n')<2: continue # nothing was chosen, or has been read of the test part
        of = [r for r in full if r['stage']==part]
        res = dict(title=f"{c['title']}: {what}{where(of)}", command='python benchmarks/cekd/birds.py run' + f' --config {whole}'*(name!='birds'), **info, table=text)
        res |= dict(rows=f'benchmarks/cekd/results/{name}.jsonl')
        (here.parent/'results'/f"{c.get('result', f'cekd_{name}')}_{part}.json").write_text(json.dumps(res, indent=1)+'\n')
        print(text, end='\n\n')
    for r in rows:
        if 'error' in r: print('error:', r['row'], r['seed'], r['error'])
    if any(r.get('stage')=='final' for r in full): figure(rows, here/f'{name}.png')

@call_parse
def main(
    stage:str, # prepare, run or table
    bundle:str='birds', # Folder with pictures, weights and code
    out:str=str(here/'results'), # Folder of the rows
    data_dir:str='.', # Folder with the packed data set and weights
    seconds:float=1e9, # End after this time
    device:str='cuda', # Or cpu
    workers:int=None, # Processes
    classes:int=None, # Fewer classes, to try it out
    epochs:int=None, # These epochs, to try it out
    precision:str=None, # bf16: mixed precision; without, TF32 on a GPU and full precision on processors
    config:str='birds', # The study: birds, birds_search, birds160, birds200, birds_random, meal50, cifar, or long for all but the first two
):
    "Prepare, run or show the study on real birds"
    if precision not in (None,'bf16'): sys.exit(f'birds: --precision is {precision!r}, but it is bf16 or left out.')
    begin,c = time.time(),read_config(config)
    for o in each_study(c).values():
        if precision: o['precision'] = c['precision'] = precision
        if classes: o['classes'] = classes
        if epochs: o['epochs'] = o['epochs']|{'from':epochs,'to':epochs}
    bundle,out = Path(bundle),Path(out)
    if stage=='prepare': prepare(c, Path(data_dir), bundle)
    elif stage=='run': run(c, bundle, out, seconds, device, workers or c['workers'], begin)
    elif stage=='table':
        for o in each_study(c).values(): table(o, out, c['name'])
    else: sys.exit(f'birds: the stage is {stage!r}, but it is prepare, run or table.')
