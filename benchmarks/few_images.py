"""Few photographs of look-alikes, trained until they are known by heart: five ways on the drawn birds, each with the same multiply-adds.

    python benchmarks/few_images.py --seeds 5 # benchmarks/results/few_images.json; a second start goes on where the first ended

Each of 20 species has only a few training images, so every network here knows them all, as on real birds. And as on real birds nobody
starts from random weights: a small backbone is trained first, on 28 *other* drawn species, and all start from it. Size, images and
epochs were fixed with plain training alone, on other drawings, so that it knows its training images. SnapMix's look at the clean
image is not counted in the multiply-adds. `fine_tune` is what a fastai user writes: `aug_transforms`, `vision_learner` and `fine_tune` with
its default rate; the epoch with a frozen body counts two thirds."""
import json,time
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from fastcore.script import call_parse
from cekd_fastai.all import *
from synthetic import backbone,net
from common import here,paired,paired_table,write_result # after fastai
from fine_tune import NoValid,user_dls

runs = here.parent/'runs'
size,trunk,branch = 56,28.05,1.08 # of a picture, and million multiply-adds
epochs,per_class,rate,wd = 30,8,2e-3,.05 # few images for many epochs, so that plain training knows them all
# Branches, label smoothing, and images that are distilled: half of the batches are mixed, and pass the network clean as well
methods = {'fine_tune': None, 'plain': (1,0,None), 'label smoothing': (1,.1,None), '2 branches, label smoothing': (2,.1,None),
    'CEKD + SnapMix, label smoothing': (2,.1,SnapMix)}

def cost(n, mix): return (trunk+n*branch)*(1.5 if mix else 1)/(trunk+branch)
def epochs_of(name):
    "Whole epochs of a way within those of plain training, without the frozen one of `fine_tune`"
    return epochs-1 if name=='fine_tune' else round(epochs/cost(methods[name][0], methods[name][2]))
def share(name):
    "Multiply-adds of a way over those of plain training"
    return (epochs-1/3)/epochs if name=='fine_tune' else epochs_of(name)*cost(methods[name][0], methods[name][2])/epochs

def user_learner(birds, weights):
    "What a fastai user has: the same network and weights, with `vision_learner`"
    dls = user_dls(read_table(birds), size, 96, imagenet_stats)
    learn = vision_learner(dls, 'resnet10t', pretrained=False, metrics=accuracy, cbs=ChannelsLast(), channels=net['channels'])
    state = {k.replace('trunk.', '').replace('branches.0.', ''):v for k,v in torch.load(weights, weights_only=True).items() if 'heads' not in k}
    learn.model[0].model.load_state_dict(state)
    return learn

def own_learner(name, seed, birds, weights):
    "A learner of this library"
    n,smooth,mix = methods[name]
    dls = fine_grained_dls(birds, size=size, bs=32, in_memory=True)
    loss = LabelSmoothingCrossEntropyFlat(eps=smooth) if smooth else CrossEntropyLossFlat()
    cbs = [ChannelsLast()] + ([mix(prob=.5),CEKD()] if mix else [])
    set_seed(seed)
    return branch_learner(dls, 'resnet10t', n, pretrained=False, weights=weights, arch_args=net, loss_func=loss, wd=wd,
        metrics=accuracy, cbs=cbs)

def fit(learn, name):
    if name=='fine_tune': return learn.fine_tune(epochs_of(name))
    lrs = [rate]*(len(learn.splitter(learn.model))-1)+[10*rate] # new heads learn faster
    learn.fit_one_cycle(epochs_of(name), lrs)

def train(name, seed, birds, weights):
    "Train one way, then read the test images once"
    set_seed(seed)
    learn,start = user_learner(birds, weights) if name=='fine_tune' else own_learner(name, seed, birds, weights),time.time()
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(NoValid()): fit(learn, name)
    secs = time.time()-start
    with learn.no_bar(), learn.no_logging(): known,acc = (float(learn.validate(ds_idx=i)[1]) for i in (0,1))
    return dict(method=name, seed=seed, epochs=epochs_of(name), accuracy=round(acc, 5), train=round(known, 5), seconds=round(secs, 1))

def table(rows):
    "One line for each way: its epochs, its accuracy, and its gain over plain training of the same seed"
    words = {k:f"{'1 + ' if k=='fine_tune' else ''}{epochs_of(k)}" for k in methods}
    return paired_table(rows, words, {k:share(k) for k in methods})

def write(rows):
    "The result file of the study"
    title = f'20 species of drawn birds, {per_class} training images of each, {size} px, 1,000 test images, a small ResNet that knows 28 ' + \
        'other species, equal multiply-adds'
    write_result('few_images', title, f"python benchmarks/few_images.py --seeds {1+max(r['seed'] for r in rows)}", rows, table(rows))

def verdict(rows):
    "What was gained over what, in words"
    return '; '.join(f'{k} {np.mean(v):+.1f}' for k,v in paired(rows).items())

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
