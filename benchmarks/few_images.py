"""Few photographs of look-alikes, trained until they are known by heart: four ways on the drawn birds, each with the same multiply-adds.

    python benchmarks/few_images.py --seeds 5 # benchmarks/results/few_images.json; a second start goes on where the first ended

Each of 20 species has only a few training images, so every network here knows them all, as on real birds. And as on real birds nobody
starts from random weights: a small backbone is trained first, on 28 *other* drawn species, and all start from it. Size, images and
epochs were fixed with plain training alone, on other drawings, so that it knows its training images. SnapMix's look at the clean
image is not counted in the multiply-adds."""
import json,time
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from fastcore.script import call_parse
from cekd_fastai.all import *
from cekd_fastai.core import write_whole
from cekd_fastai.results import about
from make_train import backbone,net
from common import here # after fastai

runs = here.parent/'runs'
size,trunk,branch = 56,28.05,1.08 # of a picture, and million multiply-adds
epochs,per_class,rate,wd = 30,8,2e-3,.05 # few images for many epochs, so that plain training knows them all
# Branches, label smoothing, and images that are distilled: half of the batches are mixed, and pass the network clean as well
methods = {'plain': (1,0,None), 'label smoothing': (1,.1,None), '2 branches, label smoothing': (2,.1,None),
    'CEKD + SnapMix, label smoothing': (2,.1,SnapMix)}

def cost(n, mix): return (trunk+n*branch)*(1.5 if mix else 1)/(trunk+branch)
def epochs_of(n, mix): return round(epochs/cost(n, mix))

class NoValid(Callback):
    "The test images are read once, after the last epoch"
    order = -100
    def before_validate(self): raise CancelValidException

def train(name, seed, birds, weights):
    "Train one way, then test it"
    n,smooth,mix = methods[name]
    set_seed(seed)
    dls = fine_grained_dls(birds, size=size, bs=32, in_memory=True)
    loss = LabelSmoothingCrossEntropyFlat(eps=smooth) if smooth else CrossEntropyLossFlat()
    cbs = [ChannelsLast()] + ([mix(prob=.5),CEKD()] if mix else [])
    set_seed(seed)
    learn = branch_learner(dls, 'resnet10t', n, pretrained=False, weights=weights, arch_args=net, loss_func=loss, wd=wd,
        metrics=accuracy, cbs=cbs)
    groups,start = len(learn.splitter(learn.model)),time.time()
    lrs = [rate]*(groups-1)+[10*rate] # new heads learn faster
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(NoValid()): learn.fit_one_cycle(epochs_of(n, mix), lrs)
    secs = time.time()-start
    with learn.no_bar(), learn.no_logging(): known,acc = (float(learn.validate(ds_idx=i)[1]) for i in (0,1))
    return dict(method=name, seed=seed, epochs=epochs_of(n, mix), accuracy=round(acc, 5), train=round(known, 5), seconds=round(secs, 1))

def table(rows):
    "One line for each way: its epochs, its accuracy, and its gain over plain training of the same seed"
    plain = {r['seed']:r['accuracy'] for r in rows if r['method']=='plain'}
    lines = ['| method | epochs | multiply-adds | training images % | test images % | over plain | each seed |','|---|---|---|---|---|---|---|']
    for k,(n,_,mix) in methods.items():
        d = [r for r in rows if r['method']==k]
        if not d: continue
        gain = [100*(r['accuracy']-plain[r['seed']]) for r in d if r['seed'] in plain]
        share = epochs_of(n, mix)*cost(n, mix)/epochs
        each = ', '.join(f"{100*r['accuracy']:.1f}" for r in d)
        known,acc = (f'{100*np.mean([r[o] for r in d]):.1f}' for o in ('train','accuracy'))
        lines.append(f"| {k} | {d[0]['epochs']} | {share:.2f} | {known} | {acc} | {'' if k=='plain' else over(gain)} | {each} |")
    return '\n'.join(lines)

def over(gain):
    "Mean of paired differences, with its standard error where there are several"
    return f'{np.mean(gain):+.1f}' + (f' ± {np.std(gain, ddof=1)/len(gain)**.5:.1f}' if len(gain)>1 else '')

def write(rows):
    "The result file of the study"
    info = about({})
    title = f'20 species of drawn birds, {per_class} training images of each, {size} px, 1,000 test images, a small ResNet that knows 28 ' + \
        'other species, equal multiply-adds'
    res = dict(title=title, command=f"python benchmarks/few_images.py --seeds {1+max(r['seed'] for r in rows)}", versions=info['versions'], machine=info['machine'], table=table(rows), runs=rows)
    write_whole(here/'results'/'few_images.json', lambda p: p.write_text(json.dumps(res, indent=1)+'\n'))

def verdict(rows):
    "What was gained over what, in words"
    acc = {(r['method'],r['seed']):100*r['accuracy'] for r in rows}
    gains = {k: [acc[k,s]-acc['plain',s] for o,s in acc if o==k and ('plain',s) in acc] for k in methods if k!='plain'}
    return '; '.join(f'{k} {np.mean(v):+.1f}' for k,v in gains.items() if v)

@call_parse
def main(
    seeds:int=5, # Number of seeds, from 0
):
    "Train each way that is missing, and print the table"
    out = here/'results'/'few_images.json'
    weights = backbone(size=size)
    birds = make_birds(runs/f'birds20_{per_class}', n_species=20, n_images=per_class+50, n_train=per_class)
    rows = json.loads(out.read_text())['runs'] if out.exists() else []
    for seed in range(seeds):
        for name in methods:
            if any((r['method'],r['seed'])==(name,seed) for r in rows): continue
            print(f'{name}, seed {seed}', flush=True)
            rows.append(train(name, seed, birds, weights))
            write(rows)
    print(table(rows))
    print(f'Points over plain training for the same multiply-adds: {verdict(rows)}.')
