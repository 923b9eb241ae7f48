"One network of each kind that is no chain: same logits, private stages, maps, a training step. `benchmarks/families.py` tries all families."
import pickle
import pytest,torch
from fastai.vision.all import CrossEntropyLossFlat,DataLoader,DataLoaders,Callback
from torch import nn
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.cait import Cait
from timm.models.mvitv2 import MultiScaleVit,MultiScaleVitCfg
from timm.models.convmixer import ConvMixer
from timm.models.deit import VisionTransformerDistilled
from cekd_fastai.branches import branch_net,branch_splitter,load_net,save_net
from cekd_fastai.cam import from_map,map_kind,model_cam,to_map
from cekd_fastai.cekd import CEKD
from cekd_fastai.css.branches import css_branch_net
from cekd_fastai.graph import divide,trace
from cekd_fastai.compiled import GradCheckpoint
from cekd_fastai.learner import branch_learner
from cekd_fastai.midlevel import mid_net
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.online.net import gate_net

small = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5)
KINDS = dict( # a function that builds each, and the places of its last map
    class_token=lambda: VisionTransformer(**small),
    mean_of_tokens=lambda: VisionTransformer(**small, global_pool='avg', class_token=False),
    registers=lambda: VisionTransformer(**small, reg_tokens=4),
    attention_pool=lambda: VisionTransformer(**small, global_pool='map', class_token=False),
    two_heads=lambda: VisionTransformerDistilled(**small),
    relative_positions=lambda: VisionTransformerRelPos(**small),
    shared_positions=lambda: Beit(**small, use_shared_rel_pos_bias=True),
    rotary=lambda: Eva(**small, use_rot_pos_emb=True),
    class_token_late=lambda: Cait(**small),
    passes_sizes=lambda: MultiScaleVit(MultiScaleVitCfg(depths=(1,1,2,1), embed_dim=16, num_heads=1), img_size=64, num_classes=5),
    channels_last=lambda: SwinTransformer(img_size=64, patch_size=4, embed_dim=16, depths=(1,1,2), num_heads=(1,1,1), window_size=4, num_classes=5),
    residuals=lambda: ConvMixer(16, 4, kernel_size=3, patch_size=8, num_classes=5))

def images(model): return torch.randn(2, 3, *([64]*2 if hasattr(model, 'stages') or hasattr(model, 'layers') else [32]*2))

def make(kind):
    torch.manual_seed(0)
    model = KINDS[kind]()
    model.default_cfg = dict(input_size=(3,*images(model).shape[-2:]))
    return model.eval()

@pytest.mark.parametrize('kind', KINDS)
def test_parts_make_the_whole(kind):
    "Trunk, stage and head compute what the network computes, wherever it is split, and after pickling"
    model = make(kind)
    x = images(model)
    want = model(x)
    names = [k for k,_ in model.named_modules() if k.count('.')==1 and k.split('.')[0] in ('blocks','stages','layers')]
    for split in (None, 'head', names[len(names)//2-1]):
        trunk,stage,head = divide(model, kind, split)
        torch.testing.assert_close(head.eval()(stage(trunk(x))), want, atol=1e-4, rtol=1e-3)
    trunk = pickle.loads(pickle.dumps(trunk))
    torch.testing.assert_close(head(stage(trunk(x))), want, atol=1e-4, rtol=1e-3)

class Gradients(Callback):
    def after_backward(self):
        self.bad = [n for n,p in self.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        self.value = self.learn.loss_grad.item()

def step(model, x, *cbs):
    dl = DataLoader(list(zip(torch.cat([x,x.flip(-1)]), torch.tensor([0,1,2,0]))), bs=4)
    dls = DataLoaders(dl, dl)
    dls.c,seen = 3,Gradients()
    torch.manual_seed(0)
    learn = branch_learner(dls, model, cbs=[SnapMix(),CEKD(),seen,*cbs], loss_func=CrossEntropyLossFlat())
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-3)
    return learn.model,seen

@pytest.mark.parametrize('kind', KINDS)
def test_training_step(kind):
    "SnapMix and CEKD: a finite gradient everywhere; private stages are copies; maps of the picture's aspect"
    model = make(kind)
    x = images(model)
    net = branch_net(model, 3, 2)
    a,b = [list(o.parameters()) for o in net.branches]
    ids = [id(p) for o in (net.trunk,*net.branches) for p in o.parameters()]
    assert len(ids)==len(set(ids)) and a and all(torch.equal(p, q) for p,q in zip(a, b))
    assert sum(len(o) for o in branch_splitter(net))==len(list(net.parameters()))
    maps = model_cam(net, x, torch.tensor([0,1]))
    assert maps.shape[1]==maps.shape[2]>1 and maps.std((1,2)).min()>0
    _,seen = step(model, x)
    assert seen.bad==[] and seen.value<100

def test_checkpointed_trunk():
    "Computing the trunk again gives the same step, also where two tensors pass between trunk and stage"
    losses = [step(make('rotary'), torch.ones(2,3,32,32), *cbs)[1].value for cbs in ([], [GradCheckpoint()])]
    assert losses[0]==pytest.approx(losses[1], rel=1e-5)

def test_channels_last_memory():
    "The layout in memory does not change the answer"
    for kind in ('class_token','channels_last'):
        net = branch_net(make(kind), 3, 2).eval()
        x = images(make(kind))
        want = net(x)
        last = dict(memory_format=torch.channels_last)
        torch.testing.assert_close(net.to(**last)(x.to(**last)), want, atol=1e-5, rtol=1e-4)

def test_file(tmp_path):
    "A file of a transformer comes back as it was"
    net = branch_net('test_vit', 3, pretrained=False).eval()
    save_net(net, tmp_path/'net.pt')
    x = torch.randn(1,3,160,160)
    assert torch.equal(load_net(tmp_path/'net.pt')[0](x), net(x))

@pytest.mark.parametrize('shape,h,w,kind', [((2,197,8),224,224,1), ((2,49,8),224,224,0), ((2,201,8),224,224,5), ((2,26,8),32,96,None),
    ((2,7,7,8),224,224,'NHWC'), ((2,8,7,7),224,224,'NCHW'), ((2,13,8),32,96,1), ((2,8),32,32,None)])
def test_layout(shape, h, w, kind):
    "What lies over the picture is recognised, and comes back from the map"
    o = torch.randn(shape)
    assert map_kind(o, h, w)==kind
    if kind is None: return
    laid = to_map(o, kind, h, w)
    assert laid.shape[2]*w==laid.shape[3]*h
    torch.testing.assert_close(from_map(laid, kind), o)

def test_places_follow_the_picture():
    "A change of one corner of the picture changes that corner of the map most"
    for kind in ('class_token','channels_last','passes_sizes'):
        model = make(kind)
        x = images(model)
        y = x.clone()
        y[:,:,-16:,:16] += 3
        trunk,stage,_ = divide(model, kind)
        change = (stage(trunk(y))-stage(trunk(x)))[:,:16].abs().mean((0,1))
        h,w = change.shape
        assert change.flatten().argmax().item() in [i*w+j for i in range(h//2, h) for j in range(w//2)]

def test_refusals():
    "What cannot be split says why, and names networks that can"
    with pytest.raises(ValueError, match="cannot be split.*'convnext_tiny'"): branch_net('crossvit_tiny_240', 3, pretrained=False)
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)
        def forward_features(self, x): return x.mean((2,3))
        def forward_head(self, x): return self.fc(x)
        def forward(self, x): return self.forward_head(self.forward_features(x))
    with pytest.raises(ValueError, match='no map of places'): branch_net(Odd(), 3)

def test_only_what_is_needed():
    "The head keeps its own modules and no others"
    head = trace(make('class_token'), 'forward_head')
    assert {k.split('.')[0] for k,_ in head.named_parameters()}=={'head'}

def test_several_things_passed_on():
    "A trunk that passes tokens with their sizes: what reads last maps works, what reads the shared map says that it cannot"
    x = torch.randn(2, 3, 64, 64)
    for gate in ('mean','leader'):
        net = gate_net(make('passes_sizes'), 5, 3, gate=gate)
        assert net.eval()(x).shape==(2,5)
    for gate in ('one','fau'):
        with pytest.raises(ValueError, match=f"The gate '{gate}' reads one map of the trunk, .* passes several things"): gate_net(make('passes_sizes'), 5, 3, gate=gate)
    with pytest.raises(ValueError, match='A mid-level classifier reads one map'): mid_net(make('passes_sizes'), 5)
    for transform in ('corner','permute'):
        with pytest.raises(ValueError, match=f"The transform '{transform}' reads one map"): css_branch_net(make('passes_sizes'), 5, transform=transform)
    assert css_branch_net(make('passes_sizes'), 5, transform=None).eval()(x).shape==(2,5)
