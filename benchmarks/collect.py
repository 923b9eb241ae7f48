"Runs of `cekd-train` collected in one result file that a second start resumes."
import inspect,json
from pathlib import Path
from cekd_fastai.cli import cekd_train
from cekd_fastai.job import run
from cekd_fastai.core import write_whole
from cekd_fastai.results import about
from common import here

# Runs are compared with those recorded before the command smoothed labels and kept statistics by itself
defaults = {k:p.default for k,p in inspect.signature(cekd_train).parameters.items()} | dict(freeze_bn=False, label_smoothing=0.)

# Names that arguments of a method have had since runs were recorded
RENAMED = dict(cekd=dict(alpha='w_cross', beta='w_clean'))

def today(args):
    "The recorded arguments of a run, with the names that they have now"
    if 'method_args' not in args: return args
    names = RENAMED.get(args.get('method', defaults['method']), {})
    pairs = [o.split('=', 1) for o in args['method_args']]
    return args | dict(method_args=[f'{names.get(k, k)}={v}' for k,v in pairs])

def collect(
    name,    # of the result file, in benchmarks/results
    labels,  # {label of a method: arguments of `cekd_train` that differ from `common`}
    common,  # arguments of every run, as for `cekd_train`
    seeds,   # seeds of each method
    command, # how this benchmark is started
    title,   # of its table
    hide=(), # arguments that say where files lie on this machine; recorded without their folder
    run=run, # trains by arguments, and returns what `result.json` holds
    table=None, # of the rows, as text, where it is not that of `common`
):
    "Run every method with every seed, one row a run; rows that the result file already has are not run again."
    out = here/'results'/f'{name}.json'
    rows = json.loads(out.read_text())['runs'] if out.exists() else []
    for seed in seeds:
        for label,kw in labels.items():
            args = defaults | common | kw | dict(seed=seed, force=True)
            said = {k:(Path(v).name if k in hide else v) for k,v in args.items() if k not in ('out','force') and v!=defaults[k]}
            if any(r['method']==label and r['seed']==seed and today(r['args'])==json.loads(json.dumps(said)) for r in rows): continue
            print(f'{label}, seed {seed}', flush=True)
            res = run(args | dict(out=str(here.parent/'runs'/name/f'{label.replace(" ", "")}-{seed}')))
            keep = {k:res[k] for k in ('accuracy','train','branches','valid_loss','seconds','images_per_s','peak_memory_gb') if k in res}
            rows = [r for r in rows if (r['method'],r['seed'])!=(label,seed)] + [dict(method=label, seed=seed, **keep, args=said)]
            out.parent.mkdir(exist_ok=True)
            info = about({})
            res = dict(title=title, command=command, versions=info['versions'], machine=info['machine'])
            if table: res['table'] = table(rows)
            write_whole(out, lambda p: p.write_text(json.dumps(res | dict(runs=rows), indent=1)+'\n'))
    return [r for r in rows if r['method'] in labels and r['seed'] in seeds]
