"""Does CEKD help, and which part of it? Runs, raw results, tables and a figure.

    python benchmarks/cekd/study.py cub50 --stage select --data-dir DIR    # on a held-out fifth of train: mixing of each method, attempts at CEKD
    python benchmarks/cekd/study.py cub50 --stage final --data-dir DIR     # on all of train with what was selected, and the official test split, once
    python benchmarks/cekd/study.py cub50 --stage table                # table and figure from the rows

DIR holds the data set and the file of weights that `config.json` names. Each finished run is one line of `results/SETTING.jsonl`; a run that is there is not run again,
so a study can be stopped at any time (or after `--hours`) and goes on where it was. `--part 0/2` and `--part 1/2` share the runs among two processes of one thread each.

*Equal epochs*: every method has the epochs of the setting. *Equal compute*: a method that needs fewer multiply-adds for a step than CEKD gets as many more epochs.
Finish the first stage before the second, which reads its choices from the rows.
The test split is read by the final stage only, after the last epoch of each run; nothing is chosen by it. CEKD has more candidates to choose from than the others have, on small held-out parts:
the selection table shows all of them."""
import json,sys,time
from functools import lru_cache
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pandas as pd,torch
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from cekd_fastai.all import *
from cekd_fastai.core import write_whole
from cekd_fastai.results import about

here = Path(__file__).resolve().parent
config = json.loads((here/'config.json').read_text())
MIX = dict(cutmix=CutMix, snapmix=SnapMix, mixup=MixUp)

# What to run

def job(setting, stage, method, seed, mix=None, cekd=None, branches=1, attempt=None, compute='equal epochs'):
    "Everything that defines a run, as plain data"
    s = config['settings'][setting]
    return dict(setting=setting, stage=stage, method=method, attempt=attempt, compute=compute, seed=seed, branches=branches, mix=mix, cekd=cekd,
        epochs=s['epochs'], args={k:v for k,v in s.items() if k!='title'})

def key(j): return json.dumps({k:j[k] for k in ('setting','stage','method','attempt','compute','seed','branches','mix','cekd','epochs','args')}, sort_keys=True)

def attempt_args(kw):
    "Arguments of `CEKD`, and the number of branches, of an attempt"
    return {k:v for k,v in kw.items() if k!='branches'},kw.get('branches', 2)

def select_jobs(setting, seeds):
    "On the held-out part: each method with each of its mixes, and each attempt with the reference's first mix"
    jobs = []
    for seed in seeds:
        for name,m in config['methods'].items():
            for mix in m.get('mixes', [None]): jobs.append(job(setting, 'select', name, seed, mix, m.get('cekd'), m['branches']))
        ref = next(m for m in config['methods'].values() if m.get('reference'))
        for name,kw in config['attempts'].items():
            args,n = attempt_args(kw)
            if name!='default': jobs.append(job(setting, 'select', 'attempt', seed, ref['mixes'][0], args, n, name))
    return jobs

def best(rows, options):
    "Name of the option (name to what its selection runs have) with the highest mean over the seeds that all options with runs have; the first where nothing was run"
    runs = {k:{r['seed']:r['accuracy'] for r in rows if r['stage']=='select' and all(r[o]==v for o,v in want.items())} for k,want in options.items()}
    runs = {k:v for k,v in runs.items() if v}
    seeds = set.intersection(*map(set, runs.values())) if runs else ()
    return max(runs, key=lambda k: sum(runs[k][s] for s in seeds)) if seeds else next(iter(options), None)

def chosen(rows, name):
    "Mix of a method, and arguments of CEKD, that were best on the held-out part"
    m = config['methods'][name]
    mix = best(rows, {o:dict(method=name, mix=o) for o in m.get('mixes', [])})
    cekd,n = m.get('cekd'),m['branches']
    if cekd == {}:
        ref,first = next((k,v['mixes'][0]) for k,v in config['methods'].items() if v.get('reference'))
        cekd,n = attempt_args(config['attempts'][best(rows, {k:dict(method=ref, mix=first) if k=='default' else dict(attempt=k) for k in config['attempts']})])
    return mix,cekd,n

def final_jobs(setting, seeds, rows):
    "On all of train: each method as selected, at equal epochs and then, where it needs less, at equal compute"
    s = config['settings'][setting]
    what = {name:chosen(rows, name) for name in config['methods']}
    make = lambda name, seed, compute: job(setting, 'final', name, seed, *what[name], compute=compute)
    equal = [make(name, seed, 'equal epochs') for seed in seeds for name in what]
    more = [make(name, seed, 'equal compute') for name in what if not name.startswith('CEKD') for seed in seeds]
    more = [j|dict(epochs=epochs_of(s, j, rows)) for j in more]
    return equal+[j for j in more if j['epochs']>s['epochs']]

# How to run it

_dls = {}
def data(s, held_out, seed, folder):
    "Loaders of a setting, read once per process and split"
    k = (s['data'],s['size'],s['classes'],held_out and seed)
    if k not in _dls:
        _dls.clear()
        src = s['data'] if s['data']=='synthetic' else str(Path(folder)/s['data'])
        _dls[k] = fine_grained_dls(src, size=s['size'], bs=s['bs'], classes=s['classes'], valid_pct=s['valid_pct'] if held_out else None, seed=seed, num_workers=0, in_memory=True)
    return _dls[k]

class NoValid(Callback):
    "Evaluate after the last epoch only"
    order = -100
    def before_validate(self): raise CancelValidException

def half_trunk(net):
    "Run a frozen trunk compiled and in bfloat16, for every method alike; what is trained stays in float32"
    full = torch.compile(net.trunk.forward, dynamic=False)
    def forward(x):
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16): return full(x).float()
    net.trunk.forward = forward

def make(s, j, dls, folder):
    "The learner of a run"
    weights = s['weights']
    if weights=='backbone':
        from synthetic import backbone
        weights = backbone()
    elif weights: weights = next((o for o in (Path(folder)/weights,Path(folder)/'weights'/weights) if o.exists()), Path(folder)/weights)
    mix = config['mixes'][j['mix']] if j['mix'] else None
    cbs = [ChannelsLast()]
    if mix: cbs.append(MIX[mix['mix']](mix['alpha'], mix['prob']))
    if j['cekd'] is not None:
        joint = s['freeze_bn'] and mix['mix']!='snapmix' # with frozen statistics the same step in fewer calls
        cbs.append(CEKD(**j['cekd'], joint=joint))
    opt = Adam if s['opt']=='adam' else partial(SGD, mom=.9)
    learn = branch_learner(dls, s['arch'], j['branches'], pretrained=False, weights=weights, freeze_bn=s['freeze_bn'], arch_args=s['arch_args'], opt_func=opt, wd=s['wd'], cbs=cbs)
    if s['freeze_trunk']:
        learn.freeze_to(1)
        half_trunk(learn.model)
    return learn

def forward_macs(f, x):
    with torch.no_grad(), FlopCounterMode(display=False) as count: out = f(x)
    return count.get_total_flops()/2,out

@lru_cache
def parts_macs(arch, size, args):
    "Multiply-adds of the trunk, and of a branch with its head, for one image; `args` is JSON"
    net = branch_net(arch, 50, 1, pretrained=False, **json.loads(args)).eval()
    t,m = forward_macs(net.trunk, torch.zeros(1,3,size,size))
    return t,forward_macs(lambda o: net.heads[0](net.branches[0](o)), m)[0]

def step_macs(s, j):
    "Multiply-adds of a training step per image: a pass that trains costs three times its forward, one that does not once"
    t,b = parts_macs(s['arch'], s['size'], json.dumps(s['arch_args']))
    n,mix,cekd = j['branches'],config['mixes'][j['mix']] if j['mix'] else dict(prob=0, mix=None),j['cekd']
    trained = (1 if s['freeze_trunk'] else 3)*t + 3*n*b
    if cekd is None: return trained + (mix['prob']*(t+n*b) if mix['mix']=='snapmix' else 0)
    return trained*(1+mix['prob']) + (mix['prob']*(t+n*b) if cekd.get('teacher')=='ema' else 0)

def epochs_of(s, j, rows):
    "As many epochs as the reference's multiply-adds allow, at least those of the setting"
    name = next(k for k,m in config['methods'].items() if m.get('reference'))
    mix,cekd,n = chosen(rows, name)
    return max(s['epochs'], round(s['epochs']*step_macs(s, dict(branches=n, mix=mix, cekd=cekd))/step_macs(s, j)))

def run_one(j, folder, n_epochs=None):
    "Train and evaluate; a row of the result file"
    s = config['settings'][j['setting']]
    held = j['stage']=='select'
    dls = data(s, held, j['seed'], folder)
    set_seed(j['seed'])
    dls.train.rng.seed(j['seed'])
    learn = make(s, j, dls, folder)
    start = time.perf_counter()
    groups = len(learn.splitter(learn.model))
    stop = [StopAfter(n_epochs)] if n_epochs else []
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(j['epochs'], [s['lr']]*(groups-1)+[s['lr']*s['head_lr']], cbs=[NoValid(),*stop])
    seconds = time.perf_counter()-start
    z,each,y = branch_preds(learn, dls.valid)
    acc = branch_accuracy(z, each, y)
    info = about({})
    return j | dict(split='held-out part of train' if held else 'official test', accuracy=round(acc['ensemble'], 5), each=[round(o, 5) for o in acc['branches']],
        loss=round(F.cross_entropy(z, y).item(), 5), images=len(y), gmacs_per_image=round(step_macs(s, j)/1e9, 4), seconds=round(seconds, 1),
        threads=torch.get_num_threads(), versions=info['versions'], machine=info['machine'])

class StopAfter(Callback):
    "End a run early, to time it"
    order,run_valid = 200,False
    def __init__(self, n): self.n_epochs = n
    def after_epoch(self):
        if self.epoch+1>=self.n_epochs: raise CancelFitException

# What came out

# Names that arguments of `CEKD`, and attempts at it, have had since rows were written
RENAMED = {'alpha':'w_cross', 'beta':'w_clean', 'alpha=2':'w_cross=2', 'alpha=0.5':'w_cross=0.5', 'both heads hear both':'both heads learn both'}

def today(row):
    "A row with the names that arguments and attempts have now"
    cekd = row['cekd'] and {RENAMED.get(k, k):v for k,v in row['cekd'].items()}
    return row | dict(cekd=cekd, attempt=RENAMED.get(row['attempt'], row['attempt']))

def read_rows(setting):
    f = here/'results'/f'{setting}.jsonl'
    return [today(json.loads(o)) for o in f.read_text().splitlines()] if f.exists() else []

def add_row(setting, row):
    f = here/'results'/f'{setting}.jsonl'
    f.parent.mkdir(exist_ok=True)
    with open(f, 'a') as o: o.write(json.dumps(row)+'\n')

def pct(s): return f'{100*s.mean():.1f}' + (f' ± {100*s.std():.1f}' if len(s)>1 else '')

def md(cells):
    cells = [cells[0],['---']*len(cells[0]),*cells[1:]]
    return '\n'.join(f"| {' | '.join(map(str, o))} |" for o in cells)

def final_table(rows):
    "One line for each method and budget, over seeds"
    df = pd.DataFrame([r for r in rows if r['stage']=='final'])
    if not len(df): return ''
    df['single'],df['mix'] = df.each.map(lambda o: sum(o)/len(o)),df.mix.fillna('')
    ref = df[df.method.map(lambda o: bool(config['methods'][o].get('reference')))].pipe(lambda d: (d.gmacs_per_image*d.epochs).mean())
    cells = [['method','mix','epochs','compute','accuracy %','mean branch %','each seed %']]
    for c,m in itertools.product(('equal epochs','equal compute'), config['methods']):
        d = df[(df['compute']==c)&(df.method==m)]
        if not len(d): continue
        share = (d.gmacs_per_image*d.epochs).mean()/ref
        cells.append([m, d.mix.iloc[0], f'{d.epochs.iloc[0]}' + (' (equal compute)' if c!='equal epochs' else ''), f'{share:.2f}', pct(d.accuracy), pct(d.single),
            ', '.join(f'{100*a:.1f}' for a in d.sort_values('seed').accuracy)])
    return md(cells)

def select_table(rows):
    "One line for each candidate, on the held-out part"
    df = pd.DataFrame([r for r in rows if r['stage']=='select'])
    if not len(df): return ''
    df['label'],df['mix'] = [f'attempt: {r.attempt}' if isinstance(r.attempt, str) else r.method for r in df.itertuples()],df.mix.fillna('')
    order = [*config['methods'],*(f'attempt: {o}' for o in config['attempts'])]
    cells = [['candidate','mix','accuracy % (held-out)','mean branch %','seeds']]
    for (_,mix),d in df.groupby([df.label.map(order.index),'mix']):
        cells.append([d.label.iloc[0], mix, pct(d.accuracy), pct(d.each.map(lambda o: sum(o)/len(o))), len(d)])
    return md(cells)

def figure(rows, file):
    "Accuracy of every seed, methods from top to bottom, for both budgets"
    df = pd.DataFrame([r for r in rows if r['stage']=='final'])
    if not len(df): return
    names = [o for o in config['methods'] if o in set(df.method)][::-1]
    fig,ax = plt.subplots(figsize=(6.4,.36*len(names)+1.1), dpi=80)
    for c,dy,color in (('equal epochs',.12,'C0'),('equal compute',-.12,'C1')):
        d = df[df['compute']==c]
        if not len(d): continue
        ax.scatter(100*d.accuracy, [names.index(o)+dy for o in d.method], s=14, color=color, alpha=.6, label=c)
        mean = d.groupby('method').accuracy.mean()
        ax.scatter(100*mean, [names.index(o)+dy for o in mean.index], s=90, color=color, marker='|')
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlabel('accuracy on the official test split, %')
    ax.legend(fontsize=7)
    fig.tight_layout()
    write_whole(file, lambda p: fig.savefig(p))
    plt.close(fig)

def write_tables(setting):
    "Tables and figure of a setting, from the rows of the final runs that `config.json` and the selection ask for, and from all of the selection's"
    rows = read_rows(setting)
    seeds = range(1+max((r['seed'] for r in rows), default=0))
    wanted = {key(j) for j in final_jobs(setting, seeds, rows)}
    rows = [r for r in rows if r['stage']=='select' or key(r) in wanted]
    if not rows: return print(f'No rows yet in {here/"results"/f"{setting}.jsonl"}.')
    title,info = config['settings'][setting]['title'],{k:rows[-1][k] for k in ('versions','machine')}
    for stage,make_table,what in (('select',select_table,'candidates on the held-out fifth of train'),('final',final_table,'official test split')):
        if not (table := make_table(rows)): continue
        res = dict(title=f'{title}: {what}', command=f'python benchmarks/cekd/study.py {setting} --stage {stage} --seeds {1+max(r["seed"] for r in rows if r["stage"]==stage)}', **info, table=table, rows=f'benchmarks/cekd/results/{setting}.jsonl')
        write_whole(here.parent/'results'/f'cekd_{setting}_{stage}.json', lambda p: p.write_text(json.dumps(res, indent=1)+'\n'))
        print(table, end='\n\n')
    figure(rows, here/f'{setting}.png')

def smoke(setting, seeds, folder, rows):
    "Time one epoch of plain and of CEKD, and say what the stages would take by multiply-adds"
    s,per = config['settings'][setting],{}
    ref = next(k for k,m in config['methods'].items() if m.get('reference'))
    for name in ('plain',ref):
        m = config['methods'][name]
        j = job(setting, 'select', name, 0, m.get('mixes', [None])[0], m.get('cekd'), m['branches'])
        row = run_one(j, folder, n_epochs=1)
        per[name] = row['seconds']/(step_macs(s, j)/1e9)
        print(f"{name}: {row['seconds']:.1f} s an epoch of the held-out split, {row['gmacs_per_image']:.3f} GMAC per image and step, accuracy after it {row['accuracy']:.1%}")
    rate = sum(per.values())/2
    for stage,jobs,share in (('select',select_jobs(setting, range(seeds)),1),('final',final_jobs(setting, range(seeds), rows),1/(1-s['valid_pct']))):
        sec = sum(rate*share*step_macs(s, j)/1e9*j['epochs'] for j in jobs)
        print(f'{stage}: {len(jobs)} runs, about {sec/3600:.1f} hours in one process of one thread')

@call_parse
def main(
    setting:str, # One of the settings in config.json
    stage:str='select', # select, final, smoke (one epoch of CEKD and plain, timed, and what the stages would take) or table
    data_dir:str='.', # Folder with data and weights
    seeds:int=3,    # Number of seeds, from 0
    only:str=None,  # Only runs whose method or attempt, and epochs, contain this, e.g. 'plain, equal compute'
    hours:float=1e9, # Start no run after this time
    part:str='0/1', # Share of the runs: this process / number of processes
    threads:int=1,  # Of torch, on the CPU
):
    "Run what is missing of a stage, then write table and figure"
    if setting not in config['settings']: sys.exit(f"study: there is no setting {setting!r}; there are {', '.join(config['settings'])}.")
    torch.set_num_threads(threads)
    start,rows = time.time(),read_rows(setting)
    if stage=='table': return write_tables(setting)
    make_jobs = lambda: select_jobs(setting, range(seeds)) if stage=='select' else final_jobs(setting, range(seeds), rows)
    if stage=='smoke': return smoke(setting, seeds, data_dir, rows)
    if stage not in ('select','final'): sys.exit(f"study: the stage is {stage!r}, but it is select, final, smoke or table.")
    i,n = map(int, part.split('/'))
    jobs = [j for k,j in enumerate(o for o in make_jobs() if not only or only in f"{o['attempt'] or o['method']}, {o['compute']}") if k%n==i]
    done = {key(r) for r in rows}
    for j in jobs:
        if key(j) in done: continue
        if time.time()-start>hours*3600: return print('Out of time: start again to go on.')
        row = run_one(j, data_dir)
        add_row(setting, row)
        print(f"{j['attempt'] or j['method']}, {j['mix'] or 'no mix'}, {j['compute']}, seed {j['seed']}: {row['accuracy']:.1%} {row['seconds']:.0f} s", flush=True)
    write_tables(setting)
