"Benchmarks and folders as `DataLoaders`: every layout, every mistake in the data, the real download, real photographs."
import dataclasses,gc,http.server,inspect,multiprocessing,pickle,random,re,shutil,tarfile,threading,warnings
from functools import partial
from pathlib import Path
import matplotlib,numpy as np,pytest,torch
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from PIL import Image
from torch import nn
from fastai.vision.all import (CrossEntropyLossFlat, FlipItem, Interpretation, Learner, Normalize, Pipeline, PILImage, RandomCrop, RandomErasing,
    Resize, Transform, URLs, accuracy, load_learner)
from cekd_fastai import data
from cekd_fastai.data import *
from cekd_fastai.synthetic import make_birds

NAMES = ['Zebra Finch', 'Ant_Bird', 'Mallard'] # their order by number is not the alphabet's

def picture(path, seed=0, size=(40,30), mode='RGB', **kwargs):
    "Write a picture of coarse noise, which differs by `seed`."
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).integers(0, 256, (4,5,3), dtype=np.uint8)
    Image.fromarray(a).resize(size, Image.BICUBIC).convert(mode).save(path, **kwargs)
    return path

def cub_mini(path, n_train=4, n_test=2):
    "CUB's layout with the classes of `NAMES`; image numbers begin at 7 and run backwards through the classes."
    classes = [f'{i:03d}.{o}' for i,o in enumerate(NAMES, 1)]
    rows = [(f'{c}/pic {j}.jpg', i, int(j<n_train)) for i,c in reversed(list(enumerate(classes, 1))) for j in range(n_train+n_test)]
    for k,(f,_,_) in enumerate(rows): picture(path/'images'/f, k)
    def write(name, lines): (path/name).write_text(''.join(f'{k} {o}\n' for k,o in lines))
    write('classes.txt', enumerate(classes, 1))
    for name,col in (('images.txt', 0), ('image_class_labels.txt', 1), ('train_test_split.txt', 2)): write(name, ((k, r[col]) for k,r in enumerate(rows, 7)))
    return path

def folders(path, **counts):
    "Class folders with so many pictures each; `train__a=2` makes two in train/a."
    for i,(nm,n) in enumerate(counts.items()):
        for j in range(n): picture(path/nm.replace('__', '/')/f'{j}.jpg', 10*i+j)
    return path

def tiny(dls, **kwargs):
    "A learner small enough to train in a moment."
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, dls.c))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, **kwargs)

mini_dls = partial(fine_grained_dls, size=28, bs=4, num_workers=0)

# Layouts

def test_cub_layout(tmp_path):
    root = cub_mini(tmp_path/'CUB_200_2011')
    t = read_table(root)
    assert t.classes == ['001.Zebra Finch', '002.Ant_Bird', '003.Mallard']
    assert t.files[0] == root/'images'/'003.Mallard'/'pic 0.jpg'
    assert t.counts().values.tolist() == [[4,2]]*3
    assert all(f.parent.name==o and v==(int(f.stem[-1])>=4) for f,o,v in zip(t.files, t.labels, t.is_valid))
    assert all(isinstance(f, Path) for f in t.files)

def test_cub_layout_one_level_down(tmp_path):
    cub_mini(tmp_path/'CUB_200_2011')
    (tmp_path/'attributes.txt').write_text('1 has_bill_shape::curved\n')
    assert read_table(tmp_path).root == tmp_path/'CUB_200_2011'

@pytest.mark.parametrize('others,chosen', [(['test'], 'test'), (['val'], 'val'), (['test','valid'], 'valid'), (['test','val'], 'val')])
def test_split_folders(tmp_path, others, chosen):
    folders(tmp_path, train__b=3, train__a=2, **{f'{o}__{c}':1 for o in others for c in 'ab'})
    t = read_table(tmp_path)
    assert (t.classes, t.n_train) == (['a','b'], 5)
    assert {f.relative_to(tmp_path).parts[0] for f,v in zip(t.files, t.is_valid) if v} == {chosen}

def test_plain_folders_split_each_class(tmp_path):
    folders(tmp_path, a=20, b=2, c=3)
    t = read_table(tmp_path)
    assert t.counts().values.tolist() == [[16,4], [1,1], [2,1]]
    assert read_table(tmp_path, valid_pct=0.99).counts().train.tolist() == [1,1,1]
    assert list(read_table(tmp_path).is_valid) == list(t.is_valid)
    assert list(read_table(tmp_path, seed=1).is_valid) != list(t.is_valid)

def test_split_of_a_class_does_not_depend_on_the_others(tmp_path):
    folders(tmp_path, a=20, b=20)
    before = {f:v for f,v in zip(*[getattr(read_table(tmp_path), o) for o in ('files','is_valid')])}
    folders(tmp_path, aa=20)
    t = read_table(tmp_path)
    assert all(before[f]==v for f,v in zip(t.files, t.is_valid) if f in before)

def test_folders_passed_over(tmp_path):
    folders(tmp_path, a=3, b=3, models=2, **{'.cache':2})
    picture(tmp_path/'a'/'._0.jpg')
    (tmp_path/'notes').mkdir()
    (tmp_path/'a'/'readme.txt').write_text('x')
    with pytest.warns(UserWarning, match='no images in notes of'): t = read_table(tmp_path)
    assert (t.classes, len(t)) == (['a','b'], 6)

def test_classes(tmp_path):
    root = cub_mini(tmp_path/'cub')
    assert read_table(root, classes=2).classes == ['001.Zebra Finch', '002.Ant_Bird']
    t = read_table(root, classes=['003.Mallard', '001.Zebra Finch'])
    assert t.classes == ['001.Zebra Finch', '003.Mallard'] and set(t.labels) == set(t.classes) and len(t) == 12
    assert read_table(t, classes=1).classes == ['001.Zebra Finch']

def test_batches_follow_the_table(tmp_path):
    root = cub_mini(tmp_path/'cub')
    dls = mini_dls(root)
    assert list(dls.vocab) == dls.table.classes and dls.c == 3 and dls.path == root
    assert [dls.vocab[i] for i in torch.cat([y for _,y in dls.valid])] == [o for o,v in zip(dls.table.labels, dls.table.is_valid) if v]
    assert {f for f in dls.train.items} == {f for f,v in zip(dls.table.files, dls.table.is_valid) if not v}
    assert len(list(dls.train)) == 3 and dls.train.one_batch()[0].shape == (4,3,28,28)

def test_transforms_are_replaced_or_added(tmp_path):
    root = cub_mini(tmp_path/'cub')
    dls = mini_dls(root, item_tfms=[FlipItem(p=0.), RandomCrop(20)], batch_tfms=[Normalize.from_stats([.5]*3, [.5]*3), RandomErasing(p=1.)])
    assert [o.p for o in dls.after_item.fs if isinstance(o, FlipItem)] == [0.]
    assert [type(o).__name__ for o in dls.after_batch.fs] == ['IntToFloatTensor', 'Normalize', 'RandomErasing']
    assert dls.one_batch()[0].shape[-2:] == (20,20)
    assert dls.valid.one_batch()[0].max() <= 1

def test_draft_only_when_resize_is_first(tmp_path):
    t = read_table(cub_mini(tmp_path/'cub'))
    block = fine_grained_block(t, size=28)
    draft = lambda b: b.datasets(t).tls[0].tfms.open_image.draft
    assert draft(block) == 64
    old = block.datasets(t)
    assert draft(block.new(item_tfms=Resize(512))) is None
    assert old.tls[0].tfms.open_image.draft == 64
    class Cut(Transform):
        order = -1
        def encodes(self, x:Image.Image): return x
    assert draft(fine_grained_block(t, size=28, item_tfms=Cut())) is None

# Mistakes in the data: one sentence that names what is at fault

def raises(err, *parts): return pytest.raises(err, match='.*'.join(map(re.escape, parts)))

def test_no_such_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(FileNotFoundError, "'CUBS' is neither a benchmark nor a folder", "did you mean 'cub'"): fine_grained_dls('CUBS')
    with raises(FileNotFoundError, "'zzzz'", "choose from 'cub', 'synthetic'"): fine_grained_dls('zzzz')
    with raises(FileNotFoundError, str(tmp_path/'none'), 'does not exist'): fine_grained_dls(tmp_path/'none')
    with raises(FileNotFoundError, 'none/sub', 'does not exist'): fine_grained_dls('none/sub')
    with raises(NotADirectoryError, 'a.jpg is a file'): fine_grained_dls(picture(tmp_path/'a.jpg'))
    with raises(TypeError, 'source is 3'): fine_grained_dls(3)
    with raises(ValueError, 'root=', 'for a named benchmark'): fine_grained_dls(tmp_path, root=tmp_path)
    with raises(FileNotFoundError, str(tmp_path/'none'), 'does not exist'): fine_grained_dls('cub', root=tmp_path/'none')

def test_no_images(tmp_path):
    with raises(ValueError, 'no images in the folders of', str(tmp_path)): read_table(tmp_path)
    picture(tmp_path/'1.jpg')
    with raises(ValueError, 'one folder of images for each class'): read_table(tmp_path)

def test_class_with_one_image(tmp_path):
    folders(tmp_path, a=3, b=1)
    with raises(ValueError, 'class b of', 'has 1 image'): read_table(tmp_path)

def test_train_folder_alone(tmp_path):
    folders(tmp_path, train__a=3, train__b=3)
    with raises(FileNotFoundError, 'has train/ but no valid/, val/ or test/'): read_table(tmp_path)
    assert read_table(tmp_path/'train').classes == ['a','b']

def test_class_only_in_validation(tmp_path):
    folders(tmp_path, train__a=3, test__a=1, test__b=2)
    with raises(ValueError, 'no training image for class b (2 in the validation part)'): read_table(tmp_path)

def test_empty_validation(tmp_path):
    folders(tmp_path, train__a=3)
    (tmp_path/'test').mkdir()
    with raises(ValueError, 'no validation images in', str(tmp_path)): read_table(tmp_path)

def test_cub_class_without_training_image(tmp_path):
    root = cub_mini(tmp_path/'cub')
    (root/'train_test_split.txt').write_text(''.join(f'{k} {int(k>=13 and k%6<4)}\n' for k in range(7, 25)))
    with raises(ValueError, 'no training image for class 003.Mallard (6 in the validation part)'): read_table(root)

@pytest.mark.parametrize('name,text,says', [
    ('images.txt', '7 003.Mallard/pic 0.jpg\noops\n', "images.txt, line 2: 'oops' is not a number and a value"),
    ('images.txt', '7 003.Mallard/pic 0.jpg\n\n8\n', "images.txt, line 3: '8' is not a number and a value"),
    ('images.txt', '7 003.Mallard/pic 0.jpg\n7 003.Mallard/pic 1.jpg\n', 'images.txt, line 2: number 7 was already used'),
    ('images.txt', '7 003.Mallard/pic 0.jpg\n8 003.Mallard/pic 0.jpg\n', 'listed more than once'),
    ('image_class_labels.txt', '7 3\n', 'image_class_labels.txt has no line for number 8, 9, 10 and 14 more'),
    ('image_class_labels.txt', ''.join(f'{k} 4\n' for k in range(7, 25)), "image_class_labels.txt: number 7 has value '4', which is none of 1, 2, 3"),
    ('train_test_split.txt', ''.join(f'{k} train\n' for k in range(7, 25)), "train_test_split.txt: number 7 has value 'train'"),
    ('classes.txt', '1 a\n2 b\n3 a\n', 'lists a name twice')])
def test_faulty_cub_tables(tmp_path, name, text, says):
    root = cub_mini(tmp_path/'cub')
    (root/name).write_text(text)
    with raises(ValueError, says): read_table(root)

@pytest.mark.parametrize('name', ['classes.txt', 'image_class_labels.txt', 'train_test_split.txt'])
def test_missing_cub_table(tmp_path, name):
    root = cub_mini(tmp_path/'cub')
    (root/name).unlink()
    with raises(FileNotFoundError, f'{name} is missing'): read_table(root)

def test_files_missing_on_disk(tmp_path):
    root = cub_mini(tmp_path/'cub')
    for o in sorted((root/'images'/'001.Zebra Finch').iterdir())[:4]: o.unlink()
    with raises(FileNotFoundError, '4 of 18 files', 'images/001.Zebra Finch/pic 0.jpg', 'and 1 more'): read_table(root)

def test_classes_errors(tmp_path):
    t = read_table(cub_mini(tmp_path/'cub'))
    with raises(ValueError, 'classes=4', 'has 3 classes, pass 1 to 3'): read_table(t, classes=4)
    with raises(ValueError, 'classes=0'): read_table(t, classes=0)
    with raises(ValueError, "no class '003.Malard'", "did you mean '003.Mallard'"): read_table(t, classes=['003.Malard'])
    with raises(ValueError, 'classes is empty'): read_table(t, classes=[])

@pytest.mark.parametrize('kw,says', [(dict(size=0), 'size=0'), (dict(size=22.5), 'size=22.5'), (dict(bs=0), 'bs=0'), (dict(bs=-3), 'bs=-3'),
    (dict(bs=13), 'bs=13 is more than the 12 training images'), (dict(bs=13, drop_last=True), 'pass bs=12 or less')])
def test_sizes(tmp_path, kw, says):
    with raises(ValueError, says): mini_dls(cub_mini(tmp_path/'cub'), **kw)

def test_small_data_without_drop_last(tmp_path): assert len(list(mini_dls(cub_mini(tmp_path/'cub'), bs=32, drop_last=False).train)) == 1

@pytest.mark.parametrize('pct', [0, 1, -.2, 20])
def test_valid_pct(tmp_path, pct):
    with raises(ValueError, f'valid_pct={pct}'): read_table(folders(tmp_path, a=3), valid_pct=pct)

# Pictures

def spoil(path, how):
    "Make a picture unreadable."
    b = path.read_bytes()
    path.write_bytes(dict(truncated=b[:len(b)//2], empty=b'', text=b'<html>404</html>')[how])
    return path

def read_all(dl, err, *parts):
    with raises(err, *parts): list(dl)

@pytest.mark.parametrize('how', ['truncated', 'empty', 'text'])
@pytest.mark.parametrize('workers', [0, 2])
def test_unreadable_image_is_named(tmp_path, how, workers, monkeypatch):
    monkeypatch.setattr('torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL', .2) # torch waits as long for each worker of a failed loader
    root = cub_mini(tmp_path/'cub')
    bad = spoil(root/'images'/'002.Ant_Bird'/'pic 5.jpg', how)
    read_all(mini_dls(root, num_workers=workers).valid, OSError, f'{bad} cannot be read as an image')
    gc.collect()

def test_unreadable_first_image_is_named_when_built(tmp_path):
    root = cub_mini(tmp_path/'cub')
    bad = spoil(root/'images'/'003.Mallard'/'pic 0.jpg', 'empty')
    with raises(OSError, f'{bad} cannot be read as an image'): mini_dls(root)

def test_image_deleted_later_is_named(tmp_path):
    root = cub_mini(tmp_path/'cub')
    dls = mini_dls(root)
    gone = root/'images'/'002.Ant_Bird'/'pic 5.jpg'
    gone.unlink()
    with raises(FileNotFoundError, f'{gone} does not exist'): list(dls.valid)

def test_verify_leaves_out(tmp_path):
    root = cub_mini(tmp_path/'cub')
    bad = [spoil(root/'images'/'003.Mallard'/f'pic {i}.jpg', how) for i,how in enumerate(['truncated','empty','text'])]
    with pytest.warns(UserWarning, match='left out 3 of 18 images that cannot be read') as w: dls = mini_dls(root, verify=True)
    assert all(str(o) in str(w[0].message) for o in bad)
    assert not set(bad) & set(dls.table.files) and len(dls.table) == 15
    list(dls.train), list(dls.valid)
    spoil(root/'images'/'003.Mallard'/'pic 3.jpg', 'empty')
    with pytest.warns(UserWarning, match='left out 4'), raises(ValueError, 'no training image for class 003.Mallard'): mini_dls(root, verify=True)

def test_verify_says_nothing_of_good_images(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(read_table(cub_mini(tmp_path/'cub'), verify=True)) == 18

@pytest.mark.parametrize('mode,ext', [('L','jpg'), ('L','png'), ('P','gif'), ('P','png'), ('RGBA','png'), ('LA','png'), ('CMYK','jpg'), ('1','png'), ('I;16','png'), ('RGB','webp'), ('RGB','bmp')])
def test_every_mode_gives_three_channels(tmp_path, mode, ext):
    for i in range(4): picture(tmp_path/'a'/f'{i}.{ext}', i, mode='L' if mode=='I;16' else mode)
    if mode == 'I;16':
        for i in range(4): Image.fromarray(np.full((30,40), 20000+i, np.uint16)).save(tmp_path/'a'/f'{i}.{ext}')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        a = open_image(tmp_path/'a'/f'0.{ext}')
    assert (type(a), a.mode, a.size) == (PILImage, 'RGB', (40,30))
    x = mini_dls(tmp_path, bs=2).one_batch()[0]
    assert x.shape == (2,3,28,28)
    if mode == 'I;16': assert np.array(a)[0,0].tolist() == [78]*3

def test_transparent_palette_opens_quietly(tmp_path):
    im = Image.open(picture(tmp_path/'x.png', mode='P'))
    im.save(tmp_path/'y.png', transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert open_image(tmp_path/'y.png').mode == 'RGB'

def test_camera_orientation(tmp_path):
    im = Image.open(picture(tmp_path/'x.png'))
    exif = Image.Exif()
    exif[0x0112] = 6 # to be turned clockwise by a quarter
    im.save(tmp_path/'y.jpg', exif=exif, quality=95)
    res = open_image(tmp_path/'y.jpg')
    assert res.size == (30,40)
    assert np.abs(np.array(res).astype(int)-np.array(im.transpose(Image.ROTATE_270)).astype(int)).mean() < 6

@pytest.mark.parametrize('size', [(1000,750), (2000,1500), (40,30)])
def test_draft_changes_little(tmp_path, size):
    fn = picture(tmp_path/'x.jpg', size=size, quality=90)
    full,fast = [np.array(ResizeShort(64)(open_image(fn, draft=o))).astype(int) for o in (None, 128)]
    assert full.shape == fast.shape and np.abs(full-fast).mean() < 1
    assert open_image(fn, draft=128).size == {1000:(250,188), 2000:(250,188), 40:(40,30)}[size[0]]

def test_resize_short_matches_exact_resampling():
    im = PILImage(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30,40,3), dtype=np.uint8)).resize((400,300), Image.BICUBIC))
    want = np.array(Image.fromarray(np.array(im)).resize((85,64), Image.BILINEAR)).astype(int)
    assert np.abs(np.array(ResizeShort(64)(im)).astype(int)-want).mean() < 1
    assert ResizeShort(300)(im) is im

def test_recipe_random_in_training_and_central_in_validation(tmp_path):
    im = PILImage(Image.fromarray(np.arange(64*96*3, dtype=np.uint32).reshape(64,96,3).astype(np.uint8)))
    tfms = recipe_tfms(56)
    random.seed(0)
    train = [np.array(Pipeline(tfms, split_idx=0)(im)) for _ in range(40)]
    valid = [np.array(Pipeline(tfms, split_idx=1)(im)) for _ in range(3)]
    assert len({o.tobytes() for o in train}) > 30
    assert all((o==np.array(im)[4:60,20:76]).all() for o in valid)

def test_recipe_flips_half_of_the_training_pictures():
    ramp = PILImage(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None,:,None], (64,1,3))))
    random.seed(0)
    flipped = lambda i: sum(int(o[0,0,0]) > int(o[0,-1,0]) for o in (np.array(Pipeline(recipe_tfms(56), split_idx=i)(ramp)) for _ in range(60)))
    assert 15 < flipped(0) < 45 and flipped(1) == 0

# What fastai does with the result

def test_train_show_export_predict(tmp_path):
    root = cub_mini(tmp_path/'cub')
    dls = mini_dls(root, path=tmp_path)
    learn = tiny(dls)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    dls.show_batch(max_n=4)
    with learn.no_bar():
        learn.show_results(max_n=4)
        Interpretation.from_learner(learn).plot_top_losses(2)
    plt.close('all')
    learn.export()
    pkl = (tmp_path/'export.pkl').read_bytes()
    assert b'pic 0.jpg' not in pkl
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'export.pkl')
    fn = dls.valid.items[0]
    grey = np.array(open_image(fn).convert('L'))
    with loaded.no_bar():
        want = loaded.predict(fn)
        for o in (str(fn), fn.read_bytes(), open_image(fn), np.array(open_image(fn))): assert torch.allclose(loaded.predict(o)[2], want[2], atol=1e-6)
        assert loaded.predict(grey)[2].shape == (3,)
        preds,_ = loaded.get_preds(dl=loaded.dls.test_dl(dls.valid.items))
        _,targs = loaded.get_preds(dl=loaded.dls.test_dl(dls.valid.items, with_labels=True))
    assert preds.shape == (6,3) and torch.allclose(preds[0], want[2], atol=1e-6)
    assert [loaded.dls.vocab[i] for i in targs] == [o for o,v in zip(dls.table.labels, dls.table.is_valid) if v]

def odd_table(root):
    "A table whose folders are no classes."
    fs = [picture(root/'all'/f'secret{i}.jpg', i) for i in range(8)]
    return ImageTable(fs, ['b','a']*4, [False]*4+[True]*4, ['b','a'], root)

def test_own_table_with_labels_that_are_no_folders(tmp_path):
    t = odd_table(tmp_path)
    dls = fine_grained_dls(t, size=28, bs=2, num_workers=0)
    assert torch.cat([y for _,y in dls.valid]).tolist() == [0,1]*2 and list(dls.vocab) == ['b','a']
    tiny(dls).export()
    assert b'secret' not in (tmp_path/'export.pkl').read_bytes()

def test_labels_travel_to_a_process_but_not_to_a_file(tmp_path):
    t = odd_table(tmp_path)
    lab = TableLabeller(t)
    labels = lambda o: [pickle.loads(o)(f) for f in t.files]
    assert labels(pickle.dumps(lab)) == ['all']*8
    multiprocessing.context.set_spawning_popen(True) # what `Process.start` does around pickling where it does not fork
    try: sent = pickle.dumps(lab)
    finally: multiprocessing.context.set_spawning_popen(None)
    assert labels(sent) == t.labels

def test_labels_with_workers(tmp_path):
    dls = fine_grained_dls(odd_table(tmp_path), size=28, bs=2, num_workers=2)
    assert torch.cat([y for _,y in dls.valid]).tolist() == [0,1]*2

# Benchmarks by name, through the real download

def archive(folder, nested):
    "CUB_200_2011.tgz with a miniature, with or without another file beside the data's folder."
    root = cub_mini(folder/'make'/'CUB_200_2011')
    folder.joinpath('serve').mkdir()
    with tarfile.open(folder/'serve'/'CUB_200_2011.tgz', 'w:gz') as f:
        f.add(root, 'CUB_200_2011')
        if nested:
            (folder/'attributes.txt').write_text('1 x\n')
            f.add(folder/'attributes.txt', 'attributes.txt')
    return folder/'serve'/'CUB_200_2011.tgz'

class Quiet(http.server.SimpleHTTPRequestHandler):
    seen = []
    def log_message(self, *args): self.seen.append(self.path)

@pytest.fixture
def server(tmp_path, fastai_home, monkeypatch):
    "A local server in place of fastai's, which serves `tmp_path/serve`; the benchmark 'cub' expects the miniature."
    Quiet.seen.clear()
    srv = http.server.ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(tmp_path/'serve')))
    threading.Thread(target=srv.serve_forever, daemon=True).start()
    monkeypatch.setattr(URLs, 'CUB_200_2011', f'http://127.0.0.1:{srv.server_port}/CUB_200_2011.tgz')
    monkeypatch.setitem(data.BENCHMARKS, 'cub', dataclasses.replace(data.BENCHMARKS['cub'], n_classes=3, n_train=12, n_test=6))
    yield srv
    srv.shutdown()
    srv.server_close()

@pytest.mark.parametrize('nested', [False, True])
def test_download(tmp_path, server, fastai_home, nested):
    archive(tmp_path, nested)
    t = mini_dls('cub').table
    assert t.root == fastai_home/'data'/'CUB_200_2011'/('CUB_200_2011' if nested else '')
    assert len(mini_dls('cub').table) == 18 and Quiet.seen == ['/CUB_200_2011.tgz'] # downloaded once

def test_no_connection_then_archive_by_hand(tmp_path, server, fastai_home):
    arch = archive(tmp_path, True)
    server.shutdown()
    server.server_close()
    with raises(ConnectionError, URLs.CUB_200_2011, 'cannot be downloaded', f'put CUB_200_2011.tgz into {fastai_home/"archive"}'): fine_grained_dls('cub')
    shutil.copy(arch, fastai_home/'archive')
    assert len(mini_dls('cub').table) == 18

def test_server_without_the_archive(tmp_path, server):
    with raises(ConnectionError, 'cannot be downloaded', '404'): fine_grained_dls('cub')

def test_archive_cut_short(tmp_path, server, fastai_home):
    b = archive(tmp_path, False).read_bytes()
    (fastai_home/'archive').mkdir(parents=True)
    (fastai_home/'archive'/'CUB_200_2011.tgz').write_bytes(b[:len(b)//2])
    with raises(OSError, 'CUB_200_2011.tgz cannot be extracted', 'delete it to download it again'): fine_grained_dls('cub')
    (fastai_home/'archive'/'CUB_200_2011.tgz').unlink()
    assert len(mini_dls('cub').table) == 18

def test_counts_are_checked(tmp_path, server, monkeypatch):
    archive(tmp_path, False)
    monkeypatch.setitem(data.BENCHMARKS, 'cub', dataclasses.replace(data.BENCHMARKS['cub'], n_classes=3, n_train=14, n_test=5))
    with raises(ValueError, "not the whole of 'cub': 2 training images missing, 1 test images too many; delete the folder"): fine_grained_dls('cub')
    with raises(ValueError, 'check root'): fine_grained_dls('cub', root=tmp_path/'make')

def test_archive_of_another_size_is_used_as_it_is(tmp_path, fastai_home, monkeypatch):
    "fastai knows the size of the official archive; one put there by hand is not fetched anew because it differs."
    arch = archive(tmp_path, False)
    (fastai_home/'archive').mkdir(parents=True)
    shutil.copy(arch, fastai_home/'archive')
    monkeypatch.setattr('fastai.data.external.untar_data', None)
    monkeypatch.setattr(data, 'untar_data', None)
    assert read_cub(data.fetch_url('CUB_200_2011')).n_train == 12

def test_synthetic_is_drawn_once(fastai_home, monkeypatch):
    n = inspect.signature(make_birds).parameters
    b = data.BENCHMARKS['synthetic']
    per = n['n_train'].default,n['n_images'].default-n['n_train'].default
    assert (b.n_classes, b.n_train, b.n_test) == (n['n_species'].default, *(o*n['n_species'].default for o in per))
    small = partial(make_birds, n_species=4, n_images=4, n_train=3, size=32, n_workers=0, progress=False)
    monkeypatch.setattr(data, 'make_birds', small)
    monkeypatch.setitem(data.BENCHMARKS, 'synthetic', dataclasses.replace(b, n_classes=4, n_train=12, n_test=4))
    t = mini_dls('synthetic').table
    when = t.files[0].stat().st_mtime_ns
    assert t.root.is_relative_to(fastai_home/'data') and mini_dls('synthetic').table.files[0].stat().st_mtime_ns == when

def test_benchmarks_lists_all():
    df = benchmarks()
    assert list(df.index) == list(data.BENCHMARKS) and {'cub','synthetic'} <= set(df.index)
    assert df.loc['cub', ['n_classes','n_train','n_test']].tolist() == [200, 5994, 5794]

# Real photographs

def test_real_cub(real_data):
    root = real_data('CUB_200_2011')
    dls = fine_grained_dls('cub', root=root, size=112, bs=32, num_workers=0)
    t = dls.table
    assert (t.n_train, t.n_valid, len(t.classes)) == (5994, 5794, 200)
    assert (t.classes[0], t.classes[-1]) == ('001.Black_footed_Albatross', '200.Common_Yellowthroat')
    n = t.counts()
    assert n.train.between(29, 30).all() and n.valid.between(11, 30).all()
    x,y = dls.one_batch()
    assert x.shape == (32,3,112,112) and abs(float(x.mean())) < .5 and .6 < float(x.std()) < 1.5
    fifty = read_table('cub', classes=50, root=root)
    assert fifty.classes == t.classes[:50] and (fifty.n_train, fifty.n_valid) == (1500, 1389)

def test_real_cub_grey_images(real_data):
    t = read_table(real_data('CUB_200_2011'))
    grey = [f for f in t.files if Image.open(f).mode == 'L']
    assert len(grey) == 8 and {open_image(f).mode for f in grey} == {'RGB'}

def test_real_cub_shortened_list(real_data, tmp_path):
    "A list with five lines fewer is noticed by name, and read as a path."
    root = real_data('CUB_200_2011')
    for o in ('classes.txt','image_class_labels.txt','train_test_split.txt'): shutil.copy(root/o, tmp_path)
    (tmp_path/'images').symlink_to(root/'images')
    lines = (root/'images.txt').read_text().splitlines()
    (tmp_path/'images.txt').write_text('\n'.join(lines[:-5]))
    with raises(ValueError, "not the whole of 'cub'", 'missing'): read_table('cub', root=tmp_path)
    assert len(read_table(tmp_path)) == 11783

def test_real_flowers(real_data):
    t = read_table(real_data('oxford-flowers17-12classes'))
    assert (len(t.classes), t.n_train, t.n_valid) == (12, 720, 240)
    assert fine_grained_dls(t, size=64, bs=8, num_workers=2).one_batch()[0].shape == (8,3,64,64)
