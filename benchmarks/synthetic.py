"""The drawn birds with the backbone, network and schedule of `make train`: plain, CutMix, SnapMix and CEKD, several seeds.

    python benchmarks/synthetic.py"""
from fastcore.script import call_parse
from common import collect,table
from make_train import backbone,common,half

methods = {'plain': dict(method='plain', mix='none'), 'CutMix': dict(method='plain', mix='cutmix'), 'SnapMix': dict(method='plain', mix='snapmix'),
    'SnapMix, half the batches': dict(method='plain', **half),
    'CEKD + SnapMix': dict(method='cekd', mix='snapmix'), 'CEKD + SnapMix, half the batches': dict(method='cekd', **half)}

@call_parse
def main(
    seeds:int=3, # Number of seeds, from 0
):
    "Train each method, and collect the runs in benchmarks/results/synthetic.json"
    title = f"20 species of drawn birds, {common['size']} px, a small ResNet that knows 28 other species, {common['epochs']} epochs"
    rows = collect('synthetic', methods, common | dict(weights=str(backbone())), range(seeds), f'python benchmarks/synthetic.py --seeds {seeds}', title, hide=['weights'])
    print(table(rows))
