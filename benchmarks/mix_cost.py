"""What it costs to mix a batch: this library beside fastai's callbacks, timm's `Mixup` and torchvision's `v2.CutMix` and `v2.MixUp`.

    python benchmarks/mix_cost.py

All methods take turns in one process, each with a batch of its own, so that whatever else the machine does falls on all of them. Every method mixes images and labels once, as in a training
step. fastai's CutMix and timm write into the batch that they are given; `+ clone` is the same after a copy, which is what a training step must do where anyone still needs the clean batch, as all
methods here, and torchvision's, promise. The labels are mixed by each in its own way: weights for two class indices, or one-hot vectors."""
import json,statistics,time
from types import SimpleNamespace
import torch
from fastcore.script import call_parse
from fastai.callback import mixup as stock
from timm.data import Mixup
from torchvision.transforms import v2
from cekd_fastai.core import write_whole
from cekd_fastai.train import about
from cekd_fastai.mix.callback import CutMix,MixUp
from cekd_fastai.mix.snapmix import SnapMix
from common import here

def from_fastai(cls, alpha, clone=False):
    "fastai's callback, driven as a learner drives it"
    cb = cls(alpha)
    cb.stack_y = True
    def mix(x, y):
        x = x.clone() if clone else x
        cb.learn = SimpleNamespace(xb=(x,), yb=(y,), x=x, y=y)
        cb.before_batch()
    return mix

def from_timm(clone=False, **kwargs):
    cb = Mixup(label_smoothing=0., num_classes=200, **kwargs)
    return (lambda x, y: cb(x.clone(), y)) if clone else cb

def snap(**kwargs):
    "SnapMix without the pass of the network, which costs whatever the network costs"
    cb = SnapMix(**kwargs)
    cb.maps = lambda x, y: x[:,0,::32,::32]
    return cb.mix

def methods(alpha):
    "Operation, method, function, and whether the batch is left as it was"
    no = dict(mixup_alpha=0., cutmix_alpha=alpha)
    return [('CutMix','cekd_fastai',CutMix(alpha).mix,True), ('CutMix','torchvision',v2.CutMix(alpha=alpha, num_classes=200),True),
        ('CutMix','fastai + clone',from_fastai(stock.CutMix, alpha, True),True), ('CutMix','timm + clone',from_timm(True, **no),True),
        ('CutMix','fastai, in place',from_fastai(stock.CutMix, alpha),False), ('CutMix','timm, in place',from_timm(**no),False),
        ('MixUp','cekd_fastai',MixUp(alpha).mix,True), ('MixUp','torchvision',v2.MixUp(alpha=alpha, num_classes=200),True),
        ('MixUp','timm + clone',from_timm(True, mixup_alpha=alpha),True), ('MixUp','timm, in place',from_timm(mixup_alpha=alpha),False),
        ('MixUp per sample','cekd_fastai',MixUp(alpha, per='sample').mix,True), ('MixUp per sample','fastai',from_fastai(stock.MixUp, alpha),True),
        ('MixUp per sample','timm + clone',from_timm(True, mixup_alpha=alpha, mode='elem'),True),
        ('CutMix per sample','cekd_fastai',CutMix(alpha, per='sample').mix,True), ('CutMix per sample','timm + clone',from_timm(True, mode='elem', **no),True),
        ('SnapMix, without maps','cekd_fastai',snap(),True), ('SnapMix per sample, without maps','cekd_fastai',snap(per='sample'),True)]

def timed(f, x, y, dev):
    "Seconds of one call"
    if dev.type=='cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    f(x, y)
    if dev.type=='cuda': torch.cuda.synchronize()
    return time.perf_counter()-start

def measure(dev, bs, size, rounds, alpha):
    "Rows of one device"
    ms,x,y = methods(alpha),torch.rand(bs, 3, size, size, device=dev),torch.randint(0, 200, (bs,), device=dev)
    times,xs = [[] for _ in ms],[x.clone() for _ in range(2)]
    for r in range(rounds+3):
        for t,(_,_,f,keeps) in zip(times, ms):
            s = timed(f, xs[keeps], y, dev)
            if r>2: t.append(s*1000)
    assert torch.equal(xs[1], x), 'a method that should leave its batch alone has written into it'
    med,low = [statistics.median(t) for t in times],[min(t) for t in times]
    own = {op:m for (op,who,*_),m in zip(ms, med) if who=='cekd_fastai'}
    return [dict(device=dev.type, operation=op, method=who, keeps_batch=keeps, ms=round(m, 3), min_ms=round(l, 3), over_ours=round(m/own[op], 2))
        for (op,who,_,keeps),m,l in zip(ms, med, low)]

@call_parse
def main(
    bs:int=64,      # Images in a batch
    size:int=224,   # Pixels
    rounds:int=40,  # Timed rounds; methods alternate
    alpha:float=1., # Of all methods
    threads:int=0,  # Of torch on the CPU; 0: as it likes
):
    "Time the mixing of a batch on the CPU, and on a GPU where there is one"
    if threads: torch.set_num_threads(threads)
    rows = [r for d in ['cpu']+['cuda']*torch.cuda.is_available() for r in measure(torch.device(d), bs, size, rounds, alpha)]
    lines = ['| device | operation | method | keeps the batch | ms | fastest ms | over ours |','|---|---|---|---|---|---|---|']
    lines += [f"| {r['device']} | {r['operation']} | {r['method']} | {'yes' if r['keeps_batch'] else 'no'} | {r['ms']:.2f} | {r['min_ms']:.2f} | {r['over_ours']:.2f} |" for r in rows]
    info = about({})
    command = f'python benchmarks/mix_cost.py --bs {bs} --size {size} --rounds {rounds} --alpha {alpha:g}' + f' --threads {threads}'*bool(threads)
    res = dict(title=f'Time to mix a batch of {bs} at {size} px (median of {rounds})', command=command, versions=info['versions'],
        machine=info['machine']|dict(threads=torch.get_num_threads()), table='\n'.join(lines), rows=rows)
    write_whole(here/'results'/'mix_cost.json', lambda p: p.write_text(json.dumps(res, indent=1)+'\n'))
    print('\n'.join(lines))
