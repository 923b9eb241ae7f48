"What the benchmark scripts share: runs of `cekd-train` collected in one result file that a second start resumes."
import inspect,json,re
from pathlib import Path
import pandas as pd
from cekd_fastai.cli import cekd_train,run
from cekd_fastai.core import write_whole
from cekd_fastai.train import about

here = Path(__file__).resolve().parent
defaults = {k:p.default for k,p in inspect.signature(cekd_train.__wrapped__).parameters.items()}

def collect(
    name,    # of the result file, in benchmarks/results
    labels,  # {label of a method: arguments of `cekd_train` that differ from `common`}
    common,  # arguments of every run, as for `cekd_train`
    seeds,   # seeds of each method
    command, # how this benchmark is started
    title,   # of its table
    hide=(), # arguments that say where files lie on this machine; recorded without their folder
):
    "Run every method with every seed, one row a run; rows that the result file already has are not run again."
    out = here/'results'/f'{name}.json'
    rows = json.loads(out.read_text())['runs'] if out.exists() else []
    for seed in seeds:
        for label,kw in labels.items():
            args = defaults | common | kw | dict(seed=seed, force=True)
            said = {k:(Path(v).name if k in hide else v) for k,v in args.items() if k not in ('out','force') and v!=defaults[k]}
            if any(r['method']==label and r['seed']==seed and r['args']==json.loads(json.dumps(said)) for r in rows): continue
            print(f'{label}, seed {seed}', flush=True)
            res = run(args | dict(out=str(here.parent/'runs'/name/f'{label.replace(" ", "")}-{seed}')))
            keep = {k:res[k] for k in ('accuracy','branches','valid_loss','seconds','images_per_s','peak_memory_gb')}
            rows = [r for r in rows if (r['method'],r['seed'])!=(label,seed)] + [dict(method=label, seed=seed, **keep, args=said)]
            out.parent.mkdir(exist_ok=True)
            info = about({})
            write_whole(out, lambda p: p.write_text(json.dumps(dict(title=title, command=command, versions=info['versions'], machine=info['machine'], runs=rows), indent=1)+'\n'))
    return [r for r in rows if r['method'] in labels and r['seed'] in seeds]

def table(rows, seconds=False):
    "Accuracy of each method over its seeds as a markdown table, with the seconds of a run where nothing else was running"
    df = pd.DataFrame(rows)
    df['single'] = df.branches.map(lambda o: sum(o)/len(o))
    g = df.groupby('method', sort=False)
    pct = lambda s: f'{100*s.mean():.1f}' + (f' ± {100*s.std():.1f}' if len(s)>1 else '')
    cells = [['method','accuracy %','mean branch %','each run %']+['seconds']*seconds]
    for m,d in g: cells.append([m, pct(d.accuracy), pct(d.single), ', '.join(f'{100*a:.1f}' for a in d.accuracy)] + [f'{d.seconds.mean():.0f}']*seconds)
    cells.insert(1, ['---']*len(cells[0]))
    return '\n'.join(f"| {' | '.join(o)} |" for o in cells)

def status(key):
    "A line of this process's status on Linux, such as `VmRSS` or the peak `VmHWM`, in GiB"
    return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/2**20

def result_table(
    name,    # Of a result file, in benchmarks/results
    only=(), # Keep the rows that begin with one of these words
    having='', # Keep the rows that hold this text
    cols=(), # Keep these columns
):
    "The table of a committed result file, with the command and machine that it came from"
    out = here/'results'/f'{name}.json'
    if not out.exists(): return f'(no `benchmarks/results/{name}.json` yet)'
    res = json.loads(out.read_text())
    where = f"{res['machine']['cores']} CPU cores, torch {res['versions']['torch']}"
    head,rule,*rows = (res['table'] if 'table' in res else table(res['runs'])).split('\n')
    if only: rows = [o for o in rows if o.startswith(tuple(f'| {k}' for k in only))]
    rows = [o for o in rows if having in o]
    names = [o.strip() for o in head.strip('|').split('|')]
    idxs = [names.index(o) for o in cols or names]
    head,rule,*rows = ('|'+'|'.join(o.strip('|').split('|')[i] for i in idxs)+'|' for o in (head,rule,*rows))
    return f"**{res['title']}** (`{res['command']}`, {where})\n\n" + '\n'.join([head,rule,*rows])
