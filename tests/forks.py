"""Processes for tests that need one. Python needs seconds to import torch, fastai and timm; here a server imports them once, and each process is forked from it.
This package and the tests' modules are not among what it has imported, so a script meets them as in a process of its own."""
import faulthandler,gc,importlib,multiprocessing,os,runpy,shutil,signal,subprocess,sys,tempfile,time,torch,warnings
from contextlib import redirect_stderr
from io import StringIO
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

_here = Path(__file__).resolve().parent
_forks = 'forkserver' in multiprocessing.get_all_start_methods() and not torch.cuda.is_available() # a process that uses CUDA cannot be forked
_ctx = multiprocessing.get_context('forkserver' if _forks else 'spawn')
_preload = ['fastai.vision.all','timm']
if _forks: _ctx.set_forkserver_preload(_preload)

def _forked(exe, args, fds):
    "What `multiprocessing` has a new interpreter do for the server, done in a fork of this process, where nothing of pytest is at work and of its open files only `fds`"
    if pid := os.fork(): return pid
    try:
        forkserver._forkserver.__init__() # the lock that this process holds now
        sys.modules.pop('conftest', None)
        sys.meta_path[:] = [o for o in sys.meta_path if not type(o).__module__.startswith('_pytest')] # it rewrites assertions
        sys.excepthook,sys.unraisablehook = sys.__excepthook__,sys.__unraisablehook__
        faulthandler.disable()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in map(int, os.listdir('/proc/self/fd')):
            if fd>2 and fd not in (null,*fds): os.dup2(null, fd, inheritable=False)
        gc.collect()
        gc.freeze()
        exec(args[-1], {})
    finally: os._exit(1)

def serve():
    """Fork the server from this process, so that both import once what it needs; without this call the first process that is started has a server made, which imports it.
    Nothing is imported yet that a script should not meet, and torch has started no thread."""
    if not (_forks and sys.platform=='linux'): return
    with redirect_stderr(StringIO()): # warnings about their own imports; a fault is raised
        for o in _preload: importlib.import_module(o)
    with patch.object(forkserver.util, 'spawnv_passfds', _forked), warnings.catch_warnings():
        warnings.simplefilter('ignore') # of Python 3.12, about the thread in which a worker of pytest listens
        forkserver.ensure_running()

def _enter(env, folder):
    "What a new process has of its own: variables, answers to signals, and files for what it writes"
    os.environ.clear()
    os.environ.update(env)
    if hub := sys.modules.get('huggingface_hub.constants'): hub.HF_HUB_OFFLINE = env.get('HF_HUB_OFFLINE')=='1' # it was read in the server
    for o in ('SIGINT','SIGTERM','SIGHUP'):
        if hasattr(signal, o): signal.signal(getattr(signal, o), signal.default_int_handler if o=='SIGINT' else signal.SIG_DFL)
    for fd,name in ((1,'stdout'),(2,'stderr')):
        os.dup2(os.open(Path(folder)/name, os.O_WRONLY|os.O_CREAT|os.O_APPEND), fd)
        setattr(sys, name, open(fd, 'w', buffering=1, closefd=False))

def _script(env, folder, script, args):
    _enter(env, folder)
    if isinstance(script, str):
        (file := Path(folder)/'script.py').write_text(script)
        script = file
    sys.path[:] = [str(script.parent), *(o for o in sys.path if Path(o).resolve() not in (_here, _here.parent/'tools'))]
    sys.argv = [str(script),*args]
    runpy.run_path(str(script), run_name='__main__')

def _function(env, folder, f, args):
    _enter(env, folder)
    f(*args)

class Process:
    "A running process as `subprocess.Popen` has it; what it wrote is in `stdout` and `stderr` once it has ended"
    def __init__(self, target, *args, env=()):
        self.folder = Path(tempfile.mkdtemp())
        self.p = _ctx.Process(target=target, args=(dict(os.environ)|dict(env), str(self.folder), *args))
        self.p.start()
    returncode = property(lambda self: self.p.exitcode)
    def written(self, name='stdout'):
        "What it has written so far"
        file = self.folder/name
        return file.read_text() if file.exists() else ''
    def send_signal(self, n): os.kill(self.p.pid, n)
    def kill(self): self.p.kill()
    def wait(self, timeout=300):
        "Its exit status; a process that takes longer is ended"
        self.p.join(timeout)
        late = self.p.exitcode is None
        if late:
            self.kill()
            self.p.join()
        self.stdout,self.stderr = self.written(),self.written('stderr')
        shutil.rmtree(self.folder, ignore_errors=True)
        if late: raise subprocess.TimeoutExpired(self.p.name, timeout, self.stdout, self.stderr)
        return self.returncode
    def until(self, test, timeout=300):
        "Wait until `test()`, or until the process has ended; it is killed if that takes longer."
        end = time.monotonic()+timeout
        while not (res := test()) and self.returncode is None:
            if time.monotonic()>end: self.kill()
            time.sleep(.01)
        return res

def start(script, *args, env=()):
    "Run `script`, a file or the text of one, as `python script args` does, with `env` besides the variables of this process."
    return Process(_script, script, [str(o) for o in args], env=env)

def run(script, *args, env=(), timeout=300):
    "`start`, and wait for the end; what comes back is that of `subprocess.run`."
    p = start(script, *args, env=env)
    p.wait(timeout)
    return subprocess.CompletedProcess([script,*args], p.returncode, p.stdout, p.stderr)

def _ranked(f, file, rank, world):
    if world>1: torch.distributed.init_process_group('gloo', init_method=f'file://{file}.init', rank=rank, world_size=world)
    torch.save(f(rank, world), f'{file}.{world}.{rank}')

def one_and_two(
    f,   # function of a module, called with rank and number of processes; what it returns is saved
    tmp, # folder for the results
):
    "What `f` returns in a process alone, and in each of two that work together; all three run side by side."
    file = Path(tmp)/'ranked'
    def _start(rank, world):
        env = {} if world==1 else dict(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1')
        return Process(_function, _ranked, (f, str(file), rank, world), env=env|dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    ps = [_start(0, 1), _start(0, 2), _start(1, 2)]
    for p in ps: p.until(lambda: any(o.returncode for o in ps)) # when one fails, the other would wait for it
    if any(o.returncode for o in ps):
        for p in ps: p.kill()
    for p in ps: p.wait()
    assert not any(p.returncode for p in ps), '\n'.join(p.stderr[-3000:] for p in ps)
    return [torch.load(f'{file}.{o}', weights_only=False) for o in ('1.0','2.0','2.1')]
