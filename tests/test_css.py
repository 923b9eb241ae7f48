"CSS against references written as loops, as a citizen of fastai, and what it refuses."
import math
from functools import partial
import numpy as np, forks, pytest, torch, torch.nn.functional as F
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CancelBatchException,CancelEpochException,CancelFitException,CancelTrainException,
    CancelValidException,CrossEntropyLossFlat,DataLoader,DataLoaders,Learner,SGD,accuracy,first,nn,set_seed,tensor,Tensor)
from fastai.callback.mixup import MixUp as FastaiMixUp
from cekd_fastai.cam import model_cam
from cekd_fastai.mix.callback import CutMix,MixUp
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.branches import branch_net,branch_splitter,load_net,save_net
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.drawing.dataset import make_birds
from cekd_fastai.cekd import CEKD
from cekd_fastai.distill import BranchLoss
from cekd_fastai.css.callback import CSS,css_losses,css_ratios,joint_loss
from cekd_fastai.css.labels import aggregate,joint_label,remove_corner,split_label
from cekd_fastai.css.branches import CSSBranchNet,css_branch_net
from cekd_fastai.css.net import CSSNet,css_net
from cekd_fastai.learner import css_learner

pair = ('test_resnet','test_efficientnet')
lf = CrossEntropyLossFlat()

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path = make_birds(tmp_path_factory.mktemp('css')/'birds', n_species=3, n_images=8, n_train=6, size=64, progress=False)
    return fine_grained_dls(path, size=64, bs=6, num_workers=0)

def make(dls, *cbs, archs=pair, n_branches=2, **kw):
    set_seed(0)
    return css_learner(dls, archs, n_branches=n_branches, pretrained=False, cbs=cbs, metrics=accuracy, **kw)

def quiet_fit(learn, n=1, *cbs, lr=1e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=cbs)
    return learn

def weights_of(model): return torch.cat([p.detach().flatten() for p in model.parameters()])

@pytest.fixture
def rand():
    torch.manual_seed(0)
    return torch.randn(3,5,12, dtype=torch.float64)*2,torch.randn(3,5,12, dtype=torch.float64)*2,tensor([0,3,1,2,3])

# --- the functions

def loop_total(t, s, y, T=3., cw=None):
    "The loss of CSS, one number after the other, from the formula"
    t,s,y = t.tolist(),s.tolist(),y.tolist()
    n,b,nk = len(t),len(y),len(t[0][0])
    def soft(z, T):
        e = [math.exp(v/T) for v in z]
        return [v/sum(e) for v in e]
    def ce(net):
        res = 0
        for i in range(n):
            ws = [1. if cw is None else cw[y[j]] for j in range(b)]
            res += sum(-w*math.log(soft(net[i][j], 1)[y[j]*n+i]) for j,w in enumerate(ws))/sum(ws)
        return res/n
    def kd(student, teacher):
        res = 0
        for i in range(n):
            for j in range(b):
                p,q = soft(teacher[i][j], T),soft(student[i][j], T)
                res += T*T*sum(p[k]*math.log(p[k]/q[k]) for k in range(nk))
        return res/(n*b)
    ct,cs,kt,ks = ce(t),ce(s),kd(t, s),kd(s, t)
    return ct+ct/cs*kt+cs+cs/ct*ks,dict(ce_1=ct, ce_2=cs, kd_1=kt, kd_2=ks)

def total(t, s, y, detach_targets=False, detach_ratio=False, loss_func=lf, T=3.):
    parts = css_losses(t, s, y, loss_func, T, detach_targets)
    ws = css_ratios(parts['ce_1'], parts['ce_2'], detach_ratio)
    return sum(ws.get(k, 1)*v for k,v in parts.items())

@pytest.mark.parametrize('T', [1.,3.])
def test_loss_against_loops(rand, T):
    t,s,y = rand
    want,parts = loop_total(t, s, y, T)
    got = css_losses(t, s, y, lf, T)
    for k,v in parts.items(): assert abs(got[k].item()-v)<1e-5, k
    assert abs(total(t, s, y, T=T).item()-want)<1e-4

def test_class_weights_against_loops(rand):
    t,s,y = rand
    t,s,cw = t.float(),s.float(),[1.,.2,3.,.5]
    w = tensor(cw)
    want,_ = loop_total(t, s, y, cw=cw)
    for f in (CrossEntropyLossFlat(weight=w),nn.CrossEntropyLoss(weight=w)):
        assert abs(total(t, s, y, loss_func=f).item()-want)<1e-4
        assert len(getattr(f, 'func', f).weight)==4
    assert abs(total(t, s, y).item()-want)>1e-2

def test_exchange_leaves_the_loss(rand):
    t,s,y = rand
    assert torch.allclose(total(t, s, y), total(s, t, y), atol=1e-6)
    assert not torch.allclose(total(t, s, y), total(t, s.flip(0), y), atol=1e-3)

def test_ratios(rand):
    a,b = tensor(2.),tensor(.5)
    ws = css_ratios(a, b)
    assert ws['kd_1']==4 and ws['kd_2']==.25 and ws['kd_1']*ws['kd_2']==1
    zero = css_ratios(tensor(0., requires_grad=True), a)
    assert all(torch.isfinite(v) for v in zero.values())

def test_gradients_by_default_reach_targets_and_ratios(rand):
    t,s,y = rand
    t.requires_grad_(), s.requires_grad_()
    g = lambda loss,z: torch.autograd.grad(loss, z, retain_graph=True, allow_unused=True)[0]
    free,held = css_losses(t, s, y, lf),css_losses(t, s, y, lf, detach_targets=True)
    assert g(free['kd_1'], s).abs().sum()>0 and g(held['kd_1'], s) is None
    assert g(free['kd_2'], t).abs().sum()>0 and g(held['kd_2'], t) is None
    assert torch.allclose(g(free['kd_1'], t), g(held['kd_1'], t))
    p = free
    rt,rs = (p['ce_1']/p['ce_2']),(p['ce_2']/p['ce_1'])
    want = p['ce_1']+p['ce_2']+rt*p['kd_1']+rs*p['kd_2']
    fixed = p['ce_1']+p['ce_2']+rt.item()*p['kd_1']+rs.item()*p['kd_2']
    assert torch.allclose(g(total(t, s, y), t), g(want, t), atol=1e-7)
    assert torch.allclose(g(total(t, s, y, detach_ratio=True), t), g(fixed, t), atol=1e-7)
    assert not torch.allclose(g(want, t), g(fixed, t), atol=1e-4)

def test_gradient_by_differences():
    torch.manual_seed(1)
    t,s = (torch.randn(2,3,6, dtype=torch.float64) for _ in range(2))
    y,eps = tensor([0,2,1]),1e-5
    t.requires_grad_()
    g = torch.autograd.grad(total(t, s, y), t)[0]
    for idx in ((0,0,0),(1,2,3),(0,1,5)):
        up,down = t.detach().clone(),t.detach().clone()
        up[idx] += eps
        down[idx] -= eps
        want = (loop_total(up, s, y)[0]-loop_total(down, s, y)[0])/(2*eps)
        assert abs(g[idx].item()-want)<1e-4

def test_extreme_logits_stay_finite():
    t,s = (torch.zeros(2,2,6) for _ in range(2))
    t[:,:,0],s[:,:,3] = 2000,2000
    t.requires_grad_(), s.requires_grad_()
    loss = total(t, s, tensor([0,1]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(t.grad).all() and torch.isfinite(s.grad).all()

@pytest.mark.parametrize('n', [1,2,3,5])
def test_joint_labels_round_trip(n):
    y = torch.arange(7)
    for i in range(n):
        back,branch = split_label(joint_label(y, i, n), n)
        assert torch.equal(back, y) and (branch==i).all()
    assert sorted(torch.cat([joint_label(y, i, n) for i in range(n)]).tolist())==list(range(7*n))

def test_aggregate_against_loops(rand):
    z,_,_ = rand
    got = aggregate(z)
    for b in range(5):
        for k in range(4): assert math.isclose(got[b,k].item(), sum(z[i,b,k*3+i].item() for i in range(3))/3, abs_tol=1e-9)

def test_one_branch_aggregates_to_plain_logits():
    one = torch.randn(1,4,6)
    assert torch.equal(aggregate(one), one[0])
    net = css_branch_net('test_resnet', 5, n_branches=1, transform=None, pretrained=False).eval()
    plain = branch_net('test_resnet', 5, n_branches=1, pretrained=False).eval()
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2,3,64,64)
    assert torch.allclose(net(x), plain(x), atol=1e-6)

def test_loss_of_a_branch_ignores_the_argmax_but_not_the_mass_of_other_slices(rand):
    t,s,y = rand
    off = t.clone()
    off[1,:,0::3] += 20
    assert torch.equal(aggregate(off), aggregate(t))
    before,after = (css_losses(o, s, y, lf)['ce_1'].item() for o in (t,off))
    assert after>before+1
    same = sum(-F.log_softmax(off[i], -1)[range(5),y*3+i].mean() for i in range(3))/3
    assert abs(after-same.item())<1e-6

@pytest.mark.parametrize('i', range(6))
@pytest.mark.parametrize('h,w', [(16,16),(14,14),(7,7),(8,12)])
def test_corner_against_loops(i, h, w):
    x = torch.rand(2,3,h,w)+1
    a,b = h//4,w//4
    want = x.clone()
    for r in range(h):
        for c in range(w):
            top,left,low,right = r<a,c<b,r>=h-a,c>=w-b
            if (i==0 and top and left) or (i==1 and low and right) or (i==2 and low and left) or (i==3 and top and right): want[:,:,r,c] = 0
    before = x.clone()
    assert torch.equal(remove_corner(x, i), want) and torch.equal(x, before)

# --- the networks

@pytest.mark.parametrize('transform', ['corner','permute',lambda m,i: m*(i+2)])
def test_transform_acts_in_training_and_evaluation(transform):
    set_seed(0)
    net = css_branch_net('test_resnet', 4, n_branches=3, transform=transform, pretrained=False)
    plain = CSSBranchNet(net.trunk, net.branches, net.heads, None)
    seen = []
    hooks = [b.register_forward_pre_hook(lambda m,a: seen.append(a[0].detach())) for b in net.branches]
    x = torch.randn(4,3,64,64)
    for mode in (True,False):
        seen.clear()
        net.train(mode)(x)
        if mode is False: t = net.trunk(x)
        maps = list(seen)
        assert not any(torch.equal(maps[i], maps[j]) for i in range(3) for j in range(i))
    want = [remove_corner(t, i) if transform=='corner' else t[:,net.perm[i]] if transform=='permute' else transform(t, i) for i in range(3)]
    assert all(torch.allclose(a, b) for a,b in zip(maps, want))
    assert not torch.allclose(net(x), plain.eval()(x), atol=1e-5)
    for h in hooks: h.remove()

def test_permutation_is_seeded_and_saved():
    a,b,c = (css_branch_net('test_resnet', 4, transform='permute', seed=s, pretrained=False) for s in (0,0,1))
    assert torch.equal(a.perm, b.perm) and not torch.equal(a.perm, c.perm)
    assert torch.equal(a.perm.sort(1).values, torch.arange(a.perm.shape[1]).expand_as(a.perm))
    c.load_state_dict(a.state_dict())
    assert torch.equal(a.perm, c.perm)

def test_transform_must_keep_the_shape():
    net = css_branch_net('test_resnet', 4, transform=lambda m,i: m[:,:,1:], pretrained=False)
    with pytest.raises(ValueError, match='must keep the shape'): net(torch.randn(2,3,64,64))

def test_each_splits_the_networks():
    torch.manual_seed(0)
    net = css_net(pair, 4, n_branches=3, pretrained=False).eval()
    x = torch.randn(2,3,64,64)
    logits,feats = net.branch_forward(x)
    each = net.class_logits(logits)
    assert logits.shape==(6,2,12) and each.shape==(6,2,4) and len(feats)==6
    for j in range(6): assert torch.equal(each[j], logits[j][:,j%3::3])
    nets = net.by_network(each)
    for k in ('net1','net2','both'): assert torch.allclose(net.subnet(k)(x), nets[k], atol=1e-6)

@pytest.mark.parametrize('which', ['net1','net2'])
def test_what_is_not_asked_does_not_run(which):
    net = css_net(pair, 4, n_branches=2, pretrained=False).eval()
    ran = []
    for k in ('net1','net2'): getattr(net, k).trunk.register_forward_hook(lambda m,a,o,k=k: ran.append(k))
    net.which = which
    net(torch.randn(1,3,64,64))
    assert ran==[which]

def test_maps_of_unlike_backbones():
    net = css_net(('test_resnet','test_resnet'), 4, split=(None,'head'), n_branches=2, transform=None, pretrained=False).eval()
    net.net2.trunk.append(nn.AvgPool2d(2))
    x,y = torch.randn(2,3,128,128),tensor([1,3])
    feats = net.branch_forward(x)[1]
    assert feats[0].shape[-1]!=feats[-1].shape[-1]
    maps = model_cam(net, x, y)
    t,s = (model_cam(net.subnet(k), x, y) for k in ('net1','net2'))
    assert maps.shape==t.shape!=s.shape
    assert torch.allclose(maps, (t+F.interpolate(s[None], t.shape[1:], mode='bilinear', align_corners=False)[0])/2, atol=1e-6)

@pytest.mark.parametrize('which', ['net1','net2','both'])
def test_maps_average_to_the_logits_of_what_is_deployed(which):
    torch.manual_seed(0)
    net = css_net(('test_resnet','test_resnet'), 4, n_branches=3, pretrained=False).eval()
    net.which = which
    x,y = torch.randn(3,3,64,64),tensor([1,3,0])
    z = net(x)
    assert torch.allclose(model_cam(net, x, y).mean((1,2)), z[range(3),y], atol=1e-5)
    w = torch.rand(3,4)
    assert torch.allclose(model_cam(net, x, w).mean((1,2)), (z*w).sum(1), atol=1e-5)
    assert torch.allclose(net.ensemble(*net.branch_forward(x)), z, atol=1e-6)

@pytest.mark.parametrize('transform', ['corner','permute'])
@pytest.mark.parametrize('which', ['net1','net2','both'])
def test_picked_networks_round_trip_through_a_file(tmp_path, which, transform):
    set_seed(0)
    net = css_net(pair, 4, n_branches=2, transform=transform, seed=3, pretrained=False).eval()
    x = torch.randn(2,3,64,64)
    save_net(net.subnet(which), tmp_path/'n.pt', vocab=['a','b','c','d'])
    got,info = load_net(tmp_path/'n.pt')
    assert got(x).shape==(2,4) and torch.allclose(got(x), net.subnet(which)(x), atol=1e-6) and info['vocab']==['a','b','c','d']

def test_groups_cover_every_parameter_once():
    net = css_net(pair, 4, n_branches=2, pretrained=False)
    groups = branch_splitter(net)
    ids = [id(p) for g in groups for p in g]
    assert len(groups)==3 and len(ids)==len(set(ids)) and set(ids)=={id(p) for p in net.parameters()}
    assert {id(p) for p in groups[2]}=={id(p) for o in (net.net1,net.net2) for p in o.heads.parameters()}

def test_freeze_bn_reaches_both_networks():
    net = css_net(pair, 4, n_branches=2, freeze_bn=True, pretrained=False).train()
    bns = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert net.freeze_bn and net.training and bns and not any(m.training for m in bns)

def test_options_for_either_network():
    net = css_net(('test_resnet','test_resnet'), 4, n_branches=2, split=('head',None), pretrained=False, arch_args=({},dict(act_layer=nn.SiLU)))
    assert len(list(net.net1.branches.parameters()))==0<len(list(net.net2.branches.parameters()))
    assert [any(isinstance(m, nn.SiLU) for m in o.modules()) for o in (net.net1,net.net2)]==[False,True]

# --- the callback

class Catch(Callback):
    "Keeps what the first step computed, and ends the fit before the weights change"
    order = 100
    def after_loss(self):
        if not self.training: return
        self.got,self.total,self.targ = self.learn.css.logits.detach(),self.learn.loss_grad.item(),self.learn.yb[0].clone()
        self.rec,self.shape = self.learn.css.record,self.learn.pred.shape
    def before_step(self):
        self.grad = torch.cat([p.grad.flatten() for p in self.learn.model.parameters()])
        raise CancelFitException

def first_step(dls, *cbs, **kw):
    dls.train.rng.seed(0)
    learn = make(dls, *cbs, **kw)
    quiet_fit(learn, 1, c:=Catch())
    return c

def test_step_has_the_loss_of_the_formula(dls):
    c = first_step(dls)
    want,_ = loop_total(*c.got.double().chunk(2), c.targ)
    assert abs(c.total-want)<1e-3 and c.shape==(6,3)

def test_each_argument_changes_the_step(dls):
    base = first_step(dls, CSS()).grad
    assert torch.allclose(base, first_step(dls, CSS()).grad, atol=1e-6)
    for kw in (dict(T=1), dict(detach_targets=True), dict(detach_ratio=True), dict(ramp=.5)):
        assert not torch.allclose(base, first_step(dls, CSS(**kw)).grad, atol=1e-6), kw
    for kw in (dict(transform=None), dict(transform='permute')): assert not torch.allclose(base, first_step(dls, **kw).grad, atol=1e-6), kw

def test_columns_are_the_means_of_the_parts(dls):
    learn,seen = make(dls),[]
    class Note(Callback):
        order = 6
        def after_loss(self):
            if self.training: seen.append(([v.item() for v in self.learn.css.parts.values()],len(self.learn.yb[0])))
    quiet_fit(learn, 1, Note())
    assert learn.recorder.metric_names[4:8]==['ce_1','ce_2','kd_1','kd_2']
    w = np.array([n for _,n in seen])
    want = (np.array([v for v,_ in seen])*w[:,None]).sum(0)/w.sum()
    assert np.allclose(learn.recorder.values[-1][3:7], want, rtol=1e-4)

def loop_mixed(z, y, rec):
    n = len(z)
    res = 0
    for i in range(n):
        lp = F.log_softmax(z[i].double(), -1)
        for b in range(len(y)):
            res -= rec.lam_a[b].item()*lp[b,y[b].item()*n+i].item() + rec.lam_b[b].item()*lp[b,y[rec.perm[b]].item()*n+i].item()
    return res/(n*len(y))

@pytest.mark.parametrize('mix', [CutMix,MixUp,SnapMix])
def test_mixed_batches_have_the_joint_labels_of_both(dls, mix):
    c = first_step(dls, mix())
    t,s = c.got.chunk(2)
    rec,parts = c.rec,css_losses(t, s, c.targ, lf, rec=c.rec)
    assert rec is not None
    assert abs(parts['ce_1'].item()-loop_mixed(t, c.targ, rec))<1e-4 and abs(parts['ce_2'].item()-loop_mixed(s, c.targ, rec))<1e-4
    kt,ks = (loop_total(t.double(), s.double(), c.targ)[1][k] for k in ('kd_1','kd_2'))
    ct,cs = parts['ce_1'].item(),parts['ce_2'].item()
    assert abs(c.total-(ct+cs+ct/cs*kt+cs/ct*ks))<1e-3

def test_classes_of_any_kind(rand):
    "Small integers do not overflow in joint labels, and an image with the class -100 does not count"
    t,s,y = torch.randn(3,4,300),torch.randn(3,4,300),tensor([90,99,3,0])
    want = css_losses(t, s, y, lf)
    for kind in (torch.uint8,torch.int8,torch.int32):
        got = css_losses(t, s, y.to(kind), lf)
        assert all(got[k]==v for k,v in want.items())
    off = css_losses(t, s, tensor([90,99,3,-100]), lf)['ce_1']
    assert torch.allclose(off, css_losses(t[:,:3], s[:,:3], y[:3], lf)['ce_1'])

def test_weights_of_a_function(dls):
    "Class weights of a `partial` are repeated like those of a module"
    w = torch.rand(dls.c)
    z,y = torch.randn(6,3*dls.c),torch.randint(0, 3*dls.c, (6,))
    assert torch.allclose(joint_loss(partial(F.cross_entropy, weight=w), 3)(z, y), joint_loss(CrossEntropyLossFlat(weight=w), 3)(z, y))

def test_ignored_class_is_refused(dls):
    with pytest.raises(ValueError, match='the loss ignores class 1'): make(dls, loss_func=CrossEntropyLossFlat(ignore_index=1))
    make(dls, loss_func=CrossEntropyLossFlat(ignore_index=-1))

def test_which_is_kept_in_a_file(tmp_path):
    "A network that evaluates one of two does so after `save_net` and `load_net`"
    net = css_net(pair, 3, 2, pretrained=False).eval()
    x = torch.randn(2,3,64,64)
    for which in ('net2','both','net1'):
        net.which = which
        save_net(net, tmp_path/'n.pt')
        again = load_net(tmp_path/'n.pt')[0]
        assert again.which==which and torch.allclose(again(x), net(x), atol=1e-5)

@pytest.mark.parametrize('which', ['net1','net2'])
def test_diversity_of_one_network(dls, which):
    "With `which` the branches that are compared are those that predict"
    from cekd_fastai.online.diversity import diversity
    learn = make(dls)
    for p in learn.model.net2.heads.parameters(): p.data.mul_(3) # so that the two differ
    learn.model.which = which
    alone = Learner(dls, learn.model.subnet(), loss_func=lf)
    d = diversity(learn)
    assert len(d.branches)==2
    for k,v in diversity(alone).as_dict().items(): assert d.as_dict()[k]==pytest.approx(v), k
    learn.model.which = 'both'
    assert len(diversity(learn).branches)==4

def test_joint_distance(dls):
    "The distance of the authors: over joint probabilities, image by image and pair by pair, and between branches of one index"
    from cekd_fastai.online.diversity import diversity
    learn = make(dls)
    net = learn.model.eval()
    d = diversity(learn, joint=True)
    x = torch.cat([x.as_subclass(torch.Tensor) for x,_ in dls.valid])
    with torch.no_grad(): p = net.branch_forward(x)[0].softmax(-1)
    n,N = p.shape[:2]
    assert p.shape[-1]>2*3-1 and n==4
    pairs = [(p[i,k]-p[j,k]).norm() for i in range(n) for j in range(i+1, n) for k in range(N)]
    assert d.distance==pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)
    same = [(p[i,k]-p[i+2,k]).norm() for i in range(2) for k in range(N)]
    assert (d.distances[0,2]+d.distances[1,3]).item()/2==pytest.approx(torch.stack(same).mean().item(), rel=1e-5)
    plain = diversity(learn)
    assert plain.distance!=pytest.approx(d.distance) and plain.disagreement==d.disagreement and plain.gain==d.gain

def test_own_start():
    "Branches begin as copies, or each with random weights of its own"
    for own in (False,True):
        net = css_net(('test_resnet','test_resnet'), 3, 2, pretrained=False, own_start=own)
        a,b = (next(o.parameters()) for o in net.net1.branches)
        assert torch.equal(a, b) != own

def test_class_weights_in_a_fit(dls):
    c = first_step(dls, loss_func=CrossEntropyLossFlat(weight=tensor([1.,.1,4.])))
    want,_ = loop_total(*c.got.double().chunk(2), c.targ, cw=[1.,.1,4.])
    assert abs(c.total-want)<1e-3

def test_own_callback_replaces_the_default(dls):
    assert make(dls, CSS(T=5)).css.T==5 and len([cb for cb in make(dls, CSS).cbs if isinstance(cb, CSS)])==1

# --- a good citizen

def test_valid_loss_is_that_of_what_is_deployed(dls):
    learn = quiet_fit(make(dls))
    for which in ('net1','net2','both'):
        learn.model.which = which
        with learn.no_bar(): loss,acc = learn.validate()
        z,y = [],[]
        for xb,yb in dls.valid:
            with torch.no_grad(): z.append(learn.model.eval().subnet(which)(xb.as_subclass(Tensor)))
            y.append(yb.as_subclass(Tensor))
        z,y = torch.cat(z),torch.cat(y)
        assert abs(loss-F.cross_entropy(z, y).item())<1e-4 and abs(acc-(z.argmax(1)==y).float().mean().item())<1e-6

def test_habits(dls):
    learn = quiet_fit(make(dls))
    with learn.no_bar(), learn.no_logging():
        before = weights_of(learn.model)
        learn.lr_find(num_it=4, show_plot=False)
        assert torch.equal(before, weights_of(learn.model))
        p,y = learn.get_preds()
        assert p.shape==(6,3) and torch.allclose(p.sum(1), torch.ones(6), atol=1e-5)
        p,_,loss = learn.get_preds(with_loss=True)
        assert loss.shape==(6,)
        p,_ = learn.tta(n=2)
        assert torch.allclose(p.sum(1), torch.ones(6), atol=1e-4)
        name,i,probs = learn.predict(dls.valid.items[0])
        assert name in dls.vocab and len(probs)==3
        learn.fine_tune(1, 1e-3)
        learn.show_results(max_n=2)

def test_freeze_trains_heads_only(dls):
    learn = make(dls, opt_func=SGD, wd=0.)
    learn.freeze()
    before = {n:p.detach().clone() for n,p in learn.model.named_parameters()}
    quiet_fit(learn, lr=.1)
    changed = {n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])}
    bn = {f'{k}.{n}' for k,m in learn.model.named_modules() if isinstance(m, nn.BatchNorm2d) for n,_ in m.named_parameters()}
    assert changed and all('.heads.' in n for n in changed-bn) and {n.split('.')[0] for n in changed-bn}=={'net1','net2'}

def test_save_load_and_resume(dls, tmp_path):
    def fresh():
        learn = make(dls, opt_func=SGD)
        learn.path,learn.model_dir = tmp_path,'.'
        return learn
    a = quiet_fit(fresh())
    a.save('half', with_opt=True)
    b = fresh()
    b.create_opt()
    b.load('half', with_opt=True)
    for learn in (a,b):
        set_seed(7)
        dls.train.rng.seed(7)
        quiet_fit(learn)
    assert torch.allclose(weights_of(a.model), weights_of(b.model), atol=1e-6)

def test_batches_of_unlike_precision(dls):
    learn = make(dls)
    with torch.autocast('cpu', dtype=torch.bfloat16): quiet_fit(learn)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1][:7])
    c = Catch()
    with torch.autocast('cpu', dtype=torch.bfloat16): quiet_fit(make(dls), 1, c)
    want,_ = loop_total(*c.got.double().chunk(2), c.targ)
    assert abs(c.total-want)<1e-2

class Stop(Callback):
    "Raises `what` at `event` of the second training batch, or before validation"
    order = 7
    def __init__(self, event, what): self.event,self.what = event,what
    def __call__(self, name):
        if name==self.event and (name=='before_validate' or self.training and getattr(self.learn, 'iter', 0)==1): raise self.what('stop')

@pytest.mark.parametrize('event', ['before_batch','after_pred','after_loss','before_step','after_step','after_batch','before_validate'])
@pytest.mark.parametrize('what', [CancelFitException,KeyboardInterrupt,RuntimeError])
def test_an_interrupt_leaves_nothing_to_repair(dls, event, what):
    learn = make(dls)
    before = learn.loss_func
    try: quiet_fit(learn, 1, Stop(event, what))
    except (KeyboardInterrupt,RuntimeError) as e: assert 'stop' in str(e)
    learn.cbs = learn.cbs.filter(lambda cb: not isinstance(cb, Stop))
    assert learn.loss_func is before
    with learn.no_bar(): p,_ = learn.get_preds()
    assert torch.allclose(p.sum(1), torch.ones(6), atol=1e-5)
    quiet_fit(learn)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1][:7]) and learn.css.logits is None

@pytest.mark.parametrize('event,what', [('after_loss',CancelBatchException),('after_pred',CancelTrainException),
    ('after_loss',CancelEpochException),('before_validate',CancelValidException)])
def test_cancelled_parts_of_a_fit(dls, event, what):
    learn = make(dls)
    quiet_fit(learn, 1, Stop(event, what))
    quiet_fit(learn)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1][:7])

def test_export_and_load_in_a_fresh_process(dls, tmp_path):
    learn = quiet_fit(make(dls, CutMix(), transform='permute'))
    learn.export(tmp_path/'m.pkl')
    with learn.no_bar(): want = learn.predict(dls.valid.items[0])[2]
    code = ("import sys; from fastai.vision.all import load_learner; l = load_learner(sys.argv[1]);\n"
        "with l.no_bar(): print(*l.predict(sys.argv[2])[2].tolist())\n"
        "assert l.css.logits is None and l.css.T==3")
    res = forks.run(code, tmp_path/'m.pkl', dls.valid.items[0])
    assert res.returncode==0, res.stderr
    assert torch.allclose(tensor([float(v) for v in res.stdout.split()[-3:]]), want, atol=1e-5)

def test_grows_no_graph_and_no_shadow(dls, recwarn):
    learn = quiet_fit(make(dls))
    assert not [w for w in recwarn if 'shadow' in str(w.message)]
    assert learn.css.parts is None and learn.css.sums is None

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_step_does_not_wait_for_the_gpu():
    net = css_net(pair, 4, n_branches=3, pretrained=False).cuda()
    x,y = torch.randn(4,3,64,64).cuda(),tensor([0,1,2,3]).cuda()
    net(x)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for transform in ('corner','permute'):
            logits,_ = net(x)
            total(*logits.chunk(2), y).backward()
    finally: torch.cuda.set_sync_debug_mode('default')

# --- what it refuses

def soft_dls():
    ds = [(torch.rand(3,64,64),torch.rand(3)) for _ in range(4)]
    res = DataLoaders(*(DataLoader(ds, bs=2, num_workers=0) for _ in range(2)))
    res.c = 3
    return res

@pytest.mark.parametrize('kw,says', [
    (dict(archs='test_resnet'), "pass two backbones such as"), (dict(archs=('test_resnet',)), 'CSS trains two networks'),
    (dict(archs=('test_resnet',)*3), 'CSS trains two networks'),
    (dict(archs=('test_resnet','test_resnt')), 'no architecture `test_resnt`'), (dict(archs=('test_resnet',nn.Sequential(nn.Flatten(), nn.Linear(3*224*224, 3)))), 'cannot be split'),
    (dict(n_branches=0), 'at least one branch'), (dict(n_branches=1), 'pass `n_branches=2` or more'),
    (dict(transform='rotate'), "choose 'corner' or 'permute'"),
    (dict(transform=3), 'a function of the map'), (dict(split='layer9'), 'no part `layer9`'), (dict(split=('head',)), '`split` has 1 values'),
    (dict(split='head', weights='none.pth'), 'no weights file'), (dict(loss_func=BCEWithLogitsLossFlat()), 'one class per image'),
    (dict(cbs=CEKD()), 'each want to write the training loss'), (dict(cbs=FastaiMixUp()), 'of cekd_fastai')])
def test_refused_when_built(dls, kw, says):
    kw = dict(archs=pair, n_branches=2) | kw
    with pytest.raises((ValueError,FileNotFoundError)) as e: css_learner(dls, kw.pop('archs'), pretrained=False, **kw)
    assert says in str(e.value) and '\n' not in says

def test_refuses_a_backbone_without_trunk():
    shallow = lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3,4,3,stride=2)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3)))
    with pytest.raises(ValueError, match='too shallow to split'): css_net((shallow,shallow), 3)

def test_refuses_one_object_twice():
    net = css_branch_net('test_resnet', 3, n_branches=2, pretrained=False)
    with pytest.raises(ValueError, match='one and the same object'): CSSNet(net, net)
    body = nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten())
    with pytest.raises(ValueError, match='one and the same object'): css_net((body,body), 3)

def test_refuses_heads_that_do_not_match():
    mk = lambda n,k: css_branch_net('test_resnet', k, n_branches=n, pretrained=False)
    for a,b in ((mk(2,3),mk(3,3)),(mk(2,3),mk(2,4)),(mk(2,3),mk(3,2))):
        with pytest.raises(ValueError, match='heads of the two networks do not match'): CSSNet(a, b)

def test_refuses_other_models_and_soft_labels(dls):
    with pytest.raises(ValueError, match='css_learner'): Learner(dls, branch_net('test_resnet', 3, pretrained=False), cbs=CSS())
    learn = css_learner(soft_dls(), pair, n_branches=2, pretrained=False, loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='soft or several labels'): quiet_fit(learn)

def test_refuses_fastai_mixup_given_to_fit(dls):
    with pytest.raises(ValueError, match='of cekd_fastai'): quiet_fit(make(dls), 1, FastaiMixUp())

def test_refuses_data_without_classes():
    dls = soft_dls()
    del dls.c
    with pytest.raises(ValueError, match='set `dls.c`'): css_learner(dls, pair, pretrained=False, loss_func=lf)

def test_small_maps_say_what_to_do(dls):
    net = css_net(pair, 3, n_branches=2, pretrained=False)
    with pytest.raises(ValueError, match='use larger images'): net(torch.randn(2,3,32,32))
    for kw in (dict(T=0), dict(T=-1), dict(ramp=2), dict(ramp=-.1)):
        with pytest.raises(ValueError, match=f'`{first(kw)}` is {first(kw.values())}'): CSS(**kw)

def test_no_other_loss_on_joint_labels(dls):
    "A loss of plain labels on joint logits would train without a word on wrong labels."
    net = css_net(('test_resnet','test_resnet'), 4, pretrained=False)
    for cb in (BranchLoss,CEKD):
        with pytest.raises(ValueError, match='have labels of their own'): Learner(dls, net, loss_func=CrossEntropyLossFlat(), splitter=branch_splitter, cbs=cb())
    one = branch_net('test_resnet', 4, pretrained=False)
    with pytest.raises(ValueError, match='`CSS` trains two networks'): Learner(dls, one, loss_func=CrossEntropyLossFlat(), cbs=CSS())
