"Networks taken apart: what must come along besides logits, what their trial is run on, and the sentences where it cannot be."
import copy
import pytest,timm,torch,torchvision
from functools import partial
from fastai.vision.all import CrossEntropyLossFlat,DataLoader,DataLoaders,set_seed
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from cekd_fastai.arch import chain,made_for
from cekd_fastai.branches import branch_net
from cekd_fastai.cekd import CEKD
from cekd_fastai.css.branches import css_branch_net
from cekd_fastai.diagnose import Diagnose
from cekd_fastai.files import fill
from cekd_fastai.graph import divide
from cekd_fastai.learner import branch_learner,css_learner,online_learner
from cekd_fastai.losses import sample_losses
from cekd_fastai.mix.callback import MixUp
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.online.net import gate_net

class Own(nn.Module):
    "A network whose `forward` joins two stages and a classifier as a test wants it"
    def __init__(self, drop=0., mid=0., fc=None):
        super().__init__()
        self.drop,self.mid = drop,mid
        self.stem,self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),nn.Conv2d(4, 8, 3, 2, 1)
        self.fc = fc or nn.Linear(8, 3)
    def features(self, x): return F.relu(self.body(F.dropout2d(self.stem(x), self.mid, self.training))).mean((2,3))
    def forward(self, x): return self.fc(F.dropout(self.features(x), self.drop, self.training))

class Steps(Own):
    "The same with timm's interface, and a skip, so that it is no chain"
    def forward_features(self, x):
        x = F.dropout2d(self.stem(x), self.mid, self.training)
        return self.body(x)+self.skip(x)
    def forward_head(self, x): return self.fc(F.dropout(x.mean((2,3)), self.drop, self.training))
    def forward(self, x): return self.forward_head(self.forward_features(x))
    def __init__(self, *args):
        super().__init__(*args)
        self.skip = nn.Conv2d(4, 8, 3, 2, 1)

def toy(size=32, c=3):
    dl = DataLoader(list(zip(torch.randn(4, 3, size, size), torch.tensor([0,1,2,0]))), bs=4, num_workers=0)
    dls = DataLoaders(dl, dl)
    dls.c = c
    return dls

def learner(arch, make=branch_learner, size=32, **kw): return make(toy(size), arch, pretrained=False, loss_func=CrossEntropyLossFlat(), **kw)

def fit(learn):
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3)

# Dropout that is called as a function

def still(net, dropout):
    "Training mode, in which nothing is random but dropout, and that only if asked for"
    net.train()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()
        if isinstance(m, nn.modules.dropout._DropoutNd) and not dropout: m.eval()
    return net

def drops(net, x):
    "Do two passes in training mode differ, by dropout alone?"
    runs = [[still(net, on).branch_forward(x)[0] for _ in range(2)] for on in (True,False)]
    assert torch.equal(*runs[1])
    return not torch.equal(*runs[0])

@pytest.mark.parametrize('name', ['test_resnet','test_efficientnet','mobilenetv3_small_050','ghostnet_050'])
def test_rate_of_dropout(name):
    "`drop_rate` of timm drops in training as it says, and changes nothing in evaluation, nor the names of the weights"
    set_seed(0)
    model = timm.create_model(name, drop_rate=.5, num_classes=3)
    x = torch.randn(2, 3, 64, 64)
    net = branch_net(model, 3, 1, keep_head=True)
    torch.testing.assert_close(net.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-4)
    assert drops(net, x) and not drops(branch_net(name, 3, 1, pretrained=False, drop_rate=0.), x)
    plain = branch_net(timm.create_model(name, num_classes=3), 3, 1, keep_head=True)
    fill(plain, net.state_dict(), 'file')
    assert list(plain.state_dict())==list(net.state_dict())

def test_rate_of_dropout_by_name_and_by_partial():
    "As an argument of the backbone and in a partial, as the how-to has it, in every branch"
    x = torch.randn(2, 3, 64, 64)
    own = partial(timm.create_model, 'test_resnet', drop_rate=.2)
    nets = [branch_net('test_resnet', 3, 2, pretrained=False, drop_rate=.2), branch_net(own, 3, 2, pretrained=False)]
    for net in (*nets,learner('test_resnet', arch_args=dict(drop_rate=.2)).model):
        rates = [[m.p for m in h.modules() if isinstance(m, nn.Dropout)] for h in net.heads]
        assert rates==[[.2],[.2]] and drops(net, x)

def test_share_that_is_dropped():
    "A half of what the classifier sees is zero, the rest twice as large"
    net = branch_net('test_resnet', 3, 1, pretrained=False, drop_rate=.5).train()
    seen = []
    net.heads[0][-1].register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    net.heads[0](torch.ones(4, net.heads[0][-1].in_features, 2, 2))
    assert set(seen[0].unique().tolist())=={0.,2.} and .2<(seen[0]==0).float().mean()<.8

def test_dropout_in_steps():
    "Where a network is taken apart by its steps, dropout is a layer that knows training from evaluation"
    model = Steps(.5, .25)
    x = torch.randn(2, 3, 64, 64)
    net = branch_net(model, 3, 1, keep_head=True)
    assert [(type(m),m.p) for m in net.modules() if 'Dropout' in type(m).__name__]==[(nn.Dropout2d,.25),(nn.Dropout,.5)]
    assert all(m.training for m in net.modules() if 'Dropout' in type(m).__name__) and drops(net, x)
    torch.testing.assert_close(net.eval()(x), model.eval()(x))

def test_positions_that_stay_as_they_are():
    "Where training moves positions that are written down, a warning says that they stay"
    model = Eva(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=3, use_rot_pos_emb=True, rope_type='dinov3', rope_rescale_coords=2.)
    model.default_cfg = dict(input_size=(3,32,32))
    with pytest.warns(UserWarning, match='`Eva` scales or shifts rotary positions at random in training'): branch_net(model, 3)

def test_dropout_in_an_own_forward():
    "Before the classifier and between two parts, each at its place, also where `forward` asks for training first"
    class Asks(Own):
        def forward(self, x):
            x = self.features(x)
            return self.fc(F.dropout(x, self.drop) if self.training else x)
    for cls in (Own,Asks):
        net = branch_net(cls(.5, .25), 3, 1, 'stem')
        assert [(k,m.p) for k,m in net.named_modules() if 'Dropout' in type(m).__name__]==[('trunk.stem_dropout0',.25),('heads.0.2_dropout0',.5)]
        assert type(net.trunk[-1]) is nn.Dropout2d and drops(net, torch.randn(2, 3, 32, 32))
    model = Own(.5)
    before,mode = torch.get_rng_state(),model.training
    divide(model, 'own')
    assert torch.equal(before, torch.get_rng_state()) and model.training==mode

def test_dropout_inside_a_part_is_its_own():
    "A part that calls the function keeps doing so, and nothing is put in beside it"
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, 2, 1)
        def forward(self, x): return F.dropout(self.conv(x), .5, self.training)
    model = Own()
    model.body = Part()
    net = branch_net(model, 3, 2)
    x = torch.randn(2, 3, 32, 32)
    assert [m for m in net.modules() if isinstance(m, nn.Dropout)]==[]
    assert not torch.equal(net.train()(x)[0], net(x)[0]) and torch.equal(net.eval()(x), net(x))

def test_dropout_without_a_place():
    "What is dropped out in the middle of other code is refused"
    class Odd(Own):
        def features(self, x): return F.dropout(2*F.relu(self.body(self.stem(x))), .5, self.training).mean((2,3))/2
    with pytest.raises(ValueError, match="`Odd` cannot be split.*its `forward` drops out what none of its children gives"): branch_net(Odd(), 3)

# Outputs and sizes

class Several(Own):
    def forward(self, x):
        x = self.features(x)
        return self.fc(x),x

class SeveralSteps(Several):
    def forward_features(self, x): return self.body(self.stem(x))
    def forward_head(self, x): return self.fc(x.mean((2,3)))

@pytest.mark.parametrize('cls,what', [(Several,'a tuple'), (SeveralSteps,'a tuple'), (None,r'a tensor of shape \(2, 8, 55, 55\)')])
def test_several_outputs(cls, what):
    "What does not answer with logits is named, whichever way it is taken apart"
    model = cls() if cls else nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 8, 3, 2))
    with pytest.raises(ValueError, match=f'answers with {what} instead of one tensor of logits.*return the logits alone'): branch_net(model, 3)

def fixed(size, c=3):
    "A network that takes pictures of one size only"
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Sequential(nn.Flatten(), nn.Linear(8*(size//4)**2, c)))

def test_a_network_of_one_size():
    "A learner tells the size of its data; without one, the message says how"
    for make,kw in ((branch_learner,{}), (online_learner,{}), (branch_learner,dict(mid=True, cbs=MixUp()))):
        learn = learner(fixed(32), make, **kw)
        assert learn.model.trunk.facts['shape']==(3,32,32)
        fit(learn)
    assert learner([fixed(32, 9),fixed(32, 9)], css_learner).model.net2.trunk.facts['shape']==(3,32,32)
    assert learner(lambda: fixed(32)).model.trunk.facts['shape']==(3,32,32)
    with pytest.raises(ValueError, match=r'`Sequential` does not take images of 3×224×224.*default_cfg = dict\(input_size=\(3,64,64\)\)'): branch_net(fixed(32), 3)
    with pytest.raises(ValueError, match='does not take images of 3×32×32'): learner(fixed(64))
    told = fixed(64)
    told.default_cfg = dict(input_size=(3,64,64))
    assert branch_net(told, 3).eval()(torch.randn(1, 3, 64, 64)).shape==(1,3)

def test_a_network_of_any_size_is_tried_as_before():
    "The size of the data is for those that need it: on small pictures a deep network has no map left"
    deep = nn.Sequential(*[nn.Conv2d(3, 3, 3, 2, 1) for _ in range(5)], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with made_for((3,32,32)): net = branch_net(deep, 3)
    assert net.trunk.facts['shape']==(3,224,224)

# The joint and the classifier

@pytest.mark.parametrize('scale', [0,1e-6,1e3])
def test_a_classifier_that_tells_nothing(scale):
    "The ReLU before the pooling is found whatever the weights of the classifier, and these stay as they are"
    model = torchvision.models.densenet._densenet(8, (1,1,1,1), 16, None, False, num_classes=3)
    with torch.no_grad(): model.classifier.weight.mul_(scale)
    before = copy.deepcopy(model.state_dict())
    net = branch_net(model, 3, 2, keep_head=False)
    assert any(isinstance(m, nn.ReLU) for m in net.heads[0])
    chain(model)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())

class Cosine(nn.Linear):
    def __init__(self, c_in, c_out): super().__init__(c_in, c_out, bias=False)
    def forward(self, x): return 10*F.linear(F.normalize(x), F.normalize(self.weight))

def test_classifier_of_an_own_class():
    "It stays of its class and draws its own weights; another number of classes is refused"
    model = Own(fc=Cosine(8, 3))
    net = branch_net(model, 3, 2)
    a,b = [h[-1] for h in net.heads]
    assert type(a) is type(b) is Cosine and not torch.equal(a.weight, b.weight) and not torch.equal(a.weight, model.fc.weight)
    with pytest.raises(ValueError, match='is a `Cosine` of 3 outputs.*one of 5: build the network with 5 outputs'): branch_net(model, 5)
    class Stubborn(Cosine): reset_parameters = lambda self: None if hasattr(self, 'weight') and self.weight.any() else nn.init.ones_(self.weight)
    with pytest.raises(ValueError, match='give that class a `reset_parameters'): branch_net(Own(fc=Stubborn(8, 3)), 3)

def test_classifier_without_bias():
    "A plain layer without a bias stays without, also a convolution"
    assert branch_net(Own(fc=nn.Linear(8, 3, bias=False)), 5, 1).heads[0][-1].bias is None
    head = nn.Sequential(nn.Conv2d(8, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1), head)
    assert branch_net(model, 5, 1).heads[0][-1][0].bias is None
    assert branch_net('ghostnet_050', 5, 1, pretrained=False).heads[0][-1].bias is not None

# Maps between trunk and branches

def swin(): return SwinTransformer([4,4], 8, [1,1,1], [1,1,2], [4,4], num_classes=3)

@pytest.mark.parametrize('split,c', [(None,16), ('features.1',8), ('head',32)])
def test_channels_last(split, c):
    "The map that a torchvision Swin passes on has its channels first, and the logits stay"
    model = swin()
    net = branch_net(model, 3, 1, split, keep_head=True).eval()
    x = torch.randn(2, 3, 64, 64)
    shared = net.trunk(x)
    assert shared.shape[1]==c and shared.shape[2]==shared.shape[3]
    torch.testing.assert_close(net(x), model.eval()(x), atol=1e-5, rtol=1e-4)
    assert net.branch_forward(x)[1][0].shape[1:]==(32,4,4)
    own = [k.removeprefix('trunk.').removeprefix('branches.0.') for k in net.state_dict() if not k.startswith('heads')]
    assert {k.replace('.', '_') for k in own}<={k.replace('.', '_') for k in model.state_dict()} # files from before still fit

def test_last_map_with_channels_last():
    "A network whose head takes channels last too"
    class Rows(nn.Module):
        def forward(self, x): return x.permute(0,2,3,1)
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 3)
        def forward(self, x): return self.fc(x.mean((1,2)))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), Rows()), nn.LayerNorm(8), Mean())
    net = branch_net(model, 3, 1, keep_head=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert net.branch_forward(x)[1][0].shape==(2,8,8,8)
    torch.testing.assert_close(net(x), model.eval()(x))

def test_corner_of_channels_last():
    "CSS removes a corner of the picture, not channels of a row"
    net = css_branch_net(swin(), 3, 2, 'features.3')
    seen = net.branch_input(torch.ones_like(net.eval().trunk(torch.randn(1, 3, 64, 64))), 0)
    assert seen.shape==(1,16,8,8) and (seen==0).any(1).sum()==4 and (seen[:,:,:2,:2]==0).all()
    assert gate_net(swin(), 3, 2, gate='one').eval()(torch.randn(2, 3, 64, 64)).shape==(2,3)

@pytest.mark.parametrize('tokens', [dict(), dict(reg_tokens=2), dict(class_token=False, global_pool='avg')])
@pytest.mark.parametrize('transform', ['corner','permute'])
def test_tokens_in_front_keep_out_of_transforms(tokens, transform):
    "The class token and registers of a transformer come to each branch as they are, its places transformed"
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=6, **tokens)
    model.default_cfg = dict(input_size=(3,32,32))
    net = css_branch_net(model, 3, 2, transform=transform).eval()
    x = torch.randn(2, 3, 32, 32)
    shared = net.trunk(x)
    for i in range(2):
        seen = net.branch_input(shared, i)
        assert seen.shape==shared.shape and torch.equal(seen[:,24:], shared[:,24:]) and not torch.equal(seen[:,:24], shared[:,:24])
        if transform=='permute': assert torch.equal(seen[:,:24].sort(1)[0], shared[:,:24].sort(1)[0])
    assert net(x).shape==(2,3)

# A loss that does not listen, and a trunk without one map

class Built(nn.Module):
    def __init__(self, reduction='mean'):
        super().__init__()
        self.reduction,self.inner = reduction,nn.CrossEntropyLoss(reduction=reduction)
    def forward(self, x, y): return self.inner(x, y)

def test_a_loss_built_with_its_reduction():
    "One number for a batch is no loss of each image"
    z,y = torch.randn(6, 3),torch.tensor([0,1,2,0,1,2])
    with pytest.raises(ValueError, match="`Built` gives one number for a batch.*let it read `self.reduction` when it is called"): sample_losses(Built(), z, y)
    learn = branch_learner(toy(), 'test_resnet', 1, pretrained=False, loss_func=Built(), cbs=MixUp())
    with pytest.raises(ValueError, match='`Built` gives one number'): fit(learn)
    assert sample_losses(Built('none'), z, y).shape==(6,)
    assert sample_losses(nn.CrossEntropyLoss(), z[:1], y[:1]).shape==(1,)

def test_a_trunk_of_several_maps_has_no_conflict():
    "It is refused before the first batch"
    learn = learner('hrnet_w18_small', cbs=[SnapMix(),CEKD(),Diagnose('trunk')])
    steps = []
    learn.model.trunk.register_forward_hook(lambda m, x, o: steps.append(len(x[0])))
    with pytest.raises(ValueError, match=r"`Diagnose\('trunk'\)` reads one map of the trunk.*passes several things on"): fit(learn)
    assert steps==[1]
