"Which maps MEAL compares, in the families that users have; and what it leaves behind."
import multiprocessing
import pytest,timm,torch
from fastai.vision.all import CategoryBlock,DataBlock,ImageBlock,Resize,ColReader,L,create_vision_model,pd,set_seed
from torch import nn
from torchvision.models import resnet50,swin_t
from cekd_fastai.all import check_data,make_birds,meal_learner
from cekd_fastai.branches import branch_net
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.meal.align import Taps,map_sizes,pick_taps,stages
from cekd_fastai.meal.teachers import as_teacher

families = ['resnet10t','resnet50','efficientnet_b0','mobilenetv3_small_050','regnety_002','convnext_atto','densenet121','ghostnet_050','mobilevit_xxs']
x = torch.randn(2, 3, 64, 64)

def small(name, **kw): return branch_net(name, 3, 1, pretrained=False, **kw).eval()

@pytest.mark.parametrize('name', families)
def test_trunk_and_branches(name):
    "The two deepest maps are the outputs of trunk and branch, in every family."
    assert pick_taps(small(name), 2, x)==[['trunk'],['branches.0']]

def seen(model, paths, x):
    taps = Taps(model, paths, size=x.shape[-2:])
    taps.on = True
    with torch.no_grad(): model(x)
    res = taps.read()
    taps.remove()
    return res

@pytest.mark.parametrize('name', ['resnet50','efficientnet_b0','convnext_atto','regnety_002'])
def test_the_same_network_has_the_same_maps(name):
    "A student with its teacher's weights has its teacher's blocks, be the teacher timm's or ours."
    theirs = timm.create_model(name, num_classes=3).eval()
    ours = branch_net(theirs, 3, 1).eval()
    mine,yours = seen(ours, pick_taps(ours, 2, x), x),seen(theirs, pick_taps(theirs, 2, x), x)
    assert torch.allclose(mine[0], yours[0], rtol=1e-3, atol=1e-9) and mine[0].std()>0

def test_within_a_body():
    "The body of fastai's networks is opened: the stages of its ResNet, though an activation runs three times."
    assert stages(create_vision_model(resnet50, 3, pretrained=False), x)[-3:]==['0.5','0.6','0']

def test_tokens_are_no_map():
    "In a transformer no square of attention is taken for a map, and the class token stays out of the comparison."
    net = small('test_vit', img_size=64)
    assert pick_taps(net, 2, x)==[['trunk'],['branches.0']]
    assert map_sizes(net, [['trunk'],['branches.0']], [None]*2, x)==[16,16]
    theirs = timm.create_model('test_vit', img_size=64).eval()
    assert map_sizes(theirs, pick_taps(theirs, 2, x), [None]*2, x)==[16,16]
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
        def forward(self, x): return self.net(x)
    swin = timm.create_model('test_vit', img_size=64).eval()
    assert not any('attn' in o for o in stages(Wrapped(swin), x))

def test_channels_last():
    "Maps whose channels come last are compared by their places: the numbers of the same maps with channels first."
    net = swin_t(weights=None).eval()
    big = torch.randn(2, 3, 224, 224)
    paths = pick_taps(net, 3, big)
    sizes = map_sizes(net, paths, [None]*3, big)
    assert sizes==[500,196,49]
    held = {}
    h = net.get_submodule(paths[1][0]).register_forward_hook(lambda m, i, o: held.update(o=o))
    mine = seen(net, paths, big)[1][0]
    h.remove()
    assert torch.allclose(mine, held['o'].mean(-1).flatten(1), atol=1e-5)

def test_the_layers_of_a_block_come_last():
    "They stand for a stage only where nothing else has their size."
    body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    assert stages(nn.Sequential(body, head), x)==['0.0','0']
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 3, 2, 1))
    assert stages(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), block), head), x)==['0.0','0']

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=3, n_images=10, n_train=6, size=64, progress=False)

def test_no_process_stays(birds, tmp_path):
    "Loaders of images without labels end with the fit."
    set_seed(0)
    dls = fine_grained_dls(birds, size=48, bs=6, num_workers=1)
    learn = meal_learner(dls, 'test_resnet', [small('test_resnet')], pretrained=False, unlabeled=birds)
    with learn.no_logging(): learn.fit(1)
    assert not multiprocessing.active_children()

def test_a_folder_as_teacher(tmp_path):
    "A folder of timm is a teacher as it is a backbone."
    from timm.models import save_for_hf
    save_for_hf(timm.create_model('test_resnet', num_classes=3), tmp_path/'net', model_config=dict(num_classes=3))
    t = as_teacher(f'local-dir:{tmp_path/"net"}')
    assert t.model.num_classes==3
    with pytest.raises(FileNotFoundError, match='There is no folder'): as_teacher(f'local-dir:{tmp_path/"none"}')

def loaders(df, folder):
    "Loaders of fastai from a table, one row for each picture."
    block = DataBlock((ImageBlock,CategoryBlock(vocab=['a','b','c'])), get_x=ColReader('file', pref=str(folder)+'/'), get_y=ColReader('label'),
        splitter=lambda o: [L(range(len(o))).argwhere(lambda i: not o['valid'].iloc[i]),L(range(len(o))).argwhere(lambda i: o['valid'].iloc[i])], item_tfms=Resize(32))
    return block.dataloaders(df, path=folder, bs=2, num_workers=0)

def test_check_data_reports_what_is_wrong(birds):
    "A picture in two parts, a class without a training picture: rows of the table and no refusal; a repeated row is nothing."
    files = sorted(o.relative_to(birds).as_posix() for o in birds.rglob('*.jpg'))[:6]
    df = pd.DataFrame(dict(file=files, label=['a','a','a','b','b','c'], valid=[False,False,True,False,True,True]))
    with_all = pd.concat([df, df.iloc[[0]], df.iloc[[0]].assign(valid=True)])
    res = check_data(loaders(with_all, birds), least=2)
    assert 'exact duplicate across parts' in set(res.problem) and 'tiny class' in set(res.problem)
    assert not any(o.endswith('duplicate') for o in res.problem)
