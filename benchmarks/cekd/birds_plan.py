"What the studies run, in which order, and by which rule settings are chosen: from a study's file and the rows that are known to the jobs that are left."
import json
from pathlib import Path

here = Path(__file__).resolve().parent

def read_config(name):
    "A study by the name of its file; one that has a `base` says only what differs from it, one with `studies` is several in one queue"
    c = json.loads((here/f'{name}.json').read_text())
    if 'studies' in c: c['studies'] = {o:read_config(o) for o in c['studies']}
    return (read_config(c['base']) if 'base' in c else {}) | c | dict(name=name)

def each_study(c): return c['studies'] if 'studies' in c else {c['name']:c}

config = read_config('birds')

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
                if row not in c.get('only', [row]): continue
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
    later = one.get('later', 0)+c.get('later', {}).get(name, 0)
    return [(rank+later,j|dict(study=name)) for rank,j in ranked(one, one['epochs']['from'], own)]

def looks(c, j):
    "What SnapMix's look at the clean images, for its maps, adds to a pass; CEKD looks at them anyway"
    return c['mixes'][j['mix']]['prob']/3 if j['mix'] and 'SnapMix' in j['mix'] and j['passes']==1 else 0

def cost(c, j, n):
    "What a run costs, in images of plain training on two branches"
    if 'study' in j: c,n = c['studies'][j['study']],n[j['study']]
    return j['epochs']*(j['passes']+looks(c, j))*n*c.get('cost', 1)*j.get('cost', 1)*(1-c['valid_pct'] if j['stage']=='select' else 1)
