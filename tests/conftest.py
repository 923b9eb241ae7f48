"What several test files share: real photographs where they are at hand, and a fastai home of its own for a test."
import gc,os,shutil,signal,sys,tarfile,tempfile,threading
from pathlib import Path
from types import SimpleNamespace
import pytest

# A job in the background has Ctrl-C ignored, which these tests and the programs that they start would inherit.
ignored = signal.getsignal(signal.SIGINT)==signal.SIG_IGN
if ignored and threading.current_thread() is threading.main_thread(): signal.signal(signal.SIGINT, signal.default_int_handler)

def data_folder():
    "The folder of archives with real data: `CEKD_DATA`, or `../shared/data` beside the repository; it need not exist."
    return Path(os.environ.get('CEKD_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')

def extracted(arch, cache):
    "Folder under `cache` with the contents of `arch`, extracted at most once; a half-finished extraction is never seen."
    dest = Path(cache)/f'{arch.stem}-{arch.stat().st_size}'
    if not dest.exists():
        dest.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(dir=dest.parent))
        try:
            with tarfile.open(arch) as f: f.extractall(tmp, **(dict(filter='data') if hasattr(tarfile, 'data_filter') else {}))
            try: tmp.rename(dest)
            except OSError:
                if not dest.exists(): raise # else another process was faster
        finally: shutil.rmtree(tmp, ignore_errors=True)
    inner = [o for o in dest.iterdir()]
    return inner[0] if len(inner)==1 and inner[0].is_dir() else dest

@pytest.fixture(scope='session')
def real_data():
    "`real_data(name)` is the extracted folder of archive `name`.tgz; the test is skipped where there is none."
    def get(name):
        arch = data_folder()/f'{name}.tgz'
        if not arch.is_file(): pytest.skip(f'no {arch}: set CEKD_DATA to a folder that holds {arch.name}')
        return extracted(arch, Path.home()/'.cache'/'cekd_fastai_tests')
    return get

def pytest_configure(config):
    "A worker, which is about to import every test, lends what they import to the processes that tests start."
    if not hasattr(config, 'workerinput'): return
    import forks # here, since the process that hands out the tests needs no torch
    forks.serve()

def pytest_collection_finish(session):
    "What the imports have made stays: the collector need not walk through it again, and seeding for a GPU that is not there need not keep its stack."
    if (torch := sys.modules.get('torch')) is None: return # the process that hands out the tests
    gc.collect()
    gc.freeze()
    if torch.cuda.is_available(): return
    for o in (torch.cuda, torch.xpu, torch.mtia): o.traceback = SimpleNamespace(format_stack=list) # a millisecond for each of thousands of seeds

def pytest_sessionfinish(session): gc.unfreeze() # at the end some of it counts what nobody has collected

@pytest.fixture(autouse=True)
def no_figures_left():
    "A test finds no open figure of the test before it: which tests share a process is for the machine to choose."
    yield
    if (plt := sys.modules.get('matplotlib.pyplot')) is not None: plt.close('all')

@pytest.fixture
def fastai_home(tmp_path, monkeypatch):
    "An empty fastai home, with the folders `archive` and `data` that fastai downloads and extracts to."
    from fastai.data.external import fastai_cfg # here, since the process that hands out the tests needs none of it
    home = tmp_path/'fastai_home'
    monkeypatch.setenv('FASTAI_HOME', str(home))
    fastai_cfg.cache_clear()
    yield home
    fastai_cfg.cache_clear()
