"Calls that a user makes, that were once accepted and went wrong later, or did nothing."
import inspect,subprocess,sys,warnings
from functools import partial
import numpy as np,pandas as pd,pytest,timm,torch
import torch.nn.functional as F
from fastai.callback.preds import FetchPredsCallback
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CrossEntropyLossFlat,DataLoaders,LabelSmoothingCrossEntropyFlat,TfmdDL,
    accuracy,get_image_files,nn,set_seed)
from cekd_fastai.all import *
from cekd_fastai.branches import PeerNet,save_net
from cekd_fastai.cli import cekd_train
from cekd_fastai.core import data_stats
from cekd_fastai.diagnose import Diagnose
from cekd_fastai.job import with_recipe
from cekd_fastai.losses import mixed_loss
from cekd_fastai.mix.core import MixRecord

@pytest.fixture(scope='module')
def birds(tmp_path_factory):
    return make_birds(tmp_path_factory.mktemp('birds'), n_species=3, n_images=6, n_train=4, size=64, n_workers=0, progress=False)

def small(birds, **kw): return fine_grained_dls(birds, **(dict(size=56, bs=4, num_workers=0)|kw))

def test_a_process_of_its_own_opens_any_network(birds, tmp_path):
    "Each module that builds a network is known wherever files of networks are opened"
    learn = branch_learner(small(birds), 'test_resnet', 1, pretrained=False, mid=True)
    deploy(learn, tmp_path/'mid.pt')
    code = f"from cekd_fastai.predict import open_net; print(open_net({str(tmp_path/'mid.pt')!r}).vocab)"
    done = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
    assert done.stdout.strip()==str(list(learn.dls.vocab)), done.stderr

def test_groups_beside_given_parts(birds):
    "Groups are for a split that is drawn; beside one that is given they would be passed over"
    df = pd.DataFrame(dict(file=[str(o) for o in get_image_files(birds)[:8]], label=['a','b']*4, is_valid=[0,0,0,0,0,0,1,1], walk=list('aabbccdd')))
    with pytest.raises(ValueError, match="group_col='walk' is for a split that is drawn"): read_table(df, group_col='walk', valid_pct=.25)
    with pytest.raises(ValueError, match="no column 'wakl'"): read_table(df, group_col='wakl')
    assert read_table(df.drop(columns='is_valid'), group_col='walk', valid_pct=.25).n_valid==2

def run_of_two(birds, *cbs, **kw):
    learn = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, metrics=accuracy, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-3, cbs=cbs)
    return [row[:-1] for row in learn.recorder.values]

@pytest.mark.parametrize('cbs', [lambda: [MixUp(),CEKD()], lambda: [MixUp(),CEKD(),Diagnose()]])
def test_predictions_are_fetched_on_the_way(birds, cbs):
    "fastai's `FetchPredsCallback`, as loggers use it, takes the recorder away for a while"
    def run(*more):
        set_seed(2)
        return run_of_two(birds, *more, cbs=cbs())
    a,b = run(),run(FetchPredsCallback())
    assert a[0]==b[0] and all(v is not None for row in b for v in row) # the copy of a loader draws a random number

def test_checkpoints_of_two_fits(birds, tmp_path):
    "What must not go on from older files knows its own"
    cb = Checkpoint(tmp_path/'c', resume=False)
    learn = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert cb.fit_no==2
    again = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, cbs=Checkpoint(tmp_path/'c', resume=False))
    with again.no_bar(), again.no_logging(), pytest.raises(ValueError, match='of an earlier run'): again.fit(1)

def test_a_monitor_that_is_no_column(birds, tmp_path):
    with pytest.raises(ValueError, match="There is no column 'accurcy'; did you mean 'accuracy'"): run_of_two(birds, Checkpoint(tmp_path/'c', monitor='accurcy'))

def test_weights_bring_their_statistics(birds, tmp_path):
    "The pictures of the next learner are normalised as those of the network in the file"
    own = ([.4,.5,.6],[.1,.2,.3])
    learn = branch_learner(small(birds, stats=own), 'test_resnet', 1, pretrained=False)
    deploy(learn, tmp_path/'own.pt')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = branch_learner(small(birds), 'test_resnet', 1, weights=tmp_path/'own.pt')
        branch_learner(small(birds, stats=own), 'test_resnet', 1, weights=tmp_path/'own.pt')
    assert np.allclose(data_stats(again.dls), own)

def test_recommended_for_peers(birds):
    "Several names are several networks, with the settings of the first"
    learn = recommended(('test_resnet','test_resnet'), pretrained=False).learner(small(birds))
    assert isinstance(learn.model, PeerNet) and learn.model.n_branches==2
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)

def several_labels(n=6):
    items = [(torch.randn(3,64,64),torch.tensor([1.,0.,1.])) for _ in range(n)]
    dls = DataLoaders.from_dsets(Many(items), Many(items), bs=3, num_workers=0, device='cpu')
    dls.c = 3
    return dls

class Many(list): loss_func = BCEWithLogitsLossFlat()

def test_recommended_for_several_labels():
    "Their loss is that of the data"
    learn = recommended('test_resnet', pretrained=False).learner(several_labels())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    assert isinstance(learn.loss_func, BCEWithLogitsLossFlat)

bce = F.binary_cross_entropy_with_logits
@pytest.mark.parametrize('loss', [nn.BCEWithLogitsLoss(), BCEWithLogitsLossFlat(), bce, partial(bce, pos_weight=torch.ones(3))])
def test_losses_of_several_labels(loss):
    "They are known in each of their forms: MEAL distils several answers, the others refuse in one sentence"
    dls,made = several_labels(),dict(pretrained=False, loss_func=loss)
    assert meal_learner(dls, 'test_resnet', [timm.create_model('test_resnet', num_classes=3)], **made).meal.multi
    calls = [partial(branch_learner, cbs=[MixUp(),CEKD()]), online_learner]
    for call in calls:
        with pytest.raises(ValueError, match='the loss is for several labels'): quick(call(dls, 'test_resnet', **made))
    with pytest.raises(ValueError, match='the loss is for several labels'): quick(css_learner(dls, ['test_resnet','test_resnet'], **made))

def quick(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_suspects_with_a_loss_of_torch(birds):
    a,b = (suspects(branch_learner(small(birds), seeded('test_resnet'), 1, loss_func=lf)) for lf in (nn.CrossEntropyLoss(),CrossEntropyLossFlat()))
    assert len(a) and a.equals(b)

def seeded(arch):
    set_seed(3)
    return timm.create_model(arch, num_classes=3)

def test_weighted_smoothing_with_ignored_labels():
    "The weights are levelled over the labels that count"
    w,y = torch.tensor([1.,2.,4.]),torch.tensor([0,-100,2,-100])
    z,rec = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)),MixRecord(torch.tensor([2,3,0,1]), torch.full((4,), .7), torch.full((4,), .3))
    lf = LabelSmoothingCrossEntropyFlat(weight=w)
    by_hand = LabelSmoothingCrossEntropyFlat(weight=w/2.5, reduction='none') # the mean of 1 and 4
    want = (.7*by_hand(z, y)+.3*by_hand(z, y[rec.perm])).mean()
    assert torch.allclose(mixed_loss(lf, z, y, rec), want)
    assert mixed_loss(lf, z, torch.full((4,), -100), rec).isfinite()

def test_a_loader_that_would_not_look(birds):
    with pytest.raises(ValueError, match='in_memory=True has a dl_type of its own'): small(birds, in_memory=True, dl_type=TfmdDL)

@pytest.mark.parametrize('make,says', [
    (lambda: MEAL(timm.create_model('test_resnet'), kind='l2', T=4), "kind='l2' compares logits"),
    (lambda: MEAL(timm.create_model('test_resnet'), adversarial=None, w_adv=.1), '`w_adv` is for discriminators'),
    (lambda: MEAL(timm.create_model('test_resnet'), views=3), '`views` is for stored answers'),
    (lambda: MEAL(timm.create_model('test_resnet'), feat='tokens'), '`feat` is for features'),
    (lambda: MEAL(timm.create_model('test_resnet'), taps=0, space='max'), '`space` is for feature maps'),
    (lambda: CEKD(w_cross=0, target='both', T=9, fuse='maps'), '`T`, `fuse` is for the cross target'),
    (lambda: CEKD(w_clean=0, clean_on='label'), '`clean_on` is for the labels of clean images'),
    (lambda: CEKD(joint=True, teacher='ema', w_clean=0), 'no clean images run'),
    (lambda: CEKD(decay=.9), 'none is kept')])
def test_arguments_that_would_do_nothing(make, says):
    with pytest.raises(ValueError, match=says): make()

def test_teachers_without_a_picture(birds):
    learn = meal_learner(small(birds), 'test_resnet', [timm.create_model('test_resnet', num_classes=3)], pretrained=False)
    with pytest.raises(ValueError, match='nothing to measure'): learn.meal.teacher_accuracy(dl=[])

def test_a_checkpoint_is_small(birds, tmp_path):
    "Neither the pixels of a batch nor stored answers go into its files, and a resumed run writes on into the file of answers"
    net = timm.create_model('test_resnet', num_classes=3)
    def run(*cbs):
        meal = MEAL(net, taps=0, adversarial=None, cache_targets=True, cache_dir=tmp_path/'answers', views=2)
        learn = branch_learner(small(birds, size=224, bs=4), 'test_resnet', 1, pretrained=False, cbs=[meal,Guard(),Checkpoint(tmp_path/'c', every=1)])
        with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=cbs)
        return learn
    class Die(Callback):
        order,run_valid = 3000,False
        def after_batch(self):
            if (self.epoch,self.iter)==(0,1): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run(Die())
    net_bytes = 4*sum(p.numel() for p in net.parameters())
    file = max((tmp_path/'c').glob('*.ckpt'))
    batch = 4*4*3*224*224
    assert file.stat().st_size<4*net_bytes+200_000<4*net_bytes+batch
    learn = run()
    cache = learn.meal.target_cache
    assert isinstance(cache.data, np.memmap) and sorted(cache.done)==[0,1]

@pytest.mark.parametrize('kw,learns', [(dict(w_clean=0),False), (dict(w_clean=0, detach=False),True), (dict(),True)])
def test_a_clean_pass_keeps_what_it_needs(birds, kw, learns):
    "Activations of the clean pass are for its gradient, where there is one"
    class See(Callback):
        order,run_valid,seen = 5.5,False,None
        def after_pred(self): self.seen = self.learn.cekd.clean.logits.requires_grad
    learn = branch_learner(small(birds), 'test_resnet', 2, pretrained=False, cbs=[MixUp(),CEKD(**kw)])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=(see := See()))
    assert see.seen==learns

def test_label_noise_looks_once(birds):
    "The maps of a batch are the same in all rounds"
    dls = small(birds)
    learn,calls = branch_learner(dls, 'test_resnet', 1, pretrained=False),[]
    learn.model.trunk.register_forward_hook(lambda *a: calls.append(1))
    label_noise([SnapMix()], dls, learn=learn, rounds=3, n=4)
    n = len(calls)
    label_noise([SnapMix()], dls, learn=learn, rounds=6, n=4)
    assert len(calls)==2*n

@pytest.mark.parametrize('off', [None,'none'])
def test_recipes_without_their_discriminators(off):
    "What a recipe says of discriminators goes with them; what you say of them is refused"
    net = timm.create_model('test_resnet')
    assert MEAL.v2(net, adversarial=off).reduce==2 and MEAL.v2(net).reduce==8
    own = {k:v.default for k,v in inspect.signature(cekd_train).parameters.items()}
    for name in ('meal-v2-imagenet-resnet18','meal-cifar10-vgg19'):
        args = with_recipe(own|dict(recipe=name, adversarial='none'), own)['method_args']
        assert not [o for o in args if o.split('=')[0] in ('disc','reduce')] and [o for o in args if o.split('=')[0] in ('taps','choose')]
    with pytest.raises(ValueError, match='`reduce` is for discriminators'): MEAL.v2(net, adversarial=off, reduce=4)

def test_loaders_of_your_own(birds):
    "Loaders need no `dataset` for the recommended settings"
    dls = small(birds)
    class Own:
        def __init__(self, dl): self.dl = dl
        def __iter__(self): return iter(self.dl)
        def __len__(self): return len(self.dl)
    own = DataLoaders(Own(dls.train), Own(dls.valid), device='cpu')
    own.c = 3
    quick(recommended('test_resnet', pretrained=False).learner(own))

def test_a_mix_that_never_mixes_is_shown(birds):
    class Never(MixUp):
        def mix(self, x, y): return None
    learn = branch_learner(small(birds), 'test_resnet', 1, pretrained=False, cbs=Never())
    for show in (learn.never.show, partial(show_mixed, learn)):
        with pytest.raises(ValueError, match='mixed nothing in 100 draws'): show()

def test_a_file_without_statistics(birds, tmp_path):
    "Weights are weights, whatever their file does not tell"
    learn = branch_learner(small(birds), 'test_resnet', 1, pretrained=False)
    save_net(learn.model, tmp_path/'net.pt', mean=None, std=None)
    again = branch_learner(small(birds), 'test_resnet', 1, weights=tmp_path/'net.pt')
    assert all(torch.equal(p, q) for p,q in zip(again.model.trunk.parameters(), learn.model.trunk.parameters()))
