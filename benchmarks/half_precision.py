"""What `HalfPrecision` gains or costs on this processor: a step of training, and a batch of predictions, against full precision.

    python benchmarks/half_precision.py

Steps in both precisions alternate in one process, so that whatever else the machine does falls on both. All is in channels last, on one thread."""
import statistics,time
import torch
from fastcore.script import call_parse
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from cekd_fastai.core import HalfPrecision,amp_context
from common import write_result
from step_cost import ready

MATRIX_UNITS = 'amx_bf16' # as Linux calls them

def seconds(f):
    "How long a call takes"
    start = time.perf_counter()
    f()
    return time.perf_counter()-start

def predict(learn, x):
    "A batch of predictions in the precision of the learner"
    net = learn.model.eval()
    with torch.inference_mode(), amp_context(learn): net(x)
    net.train()

def processor():
    "Whether this processor multiplies matrices of bfloat16, in words"
    file = Path('/proc/cpuinfo')
    if not file.exists(): return 'a processor that does not say'
    return 'a processor '+('with' if MATRIX_UNITS in file.read_text() else 'without')+' matrix units (AMX)'

@call_parse
def main(
    archs:str='resnet18,resnet50,mobilenetv2_100,tf_efficientnet_lite0,convnext_atto,vit_tiny_patch16_224', # Backbones, separated by commas
    size:int=224, # Pixels
    bs:int=16,    # Images in a batch
    rounds:int=5, # Rounds of alternating steps
):
    "Time a step of training and a batch of predictions in full and in half precision"
    torch.set_num_threads(1)
    rows = []
    x,y = torch.randn(bs,3,size,size),torch.randint(0, 50, (bs,))
    last = x.contiguous(memory_format=torch.channels_last)
    for arch in archs.split(','):
        learns = {k:ready(arch, 1, [ChannelsLast,*cbs], x, y) for k,cbs in dict(full=[], half=[HalfPrecision]).items()}
        times = {}
        for _ in range(rounds+1):
            for k,l in learns.items():
                times.setdefault(f'train_{k}', []).append(seconds(lambda: l.one_batch(0, (x,y))))
                times.setdefault(f'predict_{k}', []).append(seconds(lambda: predict(l, last)))
        med = {k:round(statistics.median(v[1:]), 4) for k,v in times.items()} # the first warms up
        ratio = {f'{k}_ratio':round(med[f'{k}_half']/med[f'{k}_full'], 3) for k in ('train','predict')}
        rows.append(dict(arch=arch) | med | ratio | dict(all_seconds={k:[round(o, 4) for o in v] for k,v in times.items()}))
        print(arch, ratio, flush=True)
    lines = ['| backbone | a step in bfloat16 over one in full precision | a batch of predictions |','|---|---|---|']
    lines += [f"| {r['arch']} | {r['train_ratio']:.2f} | {r['predict_ratio']:.2f} |" for r in rows]
    command = f'python benchmarks/half_precision.py --archs {archs} --size {size} --bs {bs} --rounds {rounds}'
    title = f'Half precision on {processor()}, one thread, {size} px, batch of {bs}'
    write_result('half_precision', title, command, rows, lines)
    print('\n'.join(lines))
