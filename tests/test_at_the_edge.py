"Callbacks where a run is not as usual: locked, killed within an epoch, with summed losses, without labels, in half precision."
import math,warnings
from functools import partial
import pytest,torch
import torch.nn.functional as F
from fastai.vision.all import Adam,Callback,CrossEntropyLossFlat,DataLoaders,Learner,SGD,first,set_seed,tensor
from cekd_fastai.all import *
from cekd_fastai.core import HalfPrecision
from cekd_fastai.diagnose import Diagnose
from cekd_fastai.css.branches import css_branch_net
from cekd_fastai.meal.heads import fit_head
from cekd_fastai.midlevel import mid_net
from cekd_toys import CatchStep,FixedMix,Items,learner,quiet,tiny,toy_dls

def flat(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

# refusals

@pytest.mark.parametrize('wrong,remedy', [((CutMix,MixUp),MixUp), ((CEKD,),CEKD), ((PSKD,OnlineLabelSmoothing),PSKD)])
def test_a_refusal_leaves_no_learner_locked(wrong, remedy):
    "A validation asks nothing of what is for training; a fit is refused, and both work once it is mended"
    learn = learner(tiny(2))
    learn.add_cbs([o() for o in wrong])
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        assert len(learn.get_preds()[0])==8 and not learn.lock.locked()
        with pytest.raises(ValueError): learn.fit(1)
        learn.validate()
        learn.remove_cb(first(cb for cb in learn.cbs if isinstance(cb, remedy)))
        learn.fit(1)
        learn.validate()

# killed runs

class Kill(Callback):
    "Ends a run within its second epoch"
    order,run_valid = 3000,False
    def after_batch(self):
        if self.epoch==1 and self.iter==1: raise SystemExit(137)

@pytest.mark.parametrize('method', [PSKD,OnlineLabelSmoothing,partial(StoredTargets, ramp=0)])
@pytest.mark.parametrize('late', [True,False])
def test_soft_labels_go_on_within_an_epoch(method, late, tmp_path):
    "Passed to the learner or to `fit`: the weights are those of a run that was not killed"
    def run(folder, *more):
        soft,mix = method(),[FixedMix(prob=.6)]*('StoredTargets' in str(method))
        learn = learner(tiny(2), *mix, *([] if late else [soft]), dls=toy_dls(32, 8))
        return quiet(learn, 3, cbs=[*([soft] if late else []), Checkpoint(folder, every=1, signals=False), *more])
    whole = run(tmp_path/'whole')
    with pytest.raises(SystemExit): run(tmp_path/'killed', Kill())
    again = run(tmp_path/'killed')
    assert torch.equal(flat(whole), flat(again))

def test_what_was_gathered_in_an_epoch_that_ended_early_is_forgotten():
    learn = learner(tiny(2), OnlineLabelSmoothing(), dls=toy_dls(32, 8))
    class End(Callback):
        order,run_valid = 3000,False
        def after_batch(self):
            if self.iter==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet(learn, 1, cbs=End())
    learn.online_label_smoothing.memory['sums'] += 1
    quiet(learn, 1, cbs=Watch(seen := []))
    assert seen[0]==0

class Watch(Callback):
    "What online label smoothing has gathered before the first batch"
    order,run_valid = 3000,False
    def __init__(self, seen): self.seen = seen
    def before_batch(self): self.seen.append(self.learn.online_label_smoothing.memory['sums'].sum().item())

def test_a_run_that_has_ended_says_so(tmp_path):
    learn = learner(tiny(2))
    quiet(learn, 1, cbs=Checkpoint(tmp_path, signals=False))
    with pytest.warns(UserWarning, match='This fit has reached its end'): quiet(learn, 1, cbs=Checkpoint(tmp_path, signals=False))

# half precision

class Infinite(Callback):
    "A loss that is no number in the second batch"
    order,run_valid = 7,False
    def after_loss(self):
        if self.iter==1: self.learn.loss_grad = self.learn.loss_grad*math.nan

@pytest.mark.parametrize('lazy', [False,True])
@pytest.mark.parametrize('half', ['fp16','bf16',None])
def test_guard_in_half_precision(half, lazy, tmp_path):
    guard = Guard(folder=tmp_path)
    guard.lazy = lazy
    learn = learner(tiny(2), guard, *([HalfPrecision(half)] if half else []), Infinite(), dls=toy_dls(32, 8))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, 2)
    assert guard.skipped==2 and flat(learn).isfinite().all()

# images without a class

def void_dls():
    dls = toy_dls(16, 8)
    items = Items((x,tensor(-100) if i in (1,6) else y) for i,(x,y) in enumerate(dls.train_ds))
    res = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu', shuffle=False, drop_last=False)
    res.c = 3
    return res

@pytest.mark.parametrize('make', [PSKD,OnlineLabelSmoothing])
def test_pixels_without_a_class_change_nothing(make):
    "Whatever a picture of class -100 shows, the network becomes the same"
    def trained(shown):
        dls = void_dls()
        items = Items((x+shown if y<0 else x,y) for x,y in dls.train_ds)
        own = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu', shuffle=False, drop_last=False)
        own.c = 3
        learn = learner(tiny(2), make(), dls=own)
        learn.metrics = []
        return flat(quiet(learn, 3))
    assert torch.allclose(trained(0.), trained(2.), atol=1e-6)

@pytest.mark.parametrize('cbs', [(SnapMix(),), (SnapMix(),CEKD()), (CutMix(),CEKD(confident=True)), (OnlineLabelSmoothing(),), (PSKD(),),
    (CutMix(prob=.6),StoredTargets()), (SnapMix(),CEKD(),OnlineLabelSmoothing()), (SnapMix(),CEKD(),Diagnose())], ids=str)
def test_images_without_a_class(cbs):
    "-100, which cross-entropies leave out: nothing is learned of their class"
    learn = learner(tiny(2), *cbs, dls=void_dls())
    learn.metrics = []
    quiet(learn, 2)
    assert flat(learn).isfinite().all()

def test_soft_labels_of_images_without_a_class():
    "The loss is that of the others alone"
    ols = OnlineLabelSmoothing()
    learn = learner(tiny(2), ols, dls=void_dls())
    learn.metrics = []
    quiet(learn, 1)
    y = tensor([0,-100])
    assert ols.targets(y)[1].sum()==0 and ols.targets(y)[0].sum()>.99

# summed losses

def cekd(lf):
    learn = learner(tiny(2), FixedMix(), CEKD(ramp=0))
    learn.loss_func = lf
    return learn

@pytest.mark.parametrize('make', [
    lambda lf: online_learner(toy_dls(size=32), 'test_resnet', 'dml', 2, pretrained=False, loss_func=lf, opt_func=SGD, lr=1e-3),
    lambda lf: online_learner(toy_dls(size=32), 'test_resnet', 'diversity', 3, pretrained=False, loss_func=lf, opt_func=SGD, lr=1e-3),
    lambda lf: meal_learner(toy_dls(size=32), 'test_resnet', [tiny(1, seed=4)], taps=0, adversarial=None, w_hard=1., pretrained=False, loss_func=lf, opt_func=SGD, lr=1e-3),
    lambda lf: css_learner(toy_dls(size=64), ('test_resnet',)*2, 2, pretrained=False, loss_func=lf, opt_func=SGD, lr=1e-3),
    cekd], ids=['dml','ffm','meal','css','cekd'])
@pytest.mark.parametrize('form', ['class','partial'])
def test_a_summed_loss_sums_all_parts(make, form):
    "Each part is as many times the mean as there are images, so that their weights stay"
    lf = (lambda r: CrossEntropyLossFlat(reduction=r)) if form=='class' else (lambda r: partial(F.cross_entropy, reduction=r))
    parts = []
    for r in ('mean','sum'):
        set_seed(0)
        learn = make(lf(r))
        step = CatchStep()
        set_seed(1)
        quiet(learn, cbs=step)
        parts.append({k:float(v) for k,v in step.parts.items() if k!='disc'})
    assert any(v>1e-4 for v in parts[0].values())
    for k,v in parts[0].items(): assert parts[1][k]==pytest.approx(8*v, rel=1e-3, abs=1e-5), k

def test_css_refuses_a_loss_that_ignores_a_class():
    for lf in (CrossEntropyLossFlat(ignore_index=0),partial(F.cross_entropy, ignore_index=0)):
        with pytest.raises(ValueError, match='the loss ignores class 0'): css_learner(toy_dls(size=64), ('test_resnet',)*2, 2, pretrained=False, loss_func=lf)

# others

def test_a_head_for_one_image_of_each_class():
    res = fit_head(torch.randn(5, 8), torch.arange(5), 5)
    assert math.isnan(res.accuracy) and res.n_held==0 and res.n_fit==5
    assert res.head(torch.randn(2, 8)).shape==(2,5)

def test_heads_train_beside_a_gate_with_a_decay_of_its_own():
    dls = toy_dls(size=32)
    one,own = (online_learner(dls, 'test_resnet', 'ffl', 2, pretrained=False, wd=1e-4, opt_func=Adam, loss_func=CrossEntropyLossFlat(), **kw) for kw in ({},dict(wd_gate=1e-5)))
    frozen = []
    for o in (one,own):
        o.freeze()
        frozen.append([k for k,p in o.model.named_parameters() if p.requires_grad and 'bn' not in k and p.ndim>1])
    assert frozen[0]==frozen[1] and any(k.startswith('heads') for k in frozen[1]) and any(k.startswith('gate') for k in frozen[1])

@pytest.mark.parametrize('n', [1,3,4])
def test_channels_are_permuted_in_any_picture(n):
    "Of each picture by itself: nothing of another in the batch gets into it"
    net = css_branch_net('test_resnet', 3, 2, transform='permute', pretrained=False, in_chans=n).eval()
    x = torch.randn(2, n, 64, 64)
    both,alone = net.branch_forward(x)[0],torch.cat([net.branch_forward(o[None])[0] for o in x], 1)
    assert torch.allclose(both, alone, atol=1e-5)

def test_the_loss_shown_counts_the_classifier_beside_the_branches():
    "At rate 0 training and validation are the same"
    net = mid_net('test_resnet', 3, 1, pretrained=False).eval()
    learn = Learner(toy_dls(size=32), net, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=0., cbs=[BranchLoss()], train_bn=False)
    quiet(learn, 1)
    train,valid = learn.recorder.values[-1][:2]
    assert train<1.6*valid
