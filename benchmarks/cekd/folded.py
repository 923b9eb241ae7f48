"""Frozen batch normalisation within the convolution before it: $\\gamma(w*x-\\mu)/\\sigma+\\beta = (w\\gamma/\\sigma)*x + \\beta-\\mu\\gamma/\\sigma$.

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
        conv = Narrow.apply if x.device.type=='cpu' and is_wide_depthwise(self) else F.conv2d
        return conv(x, self.weight*scale[:,None,None,None], bias, self.stride, pad, self.dilation, self.groups)

def is_wide_depthwise(m):
    "Whether a convolution has one filter of 5 times 5 for each channel"
    return m.kernel_size==(5,5) and m.dilation==(1,1) and m.groups==m.in_channels==m.out_channels

class Narrow(torch.autograd.Function):
    """A depthwise convolution of 5 times 5 whose weights learn from two of 5 times 3: columns 0 to 2, then 2 to 4

    Processors have no fast kernel for the gradient of wider ones."""
    @staticmethod
    def forward(ctx, x, w, bias, stride, pad, *more):
        ctx.save_for_backward(x, w)
        ctx.stride,ctx.pad = [*stride],[pad,pad] if isinstance(pad, int) else [*pad]
        return F.conv2d(x, w, bias, stride, pad, *more)

    @staticmethod
    def backward(ctx, grad):
        (x,w),(down,across) = ctx.saved_tensors,ctx.pad
        dx = grads(grad, x, w, ctx.stride, ctx.pad, True)[0] if ctx.needs_input_grad[0] else None
        if x.shape[2]<5: x,down = F.pad(x, (0,0,down,down)),0 # nor one for filters higher than the map
        x,n,dw = F.pad(x, (across,across)),(grad.shape[3]-1)*ctx.stride[1]+3,torch.empty_like(w)
        for i in (0,2):
            cols = x[...,i:i+n].contiguous(memory_format=torch.channels_last)
            dw[...,i:i+3] = grads(grad, cols, w[...,:3], ctx.stride, [down,0], False)[1]
        return dx,dw,grad.sum((0,2,3)),*[None]*4

def grads(grad, x, w, stride, pad, of_x):
    "Gradients of a depthwise convolution, either of `x` or of `w`"
    return torch.ops.aten.convolution_backward(grad, x, w, None, stride, pad, [1,1], False, [0,0], len(w), [of_x,not of_x,False])

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
