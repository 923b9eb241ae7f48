"Soft labels of the network's own: exact beside every owner of the loss, and good citizens of a learner."
import copy,shutil,warnings
import pytest,torch
from torch.nn.parallel import DistributedDataParallel
from fastai.vision.all import CancelFitException,CancelValidException,CrossEntropyLossFlat,Callback,DataLoader,DataLoaders
from fastai.vision.all import F,LabelSmoothingCrossEntropyFlat,Learner,SGD,Tensor
from fastai.vision.all import load_learner,nn,np,partial,random,set_seed,tensor
from fastai.vision.all import CategoryBlock,DataBlock,ImageBlock,IndexSplitter,PILImage,ToTensor
from fastai.callback.mixup import MixUp as FastaiMixUp
from fastai.callback.training import GradientAccumulation
from cekd_fastai.cekd import CEKD
from cekd_fastai.core import HalfPrecision
from cekd_fastai.all import branch_learner,fine_grained_dls,make_birds
from cekd_fastai.data.loaders import BalancedDL
from cekd_fastai.distill import Distill
from cekd_fastai.losses import mixed_loss
from cekd_fastai.mix.callback import CutMix,Mix,MixUp
from cekd_fastai.mix.core import MixRecord
from cekd_fastai.mix.snapmix import MixOneOf,SnapMix
from cekd_fastai.soft_labels import OnlineLabelSmoothing,remembered_in,unmixed
from cekd_fastai.own_targets import PSKD,StoredTargets
from cekd_toys import Items,Raise,learner,quiet,tiny,toy_dls
from forks import one_and_two

METHODS = dict(online=OnlineLabelSmoothing, pskd=PSKD, stored=partial(StoredTargets, weight=1., ramp=0))
each_method = pytest.mark.parametrize('make', METHODS.values(), ids=METHODS)

class Alternate(Mix):
    "Neighbours, in every second batch; weights that do not add up to 1"
    def __init__(self): super().__init__(prob=1-1e-6)
    def mix(self, x, y):
        if (self.learn.epoch+self.learn.iter)%2==0: return None
        perm = torch.arange(len(x)).view(-1, 2).flip(1).flatten()
        la,lb = torch.linspace(.4, .9, len(x)),torch.linspace(.5, .2, len(x))
        return torch.lerp(x[perm], x, .6),MixRecord(perm, la, lb, host_share=.6)

def ordinary(n_out=3, seed=0):
    "A network without branches that is a `Sequential` of `Sequential`s"
    set_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Tanh())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, n_out)))

def plain_learner(*cbs, dls=None, net=None, **kw):
    kw = dict(loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1) | kw
    return Learner(dls or toy_dls(), net or ordinary(), cbs=list(cbs), **kw)

def soft_of(learn): return next(cb for cb in learn.cbs if hasattr(type(cb), 'soften'))

class Grads(Callback):
    "Batch, gradients and loss of each step"
    order,run_valid = 100,False
    def before_fit(self): self.steps = []
    def after_backward(self):
        grads = [p.grad.clone() for p in self.learn.model.parameters()]
        record = next((cb.record for cb in self.learn.cbs if isinstance(cb, Mix)), None)
        self.steps.append((self.learn.loss.clone(), grads, self.xb[0], record, soft_of(self.learn).soft))

# Exact

def expected(net, make, step, y, lf, share):
    "Gradients of a step of `BranchLoss` by the formula"
    _,_,x,rec,q = step
    loss = 0
    for z in net(x)[0]:
        log_p = z.log_softmax(1)
        if make is METHODS['stored']:
            t = None if rec is None else (rec.lam_a[:,None]*q+rec.lam_b[:,None]*q[rec.perm])/(rec.lam_a+rec.lam_b)[:,None]
            soft = 0 if rec is None else 9*(t*(t.log()-(z/3).log_softmax(1))).sum(1).mean()
            a,b = 1,1
        else:
            of_class = getattr(lf.func, 'weight', None)
            w = torch.ones(len(y)) if of_class is None else of_class[y] # each image counts as in the loss of the task
            p = w[:,None]*q
            t = p if rec is None else rec.lam_a[:,None]*p+rec.lam_b[:,None]*p[rec.perm]
            soft = -(t*log_p).sum()/w.sum()
            a,b = (1,1) if make is METHODS['online'] else (1-share,share)
        hard = lf(z, y) if rec is None else mixed_loss(lf, z, y, rec)
        loss = loss + a*hard + b*soft
    return torch.autograd.grad(loss, list(net.parameters()))

@each_method
@pytest.mark.parametrize('lf', [CrossEntropyLossFlat(),LabelSmoothingCrossEntropyFlat(),CrossEntropyLossFlat(weight=tensor([1.,5,.5]))],
    ids=['plain','smooth','weights'])
def test_gradients_are_those_of_the_formula(make, lf):
    "Two branches, unmixed and mixed batches in turn, three epochs, with any loss of the task"
    net = tiny(2, seed=4)
    for h in net.heads: h[2].weight.data.mul_(20) # predictions that differ by image, so that some are correct
    learn = learner(net, Alternate(), make(), dls=toy_dls(8, 4))
    learn.loss_func = lf
    nets = []
    class Keep(Callback):
        order,run_valid = 90,False
        def before_batch(self): nets.append((copy.deepcopy(self.learn.model).train(), self.yb[0].as_subclass(Tensor)))
    quiet(learn, 3, cbs=[Keep(),g:=Grads()])
    assert len(g.steps)==6 and max(o[4].std() for o in g.steps)>.001
    for i,(step,(net,y)) in enumerate(zip(g.steps, nets)):
        if make is METHODS['stored'] and i<2: continue # of the sources of the first mixes nothing is known
        want = expected(net, make, step, y, lf, .8*(i//2+1)/3)
        for a,b in zip(want, step[1]): assert torch.allclose(a, b, atol=1e-6)

def test_targets_are_predictions_of_the_epoch_before():
    "For shuffled batches and two workers, each image has what the network said about it"
    items = Items(zip(torch.randn(10, 3, 1, 1), torch.randint(0, 3, (10,))))
    for kw in (dict(num_workers=0), dict(num_workers=2), dict(num_workers=2, drop_last=True), dict(num_workers=0, dl_type=BalancedDL)):
        dls = DataLoaders.from_dsets(items, items, bs=4, device='cpu', shuffle=True, **(dict(drop_last=False) | kw))
        dls.c = 3
        if 'dl_type' in kw: dls.train.by_class,dls.train.draws = [[0,1],list(range(2, 10))],random.Random(0)
        class Echo(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.ones(1))
            def forward(self, x): return x.flatten(1)*self.w
        learn = quiet(plain_learner(PSKD(), dls=dls, net=Echo(), lr=0.), 3)
        m = learn.pskd.memory
        seen = m['classes']>=0
        want = torch.stack([x.flatten() for x,_ in items]).softmax(1)
        assert seen.sum()>=8 and torch.allclose(m['probs'][seen], want[seen], atol=1e-6)
        assert torch.equal(m['classes'][seen], torch.stack([y for _,y in items])[seen])

def test_samples_left_alone_are_learned_from():
    "In a batch of which some samples are mixed, those that are not"
    rec = MixRecord(tensor([1,0,2]), tensor([.5,1,1]), tensor([.5,0,0]), host_share=tensor([.5,1,1]))
    assert unmixed(rec).tolist()==[False,True,True]
    assert not unmixed(MixRecord(tensor([1,0]), tensor([1.,1]), tensor([0.,0]), (0,0,2,2), (0,0,2,2))).any()
    set_seed(1)
    learn = learner(tiny(2), MixUp(prob=.5, per='sample'), PSKD())
    class Which(Callback):
        order,run_valid = 50,False
        def after_batch(self): self.known = unmixed(self.learn.mix_up.record)
    quiet(learn, 1, cbs=(w:=Which()))
    assert 0<w.known.sum()<8 and torch.equal(learn.pskd.memory['classes']>=0, w.known)

MIXES = [partial(o, prob=.5, per=per) for o in (MixUp,CutMix,SnapMix) for per in ('batch','sample')]
MIXES += [lambda per=per: MixOneOf([MixUp(),CutMix(),SnapMix()], prob=.5, per=per) for per in ('batch','sample')]

@each_method
@pytest.mark.parametrize('mix', MIXES, ids=range(len(MIXES)))
def test_with_every_mix(make, mix):
    "On branches, beside CEKD and on an ordinary network; validation is the plain task loss"
    set_seed(3)
    for learn in (learner(tiny(2), mix(), make()), learner(tiny(2), mix(), CEKD(), make()), plain_learner(mix(), make())):
        quiet(learn, 2)
        assert all(v.isfinite().all() for v in soft_of(learn).memory.values()) and np.isfinite(learn.recorder.losses[-1])
        assert all(p.isfinite().all() for p in learn.model.parameters())
        p,y = learn.get_preds()
        assert learn.validate()[0]==pytest.approx(F.nll_loss(p.log(), y).item(), abs=1e-4)

@each_method
def test_one_step_of_cekd(make):
    "The labels' part of CEKD is softened, the cross part is not"
    seen = []
    class Compare(Callback):
        order,run_valid = 100,False
        def after_loss(self):
            cekd,cb = self.learn.cekd,soft_of(self.learn)
            z,y,rec = cekd.logits.float(),self.yb[0],cekd.record
            clean,lf = cekd.clean.logits,self.learn.loss_func
            want = dict(ce_mix=cb.soften(mixed_loss(lf, z[0], y, rec), z[0], rec),
                ce_clean=sum(cb.soften(lf(o, y), o) for o in clean))
            assert all(torch.allclose(cekd.parts[k], v) for k,v in want.items())
            seen.append((cekd.parts['ce_clean'].item(), sum(lf(o, y) for o in clean).item()))
    quiet(learner(tiny(2), CutMix(), CEKD(), make()), 2, cbs=Compare())
    a,b = seen[1]
    if make is METHODS['stored']: assert a==pytest.approx(b) # which is for mixes alone
    else: assert a!=pytest.approx(b, rel=1e-3)

# Citizens

@pytest.mark.parametrize('make', [OnlineLabelSmoothing,PSKD])
def test_accumulated_gradients(make):
    "Two batches of four are one of eight"
    def grads(bs, *cbs):
        learn = learner(tiny(1), make(), dls=toy_dls(8, bs))
        class Get(Callback):
            order = 200
            def before_step(self):
                self.g = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()])
                raise CancelFitException
        quiet(learn, cbs=[*cbs,c:=Get()])
        return c.g
    assert torch.allclose(grads(8), grads(4, GradientAccumulation(8)), atol=1e-6)

@each_method
@pytest.mark.parametrize('event,exc', [('before_batch',KeyboardInterrupt), ('after_pred',RuntimeError), ('after_loss',KeyboardInterrupt),
    ('after_batch',CancelFitException), ('before_validate',KeyboardInterrupt)])
def test_interrupts(make, event, exc):
    "Nothing is left to repair, and the tensors of the step are gone when training goes on"
    learn = learner(tiny(2), Alternate(), make(), dls=toy_dls(16, 4))
    before = learn.loss_func
    try: quiet(learn, 2, cbs=Raise(event, exc))
    except (KeyboardInterrupt,RuntimeError): pass
    assert learn.loss_func is before and learn.dls.train.one_batch()[1].dtype==torch.long
    assert torch.allclose(learn.get_preds()[0].sum(1), torch.ones(16), atol=1e-5)
    quiet(learn, 1)
    cb = soft_of(learn)
    assert cb.soft is None and cb.labels is None and cb.rows is None
    if make is METHODS['online']: assert not cb.memory['sums'].any()

def test_interrupted_epoch_is_thrown_away():
    "Soft labels are made of one whole epoch"
    learn = learner(tiny(1), OnlineLabelSmoothing(), dls=toy_dls(16, 4))
    try: quiet(learn, 2, cbs=Raise('after_batch', KeyboardInterrupt))
    except KeyboardInterrupt: pass
    assert torch.equal(soft_of(learn).memory['soft'], torch.full((3,3), 1/3))
    sums = []
    class Look(Callback):
        order,run_valid = 1,False
        def after_train(self): sums.append(soft_of(self.learn).memory['sums'][:,-1].sum())
    quiet(learn, 1, cbs=Look())
    assert sums[0]<=16

class StopAt(Callback):
    "End the fit when an epoch begins"
    def __init__(self, n): self.n = n
    def before_epoch(self):
        if self.learn.epoch==self.n: raise CancelFitException

@each_method
@pytest.mark.parametrize('branches', [True,False])
def test_save_load_resume(make, branches, tmp_path):
    "A run that is saved, loaded into a new learner and continued ends where an uninterrupted one does"
    def new():
        cbs = Alternate(),make()
        dls = toy_dls(8, 4)
        return learner(tiny(2, seed=4), *cbs, dls=dls, path=tmp_path) if branches else plain_learner(*cbs, dls=dls, path=tmp_path)
    whole = quiet(new(), 6)
    a = quiet(new(), 6, cbs=StopAt(3))
    a.save('half')
    b = new()
    b.create_opt()
    b.load('half')
    quiet(b, 6, start_epoch=3)
    for u,v in zip(whole.model.parameters(), b.model.parameters()): assert torch.allclose(u, v, atol=1e-6)
    for k,v in soft_of(whole).memory.items(): assert torch.allclose(v, soft_of(b).memory[k], atol=1e-6), k
    forgot = new()
    forgot.create_opt()
    forgot.load('half')
    soft_of(forgot).kept.tensors = {}
    quiet(forgot, 6, start_epoch=3)
    assert any(not torch.allclose(u, v, atol=1e-6) for u,v in zip(whole.model.parameters(), forgot.model.parameters()))

@pytest.mark.parametrize('branches', [True,False])
def test_checkpoints_without_soft_labels(branches, tmp_path):
    "Load with them where none are remembered, and without where they are"
    new = lambda *cbs: learner(tiny(2), *cbs, path=tmp_path) if branches else plain_learner(*cbs, path=tmp_path)
    names = list(new().model.state_dict())
    soft = quiet(new(PSKD()), 2)
    assert list(soft.model.state_dict())==names
    soft.save('soft')
    plain = new()
    plain.load('soft')
    assert torch.equal(plain.get_preds()[0], soft.get_preds()[0])
    plain.save('plain')
    soft.load('plain', with_opt=False)
    quiet(soft, 1)
    assert (soft.pskd.memory['classes']>=0).all()

@pytest.mark.parametrize('branches', [True,False])
def test_export(branches, tmp_path):
    "An exported learner remembers nothing, predicts the same and trains on"
    dls = toy_dls(8)
    soft,plain = ((learner(tiny(2), *cbs, dls=dls, path=tmp_path) if branches else plain_learner(*cbs, dls=dls, path=tmp_path))
        for cbs in ([PSKD()],[]))
    quiet(soft, 2)
    remembered_in(soft.model).tensors['big'] = torch.zeros(100_000)
    soft.export('soft.pkl')
    assert (tmp_path/'soft.pkl').stat().st_size<100_000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'soft.pkl')
    again.dls = dls
    assert torch.equal(again.get_preds()[0], soft.get_preds()[0])
    quiet(again, 1)
    assert (again.pskd.memory['classes']>=0).all()

@each_method
def test_lr_find_leaves_no_trace(make, tmp_path):
    learn = quiet(learner(tiny(2), Alternate(), make(), dls=toy_dls(16, 4), path=tmp_path), 2)
    before = {k:v.clone() for k,v in soft_of(learn).memory.items()}
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=9, show_plot=False, suggest_funcs=None)
    after = soft_of(learn).memory
    assert all(torch.equal(v, after[k]) for k,v in before.items() if k!='seen')
    quiet(learn, 1)

def test_added_late_and_by_fit():
    "A callback that joins a learner later, or one fit alone"
    learn = quiet(learner(tiny(2)), 1)
    quiet(learn, 2, cbs=(cb:=OnlineLabelSmoothing()))
    assert cb.memory['soft'].std()>0
    learn.add_cb(PSKD()) # other tensors take the place
    quiet(learn, 1)
    assert set(learn.pskd.memory)=={'probs','classes','seen','PSKD'}

def test_second_fit_goes_on():
    "Predictions of the last epoch of one fit are those of the epoch before the next"
    learn = quiet(learner(tiny(2), PSKD()), 1)
    m = {k:v.clone() for k,v in learn.pskd.memory.items()}
    quiet(learn, 1, cbs=(g:=Grads()))
    assert torch.equal(g.steps[0][4], m['probs'])

def test_another_fold(tmp_path):
    "As many images, and the same class in many a row: the predictions for other images are dropped; those of a folder that has moved stay"
    birds = make_birds(tmp_path/'birds', n_species=2, n_images=8, n_train=7, size=40, n_workers=0, progress=False)
    data = lambda path,seed: fine_grained_dls(path, size=32, bs=4, valid_pct=.25, seed=seed, num_workers=0, item_tfms=None)
    learn = quiet(branch_learner(data(birds, 1), 'test_resnet', 2, pretrained=False, cbs=PSKD()), 1)
    m = learn.pskd.memory['probs'].clone()
    known = []
    class Look(Callback):
        order,run_valid = 4.6,False
        def before_batch(self): known.append(self.learn.pskd.stored()[1].any().item())
    shutil.copytree(birds, tmp_path/'moved'/'birds')
    learn.dls = data(tmp_path/'moved'/'birds', 1)
    quiet(learn, 1, cbs=Look())
    learn.dls = data(birds, 2)
    assert len(learn.dls.train_ds)==len(m)
    quiet(learn, 1, cbs=Look())
    assert known[0] and not known[len(known)//2]

def test_data_that_open_their_pictures_by_number():
    "Nothing is read to tell the files, of which there are none"
    read = []
    def get_x(i):
        read.append(i)
        return PILImage.create((tensor(np.full((3,16,16), i).tolist()).permute(1, 2, 0)*9).byte().numpy())
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda s: list(range(s)), get_x=get_x, get_y=lambda i: i%2, splitter=IndexSplitter([8,9]))
    dls = block.dataloaders(10, bs=4, num_workers=0, item_tfms=ToTensor())
    n = len(read)
    learn = branch_learner(dls, 'test_resnet', 2, pretrained=False, cbs=PSKD())
    assert len(read)-n<=4
    quiet(learn)
    assert [k for k in learn.pskd.memory if k.startswith('PSKD')]==['PSKD']

def test_other_data():
    "Predictions for data of another size are dropped"
    learn = quiet(learner(tiny(2), PSKD()), 1)
    learn.dls = toy_dls(12, 4)
    quiet(learn, 1)
    assert learn.pskd.memory['probs'].shape==(12,3)

def test_average_of_weights_beside():
    "The average of the weights does not touch what is remembered"
    learn = quiet(learner(tiny(2), CutMix(), CEKD(validate_ema=True), PSKD()), 2)
    assert not any('remembered' in k for k in learn.model.ema.tensors())
    assert torch.allclose(learn.pskd.memory['probs'].sum(1), torch.ones(8), atol=1e-5)

@each_method
@pytest.mark.parametrize('branches', [True,False])
def test_half_precision(make, branches):
    "Targets and losses are in full precision, and near those without"
    run = lambda *cbs: quiet(learner(tiny(2), Alternate(), make(), *cbs) if branches else plain_learner(Alternate(), make(), *cbs), 3)
    half,full = run(HalfPrecision()),run()
    for k,v in soft_of(full).memory.items():
        if not v.is_floating_point(): continue
        assert soft_of(half).memory[k].dtype==torch.float32 and torch.allclose(soft_of(half).memory[k], v, atol=.05)

# Refusals

def test_refusals():
    with pytest.raises(ValueError, match='mixes all'): plain_learner(CutMix(), OnlineLabelSmoothing())
    with pytest.raises(ValueError, match='would soften the same'): learner(tiny(2), PSKD(), OnlineLabelSmoothing())
    with pytest.raises(ValueError, match='mixes of this library'): plain_learner(FastaiMixUp(), PSKD())
    with pytest.raises(ValueError, match='from 0 to 1'): OnlineLabelSmoothing(limit=1.5)
    class Own(Distill): pass
    with pytest.raises(ValueError, match='does not look at soft labels'): learner(tiny(2), Own(), PSKD())
    items = Items((x, F.one_hot(y, 3).float()) for x,y in toy_dls().train_ds)
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu')
    dls.c = 3
    with pytest.raises(ValueError, match='labels are vectors'): quiet(learner(tiny(2), PSKD(), dls=dls))
    learner(tiny(2), CutMix(stop_at=.5), PSKD()) # unmixed at the end

# Several processes

class Part(DataLoader):
    "The batch of this process"
    def __init__(self, *args, part=None, **kw):
        super().__init__(*args, **kw)
        self.part = part
    def get_idxs(self): return list(self.part)

class Wrap(Callback):
    order = 11
    def __init__(self, world): self.world = world
    def before_fit(self):
        if self.world>1: self.learn.model = DistributedDataParallel(self.learn.model)
    def after_fit(self):
        if self.world>1: self.learn.model = self.learn.model.module
    def before_validate(self): raise CancelValidException

def ranked(rank, world):
    "What is remembered, and the weights, after three epochs of one batch"
    res = {}
    for make in (OnlineLabelSmoothing,PSKD):
        items,n = Items(toy_dls(8).train_ds),8//world
        dls = DataLoaders(*[Part(items, bs=n, num_workers=0, device='cpu', part=range(n*rank, n*rank+n)) for _ in range(2)], device='cpu')
        dls.c = 3
        learn = quiet(learner(tiny(2), cb:=make(), dls=dls), 3, cbs=Wrap(world))
        res[make.__name__] = [dict(cb.memory), [p.data for p in learn.model.parameters()]]
    return res

def test_two_processes(tmp_path):
    "Two processes with half a batch each end where one with all of it does, and remember the same"
    for one,a,b in zip(*(o.values() for o in one_and_two(ranked, tmp_path))):
        for u,v,w in zip(one[1], a[1], b[1]): assert torch.allclose(u, v, atol=1e-5) and torch.allclose(v, w, atol=1e-6)
        for k in set(one[0])-{'seen'}: assert torch.allclose(one[0][k], a[0][k], atol=1e-5) and torch.allclose(a[0][k], b[0][k], atol=1e-6)

@pytest.mark.parametrize('first,then', [(PSKD,partial(StoredTargets, ramp=0)), (partial(StoredTargets, T=3.),partial(StoredTargets, T=1.)), (StoredTargets,PSKD)])
def test_what_another_method_remembers_is_not_taken(first, then):
    "Nor what the same method did at another temperature: predictions of other kinds would be targets at once"
    learn = quiet(learner(tiny(2), Alternate(), first()), 2)
    learn.remove_cb(soft_of(learn))
    learn.add_cb(cb := then())
    known = []
    class Look(Callback):
        order,run_valid = 10,False
        def before_batch(self): known.append(bool((cb.memory['classes']>=0).any()))
    quiet(learn, 2, cbs=Look())
    assert known==[False,True]

@pytest.mark.parametrize('mix', [dict(prob=1.), dict(prob=1., stop_at=.5), dict(prob=0.), dict(prob=.5, stop_at=0.)], ids=str)
def test_stored_targets_that_would_teach_nothing(mix):
    "Everything is mixed while anything is, or nothing is"
    with pytest.raises(ValueError, match='`prob=.6`|nothing mixes') as e: learner(tiny(2), MixUp(**mix), StoredTargets())
    assert ('nothing mixes' in str(e.value))==(not mix['prob'] or not mix.get('stop_at', 1))

@pytest.mark.parametrize('make', [OnlineLabelSmoothing,PSKD,lambda: [Alternate(),StoredTargets()]])
def test_data_that_do_not_tell_their_classes(make):
    dls = toy_dls(8, 4)
    del dls.c
    with pytest.raises(ValueError, match='set `dls.c`'): Learner(dls, ordinary(), loss_func=CrossEntropyLossFlat(), cbs=make())

def test_what_is_remembered_is_made_once():
    "Memory for all images is not taken to compare sizes with"
    from torch.utils._python_dispatch import TorchDispatchMode
    learn,made = quiet(learner(tiny(2), PSKD()), 1),[]
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            res = f(*args, **(kwargs or {}))
            if isinstance(res, torch.Tensor) and res.shape==learn.pskd.memory['probs'].shape and res.device.type!='meta': made.append(str(f))
            return res
    with Watch(): learn.pskd.remember()
    assert not [o for o in made if 'zeros' in o or 'empty' in o]
