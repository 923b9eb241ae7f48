"""Which runs of the long studies may train by CUDA graphs: two epochs of each, by graphs and step by step.

    python benchmarks/cekd/graph_check.py BUNDLE

Each run trains twice step by step, which shows what chance does, and once by graphs. `BUNDLE/graphed_STUDY.json` then has how far
apart their weights are, as shares of the way from the start, and the seconds of an epoch; `birds.py run` reads it. Teachers are random
here: they cost as much as others."""
import json,math,tempfile,time,traceback
from pathlib import Path
import torch
from fastai.basics import CancelFitException
from fastcore.script import call_parse
from cekd_fastai.all import branch_net
from birds import decode_each,job,read_config
import birds_train,long_train
from birds_train import Lean
from graphed import fit_graphed,repeats

class Short(Lean):
    "An end after some epochs; the seconds of the last"
    def __init__(self, n):
        super().__init__(math.inf)
        self.n = n

    def before_epoch(self):
        if self.epoch==self.n: raise CancelFitException
        torch.cuda.synchronize()
        self.begin = time.time()
    def after_epoch(self):
        torch.cuda.synchronize()
        self.seconds = time.time()-self.begin

def begun(bench, j, graphed, epochs=2):
    "How far the weights of a run move in its first epochs, and seconds of the last of these"
    dls,_ = bench.loaders(j)
    learn,short = bench.learner(j, dls),Short(epochs)
    flat = lambda: torch.cat([o.detach().flatten().float() for o in learn.model.parameters()])
    start = flat()
    fit = lambda: bench.fit_job(learn, j, [short])
    if graphed: fit_graphed(learn, fit)
    else: fit()
    return flat()-start,short.seconds

def check_row(bench, j):
    "Twice step by step and once by graphs: how far apart the three are, as shares of the way"
    (a,slow),(b,_),(g,fast) = (begun(bench, j, o) for o in (False,False,True))
    chance,apart = (((a-o).norm()/a.norm()).item() for o in (b,g))
    return dict(ok=apart<max(3*chance, .02), chance=round(chance, 5), apart=round(apart, 5), seconds=[round(slow, 2),round(fast, 2)])

def random_teachers(bench):
    "Teachers that know nothing, which cost as much as others"
    n = int(bench.label.max())+1
    return [branch_net(o['arch'], n, 1, pretrained=False, **(o.get('args') or {})).to(bench.device) for o in bench.c['teachers'].values()]

def work_of(j):
    "What a step does, whatever the labels are"
    args = {k:o for k,o in j['args'].items() if k not in ('wrong','labelled')}
    return json.dumps([j['branches'],j['methods'],args], sort_keys=True)

def tried(bench, j):
    try: return check_row(bench, j)
    except Exception as e:
        traceback.print_exc()
        return dict(ok=False, error=f'{type(e).__name__}: {str(e)[:300]}')

def check_study(c, data, bundle):
    trainer = long_train if c.get('trainer')=='long_train' else birds_train
    bench,res = trainer.Bench(bundle, *data, c, 'cuda'),{}
    bench.layout,bench.weights,bench.teachers = 'channels_last',None,lambda j: random_teachers(bench)
    lr,target = (c['select'][o]['options'][0] for o in ('lr','target'))
    alike,file = {},bundle/f"graphed_{c['name']}.json"
    for name in c['rows']:
        j = job(c, 'final', name, 0, 'equal compute', c['epochs']['to'], lr, target)
        if not repeats(j): continue
        kind = work_of(j)
        if kind in alike: res[name] = res[alike[kind]]|dict(checked=alike[kind])
        else: res[name],alike[kind] = tried(bench, j),name
        print(c['name'], name, res[name], flush=True)
        file.write_text(json.dumps(res, indent=1))

@call_parse
def main(
    bundle:Path,        # Folder with pictures
    config:str='long',  # Studies, as for `birds.py`
    studies:str='',     # Only these, separated by commas
):
    "Compare training by graphs with training step by step, and write which runs may use it"
    c = read_config(config)
    chosen = {k:o for k,o in c['studies'].items() if not studies or k in studies.split(',')}
    with tempfile.TemporaryDirectory() as tmp:
        data = decode_each(dict(studies=chosen), bundle, Path(tmp))
        for k,o in chosen.items(): check_study(o, data[k], bundle)
