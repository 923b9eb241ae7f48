"A learner of each kind before its first fit, after it, exported, and loaded again: what fastai's own learner does at each of these times."
import warnings
from functools import partial
import pytest,torch
from fastai.vision.all import accuracy,load_learner
from cekd_fastai.all import *
from cekd_fastai.diagnose import Diagnose

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    path = make_birds(tmp_path_factory.mktemp('birds'), n_species=2, n_images=6, n_train=4, size=64, n_workers=0, progress=False)
    return fine_grained_dls(path/'images', size=64, bs=4, num_workers=0)

def branches(dls, *cbs): return branch_learner(dls, 'test_resnet', 2, pretrained=False, cbs=cbs, metrics=accuracy)
def teacher(dls): return branch_learner(dls, 'test_resnet', 1, pretrained=False).model

def plain(arch='test_resnet', **kw): return lambda d: recommended(arch, pretrained=False).learner(d, metrics=accuracy, **kw)
def two(*cbs): return lambda d: branches(d, *[o() for o in cbs])
def online(method, n=2): return lambda d: online_learner(d, 'test_resnet', method, n, pretrained=False, metrics=accuracy)
def taught(d): return meal_learner(d, 'test_resnet', [teacher(d),teacher(d)], pretrained=False, metrics=accuracy)
def channels(d): return css_learner(d, ['test_resnet','test_resnet'], pretrained=False, metrics=accuracy)

KINDS = {o:online(o) for o in ('dml','kdcl','one','ffl','diversity')} | dict(okddip=online('okddip', 3), meal=taught, css=channels)
KINDS |= dict(recommended=plain(), recommended_cekd=plain(cbs=[SnapMix(),CEKD()]), diagnose=two(CutMix, CEKD, Diagnose), guard=two(Guard))
KINDS |= dict(average=two(CutMix, partial(CEKD, teacher='ema', validate_ema=True)), joint=two(MixUp, partial(CEKD, joint=True)))
KINDS |= dict(one_of=two(partial(MixOneOf, [MixUp(),CutMix()])), grad_checkpoint=two(GradCheckpoint))
KINDS |= dict(online_labels=two(OnlineLabelSmoothing), pskd=two(PSKD), stored=two(partial(MixUp, prob=.6), StoredTargets))

@pytest.mark.parametrize('kind', KINDS)
def test_predicts_at_any_time(dls, kind, tmp_path):
    "Predictions are probabilities and leave the network as it is: before a fit, after it, and of an exported learner in another place"
    learn = KINDS[kind](dls)
    learn.path = tmp_path
    def looked_at(learn):
        was = {k:v.clone() for k,v in learn.model.state_dict().items() if torch.is_tensor(v)}
        probs,_ = learn.get_preds(dl=dls.valid)
        assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-5)
        assert all(torch.equal(v, was[k]) for k,v in learn.model.state_dict().items() if k in was)
        return probs
    with learn.no_bar(), learn.no_logging():
        before = looked_at(learn)
        assert len(learn.validate())==1+len(learn.metrics)
        learn.fit(1, 1e-3)
        after = looked_at(learn)
        assert not torch.equal(before, after)
        learn.export('model.pkl')
        assert torch.allclose(looked_at(learn), after, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'model.pkl')
    file = dls.valid_ds.items[0]
    with again.no_bar():
        name,i,probs = again.predict(file)
        assert torch.allclose(probs, after[0], atol=1e-4) and name==dls.vocab[i]
        looked_at(again)
