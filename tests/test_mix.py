"Mixing against references written as loops, and what it refuses."
import pytest, torch, torch.nn.functional as F
from fastai.vision.all import Callback,CancelFitException,Learner,Tensor,accuracy,nn,resnet18,tensor,vision_learner
from cekd_fastai.all import CEKD,CutMix,MixUp,SnapMix,branch_learner,fine_grained_dls,make_birds
from cekd_fastai import mix as M

edges = [(0,0,12,10), (0,0,4,3), (8,7,12,10), (3,2,4,3), (0,4,12,5), (5,0,6,10)]

def loop_cutmix(x, perm, box):
    out,(x1,y1,x2,y2) = x.clone(),box
    for i in range(len(x)):
        for r in range(y1, y2):
            for c in range(x1, x2): out[i,:,r,c] = x[perm[i],:,r,c]
    return out, 1-sum(1 for r in range(y1, y2) for c in range(x1, x2))/(x.shape[2]*x.shape[3])

def loop_snapmix(x, y, maps, perm, a, b):
    "One image after the other, as the paper's authors describe it"
    out,las,lbs = x.clone(),[],[]
    h,w = x.shape[2:]
    sems = []
    for m in maps:
        s = F.interpolate(m[None,None], (h,w), mode='bilinear', align_corners=False)[0,0]
        s = s-s.min()
        sems.append(s/s.sum())
    for i in range(len(x)):
        j = perm[i].item()
        patch = x[j:j+1,:,b[1]:b[3],b[0]:b[2]]
        out[i,:,a[1]:a[3],a[0]:a[2]] = F.interpolate(patch, (a[3]-a[1],a[2]-a[0]), mode='bilinear', align_corners=True)[0]
        la,lb = 1-sems[i][a[1]:a[3],a[0]:a[2]].sum(),sems[j][b[1]:b[3],b[0]:b[2]].sum()
        las.append(la+lb if y[i]==y[j] else la)
        lbs.append(la+lb if y[i]==y[j] else lb)
    return out,torch.stack(las),torch.stack(lbs)

@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.rand(5,3,10,12),tensor([0,1,0,2,1]),torch.rand(5,3,4)

def fix(monkeypatch, boxes, perm):
    "Make the draws of the mix these boxes and this permutation"
    boxes = iter(boxes)
    monkeypatch.setattr(M, 'rand_box', lambda *a: next(boxes))
    monkeypatch.setattr(torch, 'randperm', lambda n, device=None: perm)

@pytest.mark.parametrize('box', edges)
def test_cutmix_exact(batch, box, monkeypatch):
    x,y,_ = batch
    perm,before = tensor([2,0,4,3,1]),x.clone()
    fix(monkeypatch, [box], perm)
    out,rec = CutMix().mix(x, y)
    want,lam = loop_cutmix(x, perm, box)
    assert torch.equal(out, want) and torch.allclose(rec.lam_a, tensor(lam)) and torch.allclose(rec.lam_b, tensor(1-lam), atol=1e-6)
    assert torch.equal(x, before)

@pytest.mark.parametrize('a', edges)
@pytest.mark.parametrize('b', edges)
def test_snapmix_exact(batch, a, b, monkeypatch):
    x,y,maps = batch
    perm,before = tensor([2,0,4,3,1]),x.clone()
    fix(monkeypatch, [a,b], perm)
    cb = SnapMix()
    cb.maps = lambda x, y: maps
    out,rec = cb.mix(x, y)
    want,la,lb = loop_snapmix(x, y, maps, perm, a, b)
    for got,ref in ((out,want),(rec.lam_a,la),(rec.lam_b,lb)): assert torch.allclose(got, ref, atol=1e-6)
    assert torch.equal(x, before)

@pytest.mark.parametrize('mix', [CutMix,SnapMix])
def test_empty_box_mixes_nothing(batch, mix, monkeypatch):
    fix(monkeypatch, [(3,3,3,9)]*2, None)
    assert mix().mix(*batch[:2]) is None

def test_batch_of_one(monkeypatch):
    x,y = torch.rand(1,3,8,8),tensor([1])
    monkeypatch.setattr(M, 'rand_box', lambda *a: (2,2,5,6))
    for cb in (MixUp(),CutMix()):
        out,rec = cb.mix(x, y)
        assert torch.allclose(out, x, atol=1e-6) and rec.perm.tolist()==[0]

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

def test_snapmix_needs_a_map(dls):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3*56*56, 2)
        def forward(self, x): return self.fc(x.flatten(1))
    learn = Learner(dls, Flat(), cbs=SnapMix())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='`Flat` has no spatial feature map.*mix with `CutMix`'): learn.fit(1)
    with pytest.raises(ValueError, match='`test_vit` cannot be split'): branch_learner(dls, 'test_vit', pretrained=False, cbs=SnapMix())

def test_two_mixes(dls):
    from fastai.callback.mixup import MixUp as Stock
    for other in (CutMix(),Stock()):
        with pytest.raises(ValueError, match='would mix the same batch twice'): branch_learner(dls, 'test_resnet', pretrained=False, cbs=[SnapMix(),other])

def test_snapmix_alone_leaves_the_model_untouched(dls):
    learn = branch_learner(dls, 'test_resnet', pretrained=False, cbs=SnapMix())
    learn.model.train()
    before = {k:v.clone() for k,v in learn.model.state_dict().items()}
    x,y = dls.one_batch()
    learn.snap_mix.mix(x.as_subclass(Tensor), y.as_subclass(Tensor))
    assert all(torch.equal(before[k], v) for k,v in learn.model.state_dict().items()) and all(m.training for m in learn.model.modules())

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
