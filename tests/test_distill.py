"What every distillation callback shares: the formula that reaches the optimiser, the clean pass, and the learners' one body."
import pytest,torch
from functools import partial
from fastai.distributed import ParallelTrainer
from fastai.vision.all import Callback,CrossEntropyLossFlat,DataLoaders,F,L,Learner,defaults,trainable_params
from cekd_fastai.branches import branch_net,branch_splitter
from cekd_fastai.cekd import CEKD
from cekd_fastai.css.callback import CSS
from cekd_fastai.css.net import css_net
from cekd_fastai.distill import BranchLoss,CleanPass,Components,Distill
from cekd_fastai.ema import ModelEMA
from cekd_fastai.compiled import GradCheckpoint
from cekd_fastai.learner import branch_learner,css_learner,meal_learner,online_learner
from cekd_fastai.mix.callback import CutMix
from cekd_fastai.mix.snapmix import SnapMix

@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch): monkeypatch.setattr(defaults, 'use_cuda', False)

def noise(bs=4):
    g = torch.Generator().manual_seed(0)
    ds = L(zip(torch.randn(8,3,64,64, generator=g), torch.arange(8)%3))
    dls = DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, shuffle=False, drop_last=False)
    dls.c = 3
    return dls

def learner(*cbs, n=2, bs=4):
    torch.manual_seed(0)
    net = branch_net('test_resnet', 3, n, pretrained=False)
    return Learner(noise(bs), net, loss_func=CrossEntropyLossFlat(), splitter=branch_splitter, cbs=[BranchLoss(),Components(),*cbs])

def quiet(learn, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=list(cbs))
    return learn

class TwoParts(Distill):
    "Two parts, the second with a weight"
    def part_names(self): return ['a','b']
    def weights(self): return {'b':.5}
    def losses(self): return {'a':self.logits[0].sum(), 'b':self.logits[1].square().mean()}
    def loss_divisor(self): return 4

class Spy(Callback):
    "The losses and the parts of each step"
    order = 900
    def __init__(self): self.rows = []
    def after_loss(self):
        if not self.training: return
        parts = {k:v.item() for k,v in self.learn.two_parts.parts.items()}
        self.rows.append((self.learn.loss_grad.item(), self.learn.loss.item(), parts))

def test_formula():
    "The weighted sum goes to `backward`, and is displayed divided"
    spy = Spy()
    quiet(learner(TwoParts()), spy)
    assert len(spy.rows)==2
    for grad,shown,parts in spy.rows:
        assert grad==pytest.approx(parts['a']+.5*parts['b'], rel=1e-5)
        assert shown==pytest.approx(grad/4, rel=1e-5)

def test_data_parallel_is_refused():
    "It joins the logits of branches along the wrong dimension"
    learn = learner()
    learn.add_cb(ParallelTrainer([0]))
    with pytest.raises(ValueError, match='`DataParallel` joins the wrong way.*distrib_ctx'): quiet(learn)

def test_further_targets_reach_the_loss():
    "Weights of the images in the data: all calls of the loss that train have them, mixed as the labels are; CSS refuses them"
    seen = []
    def weighted(z, y, w=None, reduction='mean'):
        seen.append(w is not None)
        loss = F.cross_entropy(z, y, reduction='none')*(1 if w is None else w)
        return loss if reduction=='none' else loss.mean()
    dls = noise()
    for dl in dls.loaders: dl.dataset = dl.items = L((x,y,torch.tensor(.5)) for x,y in dl.dataset)
    dls.n_inp = 1
    def run(net, *cbs): return quiet(Learner(dls, net, loss_func=weighted, splitter=branch_splitter, cbs=[Components(),*cbs]))
    net = branch_net('test_resnet', 3, 2, pretrained=False)
    for more in ([CutMix()],[CutMix(prob=1e-6)]):
        seen.clear()
        run(net, BranchLoss(), CEKD(ramp=0), *more)
        assert seen and all(seen)
    with pytest.raises(ValueError, match='give 2 targets'): run(css_net(('test_resnet','test_resnet'), 3, 2, pretrained=False), CSS())

def test_a_search_looks_at_the_whole_loss():
    weights = []
    class Look(Callback):
        order = 6
        def after_loss(self): weights.append(self.learn.cekd.weights()['cross'])
    learn = learner(CutMix(), CEKD(w_cross=2.), Look())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert set(weights)=={2.}

def test_columns_are_means_over_images():
    "Each column is the mean over the images of the epoch"
    spy = Spy()
    learn = learner(TwoParts(), bs=3) # the last batch has two images
    quiet(learn, spy)
    want = [sum(n*parts[k] for n,(_,_,parts) in zip((3,3,2), spy.rows))/8 for k in 'ab']
    assert list(learn.recorder.values[-1][2:])==pytest.approx(want, rel=1e-5)

class NeedsClean(Distill):
    "Looks at its clean pass"
    needs_clean = True
    def __init__(self): self.passes = []
    def part_names(self): return ['z']
    def losses(self):
        self.passes.append(self.clean)
        return {'z':self.logits.square().mean()}

@pytest.mark.parametrize('mix', [CutMix,SnapMix])
def test_clean_pass(mix):
    "The clean pass has gradient and the unmixed images, and nothing of it stays after the step or the run"
    cb,m = NeedsClean(),mix()
    learn = quiet(learner(cb, m))
    assert len(cb.passes)==2 and all(isinstance(o, CleanPass) for o in cb.passes)
    for o,(x,_) in zip(cb.passes, learn.dls.train):
        assert torch.equal(o.x, x) and o.logits.shape==(2,4,3) and o.logits.requires_grad and len(o.feats)==2
    assert (cb.clean,cb.logits,cb.feats,cb.parts)==(None,)*4 and m.lent_maps is None

def test_no_clean_pass_without_a_mix():
    cb = NeedsClean()
    quiet(learner(cb))
    assert cb.passes==[None,None]

class Stop(Callback):
    order = 7
    def after_loss(self): raise KeyboardInterrupt

def test_interrupt_leaves_no_state():
    "A run after an interrupted one begins with empty sums and without the tensors of the step that was cut"
    cb = NeedsClean()
    learn = learner(cb, CutMix())
    with pytest.raises(KeyboardInterrupt): quiet(learn, Stop())
    assert cb.clean is not None
    cb.passes.clear()
    quiet(learn)
    assert len(cb.passes)==2 and cb.clean is None

def test_parts_are_dropped_unless_kept():
    "An optional part of the network stays while a callback of the learner keeps it"
    for keep in (True,False):
        learn = learner(TwoParts())
        learn.model.ema = ModelEMA(learn.model)
        if keep: learn.two_parts.keeps = ('ema',)
        assert hasattr(quiet(learn).model, 'ema')==keep

# ---- learners

TEACHER = branch_net('test_resnet', 3, 1, pretrained=False)
LEARNERS = dict(branch=partial(branch_learner, arch='test_resnet'), peers=partial(branch_learner, arch=('test_resnet','test_resnet')),
    meal=partial(meal_learner, arch='test_resnet', teachers=TEACHER), online=partial(online_learner, arch='test_resnet'),
    css=partial(css_learner, archs=('test_resnet','test_resnet')))
plain = dict(pretrained=False, loss_func=CrossEntropyLossFlat())

@pytest.mark.parametrize('name', LEARNERS)
def test_one_body(name):
    "Frozen statistics freeze batch normalisation as a whole, every parameter is in one group, and yours has priority"
    make = partial(LEARNERS[name], noise(), **plain)
    learn = make(freeze_bn=True)
    assert learn.train_bn is False and make().train_bn is True and make(freeze_bn=True, train_bn=True).train_bn is True
    groups = [id(p) for g in learn.splitter(learn.model) for p in g]
    assert sorted(groups)==sorted(id(p) for p in learn.model.parameters())
    assert make(splitter=trainable_params).splitter is trainable_params
    assert [o for o in learn.cbs if isinstance(o, Components)]

@pytest.mark.parametrize('name', LEARNERS)
def test_unknown_classes(name):
    dls = noise()
    del dls.c
    with pytest.raises(ValueError, match='number of classes cannot be told from `dls`'): LEARNERS[name](dls, **plain)

@pytest.mark.parametrize('name', ['branch','peers','online'])
def test_grad_checkpoint(name):
    "The same weights as without it, to rounding, and it is off after the run"
    res = []
    for cbs in ([], [GradCheckpoint()]):
        torch.manual_seed(1)
        learn = LEARNERS[name](noise(), cbs=cbs, **plain)
        quiet(learn)
        res.append(torch.cat([p.flatten() for p in learn.model.state_dict().values()]))
    torch.testing.assert_close(*res, atol=1e-5, rtol=1e-4)
    assert not learn.model.grad_checkpoint
