"What is exported or deployed after a compiled fit is free of it."
import pytest,torch
from fastai.vision.all import Callback,CrossEntropyLossFlat,accuracy,load_learner
from cekd_fastai.cekd import CEKD
from cekd_fastai.compiled import Compile
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.deploy import Deployed,deploy
from cekd_fastai.learner import branch_learner
from cekd_fastai.mix.callback import CutMix
from cekd_fastai.synthetic import make_birds
from test_scale import quiet

class Interrupt(Callback):
    order,run_valid = 1500,False
    def after_batch(self): raise KeyboardInterrupt

def test_predictions_compile_nothing(tmp_path, monkeypatch):
    "A fit compiles each part once; a validation or a prediction uses the plain network"
    birds = make_birds(tmp_path/'birds', n_species=3, n_images=8, n_train=5, size=40, n_workers=0, progress=False)
    dls = fine_grained_dls(birds, size=32, bs=5, num_workers=0, device='cpu')
    learn = branch_learner(dls, 'cifar_resnet8', cbs=Compile('eager'), pretrained=False, metrics=accuracy)
    seen = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **kw: seen.append(self))
    with learn.no_bar():
        learn.validate()
        learn.predict(dls.valid.items[0])
        assert not seen
        quiet(learn, 2)
    assert len(seen)==3 # the trunk and two branches

@pytest.mark.parametrize('cb', [None,Interrupt])
def test_deployed_after_compile(cb, tmp_path):
    "Files written after a compiled fit, also one that was interrupted, answer as the network does uncompiled, and compile nothing."
    birds = make_birds(tmp_path/'birds', n_species=3, n_images=8, n_train=5, size=40, n_workers=0, progress=False)
    dls = fine_grained_dls(birds, size=32, bs=5, num_workers=0, device='cpu')
    learn = branch_learner(dls, 'cifar_resnet8', cbs=[CutMix(),CEKD(),Compile('eager')], path=tmp_path,
        pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    try: quiet(learn, 1, cbs=cb and cb())
    except KeyboardInterrupt: assert cb
    learn.remove_cbs(learn.cbs.filter(lambda o: isinstance(o, (CutMix,CEKD))))
    learn.export('model.pkl')
    net = Deployed(deploy(learn, tmp_path/'model.pt'))
    again = load_learner(tmp_path/'model.pkl')
    for m in (learn.model,again.model,net.net): m.eval()
    assert all(m._compiled_call_impl is None for o in (again.model,net.net) for m in o.modules())
    assert b'_orig_mod' not in (tmp_path/'model.pt').read_bytes()
    for m in learn.model.modules(): m._compiled_call_impl = None
    files = dls.valid.items[:2]
    with torch.no_grad(): want = [learn.predict(f)[2] for f in files]
    for f,p in zip(files, want):
        assert torch.allclose(again.predict(f)[2], p, atol=1e-6)
        assert net.predict(f)=={k:pytest.approx(v, abs=1e-4) for k,v in zip([net.vocab[i] for i in p.topk(3)[1]], p.topk(3)[0].tolist())}
