"""The command: what it writes, what it says, and what it leaves behind.

A process spends most of its time on importing torch and fastai. So few tests start one, those about what only a process has; the others run the same script in
this process, by `here`."""
import json,os,re,runpy,shutil,signal,subprocess,sys,warnings
from pathlib import Path
from types import SimpleNamespace
import forks,pytest,torch
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.drawing.dataset import make_birds
from cekd_fastai.job import with_recipe
from cekd_fastai.learner import branch_learner
from cekd_fastai.recipes import PAPER_RUNS
from cekd_fastai.train import _freeze_trunk

small = '--arch test_resnet --no-pretrained --size 56 --bs 16 --num-workers 0'.split()
env = os.environ | dict(PYTHONUNBUFFERED='1', HF_HUB_OFFLINE='1', OMP_NUM_THREADS='2')
exe = Path(sys.executable).parent/'cekd-train'

def command(*args, **kw):
    "Start `cekd-train` with these arguments, as in the foreground: in the background of a shell it would ignore the interrupt."
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try: return subprocess.Popen([exe, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=env, **kw)
    finally: signal.signal(signal.SIGINT, before)

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('data')/'birds', n_species=4, n_images=12, n_train=8, size=64, progress=False)

@pytest.fixture(scope='module')
def started(birds, tmp_path_factory):
    "Two processes side by side, which import everything themselves: the help, and a run of CEKD"
    tmp = tmp_path_factory.mktemp('runs')
    ps = dict(cekd=command('--data', birds, *small, '--epochs', 2, '--method', 'cekd', '--mix', 'cutmix', '--out', tmp/'cekd'), help=command('--help'))
    yield tmp,ps
    for p in ps.values():
        p.kill()
        p.wait()

@pytest.fixture(scope='module')
def done(started):
    "Folder of a finished run of CEKD, and what it printed"
    tmp,ps = started
    text,err = ps['cekd'].communicate(timeout=300)
    assert ps['cekd'].returncode==0, err
    assert 'FutureWarning' not in err
    return tmp/'cekd',text

def _show(message, category, filename, lineno, file=None, line=None):
    print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr)

@pytest.fixture
def here(capsys, monkeypatch):
    "Run `cekd-train` with these arguments in this process, without a network; what comes back is that of `subprocess.run`."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    def go(*args):
        monkeypatch.setattr(sys, 'argv', [str(exe), *map(str, args)])
        capsys.readouterr()
        code = None
        with warnings.catch_warnings():
            warnings.simplefilter('default')
            warnings.showwarning = _show # pytest keeps warnings to itself; a process writes them
            try: runpy.run_path(str(exe), run_name='__main__')
            except SystemExit as e: code = e.code
        if isinstance(code, str): print(code, file=sys.stderr) # as Python does
        text,err = capsys.readouterr()
        return subprocess.CompletedProcess(args, 1 if isinstance(code, str) else code or 0, text, err)
    return go

def test_writes(done):
    out,text = done
    res = json.loads((out/'result.json').read_text())
    assert sorted(p.name for p in out.iterdir()) == ['history.csv','model.pkl','model.pt','report.png','result.json']
    assert len(res['branches'])==2 and 0<=res['accuracy']<=1 and res['args']['mix']=='cutmix' and res['versions']['torch']
    assert min(res[k] for k in ('seconds','images_per_s','peak_memory_gb','valid_loss'))>0
    assert f"accuracy {res['accuracy']:.1%}" in text
    assert f'written to {out}: result.json, history.csv, report.png, model.pkl, model.pt' in text
    head,*rows = (out/'history.csv').read_text().splitlines()
    assert head=='epoch,train_loss,valid_loss,accuracy,ce_mix,cross,ce_clean' and len(rows)==2
    assert (out/'report.png').read_bytes()[:4]==b'\x89PNG'

def test_help(started):
    "It comes without a warning, in particular torch's of fastai's `torch.jit.script`."
    p = started[1]['help']
    text,err = p.communicate(timeout=300)
    assert p.returncode==0 and err==''
    assert re.findall(r'^(\w+):$', text, re.M)==['options','data','method','mix','network','training','output','examples']
    examples = text.partition('examples:\n')[2].splitlines()
    assert len(examples)==3 and all(o.startswith('  cekd-train --') for o in examples)
    for o in ('--crop-to-box', '--method-args str [str ...]', '(default: resnet18)', '--precision', '--dry-run'): assert o in ' '.join(text.split())

def test_examples_of_the_help_are_read():
    from cekd_fastai.cli import cli_parser,given
    for line in cli_parser().epilog.splitlines()[1:]:
        words = line.split('   ')[0].split()
        assert set(given(words[1:]))=={o[2:].replace('-', '_') for o in words if o.startswith('--')}

def light(*args, start=(exe,)):
    "Run the command in a process of its own, which must not import torch, fastai or numpy; its exit code and what it wrote"
    p = subprocess.run([sys.executable, '-X', 'importtime', *start, *map(str, args)], capture_output=True, text=True, env=env, timeout=100)
    lines = p.stderr.splitlines()
    names = {o.rpartition('|')[2].strip() for o in lines if o.startswith('import time:')}
    assert 'cekd_fastai.recipes' in names and not names & {'torch','fastai','numpy','matplotlib','timm'}
    return p.returncode,p.stdout,'\n'.join(o for o in lines if not o.startswith('import time:'))

slips = [(['--epohcs', 3], 2, 'there is no option --epohcs (did you mean --epochs?)'), (['--epochs', '3x'], 2, 'invalid int value'),
    (['--method', 'cedk'], 1, "There is no --method 'cedk'; did you mean 'cekd'?"), (['--mix', 'snapmux'], 1, "did you mean 'snapmix'"),
    (['--precision', 'fp61'], 1, "did you mean 'fp16'"), (['--schedule', 'step'], 1, "did you mean 'steps'"), (['--opt', 'q'], 1, 'choose from adam, sgd'),
    (['--recipe', 'cekd-cub-resnet10'], 1, "did you mean 'cekd-cub-resnet101'"), (['--data', 'sinthetic'], 1, "did you mean 'synthetic'"),
    (['--epochs', 0], 1, '--epochs is 0: it must be at least one.'), (['--valid-pct', 1.2], 1, '--valid-pct is 1.2: it must be between 0 and 1.'),
    (['--data', 'not/there'], 1, 'There is no folder'), (['--data', Path(__file__).parent, '--out', Path(__file__).parent/'run'], 1, 'lies among the pictures')]

@pytest.mark.parametrize('args,code,says', slips)
def test_a_slip_is_answered_before_torch_is_loaded(args, code, says):
    rc,text,err = light(*args)
    assert rc==code and text=='' and says in err and len(err.splitlines())==1 and err.startswith('cekd-train: ')

def test_as_a_module():
    rc,text,err = light('--version', start=('-m','cekd_fastai.cli'))
    assert rc==0 and text.startswith('cekd_fastai 0.')
    assert light('--mix', 'x', start=('-m','cekd_fastai.cli'))[0]==1

@pytest.mark.parametrize('kind,line', [('methods','okddip     peers'),('mixes','snapmix    '),('recipes','cekd-cub-resnet101             cub, resnet101.tv_in1k, 200 epochs, published: 89.59 %')])
def test_lists_without_torch(kind, line):
    rc,text,err = light('--list', kind)
    assert rc==0 and err=='' and any(o.startswith(line) for o in text.splitlines())

@pytest.mark.parametrize('kind,names', [('benchmarks',('cub','cifar100','synthetic')),('backbones',('resnet50','convnext_tiny','vit_b_16','cifar_resnet110'))])
def test_lists_of_the_libraries(kind, names, here):
    p = here('--list', kind)
    assert p.returncode==0 and set(names) <= {o.split()[0] for o in p.stdout.splitlines()}

def test_a_list_that_nobody_reads_to_the_end():
    "as in `cekd-train --list backbones | head -1`: more than a pipe holds"
    p = command('--list', 'backbones')
    assert p.stdout.readline().strip()
    p.stdout.close()
    assert p.wait(timeout=100)==0 and 'BrokenPipe' not in p.stderr.read()

def test_unknown_list():
    rc,_,err = light('--list', 'birds')
    assert rc==2 and "'methods', 'mixes', 'benchmarks', 'recipes', 'backbones'" in err

@pytest.mark.skipif(os.name=='nt', reason='Windows has no SIGINT for one process')
def test_interrupt_while_loading(tmp_path):
    "Ctrl-C in the seconds in which torch and fastai are loaded is no traceback; a fastai that interrupts stands in for the user."
    (tmp_path/'fastai').mkdir()
    (tmp_path/'fastai'/'__init__.py').write_text('import os,signal,time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n')
    path = os.pathsep.join([str(tmp_path), env.get('PYTHONPATH', '')])
    p = subprocess.run([exe, '--dry-run'], capture_output=True, text=True, env=env|dict(PYTHONPATH=path), timeout=100)
    assert p.returncode==130 and 'cekd-train: interrupted' in p.stderr and 'Traceback' not in p.stderr

def test_make_train_is_quiet():
    "`make train` imports the room that runs an experiment before fastai, so that torch's warning is filtered there too."
    src = Path(__file__).resolve().parent.parent/'benchmarks'/'make_train.py'
    lines = [o for o in src.read_text(encoding='utf-8').splitlines() if re.match(r'(import|from) \w*fastai', o)]
    assert lines[0].startswith('from cekd_fastai import job ') # as a module: fastcore's `run` comes with the star

def test_one_sentence(birds, tmp_path):
    "A refusal is one sentence and exit code 1, and leaves no folder."
    p = forks.run(exe, '--data', birds, '--arch', 'resnet18', '--epochs', 1, '--size', 56, '--out', tmp_path/'refused', env=env)
    said = [o for o in p.stderr.splitlines() if o.startswith('cekd-train:')]
    assert p.returncode==1 and len(said)==1 and 'Traceback' not in p.stderr
    assert 'could not be downloaded' in said[0] and '--weights' in said[0]
    assert not (tmp_path/'refused').exists()

def test_same_seed_same_result(done, birds, tmp_path, here):
    "In a new process, and in one that has done other things before"
    p = here('--data', birds, *small, '--epochs', 2, '--method', 'cekd', '--mix', 'cutmix', '--out', tmp_path/'again')
    assert p.returncode==0, p.stderr
    a,b = (json.loads((o/'result.json').read_text()) for o in (done[0], tmp_path/'again'))
    assert a['accuracy']==b['accuracy'] and abs(a['valid_loss']-b['valid_loss'])<1e-4

def test_models_in_a_fresh_process(done, birds):
    "The export predicts there, and the file of `deploy` predicts the same without unpickling anything."
    code = f"""from fastai.vision.all import *
learn = load_learner({str(done[0]/'model.pkl')!r})
file = get_image_files({str(birds)!r})[0]
name,i,probs = learn.predict(file)
assert name==learn.dls.vocab[i] and len(probs)==4 and abs(probs.sum()-1)<1e-4
assert learn.opt is None and learn.cekd.clean is None and learn.cut_mix.host is None
from cekd_fastai.deploy import Deployed
a = Deployed({str(done[0]/'model.pt')!r}).predict(file, 4)
assert all(abs(a[o]-probs[i].item())<1e-3 for i,o in enumerate(learn.dls.vocab))"""
    p = forks.run(code, env=env)
    assert p.returncode==0, p.stderr

@pytest.mark.parametrize('name,nest', [('sgd',False), ('nesterov',True)])
def test_optimisers_are_torchs(name, nest):
    "Momentum and weight decay work together as in the papers' code: the same weights after ten steps as torch's own loop"
    from fastai.vision.all import CrossEntropyLossFlat,DataLoaders,Learner
    from cekd_fastai.train import OPTS
    x,y = torch.randn(8,4, generator=torch.Generator().manual_seed(0)),torch.arange(8)%3
    dl = torch.utils.data.DataLoader([(a,b) for a,b in zip(x, y)], batch_size=8)
    net = torch.nn.Linear(4,3)
    other = torch.nn.Linear(4,3)
    other.load_state_dict(net.state_dict())
    learn = Learner(DataLoaders(dl, dl, device='cpu'), net, loss_func=CrossEntropyLossFlat(), opt_func=OPTS[name], wd=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(10, .1)
    opt = torch.optim.SGD(other.parameters(), lr=.1, momentum=.9, weight_decay=.1, nesterov=nest)
    for _ in range(10):
        opt.zero_grad()
        torch.nn.functional.cross_entropy(other(x), y).backward()
        opt.step()
    assert torch.allclose(net.weight, other.weight, atol=1e-6)

def test_no_picture_costs_no_run(birds, tmp_path, here):
    "Pictures of 32 pixels leave the last map one place, and a class may be called like a formula: the results are there"
    for old,new in zip(sorted((birds/'images').iterdir()), ('a$_{b$','c$frac$','d','e')): shutil.copytree(old, tmp_path/'data'/new)
    for size in (32,56):
        out = tmp_path/f'run{size}'
        p = here('--data', tmp_path/'data', *small, '--size', size, '--method', 'plain', '--epochs', 1, '--out', out)
        assert p.returncode==0, p.stderr
        assert sorted(o.name for o in out.iterdir()) == ['history.csv','model.pkl','model.pt','report.png','result.json']

def test_a_failing_report_costs_no_run(birds, tmp_path, monkeypatch):
    from cekd_fastai import cli,results
    def fail(*args): raise RuntimeError('no ink')
    monkeypatch.setattr(results, 'report', fail)
    with pytest.warns(UserWarning, match='no report.png, since it could not be drawn .no ink'):
        cli.cekd_train(data=birds, arch='test_resnet', method='plain', size=56, bs=16, epochs=1, no_pretrained=True, num_workers=0, out=tmp_path/'run')
    assert sorted(o.name for o in (tmp_path/'run').iterdir()) == ['history.csv','model.pkl','model.pt','result.json']

def test_interrupt_while_saving(done, birds, tmp_path, monkeypatch):
    "Ctrl-C in the middle of writing leaves the old run whole, and of a new one what it takes to go on"
    from cekd_fastai import cli,results
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(results, 'deploy', stop)
    shutil.copytree(done[0], tmp_path/'old')
    before = {o.name:o.read_bytes() for o in (tmp_path/'old').iterdir()}
    for out in ('old','new'):
        with pytest.raises(SystemExit) as e:
            cli.cekd_train(data=birds, arch='test_resnet', method='plain', size=56, bs=16, epochs=1, no_pretrained=True, num_workers=0, force=True, out=tmp_path/out)
        assert e.value.code==130
    assert {o.name:o.read_bytes() for o in (tmp_path/'old').iterdir() if o.is_file()}==before
    assert [o.name for o in (tmp_path/'new').iterdir()]==['checkpoints'] # the training is not lost

@pytest.mark.skipif(torch.cuda.is_available(), reason='says what to do without a GPU')
def test_several_processes_without_gpu(birds, tmp_path, here, monkeypatch):
    for k,v in dict(WORLD_SIZE='2', RANK='0').items(): monkeypatch.setenv(k, v)
    p = here('--data', birds, *small, '--out', tmp_path/'run')
    assert p.returncode==1 and 'without `torchrun`' in p.stderr and not (tmp_path/'run').exists()

@pytest.mark.parametrize('recipe', ['snapmix-cars-resnet50','css-cifar100','meal-v2-imagenet-resnet18'])
def test_dry_run(recipe, tmp_path, here):
    "A published experiment is rehearsed with its own networks, and leaves nothing behind."
    p = here('--recipe', recipe, '--dry-run', '--out', tmp_path/'run')
    assert p.returncode==0, p.stderr
    assert 'dry run done' in p.stdout and any(o in p.stdout for o in ('94.3','None','73.19')) and not (tmp_path/'run').exists()
    lines = p.stdout.splitlines()
    assert lines[0]==f"{recipe}: what differs from the paper's run" and [o[2:] for o in lines if o.startswith('- ')]==PAPER_RUNS[recipe]['differs']

def test_dry_run_of_large_eyes(here, tmp_path):
    "A network that does not take the small pictures of a rehearsal gets somewhat larger ones"
    p = here('--arch', 'inception_v3', '--method', 'plain', '--dry-run', '--out', tmp_path/'run')
    assert p.returncode==0 and 'dry run done' in p.stdout, p.stderr

def test_no_option_is_guessed(here, tmp_path):
    "Half of a name is a slip, which `--launch` in particular must not hand on to its processes"
    for o in ('--launc','--epoch'):
        p = here(o, 2, '--dry-run', '--out', tmp_path/'run')
        assert p.returncode==2 and f'there is no option {o} (did you mean {o}' in p.stderr

def test_every_recipe_says_what_differs():
    "Each has sentences of its own kind, and what it trains is what the papers' code trained"
    for name,run in PAPER_RUNS.items(): assert run['differs'] and all(o.endswith('.') and '{' not in o for o in run['differs']), name
    def of(*keys, **kw): return {k:[v.get(o) for o in keys] for k,v in PAPER_RUNS.items() if v['data']=='cifar100' and all(v[a]==b for a,b in kw.items())}
    assert {tuple(map(str, o)) for o in of('opt','wd','milestones', method='okddip').values()}=={('nesterov','0.0005','[150, 225]')}
    assert {tuple(map(str, o)) for o in of('opt','wd','learner_args', method='ffl').values()}=={('nesterov','0.0001',"['own_start=True', 'wd_gate=1e-5']")}
    assert PAPER_RUNS['one-own-cifar100-resnet32']['milestones']==[151,225] and PAPER_RUNS['css-cifar100']['opt']=='sgd'
    assert PAPER_RUNS['dml-cifar100-resnet32']['arch']=='cifar_resnet32,cifar_resnet32,cifar_resnet32'

def test_recipe_reaches_the_optimiser(birds, tmp_path):
    "FFL's fusion module has a weight decay of its own, CSS warms up once an epoch, and a student of V2 learns at one rate"
    from cekd_fastai import cli
    from cekd_fastai.train import _rates,build
    own = cli._defaults()
    small = dict(data=str(birds), arch='test_resnet', arch_args=(), size=56, num_workers=0, bs=8, seed=1)
    def args(name, **kw): return SimpleNamespace(**with_recipe(own|dict(recipe=name), own) | small | kw)
    ffl = build(vars(args('ffl-cifar100-resnet32')))
    ffl.create_opt()
    ffl.opt.set_hypers(wd=ffl.wd)
    assert [h['wd'] for h in ffl.opt.hypers]==[1e-4]*3+[1e-5] and ffl.opt.param_groups[0]['nesterov']
    a,b = (next(o.parameters()) for o in ffl.model.branches)
    assert not torch.equal(a, b)
    deep = args('meal-v2-imagenet-resnet18', teachers=['test_resnet'])
    plain = args('plain-cub-resnet18')
    assert _rates(ffl, deep)==[.01]*4 and _rates(ffl, plain)==[.001,.001,.01,.01]

def test_default_is_what_is_recommended(birds):
    "Without a method, the network, loss and rates are those of `recommended`: two branches that learn smoothed labels, and no distillation"
    from cekd_fastai import cli
    from cekd_fastai.recommended import recommended
    from cekd_fastai.train import _rates,build
    args = with_recipe(cli._defaults()|dict(data=str(birds), arch='test_resnet', no_pretrained=True, size=56, num_workers=0, bs=8), cli._defaults())
    learn,r = build(args),recommended('test_resnet', pretrained=False)
    ours = r.learner(learn.dls)
    assert (args['method'],args['mix'],learn.loss_func.eps)==('recommended','none',ours.loss_func.eps)
    assert [o.shape for o in learn.model.parameters()]==[o.shape for o in ours.model.parameters()]
    assert (learn.wd,_rates(learn, SimpleNamespace(**args)))==(ours.wd,r.lr)
    assert {type(o).__name__ for o in learn.cbs}-{type(o).__name__ for o in ours.cbs}=={'ChannelsLast'}

def test_options_beside_a_recipe(tmp_path, here):
    "They win, also where they say what the command does anyway"
    args = ['--recipe', 'dml-cifar100-resnet32', '--dry-run', '--epochs', 20, '--bs', 32, '--milestones', 10, '--out', tmp_path/'run']
    p = here(*args, '--schedule', 'one-cycle')
    assert p.returncode==1 and 'add --schedule steps' in p.stderr
    p = here(*args)
    assert p.returncode==0, p.stderr
    assert "'bs': 32, 'epochs': 20" in p.stdout and "'milestones': [10]" in p.stdout

def test_rehearsal_of_meal(done, tmp_path, here):
    "Teachers of the user's classes are stood in for, and pictures have the size of the benchmark"
    teachers = (done[0]/'model.pt','test_resnet')
    p = here('--data', 'cifar100', '--arch', 'cifar_resnet8', '--method', 'meal', '--teachers', *teachers, '--dry-run', '--out', tmp_path/'run')
    assert p.returncode==0 and 'dry run done' in p.stdout, p.stderr

def test_model_size(done):
    "The export holds the network and little else: no optimiser, no batch, no teacher."
    import timm
    n = sum(p.numel() for p in timm.create_model('test_resnet').parameters())*4*2
    assert (done[0]/'model.pkl').stat().st_size < n + 400_000

def test_refuses_to_overwrite(done, birds, here):
    before = (done[0]/'model.pkl').stat().st_mtime_ns
    p = here('--data', birds, *small, '--epochs', 1, '--out', done[0])
    assert p.returncode==1 and 'already holds results' in p.stderr and '--force' in p.stderr
    assert (done[0]/'model.pkl').stat().st_mtime_ns==before

@pytest.mark.skipif(os.name=='nt', reason='Windows has no SIGINT for one process')
def test_interrupt(birds, tmp_path):
    p = forks.start(exe, '--data', birds, *small, '--epochs', 500, '--out', tmp_path/'run', env=env)
    assert p.until(lambda: re.search(r'^1 ', p.written(), re.M)) # in the midst of training: two epochs are over
    p.send_signal(signal.SIGINT)
    p.wait()
    err = p.stderr
    assert p.returncode==130 and 'goes on with --resume' in err
    assert [o.name for o in (tmp_path/'run').iterdir()]==['checkpoints']

def test_corrupt_image_is_named(birds, tmp_path, here):
    shutil.copytree(birds, tmp_path/'birds')
    file = sorted((tmp_path/'birds'/'images').rglob('*.jpg'))[3]
    file.write_bytes(file.read_bytes()[:200])
    for workers in (0,1):
        args = ['--data', tmp_path/'birds', *small[:-1], workers, '--epochs', 1, '--mix', 'cutmix', '--out', tmp_path/f'run{workers}']
        p = here(*args)
        last = p.stderr.splitlines()[-1]
        assert p.returncode==1 and file.name in last and 'verify' in last, p.stderr
    p = here(*args, '--verify', '--force') # the first batch left a checkpoint
    assert p.returncode==0 and file.name in p.stderr

def test_real_birds(real_data, tmp_path, here):
    "Two classes of CUB-200-2011, with weights from a local file, as on a machine without a network"
    weights = next(real_data('weights').rglob('mobilenet_v2*'))
    args = '--classes 3 --arch mobilenetv2_100 --arch-args pad_type=same --freeze-bn --freeze-trunk --size 64 --epochs 1 --num-workers 0'.split()
    p = here('--data', real_data('CUB_200_2011'), '--weights', weights, *args, '--out', tmp_path/'cub')
    assert p.returncode==0, p.stderr
    assert json.loads((tmp_path/'cub'/'result.json').read_text())['args']['classes']==3

def test_a_frozen_trunk_stays(birds):
    "Norms of a frozen trunk go on to learn, as everywhere in fastai; all else of it stays, and branches and heads learn"
    learn = branch_learner(fine_grained_dls(birds, size=32, bs=4, num_workers=0), 'test_resnet', 2, pretrained=False)
    _freeze_trunk(learn)
    was = {k:v.clone() for k,v in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    moved = {k for k,v in learn.model.named_parameters() if not torch.equal(v, was[k])}
    assert {k for k,v in was.items() if v.ndim>1 and k.startswith('trunk')}.isdisjoint(moved)
    assert {k for k in was if k.startswith(('branches','heads'))}<=moved

# A run that ends early, and goes on

def test_resumed(here, birds, tmp_path, monkeypatch):
    "A killed run is not begun anew by accident; with --resume it gives the results of one that was not killed."
    from cekd_fastai import safely
    from fastai.vision.all import Callback
    class Die(Callback):
        def before_epoch(self):
            if self.epoch==1: raise SystemExit(143)
    args = ['--data', birds, *small, '--method', 'plain', '--epochs', 2]
    assert here(*args, '--out', tmp_path/'whole').returncode==0
    cbs = safely.safety_cbs
    with monkeypatch.context() as m:
        m.setattr(safely, 'safety_cbs', lambda *o: [*cbs(*o), Die()])
        assert here(*args, '--out', tmp_path/'a').returncode==143
    assert sorted(o.name for o in (tmp_path/'a').iterdir())==['checkpoints']
    res = here(*args, '--out', tmp_path/'a')
    assert res.returncode==1 and 'go on with --resume' in res.stderr
    res = here(*args, '--lr', 1, '--out', tmp_path/'a', '--resume')
    assert res.returncode==1 and 'lr was 0.001 and is 1.0' in res.stderr
    assert here(*args, '--out', tmp_path/'a', '--resume').returncode==0
    a,b = ((tmp_path/o/'history.csv').read_text() for o in ('whole','a'))
    assert a==b and not (tmp_path/'a'/'checkpoints').exists()

def test_diverged(here, birds, tmp_path):
    "A run that diverges says so, leaves no model, and a result file that can be read."
    res = here('--data', birds, *small, '--method', 'plain', '--epochs', 2, '--opt', 'sgd', '--lr', 1e8, '--out', tmp_path/'a')
    assert res.returncode==1 and 'The run diverged in epoch' in res.stderr and 'accuracy' not in res.stdout.splitlines()[-1]
    said = json.loads((tmp_path/'a'/'result.json').read_text())
    assert said['diverged'] and 'learning rate' in said['error'] and not list((tmp_path/'a').glob('model.*'))
    res = here('--data', birds, *small, '--lr', 'inf', '--out', tmp_path/'b')
    assert res.returncode==1 and '--lr is inf' in res.stderr and not (tmp_path/'b').exists()

def test_locked(here, birds, tmp_path):
    "A folder belongs to one run at a time, and what a killed one left half-written is cleared."
    from cekd_fastai.safely import lock_folder
    from cekd_fastai.results import all_or_none
    (tmp_path/'.unfinished-1').mkdir()
    with lock_folder(tmp_path):
        res = here('--data', birds, *small, '--out', tmp_path)
        assert res.returncode==1 and 'still going' in res.stderr
    with all_or_none(tmp_path): pass
    assert not list(tmp_path.iterdir())
