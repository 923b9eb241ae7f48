"""What `birds.py` trains: photographs that live on the device, a distillation of its own, and one run.

The loader says in `rows` which rows of the training data its batch holds, where the library's soft labels look for them."""
import json,math,random,time
from pathlib import Path
import numpy as np,torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Callback,CancelFitException,CancelValidException,DataLoaders,OptimWrapper,partial,set_seed
from cekd_fastai.all import branch_learner,branch_preds,branch_accuracy,ece,mixed_loss
from cekd_fastai.core import HalfPrecision
from cekd_fastai.losses import soft_probs
from cekd_fastai.all import kd_loss,Distill,CEKD,MixUp,CutMix,SnapMix
from cekd_fastai.soft_labels import OnlineLabelSmoothing
from cekd_fastai.own_targets import PSKD,StoredTargets
from folded import fold_norms
from goes_on import GoesOn,folder_of
from graphed import fit_graphed
from variants import Annealed,ClassMeans,LastThird,Neighbours,StoredForAll,TwoMixes,WholePictures

# Names and forms of the library that other versions of it may change
MIXES = dict(MixUp=MixUp, CutMix=CutMix, SnapMix=SnapMix, Neighbours=Neighbours)
def clean_logits(owner): return None if getattr(owner, 'clean', None) is None else owner.clean.logits

# Photographs on the device

class BirdLoader:
    "Batches of photographs that live on the device; with a seed, shuffled, cropped and flipped, for all methods alike"
    n_inp = 1
    def __init__(self, ims, y, c, seed=None, last=False, pairs=False):
        self.ims,self.y,self.c,self.seed,self.last,self.pairs = ims,y,c,seed,last,pairs
        self.n,self.bs,self.epoch,self.rows = len(y),c['bs'] if seed is not None else 4*c['bs'],0,None
        self.device,self.rng = ims.device,random.Random(0) # nothing is drawn from it, but stored answers and checkpoints look for it

    def __len__(self): return self.n//self.bs if self.seed is not None and self.n>=self.bs else -(-self.n//self.bs)
    def to(self, device): return self
    def one_batch(self): return next(iter(self))

    def draw(self):
        "Order of the images, and the crop of each as a matrix for `affine_grid`, for the next epoch"
        c,n = self.c,self.n
        g = torch.Generator().manual_seed(1000*self.seed+self.epoch)
        self.epoch += 1
        area = torch.empty(n).uniform_(*c['crop'], generator=g)
        ratio = torch.empty(n).uniform_(*np.log(c['ratio']).tolist(), generator=g).exp()
        w,h = (area*ratio).sqrt().clamp(max=1),(area/ratio).sqrt().clamp(max=1)
        x,y = ((2*torch.rand(n, generator=g)-1)*(1-o) for o in (w,h))
        flip = torch.where(torch.rand(n, generator=g)<.5, -1., 1.)
        z = torch.zeros(n)
        order = torch.randperm(n, generator=g)
        if self.pairs: order = by_pairs(order, self.y, g)
        return order,torch.stack([w*flip,z,x, z,h,y], 1).view(n, 2, 3)

    def still(self):
        "All images in their order, with the crop in the middle"
        s = self.c['test_crop']
        return torch.arange(self.n),torch.tensor([[s,0,0],[0,s,0]]).expand(self.n, 2, 3)

    def crops(self, rows, theta):
        size = self.c['size']
        x = self.ims[rows].float()
        grid = F.affine_grid(theta, (len(rows),3,size,size), align_corners=False)
        x = F.grid_sample(x, grid, mode='bilinear', padding_mode='reflection', align_corners=False)/127.5-1
        return x.contiguous(memory_format=torch.channels_last) if self.last else x

    def __iter__(self):
        rows,theta = (o.to(self.device) for o in (self.still() if self.seed is None else self.draw()))
        for i in range(len(self)):
            part = slice(i*self.bs, (i+1)*self.bs)
            self.rows = rows[part]
            yield self.crops(self.rows, theta[part]),self.y[self.rows]

def by_pairs(order, y, g):
    "The same rows, two of one class side by side; where a class has an odd number, its last one stands beside another class"
    order = order[y[order].argsort(stable=True)]
    label = y[order]
    place = torch.arange(len(order))-torch.searchsorted(label, label) # within its class
    single = (place%2==0) & ~torch.cat([label[1:]==label[:-1],label.new_zeros(1, dtype=torch.bool)])
    paired = order[~single].view(-1, 2)
    paired = paired[torch.randperm(len(paired), generator=g)].flatten()
    return torch.cat([paired,order[single]])

def split(label, test, held_out, seed, pct):
    "Rows to train and to test on: the official parts, or for choosing a share of each class of train held out"
    train,rest = np.flatnonzero(~test),np.flatnonzero(test)
    if not held_out: return train,rest
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(train[label[train]==k]) for k in np.unique(label)]
    cut = [round(len(o)*pct) for o in groups]
    parts = [o[n:] for o,n in zip(groups, cut)],[o[:n] for o,n in zip(groups, cut)]
    return tuple(np.sort(np.concatenate(o)) for o in parts)

# A distillation

class MixSKDLogits(Distill):
    "The part of MixSKD that needs no further branches: mixed logits and the logits of what was mixed teach each other"
    needs_clean = True
    def __init__(self, T=3.): self.T = T
    def part_names(self): return ['ce_mix','ce_clean','mutual']
    def losses(self):
        lf,y,rec,z = self.learn.loss_func,self.learn.yb[0],self.record,self.logits.float()
        if rec is None: return dict(ce_mix=z.new_zeros(()), ce_clean=sum(lf(o, y) for o in z), mutual=z.new_zeros(()))
        clean = clean_logits(self).float()
        lam = rec.lam_a[:,None]
        both = lam*clean + (1-lam)*clean[:,rec.perm]
        pair = lambda a,b: kd_loss(a, soft_probs(b.detach(), self.T), self.T)
        mutual = sum(pair(a, b)+pair(b, a) for a,b in zip(z, both))
        hard = sum(mixed_loss(lf, o, y, rec) for o in z)
        return dict(ce_mix=hard, ce_clean=sum(lf(o, y) for o in clean), mutual=mutual)

METHODS = dict(online=OnlineLabelSmoothing, progressive=PSKD, stored=partial(StoredTargets, weight=1.), stored_for_all=partial(StoredForAll, weight=1.),
    mixskd=MixSKDLogits, two_mixes=TwoMixes)
FORMS = dict(cekd=CEKD, class_means=ClassMeans, last_third=LastThird, annealed=Annealed, whole_pictures=WholePictures) # of CEKD

# One run

class Lean(Callback):
    "No validation between epochs, and an end when the time is up"
    order,late = -100,False
    def __init__(self, deadline): self.deadline = deadline
    def before_validate(self): raise CancelValidException
    def before_epoch(self):
        if time.time()<=self.deadline: return
        self.late = True
        raise CancelFitException

def callbacks(j, c):
    "Mix and method of a job"
    mix = c['mixes'].get(j['mix'])
    res = [MIXES[mix['mix']](mix['alpha'], mix['prob'])] if mix else []
    joint = bool(mix) and mix['mix'] in ('MixUp','CutMix') # with frozen statistics the same step in fewer calls
    for i,o in enumerate(j['methods']):
        args = j['args'] if i==0 else {}
        res.append(FORMS[o](**args, joint=joint) if o in FORMS else METHODS[o](**args))
    return res

class Bench:
    "Pictures and weights on one device, and what can be done with them"
    def __init__(self, bundle, pixels, label, test, c, device):
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = False
        torch.set_float32_matmul_precision('high') # TF32 in products and convolutions alike
        torch.backends.cudnn.allow_tf32 = True
        self.c,self.device,self.weights = c,torch.device(device),bundle/c['weights']
        self.label,self.test,self.layout = label,test,c['layouts'][0]
        self.ims = torch.from_numpy(np.load(pixels)).to(self.device)
        self.y = torch.from_numpy(label).long().to(self.device)
        file = Path(bundle)/f"graphed_{c['name']}.json"
        checked = json.loads(file.read_text()) if file.exists() else {}
        self.graphed = {k for k,o in checked.items() if o['ok']}

    def loaders(self, j):
        tr,te = split(self.label, self.test, j['stage']=='select', j['seed'], self.c['valid_pct'])
        last,pairs = self.layout=='channels_last',self.c['mixes'].get(j['mix'], {}).get('pairs', False)
        def at(rows, seed=None):
            rows = torch.from_numpy(rows).to(self.device)
            return BirdLoader(self.ims[rows], self.y[rows], self.c, seed, last, pairs and seed is not None)
        dls = DataLoaders(at(tr, j['seed']), at(te), device=self.device)
        dls.c = int(self.label.max())+1
        return dls,at(tr)

    def learner(self, j, dls):
        "The learner of a job, without what waits for the device in each step"
        set_seed(j['seed'])
        opt = partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=self.c['wd'], fused=self.device.type=='cuda')
        loss = nn.CrossEntropyLoss(label_smoothing=j['smoothing'])
        learn = branch_learner(dls, self.c['arch'], j['branches'], pretrained=False, weights=self.weights, freeze_bn=True,
            loss_func=loss, opt_func=opt, cbs=callbacks(j, self.c))
        if self.device.type=='cpu' or self.c.get('folded'): fold_norms(learn.model)
        dls.train.epoch = self.c.get('first_epoch', 0) # whatever was looked at on the way: the same crops for all
        return self.set_up(learn)

    def set_up(self, learn, half=True):
        "Put a learner on the device, and take away what waits for it; in half precision if that was asked for"
        learn.remove_cb(learn.recorder)
        if half and self.c.get('precision')=='bf16': learn.add_cb(HalfPrecision())
        learn.model.to(self.device)
        if self.layout=='channels_last': learn.model.to(memory_format=torch.channels_last)
        return learn

    def fit(self, learn, epochs, lr, head_lr, cbs):
        "`lr` for all groups of parameters but the last, which learns `head_lr` times as fast"
        rates = [lr]*(len(learn.splitter(learn.model))-1)+[lr*head_lr]
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, rates, cbs=cbs)

    def fit_job(self, learn, j, cbs): self.fit(learn, j['epochs'], j['lr'], self.c['head_lr'], cbs)

    def run(self, j, deadline):
        "Train and test; what a row says about it, or None when the time was up"
        start = time.time()
        dls,seen = self.loaders(j)
        return self.trained(j, self.learner(j, dls), dls, seen, start, deadline)

    def trained(self, j, learn, dls, seen, start, deadline):
        "Train a learner, to go on another time where that is wanted, and measure it"
        kept = GoesOn(folder_of(self.c, j), self.c['commit'], self.c.get('first_epoch', 0)) if self.c.get('keep') else None
        ends = [Lean(math.inf),kept] if kept else [Lean(deadline)]
        self.train(j, learn, partial(self.fit_job, learn, j, ends))
        if ends[0].late: return None
        if not kept: return self.measured(j, learn, dls, seen, start)
        return self.measured(j, learn, dls, seen, start-kept.spent) | kept.said()

    def train(self, j, learn, fit):
        "Call `fit`, by CUDA graphs where `graph_check.py` has found that it comes to the same"
        if j['row'] in self.graphed: fit_graphed(learn, fit)
        else: fit()

    def measured(self, j, learn, dls, seen, start):
        "What a row says about a learner whose training began at `start`"
        if self.device.type=='cuda': torch.cuda.synchronize()
        seconds = time.time()-start
        z,each,y = branch_preds(learn, dls.valid)
        zt,_,yt = branch_preds(learn, seen)
        acc,train = branch_accuracy(z, each, y),(zt.argmax(1)==yt).float().mean().item()
        res = dict(accuracy=acc['ensemble'], ece=ece(z, y), loss=F.cross_entropy(z, y).item(), train_accuracy=train)
        if hasattr(learn.model, 'by_network'):
            res |= {f'accuracy_{k}':(o.argmax(1)==y).float().mean().item() for k,o in learn.model.by_network(each).items()}
        res = {k:round(v, 5) for k,v in res.items()} | ({'graphed':True} if j['row'] in self.graphed else {})
        return res | dict(each=[round(o, 5) for o in acc['branches']], images=len(y),
            train_images=len(yt), seconds=round(seconds, 1))

    def speed(self, layout, begin, seconds):
        "Images a second of plain training on two branches in this process, for some seconds from the time `begin`"
        self.layout = layout
        j = dict(stage='final', seed=0, branches=2, mix=None, methods=[], args={}, smoothing=0., lr=1e-5, epochs=1000)
        dls,_ = self.loaders(j)
        clock = Clock(begin, seconds, self.device)
        self.fit_job(self.learner(j, dls), j, [clock])
        return clock.rate

class Clock(Callback):
    "Count images for some seconds from a point in time, or from when the first step is over, then end the run"
    rate,steps,last = 0.,0,None
    def __init__(self, begin, seconds, device): self.begin,self.seconds,self.device = begin,seconds,device
    def before_validate(self): raise CancelValidException
    def after_batch(self):
        self.steps += 1
        if self.device.type=='cuda':
            if self.steps%4: return
            torch.cuda.synchronize()
        now = time.time()
        if self.last is None:
            if now>self.begin: self.last,self.steps = now,0
        elif now-self.last>self.seconds:
            self.rate = self.steps*self.learn.dls.train.bs/(now-self.last)
            raise CancelFitException
