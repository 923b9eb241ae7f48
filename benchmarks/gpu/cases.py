"Every mix and every method of the library, each as a learner in the middle of training, at a size that one chooses."
from dataclasses import dataclass,field
from fastai.vision.all import *
import names

SIZES = dict(tiny=dict(arch='cifar_resnet8', teachers=('cifar_resnet8','cifar_resnet14'), px=32, bs=8, c=6),
    small=dict(arch='cifar_resnet8', teachers=('cifar_resnet8','cifar_resnet14'), px=32, bs=64, c=20),
    big=dict(arch='resnet50', teachers=('resnet50','resnet34'), px=224, bs=64, c=200))
N_BATCHES = 3 # of an epoch

@dataclass
class Kit:
    "Data, networks and learners of one size"
    arch:str
    teachers:tuple
    px:int
    bs:int
    c:int
    device:str='cpu'
    loss:object=None       # The task loss, cross-entropy if None
    labels:str='class'     # 'class', or vectors: 'several' of 0 and 1, or 'soft'
    extra:list=field(default_factory=list) # Callbacks of every learner, e.g. mixed precision

    def __post_init__(self):
        gen = torch.Generator().manual_seed(0)
        n = self.bs*N_BATCHES
        self.x = torch.randn(n, 3, self.px, self.px, generator=gen)
        self.y = torch.randint(0, self.c, (n,), generator=gen)
        if self.labels=='soft': self.y = torch.rand(n, self.c, generator=gen).softmax(1)
        if self.labels=='several': self.y = (torch.rand(n, self.c, generator=gen)>.7).float()

    def batches(self, device=None):
        "The batches of an epoch, on the device"
        put = lambda o: o.to(device or self.device, non_blocking=True)
        return [(put(x),put(y)) for x,y in zip(self.x.split(self.bs), self.y.split(self.bs))]

    def dls(self):
        ds = L(zip(self.x, self.y))
        dls = DataLoaders.from_dsets(ds, ds, bs=self.bs, num_workers=0, device=torch.device(self.device))
        dls.c = self.c
        for dl in dls.loaders: dl._n_inp = 1 # or fastai takes a batch to see
        return dls

    def kw(self, cbs):
        return dict(pretrained=False, loss_func=self.loss or CrossEntropyLossFlat(), default_cbs=False,
            opt_func=partial(SGD, mom=.9), lr=.01, cbs=[*cbs,*self.extra])

    def branch(self, *cbs, n=2, arch=None): return names.branch_learner(self.dls(), arch or self.arch, n, **self.kw(cbs))
    def plain(self, *cbs):
        net = names.branch_net(self.arch, self.c, 1, pretrained=False)
        kw = self.kw(cbs)
        del kw['pretrained']
        return Learner(self.dls(), nn.Sequential(net.trunk, net.branches[0], net.heads[0]), **kw)
    def online(self, method, *cbs, n=None, gate=None):
        return names.online_learner(self.dls(), self.arch, method, n_branches=n, gate=gate, **self.kw(cbs))
    def css(self, *cbs, transform='corner', **kwargs):
        cbs = [names.CSS(**kwargs),*cbs]
        return names.css_learner(self.dls(), (self.arch,self.arch), transform=transform, **self.kw(cbs))
    def teacher_nets(self): return [names.branch_net(o, self.c, 1, pretrained=False).eval() for o in self.teachers]
    def meal(self, *cbs, n=1, **kwargs): return self.branch(names.call('MEAL', self.teacher_nets(), **kwargs), *cbs, n=n)

@dataclass
class Case:
    name:str
    make:object            # From a `Kit` to a `Learner`
    main:bool=False        # Also compared in half precision and timed
    kit:dict=field(default_factory=dict) # Of the `Kit`, where they differ
    real:bool=False        # Reads values when an epoch begins, so it needs a device that has some

CASES = {}
def case(name, make, **kwargs): CASES[name] = Case(name, make, **kwargs)

def mixes():
    "Name and maker of every mix, drawn for the batch and for each sample"
    kinds = dict(MixUp={}, CutMix={}, SnapMix={})
    for per in ('batch','sample'):
        for k,kw in kinds.items(): yield f'{k}, {per}',partial(_mix, k, per=per, **kw)
        yield f'MixOneOf, {per}',partial(_one_of, per=per)

def _mix(kind, **kwargs): return getattr(names, kind)(**kwargs)
def _one_of(**kwargs): return names.MixOneOf([names.MixUp(),names.CutMix(),names.SnapMix()], **kwargs)
CutMix,SnapMix,MixUp = (partial(_mix, o) for o in ('CutMix','SnapMix','MixUp'))
def CEKD(**kwargs): return names.call('CEKD', **kwargs)

# plain and mixed

case('plain', lambda k: k.branch(n=1), main=True)
case('two branches', lambda k: k.branch(n=2))
for _name,_make in mixes():
    case(f'plain + {_name}', lambda k,m=_make: k.branch(m(), n=1), main=_name in ('CutMix, batch','SnapMix, batch'))
    case(f'CEKD + {_name}', lambda k,m=_make: k.branch(m(), CEKD()), main=_name in ('CutMix, batch','SnapMix, batch'))
case('MixUp of some samples', lambda k: k.branch(MixUp(per='sample', prob=.5), n=1))
case('CutMix of some samples', lambda k: k.branch(CutMix(per='sample', prob=.5), n=1))
case('CutMix, drawn weights', lambda k: k.branch(CutMix(correct_lam=False), n=1))
case('CutMix, drawn weights, sample', lambda k: k.branch(CutMix(correct_lam=False, per='sample'), n=1))
case('SnapMix, one draw, labels apart', lambda k: k.branch(SnapMix(two_draws=False, same_label=False), n=1))

# the task's loss

case('label smoothing', lambda k: k.branch(MixUp(), n=1), kit=dict(loss=LabelSmoothingCrossEntropyFlat()))
for _loss in ('CrossEntropyLossFlat','LabelSmoothingCrossEntropy','LabelSmoothingCrossEntropyFlat'):
    case(f'class weights, {_loss}', lambda k: k.branch(CutMix(), n=1), kit=dict(loss=_loss))
case('several labels', lambda k: k.branch(SnapMix(), n=1), kit=dict(labels='several', loss=BCEWithLogitsLossFlat()))
case('soft labels', lambda k: k.branch(CutMix(), CEKD()), kit=dict(labels='soft', loss=nn.CrossEntropyLoss()))

# soft labels of the network's own

_some = dict(prob=.6)
for _soft in ('OnlineLabelSmoothing','PSKD','StoredTargets'):
    for _mixed in (MixUp,CutMix,SnapMix):
        _name = f'{_soft} + {_mixed.args[0]}'
        case(_name, lambda k,m=_mixed,o=_soft: k.branch(m(**_some), getattr(names, o)()))
        case(f'{_name}, sample', lambda k,m=_mixed,o=_soft: k.branch(m(per='sample', **_some), getattr(names, o)()))
    case(f'{_soft} + CEKD', lambda k,o=_soft: k.branch(CutMix(), CEKD(), getattr(names, o)()), main=_soft=='PSKD')
    case(f'{_soft}, plain learner', lambda k,o=_soft: k.plain(MixUp(per='sample', **_some), getattr(names, o)()))
    case(f'{_soft}, class weights', lambda k,o=_soft: k.branch(MixUp(**_some), getattr(names, o)()), kit=dict(loss='LabelSmoothingCrossEntropyFlat'))
case('OnlineLabelSmoothing', lambda k: k.branch(names.OnlineLabelSmoothing()), main=True)
case('PSKD', lambda k: k.branch(names.PSKD(), n=1))

# CEKD

case('CEKD, a batch that is not mixed', lambda k: k.branch(CutMix(prob=0), CEKD()))
case('CEKD, teacher branch', lambda k: k.branch(CutMix(), CEKD(teacher='branch')))
case('CEKD, teacher peer', lambda k: k.branch(CutMix(), CEKD(teacher='peer', target='both')))
case('CEKD, teacher ema', lambda k: k.branch(CutMix(), CEKD(teacher='ema')), main=True)
case('CEKD, target both', lambda k: k.branch(CutMix(), CEKD(target='both')))
case('CEKD, target fused', lambda k: k.branch(SnapMix(), CEKD(target='fused')))
case('CEKD, fuse maps', lambda k: k.branch(CutMix(), CEKD(fuse='maps')), main=True)
case('CEKD, fuse maps, SnapMix', lambda k: k.branch(SnapMix(), CEKD(fuse='maps')))
case('CEKD, fuse maps, MixUp', lambda k: k.branch(MixUp(), CEKD(fuse='maps')))
case('CEKD, fuse maps, sample', lambda k: k.branch(CutMix(per='sample'), CEKD(fuse='maps', detach=False)))
case('CEKD, joint', lambda k: k.branch(CutMix(), CEKD(joint=True)), main=True)
case('CEKD, confident', lambda k: k.branch(CutMix(), CEKD(confident=True)))
case('CEKD, gradient into the teacher', lambda k: k.branch(CutMix(), CEKD(detach=False)))
case('CEKD, clean labels on one branch', lambda k: k.branch(CutMix(), CEKD(clean_on='label')))
case('CEKD, no labels of clean images', lambda k: k.branch(CutMix(), CEKD(w_clean=0.)))
case('CEKD, no cross target', lambda k: k.branch(CutMix(), CEKD(w_cross=0., target='both')))
case('CEKD, validates the average', lambda k: k.branch(CutMix(), CEKD(validate_ema=True)))
case('CEKD, one branch', lambda k: k.branch(CutMix(), CEKD(target='both'), n=1))
case('CEKD, peers', lambda k: k.branch(SnapMix(), CEKD(target='both', teacher='peer'), arch=k.teachers), main=True)
case('CEKD, gradient checkpoints', lambda k: k.branch(CutMix(), CEKD(), names.GradCheckpoint()), main=True)
case('CEKD, diagnosed', lambda k: k.branch(CutMix(), CEKD(), names.Diagnose(('conflict','trunk','agreement'))))

# MEAL

for _choose,_adv in (('random','joint'),('mean','grl'),('each','alternate'),('each',None)):
    case(f'MEAL, {_choose}, {_adv}', lambda k,c=_choose,a=_adv: k.meal(choose=c, adversarial=a), main=_choose=='random')
for _kind in ('l1','l2','l1_soft','l2_soft'): case(f'MEAL, {_kind}', lambda k,o=_kind: k.meal(kind=o))
case('MEAL, max pooling', lambda k: k.meal(space='max', channels='max'))
case('MEAL, two branches, labels, CutMix', lambda k: k.meal(CutMix(), n=2, w_hard=1.))
case('MEAL, SnapMix', lambda k: k.meal(SnapMix(), w_hard=1.))
case('MEAL V2', lambda k: k.branch(names.MEAL.v2(k.teacher_nets()), n=1), main=True)
case('MEAL, several labels', lambda k: k.meal(), kit=dict(labels='several', loss=BCEWithLogitsLossFlat()))
case('MEAL, stored answers', lambda k: k.meal(cache_targets=True, cache_dir=tempfile.mkdtemp()), real=True)

# online distillation

for _name in ('diversity','one','okddip','ffl','dml','kdcl'):
    case(f'online {_name}', lambda k,o=_name: k.online(o), main=True)
    for _mixed in (CutMix,SnapMix): case(f'online {_name} + {_mixed.args[0]}', lambda k,o=_name,m=_mixed: k.online(o, m()))
for _gate in ('one','fau','mean'):
    case(f'FFMCD, gate {_gate}', lambda k,o=_gate: k.online('diversity', gate=o))
    case(f'FFMCD, gate {_gate}, SnapMix', lambda k,o=_gate: k.online('diversity', SnapMix(), gate=o))
for _form in ('l1','cos'): case(f'FFMCD, {_form}', lambda k,o=_form: k.online(names.FFMCD(form=o)))
case('DML, detached', lambda k: k.online(names.DML(detach=True)))
case('OKDDip, detached', lambda k: k.online(names.OKDDip(detach=True)))

# CSS

case('CSS', lambda k: k.css(), main=True)
case('CSS, permute', lambda k: k.css(transform='permute'))
case('CSS, no transform', lambda k: k.css(transform=None))
case('CSS, detached, ramp', lambda k: k.css(detach_targets=True, detach_ratio=True, ramp=.5))
for _mixed in (MixUp,CutMix,SnapMix): case(f'CSS + {_mixed.args[0]}', lambda k,m=_mixed: k.css(m()))

# a learner in the middle of training

def make_kit(
    size:str,         # One of `SIZES`
    o:Case,
    device:str='cpu',
    extra=(),         # Further callbacks
)->Kit:
    "The kit that a case is made with"
    kw = SIZES[size] | o.kit
    if isinstance(kw.get('loss'), str):
        weight = torch.linspace(.5, 2, kw['c']).to(device)
        kw['loss'] = globals()[kw['loss']](weight=weight)
    return Kit(**kw, device=device, extra=list(extra))

def begin(
    learn:Learner, # Without default callbacks
):
    "Put a learner before the first batch of its first epoch; no progress bar, no recorder"
    learn.add_cbs([TrainEvalCallback,CastToTensor])
    learn.model.to(learn.dls.device, non_blocking=True)
    learn.create_opt()
    learn.dls.train._DataLoader__idxs = range(len(learn.dls.train_ds)) # the batches hold the images in their order
    learn.n_epoch,learn.n_iter,learn.epoch,learn.dl = 2,N_BATCHES,0,learn.dls.train
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    return learn

def next_epoch(learn):
    "End an epoch of training and begin another"
    learn('after_train')
    learn('after_epoch')
    learn.epoch = 1
    for e in ('before_epoch','before_train'): learn(e)
