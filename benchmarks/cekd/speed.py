"""What a step of CEKD costs beside its bound by multiply-adds, and beside the methods that it is compared with.

    python benchmarks/cekd/speed.py --size 112 --bs 32                                        # on the CPU
    python benchmarks/cekd/speed.py --arch resnet50 --size 224 --bs 64 --precision bf16       # where there is a GPU, and again with --size 448

A training pass is worth three forward passes, one without gradient is worth one. So plain is 3 F, SnapMix 4 F, and CEKD 6 F of the network with two branches;
*over bound* is the time over plain divided by the multiply-adds over plain.
Steps of all variants alternate in one process, so that whatever else the machine does falls on all of them. Memory is what a step takes beside the network: on a GPU the
peak that torch counted, on the CPU the peak of a process of its own that makes three steps, less what it held before them.

Clean and mixed images in two calls: batch norm normalises each by its own statistics, and updates its running ones twice. In one joint call: both by common statistics, updated once.
Frozen batch norm makes the two the same step."""
import json,statistics,subprocess,sys,time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch
from fastcore.script import call_parse
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch.utils.flop_counter import FlopCounterMode
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from fastai.callback import mixup as fastai_mixup
from cekd_fastai.all import *
from cekd_fastai.core import write_whole
from cekd_fastai.mix.core import draw_lam
from cekd_fastai.results import about
from common import status # after fastai

here = Path(__file__).resolve().parents[1]

class TimmMixup(Callback):
    "timm's mixup and cutmix, with its loss for soft labels"
    order,run_valid = 4,False
    def __init__(self, n): self.mixup = Mixup(mixup_alpha=1., cutmix_alpha=1., num_classes=n)
    def before_batch(self):
        x,y = self.mixup(self.learn.xb[0].as_subclass(Tensor), self.learn.yb[0].as_subclass(Tensor))
        self.learn.xb,self.learn.yb = (x,),(y,)

class LoopSnapMix(Callback):
    "SnapMix step by step as its paper describes it: a second forward pass, and label weights image by image with a value read from the device for each"
    order,run_valid = 4,False
    def before_batch(self):
        x,y,net = self.learn.xb[0],self.learn.yb[0],self.learn.model
        h,w = x.shape[-2:]
        with torch.no_grad():
            feats = net.branch_forward(x)[1]
            lin = last(m for m in net.heads[0].modules() if isinstance(m, nn.Linear))
            maps = F.conv2d(feats[0], lin.weight[:,:,None,None].to(feats[0].dtype), lin.bias.to(feats[0].dtype)).float()
            maps = F.interpolate(maps[torch.arange(len(x)),y][:,None], (h,w), mode='bilinear', align_corners=False)[:,0]
            maps = maps-maps.flatten(1).min(1).values[:,None,None]
            maps = maps/maps.sum((1,2), keepdim=True)
        (xa,ya,xA,yA),(xb,yb,xB,yB) = (rand_box(draw_lam(5.), h, w) for _ in range(2))
        perm,mixed = torch.randperm(len(x)),x.clone()
        la,lb = torch.ones(len(x)),torch.zeros(len(x))
        if (xA-xa)*(yA-ya) and (xB-xb)*(yB-yb):
            for i in range(len(x)):
                j = perm[i].item()
                mixed[i:i+1,:,ya:yA,xa:xA] = F.interpolate(x[j:j+1,:,yb:yB,xb:xB], (yA-ya,xA-xa), mode='bilinear', align_corners=True)
                la[i],lb[i] = 1-maps[i,ya:yA,xa:xA].sum().item(),maps[j,yb:yB,xb:xB].sum().item()
                if y[i].item()==y[j].item(): la[i] = lb[i] = la[i]+lb[i]
        self.rec,self.learn.xb = MixRecord(perm.to(x.device), la.to(x.device), lb.to(x.device)),(mixed,)

    def after_loss(self):
        z,y = self.learn.pred,self.learn.yb[0]
        ce = lambda t: F.cross_entropy(z, t, reduction='none')
        self.learn.loss_grad = (self.rec.lam_a*ce(y)+self.rec.lam_b*ce(y[self.rec.perm])).mean()
        self.learn.loss = self.learn.loss_grad.detach()

def variants(n):
    "Branches, callbacks, and what a step is worth in forward passes"
    return {'plain': (1,[],3), 'fastai CutMix': (1,[fastai_mixup.CutMix],3), 'timm Mixup': (1,[partial(TimmMixup, n)],3), 'SnapMix as its authors describe it': (1,[LoopSnapMix],4),
        'SnapMix': (1,[SnapMix],4), 'plain, 2 branches': (2,[],3), 'CEKD + CutMix, two calls': (2,[CutMix,CEKD],6), 'CEKD + CutMix, one joint call': (2,[CutMix,partial(CEKD, joint=True)],6),
        'CEKD + SnapMix': (2,[SnapMix,CEKD],6), 'CEKD + CutMix, average teaches': (2,[CutMix,partial(CEKD, teacher='ema')],7),
        'CEKD + CutMix, joint, trunk checkpointed': (2,[CutMix,partial(CEKD, joint=True)],6), 'CEKD + CutMix, joint, compiled': (2,[CutMix,partial(CEKD, joint=True)],6)}

def ready(name, arch, arch_args, n_branches, cbs, x, y, precision, freeze_bn, n):
    "A learner in the middle of training, without progress bar and recorder"
    dls = DataLoaders.from_dsets(L(zip(x,y)), L(zip(x,y)), bs=len(x), num_workers=0, device=x.device)
    dls.c = n
    loss = SoftTargetCrossEntropy() if 'timm' in name else CrossEntropyLossFlat()
    learn = branch_learner(dls, arch, n_branches, pretrained=False, loss_func=loss, freeze_bn=freeze_bn, arch_args=arch_args,
        opt_func=partial(SGD, mom=.9), cbs=[ChannelsLast(),*[o() for o in cbs]], default_cbs=False)
    single = any(o in name for o in ('fastai','timm','authors')) # these know nothing of branches
    if single: learn.remove_cbs([o for o in learn.cbs if isinstance(o, BranchLoss)])
    learn.add_cbs([TrainEvalCallback,CastToTensor])
    if precision=='bf16': learn.to_bf16()
    if precision=='fp16': learn.to_fp16()
    net = learn.model
    net.grad_checkpoint = 'checkpointed' in name
    if 'compiled' in name:
        for m in (net.trunk,*net.branches): m.compile()
    if single: net.forward = lambda x: net.ensemble(*net.branch_forward(x))
    learn.create_opt()
    learn.n_epoch,learn.n_iter,learn.epoch = 1,1000,0
    learn.dl = dls.train
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    return learn

def step_memory(args, name):
    "Peak memory of a step on the CPU, from a process of its own; None where the system does not say"
    if not Path('/proc/self/status').exists(): return None
    res = subprocess.run([sys.executable, __file__, *args, '--memory', name], capture_output=True, text=True)
    return float(res.stdout.split()[-1]) if not res.returncode else None

def forward_macs(net, x):
    with torch.no_grad(), FlopCounterMode(display=False) as count: net.branch_forward(x)
    return count.get_total_flops()/2

@call_parse
def main(
    arch:str='mobilenetv2_100', # Backbone
    size:int=112, # Pixels
    bs:int=32,    # Images in a batch
    rounds:int=8, # Rounds of alternating steps
    precision:str='fp32', # fp32, bf16 or fp16 (the last two on a GPU)
    freeze_bn:bool=False, # Keep the statistics of batch norm
    only:str=None, # Only variants whose name contains this, beside plain
    n:int=200,    # Classes
    threads:int=1, # Of torch, on the CPU
    memory:str=None, # Print the memory of a step of this variant only; used for the CPU
):
    "Time, count, and on a GPU weigh a training step of each variant"
    torch.set_num_threads(threads)
    gpu = torch.cuda.is_available()
    dev = torch.device('cuda' if gpu else 'cpu')
    if precision!='fp32' and not gpu: sys.exit(f'speed: --precision {precision} needs a GPU, and there is none.')
    sync = torch.cuda.synchronize if gpu else noop
    x,y = torch.randn(bs,3,size,size, device=dev),torch.randint(0, n, (bs,), device=dev)
    todo = {k:v for k,v in variants(n).items() if not only or k=='plain' or only in k}
    if memory:
        nb,cbs,_ = variants(n)[memory]
        l = ready(memory, arch, dict(pad_type='same') if 'mobilenet' in arch else {}, nb, cbs, x, y, precision, freeze_bn, n)
        before = status('VmRSS')
        for _ in range(3): l.one_batch(0, (x,y))
        return print(status('VmHWM')-before)
    learns,macs,mem,failed = {},{},{},{}
    for k,(nb,cbs,passes) in todo.items():
        try:
            l = learns[k] = ready(k, arch, dict(pad_type='same') if 'mobilenet' in arch else {}, nb, cbs, x, y, precision, freeze_bn, n)
            macs[k] = passes*forward_macs(branch_net(arch, n, nb, pretrained=False), torch.zeros(1,3,size,size))*bs
            if gpu: torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if gpu else 0
            for _ in range(3): l.one_batch(0, (x,y))
            sync()
            mem[k] = (torch.cuda.max_memory_allocated()-before)/2**30 if gpu else step_memory(sys.argv[1:], k)
        except Exception as e:
            if k=='plain': raise
            failed[k] = str(e).strip().splitlines()[0][:200]
            learns.pop(k, None)
    times = {k:[] for k in learns}
    for _ in range(rounds):
        for k,l in learns.items():
            sync()
            start = time.perf_counter()
            l.one_batch(0, (x,y))
            sync()
            times[k].append(time.perf_counter()-start)
    med,rows = {k:statistics.median(v) for k,v in times.items()},[]
    for k in learns:
        ratio,t = macs[k]/macs['plain'],med[k]/med['plain']
        rows.append(dict(variant=k, seconds=round(med[k], 5), mac_ratio=round(ratio, 3), time_ratio=round(t, 3), over_bound=round(t/ratio, 3),
            extra_gb=mem[k] and round(mem[k], 3), all_seconds=[round(o, 5) for o in times[k]]))
    lines = ['| step | multiply-adds over plain | time over plain | time over bound | memory of a step, GiB |', '|---|---|---|---|---|']
    lines += [f"| {r['variant']} | {r['mac_ratio']:.2f} | {r['time_ratio']:.2f} | {r['over_bound']:.2f} | {'' if r['extra_gb'] is None else format(r['extra_gb'], '.2f')} |" for r in rows]
    lines += [f'| {k} | failed: {v} |  |  |  |' for k,v in failed.items()]
    info = about({})
    norm = 'frozen batch norm' if freeze_bn else 'batch norm in training'
    res = dict(title=f'Cost of a training step: {arch}, {size} px, batch of {bs}, {precision}, channels last, {norm}',
        command=f'python benchmarks/cekd/speed.py --arch {arch} --size {size} --bs {bs} --rounds {rounds} --precision {precision}'+' --freeze-bn'*freeze_bn,
        versions=info['versions'], machine=info['machine'], table='\n'.join(lines), runs=rows)
    where = 'gpu' if gpu else 'cpu'
    write_whole(here/'results'/f'cekd_speed_{where}_{arch}_{size}{"_frozen" if freeze_bn else ""}.json', lambda p: p.write_text(json.dumps(res, indent=1)+'\n'))
    print('\n'.join(lines))
