"""Real birds: the first 50 classes of CUB-200-2011 at 112 px, MobileNetV2 from ImageNet weights, its last stage fine-tuned on the CPU.

    python benchmarks/cub50.py --data CUB_200_2011 --weights mobilenet_v2.pth

`--data` is the folder in the official layout, `--weights` a local checkpoint of `mobilenetv2_100` with TensorFlow's padding.
The runs below used photographs reduced to 160 px on the shorter side. Validation is the official test split."""
from fastcore.script import call_parse
from common import collect,table

methods = {'plain': dict(method='plain', mix='none'), 'SnapMix': dict(method='plain', mix='snapmix'),
    'CEKD + CutMix': dict(method='cekd', mix='cutmix'), 'CEKD + SnapMix': dict(method='cekd', mix='snapmix')}

@call_parse
def main(
    data:str='CUB_200_2011', # Folder of CUB-200-2011
    weights:str='mobilenet_v2_tfquant.pth', # Checkpoint
    epochs:int=15, # Of each run
    seeds:int=1,   # Number of seeds, from 0
):
    "Train each method, and collect the runs in benchmarks/results/cub50.json"
    common = dict(data=data, weights=weights, arch='mobilenetv2_100', arch_args=['pad_type=same'], freeze_bn=True, freeze_trunk=True, in_memory=True,
        classes=50, size=112, bs=32, epochs=epochs, opt='sgd', lr=.003, wd=1e-4)
    command = f'python benchmarks/cub50.py --epochs {epochs} --seeds {seeds}'
    title = f'First 50 classes of CUB-200-2011, 112 px, MobileNetV2 from ImageNet, last stage fine-tuned, {epochs} epochs'
    print(table(collect('cub50', methods, common, range(seeds), command, title, hide=('data','weights'))))
