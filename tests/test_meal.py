"MEAL beside references computed by hand, its teachers from everywhere, and its manners as a fastai callback."
import os,random
import numpy as np, forks, pytest, timm, torch, torch.nn.functional as F
from copy import deepcopy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CancelBatchException,CancelEpochException,CancelFitException,
    CancelStepException,CancelTrainException,CategoryBlock,CrossEntropyLossFlat,DataBlock,DataLoader,DataLoaders,Flip,GradientAccumulation,
    ImageBlock,L,Learner,Normalize,SaveModelCallback,accuracy,aug_transforms,get_image_files,
    imagenet_stats,load_learner,parent_label,resnet18,set_seed,vision_learner)
from cekd_fastai.drawing.dataset import make_birds
from cekd_fastai.data.benchmarks import read_table
from cekd_fastai.data.image import recipe_tfms
from cekd_fastai.data.loaders import TableSplitter,fine_grained_dls
from cekd_fastai.mix.callback import CutMix,MixUp
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.branches import branch_net,branch_splitter,save_net
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.meal.align import Taps
from cekd_fastai.meal.targets import unlabeled_dl
from cekd_fastai.meal.adversary import Adversary,disc_loss,discriminator
from cekd_fastai.meal.align import align
from cekd_fastai.meal.callback import MEAL
from cekd_fastai.meal.several import TappedTeachers
from cekd_fastai.meal.teachers import Teacher,as_teacher,peek,place_teachers

modes = ['joint','grl','alternate',None]

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('meal')/'birds', n_species=3, n_images=12, n_train=8, size=64, progress=False)

@pytest.fixture(scope='module')
def dls(birds): return fine_grained_dls(birds, size=56, bs=8, num_workers=0)

def net(arch='test_resnet', n=3, branches=1, **kw):
    torch.manual_seed(len(arch)+branches)
    return branch_net(arch, n, branches, pretrained=False, **kw)

def learner(dls, *cbs, model=None, n_branches=1, **kw):
    model = model or net(branches=n_branches)
    return Learner(dls, model, splitter=branch_splitter, cbs=[BranchLoss(),Components(),*cbs], **dict(metrics=accuracy) | kw)

@pytest.fixture(scope='module')
def modules():
    "Three untrained classifiers of three classes whose answers differ"
    torch.manual_seed(3)
    res = [timm.create_model(o, num_classes=3).eval() for o in ('test_resnet','test_efficientnet','test_convnext')]
    for m in res:
        m.pretrained_cfg = {}
        m.get_classifier().weight.data.mul_(30)
    return res

def quiet(learn, epochs=1, lr=1e-3, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, **kw)
    return learn

class Catch(Callback):
    "Ends the run at the first step, with its batch and gradients"
    order = 45
    def before_step(self):
        self.im,self.lab,self.total = self.learn.xb[0].clone(),self.learn.yb[0].clone(),self.learn.loss_grad.item()
        self.grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.learn.model.parameters()]
        raise CancelFitException

def first_step(dls, *cbs, model=None, seed=0, **kw):
    "Gradients of the first step, on the same batch for the same seed"
    set_seed(seed)
    dls.train.rng = random.Random(seed)
    learn = learner(dls, *cbs, model=model, **kw)
    cb = Catch()
    quiet(learn, cbs=cb)
    return cb,learn

def same(a, b, atol=1e-6): return all(torch.allclose(i, j, atol=atol, rtol=1e-4) for i,j in zip(a, b))

# The loss and its signs

def by_hand(x, student, teacher, nets, mode, dims, gammas, eta=1.):
    "Gradients of one step of MEAL, written out: two maps and the logits, the sums as in the paper, discriminators held still"
    student.train()
    for p in student.parameters(): p.requires_grad_()
    t3 = teacher.forward_intermediates(x, indices=[3,4], intermediates_only=True)
    f3 = student.trunk(x)
    f4 = student.branches[0](f3)
    pool = lambda f,d: F.adaptive_avg_pool1d(f.flatten(2), d).mean(1)
    s = [pool(f3, dims[0]), pool(f4, dims[1]), student.heads[0](f4)]
    with torch.no_grad(): t = [pool(t3[0], dims[0]), pool(t3[1], dims[1]), teacher(x)]
    loss = sum(-g*(b.softmax(1)*a.log_softmax(1)).sum(1).mean() for g,a,b in zip(gammas, s, t))
    one = lambda i,n: F.one_hot(torch.tensor([i]*n), 2).float()
    bce,n = F.binary_cross_entropy_with_logits,len(x)
    if mode in ('joint','grl'):
        disc = sum(bce(d(torch.cat([a,b])), torch.cat([one(0, n),one(1, n)])) for d,a,b in zip(nets, s, t))
        loss = loss + (eta if mode=='joint' else -eta)*disc
    if mode=='alternate': loss = loss + eta*sum(bce(d(a), one(1, n)) for d,a in zip(nets, s))
    return loss,torch.autograd.grad(loss, list(student.parameters()))

@pytest.mark.parametrize('mode', modes)
def test_gradient_by_hand(dls, modules, mode):
    "The gradient that reaches the student in each mode is that of the formula, sign and size"
    for eta in (1.,3.):
        model,ref = net(freeze_bn=True),net(freeze_bn=True)
        game = dict(lr_disc=0., w_adv=eta) if mode else {}
        cb,learn = first_step(dls, MEAL(modules[0], adversarial=mode, **game), model=model)
        ad = model.adversary
        assert learn.meal.sizes==[16,4]
        loss,grads = by_hand(cb.im, ref, modules[0], ad and ad.nets, mode, [16,4], [.01,.05,1.], eta)
        assert same(cb.grads, grads, 1e-5) and abs(cb.total-loss.item())<1e-4

def test_signs_in_the_callback(dls, modules):
    "Reversed gradients are those of the joint game with the other sign; in both it is the discriminators' own loss"
    def grads(mode):
        torch.manual_seed(9)
        return first_step(dls, MEAL(modules[0], adversarial=mode), model=net())[0].grads
    none,joint,grl,alt = (grads(m) for m in (None,'joint','grl','alternate'))
    away = [a-b for a,b in zip(joint, none)]
    assert same(away, [b-a for a,b in zip(grl, none)], 1e-6) and max(o.abs().max() for o in away)>1e-4
    dot = sum(((a-b)*c).sum() for a,b,c in zip(alt, none, away))
    assert dot<0 # fooling them is the opposite of helping them

def test_alternate_is_judged_by_the_updated(modules):
    ad = Adversary([1], lr=.5)
    ad.held = [nn.ModuleList([nn.Linear(1, 2, bias=False)])]
    ad.nets[0].weight.data = torch.tensor([[1.],[-1.]])
    ad.opt = torch.optim.SGD(ad.nets.parameters(), lr=4.)
    g = torch.tensor([[[1.]]], requires_grad=True)
    adv,disc = ad.update([g], [torch.tensor([[0.]])], 'alternate')
    adv.backward()
    w = 1+(1-torch.sigmoid(torch.tensor(1.))) # a step of 4 along a gradient of 1/4(1-sigmoid(1))
    assert torch.allclose(ad.nets[0].weight.data, torch.stack([w,-w])[:,None])
    assert torch.allclose(disc, (F.softplus(torch.tensor(-1.))+math_ln2())/2)
    assert torch.allclose(adv, F.softplus(w)) and torch.allclose(g.grad[0,0,0], w*torch.sigmoid(w))

def math_ln2(): return torch.tensor(2.).log()

@pytest.mark.parametrize('mode', ['joint','grl','alternate'])
def test_discriminators_learn(mode):
    "In every mode they come to tell a still student from its teacher"
    torch.manual_seed(0)
    ad,s,t = Adversary([6], lr=1e-2),torch.randn(1,64,6)+1,torch.randn(64,6)-1
    losses = [ad.update([s], [t], mode)[1] for _ in range(150)]
    assert losses[-1]<.1<.6<losses[0]

def test_each_branch_as_alone(dls, modules):
    "The branches of a student are each taught as if alone, here two equal ones"
    one,two = net(freeze_bn=True),net(branches=2, freeze_bn=True)
    two.trunk.load_state_dict(one.trunk.state_dict())
    for i in range(2):
        two.branches[i].load_state_dict(one.branches[0].state_dict())
        two.heads[i].load_state_dict(one.heads[0].state_dict())
    def grads(model, mode):
        torch.manual_seed(4)
        rate = dict(lr_disc=0.) if mode else {}
        return first_step(dls, MEAL(modules[1], adversarial=mode, **rate), model=model)[1].model
    for mode in modes:
        a,b = grads(one, mode),grads(two, mode)
        ga,gb = ([p.grad for p in o] for o in (a.branches[0].parameters(), b.branches[0].parameters()))
        assert same(ga, gb, 1e-5), mode
        assert same([p.grad for p in b.branches[0].parameters()], [p.grad for p in b.branches[1].parameters()], 1e-6)

def test_multi_label(birds, modules):
    "Sigmoid outputs: the last block is a binary cross-entropy towards the teacher's probabilities"
    x = torch.randn(16,3,56,56)
    y = torch.randint(0, 2, (16,3)).float()
    ds = L(zip(x, y))
    dls = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0, device='cpu', shuffle=False)
    dls.c = 3
    model,ref = net(freeze_bn=True),net(freeze_bn=True)
    cb,learn = first_step(dls, MEAL(modules[0], adversarial=None, taps=0, T=2.), model=model, loss_func=BCEWithLogitsLossFlat(), metrics=None)
    with torch.no_grad(): p = (modules[0](cb.im)/2).sigmoid()
    loss = 4*F.binary_cross_entropy_with_logits(ref.train()(cb.im)[0][0]/2, p)
    assert same(cb.grads, torch.autograd.grad(loss, list(ref.parameters())), 1e-5)
    full = learner(dls, MEAL(modules, choose='mean'), loss_func=BCEWithLogitsLossFlat(), metrics=None)
    quiet(full)
    acc = full.meal.teacher_accuracy()
    with torch.no_grad(): want = (((modules[0](x)).sigmoid()>.5)==y.bool()).float().mean().item()
    assert abs(acc['teachers'][0]['accuracy']-want)<1e-5

# Which teachers teach

def test_choose(dls, modules, monkeypatch):
    asked,query = [],TappedTeachers.query_teacher
    monkeypatch.setattr(TappedTeachers, 'query_teacher', lambda self, i, x: asked.append(i) or query(self, i, x))
    for choose,n in (('random',1),('mean',3),('each',3)):
        learn = learner(dls, MEAL(modules, choose=choose))
        asked.clear()
        set_seed(0)
        quiet(learn, 3)
        assert len(asked)==9*n and set(asked)=={0,1,2}

def test_mean_and_each(dls, modules):
    "The mean of the softmax, not the softmax of the mean; and the mean of the losses"
    kw = dict(adversarial=None, taps=0)
    zs = lambda x: torch.stack([m(x) for m in modules])
    for choose in ('mean','each'):
        model,ref = net(freeze_bn=True),net(freeze_bn=True)
        cb,_ = first_step(dls, MEAL(modules, choose=choose, **kw), model=model)
        s = ref.train()(cb.im)[0][0]
        with torch.no_grad(): z = zs(cb.im)
        want = -(z.softmax(-1).mean(0)*s.log_softmax(1)).sum(1).mean()
        assert abs(cb.total-want.item())<1e-5 and abs(F.cross_entropy(s, z.mean(0).softmax(1)).item()-want.item())>1e-3
    mean,each = (first_step(dls, MEAL(modules, choose=c, kind='l2', **kw), model=net(freeze_bn=True)) for c in ('mean','each'))
    s = net(freeze_bn=True).train()(mean[0].im)[0][0]
    with torch.no_grad(): z = zs(mean[0].im)
    assert abs(mean[0].total-F.mse_loss(s, z.mean(0)).item())<1e-4
    assert abs(each[0].total-sum(F.mse_loss(s, o) for o in z).item()/3)<1e-4

def test_teachers_are_still(dls, modules):
    "Frozen copies in evaluation mode, once per batch, without gradient, in no parameter, checkpoint or optimiser of the student"
    teachers = [m.train() for m in modules]
    before = [{k:v.clone() for k,v in m.state_dict().items()} for m in teachers]
    learn = learner(dls, MEAL(teachers, choose='each'))
    calls,grads = [],[]
    for t in learn.meal.teachers: t.model.register_forward_hook(lambda m, i, o: calls.append(m.training) or grads.append(o.requires_grad))
    quiet(learn, 2)
    assert len(calls)==2*3*3 and not any(calls) and not any(grads)
    for t,b in zip(learn.meal.teachers, before):
        assert all(torch.equal(v, b[k]) for k,v in t.model.state_dict().items()) and not any(p.requires_grad for p in t.parameters())
    assert all(m.training and all(p.requires_grad for p in m.parameters()) for m in teachers) # the originals are their owner's
    for m in teachers: m.eval()
    size = lambda ps: sum(p.numel() for p in ps)
    assert size(learn.model.parameters())==size(net().parameters())==size(p for g in learn.opt.param_lists for p in g)
    assert list(learn.model.state_dict())==list(net().state_dict())

def test_student_starts_as_teacher(dls):
    "A network that is student and teacher at once does not chase itself"
    model = net()
    learn = learner(dls, MEAL(model), model=model)
    quiet(learn)
    assert not same(learn.model.trunk.parameters(), learn.meal.teachers[0].model.trunk.parameters())

def test_no_label_enters(dls, modules):
    kw = dict(model=net())
    class Other(Callback):
        order = -1
        def before_batch(self): self.learn.yb = ((self.learn.yb[0]+1)%3,)
    def grads(cbs, **kw):
        torch.manual_seed(5)
        return first_step(dls, MEAL(modules, **kw), *cbs, model=net())[0].grads
    assert same(grads([]), grads([Other()]))
    assert not same(grads([], w_hard=1.), grads([Other()], w_hard=1.), 1e-4)

def test_hard(dls, modules):
    ref = net(freeze_bn=True)
    cb,learn = first_step(dls, MEAL(modules[0], adversarial=None, taps=0, gammas=[0.], w_hard=.5), model=net(freeze_bn=True))
    loss = .5*F.cross_entropy(ref.train()(cb.im)[0][0], cb.lab)
    assert same(cb.grads, torch.autograd.grad(loss, list(ref.parameters())), 1e-5)
    assert quiet(learner(dls, MEAL(modules, w_hard=.5))).recorder.metric_names[4:-1]==['sim','adv','disc','hard']
    quiet(learner(dls, CutMix(), MEAL(modules, w_hard=.5)))

# Where teachers come from

def vocab_dls(birds, names, stats=imagenet_stats):
    "The same images with the classes in this order"
    t = read_table(birds).subset(names)
    return DataBlock((ImageBlock,CategoryBlock(vocab=list(names), sort=False)), get_items=lambda t: t.files, get_y=parent_label, splitter=TableSplitter(t),
        item_tfms=recipe_tfms(56), batch_tfms=Normalize.from_stats(*stats)).dataloaders(t, bs=8, num_workers=0)

def test_learner_of_other_order_and_statistics(birds, dls):
    "A teacher whose classes and statistics are others gives the same answers as in its own learner"
    stats = [.2,.4,.6],[.9,.8,.5]
    names = [dls.vocab[i] for i in (1,2,0)]
    own = vocab_dls(birds, names, stats)
    teacher = learner(own, model=net('test_efficientnet'))
    teacher.model.heads[0][-1].weight.data.mul_(30)
    teacher.model.eval()
    learn = learner(dls, MEAL(teacher, adversarial=None, taps=0))
    place_teachers(learn.meal.teachers, learn)
    t,raw = learn.meal.teachers[0],torch.rand(4,3,56,56)
    norm = lambda s: (raw-torch.tensor(s[0])[:,None,None])/torch.tensor(s[1])[:,None,None]
    with torch.no_grad(): want = teacher.model(norm(stats))[:,[2,0,1]]
    assert list(own.vocab)==names and torch.allclose(t(norm(imagenet_stats)), want, atol=1e-4) and not torch.allclose(want, want[:,[1,2,0]], atol=1e-2)
    acc = learn.meal.teacher_accuracy()
    with teacher.no_bar(), teacher.no_logging(): mine = teacher.validate()[1]
    assert acc['teachers']==[dict(name='test_efficientnet', accuracy=pytest.approx(mine))] and acc['ensemble']==pytest.approx(mine)

def test_other_classes(birds, dls):
    other = learner(vocab_dls(birds, list(dls.vocab)[:2]), model=net(n=2))
    with pytest.raises(ValueError, match=f"has 2 classes and the data has 3, and they differ: it lacks '{dls.vocab[2]}'"): learner(dls, MEAL(other, head='match'))
    strange = Teacher(net(), vocab=['a','b',dls.vocab[0]])
    with pytest.raises(ValueError, match="it alone has 'a', 'b'"): learner(dls, MEAL(strange, head='match'))
    with pytest.raises(ValueError, match='gives 5 classes, but the data has 3'): learner(dls, MEAL(net(n=5), head='match'))

def test_files(birds, dls, tmp_path):
    "A deployed file and an export teach what their network says; a pickle only on trust, junk never"
    model,names = net('test_efficientnet').eval(),[dls.vocab[i] for i in (1,2,0)]
    save_net(model, tmp_path/'t.pt', vocab=names, mean=[.5]*3, std=[.25]*3)
    own = learner(vocab_dls(birds, names, ([.5]*3,[.25]*3)), model=model)
    own.export(tmp_path/'t.pkl')
    raw = torch.rand(2,3,56,56)
    with torch.no_grad(): want = model((raw-.5)/.25)[:,[2,0,1]]
    for o,kw in ((tmp_path/'t.pt', {}), (str(tmp_path/'t.pkl'), dict(trust=True)), (own, {})):
        learn = learner(dls, MEAL(o, **kw))
        place_teachers(learn.meal.teachers, learn)
        x = (raw-torch.tensor(imagenet_stats[0])[:,None,None])/torch.tensor(imagenet_stats[1])[:,None,None]
        assert torch.allclose(learn.meal.teachers[0](x), want, atol=1e-4), o
    (tmp_path/'t.pkl').rename(tmp_path/'p.pth')
    assert as_teacher(tmp_path/'p.pth', trust=True).vocab==names
    with pytest.raises(ValueError, match='was not written by'): MEAL(tmp_path/'p.pth')
    with pytest.raises(FileNotFoundError, match='There is no teacher file'): MEAL(tmp_path/'q.pt')

def test_pickle_is_not_opened(tmp_path):
    file = tmp_path/'evil.pkl'
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path/'ran'),))
    torch.save(Evil(), file)
    with pytest.raises(ValueError, match='is a pickle, which can run any code.*pass `trust=True`'): MEAL(file)
    file.rename(tmp_path/'evil.pt')
    with pytest.raises(ValueError): MEAL(tmp_path/'evil.pt')
    assert not (tmp_path/'ran').exists()

def test_timm_name(dls, monkeypatch):
    "A name in timm is made with its weights, its statistics and its number of classes"
    asked = []
    def create(name, pretrained=False, **kw):
        asked.append((name, pretrained))
        return real(name, num_classes=3)
    real = timm.create_model
    monkeypatch.setattr(timm, 'create_model', create)
    t = as_teacher('test_convnext')
    assert asked==[('test_convnext',True)] and t.stats==[[.5]*3,[.5]*3] and t.name=='test_convnext'
    quiet(learner(dls, MEAL('test_convnext')))
    monkeypatch.undo()
    with pytest.raises(ValueError, match='no architecture `resnet1008`.*did you mean'): MEAL('resnet1008')

def test_size_a_teacher_cannot_take(dls):
    "Neither the images nor, resized, their channels"
    with pytest.raises(ValueError, match=r'`test_vit` does not take images of shape \(3, 56, 56\)'): learner(dls, MEAL(timm.create_model('test_vit', num_classes=3, in_chans=1)))

def test_any_architecture(dls):
    "A vision transformer, a `vision_learner`, a network with branches and a plain module teach the same student"
    vit = timm.create_model('test_vit', num_classes=3, img_size=56, patch_size=8)
    classic = vision_learner(dls, resnet18, pretrained=False)
    conv = nn.Sequential(nn.Conv2d(3,4,3,2,1), nn.ReLU(), nn.Conv2d(4,4,3,2,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,3))
    learn = learner(dls, MEAL([vit,classic,net(branches=2),conv], choose='each', adversarial='grl'), n_branches=2)
    assert learn.meal.teacher_paths[:2]==[[['blocks.4'],['blocks.5']], learn.meal.teacher_paths[1]] and len(learn.meal.teacher_paths[2][1])==2
    v = quiet(learn).recorder.values[-1]
    assert all(np.isfinite(v))

def test_channels_behind():
    "Maps of timm networks that keep channels last are read as what they are"
    class Behind(nn.Module):
        output_fmt = 'NHWC'
        def __init__(self):
            super().__init__()
            self.conv = nn.Identity()
        def forward(self, x): return self.conv(x.permute(0,2,3,1)).mean((1,2))
    m,x = Behind(),torch.randn(2,3,6,4)
    taps = Taps(m, [['conv']], [5], (6,4))
    taps.on = True
    m(x)
    assert torch.allclose(taps.read()[0][0], align(x, 5))

# Taps

def test_named_taps(dls, modules):
    learn = learner(dls, MEAL(modules[:2], taps=['layer2','branches.0.layer4'], teacher_taps=[['layer1','layer4'],2], dims=[20,7], gammas=[1,2,3]), n_branches=2)
    m = learn.meal
    assert m.paths==[['trunk.layer2'],['branches.0.layer4','branches.1.layer4']] and m.teacher_paths[0]==[['layer1'],['layer4']] and m.sizes==[20,7]
    quiet(learn)
    with pytest.raises(ValueError, match="`BranchNet` has no part `layr2` to tap; did you mean 'layer2'"): learner(dls, MEAL(modules[0], taps=['layr2']))
    with pytest.raises(ValueError, match='`ResNet` has no part `stages.9` to tap; choose from'): learner(dls, MEAL(modules[0], taps=1, teacher_taps=['stages.9']))
    with pytest.raises(ValueError, match='student is tapped at 1 places and teacher `ResNet` at 2'): learner(dls, MEAL(modules[0], taps=1, teacher_taps=2))
    with pytest.raises(ValueError, match='2 entries for 1 teachers'): learner(dls, MEAL(modules[0], taps=1, teacher_taps=[1,1]))
    with pytest.raises(ValueError, match='has 5 stages with a feature map, not 6: pass `taps=5`'): learner(dls, MEAL(modules[0], taps=6))

def test_a_tap_that_is_no_map(dls, modules):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.two,self.fc = nn.Identity(),nn.Linear(3,3)
        def forward(self, x): return self.fc(self.two([x])[0].mean((2,3)))
    with pytest.raises(ValueError, match='The part `two` gives a list, but a tap needs a map'): learner(dls, MEAL(Pair(), taps=1, teacher_taps=['two']))

plain_grads = {} # of MEAL without an option, by its teachers and what goes with the option
opts = [dict(kind='l1'), dict(kind='l2'), dict(kind='l1_soft'), dict(kind='l2_soft'), dict(T=4.), dict(gammas=[1.,1.,1.]), dict(taps=1), dict(taps=0), dict(dims=5),
    dict(space='max'), dict(channels='max'), dict(w_adv=.1), dict(reduce=8), dict(last_relu=True), dict(w_hard=1.), dict(adversarial='grl'), dict(adversarial=None),
    dict(choose='mean'), dict(choose='each'), dict(teacher_taps=['layer1','layer2']), dict(disc='official'), dict(batch_stats=True),
    dict(standardise=True)]

@pytest.mark.parametrize('kw', opts, ids=lambda o: '-'.join(f'{k}={v}' for k,v in o.items()))
def test_each_option_does_something(dls, modules, kw):
    teachers = 1 if 'teacher_taps' in kw else len(modules)
    base = dict(dims=[6,3]) if 'space' in kw else {}
    def grads(**kw):
        torch.manual_seed(8)
        return first_step(dls, MEAL(modules[:teachers], **base | kw), model=net())[0].grads
    key = teachers,*base
    if key not in plain_grads:
        plain_grads[key] = grads()
        assert same(plain_grads[key], grads())
    assert not same(plain_grads[key], grads(**kw), 1e-7)

def test_lr_disc(dls, modules):
    def moved(**kw):
        learn = learner(dls, MEAL(modules, **kw))
        before = [p.clone() for p in learn.model.adversary.nets.parameters()]
        quiet(learn)
        return sum((a-b).abs().sum() for a,b in zip(before, learn.model.adversary.nets.parameters()))
    assert moved(lr_disc=0.)==0 and moved(lr_disc=1e-4)<moved(lr_disc=1e-2)

def test_disc_follows_the_student(dls, modules):
    "The rate of the official discriminators is a hundredth of the student's in every step, that of V2's the student's, and ours is constant"
    class Rates(Callback):
        order = 60
        def before_fit(self): self.seen = []
        def after_batch(self):
            if self.training: self.seen.append((self.learn.opt.hypers[-1]['lr'], self.learn.model.adversary.opt.param_groups[0]['lr']))
    for disc,share in (('official',.01), ('official_v2',1.), ('own',None)):
        learn = learner(dls, MEAL(modules, disc=disc), Rates())
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, .1)
        student,discs = map(np.array, zip(*learn.rates.seen))
        assert len(set(student))>1
        assert np.allclose(discs, 1e-3 if share is None else share*student, rtol=1e-6)

def test_disc_step_is_torchs(dls, modules):
    "A step of the official discriminators: SGD with momentum .9 and decay 5e-4 on their own gradient"
    adv = Adversary([6], style='official')
    twin = deepcopy(adv.nets)
    opt = torch.optim.SGD(twin.parameters(), lr=.002, momentum=.9, weight_decay=5e-4)
    for i in range(3):
        s,t = torch.randn(1,5,6),torch.randn(5,6)
        adv.follow(.2)
        adv.update([s], [t])
        disc_loss(twin[0], s, t).backward()
        opt.step()
        opt.zero_grad()
    assert same(list(adv.nets.parameters()), list(twin.parameters()), 1e-6) and isinstance(adv.nets[0][-1], nn.ReLU)

def test_batch_statistics(dls, modules):
    "Teachers answer by the statistics of the batch, as in training mode, and stay what they were"
    learn = learner(dls, MEAL(modules[:1], batch_stats=True))
    teacher,x = learn.meal.teachers[0].model,dls.one_batch()[0].as_subclass(torch.Tensor)
    before = {k:v.clone() for k,v in teacher.state_dict().items()}
    twin = deepcopy(teacher).train()
    learn.meal.add_taps()
    found = learn.meal.query_teachers(x)[0].blocks[-1]
    assert same(found, twin(x), 1e-5) and not same(found, teacher(x), 1e-3)
    assert same(list(before.values()), list(teacher.state_dict().values())) and not any(m.training for m in teacher.modules())

def test_v2(dls, modules):
    learn = learner(dls, MEAL.v2(modules))
    assert learn.meal.choose=='mean' and learn.meal.paths==[] and learn.meal.block_loss.gammas==[1.] and learn.meal.lr_disc==1e-4
    assert [tuple(o.shape) for o in discriminator(1000, 8).parameters()][::2]==[(125,1000),(15,125),(2,15)]
    assert len(learn.model.adversary.nets)==1 and MEAL.v2(modules, reduce=2).reduce==2
    assert MEAL.v2(modules, disc='official_v2').lr_disc is None
    quiet(learn)

bad = [(dict(choose='best'), "`choose` is 'best'"), (dict(disc='weak'), "`disc` is 'weak'"), (dict(disc='official', lr_disc=1.), 'follow the student'), (dict(adversarial='gan'), "`adversarial` is 'gan'"), (dict(kind='kl'), "`kind` is 'kl'"), (dict(T=0), '`T` is 0'),
    (dict(w_hard=-1), '`w_hard` is -1'), (dict(w_adv=-1), '`w_adv` is -1'), (dict(w_feat=-1), '`w_feat` is -1'), (dict(feat='maps'), "`feat` is 'maps'"), (dict(head='new'), "`head` is 'new'"),
    (dict(w_feat=1., cache_targets=True), 'leave one of them out'), (dict(w_feat=1., feat='tokens', view=[]), "use feat='pooled'"),
    (dict(lr_disc=-1), '`lr_disc` is -1'), (dict(space='sum'), "`space` is 'sum'"), (dict(channels='sum'), "`channels` is 'sum'"),
    (dict(reduce=0), 'reduce=0: pass a whole number'), (dict(views=0), 'views=0: pass a whole number'), (dict(taps=-1), '`taps` is -1'), (dict(dims=[1]), '`dims` has 1 entries, but it takes 2'), (dict(gammas=[1]), 'it takes 3')]

@pytest.mark.parametrize('kw,said', bad, ids=[str(o[0]) for o in bad])
def test_bad_arguments(modules, kw, said):
    with pytest.raises(ValueError) as e: MEAL(modules, **kw)
    assert said in str(e.value) and '\n' not in str(e.value)

def test_bad_teachers(dls):
    for o in ([],None,()):
        with pytest.raises(ValueError, match='there is no teacher'): MEAL(o)
    with pytest.raises(TypeError, match='A teacher is a `Learner`.*not a int'): MEAL([3])
    with pytest.raises(ValueError, match='does not give one tensor of logits'): learner(dls, MEAL(nn.Sequential(nn.Conv2d(3,3,3))))
    with pytest.raises(ValueError, match='make the learner with `branch_learner`'): Learner(dls, timm.create_model('test_resnet', num_classes=3), cbs=MEAL(net()))
    assert MEAL(net(), adversarial='none').adversarial is None # as on a command line

# Images without labels

def test_unlabeled(birds, dls, modules, tmp_path):
    "They go through student and teachers beside the batch; loss of labels, metrics and mixes are of the labelled"
    files = get_image_files(birds)[:5]
    seen = []
    class See(Callback):
        order = 60
        def after_pred(self):
            if self.training: seen.append((len(self.learn.xb[0]), len(self.learn.pred), len(self.learn.meal.targets[0].p)))
        def after_loss(self):
            if not self.training or self.learn.meal.record is not None: return
            hard = F.cross_entropy(self.learn.meal.logits[0][:8], self.learn.yb[0])
            assert torch.allclose(self.learn.meal.parts['hard'], hard, atol=1e-5) and torch.equal(self.learn.pred, self.learn.meal.logits.mean(0)[:8])
    for extra in ((), (SnapMix(),)):
        learn = learner(dls, *extra, MEAL(modules, unlabeled=list(files), w_hard=1.), See())
        seen.clear()
        quiet(learn, 2)
        assert seen==[(13,8,13)]*6
    a = first_step(dls, MEAL(modules[0], adversarial=None), model=net(freeze_bn=True))[0]
    b = first_step(dls, MEAL(modules[0], adversarial=None, unlabeled=birds/'images'), model=net(freeze_bn=True))[0]
    assert len(b.im)==16 and torch.equal(a.im, b.im[:8]) and not same(a.grads, b.grads, 1e-5)
    with pytest.raises(ValueError, match='`unlabeled` has no images: there are none in'): learner(dls, MEAL(modules, unlabeled=tmp_path))

def test_unlabeled_is_augmented(birds, dls, modules):
    "Random crops and flips as in training, not the centre"
    torch.manual_seed(0)
    dl = unlabeled_dl(dls, list(get_image_files(birds))[:1]*4)
    b = dl.one_batch()[0]
    assert b.shape==(4,3,56,56) and not all(torch.equal(b[0], o) for o in b[1:]) and abs(b.mean())<3

def test_unlabeled_in_memory(birds, modules):
    mem = fine_grained_dls(birds, size=56, bs=8, in_memory=True)
    quiet(learner(mem, MEAL(modules, unlabeled=birds/'images')))

def test_unlabeled_needs_files(modules):
    x = torch.randn(16,3,56,56)
    ds = L(zip(x, torch.randint(0, 3, (16,))))
    raw = DataLoaders.from_dsets(ds, ds, bs=8, num_workers=0, device='cpu')
    raw.c = 3
    with pytest.raises(ValueError, match='make `dls` with `fine_grained_dls`'): learner(raw, MEAL(modules, unlabeled=['a.jpg']), loss_func=CrossEntropyLossFlat())

def test_training_data_without_labels(dls, modules):
    "A training set that has none trains all the same, and `w_hard` is refused"
    x = torch.randn(16,3,56,56)
    pairs = L(zip(x, torch.randint(0, 3, (16,))))
    part = DataLoaders(DataLoader(L((o,) for o in x), bs=8), DataLoader(pairs, bs=8), device='cpu')
    part.c,part.n_inp = 3,1
    for model,loss in ((net(),CrossEntropyLossFlat()), (net(),BCEWithLogitsLossFlat())):
        before = [p.clone() for p in model.parameters()]
        learn = learner(part, MEAL(modules), model=model, loss_func=loss, metrics=None)
        if isinstance(loss, CrossEntropyLossFlat): quiet(learn)
        else: quiet(learn, cbs=SkipValid())
        assert not same(before, model.parameters(), 1e-6)
    with pytest.raises(ValueError, match='`w_hard` is 1.0, but the training images have no labels'): learner(part, MEAL(modules, w_hard=1.), loss_func=CrossEntropyLossFlat())

class SkipValid(Callback):
    def before_validate(self): raise CancelFitException

def test_mixes_beside_data_without_labels(modules):
    "Teachers answer for mixed images; a mix that weighs labels is refused in one sentence"
    x = torch.randn(8,3,56,56)
    part = DataLoaders(DataLoader(L((o,) for o in x), bs=8), DataLoader(L(zip(x, torch.randint(0, 3, (8,)))), bs=8), device='cpu')
    part.c,part.n_inp = 3,1
    def learn(mix): return learner(part, mix, MEAL(modules, taps=0, adversarial=None), loss_func=CrossEntropyLossFlat())
    for mix in (MixUp(),CutMix(),CutMix(per='sample')): quiet(learn(mix))
    with pytest.raises(ValueError, match='`SnapMix` weighs labels, but these data have none'): quiet(learn(SnapMix()))

# Teachers that answer once

def counted(learn):
    calls = []
    for t in learn.meal.teachers: t.model.register_forward_hook(lambda *a: calls.append(1))
    return calls

class Keep(Callback):
    "Pixels and targets of every training batch"
    order = 20
    def before_fit(self): self.ims,self.said,self.blocks = [],[],[]
    def after_loss(self):
        if self.training:
            self.ims.append(self.learn.xb[0].clone())
            self.host = getattr(self.learn.meal.mixer, 'host', None)
            self.said.append(self.learn.meal.targets[0].p.clone())
            self.blocks.append([b.clone() for b in self.learn.meal.targets[0].blocks])

@pytest.mark.parametrize('choose', ['random','mean','each'])
def test_cached(birds, dls, modules, choose, tmp_path):
    "The second epoch asks no teacher, and has pixels, answers and blocks of the first"
    learn = learner(dls, CutMix(), MEAL(modules, choose=choose, cache_targets=True, cache_dir=tmp_path, unlabeled=birds/'images'), Keep())
    calls = counted(learn)
    quiet(learn, 1)
    n = len(calls)
    assert n==3*(1 if choose=='random' else 3) and learn.meal.target_cache.done==[0]
    a = learn.keep.ims,learn.keep.said,learn.keep.blocks
    quiet(learn, 2)
    b = learn.keep.ims,learn.keep.said,learn.keep.blocks
    assert len(calls)==n and len(b[0])==6
    for i in range(6):
        assert torch.equal(a[0][i%3], b[0][i]) and torch.allclose(a[1][i%3], b[1][i]) and all(torch.allclose(p, q) for p,q in zip(a[2][i%3], b[2][i]))

def test_cached_views(dls, modules, tmp_path):
    "Two views are two different epochs; another learner, even of another kind, goes on with the file"
    learn = learner(dls, MEAL(modules, cache_targets=True, views=2, cache_dir=tmp_path), Keep())
    calls = counted(learn)
    quiet(learn, 4)
    x = learn.keep.ims
    assert len(calls)==6 and torch.equal(x[0], x[6]) and torch.equal(x[5], x[11]) and not torch.equal(x[0], x[3])
    again = learner(dls, MEAL(modules, cache_targets=True, views=2, cache_dir=tmp_path), Keep(), model=net('test_resnet', drop_rate=.5))
    calls = counted(again)
    quiet(again, 2)
    assert not calls and torch.equal(again.keep.ims[4], x[4])
    for kw in (dict(seed=7), dict(choose='mean'), dict(T=2.), dict(dims=3)):
        other = learner(dls, MEAL(modules, cache_targets=True, views=2, cache_dir=tmp_path, **kw))
        calls = counted(other)
        quiet(other)
        assert calls, kw
    less = learner(dls, MEAL(modules[:2], cache_targets=True, views=2, cache_dir=tmp_path))
    assert less.meal.open_cache().folder!=learn.meal.target_cache.folder

def test_cached_with_balanced_classes(birds, modules, tmp_path):
    "What a loader of balanced classes draws is repeated too"
    balanced = fine_grained_dls(birds, size=32, bs=4, num_workers=0, classes=3, balanced=True)
    learn = learner(balanced, MEAL(modules, cache_targets=True, cache_dir=tmp_path))
    calls = counted(learn)
    quiet(learn, 1)
    n = len(calls)
    quiet(learn, 2)
    assert len(calls)==n

def test_cached_for_one_view_of_the_images(dls, modules, tmp_path):
    "Transforms with other arguments are another file; the same ones find theirs, whatever they have drawn meanwhile"
    def made(view): return learner(dls, MEAL(modules, cache_targets=True, cache_dir=tmp_path, view=view))
    def where(view): return made(view).meal.open_cache().folder
    used = aug_transforms(max_rotate=10)
    a = where(used)
    quiet(made(used))
    assert a==where(used)==where(aug_transforms(max_rotate=10))
    others = [where(o) for o in (aug_transforms(max_rotate=30), aug_transforms(max_rotate=10, max_warp=.3), Flip(p=.2), Flip(p=.8))]
    assert len({a,*others})==5

def test_cached_leaves_randomness_alone(dls, modules, tmp_path):
    "The seed that repeats an epoch's images is not left in any of the generators: what was drawn before a run counts after it"
    learn = learner(dls, MEAL(modules, cache_targets=True, cache_dir=tmp_path))
    def after(seed):
        set_seed(seed)
        quiet(learn)
        return torch.rand(1).item(),random.random(),np.random.rand()
    for _ in range(2): # whether the answers are written or read
        a,b = after(3),after(4)
        assert all(x!=y for x,y in zip(a, b)) and after(3)==after(3)

def test_cached_unfinished(dls, modules, tmp_path):
    "An epoch that was cut short is not taken for one"
    class Stop(Callback):
        def before_step(self):
            if self.learn.iter==1: raise KeyboardInterrupt
    learn = learner(dls, MEAL(modules, cache_targets=True, cache_dir=tmp_path))
    with pytest.raises(KeyboardInterrupt): quiet(learn, cbs=Stop())
    assert learn.meal.target_cache.done==[]
    calls = counted(learn)
    quiet(learn)
    assert len(calls)==3 and learn.meal.target_cache.done==[0] and learn.meal.target_cache.student_rng is None

def test_cached_changed_pixels(birds, modules, tmp_path):
    "Where an epoch begins with other pixels, the teachers answer anew, and the answers are those of the new pixels; where it goes on with others it is refused"
    d = fine_grained_dls(birds, size=56, bs=8, num_workers=0)
    learn = learner(d, MEAL(modules, cache_targets=True, cache_dir=tmp_path))
    quiet(learn)
    class Flip(Callback):
        order = 3
        def before_batch(self): self.learn.xb = (self.learn.xb[0].flip(-1),)
    calls = counted(learn)
    with pytest.warns(UserWarning, match='the teachers answer anew'): quiet(learn, cbs=Flip())
    quiet(learn, cbs=Flip())
    assert len(calls)==3
    class Late(Flip):
        def before_batch(self):
            if self.iter: return
            super().before_batch()
    with pytest.raises(ValueError, match='the images of this epoch are not those that the answers in'): quiet(learn, cbs=Late())
    quiet(learn)
    assert len(calls)==6

def test_cached_corrected_teacher(dls, modules, tmp_path):
    "A teacher whose classes turn out to be in another order, or whose statistics are others, is asked again"
    runs = []
    for t in (modules[0], Teacher(modules[0], vocab=list(dls.vocab)[::-1]), Teacher(modules[0], stats=([.5]*3,[.5]*3))):
        learn = learner(dls, MEAL([t], cache_targets=True, cache_dir=tmp_path), Keep())
        calls = counted(learn)
        quiet(learn)
        runs.append((len(calls),learn.keep.said[0]))
    assert [n for n,_ in runs]==[3,3,3] and not torch.allclose(runs[0][1], runs[1][1]) and not torch.allclose(runs[0][1], runs[2][1])

@pytest.mark.parametrize('cached', [False,True])
def test_processes_draw_alike_whether_to_mix(dls, modules, tmp_path, monkeypatch, cached):
    "By a number of their own, or, where an epoch is to repeat, by the generators that stored answers seed in all of them"
    from cekd_fastai.mix import callback
    monkeypatch.setattr(callback, 'together', lambda: True)
    monkeypatch.setattr(callback, 'common_seed', lambda: 7)
    seen = []
    class Look(Callback):
        order,run_valid = 4.2,False
        def before_batch(self): seen.append((self.learn.cut_mix.common,self.learn.cut_mix.record is not None))
    kw = dict(cache_targets=True, cache_dir=tmp_path, views=1) if cached else {}
    quiet(learner(dls, CutMix(prob=.5), MEAL(modules, taps=0, adversarial=None, **kw), Look()), 4)
    mixed = [o for _,o in seen]
    n = len(mixed)//4
    epochs = [mixed[i*n:(i+1)*n] for i in range(4)]
    assert {o for o,_ in seen}=={None if cached else 7}
    assert all(o==epochs[0] for o in epochs)==cached

def test_cached_other_data(birds, modules, tmp_path):
    "Another mix has answers of its own, a mix that stops is refused, and loaders of another size are asked about, unlabelled images too"
    d = [fine_grained_dls(birds, size=s, bs=8, num_workers=0) for s in (56,40)]
    plain,mixed = (learner(d[0], *cbs, MEAL(modules, cache_targets=True, cache_dir=tmp_path, unlabeled=birds/'images')) for cbs in ((),(CutMix(),)))
    quiet(plain)
    calls = counted(mixed)
    quiet(mixed)
    assert len(calls)==3
    with pytest.raises(ValueError, match='stops at 0.5 of the run'): learner(d[0], CutMix(stop_at=.5), MEAL(modules, cache_targets=True, cache_dir=tmp_path))
    plain.dls = d[1]
    calls = counted(plain)
    with pytest.warns(UserWarning, match='answer anew'): quiet(plain)
    assert len(calls)==3+3 # once each to see whether they take this size

def test_cached_student_is_free(dls, modules, tmp_path):
    "The data repeats, the dropout of the student does not"
    seen = []
    learn = learner(dls, MEAL(modules, cache_targets=True, cache_dir=tmp_path), Keep(), model=net('test_resnet', drop_rate=.5))
    class Draw(Callback):
        order,run_valid = 20,False
        def after_pred(self): seen.append(torch.rand(4))
    quiet(learn, 3, cbs=Draw())
    x = learn.keep.ims
    assert torch.equal(x[0], x[3]) and torch.equal(x[0], x[6]) and len({tuple(o.tolist()) for o in seen})==9

def test_cached_gives_the_generators_back(dls, modules, tmp_path):
    "After lr_find and early ends the generators go on from where they were, and a seed that is set afterwards holds"
    learn = learner(dls, MEAL(modules, cache_targets=True, cache_dir=tmp_path))
    def drawn(seed):
        set_seed(seed)
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
        assert not any(m._forward_hooks for m in learn.model.modules())
        return torch.rand(1).item()
    assert drawn(9)!=drawn(11)
    def after_validation():
        set_seed(5)
        learn.validate()
        return torch.rand(1)
    want = after_validation()
    class Stop(Callback):
        def before_step(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet(learn, cbs=Stop())
    learn.remove_cbs([o for o in learn.cbs if isinstance(o, Stop)])
    assert torch.equal(after_validation(), want)

def test_peers_and_second_learner(birds, dls, modules, tmp_path):
    "Peers learn from outputs, one branch each; a callback that is used again starts with its own arguments; a new rate of the discriminators holds after a load"
    from cekd_fastai.learner import meal_learner
    with pytest.raises(ValueError, match='pass `taps=0`'): meal_learner(dls, ['test_resnet','test_efficientnet'], modules, pretrained=False)
    quiet(meal_learner(dls, ['test_resnet','test_efficientnet'], modules, taps=0, pretrained=False))
    cb = MEAL(modules, dims=None)
    first = learner(fine_grained_dls(birds, size=112, bs=8, num_workers=0), cb).meal.sizes
    assert learner(dls, cb).meal.sizes==learner(dls, MEAL(modules, dims=None)).meal.sizes!=first
    old,new = (learner(dls, MEAL(modules, lr_disc=o), path=tmp_path) for o in (1e-3,1e-5))
    quiet(old)
    old.save('m')
    new.create_opt()
    new.load('m')
    assert new.model.adversary.opt.param_groups[0]['lr']==1e-5

@pytest.mark.parametrize('kind', ['memory','aug','workers'])
def test_cached_any_loader(birds, modules, kind, tmp_path):
    "Crops of whole batches, augmentation of batches, and worker processes repeat alike"
    if kind=='memory': d = fine_grained_dls(birds, size=56, bs=8, in_memory=True)
    elif kind=='aug': d = fine_grained_dls(birds, size=56, bs=8, num_workers=0, batch_tfms=aug_transforms())
    else: d = fine_grained_dls(birds, size=56, bs=8, num_workers=2)
    learn = learner(d, MEAL(modules, cache_targets=True, cache_dir=tmp_path), Keep())
    quiet(learn, 2)
    x = learn.keep.ims
    assert all(torch.equal(a, b) for a,b in zip(x[:3], x[3:])) and not torch.equal(x[0], x[1])

# Manners

def test_validation_is_the_plain_loss(dls, modules):
    learn = quiet(learner(dls, MEAL(modules)))
    valid = learn.recorder.values[-1][1]
    with learn.no_bar(): preds,y = learn.get_preds()
    assert torch.allclose(preds.sum(1), torch.ones(len(y)), atol=1e-5)
    assert abs(valid-F.nll_loss(preds.log(), y).item())<1e-4
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','accuracy','sim','adv','disc','time']
    assert type(learn.loss_func) is CrossEntropyLossFlat and len(learn.validate())==2
    assert not any(m._forward_hooks for m in learn.model.modules())

def test_building_draws_nothing(dls, modules):
    set_seed(1)
    rng = dls.train.rng.getstate()
    learner(dls, MEAL(modules, adversarial=None), model=(model := net()))
    torch.manual_seed(2)
    a,b = random.getstate(),np.random.get_state()[1].copy()
    peek(dls)
    assert random.getstate()==a and (np.random.get_state()[1]==b).all() and dls.train.rng.getstate()==rng
    assert torch.equal(torch.rand(2), torch.manual_seed(2) and torch.rand(2))

def test_bf16(dls, modules):
    "Under autocast on the CPU, teachers too; the discriminators stay in float32"
    learn = learner(dls, CutMix(), MEAL(modules, choose='each'))
    kinds = []
    learn.meal.teachers[0].model.conv1[0].register_forward_hook(lambda m, i, o: kinds.append(o.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16): quiet(learn)
    assert set(kinds)=={torch.bfloat16} and np.isfinite(learn.recorder.values[-1][3:]).all()
    assert all(p.dtype==torch.float32 for p in learn.model.adversary.nets.parameters())

def test_loss_scale(dls, modules):
    "A loss scale reaches the student's gradient once and the discriminators' not at all"
    class Scale(Callback):
        order = 10
        def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
    def run(*cbs):
        torch.manual_seed(6)
        cb,learn = first_step(dls, MEAL(modules, adversarial='grl'), *cbs, model=net(freeze_bn=True))
        return cb.grads,[p.clone() for p in learn.model.adversary.nets.parameters()]
    (g,d),(gs,ds) = run(),run(Scale())
    assert same([o*1024 for o in g], gs, 1e-4) and same(d, ds)

def test_gradient_accumulation(dls, modules):
    a = first_step(dls, MEAL(modules), model=net(freeze_bn=True))[0]
    b = first_step(dls, MEAL(modules), GradientAccumulation(8), model=net(freeze_bn=True))[0]
    assert same(a.grads, b.grads, 1e-5)
    quiet(learner(dls, MEAL(modules), GradientAccumulation(16)), 2)

def test_lr_find(dls, modules):
    "It leaves weights, discriminators and their optimiser as they were"
    learn = quiet(learner(dls, MEAL(modules)))
    ad = learn.model.adversary
    before = {k:v.clone() for k,v in learn.model.state_dict().items()},[p.clone() for p in ad.nets.parameters()],ad.opt.state_dict()['state'][0]['step'].clone()
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=7, show_plot=False)
    assert all(torch.equal(v, before[0][k]) for k,v in learn.model.state_dict().items())
    assert same(ad.nets.parameters(), before[1], 0) and ad.opt.state_dict()['state'][0]['step']==before[2]
    quiet(learn)

def test_resume(dls, modules, tmp_path):
    "A new learner that loads a checkpoint goes on as the old one does, discriminators and their optimiser included"
    def step(learn):
        set_seed(5)
        dls.train.rng = random.Random(5)
        quiet(learn)
        return [p.clone() for p in learn.model.parameters()],[p.clone() for p in learn.model.adversary.nets.parameters()]
    make = lambda: learner(dls, MEAL(modules, adversarial='grl'), path=tmp_path)
    old = quiet(make(), 2)
    old.save('ck')
    new = make()
    assert not same(new.model.adversary.nets.parameters(), old.model.adversary.nets.parameters())
    new.load('ck')
    assert new.model.adversary.opt.state_dict()['state'][0]['step']==6
    (a,b),(c,d) = (step(o.load('ck')) for o in (old,new))
    assert same(a, c, 1e-7) and same(b, d, 1e-7)

def test_checkpoints_are_exchangeable(dls, modules, tmp_path):
    "A plain learner loads MEAL's checkpoint and the other way round, strictly; discriminators of other sizes are left alone with a word"
    with_,plain = quiet(learner(dls, MEAL(modules), path=tmp_path)),quiet(learner(dls, path=tmp_path))
    with_.save('with')
    plain.save('plain')
    plain.load('with')
    assert same(plain.model.parameters(), with_.model.parameters(), 0)
    with_.load('plain')
    other = learner(dls, MEAL(modules, taps=0), path=tmp_path)
    with pytest.warns(UserWarning, match='discriminators of the checkpoint are of other sizes'): other.load('with')
    assert same(other.model.parameters(), with_.load('with').model.parameters(), 0)

def test_save_model_callback(dls, modules, tmp_path):
    learn = learner(dls, MEAL(modules), path=tmp_path)
    quiet(learn, 2, cbs=SaveModelCallback(monitor='sim', comp=np.less, with_opt=True))
    ck = torch.load(tmp_path/'models'/'model.pth', weights_only=False)
    assert ck['model']._metadata['adversary']['adversary']['opt']['state'][0]['step'] in (3,6)

events = ['before_batch','after_pred','after_loss','before_step','after_batch','after_train']

errors = (CancelFitException,CancelEpochException,CancelTrainException,ZeroDivisionError)
cuts = [(o,KeyboardInterrupt) for o in events] + [(o,ex) for o in ('after_pred','after_loss') for ex in errors]
cuts += [('after_loss',CancelBatchException), ('before_step',CancelStepException), ('before_step',CancelFitException)]

@pytest.mark.parametrize('where,ex', cuts)
def test_interrupts_leave_nothing(dls, modules, where, ex, tmp_path):
    "Whatever ends a run and wherever: predictions, exports and the next run are what they would have been"
    class Stop(Callback):
        order,run_valid = 45,False
        def stop(self): raise ex('stopped') if ex is ZeroDivisionError else ex
    setattr(Stop, where, Stop.stop)
    learn = learner(dls, MEAL(modules, unlabeled=learn_files(dls)), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        try: learn.fit(1, 0., wd=0., cbs=Stop())
        except (KeyboardInterrupt,ZeroDivisionError): pass
        learn.export('cut.pkl')
        probs = learn.get_preds()[0]
        assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-5)
        assert not any(m._forward_hooks for m in learn.model.modules()) and len(learn.validate())==2
        learn.fit(1, 1e-3)
    assert len(learn.recorder.values[-1])==6 and learn.meal.targets is None and learn.meal.student_taps is None
    assert (tmp_path/'cut.pkl').stat().st_size < 2_600_000
    assert load_learner(tmp_path/'cut.pkl').meal.teachers==()

def learn_files(dls): return list(dls.train.items[:8])

def test_export(dls, modules, tmp_path):
    "As large as the export of a plain student, and as useful: predictions in a process of its own, and a clear word when it is to be trained"
    big = timm.create_model('resnet18', num_classes=3)
    meal = MEAL([*modules,big], unlabeled=learn_files(dls), cache_targets=True, cache_dir=tmp_path/'c')
    learn,plain = (quiet(learner(dls, *cbs, path=tmp_path)) for cbs in ((meal,), ()))
    learn.export('meal.pkl')
    plain.export('plain.pkl')
    a,b = ((tmp_path/o).stat().st_size for o in ('meal.pkl','plain.pkl'))
    assert abs(a-b)<.01*b
    save_net(learn.model, tmp_path/'meal.pt')
    save_net(plain.model, tmp_path/'plain.pt')
    a,b = ((tmp_path/o).stat().st_size for o in ('meal.pt','plain.pt'))
    assert abs(a-b)<.01*b
    quiet(learn) # the export has taken nothing away
    code = f"""from fastai.vision.all import *
learn = load_learner({str(tmp_path/'meal.pkl')!r})
name,i,probs = learn.predict(get_image_files({str(dls.table.root)!r})[0])
assert name==learn.dls.vocab[i] and len(probs)==3 and abs(probs.sum()-1)<1e-4 and learn.meal.teachers==()
dl = learn.dls.test_dl(get_image_files({str(dls.table.root)!r})[:4])
assert len(learn.get_preds(dl=dl)[0])==4"""
    p = forks.run(code, env=dict(HF_HUB_OFFLINE='1'))
    assert p.returncode==0, p.stderr
    loaded = load_learner(tmp_path/'meal.pkl')
    loaded.dls = dls
    with pytest.raises(ValueError, match='has no teachers here'): quiet(loaded)

def test_freeze_and_fine_tune(dls, modules):
    learn = learner(dls, MEAL(modules, adversarial='grl'))
    learn.freeze()
    before = [p.clone() for p in learn.model.trunk.conv1[0].parameters()]
    quiet(learn)
    assert same(before, learn.model.trunk.conv1[0].parameters(), 0)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, 1e-3)
    assert not same(before, learn.model.trunk.conv1[0].parameters(), 0)

def test_added_late(dls, modules):
    "Passed to `fit`, or added to a finished learner"
    learn = learner(dls)
    quiet(learn, cbs=MEAL(modules))
    assert 'sim' in learn.recorder.metric_names and not hasattr(learn, 'meal')
    quiet(learn)
    learn.add_cb(MEAL(modules[:1], choose='mean'))
    quiet(learn)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)
    learn.remove_cb(MEAL)
    quiet(learn)

def test_one_teacher_object_two_learners(dls, modules):
    t = as_teacher(modules[0])
    a,b = learner(dls, MEAL(t, dims=4)),learner(dls, MEAL(t, dims=9))
    for l in (a,b,a): quiet(l)
    assert not any(m._forward_hooks for m in t.model.modules())

@pytest.mark.parametrize('mix', [MixUp,CutMix,SnapMix])
def test_beside_a_mix(dls, modules, mix):
    "The teacher answers for the mixed image"
    learn = learner(dls, mix(1.), MEAL(modules[0], adversarial=None, taps=0), Keep())
    set_seed(1)
    quiet(learn)
    with torch.no_grad(): assert torch.allclose(modules[0](learn.keep.ims[-1]).softmax(1), learn.keep.said[-1], atol=1e-5)
    assert not torch.allclose(learn.keep.ims[-1], learn.keep.host)

def test_batch_of_one(birds, modules):
    d = fine_grained_dls(birds, size=56, bs=1, num_workers=0)
    for mode in modes: quiet(learner(d, MEAL(modules, adversarial=mode, taps=1), model=net(freeze_bn=True)), cbs=FewBatches())

class FewBatches(Callback):
    def after_batch(self):
        if self.learn.iter==2: raise CancelFitException

class Wrap(Callback):
    "Gradients of the first step; several processes share them"
    order = 11
    def __init__(self, world): self.world = world
    def before_fit(self):
        if self.world>1: self.learn.model = DistributedDataParallel(self.learn.model)
    def before_step(self): self.g = [p.grad.clone() for p in self.learn.model.parameters()]
    def before_validate(self): raise CancelFitException

def ranked(rank, world):
    "Gradients of the network and weights of the discriminators after a step of one process"
    torch.manual_seed(0)
    x,y = torch.randn(16,3,56,56),torch.randint(0,3,(16,))
    part = slice(None) if world==1 else slice(8*rank, 8*rank+8)
    ds = L(zip(x[part], y[part]))
    dls = DataLoaders.from_dsets(ds, ds, bs=len(ds), num_workers=0, device='cpu', shuffle=False)
    dls.c,res = 3,{}
    for mode in ('joint','grl','alternate'):
        torch.manual_seed(1)
        teacher = net('test_efficientnet').eval()
        teacher.heads[0][-1].weight.data.mul_(30)
        model = net(freeze_bn=True)
        torch.manual_seed(rank) # discriminators start from those of rank 0
        learn = learner(dls, MEAL(teacher, adversarial=mode), model=model, loss_func=CrossEntropyLossFlat(), metrics=None)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=(w:=Wrap(world)))
        res[mode] = [w.g, [p.data for p in getattr(learn.model, 'module', learn.model).adversary.nets.parameters()]]
    return res

def test_two_processes(tmp_path):
    "Two processes with half a batch each get the gradients, and the discriminators, of one with all of it"
    for mode,one,a,b in zip(('joint','grl','alternate'), *(o.values() for o in forks.one_and_two(ranked, tmp_path))):
        assert same(a[0], b[0], 1e-7) and same(a[1], b[1], 1e-7)
        assert same(one[1], a[1], 1e-5) and same(one[0], a[0], 1e-5), mode

# The learner

def test_meal_learner(dls, modules):
    "Arguments of the callback and of the learner in one call; an unknown one is named"
    from cekd_fastai.learner import meal_learner
    learn = meal_learner(dls, 'test_resnet', modules, adversarial='grl', taps=1, n_branches=2, pretrained=False, metrics=accuracy, wd=.1, cbs=CutMix())
    assert learn.model.n_branches==2 and learn.meal.adversarial=='grl' and len(learn.meal.paths)==1 and learn.wd==.1 and learn.cut_mix
    quiet(learn)
    assert meal_learner(dls, 'test_resnet', modules, pretrained=False).model.n_branches==1
    with pytest.raises(TypeError, match='tapz'): meal_learner(dls, 'test_resnet', modules, pretrained=False, tapz=1)
