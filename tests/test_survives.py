"What a run outlives: the end of a terminal, signals at any moment, other machines, and a second start that is not the same."
import json,os,shutil,signal,warnings
from pathlib import Path
from types import SimpleNamespace
import forks,pytest,torch
from fastai.vision.all import (Callback,CategoryBlock,CrossEntropyLossFlat,DataBlock,DataLoaders,GradientAccumulation,GradientClip,ImageBlock,
    L,Learner,Resize,SGD,ShortEpochCallback,accuracy,defaults,get_image_files,parent_label,set_seed)
import cekd_fastai.checkpoint as room,cekd_fastai.safely as safely
from cekd_fastai.checkpoint import Checkpoint,run_difference
from cekd_fastai.cli import cekd_train,given
from cekd_fastai.learner import branch_learner
from cekd_fastai.ranks import SIGNALS
from cekd_fastai.results import about
from cekd_fastai.runstate import checkpoint_files,load_start_state,read_checkpoint,start_state
from cekd_fastai.soft_labels import OnlineLabelSmoothing
from cekd_fastai.synthetic import make_birds

def toy():
    "Four batches to train on, and two to validate"
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(16, 3, 32, 32, generator=g), torch.randint(0, 3, (16,), generator=g)))
    dls = DataLoaders.from_dsets(items, items[:8], bs=4, num_workers=0, device='cpu', shuffle=True)
    dls.c = 3
    return dls

def make(*cbs): return branch_learner(toy(), 'test_resnet', 1, pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs)

def fit(*cbs, seed=42, n=3):
    "A learner after its fit, and all that can be compared"
    set_seed(seed)
    learn = make(*cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, .01)
    soft = [v for m in learn.model.modules() for v in getattr(m, 'tensors', {}).values()]
    state = [v for v in learn.model.state_dict().values() if isinstance(v, torch.Tensor)]
    rec = learn.recorder
    return learn,[*state,*soft],[[list(o) for o in rec.values],[float(o) for o in rec.losses],rec.lrs,torch.rand(1).item()]

def same(a, b): return a[2]==b[2] and len(a[1])==len(b[1]) and all(torch.equal(u, v) for u,v in zip(a[1], b[1]))

class Signal(Callback):
    "SIGTERM within the validation of the second epoch, or before a batch of it"
    def __init__(self, valid=True): self.valid = valid
    def before_batch(self):
        if self.learn.epoch==1 and self.learn.training!=self.valid and self.learn.iter==0: self.learn.checkpoint.signal = signal.SIGTERM

@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    return make_birds(tmp_path_factory.mktemp('birds'), n_species=3, n_images=8, n_train=6, size=40, n_workers=0, progress=False)

# Killed in the validation

METHODS = dict(plain=list, soft=lambda: [OnlineLabelSmoothing()], short=lambda: [OnlineLabelSmoothing(),ShortEpochCallback(.5, short_valid=False)])

@pytest.mark.parametrize('every', [0,2])
@pytest.mark.parametrize('method', METHODS)
def test_killed_in_validation(method, every, tmp_path):
    "What callbacks do at the end of training is not done twice, whether the epoch was whole or cut short."
    cbs = METHODS[method]
    whole = fit(*cbs())
    with pytest.raises(SystemExit) as e: fit(*cbs(), Checkpoint(tmp_path, every=every, signals=False), Signal())
    state = read_checkpoint(checkpoint_files(tmp_path)[-1])
    assert e.value.code==143 and state['over'] and state['epoch']==1
    assert same(whole, fit(*cbs(), Checkpoint(tmp_path, every=every, signals=False), seed=7))

def test_a_validation_within_a_batch_is_no_end(tmp_path):
    "A signal that comes while a callback validates waits for the end of its batch."
    class Within(Callback):
        order = 70
        def after_batch(self):
            if not self.learn.training or (self.learn.epoch,self.learn.iter)!=(1,2): return
            with self.learn.aside(): self.learn.validate()
    whole = fit(Within())
    with pytest.raises(SystemExit): fit(Within(), Checkpoint(tmp_path, every=2, signals=False), Heard())
    assert checkpoint_files(tmp_path)[-1].name=='checkpoint-00-0001-000003.ckpt'
    assert same(whole, fit(Within(), Checkpoint(tmp_path, every=2, signals=False), seed=7))

class Heard(Callback):
    "SIGTERM within a validation of the second epoch"
    def before_batch(self):
        if self.learn.epoch==1 and not self.learn.training: self.learn.checkpoint.signal = signal.SIGTERM

def test_nobody_is_left_asleep(tmp_path):
    "An error while a checkpoint is being passed leaves the learner as it was."
    with pytest.raises(SystemExit): fit(Checkpoint(tmp_path, signals=False), Signal())
    learn = make(Checkpoint(tmp_path, signals=False))
    def fails(*args): raise KeyboardInterrupt
    learn.dls.train.after_batch = fails
    with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit_one_cycle(3, .01)
    assert all(cb.run for cb in learn.cbs)

def test_old_files_of_a_validation_go_on(tmp_path):
    "They do not say whether training is over; what they hold is as good as it was."
    with pytest.raises(SystemExit): fit(Checkpoint(tmp_path, every=2, signals=False), Signal(valid=False))
    file = checkpoint_files(tmp_path)[-1]
    state = read_checkpoint(file)
    del state['over']
    room.write_checkpoint(file, state)
    assert same(fit(), fit(Checkpoint(tmp_path, every=2, signals=False), seed=7))

# Signals that are ignored

PROGRAM = """
import os,signal,sys,torch
from fastai.vision.all import *
from cekd_fastai.checkpoint import Checkpoint,run_difference
from cekd_fastai.learner import branch_learner
folder,what = sys.argv[1],sys.argv[2]
class Act(Callback):
    run_valid = False
    def before_batch(self):
        if (self.epoch,self.iter)==(0,1): exec(what)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
items = L(zip(torch.randn(12, 3, 16, 16), torch.randint(0, 3, (12,))))
dls = DataLoaders.from_dsets(items, items[:4], bs=4, device='cpu', num_workers=0)
dls.c = 3
learn = branch_learner(dls, 'cifar_resnet8', pretrained=False, loss_func=CrossEntropyLossFlat(), cbs=[Checkpoint(folder),Act()])
try:
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
except KeyboardInterrupt: sys.exit(130)
assert signal.getsignal(signal.SIGHUP)==signal.SIG_IGN
"""

@pytest.mark.skipif(os.name=='nt', reason='Windows has no SIGHUP')
def test_nohup(tmp_path):
    "A signal that is ignored, as SIGHUP under `nohup`, does not end a run; the others do."
    for n,code in ((signal.SIGHUP,0), (signal.SIGTERM,143)):
        res = forks.run(PROGRAM, tmp_path/str(int(n)), f'os.kill(os.getpid(), {int(n)})')
        assert res.returncode==code, res.stderr

def test_launched_under_nohup(monkeypatch):
    "torch's launcher leaves alone what is ignored, and gives processes on processors their share of the cores."
    from cekd_fastai.cli import _prepare
    for o in ('OMP_NUM_THREADS','TORCHELASTIC_SIGNALS_TO_HANDLE'): monkeypatch.delenv(o, raising=False)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(8), raising=False)
    monkeypatch.setattr(signal, 'getsignal', lambda n: signal.SIG_IGN if n==getattr(signal, 'SIGHUP', None) else signal.SIG_DFL)
    _prepare(2, None)
    assert 'OMP_NUM_THREADS' not in os.environ
    monkeypatch.delenv('TORCHELASTIC_SIGNALS_TO_HANDLE')
    _prepare(3, 'cpu')
    heard = os.environ.pop('TORCHELASTIC_SIGNALS_TO_HANDLE').split(',')
    assert os.environ.pop('OMP_NUM_THREADS')=='2' and 'SIGTERM' in heard and 'SIGHUP' not in heard

def test_a_second_signal_is_raised(monkeypatch, tmp_path):
    "By the function that works on every system: `os.kill` ends a process on Windows."
    raised = []
    monkeypatch.setattr(signal, 'raise_signal', raised.append)
    monkeypatch.setattr(os, 'kill', lambda *args: raised.append('killed'))
    Checkpoint(tmp_path).take(signal.SIGINT, None)
    assert raised==[signal.SIGINT]

# Other machines

def test_fewer_gpus(monkeypatch):
    "States of generators that are not here go unused."
    learn,given = make(),[]
    state = start_state(learn)
    state['rng']['torch_cuda_state'] = ['first','second','third']
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', given.append)
    for n in (0,1,2,4):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: n)
        load_start_state(learn, state)
    assert given==[[],['first'],['first','second'],['first','second','third']]

def test_a_file_that_somebody_reads(tmp_path, monkeypatch):
    "On Windows it cannot be removed; training goes on, and a later write tries again."
    def held(self, *args, **kwargs):
        if self.name.startswith('checkpoint-'): raise PermissionError(13, 'it is being used by another process')
        return unlink(self, *args, **kwargs)
    unlink = Path.unlink
    with monkeypatch.context() as m:
        m.setattr(Path, 'unlink', held)
        fit(Checkpoint(tmp_path, keep=1, signals=False))
    assert len(checkpoint_files(tmp_path))>3
    fit(Checkpoint(tmp_path/'b', keep=1, signals=False))
    assert len(checkpoint_files(tmp_path/'b'))==1

# What a command says and leaves

def train(birds, out, **kwargs):
    args = dict(method='plain', arch='test_resnet', no_pretrained=True, size=32, bs=6, num_workers=0, epochs=2)
    return cekd_train(data=str(birds), out=str(out), **args | kwargs)

def test_several_values_add_up():
    "An option that is given twice loses nothing."
    args = given('--method-args w_cross=2 --method-args T=4 a=1 --milestones 1 --milestones 2 3 --teachers x --teachers y'.split())
    assert args==dict(method_args=['w_cross=2','T=4','a=1'], milestones=[1,2,3], teachers=['x','y'])
    for o in ('mix','table','arch','learner'): assert given(f'--{o}-args a=1 --{o}-args b=2'.split())=={f'{o}_args':['a=1','b=2']}

def test_the_processor_is_for_one_run(birds, tmp_path, monkeypatch):
    "Afterwards the session has the device it had, also where the run fails."
    monkeypatch.setattr(defaults, 'use_cuda', None)
    train(birds, tmp_path/'a', device='cpu', epochs=1)
    assert defaults.use_cuda is None
    with pytest.raises(SystemExit): train(birds, tmp_path/'b', device='cpu', method_args=['nonsense=1'])
    assert defaults.use_cuda is None

def test_results_name_the_device_of_the_network(monkeypatch):
    "And not the one that was asked for."
    monkeypatch.setattr(torch.cuda, 'get_device_name', str)
    def on(device): return SimpleNamespace(model=SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))])))
    assert about({}, on('cpu'))['machine']['gpu'] is None and about(dict(device='cpu'), on('cuda:1'))['machine']['gpu']=='cuda:1'

def test_images_per_second_of_a_resumed_run(birds, tmp_path, monkeypatch):
    "Only batches that this process has trained on count, and a run that has only results to write has no speed."
    class Late(Callback):
        order,run_valid = 1500,False
        def after_batch(self):
            if (self.learn.epoch,self.learn.iter)==(1,1): self.learn.checkpoint.signal = signal.SIGTERM
    cbs = safely.safety_cbs
    with monkeypatch.context() as m:
        m.setattr(safely, 'safety_cbs', lambda *args: [*cbs(*args),Late()])
        with pytest.raises(SystemExit): train(birds, tmp_path/'run')
    seen = []
    save = safely.save_run
    def full(*args): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(safely, 'save_run', lambda *args: seen.append(args[-1]) or full())
        with pytest.raises(SystemExit, match='go on with --resume'): train(birds, tmp_path/'run', resume=True)
    assert seen==[1] # the third of three batches
    said = []
    monkeypatch.setattr('builtins.print', lambda *args, **kwargs: said.append(' '.join(map(str, args))))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'This fit has reached its end')
        train(birds, tmp_path/'run', resume=True)
    assert any('All epochs are trained; the results are written now.'==o for o in said)
    assert json.loads((tmp_path/'run'/'result.json').read_text())['images_per_s'] is None

# Processes that load

LOADERS = """
import multiprocessing,os,signal,subprocess,sys,time,torch
from threading import Thread
from fastai.vision.all import *
from cekd_fastai.checkpoint import Checkpoint,run_difference
from cekd_fastai.learner import branch_learner
folder,what,how = sys.argv[1:]
class Act(Callback):
    run_valid = False
    def before_batch(self):
        if (self.epoch,self.iter)==(0,1): exec(what, dict(globals()))
class Pictures:
    def __len__(self): return 12
    def __getitem__(self, i):
        if (what=='late()' and multiprocessing.parent_process() and i>=8): time.sleep(.5)
        return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i)),torch.tensor(i%3)
def children(n): [os.kill(p.pid, n) for p in multiprocessing.active_children()]
def lost():
    os.kill(os.getpid(), signal.SIGTERM)
    children(signal.SIGKILL)
    time.sleep(.5)
def late():
    def later():
        time.sleep(.7)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(.2)
        children(signal.SIGKILL)
    Thread(target=later).start()
if __name__=='__main__':
    os.setsid()
    if how: multiprocessing.set_start_method(how, force=True)
    set_seed(0)
    dls = DataLoaders.from_dsets(Pictures(), Pictures(), bs=4, device='cpu', num_workers=1 if how else 2)
    dls.c = 3
    learn = branch_learner(dls, 'cifar_resnet8', pretrained=False, loss_func=CrossEntropyLossFlat(), cbs=[Checkpoint(folder),Act()])
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01)
    except KeyboardInterrupt: sys.exit(130)
    print(sum(float(p.double().sum()) for p in learn.model.parameters()))
"""
GROUP = "subprocess.run(['kill','-{}','--',str(-os.getpgrp())], start_new_session=True); time.sleep(.5)" # by another process: that of a parent ends its children

@pytest.mark.skipif(os.name=='nt', reason='Windows has no groups of processes that are signalled together')
def test_a_signal_to_all_processes(tmp_path):
    "Those that load leave it to the main process; where they are lost all the same, the batch ends, or nothing was under way."
    whole = forks.run(LOADERS, tmp_path/'whole', '0', '')
    assert whole.returncode==0, whole.stderr
    for i,(what,how,code) in enumerate([(GROUP.format(15),'',143), (GROUP.format(2),'',130), ('lost()','',143), ('late()','',143)]):
        res = forks.run(LOADERS, tmp_path/str(i), what, how)
        assert res.returncode==code and 'DataLoader worker' not in res.stderr, (what, how, res.returncode, res.stderr)
        assert checkpoint_files(tmp_path/str(i))[-1].name=='checkpoint-00-0000-000002.ckpt', what
    assert forks.run(LOADERS, tmp_path/str(i), '0', '').stdout==whole.stdout

def test_a_fit_that_fails_gives_signals_back(tmp_path):
    "Also one of fastai's own learner."
    class Fails(Callback):
        def after_loss(self): raise ValueError('no')
    before = [signal.getsignal(n) for n in SIGNALS]
    learn = Learner(toy(), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*32*32, 3)), CrossEntropyLossFlat(), cbs=[Checkpoint(tmp_path),Fails()])
    init = learn.dls.train.fake_l.worker_init_fn
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ValueError, match='no'): learn.fit(1)
        assert [signal.getsignal(n) for n in SIGNALS]==before and learn.dls.train.fake_l.worker_init_fn is init
        learn.remove_cb(Fails)
        learn.fit(1)
    assert [signal.getsignal(n) for n in SIGNALS]==before and '_do_epoch' not in vars(learn)

# Another run

def test_other_runs_are_refused(birds, tmp_path):
    "By naming what differs: decay, loss, size, callbacks, optimiser, normalisation, files and labels."
    shutil.copytree(birds, tmp_path/'birds')
    def learner(*cbs, size=32, loss=0., **kwargs):
        block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=parent_label, splitter=halves, item_tfms=Resize(size))
        dls = block.dataloaders(tmp_path/'birds', bs=6, num_workers=0, device='cpu')
        loss = CrossEntropyLossFlat(label_smoothing=loss)
        return branch_learner(dls, 'test_resnet', 1, pretrained=False, loss_func=loss, cbs=[Checkpoint(tmp_path/'run', signals=False),*cbs], **kwargs)
    def halves(items): return [i for i in range(len(items)) if i%2],[i for i in range(len(items)) if not i%2]
    def go_on(*cbs, wd=None, **kwargs):
        learn = learner(*cbs, **kwargs)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, .01, wd=wd)
    go_on()
    with pytest.warns(UserWarning, match='reached its end'): go_on()
    for what,cbs,kwargs in (('wd was',[],dict(wd=.3)), ('loss was .*0.0.* is .*0.4',[],dict(loss=.4)), ('size was',[],dict(size=48)), ('`GradientClip` was None',[GradientClip()],{}),
        ('`GradientAccumulation` was None',[GradientAccumulation(8)],{}), ('freeze_bn was False and is True',[],dict(freeze_bn=True)), ('optimiser was Adam and is SGD',[],dict(opt_func=SGD))):
        with pytest.raises(ValueError, match=what): go_on(*cbs, **kwargs)
    a,b = sorted({o.parent for o in (tmp_path/'birds').rglob('*.*') if o.suffix in ('.png','.jpg')})[:2]
    for one,other in ((a,b),(b,a)): # the same number in each class
        file = min(o for o in one.iterdir() if 'moved' not in o.name)
        file.rename(other/f'moved-{file.name}')
    with pytest.raises(ValueError, match='files and labels was'): go_on()

def test_what_an_older_version_has_not_written_is_not_compared():
    "What both know is, save for callbacks without arguments, as in the oldest files."
    new = dict(epochs=4, args={}, more={'wd':[.1], '`GradientClip`':{}})
    old = {k:v for k,v in new.items() if k!='more'}
    assert not run_difference(old, new) and not run_difference(new, old) and not run_difference(new, new)
    assert len(run_difference(new, new | dict(more={'wd':[.2]})))==1
