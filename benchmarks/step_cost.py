"""What a step of CEKD costs: time over plain, beside the ratio of multiply-adds.

Multiply-adds are counted on a forward pass F; a pass that trains costs 3 F (forward, and backward for inputs and weights), one that does not costs F.
So plain is 3 F, SnapMix alone 4 F (its activation maps are a pass without gradient), and CEKD 2 x 3 F of the network with two branches.
(torch's counter is not used on the backward pass, where it overcounts depthwise convolutions.)

    python benchmarks/step_cost.py

Steps of all methods alternate in one process, so that whatever else the machine does falls on all of them."""
import statistics,time
import torch
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from fastai.vision.all import *
from cekd_fastai.all import *
from common import write_result

# branches, callbacks, forward passes that a step is worth
methods = {'plain': (1,[],3), 'plain + SnapMix': (1,[SnapMix],4), 'CEKD + CutMix': (2,[CutMix,CEKD],6), 'CEKD + SnapMix': (2,[SnapMix,CEKD],6)}

def ready(arch, n, cbs, x, y):
    "A learner in the middle of training, without progress bar and recorder"
    dls = DataLoaders.from_dsets(L(zip(x,y)), L(zip(x,y)), bs=len(x), num_workers=0, device='cpu')
    dls.c = 50
    learn = branch_learner(dls, arch, n, pretrained=False, loss_func=CrossEntropyLossFlat(), cbs=[o() for o in cbs], default_cbs=False)
    learn.add_cbs([TrainEvalCallback,CastToTensor])
    learn.create_opt()
    learn.n_epoch,learn.n_iter,learn.epoch = 1,1000,0
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    return learn

def forward_macs(learn, x):
    "Multiply-adds of one forward pass"
    with torch.no_grad(), FlopCounterMode(display=False) as count: learn.model.branch_forward(x)
    return count.get_total_flops()/2

@call_parse
def main(
    archs:str='resnet18,mobilenetv2_100', # Backbones, separated by commas
    size:int=112, # Pixels
    bs:int=32,    # Images in a batch
    rounds:int=8, # Rounds of alternating steps
):
    "Time and count a training step of each method"
    rows = []
    for arch in archs.split(','):
        x,y = torch.randn(bs,3,size,size),torch.randint(0,50,(bs,))
        learns = {k:ready(arch, n, cbs, x, y) for k,(n,cbs,_) in methods.items()}
        macs = {k:passes*forward_macs(learns[k], x) for k,(_,_,passes) in methods.items()}
        for l in learns.values(): l.one_batch(0, (x,y))
        times = {k:[] for k in learns}
        for _ in range(rounds):
            for k,l in learns.items():
                start = time.perf_counter()
                l.one_batch(0, (x,y))
                times[k].append(time.perf_counter()-start)
        med = {k:statistics.median(v) for k,v in times.items()}
        for k in learns: rows.append(dict(arch=arch, method=k, gmacs=round(macs[k]/1e9, 2), seconds=round(med[k], 4), mac_ratio=round(macs[k]/macs['plain'], 3),
            time_ratio=round(med[k]/med['plain'], 3), over_bound=round(med[k]/med['plain']/(macs[k]/macs['plain']), 3), all_seconds=[round(o, 4) for o in times[k]]))
    lines = ['| backbone | method | multiply-adds over plain | time over plain | time over bound |','|---|---|---|---|---|']
    lines += [f"| {r['arch']} | {r['method']} | {r['mac_ratio']:.2f} | {r['time_ratio']:.2f} | {r['over_bound']:.2f} |" for r in rows]
    command = f'python benchmarks/step_cost.py --archs {archs} --size {size} --bs {bs} --rounds {rounds}'
    write_result('step_cost', f'Cost of a training step, {size} px, batch of {bs}', command, rows, lines)
    print('\n'.join(lines))
