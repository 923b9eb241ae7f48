"Any network as a teacher: heads for other classes, names without a network, ranking, features through a projection, and timm's own distillation beside ours."
import json,time
import pytest, timm, torch, torch.nn.functional as F
from copy import deepcopy
from torch import nn
from timm.task import FeatureDistillationTask,LogitDistillationTask
from fastai.vision.all import (BCEWithLogitsLossFlat,CancelBatchException,Callback,CrossEntropyLossFlat,DataLoaders,Flip,L,Learner,SGD,
    accuracy,imagenet_stats)
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.data.benchmarks import read_table
from cekd_fastai.drawing.dataset import make_birds
from cekd_fastai import hub
from cekd_fastai.branches import branch_net,branch_splitter,save_net
from cekd_fastai.cekd import cekd_losses
from cekd_fastai.cli import cekd_train
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.losses import kd_loss,soft_log_probs,soft_probs,z_scores
from cekd_fastai.mix.core import MixRecord
from cekd_fastai.online.callback import KDCL
from cekd_fastai.meal import heads
from cekd_fastai.meal.callback import MEAL
from cekd_fastai.meal.heads import held_out,outputs,plain_dl,train_labels
from cekd_fastai.meal.project import FeatureTap,Projection
from cekd_fastai.meal.rank import rank_teachers
from cekd_fastai.meal.several import ensemble_accuracy
from cekd_fastai.meal.teachers import Teacher,as_teacher

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    "Three species of different genera, eight training images each"
    birds = make_birds(tmp_path_factory.mktemp('teach')/'birds', n_species=9, n_images=12, n_train=8, size=40, progress=False)
    return fine_grained_dls(birds, size=32, bs=8, num_workers=0, in_memory=True, classes=read_table(birds).classes[::4])

def colours(n_out=None, side=8):
    "The mean colours of places, and a linear layer on them"
    torch.manual_seed(1)
    body = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())
    return body.append(nn.Linear(3*side*side, n_out)) if n_out else body

def learner(dls, *cbs, model=None, **kw):
    torch.manual_seed(2)
    model = model or branch_net('test_resnet', dls.c, 1, pretrained=False)
    return Learner(dls, model, splitter=branch_splitter, cbs=[BranchLoss(),Components(),*cbs], metrics=accuracy, **kw)

def quiet(learn, epochs=1, lr=1e-3):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr)
    return learn

def sees(learn, x): return learn.meal.teachers[0](x)

# A head for other classes

@pytest.mark.parametrize('make', [lambda: timm.create_model('test_vit', img_size=32, patch_size=8, num_classes=0), lambda: timm.create_model('test_resnet'),
    lambda: timm.create_model('test_convnext', num_classes=7), lambda: branch_net('test_resnet', 5, 2, pretrained=False), lambda: colours(5), colours],
    ids=['no classifier','of ImageNet','of seven','with branches','a sequence','colours alone'])
def test_a_head_for_other_classes(dls, make, capsys):
    "Fitted on frozen features, and the teacher that was given stays as it is"
    given = Teacher(make())
    before = {k:v.clone() for k,v in given.state_dict().items()}
    learn = learner(dls, MEAL(given, taps=0))
    t,x = learn.meal.teachers[0],dls.valid.one_batch()[0]
    assert t(x).shape==(len(x),3) and t.vocab==list(dls.vocab) and given.head is None
    assert 'a head for 3 classes was fitted on its frozen features from 24 training images; without the 6 that were held out' in capsys.readouterr().out
    assert all(torch.equal(v, given.state_dict()[k]) for k,v in before.items())
    quiet(learn)

def test_the_head_is_the_fit_on_frozen_features(dls):
    "Its training accuracy is that of a fit, its logits a linear function of the features"
    t = as_teacher(colours(5), dls=dls)
    with dls.train.dataset.set_split_idx(1): x,y = dls.train.new(shuffle=False, drop_last=False, bs=24).one_batch()
    assert (t(x).argmax(1)==y).float().mean()>.6 # chance is a third
    assert torch.allclose(t(x), t.head(t.model(x)), atol=1e-5) and t.model(x).shape[1]==192

def test_a_head_is_fitted_once(dls, tmp_path):
    "In memory, in a folder, and again for other weights"
    net,passes = colours(4),[]
    net[1].register_forward_hook(lambda *_: passes.append(1))
    def count(**kw):
        passes.clear()
        t = as_teacher(net, dls=dls, cache_dir=tmp_path, **kw)
        return len(passes),t.head.weight
    heads._kept.clear()
    first,w = count()
    second,again = count()
    heads._kept.clear()
    third,filed = count()
    assert first>second==third and torch.equal(w, again) and torch.equal(w, filed) and len(list(tmp_path.glob('head-*.pt')))==1
    net[0].output_size = 7 # other features of the same images, but a linear layer of the old size
    net[2] = nn.Linear(147, 4)
    assert count()[0]==first and len(list(tmp_path.glob('head-*.pt')))==2

def test_a_fit_disturbs_no_random_number(dls):
    net = colours(6, side=4)
    state = torch.get_rng_state()
    as_teacher(net, dls=dls)
    assert torch.equal(state, torch.get_rng_state())
    assert dls.train.dataset.split_idx==0

def test_classes_in_part(dls):
    "Same names: matched. More: ours are taken. Only some: a head, or one sentence"
    names = list(dls.vocab)
    x = dls.valid.one_batch()[0]
    more = Teacher(colours(4), vocab=['heron',names[2],names[0],names[1]])
    want = more.model(x)[:,[2,3,1]]
    assert torch.allclose(as_teacher(more, dls=dls)(x), want)
    some = Teacher(colours(2), vocab=['heron',names[1]])
    assert as_teacher(some, dls=dls).head is not None
    with pytest.raises(ValueError, match="and they differ: it lacks .* and it alone has 'heron'. Take a teacher of the same classes, or let a head be fitted .*head='fit'") as e:
        as_teacher(some, dls=dls, head='match')
    assert '\n' not in str(e.value)
    same = Teacher(colours(3), vocab=names)
    assert as_teacher(same, dls=dls).head is None and as_teacher(same, dls=dls, head='fit').head is not None

def test_what_no_head_fits(dls):
    multi = DataLoaders.from_dsets(L((torch.randn(3,8,8),torch.ones(3)) for _ in range(4)), bs=2, num_workers=0, device='cpu')
    multi.c = 3
    with pytest.raises(ValueError, match='no head can be fitted, since the labels are not one class an image'): as_teacher(colours(5), dls=multi)
    with pytest.raises(ValueError, match='Teacher: `head` is'): as_teacher(colours(5), dls=dls, head='guess')
    with pytest.raises(ValueError, match='`standardise` is for one class an image'):
        learner(multi, MEAL(colours(3), standardise=True, taps=0, adversarial=None), loss_func=BCEWithLogitsLossFlat())

def test_held_out_images():
    y = torch.tensor([0]*10+[1]*5+[2])
    held = held_out(y)
    assert [int(held[y==c].sum()) for c in range(3)]==[2,1,0] and torch.equal(held, held_out(y)) and not torch.equal(held, held_out(y, seed=1))

def test_a_size_of_its_own(dls):
    "A transformer of one size gets the student's images resized; its taps and statistics too"
    vit = timm.create_model('test_vit', num_classes=3, img_size=48, dynamic_img_size=False)
    learn = learner(dls, MEAL(vit, taps=1))
    x = dls.valid.one_batch()[0]
    mean,std = (torch.tensor(o)[:,None,None] for o in imagenet_stats)
    small = ((x*std+mean)-.5)/.5
    with torch.no_grad(): want = vit.eval()(F.interpolate(small, (48,48), mode='bilinear', antialias=True))
    assert torch.allclose(sees(learn, x), want, atol=1e-4)
    quiet(learn)

def test_pictures_that_grow(dls):
    "A teacher of the size with which the learner was made gets the images of later data resized"
    vit = timm.create_model('test_vit', num_classes=3, img_size=32, dynamic_img_size=False)
    learn = learner(dls, MEAL(vit, taps=0, adversarial=None))
    quiet(learn)
    assert learn.meal.teachers[0].size is None
    learn.dls = fine_grained_dls(dls.table, size=64, bs=8, num_workers=0)
    quiet(learn)
    assert learn.meal.teachers[0].size==(32,32)

# Names and files

@pytest.fixture
def no_network(monkeypatch):
    "A hub at an address where nobody listens"
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(hub, '_asked', {})

@pytest.mark.parametrize('name', ['test_vit2','hf-hub:timm/test_vit2.r160_in1k','hf_hub:timm/test_vit2.r160_in1k'])
def test_a_name_without_network(no_network, name, capfd):
    "One sentence within seconds, and no line about retries"
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=f'The weights of `{name}` could not be downloaded .*pass a file written by `deploy`') as e: as_teacher(name)
    assert time.perf_counter()-start<8 and '\n' not in str(e.value) and 'Retry' not in capfd.readouterr().err

def test_a_backbone_without_network(no_network, capfd):
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match='The weights of `test_vit2` could not be downloaded .*pass `weights=`') as e: branch_net('test_vit2', 3)
    assert time.perf_counter()-start<8 and '\n' not in str(e.value) and 'Retry' not in capfd.readouterr().err

def test_the_hub_comes_back(no_network):
    "The mode is left behind whatever happens, and a hub that answers is asked once"
    from huggingface_hub import constants
    with pytest.raises(KeyError), hub.quick_hub(1.):
        assert constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE
    hub._asked[constants.ENDPOINT] = time.monotonic(),True
    was = constants.HF_HUB_ETAG_TIMEOUT,constants.HF_HUB_DOWNLOAD_TIMEOUT
    with hub.quick_hub(): assert not constants.HF_HUB_OFFLINE
    with hub.quick_hub(2.): assert (constants.HF_HUB_ETAG_TIMEOUT,constants.HF_HUB_DOWNLOAD_TIMEOUT)==(2.,2.) # the client does not look at the socket's
    assert (constants.HF_HUB_ETAG_TIMEOUT,constants.HF_HUB_DOWNLOAD_TIMEOUT)==was

def test_names_of_torchvision_and_timm(monkeypatch):
    "A name with a prefix is no file, and a network of torchvision has ImageNet's statistics"
    import torchvision
    real,asked = torchvision.models.get_model,[]
    monkeypatch.setattr(torchvision.models, 'get_model', lambda name, weights=None, **kw: asked.append(weights) or real(name))
    t = as_teacher('torchvision/squeezenet1_1')
    assert asked==['DEFAULT'] and [list(o) for o in t.stats]==[list(o) for o in imagenet_stats]
    real_timm = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained=False, **kw: real_timm('test_resnet') if pretrained else None)
    assert as_teacher('timm/test_resnet').stats==[[.5]*3]*2 and as_teacher('hf-hub:someone/birds').name=='hf-hub:someone/birds'

def test_weights_alone(tmp_path):
    for i,o in enumerate((colours(3).state_dict(), dict(state_dict=colours(3).state_dict(), epoch=3))):
        torch.save(o, tmp_path/f'{i}.pth')
        with pytest.raises(ValueError, match=r'holds weights alone \(2 tensors\).*fill it with `load_weights'): as_teacher(tmp_path/f'{i}.pth')

def test_a_teacher_without_weights(dls):
    "Its classes are brought into order and its images renormalised like those of any other"
    class Brightest(nn.Module):
        def forward(self, x): return x.mean((2,3))
    x = torch.rand(2, 3, 4, 4)
    t = Teacher(Brightest(), vocab=['c','a','b'], stats=([.5]*3,[.5]*3)).match(['a','b','c'], ([0.]*3,[1.]*3))
    assert torch.allclose(t(x), ((x-.5)/.5).mean((2,3))[:,[1,2,0]])

def test_a_second_head(dls, tmp_path):
    "A teacher with a fitted head that meets other classes keeps its features, whatever layers they end with"
    torch.manual_seed(1)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))
    first_one = as_teacher(net, dls=dls)
    birds = make_birds(tmp_path/'birds', n_species=4, n_images=8, n_train=6, size=40, progress=False)
    second = as_teacher(first_one, dls=fine_grained_dls(birds, size=32, bs=8, num_workers=0, in_memory=True))
    x = dls.valid.one_batch()[0]
    assert second.head.out_features==4 and torch.equal(second.model(x), first_one.model(x)) and torch.equal(second.model(x), net[:4](x))

# Ranking

def test_ranking(dls):
    "Numbers of images that the heads have not seen, computed again by hand"
    nets = [colours(5),colours(6, side=2),Teacher(colours(3, side=3), vocab=list(dls.vocab))]
    table = rank_teachers(dls, nets)
    held = held_out(train_labels(dls))
    rows = held.nonzero()[:,0]
    batches = dls.train.new(shuffle=False, drop_last=False, bs=24)
    with dls.train.dataset.set_split_idx(1): x,y = batches.one_batch()
    z = nets[2](x[rows])
    p = z.softmax(1)
    third = table[table['parameters (M)'].round(6)==round(84/1e6, 6)].iloc[0]
    assert third.accuracy==pytest.approx((z.argmax(1)==y[rows]).float().mean().item())
    assert third.entropy==pytest.approx(-(p*p.log()).sum(1).mean().item(), abs=1e-5)
    assert third['multiply-adds (M)']==pytest.approx(81/1e6)
    assert table.accuracy.is_monotonic_decreasing and table.agreement.between(0, 1).all()
    refit = as_teacher(nets[0], dls=dls) # fitted on all: not what the table has
    assert refit.fitted.accuracy in table.accuracy.tolist()
    with pytest.raises(ValueError, match='There is no teacher to rank'): rank_teachers(dls, [])
    on_valid = rank_teachers(dls, nets[2], dl=dls.valid)
    (z,),y = outputs([nets[2]], dls.valid, 'cpu')
    assert on_valid.accuracy.item()==pytest.approx((z.argmax(1)==y).float().mean().item())
    assert on_valid.entropy.item()==pytest.approx(torch.distributions.Categorical(logits=z).entropy().mean().item(), abs=1e-5)

class Says(nn.Module):
    "Logits from a table, by the brightness of the picture"
    def __init__(self, *rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows), requires_grad=False)
    def forward(self, x): return self.rows[x[:,0,0,0].long()]

def test_the_ensemble_is_the_mean_softmax(dls):
    "Each is right half of the time, as is the mean of their logits; the mean of their probabilities is always right"
    a,b = Says((0.,10.,9.9), (3.,0.,0.)),Says((1.,-99.,-1.), (0.,1.,0.))
    x,y = torch.arange(2.)[:,None,None,None].expand(2,3,8,8),torch.tensor([0,0])
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), loss_func=CrossEntropyLossFlat())
    res = ensemble_accuracy([Teacher(o, name) for o,name in ((a,'a'),(b,'b'))], learn, [(x,y)])
    assert res==dict(teachers=[dict(name='a', accuracy=.5),dict(name='b', accuracy=.5)], ensemble=1.)

def test_ranking_on_other_data(dls, tmp_path):
    "A head that was fitted on other images of the same classes is judged on these"
    birds = make_birds(tmp_path/'birds', n_species=9, n_images=12, n_train=8, size=40, seed=9, progress=False)
    other = fine_grained_dls(birds, size=32, bs=8, num_workers=0, classes=list(dls.vocab))
    assert list(other.vocab)==list(dls.vocab)
    t = as_teacher(colours(5), dls=other)
    held = held_out(train_labels(dls)).nonzero()[:,0].tolist()
    (z,),y = outputs([t], plain_dl(dls, held), 'cpu')
    table = rank_teachers(dls, [t])
    assert table.accuracy.iloc[0]==pytest.approx((z.argmax(1)==y).float().mean().item())
    assert table.entropy.iloc[0]==pytest.approx(torch.distributions.Categorical(logits=z).entropy().mean().item(), abs=1e-5)

# Logit standardisation

def test_standardised_losses():
    "A student's logits times any factor, plus any number, are the same student"
    torch.manual_seed(0)
    z,t = torch.randn(6,5),torch.randn(6,5)
    want = F.kl_div((z_scores(z)/2).log_softmax(1), (z_scores(t)/2).softmax(1), reduction='batchmean')*4
    assert torch.allclose(kd_loss(z, t, 2, logit_target=True, standardise=True), want, atol=1e-6)
    assert torch.allclose(kd_loss(7*z+3, t, 2, logit_target=True, standardise=True), want, atol=1e-5)
    assert torch.allclose(kd_loss(z, soft_probs(t, 2, standardise=True), 2, standardise=True), want, atol=1e-6)
    assert not torch.allclose(kd_loss(7*z+3, t, 2, logit_target=True), kd_loss(z, t, 2, logit_target=True), atol=1e-2)

def test_standardised_methods(dls):
    "MEAL, CEKD and the online methods reach it"
    rec = MixRecord(torch.arange(4).flip(0), torch.full((4,), .7), torch.full((4,), .3))
    torch.manual_seed(1)
    mixed,clean,y = torch.randn(2,4,3),torch.randn(2,4,3),torch.tensor([0,1,2,0])
    one = cekd_losses(mixed, clean, y, rec, CrossEntropyLossFlat(), standardise=True)['cross']
    mixed[1] *= 5
    assert torch.allclose(one, cekd_losses(mixed, clean, y, rec, CrossEntropyLossFlat(), standardise=True)['cross'], atol=1e-5)
    assert not torch.allclose(one, cekd_losses(mixed, clean, y, rec, CrossEntropyLossFlat())['cross'], atol=1e-3)
    online = KDCL(standardise=True)
    z = torch.randn(3,4,3)
    assert torch.allclose(online.soft(z, None, None)['kd'], online.soft(9*z, None, None)['kd'], atol=1e-4)
    loss = MEAL(colours(3), standardise=True, taps=0, T=2.).block_loss
    t = torch.randn(4,3)
    from cekd_fastai.meal.several import Answer
    answer = [Answer([t], soft_probs(t, 2., standardise=True))]
    want = -4*(soft_probs(t, 2., standardise=True)*soft_log_probs(z, 2., standardise=True)).sum(-1).mean(-1).sum()
    assert torch.allclose(loss([], z, answer), want, atol=1e-5) and torch.allclose(loss([], 3*z, answer), want, atol=1e-4)

# Features through a projection

def with_features(dls, feat='pooled', teachers=None, **kw):
    teachers = teachers or [timm.create_model('test_vit', num_classes=3, img_size=32, patch_size=8)]
    return learner(dls, MEAL(teachers, taps=0, adversarial=None, w_feat=1., feat=feat, **kw))

@pytest.mark.parametrize('feat', ['pooled','tokens'])
def test_features(dls, feat, tmp_path):
    "The projection learns, is in checkpoints and in no parameter or export; the student learns through it"
    learn = with_features(dls, feat, gammas=[0.], teachers=[timm.create_model('test_vit', num_classes=3, img_size=32, patch_size=8),colours(3)] if feat=='pooled' else None)
    net,pr = learn.model,learn.model.projection
    before = [o.clone() for o in pr.nets.parameters()],net.trunk.state_dict()['conv1_0.weight' if 'conv1_0.weight' in net.trunk.state_dict() else next(iter(net.trunk.state_dict()))].clone()
    n = len(list(net.parameters()))
    quiet(learn)
    assert not all(torch.equal(a, b) for a,b in zip(before[0], pr.nets.parameters()))
    assert len(list(net.parameters()))==n and not any('projection' in k for k in net.state_dict())
    assert 'feat' in learn.recorder.metric_names
    learn.save(tmp_path/'c')
    other = with_features(dls, feat, gammas=[0.], teachers=learn.meal.teachers)
    other.load(tmp_path/'c')
    assert all(torch.equal(a, b) for a,b in zip(pr.nets.parameters(), other.model.projection.nets.parameters()))
    assert other.model.projection.opt.state_dict()['state']
    save_net(net, tmp_path/'net.pt')
    assert not any(m._forward_hooks or m._forward_pre_hooks for o in (net,learn.meal.teachers[0].model) for m in o.modules())
    with pytest.warns(UserWarning, match='projections of the checkpoint are of other sizes'):
        with_features(dls, 'pooled', teachers=[colours(3, side=3)]).load(tmp_path/'c')

def test_gradient_through_the_projection():
    "Of the step, as autograd computes it for the loss written out"
    torch.manual_seed(0)
    pr = Projection(4, [6,4])
    s,t = torch.randn(2,5,4, requires_grad=True),[(0,torch.randn(5,6)),(1,torch.randn(5,4))]
    lin = deepcopy(pr.nets[0])
    want = sum(F.mse_loss(lin(o), t[0][1])+F.mse_loss(o, t[1][1]) for o in s)/2
    grads = torch.autograd.grad(want, [s,*lin.parameters()])
    loss = pr.update(s, t)
    loss.backward()
    assert torch.allclose(loss, want, atol=1e-6) and torch.allclose(s.grad, grads[0], atol=1e-6)
    assert torch.equal((lin.weight-pr.nets[0].weight).sign(), grads[1].sign())

# The same image, another view

def test_another_view(dls):
    "The teacher sees what the transforms make of the student's batch, the student what it always sees"
    seen = {}
    class See(Callback):
        order = 70
        def after_pred(self):
            if self.training: seen.setdefault('student', self.x.clone())
    learn = learner(dls, MEAL(colours(3), taps=0, adversarial=None, view=[Flip(p=1.)]), See())
    def note(m, x): seen['teacher'] = x[0] if 'student' not in seen else seen['teacher']
    learn.meal.teachers[0].model.register_forward_pre_hook(note)
    quiet(learn)
    mean,std = (torch.tensor(o)[:,None,None] for o in imagenet_stats)
    raw = lambda x: (x*std+mean)
    assert torch.allclose(raw(seen['teacher']), raw(seen['student']).clamp(0, 1).flip(3), atol=1e-5)

# Stored answers ask where every room asks

def test_stored_answers_of_skipped_batches(dls, tmp_path):
    "A batch that is skipped in one epoch leaves the answers of the others where they are"
    class Skip(Callback):
        order = -5
        def before_batch(self):
            if self.training and self.epoch==0 and self.iter==1: raise CancelBatchException
    learn = learner(dls, MEAL(colours(3), taps=0, adversarial=None, cache_targets=True, cache_dir=tmp_path), Skip())
    quiet(learn, 1)
    cache = learn.meal.target_cache
    stored = cache.data[0]
    assert stored[:8].any(1).all() and not stored[8:16].any() and stored[16:24].any(1).all()

# timm's own distillation

def timm_steps(task_type, student, teacher, batches, **kw):
    "Distillation loss of steps of timm's task"
    task = task_type(student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=1., task_loss_weight=0., verbose=False, **kw)
    task.train()
    opt,res = torch.optim.SGD(task.trainable_module.parameters(), lr=.05),[]
    for x,y in batches:
        out = task(x, y)
        out['loss'].backward()
        opt.step()
        opt.zero_grad()
        res.append(out['kd_loss'].item())
    return res

def our_steps(student, teacher, batches, **kw):
    "The parts of MEAL's loss in the same steps"
    xs,ys = torch.cat([o[0] for o in batches]),torch.cat([o[1] for o in batches])
    data = L(zip(xs, ys))
    dls = DataLoaders.from_dsets(data, data, bs=len(batches[0][0]), num_workers=0, device='cpu', shuffle=False)
    dls.c = 3
    net,parts = branch_net(student, 3, 1, keep_head=True),[]
    class Keep(Callback):
        order,run_valid = 30,False
        def after_loss(self): parts.append({k:v.item() for k,v in self.learn.meal.parts.items()})
    meal = MEAL(teacher, taps=0, adversarial=None, **kw)
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), opt_func=SGD, splitter=branch_splitter, wd=0., moms=(0.,0.,0.), cbs=[BranchLoss(),meal,Keep()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    return parts,learn.model

@pytest.fixture
def pair():
    torch.manual_seed(0)
    student,teacher = timm.create_model('test_resnet', num_classes=3),timm.create_model('test_convnext', num_classes=3).eval()
    teacher.get_classifier().weight.data.mul_(30)
    return student,teacher,[(torch.randn(6,3,32,32),torch.randint(0, 3, (6,))) for _ in range(3)]

def test_logits_as_timm(pair):
    "The same loss in three steps, and the same student after them"
    student,teacher,batches = pair
    mine,net = our_steps(deepcopy(student), teacher, batches, T=3.)
    theirs = timm_steps(LogitDistillationTask, student, deepcopy(teacher), batches, temperature=3.)
    with torch.no_grad(): log_q = [soft_log_probs(teacher(x), 3.) for x,_ in batches]
    floors = [-9*(o.exp()*o).sum(1).mean().item() for o in log_q]
    assert [o['sim']-f for o,f in zip(mine, floors)]==pytest.approx(theirs, abs=1e-5) and theirs[0]>1e-3
    with torch.no_grad(): assert torch.allclose(net.eval()(batches[0][0]), student.eval()(batches[0][0]), atol=1e-4)

def test_features_as_timm(pair):
    "Where widths are the same there is no projection and the loss is timm's; where they differ it is for the same projection"
    student,_,batches = pair
    torch.manual_seed(5)
    same = timm.create_model('test_resnet', num_classes=3).eval()
    mine,_ = our_steps(deepcopy(student), same, batches, gammas=[0.], w_feat=1.)
    theirs = timm_steps(FeatureDistillationTask, deepcopy(student), deepcopy(same), batches)
    assert [o['feat'] for o in mine]==pytest.approx(theirs, rel=1e-4)
    other = timm.create_model('test_vit', num_classes=3, img_size=32, patch_size=8).eval()
    task = FeatureDistillationTask(deepcopy(student), other, nn.CrossEntropyLoss(), verbose=False)
    x,y = batches[0]
    task.train()
    want = task(x, y)['kd_loss']
    a,b = FeatureTap(student.train(), 'pooled', x),FeatureTap(other, 'pooled', x)
    for tap,m in ((a,student),(b,other)):
        tap.on = True
        m(x)
    pr = Projection(96, [64])
    pr.nets[0].load_state_dict(task.trainable_module.projection.state_dict())
    assert torch.allclose(pr.update(a.read(), [(0,b.read()[0].detach())]), want, rtol=1e-5)

def test_the_command(tmp_path, capsys):
    "`cekd_train` takes teachers of other classes, and keeps what they are worth on the student's"
    birds = make_birds(tmp_path/'birds', n_species=4, n_images=6, n_train=4, size=40, progress=False)
    save_net(branch_net('test_resnet', 5, 1, pretrained=False), tmp_path/'t.pt', vocab=list('vwxyz'))
    cekd_train(data=birds, method='meal', teachers=[tmp_path/'t.pt'], arch='test_resnet', no_pretrained=True, size=32, bs=8, num_workers=0,
        in_memory=True, epochs=1, out=tmp_path/'run', method_args=['w_feat=1','taps=0'])
    assert 'Teacher `t`: a head for 4 classes' in capsys.readouterr().out
    res = json.loads((tmp_path/'run'/'result.json').read_text())
    assert res['teachers']['teachers'][0]['name']=='t' and 0<=res['teachers']['ensemble']<=1
    assert 'feat' in (tmp_path/'run'/'history.csv').read_text().splitlines()[0]
