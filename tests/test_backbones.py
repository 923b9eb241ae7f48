"What a backbone brings along (statistics, size, layers), and what fills it: on tiny networks."
import pytest,timm,torch,torchvision,warnings
import numpy as np
from fastai.vision.all import (CategoryBlock,CrossEntropyLossFlat,DataBlock,DataLoaders,Image,ImageBlock,L,Learner,Normalize,Resize,
    imagenet_stats,vision_learner)
from functools import partial
from timm.models.byobnet import ByoBlockCfg
from torch import nn
from cekd_fastai.arch import make_arch
from cekd_fastai.branches import branch_net,branch_splitter,save_net
from cekd_fastai.cli import _defaults
from cekd_fastai.core import data_stats
from cekd_fastai.data.image import norm_stats
from cekd_fastai.data.loaders import fine_grained_dls,official_test_dl
from cekd_fastai.deploy import Deployed,deploy
from cekd_fastai.drawing.dataset import make_birds
from cekd_fastai.ema import ModelEMA
from cekd_fastai.learner import branch_learner,css_learner,online_learner
from cekd_fastai.recommended import recommended
from cekd_fastai.train import advised,build
from cekd_fastai.tuning import backbone_stats,layer_groups,undecayed_params
from cekd_fastai.weights import Saved

HALF = [[.5]*3]*2

def toy(c=3, size=64, names='ab'):
    ds = L(zip(torch.randn(4,c,size,size), torch.arange(4)%len(names)))
    dls = DataLoaders.from_dsets(ds, ds, bs=4, num_workers=0)
    dls.c,dls.vocab = len(names),[*names]
    return dls

def learner(arch='test_resnet', dls=None, n=1, **kw):
    return branch_learner(dls or toy(), arch, n, loss_func=CrossEntropyLossFlat(), **dict(pretrained=False)|kw)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Four grey pictures of each of two classes"
    path = tmp_path_factory.mktemp('grey')
    for part in ('train','valid'):
        for k in 'ab':
            (path/part/k).mkdir(parents=True)
            for i in range(2): Image.fromarray(np.random.default_rng(i).integers(0, 255, (40,48), dtype=np.uint8)).save(path/part/k/f'{i}.png')
    return path

# weights

def branch(net, i=0): return [p for p in net.branches[i].parameters()][0]
def classifier(net, i=0): return [m for m in net.heads[i].modules() if isinstance(m, nn.Linear)][-1].weight

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A network of two branches in every kind of file, its average among them"
    path = tmp_path_factory.mktemp('weights')
    net = branch_net('test_resnet', 3, pretrained=False).eval()
    save_net(net, path/'deploy.pt', vocab=['crow','raven','rook'])
    net.ema = ModelEMA(net)
    learn = Learner(toy(names='abc'), net, CrossEntropyLossFlat(), path=path, model_dir='.', splitter=branch_splitter)
    learn.save('fastai')
    del net.ema
    torch.save(dict(model=branch_net('test_resnet', 3, pretrained=False).state_dict(), model_ema=net.state_dict()), path/'average.pt')
    torch.save({k:v for k,v in net.state_dict().items() if 'num_batches' not in k and not k.startswith('heads')} | {'heads.0.9.weight':torch.ones(9,9)}, path/'headless.pt')
    return net,path

@pytest.mark.parametrize('file,n', [('deploy.pt',2), ('deploy.pt',3), ('fastai.pth',1), ('average.pt',2), ('headless.pt',2)])
def test_branches_from_a_file(saved, file, n):
    "Trunk and branches come back; a branch that the file has not is the first one; heads where they fit"
    old,path = saved
    net = branch_net('test_resnet', 3, n, weights=path/file)
    assert torch.equal(next(net.trunk.parameters()), next(old.trunk.parameters()))
    for i in range(n):
        j = i if i<2 else 0
        assert torch.equal(branch(net, i), branch(old, j))
        assert torch.equal(classifier(net, i), classifier(old, j))==(file!='headless.pt')
    assert net.trunk.facts['new']==([f'heads.{i}.1' for i in range(n)] if file=='headless.pt' else [])

def test_a_class_more(saved, capsys):
    "Rows of common classes stay, by name; the learner names what is new; a second file has no other network"
    old,path = saved
    learn = learner(dls=toy(names=['raven','jay','crow','rook']), n=2, weights=path/'deploy.pt')
    assert torch.equal(classifier(learn.model, 1)[[2,0,3]], classifier(old, 1))
    assert 'New in `test_resnet`, beside the weights of the file: jay' in capsys.readouterr().out
    same = learner(dls=toy(names=['rook','raven','crow']), weights=path/'deploy.pt') # another order
    assert torch.equal(classifier(same.model), classifier(old)[[2,1,0]])
    with pytest.raises(ValueError, match='deploy.pt` does not fit `BranchNet`.*Check the architecture'):
        branch_net('test_efficientnet', 3, weights=path/'deploy.pt')

def test_another_split(saved):
    "Where the network of the file was split makes no difference"
    old,path = saved
    net = branch_net('test_resnet', 3, split='layer2', weights=path/'deploy.pt').eval()
    x = torch.randn(2,3,64,64)
    torch.testing.assert_close(net(x), old(x), atol=1e-5, rtol=1e-4) # both branches of the file began alike

def test_foreign_files(tmp_path):
    "torchvision's names, a fastai learner by position, a transformer of another size"
    tv = torchvision.models.resnet18()
    torch.save(tv.state_dict(), tmp_path/'tv.pth')
    assert torch.equal(make_arch('resnet18', weights=tmp_path/'tv.pth')[0].layer4[1].conv2.weight, tv.layer4[1].conv2.weight)
    learn = vision_learner(toy(), torchvision.models.resnet18, pretrained=False, loss_func=CrossEntropyLossFlat(), path=tmp_path)
    learn.save('own')
    body = Saved(tmp_path/'models'/'own.pth').tensors
    torch.save({k:v for k,v in body.items() if k.startswith('0.')}, tmp_path/'body.pth')
    net = make_arch('resnet18', weights=tmp_path/'body.pth')[0]
    assert torch.equal(net.conv1.weight, learn.model[0][0].weight)
    vit = timm.create_model('test_vit')
    torch.save(vit.state_dict(), tmp_path/'vit.pth')
    small = make_arch('test_vit', weights=tmp_path/'vit.pth', img_size=64)[0]
    assert small.pos_embed.shape[1]==17 and torch.equal(small.blocks[5].mlp.fc1.weight, vit.blocks[5].mlp.fc1.weight)
    with pytest.raises(ValueError, match='does not fit `VisionTransformer`'): make_arch('test_vit', weights=tmp_path/'tv.pth')

# statistics

def test_statistics(folder):
    "The backbone's own, for the learner and in the loaders that you made it with; none from random weights"
    dls = fine_grained_dls(folder, size=32, bs=2, num_workers=0)
    vit = timm.create_model('test_vit', img_size=32)
    learn = branch_learner(dls, vit, 1)
    assert data_stats(learn.dls)==data_stats(dls)==HALF and dls.valid is learn.dls.valid
    plain = fine_grained_dls(folder, size=32, bs=2, num_workers=0)
    assert np.allclose(data_stats(plain), imagenet_stats)
    x = [dl.valid.one_batch()[0] for dl in (plain,learn.dls)]
    mean,std = [torch.tensor(o)[:,None,None] for o in imagenet_stats]
    torch.testing.assert_close(x[1].as_subclass(torch.Tensor), (x[0].as_subclass(torch.Tensor)*std+mean-.5)/.5, atol=1e-4, rtol=1e-3)
    assert data_stats(branch_learner(dls, 'test_vit', 1, pretrained=False).dls)==data_stats(dls)
    named = fine_grained_dls(folder, size=32, bs=2, num_workers=0, arch='test_vit', in_memory=True)
    assert data_stats(named)==HALF
    own = fine_grained_dls(folder, size=32, bs=2, num_workers=0, stats=([.1]*3,[.2]*3))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert torch.allclose(torch.tensor(data_stats(branch_learner(own, vit, 1).dls)[0]), torch.tensor(.1))

def test_each_learner_keeps_its_statistics(folder):
    "Of several that were made with the same loaders; these have those of the last"
    dls = fine_grained_dls(folder, size=32, bs=2, num_workers=0)
    vit,net = (timm.create_model(o, **kw) for o,kw in (('test_vit',dict(img_size=32)), ('test_resnet',{})))
    net.pretrained_cfg = dict(mean=(.1,)*3, std=(.2,)*3)
    mean = lambda *ls: [round(data_stats(getattr(o, 'dls', o))[0][0], 3) for o in ls]
    a = branch_learner(dls, 'test_resnet', 1, pretrained=False)
    with pytest.warns(UserWarning, match='take its own `learn.dls`'): b,c = branch_learner(dls, vit, 1),branch_learner(dls, net, 1)
    assert mean(a, b, c, dls)==[.485,.5,.1,.1]
    test = official_test_dl(dls)
    assert torch.equal(test.one_batch()[0], c.dls.valid.one_batch()[0])
    with pytest.warns(UserWarning, match='take its own `learn.dls`'): d = branch_learner(dls, 'test_resnet', 1, pretrained=False)
    e = branch_learner(b.dls, net, 1) # with the loaders of another learner, which keeps them
    assert mean(a, b, c, d, e, dls)==[.485,.5,.1,.485,.1,.485]
    dls.loaders = [dls.train.new(bs=1),dls.valid] # loaders that were changed since are what counts
    assert branch_learner(dls, 'test_resnet', 1, pretrained=False).dls.train.bs==1

@pytest.mark.parametrize('name', ['efficientnet_b1','inception_v3'])
def test_a_name_that_two_libraries_have(name):
    "timm normalised it otherwise than torchvision"
    of_timm = norm_stats(name)[0]
    assert of_timm==[.5]*3
    for o in (f'torchvision/{name}',getattr(torchvision.models, name)): assert np.allclose(norm_stats(o), imagenet_stats)
    class Net(nn.Module): pass
    assert np.allclose(backbone_stats(Net(), f'torchvision/{name}'), imagenet_stats)

@pytest.mark.parametrize('arch', ['local-dir:nowhere',['test_resnet','test_vit']])
def test_a_backbone_that_is_known_with_its_learner(folder, arch):
    "The loaders wait for it, as without `arch`"
    dls = fine_grained_dls(folder, size=32, bs=2, num_workers=0, arch=arch)
    assert dls.open_stats
    branch_learner(dls, timm.create_model('test_vit', img_size=32), 1)
    assert data_stats(dls)==HALF

def test_statistics_in_a_file(folder, tmp_path):
    "The loaders in memory get them too, and a file of `deploy` keeps them"
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path/'vit.pth')
    dls = fine_grained_dls(folder, size=32, bs=2, num_workers=0, in_memory=True)
    learn = branch_learner(dls, 'test_vit', 1, weights=tmp_path/'vit.pth', path=tmp_path)
    assert data_stats(learn.dls)==HALF and learn.dls.train.store is dls.train.store
    learn.fit(1, 1e-4)
    assert Deployed(deploy(learn, tmp_path/'m.pt')).mean.flatten().tolist()==[.5]*3

def test_foreign_loaders_are_named(folder):
    "A warning with the remedy, where the loaders are not ours"
    block = DataBlock((ImageBlock,CategoryBlock), get_items=lambda p: sorted(p.rglob('*.png')), get_y=lambda o: o.parent.name,
        item_tfms=Resize(32), batch_tfms=Normalize.from_stats(*imagenet_stats))
    dls = block.dataloaders(folder, bs=2, num_workers=0)
    vit = timm.create_model('test_vit', img_size=32)
    with pytest.warns(UserWarning, match='was pretrained on images of mean .0.5.*from_stats.*0.5'): branch_learner(dls, vit, 1)

# sizes and channels

def test_sizes():
    "A transformer is made for the size of the data, in every kind of network; what does not go is named with what does"
    net = learner('test_vit', n=2).model
    assert net.recipe['img_size']==64 and net.eval()(torch.randn(1,3,64,64)).shape==(1,2)
    assert online_learner(toy(), 'test_vit', 'one', pretrained=False, loss_func=CrossEntropyLossFlat()).model.trunk.facts['shape']==(3,64,64)
    assert css_learner(toy(), ('test_vit','test_resnet'), pretrained=False, loss_func=CrossEntropyLossFlat()).model.net1.trunk.facts['shape'][1]==64
    assert branch_learner(toy(), ('test_vit','test_resnet'), pretrained=False, loss_func=CrossEntropyLossFlat()).model.recipe['arch_args'][0]==dict(img_size=64)
    with pytest.raises(ValueError, match='`test_vit` cannot be made for pictures of 8 pixels: of the sizes near, it takes .*32.*160'):
        learner('test_vit', toy(size=8))

@pytest.mark.parametrize('c', [1,4,6])
@pytest.mark.parametrize('arch', ['test_resnet','test_vit'])
def test_channels_of_the_data(arch, c):
    "Pictures of any number of channels get a first layer for them, also where a classifier looks at the middle"
    learn = learner(arch, toy(c), mid=True)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.model.recipe['in_chans']==c

def test_channels_that_do_not_fit():
    with pytest.raises(ValueError, match=r'The pictures have 1 channels, but `ResNet` takes 3: pass `arch_args=dict\(n_in=1\)`'):
        learner(timm.create_model('test_resnet'), toy(1))

# rates, decay and settings

@pytest.mark.parametrize('arch,n', [('test_vit',3), ('test_resnet',2), ('test_convnext',2), ('cifar_resnet8',2)])
def test_layers(arch, n):
    "Every parameter is in one group; earlier layers in earlier ones; branches share theirs; heads and a gate are last"
    learn = online_learner(toy(), arch, 'one', n, pretrained=False, loss_func=CrossEntropyLossFlat(), splitter=partial(branch_splitter, by_layer=True))
    net = learn.model
    groups = layer_groups(net)
    ids = [id(p) for g in groups for p in g]
    assert len(groups)>3 and len(ids)==len(set(ids))==len(list(net.parameters()))
    assert {id(p) for p in groups[-1]}=={id(p) for m in (net.heads,net.gate) for p in m.parameters()}
    first = next(net.trunk.parameters())
    assert any(p is first for p in groups[0])
    learn.freeze()
    assert {k.split('.')[0] for k,p in net.named_parameters() if p.requires_grad and p.ndim>1}<={'heads','gate'}

def test_what_does_not_decay():
    "Positions and class token of a transformer keep their size, weights shrink"
    learn = recommended('test_vit').learner(toy(), pretrained=False, n_branches=1)
    free = {id(p) for p in undecayed_params(learn.model)}
    named = dict(learn.model.named_parameters())
    assert id(named['trunk.body.pos_embed']) in free and id(named['trunk.body.blocks.0.mlp.fc1.weight']) not in free
    assert all(id(p) in free for k,p in named.items() if p.ndim==1 and not k.startswith('heads'))
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.)
    assert learn.opt.state[named['trunk.body.pos_embed']]['do_wd'] is False

def test_settings():
    "Families differ; from random weights there is one rate; the command takes what is not given"
    kinds = {k:recommended(k) for k in ('test_resnet','test_convnext','test_vit','torchvision/resnet18','cifar_resnet8')}
    assert [o.layer_decay for o in kinds.values()]==[None,.75,.75,None,None]
    assert [o.size for o in kinds.values()]==[160,160,160,224,32]
    assert recommended('test_vit', pretrained=False).layer_decay is None
    args = dict(arch='test_vit', no_pretrained=False, weights=None, data='synthetic', lr=None, wd=None, opt=None, head_lr=3., size=None)
    assert {k:advised(args)[k] for k in ('lr','wd','opt','head_lr','size')}==dict(lr=1e-4, wd=.05, opt='adam', head_lr=3., size=160)
    assert advised(args|dict(data='cifar10'))['size'] is None and advised(args|dict(no_pretrained=True))['size'] is None

def test_command_smooths_and_keeps_statistics():
    "Labels are smoothed and statistics kept as recommended; not by MEAL and CSS, nor in a paper's experiment; what is given counts."
    args = dict(arch='test_resnet', no_pretrained=False, weights=None, data='synthetic', method='cekd', recipe=None, freeze_bn=None, label_smoothing=None)
    def both(**kw): return [advised(args|kw)[k] for k in ('freeze_bn','label_smoothing')]
    assert both()==[True,.1] and both(no_pretrained=True)==[False,.1] and both(arch='test_vit')==[False,.1]
    assert both(method='meal')==both(method='css')==[True,0.] and both(recipe='cekd-cub-resnet101')==[False,0.]
    assert both(freeze_bn=False, label_smoothing=.3)==[False,.3] and both(recipe='css-cifar100', label_smoothing=.2)==[False,.2]

def test_command_has_the_loss(tmp_path):
    birds = make_birds(tmp_path/'birds', n_species=2, n_images=3, n_train=2, size=40, progress=False)
    own = _defaults()|dict(data=birds, arch='test_resnet', size=32, bs=2, no_pretrained=True, num_workers=0, method='plain')
    for given,eps in ((None,.1), (.3,.3)): assert build(own|dict(label_smoothing=given)).loss_func.eps==eps
    assert isinstance(build(own|dict(label_smoothing=0.)).loss_func, CrossEntropyLossFlat)
    with pytest.raises(ValueError, match='--label-smoothing is for labels, which MEAL leaves out'): build(own|dict(method='meal', teachers=['x.pt'], label_smoothing=.1))

# what builds a backbone

def test_random_weights_are_named():
    "A function that cannot be told is named once; a partial of torchvision is told; one that holds the word is not"
    def own(): return nn.Sequential(nn.Sequential(nn.Conv2d(3,4,3,2), nn.ReLU(), nn.Conv2d(4,8,3,2)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,5))
    with pytest.warns(UserWarning, match='`own` takes no `pretrained`.*perhaps random') as seen: learner(own, pretrained=True)
    assert len(seen)==1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learner(own)
        make_arch(partial(torchvision.models.resnet18, weights=None))
    with pytest.raises(ValueError, match='There are no pretrained weights for `test_resnet`: pass `pretrained=False`'):
        make_arch('test_resnet', pretrained_cfg=dict(url='', hf_hub_id=''))

def test_two_classifiers_in_a_chain():
    "Where a chain of parts ends in two classifiers, both are new"
    model = timm.create_model('repvit_m0_9', embed_dim=(8,8,16,16), depth=(1,1,1,1))
    net = branch_net(model, 3, 1).eval()
    assert net(torch.randn(2,3,64,64)).shape==(2,3)

def test_refused_families():
    "A family that cannot be split: why, and three that can"
    with pytest.raises(ValueError, match="cannot be split.*'resnet50', 'convnext_tiny' or 'vit_small_patch16_224'"):
        branch_net('pit_ti_224', 3, pretrained=False)

@pytest.mark.parametrize('change', ['absent','other size'])
def test_a_classifier_that_is_not_there_is_not_kept(tmp_path, change):
    "A file without the classifier, or with one of other classes, gives no random one where it was to be kept."
    sd = timm.create_model('test_resnet').state_dict()
    for k in ('fc.weight','fc.bias'): sd.pop(k) if change=='absent' else sd.update({k:sd[k][:7]})
    torch.save(sd, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='w.pth` has no classifier of the size of that .*without `keep_head`'):
        branch_net('test_resnet', 1000, 1, weights=tmp_path/'w.pth', keep_head=True)
    assert branch_net('test_resnet', 1000, 1, weights=tmp_path/'w.pth').trunk.facts['new']==['heads']

def test_a_classifier_of_other_classes_in_our_own_file_is_not_kept(tmp_path):
    save_net(branch_net('test_resnet', 3, 1, pretrained=False), tmp_path/'net.pt')
    with pytest.raises(ValueError, match='net.pt` has no classifier of these classes to keep'):
        branch_net('test_resnet', 5, 1, num_classes=5, weights=tmp_path/'net.pt', keep_head=True)
    assert branch_net('test_resnet', 3, 1, num_classes=3, weights=tmp_path/'net.pt', keep_head=True).trunk.facts['new']==[]

def test_sizes_that_divide_into_no_blocks(tmp_path):
    "`halonet` takes any size by name, and then fails without a word: the learner names the sizes instead."
    birds = make_birds(tmp_path/'birds', n_species=2, n_images=4, n_train=2, size=80, n_workers=0, progress=False)
    dls = fine_grained_dls(birds, size=64, bs=2, num_workers=0)
    blocks = [ByoBlockCfg(type='self_attn', d=1, c=c, s=s, gs=0, br=1.) for c,s in ((16,1),(32,2),(64,2),(128,2))]
    small = dict(blocks=tuple(blocks), stem_chs=16) # one block a stage and a quarter of the channels: the same sizes of maps
    with torch.device('meta'): assert timm.create_model('halonet_h1', **small)(torch.empty(2,3,256,256)).shape==(2,1000)
    def css(dls, arch, arch_args, **kw): return css_learner(dls, (arch,'test_resnet'), arch_args=[arch_args,{}], **kw)
    for make in (branch_learner,online_learner,css):
        with pytest.raises(ValueError, match='`halonet_h1` cannot be made for pictures of 64 pixels: of the sizes near, it takes 256'):
            make(dls, 'halonet_h1', arch_args=small, pretrained=False)

def test_a_size_is_tried_without_a_trace(tmp_path):
    "Trying a size changes no weight, no statistics and no random number."
    birds = make_birds(tmp_path/'birds', n_species=2, n_images=4, n_train=2, size=80, n_workers=0, progress=False)
    dls = fine_grained_dls(birds, size=64, bs=2, num_workers=0)
    torch.manual_seed(3)
    net = branch_net('test_resnet', 2, pretrained=False)
    after,want = torch.rand(1),{k:v.clone() for k,v in net.state_dict().items()}
    torch.manual_seed(3)
    learn = branch_learner(dls, 'test_resnet', pretrained=False)
    assert tuple(learn.model.trunk.facts['shape'])!=(3,64,64) and learn.model.training
    assert torch.equal(torch.rand(1), after) and all(torch.equal(v, want[k]) for k,v in learn.model.state_dict().items())
