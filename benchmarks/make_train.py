"""The main job, `make train`: plain, plain with SnapMix, and CEKD on the drawn birds, each for the same number of epochs.

As on real birds, nobody starts from random weights: a small backbone is trained first, on 28 *other* drawn species, and all three start from it."""
import sys,time
from cekd_fastai import job # before fastai, whose import makes torch warn: this room filters the warning; its `run` is not fastcore's, which comes with the star
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from cekd_fastai.all import *
from cekd_fastai.core import one_sentence,write_whole
from collect import defaults # after fastai, which has one of its own
from common import here,table

net = dict(channels=(24,48,96,128), num_classes=28)
# One network and schedule for all; 84 pixels are a crop from the 96 of the drawn birds
common = dict(data='synthetic', arch='resnet10t', arch_args=[f'{k}={v}' for k,v in net.items()], size=84, bs=32, epochs=12, lr=2e-3, wd=.05, in_memory=True)
# Half of the batches are mixed: in so short a run every mixed batch is one less to learn the parts from (benchmarks/results/synthetic.json has both)
half = dict(mix='snapmix', mix_prob=.5)
methods = {'plain': dict(method='plain', mix='none'), 'plain + SnapMix': dict(method='plain', **half), 'CEKD + SnapMix': dict(method='cekd', **half)}

def backbone(epochs=15, size=84):
    "Weights of a small network trained on drawn species other than the 20 of `synthetic`, made once for each size of picture"
    file = here.parent/'runs'/('backbone.pth' if size==84 else f'backbone{size}.pth')
    if file.exists(): return file
    print('A backbone first, on 28 other species', flush=True)
    birds = make_birds(here.parent/'runs'/'birds48', n_species=48, n_images=31, n_train=30, seed=7)
    set_seed(7)
    dls = fine_grained_dls(birds, size=size, bs=32, classes=read_table(birds).classes[20:], in_memory=True)
    learn = branch_learner(dls, 'resnet10t', 1, pretrained=False, arch_args=net, wd=.05, metrics=accuracy, cbs=ChannelsLast())
    learn.fit_one_cycle(epochs, 3e-3)
    write_whole(file, lambda p: torch.save(learn.model.state_dict(), p))
    return file

def main():
    "Train the three and print their table"
    start,rows = time.time(),[]
    weights = str(backbone())
    for label,kw in methods.items():
        print(f'\n{label}', flush=True)
        out = here.parent/'runs'/'make_train'/label.replace(' ', '')
        rows.append(dict(method=label, **job.run(defaults | common | kw | dict(weights=weights, force=True, out=str(out)))))
    print(f'\nTest accuracy after {common["epochs"]} epochs on 20 species of drawn birds, seed {defaults["seed"]} ({time.time()-start:.0f} s in all):\n\n{table(rows, seconds=True)}\n')
    plain,mixed,cekd = (100*o['accuracy'] for o in rows)
    times = rows[2]['seconds']/rows[0]['seconds']
    print(f'CEKD is {cekd-mixed:+.1f} points from its own baseline, the same mix without it, and {cekd-plain:+.1f} from plain training, for the same epochs '
        f'and {times:.1f} times the seconds of plain; one run scatters by about 2.')
    print('For the same multiply-adds, on photographs and with more seeds: benchmarks/README.md, where two branches with label smoothing are level with CEKD or above.')
    print(f'Reports and models: {here.parent/"runs"/"make_train"}. Other seeds and methods: benchmarks/results/synthetic.json')

if __name__=='__main__':
    try: main()
    except (ValueError,OSError) as e: sys.exit(f'make train: {one_sentence(e)}')
    except KeyboardInterrupt: sys.exit(130)
