"A learner of each kind before its first fit, after it, exported, and loaded again: what fastai's own learner does at each of these times."
import random,signal,warnings
from functools import partial
import pytest,timm,torch
from fastai.vision.all import (Callback,CancelBatchException,CancelEpochException,CancelFitException,CrossEntropyLossFlat,Learner,accuracy,
    load_learner,no_random,set_seed,trainable_params)
from cekd_fastai.all import *
from cekd_fastai.compiled import Compile
from cekd_fastai.core import HalfPrecision
from cekd_fastai.diagnose import Diagnose
from cekd_fastai.runstate import checkpoint_files

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
KINDS |= dict(half=two(CutMix, CEKD, HalfPrecision))
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
        assert torch.allclose(probs, after[0], atol=1e-2 if kind=='half' else 1e-4) and name==dls.vocab[i]
        looked_at(again)

# A validation within a fit, and a fit after one that was cut off

class Looks(Callback):
    "Validates and predicts by itself after the first batch, or after the training part, of each epoch"
    def __init__(self, order=0, at='after_train'): self.order,self.at = order,at
    def look(self):
        with no_random():
            self.seen = self.learn.validate()
            self.learn.get_preds()
    def after_batch(self):
        if self.at=='after_batch' and self.training and self.iter==0: self.look()
    def after_train(self):
        if self.at=='after_train': self.look()

class Files(Callback):
    "Notes the newest checkpoint after each epoch"
    order = 3000
    def __init__(self, folder): self.folder,self.names = folder,[]
    def after_epoch(self): self.names.append(checkpoint_files(self.folder)[-1].name)

def plain_run(make, dls, path, *cbs):
    set_seed(5)
    dls.train.rng = random.Random(5)
    learn = make(dls)
    learn.path = path
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=cbs)
    return learn

@pytest.mark.parametrize('kind', KINDS)
def test_validates_within_a_fit(dls, kind, tmp_path):
    "What a callback looks at on the way changes neither the training nor the table"
    a,b = plain_run(KINDS[kind], dls, tmp_path),plain_run(KINDS[kind], dls, tmp_path, look := Looks(), Looks(100, 'after_batch'))
    assert all(torch.equal(p, q) for p,q in zip(a.model.parameters(), b.model.parameters()))
    ours,theirs = ([list(getattr(o.recorder, k)) for k in ('metric_names','values','losses','iters')] for o in (a,b))
    assert ours==theirs
    assert list(look.seen)==list(b.recorder.values[-1])[1:1+len(look.seen)]==list(b.recorder.values[-1])[1:2+len(b.metrics)]

class Still(Callback):
    "Keeps the trunk in evaluation, and notes that it stays so"
    order = 90
    def __init__(self): self.seen = set()
    def before_train(self): self.learn.model.trunk.eval()
    def before_batch(self):
        if self.learn.training: self.seen.add((self.learn.model.trunk.training,self.learn.model.heads.training))

def test_what_a_callback_has_put_into_evaluation_stays_there(dls):
    plain_run(two(), dls, None, still := Still(), Looks(100, 'after_batch'))
    assert still.seen=={(False,True)}

def test_the_bar_goes_on(dls):
    "A validation in the middle of an epoch has a bar of its own"
    class See(Callback):
        order = 200
        def __init__(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append((self.learn.progress.pbar.total,self.iter))
    learn = branches(dls)
    with learn.no_logging(): learn.fit(1, 1e-3, cbs=[Looks(100, 'after_batch'),see := See()])
    assert len(see.seen)==len(dls.train) and all(n==len(dls.train) and i<n for n,i in see.seen)

def test_validates_within_a_fit_that_is_kept(dls, tmp_path):
    "Files go on to be written, and the next fit of the learner goes on after them"
    learn = plain_run(partial(branches), dls, tmp_path, Looks())
    learn.add_cb(Checkpoint(tmp_path/'c', resume=False))
    with learn.no_bar(), learn.no_logging():
        for n in (1,2):
            learn.fit(2, 1e-3, cbs=[Looks(),Looks(100, 'after_batch'),files := Files(tmp_path/'c')])
            assert files.names==[f'checkpoint-{n-1:02}-000{e}-000000.ckpt' for e in (1,2)]
            assert learn.checkpoint.fit_no==n and checkpoint_files(tmp_path/'c')[-1].name==f'checkpoint-{n-1:02}-0002-000000.ckpt'

@pytest.mark.parametrize('kind', KINDS)
def test_no_gradient_is_left(dls, kind):
    "A fit that was ended before a step leaves the next one none of its gradients"
    class Stop(Callback):
        order = 300
        def before_step(self): raise CancelFitException
    class Look(Callback):
        order,seen = 300,None
        def before_batch(self):
            if self.training and self.seen is None: self.seen = any(p.grad is not None and p.grad.any() for p in self.learn.model.parameters())
    learn = KINDS[kind](dls)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=Stop())
        learn.fit(1, 1e-3, cbs=(look := Look()))
    assert look.seen is False

# A fit that fails

class Fails(Callback):
    "An error in the second batch, between the forward pass and the loss, or an exception that fastai catches"
    order,run_valid = 4.9,False
    def __init__(self, error=KeyboardInterrupt): self.error = error
    def after_pred(self):
        if self.iter==1: raise self.error('on purpose')

def ordinary(dls, *cbs): return Learner(dls, timm.create_model('test_resnet', num_classes=2), loss_func=CrossEntropyLossFlat(), splitter=trainable_params, cbs=cbs)
def taps(learn): return [m for m in learn.model.modules() if m._forward_hooks or m._forward_pre_hooks]
def signals(learn): return signal.getsignal(signal.SIGTERM)!=signal.SIG_DFL
def half(learn): return torch.is_autocast_enabled('cpu')
def checkpointed(learn): return learn.model.grad_checkpoint
def compiled(learn): return [m for m in learn.model.modules() if m._compiled_call_impl is not None]

@pytest.mark.parametrize('cb,held', [(HalfPrecision,half), (GradCheckpoint,checkpointed), (partial(Compile, 'eager'),compiled), (partial(Diagnose, 'trunk'),taps)])
def test_a_failed_fit_leaves_nothing(dls, cb, held):
    "What was passed to a fit that fails is off afterwards, and the next fit is like any other"
    learn = branches(dls, CutMix(), CEKD())
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[cb(),Fails()])
        assert not held(learn)
        learn.fit(1)
        assert not held(learn)

def test_a_failed_fit_gives_signals_and_taps_back(dls, tmp_path):
    learn = meal_learner(dls, 'test_resnet', [teacher(dls)], pretrained=False)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[Checkpoint(tmp_path),Fails(ZeroDivisionError)])
    assert not signals(learn) and not taps(learn)

def test_a_dead_checkpoint_hears_nothing(dls, tmp_path):
    "With fastai's own learner nobody lets go; the next Ctrl-C is still one"
    learn = ordinary(dls)
    class Ctrl_C(Callback):
        run_valid = False
        def after_pred(self):
            if self.iter==0: signal.raise_signal(signal.SIGINT)
    was = signal.getsignal(signal.SIGINT)
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(ZeroDivisionError): learn.fit(1, cbs=[Checkpoint(tmp_path),Fails(ZeroDivisionError)])
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Ctrl_C())
    assert signal.getsignal(signal.SIGINT)==was

@pytest.mark.parametrize('error', [KeyboardInterrupt,CancelBatchException,CancelEpochException,CancelFitException])
def test_half_precision_ends_with_its_batch(dls, error):
    "With fastai's own learner: the next fit computes in full precision outside its batches, and its forward passes see the weights of today"
    seen = []
    class Look(Callback):
        order = 11
        def before_batch(self): seen.append(torch.is_autocast_enabled('cpu'))
        def after_batch(self): seen.append(torch.is_autocast_enabled('cpu'))
    learn = ordinary(dls, HalfPrecision())
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1, cbs=Fails(error))
        except KeyboardInterrupt: pass
        learn.fit(1, cbs=Look())
    assert seen==[True,False]*(len(seen)//2) and not half(learn)

def test_the_model_you_pass_stays_yours(dls):
    "Two learners of one module both start from it, and train none but their own"
    model = timm.create_model('test_resnet')
    was = {k:v.clone() for k,v in model.state_dict().items()}
    for _ in range(2):
        learn = branch_learner(dls, model, 2, metrics=accuracy)
        assert all(torch.equal(v, was[k]) for k,v in learn.model.trunk.state_dict().items() if k in was)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    assert all(torch.equal(v, was[k]) for k,v in model.state_dict().items()) and model.training

def test_exported_within_a_fit(dls, tmp_path):
    "What is loaded is in no fit: a batch that is not finite is predicted like any other"
    class Exports(Callback):
        order = 300
        def after_epoch(self): self.learn.export('model.pkl')
    learn = plain_run(two(Guard), dls, tmp_path, Exports())
    assert torch.equal(dict(learn.model.named_parameters())['heads.0.1.weight'], learn.model.heads[0][1].weight)
    again = load_learner(tmp_path/'model.pkl')
    assert not again.in_fit and not again.guard.fitting
