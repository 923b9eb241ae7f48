"Mixing against references written as loops, beside everything a fastai learner does, and what it refuses."
from copy import deepcopy
from types import SimpleNamespace
from functools import partial
import numpy as np, pytest, torch, torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast
from fastai.callback.mixup import CutMix as StockCutMix,MixUp as StockMixUp
from fastai.callback.training import GradientAccumulation
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CancelFitException,CrossEntropyLossFlat,DataBlock,DataLoaders,FocalLossFlat,ImageBlock,
    Interpretation,LabelSmoothingCrossEntropyFlat,Learner,MultiCategoryBlock,PILImage,Tensor,TensorImage,accuracy,load_learner,nn,resnet18,set_seed,tensor,
    vision_learner)
from torch.utils._python_dispatch import TorchDispatchMode
from cekd_fastai.all import CEKD,CutMix,MixOneOf,MixUp,SnapMix,branch_learner,fine_grained_dls,make_birds
from cekd_fastai.cam import model_cam
from cekd_fastai.core import HalfPrecision
from cekd_fastai.losses import _setting
from cekd_fastai.mix import callback,snapmix
from cekd_fastai.mix.callback import Mix
from cekd_fastai.mix.noise import plot_label_noise
from cekd_fastai.synthetic import bird_parts
from cekd_fastai.losses import mixed_loss
from cekd_fastai.mix.core import MixRecord,mix_pixels
from cekd_fastai.mix.evidence import Evidence,evidence_batches,oracle_weights
from cekd_fastai.mix.noise import label_noise,noise_table

edges = [(0,0,12,10), (0,0,4,3), (8,7,12,10), (3,2,4,3), (0,4,12,5), (5,0,6,10)]
empty = (3,3,3,9)
every = [MixUp, CutMix, SnapMix, partial(MixUp, per='sample'), partial(CutMix, per='sample'), partial(SnapMix, per='sample'),
    lambda: MixOneOf([MixUp(),CutMix(),SnapMix()]), lambda: MixOneOf([MixUp(),CutMix(),SnapMix()], per='sample', prob=.8)]

# References: one image after the other, one pixel after the other

def loop_image(host, donor, a, b, host_share=0.):
    "Box `b` of `donor`, resized, in box `a` of `host`"
    out,(x1,y1,x2,y2) = host.clone(),a
    if x2<=x1 or y2<=y1: return out
    patch = F.interpolate(donor[None,:,b[1]:b[3],b[0]:b[2]], (y2-y1,x2-x1), mode='bilinear', align_corners=True)[0]
    for r in range(y1, y2):
        for c in range(x1, x2): out[:,r,c] = host_share*host[:,r,c] + (1-host_share)*patch[:,r-y1,c-x1]
    return out

def loop_share(a, h, w): return sum(1 for r in range(h) for c in range(w) if a[0]<=c<a[2] and a[1]<=r<a[3])/(h*w)

def loop_sem(m, h, w):
    s = F.interpolate(m[None,None], (h,w), mode='bilinear', align_corners=False)[0,0]
    s = s-s.min()
    return s/s.sum()

def loop_snap(y, maps, perm, boxes_a, boxes_b, h, w):
    "Weights of SnapMix as the paper's authors describe them"
    sems,las,lbs = [loop_sem(m, h, w) for m in maps],[],[]
    for i,(a,b) in enumerate(zip(boxes_a, boxes_b)):
        j = perm[i].item()
        la,lb = 1-sems[i][a[1]:a[3],a[0]:a[2]].sum(),sems[j][b[1]:b[3],b[0]:b[2]].sum()
        if not loop_share(a, h, w) or not loop_share(b, h, w): la,lb = tensor(1.),tensor(0.)
        elif y[i]==y[j]: la = lb = la+lb
        las.append(la)
        lbs.append(lb)
    return torch.stack(las),torch.stack(lbs)

@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.rand(5,3,10,12),tensor([0,1,0,2,1]),torch.rand(5,3,4)

perm = tensor([2,0,4,3,1])

def fix(monkeypatch, boxes=(), lams=None, perm=perm):
    "Make the draws of the mix these boxes, these shares and this permutation"
    boxes,lams = iter(boxes),None if lams is None else iter(lams)
    for m in (callback,snapmix):
        monkeypatch.setattr(m, 'rand_box', lambda *a: next(boxes))
        if lams: monkeypatch.setattr(m, 'draw_lam', lambda *a: next(lams))
    monkeypatch.setattr(torch, 'randperm', lambda n, device=None: perm)

def same(got, want): return torch.allclose(got, want, atol=1e-6, rtol=0)

@pytest.mark.parametrize('box', edges)
def test_cutmix_exact(batch, box, monkeypatch):
    x,y,_ = batch
    before,lam = x.clone(),1-loop_share(box, 10, 12)
    fix(monkeypatch, [box])
    out,rec = CutMix().mix(x, y)
    assert torch.equal(out, torch.stack([loop_image(x[i], x[j], box, box) for i,j in enumerate(perm)]))
    assert same(rec.lam_a, torch.full((5,), lam)) and same(rec.lam_b, torch.full((5,), 1-lam)) and torch.equal(x, before)

@pytest.mark.parametrize('a', edges)
@pytest.mark.parametrize('b', edges)
def test_snapmix_exact(batch, a, b, monkeypatch):
    x,y,maps = batch
    before = x.clone()
    fix(monkeypatch, [a,b])
    cb = SnapMix()
    cb.maps = lambda x, y: maps
    out,rec = cb.mix(x, y)
    la,lb = loop_snap(y, maps, perm, [a]*5, [b]*5, 10, 12)
    assert same(out, torch.stack([loop_image(x[i], x[j], a, b) for i,j in enumerate(perm)]))
    assert same(rec.lam_a, la) and same(rec.lam_b, lb) and torch.equal(x, before)

@pytest.mark.parametrize('lam', [0.,.3,1.])
def test_mixup_exact(batch, lam, monkeypatch):
    x,y,_ = batch
    fix(monkeypatch, lams=[lam])
    out,rec = MixUp().mix(x, y)
    assert same(out, torch.stack([lam*x[i]+(1-lam)*x[j] for i,j in enumerate(perm)]))
    assert same(rec.lam_a, torch.full((5,), lam)) and same(rec.lam_b, 1-rec.lam_a)

each_a,each_b = [edges[0],edges[1],edges[3],empty,edges[2]],[edges[2],edges[5],edges[0],edges[4],edges[0]]

def test_per_sample_exact(batch, monkeypatch):
    "A box and a share for each sample: the whole image, two corners, one pixel, none"
    x,y,maps = batch
    lams,a,b = tensor([0.,.2,.5,.7,1.]),tensor(each_a),tensor(each_b)
    fix(monkeypatch, [a,a,b], [lams,lams,lams,lams])
    out,rec = MixUp(per='sample').mix(x, y)
    assert same(out, torch.stack([lams[i]*x[i]+(1-lams[i])*x[j] for i,j in enumerate(perm)])) and same(rec.lam_a, lams) and same(rec.lam_b, 1-lams)
    out,rec = CutMix(per='sample').mix(x, y)
    assert torch.equal(out, torch.stack([loop_image(x[i], x[j], each_a[i], each_a[i]) for i,j in enumerate(perm)]))
    assert same(rec.lam_a, tensor([1-loop_share(o, 10, 12) for o in each_a])) and same(rec.lam_b, 1-rec.lam_a)
    cb = SnapMix(per='sample')
    cb.maps = lambda x, y: maps
    out,rec = cb.mix(x, y)
    assert same(out, torch.stack([loop_image(x[i], x[j], each_a[i], each_b[i]) for i,j in enumerate(perm)]))
    la,lb = loop_snap(y, maps, perm, each_a, each_b, 10, 12)
    assert same(rec.lam_a, la) and same(rec.lam_b, lb) and rec.lam_a[3]==1 and rec.lam_b[3]==0

@pytest.mark.parametrize('a', edges)
@pytest.mark.parametrize('b', edges)
def test_per_sample_edges(batch, a, b):
    x = batch[0]
    rec = MixRecord(perm, None, None, tensor([a]*5), tensor([b]*5), torch.linspace(0, 1, 5))
    assert same(mix_pixels(x, rec), torch.stack([loop_image(x[i], x[j], a, b, rec.host_share[i]) for i,j in enumerate(perm)]))

def test_large_images_exact():
    "Positions between pixels stay exact at the size of real crops"
    torch.manual_seed(0)
    x,a,b = torch.rand(2,1,224,224),(3,10,220,201),(17,0,150,224)
    for rec in (MixRecord(tensor([1,0]), None, None, a, b),MixRecord(tensor([1,0]), None, None, tensor([a]*2), tensor([b]*2))):
        out = mix_pixels(x, rec)
        want = F.interpolate(x.double()[:,:,b[1]:b[3],b[0]:b[2]], (a[3]-a[1],a[2]-a[0]), mode='bilinear', align_corners=True)
        assert (out[[1,0],:,a[1]:a[3],a[0]:a[2]]-want).abs().max()<5e-5

def test_one_of_exact(batch, monkeypatch):
    "One record for samples that were mixed in three ways"
    x,y,maps = batch
    lams,a,b = tensor([0.,.2,.5,.7,1.]),tensor(each_a),tensor(each_b)
    pick = tensor([2,0,1,1,2])
    fix(monkeypatch, [a,a,b], [lams,lams,lams,lams])
    monkeypatch.setattr(torch, 'multinomial', lambda w, n, replacement=False: pick)
    cb = MixOneOf([MixUp(),CutMix(),SnapMix()], per='sample')
    cb.mixes[2].maps = lambda x, y: maps
    out,rec = cb.mix(x, y)
    la,lb = loop_snap(y, maps, perm, each_a, each_b, 10, 12)
    for i,j in enumerate(perm):
        if pick[i]==0: img,w = lams[i]*x[i]+(1-lams[i])*x[j],(lams[i],1-lams[i])
        elif pick[i]==1: img,w = loop_image(x[i], x[j], each_a[i], each_a[i]),(1-loop_share(each_a[i], 10, 12),loop_share(each_a[i], 10, 12))
        else: img,w = loop_image(x[i], x[j], each_a[i], each_b[i]),(la[i],lb[i])
        assert same(out[i], img) and same(rec.lam_a[i], torch.as_tensor(w[0])) and same(rec.lam_b[i], torch.as_tensor(w[1])), i
    assert torch.equal(rec.mix_idx, pick)

@pytest.mark.parametrize('mix', [CutMix,SnapMix])
def test_empty_box_mixes_nothing(batch, mix, monkeypatch):
    fix(monkeypatch, [empty]*2)
    assert mix().mix(*batch[:2]) is None

@pytest.mark.parametrize('make', every)
def test_batch_of_one(make):
    x,y = torch.rand(1,3,16,16),tensor([1])
    cb = make()
    cb.learn = SimpleNamespace(model=net(), cbs=[])
    for _ in range(10):
        res = cb.mix(x, y)
        if res is None: continue
        assert res[1].perm.tolist()==[0] and res[0].shape==x.shape
        if isinstance(cb, (MixUp,CutMix)): assert torch.allclose(res[0], x, atol=1e-6)

# Options

def test_same_label(batch, monkeypatch):
    x,y,maps = batch
    recs = []
    for on in (True,False):
        fix(monkeypatch, [edges[1],edges[2]])
        cb = SnapMix(same_label=on)
        cb.maps = lambda x, y: maps
        recs.append(cb.mix(x, y)[1])
    pair,(yes,no) = y==y[perm],recs
    assert pair.any() and not pair.all() and same(yes.lam_a[pair], (no.lam_a+no.lam_b)[pair]) and torch.equal(yes.lam_a, yes.lam_b)==pair.all()
    assert torch.equal(yes.lam_a[~pair], no.lam_a[~pair]) and not torch.equal(yes.lam_b[pair], no.lam_b[pair])

def test_two_draws():
    sides = lambda b: (b[2]-b[0], b[3]-b[1])
    for n in (None,50):
        eq = {}
        for two in (True,False):
            ds = [SnapMix(.5, two_draws=two).draw(400, 400, n) for _ in range(60)]
            boxes = [(a,b) for d in ds if d for a,b in (zip(d['box_a'].tolist(), d['box_b'].tolist()) if n else [(d['box_a'],d['box_b'])])]
            inner = [(a,b) for a,b in boxes if min(*a[:2], *b[:2])>0 and max(*a[2:], *b[2:])<400]
            eq[two] = [sides(a)==sides(b) for a,b in inner]
            assert all(a!=b for a,b in inner)
        assert len(eq[False]) and all(eq[False]) and not all(eq[True])

def test_correct_lam(batch, monkeypatch):
    x,y,_ = batch
    fix(monkeypatch, [edges[1],tensor([edges[1],empty]),edges[1]], [.5,tensor([.5,.5]),.5])
    assert (CutMix(correct_lam=False).mix(x, y)[1].lam_a==.5).all()
    assert CutMix(correct_lam=False).draw(10, 12, 2)['lam'].tolist()==[.5,1.]
    assert same(CutMix().mix(x, y)[1].lam_a, torch.full((5,), .9))

def test_prob_per_sample():
    x,y = torch.rand(400,1,8,8),torch.zeros(400).long()
    for cb in (MixUp(1., prob=.3, per='sample'),CutMix(prob=.3, per='sample'),MixOneOf([MixUp(1.),CutMix()], prob=.3, per='sample')):
        out,rec = cb.mix(x, y)
        mixed = (out!=x).flatten(1).any(1)
        assert .2<(rec.lam_a<1).float().mean()<.4 and not (mixed&(rec.lam_a==1)).any() and ((rec.lam_a<1)&~mixed).float().mean()<.05

def test_one_of_weights():
    x,y = torch.rand(4,1,8,8),torch.zeros(4).long()
    for kw in (dict(),dict(per='sample')):
        cb = MixOneOf([MixUp(),CutMix(),CutMix()], weights=[1,3,0], **kw)
        picks = torch.cat([o[1].mix_idx for o in (cb.mix(x, y) for _ in range(300)) if o is not None])
        assert not (picks==2).any() and .65<(picks==1).float().mean()<.85

def test_refused():
    for kw,msg in ((dict(mixes=[]),'0 mixes'), (dict(mixes=[MixUp()], weights=[1,2]),'1 mixes'), (dict(mixes=[MixUp()], weights=[0]),'not all 0'),
        (dict(mixes=[StockMixUp()]),'fastai.callback.mixup.MixUp'), (dict(mixes=[MixUp(prob=.5)]),'own `prob`'), (dict(mixes=[MixOneOf([MixUp()])]),'MixOneOf, but')):
        with pytest.raises(ValueError, match=msg): MixOneOf(**kw)
    with pytest.raises(TypeError, match='alpha'): MixOneOf([MixUp()], alpha=2)

# Any target, any loss, any learner

def net(c=3):
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, c)))

def targets(kind, n=16):
    y = torch.randint(0, 3, (n,))
    return dict(integer=y, onehot=F.one_hot(y, 3).float(), multi=(torch.rand(n,3)>.5).float(), bits=F.one_hot(y, 3))[kind]

def pixel_dls(kind='integer', n=16, bs=8):
    torch.manual_seed(0)
    ds = list(zip(torch.rand(n,3,16,16), targets(kind, n)))
    dls = DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu')
    dls.c = 3
    return dls

class Steps(Callback):
    "What each training step saw"
    run_valid,order = False,7
    def before_fit(self): self.seen = []
    def after_loss(self):
        rec = next(cb for cb in self.learn.cbs if isinstance(cb, Mix)).record
        self.seen.append((self.learn.xb[0], self.learn.yb[0], rec, self.learn.pred.detach(), self.learn.loss.detach()))

def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, f)(*args, **kwargs)

weight = tensor([1.,2.,4.])
ints = [CrossEntropyLossFlat, nn.CrossEntropyLoss, lambda: F.cross_entropy, LabelSmoothingCrossEntropyFlat, lambda: nn.CrossEntropyLoss(label_smoothing=.1),
    FocalLossFlat] + [partial(o, weight=weight) for o in (nn.CrossEntropyLoss,CrossEntropyLossFlat,LabelSmoothingCrossEntropyFlat)]
floats = [BCEWithLogitsLossFlat, nn.BCEWithLogitsLoss, nn.CrossEntropyLoss]
combos = [('integer',l) for l in ints] + [('onehot',l) for l in floats] + [('multi',l) for l in floats[:2]] + [('bits',BCEWithLogitsLossFlat)]

@pytest.mark.parametrize('make', every)
@pytest.mark.parametrize('kind,loss', combos)
def test_targets_and_losses(make, kind, loss):
    "The step's loss is that of both labels; the loss function, its reduction and the labels stay what they were"
    lf = loss()
    learn = Learner(pixel_dls(kind), net(), loss_func=lf, cbs=[make(),Steps()])
    quiet(learn, 'fit', 1, 1e-2)
    assert learn.loss_func is lf and getattr(lf, 'reduction', 'mean')=='mean' and any(o[2] for o in learn.steps.seen)
    for x,y,rec,pred,loss in learn.steps.seen:
        if rec is None: continue
        own = [lf(pred[i:i+1], y[i:i+1]) for i in range(len(y))]
        if weight is _setting(lf, 'weight'): continue
        other = [lf(pred[i:i+1], y[j:j+1]) for i,j in enumerate(rec.perm)]
        want = sum(a*o+b*p for a,b,o,p in zip(rec.lam_a, rec.lam_b, own, other))/len(y)
        assert torch.allclose(loss, want, atol=1e-5)

def test_equals_stock_mixup():
    "The same loss as fastai's callback, for the same draws"
    torch.manual_seed(0)
    pred,y,lam = torch.randn(6,3),torch.randint(0, 3, (6,)),torch.rand(6)
    perm,stock = torch.randperm(6),StockMixUp()
    stock.learn = SimpleNamespace(training=True, loss_func=None)
    stock.old_lf,stock.yb1,stock.lam = CrossEntropyLossFlat(),(y[perm],),lam
    assert torch.allclose(stock.lf(pred, y), mixed_loss(CrossEntropyLossFlat(), pred, y, MixRecord(perm, lam, 1-lam)))
    t = torch.rand(6, 3)
    lerped = BCEWithLogitsLossFlat()(pred, torch.lerp(t[perm], t, lam[:,None]))
    assert torch.allclose(lerped, mixed_loss(BCEWithLogitsLossFlat(), pred, t, MixRecord(perm, lam, 1-lam)))

def test_several_targets():
    "A loss of two kinds of labels gets both"
    class Two(nn.Module):
        reduction = 'mean'
        def forward(self, p, a, b):
            res = F.cross_entropy(p, a, reduction='none')+F.cross_entropy(p, b, reduction='none')
            return res if self.reduction=='none' else res.mean()
    ds = list(zip(torch.rand(16,3,16,16), targets('integer'), targets('integer')))
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0, device='cpu')
    dls.n_inp = 1
    learn = Learner(dls, net(), loss_func=Two(), cbs=[CutMix(),Steps()])
    quiet(learn, 'fit', 1)
    p,(a,b),perm,lam = torch.randn(6,3),torch.randint(0, 3, (2,6)),torch.arange(6).roll(1),torch.linspace(.2, .9, 6)
    two = Two()
    two.reduction = 'none'
    want = (lam*two(p, a, b)+(1-lam)*two(p, a[perm], b[perm])).mean()
    assert torch.allclose(mixed_loss(Two(), p, (a,b), MixRecord(perm, lam, 1-lam)), want)

def test_class_weights():
    "Each part of the label has the weight of its class, and the mean is over the weights of the hosts, as without a mix"
    z,y,w = torch.randn(6,3),torch.tensor([0,1,2,2,1,0]),torch.tensor([1.,2.,5.])
    perm,lam = torch.arange(6).roll(1),torch.linspace(.2, .9, 6)
    log_p = z.log_softmax(1)
    each = [-(lam[i]*w[y[i]]*log_p[i,y[i]] + (1-lam[i])*w[y[perm[i]]]*log_p[i,y[perm[i]]]) for i in range(6)]
    for lf in (nn.CrossEntropyLoss(weight=w),CrossEntropyLossFlat(weight=w)):
        assert torch.allclose(mixed_loss(lf, z, y, MixRecord(perm, lam, 1-lam)), sum(each)/w[y].sum())

@pytest.mark.parametrize('make', every)
def test_the_batch_is_not_written(make):
    "What another callback kept of the batch is what it was; the host is there until the step ends"
    class Keep(Callback):
        order,run_valid = 3,False
        def before_batch(self): self.x,self.copy = self.learn.xb[0],self.learn.xb[0].clone()
        def after_loss(self):
            cb = next(cb for cb in self.learn.cbs if isinstance(cb, Mix))
            assert torch.equal(self.x, self.copy) and (cb.record is None or torch.equal(cb.host, self.copy))
    learn = Learner(pixel_dls(), net(), loss_func=nn.CrossEntropyLoss(), cbs=[make(),Keep()])
    quiet(learn, 'fit', 2)

@pytest.mark.parametrize('make', every)
def test_precision_and_memory_format(make):
    class Last(Callback):
        order = 3
        def before_batch(self): self.learn.xb = (self.learn.xb[0].to(memory_format=torch.channels_last),)
    for amp in (lambda l: l.to_fp16(), lambda l: l.to_bf16(), lambda l: l.add_cb(HalfPrecision())):
        learn = Learner(pixel_dls(), net(), loss_func=nn.CrossEntropyLoss(), cbs=[make(),Steps(),ChannelsLast(),Last()])
        amp(learn)
        quiet(learn, 'fit', 1)
        for x,y,rec,pred,loss in learn.steps.seen:
            assert x.dtype==torch.float32 and torch.isfinite(loss) and x.is_contiguous(memory_format=torch.channels_last)
            if rec is not None: assert rec.lam_a.dtype==rec.lam_b.dtype==torch.float32

def test_maps_under_autocast():
    "The extra pass runs in the precision of the step"
    seen = []
    class Body(nn.Conv2d):
        def forward(self, x):
            seen.append((res := super().forward(x)).dtype)
            return res
    model = nn.Sequential(nn.Sequential(Body(3, 8, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    learn = Learner(pixel_dls(n=8), model, loss_func=nn.CrossEntropyLoss(), cbs=[SnapMix(),HalfPrecision()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert seen==[torch.bfloat16]*2+[torch.float32] or seen==[torch.bfloat16]*3

def test_gradient_accumulation():
    "Two half batches give the gradient of their mixed losses, weighed by their sizes"
    class Catch(Callback):
        order = 20
        def before_step(self):
            self.grads = [p.grad.clone() for p in self.learn.model.parameters()]
            raise CancelFitException
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))
    learn = Learner(pixel_dls(), model, loss_func=nn.CrossEntropyLoss(weight=weight), cbs=[CutMix(),Steps(),GradientAccumulation(16),Catch()])
    quiet(learn, 'fit', 1)
    model.zero_grad()
    for x,y,rec,*_ in learn.steps.seen: (mixed_loss(learn.loss_func, model(x), y, rec)/2).backward()
    assert len(learn.steps.seen)==2 and all(torch.allclose(p.grad, g, atol=1e-6) for p,g in zip(model.parameters(), learn.catch.grads))

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path = make_birds(tmp_path_factory.mktemp('mix')/'birds', n_species=2, n_images=12, n_train=8, size=64, progress=False)
    return fine_grained_dls(path, size=56, bs=8, num_workers=0)

@pytest.mark.parametrize('cb', [MixUp,CutMix,SnapMix])
def test_any_fastai_learner(dls, cb):
    "In place of fastai's own callbacks, on a learner without branches, with a loss that fastai's cannot use"
    learn = vision_learner(dls, resnet18, pretrained=False, loss_func=nn.CrossEntropyLoss(), cbs=cb())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert isinstance(learn.loss_func, nn.CrossEntropyLoss) and learn.loss_func.reduction=='mean'

@pytest.mark.parametrize('make', every)
def test_every_fastai_habit(dls, make, tmp_path):
    "fine_tune, lr_find, get_preds, validate, predict, tta, show_results, Interpretation, export and load_learner"
    learn = Learner(dls, net(2), metrics=accuracy, cbs=make(), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-3)
        learn.lr_find(num_it=15, show_plot=False)
        probs,targs = learn.get_preds()
        valid_loss,_ = learn.validate()
        assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-5)
        assert valid_loss==pytest.approx(F.nll_loss(probs.log(), targs).item(), abs=1e-4)
        assert torch.allclose(learn.get_preds(with_loss=True)[2].mean(), tensor(valid_loss), atol=1e-4)
        name,_,p = learn.predict(dls.valid_ds.items[0])
        assert torch.allclose(p, probs[0], atol=1e-5) and name in dls.vocab
        assert torch.allclose(learn.tta(n=1)[0].sum(1), torch.ones(len(probs)), atol=1e-5)
        learn.show_results(max_n=2)
        assert len(Interpretation.from_learner(learn).top_losses(3)[0])==3
        learn.export(tmp_path/'l.pkl')
        again = load_learner(tmp_path/'l.pkl')
        with again.no_bar(): assert torch.allclose(again.predict(dls.valid_ds.items[0])[2], p, atol=1e-5)
        assert next(cb for cb in again.cbs if isinstance(cb, Mix)).record is None
        again.dls = dls
        with again.no_bar(), again.no_logging(): again.fit(1)

def test_fit_cbs(dls):
    "A mix for one fit only, which `after_create` never sees"
    learn = Learner(dls, net(2), cbs=Steps())
    quiet(learn, 'fit', 1, cbs=SnapMix())
    assert learn.steps.seen[0][2] is not None and not any(isinstance(cb, Mix) for cb in learn.cbs)
    with pytest.raises(ValueError, match='would mix the same batch twice'): quiet(learn, 'fit', 1, cbs=[MixUp(),StockCutMix()])

def test_keeps_the_type_of_images(dls):
    class Look(Callback):
        order = 5
        def before_batch(self): assert type(self.learn.xb[0]) is TensorImage
    quiet(Learner(dls, net(2), cbs=[CutMix(),Look()]), 'fit', 1)

def test_stop_at():
    for at,n in ((0.,0),(.25,2),(.5,4),(.7,6),(1.,8)):
        learn = Learner(pixel_dls(), net(), loss_func=nn.CrossEntropyLoss(), cbs=[MixUp(stop_at=at),Steps()])
        quiet(learn, 'fit', 4)
        assert [o[2] is not None for o in learn.steps.seen]==[True]*n+[False]*(8-n)

def test_stop_at_in_a_search(dls):
    "A search for a learning rate is the beginning of a run: it mixes all along, or with stop_at=0 not at all"
    for stop,want in ((.5,{True}), (0.,{False})):
        seen = []
        class See(Callback):
            order,run_valid = 90,False
            def after_loss(self): seen.append(self.mix_up.record is not None)
        learn = branch_learner(dls, 'test_resnet', pretrained=False, cbs=[MixUp(stop_at=stop),See()])
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
        assert set(seen)==want and len(seen)>=12

def test_several_targets_of_branches():
    "Branches pass all targets to the loss, as a plain learner does"
    def lf(z, a, b, reduction='mean'): return F.cross_entropy(z, a, reduction=reduction)+.5*F.cross_entropy(z, b, reduction=reduction)
    g = torch.Generator().manual_seed(0)
    items = [(torch.randn(3,32,32, generator=g),tensor(i%3),tensor((i+1)%3)) for i in range(8)]
    dls = DataLoaders.from_dsets(items, items, bs=8, num_workers=0, device='cpu', shuffle=False)
    dls.c,dls.n_inp = 3,1
    for cbs in ([],[CutMix()]):
        learn = branch_learner(dls, 'test_resnet', 2, pretrained=False, loss_func=lf, cbs=cbs)
        quiet(learn, 'fit', 1)
        assert torch.isfinite(learn.recorder.losses[-1])

class Half(CutMix):
    "A CutMix with weights of its own"
    def weigh(self, x, y, rec): return torch.full_like(rec.lam_a, .9),torch.full_like(rec.lam_b, .1)

@pytest.mark.parametrize('per', ['batch','sample'])
def test_one_of_asks_each(batch, per):
    "`MixOneOf` asks a mix that weighs labels in its own way, however it chooses"
    x,y = batch[0],batch[1]
    assert (MixOneOf([Half()], per=per).mix(x, y)[1].lam_a==.9).all()

def test_images_are_no_maps(dls):
    "A network behind a layer that normalises is refused instead of looked at pixel by pixel"
    from cekd_fastai.interpret.maps import show_cam
    plain = nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3,4,3,2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, dls.c)))
    learn = Learner(dls, plain, loss_func=CrossEntropyLossFlat(), cbs=SnapMix())
    with pytest.raises(ValueError, match='no spatial feature map'): quiet(learn, 'fit', 1)
    with pytest.raises(ValueError, match='no spatial feature map'): show_cam(learn, [0])

def test_channels_last(dls):
    "The maps of a plain network that keeps its channels last are read as what they are"
    from timm.models.swin_transformer import SwinTransformer
    from cekd_fastai.interpret.maps import show_cam
    net = SwinTransformer(img_size=56, embed_dim=8, depths=(1,1), num_heads=(1,1), window_size=7, num_classes=dls.c)
    x = torch.randn(2,3,56,56)
    maps = model_cam(net, x, tensor([0,1]))
    assert maps.shape==(2,7,7) and torch.allclose(maps.mean((1,2)), net.eval()(x)[[0,1],[0,1]], atol=1e-5) # the head is linear on a mean
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=SnapMix())
    quiet(learn, 'fit', 1)
    assert len(show_cam(learn, [0]))==1

def test_multi_label_images(dls):
    "SnapMix with several labels for each image: the map is that of all its labels"
    files = list(dls.train_ds.items)
    block = DataBlock(blocks=(ImageBlock,MultiCategoryBlock), get_y=lambda o: [o.parent.name, 'bird'], splitter=lambda o: (list(range(8)),list(range(8))))
    learn = vision_learner(block.dataloaders(files, bs=8, num_workers=0), resnet18, pretrained=False, cbs=SnapMix())
    learn.create_opt()
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    m,x = net(),torch.rand(2,3,16,16)
    both = model_cam(m, x, tensor([[1.,1,0],[0,0,1]]))
    one = [model_cam(m, x, tensor(o)) for o in ([0,2],[1,2])]
    assert same(both[0], (one[0]+one[1])[0]) and same(both[1], one[0][1])

# Interrupts

def interrupted(learn, where, ex):
    "Start a fit that ends in `ex`"
    class Stop(Callback):
        order,count = 45,0
        def stop(self):
            self.count += 1
            if self.count==2: raise ex('stopped')
    setattr(Stop, where, Stop.stop)
    try: quiet(learn, 'fit', 2, cbs=Stop())
    except (KeyboardInterrupt,ZeroDivisionError): pass

def outcome(learn, state, seed=1):
    "Predictions, then weights after another fit, from the same start"
    learn.model.load_state_dict(state)
    learn.opt = None
    preds = quiet(learn, 'get_preds')[0]
    set_seed(seed)
    learn.dls.train.rng.seed(seed)
    quiet(learn, 'fit', 1, 1e-2)
    return [preds,quiet(learn, 'get_preds')[0],*(o.clone() for o in learn.model.state_dict().values())]

@pytest.mark.parametrize('make', every)
def test_the_next_run_is_what_it_would_have_been(make, tmp_path):
    "After any interrupt anywhere, and after lr_find"
    start = net()
    state = {k:v.clone() for k,v in start.state_dict().items()}
    def learner(): return Learner(pixel_dls(), start, loss_func=CrossEntropyLossFlat(), cbs=make(), path=tmp_path)
    want = outcome(learner(), state)
    wheres,exs = ('before_batch','after_pred','after_loss','before_step','after_epoch'),(KeyboardInterrupt,CancelFitException,ZeroDivisionError)
    spoils = [partial(interrupted, where=w, ex=e) for w in wheres for e in exs]
    spoils.append(lambda l: quiet(l, 'lr_find', num_it=15, show_plot=False))
    for spoil in spoils:
        learn = learner()
        spoil(learn)
        assert all(torch.equal(a, b) for a,b in zip(want, outcome(learn, state))), spoil

@pytest.mark.parametrize('where', ['before_batch','after_pred','after_loss','before_step'])
@pytest.mark.parametrize('ex', [KeyboardInterrupt,CancelFitException,ZeroDivisionError])
def test_interrupts_leave_nothing(dls, where, ex):
    "Whatever ends a run and wherever, predictions and the next run are what they would have been"
    class Stop(Callback):
        order = 45
        def stop(self): raise ex('stopped') if ex is ZeroDivisionError else ex
    setattr(Stop, where, Stop.stop)
    learn = branch_learner(dls, 'test_resnet', pretrained=False, metrics=accuracy, cbs=[SnapMix(),CEKD()])
    before = learn.get_preds()[0]
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1, 0., wd=0., cbs=Stop())
        except (KeyboardInterrupt,ZeroDivisionError): pass
        learn.model.eval()
        probs = learn.get_preds()[0]
        assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-5) and len(before)==len(probs)
        assert len(learn.validate())==2
        learn.fit(1, 1e-3)
    assert len(learn.recorder.values[-1])==6 and learn.cekd.clean is None and learn.snap_mix.host is None

# SnapMix and the network

def test_snapmix_needs_a_map(dls):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3*56*56, 2)
        def forward(self, x): return self.fc(x.flatten(1))
    learn = Learner(dls, Flat(), cbs=SnapMix())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='`Flat` has no spatial feature map.*mix with `CutMix`'): learn.fit(1)
    with pytest.raises(ValueError, match='`Flat` cannot be split'): branch_learner(dls, Flat(), cbs=SnapMix())
    with pytest.raises(ValueError, match='belongs to no learner'): [SnapMix().mix(torch.rand(2,3,8,8), tensor([0,1])) for _ in range(20)]

def test_two_mixes(dls):
    for other in (CutMix(),StockMixUp(),MixOneOf([MixUp()])):
        with pytest.raises(ValueError, match='would mix the same batch twice'): branch_learner(dls, 'test_resnet', pretrained=False, cbs=[SnapMix(),other])

@pytest.mark.parametrize('make', [SnapMix,partial(SnapMix, per='sample'),lambda: MixOneOf([SnapMix()])])
def test_snapmix_alone_leaves_the_model_untouched(dls, make):
    learn = branch_learner(dls, 'test_resnet', pretrained=False, cbs=make())
    learn.model.train()
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    x,y = dls.one_batch()
    cb = next(cb for cb in learn.cbs if isinstance(cb, Mix))
    cb.mix(x.as_subclass(Tensor), y.as_subclass(Tensor))
    assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items()) and all(m.training for m in learn.model.modules())

@pytest.mark.parametrize('mix,owner,passes', [(CutMix,None,1), (SnapMix,None,2), (CutMix,CEKD,2), (SnapMix,CEKD,2),
    (lambda: MixOneOf([SnapMix()], per='sample'),CEKD,2), (lambda: MixOneOf([SnapMix(),SnapMix(two_draws=False)], per='sample'),None,2)])
def test_passes_of_a_step(dls, mix, owner, passes):
    "The maps cost one pass alone, and none where the clean pass exists"
    learn = branch_learner(dls, 'test_resnet', pretrained=False, cbs=[mix()]+([owner()] if owner else []))
    count = []
    learn.model.trunk.register_forward_pre_hook(lambda m, x: count.append(len(x[0])) if learn.training else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert len(count)==passes*len(dls.train)

def test_snapmix_of_the_authors(dls):
    "With `official` the pass for the maps runs in training mode, counts in batch normalisation, and maps are rectified"
    learn = branch_learner(dls, 'test_efficientnet', 1, pretrained=False, cbs=SnapMix(official=True))
    x,y = (o.as_subclass(Tensor) for o in dls.one_batch())
    net,twin = learn.model.train(),deepcopy(learn.model).train()
    maps = learn.snap_mix.maps(x, y)
    with torch.no_grad(): feat = twin.branch_forward(x)[1][0]
    fc = twin.heads[0][-1]
    want = torch.einsum('bchw,bc->bhw', feat.relu(), fc.weight[y]) + fc.bias[y][:,None,None]
    assert torch.allclose(maps, want, atol=1e-5) and (feat<0).any() and net.training
    assert all(torch.allclose(a, b) for a,b in zip(net.buffers(), twin.buffers())) # both have counted one pass
    with torch.no_grad(): learn.snap_mix.maps(x, y) # a look outside a step counts nothing
    assert all(torch.allclose(a, b) for a,b in zip(net.buffers(), twin.buffers()))

@pytest.mark.parametrize('mix', [None,SnapMix])
def test_middle(dls, tmp_path, mix):
    "SnapMix's baseline+: the loss is the sum of both classifiers' losses, the prediction their mean, and a file has both"
    from cekd_fastai.all import Deployed,deploy
    learn = branch_learner(dls, 'test_resnet', 1, pretrained=False, mid=True, metrics=accuracy, cbs=mix() if mix else None)
    net,seen = learn.model,[]
    class See(Callback):
        order = 100
        def after_loss(self):
            if not self.training: return
            rec = self.learn.snap_mix.record if mix else None
            want = sum(mixed_loss(F.cross_entropy, z, self.yb[0], rec) if rec else F.cross_entropy(z, self.yb[0]) for z in self.learn.branch_loss.logits)
            seen.append((self.learn.loss_grad.item(), want.item(), len(self.learn.branch_loss.logits)))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=See())
    assert all(a==pytest.approx(b, rel=1e-4) and n==2 for a,b,n in seen) and len(seen)==2*len(dls.train)
    probs = learn.get_preds()[0]
    x = dls.valid.one_batch()[0].as_subclass(Tensor)
    with torch.no_grad(): z = net.eval().branch_forward(x)[0]
    assert torch.allclose(net(x), z.mean(0), atol=1e-6)
    learn.export(tmp_path/'l.pkl')
    assert torch.allclose(load_learner(tmp_path/'l.pkl').get_preds(dl=dls.valid)[0], probs, atol=1e-5)
    for which in (None,0):
        got = Deployed(deploy(learn, tmp_path/'n.pt', which)).net(x)
        assert torch.allclose(got, z.mean(0) if which is None else z[0], atol=1e-5)
    learn.save(tmp_path/'now')
    for p in net.parameters(): p.data.add_(1)
    learn.load(tmp_path/'now')
    assert torch.allclose(learn.get_preds()[0], probs, atol=1e-5)
    learn.freeze()
    assert all(p.requires_grad for p in net.mid.parameters()) and not any(p.requires_grad for p in net.branches.parameters() if p.ndim>1)

def test_middle_stands_alone(dls):
    "It has no loss beside a distillation, and none beside peers"
    with pytest.raises(ValueError, match='no loss for the mid.*: leave out `mid=True`, or `CEKD`'): branch_learner(dls, 'test_resnet', mid=True, pretrained=False, cbs=[SnapMix(),CEKD()])
    with pytest.raises(ValueError, match='`mid` is for one network'): branch_learner(dls, ('test_resnet',)*2, mid=True, pretrained=False)

def test_maps_of_the_ensemble(dls):
    "The mean of the map is the logit that is deployed"
    learn = branch_learner(dls, 'test_resnet', pretrained=False, cbs=SnapMix())
    x,y = (o.as_subclass(Tensor) for o in dls.one_batch())
    maps = model_cam(learn.model.train(), x, y)
    with torch.no_grad(): logits = learn.model.eval()(x)
    assert torch.allclose(maps.mean((1,2)), logits.gather(1, y[:,None])[:,0], atol=1e-4)

# No synchronisation

class Ops(TorchDispatchMode):
    "Names of the operators that ran, and how many tensors went to the device"
    def __init__(self):
        super().__init__()
        self.names,self.sent = [],0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        dev = (kwargs or {}).get('device')
        self.sent += '_to_copy' in str(func) and dev is not None and torch.device(dev).type=='meta' and args[0].device.type=='cpu'
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize('make', every)
def test_nothing_asks_the_device(make, monkeypatch):
    "On torch's `meta` device, which holds no numbers, whatever would have to read one raises; all that goes to the device goes through `_send`"
    count,send = [],callback._send
    monkeypatch.setattr(callback, '_send', lambda t, d: count.append(t) or send(t, d))
    dev = torch.device('meta')
    cb,x,y,w = make(),torch.rand(8,3,16,16, device=dev),torch.zeros(8, dtype=torch.long, device=dev),torch.rand(3, device=dev)
    cb.learn = SimpleNamespace(model=net().to(dev), cbs=[])
    set_seed(3)
    for lf in (nn.CrossEntropyLoss(weight=w),CrossEntropyLossFlat(),LabelSmoothingCrossEntropyFlat(),FocalLossFlat()):
        with Ops() as ops:
            mixed,rec = next(o for o in iter(lambda: cb.mix(x, y), 0) if o is not None)
            mixed_loss(lf, cb.learn.model(mixed), y, rec).backward()
        assert ops.sent==len([o for o in count if isinstance(o, Tensor)]) and mixed.device.type=='meta'
        assert not [o for o in ops.names if any(k in o for k in ('masked_select','nonzero','unique'))]
        count.clear()

def test_the_meta_check_bites():
    "A tensor as the bound of a slice, or a boolean index, is found"
    x = torch.rand(4, 4, device='meta')
    for bad in (lambda: x[:torch.tensor(2, device='meta')], lambda: x[x>0], lambda: x.sum().item()):
        with pytest.raises(Exception): bad()

# Label noise

def test_mixes_of_one_class_have_rows_of_their_own(dls):
    assert list(label_noise([CutMix(alpha=1.),MixUp(),CutMix(alpha=5.)], dls, n=16, rounds=1).index)==['cut_mix 1','mix_up','cut_mix 2']

def loop_oracle(rec, ev, h, w):
    "Evidence laid out on pixels and counted one by one; rectangles of whole pixels"
    n,P = ev.weights.shape
    boxes = lambda b: [(0,0,w,h)]*n if b is None else [b]*n if isinstance(b, tuple) else b.tolist()
    a,b,keep = boxes(rec.box_a),boxes(rec.box_b),torch.as_tensor(rec.host_share).expand(n).tolist()
    def seen(i, box):
        res = 0.
        for p in range(P):
            x1,y1,x2,y2 = ev.rects[i,p].int().tolist()
            pix = [(c,r) for c in range(x1, x2) for r in range(y1, y2)]
            res += ev.weights[i,p].item()*sum(box[0]<=c<box[2] and box[1]<=r<box[3] for c,r in pix)/len(pix)
        return res
    out = []
    for i,j in enumerate(rec.perm.tolist()):
        host = ev.weights[i].sum().item()-(1-keep[i])*seen(i, a[i])
        donor = (1-keep[i])*seen(j, b[i])
        out.append(host/(host+donor) if host+donor>1e-6 else float('nan'))
    return tensor(out)

@pytest.mark.parametrize('make', [MixUp,CutMix,SnapMix,partial(CutMix, per='sample'),partial(SnapMix, per='sample'),lambda: MixOneOf([MixUp(),CutMix(),SnapMix()], per='sample', prob=.8)])
def test_oracle_counts_pixels(make):
    torch.manual_seed(0)
    x,y,cb = torch.rand(12,3,16,16),torch.randint(0, 3, (12,)),make()
    cb.learn = SimpleNamespace(model=net(), cbs=[])
    lo = torch.randint(0, 12, (12,4,2))
    ev = Evidence(torch.cat([lo,lo+torch.randint(1, 5, (12,4,2))], -1).float(), torch.rand(12,4)*(torch.rand(12,4)>.4))
    rec = next(o for o in (cb.mix(x, y) for _ in range(20)) if o is not None)[1]
    got,want = oracle_weights(rec, ev),loop_oracle(rec, ev, 16, 16)
    assert torch.allclose(got, want, atol=1e-5, equal_nan=True)

def test_parts_land_on_their_pixels(tmp_path):
    "A mark painted on the picture file at a part's location is found in the batch where the evidence says, for several crops and shapes of file"
    from PIL import Image
    path = make_birds(tmp_path/'birds', n_species=2, n_images=6, n_train=4, size=96, progress=False)
    parts = bird_parts(path)
    for img,d in parts[parts.visible].groupby('image'):
        im = Image.open(path/'images'/img)
        for o in d.itertuples(): im.paste((255,0,255), (int(o.x)-1,int(o.y)-1,int(o.x)+2,int(o.y)+2))
        im.save(path/'images'/img, quality=100, subsampling=0)
    for size in (84,63):
        x,y,ev = next(evidence_batches(fine_grained_dls(path, size=size, bs=4, num_workers=0), bs=8))
        hits = 0
        for i in range(len(x)):
            for r,w in zip(ev.rects[i], ev.weights[i]):
                if not w: continue
                cx,cy = ((r[:2]+r[2:])/2).int().tolist()
                near = x[i,:,max(cy-1,0):cy+2,max(cx-1,0):cx+2]
                assert (near[1]<-1).any() and (near[0]>.5).any()
                hits += 1
        assert hits>=6

def test_loaders_that_go_by_file_are_refused(dls, monkeypatch):
    "A loader that crops each file by its own box would move the evidence unseen"
    flip = lambda fn, *args: PILImage(PILImage.create(fn).transpose(0)) if not isinstance(fn, PILImage) else fn
    monkeypatch.setattr('cekd_fastai.data.loaders.open_image', flip)
    with pytest.raises(ValueError, match='treat a picture by its file'): next(evidence_batches(dls))

def test_noise_needs_its_files(dls, tmp_path):
    bare = SimpleNamespace(table=SimpleNamespace(root=tmp_path), train_ds=SimpleNamespace(items=[tmp_path/'images'/'a.jpg']), vocab=['a'])
    with pytest.raises(FileNotFoundError, match='layout of CUB-200-2011'): next(evidence_batches(bare, 'box'))
    with pytest.raises(FileNotFoundError, match='make_birds'): next(evidence_batches(bare))

def test_label_noise(dls):
    "The table agrees with its rows; an oracle label has no error; nothing random is left behind"
    learn = Learner(dls, net(2))
    class Right(CutMix):
        ev = None
        def weigh(self, x, y, rec):
            w = oracle_weights(rec, self.ev).nan_to_num(.5)
            return w,1-w
    right = Right(5.)
    right.ev = next(evidence_batches(dls, bs=16))[2]
    rows = label_noise(dict(cut=CutMix(5.), snap=SnapMix(), right=right), dls, learn=learn, rounds=8, per_image=True)
    t = noise_table(rows)
    assert t.error['right']<1e-6 and t.error['cut']>.1 and not right.learn and set(rows.method)=={'cut','snap','right'}
    cut = rows[(rows.method=='cut')&~rows.same]
    assert t.error['cut']==pytest.approx(np.nanmean(abs(cut.label-cut.oracle))) and t.blank['cut']==pytest.approx(cut.oracle.isna().mean())
    axes = plot_label_noise(rows).axes
    assert len(axes)==3
    for ax,name in zip(axes, rows.method.unique()):
        mine = rows[(rows.method==name)&~rows.same].dropna()
        assert ax.get_title()==f'{name}: error {t.error[name]:.2f}' and np.allclose(ax.collections[0].get_offsets(), mine[['oracle','label']])

def test_label_noise_on_photographs(real_data):
    "Boxes of real birds: blending keeps all of both birds, pasting does not"
    dls = fine_grained_dls(real_data('CUB_200_2011'), size=64, bs=16, classes=4, num_workers=0)
    t = label_noise([MixUp(1.),CutMix(1.)], dls, kind='box', n=64, rounds=4)
    assert t.error['mix_up']<.01 and .02<t.error['cut_mix']<t.half['cut_mix'] and t.images.min()>100
