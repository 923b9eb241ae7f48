"""Kill a run at random moments and at each of its renames, fill the disk, kill its workers, spoil its files: does it go on, and end with the same weights?

    python benchmarks/faults.py

One process loads the library and builds a network, and every run is a fork of it, so that no kill costs an import. A run of six steps writes a checkpoint after each of them, and after each of its two epochs.
After each fault the same call goes on; its weights are compared bit for bit with those of a run that nothing happened to."""
import argparse,collections,errno,hashlib,json,os,random,shutil,signal,tempfile,time,warnings
from pathlib import Path
from functools import partial
from common import here
import torch
from fastai.vision.all import Callback,CrossEntropyLossFlat,DataLoaders,L,set_seed
from cekd_fastai.cekd import CEKD
from cekd_fastai.checkpoint import Checkpoint
from cekd_fastai.learner import branch_learner
from cekd_fastai.mix.callback import CutMix
from cekd_fastai.runstate import checkpoint_files

class Pictures:
    "Small random pictures; a worker that reads number `deadly` kills itself"
    def __init__(self, items, deadly=None): self.items,self.deadly = items,deadly
    def __len__(self): return len(self.items)
    def __getitem__(self, i):
        if i==self.deadly and torch.utils.data.get_worker_info(): os.kill(os.getpid(), signal.SIGKILL)
        return self.items[i]
    def new_empty(self): return Pictures([])

def learner(deadly=None, num_workers=0):
    g = torch.Generator().manual_seed(0)
    items = L(zip(torch.randn(12, 3, 16, 16, generator=g), torch.randint(0, 3, (12,), generator=g)))
    train = items if deadly is None else Pictures(items, deadly)
    dls = DataLoaders.from_dsets(train, items[:4], bs=4, device='cpu', num_workers=num_workers, shuffle=True)
    dls.c = 3
    set_seed(1)
    return branch_learner(dls, 'cifar_resnet8', pretrained=False, loss_func=CrossEntropyLossFlat(), cbs=[CutMix(),CEKD()])

LEARN = {} # Built once, and trained in forks alone

def train(folder, before=None, cbs=(), which='plain'):
    "The run, and the checksum of its weights"
    set_seed(1)
    learn = LEARN[which]
    learn.add_cbs([Checkpoint(folder, every=1), *cbs])
    if before: before()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
    h = hashlib.sha256()
    for v in learn.model.state_dict().values(): h.update(v.contiguous().numpy().tobytes())
    return h.hexdigest()

def forked(f, kill_after=None):
    "What `f` gives in a fork of this process: `(answer or None, exit code, last words)`; killed after so many seconds"
    r,w = os.pipe()
    pid = os.fork()
    if pid==0:
        os.close(r)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        warnings.simplefilter('ignore')
        try: res,code = dict(ok=f()),0
        except BaseException as e: res,code = dict(said=f'{type(e).__name__}: {e}'),1
        os.write(w, json.dumps(res).encode()[:60_000])
        os._exit(code)
    os.close(w)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(r, 'rb') as p: text = p.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(text) if text else {},code

def left_over(folder):
    "Files in the folder of checkpoints that are none"
    return [o.name for o in folder.iterdir() if not o.name.endswith('.ckpt') or o.name[0]=='.'] if folder.exists() else []

def goes_on(folder, whole):
    "Outcome of the same call again"
    res,code = forked(lambda: train(folder))
    if left_over(folder): return f'left {left_over(folder)[0]}'
    return 'the same weights' if res.get('ok')==whole else 'other weights' if 'ok' in res else res.get('said', f'exit code {code}')

def at_call(name, n):
    "Kill this process at call number `n` of a function of `os`, before or after it is done"
    old,count = getattr(os, name),[0]
    def new(*args, **kw):
        count[0] += 1
        if count[0]==n//2 and n%2==0: os.kill(os.getpid(), signal.SIGKILL)
        res = old(*args, **kw)
        if count[0]==n//2 and n%2: os.kill(os.getpid(), signal.SIGKILL)
        return res
    setattr(os, name, new)

def count_calls(name, tmp):
    "How often a whole run calls a function of `os`"
    def f():
        n,old = [0],getattr(os, name)
        def new(*args, **kw):
            n[0] += 1
            return old(*args, **kw)
        setattr(os, name, new)
        train(tmp/'count')
        return n[0]
    return forked(f)[0]['ok']

def random_kills(tmp, whole, n, seconds, rng):
    "Moments are drawn until `n` kills have met a run that had not ended"
    kills = 0
    while kills<n:
        shutil.rmtree(folder := tmp/'random', ignore_errors=True)
        _,code = forked(lambda: train(folder), rng.uniform(.02, 1)*seconds)
        again = goes_on(folder, whole)
        if code!=-9 and again=='the same weights': continue
        kills += 1
        yield ('killed' if code==-9 else 'it had ended'),again

def rename_kills(tmp, whole):
    "Before and after each rename of a whole run"
    for n in range(2, 2*count_calls('replace', tmp)+2):
        folder = tmp/f'rename{n}'
        _,code = forked(lambda: train(folder, partial(at_call, 'replace', n)))
        yield 'killed' if code==-9 else f'exit code {code}',goes_on(folder, whole)

def sync_kills(tmp, whole):
    "In the midst of each file, before it is forced to the disk"
    for n in range(2, 2*count_calls('fsync', tmp)+2, 4):
        folder = tmp/f'sync{n}'
        _,code = forked(lambda: train(folder, partial(at_call, 'fsync', n)))
        yield 'killed' if code==-9 else f'exit code {code}',goes_on(folder, whole)

def full_disks(tmp, whole):
    "No room from some write on, then room again"
    def full(n):
        old,count = os.fsync,[0]
        def new(fd):
            count[0] += 1
            if count[0]>n: raise OSError(errno.ENOSPC, 'No space left on device')
            return old(fd)
        os.fsync = new
    for n in (0,2,5,9):
        folder = tmp/f'full{n}'
        res,_ = forked(lambda: train(folder, partial(full, n)))
        yield 'training went on' if res.get('ok')==whole else res.get('said', 'killed'),goes_on(folder, whole)

class Spoil(Callback):
    "Spoils the newest checkpoint after an epoch, and ends the run there"
    order = 3000
    def __init__(self, folder, how): self.where,self.how = folder,how
    def after_epoch(self):
        if self.epoch: return
        self.how(checkpoint_files(self.where)[-1])
        os.kill(os.getpid(), signal.SIGKILL)

def cut(f): os.truncate(f, f.stat().st_size//2)
def empty(f): os.truncate(f, 0)
def bit(f):
    b = bytearray(f.read_bytes())
    b[len(b)//2] ^= 1
    f.write_bytes(b)
def gone(f): f.unlink()
def other(f): f.write_bytes(b'something else')
def noise(f): f.write_bytes(os.urandom(5000))

def spoilt(tmp, whole):
    "The newest checkpoint, between two epochs"
    for how in (cut,empty,bit,gone,other,noise):
        folder = tmp/f'spoil-{how.__name__}'
        forked(lambda: train(folder, cbs=[Spoil(folder, how)]))
        again = goes_on(folder, whole)
        yield 'killed', 'the same weights' if again.endswith('.bad') and len(list(folder.glob('*.bad')))==1 and forked(lambda: train(folder))[0].get('ok')==whole else again

def dead_workers(tmp, whole):
    "A process that loads pictures is killed"
    from cekd_fastai.safely import named_faults
    def f(folder):
        with named_faults(): return train(folder, which='deadly')
    for i in range(2):
        folder = tmp/f'worker{i}'
        start = time.time()
        res,_ = forked(lambda: f(folder))
        yield f"one sentence: {res.get('said', '')[:60]} …" if 'was killed' in res.get('said', '') else str(res), goes_on(folder, whole)

def words(d): return '; '.join(f'{v} × {k}' if len(d)>1 else k for k,v in d.items())

def write(kills, row):
    "Put the row of one campaign into the result file"
    file = here/'results'/'faults.json'
    rows = json.loads(file.read_text())['runs'] if file.exists() else []
    rows = [o for o in rows if o['fault']!=row['fault']]+[row]
    head = ['fault','runs','what the run did','and after the same call again']
    cells = [[o['fault'],o['runs'],words(o['at_once']),words(o['again'])] for o in rows]
    table = '\n'.join(f"| {' | '.join(map(str, o))} |" for o in [head,['---']*len(head),*cells])
    res = dict(title='Faults of a run', command=f'python benchmarks/faults.py --kills {kills}', machine=dict(cores=os.cpu_count()), versions=dict(torch=torch.__version__), runs=rows, table=table)
    file.write_text(json.dumps(res, indent=1)+'\n')

def main(kills, only):
    "Rows of the campaigns whose names begin with one of these words"
    tmp = Path(tempfile.mkdtemp())
    LEARN.update(plain=learner(), deadly=learner(7, 1))
    start = time.time()
    whole = forked(lambda: train(tmp/'whole'))[0]['ok']
    seconds = time.time()-start
    campaigns = {f'killed at {kills} random moments': random_kills(tmp, whole, kills, seconds, random.Random(0)), 'killed before and after each rename': rename_kills(tmp, whole),
        'killed before and after each file is forced to the disk': sync_kills(tmp, whole), 'the disk is full from some file on': full_disks(tmp, whole),
        'the newest checkpoint is spoilt between two epochs': spoilt(tmp, whole), 'a worker is killed': dead_workers(tmp, whole)}
    for name,outcomes in campaigns.items():
        if only and not name.startswith(tuple(only)): continue
        seen = list(outcomes)
        count = collections.Counter(o[1] for o in seen)
        row = dict(fault=name, runs=len(seen), at_once=dict(collections.Counter(o[0] for o in seen)), again=dict(count))
        print(row, flush=True)
        write(kills, row)
    shutil.rmtree(tmp, ignore_errors=True)

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--kills', type=int, default=50)
    p.add_argument('--only', nargs='*', default=[], help='first words of campaigns')
    a = p.parse_args()
    torch.set_num_threads(1)
    main(a.kills, a.only)
