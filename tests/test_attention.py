"Class activation maps of networks with a class token: attention of the last block times the head, in every kind of timm that has one"
import pytest,torch
from fastai.vision.all import CrossEntropyLossFlat,DataLoader,DataLoaders
from torch import nn
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.cait import Cait
from timm.models.convit import ConVit
from timm.models.deit import VisionTransformerDistilled
from timm.models.tnt import TNT
from timm.models.volo import VOLO
from timm.models.xcit import Xcit
from cekd_fastai.attention import class_attention,reads_class_token
from cekd_fastai.branches import branch_net
from cekd_fastai.cam import cam,model_cam
from cekd_fastai.cekd import CEKD
from cekd_fastai.compiled import heavy_parts
from cekd_fastai.compiled import GradCheckpoint
from cekd_fastai.learner import branch_learner
from cekd_fastai.mix.snapmix import SnapMix

small = dict(img_size=32, patch_size=8, embed_dim=24, depth=4, num_heads=2, num_classes=5)
def _but(o, k): return {a:b for a,b in o.items() if a!=k}

CLASS_TOKEN = dict( # a function that builds each
    vit=lambda: VisionTransformer(**small),
    registers=lambda: VisionTransformer(**small, reg_tokens=4),
    deit=lambda: VisionTransformerDistilled(**small),
    relpos=lambda: VisionTransformerRelPos(**small, class_token=True, global_pool='token'),
    beit=lambda: Beit(**small, use_shared_rel_pos_bias=True, global_pool='token'),
    eva=lambda: Eva(**small, use_rot_pos_emb=True, global_pool='token'),
    cait=lambda: Cait(**small),
    convit=lambda: ConVit(**small | dict(local_up_to_layer=2)),
    tnt=lambda: TNT(**_but(small, 'num_heads'), inner_dim=12, num_heads_inner=2, num_heads_outer=2),
    volo=lambda: VOLO(layers=(1,1,1,1), embed_dims=(16,24,24,24), num_heads=(2,2,2,2), img_size=32, patch_size=8, num_classes=5,
        stem_hidden_dim=8, use_aux_head=False, use_mix_token=False),
    xcit=lambda: Xcit(**small, cls_attn_layers=1))
MEAN = dict(mean=lambda: VisionTransformer(**small, global_pool='avg'), pooled=lambda: VisionTransformer(**small, global_pool='map', class_token=False))

def make(kind):
    torch.manual_seed(0)
    model = (CLASS_TOKEN|MEAN)[kind]()
    model.default_cfg = dict(input_size=(3,32,32))
    for m in model.modules(): # what is deeper than the first layer counts as well
        if isinstance(m, nn.Linear): nn.init.normal_(m.weight, 0, .2)
    return model.eval()

def images(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
y = torch.tensor([0,1])

def head_alone(net, x): return torch.stack([cam(h, f, y) for h,f in zip(net.heads, net.branch_forward(x)[1])]).mean(0)

@pytest.mark.parametrize('kind', CLASS_TOKEN)
@torch.no_grad()
def test_reads_attention(kind):
    "Attention times head in each branch; at the place that is attended to least, and scored lowest, there is least"
    net,x = branch_net(make(kind), 3, 2).eval(),images()
    with class_attention(net) as seen: feats = net.branch_forward(x)[1]
    assert all(reads_class_token(h, f) for h,f in zip(net.heads, feats))
    front,want = net.heads[0].takes[0],[]
    for h,f in zip(net.heads, feats):
        row,low = seen.of(h),cam(h, f, y)
        assert row.shape==(2,front+low[0].numel()) and row.min()>=0
        torch.testing.assert_close(row.sum(1), torch.ones(2), atol=1e-4, rtol=0)
        want.append(row[:,front:].view_as(low)*(low-low.amin((1,2), keepdim=True)))
    found = model_cam(net, x, y)
    torch.testing.assert_close(found, torch.stack(want).mean(0))
    assert not torch.allclose(found, head_alone(net, x))

@pytest.mark.parametrize('kind', MEAN)
@torch.no_grad()
def test_heads_that_read_places(kind):
    "A head that reads the patches keeps its own map"
    net,x = branch_net(make(kind), 3, 2).eval(),images()
    torch.testing.assert_close(model_cam(net, x, y), head_alone(net, x))

@torch.no_grad()
def test_fused_and_not():
    "The row is the same, whichever way timm computes attention, and it is the row of the weights"
    net,x = make('vit'),images()
    rows = []
    for fused in (True,False):
        for b in net.blocks: b.attn.fused_attn = fused
        with class_attention(net) as seen: net(x)
        rows.append(seen.of(None))
    torch.testing.assert_close(*rows)

@torch.no_grad()
def test_ways_to_run():
    "Autocast and channels last give nearly the same map; a split at the head reads the trunk's attention; compiled parts fall back on the head"
    net,x = branch_net(make('vit'), 3, 2).eval(),images()
    want = model_cam(net, x, y)
    with torch.autocast('cpu', torch.bfloat16): half = model_cam(net, x, y)
    assert torch.corrcoef(torch.stack([half.float().flatten(),want.flatten()]))[0,1]>.98
    last = dict(memory_format=torch.channels_last)
    torch.testing.assert_close(model_cam(net.to(**last), x.to(**last), y), want, atol=1e-4, rtol=1e-3)
    at_head = branch_net(make('vit'), 3, 2, 'head').eval()
    assert not torch.allclose(model_cam(at_head, x, y), head_alone(at_head, x))
    for m in heavy_parts(net): m._compiled_call_impl = m._call_impl # as `m.compile` sets it, which takes seconds
    torch.testing.assert_close(model_cam(net, x, y), head_alone(net, x), atol=1e-5, rtol=1e-4)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

class Passes(nn.Module):
    def forward(self, x, **kwargs): return x

@torch.no_grad()
def test_plain_model():
    "A model without branches, and one whose attention has another form"
    model,x = make('vit'),images()
    with class_attention(model) as seen: feat = model.forward_features(x)
    low = model.head(model.fc_norm(feat[:,1:]))[...,0].view(2,4,4)
    want = seen.of(None)[:,1:].view(2,4,4)*(low-low.amin((1,2), keepdim=True))
    torch.testing.assert_close(model_cam(model, x, torch.tensor([0,0])), want)
    for b in model.blocks: b.attn = Passes()
    torch.testing.assert_close(model_cam(model, x, torch.tensor([0,0])), model.head(model.forward_features(x)[:,1:])[...,0].view(2,4,4))

def test_in_training(monkeypatch):
    "SnapMix in a step of CEKD reads the attention of the step's own clean pass, also with a trunk that is computed again"
    found,rule = [],SnapMix.maps
    def maps(self, x, y):
        res = rule(self, x, y)
        heads = [cam(h, f.detach(), y) for h,f in zip(self.learn.model.heads, self.lent_maps(x))] # the pass is kept
        found.append((res,torch.stack(heads).mean(0)))
        return res
    monkeypatch.setattr(SnapMix, 'maps', maps)
    for cbs in ([], [GradCheckpoint()]):
        dl = DataLoader(list(zip(torch.cat([images()]*2), torch.tensor([0,1,2,0]))), bs=4)
        dls = DataLoaders(dl, dl)
        dls.c = 3
        net = make('vit')
        torch.manual_seed(0)
        learn = branch_learner(dls, net, cbs=[SnapMix(),CEKD(),*cbs], loss_func=CrossEntropyLossFlat())
        with learn.no_bar(),learn.no_logging(): learn.fit(1, 0.)
    for res,heads in found: assert res.std((1,2)).min()>0 and not torch.allclose(res, heads.detach())
    torch.testing.assert_close(found[0][0], found[-1][0])
