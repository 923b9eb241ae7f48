"""Class activation maps of a vision transformer that reads its class token: which rule finds the evidence of drawn birds?

    python benchmarks/token_maps.py

A small transformer is trained on drawn birds of eight species, once with a class token and once with the mean of its tokens. SnapMix
then weighs the labels of mixed training images by maps that are made in several ways, and `label_noise` measures how far each
weight is from what the image shows of the parts that tell the two species apart."""
from fastai.vision.all import *
from timm.layers import HybridEmbed
from torch.utils.data import TensorDataset
from fastcore.script import call_parse
from cekd_fastai.all import *
from cekd_fastai.core import eval_mode
from cekd_fastai.drawing.dataset import make_birds
from common import here,write_result

def stem(c=32):
    "Three convolutions that make the 8 x 8 tokens; without them a transformer learns nothing from so few pictures"
    def conv(a, b): return [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*conv(3, c//2), *conv(c//2, c), *conv(c, c))

def small(): return dict(img_size=64, patch_size=1, embed_dim=64, depth=4, num_heads=4, embed_layer=partial(HybridEmbed, backbone=stem()))

def class_attention(block, x, front=1):
    "Attention of the class token to each place in a block, the mean over its heads, from the tokens that enter the block"
    attn,b = block.attn,len(x)
    qkv = attn.qkv(block.norm1(x)).reshape(b, x.shape[1], 3, attn.num_heads, -1).permute(2,0,3,1,4)
    q,k,_ = qkv.unbind(0)
    q,k = attn.q_norm(q),attn.k_norm(k)
    res = (q[:,:,:1]*attn.scale @ k.transpose(-2,-1)).softmax(-1)
    return res.mean(1)[:,0,front:]

class ByHead(SnapMix):
    "SnapMix by what the head says of each place, without attention"
    @torch.no_grad()
    def maps(self, x, y):
        net = self.learn.model
        with eval_mode(net): return net.cam(net.branch_forward(x)[1], y)

class ByAttention(ByHead):
    "SnapMix by the attention of the class token in the last block alone, computed the long way"
    @torch.no_grad()
    def maps(self, x, y):
        net,seen = self.learn.model,[]
        block = [m for m in net.branches[0].modules() if type(m).__name__=='Block'][-1]
        hook = block.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        heads = super().maps(x, y)
        hook.remove()
        with eval_mode(net): return class_attention(block, seen[-1]).view_as(heads)

def table(rows):
    lines = ['| reads | accuracy % | map | error | of half and half |','|---|---|---|---|---|']
    lines += [f"| {r['pool']} | {100*r['accuracy']:.0f} | {r['method']} | {r['error']:.3f} | {r['half']:.3f} |" for r in rows]
    return '\n'.join(lines)

def in_memory(dls):
    "Loaders of the same pictures as tensors, as validation sees them, and half of the training pictures mirrored"
    def all_of(dl):
        plain = dls.test_dl(list(dl.dataset.items), with_labels=True, num_workers=0)
        return [torch.cat([o.as_subclass(Tensor).cpu() for o in b]) for b in zip(*plain)]
    train,valid = [TensorDataset(*all_of(dl)) for dl in dls.loaders]
    res = DataLoaders(DataLoader(train, bs=32, shuffle=True, drop_last=True), DataLoader(valid, bs=64))
    res.c,res.vocab = len(dls.vocab),dls.vocab
    return res

class Mirror(Callback):
    "Mirror half of the training pictures"
    def before_batch(self):
        if not self.training: return
        flip = torch.rand(len(self.x), 1, 1, 1)<.5
        self.learn.xb = (torch.where(flip, self.x.flip(-1), self.x),)

@call_parse
def main(
    epochs:int=16,  # Of training, without a mix
    images:int=150, # Training images of each species
    rounds:int=4,   # Times that each image is mixed
    species:int=8,  # How many
    seed:int=42,    # Of everything
):
    "Train, measure, and write benchmarks/results/token_maps.json"
    defaults.use_cuda = False
    path = make_birds(here.parent/'runs'/f'token_birds_{species}_{images}', n_species=species, n_images=images+30, n_train=images, size=64, n_workers=0, progress=False)
    rows = []
    for pool in ('token','avg'):
        set_seed(seed)
        dls = fine_grained_dls(path, size=64, bs=64, num_workers=0, in_memory=True)
        args = dict(arch_args=small() | dict(global_pool=pool), cbs=Mirror(), loss_func=CrossEntropyLossFlat(), metrics=accuracy)
        learn = branch_learner(in_memory(dls), 'vit_tiny_patch16_224', 1, pretrained=False, **args)
        with learn.no_bar(): learn.fit_one_cycle(epochs, 1e-3)
        acc = learn.validate()[1]
        mixes = {'CutMix: area':CutMix(5.), 'head on each place':ByHead(5.)}
        if pool=='token': mixes |= {'attention of the class token':ByAttention(5.), 'attention x head':SnapMix(5.)} # the last is the library's own rule
        noise = label_noise(mixes, dls, learn=learn, rounds=rounds)
        name = dict(token='class token', avg='mean of the tokens')[pool]
        rows += [dict(pool=name, accuracy=acc, **r) for r in noise.reset_index().to_dict('records')]
        print(table(rows), flush=True)
    title = f'Error of the label weights with maps of a small vision transformer, {species} drawn species, 64 px'
    command = f'python benchmarks/token_maps.py --epochs {epochs} --images {images}'
    write_result('token_maps', title, command, rows, table(rows))
