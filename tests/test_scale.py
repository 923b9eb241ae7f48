"One step from several batches, compiled trunks, and several processes: the same gradients, draws of their own, and an end that all agree on."
import functools,math,multiprocessing,os,signal,time,warnings
import pytest,torch
from fastai.vision.all import Callback,CrossEntropyLossFlat,DataLoaders,L,SGD,accuracy,imagenet_stats,set_seed
from fastai.callback.training import GradientAccumulation
from cekd_fastai.branches import branch_net
from cekd_fastai.core import data_stats
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.drawing.dataset import make_birds
from cekd_fastai.meal.teachers import Teacher
from cekd_fastai.ranks import RankDL
from cekd_fastai.cekd import CEKD
from cekd_fastai.checkpoint import Checkpoint
from cekd_fastai.guard import Guard
from cekd_fastai.compiled import Compile
from cekd_fastai.compiled import GradCheckpoint
from cekd_fastai.learner import branch_learner,css_learner,meal_learner,online_learner
from cekd_fastai.mix.callback import CutMix
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.online.callback import ONLINE
from cekd_fastai.runstate import checkpoint_files,newest_checkpoint
from cekd_fastai.safely import named_faults
from cekd_fastai.soft_labels import OnlineLabelSmoothing
from cekd_fastai.own_targets import PSKD,StoredTargets
from cekd_toys import BoxMix,FixedMix

arch,n_out = 'cifar_resnet8',3
kw = dict(pretrained=False, freeze_bn=True, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD)

def toy(bs=4, n=16, n_valid=4, **kwargs):
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(n, 3, 16, 16, generator=g), torch.randint(0, n_out, (n,), generator=g)))
    kwargs = dict(shuffle=False, drop_last=False, num_workers=0) | kwargs # a process that loads is a copy of this large one
    dls = DataLoaders.from_dsets(items, items[:n_valid], bs=bs, val_bs=4, device='cpu', **kwargs)
    dls.c = n_out
    return dls

def test_what_a_divided_loader_tells(tmp_path):
    "Its statistics are those of the loader behind it, and a new one is of this process alone"
    birds = make_birds(tmp_path/'birds', n_species=2, n_images=6, n_train=4, size=40, n_workers=0, progress=False)
    dls = fine_grained_dls(birds, size=32, bs=4, num_workers=0, stats=([.5]*3,[.25]*3), device='cpu')
    want,teacher = data_stats(dls),Teacher(torch.nn.Identity(), stats=imagenet_stats)
    dls.loaders = [RankDL(o, rank=0, world_size=2, trains=o is dls.train) for o in list(dls.loaders)]
    assert data_stats(dls)==want==[[.5]*3,[.25]*3]
    assert teacher.match(None, data_stats(dls)).scale is not None
    fresh = dls.train.new(bs=2, shuffle=False, num_workers=0)
    assert not isinstance(fresh, RankDL) and len(fresh.one_batch()[0])==2

class FrozenNorms(Callback):
    "Batch normalisation that leaves its statistics alone, in gates too"
    def before_train(self):
        for m in self.learn.model.modules():
            if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.eval()

class LateMix(FixedMix):
    "Mixes from the second epoch on"
    over = property(lambda self: self.learn.epoch==0)

def teacher():
    set_seed(7)
    net = branch_net(arch, n_out, 1, pretrained=False).eval()
    net.heads[0][-1].weight.data.mul_(9)
    return net

def plain(d, *cbs, **k): return branch_learner(d, arch, 1, cbs=cbs, **kw|k)
def cekd(d, *cbs, **k): return branch_learner(d, arch, cbs=[FixedMix(),CEKD(ramp=1., teacher='ema'),*cbs], **kw|k)
def cekd_maps(d, *cbs, **k): return branch_learner(d, arch, cbs=[BoxMix(),CEKD(ramp=1., fuse='maps'),*cbs], **kw|k)
def meal(d, *cbs, mode='joint', **k): return meal_learner(d, arch, [teacher()], cbs=cbs, adversarial=mode, disc='official_v2', **kw|k) # which steps by SGD: Adam makes much of a gradient near 0
def soft(cb):
    def make(d, *cbs, **k): return branch_learner(d, arch, 1, cbs=[*cb(),*cbs], **kw|k)
    return make

METHODS = dict(plain=plain, cekd=cekd, cekd_maps=cekd_maps, meal=meal, grl=lambda d,*cbs,**k: meal(d, *cbs, mode='grl', **k))
METHODS |= dict(smoothing=soft(lambda: [OnlineLabelSmoothing()]),
    pskd=soft(lambda: [PSKD()]), stored=soft(lambda: [LateMix(prob=1-1e-6),StoredTargets(ramp=1.)]))
METHODS |= {o: (lambda d,*cbs,o=o,**k: online_learner(d, arch, ONLINE[o](**({} if o=='dml' else dict(ramp=1.))), cbs=cbs, **kw|k)) for o in ONLINE}
def css(d, *cbs, **k): return css_learner(d, (arch,arch), 2, cbs=cbs, **kw|k)

def quiet(learn, n=2, lr=.05, cbs=None):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n, lr, cbs=cbs)
    return learn

def weights(learn):
    "Parameters of the network and of MEAL's discriminators"
    adversary = getattr(learn.model, 'adversary', None)
    return [p.data.clone() for p in (*learn.model.parameters(), *(adversary.nets.parameters() if adversary else ()))]

def apart(a, b): return max((p-q).abs().max().item() for p,q in zip(a, b))

def trained(make, *cbs, n=2, **dl):
    set_seed(1)
    return weights(quiet(make(toy(**dl), FrozenNorms(), *cbs), n))

@functools.cache
def large(method): return trained(METHODS[method], bs=8)

# One step from several batches

@pytest.mark.parametrize('method', METHODS)
def test_accumulated_is_the_large_batch(method):
    "Four steps of two batches each end where four steps of the large batch do, ramps and discriminators included."
    assert apart(large(method), trained(METHODS[method], GradientAccumulation(8)))<1e-5

def test_small_batches_end_elsewhere():
    "The comparison can fail: eight steps of the small batch end elsewhere."
    assert apart(large('meal'), trained(METHODS['meal']))>1e-4

def test_window_that_is_thrown_away():
    "A batch that is not finite takes the others of its step with it, and the next step begins anew."
    class Spoil(Callback):
        order,run_valid = 8,False
        def after_loss(self):
            if self.train_iter==1: self.learn.loss_grad = self.learn.loss_grad*math.nan
    class Steps(Callback):
        order,run_valid = 100,False
        def before_fit(self): self.at = []
        def after_step(self): self.at.append(self.train_iter)
    set_seed(1)
    learn = quiet(plain(toy(), Guard(), Spoil(), Steps(), GradientAccumulation(8)), 2)
    assert learn.guard.skipped==1 and learn.steps.at==[1,3,5,7] # the first is the one left out
    assert all(p.isfinite().all() for p in weights(learn))

@pytest.mark.parametrize('mode', ['joint','alternate'])
def test_resumed_within_a_window(mode, tmp_path):
    "A run that is killed between the batches of a step goes on with their gradients, those of the discriminators too."
    class Die(Callback):
        order,run_valid = 1500,False
        def before_batch(self):
            if (self.epoch,self.iter)==(1,3): raise SystemExit
    def run(*cbs):
        set_seed(1)
        return quiet(meal(toy(), GradientAccumulation(8), *cbs, mode=mode))
    whole = weights(run())
    with pytest.raises(SystemExit): run(Die(), Checkpoint(tmp_path, every=1, signals=False))
    assert apart(whole, weights(run(Checkpoint(tmp_path, every=1, signals=False))))==0

# The compiled network

def test_compiled(tmp_path):
    "Compiled trunk and branches, computed twice to save memory, under a mix that looks at maps: the same, and nothing of it stays."
    def run(*cbs):
        set_seed(1)
        return quiet(branch_learner(toy(n=8), arch, cbs=[SnapMix(),CEKD(),*cbs], **kw), 1)
    a,b = run(),run(GradCheckpoint(),Compile('aot_eager'))
    assert apart(weights(a), weights(b))<1e-5
    assert all(m._compiled_call_impl is None for m in b.model.modules())
    torch.save(b.model, tmp_path/'model.pt')
    assert b'_orig_mod' not in (tmp_path/'model.pt').read_bytes()

def test_computed_again_is_compiled_once():
    "The second pass of a trunk finds the code of the first: torch compiles each part once, and nothing in a backward pass."
    made = []
    def backend(gm, inputs):
        made.append(torch._C._current_autograd_node() is not None) # within a backward pass?
        return gm.forward
    def run(*cbs):
        torch._dynamo.reset()
        made.clear()
        quiet(branch_learner(toy(n=16), arch, cbs=[*cbs,Compile(backend)], **kw), 1)
        return made.copy()
    once = run()
    assert run(GradCheckpoint())==once and not any(once)

def test_compiled_and_tapped_at_the_trunk():
    "A trunk that is compiled and computed again gives MEAL no maps: one sentence. Either alone does, and so do taps of the branches."
    cbs = GradCheckpoint(),Compile('aot_eager')
    def run(make, *cbs):
        set_seed(1)
        return weights(quiet(make(toy(n=8), *cbs), 1))
    def late(d, *cbs): return meal_learner(d, arch, [teacher()], taps=1, adversarial=None, cbs=cbs, **kw)
    with pytest.raises(ValueError, match='MEAL reads maps of the trunk, .*or pass `taps=1`'): run(meal, *cbs)
    assert apart(run(meal), run(meal, GradCheckpoint()))==0 and apart(run(late), run(late, *cbs))<1e-5

def test_compiled_as_a_whole_is_refused():
    for cb in (GradCheckpoint(), CEKD()):
        learn = branch_learner(toy(), arch, cbs=SnapMix(), **kw)
        learn.model = torch.compile(learn.model, backend='eager')
        learn.add_cb(cb)
        with pytest.raises(ValueError, match='pass `Compile..` in `cbs`'): quiet(learn, 1)

# Without a wait

def test_lazy_guard(tmp_path):
    "Answers that are read one batch later: a bad picture, in training and in validation, a bad loss, and a run that has nothing else."
    class Spoil(Callback):
        order,run_valid,at = 8,False,()
        def after_loss(self):
            if self.train_iter in self.at: self.learn.loss_grad = self.learn.loss_grad*math.nan
    class Lazy(Guard): lazy = True
    dls = toy(n_valid=8)
    dls.train_ds[5][0][0,3,3] = math.inf # in training and in validation
    spoil = Spoil()
    spoil.at = [3]
    for make in (cekd,meal,METHODS['one']):
        learn = quiet(make(dls, guard := Lazy(folder=tmp_path), spoil, freeze_bn=False), 1)
        assert guard.skipped==3 and guard.good==2 and all(p.isfinite().all() for p in (*weights(learn),*learn.model.buffers()))
        assert all(math.isfinite(o) for o in learn.recorder.values[0])
    spoil.at = range(99)
    with pytest.raises(ValueError, match='not finite in 3 batches in a row'): quiet(plain(toy(), Lazy(3, tmp_path), spoil), 2)
    def run(*cbs):
        set_seed(1)
        return weights(quiet(cekd(toy(), *cbs, freeze_bn=False)))
    assert apart(run(), run(Lazy(folder=tmp_path)))==0

# Several processes

METHODS_ALL = METHODS | dict(css=css, alternate=lambda d,*cbs,**k: meal(d, *cbs, mode='alternate', **k))

class Boxes(Callback):
    "The boxes that this process draws, and how many images it sees"
    run_valid = False
    def before_fit(self): self.boxes,self.n = [],0
    def after_pred(self):
        self.n += len(self.xb[0])
        if hasattr(self.learn, 'cut_mix') and self.cut_mix.record: self.boxes.append(self.cut_mix.record.box_a)

def uneven(learn_cbs=(), bs=4, n=13):
    set_seed(1)
    learn = plain(toy(bs, n, n), FrozenNorms(), *learn_cbs)
    learn.dls.valid.bs = bs
    return learn

def outcome(learn): return dict(w=weights(learn), rows=[[float(v) for v in o] for o in learn.recorder.values])

class Stop(Callback):
    "Something happens to one process before a batch"
    order,run_valid = 1500,False
    def __init__(self, f): self.f = f
    def before_batch(self):
        if (self.epoch,self.iter)==(1,1): self.f()

def die(): raise SystemExit(9)

def kept(tmp, *cbs, n=13):
    "A run whose draws, memory and sums differ between processes"
    set_seed(1)
    return branch_learner(toy(2, n, shuffle=True), arch, 1, cbs=[CutMix(prob=.5),PSKD(),*cbs], **kw)

def in_ranks(rank, tmp):
    "What one of two processes does; its results go into a file"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='1', ACCELERATE_USE_CPU='true')
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp}/meet', rank=rank, world_size=2)
    res = {}
    def train(learn, n=2, **kwargs):
        with learn.distrib_ctx(): return quiet(learn, n, **kwargs)
    for name,make in METHODS_ALL.items():
        set_seed(1)
        res[name] = weights(train(make(toy(), FrozenNorms())))
    res['uneven'] = outcome(train(learn := uneven()))
    with learn.distrib_ctx(): res['preds'] = learn.get_preds()
    res['added'] = outcome(train(uneven([GradientAccumulation(4)], 2, 15)))
    set_seed(1)
    learn = train(plain(toy(), CutMix(), Boxes()))
    res['boxes'],res['seen'] = learn.boxes.boxes,learn.boxes.n
    res['whole'] = weights(train(kept(tmp), 2))+[torch.rand(1)]
    cb = lambda **k: Checkpoint(tmp/'run', every=1, **k)
    try: train(kept(tmp, Stop(die), cb()))
    except SystemExit as e: res['died'] = e.code
    res['resumed'] = weights(train(kept(tmp, cb())))+[torch.rand(1)]
    def stop(): os.kill(os.getpid(), signal.SIGTERM) if rank else None
    try: train(kept(tmp, Stop(stop), Checkpoint(tmp/'told')))
    except SystemExit as e: res['told'] = e.code
    res['told_at'] = [o.name for o in checkpoint_files(tmp/'told')]
    res['after_told'] = weights(train(kept(tmp, Checkpoint(tmp/'told'))))+[torch.rand(1)]
    late = dict(minutes=1e9 if rank else 1e-9, signals=False) # the clock of one process counts for all
    try: train(kept(tmp, Stop(die), Checkpoint(tmp/'clock', **late)))
    except SystemExit: res['clock'] = [o.name for o in checkpoint_files(tmp/'clock')]
    res['after_clock'] = weights(train(kept(tmp, Checkpoint(tmp/'clock', **late))))+[torch.rand(1)]
    torch.save(res, tmp/f'res{rank}')
    def gone(): os._exit(7) if rank else None
    start = time.time()
    try:
        with named_faults(): train(kept(tmp, Stop(gone), Checkpoint(tmp/'gone')))
    except OSError as e: (tmp/'said').write_text(f'{time.time()-start:.0f} {e}')
    os._exit(0)

@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    "Results of two processes, which start as copies of this one"
    tmp = tmp_path_factory.mktemp('ranks')
    ctx = multiprocessing.get_context('fork')
    ps = [ctx.Process(target=in_ranks, args=(r, tmp)) for r in range(2)]
    for p in ps: p.start()
    for p in ps: p.join(500)
    for p in ps: p.kill()
    a,b = [torch.load(tmp/f'res{r}', weights_only=False) for r in range(2)]
    return a,b,tmp

@pytest.mark.parametrize('method', METHODS_ALL)
def test_ranks_are_one_process(ranks, method):
    "Two processes with half a batch each: bit-equal to each other, and where one with the joined batch ends."
    a,b,_ = ranks
    assert apart(a[method], b[method])==0
    one = large(method) if method in METHODS else trained(METHODS_ALL[method], bs=8)
    assert apart(a[method], one)<(2e-2 if method=='css' else 1e-5) # the ratios of CSS are those of each process

def test_uneven(ranks):
    "13 images are 13: each counts once in training, in the losses and metrics, and in predictions, which are in order."
    a,b,_ = ranks
    one = quiet(uneven(bs=8))
    rows = outcome(one)['rows'] # predictions change them
    for o in (a,b):
        assert apart(o['uneven']['w'], weights(one))<1e-5 and len(o['uneven']['rows'])==len(rows)==2
        for x,y in zip(o['uneven']['rows'], rows): assert x[-2:]==pytest.approx(y[-2:], abs=1e-5) # validation loss, accuracy
        assert apart(o['preds'], one.get_preds())<1e-5 and len(o['preds'][0])==13
    added = quiet(uneven([GradientAccumulation(8)], 4, 15))
    assert apart(a['added']['w'], weights(added))<1e-5 and apart(a['added']['w'], b['added']['w'])==0

def test_draws_of_their_own(ranks):
    a,b,_ = ranks
    assert len(a['boxes'])==4 and a['seen']==b['seen']==16 and not set(a['boxes']) & set(b['boxes'])

def test_resumed_ranks(ranks):
    "Killed within an epoch, or told to stop, and started again: each process ends as if nothing had happened."
    a,b,_ = ranks
    assert a['died']==b['died']==9
    assert a['clock'][-1].startswith('checkpoint-00-0001-')
    for o in (a,b): assert all(apart(o['whole'], o[k])==0 for k in ('resumed','after_told','after_clock'))
    assert a['whole'][-1]!=b['whole'][-1]

def test_signal_to_one(ranks):
    "A signal to one process ends both after the same batch, with its number and one checkpoint."
    a,b,_ = ranks
    assert a['told']==b['told']==143 and a['told_at'][-1].startswith('checkpoint-00-0001-')

def test_one_is_gone(ranks):
    "One process that is gone within an epoch ends the other within seconds, in one sentence and with a checkpoint."
    seconds,said = (ranks[2]/'said').read_text().split(' ', 1)
    assert int(seconds)<60 and said.startswith('Another process of this run has ended; what was written stays')
    newest = newest_checkpoint(ranks[2]/'gone')
    assert newest and len(newest['others'])==1
