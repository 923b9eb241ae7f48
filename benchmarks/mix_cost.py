"""What it costs to mix a batch: this library beside fastai's callbacks, timm's `Mixup` and torchvision's `v2.CutMix` and `v2.MixUp`.

    python benchmarks/mix_cost.py

All methods take turns in one process, each with a batch of its own, so that whatever else the machine does falls on all of
them. Every method mixes images and labels once, as in a training step. fastai's CutMix and timm write into the batch that they
are given; `+ clone` is the same after a copy, which a training step must make if the clean batch is still needed. All methods
here, and torchvision's, leave the batch as it is. The labels are mixed by each in its own way: weights for two class indices,
or one-hot vectors."""
import statistics,time
from collections import namedtuple
from types import SimpleNamespace
import torch
from fastcore.script import call_parse
from fastai.callback import mixup as stock
from timm.data import Mixup
from torchvision.transforms import v2
from cekd_fastai.mix.callback import CutMix,MixUp
from cekd_fastai.mix.snapmix import SnapMix
from common import write_result

Method = namedtuple('Method', 'operation name f keeps_batch')
n_classes = 200

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
    "timm's callable, which mixes in place"
    mix = Mixup(label_smoothing=0., num_classes=n_classes, **kwargs)
    return (lambda x, y: mix(x.clone(), y)) if clone else mix

def snap(**kwargs):
    "SnapMix without the pass of the network, which costs whatever the network costs"
    cb = SnapMix(**kwargs)
    cb.maps = lambda x, y: x[:,0,::32,::32]
    return cb.mix

def methods(alpha):
    "Every operation by every library that has it, ours first"
    cut = dict(mixup_alpha=0., cutmix_alpha=alpha)
    res = []
    def add(operation, name, f, keeps_batch=True): res.append(Method(operation, name, f, keeps_batch))
    add('CutMix', 'cekd_fastai', CutMix(alpha).mix)
    add('CutMix', 'torchvision', v2.CutMix(alpha=alpha, num_classes=n_classes))
    add('CutMix', 'fastai + clone', from_fastai(stock.CutMix, alpha, True))
    add('CutMix', 'timm + clone', from_timm(True, **cut))
    add('CutMix', 'fastai, in place', from_fastai(stock.CutMix, alpha), False)
    add('CutMix', 'timm, in place', from_timm(**cut), False)
    add('MixUp', 'cekd_fastai', MixUp(alpha).mix)
    add('MixUp', 'torchvision', v2.MixUp(alpha=alpha, num_classes=n_classes))
    add('MixUp', 'timm + clone', from_timm(True, mixup_alpha=alpha))
    add('MixUp', 'timm, in place', from_timm(mixup_alpha=alpha), False)
    add('MixUp per sample', 'cekd_fastai', MixUp(alpha, per='sample').mix)
    add('MixUp per sample', 'fastai', from_fastai(stock.MixUp, alpha))
    add('MixUp per sample', 'timm + clone', from_timm(True, mixup_alpha=alpha, mode='elem'))
    add('CutMix per sample', 'cekd_fastai', CutMix(alpha, per='sample').mix)
    add('CutMix per sample', 'timm + clone', from_timm(True, mode='elem', **cut))
    add('SnapMix, without maps', 'cekd_fastai', snap())
    add('SnapMix per sample, without maps', 'cekd_fastai', snap(per='sample'))
    return res

def timed(f, x, y):
    "Milliseconds of one call"
    if x.is_cuda: torch.cuda.synchronize()
    start = time.perf_counter()
    f(x, y)
    if x.is_cuda: torch.cuda.synchronize()
    return 1000*(time.perf_counter()-start)

def measure(dev, bs, size, rounds, alpha):
    "Rows of one device"
    ms = methods(alpha)
    x,y = torch.rand(bs, 3, size, size, device=dev),torch.randint(0, n_classes, (bs,), device=dev)
    kept,written = x.clone(),x.clone()
    times = [[] for _ in ms]
    for r in range(rounds+3): # the first three warm up
        for t,m in zip(times, ms):
            took = timed(m.f, kept if m.keeps_batch else written, y)
            if r>2: t.append(took)
    assert torch.equal(kept, x), 'a method that should leave its batch alone has written into it'
    medians = [statistics.median(t) for t in times]
    ours = {m.operation:t for m,t in zip(ms, medians) if m.name=='cekd_fastai'}
    def row(m, median, fastest):
        return dict(device=dev.type, operation=m.operation, method=m.name, keeps_batch=m.keeps_batch,
            ms=round(median, 3), min_ms=round(fastest, 3), over_ours=round(median/ours[m.operation], 2))
    return [row(m, median, min(t)) for m,median,t in zip(ms, medians, times)]

def table(rows):
    "The rows as a table in markdown"
    lines = ['| device | operation | method | keeps the batch | ms | fastest ms | over ours |','|---|---|---|---|---|---|---|']
    for r in rows:
        cells = [r['device'], r['operation'], r['method'], 'yes' if r['keeps_batch'] else 'no']
        cells += [f'{r[k]:.2f}' for k in ('ms','min_ms','over_ours')]
        lines.append(f"| {' | '.join(cells)} |")
    return '\n'.join(lines)

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
    devices = ['cpu']+['cuda']*torch.cuda.is_available()
    rows = [r for d in devices for r in measure(torch.device(d), bs, size, rounds, alpha)]
    command = f'python benchmarks/mix_cost.py --bs {bs} --size {size} --rounds {rounds} --alpha {alpha:g}'
    if threads: command += f' --threads {threads}'
    title = f'Time to mix a batch of {bs} at {size} px (median of {rounds})'
    write_result('mix_cost', title, command, rows, table(rows), threads=torch.get_num_threads())
    print(table(rows))
