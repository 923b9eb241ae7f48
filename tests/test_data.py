"Benchmarks and folders as `DataLoaders`: every layout, every mistake in the data, the real download, real photographs."
import dataclasses,gc,hashlib,http.server,inspect,io,json,multiprocessing,pickle,random,re,shutil,sys,tarfile,threading,warnings,zipfile
from collections import Counter
from functools import partial
from pathlib import Path
import matplotlib,numpy as np,pandas as pd,pytest,torch
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from PIL import Image
from scipy.io import savemat
from torch import nn
from torchvision import datasets as tvd
from fastai.vision.all import (ConvLayer, CrossEntropyLossFlat, FlipItem, ImageDataLoaders, Interpretation, Learner, Normalize, PartialDL, Pipeline, PILImage,
    RandomCrop, RandomErasing, RegressionBlock, Resize, TensorImage, Transform, URLs, WeightedDL, accuracy, get_image_files, load_learner, set_seed)
from cekd_fastai.core import *
from cekd_fastai.data import check,image,readers
from cekd_fastai.data.audit import *
from cekd_fastai.data.benchmarks import *
from cekd_fastai.data.check import *
from cekd_fastai.data.download import *
from cekd_fastai.data.folders import *
from cekd_fastai.data.image import *
from cekd_fastai.data.loaders import *
from cekd_fastai.data.readers import *
from cekd_fastai.data.table import *
from cekd_fastai.data.table import _split_groups as table_split
from cekd_fastai.data.words import *
from cekd_fastai import synthetic
from cekd_fastai.drawing.dataset import make_birds

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
    folders(tmp_path, a=3, b=3, **{'.cache':2})
    (tmp_path/'models').mkdir()
    (tmp_path/'models'/'best.pth').write_text('x')
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
    assert read_table(t, classes=2).classes == ['001.Zebra Finch', '003.Mallard']

def test_batches_follow_the_table(tmp_path):
    root = cub_mini(tmp_path/'cub')
    dls = mini_dls(root)
    assert list(dls.vocab) == dls.table.classes and dls.c == 3 and dls.path == Path('.') # nothing is saved among the pictures
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

# Folders as people have them

def in_folders(path, *names, n=3):
    "Each of the folders with `n` pictures, all of them different."
    for i,o in enumerate(names):
        for j in range(n): picture(path/o/f'{j}.jpg', 10*i+j)
    return path

def heard(f, *args, **kwargs):
    "What a function gives, and its warnings in words."
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        res = f(*args, **kwargs)
    return res,[str(o.message) for o in w]

@pytest.mark.parametrize('train,other', [('Train','Test'), ('TRAIN','VALID'), ('training','testing'), ('training_set','test_set'), ('Train','Validation'), ('train_images','val_images'),
    ('TrainingSet','TestSet'), ('trainset','testset'), ('train2017','val2017'), ('cars_train','cars_test'), ('seg_train/seg_train','seg_test/seg_test'), ('data/Train','data/dev')])
def test_parts_in_any_words(tmp_path, train, other):
    t,said = heard(read_table, in_folders(tmp_path, *[f'{p}/{c}' for p in (train,other) for c in 'abc']))
    assert (t.classes, t.n_train, t.n_valid, t.n_test) == (['a','b','c'], 9, 9, 0) and not said
    assert all(str(f.relative_to(tmp_path)).startswith(other)==v for f,v in zip(t.files, t.is_valid))

def test_three_parts_and_what_is_none(tmp_path):
    root = in_folders(tmp_path, *[f'{p}/{c}' for p in ('Train','Val','TEST','extra') for c in 'ab'])
    t,said = heard(read_table, root)
    assert (t.n_train, t.n_valid, t.n_test) == (6,6,6) and len(said)==1 and 'left out extra of' in said[0]

@pytest.mark.parametrize('names,says', [(['train','test'], 'hold images and no class folders: pass a CSV file or a DataFrame'), (['train/a','train/b','test'], 'pass {}/train to split it here'),
    (['valid/a','valid/b','test/a','test/b'], 'but no train/'), (['train/a','train/b','val/a','val/b','valid/a','valid/b'], 'val and valid of {} could each be the valid part'),
    (['train/a','train/b','holdout/a','holdout/b'], 'has train/ but no valid/'), (['TRAINING/a','TRAINING/b'], 'has TRAINING/ but no valid/'),
    (['entrenamiento/a','entrenamiento/b','prueba/a','prueba/b'], 'pass one of them, such as {}/entrenamiento'), (['2023/a','2023/b','2024/a','2024/b'], 'not clear which are the classes'),
    (['x_train/a','x_train/b','x_test/a','y_train/a','y_train/b','y_test/b'], 'several data sets, with training parts x_train, y_train')])
def test_parts_that_are_not_clear(tmp_path, names, says):
    with raises((ValueError,FileNotFoundError), says.format(tmp_path)): read_table(in_folders(tmp_path, *names))

def test_flat_parts_name_the_table(tmp_path):
    in_folders(tmp_path, 'train', 'test')
    (tmp_path/'labels.csv').write_text('file,label\n0.jpg,a\n1.jpg,b\n2.jpg,a\n')
    with raises(ValueError, f"pass '{tmp_path/'labels.csv'}' with file names and labels, and folder='{tmp_path/'train'}'"): read_table(tmp_path)
    in_folders(tmp_path/'x', 'train/a', 'train/b', 'valid/a', 'test')
    t,said = heard(read_table, tmp_path/'x')
    assert (t.n_train, t.n_valid, t.n_test) == (6,3,0) and len(said)==1 and 'test of' in said[0] and said[0].endswith('not used')

@pytest.mark.parametrize('down', ['images', 'archive/data', '2023', 'a/b/c', 'models'])
def test_classes_further_down(tmp_path, down):
    t,said = heard(read_table, in_folders(tmp_path, f'{down}/daisy', f'{down}/rose'))
    assert (t.classes, len(t)) == (['daisy','rose'], 6) and not said

@pytest.mark.parametrize('names', [['a'], ['images/a'], ['train/a','test/a']])
def test_one_class_alone(tmp_path, names):
    root = in_folders(tmp_path, *names)
    for f in (read_table, mini_dls):
        with raises(ValueError, "has one class alone, 'a'"): f(root)

def test_one_class_alone_by_every_other_way(tmp_path):
    root = in_folders(tmp_path, 'a', 'b')
    t = read_table(root)
    one = t.to_df().query("label=='a'")
    for f in (lambda: ImageTable(t.files[:3], 'aaa', [0,0,1]), lambda: t.subset(['a']), lambda: read_table(root, classes=['b']), lambda: read_table(one, folder=root)):
        with raises(ValueError, 'has one class alone'): f()
    with raises(ValueError, 'pass 2 to 2'): read_table(root, classes=1)

@pytest.mark.parametrize('names', [['train','plane','car'], ['train/1','train/2','plane','car'], ['test','plane','car'], ['models','a'], ['train/models','train/train','valid/models','valid/train']])
def test_classes_with_odd_names(tmp_path, names):
    t,said = heard(read_table, in_folders(tmp_path, *names))
    parts = names[0].startswith('train/m')
    want = {'models','train'} if parts else {o.split('/')[0] for o in names}
    assert set(t.classes)==want and len(t)==3*len(names)
    assert ['is taken for a class' in o for o in said]==[True]*('test' in names)

def test_skipped_files_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr('cekd_fastai.data.folders.IMAGE_SUFFIXES', IMAGE_SUFFIXES-HEIF_SUFFIXES)
    root = in_folders(tmp_path, 'a', 'b')
    for i in range(5): (root/'a'/f'{i}.HEIC').write_text('x')
    for o in ('a/x.dng','b/y.DNG','b/nosuffix','b/notes.txt','a/.hidden'): (root/o).write_text('x')
    for f in (read_table, verify):
        said = heard(f, root)[1]
        assert len(said)==1 and 'skipped 8 files of' in said[0] and '5 .heic, 2 .dng, 1 without a suffix' in said[0]
        assert 'pip install pillow-heif' in said[0] and 'convert them to JPEG' in said[0]

def test_heic_with_the_extra(tmp_path):
    heif = pytest.importorskip('pillow_heif')
    exif = Image.Exif()
    exif[0x0112] = 6
    for c in 'ab':
        folder = tmp_path/'set'/c
        folder.mkdir(parents=True)
        for i in range(3): heif.from_pillow(Image.open(picture(tmp_path/'x.png', i, size=(80,60)))).save(folder/f'{i}.HEIC', quality=95)
    heif.from_pillow(Image.open(tmp_path/'x.png')).save(tmp_path/'turned.heic', exif=exif.tobytes(), quality=95)
    t,said = heard(read_table, tmp_path/'set')
    assert len(t)==6 and not said and len(verify(t))==0 and mini_dls(t, bs=2).one_batch()[0].shape==(2,3,28,28)
    plain = open_image(tmp_path/'set'/'b'/'2.HEIC')
    assert np.abs(np.array(plain).astype(int)-np.array(open_image(tmp_path/'x.png'))).mean() < 6
    raw = (tmp_path/'turned.heic').read_bytes()
    for o in (tmp_path/'turned.heic', raw, io.BytesIO(raw), Image.open(io.BytesIO(raw))): assert open_image(o).size == (60,80)

@pytest.mark.parametrize('link,to', [('a/up','..'), ('a/up','../..'), ('latest','a'), ('A_latest','b'), ('a/deep/er','../../b'), ('self','.')])
def test_links_that_lead_back(tmp_path, link, to):
    root = in_folders(tmp_path/'set', 'a', 'b')
    (root/link).parent.mkdir(exist_ok=True)
    (root/link).symlink_to(to)
    t,said = heard(read_table, root)
    assert (t.classes, len(t), len({o.resolve() for o in t.files})) == (['a','b'], 6, 6)
    assert any(f'to folders that are read already: {link}' in o for o in said)
    assert len(verify(root))==0 and len(images_of(root))==6

def test_links_to_elsewhere(tmp_path):
    in_folders(tmp_path/'disk', 'tits', 'wrens')
    (tmp_path/'set'/'.store').mkdir(parents=True)
    in_folders(tmp_path/'set'/'.store', 'owls')
    for o,to in (('tit','../disk/tits'), ('wren','../disk/wrens'), ('owl','.store/owls'), ('wren2','../disk/wrens')): (tmp_path/'set'/o).symlink_to(to)
    t,said = heard(read_table, tmp_path/'set')
    assert (t.classes, len(t)) == (['owl','tit','wren'], 9) and len(said)==1 and said[0].endswith('wren2')

@pytest.mark.parametrize('name', ['stanford_cars', 'flowers-102', 'oxford-iiit-pet', 'fgvc-aircraft-2013b', 'CUB_200_2011'])
def test_class_folders_in_a_folder_with_the_name_of_a_benchmark(tmp_path, name):
    in_folders(tmp_path/name, 'images/a', 'images/b')
    for o in (tmp_path/name, tmp_path): assert (read_table(o).classes, len(read_table(o))) == (['a','b'], 6)

@pytest.mark.parametrize('note', ['images.txt', 'classes.txt', 'labels.mat'])
def test_notes_in_a_class_folder(tmp_path, note):
    root = in_folders(tmp_path, 'a', 'b')
    (root/'a'/note).write_text('some words')
    (root/note).write_text('some words')
    t,said = heard(read_table, root)
    assert (t.classes, len(t)) == (['a','b'], 6) and not said

# Tables

@pytest.mark.parametrize('enc,warns', [('utf-8',False), ('utf-8-sig',False), ('utf-16',False), ('utf-16-le',False), ('utf-16-be',False), ('latin-1',True), ('cp1252',True)])
def test_lists_in_any_encoding(tmp_path, enc, warns):
    root = cub_mini(tmp_path/'cub')
    text = (root/'classes.txt').read_text().replace('Mallard', 'Möwe')
    (root/'classes.txt').write_bytes(text.encode(enc))
    t,said = heard(read_table, root)
    assert t.classes == ['001.Zebra Finch','002.Ant_Bird','003.Möwe'] and bool(said)==warns
    if warns: assert f"{root/'classes.txt'}, line 3: this is no UTF-8" in said[0]
    df = pd.DataFrame(dict(file=[o.relative_to(root).as_posix() for o in t.files], label=['Möwe','Krähe']*9))
    (tmp_path/'a.csv').write_bytes(df.to_csv(index=False, sep=';').encode(enc))
    u,said = heard(read_table, tmp_path/'a.csv', folder=root)
    assert u.classes == ['Krähe','Möwe'] and bool(said)==warns

def test_lists_cut_short(tmp_path):
    root = cub_mini(tmp_path/'cub')
    (root/'classes.txt').write_bytes('1 a\n'.encode('utf-16')[:-1])
    with raises(ValueError, 'classes.txt is not whole UTF-16', 'save it as UTF-8'): read_table(root)
    (tmp_path/'a.csv').write_text('')
    with raises(ValueError, 'a.csv cannot be read as a table'): read_table(tmp_path/'a.csv')

@pytest.mark.parametrize('labels,valid,says', [(['a',np.nan,'b','b'], [0,1,0,1], 'no label for .*1.jpg (row 1)'), (['a',None,'b','b'], [0,1,0,1], '(row 1): fill in the column labels'),
    (['a','b',3,'b'], [0,0,1,1], 'row 2 of column labels is 3'), ([['a'],'a','b','b'], [0,1,0,1], "row 0 of column labels is ['a']"),
    ('abab', [0,0,1,np.nan], "row 3 of column 'is_valid' is nan"), ('abab', ['train','train','later','valid'], "row 2 of column 'is_valid' is 'later'"), ('abab', [0,0,1,2], "row 3 of column 'is_valid' is 2")])
def test_cells_that_are_wrong(tmp_path, labels, valid, says):
    files = [picture(tmp_path/f'{i}.jpg', i) for i in range(4)]
    with raises(ValueError, *says.split('.*')): ImageTable(files, labels, valid)

@pytest.mark.parametrize('flags', [[False,False,True,True], ['False','False','True','True'], ['train','train','valid','valid'], ['Training','TRAIN','val','Validation'], [0,0,1,1], [0.,0.,1.,1.], ['no','no','yes','yes'], np.array([0,0,1,1])])
def test_every_way_to_write_a_part(tmp_path, flags):
    assert ImageTable([picture(tmp_path/f'{i}.jpg', i) for i in range(4)], 'abab', flags).is_valid.tolist() == [False,False,True,True]

def test_files_that_are_wrong(tmp_path):
    files = [picture(tmp_path/f'{i}.jpg', i) for i in range(4)]
    with raises(FileNotFoundError, '1 of 4 files of the table are missing', 'gone.jpg (row 3)'): ImageTable(files[:3]+[tmp_path/'gone.jpg'], 'abab', [0,0,1,1])
    with raises(ValueError, 'row 2 of column files is nan'): ImageTable(files[:2]+[np.nan, files[3]], 'abab', [0,0,1,1])
    (tmp_path/'a').mkdir()
    (tmp_path/'b').mkdir()
    for i in range(4): (tmp_path/'ab'[i%2]/f'{i}.jpg').symlink_to(files[i] if i else tmp_path/'none.jpg')
    with raises(FileNotFoundError, '1 of 4 files', 'a/0.jpg', 'links'): read_table(tmp_path)
    (tmp_path/'a'/'5.jpg').symlink_to(files[1])
    with pytest.warns(UserWarning, match='left out 1 of 5 images.*missing'): assert len(read_table(tmp_path, verify=True))==4

@pytest.mark.parametrize('names', [['001','002'], ['NA','None'], ['nan','true'], ['a,b','c;"d"'], ['Möwe','Krähe'], ['1e3','1.0']])
@pytest.mark.parametrize('test', [False,True])
def test_round_trip(tmp_path, names, test):
    files = [picture(tmp_path/f'{i}.jpg', i) for i in range(8)]
    t = ImageTable(files, names*4, [0,0,0,0,1,1,0,0], root=tmp_path, is_test=[0]*6+[1,1] if test else None)
    t.to_df().to_csv(tmp_path/'t.csv', index=False)
    for u in (ImageTable.from_df(tmp_path/'t.csv'), read_table(tmp_path/'t.csv'), ImageTable.from_df(t.to_df(), folder=tmp_path)):
        both = [(o.files, o.labels, o.classes, o.is_valid.tolist(), o.is_test.tolist()) for o in (u,t)]
        assert both[0]==both[1]

def sheet(tmp_path, head, rows, name='t.csv'):
    "A CSV file, and the pictures that it names"
    for o in rows: picture(tmp_path/o.replace(';', ',').split(',')[0], 1)
    (tmp_path/name).write_text('\n'.join([head,*rows])+'\n')
    return tmp_path/name

def test_blanks_around_labels_and_heads(tmp_path):
    t = read_table(sheet(tmp_path, 'file, label', ['0.jpg, cat','1.jpg,cat ','2.jpg, dog','3.jpg,dog']))
    assert t.classes==['cat','dog'] and len(t)==4
    with raises(ValueError, 'no label for', '(row 1)'): read_table(sheet(tmp_path, 'file,label', ['0.jpg,cat','1.jpg,  ','2.jpg,dog','3.jpg,dog']))

@pytest.mark.parametrize('head', ['file,label','\n\nfile;label'])
def test_sheets_with_trailing_separators_and_blank_lines(tmp_path, head):
    end = ',' if ';' not in head else ';'
    t = read_table(sheet(tmp_path, head, [f'{i}.jpg{end}{"ab"[i%2]}{end}' for i in range(4)]))
    assert t.labels==[*'abab']

def test_a_sheet_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    sheet(tmp_path, 'file,label', [f'{i}.jpg,{"ab"[i%2]}' for i in range(4)])
    assert len(read_table('~/t.csv'))==len(read_table(pd.read_csv(tmp_path/'t.csv'), folder='~'))==4

def test_groups_of_several_classes(tmp_path):
    "Walks on which many species were seen: about the share that was asked for, and some of each class"
    rng = np.random.default_rng(0)
    for n_classes,per,n_walks in ((200,20,30), (100,30,15), (20,30,25), (50,9,50)):
        labels = [f'c{i%n_classes}' for i in range(n_classes*per)]
        groups = rng.integers(n_walks, size=len(labels)).tolist() if n_walks!=n_classes else labels
        held = table_split(labels, groups, .2, 42)
        none = set(labels)-{o for o,v in zip(labels, held) if v}
        if n_walks==n_classes: assert none==set(labels) and not held.any() # a class in one group has nothing left to train on
        else: assert .17<held.mean()<.31 and not none

def test_rows_with_names_and_cells_too_many(tmp_path):
    "A separator within a cell is no new column; names of rows, as R writes them, are no files; a name of a column stands once"
    for i in range(4): picture(tmp_path/f'{i}.jpg', 1)
    (tmp_path/'r.csv').write_text('"file","label"\n'+''.join(f'"{i+1}","{i}.jpg","{"ab"[i%2]}"\n' for i in range(4)))
    assert read_table(tmp_path/'r.csv').labels==[*'abab']
    (tmp_path/'cut.csv').write_text('file,label\n'+''.join(f'{i}.jpg,Gull, herring\n' for i in range(4)))
    with raises(FileNotFoundError, 'missing'): read_table(tmp_path/'cut.csv')
    (tmp_path/'twice.csv').write_text('file,label,label \n'+''.join(f'{i}.jpg,a,b\n' for i in range(4)))
    with raises(ValueError, "several columns 'label'"): read_table(tmp_path/'twice.csv')

def test_parts_of_a_sheet_stay_official(tmp_path):
    "With `valid_pct` what the column says is the test part, whichever form the table has"
    rows = [f'{i}.jpg,{"ab"[i%2]},{i>=16}' for i in range(20)]
    file = sheet(tmp_path, 'file,label,is_valid', rows)
    tables = [read_table(o, valid_pct=.5) for o in (file, ImageTable.from_df(file))]
    assert [(o.n_train,o.n_valid,o.n_test) for o in tables]==[(8,8,4)]*2

def test_every_class_has_its_share_of_groups(tmp_path):
    "Three groups of each of three classes; a class in one group is named; an image without a group stands alone"
    n = 27
    for i in range(n): picture(tmp_path/f'{i}.jpg', 1)
    df = pd.DataFrame(dict(file=[f'{i}.jpg' for i in range(n)], label=['abc'[i//9] for i in range(n)], walk=[i//3 for i in range(n)]))
    for seed in range(5):
        t = ImageTable.from_df(df, group_col='walk', folder=tmp_path, valid_pct=.25, seed=seed)
        assert t.counts().valid.tolist()==[3,3,3]
    with pytest.warns(UserWarning, match='no validation image of a:'): t = ImageTable.from_df(df.assign(walk=df.walk.clip(lower=2)), group_col='walk', folder=tmp_path)
    assert t.counts().valid.tolist()==[0,3,3]
    for none in (np.nan,'',None):
        free = df.astype(dict(walk=object)).assign(walk=[none if i%9 else i for i in range(n)])
        t = ImageTable.from_df(free, group_col='walk', folder=tmp_path, valid_pct=1/3)
        assert t.counts().valid.tolist()==[3,3,3]

def test_a_validation_part_that_was_drawn_is_no_test_part(tmp_path):
    root = in_folders(tmp_path/'set', *'ab', n=6)
    with raises(ValueError, 'has no test part', 'pass valid_pct'): official_test_dl(mini_dls(root, bs=2))
    with raises(ValueError, 'has no test part'): official_test_dl(mini_dls(read_table(root).subset(2).folds(3)[0], bs=2))
    parts = in_folders(tmp_path/'parts', *[f'{p}/{c}' for p in ('train','test') for c in 'ab'], n=6)
    dls = mini_dls(parts, bs=2)
    assert official_test_dl(dls) is dls.valid and official_test_dl(mini_dls(parts, bs=2, valid_pct=.5)).n==12

@pytest.mark.parametrize('k', [2,3,5])
@pytest.mark.parametrize('grouped', [False,True])
def test_folds(tmp_path, k, grouped):
    t = read_table(in_folders(tmp_path, *[f'{p}/{c}' for p in ('train','valid','test') for c in 'abc'], n=10))
    groups = [f'{o.parent} {i//2}' for i,o in enumerate(t.files)] if grouped else None
    fs = t.folds(k, groups)
    assert (np.sum([o.is_valid for o in fs], 0) == ~t.is_test).all() and all((o.is_test==t.is_test).all() and o.files==t.files for o in fs)
    assert [o.is_valid.tolist() for o in fs] == [o.is_valid.tolist() for o in t.folds(k, groups)]
    if grouped: assert all((o.is_valid[::2]==o.is_valid[1::2]).all() for o in fs)
    else: assert all((o.counts().valid-20/k).abs().max()<1 for o in fs)
    with raises(ValueError, 'k=1: pass 2 or more'): t.folds(1)

def test_near_miss_of_a_path(tmp_path, monkeypatch):
    in_folders(tmp_path/'birds', 'a', 'b')
    monkeypatch.chdir(tmp_path)
    for o in (tmp_path/'brids', './brids', 'brids/a', tmp_path/'brids'/'a'):
        with raises(FileNotFoundError, 'brids', f'does not exist: in {tmp_path}', "did you mean 'birds'?"): read_table(o)
    with raises(FileNotFoundError, "'brids' is neither a benchmark nor a folder", "'birds'"): read_table('brids')
    (tmp_path/'labels.csv').write_text('file,label\n')
    with raises(FileNotFoundError, 'lables.csv does not exist', "did you mean 'labels.csv'"): read_table('lables.csv')

def test_verify_takes_files_in_any_form(tmp_path):
    root = in_folders(tmp_path, 'a', 'b')
    bad = spoil(root/'a'/'0.jpg', 'empty')
    files = sorted(root.glob('*/*.jpg'))
    t = read_table(root)
    lists = get_image_files(root),files,tuple(files),set(files),iter(files),map(str, files),np.array(files),pd.Series(files)
    more = t.to_df().file.map(lambda f: root/f),root,str(root),t,bad,str(bad)
    for o in (*lists,*more): assert verify(o).file.tolist() == [bad]
    with raises(TypeError, 'verify takes pictures', 'and not 3'): verify(3)
    with raises(TypeError, 'ImageTable.from_df(df)'): verify(t.to_df())

# Mistakes in the data: one sentence that names what is at fault

def raises(err, *parts): return pytest.raises(err, match='.*'.join(map(re.escape, parts)))

def test_no_such_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with raises(FileNotFoundError, "'CUBS' is neither a benchmark nor a folder", "did you mean 'cub'"): fine_grained_dls('CUBS')
    with raises(FileNotFoundError, "'zzzz'", "choose from 'cub', 'cars'"): fine_grained_dls('zzzz')
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
    folders(tmp_path, train__a=3, train__b=2)
    (tmp_path/'test').mkdir()
    with raises(FileNotFoundError, 'has train/ but no valid/'): read_table(tmp_path)

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
    with raises(ValueError, 'classes=4', 'has 3 classes, pass 2 to 3'): read_table(t, classes=4)
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
    for i in range(4): picture(tmp_path/'aabb'[i]/f'{i}.{ext}', i, mode='L' if mode=='I;16' else mode)
    if mode == 'I;16':
        for i in range(4): Image.fromarray(np.full((30,40), 20000+i, np.uint16)).save(tmp_path/'aabb'[i]/f'{i}.{ext}')
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
    dls = fine_grained_dls(t, size=28, bs=2, num_workers=0, path=tmp_path)
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
    monkeypatch.setitem(BENCHMARKS, 'cub', dataclasses.replace(BENCHMARKS['cub'], n_classes=3, n_train=12, n_test=6))
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
    monkeypatch.setitem(BENCHMARKS, 'cub', dataclasses.replace(BENCHMARKS['cub'], n_classes=3, n_train=14, n_test=5))
    with raises(ValueError, "not the whole of 'cub': 2 training images missing, 1 test images too many; delete the folder"): fine_grained_dls('cub')
    with raises(ValueError, 'check root'): fine_grained_dls('cub', root=tmp_path/'make')

def test_archive_of_another_size_is_used_as_it_is(tmp_path, fastai_home, monkeypatch):
    "fastai knows the size of the official archive; one put there by hand is not fetched anew because it differs."
    arch = archive(tmp_path, False)
    (fastai_home/'archive').mkdir(parents=True)
    shutil.copy(arch, fastai_home/'archive')
    monkeypatch.setattr('fastai.data.external.untar_data', None)
    assert read_cub(fetch_url('CUB_200_2011')).n_train == 12

def test_synthetic_is_drawn_once(fastai_home, monkeypatch):
    n = inspect.signature(make_birds).parameters
    b = BENCHMARKS['synthetic']
    per = n['n_train'].default,n['n_images'].default-n['n_train'].default
    assert (b.n_classes, b.n_train, b.n_test) == (n['n_species'].default, *(o*n['n_species'].default for o in per))
    small = partial(make_birds, n_species=4, n_images=4, n_train=3, size=32, n_workers=0, progress=False)
    monkeypatch.setattr(synthetic, 'make_birds', small)
    monkeypatch.setitem(BENCHMARKS, 'synthetic', dataclasses.replace(b, n_classes=4, n_train=12, n_test=4))
    t = mini_dls('synthetic').table
    when = t.files[0].stat().st_mtime_ns
    assert t.root.is_relative_to(fastai_home/'data') and mini_dls('synthetic').table.files[0].stat().st_mtime_ns == when

def test_benchmarks_lists_all():
    df = benchmarks()
    assert list(df.index) == list(BENCHMARKS) and {'cub','synthetic'} <= set(df.index)
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

# Layouts of the other benchmarks: miniatures as their authors write them

def mats(path, **kwargs):
    "A MATLAB file."
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, kwargs)

def cells(names): return np.array(names, dtype=object)

def cars_mini(path, size=(80,60)):
    "3 classes; train has 2 pictures of each and test 1; the box of picture k begins at (k, 2k) and is 40 x 20."
    base = path/'stanford_cars'
    mats(base/'devkit'/'cars_meta.mat', class_names=cells(['AM General Hummer', 'Acura RL', 'Audi R8']))
    for file,folder,n in ((base/'devkit'/'cars_train_annos.mat', 'cars_train', 6), (base/'cars_test_annos_withlabels.mat', 'cars_test', 3)):
        dt = [(o, object) for o in ('bbox_x1','bbox_y1','bbox_x2','bbox_y2','class','fname')]
        mats(file, annotations=np.array([(k+1, 2*k+1, k+40, 2*k+20, k%3+1, f'{k+1:05d}.jpg') for k in range(n)], dtype=dt))
        for k in range(n): picture(base/folder/f'{k+1:05d}.jpg', k, size=size)
    return path

def aircraft_mini(path, size=(80,60)):
    "4 variants of 2 families of 2 manufacturers; train, val and test have one picture of each variant."
    base = path/'fgvc-aircraft-2013b'/'data'
    names = dict(variant=['707-320','737-200','A300B4','A310'], family=['Boeing 707','A300'], manufacturer=['Boeing','Airbus'])
    for level,file in (('variant','variants'), ('family','families'), ('manufacturer','manufacturers')):
        base.mkdir(parents=True, exist_ok=True)
        (base/f'{file}.txt').write_text('\n'.join(names[level])+'\n')
        for part,ids in (('train',range(4)), ('val',range(4,8)), ('trainval',range(8)), ('test',range(8,12))):
            (base/f'images_{level}_{part}.txt').write_text(''.join(f'{k:07d} {names[level][k%4*len(names[level])//4]}\n' for k in ids))
    (base/'images_box.txt').write_text(''.join(f'{k:07d} {k+1} 3 {k+40} 52\n' for k in range(12)))
    for k in range(12): picture(base/'images'/f'{k:07d}.jpg', k, size=size)
    return path

def pets_mini(path):
    base = path/'oxford-iiit-pet'
    rows = [('Abyssinian',1,1,1), ('american_bulldog',2,2,1), ('Birman',3,1,2)]
    (base/'annotations').mkdir(parents=True)
    for part,ids in (('trainval',(1,2)), ('test',(3,))):
        (base/'annotations'/f'{part}.txt').write_text(''.join(f'{o}_{i} {a} {b} {c}\n' for o,a,b,c in rows for i in ids))
        for k,(o,*_) in enumerate(rows):
            for i in ids: picture(base/'images'/f'{o}_{i}.jpg', 10*k+i)
    return path

def flowers_mini(path, monkeypatch):
    "Six pictures of two classes; the numbers of train, val and test are mixed. torchvision compares hashes, which a miniature cannot have."
    base = path/'flowers-102'
    mats(base/'imagelabels.mat', labels=np.array([[1,2,1,2,1,2]]))
    mats(base/'setid.mat', trnid=np.array([[6,1]]), valid=np.array([[2,3]]), tstid=np.array([[5,4]]))
    for k in range(1, 7): picture(base/'jpg'/f'image_{k:05d}.jpg', k)
    monkeypatch.setattr(tvd.Flowers102, '_check_integrity', lambda self: True)
    return path

def dogs_mini(path):
    names = ['n02085620-Chihuahua', 'n02085782-Japanese_spaniel']
    fs = [f'{o}/{o[:9]}_{k}.jpg' for o in names for k in range(3)]
    for k,o in enumerate(fs): picture(path/'Images'/o, k)
    for part,keep in (('train', [0,2,3,4]), ('test', [1,5])):
        mats(path/f'{part}_list.mat', file_list=cells([[fs[k]] for k in keep]), labels=np.array([[k//3+1] for k in keep]))
    return path

def nabirds_mini(path):
    "Numbers of pictures are words, classes.txt holds groups too, and two leaves bear one name."
    rows = [(f'{k:08x}-0000', f'{c:04d}/{k:08x}.jpg', c, int(k%3<2)) for k,c in enumerate([295]*3+[296]*3+[1010]*3)]
    for k,(_,f,_,_) in enumerate(rows): picture(path/'images'/f, k)
    (path/'classes.txt').write_text('0 Birds\n1 Ducks\n295 Mallard (Adult male)\n296 Mallard\n1010 Mallard\n')
    (path/'hierarchy.txt').write_text('1 0\n295 1\n296 1\n1010 1\n')
    for name,fmt in (('images.txt','{0} {1}'), ('image_class_labels.txt','{0} {2}'), ('train_test_split.txt','{0} {3}'), ('bounding_boxes.txt','{0} 5 6 20 10')):
        (path/name).write_text(''.join(fmt.format(*o)+'\n' for o in rows))
    return path

def cifar_mini(path, cls, monkeypatch):
    "The official pickles, with 6 training and 4 test pictures of 2 classes."
    base,fine = path/cls.base_folder,cls is tvd.CIFAR100
    base.mkdir(parents=True)
    rand = np.random.default_rng(0)
    def put(name, n): (base/name).write_bytes(pickle.dumps({'data': rand.integers(0, 256, (n,3072), dtype=np.uint8), 'fine_labels' if fine else 'labels': [k%2 for k in range(n)]}))
    for name,_ in cls.train_list: put(name, 6 if fine else 2)
    for name,_ in cls.test_list: put(name, 4)
    (base/cls.meta['filename']).write_bytes(pickle.dumps({cls.meta['key']: ['apple','bear']}))
    monkeypatch.setattr('torchvision.datasets.cifar.check_integrity', lambda *args: True)
    return path

def svhn_mini(path, monkeypatch):
    rand = np.random.default_rng(0)
    for part,n in (('train',20), ('test',10)): mats(path/f'{part}_32x32.mat', X=rand.integers(0, 256, (32,32,3,n), dtype=np.uint8), y=np.array([[k%10+1] for k in range(n)], dtype=np.uint8))
    monkeypatch.setattr(tvd.SVHN, '_check_integrity', lambda self: True)
    return path

def expect(monkeypatch, name, *counts):
    "The named benchmark with the counts of a miniature."
    monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], **dict(zip(('n_classes','n_train','n_test'), counts))))

def in_parts(t): return {p:[(f.name, o) for f,o,v in zip(t.files, t.labels, t.is_valid) if v==(p=='valid')] for p in ('train','valid')}

def test_cars(tmp_path, monkeypatch):
    cars_mini(tmp_path)
    expect(monkeypatch, 'cars', 3, 6, 3)
    t = read_table('cars', root=tmp_path)
    assert t.classes == ['AM General Hummer', 'Acura RL', 'Audi R8'] and t.recipe == 'squeeze'
    assert in_parts(t)['valid'] == [('00001.jpg','AM General Hummer'), ('00002.jpg','Acura RL'), ('00003.jpg','Audi R8')]
    assert t.boxes[:3].tolist() == [[0,0,40,20], [1,2,40,20], [2,4,40,20]]
    for o in (tmp_path, tmp_path/'stanford_cars'): assert read_table(o).files == t.files
    (tmp_path/'stanford_cars'/'cars_train'/'00004.jpg').unlink()
    with raises(FileNotFoundError, '1 of 9 files', '00004.jpg'): read_table('cars', root=tmp_path)
    (tmp_path/'stanford_cars'/'cars_test_annos_withlabels.mat').unlink()
    with raises(FileNotFoundError, 'stanford_cars lacks files of StanfordCars'): read_table('cars', root=tmp_path)

def test_cars_by_name_says_what_to_do(fastai_home):
    with raises(FileNotFoundError, "'cars' cannot be downloaded automatically", 'stanford_cars', str(fastai_home/'data'/'cars')): fine_grained_dls('cars')

@pytest.mark.parametrize('name,classes', [('aircraft',4), ('aircraft-family',2), ('aircraft-manufacturer',2)])
def test_aircraft(tmp_path, monkeypatch, name, classes):
    expect(monkeypatch, name, classes, 8, 4)
    t = read_table(name, root=aircraft_mini(tmp_path))
    assert len(t.classes) == classes and t.recipe == 'squeeze' and t.boxes[5].tolist() == [5,2,40,50]
    assert [f.stem for f,v in zip(t.files, t.is_valid) if v] == [f'{k:07d}' for k in range(8, 12)]
    if name == 'aircraft': assert t.labels[:4] == ['707-320','737-200','A300B4','A310'] and read_table(tmp_path).labels == t.labels
    if name == 'aircraft-family': assert t.labels[:4] == ['Boeing 707']*2+['A300']*2

def test_pets(tmp_path, monkeypatch):
    expect(monkeypatch, 'pets', 3, 6, 3)
    t = read_table('pets', root=pets_mini(tmp_path))
    assert t.classes == ['Abyssinian', 'American Bulldog', 'Birman']
    assert in_parts(t)['valid'] == [('Abyssinian_3.jpg','Abyssinian'), ('american_bulldog_3.jpg','American Bulldog'), ('Birman_3.jpg','Birman')]
    assert read_table(tmp_path).files == t.files

def test_flowers(tmp_path, monkeypatch):
    flowers_mini(tmp_path, monkeypatch)
    monkeypatch.setattr(tvd.Flowers102, 'classes', ['pink primrose', 'hard-leaved pocket orchid'])
    expect(monkeypatch, 'flowers', 2, 4, 2)
    t = read_table('flowers', root=tmp_path)
    names = tvd.Flowers102.classes
    assert in_parts(t) == dict(train=[('image_00006.jpg',names[1]), ('image_00001.jpg',names[0]), ('image_00002.jpg',names[1]), ('image_00003.jpg',names[0])],
        valid=[('image_00005.jpg',names[0]), ('image_00004.jpg',names[1])])

def test_flowers_of_other_hashes(tmp_path, monkeypatch):
    with monkeypatch.context() as m: flowers_mini(tmp_path, m)
    with raises(FileNotFoundError, 'flowers-102 lacks files of Flowers102 or they were changed'): read_table(tmp_path)

def test_dogs(tmp_path, monkeypatch):
    expect(monkeypatch, 'dogs', 2, 4, 2)
    t = read_table('dogs', root=dogs_mini(tmp_path))
    assert t.classes == ['n02085620-Chihuahua', 'n02085782-Japanese_spaniel'] and t.n_train == 4
    assert in_parts(t)['valid'] == [('n02085620_1.jpg','n02085620-Chihuahua'), ('n02085782_2.jpg','n02085782-Japanese_spaniel')]
    (tmp_path/'Images'/'n02085620-Chihuahua'/'n02085620_1.jpg').unlink()
    with raises(FileNotFoundError, '1 of 6 files', 'n02085620_1.jpg'): read_table(tmp_path)

def test_nabirds(tmp_path, monkeypatch):
    expect(monkeypatch, 'nabirds', 3, 6, 3)
    t = read_table('nabirds', root=nabirds_mini(tmp_path))
    assert t.classes == ['Mallard (Adult male)', 'Mallard (296)', 'Mallard (1010)']
    assert t.counts().values.tolist() == [[2,1]]*3 and t.boxes[0].tolist() == [5,6,20,10]

@pytest.mark.parametrize('name,cls', [('cifar10',tvd.CIFAR10), ('cifar100',tvd.CIFAR100)])
def test_cifar(tmp_path, monkeypatch, name, cls):
    cifar_mini(tmp_path, cls, monkeypatch)
    expect(monkeypatch, name, 2, 6 if name=='cifar100' else 10, 4)
    dls = fine_grained_dls(name, root=tmp_path, bs=2, num_workers=0)
    t = dls.table
    assert (t.classes, t.recipe, t.stats) == (['apple','bear'], 'pad', STATS[name])
    assert dls.one_batch()[0].shape == (2,3,32,32)
    raw = [cls(tmp_path, train=o) for o in (True, False)]
    for f,o,v in zip(t.files, t.labels, t.is_valid):
        i = int(f.stem)
        assert (np.array(Image.open(f)) == raw[int(v)].data[i]).all() and o == raw[int(v)].classes[raw[int(v)].targets[i]]
    when = t.files[0].stat().st_mtime_ns
    assert read_table(name, root=tmp_path).files[0].stat().st_mtime_ns == when # written once
    t.files[0].unlink()
    with raises(FileNotFoundError, '1 files of', 'are missing: 00000.png'): read_table(name, root=tmp_path)

def test_svhn(tmp_path, monkeypatch):
    svhn_mini(tmp_path, monkeypatch)
    expect(monkeypatch, 'svhn', 10, 20, 10)
    dls = fine_grained_dls('svhn', root=tmp_path, bs=2, num_workers=0)
    t = dls.table
    assert t.classes == list('0123456789') and t.recipe == 'digits'
    assert {o for f,o in zip(t.files, t.labels) if f.name=='00009.png'} == {'0'} # the files say 10
    assert not any(isinstance(o, FlipItem) for o in dls.after_item.fs)

def test_arrays_that_are_not_there(tmp_path):
    with raises(FileNotFoundError, 'neither train/ and test/ nor the whole files of CIFAR10'): read_table('cifar10', root=tmp_path)
    assert not (tmp_path/'png').exists() and not list(tmp_path.iterdir())

def test_arrays_half_written(tmp_path, monkeypatch):
    "An interrupt while the PNG files are written leaves nothing that could be taken for the data set."
    cifar_mini(tmp_path, tvd.CIFAR100, monkeypatch)
    expect(monkeypatch, 'cifar100', 2, 6, 4)
    save,n = Image.Image.save,[]
    def broken(self, *args, **kwargs):
        n.append(1)
        if len(n) > 3: raise KeyboardInterrupt
        return save(self, *args, **kwargs)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Image.Image, 'save', broken)
        read_table('cifar100', root=tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == [tvd.CIFAR100.base_folder]
    assert len(read_table('cifar100', root=tmp_path)) == 10

def test_cinic_has_three_parts(tmp_path, monkeypatch):
    folders(tmp_path, train__cat=3, train__dog=3, valid__cat=2, valid__dog=2, test__cat=2, test__dog=1)
    expect(monkeypatch, 'cinic10', 2, 6, 3)
    dls = fine_grained_dls('cinic10', root=tmp_path, bs=2, num_workers=0)
    assert dls.table.counts().values.tolist() == [[3,2,2],[3,2,1]] and dls.table.recipe == 'pad'
    assert {o.parent.parent.name for o in dls.valid.items} == {'valid'} and {o.parent.parent.name for o in official_test_dl(dls).items} == {'test'}
    with raises(ValueError, 'has a validation part and a test part already'): read_table('cinic10', root=tmp_path, valid_pct=.2)

@pytest.mark.parametrize('name', ['imagenet','imagewoof'])
def test_imagenet_layout(tmp_path, monkeypatch, name):
    folders(tmp_path, train__n01440764=3, train__n01443537=2, val__n01440764=1, val__n01443537=1)
    expect(monkeypatch, name, 2, 5, 2)
    assert read_table(name, root=tmp_path).counts().values.tolist() == [[3,1],[2,1]]
    next((tmp_path/'train'/'n01443537').iterdir()).unlink()
    with raises(ValueError, f"not the whole of '{name}': 1 training images missing", 'n01443537 with 1 train'): read_table(name, root=tmp_path)

def test_never_downloaded(fastai_home):
    with raises(FileNotFoundError, "'imagenet' cannot be downloaded", 'image-net.org', 'root='): fine_grained_dls('imagenet')
    with raises(FileNotFoundError, "'nabirds' cannot be downloaded", 'put nabirds.tar.gz into'): fine_grained_dls('nabirds')
    (fastai_home/'archive').mkdir(parents=True)
    (fastai_home/'archive'/'nabirds.tar.gz').write_bytes(b'half')
    with raises(OSError, 'nabirds.tar.gz is damaged or another version'): fine_grained_dls('nabirds')

def test_official_counts():
    want = dict(cub=(200,5994,5794), cars=(196,8144,8041), aircraft=(100,6667,3333), dogs=(120,12000,8580), pets=(37,3680,3669), flowers=(102,2040,6149),
        nabirds=(555,23929,24633), cifar10=(10,50000,10000), cifar100=(100,50000,10000), cinic10=(10,90000,90000), svhn=(10,73257,26032),
        imagenet=(1000,1281167,50000), imagewoof=(10,9025,3929))
    df = benchmarks()
    assert {k:tuple(df.loc[k, ['n_classes','n_train','n_test']]) for k in want} == want
    assert df.loc[['aircraft-family','aircraft-manufacturer'], 'n_classes'].tolist() == [70,30]
    assert {'title','gb','papers','source','licence','paper'} <= set(df.columns) and 'CEKD' in df.papers['aircraft'] and 'MEAL' in df.papers['svhn']

# Options

def test_holdout_leaves_the_test_part_alone(tmp_path):
    root = cub_mini(tmp_path/'cub', n_train=8, n_test=2)
    full,dls = read_table(root),mini_dls(root, valid_pct=.25)
    t = dls.table
    assert t.counts().values.tolist() == [[6,2,2]]*3
    assert {f for f,o in zip(t.files, t.is_test) if o} == {f for f,o in zip(full.files, full.is_valid) if o}
    seen = set(dls.train.items) | set(dls.valid.items)
    assert len(seen) == 24 and not seen & set(official_test_dl(dls).items)
    x,y = official_test_dl(dls).one_batch()
    assert len(y) == 4 and [dls.vocab[o] for o in y] == [f.parent.name for f in official_test_dl(dls).items[:4]]
    assert list(mini_dls(root, valid_pct=.25).valid.items) == list(dls.valid.items) != list(mini_dls(root, valid_pct=.25, seed=1).valid.items)
    learn = tiny(dls, path=tmp_path)
    with learn.no_bar(): assert len(learn.validate(dl=official_test_dl(dls))) == 2
    assert t.to_df().is_test.sum() == 6 and official_test_dl(mini_dls(root)).n == 6
    with raises(ValueError, 'class 001.Zebra Finch (1)', 'valid_pct needs'): read_table(cub_mini(tmp_path/'one', n_train=1), valid_pct=.2)

def test_holdout_of_split_folders(tmp_path):
    folders(tmp_path, train__a=10, train__b=5, test__a=2, test__b=1)
    assert read_table(tmp_path, valid_pct=.2).counts().values.tolist() == [[8,2,2],[4,1,1]]
    assert read_table(tmp_path).counts().values.tolist() == [[10,2],[5,1]]

def test_per_class(tmp_path):
    root = cub_mini(tmp_path/'cub')
    t = read_table(root, per_class=2)
    assert t.counts().values.tolist() == [[2,2]]*3
    assert read_table(root, per_class=2).files == t.files
    assert len({tuple(read_table(root, per_class=2, seed=i).files) for i in range(8)}) > 1
    assert set(t.files) < set(read_table(root, per_class=3).files)
    assert set(read_table(root, per_class=2, classes=2).files) < set(t.files)
    assert read_table(root, per_class=2, valid_pct=.25).counts().values.tolist() == [[2,1,2]]*3
    with raises(ValueError, 'class 001.Zebra Finch (4)', 'fewer than 5', 'smaller per_class'): read_table(root, per_class=5)
    for o in (0, 1.5, True):
        with raises(ValueError, f'per_class={o}'): read_table(root, per_class=o)

@pytest.mark.parametrize('memory', [False, True])
def test_balanced(tmp_path, memory):
    folders(tmp_path, train__a=20, train__b=5, train__c=2, test__a=1, test__b=1, test__c=1)
    make = lambda **kw: mini_dls(tmp_path, balanced=True, in_memory=memory, bs=9, **kw)
    drawn = lambda dl: ['abc'.index(dl.items[i].parent.name) for i in dl.get_idxs()]
    epochs = lambda dls: [drawn(dls.train) for _ in range(3)]
    dls = make()
    got = epochs(dls)
    assert all(sorted(map(o.count, range(3))) == [9,9,9] for o in got) and got[0] != got[1]
    rows = dls.train.get_idxs()
    assert sorted(len([i for i in rows if i==j]) for j in range(27) if dls.train.items[j].parent.name=='b') == [1,2,2,2,2] # as even as can be
    assert epochs(make()) == got != epochs(make(seed=1))
    assert torch.cat([y for _,y in dls.train]).bincount().tolist() == [9,9,9]
    assert len(dls.train) == 3 and [int(y) for _,b in dls.valid for y in b] == [0,1,2]
    assert list(dls.train.new(shuffle=False).get_idxs()) == list(range(27)) and sorted(map(drawn(dls.train.new()).count, range(3))) == [9,9,9]
    plain = mini_dls(tmp_path, bs=9, in_memory=memory)
    assert sorted(plain.train.get_idxs()) == list(range(27))
    with raises(ValueError, 'balanced=True has a dl_type of its own'): make(dl_type=BalancedDL)

def boxed(path, size=(80,60)):
    "CUB's layout with a white object in the box of a black picture; class i's object has width 20+4i."
    root = cub_mini(path)
    lines = []
    for k,o in readers._id_lines(root/'images.txt').items():
        box = (7+int(k)%5, 9, 20+4*int(o[:3]), 30)
        a = np.zeros((size[1],size[0],3), np.uint8)
        a[box[1]:box[1]+box[3],box[0]:box[0]+box[2]] = 255
        Image.fromarray(a).save(root/'images'/o, quality=95, subsampling=0)
        lines.append(f'{k} ' + ' '.join(f'{v:.1f}' for v in box) + '\n')
    (root/'bounding_boxes.txt').write_text(''.join(lines))
    return root

def test_crop_to_box(tmp_path):
    root = boxed(tmp_path/'cub')
    kw = dict(stats=([0.]*3, [1.]*3))
    for dls in (mini_dls(root, crop_to_box=True, **kw), mini_dls(root, crop_to_box=True, in_memory=True, **kw)):
        for dl in dls.loaders:
            for x,_ in dl: assert x.min() > .9
    assert mini_dls(root, **kw).valid.one_batch()[0].min() < .1
    t = read_table(root)
    assert [tuple(open_image(f, box=b).size) for f,b in zip(t.files, t.boxes)] == [(20+4*int(f.parent.name[:3]), 30) for f in t.files]
    dls = mini_dls(root, crop_to_box=True, path=tmp_path)
    tiny(dls).export()
    assert b'pic 0.jpg' not in (tmp_path/'export.pkl').read_bytes()
    new = picture(tmp_path/'new.jpg')
    assert dls.test_dl([new]).one_batch()[0].shape == (1,3,28,28) # a picture without a box is taken whole

def test_crop_to_box_in_processes(tmp_path):
    dls = mini_dls(boxed(tmp_path/'cub'), crop_to_box=True, num_workers=2, stats=([0.]*3, [1.]*3))
    assert min(float(x.min()) for x,_ in dls.valid) > .9

def test_box_of_a_large_jpeg_is_decoded_small_enough_to_keep_its_pixels(tmp_path):
    fn = picture(tmp_path/'x.jpg', size=(1600,1200), quality=95)
    full = open_image(fn, box=(200,160,400,320)).resize((100,80))
    fast = open_image(fn, draft=80, box=(200,160,400,320))
    assert min(fast.size) >= 80 and fast.width < 400
    assert np.abs(np.array(fast.resize((100,80))).astype(int) - np.array(full)).mean() < 2

def test_crop_to_box_errors(tmp_path):
    with raises(ValueError, 'crop_to_box=True', 'has no boxes'): mini_dls(cub_mini(tmp_path/'cub'), crop_to_box=True)
    root = boxed(tmp_path/'b')
    lines = (root/'bounding_boxes.txt').read_text().splitlines()
    (root/'bounding_boxes.txt').write_text('\n'.join(lines[:-1]))
    with raises(ValueError, 'bounding_boxes.txt: 24 has no line with 4 numbers'): read_table(root)
    (root/'bounding_boxes.txt').write_text('\n'.join(lines[:-1]+['24 1 2 3 x']))
    with raises(ValueError, 'bounding_boxes.txt: 24 has no line with 4 numbers'): read_table(root)
    (root/'bounding_boxes.txt').write_text('\n'.join(['7 90 1 5 5']+lines[1:]))
    with raises(OSError, 'pic 0.jpg cannot be read', 'its box [90.0, 1.0, 5.0, 5.0] lies outside of its 80 x 60 pixels'): mini_dls(root, crop_to_box=True, in_memory=True)

def test_default_size_and_recipe_of_each_set(tmp_path, monkeypatch):
    kinds = lambda dls: {type(o).__name__ for o in dls.after_item.fs} - {'ToTensor'}
    dls = fine_grained_dls(cub_mini(tmp_path/'cub'), bs=2, num_workers=0)
    assert kinds(dls) == {'ResizeShort','RandomCrop','FlipItem'} and dls.one_batch()[0].shape[-1] == 224
    assert kinds(mini_dls(cars_mini(tmp_path/'cars'))) == {'ResizeSquare','RandomCrop','FlipItem'}
    small = folders(tmp_path/'small', a=4, b=4)
    dls = fine_grained_dls(small, recipe='digits', bs=2, num_workers=0)
    assert kinds(dls) == {'ResizeSquare','CropPad','RandomCrop'} and dls.one_batch()[0].shape[-1] == 32
    with raises(ValueError, "recipe='pda'", "did you mean 'pad'"): mini_dls(small, recipe='pda')

def test_squeeze_keeps_everything_in_sight():
    "A wide picture with a red left and a blue right end: squeezed, both are in the central crop; cropped, neither."
    a = np.full((40,160,3), 128, np.uint8)
    a[:,:20],a[:,-20:] = (255,0,0),(0,0,255)
    x = {o:np.array(Pipeline(recipe_tfms(56, o), split_idx=1)(PILImage(Image.fromarray(a)))).astype(int) for o in ('crop','squeeze')}
    assert all(o.shape == (56,56,3) for o in x.values())
    assert (x['squeeze'][28,0]-[255,0,0] == 0).all() and (x['squeeze'][28,-1]-[0,0,255] == 0).all() and (x['crop'] == 128).all()

def test_pad_moves_by_at_most_four_and_fills_with_black():
    im = PILImage(Image.new('RGB', (32,32), 'white'))
    random.seed(0)
    x = np.stack([np.array(Pipeline(recipe_tfms(32, 'pad'), split_idx=0)(im))[:,:,0] for _ in range(200)])
    assert set(np.unique(x)) == {0,255}
    rows = (x.max(2) == 255).sum(1)
    assert set(rows.tolist()) == {28,29,30,31,32}

@pytest.mark.parametrize('recipe', ['crop','squeeze','pad','digits'])
def test_in_memory_is_the_recipe(tmp_path, recipe):
    root = cub_mini(tmp_path/'cub')
    a,b = [mini_dls(root, recipe=recipe, in_memory=o) for o in (False,True)]
    for (x,y),(u,v) in zip(a.valid, b.valid): assert torch.allclose(x, u, atol=1e-6) and (y==v).all()
    ramp = Image.fromarray(np.tile(np.linspace(60, 255, 40).astype(np.uint8)[None,:,None], (30,1,3)))
    ramp.save(tmp_path/'r.png')
    got = PixelStore([tmp_path/'r.png'], 28, recipe=recipe).crops(torch.zeros(100, dtype=torch.long), random=True)
    flips = sum(int(o[0,14,4]) > int(o[0,14,-5]) for o in got)
    assert flips == 0 if recipe=='digits' else 30 < flips < 70
    assert (0 in got.unique().tolist()) == (recipe in ('pad','digits'))

def test_stats(tmp_path):
    root = cub_mini(tmp_path/'cub')
    own = lambda **kw: [o.mean.flatten().tolist()+o.std.flatten().tolist() for o in mini_dls(root, device='cpu', **kw).after_batch.fs if isinstance(o, Normalize)]
    assert np.allclose(own(), [[.485,.456,.406,.229,.224,.225]])
    assert np.allclose(own(stats='vit_base_patch16_224'), [[.5]*6])
    assert np.allclose(own(stats=([.1]*3, [.2]*3)), [[.1]*3+[.2]*3])
    for o in ('resnet_50x', (1,2), [[.1]*3]):
        with raises(ValueError, 'architecture'): own(stats=o)

def test_norm_stats_of_a_model():
    import timm
    assert norm_stats(timm.create_model('vit_tiny_patch16_224')) == ([.5]*3, [.5]*3)
    assert norm_stats('vit_base_patch16_224.dino') == ([.485,.456,.406], [.229,.224,.225])

# A smaller copy

def test_presize_cub(tmp_path, monkeypatch):
    root = boxed(tmp_path/'cub', size=(160,120))
    (root/'extra.txt').write_text('pixels of something else')
    dest = presize(root, 40)
    a,b = read_table(root),read_table(dest)
    assert dest == tmp_path/'cub-40' and (b.labels, list(b.is_valid), b.classes) == (a.labels, list(a.is_valid), a.classes)
    assert [o.relative_to(dest) for o in b.files] == [o.relative_to(root) for o in a.files]
    assert {Image.open(o).size for o in b.files} == {(53,40)} and {Image.open(o).format for o in b.files} == {'JPEG'}
    assert np.abs(b.boxes-a.boxes/3).max() <= .05
    assert not (dest/'extra.txt').exists() and [o.name for o in tmp_path.iterdir() if o.name[0]=='.'] == []
    x,y = [mini_dls(o, crop_to_box=True).valid.one_batch()[0] for o in (root, dest)]
    assert (x-y).abs().mean() < .1
    when = (dest/'images.txt').stat().st_mtime_ns
    assert presize(root, 40) == dest and (dest/'images.txt').stat().st_mtime_ns == when
    with raises(FileExistsError, 'cub-40 exists and is not this copy'): presize(root, 50, dest=dest)
    expect(monkeypatch, 'cub', 3, 12, 6)
    assert len(read_table('cub', root=presize('cub', 40, root=root))) == 18
    with raises(TypeError, 'pass a name or a path'): presize(a, 40)
    with raises(ValueError, 'size=0'): presize(root, 0)

@pytest.mark.parametrize('make', [cars_mini, aircraft_mini])
def test_presize_scales_corner_boxes(tmp_path, make):
    root = make(tmp_path/'set', size=(160,120))
    a,b = read_table(root),read_table(presize(root, 60))
    assert (b.labels, b.recipe) == (a.labels, 'squeeze') and {Image.open(o).size for o in b.files} == {(80,60)}
    assert np.abs(b.boxes-a.boxes/2).max() <= 1
    assert ((b.boxes[:,:2] <= a.boxes[:,:2]/2) & (b.boxes[:,:2]+b.boxes[:,2:] >= (a.boxes[:,:2]+a.boxes[:,2:])/2)).all() # never cuts the object
    c = read_table(presize(presize(root, 60), 30))
    assert np.abs(c.boxes-a.boxes/4).max() <= 2

def test_presize_others(tmp_path, monkeypatch):
    flowers = flowers_mini(tmp_path/'flowers', monkeypatch)
    monkeypatch.setattr(tvd.Flowers102, 'classes', ['pink primrose', 'hard-leaved pocket orchid'])
    for root in (flowers, pets_mini(tmp_path/'pets'), dogs_mini(tmp_path/'dogs'), nabirds_mini(tmp_path/'nabirds')):
        a,b = read_table(root),read_table(presize(root, 20))
        assert (b.labels, list(b.is_valid)) == (a.labels, list(a.is_valid)) and {min(Image.open(o).size) for o in b.files} == {20}

def test_presize_keeps_parts_and_formats(tmp_path):
    root = folders(tmp_path/'set', train__a=2, valid__a=1, test__a=1, train__b=1)
    for i,(ext,kw) in enumerate(dict(png=dict(mode='L'), gif=dict(mode='P'), webp={}, bmp={}, tif={}).items()): picture(root/'train'/'a'/f'x{i}.{ext}', size=(60,60), **kw)
    picture(root/'train'/'a'/'small.jpg', size=(10,10))
    b = read_table(presize(root, 20))
    assert b.counts().values.tolist() == [[8,1,1],[1,0,0]]
    sizes = {o.name:Image.open(o).size for o in b.files if o.parent.parent.name=='train' and o.parent.name=='a'}
    assert sizes == {'0.jpg':(27,20), '1.jpg':(27,20), 'x0.png':(20,20), 'x1.gif':(60,60), 'x2.webp':(20,20), 'x3.bmp':(20,20), 'x4.tif':(20,20), 'small.jpg':(10,10)}

def test_presize_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2): Image.open(picture(tmp_path/'x.png', size=(80,60))).save((tmp_path/'set'/'a').mkdir(parents=True, exist_ok=True) or tmp_path/'set'/'a'/f'{i}.jpg', exif=exif, quality=95)
    folders(tmp_path/'set', b=2)
    a,b = tmp_path/'set'/'a'/'0.jpg',presize(tmp_path/'set', 30, quality=95)/'a'/'0.jpg'
    assert open_image(b).size == (30,40)
    assert np.abs(np.array(open_image(b)).astype(int)-np.array(open_image(a).resize((30,40)))).mean() < 8

def test_presize_quality(tmp_path):
    root = folders(tmp_path/'set', a=3, b=3)
    n = [sum(o.stat().st_size for o in presize(root, 25, dest=tmp_path/f'q{q}', quality=q).rglob('*.jpg')) for q in (20, 95)]
    assert n[0] < n[1]

def test_no_suspects_to_show(capsys):
    show_suspects(pd.DataFrame(dict(file=[], label=[], belief=[], p_label=[], p_belief=[])))
    assert 'no suspects' in capsys.readouterr().out

def test_presize_refuses(tmp_path):
    "A table, whose labels would not come along; a place within the data set, which would be a class of it; the copy of another one"
    a,b = in_folders(tmp_path/'a', *'xy', n=2),in_folders(tmp_path/'b', *'zxy', n=2)
    shutil.rmtree(b/'z') # so that its pictures are others
    read_table(a).to_df().to_csv(a/'t.csv', index=False)
    with raises(TypeError, 't.csv', 'is a table', 'pass the folder'): presize(a/'t.csv', 10)
    with raises(ValueError, 'lies in', 'choose a dest beside it'): presize(a, 10, dest=a/'small')
    copy = presize(a, 10, dest=tmp_path/'copy')
    assert presize(a, 10, dest=copy)==copy
    with raises(FileExistsError, 'is not this copy'): presize(b, 10, dest=copy)
    note = json.loads((copy/'presized.json').read_text())
    (copy/'presized.json').write_text(json.dumps({k:v for k,v in note.items() if k!='of'})) # as it was before
    assert presize(a, 10, dest=copy)==copy
    (tmp_path/'away').mkdir()
    there = [Path(shutil.move(o, tmp_path/'away'/o.name)) for o in (a,copy)]
    assert presize(there[0], 10, dest=there[1])==there[1] # wherever both lie
    assert presize(b, 10, dest=b/'..'/'beside').exists()

def test_presize_of_several_pictures_in_one_file(tmp_path):
    "As phones write them"
    root = in_folders(tmp_path/'set', *'xy', n=2)
    f = root/'x'/'p.jpg'
    one,two = (Image.effect_noise((60,40), o).convert('RGB') for o in (20,90))
    one.save(f, format='MPO', save_all=True, append_images=[two])
    with Image.open(f) as im: assert im.format=='MPO'
    assert Image.open(presize(root, 20)/'x'/'p.jpg').size==(30,20)

def test_presize_here(tmp_path, monkeypatch):
    "Of the folder that one is in, and of one whose reader names the folder above it"
    root = in_folders(tmp_path/'set', *'xy', n=2)
    monkeypatch.chdir(root)
    assert presize('.', 10)==tmp_path/'set-10' and len(read_table(tmp_path/'set-10'))==4

def test_presize_interrupted(tmp_path, monkeypatch):
    root,before = cub_mini(tmp_path/'cub'),check._shrink
    def broken(src, *args):
        if src.name == 'pic 3.jpg': raise KeyboardInterrupt
        return before(src, *args)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(check, '_shrink', broken)
        presize(root, 20)
    assert [o.name for o in tmp_path.iterdir()] == ['cub']
    spoil(root/'images'/'003.Mallard'/'pic 2.jpg', 'truncated')
    with raises(OSError, '003.Mallard/pic 2.jpg cannot be read'): presize(root, 20)
    assert [o.name for o in tmp_path.iterdir()] == ['cub']

# Files that are no good, and names that are unusual

def test_verify_lists_every_fault(tmp_path):
    root = folders(tmp_path/'set', a=9, b=2, c=2)
    f = lambda i: root/'a'/f'{i}.jpg'
    for i,how in enumerate(['truncated','empty','text']): spoil(f(i), how)
    Image.new('1', (2000,1500)).save(root/'a'/'big.png')
    b = bytearray(picture(root/'a'/'crc.png', size=(64,64)).read_bytes())
    b[len(b)//2] ^= 255
    (root/'a'/'crc.png').write_bytes(b)
    df = verify(root, max_pixels=10**6)
    assert list(df.columns) == ['file','fault']
    got = {o.name:w for o,w in df.values}
    assert got.pop('crc.png').startswith('corrupt')
    assert got == {'0.jpg':'truncated', '1.jpg':'empty', '2.jpg':'not an image', 'big.png':'oversized (2,000 x 1,500)'}
    t = ImageTable([f(i) for i in range(3, 9)]+[root/'a'/'gone.jpg'], 'ababaab', [False]*6+[True], must_exist=False)
    assert verify(t).fault.tolist() == ['missing'] and len(verify(root/'b')) == 0 and verify(f(1)).fault.tolist() == ['empty']
    dls = mini_dls(root, bs=1, classes=['b','c'])
    assert len(verify(dls)) == 0
    spoil(root/'b'/'1.jpg', 'empty')
    assert verify(dls).fault.tolist() == ['empty']
    with raises(FileNotFoundError, 'does not exist'): verify(tmp_path/'none')

def test_decompression_bomb(tmp_path, monkeypatch):
    fn = tmp_path/'set'/'a'/'bomb.png'
    fn.parent.mkdir(parents=True)
    Image.new('1', (300,300)).save(fn)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40000)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert verify(fn.parent).fault.tolist() == ['oversized (more than 80,000 pixels)']
        monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 60000)
        assert verify(fn.parent).fault.tolist() == ['oversized (300 x 300)']
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 40000)
    with raises(OSError, 'bomb.png cannot be read', 'exceeds limit'): open_image(fn)

def test_verify_works_in_parallel(tmp_path, monkeypatch):
    "All threads are inside at once, else the barrier breaks."
    root,gate,before = folders(tmp_path, a=4, b=4),threading.Barrier(2, timeout=20),image.open_image
    def meet(*args, **kwargs):
        gate.wait()
        return before(*args, **kwargs)
    monkeypatch.setattr(image.defaults, 'cpus', 2)
    monkeypatch.setattr(image, 'open_image', meet)
    assert len(verify(root)) == 0

@pytest.mark.parametrize('mode,ext', [('RGB','jpg'),('L','png'),('P','png'),('RGBA','png'),('CMYK','jpg'),('1','png')])
def test_opened_but_not_read(tmp_path, mode, ext):
    "A picture that Pillow has opened and not yet read, as an upload form hands over, is like its file"
    f = tmp_path/f'a.{ext}'
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((12,8), 90).convert(mode).save(f, exif=exif)
    im = Image.open(f)
    res = open_image(im)
    assert res.mode=='RGB' and res.size==(8,12) and (np.array(res)==np.array(open_image(f))).all()
    assert type(im) is not type(res) and im.mode==mode

@pytest.mark.parametrize('turn', range(1, 9))
@pytest.mark.parametrize('ext', ['jpg','png','webp','tif'])
def test_every_orientation(tmp_path, turn, ext):
    "Written turned away and with the note that undoes it, the picture is upright again; so is a box in the upright picture."
    undo = {1:None, 2:'FLIP_LEFT_RIGHT', 3:'ROTATE_180', 4:'FLIP_TOP_BOTTOM', 5:'TRANSPOSE', 6:'ROTATE_90', 7:'TRANSVERSE', 8:'ROTATE_270'}[turn]
    im = Image.open(picture(tmp_path/'x.png', size=(80,60)))
    exif = Image.Exif()
    exif[0x0112] = turn
    turned = im.transpose(getattr(Image.Transpose, undo)) if undo else im
    turned.save(tmp_path/f'y.{ext}', exif=exif, **dict(webp=dict(lossless=True), jpg=dict(quality=95)).get(ext, {}))
    for box in (None, (10,20,40,30)):
        want,got = im if box is None else im.crop((10,20,50,50)),open_image(tmp_path/f'y.{ext}', box=box)
        assert got.size == want.size and np.abs(np.array(got).astype(int)-np.array(want)).mean() < 6
    assert upright_size(tmp_path/f'y.{ext}') == im.size

def late_exif(file, exif):
    "Move the note of a PNG behind its pixels"
    data = file.read_bytes()
    at = data.index(b'eXIf')-4
    end = at+12+int.from_bytes(data[at:at+4], 'big')
    tail = data.index(b'IEND')-4
    file.write_bytes(data[:at]+data[end:tail]+data[at:end]+data[tail:])

@pytest.mark.parametrize('kind', ['exif','late','xmp','broken'])
def test_an_orientation_wherever_it_stands(tmp_path, kind):
    "A file, the same opened by Pillow, its bytes: one picture, turned once, also if it is opened again"
    f,exif = tmp_path/('a.jpg' if kind in ('xmp','broken') else 'a.png'),Image.Exif()
    exif[0x0112] = 6
    im = Image.effect_noise((12,8), 90).convert('RGB')
    if kind in ('exif','late'): im.save(f, exif=exif)
    elif kind=='xmp': im.save(f, xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    else: im.save(f, exif=b'Exif\0\0junk that is no header')
    if kind=='late': late_exif(f, exif)
    size = (12,8) if kind=='broken' else (8,12)
    ways = [open_image(f), open_image(Image.open(f)), open_image(f.read_bytes()), open_image(open_image(f))]
    assert all(o.size==size and (np.array(o)==np.array(ways[0])).all() for o in ways)

def test_arrays_and_tensors(tmp_path):
    "Channels first or last, one or three, of bytes; another shape is named"
    a = np.random.default_rng(0).integers(0, 255, (9,7,3), dtype=np.uint8)
    for o in (a, np.moveaxis(a, -1, 0), torch.tensor(a), torch.tensor(a).permute(2,0,1), TensorImage(torch.tensor(a).permute(2,0,1).float())):
        assert np.array_equal(np.array(open_image(o)), a)
    for o in (a[...,0], a[...,:1], np.moveaxis(a[...,:1], -1, 0)): assert np.array_equal(np.array(open_image(o))[...,2], a[...,0])
    with raises(ValueError, 'an array of float64 of shape (9, 7, 3) is no picture', '(3, H, W)'): open_image(a/255)

def test_real_numbers_keep_their_shades(tmp_path):
    a = np.linspace(0, 1, 256, dtype=np.float32).reshape(16,16)
    for i,b in enumerate((a, 255*a, 65535*a, np.where(a>.99, 1.001, a), np.where(a>.99, 255.5, 255*a), np.where(a>.997, np.inf, 200*a))):
        Image.fromarray(b).save(tmp_path/f'{i}.tif')
        got = np.array(open_image(tmp_path/f'{i}.tif'))[:,:,0].astype(float)
        assert np.abs(got-(200*a if i==5 else 255*a))[a<.99].max()<=1.1

def test_sixteen_bits_and_cmyk_keep_their_colours(tmp_path):
    a = np.array([[[200,30,90]]], np.uint8).repeat(16, 0).repeat(16, 1)
    Image.fromarray(a).convert('CMYK').save(tmp_path/'c.jpg', quality=100)
    Image.fromarray(a).convert('CMYK').save(tmp_path/'c.tif')
    for o in ('c.jpg','c.tif'): assert np.abs(np.array(open_image(tmp_path/o)).astype(int)-a).max() <= 4
    deep = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16,16)
    for o in ('d.png','d.tif'):
        Image.fromarray(deep).save(tmp_path/o)
        assert np.abs(np.array(open_image(tmp_path/o))[:,:,0].astype(int)-deep//256).max() <= 1

def test_unusual_names(tmp_path):
    "Unicode, spaces and the longest name that a file system takes: through table, batch, copy, verify and export."
    names = ['Grünspecht (♂)', 'シジュウカラ', 'ñandú & co']
    long = 'x'*251+'.jpg'
    for i,o in enumerate(names):
        for j,f in enumerate(('é 1.jpg', long, '写真.jpg', "it's.jpg")): picture(tmp_path/'set'/o/f, 4*i+j)
    dls = mini_dls(tmp_path/'set', bs=2)
    assert list(dls.vocab) == sorted(names) and len(list(dls.train)) > 0 and len(verify(tmp_path/'set')) == 0
    assert len(read_table(presize(tmp_path/'set', 20))) == 12 and fine_grained_dls(tmp_path/'set-20', size=16, bs=2, in_memory=True).one_batch()[0].shape[0] == 2
    root = cub_mini(tmp_path/'cub')
    (root/'images'/'003.Mallard'/'pic 0.jpg').rename(root/'images'/'003.Mallard'/long)
    (root/'images.txt').write_text((root/'images.txt').read_text().replace('003.Mallard/pic 0.jpg', f'003.Mallard/{long}'))
    assert long in {o.name for o in read_table(root).files}

# What is doubtful

def photo(path, seed, size=(120,90), **kwargs):
    "A smooth picture with as much detail as a small photo has."
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).integers(0, 256, (9,12,3), dtype=np.uint8)
    Image.fromarray(a).resize(size, Image.BICUBIC).save(path, **kwargs)
    return path

@pytest.fixture
def photos(tmp_path):
    pytest.importorskip('imagehash')
    for i,o in enumerate(('train/a','train/b','valid/a','valid/b')):
        for j in range(10): photo(tmp_path/'set'/o/f'{j}.png', 100*i+j)
    return tmp_path/'set'

def problems(df): return [(o.problem, '/'.join(o.file.parts[-3:])) for o in df.itertuples()]

def test_check_data_of_good_pictures(photos): assert len(check_data(photos)) == 0

@pytest.mark.parametrize('valid_col', [None, 'is_valid'])
def test_loaders_of_fastai(tmp_path, valid_col):
    "`ImageDataLoaders.from_df`, whose items are rows of a table, is looked through like a folder"
    root = folders(tmp_path/'set', a=9, b=9)
    spoil(root/'a'/'1.jpg', 'empty')
    names = sorted(str(o.relative_to(root))[:-4] for o in root.glob('*/*.jpg'))
    df = pd.DataFrame(dict(name=names, label=[o[0] for o in names], is_valid=[o[-1] in '78' for o in names]))
    dls = ImageDataLoaders.from_df(df, root, suff='.jpg', valid_col=valid_col, seed=0, item_tfms=Resize(32), bs=2, num_workers=0) # fastai opens the first picture
    assert verify(dls).file.tolist() == [root/'a'/'1.jpg']
    found = check_data(dls, least=1)
    assert found.problem.tolist()[0]=='unreadable' and found.file.tolist()[0]==root/'a'/'1.jpg' and found.label.tolist()[0]=='a'
    if not valid_col: return
    assert set(found.part)<={'train','valid'} and sum(found.part=='valid')==sum(o.stem in '78' for o in found.file)
    (root/'a'/'1.jpg').write_bytes((root/'a'/'2.jpg').read_bytes())
    learn = Learner(dls, nn.Linear(1, 1), loss_func=CrossEntropyLossFlat())
    def wrong(dl, act):
        y = torch.tensor([int(o) for o in dl.dataset.tls[1]])
        return torch.eye(2)[1-y]*.98+.01,y
    learn.get_preds = wrong
    assert set(suspects(learn).file)<={root/f'{o}.jpg' for o in names} and len(suspects(learn))

def test_loaders_of_other_labels(photos):
    files = get_image_files(photos)
    dls = ImageDataLoaders.from_lists(photos, files, [float(i) for i in range(len(files))], y_block=RegressionBlock, item_tfms=Resize(32), bs=2, num_workers=0)
    with raises(ValueError, 'check_data is for pictures with one class each'): check_data(dls)

@pytest.mark.parametrize('how', ['smaller', 'larger', 'recompressed', 'brighter', 'grey'])
@pytest.mark.parametrize('to,where', [('train/a',''), ('valid/a',' across parts'), ('train/b',' across classes'), ('valid/b',' across classes')])
def test_near_duplicates(photos, how, to, where):
    im = Image.open(photos/'train'/'a'/'3.png')
    ways = dict(smaller=lambda: im.resize((60,45)), larger=lambda: im.resize((300,225)), recompressed=lambda: im,
        brighter=lambda: im.point(lambda v: min(255, v+5)), grey=lambda: im.convert('L'))
    new = ways[how]()
    new.save(photos/to/'z.jpg', quality=40)
    got = [o for o in problems(check_data(photos)) if o[0]!='odd mode']
    if how == 'grey': assert got == [] # Another picture: its colours are gone
    else: assert len(got)==1 and got[0][0]==f'near duplicate{where}'

@pytest.mark.parametrize('to,where', [('train/a',''), ('valid/a',' across parts'), ('valid/b',' across classes')])
def test_exact_duplicates(photos, to, where):
    shutil.copy(photos/'train'/'a'/'3.png', photos/to/'z.png')
    df = check_data(photos)
    assert problems(df) == [(f'exact duplicate{where}', f'{to}/z.png')] and '3.png (train, a)' in df.detail[0] and df.remedy[0]

def test_copies_of_several_kinds_are_each_a_row(photos):
    for i in range(3): shutil.copy(photos/'train'/'a'/'3.png', photos/'valid'/'a'/f'z{i}.png')
    (photos/'test'/'b').mkdir(parents=True)
    Image.open(photos/'train'/'b'/'1.png').save(photos/'test'/'b'/'y.jpg')
    assert Counter(o for o,_ in problems(check_data(photos))) == {'exact duplicate across parts':3, 'near duplicate across parts':1}

def test_check_data_finds_the_rest(photos):
    (photos/'train'/'a'/'0.png').write_bytes(b'')
    photo(photos/'train'/'a'/'small.png', 900, (40,20))
    photo(photos/'train'/'b'/'long.png', 901, (400,50))
    Image.open(photos/'train'/'b'/'2.png').convert('RGBA').rotate(90).save(photos/'train'/'b'/'2.png')
    photo(photos/'train'/'c'/'0.png', 902)
    df = check_data(photos)
    assert problems(df) == [('unreadable','train/a/0.png'), ('tiny class','train/c/0.png'), ('small','train/a/small.png'), ('long','train/b/long.png'), ('odd mode','train/b/2.png')]
    assert df.detail.tolist() == ['empty', '1 training images', '40 x 20', '400 x 50', 'RGBA'] and df.remedy.map(len).min()>10

def test_groups_on_both_sides(photos):
    t = read_table(photos)
    walks = [f'walk {f.stem}' if o=='a' else f'{f.parent.parent.name} {f.stem}' for f,o in zip(t.files, t.labels)]
    df = check_data(t, groups=walks)
    assert set(df.problem)=={'group across parts'} and len(df)==10 and df.detail[0]=="group 'walk 0' has 1 in train and 1 in valid" and set(df.part)=={'valid'}
    assert len(check_data(t, groups=lambda o: o))==0 and len(check_data(mini_dls(t), groups=lambda o: o.parent))==0
    with raises(ValueError, '3 groups and 40 images'): check_data(t, groups='abc')

def test_check_data_without_its_library(photos, monkeypatch):
    monkeypatch.setitem(sys.modules, 'imagehash', None)
    with raises(ImportError, '`check_data` needs imagehash, but `imagehash` is not installed: run `pip install imagehash`'): check_data(photos)

def test_suspects_among_drawn_birds(tmp_path):
    "Finches and thrushes with 8 of 80 held-out labels swapped: most of the first 8 suspects are among them."
    pytest.importorskip('cleanlab')
    t = read_table(make_birds(tmp_path/'birds', n_species=8, n_images=30, n_train=20, size=64, n_workers=0, progress=False))
    labels = [o.split('_')[-1] for o in t.labels]
    wrong = random.Random(0).sample(np.flatnonzero(t.is_valid).tolist(), 8)
    for i in wrong: labels[i] = dict(Finch='Thrush', Thrush='Finch')[labels[i]]
    set_seed(1)
    dls = fine_grained_dls(ImageTable(t.files, labels, t.is_valid, root=t.root), size=56, bs=16, in_memory=True)
    net = nn.Sequential(*[ConvLayer(i, o, stride=2) for i,o in ((3,16),(16,32),(32,64),(64,64))], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(24, 1e-2)
        df = suspects(learn)
    planted = {t.files[i] for i in wrong}
    recall = len(set(df.file[:8]) & planted)/8
    print(f'recall at the planted number: {recall:.2f}')
    assert recall>=.5 and (df.p_belief>=df.p_label).all() and (df.label!=df.belief).any()
    show_suspects(df, 4)
    titles = [o.get_title() for o in plt.gcf().axes if o.get_title()]
    assert len(titles)==4
    for o,(_,row) in zip(titles, df.iterrows()): assert 0<=o.find(row.label)<o.rfind(row.belief) or row.label==row.belief, (o,row)
    plt.close('all')

def test_bad_files_are_looked_up_once(monkeypatch):
    "Twenty thousand files of which a tenth is bad: the list of them is made once, not for each file."
    files = [Path(f'/x/{i%50}/{i}.jpg') for i in range(20_000)]
    t = ImageTable(files, [str(i%50) for i in range(20_000)], [i%100>90 for i in range(20_000)], must_exist=False)
    class Bad(pd.DataFrame):
        asked = 0
        @property
        def file(self):
            Bad.asked += 1
            return self['file']
    monkeypatch.setattr(image, 'unreadable', lambda *args: Bad(dict(file=files[::11], fault='empty')))
    with pytest.warns(UserWarning, match='left out 1,819 of 20,000'): assert len(t.drop_unreadable()) == 18_181
    assert Bad.asked <= 2

# Downloads and archives that go wrong

def serve(tmp_path, name, files):
    "A tar file in the served folder with {name in the archive: bytes or (kind, target) of a link}."
    (tmp_path/'serve').mkdir(exist_ok=True)
    with tarfile.open(tmp_path/'serve'/name, 'w:gz') as f:
        for k,v in files.items():
            o = tarfile.TarInfo(k)
            if isinstance(v, tuple): o.type,o.linkname = v
            else: o.size = len(v)
            f.addfile(o, io.BytesIO(v) if isinstance(v, bytes) else None)
    return tmp_path/'serve'/name

def url_of(srv, name): return f'http://127.0.0.1:{srv.server_port}/{name}'
def md5(path): return hashlib.md5(path.read_bytes()).hexdigest()
def hidden(path): return [o for o in path.rglob('.partial*')]

def test_fetch_files(tmp_path, server, fastai_home):
    a,b = serve(tmp_path, 'images.tar.gz', {'images/1.txt':b'one'}),tmp_path/'serve'/'labels.mat'
    b.write_bytes(b'labels')
    files = [(url_of(server, a.name), md5(a), 'pet'), (url_of(server, b.name), md5(b), 'pet')]
    dest = fetch_files('pets', files)
    assert dest == fastai_home/'data'/'pets' and (dest/'pet'/'images'/'1.txt').read_text() == 'one' and (dest/'pet'/'labels.mat').read_bytes() == b'labels'
    assert fetch_files('pets', files) == dest and len(Quiet.seen) == 2 and not hidden(fastai_home)
    assert sorted(o.name for o in (fastai_home/'archive'/'pets').iterdir()) == ['images.tar.gz','labels.mat']

def test_wrong_hash(tmp_path, server, fastai_home):
    a = serve(tmp_path, 'x.tar.gz', {'1.txt':b'one'})
    with raises(ConnectionError, 'cannot be downloaded', f'its md5 is {md5(a)}, and should be 0123'): fetch_files('x', [(url_of(server, a.name), '0123', '')])
    assert not (fastai_home/'archive'/'x.tar.gz').exists() and not (fastai_home/'data'/'x').exists() and not hidden(fastai_home)
    assert fetch_files('x', [(url_of(server, a.name), md5(a), '')]).exists()

def test_hash_that_fastai_publishes(tmp_path, server, fastai_home, monkeypatch):
    a = serve(tmp_path, 'x.tar.gz', {'1.txt':b'one'})
    url = url_of(server, a.name)
    monkeypatch.setattr('fastdownload.core.read_checks', lambda mod: {url:(a.stat().st_size+1, 'abc')})
    with raises(ConnectionError, 'not those that fastai publishes'): fetch_files('x', [(url, None, '')])
    assert not (fastai_home/'archive'/'x.tar.gz').exists()

def test_interrupted_download_starts_again(tmp_path, server, fastai_home, monkeypatch):
    a = serve(tmp_path, 'x.tar.gz', {'1.txt':random.Random(0).randbytes(50_000)})
    def half(self):
        b = a.read_bytes()
        self.send_response(200)
        self.send_header('Content-Length', str(len(b)))
        self.end_headers()
        self.wfile.write(b[:len(b)//2])
    with monkeypatch.context() as m:
        m.setattr(Quiet, 'do_GET', half)
        with raises(ConnectionError, 'cannot be downloaded'): fetch_files('x', [(url_of(server, a.name), None, '')])
    assert not hidden(fastai_home) and not (fastai_home/'archive'/'x.tar.gz').exists()
    assert (fetch_files('x', [(url_of(server, a.name), None, '')])/'1.txt').stat().st_size == 50_000

EVIL = [({'../../evil.txt':b'x'}, "'../../evil.txt' reaches outside"), ({'/tmp/evil.txt':b'x'}, "'/tmp/evil.txt' reaches outside"), ({'a/../../evil.txt':b'x'}, 'reaches outside'),
    ({'C:\\evil.txt':b'x'}, 'reaches outside'), ({'a':(tarfile.SYMTYPE, '/etc')}, "'a' is a link to '/etc'"), ({'d/a':(tarfile.SYMTYPE, '../..'), 'd/a/evil.txt':b'x'}, "is a link to '../..'"),
    ({'a':(tarfile.LNKTYPE, '../evil.txt')}, "is a link to '../evil.txt'"), ({'a':(tarfile.FIFOTYPE, '')}, 'is a device')]

@pytest.mark.parametrize('files,says', EVIL)
def test_archive_that_reaches_outside(tmp_path, server, fastai_home, files, says):
    a = serve(tmp_path, 'x.tar.gz', {'ok.txt':b'fine'} | files)
    with raises(OSError, 'x.tar.gz cannot be extracted', says): fetch_files('x', [(url_of(server, a.name), None, '')])
    assert not (fastai_home/'data'/'x').exists() and not hidden(fastai_home) and not list(tmp_path.rglob('evil.txt')) and not Path('/tmp/evil.txt').exists()

def test_links_inside_are_kept(tmp_path):
    a = serve(tmp_path, 'x.tar.gz', {'d/1.txt':b'one', 'd/2.txt':(tarfile.SYMTYPE, '1.txt'), 'd/3.txt':(tarfile.LNKTYPE, 'd/1.txt')})
    assert [o.read_text() for o in sorted((unpack(a, tmp_path/'out')/'d').iterdir())] == ['one']*3

@pytest.mark.parametrize('name', ['../evil.txt', '/evil.txt', 'a/../../evil.txt', 'link'])
def test_zip_that_reaches_outside(tmp_path, name):
    with zipfile.ZipFile(tmp_path/'x.zip', 'w') as f:
        info = zipfile.ZipInfo(name)
        if name == 'link': info.external_attr = (0o120777) << 16
        f.writestr(info, '../evil.txt')
    with raises(OSError, 'x.zip cannot be extracted', 'outside the folder'): unpack(tmp_path/'x.zip', tmp_path/'out')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['x.zip']

def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path/'x.zip', 'w') as f: f.writestr('top/ü.txt', 'one')
    assert (unpack(tmp_path/'x.zip', tmp_path/'out', flat=True)/'ü.txt').read_text() == 'one'
    with raises(FileExistsError, 'out exists'): unpack(tmp_path/'x.zip', tmp_path/'out')
    (tmp_path/'y.zip').write_bytes((tmp_path/'x.zip').read_bytes()[:-30])
    with raises(OSError, 'y.zip cannot be extracted'): unpack(tmp_path/'y.zip', tmp_path/'out2')

def test_partial_extraction_is_no_data_set(tmp_path, server, fastai_home, monkeypatch):
    archive(tmp_path, False)
    extract,n = tarfile.TarFile.extract,[]
    def broken(self, *args, **kwargs):
        n.append(1)
        if len(n) > 9: raise KeyboardInterrupt
        return extract(self, *args, **kwargs)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(tarfile.TarFile, 'extract', broken)
        mini_dls('cub')
    assert len(n) == 10 and not list((fastai_home/'data').iterdir())
    assert len(mini_dls('cub').table) == 18 and Quiet.seen == ['/CUB_200_2011.tgz']

def test_two_processes_at_once(tmp_path):
    "The one that is later keeps the folder of the one that was faster."
    a = serve(tmp_path, 'x.tar.gz', {'1.txt':b'one'})
    with whole_folder(tmp_path/'out') as tmp:
        (tmp/'1.txt').write_text('late')
        unpack(a, tmp_path/'out')
    assert (tmp_path/'out'/'1.txt').read_text() == 'one' and not hidden(tmp_path)

# The other real packs

def test_real_cub_boxes(real_data):
    t = read_table(real_data('CUB_200_2011'), classes=3)
    assert len(t.boxes) == len(t) and (t.boxes[:,2:] > 10).all()
    for f,(x,y,w,h) in list(zip(t.files, t.boxes))[::20]:
        im = Image.open(f)
        assert x+w <= im.width+1 and y+h <= im.height+1 and open_image(f, box=(x,y,w,h)).width == pytest.approx(w, abs=2)
    a,b = [fine_grained_dls(t, size=64, bs=8, num_workers=0, crop_to_box=o).valid.one_batch()[0] for o in (False,True)]
    assert a.shape == b.shape and (a-b).abs().mean() > .1

def test_real_cub_is_sound(real_data): assert len(verify(read_table(real_data('CUB_200_2011'), classes=20))) == 0

def test_real_cifar100(real_data, monkeypatch):
    expect(monkeypatch, 'cifar100', 100, 4000, 1000)
    root = real_data('cifar100-mini')
    dls = fine_grained_dls('cifar100', root=root, bs=64, in_memory=True)
    assert dls.one_batch()[0].shape == (64,3,32,32) and dls.table.classes[:2] == ['apple','aquarium_fish']
    a = np.stack([np.array(open_image(o)) for o in dls.train.items])/255
    assert np.abs(a.mean((0,1,2))-STATS['cifar100'][0]).max() < .01 and np.abs(a.std((0,1,2))-STATS['cifar100'][1]).max() < .01
    x = torch.cat([x for x,_ in dls.valid])
    assert x.mean((0,2,3)).abs().max() < .1 and (x.std((0,2,3))-1).abs().max() < .1
    monkeypatch.undo()
    with raises(ValueError, "not the whole of 'cifar100': 46,000 training images missing, 9,000 test images missing"): read_table('cifar100', root=root)

def test_real_flowers_presized(real_data, tmp_path):
    root = real_data('oxford-flowers17-12classes')
    t = read_table(presize(root, 64, dest=tmp_path/'small'))
    assert (len(t.classes), t.n_train, t.n_valid) == (12, 720, 240) and {min(Image.open(o).size) for o in t.files[::50]} == {64}
    assert read_table(root, valid_pct=.1, per_class=5).counts().values.tolist() == [[5,6,20]]*12

# Other statistics, and all else as it is

@pytest.mark.parametrize('how', ['weights','share','number','balanced'])
def test_other_statistics_keep_the_loader(tmp_path, how):
    "A learner's own statistics leave weights, shares and numbers of a loader where they are"
    root = folders(tmp_path/'set', train__a=6, train__b=6, valid__a=2, valid__b=2)
    kw = dict(weights=dict(dl_type=WeightedDL, dl_kwargs=[dict(wgts=[1.]*6+[0.]*6),{}]), share=dict(dl_type=PartialDL, dl_kwargs=[dict(partial_n=4),{}]),
        number=dict(dl_kwargs=[dict(n=5),{}]), balanced=dict(balanced=True))[how]
    dls = fine_grained_dls(root, size=32, bs=2, num_workers=0, drop_last=False, **kw)
    new = with_stats(dls, ([.5]*3,[.5]*3))
    a,b = dls.train,new.train
    assert type(a) is type(b) and len(a)==len(b) and a.n==b.n and data_stats(new)==[[.5]*3]*2 and data_stats(dls)!=data_stats(new)
    if how=='weights': assert set(b.get_idxs())<=set(range(6))
    for dl in (a, b): assert sum(len(y) for x,y in dl)==(4 if how=='share' else dl.n)
    x,y = (o.valid.one_batch()[0] for o in (dls,new))
    m,s = (torch.tensor(o)[:,None,None] for o in data_stats(dls))
    assert torch.allclose((x*s+m-.5)/.5, y, atol=1e-5)
