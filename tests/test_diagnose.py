"Diagnostics of CEKD: exact angles, errors of targets, and records that nothing else changes."
import warnings
import pytest,torch,torch.nn.functional as F
from fastai.vision.all import CancelValidException,Callback,Learner,SaveModelCallback,load_learner,nn
from cekd_fastai.branches import branch_net
from cekd_fastai.cekd import CEKD,cekd_losses
from cekd_fastai.diagnose import Diagnose,target_angle
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.losses import cross_target,soft_probs
from cekd_fastai.mix.callback import CutMix
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.mix.evidence import evidence_batches
from cekd_fastai.mix.noise import label_noise
from cekd_fastai.drawing.dataset import make_birds
from cekd_toys import lf,FixedMix,tiny,peers,toy_dls,learner,quiet

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
    with pytest.raises(TypeError, match="'NoneType'"): quiet(learner(tiny(2), FixedMix(), CEKD(), Every(), path=tmp_path), 2, cbs=SaveModelCallback()) # of fastai

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
    learn.dls = fine_grained_dls(birds.table.root, size=40, bs=16, num_workers=0, in_memory=True)
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
    learn = Learner(birds, branch_net('test_resnet', birds.c, 2, pretrained=False), cbs=[BranchLoss(),CutMix(5.),CEKD()])
    table = label_noise(CutMix(5.), birds, n=64, rounds=1, seed=42)
    res = learn.cekd.target_noise(n=64)
    assert res['label_noise']==pytest.approx(table.error.iloc[0], abs=1e-5)
    for h in learn.model.heads:
        for o in h.modules():
            if isinstance(o, nn.Linear): o.weight.data.zero_(), o.bias.data.zero_()
    assert learn.cekd.target_noise(n=64)['cross_noise']==pytest.approx(table.half.iloc[0], abs=1e-4)
    learn.cekd.eval_target = lambda x, rec: cross_target(F.one_hot(next(ys), birds.c).float(), rec)
    batches = list(evidence_batches(birds, n=64))
    ys = (y for _,y,_ in batches)
    sure = learn.cekd.target_noise(n=64, batches=batches)
    assert sure['cross_noise']==pytest.approx(sure['label_noise'], abs=1e-3)

def test_noise_of_the_mixed_only(birds):
    "Where each image is mixed or not for itself, those that were not do not count"
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
