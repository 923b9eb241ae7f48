"""Kill every method with every mix at an epoch's border and within an epoch, start it again, and compare with a run
that was not killed: weights, history, predictions and the random numbers that come next, bit for bit.

    PYTHONPATH=$PWD .venv/bin/python tools/same_resumed.py
    PYTHONPATH=$PWD .venv/bin/python tools/same_resumed.py cekd/ meal/

The cases are those of `same_results.py` that train a learner. Words choose the cases whose names contain one of them.
A run is stopped as by SIGTERM, or as by `kill -9`, where the newest file is older than the moment of death. The second
start has another seed, so that whatever was not written down shows. Exits with 1 if any run differs."""
import same_results as same
from same_results import *
from cekd_fastai.checkpoint import Checkpoint

# Epoch and batch of the death, and whether the run may write a last checkpoint
DEATHS = [(1,0,True), (1,2,True), (0,1,True), (1,2,False)]
places = [o for o in DEATHS]

class Die(Callback):
    "Ends a run at a given place"
    order,run_valid = 1500,False
    def __init__(self, epoch, batch, warned): store_attr()
    def here(self, epoch, batch): return (epoch,batch)==(self.epoch,self.batch)
    def end(self):
        if not self.warned: raise SystemExit(137)
        self.learn.checkpoint.signal = 15
    def before_batch(self):
        if self.here(self.learn.epoch, self.learn.iter) and not self.batch: raise SystemExit(137)
    def after_batch(self):
        if self.here(self.learn.epoch, self.learn.iter+1): self.end()

def trained(learn, cbs, fit):
    "Everything that can be compared after a run"
    learn.add_cbs(cbs)
    quiet(learn, fit)
    learn.remove_cbs(cbs)
    rec = learn.recorder
    parts = dict(columns=list(rec.values), losses=rec.losses, rates=rec.lrs, hps=getattr(rec, 'hps', {}))
    parts |= dict(weights=weights(learn.model), optimiser=learn.opt.state_dict())
    parts |= dict(random=[torch.rand(1), random.random(), np.random.rand()])
    return parts | dict(predictions=quiet(learn, lambda o: o.get_preds(dl=o.dls.valid)[0]))

def run_with(f, seed, *cbs):
    "The case `f` with callbacks of ours, at least two epochs"
    def outcome(learn, n=1, fit=None): return trained(learn, cbs, fit or (lambda o: o.fit(max(n, 2), .05)))
    set_seed(seed)
    with patched.object(same, 'outcome', outcome): return f()

def without_resume(f):
    "The case as it is, None if it trains in a way of its own"
    called = []
    def outcome(learn, n=1, fit=None): called.append(1)
    with patched.object(same, 'outcome', outcome): f()
    return called

def differences(old, new):
    "Names of the parts that differ"
    return [k for k in old if summary(old[k])['sha']!=summary(new[k])['sha']]

def check(f):
    "What differs after each death"
    whole = run_with(f, 42)
    for epoch,batch,warned in places:
        with tempfile.TemporaryDirectory() as d:
            try: run_with(f, 42, Checkpoint(d, signals=False), Die(epoch, batch, warned))
            except SystemExit: pass
            else: yield f'it did not die at {epoch}, {batch}'
            diff = differences(whole, run_with(f, 7, Checkpoint(d, signals=False)))
        if diff: yield f'epoch {epoch}, batch {batch}, {"warned" if warned else "killed"}: {", ".join(diff)}'

def main(words):
    names = [k for k in CASES if not words or any(w in k for w in words)]
    same.noise.__defaults__ = (3*bs,)+same.noise.__defaults__[1:]
    bad,n,start = 0,0,time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        same.root = Path(tmp)
        for k in names:
            try: trains = k.split('/')[0] not in ('data','command','maps','use') and without_resume(CASES[k])
            except Exception: trains = False
            if not trains: continue
            n += 1
            try: found = list(check(CASES[k]))
            except Exception as e: found = [f'{type(e).__name__}: {e}']
            if found: print(f'{k}:', '; '.join(found), flush=True)
            bad += bool(found)
    print(f'{n-bad} of {n} cases are the same after {len(places)} deaths each, in {time.perf_counter()-start:.0f} s')
    return int(bool(bad))

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
