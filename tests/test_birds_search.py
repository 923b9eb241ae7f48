"The study that compares forms of CEKD on held-out images: each form by hand, and frozen norms within their convolutions."
import sys
from copy import deepcopy
from pathlib import Path
import pytest,timm,torch
from fastai.vision.all import Callback,DataLoaders,nn,tensor
from cekd_fastai.all import CEKD,Mix,MixRecord,MixUp,OnlineLabelSmoothing,SnapMix,branch_learner
from cekd_fastai.core import unwrap_model
sys.path[:0] = [str(Path(__file__).parent),str(Path(__file__).parent.parent/'benchmarks'/'cekd')]
import birds_plan,birds_tables,variants
from birds_train import by_pairs
from folded import Folded,fold_norms,pairs
from test_birds_study import Silent,Y,Z,fit,halves,learner,loader

def parts_of(cekd, epochs=1, *cbs):
    "Parts and weights of the loss of two images that are mixed 3 to 1, step by step; the network answers `Z`"
    res = []
    class Spy(Callback):
        order = 10
        def after_loss(self): res.append({k:v.item() for k,v in cekd.parts.items()} | {f'w_{k}':v for k,v in cekd.weights().items()})
    fit(learner(Z, Y, [[0,3]], [halves(range(epochs)),cekd,*cbs,Spy()], n_branches=2), epochs)
    return res

def test_class_means_are_averaged_over_steps():
    cb = variants.ClassMeans(keep=.9)
    cb.learn_classes(tensor([[.6,.4,0],[.8,.2,0]]), tensor([0,0]))
    assert torch.allclose(cb.means, tensor([[.97,.03,0],[0,1,0],[0,0,1]])) # .9 of [1,0,0], .1 of the mean [.7,.3,0]

def test_class_means_are_the_target():
    "With `keep` 0 and one image a class, the class's mean is the image's own prediction, as CEKD has it"
    means,own = parts_of(variants.ClassMeans(keep=0., ramp=0.)),parts_of(CEKD(ramp=0.))
    assert means[0]==pytest.approx(own[0], abs=1e-5) and own[0]['cross']>.001
    kept = parts_of(variants.ClassMeans(keep=.5, ramp=0.))
    assert abs(kept[0]['cross']-own[0]['cross'])>.001

def test_the_last_third():
    w = [o['w_cross'] for o in parts_of(variants.LastThird(w_cross=2.), 6)]
    assert w==[0,0,0,0,2,2]

def test_clean_labels_fade():
    w = [o['w_ce_clean'] for o in parts_of(variants.Annealed(ramp=0.), 4)]
    assert w==pytest.approx([2,1.5,1,.5])

def test_whole_pictures_teach():
    "What the average is shown is the middle of the pictures of the batch, upright and unmirrored"
    dl,ims = loader(3)
    dls = DataLoaders(dl, dl)
    dls.c = 8
    cb,seen = variants.WholePictures(ramp=0.),[]
    learn = branch_learner(dls, 'test_resnet', 2, pretrained=False, loss_func=nn.CrossEntropyLoss(), cbs=[MixUp(),cb,Silent()])
    net = unwrap_model(learn.model)
    shown = lambda m,x: seen.append(x[0].detach().clone())
    net.trunk.register_forward_pre_hook(shown)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    whole = [ims[dl.rows].float()/127.5-1] # the rows of the last batch
    assert any(o.shape==whole[0].shape and torch.allclose(o, whole[0], atol=1e-3) for o in seen)

def test_neighbours_have_one_class():
    "Pairs of a class side by side, none lost; the odd one of a class stands at the end"
    y = tensor([0,1,0,1,0,2,2,1,0])
    order,other = (by_pairs(torch.arange(9), y, torch.Generator().manual_seed(o)) for o in (0,1))
    assert sorted(order.tolist())==list(range(9))
    assert (y[order][0:8:2]==y[order][1:8:2]).all() and y[order[8]]==1
    assert variants.Neighbours().donors(4).tolist()==[1,0,3,2] and isinstance(variants.Neighbours(), SnapMix)
    assert order.tolist()!=other.tolist() # the pairs come in another order

def frozen(arch):
    "A small network in double precision whose norms are frozen at random statistics"
    torch.manual_seed(0)
    net = timm.create_model(arch, num_classes=3).double().train()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.eval()
        m.running_mean.normal_(0, .1), m.running_var.uniform_(.5, 2)
        nn.init.uniform_(m.weight, .5, 1.5), nn.init.normal_(m.bias, 0, .1)
    return net,len(norms)

@pytest.mark.parametrize('arch', ['tf_efficientnet_lite0','mobilenetv2_100'])
def test_folded_norms_train_alike(arch):
    net,n = frozen(arch)
    folded = deepcopy(net)
    assert fold_norms(folded)==n and list(folded.state_dict())==list(net.state_dict())
    x = torch.randn(2, 3, 64, 64, dtype=torch.double)
    for o in (net,folded): nn.functional.cross_entropy(o(x), tensor([0,2])).backward()
    assert torch.allclose(net(x), folded(x), rtol=1e-9)
    for a,b in zip(net.parameters(), folded.parameters()): assert (a.grad-b.grad).norm()<=1e-9*max(1, a.grad.norm())

def test_a_copy_of_a_folded_network_has_its_own_norms():
    net,_ = frozen('mobilenetv2_100')
    fold_norms(net)
    copy = deepcopy(net)
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    before = net(x)
    with torch.no_grad(): [p.zero_() for p in copy.parameters()]
    assert torch.equal(net(x), before) and not copy(x).any()
    conv = next(m for m in copy.modules() if isinstance(m, Folded))
    assert any(conv.norm[0] is m for m in copy.modules())

def test_a_norm_without_its_convolution_is_left():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), timm.layers.BatchNormAct2d(4), timm.layers.BatchNormAct2d(4))
    assert not list(pairs(net)) # the convolution has a bias, and the second norm follows none

def test_every_form_is_defined_and_trains_for_as_many_passes():
    c = birds_plan.read_config('birds_search')
    bar = '2 branches, label smoothing'
    todo = birds_plan.jobs(c, 20, {})
    assert {j['stage'] for j in todo}=={'select'} and {j['seed'] for j in todo}=={0}
    assert all(19<j['epochs']*j['passes']<=20 for j in todo)
    assert len({birds_plan.key(j) for j in todo})==len(todo)==len(c['final'][0]['rows'])
    assert [j['row'] for j in todo][0]==bar and {j['row'] for j in todo}|{'plain','CEKD + SnapMix','2 branches, MixUp, label smoothing','CEKD + SnapMix, label smoothing, no cross target'}==set(c['rows'])
    assert {j['mix'] for j in todo if j['mix']}<=set(c['mixes'])

RIVALS = ['2 branches, MixUp, label smoothing','2 branches, online label smoothing','CEKD + SnapMix, label smoothing, no cross target','2 branches, PS-KD'] # of the form that wins, in new seeds

def test_the_best_forms_go_on():
    "Eight, then four, then two, beside the rivals, and one of them on the test part; none before all of a block has been run"
    c = birds_plan.read_config('birds_search')
    rows,done = c['final'][0]['rows'],{}
    def go(n):
        todo = birds_plan.jobs(c, 20, done)[:n]
        done.update({birds_plan.key(j):dict(accuracy=[*RIVALS[::2],*rows].index(j['row'])/100 + j['seed']/1000) for j in todo})
        return todo
    assert len(go(len(rows)-1))==len(rows)-1 and [j['row'] for j in birds_plan.jobs(c, 20, done)]==rows[-1:]
    go(1)
    assert [j['row'] for j in birds_plan.jobs(c, 20, done)]==[*rows[:3],*rows[:-9:-1]] and {j['seed'] for j in go(11)}=={1}
    assert [j['row'] for j in birds_plan.jobs(c, 20, done)]==[*rows[:3],*rows[:-5:-1]] and {j['seed'] for j in go(7)}=={2}
    assert [(j['row'],j['seed']) for j in go(10)]==[(o,s) for s in (3,4) for o in (*rows[:3],rows[-1],rows[-2])]
    assert [(j['stage'],j['row'],j['seed']) for j in go(99)]==[('final',o,s) for s in range(5, 10) for o in (*rows[:3],*RIVALS,rows[-1])]
    assert not birds_plan.jobs(c, 20, done)

def test_the_table_holds_each_form_against_its_rivals():
    c = birds_plan.read_config('birds_search')
    def r(row, seed, acc):
        j = birds_plan.job(c, 'select', row, seed, 'equal compute', 20, .0012, 'separate')
        return j|dict(accuracy=acc, train_accuracy=1.)
    one,bar,other = ('2 branches, PS-KD','2 branches, label smoothing','CEKD + SnapMix, label smoothing')
    rows = [r(bar, 0, .6),r(bar, 1, .7),r(one, 0, .5),r(one, 1, .7),r(other, 0, .7),r(other, 1, .7)]
    lines = birds_tables.select_table(rows, c).split('\n')
    assert [o.split(' | ')[0][2:] for o in lines[2:]]==[other,bar,one]
    assert lines[2].split(' | ')[-2].strip()=='+5.0 ± 5.0 (+10.0, +0.0)' and lines[4].endswith('| -5.0 ± 5.0 (-10.0, +0.0) | -10.0 ± 10.0 (-20.0, +0.0) |')

def test_stored_targets_for_unmixed_images():
    "The answers of epoch 1 at T = 2 are the target of epoch 2, in which the network answers otherwise"
    T,cb,losses = 2.,variants.StoredForAll(1., T=2., ramp=0.),[]
    class Spy(Callback):
        order = 10
        def after_loss(self): losses.append(self.learn.loss_grad.item())
        def after_epoch(self): self.learn.dls.train.z = Z.roll(1, 1)
    fit(learner(Z, Y, [[0,3]], [halves([]),cb,Spy()]), 2)
    q,z = (Z[[0,3]]/T).softmax(1),Z.roll(1, 1)[[0,3]]
    p = (z/T).softmax(1)
    ce = -z.log_softmax(1)[range(2),[0,2]].mean()
    assert losses[1]==pytest.approx((ce + T*T*(q*(q/p).log()).sum(1).mean()).item(), abs=1e-5)
    assert losses[0]==pytest.approx(-Z[[0,3]].log_softmax(1)[range(2),[0,2]].mean().item(), abs=1e-5) # nothing stored yet

class Uncut(Mix):
    "Weights of 3 to 1, and images that show the host alone"
    def mix(self, x, y): return x.clone(),MixRecord(tensor([1,0]), torch.full((2,), .75), torch.full((2,), .25), box_a=(0,0,0,0), box_b=(0,0,0,0))

@pytest.mark.parametrize('mix', [halves([0]),Uncut()])
def test_two_mixes_teach_each_other(mix):
    "The learner's own mix and one that blends; where they are the same, nobody has anything to teach"
    T,cb,parts = 2.,variants.TwoMixes(T=2., ramp=0.),[]
    class Spy(Callback):
        order = 10
        def after_loss(self): parts.append({k:v.item() for k,v in cb.parts.items()})
    fit(learner(Z, Y, [[0,3]], [mix,cb,Spy()], n_branches=2))
    blend = .75*Z[[0,3]]+.25*Z[[3,0]]
    own = Z[[0,3]] if isinstance(mix, Uncut) else blend
    ce = lambda z: -(.75*z.log_softmax(1)[range(2),[0,2]]+.25*z.log_softmax(1)[range(2),[2,0]]).mean()
    p,q = (own/T).softmax(1),(blend/T).softmax(1)
    kl = lambda t,s: T*T*(t*(t/s).log()).sum(1).mean()
    assert parts[0]['ce']==pytest.approx((2*ce(own)+2*ce(blend)).item(), abs=1e-5)
    assert parts[0]['cross']==pytest.approx((2*kl(p, q)+2*kl(q, p)).item(), abs=1e-5)
    assert (parts[0]['cross']>.01)==isinstance(mix, Uncut)

def test_online_labels_in_cekd_by_hand():
    "Images of .7, .2, .1 and .1, .2, .7, mixed 3 to 1: in the second epoch each class has its image's answer as soft label"
    labels,soft = parts_of(CEKD(ramp=0.), 2)[1],parts_of(CEKD(ramp=0.), 2, OnlineLabelSmoothing())[1]
    hard,entropy = .35667,.80182 # -ln .7 and -(.7 ln .7 + .2 ln .2 + .1 ln .1)
    assert labels['ce_clean']==pytest.approx(2*hard, abs=1e-4) and soft['ce_clean']==pytest.approx(2*(hard+entropy), abs=1e-4)
    # the mix answers .54268, .25220, .20512; its label is .75 and .25, its soft label .55, .2, .25
    hard,by_class = .75*.61124+.25*1.58417,.55*.61124+.2*1.37753+.25*1.58417
    assert labels['ce_mix']==pytest.approx(hard, abs=1e-4) and soft['ce_mix']==pytest.approx(hard+by_class, abs=1e-4)
    assert soft['cross']==pytest.approx(labels['cross'], abs=1e-5) # the cross target is not softened
