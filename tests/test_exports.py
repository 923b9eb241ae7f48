"Files for other programs: ONNX, int8 and programs of `torch.export` answer as the network does, for every method and for backbones of every family."
import sys
import pytest,torch
from torch import nn
from fastai.vision.all import set_seed
from cekd_fastai.all import CEKD,MixUp,SnapMix,StoredTargets,branch_learner,fine_grained_dls,make_birds,meal_learner,online_learner
from cekd_fastai.deploy import deploy
from cekd_fastai.onnx_file import OnnxNet,export_onnx
from cekd_fastai.predict import open_net,predict_folder
from cekd_fastai.program import ProgramNet,export_program
from cekd_fastai.quantize import quantize_onnx

pytest.importorskip('onnxruntime')

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=3, n_images=6, n_train=4, size=72, progress=False)

@pytest.fixture(scope='module')
def dls(birds): return fine_grained_dls(birds, size=64, bs=8, num_workers=0)

def learner(dls, arch='test_resnet', *args, **kw):
    set_seed(1)
    return branch_learner(dls, arch, *args, pretrained=False, **kw)

def answers(learn):
    with learn.no_bar(): return learn.get_preds()[0]

def check(learn, tmp_path, program=True):
    "Both files against the learner, for one picture and for several."
    want,items = answers(learn),learn.dls.valid.items
    file = deploy(learn, tmp_path/'x.pt')
    nets = [OnnxNet(export_onnx(file, tmp_path/'x.onnx', pictures=items))]
    if program: nets.append(ProgramNet(export_program(file, tmp_path/'x.pt2', pictures=items)))
    for net in nets:
        for n in (1,3,len(want)): assert (net(items[:n])-want[:n]).abs().max()<2e-4, type(net)

# ONNX of CSS, of peers and of every gate is in test_deploy.
METHODS = dict(cekd=lambda d: learner(d, cbs=[SnapMix(),CEKD()]), meal=lambda d: meal_learner(d, 'test_resnet', [learner(d, 'test_resnet', 1)], 1, pretrained=False),
    gates=lambda d: online_learner(d, 'test_resnet', 'diversity', pretrained=False), stored=lambda d: learner(d, cbs=[MixUp(prob=.6),StoredTargets()]))

@pytest.mark.parametrize('method', METHODS)
def test_methods(dls, tmp_path, method): check(METHODS[method](dls), tmp_path, method=='gates')

# Five more, of other families, are in test_deploy.
BACKBONES = {k:{} for k in 'test_byobnet test_mambaout test_nfnet test_convnext2 lcnet_050 ghostnet_050 cifar_resnet20'.split()}|dict(test_vit=dict(img_size=64))

@pytest.mark.parametrize('arch', BACKBONES)
def test_backbones(dls, tmp_path, arch): check(learner(dls, arch, 1, arch_args=BACKBONES[arch]), tmp_path, arch=='test_vit')

def test_int8(dls, tmp_path, capsys):
    "Size, accuracy and speed beside the float file; the same metadata; nearly the same answers; from loaders and from a list."
    learn = learner(dls, 'resnet10t', 1)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3)
    file = export_onnx(learn, tmp_path/'birds.onnx')
    small = quantize_onnx(file, dls)
    lines = capsys.readouterr().out.splitlines()
    assert small.name=='birds-int8.onnx' and lines[0].split()==['MB','accuracy','same_class','ms','speed'] and [o.split()[0] for o in lines[1:]]==['float','int8']
    with learn.no_bar(): acc = (learn.get_preds()[0].argmax(1)==learn.get_preds()[1]).float().mean().item()
    assert abs(float(lines[1].split()[2])-acc)<1e-3 and small.stat().st_size<.35*file.stat().st_size
    a,b = open_net(file),open_net(small)
    assert a.info==b.info and 0<(a(dls.valid.items)-b(dls.valid.items)).abs().max()<.2
    again = quantize_onnx(file, dls.train.items, tmp_path/'list.onnx', n=6)
    assert 'accuracy' not in capsys.readouterr().out and again.read_bytes()[:4]==small.read_bytes()[:4]
    import onnx
    assert {o.op_type for o in onnx.load(small).graph.node}>={'QuantizeLinear','DequantizeLinear'}

def test_int8_that_differs(dls, tmp_path, monkeypatch):
    "A file that gives other classes is written with a warning that has their share; here its graph is that of another network."
    a,b = (export_onnx(learner(dls), tmp_path/f'{o}.onnx') for o in 'ab')
    items = dls.valid.items
    net,other = OnnxNet(a),OnnxNet(b)
    other.session = type('Negative', (), dict(run=lambda self, *args: [-net.session.run(*args)[0]]))()
    monkeypatch.setattr('cekd_fastai.quantize._write_int8', lambda tmp, **kw: tmp.write_bytes(b.read_bytes()))
    monkeypatch.setattr('cekd_fastai.quantize.OnnxNet', lambda file: net if file==a else other)
    with pytest.warns(UserWarning, match='another class than the float file for 100% of the pictures'): quantize_onnx(a, items, tmp_path/'b.onnx')

def test_program(dls, tmp_path):
    "It is opened by its suffix, predicts a folder, and is refused if it differs or is none."
    learn = learner(dls)
    file = export_program(learn, tmp_path/'birds.pt2')
    table = predict_folder(file, dls.valid.items)
    assert (torch.tensor(table.prob_1.values)-answers(learn).max(1)[0]).abs().max()<1e-3
    (tmp_path/'junk.pt2').write_bytes(b'junk')
    with pytest.raises(ValueError, match='is not a file of `torch.export`'): open_net(tmp_path/'junk.pt2')
    with pytest.raises(ValueError, match='suffix .pt2'): export_program(learn, tmp_path/'birds.pt')

def test_program_that_differs_is_refused(dls, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.ReLU, 'forward', lambda self, x: x.tanh() if torch.compiler.is_exporting() else x.relu())
    with pytest.raises(ValueError, match='answers otherwise than the network'): export_program(learner(dls), tmp_path/'x.pt2')
    assert list(tmp_path.iterdir())==[]

def test_without_packages(dls, tmp_path, monkeypatch):
    file = export_onnx(learner(dls), tmp_path/'x.onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime.quantization', None)
    with pytest.raises(ImportError, match='run `pip install onnx onnxruntime`'): quantize_onnx(file, dls)
    assert [o.name for o in tmp_path.iterdir()]==['x.onnx']
