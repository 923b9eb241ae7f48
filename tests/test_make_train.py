"What `make train` prints, without training: its lines are computed from its runs and from the committed seeds."
import json,sys
from pathlib import Path
import numpy as np,pytest,torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
import make_train as front
from cekd_fastai.all import branch_net,history
from fastai.test_utils import synth_learner
from fastai.metrics import mse
from test_recipe_studies import macs

file = front.here/'results'/'make_train.json'

def test_ways_have_equal_multiply_adds():
    net = branch_net('resnet10t', 20, 1, pretrained=False, **front.net).eval()
    size = front.common['size']
    assert macs(net, torch.zeros(1,3,size,size))==pytest.approx([front.trunk,front.branch], abs=.06)
    for k in front.methods: assert front.share(k)==pytest.approx(1, rel=.02)
    assert front.cost(front.cekd)==pytest.approx(2*front.cost(front.recipe)) # a clean pass and a mixed one

def test_result_file_has_five_seeds_of_each_way():
    res = json.loads(file.read_text())
    for k in front.methods:
        d = [r for r in res['runs'] if r['method']==k]
        assert sorted(r['seed'] for r in d)==list(range(len(d))) and len(d)>=5, k
        assert all(r['args']['epochs']==front.epochs_of(k) for r in d), k
    assert res['table']==front.table_of(res['runs'])

def rows(*accs): return [dict(method=k, seed=0, accuracy=a, train=1.) for k,a in zip(front.methods, accs)]

def kept(cekd):
    "Five seeds in which the recipe is three points above plain training, and CEKD as far as asked"
    res = []
    for s in range(5):
        for r,off in zip(rows(.4,.42,.43,.4), (0,0,0,cekd+.01*(s%2))): res.append(r | dict(seed=s, accuracy=r['accuracy']+off))
    return res

def test_closing_lines_are_those_of_the_run_and_of_the_seeds():
    now,seeds,bar = front.closing(rows(.5,.51,.525,.49), kept(.03))
    assert 'have 52.5 % where plain training has 50.0: +2.5 points' in now and 'alone: +1.0' in now and f'{front.epochs_of(front.cekd)} epochs' in now
    assert now.endswith(': -1.0.') and 'Over 5 seeds' in seeds
    assert f'{front.recipe} +3.0 ± 0.0, above it' in seeds and f'{front.cekd} +3.4 ± 0.2, above it' in seeds
    assert 'above label smoothing (+1.4 ± 0.2)' in bar and f'level with {front.recipe} (+0.4 ± 0.2)' in bar

@pytest.mark.parametrize('off,word', [(.06,'above'),(-.02,'below')])
def test_two_standard_errors_are_a_difference(off, word): assert f'{word} {front.recipe}' in front.closing(rows(.5,.5,.5,.5), kept(off))[2]

def test_a_record_has_every_epoch_and_four_validations():
    learn = synth_learner(n_trn=1, n_val=1, metrics=mse, path=None)
    with learn.no_bar(), learn.no_logging(): learn.fit(10, cbs=front.Seldom())
    hist = history(learn)
    assert len(hist)==10 and hist.train_loss.notna().all() and np.flatnonzero(hist.mse.notna()).tolist()==[2,4,7,9]
