"What a user types at the doors of the library: paths in the home folder, options beside a recipe, a card of a part of a network."
import subprocess
from pathlib import Path
import pytest
from fastai.vision.all import accuracy,set_seed
from cekd_fastai.all import branch_learner,fine_grained_dls,make_birds
from cekd_fastai.branches import branch_preds
from cekd_fastai.cli import _defaults,cekd_train
from cekd_fastai.job import with_recipe
from cekd_fastai.options import at_home

root = Path(__file__).resolve().parent.parent

@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    return make_birds(tmp_path_factory.mktemp('birds'), n_species=4, n_images=6, n_train=4, size=64, n_workers=0, progress=False)

def small(birds, **kw): return fine_grained_dls(birds, size=56, bs=8, num_workers=0, **kw)

def test_the_home_folder(birds, tmp_path, monkeypatch):
    "`--out=~/x` reaches the library as it stands"
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert at_home('~/x')==str(tmp_path/'x') and at_home('~no-such-user/x')=='~no-such-user/x' and at_home('x~')=='x~' and at_home(None) is None
    (tmp_path/'birds').symlink_to(birds)
    cekd_train(data='~/birds', method='plain', arch='test_resnet', no_pretrained=True, size=56, bs=8, num_workers=0, epochs=1, out='~/run')
    assert (tmp_path/'run'/'result.json').exists() and not (tmp_path/'~').exists()
    with pytest.raises(SystemExit, match='There is no folder|There is no benchmark'): cekd_train(data='~no-such-user/birds', out='run2')

def test_a_resumed_run_counts_the_images_of_its_seconds(birds, tmp_path):
    "Those of epochs before are not in them"
    from cekd_fastai.results import save_run
    learn = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    args = _defaults()|dict(epochs=4, method='plain', arch='test_resnet')
    whole,rest = save_run(learn, tmp_path, args, 2.), save_run(learn, tmp_path, args, 2., 3)
    assert whole['images_per_s']==4*rest['images_per_s'] and rest['epochs_before']==3 and 'epochs_before' not in whole

@pytest.mark.parametrize('name,own', [('snapmix-cub-resnet50',dict(mix='none')), ('cekd-cub-resnet101',dict(schedule='one-cycle')), ('meal-cifar10-vgg19',dict(method='plain'))])
def test_options_beside_a_recipe_win(name, own):
    "With what hangs on the recipe's own choice"
    from types import SimpleNamespace
    from cekd_fastai.train import check_used
    args = with_recipe(_defaults()|dict(recipe=name)|own, _defaults(), own)
    check_used(SimpleNamespace(**args))
    assert all(args[k]==v for k,v in own.items())

def test_a_refused_run_leaves_the_unfinished_one(birds, tmp_path):
    kw = dict(data=str(birds), method='plain', arch='test_resnet', no_pretrained=True, size=56, bs=8, num_workers=0, epochs=1, out=str(tmp_path/'run'))
    kept = tmp_path/'run'/'checkpoints'/'checkpoint-00-0001-000000.ckpt'
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b'x')
    with pytest.raises(SystemExit): cekd_train(**kw, force=True, mix_args=['alpha=3'])
    assert kept.exists()
    cekd_train(**kw, force=True)
    assert not kept.exists()

def test_a_card_is_about_the_part_that_is_written(birds, tmp_path):
    pytest.importorskip('huggingface_hub')
    from cekd_fastai.share import to_hub
    set_seed(3)
    learn = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(3, 3e-3)
    _,each,y = branch_preds(learn)
    for which in (0,1):
        card = (to_hub(learn, folder=tmp_path/str(which), which=which)/'README.md').read_text()
        a = (each[which].argmax(1)==y).float().mean()
        assert f'Accuracy {a:.1%}' in card and '| n_branches | 2' not in card

def test_int8_of_some_classes_is_measured_by_name(birds, tmp_path, capsys):
    pytest.importorskip('onnxruntime.quantization')
    from cekd_fastai.onnx_file import export_onnx
    from cekd_fastai.onnx_file import OnnxNet
    from cekd_fastai.quantize import _as_in_file,quantize_onnx
    learn = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 3e-3)
    file = export_onnx(learn, tmp_path/'b.onnx')
    some = small(birds, classes=list(learn.dls.vocab)[2:])
    assert _as_in_file(OnnxNet(file), some.vocab, [0,1,0]).tolist()==[2,3,2]
    with pytest.raises(ValueError, match="has no class 'roc'"): _as_in_file(OnnxNet(file), ['roc'], [0])
    quantize_onnx(file, some)
    said = float(capsys.readouterr().out.splitlines()[1].split()[2])
    whole,_,_ = branch_preds(learn, learn.dls.test_dl(some.valid.items, with_labels=True))
    names = [learn.dls.vocab[i] for i in whole.argmax(1).tolist()]
    label = {k:str(v) for k,v in zip(some.valid.items, [some.vocab[int(y)] for _,y in some.valid_ds])}
    assert said==pytest.approx(sum(n==label[f] for n,f in zip(names, some.valid.items))/len(names), abs=.13) # eight bits, and onnxruntime, may move a picture

def test_make_clean_knows_spaces(tmp_path):
    "And deletes nothing but caches"
    (tmp_path/'Makefile').write_text((root/'Makefile').read_text())
    for o in ("Untitled Folder/.ipynb_checkpoints","it's/__pycache__",'Untitled'):
        (tmp_path/o).mkdir(parents=True)
        (tmp_path/o/'work.txt').write_text('x')
    done = subprocess.run(['make','clean'], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stderr
    assert (tmp_path/'Untitled'/'work.txt').exists() and not list(tmp_path.rglob('.ipynb_checkpoints'))+list(tmp_path.rglob('__pycache__'))
