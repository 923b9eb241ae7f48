"Half precision by autocast on the processor, for every method with every mix: near full precision, and really in half."
import math,pickle,warnings
import pytest,torch
from fastai.vision.all import Callback,CrossEntropyLossFlat,DataLoaders,L,SGD,set_seed
from cekd_fastai.branches import branch_net
from cekd_fastai.cekd import CEKD
from cekd_fastai.core import HalfPrecision
from cekd_fastai.learner import branch_learner,css_learner,meal_learner,online_learner
from cekd_fastai.mix.callback import CutMix,Mix,MixUp
from cekd_fastai.mix.snapmix import MixOneOf,SnapMix
from cekd_fastai.online.callback import ONLINE
from cekd_fastai.own_targets import PSKD,StoredTargets
from cekd_fastai.soft_labels import OnlineLabelSmoothing

arch,n_out = 'cifar_resnet8',3
kw = dict(pretrained=False, loss_func=CrossEntropyLossFlat(), opt_func=SGD)

class Look(Callback):
    "In which precision the first layer of a network computes while it trains, and the loss"
    def before_fit(self):
        self.seen,self.loss_seen = set(),set()
        m = next(m for m in self.learn.model.modules() if isinstance(m, torch.nn.Conv2d))
        self.hook = m.register_forward_hook(lambda m,i,o: self.seen.add(o.dtype) if self.learn.training else None)
    def before_backward(self): self.loss_seen.add(self.learn.loss_grad.dtype)
    def after_fit(self): self.hook.remove()

class ScaleSeen(Callback):
    "By what the loss is multiplied before the backward pass"
    order = 11 # after mixed precision
    def before_fit(self): self.scales = set()
    def before_backward(self): self.scales.add(round(float(self.learn.loss_grad.detach()/self.learn.loss), 3))

def toy():
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(8, 3, 8, 8, generator=g), torch.randint(0, n_out, (8,), generator=g)))
    dls = DataLoaders.from_dsets(items, items[:4], bs=4, device='cpu', shuffle=False, num_workers=0)
    dls.c = n_out
    return dls

def plain(*cbs): return branch_learner(toy(), arch, 1, cbs=cbs, **kw)
def cekd(*cbs, **args):
    mix = [] if any(isinstance(o, Mix) for o in cbs) else [CutMix()] # it needs one
    return branch_learner(toy(), arch, cbs=[*mix,CEKD(**args),*cbs], **kw)
def meal(*cbs, mode='joint'): return meal_learner(toy(), arch, [branch_net(arch, n_out, 1, pretrained=False).eval()], cbs=cbs, adversarial=mode, **kw)
def css(*cbs): return css_learner(toy(), (arch,arch), 2, cbs=cbs, **kw)
def soft(cb): return lambda *cbs: plain(cb(), *cbs)

METHODS = dict(plain=plain, cekd=cekd, cekd_ema=lambda *o: cekd(*o, teacher='ema'), cekd_maps=lambda *o: cekd(*o, fuse='maps'), css=css)
METHODS |= {f'meal_{o}': (lambda *cbs,o=o: meal(*cbs, mode=o)) for o in ('joint','grl','alternate')} | dict(meal_none=lambda *o: meal(*o, mode=None))
METHODS |= {o: (lambda *cbs,o=o: online_learner(toy(), arch, o, cbs=cbs, **kw)) for o in ONLINE}
METHODS |= dict(smoothing=soft(OnlineLabelSmoothing), pskd=soft(PSKD), stored=soft(StoredTargets))
MIXES = dict(none=list, mixup=lambda **k: [MixUp(**k)], cutmix=lambda **k: [CutMix(**k)], snapmix=lambda **k: [SnapMix(**k)],
    oneof=lambda **k: [MixOneOf([MixUp(),CutMix(),SnapMix()], **k)])
SOME = ('smoothing','pskd','stored') # which learn from unmixed batches, so not all may be mixed

def losses(method, mix, *cbs):
    "Losses of two steps and of a validation, and what `Look` has seen"
    set_seed(3)
    args = dict(prob=.5) if method in SOME and mix!='none' else {}
    learn = METHODS[method](*MIXES[mix](**args), look := Look(), *cbs)
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1, .01)
    return [float(o) for o in learn.recorder.losses]+[float(learn.recorder.values[0][1])],look

pairs = [(a,b) for a in METHODS for b in MIXES if (a,b)!=('stored','none')] # stored targets teach about mixes

@pytest.mark.parametrize('method,mix', pairs)
def test_half_is_near_full(method, mix):
    full,half = losses(method, mix),losses(method, mix, HalfPrecision())
    assert half[1].seen=={torch.bfloat16} and full[1].seen=={torch.float32}
    assert half[1].loss_seen=={torch.float32} and all(math.isfinite(o) for o in half[0])
    assert half[0]==pytest.approx(full[0], rel=.05, abs=.02) and half[0]!=full[0]

@pytest.mark.parametrize('mode,dtype,scale', [('bf16',torch.bfloat16,1.), ('fp16',torch.float16,2.**16)])
def test_no_warning_and_a_file(mode, dtype, scale):
    "Training warns of nothing, a loss in float16 is scaled, and what went through a file predicts in the same precision"
    learn = plain(look := Look(), half := HalfPrecision(mode), scaled := ScaleSeen())
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*CUDA')
        learn.fit(1, .01)
    assert look.seen=={dtype} and scaled.scales=={scale}
    loaded,seen = plain(pickle.loads(pickle.dumps(half))),set()
    next(m for m in loaded.model.modules() if isinstance(m, torch.nn.Conv2d)).register_forward_hook(lambda m,i,o: seen.add(o.dtype))
    with loaded.no_bar(): p,_ = loaded.get_preds()
    assert seen=={dtype} and p.dtype==torch.float32 and len(p)==4

def test_mixed_precision_of_the_users_own():
    "A subclass has another name; passes outside the step are in its precision all the same"
    class MyAMP(HalfPrecision): name = 'my_amp'
    learn = cekd(CutMix(), MyAMP('bf16'))
    seen,net = [],learn.model.trunk
    hook = net.register_forward_hook(lambda m,x,y: seen.append(y.dtype))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    hook.remove()
    assert seen and set(seen[:2])=={torch.bfloat16} # the mixed and the clean pass of a step
