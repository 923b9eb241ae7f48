"The synthetic birds: files, determinism, part locations, interrupted runs, messages"
import json, os, sys
from itertools import combinations

import forks, numpy as np, pytest
from PIL import Image

from cekd_fastai.drawing import anatomy,bird,dataset,species
from cekd_fastai.drawing.bird import *
from cekd_fastai.drawing.dataset import *
from cekd_fastai.drawing.shapes import *
from cekd_fastai.drawing.anatomy import *
from cekd_fastai.drawing.species import *
from cekd_fastai.synthetic import *

TINY = dict(n_species=5, n_images=4, n_train=3, size=48, progress=False)

def table(path, f): return [l.split() for l in (path/f).read_text().splitlines()]
def contents(path): return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob('*') if p.is_file()}
def sisters(): return [(a,b) for a,b in combinations(bird_species(MAX_SPECIES), 2) if a.plan == b.plan and len(a.differ(b)) == 1]

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('birds')/'set', **TINY, n_workers=0)

def test_layout(birds):
    images = table(birds, 'images.txt')
    assert [int(i) for i,_ in images] == list(range(1, 21))
    assert images[0][1] == '001.Common_Finch/Common_Finch_0001_000001.jpg'
    assert sorted(f for _,f in images) == sorted(p.relative_to(birds/'images').as_posix() for p in (birds/'images').rglob('*.jpg'))
    assert [f for _,f in images] == sorted(f for _,f in images)
    assert {Image.open(birds/'images'/f).size for _,f in images} == {(48, 48)}
    classes = dict(table(birds, 'classes.txt'))
    assert len(classes) == 5
    assert all(classes[c] == f.split('/')[0] for (_,c),(_,f) in zip(table(birds, 'image_class_labels.txt'), images))
    split = [int(v) for _,v in table(birds, 'train_test_split.txt')]
    assert [sum(split[i:i+4]) for i in range(0, 20, 4)] == [3]*5
    assert table(birds, 'parts/parts.txt') == [[str(i), p] for i,p in enumerate(PARTS, 1)]
    assert [r[:2] for r in table(birds, 'parts/part_locs.txt')] == [[str(i), str(p)] for i in range(1, 21) for p in range(1, 12)]
    assert (birds/'README.md').stat().st_size and json.loads((birds/'birds.json').read_text())['n_train'] == 3

@pytest.mark.parametrize('n_workers', [1, 2])
def test_same_bytes_for_any_number_of_workers(birds, tmp_path, n_workers):
    assert contents(make_birds(tmp_path/'set', **TINY, n_workers=n_workers)) == contents(birds)

def test_same_bytes_from_spawned_processes(birds, tmp_path, monkeypatch):
    "A process of the forkserver is handed its work as a spawned one is, by `multiprocessing.spawn`; torch and fastai are imported there already."
    monkeypatch.setattr(dataset, '_context', lambda: forks._ctx)
    assert contents(make_birds(tmp_path/'set', **TINY, n_workers=1)) == contents(birds)

def test_the_seed_matters_and_images_differ(birds, tmp_path):
    other = contents(make_birds(tmp_path/'set', **TINY, n_workers=0, seed=43))
    mine = {k: v for k,v in contents(birds).items() if k.endswith('.jpg')}
    assert len(set(mine.values())) == 20
    assert all(other[k] != v for k,v in mine.items())

def test_tables_agree_with_draw_bird(birds):
    specs,parts = bird_species(5),bird_parts(birds)
    for i in (1, 7, 20):
        _,box,locs = draw_bird(specs[(i-1)//4], np.random.default_rng([42, i]), 48)
        np.testing.assert_allclose([float(v) for v in table(birds, 'bounding_boxes.txt')[i-1][1:]], box, atol=.051)
        for (p,(x,y,vis)),row in zip(locs.items(), parts.iloc[(i-1)*11:i*11].itertuples()):
            assert (row.part, row.visible) == (p, vis)
            if vis: np.testing.assert_allclose((row.x, row.y), (x, y), atol=.051)
            else: assert np.isnan(row.x) and np.isnan(row.y)

def test_hidden_parts_are_zero_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(bird, 'paint_front', lambda cv, rng: cv.front.paste(255, (0, 0, cv.n, cv.n//2)))
    rows = table(make_birds(tmp_path/'set', **TINY, n_workers=0), 'parts/part_locs.txt')
    assert {tuple(r[2:4]) for r in rows if r[4] == '0'} == {('0.0', '0.0')}
    assert 0 < sum(r[4] == '1' for r in rows) < len(rows) and all(float(r[3]) > 20 for r in rows if r[4] == '1')

def test_parts_lie_in_the_box_and_the_box_in_the_picture():
    specs,seen = bird_species(MAX_SPECIES),0
    for i in range(40):
        _,(x,y,w,h),parts = draw_bird(specs[i*6%MAX_SPECIES], np.random.default_rng(i), 64)
        assert 0 <= x < x+w <= 64 and 0 <= y < y+h <= 64
        for p,(px,py,vis) in parts.items():
            if vis: assert x-.5 <= px <= x+w+.5 and y-.5 <= py <= y+h+.5, (i, p)
            seen += vis
    assert .9 < seen/(40*11) < 1

def test_the_pixel_at_a_part_has_its_colour(monkeypatch):
    monkeypatch.setattr(bird, 'light', lambda im, bird, rng: im)
    marks = dict(bill=('curved', (58, 52, 50)), crown=('red', (206, 40, 34)), wing=('orange', (232, 120, 30)), tail=('rufous', (192, 84, 32)), eye=('plain', (22, 16, 14)))
    for part,(option,rgb) in marks.items():
        spec,n = BirdSpec('x', species.PLANS[0], **{part: option}),0
        for i in range(12):
            im,_,parts = draw_bird(spec, np.random.default_rng(i), 96)
            x,y,vis = parts[part]
            ok = np.abs(np.asarray(im).astype(int)[int(y)-1:int(y)+2, int(x)-1:int(x)+2]-rgb).sum(-1).min() < 40 if vis else False
            n += ok
        assert n >= 10, (part, n)

def test_sisters_differ_at_their_diagnostic_part_alone():
    pairs = sisters()
    for i,(a,b) in enumerate(pairs[::len(pairs)//50]):
        part, = a.differ(b)
        (ia,_,pa),(ib,_,pb) = (draw_bird(s, np.random.default_rng(i), 96) for s in (a,b))
        diff = np.abs(np.asarray(ia).astype(int)-np.asarray(ib)).max(-1) > 10
        assert diff.mean() < .10, (a.name, b.name)
        at = {p: (int(x), int(y)) for p,(x,y,vis) in pa.items() if vis}
        if part in at: assert np.hypot(*(np.argwhere(diff)[:, ::-1]-at[part]).T).min() < 3.5, (a.name, b.name, i)
        assert not [p for p,(x,y) in at.items() if p != part and diff[y, x]], (a.name, b.name, i)
        assert all(np.allclose(pa[p][:2], pb[p][:2]) for p in PARTS if p != part)

def test_hidden_parts_and_parts_outside_are_not_visible(monkeypatch):
    spec = bird_species(2)[0]
    def leaf_over_all(cv, rng): cv.front.paste(255, (0, 0, cv.n, cv.n))
    with monkeypatch.context() as m:
        m.setattr(bird, 'paint_front', leaf_over_all)
        assert not any(v for *_,v in draw_bird(spec, np.random.default_rng(0), 48)[2].values())
    rand = anatomy.Pose.random
    def left_of_the_edge(rng):
        pose = rand(rng)
        pose.x,pose.flip = -.8,True
        return pose
    monkeypatch.setattr(bird, 'paint_front', lambda cv, rng: None)
    monkeypatch.setattr(anatomy.Pose, 'random', left_of_the_edge)
    parts = draw_bird(spec, np.random.default_rng(0), 48)[2]
    assert {p: v for p,(*_,v) in parts.items()} == {p: x >= 0 for p,(x,*_) in parts.items()}
    assert not parts['bill'][2] and parts['tail'][2]

def test_diagnostic_table(birds):
    d,specs = diagnostic_parts(birds),bird_species(5)
    names = [c for _,c in table(birds, 'classes.txt')]
    assert len(d) == 5*4
    for (a,sa),(b,sb) in combinations(zip(names, specs), 2): assert d[a,b] == d[b,a] == sa.differ(sb) == sb.differ(sa)
    assert d['001.Common_Finch', names[1]] and set(d['001.Common_Finch', names[1]]) < set(species.MARKS)
    assert 'back' in d[names[0], names[4]]

def _interrupt(exc, after):
    real = dataset.draw_bird
    def draw(spec, rng, size):
        if spec == bird_species(5)[after]: raise exc
        return real(spec, rng, size)
    return draw

@pytest.mark.parametrize('n_workers', [0, pytest.param(2, marks=pytest.mark.skipif(sys.platform != 'linux', reason='a patched worker needs fork'))])
@pytest.mark.parametrize('exc', [KeyboardInterrupt(), OSError('disk full')])
def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch, n_workers, exc):
    monkeypatch.setattr(dataset, 'draw_bird', _interrupt(exc, 2))
    with pytest.raises(type(exc)): make_birds(tmp_path/'set', **TINY, n_workers=n_workers)
    assert list(tmp_path.iterdir()) == []

def test_an_interrupted_replacement_keeps_the_old_set(tmp_path, monkeypatch):
    p = make_birds(tmp_path/'set', **TINY, n_workers=0)
    before = contents(p)
    monkeypatch.setattr(dataset, 'draw_bird', _interrupt(KeyboardInterrupt(), 2))
    with pytest.raises(KeyboardInterrupt): make_birds(p, **TINY, n_workers=0, seed=1, force=True)
    assert contents(p) == before and list(tmp_path.iterdir()) == [p]

@pytest.mark.skipif(sys.platform != 'linux', reason='a patched worker needs fork')
def test_a_dead_worker_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, 'draw_bird', lambda *a: os._exit(1))
    with pytest.raises(RuntimeError, match='n_workers=0'): make_birds(tmp_path/'set', **TINY, n_workers=1)
    assert list(tmp_path.iterdir()) == []

def test_reuse_and_force(tmp_path, monkeypatch):
    p = make_birds(tmp_path/'a'/'set', **TINY, n_workers=0)
    before = contents(p)
    with monkeypatch.context() as m:
        m.setattr(dataset, 'draw_bird', _interrupt(AssertionError('drawn again'), 0))
        assert make_birds(str(p), **TINY, n_workers=0) == p
    with pytest.raises(ValueError, match='seed=42 instead of 7.*force=True'): make_birds(p, **TINY, n_workers=0, seed=7)
    assert contents(p) == before
    make_birds(p, **TINY, n_workers=0, seed=7, force=True)
    assert contents(p) != before and list(p.parent.iterdir()) == [p]
    next(p.glob('images/*/*.jpg')).unlink()
    with pytest.raises(ValueError, match='lacks 1 of its images.*force=True'): make_birds(p, **TINY, n_workers=0, seed=7)

def test_a_set_of_another_drawing_is_not_reused(tmp_path, monkeypatch):
    p = make_birds(tmp_path/'set', **TINY, n_workers=0)
    monkeypatch.setattr(dataset, '_DRAWING', dataset._DRAWING+1)
    with pytest.raises(ValueError, match='force=True'): make_birds(p, **TINY, n_workers=0)

def test_foreign_folders_are_never_touched(tmp_path):
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.txt').write_text('x')
    for force in (False, True):
        with pytest.raises(FileExistsError, match='not written by make_birds'): make_birds(tmp_path/'mine', **TINY, force=force)
    (tmp_path/'file').write_text('x')
    with pytest.raises(FileExistsError, match='not written by make_birds'): make_birds(tmp_path/'file', **TINY)
    with pytest.raises(OSError, match='cannot write to .*: choose another path'): make_birds(tmp_path/'file'/'set', **TINY)
    (tmp_path/'empty').mkdir()
    assert len(contents(make_birds(tmp_path/'empty', **TINY, n_workers=0))) == 30

@pytest.mark.parametrize('kw,msg', [
    (dict(n_species=1), 'n_species is 1: .* between 2 and 252'), (dict(n_species=253), 'n_species is 253'), (dict(n_species=2.5), 'n_species is 2.5: pass a whole number'),
    (dict(n_images=1, n_train=1), 'n_images is 1: .* at least 2'), (dict(n_images='60'), "n_images is '60': pass a whole number"),
    (dict(n_train=0), 'n_train is 0 of n_images=4: pass 1 to 3'), (dict(n_train=4), 'n_train is 4 of n_images=4'), (dict(n_train=True), 'n_train is True'),
    (dict(size=31), 'size is 31: below 32 pixels'), (dict(seed=-1), 'seed is -1: pass 0 or more'), (dict(seed=None), 'seed is None: pass a whole number'),
    (dict(n_workers=-1), 'n_workers is -1'), (dict(n_workers='all'), "n_workers is 'all'")])
def test_bad_arguments(tmp_path, kw, msg):
    with pytest.raises(ValueError, match=msg): make_birds(tmp_path/'set', **{**TINY, **kw})
    assert list(tmp_path.iterdir()) == []

def test_readers_name_the_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='diagnostic_parts.csv is missing: pass the folder'): diagnostic_parts(tmp_path)
    with pytest.raises(FileNotFoundError, match='part_locs.txt is missing'): bird_parts(tmp_path)

def test_every_size_and_species_can_be_drawn():
    for i,spec in enumerate(bird_species(MAX_SPECIES)):
        im,_,parts = draw_bird(spec, np.random.default_rng(i), (32, 50)[i%2])
        assert im.size == ((32, 50)[i%2],)*2 and tuple(parts) == PARTS
