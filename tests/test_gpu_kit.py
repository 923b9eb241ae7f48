"Every mix and every method trains a step on a GPU that knows shapes only, which no step may wait for."
import ast,json,sys
from pathlib import Path
import pytest,torch
from torch import nn
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'/'gpu'))
from cases import CASES
from cells import all_cuda_cells,cuda_tests,missing_names,slice_cells,files_of_tests
from fake import FakeGPU,Waits,fake_step

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.mark.parametrize('name', [k for k,o in CASES.items() if not o.real])
def test_a_step_never_waits_for_the_device(name):
    learn = fake_step(CASES[name])
    assert learn.loss.device.type=='cuda' and not learn.loss.shape
    assert all(o.device.type=='cuda' for o in learn.model.parameters())

# --- the test can fail: what a loss does wrong is seen, within any method

# chkstyle: ignore-node
faults = dict(item=lambda z: z.sum().item(), bool=lambda z: bool(z.sum()>0), tolist=lambda z: z.tolist(), cpu=lambda z: z.cpu(),
    mask=lambda z: z[z>0], nonzero=lambda z: z.nonzero(), cpu_index=lambda z: z[torch.tensor([0,1], device='cpu')],
    from_python=lambda z: z*torch.tensor(2., device=z.device),
    blocking_copy=lambda z: z*torch.rand(z.shape, device='cpu').to(z.device),
    other_device=lambda z: z*torch.rand(z.shape, device='cpu'))

class Faulty(nn.CrossEntropyLoss):
    "A cross-entropy that does something else beside"
    def __init__(self, fault, **kwargs):
        super().__init__(**kwargs)
        self.fault = fault
    def forward(self, z, y):
        self.fault(z.detach())
        return super().forward(z, y)

@pytest.mark.parametrize('fault', faults)
def test_a_loss_that_waits_is_seen(fault):
    with pytest.raises(RuntimeError, match='waits for it|same device|different devices|Device Propagation'):
        fake_step(CASES['CEKD + CutMix, batch'], Faulty(faults[fault]))

@pytest.mark.parametrize('method', ['plain + CutMix, batch','online one','CSS','MEAL, two branches, labels, CutMix'])
def test_a_loss_that_waits_is_seen_in_other_methods(method):
    with pytest.raises(Waits): fake_step(CASES[method], Faulty(faults['item']))

def test_what_a_gpu_does_without_waiting_is_allowed():
    with FakeGPU() as gpu:
        gpu.watching = True
        x = torch.zeros(4, 3, device='cuda')
        y = x + torch.rand(3, device='cpu').to('cuda', non_blocking=True)
        y = y[torch.zeros(2, dtype=torch.long, device='cuda')]*torch.tensor(2.)
        assert y.device.type=='cuda' and y.shape==(2,3)
        assert 0<=torch.rand(1, device='cpu').item()<1
    assert torch.ones(2).sum().item()==2

# --- what the kit takes along can run there

repo = Path(__file__).resolve().parents[1]

def test_cells_for_a_gpu_find_what_they_need():
    parts = all_cuda_cells(repo/'nbs')
    assert parts, 'no notebook has a cell for a GPU'
    assert {o['notebook']:lost for o in parts if (lost := missing_names(o))}=={}

def test_cells_take_along_what_writes_their_files():
    "A call for its effect on something that is needed goes along, one that only checks or shows does not."
    cells = ["path = 'birds'\nmake_birds(path, n=4)\ntest_eq(path, 'birds')\nprint(path)\nother = 3\nmake_birds(other)", 'dls = load(path)', 'use(dls)']
    assert slice_cells(cells, {2}, set())[0]==[(0,"path = 'birds'\nmake_birds(path, n=4)"),(1,'dls = load(path)'),(2,'use(dls)')]

def test_tests_for_a_gpu_find_what_they_import():
    "Modules of the folder of tests that they import go along"
    files = files_of_tests(repo/'tests')
    local = {o.stem for o in (repo/'tests').glob('*.py')}
    needed = set()
    for f in files:
        for o in ast.walk(ast.parse(f.read_text())):
            if isinstance(o, ast.Import): needed |= {a.name for a in o.names}
            if isinstance(o, ast.ImportFrom): needed.add(o.module)
    assert {'forks'}<=needed and needed&local<={o.stem for o in files}

def test_tests_for_a_gpu_are_found(tmp_path):
    assert cuda_tests(repo/'tests')
    (tmp_path/'test_a.py').write_text("@pytest.mark.skipif(not torch.cuda.is_available(), reason='')\ndef test_x(): pass\ndef test_y(): pass\n")
    assert cuda_tests(tmp_path)==['test_a.py::test_x']

def test_what_failed_on_a_card_runs_first(tmp_path, monkeypatch):
    "By the last line of an item, whatever its stage writes before the name"
    import checks
    (tmp_path/'results').mkdir()
    lines = [('compiled','compile: c',False),('compiled','compile: b',False),('compiled','compile: b',True),('sync','a',False)]
    (tmp_path/'results'/'card.jsonl').write_text(''.join(json.dumps(dict(stage=s, item=i, ok=ok))+'\n' for s,i,ok in lines))
    monkeypatch.setattr(checks, 'here', tmp_path)
    assert list(checks.Run('compiled', tmp_path, 9, True).each('abcd'))==['c','a','b','d']
    assert list(checks.Run('sync', tmp_path, 9, True).each('cba'))==['a','c','b']
