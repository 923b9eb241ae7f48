"""How wrong the labels of mixed photographs are, by the boxes of real birds: first classes of CUB-200-2011 at 112 px, the same
boxes for every method.

    python benchmarks/label_noise.py --data CUB_200_2011 --weights mobilenet_v2.pth

The evidence is the bird's bounding box: the deserved weight of the host is its share of the two birds' boxes that the mixed
image shows. SnapMix uses the maps of a MobileNetV2 with ImageNet weights whose last stage was fine-tuned on these classes for a
few epochs."""
from fastai.vision.all import *
from fastcore.script import call_parse
from cekd_fastai.all import *
from common import write_result

def table(noise):
    "The measurement as a table in markdown"
    lines = ['| method | error | of half and half | without evidence | images |','|---|---|---|---|---|']
    lines += [f'| {r.Index} | {r.error:.3f} | {r.half:.3f} | {r.blank:.3f} | {r.images} |' for r in noise.itertuples()]
    return '\n'.join(lines)

@call_parse
def main(
    data:str='CUB_200_2011', # Folder of CUB-200-2011
    weights:str='mobilenet_v2_tfquant.pth', # Checkpoint of `mobilenetv2_100` with TensorFlow's padding
    classes:int=20, # The first so many
    epochs:int=3,   # Of fine-tuning
    alpha:float=5., # Of all methods
    rounds:int=4,   # Times that each image is mixed
):
    "Measure the label noise of each method, and write benchmarks/results/label_noise.json"
    set_seed(42)
    dls = fine_grained_dls(data, size=112, bs=32, classes=classes, num_workers=0, in_memory=True)
    padding = dict(pad_type='same')
    learn = branch_learner(dls, 'mobilenetv2_100', 1, weights=weights, arch_args=padding, metrics=accuracy, freeze_bn=True)
    learn.freeze_to(1)
    with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-3)
    acc = 100*learn.validate()[1]
    mixes = {'CutMix':CutMix(alpha), 'CutMix, drawn weight':CutMix(alpha, correct_lam=False), 'MixUp':MixUp(alpha)}
    mixes['SnapMix'] = SnapMix(alpha)
    noise = label_noise(mixes, dls, learn=learn, kind='box', rounds=rounds)
    title = f'Error of the label weights by the boxes of real birds, {classes} classes of CUB-200-2011, 112 px ' + \
        f'(SnapMix uses a network of {acc:.0f} % accuracy)'
    command = f'python benchmarks/label_noise.py --classes {classes} --epochs {epochs} --alpha {alpha:g} --rounds {rounds}'
    write_result('label_noise', title, command, noise.reset_index().to_dict('records'), table(noise))
    print(table(noise))
