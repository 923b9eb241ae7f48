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
    x = torch.zeros(1,3,front.common['size'],front.common['size'])
    nets = [branch_net('resnet10t', 20, 1, pretrained=False, **o).eval() for o in (front.net,front.small)]
    assert macs(nets[0], x)==pytest.approx([front.trunk,front.branch], abs=.06)
    assert sum(macs(nets[1], x))==pytest.approx(front.student, abs=.06)
    for k in front.methods: assert front.share(k)==pytest.approx(1, rel=.02)
    assert front.cost(front.cekd)==pytest.approx(2*front.cost(front.recipe)) # a clean pass and a mixed one
    teacher = sum(front.trunk+front.methods[k]['n_branches']*front.branch for k in front.teachers)/len(front.teachers)
    alone,more = map(front.cost, front.taught)
    assert alone==pytest.approx((3*front.student+teacher)/(3*front.student)) and more==2*alone # a batch without labels beside each

def test_result_file_has_five_seeds_of_each_way():
    res = json.loads(file.read_text())
    for k in front.methods:
        d = [r for r in res['runs'] if r['method']==k]
        assert sorted(r['seed'] for r in d)==list(range(len(d))) and len(d)>=5, k
        assert all(r['args']['epochs']==front.epochs_of(k) for r in d), k
    assert res['table']==front.table_of(res['runs'])
    assert '/' not in json.dumps([r['args'] for r in res['runs']]) # no folder of a machine

def rows(*accs): return [dict(method=k, seed=0, accuracy=a, train=1.) for k,a in zip(front.methods, accs)]

def kept(cekd):
    "Five seeds in which the recipe is three points above plain training, CEKD as far as asked, and a student five or ten points above labels"
    res = []
    for s in range(5):
        for r,off in zip(rows(.4,.42,.43,.4,.1,.1,.12,.15,.2), (0,0,0,cekd+.01*(s%2),0,.01*(s%2),0,0,0)): res.append(r | dict(seed=s, accuracy=r['accuracy']+off))
    return res

def test_closing_lines_are_those_of_the_run_and_of_the_seeds():
    now,seeds,bar,began,_ = front.closing(rows(.5,.51,.525,.49,.125,.12,.13,.2,.3), kept(.03))
    assert 'has 12.5 % by the labels of its 80 images, 12.0 (-0.5) by smoothed labels' in now
    assert 'the same multiply-adds: 20.0 (+7.5)' in now and now.endswith('With 600 images more, which nobody has labelled: 30.0 (+17.5).')
    assert 'knows 28 other species' in began
    alone,more = front.taught
    assert 'Over 5 seeds' in seeds and 'smoothed labels +0.4 ± 0.2, level with it' in seeds
    assert f'{alone} +5.0 ± 0.0, above it; {more} +10.0 ± 0.0, above it. {alone} over labels, MixUp, the best by labels: +3.0 ± 0.0.' in seeds
    assert f'{front.recipe} +3.0 ± 0.0, above it; {front.cekd} +3.4 ± 0.2, above it' in bar and f'{front.epochs_of(front.cekd)} epochs' in bar
    assert 'above label smoothing (+1.4 ± 0.2)' in bar and f'level with {front.recipe} (+0.4 ± 0.2)' in bar

@pytest.mark.parametrize('off,word', [(.06,'above'),(-.02,'below')])
def test_two_standard_errors_are_a_difference(off, word): assert f'{word} {front.recipe}' in front.closing(rows(*[.5]*9), kept(off))[2]

def test_a_row_begins_when_what_it_needs_is_there(monkeypatch):
    "The backbone comes before the ways, and both teachers before those they teach."
    done = []
    def run(o):
        done.append(o['out'])
        return o
    monkeypatch.setattr(front, 'backbone', lambda seed: done.append('backbone'))
    monkeypatch.setattr(front, 'run', run)
    monkeypatch.setattr(front, 'all_birds', lambda: 'birds')
    with front.executor(1) as ex: res = dict(front.results(ex, 3))
    assert res.keys()==front.methods.keys() and all(o['seed']==3 for o in res.values())
    places = {k:done.index(str(front.out_of(k, 3))) for k in front.methods}
    assert done.index('backbone')<min(places[k] for k in front.ways)
    assert max(places[k] for k in front.teachers)<min(places[k] for k in front.taught)

def test_files_of_a_row(monkeypatch):
    "A way begins at the backbone of its seed, a taught student with two networks and images without labels, and a student by labels with nothing."
    monkeypatch.setattr(front, 'backbone', lambda seed: f'backbone{seed}')
    monkeypatch.setattr(front, 'network', lambda k, seed: f'{k} {seed}')
    for o in ('all_birds','more_birds'): monkeypatch.setattr(front, o, lambda o=o: o)
    files = {k:front.with_files(front.job(k, 3)) for k in front.methods}
    assert all(files[k]['weights']=='backbone3' for k in front.ways) and not any(files[k]['weights'] for k in front.students)
    alone,more = (files[k] for k in front.taught)
    assert alone['teachers']==more['teachers']==[f'{k} 3' for k in front.teachers]
    assert more['method_args']==[*alone['method_args'],'unlabeled=more_birds/images']

def test_a_record_has_every_epoch_and_two_validations():
    learn = synth_learner(n_trn=1, n_val=1, metrics=mse, path=None)
    with learn.no_bar(), learn.no_logging(): learn.fit(10, cbs=front.Seldom())
    hist = history(learn)
    assert len(hist)==10 and hist.train_loss.notna().all() and np.flatnonzero(hist.mse.notna()).tolist()==[4,9]
