"Runs that are killed and started again: every kind of data and optimiser, several fits, signals, and files that are bad."
import math,os,shutil,signal
from functools import partial
import forks,pytest,torch
from fastai.vision.all import (Adam,Callback,CrossEntropyLossFlat,DataLoaders,EarlyStoppingCallback,
    GradientAccumulation,L,OptimWrapper,RandomResizedCrop,SGD,accuracy,aug_transforms,random,set_seed)
from cekd_fastai.branches import branch_net
from cekd_fastai.cekd import CEKD
from cekd_fastai.checkpoint import Checkpoint,Resume,run_about,run_difference
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.learner import branch_learner,meal_learner
from cekd_fastai.mix.callback import CutMix,MixUp
from cekd_fastai.mix.snapmix import MixOneOf,SnapMix
from cekd_fastai.own_targets import PSKD
from cekd_fastai.soft_labels import OnlineLabelSmoothing
from cekd_fastai.core import one_sentence
from cekd_fastai.runstate import WrongState,check_layout,checkpoint_files,newest_checkpoint,read_checkpoint,write_checkpoint
from cekd_fastai.synthetic import make_birds
from cekd_fastai.train import sgd

arch = 'cifar_resnet8'
kw = dict(pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def toy():
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(12, 3, 32, 32, generator=g), torch.randint(0, 3, (12,), generator=g)))
    dls = DataLoaders.from_dsets(items, items[:4], bs=4, num_workers=0, device='cpu', shuffle=True)
    dls.c = 3
    return dls

@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    return make_birds(tmp_path_factory.mktemp('birds'), n_species=3, n_images=12, n_train=8, size=40, n_workers=0, progress=False)

class Die(Callback):
    "Ends the run before a batch, or after one with a last checkpoint"
    order,run_valid = 1500,False
    def __init__(self, epoch, batch, last=False): self.place,self.last = (epoch,batch),last
    def before_batch(self):
        if (self.learn.epoch,self.learn.iter)==self.place and not self.last: raise SystemExit(137)
    def after_batch(self):
        if (self.learn.epoch,self.learn.iter+1)==self.place and self.last: self.learn.checkpoint.signal = signal.SIGTERM

def fit(make, *cbs, seed=42, fit=lambda o: o.fit_one_cycle(4, .01)):
    "A learner after its fit, and what can be compared"
    set_seed(seed)
    learn = make()
    learn.add_cbs(cbs)
    with learn.no_bar(), learn.no_logging(): fit(learn)
    after = [torch.rand(1).item(), random.random()]
    rec = learn.recorder
    state = {k:v for k,v in learn.model.state_dict().items() if isinstance(v, torch.Tensor)}
    return learn,dict(state=state, values=[list(o) for o in rec.values], losses=[float(o) for o in rec.losses], lrs=rec.lrs, after=after)

def same(a, b):
    "Whether two runs agree bit for bit"
    a,b = dict(a),dict(b)
    s,t = a.pop('state'),b.pop('state')
    return a==b and s.keys()==t.keys() and all(torch.equal(v, t[k]) for k,v in s.items())

PLACES = [(0,1,True), (2,0,False), (2,2,True), (3,2,False)]

def killed(make, tmp, places=PLACES, **opts):
    "Kill at every place, start again, compare"
    whole = fit(make, **opts)[1]
    for i,place in enumerate(places):
        with pytest.raises(SystemExit): fit(make, Checkpoint(tmp/str(i), every=2, signals=False), Die(*place), **opts)
        assert same(whole, fit(make, Checkpoint(tmp/str(i), every=2, signals=False), seed=7, **opts)[1]), place

def test_without(tmp_path):
    "What fastai has: weights and optimiser come back, and the run is another one."
    make = lambda: branch_learner(toy(), arch, cbs=CutMix(), **kw)
    whole = fit(make)[1]
    class Half(Callback):
        def before_epoch(self):
            if self.epoch==2: raise SystemExit(self.learn.save(tmp_path/'half'))
    with pytest.raises(SystemExit): fit(make, Half())
    again = fit(make, fit=lambda o: o.load(tmp_path/'half').fit_one_cycle(4, .01, start_epoch=2))[1]
    assert not all(torch.equal(v, again['state'][k]) for k,v in whole['state'].items())

@pytest.mark.parametrize('opt', [Adam,SGD,sgd])
def test_optimisers(opt, tmp_path): killed(lambda: branch_learner(toy(), arch, cbs=[SnapMix(),CEKD(teacher='ema')], opt_func=opt, **kw), tmp_path)

TORCH = dict(adamw=torch.optim.AdamW, nesterov=partial(torch.optim.SGD, momentum=.9, nesterov=True))

@pytest.mark.parametrize('opt', TORCH)
def test_torch_optimisers(opt, tmp_path):
    "Killed and resumed is not killed, with an optimiser of torch in fastai's wrapper and rates for three groups."
    make = lambda: branch_learner(toy(), arch, cbs=CutMix(), opt_func=partial(OptimWrapper, opt=TORCH[opt]), **kw)
    killed(make, tmp_path, [(2,0,False), (2,2,True)], fit=lambda o: o.fit_one_cycle(4, [.01,.01,.02]))

DATA = dict(plain={}, balanced=dict(balanced=True), memory=dict(in_memory=True, balanced=True), crops=dict(item_tfms=RandomResizedCrop(32)),
    turned=dict(batch_tfms=aug_transforms(size=32)))
@pytest.mark.parametrize('data', DATA)
def test_loaders(data, birds, tmp_path):
    make = lambda: branch_learner(fine_grained_dls(birds, size=32, bs=8, num_workers=0, device='cpu', **DATA[data]), arch, cbs=[CutMix(prob=.5)], **kw)
    killed(make, tmp_path, PLACES[1:3])

def test_workers(birds, tmp_path):
    "With worker processes too, since they are seeded from the epoch's start."
    make = lambda: branch_learner(fine_grained_dls(birds, size=32, bs=8, num_workers=2, device='cpu'), arch, cbs=CutMix(), **kw)
    killed(make, tmp_path, [(2,2,True)])

@pytest.mark.parametrize('how', [dict(unlabeled=True), dict(cache_targets=True)])
def test_meal(how, birds, tmp_path):
    "Unlabelled images go on in the midst of their loader, stored answers at their row."
    def make():
        args = dict(unlabeled=birds) if 'unlabeled' in how else dict(cache_targets=True, cache_dir=tmp_path/'answers')
        teacher = branch_net(arch, 3, 1, pretrained=False)
        with torch.no_grad(): [p.fill_(.01) for p in teacher.parameters()]
        return meal_learner(fine_grained_dls(birds, size=32, bs=8, num_workers=0, device='cpu'), arch, [teacher.eval()], **args, **kw)
    killed(make, tmp_path, [(1,0,False), (2,2,True)])

def test_accumulated(tmp_path):
    "Gradients that wait for their step are kept."
    killed(lambda: branch_learner(toy(), arch, cbs=GradientAccumulation(8), **kw), tmp_path, [(0,1,True), (2,2,True)])

def test_several_fits(tmp_path):
    "`fine_tune` fits twice: a death in the first or the second fit."
    make,opts = lambda: branch_learner(toy(), arch, cbs=CutMix(), **kw),dict(fit=lambda o: o.fine_tune(2, .01))
    whole = fit(make, **opts)[1]
    class DieIn(Callback):
        order,run_valid = 1500,False
        def __init__(self, n): self.n,self.i = n,0
        def before_batch(self):
            self.i += 1
            if self.i==self.n: raise SystemExit
    for n in (2,5,8):
        with pytest.raises(SystemExit): fit(make, Checkpoint(tmp_path/str(n), every=1, signals=False), DieIn(n), **opts)
        again = fit(make, Checkpoint(tmp_path/str(n), every=1, signals=False), seed=7, **opts)[1]
        assert all(torch.equal(v, again['state'][k]) for k,v in whole['state'].items()), n

def test_early_end(tmp_path):
    "A run that a callback ended stays ended."
    make = lambda: branch_learner(toy(), arch, **kw)
    def run(*cbs): return fit(make, EarlyStoppingCallback('accuracy', min_delta=2.), *cbs, fit=lambda o: o.fit(9, .01))
    a = run(Checkpoint(tmp_path, signals=False))[0]
    b = run(Checkpoint(tmp_path, signals=False), Die(0,0))[0]
    assert len(a.recorder.values)==len(b.recorder.values)==2

def test_best_and_newest(tmp_path):
    "The newest are kept, and the best epoch's; what a kill within a write has left is not."
    for o in ('.checkpoint-00-0001-000000-7.ckpt','.best-7.ckpt','..can-write-7'): (tmp_path/o).write_text('')
    learn = fit(lambda: branch_learner(toy(), arch, **kw), Checkpoint(tmp_path, keep=2, signals=False))[0]
    assert [o.name for o in checkpoint_files(tmp_path)]==['checkpoint-00-0003-000000.ckpt','checkpoint-00-0004-000000.ckpt']
    best = min(range(4), key=lambda i: learn.recorder.values[i][1])
    o = read_checkpoint(tmp_path/'best.ckpt')
    assert not [o for o in tmp_path.iterdir() if o.name[0]=='.']
    assert o['epoch']==best+1 and o['best']==learn.recorder.values[best][1]==learn.checkpoint.best

@pytest.mark.parametrize('spoil', [lambda b: b[:len(b)//2], lambda b: b'', lambda b: b[:-9]+bytes([b[-9]^1])+b[-8:], lambda b: b'PK'+b,
    lambda b: b.replace(b' 1 ', b' 9 ', 1)])
def test_bad_file(spoil, tmp_path):
    "A bad newest file is named and set aside, and the one before gives the same run."
    make = lambda: branch_learner(toy(), arch, **kw)
    whole = fit(make)[1]
    with pytest.raises(SystemExit): fit(make, Checkpoint(tmp_path, signals=False), Die(3,1))
    f = checkpoint_files(tmp_path)[-1]
    f.write_bytes(spoil(f.read_bytes()))
    with pytest.warns(UserWarning, match='checkpoint-00-0003.*the one before is used'):
        again = fit(make, Checkpoint(tmp_path, signals=False), seed=7)[1]
    assert same(whole, again) and f.with_suffix('.bad').exists()

def test_by_the_clock(tmp_path):
    "A new run writes after its first batch, and again within an epoch when the newest file is too old; not when it goes on."
    make = lambda: branch_learner(toy(), arch, **kw)
    whole = fit(make)[1]
    with pytest.raises(SystemExit): fit(make, Checkpoint(tmp_path/'a', signals=False), Die(0,2))
    assert [o.name for o in checkpoint_files(tmp_path/'a')]==['checkpoint-00-0000-000001.ckpt']
    with pytest.raises(SystemExit): fit(make, Checkpoint(tmp_path/'a', signals=False), Die(0,2))
    assert len(checkpoint_files(tmp_path/'a'))==1
    assert same(whole, fit(make, Checkpoint(tmp_path/'a', signals=False), seed=7)[1])
    with pytest.raises(SystemExit): fit(make, Checkpoint(tmp_path/'b', minutes=1e-9, signals=False), Die(1,2))
    assert checkpoint_files(tmp_path/'b')[-1].name=='checkpoint-00-0001-000002.ckpt'
    with pytest.raises(SystemExit): fit(make, Checkpoint(tmp_path/'c', minutes=0, signals=False), Die(0,2))
    assert not checkpoint_files(tmp_path/'c')

# Files whose checksum is right and whose contents are not

def _place(state, path):
    "What holds the place `path`, and the key there; `next` is the first key"
    for k in path[:-1]: state = state[k]
    return state,next(iter(state)) if path[-1] is next else path[-1]

def put(*path, to):
    "A change to a state: another value at a place"
    def change(state):
        o,k = _place(state, path)
        o[k] = to
    return change

def drop(*path):
    "A change to a state: nothing at a place"
    def change(state):
        o,k = _place(state, path)
        del o[k]
    return change

PLACE = [drop('fit'), put('epoch', to='1'), put('batch', to=-1), put('best', to={}), drop('best'), drop('start'), put('start', to=torch.ones(3)), put('now', to=True), put('net', to={}),
    drop('net','notes'), put('net','opt', to=[]), put('about', to=3), drop('about','args'), put('others', to=None)]
INSIDE = [put('net','model',next, to=3), drop('net','model',next), put('net','grads',0, to=[1]), put('net','grads',0, to=torch.ones(7)),
    put('net','opt','state',0, to=3), put('net','opt','state',0,'grad_avg', to=0), put('net','opt','state',0,'grad_avg', to=torch.ones(2,2)), put('net','opt','hypers', to=[]),
    drop('net','opt','hypers',0,'lr'), put('net','opt','hypers',0,'lr', to='x'), put('net','opt','hypers',0,'sqr_mom', to=True), put('net','opt','hypers',0,'lr', to=math.inf), put('net','opt','state',0,'step', to=-1), put('now','rng', to={}), put('now','rng','numpy_state', to='x'), put('now','rng','random_state', to=(1,2)),
    drop('now','cbs','ParamScheduler:0','attrs','hps','lr'), put('now','cbs','ParamScheduler:0','attrs','hps', to=7), put('now','cbs','Recorder:0', to=0),
    put('now','cbs','Recorder:0','attrs','losses', to='x'), put('now','cbs','Recorder:0','attrs','losses', to=None),
    *(put('now','cbs','Recorder:0','parts','smooth_loss',k, to=v) for k,v in (('count',None),('val',.5))),
    put('now','learn','train_iter', to='x'), put('now','learn','pct_train', to=math.inf), put('now','learn','model', to=1), put('now','metrics', to=[]),
    put('start','loaders', to=[7]), put('start','loaders',0,'rng', to=(1,)), put('start','rng', to={})]

@pytest.fixture(scope='module')
def file_of_a_run(tmp_path_factory):
    "A checkpoint from within the second epoch"
    tmp = tmp_path_factory.mktemp('run')
    with pytest.raises(SystemExit): fit(small, Checkpoint(tmp, every=1, signals=False), Die(1,2))
    return checkpoint_files(tmp)[-1]

def small(): return branch_learner(toy(), arch, 1, **kw)

@pytest.mark.parametrize('change', PLACE)
def test_other_contents(change, file_of_a_run, tmp_path):
    "A file that is no run is named and set aside, like a damaged one."
    state = read_checkpoint(file_of_a_run)
    change(state)
    write_checkpoint(f := tmp_path/file_of_a_run.name, state)
    with pytest.warns(UserWarning, match=f'{f.name}` was not written by `Checkpoint` .*the one before is used'):
        assert newest_checkpoint(tmp_path, check=check_layout) is None

@pytest.mark.parametrize('change', INSIDE)
def test_other_contents_inside(change, file_of_a_run, tmp_path):
    "Contents that do not fit the run are an error in one sentence, before the first batch."
    state = read_checkpoint(file_of_a_run)
    change(state)
    write_checkpoint(tmp_path/file_of_a_run.name, state)
    class Never(Callback):
        order,run_valid = 1900,False
        def after_pred(self): raise AssertionError('a batch was trained on')
    with pytest.raises(WrongState) as e: fit(small, Checkpoint(tmp_path, signals=False), Never())
    assert one_sentence(e.value).startswith('The checkpoint ') and one_sentence(e.value).endswith('choose another folder.')

def test_file_runs_nothing(tmp_path):
    "A pickle in the place of a checkpoint is not opened."
    import pickle
    class Evil:
        def __reduce__(self): return os.system,(f'touch {tmp_path}/ran',)
    (tmp_path/'checkpoint-00-0001-000000.ckpt').write_bytes(pickle.dumps(Evil()))
    with pytest.warns(UserWarning, match='no checkpoint of this library'): assert newest_checkpoint(tmp_path) is None
    assert not (tmp_path/'ran').exists()

def test_other_run(tmp_path):
    "Another run is refused by naming what differs."
    fit(lambda: branch_learner(toy(), arch, **kw), Checkpoint(tmp_path, signals=False))
    for change,what in ((dict(fit=lambda o: o.fit_one_cycle(5, .01)),'epochs was 4 and is 5'), (dict(fit=lambda o: o.fit(4, .02)),'rates was')):
        with pytest.raises(ValueError, match=what): fit(lambda: branch_learner(toy(), arch, **kw), Checkpoint(tmp_path, signals=False), **change)
    with pytest.raises(ValueError, match='`CutMix` was None'):
        fit(lambda: branch_learner(toy(), arch, cbs=CutMix(), **kw), Checkpoint(tmp_path, signals=False))

@pytest.mark.parametrize('cb,others', [(lambda: [PSKD(.5)], {"`PSKD` was .*'alpha': 0.5":lambda: [PSKD()], '`OnlineLabelSmoothing` was None':lambda: [OnlineLabelSmoothing()], '`PSKD` was':list}),
    (lambda: [CutMix(1.)], {"`CutMix` was .*'alpha': 1.0":lambda: [CutMix(3.)], "`CutMix` was .*'prob': 1.0":lambda: [CutMix(prob=.5)]}),
    (lambda: [CutMix(),CEKD()], {"`CEKD` was .*'w_cross': 1.0":lambda: [CutMix(),CEKD(w_cross=2.)], "`CEKD` was .*'teacher'":lambda: [CutMix(),CEKD(teacher='ema')]})])
def test_other_arguments_are_another_run(tmp_path, cb, others):
    "Of a mix, a distillation or soft labels"
    def go_on(cbs): return fit(lambda: branch_learner(toy(), arch, cbs=cbs(), **kw), Checkpoint(tmp_path, signals=False))
    go_on(cb)
    for what,other in others.items():
        with pytest.raises(ValueError, match=what): go_on(other)
    go_on(cb)

def test_full_disk(tmp_path, monkeypatch):
    "A disk that fills up costs a checkpoint, not the run; one that is full is said before the first step."
    import cekd_fastai.checkpoint as room
    make = lambda: branch_learner(toy(), arch, **kw)
    whole = fit(make)[1]
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(room, 'write_checkpoint', full)
        with pytest.warns(UserWarning, match='No space left on device.*training goes on'): assert same(whole, fit(make, Checkpoint(tmp_path/'a', signals=False))[1])
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda p: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(OSError, match='0.0 GiB free'): fit(make, Checkpoint(tmp_path/'b', signals=False))
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match='cannot be written to'): fit(make, Checkpoint(tmp_path/'file'/'c', signals=False))

def test_leaves_others_alone(tmp_path):
    "Predictions, validation and the search for a rate neither read nor write; an export leaves the state out."
    learn = branch_learner(toy(), arch, cbs=Checkpoint(tmp_path/'c', signals=False), path=tmp_path, **kw)
    with learn.no_bar(), learn.no_logging():
        learn.validate(), learn.get_preds(), learn.lr_find(num_it=6, show_plot=False)
        assert not (tmp_path/'c').exists() and not any(isinstance(o, Resume) for o in learn.cbs)
        learn.fit(1, .01)
        learn.fit(1, .01)
    assert learn.checkpoint.fit_no==2 and checkpoint_files(tmp_path/'c')[-1].name=='checkpoint-01-0001-000000.ckpt'
    assert not any(isinstance(o, Resume) for o in learn.cbs)

PROGRAM = """
import os,signal,sys,torch
from fastai.vision.all import *
from cekd_fastai.checkpoint import Checkpoint
from cekd_fastai.learner import branch_learner
from cekd_fastai.mix.callback import CutMix,MixUp
folder,what = sys.argv[1],sys.argv[2]
class Act(Callback):
    run_valid = False
    def before_batch(self):
        if (self.epoch,self.iter)!=(1,1): return
        for n in what.split('+'): os.kill(os.getpid(), int(n))
set_seed(0)
items = L(zip(torch.randn(12, 3, 16, 16), torch.randint(0, 3, (12,))))
dls = DataLoaders.from_dsets(items, items[:4], bs=4, device='cpu', num_workers=0)
dls.c = 3
learn = branch_learner(dls, 'cifar_resnet8', pretrained=False, loss_func=CrossEntropyLossFlat(), cbs=[CutMix(),Checkpoint(folder),*[Act()]*(what!='0')])
try:
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
except KeyboardInterrupt: sys.exit(130)
print(sum(float(p.double().sum()) for p in learn.model.parameters()))
"""

def test_signals(tmp_path):
    "Each signal writes a checkpoint and leaves with its code, a second one leaves at once; `kill -9` at any moment costs no more than what came after the newest file."
    def run(folder, what): return forks.run(PROGRAM, tmp_path/folder, what)
    whole = run('whole', '0')
    assert whole.returncode==0, whole.stderr
    for n,code in ((15,143), (1,129), (2,130), (9,-9)):
        res = run(str(n), str(n))
        assert res.returncode==code, (n, res.stderr)
        names = [o.name for o in checkpoint_files(tmp_path/str(n))]
        assert names[-1]==('checkpoint-00-0001-000000.ckpt' if n==9 else 'checkpoint-00-0001-000002.ckpt')
        assert run(str(n), '0').stdout==whole.stdout
    res = run('twice', '2+2')
    assert res.returncode==130 and checkpoint_files(tmp_path/'twice')[-1].name=='checkpoint-00-0001-000000.ckpt'

def test_parts_of_arguments_are_another_run(tmp_path):
    "The mixes of a choice, the folder of unlabelled pictures, the weights of a teacher, and what a subclass passes on"
    class Own(CEKD):
        def __init__(self, mine=1, **kwargs):
            super().__init__(**kwargs)
            self.mine = mine
    def net(seed):
        set_seed(seed)
        return branch_net(arch, 3, 1, pretrained=False).eval()
    def about(*cbs):
        learn = branch_learner(toy(), arch, cbs=cbs, **kw)
        learn.create_opt()
        learn.n_epoch = 1
        return run_about(learn)
    def differs(a, b): return run_difference(about(*a), about(*b))
    def one_of(alpha): return [MixOneOf([MixUp(alpha),CutMix()])]
    assert differs(one_of(.4), one_of(9.)) and not differs(one_of(.4), one_of(.4))
    assert differs([CutMix(),Own(T=3.)], [CutMix(),Own(T=5.)]) and not differs([CutMix(),Own(2)], [CutMix(),Own(2)])
    def taught(n):
        learn = meal_learner(toy(), arch, [net(n)], 1, **kw)
        learn.create_opt()
        learn.n_epoch = 1
        return run_about(learn)
    assert run_difference(taught(1), taught(2)) and not run_difference(taught(1), taught(1))

def test_a_checkpoint_of_an_older_version_goes_on():
    "Whose callbacks had no arguments in it"
    new = {'epochs':4, 'args':{}, '`CutMix`':dict(alpha=1.), '`CEKD`':dict(T=3.)}
    assert not run_difference(new|{'`CutMix`':{}, '`CEKD`':{}}, new)
    assert len(run_difference({k:v for k,v in new.items() if k!='`CEKD`'}, new))==1
