"""The checks, each a stage that runs in a process of its own: `python checks.py STAGE --out FOLDER --seconds N`.

A result is a line of `results.jsonl`, written as it comes. What fails is a line too, with the error and the place in the
library where it came from, and the next item goes on."""
import argparse,gc,itertools,json,os,statistics,subprocess,sys,tempfile,time,traceback,warnings
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path

here = Path(__file__).resolve().parent
STAGES = {} # name: function of a `Run`

def stage(f):
    STAGES[f.__name__] = f
    return f

def place(frames):
    "The last frame of the library, as file:line, with what stands there"
    own = [o for o in frames if 'cekd_fastai' in (parts := Path(o.filename).parts) and 'benchmarks' not in parts]
    return f'{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}' if own else None

def failure(e):
    "First and last line of an error, and its place"
    lines = [o.strip() for o in str(e).splitlines() if o.strip()] or ['']
    text = lines[0][:250]+(f' … {lines[-1][:250]}' if len(lines)>1 else '')
    return dict(ok=False, error=f'{type(e).__name__}: {text}', where=place(traceback.extract_tb(e.__traceback__)))

class Run:
    "Where results go, and what is done already"
    def __init__(self, stage, out, seconds, dry):
        self.stage,self.out,self.dry = stage,Path(out),dry
        self.end = time.time()+seconds
        self.begun = self.out/f'{stage}.begun' # names the item that runs now
        if self.begun.exists(): self.died()
        rows = done_rows(self.out)
        last = {r['item']:r for r in rows_of(*(here/'results').glob('*.jsonl')) if r['stage']==stage}
        self.failed = {k.rpartition(': ')[2] for k,r in last.items() if r.get('ok') is False} # when the kit last ran on a card
        self.done = {r['item'] for r in rows if r['stage']==stage and (r.get('ok') is not False or r.get('died'))}

    def died(self):
        "The process before this one ended within an item: that is its result, and it is not run again"
        self.note(self.begun.read_text(), ok=False, died=True, error='the process ended while this ran')
        self.begun.unlink()

    def note(self, item, **row):
        "Write a result"
        line = json.dumps(dict(stage=self.stage, item=item, **row), default=str)+'\n'
        with open(self.out/'results.jsonl', 'a') as f: f.write(line)

    def each(self, items):
        "Items that are not done, while there is time; those that failed last time come first"
        for o in sorted(items, key=lambda o: o not in self.failed):
            if o in self.done: continue
            if time.time()>self.end: return self.note('(rest)', ok=None, note=f'no time left, first not run: {o}')
            yield o

    def do(self, item, f, *args):
        "Run one item and write what it returns"
        start = time.time()
        self.begun.write_text(item)
        try: row = f(*args)
        except Exception as e: row = failure(e)
        self.begun.unlink(missing_ok=True)
        self.note(item, **(dict(ok=True)|(row or {})), seconds=round(time.time()-start, 2))

def done_rows(out): return rows_of(Path(out, 'results.jsonl'))

def rows_of(*files):
    "Results in these files, as far as they exist; a line that was cut off is left out"
    rows = []
    for o in (o for f in files if f.exists() for o in f.read_text().splitlines()):
        try: rows.append(json.loads(o))
        except ValueError: continue
    return rows

def device(run): return 'cpu' if run.dry else 'cuda'

# --- cells of notebooks, and tests

@stage
def cells(run):
    "All `#| cuda` cells of the notebooks"
    import cells as c
    os.environ['IN_TEST'] = '1'
    import matplotlib
    matplotlib.use('Agg')
    parts = json.loads((here/'cells.json').read_text()) if (here/'cells.json').exists() else c.all_cuda_cells(here.parents[1]/'nbs')
    names = {p['notebook']:p for p in parts}
    for nb in run.each(names): run.do(nb, run_cells, names[nb], c)

def run_cells(part, c):
    "Run what a notebook's cells need, then the cells"
    env = c.names_of(part)
    for o in part['cells']:
        try: exec(compile(o['source'], f"{part['notebook']}#{o['id']}", 'exec'), env)
        except Exception as e: return failure(e) | dict(cell=o['id'], asks_for_a_gpu=o['cuda'])
    return dict(cells=sum(o['cuda'] for o in part['cells']))

@stage
def tests(run):
    "The tests that are skipped without a GPU"
    from cells import cuda_tests
    folder = here.parents[1]/'tests'
    ids = [o for o in run.each(cuda_tests(folder))]
    if not ids: return
    with tempfile.TemporaryDirectory() as tmp:
        xml = Path(tmp)/'r.xml'
        cmd = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'--junitxml={xml}', *[str(folder/o) for o in ids]]
        try: p = subprocess.run(cmd, capture_output=True, text=True, timeout=max(run.end-time.time(), 20))
        except subprocess.TimeoutExpired: return run.note('(all)', ok=False, error='ran out of time')
        if not xml.exists(): return run.note('(all)', ok=False, error=(p.stdout+p.stderr)[-400:])
        for o in ET.parse(xml).iter('testcase'):
            bad = o.find('failure') if o.find('failure') is not None else o.find('error')
            skipped = o.find('skipped')
            item = f"{o.get('classname').split('.')[-1]}.py::{o.get('name')}"
            if bad is not None: run.note(item, ok=False, error=(bad.get('message') or '')[:300])
            else: run.note(item, ok=None if skipped is not None else True, note=skipped.get('message') if skipped is not None else None)

# --- waiting for the device

@contextmanager
def watch(found):
    "Collect where the program waits for the device: `file:line` of the library, or of whom else"
    import torch
    def show(message, category, filename, lineno, file=None, line=None):
        if 'synchroniz' not in str(message): return
        frames = traceback.extract_stack()[:-1]
        ours = place(frames)
        other = next((o for o in reversed(frames) if 'warnings' not in o.filename and 'checks.py' not in o.filename), frames[-1])
        found.append(dict(ours=ours, at=f'{Path(other.filename).name}:{other.lineno} {other.line}'))
    with warnings.catch_warnings():
        warnings.simplefilter('always')
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode('warn')
        try: yield found
        finally: torch.cuda.set_sync_debug_mode('default')

def steps_watched(o, extra=()):
    "Steps of a second epoch, the last one watched"
    from cases import begin,make_kit,next_epoch,set_seed
    set_seed(0)
    kit = make_kit('tiny', o, 'cuda', extra)
    learn,found = begin(o.make(kit)),[]
    batches = kit.batches()
    for i,b in enumerate(batches): learn.one_batch(i, b)
    next_epoch(learn)
    for i,b in enumerate(batches[:-1]): learn.one_batch(i, b)
    with watch(found): learn.one_batch(len(batches)-1, batches[-1])
    ours = [f for f in found if f['ours']]
    return dict(ok=not ours, ours=ours[:5], others=[f['at'] for f in found if not f['ours']][:5])

def planted():
    "Whether a number that is read within the watched region is noticed"
    import torch
    found,x = [],torch.rand(8, device='cuda')
    with watch(found):
        x.sum().item()
        x.cpu()
    return dict(ok=len(found)>=2, found=len(found))

@stage
def sync(run):
    "Device synchronisations of a step of every method and mix; in a dry run, on a GPU that knows shapes only"
    from cases import CASES
    from cekd_fastai.core import HalfPrecision
    if run.dry:
        from fake import fake_step
        for k in run.each([k for k,o in CASES.items() if not o.real]): run.do(k, lambda o: dict(note='a GPU that knows shapes only') if fake_step(o) else None, CASES[k])
        return
    for k in run.each(['(planted)']): run.do(k, planted)
    order = sorted(CASES, key=lambda k: not CASES[k].main)
    for k in run.each(order): run.do(k, steps_watched, CASES[k])
    for k in run.each([f'bf16: {k}' for k in order if CASES[k].main]): run.do(k, steps_watched, CASES[k.partition(': ')[2]], [HalfPrecision('bf16')])
    for k in run.each(['fp16: CEKD + SnapMix, batch']): run.do(k, steps_watched, CASES[k.partition(': ')[2]], [HalfPrecision('fp16')])

# --- runs as a user starts them

def pictures(run):
    "Folder of small pictures: photographs where the kit has some, else birds drawn on the spot"
    import names
    folder = here.parents[2]/'data'/'pictures'
    if folder.is_dir(): return folder
    return names.make_birds(Path(tempfile.mkdtemp())/'birds', n_species=8, n_images=24, n_train=16, size=64, progress=False)

@stage
def fit(run):
    "Short runs with loaders, progress, half precision, validation and deployment"
    import torch
    from fastai.vision.all import accuracy,set_seed
    import names
    folder,arch = pictures(run),'cifar_resnet8' if run.dry else 'resnet18'
    size,bs,workers = (32,16,0) if run.dry else (64,64,4)
    dls = lambda: names.fine_grained_dls(folder, size=size, bs=bs, num_workers=workers, device=torch.device(device(run)))
    kw = dict(pretrained=False, metrics=accuracy)
    teacher = lambda d: names.branch_net(arch, d.c, 1, pretrained=False).eval()
    ways = dict( # chkstyle: ignore-node
        cekd=lambda d: names.branch_learner(d, arch, 2, cbs=[names.SnapMix(),names.CEKD()], **kw),
        ema=lambda d: names.branch_learner(d, arch, 2, cbs=[names.CutMix(),names.CEKD(teacher='ema', validate_ema=True)], **kw),
        meal=lambda d: names.meal_learner(d, arch, [teacher(d)], **kw),
        online=lambda d: names.online_learner(d, arch, **kw),
        css=lambda d: names.css_learner(d, (arch,arch), **kw))
    def one(way, precision):
        set_seed(0)
        learn = ways[way](dls())
        if precision and not run.dry: getattr(learn, precision)()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1 if run.dry else 3, 1e-3)
        log = learn.recorder.values
        probs,_ = learn.get_preds()
        with tempfile.TemporaryDirectory() as tmp:
            net = names.load_net(names.deploy(learn, Path(tmp)/'net.pt'))[0]
            x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor).cpu().float()
            with torch.no_grad():
                z = net(x)
                learn.model.eval()
                own = learn.model.cpu()(x)
            apart = (own-z).abs().max().item()
        first,last = log[0][0],log[-1][0]
        good = bool(torch.isfinite(probs).all()) and last==last and apart<1e-3
        return dict(ok=good, train_loss=[round(first, 3),round(last, 3)], accuracy=round(log[-1][-1], 3), deployed_apart=round(apart, 6))
    for k in run.each([f'{w}, {p}' for w in ways for p in ('to_bf16','to_fp16')]): run.do(k, one, *k.split(', '))

# --- half precision, channels last, compile, against float32

# Largest relative difference of a step's loss, and difference of the weights over how far float32 moved them.
LIMITS = dict(repeat=(1e-3,.02), channels_last=(1e-3,.03), compile=(2e-3,.05), fp16=(2e-3,.1), bf16=(5e-3,.3))
N_STEPS = 4

def trained(o, mode, size, dev, backend='inductor'):
    "Losses of a few steps, and the weights before and after, from the same seeds for every mode"
    import torch
    from fastai.callback.channelslast import ChannelsLast
    from cases import begin,make_kit,set_seed
    from cekd_fastai.core import HalfPrecision
    from cekd_fastai.compiled import Compile
    extra = dict(compile=[Compile(backend)], fp16=[HalfPrecision('fp16', init_scale=2.**10)], bf16=[HalfPrecision('bf16')], channels_last=[ChannelsLast()]).get(mode, [])
    set_seed(0)
    kit = make_kit(size, o, dev, extra)
    learn = o.make(kit)
    params = list(learn.model.parameters())
    begin(learn)
    weights = lambda: torch.cat([p.detach().float().flatten() for p in params])
    before,losses,batches = weights(),[],kit.batches()
    for i in range(N_STEPS):
        set_seed(i)
        k = i%len(batches)
        learn.one_batch(k, batches[k])
        losses.append(learn.loss.detach().float())
    return torch.stack(losses).cpu(),before,weights()

def compare(ref, new, mode):
    "How far a mode is from float32"
    (l0,w0,w1),(l,_,w) = ref,new
    loss = ((l-l0).abs()/l0.abs().clamp(min=.1)).max().item()
    moved = ((w-w1).norm()/(w1-w0).norm().clamp(min=1e-12)).item()
    a,b = LIMITS[mode]
    finite = bool(l.isfinite().all() and w.isfinite().all())
    return dict(ok=finite and loss<=a and moved<=b, loss=round(loss, 6), weights=round(moved, 5), limits=[a,b], finite=finite)

def numbers_of(run, k, modes, refs, **kw):
    from cases import CASES
    size,dev = ('tiny' if run.dry else 'small'),device(run)
    for mode in modes:
        item = f'{mode}: {k}'
        if item in run.done: continue
        def f():
            if k not in refs: refs[k] = trained(CASES[k], 'float32', size, dev)
            return compare(refs[k], trained(CASES[k], mode, size, dev, **kw), mode)
        run.do(item, f)

def exact_float32():
    import torch
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

@stage
def numbers(run):
    "Loss and weights of a few steps in half precision and channels last, against float32"
    from cases import CASES
    exact_float32()
    for k in run.each([k for k,o in CASES.items() if o.main]): numbers_of(run, k, ['repeat','fp16','bf16','channels_last'], {})

@stage
def compiled(run):
    "Loss and weights of a few steps of a compiled network, against float32"
    import torch
    from cases import CASES
    exact_float32()
    first = ['CEKD + SnapMix, batch','plain','CSS','online diversity','MEAL, random, joint','CEKD, peers','CEKD, gradient checkpoints']
    for k in run.each(first+[k for k,o in CASES.items() if o.main and k not in first]):
        torch._dynamo.reset()
        numbers_of(run, k, ['compile'], {}, backend='aot_eager_decomp_partition' if run.dry else 'inductor')

# --- time and memory

def wait():
    import torch
    if torch.cuda.is_available(): torch.cuda.synchronize()

def seconds_of(f, n=1):
    "Seconds of `n` calls, the device's work included"
    wait()
    start = time.perf_counter()
    for _ in range(n): f()
    wait()
    return (time.perf_counter()-start)/n

def peak_flops(dtype, dev, n):
    "Operations a second of a large matrix product on random numbers"
    import torch
    a,b = (torch.randn(n, n, device=dev, dtype=dtype) for _ in range(2))
    for _ in range(3): a@b
    return 2*n**3/statistics.median(seconds_of(lambda: a@b, 3) for _ in range(5))

def ready(o, size, dev):
    "A learner in bfloat16 and channels last, and a function that trains its next step"
    from fastai.callback.channelslast import ChannelsLast
    from cases import begin,make_kit,set_seed
    from cekd_fastai.core import HalfPrecision
    set_seed(0)
    kit = make_kit(size, o, dev, [HalfPrecision('bf16'),ChannelsLast()])
    learn,batches = begin(o.make(kit)),itertools.cycle(enumerate(kit.batches()))
    return learn,lambda: learn.one_batch(*next(batches))

class Whole:
    "In place of torch's tracker of modules, whose hooks do not bear `torch.autograd.grad` within a step"
    parents,is_bw = {'Global'},False
    def __enter__(self): return self
    def __exit__(self, *args): pass

def flops_of(f):
    "Operations of a step, forward and backward, as torch counts them"
    from torch.utils.flop_counter import FlopCounterMode
    count = FlopCounterMode(display=False)
    count.mod_tracker = Whole()
    with count: f()
    return count.get_total_flops()

def peak_memory(f):
    "GiB that a step takes beyond what is there before it"
    import torch
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    wait()
    return (torch.cuda.max_memory_allocated()-before)/2**30

@stage
def peaks(run):
    "The rates of this machine that the bounds are made of"
    import torch
    dev,n = device(run),256 if run.dry else 8192
    for k in run.each(['bfloat16','float32']): run.do(k, lambda: dict(tflops=round(peak_flops(getattr(torch, k), dev, n)/1e12, 3), n=n))
    if run.dry: return
    memory = torch.cuda.get_device_properties(0).total_memory/2**30
    run.note('device', ok=True, name=torch.cuda.get_device_name(), torch=torch.__version__, memory_gb=round(memory, 1))

@stage
def steps(run):
    "Time of a step over its multiply-add bound and over plain, and its peak memory over plain; plain takes turns with each method"
    import torch
    from cases import CASES
    size,dev,rounds = ('tiny' if run.dry else 'big'),device(run),2 if run.dry else 6
    peak = next((r['tflops']*1e12 for r in done_rows(run.out) if r['stage']=='peaks' and r['item']=='bfloat16' and r.get('ok')), None)
    _,plain = ready(CASES['plain'], size, dev)
    for _ in range(3): plain()
    f0 = flops_of(plain)
    m0 = None if run.dry else peak_memory(plain)
    def measure(o):
        learn,step = ready(o, size, dev)
        for _ in range(3): step()
        flops = flops_of(step)
        mem = None if run.dry else peak_memory(step)
        pairs = [(seconds_of(plain, 2),seconds_of(step, 2)) for _ in range(rounds)]
        t0,t = (statistics.median(x) for x in zip(*pairs))
        res = dict(ms=round(1000*t, 3), gflops=round(flops/1e9, 2), over_plain=round(t/t0, 3), flops_over_plain=round(flops/f0, 3))
        res |= dict(over_bound_of_plain=round(t/t0/(flops/f0), 3), over_peak=peak and round(t/(flops/peak), 2))
        if mem is not None: res |= dict(memory_gb=round(mem, 3), memory_over_plain=round(mem/m0, 3))
        else: res['note'] = 'peak memory is read on a GPU only'
        return res
    order = ['plain','plain + SnapMix, batch','CEKD + SnapMix, batch','CEKD + CutMix, batch','CSS','MEAL, random, joint','online diversity']
    for k in run.each(order+[k for k,o in CASES.items() if o.main and k not in order]):
        run.do(k, measure, CASES[k])
        gc.collect()
        if not run.dry: torch.cuda.empty_cache()

def one_hot_mixes(c):
    "Operation, who, and a function that mixes a batch and leaves it as it was"
    import names
    from timm.data import Mixup
    from torchvision.transforms import v2
    off = dict(mixup_alpha=0., cutmix_alpha=0., label_smoothing=0., num_classes=c)
    timm = lambda **kw: (lambda f: lambda x,y: f(x.clone(), y))(Mixup(**off|kw)) # it writes into its batch
    ours = lambda kind,**kw: getattr(names, kind)(1., **kw).mix
    return [('MixUp','ours',ours('MixUp')), ('MixUp','timm',timm(mixup_alpha=1.)), ('MixUp','torchvision',v2.MixUp(alpha=1., num_classes=c)),
        ('CutMix','ours',ours('CutMix')), ('CutMix','timm',timm(cutmix_alpha=1.)), ('CutMix','torchvision',v2.CutMix(alpha=1., num_classes=c)),
        ('MixUp per sample','ours',ours('MixUp', per='sample')), ('MixUp per sample','timm',timm(mixup_alpha=1., mode='elem')),
        ('CutMix per sample','ours',ours('CutMix', per='sample')), ('CutMix per sample','timm',timm(cutmix_alpha=1., mode='elem'))]

@stage
def mixing(run):
    "Time to mix a batch that lies on the device, beside timm and torchvision, in turns"
    import torch
    dev,(b,px,rounds) = device(run),(8,32,3) if run.dry else (128,224,20)
    x,y = torch.rand(b, 3, px, px, device=dev),torch.randint(0, 200, (b,), device=dev)
    ms = one_hot_mixes(200)
    def measure(op):
        own = [(who,f) for o,who,f in ms if o==op]
        for _,f in own: seconds_of(lambda: f(x, y), 2)
        times = {who:[] for who,_ in own}
        for _ in range(rounds):
            for who,f in own: times[who].append(seconds_of(lambda: f(x, y), 5))
        med = {k:statistics.median(v) for k,v in times.items()}
        return dict(ms={k:round(1000*v, 4) for k,v in med.items()}, over_ours={k:round(v/med['ours'], 3) for k,v in med.items()})
    for op in run.each(list(dict.fromkeys(o for o,_,_ in ms))): run.do(op, measure, op)

# --- the study on all 200 species

sys.path.append(str(here.parent/'cekd'))

def tiny_birds(folder, n_species=4):
    "In the place of the 200 species a few drawn ones, and a tiny network with random weights; the study's settings for them"
    import numpy as np,timm,torch
    import birds_bundle,birds_plan,names
    c = birds_plan.read_config('birds200') | dict(classes=n_species, stored=48, size=32, bs=8, arch='test_efficientnet', weights='tiny.pth', workers=1)
    c |= dict(epochs={'from':2,'to':2,'waves':1}, layouts=['channels_first'])
    where = names.make_birds(folder/'drawn', n_species=n_species, n_images=6, n_train=4, size=48, n_workers=0, progress=False)
    files = sorted((where/'images').rglob('*.jpg'))
    kinds = sorted({o.parent.name for o in files})
    jpegs = [birds_bundle.square(o, 48, 75, 'WEBP') for o in files]
    np.savez(folder/'birds.npz', jpegs=np.frombuffer(b''.join(jpegs), np.uint8), ends=np.cumsum([len(o) for o in jpegs]),
        label=np.array([kinds.index(o.parent.name) for o in files], np.int16), test=np.arange(len(files))%6>3)
    torch.save(timm.create_model(c['arch']).state_dict(), folder/c['weights'])
    birds_bundle.note_commit(folder)
    return c

@stage
def study(run):
    "One seed of the whole-network study on all 200 species: each of its runs is a row of `birds200.jsonl`, and is not run again"
    import birds_plan,birds_queue
    bundle = here.parents[2]/'data'/'birds'
    if not run.dry and not bundle.is_dir(): return run.note('(all)', ok=None, note='the kit was prepared without the archive of CUB-200-2011')
    with tempfile.TemporaryDirectory() as tmp:
        c = tiny_birds((bundle := Path(tmp))) if run.dry else birds_plan.read_config('birds200')
        file = run.out/f"{c['name']}.jsonl"
        wanted = {o['row'] for o in birds_plan.jobs(c, c['epochs']['from'], {})}
        had = {r['row'] for r in birds_queue.read_rows(file) if 'accuracy' in r}
        if not wanted<=had: birds_queue.run(c, bundle, run.out, run.end-time.time(), device(run), c['workers'], time.time())
    for r in birds_queue.read_rows(file):
        if 'error' in r and r['row'] not in had: run.note(r['row'], ok=False, error=r['error'])
        if 'accuracy' in r and r['row'] not in had: run.note(r['row'], ok=True, accuracy=r['accuracy'], seconds=r['seconds'])
        had |= {r['row']} if 'accuracy' in r else set()
    if left := sorted(wanted-had): run.note('(rest)', ok=None, note=f"not run: {', '.join(left)}; start again to go on")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('stages', nargs='+', choices=STAGES)
    p.add_argument('--out', required=True)
    p.add_argument('--seconds', type=float, default=150)
    p.add_argument('--dry', action='store_true')
    a = p.parse_args()
    warnings.simplefilter('ignore')
    end = time.time()+a.seconds
    for s in a.stages:
        run = Run(s, a.out, end-time.time(), a.dry)
        try: STAGES[s](run)
        except Exception as e: run.note('(stage)', **failure(e))
