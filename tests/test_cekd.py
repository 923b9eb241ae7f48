"CEKD against references written as loops, in several processes, through interrupts, and what each option changes."
import copy,itertools,warnings
import pytest,torch,torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.vision.all import (CancelBatchException,CancelFitException,CancelStepException,CancelTrainException,CancelValidException,Callback,
    CrossEntropyLossFlat,DataLoaders,L,Learner,load_learner,nn,set_seed,tensor)
from cekd_fastai.branches import branch_net,branch_splitter,peer_net
from cekd_fastai.cekd import CEKD,TARGETS,TEACHERS,cekd_losses,region_logits,teacher_logits
from cekd_fastai.core import HalfPrecision,unwrap_model
from cekd_fastai.diagnose import Diagnose
from cekd_fastai.distill import BranchLoss
from cekd_fastai.losses import cross_target,mixed_loss,soft_probs
from cekd_fastai.mix.callback import CutMix,mix_of
from cekd_fastai.mix.core import MixRecord,mix_pixels
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.ranks import own_buffers
from cekd_toys import lf,FixedMix,BoxMix,tiny,peers,toy_dls,learner,quiet,CatchStep,first_step,flat,Raise
from forks import one_and_two

# References

def softmax(z, T=1.): return [(v/T).exp()/sum((o/T).exp() for o in z) for v in z]

def loop_cekd(mixed, clean, y, la, lb, perm, T, teacher, target):
    "One image and one class after the other"
    n,B,K = mixed.shape
    hard = [0] if target=='separate' else list(range(n))
    soft = list(range(1,n)) if target=='separate' else list(range(n))
    ce_mix = cross = ce_clean = 0.
    for b in range(B):
        j,s = perm[b].item(),la[b]+lb[b]
        for i in hard:
            p = softmax(mixed[i,b])
            w = (la[b]/s,lb[b]/s) if target=='fused' else (la[b],lb[b])
            ce_mix += -(w[0]*p[y[b]].log()+w[1]*p[y[j]].log())/B
        for i in soft:
            others = [k for k in range(n) if k!=i]
            who = dict(ensemble=range(n), branch=[0], peer=others)[teacher]
            def says(b): return softmax([sum(clean[k,b,c] for k in who)/len(who) for c in range(K)], T)
            qa,qb = says(b),says(j)
            q = [(la[b]*u+lb[b]*v)/s for u,v in zip(qa,qb)]
            p = softmax(mixed[i,b], 1. if target=='fused' else T)
            cross += sum(-q[c]*p[c].log() if target=='fused' else T*T*q[c]*(q[c].log()-p[c].log()) for c in range(K))/B
        ce_clean += sum(-softmax(clean[i,b])[y[b]].log() for i in range(n))/B
    return dict(ce_mix=ce_mix, cross=cross, ce_clean=ce_clean)

@pytest.fixture
def case():
    g = torch.Generator().manual_seed(1)
    mixed,clean = (torch.randn(3,5,4, generator=g, dtype=torch.float64)*2 for _ in range(2))
    perm,y = tensor([2,0,1,4,3]),tensor([0,1,1,3,2])
    return mixed,clean,y,MixRecord(perm, torch.rand(5, generator=g, dtype=torch.float64)+.05, torch.rand(5, generator=g, dtype=torch.float64)+.05)

@pytest.mark.parametrize('n', [2,3])
@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('teacher', [o for o in TEACHERS if o!='ema'])
def test_losses_exact(case, teacher, target, n):
    mixed,clean,y,rec = case
    mixed,clean = mixed[:n],clean[:n]
    want = loop_cekd(mixed, clean, y, rec.lam_a, rec.lam_b, rec.perm, 2.5, teacher, target)
    got = cekd_losses(mixed, clean, y, rec, lf, 2.5, teacher, target)
    for k in want: assert got[k].item()==pytest.approx(want[k].item(), rel=1e-5), k

def test_other_teacher_exact(case):
    "Given logits teach every branch, as those of an average do"
    mixed,clean,y,rec = case
    got = cekd_losses(mixed, clean, y, rec, lf, 3., 'ema', 'both', logits=clean[1:2])
    want = loop_cekd(mixed, clean[[1,0,2]], y, rec.lam_a, rec.lam_b, rec.perm, 3., 'branch', 'both')
    assert got['cross'].item()==pytest.approx(want['cross'].item(), rel=1e-5)

@pytest.mark.parametrize('w_cross,pct', [(1.,1.),(3.,1.),(1.,.1),(0.,1.)])
def test_fused_target_exact(w_cross, pct):
    "The weighted parts are the cross-entropy towards the fused target; mu ends at w_cross/(1+w_cross)"
    cb = CEKD(w_cross=w_cross, target='fused', ramp=.3, **dict(T=2.) if w_cross else {})
    learn = learner(tiny(), FixedMix(), cb)
    x,y = learn.dls.one_batch()
    rec = FixedMix().mix(x, y)[1]
    learn.mix = None
    learn.fixed_mix.record,learn.pct_train = rec,pct
    net = learn.model.train()
    mixed,clean = net(FixedMix().mix(x, y)[0])[0],net(x)[0]
    parts,w = cekd_losses(mixed, clean, y, rec, lf, 2., target='fused'),cb.weights()
    mu = w_cross/(1+w_cross)*(1. if pct>=.3 else torch.exp(tensor(-5*(1-pct/.3)**2)).item())
    q = cross_target(soft_probs(clean.mean(0), 2.), rec)
    t = (1-mu)*cross_target(F.one_hot(y, 3).float(), rec)+mu*q
    want = sum(-(t*z.log_softmax(-1)).sum(-1).mean() for z in mixed)
    assert (w['ce_mix']*parts['ce_mix']+w['cross']*parts['cross']).item()==pytest.approx(want.item(), rel=1e-5)

# Invariants

@pytest.mark.parametrize('teacher', [o for o in TEACHERS if o!='ema'])
def test_target_of_unmixed_and_sum(case, teacher):
    _,clean,y,rec = case
    one = MixRecord(rec.perm, torch.ones(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64))
    for p in soft_probs(teacher_logits(clean, teacher), 3.):
        assert torch.allclose(cross_target(p, one), p.double(), atol=3e-6)
        assert torch.allclose(cross_target(p, rec).sum(-1), torch.ones(5, dtype=torch.float64), atol=1e-6)

@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('teacher', [o for o in TEACHERS if o!='ema'])
def test_gradient_into_clean(case, teacher, target):
    mixed,clean,y,rec = case
    for detach in (True,False):
        m,c = mixed.clone().requires_grad_(),clean.clone().requires_grad_()
        g = torch.autograd.grad(cekd_losses(m, c, y, rec, lf, 3., teacher, target, detach)['cross'], (m,c), allow_unused=True)
        assert g[0].abs().sum()>0 and (g[1] is None if detach else g[1].abs().sum()>0)

def test_both_without_cross_loss_is_mixed_loss():
    "One head that hears everything, without distillation: the plain mixed loss, and with `w_clean` the clean loss beside it"
    for w_clean in (0.,.5):
        a = first_step(tiny(1), FixedMix(), CEKD(w_cross=0, w_clean=w_clean, target='both'))
        net = tiny(1).train()
        x,y = toy_dls().one_batch()
        xm,rec = FixedMix().mix(x, y)
        (mixed_loss(lf, net(xm)[0][0], y, rec)+w_clean*lf(net(x)[0][0], y)).backward()
        for k,p in net.named_parameters(): assert torch.allclose(a.grads[k], p.grad, atol=1e-6), k
    b = first_step(tiny(1), FixedMix())
    assert torch.allclose(flat(b), flat(first_step(tiny(1), FixedMix(), CEKD(w_cross=0, w_clean=0, target='both'))), atol=1e-6)

def test_roles():
    "Separate: the hard label has no gradient in the soft branch, nor the soft target in the label branch"
    for kw,silent in ((dict(w_cross=0, clean_on='label', target='both'),None),(dict(w_clean=0, ramp=0),None)):
        g = first_step(tiny(2), FixedMix(), CEKD(**kw)).grads
        assert all(v.abs().sum()>0 for v in g.values())
    alone = first_step(tiny(2), FixedMix()).grads
    sep = first_step(tiny(2), FixedMix(), CEKD(w_clean=0, ramp=0)).grads
    assert all(torch.allclose(alone[k], sep[k], atol=1e-6) for k in sep if k.startswith(('branches.0','heads.0')))
    assert not torch.allclose(alone['heads.1.2.weight'], sep['heads.1.2.weight'], atol=1e-3)

# Every option changes the step

base = dict(ramp=0.)
@pytest.mark.parametrize('a,b', [(base,dict(ramp=.5)), (base,dict(w_cross=2., **base)), (base,dict(w_clean=.5, **base)), (base,dict(T=1., **base)),
    (base,dict(teacher='branch', **base)), (base,dict(target='both', **base)), (base,dict(target='fused', **base)), (base,dict(detach=False, **base)),
    (base,dict(confident=True, **base)), (base,dict(clean_on='label', **base)), (dict(target='both', teacher='branch', **base),dict(target='both', teacher='peer', **base)),
    (dict(target='both', **base),dict(target='both', teacher='peer', **base)), (dict(w_cross=.5, target='fused', **base),dict(target='fused', **base))])
def test_options_count(a, b):
    runs = [flat(first_step(tiny(2), FixedMix(), CEKD(**o))) for o in (a,a,b)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2], rtol=1e-3, atol=1e-5)

@pytest.mark.parametrize('kw', [{}, dict(target='fused'), dict(target='both', teacher='peer'), dict(joint=True), dict(confident=True)])
def test_maps_change_the_target(kw):
    "Targets of what is visible train another way than targets by label weights"
    runs = [flat(first_step(tiny(2), BoxMix(), CEKD(ramp=0, fuse=o, **kw))) for o in ('labels','maps')]
    assert not torch.allclose(*runs, rtol=1e-3, atol=1e-5)

def test_maps_detach():
    "No gradient of a target from maps reaches the clean pass, unless it may"
    runs = [flat(first_step(tiny(2), BoxMix(), CEKD(ramp=0, w_clean=0, fuse='maps', detach=o))) for o in (True,False)]
    assert not torch.allclose(*runs, rtol=1e-3, atol=1e-5)
    seen = []
    class Keep(Callback):
        order = 90
        def after_loss(self): seen.append((self.cekd.region.requires_grad, self.cekd.region.shape))
    for o in (True,False): first_step(tiny(2), BoxMix(), CEKD(fuse='maps', detach=o), Keep())
    assert seen==[(False,(2,8,3)),(True,(2,8,3))]

@pytest.mark.parametrize('layer', [nn.Dropout(.5),nn.BatchNorm2d(8)])
def test_maps_leave_the_heads_alone(layer):
    "A target from maps has no dropout in it, and its places do not count for the statistics of batch norm"
    def run(fuse):
        net,seen = tiny(2),[]
        for h in net.heads: h.insert(0, copy.deepcopy(layer))
        class Keep(Callback):
            order = 90
            def after_loss(self):
                if fuse=='maps': seen.append(torch.equal(self.cekd.region, self.cekd._region_logits(self.cekd.clean.feats, self.cekd.record, (16,16))))
        first_step(net, BoxMix(), CEKD(fuse=fuse), Keep())
        return seen,dict(net.named_buffers()),net
    (seen,a,net),(_,b,_) = run('maps'),run('labels')
    assert seen==[True] and all(torch.equal(v, b[k]) for k,v in a.items()) and net.heads.training

@pytest.mark.parametrize('box', [(2,0,8,4), tensor([[2,0,8,4],[0,0,0,0],[0,0,8,8]])])
def test_region_is_the_pasted_map(box):
    "Boxes on the borders of the map's places: pasting the maps like pixels, then pooling, gives the same logits"
    g = torch.Generator().manual_seed(0)
    feat,perm = torch.randn(3,5,4,4, generator=g),tensor([2,0,1])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5,6))
    rec = MixRecord(perm, torch.ones(3), torch.ones(3), box, box)
    small = MixRecord(perm, rec.lam_a, rec.lam_b, *[tuple(v//2 for v in box) if isinstance(box, tuple) else box//2]*2)
    assert torch.allclose(region_logits(head, feat, rec, (8,8)), head(mix_pixels(feat, small)), atol=1e-6)

def test_region_of_mixup_and_resized():
    "MixUp mixes the logits; a donor's box that is enlarged counts as much as the host's place that it fills"
    g = torch.Generator().manual_seed(0)
    feat,perm = torch.randn(2,5,4,4, generator=g),tensor([1,0])
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5,6))
    z = head(feat)
    mixup = MixRecord(perm, torch.ones(2), torch.ones(2), host_share=.3)
    assert torch.allclose(region_logits(head, feat, mixup, (8,8)), .3*z+.7*z[perm], atol=1e-6)
    snap = MixRecord(perm, torch.ones(2), torch.ones(2), (0,0,8,4), (4,4,8,8))
    want = (head(feat[...,2:,:])+head(feat[perm][...,2:,2:]))/2
    assert torch.allclose(region_logits(head, feat, snap, (8,8)), want, atol=1e-6)

def test_joint():
    "Without batch norm one call or two are the same step; with it they are not; and the joint one runs the trunk once"
    runs = [flat(first_step(tiny(2), FixedMix(), CEKD(joint=o))) for o in (False,True)]
    assert torch.allclose(*runs, atol=1e-6)
    runs = [flat(first_step(tiny(2, bn=True), FixedMix(), CEKD(joint=o), dls=toy_dls(size=64))) for o in (False,True)]
    assert not torch.allclose(*runs, atol=1e-4)
    for joint,want in ((False,[8,8]),(True,[16])):
        net,sizes = tiny(2),[]
        net.trunk.register_forward_hook(lambda m,i,o: sizes.append(len(o)))
        first_step(net, FixedMix(), CEKD(joint=joint))
        assert sizes==want

def test_no_pass_without_use():
    "Weights of 0 cost nothing: no clean pass, no column"
    for kw,passes,cols in ((dict(w_cross=0, w_clean=0, target='both'),1,['ce_mix']), (dict(w_clean=0),2,['ce_mix','cross']), (dict(w_cross=0, target='both'),2,['ce_mix','ce_clean'])):
        net,calls = tiny(2),[]
        net.trunk.register_forward_hook(lambda m,i,o: calls.append(1))
        g = first_step(net, FixedMix(), CEKD(**kw))
        assert len(calls)==passes and list(g.parts)==cols

def test_summed_losses():
    "A loss that is summed over images is B times its mean in every part"
    runs = []
    for o in ('mean','sum'):
        learn = learner(tiny(2), FixedMix(), CEKD(ramp=0), g:=CatchStep())
        learn.loss_func = CrossEntropyLossFlat(reduction=o)
        quiet(learn)
        runs.append(g.parts)
    assert {k:v/8 for k,v in runs[1].items()}==pytest.approx(runs[0], rel=1e-5)

@pytest.mark.parametrize('target', TARGETS)
def test_unmixed_batches_by_hand(target):
    "A batch that is left unmixed has its labels, once for each branch that learns them, and no cross loss"
    x,y = toy_dls().one_batch()
    z = tiny(2).branch_forward(x)[0]
    parts = first_step(tiny(2), FixedMix(prob=0.), CEKD(target=target)).parts
    hard = z[:1] if target=='separate' else z
    assert parts['cross']==0 and parts['ce_mix']==pytest.approx(sum(lf(o, y).item() for o in hard), rel=1e-5)
    assert parts['ce_clean']==pytest.approx(sum(lf(o, y).item() for o in z), rel=1e-5)

def test_clean_labels_of_the_label_branch():
    x,y = toy_dls().one_batch()
    z = tiny(2).branch_forward(x)[0]
    for where,rows in (('label',z[:1]),('all',z)):
        parts = first_step(tiny(2), FixedMix(), CEKD(clean_on=where)).parts
        assert parts['ce_clean']==pytest.approx(sum(lf(o, y).item() for o in rows), rel=1e-5)

def test_peer_that_is_no_peer():
    "With two branches of which one hears the soft target, teacher='peer' would be teacher='branch'"
    with pytest.raises(ValueError, match="is the same as teacher='branch'"): learner(tiny(2), FixedMix(), CEKD(teacher='peer'))
    first_step(tiny(3), FixedMix(), CEKD(teacher='peer'))

@pytest.mark.parametrize('teacher,target,n', [o for o in itertools.product(TEACHERS, TARGETS, [2,3,4]) if o!=('peer','separate',2)])
def test_crossings_learn(teacher, target, n):
    "Every teacher with every target and number of branches: the loss falls, and every parameter moves"
    learn = learner(tiny(n), FixedMix(prob=.8), CEKD(teacher=teacher, target=target))
    old = copy.deepcopy(dict(learn.model.named_parameters()))
    quiet(learn, 12)
    vals = [o[1] for o in learn.recorder.values]
    assert vals[-1]<vals[0] and all(not torch.equal(old[k], p) for k,p in learn.model.named_parameters())

# Peers

def test_peers_teach_each_other():
    "Each peer's cross loss is the divergence from the other's answer about clean images, and trains that peer only"
    net = peers().train()
    x,y = toy_dls().one_batch()
    xm,rec = FixedMix().mix(x, y)
    (mixed,_),(clean,_) = net(xm),net(x)
    got = cekd_losses(mixed, clean, y, rec, lf, 3., 'peer', 'both')['cross']
    kl = lambda z,t: 9*F.kl_div((z/3).log_softmax(-1), cross_target(soft_probs(t.detach(), 3.), rec), reduction='batchmean')
    assert torch.allclose(got, kl(mixed[0], clean[1])+kl(mixed[1], clean[0]), rtol=1e-5)
    g = torch.autograd.grad(kl(mixed[0], clean[1]), list(net.parameters()), retain_graph=True, allow_unused=True)
    for (k,_),o in zip(net.named_parameters(), g): assert (o is not None and o.abs().sum()>0)==(k.split('.')[1]=='0'), k

def test_peers_train_and_export(tmp_path):
    net = peer_net(('test_resnet','resnet10t'), 3, pretrained=False, arch_args=[{},dict(channels=(16,16,24,32))])
    learn = learner(net, SnapMix(), CEKD(teacher='peer', target='both'), dls=toy_dls(size=64), path=tmp_path)
    quiet(learn, 1)
    before = learn.get_preds()[0]
    learn.export('p.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'p.pkl')
    again.dls = learn.dls
    assert torch.allclose(again.get_preds()[0], before, atol=1e-6)
    assert [len(o) for o in branch_splitter(net)]==[len(list(m.parameters())) for m in (net.trunk,net.branches,net.heads)]

# A good citizen of fastai

variants = [dict(), dict(teacher='ema', validate_ema=True), dict(teacher='peer', target='both', joint=True), dict(target='fused', detach=False), dict(fuse='maps')]

@pytest.mark.parametrize('kw', variants)
@pytest.mark.parametrize('event,exc', [('before_batch',KeyboardInterrupt), ('after_pred',RuntimeError), ('after_loss',CancelBatchException), ('after_backward',CancelBatchException),
    ('before_step',CancelStepException), ('after_step',KeyboardInterrupt), ('after_batch',CancelTrainException), ('after_loss',CancelFitException), ('before_validate',CancelValidException), ('before_validate',KeyboardInterrupt)])
def test_interrupts(event, exc, kw):
    "Whatever stops a run, predictions are probabilities and the next run trains"
    learn = learner(tiny(2), FixedMix(), CEKD(**kw), dls=toy_dls(24))
    try: quiet(learn, 2, cbs=Raise(event, exc))
    except (KeyboardInterrupt,RuntimeError): pass
    learn.remove_cbs([o for o in learn.cbs if isinstance(o, Raise)])
    p,t = learn.get_preds()
    assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5) and learn.loss_func is lf
    assert learn.cekd.clean is None or exc in (KeyboardInterrupt,RuntimeError)
    quiet(learn, 2)
    assert learn.cekd.clean is None and learn.cekd.ema_target is None and all(torch.isfinite(o).all() for o in learn.model.state_dict().values())
    assert torch.allclose(learn.get_preds()[0].sum(1), torch.ones(24), atol=1e-5)

@pytest.mark.parametrize('kw', variants)
def test_lr_find_leaves_no_trace(kw, tmp_path):
    "Not even meanwhile does the average follow the steps of the search"
    class Watch(Callback):
        order,run_valid,seen = 100,False,()
        def after_batch(self): self.seen = (*self.seen, getattr(getattr(self.learn.model, 'ema', None), 'n', 0))
    learn = learner(tiny(2), FixedMix(), CEKD(**kw), dls=toy_dls(24), path=tmp_path)
    quiet(learn, 2)
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    learn.add_cb(w:=Watch())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    learn.remove_cb(w)
    assert w.seen and len(set(w.seen))==1
    for k,v in learn.model.state_dict().items(): assert torch.equal(v, before[k]), k
    quiet(learn, 1)

@pytest.mark.parametrize('kw', variants)
@pytest.mark.parametrize('prec', ['bf16','fp16'])
def test_mixed_precision(prec, kw):
    "Trains under the callbacks of mixed precision; losses are float32"
    seen,kinds = [],set()
    class See(Callback):
        order,run_valid = 6,False
        def after_loss(self): kinds.update(v.dtype for v in self.learn.cekd.parts.values())
    learn = learner(tiny(2), FixedMix(), CEKD(**kw), HalfPrecision(prec), See(), dls=toy_dls(24))
    learn.model.trunk[0].register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, 2)
    assert {torch.bfloat16,torch.float16} & set(seen) and kinds=={torch.float32}
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

def test_maps_of_the_clean_pass_under_autocast():
    "SnapMix looks at the clean pass before the step's own autocast begins, in the precision of that pass"
    seen = []
    learn = learner(tiny(2), SnapMix(), CEKD(), HalfPrecision(), dls=toy_dls(24))
    learn.model.heads[0].register_forward_hook(lambda m,i,o: seen.append(o.dtype))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn, 2)
    assert set(seen)=={torch.bfloat16} and all(torch.isfinite(p).all() for p in learn.model.parameters())

def test_valid_loss_is_plain():
    learn = quiet(learner(tiny(2), FixedMix(), CEKD(target='fused')), 2)
    shown = learn.recorder.values[-1][1]
    p,y = learn.get_preds()
    assert shown==pytest.approx(F.nll_loss(p.log(), y).item(), rel=1e-4)

def test_label_vectors():
    "Labels as class probabilities"
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(8,3,16,16, generator=g), F.one_hot(torch.arange(8)%3, 3).float()))
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu', shuffle=False)
    dls.c = 3
    soft = Learner(dls, tiny(2), loss_func=nn.CrossEntropyLoss(), lr=.1, cbs=[BranchLoss(),FixedMix(),CEKD(confident=True, target='both'),Diagnose()])
    quiet(soft, 1)
    assert torch.isfinite(soft.recorder.losses[-1])

# No synchronisation

class Ops(TorchDispatchMode):
    "Names of the operators that ran"
    names = ()
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = (*self.names,str(func))
        return func(*args, **(kwargs or {}))

class Watch(Callback):
    "The operators from the mixed batch to the end of the step"
    order,run_valid = 99,False
    def before_batch(self): self.mode = Ops().__enter__()
    def after_step(self): self.mode.__exit__(None, None, None)

class Ask(Callback):
    "Ask the device, as no step should"
    order = 6
    def after_loss(self): self.asked = self.learn.loss_grad.item()

def asks(*cbs, net=None):
    quiet(learner(net or tiny(2), BoxMix(), *cbs, w:=Watch()))
    assert len(w.mode.names)>100
    return [o for o in w.mode.names if any(k in o for k in ('_local_scalar_dense','nonzero','masked_select','unique','is_nonzero'))]

@pytest.mark.parametrize('kw', [dict(), dict(teacher='ema', validate_ema=True), dict(fuse='maps', confident=True), dict(target='fused', joint=True),
    dict(teacher='peer', target='both', detach=False)])
def test_a_step_asks_nothing(kw):
    "From the mixed batch to the end of the step, the update of the average with it, no number is read from the device"
    assert not asks(CEKD(**kw), Diagnose(('conflict','trunk','agreement')))

def test_the_step_check_bites(): assert asks(CEKD(), Ask())

# Several processes

class KeepFirst(Callback):
    order,run_valid,grads = 100,False,None
    def before_step(self):
        self.sent = len(own_buffers(unwrap_model(self.learn.model))),getattr(self.learn.model, 'broadcast_buffers', None)
        if self.grads is None: self.grads = {k:p.grad.clone() for k,p in self.learn.model.named_parameters()}

class Said(Callback):
    "Keeps which batches were mixed"
    order = 4.2
    def before_fit(self): self.mixed = []
    def before_batch(self):
        if self.learn.training: self.mixed.append(mix_of(self.learn).record is not None)

def ranked(rank, world):
    "The runs of one process; each of two has one half of every batch"
    two,res = world>1,{}
    for name,(make,mix,kw) in ddp_cases().items():
        net = make()
        dls = toy_dls(16, 4 if two else 8, size=64 if 'norm' in name or name=='random' else 16)
        learn = learner(net, mix(), CEKD(**kw), dls=dls)
        g = KeepFirst()
        if not two: quiet(learn, 2, cbs=g)
        else:
            with learn.distrib_ctx(sync_bn=False, cpu=True):
                if name=='random': set_seed(rank)
                quiet(learn, 6 if name=='random' else 2, cbs=[g,said:=Said()])
        grads = {k.removeprefix('module.'):v for k,v in g.grads.items()}
        res[name] = dict(sent=g.sent, mixed=said.mixed if two else None, grads=grads, params=dict(net.named_parameters()),
            stats=dict(net.named_buffers()), ema=net.ema.tensors() if hasattr(net,'ema') else {})
    return res

def ddp_cases():
    return dict(h1=(lambda: tiny(2),FixedMix,dict(ramp=0)), h2=(peers,FixedMix,dict(ramp=0, teacher='peer', target='both')),
        h3=(lambda: tiny(3),FixedMix,dict(ramp=0, target='fused')), maps=(lambda: tiny(2),BoxMix,dict(ramp=0, fuse='maps')),
        gradient=(lambda: tiny(2),FixedMix,dict(ramp=0, detach=False, target='both')),
        joint=(lambda: tiny(2),FixedMix,dict(ramp=0, joint=True)), ema=(lambda: tiny(2),FixedMix,dict(ramp=0, teacher='ema', validate_ema=True)),
        frozen_norm=(frozen_norm,FixedMix,dict(ramp=0, teacher='ema')),
        soft_only=(lambda: tiny(2),lambda: FixedMix(prob=0),dict(w_clean=0)), random=(lambda: tiny(2, bn=True),lambda: CutMix(prob=.7),dict(teacher='ema')) )

def frozen_norm():
    set_seed(0)
    return branch_net('test_resnet', 3, 2, freeze_bn=True, pretrained=False)

@pytest.fixture(scope='module')
def two_and_one(tmp_path_factory):
    "The same runs with two processes and with one on the joined batch"
    one,a,b = one_and_two(ranked, tmp_path_factory.mktemp('ddp'))
    return a,b,one

def _same(a, b, tol=0.):
    assert a.keys()==b.keys()
    for k in a: assert torch.allclose(a[k].float(), b[k].float(), atol=tol, rtol=0), f'{k}: {(a[k]-b[k]).abs().max()}'

@pytest.mark.parametrize('name', ddp_cases())
def test_ranks_agree(two_and_one, name):
    a,b,_ = two_and_one
    for k in ('grads','params','stats','ema'): _same(a[name][k], b[name][k])

def test_all_processes_mix_the_same_batches(two_and_one):
    "Where norms are synchronised, a pass over clean images that one process alone takes would never end"
    a,b = (o['random']['mixed'] for o in two_and_one[:2])
    assert a==b and {*a}=={True,False}

def test_average_is_not_sent_each_step(two_and_one):
    "Each process averages by itself; only the running statistics of the network itself travel, once in a step, and none that stand still"
    assert two_and_one[0]['random']['sent']==(len(list(tiny(2, bn=True).buffers())),False)
    assert two_and_one[0]['frozen_norm']['sent']==(0,False)

@pytest.mark.parametrize('name', [o for o in ddp_cases() if o not in ('random','soft_only')])
def test_two_processes_are_one(two_and_one, name):
    a,_,one = two_and_one
    for k in ('grads','params','ema'): _same(a[name][k], one[name][k], 1e-5)
    assert max(v.abs().max() for v in one[name]['grads'].values())>1e-3
