"Taking networks apart: what must stay as it was, and what each part computes."
import pytest,timm,torch,torchvision
from torch import nn
from torch.nn import functional as F
from functools import partial
from cekd_fastai.weights import load_weights
from cekd_fastai.arch import CIFAR_ARCHS,chain,cifar_net,make_arch
from cekd_fastai.graph import new_head,split_at
from cekd_fastai.branches import branch_net,frozen_norm_stats
from cekd_fastai.ema import ModelEMA

def body(): return nn.Sequential(nn.Conv2d(3,4,3,2), nn.ReLU(), nn.Conv2d(4,8,3,2))

NETS = dict(residual=lambda: timm.create_model('test_resnet'), inverted=lambda: timm.create_model('mobilenetv3_small_050'),
    pooled_inside=lambda: torchvision.models.mobilenet_v2(), convolution_as_classifier=lambda: torchvision.models.squeezenet1_1(),
    of_cifar=lambda: cifar_net('cifar_resnet8'), own=lambda: nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,5)))

@pytest.mark.parametrize('name', NETS)
def test_parts_make_the_whole(name):
    "Parts and head, run one after the other, compute what the network computes, also on another size of images"
    net = NETS[name]().eval()
    parts,heights,head = chain(net)
    x = torch.randn(2, 3, 96, 96)
    trunk = nn.Sequential(*[m for _,m in parts])
    assert len(parts)==len(heights) and heights==sorted(heights, reverse=True)
    torch.testing.assert_close(head.eval()(trunk(x)), net(x), atol=1e-4, rtol=1e-3)

class FunctionalRelu(nn.Module):
    "A network whose `forward` runs a ReLU between its last map and its pooling"
    def __init__(self):
        super().__init__()
        self.stem,self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()),nn.Conv2d(4, 4, 3, 2, 1)
        self.pool,self.fc = nn.AdaptiveAvgPool2d(1),nn.Linear(4, 5)
    def forward(self, x): return self.fc(self.pool(F.relu(self.body(self.stem(x)))).flatten(1))

@pytest.mark.parametrize('seed', range(5))
def test_a_relu_before_the_pooling_is_none_after_it(seed):
    "On smooth images a map of few channels has one sign in all places, where both are the same."
    torch.manual_seed(seed)
    net = FunctionalRelu().eval()
    parts,_,head = chain(net)
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(head(nn.Sequential(*[m for _,m in parts])(x)), net(x))

def test_looking_changes_nothing():
    "Modes, statistics and random numbers are as before"
    net = timm.create_model('test_resnet').train()
    net.bn1.eval()
    before = {k:v.clone() for k,v in net.state_dict().items()}
    torch.manual_seed(0)
    chain(net)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))
    assert net.training and not net.bn1.training and net.layer1.training
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

def test_new_head_leaves_the_old():
    "The network keeps its classifier, and two heads do not begin alike"
    net = timm.create_model('test_resnet')
    parts,heights,head = chain(net)
    a,b = new_head(head, 7),new_head(head, 7)
    assert head[-1] is net.fc and net.fc.out_features==1000
    assert a[-1].out_features==b[-1].out_features==7 and not torch.equal(a[-1].weight, b[-1].weight)

def test_wide_bottlenecks():
    "The width is that inside a bottleneck; what leaves a stage is as wide as in any bottleneck network"
    wide,narrow = cifar_net('cifar_wide_resnet20_8'),cifar_net('cifar_resnet56')
    for i,c in enumerate((16,32,64), 1):
        a,b = wide.get_submodule(f'layer{i}.0'),narrow.get_submodule(f'layer{i}.0')
        assert (a.conv2.out_channels,b.conv2.out_channels)==(8*c,c)
        assert a.conv3.out_channels==b.conv3.out_channels==4*c

def test_cifar_depths():
    "Two layers a basic block, three a bottleneck, and the stem and the classifier beside them"
    for name in CIFAR_ARCHS:
        if 'wide' in name or 'vgg' in name: continue
        convs = [k for k,m in cifar_net(name).named_modules() if isinstance(m, nn.Conv2d) and 'downsample' not in k]
        assert len(convs)+1==int(name.removeprefix('cifar_resnet'))

@pytest.mark.parametrize('split,i', [(None,7), ('layer2',6), ('maxpool',4), ('head',8)])
def test_split(split, i):
    parts,heights,_ = chain(timm.create_model('resnet18'))
    assert split_at(parts, heights, split)==i

def test_optional_parts_of_a_checkpoint(tmp_path):
    "A checkpoint of a network with an average fits one without; one with a foreign tensor does not"
    net = branch_net('test_resnet', 3, pretrained=False)
    net.ema = ModelEMA(net)
    torch.save(net.state_dict(), tmp_path/'w.pth')
    plain = branch_net('test_resnet', 3, pretrained=False)
    load_weights(plain, tmp_path/'w.pth')
    assert torch.equal(plain.heads[1][-1].weight, net.heads[1][-1].weight) and not hasattr(plain, 'ema')
    torch.save(net.state_dict() | dict(extra=torch.zeros(1)), tmp_path/'w.pth')
    with pytest.raises(ValueError, match='1 of .* tensors are missing, unknown or of another shape, the first is `extra`'):
        load_weights(plain, tmp_path/'w.pth')

def test_frozen_norm_stats_after_an_error():
    "Statistics stay inside the block, momentum and counters come back, also when a pass fails"
    norm = nn.BatchNorm2d(2, momentum=.3)
    before = {k:v.clone() for k,v in norm.state_dict().items()}
    with pytest.raises(KeyError), frozen_norm_stats(norm):
        norm(torch.randn(4,2,3,3))
        raise KeyError
    assert norm.momentum==.3 and all(torch.equal(v, before[k]) for k,v in norm.state_dict().items())
    norm(torch.randn(4,2,3,3))
    assert not torch.equal(norm.running_mean, before['running_mean'])

# What builds a backbone, and what fills it

def test_functions_are_called():
    "A function is the one that was given, is told `pretrained`, and a partial keeps its arguments"
    assert type(make_arch(timm.models.resnet18, pretrained=False)[0]).__module__.startswith('timm.')
    assert type(make_arch(torchvision.models.resnet18, pretrained=False)[0]).__module__.startswith('torchvision.')
    told = []
    def own(pretrained=False):
        told.append(pretrained)
        return body()
    make_arch(own)
    make_arch(own, pretrained=False)
    make_arch(partial(own, pretrained='mine'))
    assert told==[True,False,'mine']
    small = make_arch(partial(timm.create_model, 'test_resnet', num_classes=3), pretrained=False)[0]
    assert small.num_classes==3

@pytest.mark.parametrize('name', ['test_resnet','test_vit'])
@pytest.mark.parametrize('key,n', [('in_chans',1), ('n_in',4), ('n_in',6)])
def test_channels(name, key, n):
    "Pictures of other than three channels, by timm's name and by fastai's"
    net = branch_net(name, 3, pretrained=False, **{key:n}).eval()
    assert net(torch.randn(1,n,160,160)).shape==(1,3)

def test_no_classifier():
    "A backbone that comes without a classifier gets one"
    net = branch_net('test_vit', 3, pretrained=False, num_classes=0).eval()
    assert net(torch.randn(1,3,160,160)).shape==(1,3)

def test_size_of_a_transformer():
    "A transformer is made for another size by timm's own argument"
    net = branch_net('test_vit', 3, pretrained=False, img_size=64).eval()
    assert net.branch_forward(torch.randn(1,3,64,64))[1][0].shape[2:]==(4,4)

def test_classifier_of_a_file(tmp_path):
    "A file with another classifier, with none, or without counters of batch normalisation fills all the rest"
    saved = timm.create_model('test_resnet', num_classes=7)
    sd = saved.state_dict()
    files = dict(other=sd, none={k:v for k,v in sd.items() if not k.startswith('fc.')}, uncounted={k:v for k,v in sd.items() if 'num_batches' not in k})
    files['unnamed'] = {f'layer_{i}':v for i,v in enumerate(v for k,v in timm.create_model('test_resnet').state_dict().items() if 'num_batches' not in k)}
    for k,v in files.items():
        torch.save(v, tmp_path/'w.pth')
        model = make_arch('test_resnet', weights=tmp_path/'w.pth')[0]
        want = v['layer_0'] if k=='unnamed' else sd['conv1.0.weight'] if 'conv1.0.weight' in sd else sd['conv1.weight']
        assert model.fc.out_features==1000 and torch.equal(next(model.parameters()), want)
    torch.save(sd, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='has no classifier of the size of that of `'): load_weights(timm.create_model('test_resnet'), tmp_path/'w.pth')
