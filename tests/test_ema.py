"The average of the weights that CEKD keeps: exact, saved, loaded, exported, and shown when it should be."
import copy,warnings
import pytest,torch
from fastai.vision.all import CancelFitException,CancelStepException,Callback,SaveModelCallback,load_learner
from cekd_fastai.weights import load_weights
from cekd_fastai.cekd import CEKD,cekd_losses
from cekd_toys import lf,FixedMix,tiny,toy_dls,learner,quiet,CatchStep,Raise

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
    make = lambda **kw: learner(tiny(2), FixedMix(), CEKD(**kw), path=tmp_path)
    average = dict(validate_ema=True, decay=.95)
    raw,ema = quiet(make(), 5),quiet(make(**average), 5, cbs=SaveModelCallback(every_epoch=True, fname='m'))
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
    old = make(**average)
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

def test_plain_weights_into_an_average(tmp_path):
    "Weights of a run without an average fill a network that keeps one, which starts anew from them"
    torch.save(tiny(2, seed=4).state_dict(), tmp_path/'w.pth')
    ema = quiet(learner(tiny(2), FixedMix(), CEKD(teacher='ema'), path=tmp_path), 1)
    load_weights(ema.model, tmp_path/'w.pth')
    assert torch.equal(ema.model.heads[0][2].weight, tiny(2, seed=4).heads[0][2].weight) and not ema.model.ema.n
    quiet(ema, 1)

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
