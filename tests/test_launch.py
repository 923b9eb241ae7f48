"Several processes started from a notebook, and what `--launch` and `accelerate launch` start."
import signal,sys
import processes,pytest,torch
from accelerate.commands import launch as accelerate_launch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError,ProcessFailure
from cekd_fastai import cli

SCRIPT = """
import os,socket,sys
from contextlib import nullcontext
from fastai.vision.all import *
from fastai.distributed import *
from accelerate import notebook_launcher
from cekd_fastai.all import *
folder = Path(sys.argv[1])
torch.set_num_threads(1)
default_device(False)

def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]

def train(name, bs, in_notebook=False):
    set_seed(1)
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(8, 3, 16, 16, generator=g), torch.randint(0, 3, (8,), generator=g)))
    dls = DataLoaders.from_dsets(items, items, bs=bs, device='cpu', shuffle=False, num_workers=0)
    dls.c = 3
    learn = branch_learner(dls, 'cifar_resnet8', 1, pretrained=False, freeze_bn=True, loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    ctx = learn.distrib_ctx(in_notebook=in_notebook) if name!='one' else nullcontext()
    with ctx, learn.no_bar(), learn.no_logging():
        learn.fit(2, .05)
        n = torch.distributed.get_world_size() if name!='one' else 1
    torch.save((n,[p.data for p in learn.model.parameters()]), folder/f'{name}{rank_distrib()}.pth')

train('one', 8)
notebook_launcher(train, ('notebook',4,True), num_processes=2, use_port=str(free_port()))
"""

@pytest.fixture(scope='module')
def launched(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('launched')
    res = processes.run(SCRIPT, tmp, env=dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''), timeout=500)
    assert res.returncode==0, res.stderr[-3000:]
    return tmp

def test_two_are_one(launched):
    "Two processes of a notebook end where one process with the joined batch does."
    _,one = torch.load(launched/'one0.pth')
    for k in range(2):
        n,ps = torch.load(launched/f'notebook{k}.pth')
        assert n==2 and all(torch.allclose(p, q, atol=1e-5) for p,q in zip(ps, one))

WORDS = '--data birds --bs 4 --device cpu'.split()

def test_what_launch_starts(monkeypatch, capsys):
    "`--launch N` is the line of `torchrun` in the guide, and ends as that does."
    seen = []
    monkeypatch.setattr(torchrun, 'main', seen.append)
    monkeypatch.setattr(sys, 'argv', ['cekd-train','--launch','2',*WORDS])
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(SystemExit) as e: cli._launch(cli.given())
    a = torchrun.parse_args(seen[0])
    assert not e.value.code and (a.nproc_per_node,a.standalone,a.module,a.training_script,a.training_script_args)==('2',True,True,'cekd_fastai.cli',WORDS)
    def told(words): raise SignalException('told to stop', signal.SIGTERM)
    monkeypatch.setattr(torchrun, 'main', told)
    with pytest.raises(SystemExit) as e: cli._launch(cli.given())
    assert e.value.code==143
    for code,leaves in ((3,3), (-9,137)):
        def failed(words): raise ChildFailedError('cekd-train', {1:ProcessFailure(1, 77, code, '/none')})
        monkeypatch.setattr(torchrun, 'main', failed)
        with pytest.raises(SystemExit) as e: cli._launch(cli.given())
        assert e.value.code==leaves
    assert capsys.readouterr().err.count('process 1 was killed (signal 9)')==1

def test_what_accelerate_starts(monkeypatch):
    "The line of `accelerate launch` in the guide comes to the same."
    seen = []
    monkeypatch.setattr(torchrun, 'run', seen.append)
    words = ['--multi_gpu','--num_processes','2','-m','cekd_fastai.cli',*WORDS]
    accelerate_launch.launch_command(accelerate_launch.launch_command_parser().parse_args(words))
    a = seen[0]
    assert (int(a.nproc_per_node),a.module,a.training_script,list(a.training_script_args))==(2,True,'cekd_fastai.cli',WORDS)
