"""Frozen batch normalisation within the convolution before it, on processors: $\\gamma(w*x-\\mu)/\\sigma+\\beta = (w\\gamma/\\sigma)*x + \\beta-\\mu\\gamma/\\sigma$.

The same function of the same parameters, so the gradients are the same too but for rounding, and a step passes over its maps fewer times."""
import torch,torch.nn.functional as F
from torch import nn
from timm.layers import BatchNormAct2d,Conv2dSame
from timm.layers.padding import pad_same

class Folded:
    "A convolution that its frozen norm is a part of"
    def forward(self, x):
        norm, = self.norm # in a tuple, so that it is not a part twice
        scale = norm.weight*(norm.running_var+norm.eps).rsqrt()
        bias,pad = norm.bias-norm.running_mean*scale,self.padding
        if isinstance(self, Conv2dSame): x,pad = pad_same(x, self.kernel_size, self.stride, self.dilation),0
        return F.conv2d(x, self.weight*scale[:,None,None,None], bias, self.stride, pad, self.dilation, self.groups)

class ClipAt6(torch.autograd.Function):
    "`relu6` in place, which keeps its result and no copy of its input"
    @staticmethod
    def forward(ctx, x):
        x.clamp_(0, 6)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad): return torch.ops.aten.hardtanh_backward(grad, *ctx.saved_tensors, 0, 6)

class ActivationOnly:
    "What is left of a norm that has been folded"
    def forward(self, x): return ClipAt6.apply(x) if isinstance(self.act, nn.ReLU6) else self.act(x)

def pairs(model):
    "Each convolution without a bias with the norm after it, in the order of their names, as timm's networks call them"
    last = None
    for m in model.modules():
        if isinstance(m, nn.Conv2d): last = m
        elif isinstance(m, BatchNormAct2d):
            if last is not None and last.bias is None and last.out_channels==m.num_features: yield last,m
            last = None

def fold_norms(model):
    "Fold every frozen norm of a timm network; how many there were"
    n = 0
    for conv,norm in list(pairs(model)):
        conv.norm = (norm,)
        conv.__class__ = type('FoldedConv', (Folded,type(conv)), {})
        norm.__class__ = type('FoldedNorm', (ActivationOnly,type(norm)), {})
        n += 1
    return n
