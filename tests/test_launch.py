"Several processes started from a notebook, and what `--launch` and `accelerate launch` start."
import signal,socket,sys
import forks,pytest,torch
from accelerate.commands import launch as accelerate_launch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError,ProcessFailure
from cekd_fastai import cli
from cekd_fastai.runstate import checkpoint_files
from cekd_fastai.synthetic import make_birds

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
    res = forks.run(SCRIPT, tmp, env=dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''), timeout=500)
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

NODE = """
import os,signal,sys
from torch.distributed.launcher.api import LaunchConfig,elastic_launch
from cekd_fastai import cli
from cekd_fastai.checkpoint import Checkpoint
node,port,die,*words = sys.argv[1:]

def train():
    old = Checkpoint.after_epoch
    def after_epoch(self):
        old(self)
        if die=='1' and os.environ['RANK']=='1': os.kill(os.getpid(), signal.SIGKILL)
    Checkpoint.after_epoch = after_epoch
    cli.cekd_train(**cli.given(words))

# as `torchrun --nnodes 2 --node-rank node --nproc-per-node 1 --master-addr 127.0.0.1 --master-port port`, without a new Python for the training
config = LaunchConfig(2, 2, 1, run_id='none', rdzv_backend='static', rdzv_endpoint=f'127.0.0.1:{port}', rdzv_configs=dict(rank=int(node)), max_restarts=0, start_method='fork')
elastic_launch(config, train)()
"""

def two_nodes(outs, *words, die=False):
    "Two launchers with one process each, which share a port"
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    env = dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    ps = [forks.start(NODE, k, port, int(die), '--out', o, *words, env=env) for k,o in enumerate(outs)]
    for p in ps: p.wait(120)
    return ps

def test_two_nodes(tmp_path):
    "One node is lost after the first epoch: the other ends with a sentence, both go on from a folder that they share, and only the first writes."
    make_birds(tmp_path/'birds', n_species=3, n_images=8, n_train=5, size=40, n_workers=0, progress=False)
    words = f'--data {tmp_path/"birds"} --arch cifar_resnet8 --no-pretrained --method plain --size 32 --bs 2 --epochs 2 --num-workers 0 --device cpu'.split()
    out,other = tmp_path/'run',tmp_path/'other'
    ps = two_nodes([out,other], *words, die=True)
    assert all(p.returncode for p in ps) and 'Another process of this run has ended; what was written stays' in ps[0].stderr
    assert [o.name for o in checkpoint_files(out/'checkpoints')]==['checkpoint-00-0000-000001.ckpt','checkpoint-00-0001-000000.ckpt'] and not other.exists()
    ps = two_nodes([out,other], *words, '--resume')
    assert all(p.returncode for p in ps) and 'have found different checkpoints: use a folder that all machines share' in ps[0].stderr
    ps = two_nodes([out,out], *words, '--resume')
    assert [p.returncode for p in ps]==[0,0], ps[1].stderr
    assert len((out/'history.csv').read_text().splitlines())==3 and not (out/'checkpoints').exists()
    assert 'accuracy' in ps[0].stdout and 'accuracy' not in ps[1].stdout and not other.exists()
