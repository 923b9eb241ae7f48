"What the tests of CEKD, of its average and of its diagnostics share: toy networks, fixed mixes, and learners of a few steps."
import torch
from fastai.vision.all import Callback,CancelFitException,CrossEntropyLossFlat,DataLoaders,Learner,SGD,accuracy,nn,set_seed,tensor
from cekd_fastai.branches import BranchNet,PeerNet,branch_net,branch_splitter
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.mix.callback import Mix
from cekd_fastai.mix.core import MixRecord,mix_pixels

lf = CrossEntropyLossFlat()

class FixedMix(Mix):
    "The same pairs and weights in every batch, pairs inside each four"
    def mix(self, x, y):
        n = len(x)
        perm = torch.arange(n).view(-1,2).flip(1).flatten()
        la,lb = (tensor(o).repeat(n//4) for o in ([.7,.4,.6,.9],[.3,.5,.2,.4]))
        return torch.lerp(x[perm], x, la[:,None,None,None]), MixRecord(perm, la, lb)

class BoxMix(FixedMix):
    "The same pairs and weights, with one box in every batch"
    def mix(self, x, y):
        rec = super().mix(x, y)[1]
        rec.box_a = rec.box_b = (4,0,16,12)
        return mix_pixels(x, rec),rec

def tiny(n=2, n_out=3, bn=False, seed=0):
    "A branch network of three convolutions without batch norm, or the small residual one with"
    set_seed(seed)
    if bn: return branch_net('test_resnet', n_out, n, pretrained=False)
    trunk = nn.Sequential(nn.Conv2d(3,6,3,2,1), nn.Tanh())
    branches = [nn.Sequential(nn.Conv2d(6,8,3,2,1), nn.Tanh()) for _ in range(n)]
    return BranchNet(trunk, branches, [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, n_out)) for _ in range(n)])

def peers(n_out=3):
    a,b = tiny(1, n_out, seed=1),tiny(1, n_out, seed=2)
    b.trunk[0],b.branches[0][0] = nn.Conv2d(3,10,3,2,1),nn.Conv2d(10,8,3,2,1)
    return PeerNet([a,b])

class Items(list):
    def new_empty(self): return Items()

def toy_dls(n=8, bs=8, n_out=3, size=16):
    g = torch.Generator().manual_seed(3)
    items = Items(zip(torch.randn(n,3,size,size, generator=g), torch.randint(0,n_out,(n,), generator=g)))
    dls = DataLoaders.from_dsets(items, items, bs=bs, val_bs=bs, num_workers=0, device='cpu', shuffle=False, drop_last=False)
    dls.c = n_out
    return dls

def learner(net, *cbs, dls=None, **kw):
    dls = dls or toy_dls()
    return Learner(dls, net, loss_func=lf, opt_func=SGD, lr=.1, splitter=branch_splitter, metrics=accuracy, cbs=[BranchLoss(),Components(),*cbs], **kw)

def quiet(learn, n=1, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, **kw)
    return learn

class CatchStep(Callback):
    "The gradient of the first step, and the parts of its loss"
    order,run_valid = 100,False
    def after_backward(self):
        self.parts = {k:v.item() for o in self.learn.cbs if (p:=getattr(o, 'parts', None)) for k,v in p.items()}
        self.grads = {k:p.grad.clone() for k,p in self.learn.model.named_parameters() if p.grad is not None}
        raise CancelFitException

def first_step(net, *cbs, **kw):
    learn = learner(net, *cbs, **kw)
    quiet(learn, cbs=(g:=CatchStep()))
    return g

def flat(g): return torch.cat([o.flatten() for o in g.grads.values()])

class Raise(Callback):
    "Raise at an event of the second batch"
    order = 200
    def __init__(self, event, exc): self.event,self.exc,self.n = event,exc,0
    def __call__(self, name):
        if name==self.event and not self.done:
            self.n += 1
            if self.n==2 or name in ('before_validate','after_train'):
                self.done = True
                raise self.exc('stop')
    done = False
