"What the study of few images and the one beside `fine_tune` count: epochs for equal multiply-adds, and differences by seed."
import sys
from pathlib import Path
import pytest,torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
import fine_tune as recipe,few_images as door
from cekd_fastai.all import branch_net
from torch.utils.flop_counter import FlopCounterMode

def macs(net, x):
    "Million multiply-adds of the trunk and of a branch"
    res = []
    for f in (net.trunk,lambda o: net.heads[0](net.branches[0](o))):
        with torch.no_grad(), FlopCounterMode(display=False) as c: x = f(x)
        res.append(c.get_total_flops()/2e6)
    return res

@pytest.mark.parametrize('mod,arch,size,kw', [(recipe,recipe.arch,96,{}),(door,'resnet10t',door.size,door.net)])
def test_multiply_adds_are_those_of_the_network(mod, arch, size, kw):
    net = branch_net(arch, 20, 1, pretrained=False, **kw).eval()
    assert macs(net, torch.zeros(1,3,size,size))==pytest.approx([mod.trunk,mod.branch], abs=.06)

def test_no_row_of_the_recipe_costs_more_than_fine_tune():
    "The frozen epoch of `fine_tune` counts two thirds; the recipe has whole epochs within that."
    for s in recipe.sets.values():
        for k,m in {**recipe.methods,**recipe.stairs}.items():
            if not recipe.is_fair(m, s['epochs']):
                assert k=='CEKD + SnapMix, label smoothing' and s['epochs']==5 # too few epochs for its two passes
                continue
            share = recipe.compute(m, s['epochs'])
            assert share==1 if m.get('fastai') is not None and 'whole' not in m['fastai'] else .8<share<=1, k
    two = recipe.methods['2 branches, label smoothing']
    assert recipe.epochs_of(two, 5)==4 and recipe.compute(two, 5)==pytest.approx(4*96.5/70.6/(17/3))

def test_the_rate_of_fine_tune_is_chosen_on_held_out_images_only():
    row = lambda stage, rate, acc: dict(stage=stage, method='fine_tune', rate=rate, accuracy=acc)
    rows = [row('select',2e-3,.5),row('select',5e-3,.6),row('final',2e-3,.9)]
    assert (recipe.best(rows),recipe.best(rows[2:]))==(5e-3,2e-3)

def test_ways_to_train_on_few_images_have_equal_multiply_adds():
    for k in door.methods: assert door.share(k)==pytest.approx(1, rel=.02)

def test_differences_are_paired_by_seed():
    row = lambda method, seed, acc: dict(method=method, seed=seed, epochs=9, accuracy=acc, train=1., seconds=1.)
    a,b = 'plain','label smoothing'
    rows = [row(a,0,.5),row(a,1,.7),row(b,0,.53),row(b,1,.71)]
    line = door.table(rows).split('\n')[3]
    assert '| 62.0 | +2.0 ± 1.0 | 53.0, 71.0 |' in line and 'label smoothing +2.0' in door.verdict(rows)
