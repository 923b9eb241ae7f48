"Processes that run jobs: several on one GPU, side by side where its driver can do that, or on processors."
import os,shutil,subprocess,sys,threading,time
import multiprocessing as mp
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path

here = Path(__file__).resolve().parent

# Several processes on one GPU

MPS_TOOLS = ('nvidia-cuda-mps-control','/usr/local/nvidia/bin/nvidia-cuda-mps-control')
MPS_TEST = """import ctypes
c,p,d,n = ctypes.CDLL('libcuda.so.1'),ctypes.c_void_p(),ctypes.c_int(),ctypes.c_size_t(1<<20)
for f in (lambda: c.cuInit(0), lambda: c.cuDeviceGet(ctypes.byref(d), 0), lambda: c.cuDevicePrimaryCtxRetain(ctypes.byref(p), d),
    lambda: c.cuCtxSetCurrent(p), lambda: c.cuMemAlloc_v2(ctypes.byref(p), n)):
    if r := f(): raise SystemExit(r)
"""

def quiet(cmd, env, seconds, **kw):
    "Exit code of a command that says nothing"
    return subprocess.run(cmd, env=os.environ|env, timeout=seconds, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kw).returncode

def start_mps(folder):
    "Let kernels of several processes run side by side, where the driver's tool works; its environment, None without"
    tool = next((o for o in map(shutil.which, MPS_TOOLS) if o), None)
    if tool is None: return None
    env = dict(CUDA_MPS_PIPE_DIRECTORY=str(folder/'pipe'), CUDA_MPS_LOG_DIRECTORY=str(folder/'log'), MPS_TOOL=tool)
    for o in ('pipe','log'): (folder/o).mkdir(exist_ok=True)
    try:
        if quiet([tool,'-d'], env, 10): return None
        if not quiet([sys.executable,'-c',MPS_TEST], env, 20): return env
    except (subprocess.TimeoutExpired,OSError): pass
    stop_mps(env)
    return None

def stop_mps(env):
    if env is None: return
    try: quiet([env['MPS_TOOL']], env, 5, input=b'quit\n')
    except (subprocess.TimeoutExpired,OSError): pass

def about(device):
    "Versions and machine of this process"
    import fastai,platform,timm,torch,torchvision
    versions = {o.__name__:o.__version__ for o in (torch,torchvision,fastai,timm)} | dict(python=platform.python_version())
    gpu = torch.cuda.get_device_name() if device=='cuda' else None
    return dict(versions=versions, machine=dict(platform=platform.platform(), cores=os.cpu_count(), gpu=gpu))

def short(e): return dict(error=f'{type(e).__name__}: {str(e)[:300]}')

def begin_bench(bundle, data, c, device):
    "What runs the jobs of a study, or of several"
    if 'studies' in c: return Several(bundle, data, c, device)
    return import_module(c.get('trainer', 'birds_train')).Bench(bundle, *data[c['name']], c, device)

class Several:
    "The benches of several studies, each set up when it is first needed"
    def __init__(self, bundle, data, c, device): self.args,self.c,self.benches,self.layout = (bundle,data,device),c,{},'channels_last'
    def run(self, j, deadline):
        bundle,data,device = self.args
        name = j['study']
        if name not in self.benches: self.benches[name] = begin_bench(bundle, data, self.c['studies'][name], device)
        self.benches[name].layout = self.layout
        return self.benches[name].run(j, deadline)

def end_with_parent():
    "End this process as soon as the one that began it has ended, since nobody would hear its answer"
    def watch():
        wait([mp.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()

def work(conn, src, *args):
    "A worker: answers each message with one, but for `layout`"
    end_with_parent()
    try:
        sys.path[:0] = src
        bench = begin_bench(*args)
        conn.send(('ready',about(args[-1])))
        while True:
            what,*rest = conn.recv()
            try:
                if what=='layout': bench.layout = rest[0]
                else: conn.send((what,getattr(bench, what)(*rest)))
            except Exception as e: conn.send((what,short(e)))
    except (EOFError,KeyboardInterrupt): pass
    except Exception as e: conn.send(('failed',short(e)['error']))

class Pool:
    "Worker processes, each with a pipe"
    def __init__(self, n, args, env):
        self.ctx,self.args,self.env,self.workers = mp.get_context('spawn'),args,env or {},{}
        for _ in range(n): self.add()

    def add(self):
        mine,theirs = self.ctx.Pipe()
        was = {k:os.environ.get(k) for k in self.env}
        os.environ.update(self.env)
        p = self.ctx.Process(target=work, args=(theirs,[str(here),str(here.parent)],*self.args), daemon=True)
        p.start()
        for k,v in was.items(): os.environ.pop(k) if v is None else os.environ.update({k:v})
        theirs.close()
        self.workers[mine] = p

    def drop(self, conn):
        self.workers.pop(conn).kill()
        conn.close()

    def answers(self, conns, until):
        "What these workers say, as it comes: `(conn, what, value)`; `failed` for one that ended"
        for conn in wait(conns, min(max(0, until-time.time()), 1e6)): # longer waits overflow
            try: what,value = conn.recv()
            except (EOFError,OSError): what,value = 'failed','the process ended'
            yield conn,what,value

    def gather(self, conns, until):
        "One answer of each that comes in time"
        res,conns = {},list(conns)
        while conns and time.time()<until:
            for conn,what,value in self.answers(conns, until):
                conns.remove(conn)
                if what=='failed' or isinstance(value, dict) and 'error' in value:
                    print(f'worker: {value}', flush=True)
                    self.drop(conn)
                else: res[conn] = value
        return res

    def close(self):
        for conn in list(self.workers): self.drop(conn)
