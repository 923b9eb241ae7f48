"""Train every method with every mix for a few steps, and keep a digest of each result. A change that only moves and
renames code leaves every digest as it is, bit for bit. Before you restructure, take a second checkout of the commit
before your change, write its digests, and compare as often as you like:

    git worktree add --detach ../before HEAD
    PYTHONPATH=../before .venv/bin/python tools/same_results.py write before.json
    PYTHONPATH=$PWD .venv/bin/python tools/same_results.py compare before.json

`compare` lists the cases that differ, with the parts that do (images, losses, columns, weights, predictions, random
numbers) and the relative change of their norm: 1e-7 or less means that sums were added in another order, more that
something else was computed. It exits with 1 if any case differs. Add words to run only the cases whose names contain
one of them: `compare before.json cekd/ meal/`. Both runs need the same machine and the same versions of torch, fastai
and timm. All cases take two to three minutes on one free core.

The script finds names in all modules of the package. If your change renames something that a case uses, add the new
name to `NAMES`, or to `ARGS` for an argument, and keep the old one until the change is done: then the script runs on
both sides of it. Tensors, columns and parameters are compared without their names."""
import os
os.environ |= dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='Agg', HF_HUB_OFFLINE='1')
import argparse,fastai,hashlib,importlib,inspect,io,json,sys,tempfile,time,timm,warnings
from contextlib import redirect_stdout
from functools import cache
from types import ModuleType
from unittest.mock import patch as patched
from fastai.vision.all import *
import cekd_fastai

defaults.use_cuda = False
torch.set_num_threads(1)
warnings.simplefilter('ignore')
package = Path(cekd_fastai.__file__).resolve().parent

# Later names of what the cases below call by its first name.
NAMES = dict(CheckpointTrunk=['GradCheckpoint'], class_maps=['model_cam'], few=['few_shot'], official_test=['official_test_dl'])
ARGS = dict(alpha=['w_cross', 'w_kd'], beta=['w_clean'], eta=['w_adv'], cd=['w_cd'], hard=['w_hard'],
    cache=['cache_dir'], online=['cache_targets'], checkpoint_trunk=['grad_checkpoint'])

# ---- names of the package

@cache
def rooms():
    "All modules of the package, but the one that only passes names on"
    files = [o for o in package.rglob('*.py') if o.stem not in ('all', '_modidx', '__init__')]
    names = ['.'.join(('cekd_fastai', *o.relative_to(package).with_suffix('').parts)) for o in sorted(files)]
    return [importlib.import_module(o) for o in names]

def _own(room, name):
    "What `room` itself defines as `name`, None if it does not"
    res = vars(room).get(name)
    if isinstance(res, ModuleType): return None
    defined = getattr(res, '__module__', None)==room.__name__
    return res if defined or name in getattr(room, '__all__', ()) else None

def get(name):
    "The function, class or constant whose first name is `name`"
    names = [name, *NAMES.get(name, [])]
    found = [res for o in names for room in rooms() if (res := _own(room, o)) is not None]
    if not found: raise NameError(f"no module of the package defines {' or '.join(names)}: add the new name to NAMES")
    return found[0]

def member(o, name):
    "The attribute of `o` whose first name is `name`"
    names = [name, *NAMES.get(name, [])]
    found = [k for k in names if hasattr(o, k)]
    if not found: raise AttributeError(f"{type(o).__name__} has no {' or '.join(names)}: add the new name to NAMES")
    return getattr(o, found[0])

def renamed(f, kw):
    "`kw` with the names of the arguments of `f`"
    known = inspect.signature(f).parameters
    res = {}
    for k,v in kw.items():
        names = [o for o in [k, *ARGS.get(k, [])] if o in known]
        if not names: raise TypeError(f"{f.__name__} has no argument {k}: add the new name to ARGS")
        res[names[0]] = v
    return res

def call(name, *args, **kw):
    "Call the function or class whose first name is `name`"
    f = get(name)
    return f(*args, **renamed(f, kw))

# ---- digests

def leaves(o):
    "The arrays and texts inside `o`, in order, without the names of columns and keys"
    if isinstance(o, Tensor): yield o.detach().as_subclass(Tensor).cpu().numpy()
    elif isinstance(o, (np.ndarray,np.generic,bool,int,float)): yield np.asarray(o)
    elif isinstance(o, pd.DataFrame): yield from leaves([o[c].tolist() for c in o])
    elif isinstance(o, dict): yield from leaves(list(o.values()))
    elif isinstance(o, (list,tuple,L)):
        for v in o: yield from leaves(v)
    else: yield str(o)

def sha(arrays):
    "Digest of arrays and texts, with the types and shapes of the former"
    h = hashlib.sha256()
    for o in arrays:
        if isinstance(o, np.ndarray): h.update(f'{o.dtype}{o.shape}'.encode()+np.ascontiguousarray(o).tobytes())
        else: h.update(o.encode())
    return h.hexdigest()[:16]

def summary(o):
    "Digest of `o`, and the norm of its numbers, which shows how large a difference is"
    arrays = list(leaves(o))
    squares = [np.nansum(v.astype(np.float64)**2) for v in arrays if isinstance(v, np.ndarray)]
    return dict(sha=sha(arrays), norm=math.sqrt(sum(squares)))

def hidden(net):
    "Networks that modules of `net` keep in plain attributes and lists, such as discriminators"
    values = [v for m in net.modules() for v in vars(m).values()]
    lists = [list(v) for v in values if isinstance(v, (list,tuple))]
    return [o for o in values+sum(lists, []) if isinstance(o, nn.Module)]

def weights(net):
    "All parameters and buffers of `net`, ordered by what is in them: their names and places may change"
    nets = [net, *hidden(net)]
    tensors = {id(t):t for m in nets for t in (*m.parameters(), *m.buffers())}
    return sorted((next(leaves(o)) for o in tensors.values()), key=lambda o: sha([o]))

def folder_files(path):
    "Names and bytes of all files in a folder"
    files = sorted(o for o in path.rglob('*') if o.is_file())
    return [(o.relative_to(path).as_posix(), np.frombuffer(o.read_bytes(), np.uint8)) for o in files]

# ---- data, networks and learners

root = Path()
n_out,bs,size = 4,4,64

def fresh_folder(): return Path(tempfile.mkdtemp(dir=root))

class Items(list):
    "A data set of tensors, as fastai wants it"
    def new_empty(self): return Items()

def noise(n=2*bs, bs=bs, multi=False):
    "Loaders of random pictures, two batches of them by default"
    g = torch.Generator().manual_seed(0)
    y = torch.rand(n, n_out, generator=g).round() if multi else torch.randint(0, n_out, (n,), generator=g)
    items = Items(zip(torch.randn(n, 3, size, size, generator=g), y))
    dls = DataLoaders.from_dsets(items, Items(items[:bs]), bs=bs, num_workers=0, device='cpu')
    dls.c = n_out
    return dls

@cache
def birds():
    "Folder of drawn birds"
    kw = dict(n_species=4, n_images=12, n_train=8, size=72, n_workers=0, progress=False)
    with no_random(0): return call('make_birds', root/'birds', **kw)

def bird_dls(**kw): return get('fine_grained_dls')(birds(), **dict(size=size, bs=8, num_workers=0, device='cpu') | kw)

arch = 'test_resnet'
plain = dict(pretrained=False, loss_func=CrossEntropyLossFlat(), opt_func=SGD, metrics=accuracy)

@cache
def teachers():
    "A network of two branches, one of one branch, and one of timm"
    with no_random(1):
        nets = [call('branch_net', a, n_out, n, pretrained=False) for a,n in ((arch,2), ('test_efficientnet',1))]
        return nets+[timm.create_model(arch, num_classes=n_out)]

@cache
def teacher_file():
    "A file of a network for drawn birds that were normalised otherwise"
    with no_random(2):
        dls = bird_dls(stats=([.5]*3,[.25]*3))
        return get('deploy')(get('branch_learner')(dls, arch, **plain), root/'teacher.pt')

def branches(cbs=(), dls=None, arch=arch, n=2, **kw):
    "A learner of a network with branches"
    return call('branch_learner', dls or noise(), arch, n, cbs=list(cbs), **plain | kw)

def cekd(cbs=(), dls=None, arch=arch, n=2, net_args=None, **kw):
    "A learner of CEKD with arguments `kw`"
    return branches([*cbs, call('CEKD', **kw)], dls, arch, n, **(net_args or {}))

def meal(cbs=(), dls=None, arch=arch, teach=None, n=1, loss_func=plain['loss_func'], metrics=accuracy, **kw):
    "A learner of MEAL with arguments `kw`"
    kw = plain | dict(loss_func=loss_func, metrics=metrics) | kw
    return call('meal_learner', dls or noise(), arch, teach or teachers()[:2], n_branches=n, cbs=list(cbs), **kw)

def css(cbs=(), dls=None, archs=(arch,'test_efficientnet'), n=2, net_args=None, **kw):
    "A learner of CSS with arguments `kw`"
    return call('css_learner', dls or noise(), archs, n, cbs=[call('CSS', **kw), *cbs], **plain | (net_args or {}))

def online(name, cbs=(), dls=None, net_args=None, **kw):
    "A learner of one of the methods of online distillation with arguments `kw`"
    f = get('ONLINE')[name]
    return call('online_learner', dls or noise(), arch, f(**renamed(f, kw)), cbs=list(cbs), **plain | (net_args or {}))

def stock(cbs=(), dls=None):
    "fastai's own learner"
    return vision_learner(dls or noise(), arch, n_out=n_out, cbs=list(cbs), **plain)

# ---- a run

class Watch(Callback):
    "Keep the images and the losses of each step"
    order,run_valid = 1000,False
    def __init__(self): self.images,self.losses = [],[]
    def before_batch(self): self.images.append(self.learn.xb[0].clone())
    def after_batch(self): self.losses.append([float(self.learn.loss), float(self.learn.loss_grad)])

def quiet(learn, f):
    "`f(learn)` without output"
    with learn.no_bar(), learn.no_logging(): return f(learn)

def fitted(learn, n=1, lr=.05):
    "`learn` after `n` epochs"
    quiet(learn, lambda o: o.fit(n, lr))
    return learn

def outcome(learn, n=1, fit=None):
    "Train `learn` and return everything that can be compared"
    watch = Watch()
    learn.add_cb(watch)
    quiet(learn, fit or (lambda o: o.fit(n, .05)))
    learn.remove_cb(watch)
    columns = list(learn.recorder.values)
    preds = quiet(learn, lambda o: o.get_preds(dl=o.dls.valid)[0])
    steps = dict(images=watch.images, losses=watch.losses, columns=columns)
    return steps | dict(weights=weights(learn.model), predictions=preds)

# ---- how a case is written

CASES = {}

class Later:
    "A callback that its case builds when it runs"
    def __init__(self, name, *args, **kw): self.name,self.args,self.kw = name,args,kw
    def build(self): return call(self.name, *now(self.args), **self.kw)

def now(o):
    "Build callbacks of type `Later`, inside lists too"
    if isinstance(o, Later): return o.build()
    return [now(v) for v in o] if isinstance(o, (list,tuple)) else o

def case(name, f, /, *cbs, epochs=1, fit=None, **kw):
    "Add the case that trains the learner `f(cbs, **kw)`"
    @result(name)
    def _train(): return outcome(f(now(cbs), **kw), epochs, fit)

def result(name):
    "Add the case that the function below computes, as a dict of its parts"
    def _add(f):
        assert name not in CASES, name
        CASES[name] = f
        return f
    return _add

def mixes(**kw):
    "Every mix with arguments `kw`, by name"
    three = [Later(o) for o in ('MixUp','CutMix','SnapMix')]
    names = dict(mixup='MixUp', cutmix='CutMix', snapmix='SnapMix')
    return {k:Later(v, **kw) for k,v in names.items()} | dict(oneof=Later('MixOneOf', three, **kw))

mixup,cutmix,snapmix,oneof = mixes().values()

# ---- every method with every mix

METHODS = dict(stock=stock, branches=branches, cekd=cekd, meal=meal, css=css)
METHODS |= {o:partial(online, o) for o in ('dml','kdcl','one','okddip','ffl','diversity')}

for method,f in METHODS.items():
    if method!='cekd': case(f'{method}/no mix', f)
    for o,mix in mixes().items(): case(f'{method}/{o}', f, mix)
    case(f'{method}/oneof per sample', f, Later('MixOneOf', [mixup,cutmix,snapmix], per='sample'))

# ---- mixes

for method in ('stock','branches','cekd'):
    f = METHODS[method]
    for o in ('MixUp','CutMix','SnapMix'): case(f'mix/{method}, {o} per sample', f, Later(o, per='sample'))
    for o,mix in mixes(prob=.5).items(): case(f'mix/{method}, {o}, half', f, mix, epochs=2)
    for o,mix in mixes(prob=.5, per='sample').items(): case(f'mix/{method}, {o}, half per sample', f, mix)
for o,mix in mixes(stop_at=.5).items():
    case(f'mix/branches, {o} stops', branches, mix)
    case(f'mix/cekd, {o} stops', cekd, mix)

case('mix/alpha', branches, Later('MixUp', alpha=2.))
case('mix/share as drawn', branches, Later('CutMix', correct_lam=False))
case('mix/share as drawn per sample', branches, Later('CutMix', correct_lam=False, per='sample'))
for per in ('batch','sample'):
    case(f'mix/pairs of a class as others, each {per}', cekd, Later('SnapMix', same_label=False, per=per))
    case(f'mix/one size for both boxes, each {per}', cekd, Later('SnapMix', two_draws=False, per=per))
    two = [Later('SnapMix'), Later('SnapMix', alpha=1., same_label=False), Later('CutMix')]
    case(f'mix/two snapmixes, each {per}', cekd, Later('MixOneOf', two, weights=[1,2,1], per=per))

# ---- losses

class_weight = torch.tensor([1.,2.,.5,1.5])
LOSSES = dict(weighted=CrossEntropyLossFlat(weight=class_weight), sum=CrossEntropyLossFlat(reduction='sum'),
    smooth=LabelSmoothingCrossEntropyFlat(), smooth_weighted=LabelSmoothingCrossEntropy(weight=class_weight),
    torch=nn.CrossEntropyLoss(), function=partial(F.cross_entropy, weight=class_weight))

def with_loss(cbs, f, loss_func, **kw):
    "The learner `f(cbs, **kw)` with another loss"
    learn = f(cbs, **kw)
    learn.loss_func = loss_func
    return learn

for o,loss in LOSSES.items():
    case(f'loss/branches, {o}', with_loss, cutmix, f=branches, loss_func=loss)
    case(f'loss/cekd, {o}', with_loss, cutmix, f=cekd, loss_func=loss)
    case(f'loss/diversity, {o}', with_loss, mixup, f=METHODS['diversity'], loss_func=loss)
    case(f'loss/css, {o}', with_loss, cutmix, f=css, loss_func=loss)

def several(cbs, f, **kw): return f(cbs, noise(multi=True), loss_func=BCEWithLogitsLossFlat(), metrics=None, **kw)
for o,mix in mixes().items():
    case(f'loss/several labels, branches, {o}', several, mix, f=branches)
    case(f'loss/several labels, meal, {o}', several, mix, f=meal, hard=.5)

# ---- networks

case('net/efficientnet', cekd, snapmix, arch='test_efficientnet')
case('net/convnext', cekd, snapmix, arch='test_convnext')
case('net/of cifar', cekd, snapmix, arch='cifar_resnet8')
case('net/of torchvision', cekd, cutmix, arch='squeezenet1_1')
case('net/one branch', branches, snapmix, n=1)
case('net/private classifiers', cekd, snapmix, net_args=dict(split='head'))
case('net/split early', cekd, snapmix, net_args=dict(split='stem'), arch='cifar_resnet8')
deep = dict(arch_args=dict(drop_path_rate=.5))
case('net/random depth', cekd, snapmix, net_args=deep)
case('net/random depth, meal', meal, mixup, n=2, **deep)
case('net/adam', cekd, snapmix, net_args=dict(opt_func=Adam))
case('net/one cycle', cekd, snapmix, fit=lambda o: o.fit_one_cycle(2, .05))
case('net/fine tune', branches, snapmix, fit=lambda o: o.fine_tune(1, .05))

def single(cbs, f): return f(cbs, noise(4, 1))
case('net/one image, diversity', single, f=METHODS['diversity'])
case('net/one image, cekd', single, snapmix, f=cekd)

freezable = dict(branches=branches, cekd=cekd, css=css) | {o:METHODS[o] for o in ('diversity','one')}
for method,f in freezable.items():
    frozen = dict(freeze_bn=True)
    case(f'net/frozen statistics, {method}', f, snapmix, **(frozen if method=='branches' else dict(net_args=frozen)))
less = Later('CheckpointTrunk')
for o in ('branches','cekd','css','diversity'): case(f'net/checkpointed, {o}', METHODS[o], snapmix, less)
case('net/checkpointed, meal', meal, less, taps=1)

peers = dict(arch=[arch,'test_efficientnet'])
case('peers/plain', branches, **peers)
case('peers/checkpointed', branches, less, **peers)
for o,mix in mixes().items(): case(f'peers/cekd, {o}', cekd, mix, target='both', teacher='peer', **peers)
case('peers/cekd, maps', cekd, snapmix, fuse='maps', **peers)
case('peers/meal', meal, mixup, n=2, taps=0, **peers)

# ---- CEKD

for teacher,target in itertools.product(('ensemble','branch','peer','ema'), ('separate','both','fused')):
    case(f'cekd/{teacher} teaches {target}', cekd, snapmix, n=3, teacher=teacher, target=target)
for o,mix in (mixes() | {f'{k} per sample':v for k,v in mixes(per='sample').items()}).items():
    case(f'cekd/maps, {o}', cekd, mix, fuse='maps')
for teacher,target in (('branch','both'), ('peer','fused'), ('ensemble','fused')):
    case(f'cekd/maps, {teacher} teaches {target}', cekd, snapmix, fuse='maps', teacher=teacher, target=target)
for target in ('separate','both','fused'):
    case(f'cekd/confident, {target}', cekd, snapmix, confident=True, target=target)
    case(f'cekd/gradient into the teacher, {target}', cekd, snapmix, detach=False, target=target)
case('cekd/confident, maps', cekd, snapmix, confident=True, fuse='maps')
case('cekd/gradient into the teacher, maps', cekd, snapmix, detach=False, fuse='maps')
case('cekd/gradient into the teacher, peer', cekd, snapmix, detach=False, teacher='peer', target='both')

for o in ('mixup','cutmix'): case(f'cekd/joint, {o}', cekd, mixes()[o], joint=True)
case('cekd/joint, half', cekd, Later('CutMix', prob=.5), joint=True, epochs=2)
case('cekd/joint, maps', cekd, cutmix, joint=True, fuse='maps')
case('cekd/clean on label', cekd, snapmix, clean_on='label')
case('cekd/clean on label, half', cekd, Later('SnapMix', prob=.5), clean_on='label', epochs=2)
case('cekd/weights', cekd, snapmix, alpha=2., beta=.5, T=5.)
case('cekd/no ramp', cekd, snapmix, ramp=0.)
case('cekd/no cross loss', cekd, snapmix, alpha=0.)
case('cekd/no clean loss', cekd, cutmix, beta=0.)
case('cekd/average validates', cekd, snapmix, validate_ema=True, decay=.5, epochs=2)
case('cekd/average teaches and validates', cekd, snapmix, teacher='ema', validate_ema=True, beta=0., epochs=2)

@result('cekd/average goes on')
def _():
    "The average of a run that is saved, loaded and trained on"
    first,then = (cekd([get('SnapMix')()], teacher='ema', validate_ema=True) for _ in range(2))
    fitted(first).save(file := fresh_folder()/'run')
    then.load(file)
    return outcome(then)

@result('cekd/rate search')
def _():
    learn = cekd([get('CutMix')()], teacher='ema', validate_ema=True)
    found = quiet(learn, lambda o: o.lr_find(num_it=4, show_plot=False))
    return dict(rates=found, losses=learn.recorder.losses, weights=weights(learn.model))

watch = Later('Diagnose', ['conflict','trunk','agreement'])
for o,mix in mixes().items(): case(f'diagnose/{o}', cekd, mix, watch, epochs=2)
for teacher,target in (('ema','both'), ('peer','fused'), ('branch','separate')):
    case(f'diagnose/{teacher} teaches {target}', cekd, snapmix, watch, n=3, teacher=teacher, target=target)
case('diagnose/maps', cekd, snapmix, watch, fuse='maps')
case('diagnose/joint', cekd, cutmix, watch, joint=True)

def on_birds(cbs, f=cekd, data=None, **kw): return f(cbs, bird_dls(**(data or {})), **kw)
evidence = {o:Later('Diagnose', 'noise', kind=o, n=12) for o in ('parts','box')}
for o,cb in evidence.items(): case(f'diagnose/noise of {o}', on_birds, snapmix, cb, epochs=2)
case('diagnose/noise of the average', on_birds, cutmix, Later('Diagnose', 'noise', n=12), teacher='ema')

# ---- MEAL

for choose,adversarial in itertools.product(('random','mean','each'), ('joint','grl','alternate',None)):
    case(f'meal/{choose}, {adversarial}', meal, choose=choose, adversarial=adversarial)
for taps in (0, 1, 3): case(f'meal/{taps} taps', meal, taps=taps)
case('meal/named taps', meal, taps=['layer2'], teacher_taps=[['layer3'],['blocks_1']], arch='cifar_resnet8')
for kind in ('l1','l2','l1_soft','l2_soft'): case(f'meal/{kind}', meal, kind=kind, choose='mean')
case('meal/labels too', meal, hard=.5, epochs=2)
for o,mix in mixes(prob=.5).items(): case(f'meal/labels too, {o}', meal, mix, hard=.5, epochs=2)
case('meal/greatest', meal, space='max', channels='max', dims=[9,4])
case('meal/greatest channel', meal, channels='max', dims=[9,4])
case('meal/greatest place', meal, space='max', dims=[9,4])
case('meal/discriminators', meal, reduce=4, last_relu=True, lr_disc=.1, eta=.5)
case('meal/sizes', meal, dims=[8,4], gammas=[.5,.2,.3], T=4.)
case('meal/three branches', meal, n=3, choose='each')

@result('meal/v2')
def _():
    cls = get('MEAL')
    return outcome(branches([cls.v2(teachers()[:2], **renamed(cls, dict(hard=.5)))], n=1))

@result('meal/teachers of all kinds')
def _():
    trained = on_birds([], branches, n=1)
    learn = on_birds([], meal, teach=[*teachers(), trained, teacher_file()], choose='each')
    return outcome(learn) | dict(accuracy=learn.meal.teacher_accuracy())

@result('meal/discriminators go on')
def _():
    "The discriminators of a run that is saved, loaded and trained on"
    first,then = (meal(n=2) for _ in range(2))
    fitted(first).save(file := fresh_folder()/'run')
    then.load(file)
    return outcome(then)

def caching(cbs, dls=None, **kw): return meal(cbs, dls, online=True, cache=fresh_folder(), **kw)
case('meal/cached', caching, epochs=2)
case('meal/cached, random depth', caching, epochs=2, **deep)
case('meal/cached, two views', caching, epochs=4, views=2)
case('meal/cached, labels too', caching, snapmix, epochs=2, hard=.5, n=2)
for o,mix in mixes(per='sample').items(): case(f'meal/cached, {o}', caching, mix, epochs=2, choose='mean')
case('meal/cached, birds', on_birds, f=caching, epochs=2)

@result('meal/cached by another run')
def _():
    folder = fresh_folder()
    first,then = (meal(online=True, cache=folder) for _ in range(2))
    return outcome(first) | {f'{k} again':v for k,v in outcome(then).items()}

def unlabeled(cbs, **kw): return on_birds(cbs, meal, unlabeled=get_image_files(birds())[:12], **kw)
def caching_unlabeled(cbs): return unlabeled(cbs, online=True, cache=fresh_folder())
case('meal/unlabelled', unlabeled, mixup, hard=.5)
case('meal/unlabelled, cached', caching_unlabeled, epochs=2)

# ---- online distillation

for o in ('one','fau','mean'): case(f'diversity/gate {o}', METHODS['diversity'], snapmix, net_args=dict(gate=o))
for o in ('fro','l1','cos'): case(f'diversity/{o}', METHODS['diversity'], form=o, cd=.01)
for o in ('dml','one','okddip','ffl','diversity'):
    detach = o=='dml' or o=='okddip'
    case(f'{o}/other gradients', METHODS[o], detach=detach, ramp=0., T=5., alpha=.5)
case('one/five branches', METHODS['one'], net_args=dict(n_branches=5))

# ---- CSS

for o in ('corner','permute',None): case(f'css/{o}', css, archs=(arch,arch), net_args=dict(transform=o), n=5)
case('css/detached', css, detach_targets=True, detach_ratio=True)
case('css/ramp', css, ramp=.5, T=1.5)

@result('css/each network')
def _():
    learn = fitted(on_birds([], css))
    return {str(i):deployed(learn, o) for i,o in enumerate(get('NETWORKS'))}

# ---- class maps

def maps(learn):
    "Class maps of a batch and the semantic maps made of them, for classes and for weights of classes"
    x,y = first(noise(bs).train)
    soft = torch.rand(bs, n_out)
    found = [call('class_maps', learn.model, x, o) for o in (y, soft)]
    return dict(maps=found, semantic=[call('semantic_map', o, (size,size)) for o in found])

for method,f in METHODS.items(): result(f'maps/{method}')(lambda f=f: maps(f([get('CutMix')()])))
result('maps/peers')(lambda: maps(branches(**peers)))
for o in ('fau','mean'): result(f'maps/gate {o}')(lambda o=o: maps(online('diversity', net_args=dict(gate=o))))
result('maps/timm')(lambda: maps(Learner(noise(), teachers()[2], loss_func=noop)))

# ---- data

def batches(dls, epochs=2):
    "The training batches of some epochs, and the validation batches"
    train = [b for _ in range(epochs) for b in dls.train]
    return dict(train=train, valid=list(dls.valid))

def table(t): return dict(rows=member(t, 'to_df')(), classes=t.classes, boxes=t.boxes, counts=member(t, 'counts')())

@result('data/birds')
def _():
    tables = dict(parts=call('bird_parts', birds()), marks=call('diagnostic_parts', birds()))
    return dict(files=folder_files(birds())) | tables

@result('data/birds of another seed')
def _():
    path = call('make_birds', fresh_folder()/'b', 8, 3, 48, 7, 2, n_workers=0, progress=False)
    return dict(files=folder_files(path))

@result('data/table')
def _():
    t = get('read_table')(birds())
    few,held = member(t, 'few'),t.holdout(.3)
    parts = dict(whole=t, held=held, held_other=t.holdout(.3, seed=1), few=few(3), few_other=few(3, seed=1))
    parts |= dict(classes=t.subset(2), named=t.subset([t.classes[3], t.classes[1]]), both=member(held, 'few')(2))
    return {k:table(v) for k,v in parts.items()}

@result('data/table by name')
def _(): return table(get('read_table')(birds(), classes=3, valid_pct=.25, seed=3, per_class=4))

LOADERS = dict(whole={}, squeezed=dict(recipe='squeeze'), held=dict(valid_pct=.25), few=dict(per_class=2),
    classes=dict(classes=2), balanced=dict(balanced=True, classes=3))
LOADERS |= dict(boxes=dict(crop_to_box=True), network=dict(stats=arch))
LOADERS |= {o:dict(recipe=r, size=32) for o,r in (('padded','pad'), ('digits','digits'))}
LOADERS |= dict(memory=dict(in_memory=True), memory_padded=dict(in_memory=True, recipe='pad', size=32),
    memory_boxes=dict(in_memory=True, balanced=True, crop_to_box=True))
LOADERS |= dict(turned=dict(batch_tfms=aug_transforms(size=48)), cut=dict(item_tfms=RandomResizedCrop(size)))
for o,kw in LOADERS.items(): result(f'data/loaders, {o}')(lambda kw=kw: batches(bird_dls(**kw)))

@result('data/loaders, no repeats')
def _():
    "Balanced loaders of classes with unequal numbers of images"
    t = get('read_table')(birds())
    keep = [i for i,o in enumerate(t.labels) if i%3 or o!=t.classes[0]]
    t = get('ImageTable')([t.files[i] for i in keep], [t.labels[i] for i in keep], t.is_valid[keep], root=t.root)
    dls = get('fine_grained_dls')(t, size=32, bs=8, num_workers=0, balanced=True)
    return batches(dls)

@result('data/test part')
def _(): return dict(batches=list(call('official_test', bird_dls(valid_pct=.25))))

@result('data/presized')
def _():
    files = folder_files(call('presize', birds(), 40, fresh_folder()/'small'))
    return dict(files=[o for o in files if not o[0].endswith('.json')])

@result('data/statistics')
def _(): return dict(stats=[get('norm_stats')(o) for o in (arch, 'vit_tiny_patch16_224', 'resnet18')])

def label_noise(per, kind):
    "How wrong the labels of every mix are"
    learn = on_birds([], branches)
    ms = {k:now(v) for k,v in mixes(per=per).items()}
    rows = get('label_noise')(ms, learn.dls, learn, kind=kind, n=16, rounds=2, per_image=True)
    return dict(rows=rows, table=get('noise_table')(rows))

for per,kind in itertools.product(('batch','sample'), ('parts','box')):
    result(f'data/label noise, {kind}, each {per}')(lambda per=per, kind=kind: label_noise(per, kind))

# ---- looking inside, and taking the network out

def pictures(): return get_image_files(birds()).sorted()[:5]

def deployed(learn, *which):
    "What the file of a network predicts, and the weights in it"
    net = get('Deployed')(get('deploy')(learn, fresh_folder()/'net.pt', *which))
    return dict(probs=net(pictures()), best=list(net.predict(pictures()[0], 2).items()), weights=weights(net.net))

@result('use/deployed')
def _():
    learn = fitted(on_birds([get('SnapMix')()]))
    return dict(whole=deployed(learn), first=deployed(learn, 0), second=deployed(learn, 1))

for method in ('meal','okddip','diversity','ffl','css'):
    result(f'use/deployed, {method}')(lambda f=METHODS[method]: deployed(fitted(on_birds([], f))))
result('use/deployed, peers')(lambda: deployed(fitted(on_birds([], branches, **peers)), 1))
result('use/deployed, average')(lambda: deployed(fitted(on_birds([get('CutMix')()], validate_ema=True))))
result('use/deployed, squeezed')(lambda: deployed(on_birds([], branches, dict(recipe='squeeze'))))
result('use/deployed, padded')(lambda: deployed(on_birds([], branches, dict(recipe='pad', size=32))))

@result('use/exported')
def _():
    learn = fitted(on_birds([get('SnapMix')()], validate_ema=True))
    file = fresh_folder()/'learn.pkl'
    learn.export(file)
    return dict(predictions=[load_learner(file).predict(o) for o in pictures()[:2]])

@result('use/interpreted')
def _():
    learn = fitted(on_birds([get('SnapMix')()]))
    whole,each,y = get('branch_preds')(learn)
    vocab = learn.dls.vocab
    res = dict(logits=(whole, each, y), accuracy=get('branch_accuracy')(whole, each, y))
    res |= dict(ece=get('ece')(whole, y), reliability=get('reliability')(whole*9, y, 5))
    res |= dict(pairs=get('confused_pairs')(whole, y, vocab), history=get('history')(learn))
    return res | dict(agreement=get('branch_agreement')(learn), diversity=get('diversity')(learn).as_dict(),
        maps=get('item_cams')(learn, [0,3,5]), shown=get('show_cam')(learn, [0,1]), parts=get('plot_components')(learn))

@result('use/confused pairs of any logits')
def _():
    z,y = torch.randn(80, n_out),torch.randint(0, n_out, (80,))
    return dict(pairs=get('confused_pairs')(z, y, list('abcd'), 4), ece=get('ece')(z, y), reliability=get('reliability')(z, y))

# ---- the command

def command(method, **kw):
    "What the command writes about a run on drawn birds"
    if method=='meal': kw |= dict(teachers=[str(teacher_file())])
    out = fresh_folder()/'run'
    f = inspect.unwrap(get('cekd_train'))
    small = dict(arch=arch, method=method, epochs=1, size=size, bs=8, lr=.01, no_pretrained=True, num_workers=0)
    small |= dict(data=str(birds()), out=str(out))
    with redirect_stdout(io.StringIO()), patched.object(plt.Figure, 'savefig'): f(**renamed(f, small | kw))
    res = json.loads((out/'result.json').read_text())
    said = [res.get(o) for o in ('accuracy','branches','valid_loss','diversity','networks','teachers')]
    net = get('Deployed')(out/'model.pt')
    return dict(result=said, history=pd.read_csv(out/'history.csv'), weights=weights(net.net), probs=net(pictures()))

COMMANDS = dict(plain=dict(opt='sgd', schedule='steps', epochs=2, milestones=[1], warmup=.5))
COMMANDS |= dict(cekd=dict(method_args=['T=4'], mix_args=['alpha=3'], balanced=True, freeze_trunk=True))
COMMANDS |= dict(meal=dict(adversarial='grl', mix='mixup', mix_prob=.5, in_memory=True))
COMMANDS |= dict(css=dict(arch=f'{arch},test_efficientnet', opt='nesterov', checkpoint_trunk=True))
COMMANDS |= dict(okddip=dict(mix='cutmix', per_class=4, freeze_bn=True, valid_pct=.25))
for o,kw in COMMANDS.items(): result(f'command/{o}')(lambda o=o, kw=kw: command(o, **kw))

@result('command/weights of a file')
def _():
    file = str(fresh_folder()/'net.pth')
    torch.save(timm.create_model(arch).state_dict(), file)
    return command('plain', weights=file, mix='snapmix')

@result('command/recipes')
def _():
    runs = get('PAPER_RUNS')
    names = 'data arch method mix mix_args size bs epochs lr wd opt schedule milestones warmup no_pretrained published'.split()
    return {k:[v.get(o) for o in names] for k,v in sorted(runs.items())}

# ---- write and compare

def run_case(f):
    "Digests of the parts of one case, and of the random numbers that come after it"
    set_seed(42)
    try: parts = f()
    except (Exception,SystemExit) as e: return dict(error=dict(sha=f'{type(e).__name__}: {e}', norm=0.))
    finally: plt.close('all')
    after = [torch.rand(1), random.random(), np.random.rand()]
    return {k:summary(v) for k,v in parts.items()} | dict(random=summary(after))

def run_all(words):
    "All cases whose names contain one of `words`, every one if there are none"
    global root
    names = [o for o in CASES if not words or any(w in o for w in words)]
    rooms() # a module that cannot be imported ends the run here, not once in each case
    res,start = {},time.perf_counter()
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        for o in names: res[o] = run_case(CASES[o])
    print(f'{len(res)} cases of {package} in {time.perf_counter()-start:.0f} s')
    return res

def versions(): return {o.__name__:o.__version__ for o in (torch,fastai,timm)} | dict(threads=torch.get_num_threads())

def difference(old, new):
    "The parts of a case that differ, and the relative change of their norm; empty if none does"
    if 'error' in new: return new['error']['sha']
    rest = [f'no {k}' for k in old if k not in new] + [f'{k} is new' for k in new if k not in old]
    both = [k for k in old if k in new and old[k]['sha']!=new[k]['sha']]
    share = {k:abs(new[k]['norm']-old[k]['norm'])/max(old[k]['norm'], 1e-12) for k in both}
    return ', '.join(rest + [f'{k} ({v:.0e})' for k,v in share.items()])

def write(file, words):
    "Write digests to `file`; return 1 if a case fails, which is then left out"
    res = run_all(words)
    bad = {k:v['error']['sha'] for k,v in res.items() if 'error' in v}
    for k,v in bad.items(): print(f'{k}: {v}')
    good = {k:v for k,v in res.items() if k not in bad}
    file.write_text(json.dumps(dict(versions=versions(), cases=good), indent=0)+'\n')
    return int(bool(bad))

def compare(file, words):
    "Run again and list the differences from `file`; return 1 if there are any"
    old = json.loads(file.read_text())
    if old['versions']!=versions():
        sys.exit(f"{file} was written with {old['versions']}, but these are {versions()}: write it again in this environment.")
    new = run_all(words)
    wanted = [o for o in old['cases'] if o in new or not words]
    diff = {k:difference(old['cases'][k], new[k]) if k in new else 'there is no such case now' for k in wanted}
    diff = {k:v for k,v in diff.items() if v}
    for k,v in diff.items(): print(f'{k}: {v}')
    print(f'{len(wanted)-len(diff)} of {len(wanted)} cases are the same, bit for bit')
    return int(bool(diff))

def main():
    p = argparse.ArgumentParser(description='Compare the results of all methods before and after a change.')
    p.add_argument('what', choices=['write','compare'])
    p.add_argument('file', type=Path, help='digests, a JSON file')
    p.add_argument('words', nargs='*', help='only cases whose names contain one of these')
    a = p.parse_args()
    sys.argv = sys.argv[:1] # the command looks at them too
    return dict(write=write, compare=compare)[a.what](a.file, a.words)

if __name__=='__main__': sys.exit(main())
