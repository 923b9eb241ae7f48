"What a user types at the doors of the library: paths in the home folder, options beside a recipe, a card of a part of a network."
import contextlib,io,math,os,subprocess,sys
from functools import partial
from pathlib import Path,PureWindowsPath
import pandas as pd,pytest,torch
from fastai.vision.all import Callback,accuracy,set_seed
from PIL import Image
from cekd_fastai import hub
from cekd_fastai.all import Guard,MEAL,branch_learner,deploy,fine_grained_dls,make_birds,predict_folder
from cekd_fastai.branches import branch_preds
from cekd_fastai.cli import _defaults,cekd_train
from cekd_fastai.commands import _print_table
from cekd_fastai.data import readers
from cekd_fastai.data.benchmarks import read_table
from cekd_fastai.data.table import _inside
from cekd_fastai.data.words import not_there
from cekd_fastai.guard import Diverged
from cekd_fastai.job import with_recipe
from cekd_fastai.options import at_home
from cekd_fastai.predict import _packed
from cekd_fastai.share import from_hub,to_hub

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

@pytest.mark.parametrize('name,own', [('snapmix-cub-resnet50',dict(mix='none')), ('cekd-cub-resnet101',dict(schedule='one-cycle')), ('meal-cifar10-vgg19',dict(method='plain')),
    ('snapmix-cub-resnet18-scratch',dict(mix_prob=1.)), ('snapmix-cub-resnet18-scratch',dict(mix='mixup')), ('snapmix-cub-resnet18',dict(method='stored'))])
def test_options_beside_a_recipe_win(name, own):
    "With what hangs on the recipe's own choice"
    from types import SimpleNamespace
    from cekd_fastai.train import check_used
    args = with_recipe(_defaults()|dict(recipe=name)|own, _defaults(), own)
    check_used(SimpleNamespace(**args))
    assert all(args[k]==v for k,v in own.items())
    assert args['mix_prob']==(.6 if own.get('method')=='stored' else 1.)

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

# Other systems, other folders

class Spoil(Callback):
    "Every batch is not finite"
    order = -6
    def before_batch(self):
        if self.training: self.learn.xb = (self.xb[0]*math.nan,)

def test_home_at_every_door(birds, tmp_path, monkeypatch):
    "`~` is the home folder wherever a path is given"
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    drawn = make_birds('~/drawn', n_species=2, n_images=3, n_train=2, size=40, n_workers=0, progress=False)
    assert drawn==tmp_path/'drawn' and len(read_table('~/drawn'))==6
    learn = branch_learner(fine_grained_dls('~/drawn', size=32, bs=2, num_workers=0), 'test_resnet', 1, pretrained=False)
    assert deploy(learn, '~/net.pt')==tmp_path/'net.pt'
    assert len(predict_folder('~/net.pt', '~/drawn/images', csv='~/out.csv'))==6 and (tmp_path/'out.csv').exists()
    to_hub(learn, folder='~/given')
    assert from_hub('~/given').vocab==learn.dls.vocab
    taught = partial(branch_learner, learn.dls, 'test_resnet', 1, pretrained=False)
    for a in (taught(cbs=MEAL('~/net.pt', cache_targets=True, cache_dir='~/answers')), taught(weights='~/net.pt', cbs=[Guard(folder='~/bad'),Spoil()])):
        with a.no_bar(), a.no_logging(), contextlib.suppress(Diverged): a.fit(1)
    assert list((tmp_path/'answers').iterdir()) and list((tmp_path/'bad').iterdir()) and not (tmp_path/'~').exists()

def test_a_split_of_windows_is_read_anywhere(): assert _inside(PureWindowsPath('C:/birds/a/1.jpg'), PureWindowsPath('C:/birds'))=='a/1.jpg'

def test_a_drive_that_is_not_there(monkeypatch):
    monkeypatch.setattr(Path, 'is_dir', lambda self: False)
    assert not_there('/birds')=='/birds does not exist: there is no /'

@pytest.mark.parametrize('text,says', [('a.png,cat\nb.png,dog\n','the first line of the table is a picture'), ('file,label,label\na.png,cat,dog\n',"several columns 'label'")])
def test_heads_of_tables(tmp_path, text, says):
    for o in 'ab': Image.new('RGB', (8,8)).save(tmp_path/f'{o}.png')
    (tmp_path/'labels.csv').write_text(text)
    with pytest.raises(ValueError, match=says): read_table(tmp_path/'labels.csv')
    with pytest.raises(ValueError, match="several columns 'label'"): read_table(pd.DataFrame([['a.png','x','y']], columns=['file','label','label']), folder=tmp_path)

def test_a_table_for_any_terminal(monkeypatch):
    "Names that the code page of a terminal lacks, or that are of no encoding at all, and lines that end once"
    raw = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, encoding='cp1252', newline='\r\n'))
    _print_table(pd.DataFrame(dict(file=['śpiew.jpg','\udcff.jpg'], class_1=['a','b'])))
    sys.stdout.flush()
    assert raw.getvalue()=='file,class_1\nśpiew.jpg,a\n'.encode()+b'\xff.jpg,b\n'

def test_a_batch_is_one_tensor(tmp_path):
    x,y = torch.zeros(3, 4, 4, dtype=torch.uint8),torch.zeros(3, 5, 4, dtype=torch.uint8)
    files,items,bad = _packed([('a',x),('b','broken'),('c',x)])
    assert files==('a','c') and items.shape==(2,3,4,4) and bad=={'b':'broken'}
    assert [o.shape for o in _packed([('a',x),('c',y)])[1]]==[x.shape,y.shape] and _packed([('b','broken')])[0]==()

def test_what_cannot_be_exported_stays(birds, tmp_path):
    "A learner whose export fails keeps its data and its optimiser"
    learn = branch_learner(fine_grained_dls(birds, size=32, bs=4, num_workers=0), 'test_resnet', 1, pretrained=False, path=tmp_path)
    learn.create_opt()
    dls,opt = learn.dls,learn.opt
    with pytest.raises(Exception): learn.export('no/such/folder.pkl')
    assert learn.dls is dls and learn.opt is opt and len(learn.get_preds()[0])

def test_arrays_in_a_folder_of_somebody_else(tmp_path, monkeypatch):
    "CIFAR's pictures are written into the folder of fastai where its own may not be written to"
    written = []
    monkeypatch.setattr(readers.os, 'access', lambda path, mode: False)
    monkeypatch.setattr(readers, 'fastai_path', lambda o: tmp_path/'own'/o)
    monkeypatch.setattr(readers, '_write_png', lambda root, dest, cls: written.append(dest))
    (tmp_path/'cifar-10-batches-py').mkdir()
    assert readers._png_folder(tmp_path, readers.tvd.CIFAR10)==tmp_path/'own'/'data'/'cifar10-png' and written==[tmp_path/'own'/'data'/'cifar10-png']

def test_a_no_of_the_hub_is_soon_forgotten(monkeypatch):
    clock,answers = [0.],[]
    class Session:
        def head(self, url, timeout):
            answers.append(clock[0])
            if len(answers)<2: raise OSError('no route')
    monkeypatch.setattr(hub, 'get_session', Session)
    monkeypatch.setattr(hub.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(hub, '_asked', {})
    said = []
    for clock[0] in (0, 10, 20, 600, 630): said.append(hub.hub_answers())
    assert said==[False,False,True,True,True] and answers==[0,20,630]

def test_core_loaded_again():
    "As `%autoreload` does it: mixed precision still begins and ends once"
    code = 'import importlib,cekd_fastai.core as c; o = c.MixedPrecision._begin; importlib.reload(c); assert c.MixedPrecision._begin is o and o.__module__=="fastai.callback.fp16"'
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True).returncode==0

# What is lost, and what is silently left out

def test_what_only_loading_needs_is_no_part_of_a_recipe(tmp_path):
    "A cache folder of a cluster, after whose training the network would not go into a file"
    from cekd_fastai.branches import branch_net,load_net,save_net
    net = branch_net('test_resnet', 3, 2, pretrained=False, cache_dir='/scratch/hub')
    assert 'cache_dir' not in net.recipe
    save_net(net, tmp_path/'net.pt')
    assert load_net(tmp_path/'net.pt')[0].n_branches==2

def test_a_network_that_goes_into_no_file_leaves_the_other_results(birds, tmp_path, monkeypatch):
    from cekd_fastai import results
    learn = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, metrics=accuracy)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    def refuse(*args): raise ValueError('its recipe holds a thing')
    monkeypatch.setattr(results, 'deploy', refuse)
    args = _defaults()|dict(epochs=1, method='plain', arch='test_resnet')
    with pytest.warns(UserWarning, match='no model.pt.*model.pkl has it .its recipe holds a thing'): results.save_run(learn, tmp_path, args, 1.)
    assert {o.name for o in tmp_path.iterdir()}=={'result.json','history.csv','report.png','model.pkl'}

def test_a_killed_run_over_older_results_goes_on(tmp_path, monkeypatch):
    "`--resume` alone is enough, and nothing advises to delete its checkpoints"
    from cekd_fastai import safely
    (tmp_path/'result.json').write_text('old')
    ckpt = tmp_path/'checkpoints'/'checkpoint-00-0001-000000.ckpt'
    ckpt.parent.mkdir()
    ckpt.write_bytes(b'x')
    monkeypatch.setattr(safely, '_trained', lambda args, out: 'went on')
    args = dict(out=tmp_path, force=False, resume=False)
    with pytest.raises(FileExistsError, match='unfinished run: go on with --resume'): safely.kept_run(args)
    assert safely.kept_run(args|dict(resume=True))=='went on' and ckpt.exists()
    ckpt.unlink()
    with pytest.raises(FileExistsError, match='already holds results'): safely.kept_run(args|dict(resume=True))

def test_old_results_stay_until_new_ones_are_there(tmp_path, monkeypatch):
    from cekd_fastai import results
    from cekd_fastai.safely import write_diverged
    for o in ('result.json','model.pt','report.png'): (tmp_path/o).write_text('old')
    real,seen = os.replace,[]
    def look(a, b):
        seen.append(sorted(o.name for o in tmp_path.glob('*.*') if o.name[0]!='.'))
        real(a, b)
    monkeypatch.setattr(results.os, 'replace', look)
    with results.all_or_none(tmp_path) as d: (d/'result.json').write_text('new'), (d/'model.pt').write_text('new')
    assert seen==[['model.pt','report.png','result.json']]*2
    assert {o.name:o.read_text() for o in tmp_path.iterdir()}=={'model.pt':'new','result.json':'new'}
    write_diverged(tmp_path, {}, Diverged('The run diverged.'))
    assert (tmp_path/'result.json').read_text()=='new' and (tmp_path/'model.pt').exists()
    (tmp_path/'model.pt').unlink()
    for why in ('The run diverged.','It diverged once more.'):
        write_diverged(tmp_path, {}, Diverged(why))
        assert why in (tmp_path/'result.json').read_text()

def test_too_little_memory_sets_no_checkpoint_aside(tmp_path, monkeypatch):
    from cekd_fastai import runstate
    for i in (1,2): runstate.write_checkpoint(tmp_path/f'checkpoint-00-000{i}-000000.ckpt', dict(a=torch.ones(2)))
    def full(*args): raise torch.OutOfMemoryError('CUDA out of memory')
    with monkeypatch.context() as m:
        m.setattr(runstate, 'unpack', full)
        with pytest.raises(torch.OutOfMemoryError): runstate.newest_checkpoint(tmp_path)
    assert len(runstate.checkpoint_files(tmp_path))==2 and torch.equal(runstate.newest_checkpoint(tmp_path)['a'], torch.ones(2))

def test_pictures_to_calibrate_with_are_from_all_classes(birds, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    from cekd_fastai import quantize
    from cekd_fastai.onnx_file import export_onnx
    file = export_onnx(branch_learner(small(birds), 'test_resnet', 1, pretrained=False), tmp_path/'birds.onnx')
    used = []
    monkeypatch.setattr(quantize, '_write_int8', lambda tmp, d, pictures, per_channel: used.extend(pictures) or tmp.write_bytes(file.read_bytes()))
    quantize.quantize_onnx(file, birds/'images' if (birds/'images').exists() else birds, n=4, n_valid=4)
    assert len(used)==4 and len({o.parent for o in used})==4

def test_files_that_are_no_pictures_are_named(birds, tmp_path, capsys):
    from cekd_fastai.commands import cekd_predict
    file = deploy(branch_learner(small(birds), 'test_resnet', 1, pretrained=False), tmp_path/'birds.pt')
    folder = tmp_path/'photos'
    folder.mkdir()
    for o in ('b.dng','c.heics','notes.txt'): (folder/o).write_bytes(b'x')
    with pytest.raises(ValueError, match=r'no pictures in .*: skipped 2 files of .*\.dng'): predict_folder(file, folder)
    Image.new('RGB', (60,60)).save(folder/'a.jpg')
    with pytest.warns(UserWarning, match='skipped 2 files'): df = predict_folder(file, folder)
    assert len(df)==1 and len(df.attrs['left_out'])==1
    cekd_predict(str(file), [str(folder)])
    assert 'cekd-predict: skipped 2 files of' in capsys.readouterr().err

@pytest.mark.parametrize('error', [MemoryError(),torch.OutOfMemoryError('CUDA out of memory. Tried to allocate')])
def test_too_little_memory_for_a_batch(birds, tmp_path, monkeypatch, error):
    from cekd_fastai.commands import cekd_predict
    from cekd_fastai.deploy import Deployed
    file = deploy(branch_learner(small(birds), 'test_resnet', 1, pretrained=False), tmp_path/'birds.pt')
    def full(*args): raise error
    monkeypatch.setattr(Deployed, 'probs', full)
    with pytest.raises(SystemExit, match='^cekd-predict: the memory is too small: pass a smaller --batch.$'): cekd_predict(str(file), [str(birds)])

def test_options_that_would_do_nothing(birds, tmp_path):
    from cekd_fastai.predict import open_net
    with pytest.raises(ValueError, match='label_col is for a DataFrame'): read_table('cub', label_col='x')
    with pytest.raises(ValueError, match='label_col is for a DataFrame'): read_table(read_table(birds), label_col='x')
    with pytest.raises(ValueError, match='num_workers would do nothing'): fine_grained_dls(birds, size=56, bs=8, in_memory=True, num_workers=2)
    with pytest.raises(ValueError, match='runs on the CPU'): open_net(tmp_path/'x.onnx', 'cuda')

def test_a_folder_that_is_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from cekd_fastai.train import make_data
    (tmp_path/'2024').mkdir()
    for i in range(12): Image.new('RGB', (60,60)).save(tmp_path/'2024'/f'{i}.jpg')
    pd.DataFrame(dict(name=[f'{i}.jpg' for i in range(12)], label=['a','b']*6)).to_csv(tmp_path/'t.csv', index=False)
    args = _defaults()|dict(data=str(tmp_path/'t.csv'), size=56, bs=4, num_workers=0, table_args=['folder=2024'])
    assert make_data(args).train.n>=8
