"""Which runs of the long studies may train by CUDA graphs: two epochs of each, by graphs and step by step.

    python benchmarks/cekd/graph_check.py BUNDLE
    python benchmarks/cekd/graph_check.py BUNDLE --held # what holding the momentum within an epoch does by itself, on a CPU too

Each run trains twice step by step, which shows what chance does, and once by graphs, with the momentum that graphs have in all three.
`BUNDLE/graphed_STUDY.json` then has how far apart their weights are, as shares of the way from the start, and the seconds of an epoch;
`birds.py run` reads it. Teachers are random here: they cost as much as others."""
import json,math,tempfile,time,traceback
from pathlib import Path
import torch
from fastai.basics import CancelFitException
from fastcore.script import call_parse
from cekd_fastai.all import branch_net
from birds_bundle import decode_each
from birds_plan import job,read_config
import birds_train,long_train
from birds_train import Lean
from graphed import HeldMomentum,fit_graphed,repeats

class Short(Lean):
    "An end after some epochs; the seconds of the last"
    def __init__(self, n):
        super().__init__(math.inf)
        self.n = n

    def before_epoch(self):
        if self.epoch==self.n: raise CancelFitException
        wait()
        self.begin = time.time()
    def after_epoch(self):
        wait()
        self.seconds = time.time()-self.begin

def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()

def begun(bench, j, graphed=False, held=True, epochs=2):
    "How far the weights of a run move in its first epochs, and seconds of the last of these"
    dls,_ = bench.loaders(j)
    learn,short = bench.learner(j, dls),Short(epochs)
    flat = lambda: torch.cat([o.detach().flatten().float() for o in learn.model.parameters()])
    start = flat()
    fit = lambda: bench.fit_job(learn, j, [short]+[HeldMomentum()]*(held and not graphed))
    if graphed: fit_graphed(learn, fit)
    else: fit()
    return flat()-start,short.seconds

def distance(a, b): return ((a-b).norm()/a.norm()).item()

def check_row(bench, j):
    "Twice step by step and once by graphs: how far apart the three are, as shares of the way"
    (a,slow),(b,_),(g,fast) = (begun(bench, j, o) for o in (False,False,True))
    chance,apart = distance(a, b),distance(a, g)
    return dict(ok=apart<1.5*chance+.02, chance=round(chance, 5), apart=round(apart, 5), seconds=[round(slow, 2),round(fast, 2)])

def held_row(bench, j):
    "Step by step, with momentum that moves and with held momentum"
    a,b = (begun(bench, j, held=o)[0] for o in (False,True))
    return dict(held=round(distance(a, b), 5))

def random_teachers(bench):
    "Teachers that know nothing, which cost as much as others"
    n = int(bench.label.max())+1
    return [branch_net(o['arch'], n, 1, pretrained=False, **(o.get('args') or {})).to(bench.device) for o in bench.c['teachers'].values()]

def work_of(j):
    "What a step does, whatever the labels are"
    args = {k:o for k,o in j['args'].items() if k not in ('wrong','labelled')}
    return json.dumps([j['branches'],j['methods'],args], sort_keys=True)

def tried(check, bench, j):
    try: return check(bench, j)
    except Exception as e:
        traceback.print_exc()
        return dict(ok=False, error=f'{type(e).__name__}: {str(e)[:300]}')

def check_study(c, data, bundle, check, file, rows):
    trainer = long_train if c.get('trainer')=='long_train' else birds_train
    bench,res = trainer.Bench(bundle, *data, c, 'cuda' if torch.cuda.is_available() else 'cpu'),{}
    bench.layout,bench.weights,bench.teachers = 'channels_last',None,lambda j: random_teachers(bench)
    lr,target = (c['select'][o]['options'][0] for o in ('lr','target'))
    alike = {}
    for name in rows or c['rows']:
        j = job(c, 'final', name, 0, 'equal compute', c['epochs']['to'], lr, target)
        if not repeats(j): continue
        kind = work_of(j)
        if kind in alike: res[name] = res[alike[kind]]|dict(checked=alike[kind])
        else: res[name],alike[kind] = tried(check, bench, j),name
        print(c['name'], name, res[name], flush=True)
        file.write_text(json.dumps(res, indent=1))

@call_parse
def main(
    bundle:Path,        # Folder with pictures
    config:str='long',  # Studies, as for `birds.py`
    studies:str='',     # Only these, separated by commas
    rows:str='',        # Only these runs, separated by semicolons
    held:bool=False,    # Compare held momentum with momentum that moves, step by step, instead
):
    "Compare training by graphs with training step by step, and write which runs may use it"
    c = read_config(config)
    chosen = {k:o for k,o in c['studies'].items() if not studies or k in studies.split(',')}
    with tempfile.TemporaryDirectory() as tmp:
        data = decode_each(dict(studies=chosen), bundle, Path(tmp))
        check,kind = (held_row,'held') if held else (check_row,'graphed')
        for k,o in chosen.items(): check_study(o, data[k], bundle, check, bundle/f'{kind}_{k}.json', rows.split(';') if rows else None)
