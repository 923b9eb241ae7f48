"The deployed file answers as the learner does, whatever its loaders do to a picture, or `deploy` refuses."
import io,random,tempfile
import numpy as np,pandas as pd,pytest,torch
from PIL import Image
from torch import nn
from fastai.vision.all import (BCEWithLogitsLossFlat,Brightness,CategoryBlock,CropPad,CrossEntropyLossFlat,DataBlock,DihedralItem,
    FlipItem,FocalLossFlat,ImageBlock,ImageDataLoaders,IntToFloatTensor,L,
    LabelSmoothingCrossEntropyFlat,Normalize,PILImage,PILImageBW,RandomCrop,RandomResizedCrop,
    RandomResizedCropGPU,Resize,TensorImage,Transform,aug_transforms,first,get_image_files,
    load_learner,parent_label,set_seed)
from cekd_fastai.all import Deployed,branch_learner,deploy,fine_grained_dls,make_birds
from cekd_fastai.branches import branch_preds,load_net,save_net

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
    return (Deployed(file)(learn.dls.valid.items if items is None else items)-answers(learn)).abs().max().item()

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

@pytest.mark.parametrize('thresh', [.5,.8])
def test_several_classes(photos, tmp_path, thresh):
    "The sigmoid and the threshold go along."
    learn = learner(several(photos), loss_func=BCEWithLogitsLossFlat(thresh=thresh))
    file = deploy(learn, tmp_path/'x.pt')
    d = Deployed(file)
    tl = learn.dls.valid.dataset.tls[0]
    items = [tl.tfms.fs[0](o) for _,o in tl.items.iterrows()]
    assert gap(learn, file, items)<2e-3
    with learn.no_bar(): names,*_ = learn.predict(items[0])
    assert d.several and d.thresh==thresh and d.classes(d(items[0])[0])==list(names)

@pytest.mark.parametrize('loss,act', [(nn.CrossEntropyLoss(),'softmax'), (LabelSmoothingCrossEntropyFlat(),'softmax'), (FocalLossFlat(),'softmax'),
    (nn.BCEWithLogitsLoss(),'softmax'), (BCEWithLogitsLossFlat(),'sigmoid')])
def test_activation_of_the_loss(photos, tmp_path, loss, act):
    "A loss of torch has no activation: one class for each picture is a softmax."
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
