"""The drawn birds for twelve epochs, in which nothing overfits: plain, CutMix, SnapMix, CEKD, and the controls that say where a gain comes from.

    python benchmarks/synthetic.py

As on real birds, nobody starts from random weights: a small backbone is trained first, on 28 *other* drawn species, and all start from it.
An earlier split and heavier clean labels looked better in trials with seeds 0 to 2, on the same test images; seeds 10 to 12 then did not bear that out.

    python benchmarks/synthetic.py --few --first 0 --seeds 5

has the other regime, the ways of `make train` (make_train.py), in benchmarks/results/make_train.json."""
from collect import collect
from fastai.vision.all import *
from fastcore.script import call_parse
from cekd_fastai.all import *
import make_train as front
from common import here,table # after fastai

net = dict(channels=(24,48,96,128), num_classes=28)
# One network and schedule for all; 84 pixels are a crop from the 96 of the drawn birds
common = dict(data='synthetic', arch='resnet10t', arch_args=[f'{k}={v}' for k,v in net.items()], size=84, bs=32, epochs=12, lr=2e-3, wd=.05, in_memory=True)
# Half of the batches are mixed: in so short a run every mixed batch is one less to learn the parts from
half = dict(mix='snapmix', mix_prob=.5)
two = dict(split='layer2', n_branches=2)
early = dict(method='cekd', split='layer2', **half)
methods = {'plain': dict(method='plain', mix='none'), 'CutMix': dict(method='plain', mix='cutmix'), 'SnapMix': dict(method='plain', mix='snapmix'),
    'SnapMix, half the batches': dict(method='plain', **half), 'early split, no mixing': dict(method='plain', mix='none', **two),
    'early split, clean and mixed, no distillation': early | dict(method_args=['w_clean=3','w_cross=0']),
    'CEKD + SnapMix': dict(method='cekd', mix='snapmix'), 'CEKD + SnapMix, half the batches': dict(method='cekd', **half),
    'CEKD + SnapMix, early split, w_clean 3': early | dict(method_args=['w_clean=3'])}

def backbone(epochs=15, size=84):
    "Weights of a small network trained on drawn species other than the 20 of `synthetic`, made once for each size of picture"
    def dls():
        birds = make_birds(here.parent/'runs'/'birds48', n_species=48, n_images=31, n_train=30, seed=7)
        return fine_grained_dls(birds, size=size, bs=32, classes=read_table(birds).classes[20:], in_memory=True)
    return front.pretrained(here.parent/'runs'/('backbone.pth' if size==84 else f'backbone{size}.pth'), dls, net, epochs)

@call_parse
def main(
    seeds:int=3,     # Number of seeds
    first:int=10,    # The first of them
    only:str='',     # Only these methods, separated by semicolons
    few:bool=False,  # The ways of `make train` instead
):
    "Train each method, and collect the runs in benchmarks/results"
    all_ = front.methods if few else methods
    labels = {k:all_[k] for k in only.split(';')} if only else all_
    each = range(first, first+seeds)
    if few: return print(front.seeds_table(labels, each))
    title = f"20 species of drawn birds, {common['size']} px, a small ResNet that knows 28 other species, {common['epochs']} epochs"
    command = 'python benchmarks/synthetic.py --first 0` and `--first 10'
    print(table(collect('synthetic', labels, common | dict(weights=str(backbone())), each, command, title, hide=['weights'])))
