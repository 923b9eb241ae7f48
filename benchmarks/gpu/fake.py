"""A GPU that knows shapes only: tensors on `cuda` on a machine that has none, where whatever waits for the device raises.

torch's fake tensors know device, type and shape. Mixing devices raises with them as on a GPU. What on a GPU makes the
program wait (reading a number, a size that depends on values, a blocking copy) raises `Waits` here. Tensors on the CPU
stay real, so boxes and coins are drawn as ever.

There is no backward pass, because torch's engine asks the driver for streams: `torch.autograd.grad` gives zeros."""
from contextlib import ExitStack
from unittest.mock import patch
import torch
from torch import nn,Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException,DynamicOutputShapeException,FakeTensor,FakeTensorMode,unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves,tree_map_only
from cases import begin,make_kit,noop,set_seed

class Waits(RuntimeError):
    "A step needs a value that is on the device, and so waits for it"

aten = torch.ops.aten
indexing = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)

def _on_gpu(t): return t.device.type=='cuda'

def _blocks(func, args, kwargs):
    "Whether an operation copies between the CPU and the device and waits until that is done"
    if func is aten._to_copy.default:
        to = torch.device(kwargs.get('device') or args[0].device)
        if to.type==args[0].device.type: return False
        return _on_gpu(args[0]) or not kwargs.get('non_blocking', False)
    if func is aten.copy_.default:
        to,t = args[:2]
        if to.device.type==t.device.type: return False
        free = args[2] if len(args)>2 else kwargs.get('non_blocking', False)
        return _on_gpu(t) or not free
    return func in indexing and _on_gpu(args[0]) and any(isinstance(o, Tensor) and not _on_gpu(o) for o in args[1])

def hidden(module):
    "Modules that a module keeps without being their parent, as an adversary its discriminators"
    held = getattr(module, 'held', None)
    return list(held[0].modules()) if held else []

class FakeGPU(TorchDispatchMode):
    "Whatever touches `cuda` is computed with fake tensors, everything else as it is"
    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.watching = False

    def __enter__(self):
        self.stack = ExitStack()
        self.stack.enter_context(self.fake) # below this mode: torch then leaves the driver alone
        self.stack.enter_context(patch.object(nn.Module, 'to', lambda m, *args, **kwargs: self.move(m)))
        self.stack.enter_context(patch.object(Tensor, 'pin_memory', lambda t: t))
        as_subclass = Tensor.as_subclass # a fake tensor is of one class only
        self.stack.enter_context(patch.object(Tensor, 'as_subclass', lambda t,cls: t if isinstance(t, FakeTensor) else as_subclass(t, cls)))
        self.stack.enter_context(patch.object(Tensor, 'backward', lambda t: None))
        self.stack.enter_context(patch.object(torch.autograd, 'grad', self.grad))
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.stack.close()

    def move(self, module):
        "Give a module fake tensors in place of its own, as a fake tensor cannot be the data of a real one"
        new = {}
        for m in [*module.modules(), *(o for m in module.modules() for o in hidden(m))]:
            for tensors in (m._parameters,m._buffers):
                for k,t in tensors.items():
                    if t is None or isinstance(t, FakeTensor): continue
                    if id(t) not in new: new[id(t)] = t,self.fresh(t)
                    tensors[k] = new[id(t)][1]
            for group in getattr(getattr(m, 'opt', None), 'param_groups', ()):
                group['params'] = [new[id(p)][1] if id(p) in new else p for p in group['params']]
        return module

    def fresh(self, t):
        "A tensor like `t` on the device"
        res = torch.empty(t.shape, dtype=t.dtype, device='cuda')
        return nn.Parameter(res, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else res

    def grad(self, outputs, inputs, *args, **kwargs):
        "A zero gradient for each input"
        return tuple(torch.zeros_like(o) for o in ([inputs] if isinstance(inputs, Tensor) else inputs))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get('device')
        to_gpu = device is not None and torch.device(device).type=='cuda'
        if not to_gpu and not any(isinstance(o, FakeTensor) for o in tree_leaves((args, kwargs))):
            with unset_fake_temporarily(): return func(*args, **kwargs)
        if self.watching and _blocks(func, args, kwargs): raise Waits(f'`{func}` copies between the CPU and the device, and waits for it')
        put = lambda t: t if isinstance(t, FakeTensor) else self.fake.from_tensor(t)
        if to_gpu: args,kwargs = tree_map_only(Tensor, put, (args, kwargs))
        try: return func(*args, **kwargs)
        except (DataDependentOutputException,DynamicOutputShapeException) as e:
            raise Waits(f'`{func}` needs a value that is on the device, and waits for it') from e

def move_loss(
    gpu,       # Entered
    loss_func, # The task's loss; fastai wraps some in another
):
    "Put the class weights of a loss on the device, as one who trains there does"
    for f in (loss_func, getattr(loss_func, 'func', None)):
        if isinstance(getattr(f, 'weight', None), Tensor): f.weight = gpu.fresh(f.weight)

def fake_step(
    o,          # A `Case`
    loss=None,  # Another loss for its task
    n:int=1,    # Number of steps
):
    "Steps of a method on a GPU that knows shapes only; raises `Waits`, or what a GPU raises"
    set_seed(0)
    kit = make_kit('tiny', o)
    if loss is not None: kit.loss = loss
    learn,gpu = o.make(kit),FakeGPU()
    with gpu:
        learn.dls.to(torch.device('cuda'))
        move_loss(gpu, learn.loss_func)
        begin(learn)
        learn.opt.step = learn.opt.zero_grad = noop # fastai's part, which takes most of the time here
        for i,b in enumerate(kit.batches('cuda')[:n]):
            gpu.watching = True
            learn.one_batch(i, b)
            gpu.watching = False
    return learn
