"Wrong words: what a user gets wrong is answered in one sentence that names the fault and the remedy, in the words of a notebook or of the terminal."
import pickle,re,subprocess,sys
from pathlib import Path
import numpy as np,pandas as pd,pytest,torch
import fastai.callback.mixup as stock
from fastai.vision.all import OrderedDict,get_image_files
from cekd_fastai.all import CEKD,as_teacher,branch_learner,fine_grained_dls,make_birds,verify
from cekd_fastai.cli import _defaults,cekd_train
from cekd_fastai.options import as_options
from cekd_fastai.commands import cekd_predict
from cekd_fastai.train import build

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=3, n_images=8, n_train=6, size=48, progress=False)

@pytest.fixture(scope='module')
def dls(birds): return fine_grained_dls(birds, size=32, bs=8, num_workers=0)

def learner(dls, *args, **kw): return branch_learner(dls, 'test_resnet', *args, pretrained=False, **kw)

def quietly(learn, f):
    with learn.no_bar(),learn.no_logging(): return f(learn)

# Star imports in the other order

@pytest.mark.parametrize('name', ['CutMix','MixUp'])
def test_mixes_of_fastai(dls, name):
    "`from cekd_fastai.all import *` and then fastai's: the mix has the same name, and is another class."
    with pytest.raises(ValueError, match=f'this `{name}` is fastai.s: import `cekd_fastai.all` after'): learner(dls, cbs=[getattr(stock, name)(), CEKD()])

def test_no_mix(dls):
    with pytest.raises(ValueError, match='nothing mixes: add `SnapMix'): learner(dls, cbs=CEKD())

# Words where a number belongs

def options(birds, **kw): return _defaults()|dict(data=birds, size=32, bs=8, num_workers=0, arch='test_resnet', no_pretrained=True)|kw

@pytest.mark.parametrize('mix', ['snapmix','mixup','cutmix'])
@pytest.mark.parametrize('given,says', [('alpha=abc',"`alpha` is 'abc', but it is a number"), ('alpha=None','`alpha` is None, but it is a number'),
    ('alpha=[1]','`alpha` is .1., but it is a number'), ('stop_at=x',"`stop_at` is 'x', but it is a number"), ('alpha=-1','must be above 0')])
def test_values_of_a_mix(birds, mix, given, says):
    with pytest.raises(ValueError, match=says): build(options(birds, method='plain', mix=mix, mix_args=[given]))

@pytest.mark.parametrize('method', ['cekd','ffl','dml','css','kdcl','diversity','okddip','one'])
def test_values_of_a_method(birds, method):
    kw = {} if method=='cekd' else dict(mix='none')
    arch = 'test_resnet,test_resnet' if method=='css' else 'test_resnet'
    with pytest.raises(ValueError, match="`T` is 'abc', but it is a number"): build(options(birds, method=method, method_args=['T=abc'], arch=arch, **kw))

@pytest.mark.parametrize('method,name', [('stored','T'), ('stored','weight'), ('pskd','alpha'), ('ols','limit')])
def test_values_of_soft_labels(birds, method, name):
    with pytest.raises(ValueError, match=f"`{name}` is 'abc', but it is a number"): build(options(birds, method=method, method_args=[f'{name}=abc']))

# Folders that are nearly there

@pytest.mark.parametrize('path,near', [('bird','birds'), ('birds/image','images'), ('birds/images/001.Common_Finc','001.Common_Finch'), ('birdz/images','birds'),
    ('{tmp}/bird','birds'), ('./bird','birds')])
def test_a_folder_nearly_there(birds, path, near, monkeypatch):
    "Folders are listed, by the loaders, by `verify` and by the command."
    monkeypatch.chdir(birds.parent)
    path = path.format(tmp=birds.parent)
    for f in (lambda: fine_grained_dls(path, size=32), lambda: verify(path)):
        with pytest.raises(FileNotFoundError, match=f"did you mean '{near}'"): f()
    with pytest.raises(SystemExit, match=rf"^cekd-train: .*did you mean (--data )?'?[\w/.-]*{near}'?( or 'nabirds')?\?$"): cekd_train(data=path)

# A command names its own options

def test_options_of_the_command():
    "Every argument of `cekd_train` in the forms in which rooms name them."
    for name,default in _defaults().items():
        flag = '--'+name.replace('_', '-')
        assert as_options(f'pass `{name}=3` or so', _defaults())==f'pass {flag} 3 or so'
        assert as_options(f"pass {name}='x' or so", _defaults())==f'pass {flag} x or so'
        if default is False: assert as_options(f'pass {name}=True.', _defaults())==f'pass {flag}.'
    assert as_options('pass `pretrained=False`', _defaults())=='pass --no-pretrained'

@pytest.mark.parametrize('wrong,says', [
    (dict(bs=64), '--bs 64 is more than the 18 training images of .*: pass --bs 18 or less$'),
    (dict(crop_to_box=True, data='images'), '^cekd-train: --crop-to-box: .* has no boxes'),
    (dict(valid_pct=1.5), '--valid-pct is 1.5: it must be between 0 and 1'),
    (dict(classes=9), '--classes 9: .* has 3 classes'),
    (dict(n_branches=0), '--n-branches is 0'),
    (dict(n_branches=1, method='cekd'), 'pass --n-branches 2'),
    (dict(root='images'), '--root .* is for a named benchmark'),
    (dict(mix='none', method='cekd'), 'leave out --mix none'),
    (dict(mix='none', method='stored'), 'leave out --mix none'),
    (dict(mix='cutmix', method='ols', mix_prob=1.), 'give it --mix-prob .6'),
    (dict(method='stored', mix_prob=0.), 'but nothing mixes'),
    (dict(method='stored', mix_prob=1., mix_args=['stop_at=.8']), 'give it --mix-prob .6'),
    (dict(method='stored', recipe='plain-cub-resnet18'), 'add --mix mixup, or pass another --method'),
    (dict(table_args=['foldr=x']), "^cekd-train: There is no argument of a table 'foldr'; did you mean 'folder'"),
    (dict(table_args=['suff=.jpg']), '^cekd-train: suff is for a DataFrame or a CSV file'),
    (dict(data='cut'), 'leave such files out with --verify')])
def test_errors_of_the_command(birds, tmp_path, wrong, says):
    "No Python in what the command prints: what it names can be typed."
    kw = options(birds, out=tmp_path/'run', epochs=1)|wrong
    for k in ('data','root'):
        if kw[k]=='images': kw[k] = str(birds/'images')
    if kw['data']=='cut':
        kw['data'] = tmp_path/'photos'
        for i,o in enumerate(sorted(get_image_files(birds/'images'))):
            (kw['data']/o.parent.name).mkdir(parents=True, exist_ok=True)
            (kw['data']/o.parent.name/o.name).write_bytes(o.read_bytes()[:-1 if i%2 else 200])
    with pytest.raises(SystemExit, match=says) as e: cekd_train(**kw)
    flags = {o for o in re.findall(r'(?<!\S)--[\w-]+', str(e.value))}
    assert flags<={'--'+o.replace('_', '-') for o in _defaults()} and not re.search('=(True|False)', str(e.value))

def test_a_table_for_the_command(birds, tmp_path):
    "A flat folder and a CSV file with bare names, as Kaggle has them"
    (tmp_path/'train').mkdir()
    files = sorted(get_image_files(birds/'images'))
    for i,o in enumerate(files): (tmp_path/'train'/f'{i:04}{o.suffix}').write_bytes(o.read_bytes())
    pd.DataFrame(dict(id=[f'{i:04}' for i in range(len(files))], day=1, breed=[o.parent.name for o in files])).to_csv(tmp_path/'labels.csv', index=False)
    kw = options(tmp_path/'labels.csv', method='plain', mix='none')
    said = ['fn_col=id','label_col=breed',f'folder={tmp_path}/train']
    learn = build(kw|dict(table_args=[*said,f'suff={files[0].suffix}']))
    assert len(learn.dls.table)==len(files) and list(learn.dls.vocab)==sorted({o.parent.name for o in files})
    with pytest.raises(SystemExit, match='are missing: .*; check --table-args folder= and --table-args suff=, or leave'):
        cekd_train(**kw|dict(table_args=said, out=tmp_path/'run'))

def test_no_option_is_invented():
    "Messages of all rooms that name an argument of the command by `name=value` come out without it."
    src = '\n'.join(p.read_text(encoding='utf-8') for p in (Path(__file__).resolve().parent.parent/'cekd_fastai').rglob('*.py'))
    said = set(re.findall(r"(?:pass|with|or|use) `?((?:%s)=(?:True|False|'\w+'|\d+))" % '|'.join([*_defaults(),'pretrained','drop_last']), src))
    assert {'verify=True','drop_last=False','pretrained=False'}<=said
    for o in said: assert not re.search(r'\w=', as_options(f'lower it, or {o}', _defaults())), o

def test_options_of_predict(tmp_path):
    (tmp_path/'photos').mkdir()
    with pytest.raises(SystemExit, match='^cekd-predict: There is no file'): cekd_predict('none.pt', [str(tmp_path/'photos')])
    assert as_options('bs=0: pass a whole number', ('csv','top'), bs='batch')=='--batch 0: pass a whole number'

def test_commands_interrupted_while_loading(tmp_path):
    "Ctrl-C while torch is loaded is one sentence and 130; nothing else is said."
    (tmp_path/'torch.py').write_text('import os,signal\nos.kill(os.getpid(), signal.SIGINT)\n')
    (tmp_path/'birds.pt').touch()
    for name,*args in (('cekd-predict',tmp_path), ('cekd-serve',)):
        start = "import signal,sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n" # a program in the background ignores it
        start += f"sys.path.insert(0, {str(tmp_path)!r})\nfrom cekd_fastai.commands import {name.replace('-', '_')} as main\nmain()\n"
        (tmp_path/'start.py').write_text(start)
        res = subprocess.run([sys.executable, tmp_path/'start.py', tmp_path/'birds.pt', *args], capture_output=True, text=True)
        assert (res.returncode,res.stderr.strip(),res.stdout)==(130,f'{name}: interrupted.','')

# Teachers

def test_teacher_without_network(dls, tmp_path):
    "Weights alone, bare or in a checkpoint, trusted or not; and what is no network at all."
    net = learner(dls, 1).model
    torch.save(net.state_dict(), tmp_path/'bare.pth')
    torch.save(dict(model=net.state_dict(), opt=None, epoch=3), tmp_path/'inside.pth')
    torch.save(OrderedDict(net.state_dict()), tmp_path/'bare.pkl')
    for f,trust in (('bare.pth',False), ('bare.pth',True), ('inside.pth',False), ('inside.pth',True), ('bare.pkl',True)):
        with pytest.raises(ValueError, match=rf'{f}` holds weights alone .*`load_weights'): as_teacher(tmp_path/f, trust)
    torch.save([1,2], tmp_path/'list.pkl')
    (tmp_path/'junk.pkl').write_bytes(b'junk')
    (tmp_path/'old.pkl').write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match='list.pkl` holds a `list`, which is no learner'): as_teacher(tmp_path/'list.pkl', True)
    for f in ('junk.pkl','old.pkl'):
        with pytest.raises(ValueError, match=f'{f}` cannot be opened'): as_teacher(tmp_path/f, True)

def test_teacher_with_network(dls, tmp_path):
    "A learner and a whole network are teachers, if they are trusted."
    learn = learner(dls, 1)
    learn.export(tmp_path/'learn.pkl')
    torch.save(learn.model, tmp_path/'net.pth')
    x = torch.randn(2,3,32,32)
    with torch.no_grad(): want = learn.model.cpu().eval()(x)
    for f in ('learn.pkl','net.pth'):
        with pytest.raises(ValueError, match='is a pickle|was not written by'): as_teacher(tmp_path/f)
        assert torch.allclose(as_teacher(tmp_path/f, True)(x), want, atol=1e-5)

# Rates

@pytest.mark.parametrize('kw,rates,says', [(dict(split='head'),3,r'3 values of `lr` for 2 groups of parameters \(trunk, heads\): pass 2, or one for all'),
    ({},2,r'2 values of `lr` for 3 groups of parameters \(trunk, branches, heads\): pass 3')])
@pytest.mark.parametrize('how', ['fit','fit_one_cycle'])
def test_rates_of_groups(dls, kw, rates, says, how):
    with pytest.raises(ValueError, match=says): getattr(learner(dls, **kw), how)(1, [1e-3]*rates)

def test_rates_that_fit(dls):
    "Other errors of a fit stay what they are, and the right number of rates is taken."
    learn = learner(dls, split='head')
    quietly(learn, lambda o: o.fit_one_cycle(1, [1e-3,1e-2]))
    assert len(learn.opt.hypers)==2
    def fault(): raise AssertionError('mine')
    learn.loss_func = lambda *args: fault()
    with pytest.raises(AssertionError, match='mine'): quietly(learn, lambda o: o.fit(1))

# Lists of files

KINDS = dict(found=lambda fs: fs, words=lambda fs: fs.map(str), list=list, tuple=tuple, iterator=iter, array=lambda fs: np.array(fs.map(str)),
    column=lambda fs: pd.Series(list(fs.map(str))))

@pytest.mark.parametrize('kind', KINDS)
def test_verify_takes_files(birds, tmp_path, kind):
    "As `get_image_files` gives them, and in every other form of a list; a bad one among them is found."
    bad = tmp_path/'bad.jpg'
    bad.write_bytes(b'no picture')
    files = get_image_files(birds/'images')+[bad]
    assert [Path(o).name for o in verify(KINDS[kind](files)).file]==['bad.jpg']
