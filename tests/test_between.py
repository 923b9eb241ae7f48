"What one epoch, fit or interrupt leaves for the next, and what joins a learner after it was made."
import warnings
import pytest,timm,torch
from fastai.callback.training import GradientClip,ShortEpochCallback
from fastai.data.all import DataBlock,Normalize,RandomSplitter,RegressionBlock,SkipItemException,first,get_image_files,math,np,partial,set_seed,tensor
from fastai.vision.all import SGD,F,Callback,CancelTrainException,ImageBlock,ImageDataLoaders,Resize,accuracy,imagenet_stats,load_learner,nn
from fastai.losses import BCEWithLogitsLossFlat,CrossEntropyLossFlat,FocalLossFlat,L1LossFlat,LabelSmoothingCrossEntropy,MSELossFlat
from cekd_fastai.all import (CEKD,CutMix,Guard,MixUp,PSKD,SnapMix,branch_learner,css_learner,fine_grained_dls,make_birds,meal_learner,online_learner)
from cekd_fastai.cam import model_cam
from cekd_fastai.core import HalfPrecision,data_stats,is_fit
from cekd_fastai.losses import is_multi,is_regression,mixed_loss
from cekd_fastai.meal.targets import _alike
from cekd_fastai.mix.callback import Mix
from cekd_fastai.mix.core import MixRecord,mix_pixels
from cekd_fastai.online.callback import FFMCD

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('birds'), n_species=3, n_images=14, size=48, n_train=10, progress=False)

@pytest.fixture
def dls(birds, tmp_path):
    set_seed(0)
    return fine_grained_dls(birds, size=32, bs=8, num_workers=0, path=tmp_path)

def quiet(learn, *args, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kw)
    return learn

def small(dls, *cbs, **kw): return branch_learner(dls, 'test_resnet', pretrained=False, cbs=list(cbs), **kw)

class Stop(Callback):
    "Interrupt the second epoch after a batch"
    order = 70
    def after_batch(self):
        if self.training and self.epoch==1 and self.iter==1: raise KeyboardInterrupt

class Short(Callback):
    "Two batches an epoch, ended before those who own the loss hear of the end of the batch; mixed, but for the first one of the second epoch"
    order = -1
    def before_batch(self): first(o for o in self.learn.cbs if isinstance(o, Mix)).prob = 0. if self.epoch and not self.iter else 1.
    def after_batch(self):
        if self.training and self.iter>=1: raise CancelTrainException

def test_an_epoch_that_a_callback_ends_leaves_nothing(dls):
    quiet(small(dls, MixUp(prob=.5), CEKD(joint=True), Short()), 2)
    quiet(small(dls, MixUp(prob=.5), CEKD(joint=True), ShortEpochCallback(.4)), 6)

def test_targets_are_those_of_this_batch(dls):
    "In an unmixed batch, PS-KD remembers what the network says of it, and not the clean pass of the epoch before"
    seen = []
    class Look(Callback):
        order = 4.6
        def after_loss(self):
            if not self.training or self.learn.mix_up.record is not None: return
            seen.append((self.learn.pskd.clean_preds()[0], self.learn.pred))
    quiet(small(dls, MixUp(prob=.5), CEKD(), PSKD(), Short(), Look()), 2)
    assert len(seen)==1
    for a,b in seen: assert torch.allclose(a, b)

@pytest.mark.parametrize('loss', [MSELossFlat(),L1LossFlat(),nn.SmoothL1Loss(),F.huber_loss,partial(F.mse_loss, reduction='sum')])
def test_losses_for_numbers(loss): assert is_regression(loss) and not is_multi(loss)

OF_CLASSES = [CrossEntropyLossFlat(),LabelSmoothingCrossEntropy(),FocalLossFlat(),F.cross_entropy,BCEWithLogitsLossFlat(),nn.MultiLabelSoftMarginLoss()]

@pytest.mark.parametrize('loss', OF_CLASSES)
def test_losses_for_classes(loss): assert not is_regression(loss)

def test_several_labels(): assert is_multi(nn.MultiLabelSoftMarginLoss()) and not is_multi(nn.CrossEntropyLoss())

@pytest.fixture(scope='module')
def numbers(birds):
    block = DataBlock((ImageBlock,RegressionBlock(n_out=2)), get_y=lambda o: [len(o.name),1.], splitter=RandomSplitter(.3, seed=0), item_tfms=Resize(32))
    return block.dataloaders(get_image_files(birds), bs=8, num_workers=0)

@pytest.mark.parametrize('make', [lambda d: small(d, CutMix(), CEKD()), lambda d: online_learner(d, 'test_resnet', 'dml', pretrained=False),
    lambda d: online_learner(d, 'test_resnet', pretrained=False), lambda d: meal_learner(d, 'test_resnet', [small(d, n_branches=1)], pretrained=False)], ids=['cekd','dml','ffmcd','meal'])
def test_numbers_are_no_classes(numbers, make):
    with pytest.raises(ValueError, match='distils classes, but the loss is one for numbers'): make(numbers)

def test_no_maps_of_numbers(numbers):
    with pytest.raises(ValueError, match='`SnapMix` looks for the evidence of a class'): small(numbers, SnapMix())

def test_numbers_train_on_branches(numbers): quiet(small(numbers, CutMix()), 1)

def test_an_interrupt_keeps_the_average(dls, birds):
    learn = small(dls, CutMix(), CEKD(validate_ema=True))
    with pytest.raises(KeyboardInterrupt): quiet(learn, 3, 1e-2, cbs=Stop())
    files = get_image_files(birds)[:5]
    with learn.no_bar():
        there = load_learner(learn.export('a.pkl'))
        with there.no_bar(): a = there.get_preds(dl=there.dls.test_dl(files))[0]
        assert torch.allclose(a, learn.get_preds(dl=learn.dls.test_dl(files))[0], atol=1e-5)

def test_an_export_after_an_interrupt_holds_no_pictures(dls):
    learn = small(dls, Guard())
    class Mid(Callback):
        def after_loss(self):
            if self.training: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): quiet(learn, 1, cbs=Mid())
    assert learn.guard.batch is None and 'batch' not in learn.guard.__getstate__()

def test_averaged_views_are_no_fit(dls):
    said = []
    class Ask(Callback):
        def before_fit(self): said.append(is_fit(self.learn))
    learn = small(dls, Ask())
    with learn.no_bar(), learn.no_logging():
        learn.tta(n=1)
        learn.validate()
        learn.fit(1, 0.)
    assert said[-1] and not any(said[:-1]) and len(said)==3

@pytest.mark.parametrize('make', [lambda d: online_learner(d, 'test_resnet', pretrained=False), lambda d: css_learner(d, ['test_resnet']*2, 2, pretrained=False)], ids=['online','css'])
def test_a_learner_without_its_method(birds, make):
    learn = make(fine_grained_dls(birds, size=64, bs=8, num_workers=0))
    learn.remove_cbs([o for o in learn.cbs if getattr(o, 'loss_rank', 0)])
    with pytest.raises(ValueError, match='Nothing makes one loss of what the branches of this network answer'): quiet(learn, 1)

def test_a_picture_that_is_not_finite_is_like_itself():
    a = tensor([1.,math.nan,2.])
    assert _alike(a, a).all() and _alike(a, tensor([1.,2.,2.1])).tolist()==[True,False,False]

@pytest.mark.parametrize('w_clean,times', [(0.,1),(1.,2)])
def test_a_pass_that_must_not_train_moves_no_statistics(dls, w_clean, times):
    learn = quiet(small(dls, MixUp(), CEKD(w_clean=w_clean)), 1)
    n = {int(v) for k,v in learn.model.state_dict().items() if k.endswith('num_batches_tracked')}
    assert n=={times*len(learn.dls.train)}

# Statistics

HALVES = ([.5]*3,[.5]*3)

@pytest.fixture
def known(birds, tmp_path):
    "A learner of a backbone that knows pictures of mean .5"
    file = tmp_path/'vit.pth'
    torch.save(timm.create_model('test_vit').state_dict(), file)
    return branch_learner(fine_grained_dls(birds, size=160, bs=8, num_workers=0), 'test_vit', weights=file)

def same(a, b): return all(np.allclose(u, v, atol=1e-3) for u,v in zip(a, b))

def test_later_data_have_the_statistics_of_the_network(known, birds):
    assert same(data_stats(known.dls), HALVES)
    new = fine_grained_dls(birds, size=160, bs=4, num_workers=0)
    known.dls = new
    assert same(data_stats(known.dls), HALVES) and known.dls.bs==4
    own = ImageDataLoaders.from_folder(birds/'images', valid_pct=.3, item_tfms=Resize(160), batch_tfms=Normalize.from_stats(*imagenet_stats), bs=4, num_workers=0)
    with pytest.warns(UserWarning, match='was pretrained on images of mean'): known.dls = own
    assert known.dls is own

def test_an_older_loader_is_named(birds, tmp_path):
    file = tmp_path/'vit.pth'
    torch.save(timm.create_model('test_vit').state_dict(), file)
    dls,files = fine_grained_dls(birds, size=160, bs=8, num_workers=0),get_image_files(birds)[:3]
    early = dls.test_dl(files)
    learn = branch_learner(dls, 'test_vit', weights=file)
    with learn.no_bar():
        with pytest.warns(UserWarning, match='normalises its pictures otherwise'): learn.get_preds(dl=early)
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)
            learn.get_preds(dl=learn.dls.test_dl(files))

def test_an_older_export_is_read(known, tmp_path):
    "Its data lie where fastai's learner has them"
    assert vars(known)['dls'] is known.dls
    there = load_learner(known.export(tmp_path/'a.pkl'))
    assert same(data_stats(there.dls), HALVES)

def test_no_item_is_skipped_where_rows_count(birds):
    "fastai moves the next item up, so that predictions would belong to other images; the loader is as it was after the fit"
    dls = fine_grained_dls(birds, size=32, bs=8, num_workers=0)
    learn = small(dls, PSKD())
    quiet(learn, 1)
    assert 'do_item' not in vars(dls.train)
    whole = learn.dls.train.create_item
    def some(i):
        if i==5: raise SkipItemException
        return whole(i)
    learn.dls.train.create_item = some
    with pytest.raises(ValueError, match='skip item 5'): quiet(learn, 1)
    assert 'do_item' not in vars(learn.dls.train)
    learn.remove_cb(PSKD)
    quiet(learn, 1)

class Nested(Callback):
    "Ask for something in the midst of a fit"
    def __init__(self, ask): self.ask = ask
    def after_batch(self):
        if self.training and self.iter==1 and not self.learn.hosts: self.ask(self.learn)
    def after_epoch(self):
        if not self.learn.hosts: self.ask(self.learn)

ASKED = [lambda learn: learn.tta(n=2), lambda learn: learn.validate(), lambda learn: learn.get_preds()]

@pytest.mark.parametrize('ask', ASKED)
def test_what_is_asked_within_a_fit_changes_nothing_of_it(birds, tmp_path, ask):
    def run(*cbs):
        set_seed(0)
        dls = fine_grained_dls(birds, size=32, bs=8, num_workers=0, path=tmp_path)
        learn = small(dls, MixUp(), CEKD(), GradientClip(), HalfPrecision(), *cbs, metrics=accuracy)
        learn.recorder.train_metrics = True
        return quiet(learn, 2)
    a,b = run(),run(Nested(ask))
    assert len(b.recorder.values)==2 and b.epoch==1
    assert [list(o) for o in a.recorder.values]==[list(o) for o in b.recorder.values]
    for p,q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)

def meal(birds, tmp_path, *args, teacher='test_resnet', **kw):
    set_seed(0)
    dls = fine_grained_dls(birds, size=32, bs=4, num_workers=0, path=tmp_path)
    return meal_learner(dls, 'test_resnet', branch_learner(dls, teacher, pretrained=False), *args, pretrained=False, **kw)

def test_a_rate_for_each_form_of_meal(birds, tmp_path):
    for form in ('joint','grl'):
        learn = meal(birds, tmp_path, adversarial=form)
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=12, show_plot=False)
        assert min(learn.recorder.losses)>0 and len(learn.recorder.losses)>5, form

def test_a_projection_learns_at_a_rate_for_adam(birds, tmp_path):
    learn = quiet(meal(birds, tmp_path, teacher='test_efficientnet', adversarial=None, w_feat=1., opt_func=SGD), 1, .1)
    assert [g['lr'] for g in learn.model.projection.opt.param_groups]==[1e-3]

def test_answers_are_stored_while_a_callback_validates(birds, tmp_path):
    quiet(meal(birds, tmp_path, adversarial=None, cache_targets=True, cache_dir=tmp_path/'c', cbs=Nested(lambda learn: learn.validate())), 2)

@pytest.mark.parametrize('kw', [{},dict(weight=tensor([1.,1,50])),dict(ignore_index=2),dict(reduction='sum'),dict(weight=tensor([1.,4,2]), ignore_index=1)])
def test_soft_labels_count_images_as_the_loss_does(dls, kw):
    "A soft label that is the label itself gives the loss of the label, mixed or not"
    learn = small(dls, MixUp(prob=.5), PSKD(), loss_func=CrossEntropyLossFlat(**kw))
    x,y,z = torch.rand(6, 3, 8, 8),tensor([0,1,2,0,-100,2]),torch.randn(6, 3)
    if kw.get('ignore_index', -100)!=-100: y = y.clamp(min=0)
    cb,rec = learn.pskd,MixUp().mix(x, y)[1]
    cb.labels,cb.soft = y,F.one_hot(y.clamp(min=0), 3)*(y>=0)[:,None].float()
    assert torch.allclose(cb.soft_loss(z), learn.loss_func(z, y), rtol=1e-5)
    if -100 not in y: assert torch.allclose(cb.soft_loss(z, rec), mixed_loss(learn.loss_func, z, y, rec), rtol=1e-5)

def test_a_search_looks_at_one_share(dls):
    learn,seen = small(dls, PSKD()),set()
    shares = type(learn.pskd).shares
    learn.pskd.shares = lambda: (seen.add(shares(learn.pskd)),shares(learn.pskd))[1]
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=9, show_plot=False)
    assert {round(o, 6) for _,o in seen}=={.8}

@pytest.mark.parametrize('at', [0,-1])
def test_a_batch_left_out_is_in_no_mean(dls, at):
    class Spoil(Callback):
        order = -50
        def before_batch(self):
            if self.training and self.iter==at%self.n_iter: self.learn.xb = (self.xb[0]*math.nan,)
    learn = small(dls, Guard(), Spoil(), metrics=accuracy)
    learn.recorder.train_metrics = True
    quiet(learn, 1)
    assert all(math.isfinite(o) for o in learn.recorder.values[0]) and len(learn.recorder.losses)==len(dls.train)-1

def test_diversity_of_peers_of_unlike_width(dls):
    peers = dict(pretrained=False)
    with pytest.raises(ValueError, match='The heads do not match'): online_learner(dls, ('test_resnet','test_efficientnet'), FFMCD(form='cos'), **peers)
    online_learner(dls, ('test_resnet','test_efficientnet'), FFMCD(), **peers)

def test_one_box_and_a_share_for_each_host():
    x,perm = torch.rand(3, 3, 8, 8),tensor([1,2,0])
    def rec(share): return MixRecord(perm, torch.ones(3), torch.zeros(3), (2,2,6,6), (2,2,6,6), host_share=share)
    share = tensor([0.,.5,1])
    got = mix_pixels(x, rec(share))
    for i,s in enumerate(share.tolist()): assert torch.allclose(got[i], mix_pixels(x, rec(s))[i])

def test_a_map_of_one_network_runs_that_one(dls):
    net = css_learner(dls, ['test_resnet','test_resnet'], transform='permute', pretrained=False).model
    ran,net.which = [],'net1'
    net.net2.trunk.register_forward_hook(lambda *o: ran.append(o))
    x,y = torch.rand(2, 3, 32, 32),tensor([0,1])
    assert model_cam(net, x, y).shape[0]==2 and not ran
