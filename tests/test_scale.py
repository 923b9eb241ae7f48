"One step from several batches, compiled trunks, and several processes: the same gradients, draws of their own, and an end that all agree on."
import math,os,warnings
import pytest,torch
from fastai.vision.all import Callback,CancelFitException,CrossEntropyLossFlat,DataLoaders,L,SGD,accuracy,set_seed
from fastai.callback.training import GradientAccumulation
from cekd_fastai.branches import branch_net
from cekd_fastai.cekd import CEKD
from cekd_fastai.checkpoint import Checkpoint
from cekd_fastai.guard import Guard
from cekd_fastai.learner import branch_learner,css_learner,meal_learner,online_learner
from cekd_fastai.online.callback import ONLINE
from cekd_fastai.soft_labels import OnlineLabelSmoothing,PSKD,StoredTargets
from cekd_toys import BoxMix,FixedMix

arch,n_out = 'cifar_resnet8',3
kw = dict(pretrained=False, freeze_bn=True, loss_func=CrossEntropyLossFlat(), metrics=accuracy, opt_func=SGD)

def toy(bs=4, n=16, **kwargs):
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(n, 3, 16, 16, generator=g), torch.randint(0, n_out, (n,), generator=g)))
    dls = DataLoaders.from_dsets(items, items, bs=bs, val_bs=4, device='cpu', **dict(shuffle=False, drop_last=False) | kwargs)
    dls.c = n_out
    return dls

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
METHODS |= dict(smoothing=soft(lambda: [OnlineLabelSmoothing()]), pskd=soft(lambda: [PSKD()]), stored=soft(lambda: [LateMix(stop_at=.999),StoredTargets(ramp=1.)]))
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

# One step from several batches

@pytest.mark.parametrize('method', METHODS)
def test_accumulated_is_the_large_batch(method):
    "Four steps of two batches each end where four steps of the large batch do, ramps and discriminators included."
    large,added = trained(METHODS[method], bs=8),trained(METHODS[method], GradientAccumulation(8))
    assert apart(large, added)<1e-5
    assert apart(large, trained(METHODS[method]))>1e-4 # and not where eight steps of the small one do

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
