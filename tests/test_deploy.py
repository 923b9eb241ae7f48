"The deployed file answers as the learner does or `deploy` refuses; ONNX and the table of a folder answer as the file does."
import io,os,random,sys,tempfile
from pathlib import Path
import numpy as np,pandas as pd,forks,pytest,torch
from PIL import Image
from torch import nn
from fastai.vision.all import (BCEWithLogitsLossFlat,Brightness,CategoryBlock,CropPad,CrossEntropyLossFlat,DataBlock,DihedralItem,FlipItem,
    FocalLossFlat,ImageBlock,ImageDataLoaders,IntToFloatTensor,L,LabelSmoothingCrossEntropyFlat,Normalize,PILImage,PILImageBW,RandomCrop,
    RandomResizedCrop,RandomResizedCropGPU,Resize,TensorImage,Transform,aug_transforms,first,get_image_files,load_learner,parent_label,set_seed)
from cekd_fastai.all import Deployed,branch_learner,css_learner,deploy,fine_grained_dls,make_birds,online_learner
from cekd_fastai.branches import branch_preds,load_net,save_net
from cekd_fastai.onnx_file import OnnxNet,export_onnx
from cekd_fastai.predict import open_net,predict_folder

@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Drawn birds of four species in class folders, half of them wide and half of them high, and larger than what networks here see."
    birds = make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=4, n_images=10, n_train=8, size=96, progress=False)
    dest = tmp_path_factory.mktemp('photos')
    for i,o in enumerate(sorted(get_image_files(birds/'images'))):
        f = (dest/o.parent.name/o.name).with_suffix('.jpg')
        f.parent.mkdir(exist_ok=True)
        Image.open(o).convert('RGB').resize((170,90) if i%2 else (90,150)).save(f, quality=92)
    return dest

def stock(photos, item, batch=None, **kwargs):
    "fastai's own loaders."
    return ImageDataLoaders.from_folder(photos, valid_pct=.4, seed=1, item_tfms=item, batch_tfms=batch, bs=8, num_workers=0, **kwargs)

def learner(dls, **kwargs):
    "A tiny network with strong opinions, so that other pixels give other answers."
    set_seed(3)
    learn = branch_learner(dls, 'test_resnet', pretrained=False, **kwargs)
    z = branch_preds(learn)[0]
    with torch.no_grad():
        for h in learn.model.heads:
            out = [m for m in h.modules() if isinstance(m, nn.Linear)][-1]
            s = 2/z.std(0)
            out.weight.mul_(s[:,None])
            out.bias.sub_(z.mean(0)).mul_(s)
    return learn

def answers(learn):
    with learn.no_bar(): return learn.get_preds()[0]

def gap(learn, file, items=None):
    "Largest difference of a probability between learner and file."
    net = file if isinstance(file, Deployed) else Deployed(file)
    return (net(learn.dls.valid.items if items is None else items)-answers(learn)).abs().max().item()

STOCK = dict(squish=(Resize(48, 'squish'),None), zeros=(Resize(48, 'pad', pad_mode='zeros'),None), border=(Resize(48, 'pad', pad_mode='border'),None),
    reflection=(Resize(48, 'pad'),None), crop=(Resize(48),None), oblong=(Resize((40,64)),None), presizing=(Resize(96),aug_transforms(size=48)),
    presizing_oblong=(Resize(96, 'squish'),aug_transforms(size=(40,64))), random_resized=(RandomResizedCrop(48),None),
    gpu=(Resize(80),[RandomResizedCropGPU(48)]), nearest=(Resize(48, 'squish', resamples=(Image.NEAREST,)*2),None),
    normalised=(Resize(48),[*aug_transforms(),Normalize.from_stats([.1,.2,.3],[.3,.2,.1])]),
    crop_pad=([Resize(64),CropPad((40,70))],None), random_crop=([Resize(64),RandomCrop(48)],None),
    training_only=([Resize(48),FlipItem(1.),DihedralItem(1.)],[Brightness(p=1.)]))

@pytest.mark.parametrize('kind', STOCK)
def test_stock_loaders(photos, tmp_path, kind):
    "What fastai's transforms do in validation goes along."
    learn = learner(stock(photos, *STOCK[kind]))
    spread = answers(learn).max(0)[0]-answers(learn).min(0)[0]
    assert spread.max()>.2 # the network tells these pictures apart
    assert gap(learn, deploy(learn, tmp_path/'x.pt'))<2e-3

@pytest.mark.parametrize('recipe', ['crop','squeeze','pad','digits'])
@pytest.mark.parametrize('memory', [False,True])
def test_own_recipes(photos, tmp_path, recipe, memory):
    learn = learner(fine_grained_dls(photos, size=48, bs=8, recipe=recipe, num_workers=0, in_memory=memory))
    assert gap(learn, deploy(learn, tmp_path/'x.pt'))<2e-3

def test_presized_recipe(photos, tmp_path):
    "Transforms beside those of a recipe."
    dls = fine_grained_dls(photos, size=64, bs=8, num_workers=0, batch_tfms=aug_transforms(size=48))
    learn = learner(dls)
    file = deploy(learn, tmp_path/'x.pt')
    assert Deployed(file).size==[48,48]
    assert gap(learn, file)<2e-3

class Negative(Transform):
    "Turns light into dark."
    order = 2
    def encodes(self, o:PILImage): return PILImage(Image.fromarray(255-np.asarray(o)))

class Nothing(Transform):
    order = 2
    def encodes(self, o:PILImage): return o

class Darker(Transform):
    order = 40
    def encodes(self, o:TensorImage): return o*.5

def swap(o:PILImage): return PILImage.create(np.asarray(o)[...,::-1].copy())

@pytest.mark.parametrize('item,batch,name', [([Resize(48),Negative()],None,'Negative'), ([Resize(48)],[Darker()],'Darker'), ([Resize(48),Transform(swap, order=3)],None,'swap')])
def test_own_transform_refused(photos, tmp_path, item, batch, name):
    "A transform that the file cannot carry is named, and the old file stays."
    learn = learner(stock(photos, item, batch))
    (tmp_path/'x.pt').write_text('before')
    with pytest.raises(ValueError, match=f'cannot describe {name}'): deploy(learn, tmp_path/'x.pt')
    assert [o.name for o in tmp_path.iterdir()]==['x.pt'] and (tmp_path/'x.pt').read_text()=='before'

def test_harmless_transform(photos, tmp_path):
    "One that did nothing is left out, and named in a warning."
    learn = learner(stock(photos, [Resize(48),Nothing()]))
    with pytest.warns(UserWarning, match='leaves out Nothing'): file = deploy(learn, tmp_path/'x.pt')
    assert gap(learn, file)<2e-3

def test_own_scale_of_pixels(photos, tmp_path):
    "A known transform with an argument that the file does not carry."
    dls = stock(photos, Resize(48))
    dls.valid.after_batch.fs = L(IntToFloatTensor(div=100.))
    with pytest.raises(ValueError, match='IntToFloatTensor'): deploy(learner(dls), tmp_path/'x.pt')

def test_changed_network_refused(photos, tmp_path):
    "A file builds the network from its recipe; one whose modules were changed is not that network."
    learn = learner(stock(photos, Resize(48)))
    first(m for m in learn.model.modules() if isinstance(m, nn.ReLU)).forward = torch.tanh
    with pytest.raises(ValueError, match='its modules were changed'): deploy(learn, tmp_path/'x.pt')

def test_loaders_of_another_kind(photos, tmp_path):
    learn = learner(stock(photos, Resize(48)))
    learn.dls.valid.dataset = [1,2]
    with pytest.raises(ValueError, match='reads loaders of a `DataBlock`'): deploy(learn, tmp_path/'x.pt')

def test_grey_pictures_refused(photos, tmp_path):
    "A file shows its network three colours."
    block = DataBlock((ImageBlock(cls=PILImageBW),CategoryBlock), get_items=get_image_files, get_y=parent_label, item_tfms=Resize(48))
    learn = branch_learner(block.dataloaders(photos, bs=8, num_workers=0), 'test_resnet', pretrained=False)
    with pytest.raises(ValueError, match='differ in shape'): deploy(learn, tmp_path/'x.pt')

# Losses

def several(photos, **kwargs):
    "Loaders of pictures with several classes, from a table."
    files = sorted(get_image_files(photos))
    names = [f"{o.parent.name} {'odd' if i%2 else 'even'}" for i,o in enumerate(files)]
    df = pd.DataFrame(dict(name=[o.relative_to(photos).as_posix() for o in files], labels=[o.replace(' ', ';') for o in names]))
    return ImageDataLoaders.from_df(df, photos, label_delim=';', valid_pct=.4, seed=1, item_tfms=Resize(48, 'squish'), bs=8, num_workers=0, **kwargs)

def rows(learn):
    "Paths of the validation pictures of `several`."
    tl = learn.dls.valid.dataset.tls[0]
    return [tl.tfms.fs[0](o) for _,o in tl.items.iterrows()]

@pytest.mark.parametrize('thresh', [.5,.8])
def test_several_classes(photos, tmp_path, thresh):
    "The sigmoid and the threshold go along."
    learn = learner(several(photos), loss_func=BCEWithLogitsLossFlat(thresh=thresh))
    file = deploy(learn, tmp_path/'x.pt')
    d = Deployed(file)
    items = rows(learn)
    assert gap(learn, file, items)<2e-3
    with learn.no_bar(): names,*_ = learn.predict(items[0])
    assert d.several and d.thresh==thresh and d.classes(d(items[0])[0])==list(names)

@pytest.mark.parametrize('loss,act', [(nn.CrossEntropyLoss(),'softmax'), (LabelSmoothingCrossEntropyFlat(),'softmax'), (FocalLossFlat(),'softmax'),
    (nn.BCEWithLogitsLoss(),'sigmoid'), (BCEWithLogitsLossFlat(),'sigmoid')])
def test_activation_of_the_loss(photos, tmp_path, loss, act):
    "A loss of torch has no activation: it is a sigmoid for the one that is for several labels, else a softmax."
    assert Deployed(deploy(learner(stock(photos, Resize(48)), loss_func=loss), tmp_path/'x.pt')).info['activation']==act

def test_plain_loss_of_several(photos, tmp_path):
    assert Deployed(deploy(learner(several(photos), loss_func=nn.BCEWithLogitsLoss()), tmp_path/'x.pt')).several

def test_other_activation_refused(photos, tmp_path):
    class Odd(CrossEntropyLossFlat):
        def activation(self, x): return x.softmax(-1)**2
    with pytest.raises(ValueError, match='`Odd` has an activation'): deploy(learner(stock(photos, Resize(48)), loss_func=Odd()), tmp_path/'x.pt')

# Exported learners and older files

@pytest.mark.parametrize('kind', ['squish','presizing','own','rows'])
def test_exported_learner(photos, tmp_path, kind):
    "A learner that comes without its data."
    own = dict(own=lambda: fine_grained_dls(photos, size=48, bs=8, num_workers=0), rows=lambda: several(photos))
    learn = learner(own[kind]() if kind in own else stock(photos, *STOCK[kind]))
    file = deploy(learn, tmp_path/'here.pt')
    learn.export(tmp_path/'learn.pkl')
    there = deploy(load_learner(tmp_path/'learn.pkl'), tmp_path/'there.pt')
    files = get_image_files(photos)[:6]
    assert torch.equal(Deployed(file)(files), Deployed(there)(files))

def test_exported_learner_refused(photos, tmp_path):
    learn = learner(stock(photos, [Resize(48),Negative()]))
    learn.export(tmp_path/'learn.pkl')
    with pytest.raises(ValueError, match='cannot describe Negative'): deploy(load_learner(tmp_path/'learn.pkl'), tmp_path/'x.pt')

@pytest.mark.parametrize('recipe', ['crop','squeeze','pad'])
def test_older_file(photos, tmp_path, recipe):
    "A file that names its recipe, as files were before."
    learn = learner(fine_grained_dls(photos, size=48, bs=8, recipe=recipe, num_workers=0))
    info = load_net(deploy(learn, tmp_path/'new.pt'))[1]
    save_net(learn.model, tmp_path/'old.pt', recipe=recipe, **{k:info[k] for k in ('vocab','mean','std','size')})
    assert gap(learn, tmp_path/'old.pt')<2e-3

# Ways in

def turned(photos, to):
    "A photo that lies on its side, with the note of the camera that says so."
    im = Image.open(get_image_files(photos)[0])
    exif = im.getexif()
    exif[0x0112] = 6
    im.save(to, exif=exif, quality=95)
    return to

def ways(f):
    "One picture by every way in."
    spooled = tempfile.SpooledTemporaryFile()
    spooled.write(f.read_bytes())
    return dict(path=f, string=str(f), bytes=f.read_bytes(), memory=io.BytesIO(f.read_bytes()), spooled=spooled, opened=open(f, 'rb'), pillow=Image.open(f))

@pytest.mark.parametrize('own', [True,False])
def test_same_pixels_by_every_way(photos, tmp_path, own):
    "A turned photo is what the learner sees, upright in our loaders and as stored in fastai's."
    learn = learner(fine_grained_dls(photos, size=48, bs=8, num_workers=0) if own else stock(photos, Resize(48)))
    d = Deployed(deploy(learn, tmp_path/'x.pt'))
    f = turned(photos, tmp_path/'turned.jpg')
    with learn.no_bar(): right = learn.predict(f)[2]
    for way,o in ways(f).items():
        for _ in range(2): assert (d([o])[0]-right).abs().max()<2e-3, way # an open file is read from its start each time
        assert torch.equal(d(o), d([o])), way

def test_large_photo_is_decoded_small(photos, tmp_path):
    "As the learner does, a large JPEG is decoded at a part of its size."
    learn = learner(fine_grained_dls(photos, size=48, bs=8, num_workers=0))
    big = tmp_path/'big.jpg'
    Image.open(get_image_files(photos)[0]).resize((1600,1200)).save(big)
    d = Deployed(deploy(learn, tmp_path/'x.pt'))
    assert min(d.input.open(big, draft=d.input.draft).size)<300
    with learn.no_bar(): assert (d(big)[0]-learn.predict(big)[2]).abs().max()<2e-3

def test_boxes(photos, tmp_path):
    "Loaders that cut pictures to their boxes: the file takes pictures that are cut."
    dls = fine_grained_dls(make_birds(tmp_path/'birds', n_species=3, n_images=8, n_train=6, size=64, progress=False), size=48, bs=8, num_workers=0, crop_to_box=True)
    learn = learner(dls)
    d = Deployed(deploy(learn, tmp_path/'x.pt'))
    cut = [dls.valid.dataset[i][0] for i in range(len(dls.valid.items))]
    assert (d(cut)-answers(learn)).abs().max()<2e-3

# The file itself

def test_deploying_draws_nothing(photos, tmp_path):
    "Checking a file leaves the random numbers of the next training as `save_net` leaves them."
    learn = learner(stock(photos, Resize(48)))
    res = []
    for write in (lambda: deploy(learn, tmp_path/'a.pt'), lambda: save_net(learn.model, tmp_path/'b.pt')):
        set_seed(7)
        write()
        res.append((torch.rand(1).item(),random.random(),np.random.rand()))
    assert res[0]==res[1]

def test_file_explains_itself(photos, tmp_path):
    (tmp_path/'x.onnx').write_bytes(b'x')
    with pytest.raises(ValueError, match='is an ONNX file'): Deployed(tmp_path/'x.onnx')
    learn = learner(stock(photos, Resize(48)))
    file = deploy(learn, tmp_path/'x.pt')
    net,info = load_net(file)
    save_net(net, tmp_path/'y.pt', **info | dict(steps=[['Swirl',{}]]))
    with pytest.raises(ValueError, match='`Swirl`, which this version does not know'): Deployed(tmp_path/'y.pt')
    (tmp_path/'broken.jpg').write_bytes(b'no picture')
    for d in (Deployed(file),):
        with pytest.raises(OSError, match='broken.jpg cannot be read'): d(tmp_path/'broken.jpg')
        with pytest.raises(FileNotFoundError): d(tmp_path/'none.jpg')

# ONNX

def small(photos): return fine_grained_dls(photos, size=64, bs=8, num_workers=0)

NETS = dict(resnet=lambda d: branch_learner(d, 'test_resnet', pretrained=False), single=lambda d: branch_learner(d, 'resnet10t', 1, pretrained=False),
    mobilenet=lambda d: branch_learner(d, 'mobilenetv3_small_050', split='head', pretrained=False),
    efficientnet=lambda d: branch_learner(d, 'test_efficientnet', pretrained=False),
    convnext=lambda d: branch_learner(d, 'test_convnext', pretrained=False),
    peers=lambda d: branch_learner(d, ('test_resnet','resnet10t'), pretrained=False), css=lambda d: css_learner(d, ('test_resnet','resnet10t'), pretrained=False),
    **{k: lambda d, k=k: online_learner(d, 'test_resnet', k, pretrained=False) for k in ('ffl','okddip','one','diversity')})

@pytest.mark.parametrize('kind', NETS)
def test_onnx_of_many_networks(photos, tmp_path, kind):
    "onnxruntime says what PyTorch says, for any number of pictures."
    pytest.importorskip('onnxruntime')
    dls = fine_grained_dls(photos, size=160, bs=8, num_workers=0) if kind=='convnext' else small(photos)
    learn = NETS[kind](dls)
    net = OnnxNet(export_onnx(learn, tmp_path/'x.onnx'))
    want = answers(learn)
    for n in (1,3,len(want)): assert (net(dls.valid.items[:n])-want[:n]).abs().max()<2e-4

def test_onnx_of_stock_loaders(photos, tmp_path):
    "Steps for pictures and for batches, and the sigmoid, go along."
    pytest.importorskip('onnxruntime')
    learn = learner(several(photos, batch_tfms=aug_transforms(size=(40,64))), loss_func=BCEWithLogitsLossFlat(thresh=.7))
    net = OnnxNet(export_onnx(learn, tmp_path/'x.onnx'))
    assert net.several and net.thresh==.7 and net.size==[40,64]
    assert gap(learn, net, rows(learn))<2e-3

def test_onnx_that_differs_is_refused(photos, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    learn = learner(small(photos))
    monkeypatch.setattr(nn.ReLU, 'forward', lambda self, x: x.tanh() if torch.onnx.is_in_onnx_export() else x.relu())
    with pytest.raises(ValueError, match='answers otherwise than in PyTorch'): export_onnx(learn, tmp_path/'x.onnx')
    assert list(tmp_path.iterdir())==[]

def test_onnx_without_packages(photos, tmp_path, monkeypatch):
    "One sentence names what to install."
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    monkeypatch.setitem(sys.modules, 'onnx', None)
    (tmp_path/'x.onnx').write_bytes(b'x')
    with pytest.raises(ImportError, match='run `pip install onnx onnxruntime`'): export_onnx(learner(small(photos)), tmp_path/'y.onnx')
    with pytest.raises(ImportError, match='run `pip install onnxruntime`'): OnnxNet(tmp_path/'x.onnx')

def test_foreign_onnx(photos, tmp_path):
    onnx = pytest.importorskip('onnx')
    file = export_onnx(learner(small(photos)), tmp_path/'x.onnx')
    graph = onnx.load(file)
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path/'y.onnx')
    with pytest.raises(ValueError, match='does not say how it sees a picture'): OnnxNet(tmp_path/'y.onnx')
    (tmp_path/'z.onnx').write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='damaged'): OnnxNet(tmp_path/'z.onnx')

def test_an_array_is_a_picture(deployed, mixed):
    d = Deployed(deployed)
    im = Image.open(mixed/'10.jpg')
    a,t = np.array(im),torch.from_numpy(np.array(im)).permute(2,0,1)
    want = d(im)
    assert len(want)==1 and torch.allclose(d(a), want) and torch.allclose(d(t), want)
    for o in ([a,a],np.stack([a,a])): assert torch.allclose(d(o), want.expand(2, -1))
    for o in (pd.Series([mixed/'10.jpg']),np.array([str(mixed/'10.jpg')])): assert torch.allclose(d(o), want)
    with pytest.raises(ValueError, match='no pictures to predict'): d([])

@pytest.mark.parametrize('device', ['gpu','cuda'])
def test_a_device_that_is_not_there(deployed, device):
    "The device is named, and not the file."
    if device=='cuda' and torch.cuda.is_available(): pytest.skip('there is one')
    with pytest.raises(ValueError, match=f"Nothing can run on the device '{device}' here .*pass 'cpu'"): open_net(deployed, device)

# The table of a folder

@pytest.fixture(scope='module')
def deployed(photos, tmp_path_factory): return deploy(learner(fine_grained_dls(photos, size=48, bs=8, num_workers=0)), tmp_path_factory.mktemp('net')/'birds.pt')

@pytest.fixture
def mixed(photos, tmp_path):
    "A folder with good and broken files."
    dest = tmp_path/'mixed'
    dest.mkdir()
    for i,o in enumerate(sorted(get_image_files(photos))): (dest/f'{i:02}.jpg').write_bytes(o.read_bytes())
    (dest/'05a.jpg').write_bytes(b'')
    (dest/'11a.jpg').write_bytes((dest/'11.jpg').read_bytes()[:700])
    (dest/'notes.txt').write_text('no picture')
    return dest

@pytest.mark.parametrize('workers', [0,2])
def test_folder(deployed, mixed, workers):
    "Rows in the order of the files, with what the network says to each alone; broken files are listed."
    d = Deployed(deployed)
    with pytest.warns(UserWarning, match='2 of 42 files cannot be read') as said: df = d.predict_folder(mixed, bs=7, num_workers=workers)
    assert [Path(o).name for o in df.file]==[f'{i:02}.jpg' for i in range(40)]
    assert sorted(Path(o).name for o in df.attrs['broken'])==['05a.jpg','11a.jpg'] and any('05a.jpg cannot be read' in str(o.message) for o in said)
    for f,c,p in zip(df.file[:5], df.class_1, df.prob_1):
        best = d.predict(f, 1)
        assert list(best)==[c] and abs(best[c]-p)<1e-3

def test_folder_with_mirror_images(deployed, mixed):
    d = Deployed(deployed)
    files = sorted(mixed.glob('0?.jpg'))
    df = d.predict_folder(files, tta=True, top=99)
    assert df.shape==(len(files),2+2*4) and df.model[0].endswith(' tta')
    flipped = [Image.open(o).transpose(Image.FLIP_LEFT_RIGHT) for o in files]
    both = (d([Image.open(o) for o in files])+d(flipped))/2
    assert abs(both.max(1)[0].numpy()-df.prob_1.values).max()<.02 # scaling is not quite symmetric
    assert abs(d(files).max(1)[0].numpy()-df.prob_1.values).max()>.02

def test_files_keep_their_order(deployed, mixed):
    files = sorted(mixed.glob('1?.jpg'), reverse=True)
    assert Deployed(deployed).predict_folder(files).file.tolist()==[str(o) for o in files]

def test_new_files_take_their_place(deployed, mixed, tmp_path):
    "A table that goes on with more files is as one that was made at once."
    files,d = sorted(mixed.glob('1?.jpg')),Deployed(deployed)
    d.predict_folder(files[::2], csv=tmp_path/'a.csv')
    d.predict_folder(files, csv=tmp_path/'a.csv')
    d.predict_folder(files, csv=tmp_path/'b.csv')
    assert (tmp_path/'a.csv').read_text()==(tmp_path/'b.csv').read_text()

def test_no_picture_is_read_twice(deployed, mixed, tmp_path, monkeypatch):
    d = Deployed(deployed)
    files = sorted(mixed.glob('1?.jpg'))
    first_run = d.predict_folder(files, csv=tmp_path/'a.csv')
    monkeypatch.setattr(type(d.input), 'item', lambda *args: 1/0)
    assert d.predict_folder(files, csv=tmp_path/'a.csv').equals(first_run)

@pytest.mark.parametrize('data', [b'my only line, without an end', b'picture,label\na.jpg,cat\nb.jpg,dog', b'\0\xff\n\x01', b'file\tmodel\n', b'\n\nx', b'a\rb\rc', b'"'+b'x'*200_000])
def test_a_file_that_is_no_table_stays(deployed, mixed, tmp_path, data):
    "Whatever lies under the name that was given: not a byte of it is lost."
    file = tmp_path/'notes.csv'
    file.write_bytes(data)
    with pytest.raises(ValueError, match='notes.csv` has the columns'): Deployed(deployed).predict_folder(sorted(mixed.glob('1?.jpg')), csv=file)
    assert file.read_bytes()==data

@pytest.mark.parametrize('change', [lambda b: b+b'\r\n', lambda b: b'\xef\xbb\xbf'+b, lambda b: b[:11], lambda b: b[:-20], lambda b: b''])
def test_a_table_goes_on_after_other_programs(deployed, mixed, tmp_path, change):
    "A blank line at the end, the mark of a spreadsheet program at the start, half a head, half a row, nothing."
    d,files,file = Deployed(deployed),sorted(mixed.glob('1[0-4].jpg')),tmp_path/'a.csv'
    want = d.predict_folder(files, csv=file)
    file.write_bytes(change(file.read_bytes()))
    assert d.predict_folder(files, csv=file).file.tolist()==want.file.tolist()
    again = d.predict_folder(files, csv=file)
    assert again.class_1.equals(want.class_1) and np.allclose(again.prob_1, want.prob_1, atol=1e-5)

def test_rows_of_others_keep_their_order(deployed, mixed, tmp_path):
    d,files,file = Deployed(deployed),sorted(mixed.glob('1?.jpg')),tmp_path/'a.csv'
    d.predict_folder(files, csv=file)
    d.predict_folder(files[-1:], csv=file)
    assert [o.split(',')[0] for o in file.read_text().splitlines()[1:]]==[str(o) for o in files[-1:]+files[:-1]]

@pytest.mark.skipif(sys.platform!='linux', reason='names are text elsewhere')
def test_names_of_another_encoding(deployed, mixed, tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path)+b'/caf\xe9.jpg'))
    file.write_bytes((mixed/'10.jpg').read_bytes())
    df = Deployed(deployed).predict_folder([file], csv=tmp_path/'a.csv')
    assert df.file.tolist()==Deployed(deployed).predict_folder([file], csv=tmp_path/'a.csv').file.tolist()==[str(file)]
    assert b'caf\xe9.jpg' in (tmp_path/'a.csv').read_bytes()

def test_several_labels_in_a_table(photos, tmp_path):
    d = Deployed(deploy(learner(several(photos), loss_func=BCEWithLogitsLossFlat(thresh=.6)), tmp_path/'x.pt'))
    files = sorted(get_image_files(photos))[:6]
    df = predict_folder(d, files, csv=tmp_path/'a.csv')
    assert df.labels.tolist()==[';'.join(d.classes(d(o)[0])) for o in files]
    assert any(';' in o for o in df.labels)

SCRIPT = "from cekd_fastai.commands import cekd_predict\nif __name__=='__main__': cekd_predict()\n"

def command(*args): return forks.start(SCRIPT, *args)

def run_command(*args):
    p = command(*args)
    p.wait()
    return p.stdout,p.stderr,p.returncode

def test_command(deployed, mixed, tmp_path):
    out,err,code = run_command(deployed, mixed, '--csv', tmp_path/'out.csv', '--top', 2, '--batch', 8, '--workers', 0, '--tta')
    assert code==0 and f'40 pictures in {tmp_path/"out.csv"}' in out
    assert err.count('cekd-predict: skipped')==2
    df = pd.read_csv(tmp_path/'out.csv')
    assert df.columns.tolist()==['file','model','class_1','prob_1','class_2','prob_2'] and len(df)==40

def test_command_faults(deployed, tmp_path):
    "One sentence, and an exit status."
    (tmp_path/'empty').mkdir()
    out,err,code = run_command(deployed, tmp_path/'empty')
    assert code==1 and err.strip().splitlines()[-1]==f'cekd-predict: There are no pictures in `{tmp_path/"empty"}`.'

def test_killed_command_goes_on(deployed, photos, tmp_path):
    "A run that is killed leaves whole batches, and the next one makes the rest."
    files = [tmp_path/f'{i:03}.jpg' for i in range(300)]
    data = [o.read_bytes() for o in get_image_files(photos)]
    for i,o in enumerate(files): o.write_bytes(data[i%len(data)])
    csv,args = tmp_path/'out.csv',(deployed,tmp_path,'--csv',tmp_path/'out.csv','--batch',2,'--workers',0)
    p = command(*args)
    p.until(lambda: csv.exists() and csv.read_bytes().count(b'\n')>=20)
    p.kill()
    p.wait()
    n = csv.read_bytes().count(b'\n')
    assert 20<=n<300
    assert run_command(*args)[2]==0
    df = pd.read_csv(csv)
    assert df.file.tolist()==[str(o) for o in files]
    assert (df.prob_1-Deployed(deployed)(files).max(1)[0].numpy()).abs().max()<1e-3

def test_command_runs_onnx(deployed, photos, tmp_path):
    "The same rows, by onnxruntime."
    pytest.importorskip('onnxruntime')
    file = export_onnx(deployed, tmp_path/'birds.onnx')
    files = sorted(get_image_files(photos))[:6]
    out,err,code = run_command(file, *files)
    got = pd.read_csv(io.StringIO(out))
    want = open_net(deployed).predict_folder(files)
    assert code==0 and got.class_1.tolist()==want.class_1.tolist() and (got.prob_1-want.prob_1).abs().max()<2e-4
