"CEKD against references written as loops, in several processes, through interrupts, and what each option changes."
import copy,itertools,os,subprocess,sys,warnings
from pathlib import Path
import pytest,torch,torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.vision.all import (CancelBatchException,CancelFitException,CancelStepException,CancelTrainException,CancelValidException,Callback,
    CrossEntropyLossFlat,DataLoaders,L,Learner,SaveModelCallback,SGD,accuracy,load_learner,nn,set_seed,tensor)
from cekd_fastai.arch import load_weights
from cekd_fastai.branches import branch_net,branch_splitter
from cekd_fastai.branches import PeerNet,peer_net
from cekd_fastai.cekd import CEKD,TARGETS,TEACHERS,cekd_losses,region_logits,teacher_logits
from cekd_fastai.diagnose import Diagnose,target_angle
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.losses import cross_target,soft_probs
from cekd_fastai.losses import mixed_loss
from cekd_fastai.mix.callback import CutMix,Mix
from cekd_fastai.mix.core import MixRecord,mix_pixels
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.drawing.dataset import make_birds

lf = CrossEntropyLossFlat()

class FixedMix(Mix):
    "The same pairs and weights in every batch, pairs inside each four"
    def mix(self, x, y):
        n = len(x)
        perm = torch.arange(n).view(-1,2).flip(1).flatten()
        la,lb = (tensor(o).repeat(n//4) for o in ([.7,.4,.6,.9],[.3,.5,.2,.4]))
        return torch.lerp(x[perm], x, la[:,None,None,None]), MixRecord(perm, la, lb)

class BoxMix(FixedMix):
    "The same pairs and weights, with one box in every batch"
    def mix(self, x, y):
        rec = super().mix(x, y)[1]
        rec.box_a = rec.box_b = (4,0,16,12)
        return mix_pixels(x, rec),rec

def tiny(n=2, n_out=3, bn=False, seed=0):
    "A branch network of three convolutions without batch norm, or the small residual one with"
    set_seed(seed)
    if bn: return branch_net('test_resnet', n_out, n, pretrained=False)
    from cekd_fastai.branches import BranchNet
    trunk = nn.Sequential(nn.Conv2d(3,6,3,2,1), nn.Tanh())
    branches = [nn.Sequential(nn.Conv2d(6,8,3,2,1), nn.Tanh()) for _ in range(n)]
    return BranchNet(trunk, branches, [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)) for _ in range(n)])

def peers(n_out=3):
    a,b = tiny(1, n_out, seed=1),tiny(1, n_out, seed=2)
    b.trunk[0],b.branches[0][0] = nn.Conv2d(3,10,3,2,1),nn.Conv2d(10,8,3,2,1)
    return PeerNet([a,b])

class Items(list):
    def new_empty(self): return Items()

def toy_dls(n=8, bs=8, n_out=3, size=16, order=None):
    g = torch.Generator().manual_seed(3)
    items = Items(zip(torch.randn(n,3,size,size, generator=g), torch.randint(0,n_out,(n,), generator=g)))
    if order: items = Items(items[i] for i in order)
    dls = DataLoaders.from_dsets(items, items, bs=bs, val_bs=bs, num_workers=0, device='cpu', shuffle=False, drop_last=False)
    dls.c = n_out
    return dls

def learner(net, *cbs, dls=None, **kw):
    dls = dls or toy_dls()
    return Learner(dls, net, loss_func=lf, opt_func=SGD, lr=.1, splitter=branch_splitter, metrics=accuracy, cbs=[BranchLoss(),Components(),*cbs], **kw)

def quiet(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kw)
    return learn

class CatchStep(Callback):
    "The gradient of the first step, and the parts of its loss"
    order,run_valid = 100,False
    def after_backward(self):
        self.parts = {k:v.item() for o in self.learn.cbs if (p:=getattr(o, 'parts', None)) for k,v in p.items()}
        self.grads = {k:p.grad.clone() for k,p in self.learn.model.named_parameters() if p.grad is not None}
        raise CancelFitException

def first_step(net, *cbs, **kw):
    learn = learner(net, *cbs, **kw)
    quiet(learn, cbs=(g:=CatchStep()))
    return g

def flat(g): return torch.cat([o.flatten() for o in g.grads.values()])

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
    cb = CEKD(w_cross=w_cross, target='fused', ramp=.3, T=2.)
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

# The average

class CancelSome(Callback):
    "Cancel every second step"
    run_valid = False
    def before_step(self):
        if self.learn.train_iter%2: raise CancelStepException

class Track(Callback):
    "A moving average written as a loop, of the steps that were taken"
    order,run_valid,ref,n = 100,False,None,0
    def before_train(self):
        if self.ref is None: self.ref = {k:p.detach().clone() for k,p in self.learn.model.named_parameters()}
    def after_step(self):
        if self.learn.train_iter%2: return
        self.n += 1
        d = min(.9, (1+self.n)/(10+self.n))
        for k,p in self.learn.model.named_parameters(): self.ref[k] = d*self.ref[k]+(1-d)*p.detach()

def test_average_exact_and_cancelled():
    learn = learner(tiny(2), FixedMix(), CEKD(teacher='ema', decay=.9), dls=toy_dls(32))
    quiet(learn, 6, cbs=[CancelSome(),t:=Track()])
    avg = learn.model.ema
    assert avg.n==t.n==12
    for k,v in t.ref.items(): assert torch.allclose(avg.tensors()[k], v, atol=1e-6), k

def test_average_teaches():
    "The cross loss follows the average, not the network"
    net = tiny(2)
    learn = learner(net, FixedMix(), CEKD(teacher='ema', ramp=0))
    quiet(learn, 3)
    x,y = learn.dls.one_batch()
    xm,rec = FixedMix().mix(x, y)
    ref = tiny(2)
    ref.load_state_dict(net.ema.tensors())
    want = cekd_losses(net.train()(xm)[0], net(x)[0], y, rec, lf, logits=ref.eval()(x)[None])['cross'].item()
    quiet(learn, 1, cbs=(g:=CatchStep()))
    assert g.parts['cross']==pytest.approx(want, rel=1e-4)
    assert want!=pytest.approx(cekd_losses(net.train()(xm)[0], net(x)[0], y, rec, lf)['cross'].item(), rel=1e-3)

def test_average_of_batch_norm():
    learn = learner(tiny(2, bn=True), FixedMix(), CEKD(teacher='ema'), dls=toy_dls(size=64))
    quiet(learn, 2)
    k,mean = next((k,v) for k,v in learn.model.named_buffers() if k.endswith('running_mean') and not k.startswith('ema'))
    avg = learn.model.ema.tensors()
    assert not torch.equal(avg[k], mean) and avg[k].abs().sum()>0
    assert avg[k.replace('running_mean','num_batches_tracked')]==learn.model.state_dict()[k.replace('running_mean','num_batches_tracked')]
    assert len(list(learn.model.ema.parameters()))==0

def test_average_save_load_resume(tmp_path):
    "A run that is saved, loaded into a new learner and continued ends where an uninterrupted one does"
    def make(): return learner(tiny(2), FixedMix(), CEKD(teacher='ema', ramp=0), path=tmp_path)
    whole = quiet(make(), 6)
    a = quiet(make(), 3)
    a.save('half')
    b = make()
    b.create_opt()
    b.load('half')
    quiet(b, 3)
    for (k,u),v in zip(whole.model.state_dict().items(), b.model.state_dict().values()): assert torch.allclose(u, v, atol=1e-6), k
    assert b.model.ema.n==6
    plain = learner(tiny(2, seed=5), FixedMix(), path=tmp_path)
    plain.save('plain')
    b.load('plain', with_opt=False)
    assert b.model.ema.n==0
    quiet(b, 1)
    assert torch.allclose(b.model.ema.tensors()['heads.0.2.weight'], plain.model.heads[0][2].weight, atol=.05)

def test_average_not_exported(tmp_path):
    big,small = (learner(tiny(2), FixedMix(), CEKD(teacher=o), path=tmp_path) for o in ('ema','ensemble'))
    for l,f in ((big,'a.pkl'),(small,'b.pkl')):
        quiet(l, 2)
        l.export(f)
    assert (tmp_path/'a.pkl').stat().st_size<(tmp_path/'b.pkl').stat().st_size+4000
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'a.pkl')
    assert not again.model.ema._buffers
    again.dls = big.dls
    assert torch.allclose(again.get_preds()[0], big.get_preds()[0], atol=1e-6)
    quiet(again, 1)
    assert again.model.ema.n==1 and big.model.ema._buffers

def test_validate_ema(tmp_path):
    "The table, SaveModelCallback, predictions and exports see the average; training goes on from the weights of the last step"
    make = lambda **kw: learner(tiny(2), FixedMix(), CEKD(decay=.95, **kw), path=tmp_path)
    raw,ema = quiet(make(), 5),quiet(make(validate_ema=True), 5, cbs=SaveModelCallback(every_epoch=True, fname='m'))
    avg,shown = ema.model.ema,ema.recorder.values[-1][1]
    assert avg.swapped and shown!=raw.recorder.values[-1][1]
    for k,v in raw.model.state_dict().items(): assert torch.allclose(avg.tensors()[k], v, atol=1e-6), k
    assert ema.validate()[0]==pytest.approx(shown, rel=1e-5)
    ema.export('e.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'e.pkl')
    again.dls = ema.dls
    assert torch.allclose(again.get_preds()[0], ema.get_preds()[0], atol=1e-6)
    ema.cekd.use_ema(False)
    assert torch.allclose(ema.model.heads[0][2].weight, raw.model.heads[0][2].weight, atol=1e-6)
    ema.cekd.use_ema()
    for l in (raw,ema): quiet(l, 1)
    ema.cekd.use_ema(False)
    for k,v in raw.model.state_dict().items(): assert torch.allclose(ema.model.state_dict()[k], v, atol=1e-5), k
    old = make(validate_ema=True)
    old.load('m_2', with_opt=False)
    assert old.model.ema.swapped and old.model.ema.n==3

def test_average_without_owner(tmp_path):
    "Training without a callback that keeps the average goes on from what the network holds, and later training from there"
    make = lambda: CEKD(validate_ema=True, decay=.9)
    learn = quiet(learner(tiny(2), FixedMix(), cb:=make(), path=tmp_path), 3)
    held = copy.deepcopy(learn.model.state_dict())
    learn.remove_cb(cb)
    learn.validate()
    assert learn.model.ema.swapped
    class Start(Callback):
        order = 200
        def before_batch(self):
            if self.training and self.iter==0 and self.epoch==0: self.state = {k:v.clone() for k,v in self.learn.model.state_dict().items()}
    same = lambda a,b: all(torch.equal(a[k], b[k]) for k in a if not k.startswith('ema'))
    quiet(learn, 2, cbs=(s:=Start()))
    assert same(s.state, held) and not hasattr(learn.model, 'ema')
    plain = copy.deepcopy(learn.model.state_dict())
    learn.add_cb(make())
    quiet(learn, 1, cbs=(s:=Start()))
    assert same(s.state, plain)

def test_average_into_a_plain_network(tmp_path):
    "A checkpoint with an average loads where none is kept, also as weights, and one of an exported run where one is"
    ema = quiet(learner(tiny(2), FixedMix(), CEKD(teacher='ema'), path=tmp_path), 2)
    ema.save('ema')
    plain = learner(tiny(2, seed=4), path=tmp_path)
    plain.load('ema')
    assert torch.equal(plain.get_preds()[0], ema.get_preds()[0])
    torch.save(ema.model.state_dict(), tmp_path/'w.pth')
    assert torch.equal(load_weights(tiny(2, seed=4), tmp_path/'w.pth').heads[0][2].weight, ema.model.heads[0][2].weight)
    with pytest.raises(RuntimeError, match='Unexpected key'): plain.model.load_state_dict(ema.model.state_dict() | {'else.weight':torch.zeros(1)})
    ema.export('e.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'e.pkl')
    again.model_dir,again.path = 'models',tmp_path
    again.save('shell', with_opt=False)
    new = learner(tiny(2, seed=4), FixedMix(), CEKD(teacher='ema'), path=tmp_path)
    new.load('shell', with_opt=False)
    assert new.model.ema.n==0 and torch.equal(new.get_preds()[0], ema.get_preds()[0])

@pytest.mark.parametrize('event', ['after_batch','before_validate'])
def test_average_after_an_early_end(event):
    "Where a callback ends the run, the network holds the average as well, until one asks for the weights of the last step"
    learn = learner(tiny(2), FixedMix(), CEKD(validate_ema=True), dls=toy_dls(24))
    quiet(learn, 2, cbs=Raise(event, CancelFitException))
    assert learn.model.ema.swapped
    shown,z = learn.get_preds()[0],learn.cekd.ema_logits(learn.dls.valid.one_batch()[0])
    assert torch.allclose(z, learn.model.eval()(learn.dls.valid.one_batch()[0]))
    learn.cekd.use_ema(False)
    raw = learn.get_preds()[0]
    learn.validate()
    assert not learn.model.ema.swapped and not torch.equal(raw, shown)
    quiet(learn, 1)
    assert learn.model.ema.swapped

def test_average_that_has_not_begun(tmp_path):
    "Before training the average says what the network says, whatever was loaded"
    learn = learner(tiny(2), FixedMix(), CEKD(teacher='ema'), path=tmp_path)
    learner(tiny(2, seed=5), path=tmp_path).save('plain', with_opt=False)
    learn.load('plain', with_opt=False)
    x = learn.dls.one_batch()[0]
    assert torch.equal(learn.cekd.ema_logits(x), learn.model.eval()(x))

def test_use_average_of_teacher():
    learn = quiet(learner(tiny(2), FixedMix(), CEKD(teacher='ema')), 3)
    assert not learn.model.ema.swapped
    before = learn.get_preds()[0]
    learn.cekd.use_ema()
    assert not torch.allclose(learn.get_preds()[0], before, atol=1e-4)
    quiet(learn, 1)
    assert not learn.model.ema.swapped

# A good citizen of fastai

variants = [dict(), dict(teacher='ema', validate_ema=True), dict(teacher='peer', target='both', joint=True), dict(target='fused', detach=False), dict(fuse='maps')]

class Raise(Callback):
    "Raise at an event of the second batch"
    order = 200
    def __init__(self, event, exc): self.event,self.exc,self.n = event,exc,0
    def __call__(self, name):
        if name==self.event and not self.done:
            self.n += 1
            if self.n==2 or name in ('before_validate','after_train'):
                self.done = True
                raise self.exc('stop')
    done = False

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
@pytest.mark.parametrize('prec', ['to_bf16','to_fp16'])
def test_mixed_precision(prec, kw):
    "Trains under the callbacks of mixed precision; losses are float32"
    learn = learner(tiny(2), FixedMix(), CEKD(**kw), dls=toy_dls(24))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(getattr(learn, prec)(), 2)
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())

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

# Diagnostics

def test_diagnose_columns_and_values():
    learn = learner(tiny(2), FixedMix(), CEKD(), d:=Diagnose(('conflict','trunk','agreement'), n_batches=1), dls=toy_dls(16))
    quiet(learn, 2)
    assert list(learn.recorder.metric_names)[-4:-1]==['conflict','trunk_conflict','agreement']
    assert len(d.values)==2 and all(len(o)==len(learn.recorder.metric_names)-2 for o in learn.recorder.values)
    assert 0<d.values[0]['conflict']<180 and 0<d.values[0]['trunk_conflict']<180 and 0<=d.values[0]['agreement']<=1
    assert not learn.model.trunk._forward_hooks

class Every(Callback):
    "Validate every second epoch only"
    order = -100
    def before_validate(self):
        if self.epoch%2==0: raise CancelValidException

def test_columns_of_a_cancelled_validation(tmp_path):
    "Parts and diagnostics stay under their names, so nothing else is taken for the validation loss"
    learn = quiet(learner(tiny(2), FixedMix(), CEKD(), Diagnose('agreement'), Every(), dls=toy_dls(16)), 4)
    names = [o for o in learn.recorder.metric_names if o not in ('epoch','time')]
    assert names[:3]==['train_loss','valid_loss','accuracy']
    rows = [dict(zip(names, o)) for o in learn.recorder.values]
    for i,r in enumerate(rows):
        assert len(learn.recorder.values[i])==len(names) and (r['valid_loss'] is None)==(i%2==0) and all(r[k] is not None for k in ('ce_mix','cross','agreement'))
    with pytest.raises(Exception): quiet(learner(tiny(2), FixedMix(), CEKD(), Every(), path=tmp_path), 2, cbs=SaveModelCallback())

def test_diagnose_trunk_exact():
    "The angle at the trunk from a graph of its own"
    net = tiny(2)
    x,y = toy_dls().one_batch()
    xm,rec = FixedMix().mix(x, y)
    t = net.trunk(xm).detach().requires_grad_()
    mixed = torch.stack([h(b(t)) for b,h in zip(net.branches, net.heads)])
    parts = cekd_losses(mixed, net.branch_forward(x)[0], y, rec, lf)
    a,b = (torch.autograd.grad(parts[k], t, retain_graph=True)[0].flatten(1) for k in ('ce_mix','cross'))
    want = torch.rad2deg(torch.acos((a*b).sum(1)/a.norm(dim=1)/b.norm(dim=1))).mean().item()
    q = cross_target(soft_probs(net.branch_forward(x)[0].mean(0), 3.), rec)
    logit = torch.stack([target_angle(z, q, y, rec, 3.) for z in mixed]).mean().item()
    for joint in (False,True):
        learn = learner(tiny(2), FixedMix(), CEKD(joint=joint), d:=Diagnose(('trunk','conflict')))
        quiet(learn, 1)
        assert d.values[0]['trunk_conflict']==pytest.approx(want, rel=1e-4) and d.values[0]['conflict']==pytest.approx(logit, rel=1e-4)

def test_diagnose_changes_nothing():
    runs = []
    for cbs in ((),(Diagnose(('conflict','trunk','agreement')),)):
        for frozen in (False,True):
            learn = learner(tiny(2), FixedMix(), CEKD(), *cbs)
            if frozen: learn.freeze_to(1)
            runs.append(quiet(learn, 2).model.state_dict())
    for a,b in ((0,2),(1,3)): assert all(torch.equal(u, v) for u,v in zip(runs[a].values(), runs[b].values()))

def test_diagnose_keeps_its_record(birds, tmp_path):
    "Validations, predictions and `lr_find` leave the record of the run alone, an exported learner predicts, and other loaders are other evidence"
    learn = Learner(birds, branch_net('test_resnet', birds.c, 2, pretrained=False), cbs=[BranchLoss(),Components(),CutMix(5.),CEKD(),d:=Diagnose('noise', n=32)], path=tmp_path)
    quiet(learn, 2)
    kept,first = d.values,d.batches
    learn.validate()
    learn.get_preds()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=14, show_plot=False)
    assert d.values is kept and len(kept)==2
    learn.export('d.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'d.pkl')
    with again.no_bar(): assert again.predict(birds.valid_ds.items.iloc[0] if hasattr(birds.valid_ds.items, 'iloc') else birds.valid_ds.items[0])[0] in birds.vocab
    quiet(learn, 1)
    assert d.batches is first and len(d.values)==1
    learn.dls = fine_grained_dls(birds.path, size=40, bs=16, num_workers=0, in_memory=True)
    quiet(learn, 1)
    assert d.batches[0][0].shape[-1]==40

def test_diagnose_refuses():
    with pytest.raises(ValueError, match='the learner has none'): quiet(learner(tiny(2), FixedMix(), Diagnose()))
    with pytest.raises(ValueError, match='has no soft one'): quiet(learner(tiny(2), FixedMix(), CEKD(w_cross=0), Diagnose()))
    with pytest.raises(ValueError, match='peers share none'): quiet(learner(peers(), FixedMix(), CEKD(teacher='peer', target='both'), Diagnose('trunk')))

@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    path = make_birds(tmp_path_factory.mktemp('cekd')/'birds', n_species=8, n_images=12, n_train=8, size=64, progress=False)
    return fine_grained_dls(path, size=56, bs=16, num_workers=0, in_memory=True)

def test_target_noise(birds):
    "The label's error is that of the mix; a teacher that knows nothing says half and half, and one that knows all says what the label says"
    from cekd_fastai.mix.noise import label_noise
    learn = Learner(birds, branch_net('test_resnet', birds.c, 2, pretrained=False), cbs=[BranchLoss(),CutMix(5.),CEKD()])
    table = label_noise(CutMix(5.), birds, n=64, rounds=1, seed=42)
    res = learn.cekd.target_noise(n=64)
    assert res['label_noise']==pytest.approx(table.error.iloc[0], abs=1e-5)
    for h in learn.model.heads:
        for o in h.modules():
            if isinstance(o, nn.Linear): o.weight.data.zero_(), o.bias.data.zero_()
    assert learn.cekd.target_noise(n=64)['cross_noise']==pytest.approx(table.half.iloc[0], abs=1e-4)
    learn.cekd.eval_target = lambda x, rec: cross_target(F.one_hot(next(ys), birds.c).float(), rec)
    from cekd_fastai.mix.noise import evidence_batches
    batches = list(evidence_batches(birds, n=64))
    ys = (y for _,y,_ in batches)
    sure = learn.cekd.target_noise(n=64, batches=batches)
    assert sure['cross_noise']==pytest.approx(sure['label_noise'], abs=1e-3)

def test_noise_of_the_mixed_only(birds):
    "Where each image is mixed or not for itself, those that were not do not count"
    from cekd_fastai.mix.noise import label_noise
    mix = lambda: CutMix(5., prob=.3, per='sample')
    learn = Learner(birds, branch_net('test_resnet', birds.c, 2, pretrained=False), cbs=[BranchLoss(),mix(),CEKD()])
    assert learn.cekd.target_noise(n=64)['label_noise']==pytest.approx(label_noise(mix(), birds, n=64, rounds=1, seed=42).error.iloc[0], abs=1e-5)

def test_box_noise(birds):
    "The share of each bird's box as yardstick, which real birds have too"
    learn = Learner(birds, branch_net('test_resnet', birds.c, 2, pretrained=False), cbs=[BranchLoss(),CutMix(5.),CEKD(teacher='peer', target='both'),d:=Diagnose('noise', kind='box', n=32)])
    res = learn.cekd.target_noise('box', n=32)
    assert res!=learn.cekd.target_noise('parts', n=32) and 0<res['label_noise']<1
    quiet(learn, 1)
    assert d.values[0]['label_noise']==pytest.approx(res['label_noise'], abs=1e-6)

def test_box_noise_on_cub(real_data):
    dls = fine_grained_dls(real_data('CUB_200_2011'), size=64, bs=16, classes=4, num_workers=0)
    learn = Learner(dls, branch_net('test_resnet', dls.c, 2, pretrained=False), cbs=[BranchLoss(),CutMix(5.),CEKD(teacher='ema')])
    learn.model.eval()
    res = learn.cekd.target_noise('box', n=32)
    assert 0<res['label_noise']<.5 and 0<res['cross_noise']<.6 and res['images']>5

def test_diagnose_noise(birds):
    learn = Learner(birds, branch_net('test_resnet', birds.c, 2, pretrained=False), cbs=[BranchLoss(),Components(),SnapMix(),CEKD(),d:=Diagnose('noise', n=48)])
    quiet(learn, 2)
    assert len(d.values)==2 and all(0<v<1 for o in d.values for v in o.values())
    assert list(learn.recorder.metric_names)[-3:-1]==['label_noise','cross_noise']

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

script = '''
import json,os,sys
sys.path.insert(0, {tests!r})
import torch,torch.distributed as dist
from fastai.distributed import *
from fastai.distributed import DistributedDL
from fastai.vision.all import Callback,set_seed
from test_cekd import *
def to_all(self, t, rank): # fastai's sends through CUDA
    t = torch.tensor(t)
    dist.broadcast(t, rank)
    return t.tolist()
DistributedDL._broadcast = to_all
class KeepFirst(Callback):
    order,run_valid,grads = 100,False,None
    def before_step(self):
        self.sent = len(getattr(self.learn.model, 'modules_buffers', ()))
        if self.grads is None: self.grads = {{k:p.grad.clone() for k,p in self.learn.model.named_parameters()}}
two,res = int(os.environ.get('WORLD_SIZE', 1))>1,{{}}
for name,(make,mix,kw) in ddp_cases().items():
    net = make()
    order = None if two else [*range(4),*range(8,12),*range(4,8),*range(12,16)] # each process has one half
    dls = toy_dls(16, 4 if two else 8, size=64 if 'norm' in name or name=='random' else 16, order=order)
    learn = learner(net, mix(), CEKD(**kw), dls=dls)
    g = KeepFirst()
    if not two: quiet(learn, 2, cbs=g)
    else:
        with learn.distrib_ctx(sync_bn=False, cpu=True):
            if name=='random': set_seed(int(os.environ['RANK']))
            quiet(learn, 2, cbs=g)
    res[name] = dict(sent=g.sent, grads={{k.removeprefix('module.'):v for k,v in g.grads.items()}}, params=dict(net.named_parameters()), ema=net.ema.tensors() if hasattr(net,'ema') else {{}})
torch.save(res, {out!r}+os.environ.get('RANK', 'one'))
'''

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

def _start(cmd, env, cwd):
    res = subprocess.run(cmd, env=env, cwd=cwd, capture_output=True, text=True, timeout=400)
    assert res.returncode==0, res.stderr[-3000:]

@pytest.fixture(scope='module')
def two_and_one(tmp_path_factory):
    "The same runs with two processes and with one on the joined batch"
    tmp = tmp_path_factory.mktemp('ddp')
    (tmp/'run.py').write_text(script.format(tests=str(Path(__file__).parent), out=str(tmp/'res-')))
    env = {k:v for k,v in os.environ.items() if k not in ('RANK','WORLD_SIZE','LOCAL_RANK')}|dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', MASTER_ADDR='127.0.0.1')
    env.pop('MASTER_PORT', None)
    _start([sys.executable,'-m','torch.distributed.run','--nproc-per-node','2','--rdzv-backend','c10d','--rdzv-endpoint','127.0.0.1:0','run.py'], env, tmp)
    _start([sys.executable,'run.py'], env, tmp)
    return [torch.load(tmp/f'res-{o}') for o in ('0','1','one')]

def _same(a, b, tol=0.):
    assert a.keys()==b.keys()
    for k in a: assert torch.allclose(a[k].float(), b[k].float(), atol=tol, rtol=0), f'{k}: {(a[k]-b[k]).abs().max()}'

@pytest.mark.parametrize('name', ddp_cases())
def test_ranks_agree(two_and_one, name):
    a,b,_ = two_and_one
    for k in ('grads','params','ema'): _same(a[name][k], b[name][k])

def test_average_is_not_sent_each_step(two_and_one):
    "Each process averages by itself; only the running statistics of the network itself travel with every forward pass"
    assert two_and_one[0]['random']['sent']==len(list(tiny(2, bn=True).buffers()))

@pytest.mark.parametrize('name', [o for o in ddp_cases() if o not in ('random','soft_only')])
def test_two_processes_are_one(two_and_one, name):
    a,_,one = two_and_one
    for k in ('grads','params','ema'): _same(a[name][k], one[name][k], 1e-5)
    assert max(v.abs().max() for v in one[name]['grads'].values())>1e-3
