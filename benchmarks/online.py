"""Online distillation on CIFAR-100: every method with the same backbone, data, number of epochs, schedule and seeds; what a step costs; and branches in one batch against a loop.

`--data` is a folder of class folders `train` and `test` with the 32 pixel images, whole or a subset. Plain has one branch; the others have the branches of their papers (2 to 4), CSS two networks of three.
CEKD mixes with CutMix; `plain + CutMix` is there to compare it with. Every finished run is in the result file at once, and a second start goes on from there.

    python benchmarks/online.py --data cifar100-mini             # the study, benchmarks/results/online.json
    python benchmarks/online.py --setting flowers --data flowers --weights mobilenet_v2_tfquant.pth # CEKD's branch network on few flowers, benchmarks/results/online_flowers.json
    python benchmarks/online.py --data cifar100-mini --only 'plain;ONE' --seeds 1 --epochs 2
    python benchmarks/online.py --cost                           # cost of a step, and of batched branches, benchmarks/results/online_cost.json
    python benchmarks/online.py --table                          # print the tables of both"""
import json,statistics,time
from copy import deepcopy
import torch
from fastcore.script import call_parse
from torch.func import functional_call,stack_module_state,vmap
from torch.utils.flop_counter import FlopCounterMode
from fastai.vision.all import *
from cekd_fastai.all import *
from cekd_fastai.learner import css_learner
from cekd_fastai.learner import online_learner
from cekd_fastai.online.diversity import diversity
from common import here,result_table,write_result # after fastai

# function of data and backbone that gives a learner
def online(method): return lambda dls, arch, **kw: online_learner(dls, arch, method, **kw)
def branched(n, *cbs): return lambda dls, arch, **kw: branch_learner(dls, arch, n, cbs=[o() for o in cbs], **kw)

# What the two studies train. Flowers: photographs, ten of each class for training, and a network that knows ImageNet.
settings = dict(
    cifar=dict(arch='cifar_resnet8', size=32, recipe='pad', per_class=None, bs=64, lr=.1, wd=5e-4, freeze_bn=False, arch_args={}, weights=None),
    flowers=dict(arch='mobilenetv2_100', size=112, recipe='crop', per_class=10, bs=16, lr=3e-4, wd=1e-4, freeze_bn=True, arch_args=dict(pad_type='same'), weights='mobilenet_v2_tfquant.pth'))
of_flowers = ['plain','plain + CutMix','2 branches','DML','FFM + CD','clean + CutMix, 2 branches','CEKD + CutMix']

methods = {'plain': branched(1), 'plain + CutMix': branched(1, CutMix), '2 branches': branched(2), '3 branches': branched(3), 'DML': online('dml'), 'KDCL, mean': online('kdcl'),
    'ONE': online('one'), 'OKDDip': online('okddip'), 'FFL': online('ffl'), 'FFM + CD': online('diversity'),
    'CSS': lambda dls, arch, **kw: css_learner(dls, (arch,arch), **kw), 'clean + CutMix, 2 branches': branched(2, CutMix, partial(CEKD, w_cross=0, target='both')), 'CEKD + CutMix': branched(2, CutMix, CEKD)}

def n_params(m): return sum(p.numel() for p in m.parameters())

def sync():
    if torch.cuda.is_available(): torch.cuda.synchronize()

# ---- the study

def one_run(label, seed, a):
    "Train one network and say how it predicts"
    set_seed(seed)
    dls = fine_grained_dls(a['data'], size=a['size'], bs=a['bs'], recipe=a['recipe'], per_class=a['per_class'], seed=seed, in_memory=True)
    set_seed(seed)
    learn = methods[label](dls, a['arch'], pretrained=False, weights=a['weights'], freeze_bn=a['freeze_bn'], arch_args=a['arch_args'], metrics=accuracy,
        opt_func=partial(SGD, mom=.9), wd=a['wd'], loss_func=CrossEntropyLossFlat())
    groups = len(learn.splitter(learn.model)) if a['weights'] else 1
    lr = [a['lr']]*(groups-1)+[10*a['lr']] if a['weights'] else a['lr'] # new heads learn faster than a network that knows ImageNet
    start = time.perf_counter()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(a['epochs'], lr)
    sync()
    secs,net = time.perf_counter()-start,learn.model
    with learn.no_bar(), learn.no_logging(): loss,acc = learn.validate()
    if net.n_branches==1: d = dict(ensemble=acc, branches=[acc], distance=None, disagreement=None, gain=None)
    else: d = diversity(learn).as_dict()
    if hasattr(net, 'by_network'):
        _,each,y = branch_preds(learn)
        d['networks'] = {k:accuracy(z, y).item() for k,z in net.by_network(each).items()}
    sizes = dict(parameters=n_params(net), deployed=n_params(net.subnet()))
    return dict(method=label, seed=seed, **d, valid_loss=loss, **sizes, seconds=round(secs, 1), args=said(a))

def said(a): return json.loads(json.dumps(a | {k:Path(a[k]).name for k in ('data','weights') if a[k]}))

was = dict(t='net1', s='net2') # names of the two networks of CSS in result files that are there already

def study_table(rows):
    "Mean and spread over the seeds of each method"
    df = pd.DataFrame(rows)
    df['single'] = df.branches.map(lambda o: sum(o)/len(o))
    pct = lambda s: f'{100*s.mean():.1f}' + (f' ± {100*s.std():.1f}' if len(s)>1 else '')
    num = lambda s, f='{:.3f}': '' if s.isna().all() else f.format(s.astype(float).mean())
    lines = ['| method | mean branch % | ensemble % | gain | distance | disagreement | parameters, trained | deployed | seconds |', '|'+'---|'*9]
    for k in methods:
        d = df[df.method==k]
        if len(d): lines.append(f"| {k} | {pct(d.single)} | {pct(d.ensemble)} | {num(100*d.gain.astype(float), '{:+.1f}')} | {num(d.distance)} | {num(d.disagreement)} | "
            f"{d.parameters.iloc[0]/1e6:.3f} M | {d.deployed.iloc[0]/1e6:.3f} M | {d.seconds.mean():.0f} |")
        nets = [{was.get(o, o):v for o,v in r['networks'].items()} for r in rows if r['method']==k and 'networks' in r]
        lines += [f"| {k}, {o} alone | | {pct(pd.Series([n[o] for n in nets]))} | | | | | | |" for o in ('net1','net2') if nets]
    return lines

def study(a, labels, seeds, command, name):
    out = here/'results'/f'{name}.json'
    rows = json.loads(out.read_text())['runs'] if out.exists() else []
    if other := [r for r in rows if r['args']!=said(a)]: raise SystemExit(f"{out.name} holds runs with other settings ({other[0]['args']}): use those, or another --name.")
    for seed in seeds:
        for k in labels:
            if any((r['method'],r['seed'])==(k,seed) for r in rows): continue
            print(f'{k}, seed {seed}', flush=True)
            rows.append(one_run(k, seed, a))
            few = f", {a['per_class']} training images of each class" if a['per_class'] else ''
            write_result(name, f"{Path(a['data']).name}{few}, {a['arch']}, {a['epochs']} epochs, the final epoch on the test images", command, rows, study_table(rows))
    print('\n'.join(study_table(rows)))

# ---- cost

def ready(make, arch, size, x, y):
    "A learner in the middle of training, without progress bar and recorder"
    dls = DataLoaders.from_dsets(L(zip(x.cpu(),y.cpu())), L(zip(x.cpu(),y.cpu())), bs=len(x), num_workers=0, device=x.device)
    dls.c = 100
    learn = make(dls, arch, pretrained=False, loss_func=CrossEntropyLossFlat(), default_cbs=False)
    learn.add_cbs([TrainEvalCallback,CastToTensor])
    learn.create_opt()
    learn.n_epoch,learn.n_iter,learn.epoch,learn.dl = 1,1000,0,dls.train
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    return learn

def macs(learn, x):
    "Multiply-adds that a step is worth: three times those of a forward pass, gate included, once more for a clean pass"
    m = learn.model
    with torch.no_grad(), FlopCounterMode(display=False) as count: m.ensemble(*m.branch_forward(x))
    passes = 2 if any(getattr(cb, 'needs_clean', False) for cb in learn.cbs) else 1
    return 3*passes*count.get_total_flops()/2

def step_cost(arch, size, bs, rounds, device):
    "Time and multiply-adds of a step of each method over plain; steps of all methods alternate"
    x,y = torch.randn(bs,3,size,size, device=device),torch.randint(0,100,(bs,), device=device)
    learns = {k:ready(f, arch, size, x, y) for k,f in methods.items()}
    m,times = {k:macs(l, x) for k,l in learns.items()},{k:[] for k in learns}
    for i in range(rounds+2):
        for k,l in learns.items():
            sync()
            start = time.perf_counter()
            l.one_batch(0, (x,y))
            sync()
            if i>1: times[k].append(time.perf_counter()-start)
    med = {k:statistics.median(v) for k,v in times.items()}
    return [dict(arch=arch, method=k, gmacs=round(m[k]/1e9, 2), seconds=round(med[k], 4), mac_ratio=round(m[k]/m['plain'], 3), time_ratio=round(med[k]/med['plain'], 3),
        over_bound=round(med[k]/med['plain']/(m[k]/m['plain']), 3)) for k in learns]

def grouped(branches):
    "The branches as one module with grouped convolutions, on the shared map repeated once per branch"
    n,res = len(branches),deepcopy(branches[0])
    for name,mod in list(res.named_modules()):
        mods = [b.get_submodule(name) for b in branches]
        if isinstance(mod, nn.Conv2d):
            new = nn.Conv2d(n*mod.in_channels, n*mod.out_channels, mod.kernel_size, mod.stride, mod.padding, mod.dilation, n*mod.groups, mod.bias is not None)
        elif isinstance(mod, nn.BatchNorm2d): new = nn.BatchNorm2d(n*mod.num_features)
        else: continue
        new.load_state_dict({k:v if v.ndim==0 else torch.cat([o.state_dict()[k] for o in mods]) for k,v in mod.state_dict().items()})
        parent,_,attr = name.rpartition('.')
        setattr(res.get_submodule(parent), attr, new)
    return res.to(next(branches[0].parameters()).device)

def ways(branches, x):
    "Last maps of all branches (n, B, C, h, w) by a loop, by grouped convolutions, and by vmap, and the gradient's parameters of each"
    n,b = len(branches),len(x)
    one = grouped(branches).train()
    params,buffers = stack_module_state(branches)
    base = deepcopy(branches[0]).to('meta').train()
    f = vmap(lambda p, u, x: functional_call(base, (p,u), (x,)), in_dims=(0,0,None), randomness='same')
    split = lambda o: o.view(b, n, -1, *o.shape[2:]).transpose(0, 1)
    loop = (lambda: torch.stack([m(x) for m in branches])), [p for m in branches for p in m.parameters()]
    group = (lambda: split(one(x.repeat(1,n,1,1)))), list(one.parameters())
    return dict(loop=loop, grouped=group, vmap=((lambda: f(params, buffers, x)), list(params.values())))

def batched(arch, size, bs, rounds, n, device):
    "Forward and backward pass of n branches, three ways; each must give the maps of the loop"
    net = branch_net(arch, 100, n, pretrained=False).to(device).train()
    for m in net.branches:
        for p in m.parameters(): p.data.add_(.01*torch.randn_like(p)) # branches differ, as after training
    with torch.no_grad(): x = net.trunk(torch.randn(bs,3,size,size, device=device))
    todo,times,res = ways(list(net.branches), x.requires_grad_()),{},[]
    want = todo['loop'][0]().detach()
    for k,(f,ps) in todo.items():
        try:
            same = torch.allclose(f().detach(), want, atol=1e-3, rtol=1e-3)
            times[k] = []
            if not same: raise AssertionError(f'{k} gives other maps than the loop')
        except RuntimeError as e: res.append(dict(arch=arch, way=k, error=str(e).splitlines()[0]))
    for i in range(rounds+2):
        for k in times:
            f,ps = todo[k]
            sync()
            start = time.perf_counter()
            torch.autograd.grad(f().square().mean(), [x,*ps])
            sync()
            if i>1: times[k].append(time.perf_counter()-start)
    med = {k:statistics.median(v) for k,v in times.items()}
    return [dict(arch=arch, way=k, branches=n, seconds=round(v, 4), over_loop=round(v/med['loop'], 3)) for k,v in med.items()]+res

def measure_cost(archs, bs, rounds, command):
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    rows,ways_ = [],[]
    for arch in archs:
        size = 32 if arch.startswith('cifar') else 112
        rows += step_cost(arch, size, bs, rounds, device)
        ways_ += batched(arch, size, bs, rounds, 3, device)
    lines = ['| backbone | method | multiply-adds over plain | time over plain | time over bound |','|---|---|---|---|---|']
    lines += [f"| {r['arch']} | {r['method']} | {r['mac_ratio']:.2f} | {r['time_ratio']:.2f} | {r['over_bound']:.2f} |" for r in rows]
    lines += ['', 'Forward and backward pass of the three branches alone, over a loop:', '', '| backbone | way | time over loop |','|---|---|---|']
    lines += [f"| {r['arch']} | {r['way']} | {r.get('over_loop', r.get('error'))} |" for r in ways_]
    write_result('online_cost', f'Cost of a step of online distillation on one {device.upper()}, batch of {bs}', command, rows, lines, ways=ways_)
    print('\n'.join(lines))

@call_parse
def main(
    setting:str='cifar', # What to train: cifar or flowers
    data:str='cifar100-mini', # Folder with the class folders `train` and `test`
    weights:str=None, # File with ImageNet weights of the backbone, for flowers
    epochs:int=30, # Of each run
    seeds:int=3,   # Number of seeds, from 0
    bs:int=64,     # Images in a batch, for the cost
    only:str='', # Some of the methods, separated by semicolons; by default all, or with flowers those of the branch network
    cost:bool=False, # Measure the cost of a step instead
    archs:str='cifar_resnet32,resnet18', # Backbones of the cost, separated by commas
    rounds:int=8,  # Rounds of alternating steps of the cost
    name:str=None, # Of the result file of the study; online, or online_flowers
    table:bool=False, # Print the tables of the result files
):
    "Train each method, and collect the runs in a file in benchmarks/results"
    if table: return print(*[result_table(o) for o in ('online','online_flowers','online_cost')], sep='\n\n')
    if cost: return measure_cost(archs.split(','), bs, rounds, f'python benchmarks/online.py --cost --archs {archs} --bs {bs} --rounds {rounds}')
    if setting not in settings: raise SystemExit(f"--setting is cifar or flowers, not {setting!r}.")
    short = {k.lower():k for k in methods}
    every = of_flowers if setting=='flowers' else [o for o in methods if '2 branches' not in o]
    labels = [short.get(o.strip().lower()) for o in only.split(';')] if only else every
    if None in labels: raise SystemExit(f"--only names a method that is not known; there are: {'; '.join(methods)}")
    a = settings[setting] | dict(data=data, epochs=epochs) | (dict(weights=weights) if weights else {})
    name = name or ('online' if setting=='cifar' else f'online_{setting}')
    study(a, labels, range(seeds), f"python benchmarks/online.py --setting {setting} --data {Path(data).name} --epochs {epochs} --seeds {seeds}" + (f' --weights {Path(weights).name}' if weights else ''), name)
