"Pictures and their twins in words: against loops over pixels and images, on every kind of learner, and what they leave alone."
import math,random
from functools import partial
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt,numpy as np,pandas as pd,pytest,timm,torch,torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix as StockCutMix
from fastai.vision.all import (DataBlock,ImageBlock,ImageDataLoaders,L,Learner,MultiCategoryBlock,PILImage,RegressionBlock,Resize,Tensor,
    accuracy,load_learner,nn,resnet18,set_seed,tensor,vision_learner)
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from cekd_fastai.core import data_stats
from cekd_fastai.interpret.maps import _Look,box_mass,map_place
from cekd_fastai.all import (CEKD,CutMix,FFMCD,MixOneOf,MixUp,SnapMix,branch_agreement,branch_learner,branch_preds,model_cam,confused_pairs,
    css_learner,ece,fine_grained_dls,history,item_cams,make_birds,meal_learner,mix_pixels,online_learner,plot_branch_agreement,plot_components,
    plot_confused_pairs,plot_history,plot_reliability,reliability,report,semantic_map,show_cam,show_mixed)
from cekd_fastai.mix.callback import Mix
from cekd_fastai.mix.core import MixRecord

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('data')/'birds', n_species=3, n_images=12, n_train=6, size=73, progress=False)

@pytest.fixture(scope='module')
def dls(birds):
    set_seed(0)
    return fine_grained_dls(birds, size=64, bs=8, num_workers=0)

@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')

def shaken(learn):
    "Random weights and statistics of batch normalisation, so that no two branches are alike"
    torch.manual_seed(1)
    for m in learn.model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
            m.running_mean.normal_(0, .1)
            m.running_var.uniform_(.5, 1.5)
    for p in learn.model.parameters(): p.data.add_(torch.randn_like(p)*.05)
    return learn

small = dict(arch='test_resnet', pretrained=False)
def two(dls, **kw): return branch_learner(dls, **small, **kw)
def css(dls, which='both'):
    learn = css_learner(dls, ('test_resnet','test_resnet'), n_branches=2, pretrained=False)
    learn.model.which = which
    return learn

branchy = dict(two=two, gate=partial(online_learner, **small), one=partial(online_learner, method='one', **small), okddip=partial(online_learner, method='okddip', **small),
    ffl=partial(online_learner, method='ffl', **small), fau=partial(online_learner, method=FFMCD(), gate='fau', **small), css=css, css_2=partial(css, which='net2'),
    peers=lambda dls: branch_learner(dls, ('test_resnet','resnet10t'), pretrained=False, arch_args=[{},dict(channels=(16,16,24,32))]),
    meal=lambda dls: meal_learner(dls, 'test_resnet', [two(dls)], n_branches=2, pretrained=False))
single = dict(alone=partial(two, n_branches=1), torchvision=partial(vision_learner, arch=resnet18, pretrained=False),
    timm=partial(vision_learner, arch='test_resnet', pretrained=False), raw=lambda dls: Learner(dls, timm.create_model('test_resnet', num_classes=3)))
learners = branchy | single

@pytest.fixture(scope='module')
def learn(dls):
    "A learner of two branches after two epochs"
    set_seed(0)
    res = two(dls, metrics=accuracy, cbs=[CutMix(),CEKD(w_cross=.5, ramp=0)])
    with res.no_bar(), res.no_logging(): res.fit(2, 1e-3)
    return shaken(res)

def drawn(fig=None):
    "Pictures on each of the axes of the last figure"
    return [[np.asarray(o.get_array()) for o in ax.images] for ax in (fig or plt.gcf()).axes]

def state(learn):
    "Everything that looking must leave alone"
    net,dls = learn.model,learn.dls
    return dict(modes=[m.training for m in net.modules()], cbs=list(learn.cbs), dls=dls, rng=dls.train.rng.getstate(), valid=dls.valid.rng.getstate(),
        hooks=[len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in net.modules()], grads=[p.grad is None for p in net.parameters()],
        attrs=sorted(vars(learn)), needs=[p.requires_grad for p in net.parameters()], tfms=[type(o) for o in dls.valid.after_batch])

def weights(learn): return {k:v.clone() for k,v in learn.model.state_dict().items() if isinstance(v, Tensor)}

# Maps

def loop_map(head, feat, k, size):
    "Logit of class `k` place by place, enlarged, from 0 up, summing to 1"
    m = torch.stack([torch.stack([head(feat[:,:,r:r+1,c:c+1])[:,k] for c in range(feat.shape[3])]) for r in range(feat.shape[2])]).permute(2,0,1)
    s = F.interpolate(m[:,None], size, mode='bilinear', align_corners=False)[:,0]
    s = s-s.amin((1,2), keepdim=True)
    return s/s.sum((1,2), keepdim=True)

@pytest.mark.parametrize('name', branchy)
def test_maps_of_branches(dls, name):
    learn = shaken(branchy[name](dls))
    x = dls.valid.one_batch()[0].as_subclass(Tensor)
    look,net = _Look(learn, x),learn.model.eval()
    n = len(look.names)-1
    y = torch.arange(len(x))%3
    with torch.no_grad(): feats = net.branch_forward(x)[1]
    per = net.net1.n_branches if name.startswith('css') else 1
    for i in range(n):
        with torch.no_grad(): want = torch.cat([loop_map(net.heads[i], feats[i][j:j+1], k*per+i%per, (64,64)) for j,k in enumerate(y.tolist())])
        assert torch.allclose(look.maps(i, y), want, atol=1e-6)
    assert torch.allclose(look.maps(n, y), semantic_map(model_cam(net, x, y), (64,64)), atol=1e-6)

@pytest.mark.parametrize('name', single)
def test_maps_of_one_network(dls, name):
    learn = shaken(single[name](dls))
    x,y = dls.valid.one_batch()[0].as_subclass(Tensor),torch.arange(8)%3
    look = _Look(learn, x)
    assert look.names==['network']
    assert torch.allclose(look.maps(0, y), semantic_map(model_cam(learn.model, x, y), (64,64)), atol=1e-6)

@pytest.mark.parametrize('name', learners)
def test_show_cam_says_what_every_network_predicts(dls, name):
    learn = shaken(learners[name](dls))
    items = (5,0,11)
    df = show_cam(learn, items)
    whole,each,y = branch_preds(learn)
    outs = [whole] if len(each)==1 else [*each,whole]
    names = ['network'] if len(each)==1 else [f'branch {i}' for i in range(len(each))]+['ensemble']
    assert df.network.tolist()==names*3 and df.item.tolist()==[o for o in items for _ in names]
    assert df.truth.tolist()==[dls.vocab[y[o]] for o in items for _ in names]
    assert df.predicted.tolist()==[dls.vocab[z[o].argmax()] for o in items for z in outs]
    assert np.allclose(df.probability, [z[o].softmax(0).max().item() for o in items for z in outs], atol=1e-5)
    assert len(plt.gcf().axes)==3*(len(names)+1) and df.in_box.between(0, 1).all()

def test_show_cam_draws_what_it_says(dls, learn):
    df,pics = show_cam(learn, [3,7]),drawn()
    look = _Look(learn, dls.valid.new(get_idxs=lambda: [3,7], n=2, bs=2).one_batch()[0])
    for j in range(2):
        row,first = pics[4*j:4*j+4],pics[4*j][0]
        assert [len(o) for o in row]==[1,2,2,2] and all(np.array_equal(o[0], first) for o in row)
        for i in range(3): assert np.allclose(row[1+i][1], look.maps(i, look.logits[i].argmax(-1))[j], atol=1e-7)
        titles = [ax.get_title() for ax in plt.gcf().axes[4*j:4*j+4]]
        assert df.truth[3*j] in titles[0] and all(df.predicted[3*j+i] in titles[1+i] and df.network[3*j+i] in titles[1+i] for i in range(3))
    assert 0<=pics[0][0].min() and pics[0][0].max()<=1 and len(np.unique(pics[0][0]))>50

def test_which(learn):
    assert show_cam(learn, 0, 'ensemble').network.tolist()==['ensemble'] and show_cam(learn, 0, 1).network.tolist()==['branch 1']
    assert show_cam(learn, 0, ['ensemble',0]).network.tolist()==['ensemble','branch 0']
    for bad in (2,-1,'mean',None,[]):
        with pytest.raises(ValueError, match="index of a branch from 0 to 1"): show_cam(learn, 0, bad)

def test_figsize(learn):
    show_cam(learn, 0, figsize=(3,2))
    assert tuple(plt.gcf().get_size_inches())==(3,2)
    show_mixed(learn, 2, figsize=(4,1))
    assert tuple(plt.gcf().get_size_inches())==(4,1)

def test_new_pictures(dls, learn):
    "A file, its name, its pixels and its index are one picture."
    file = dls.valid_ds.items[4]
    want,cols = show_cam(learn, 4),['network','predicted','where','probability']
    for o in (file, str(file), PILImage.create(file), Image.open(file)):
        got = show_cam(learn, o)
        pd.testing.assert_frame_equal(got[cols], want[cols])
        assert set(got.truth)=={''}
    assert show_cam(learn, [file,PILImage.create(file)]).item.tolist()==[file.name]*3+['picture 1']*3
    assert np.allclose(show_cam(learn, file).in_box, want.in_box)

@pytest.mark.parametrize('items,msg', [(99,'There is no item 99: the validation set has 18 images, from 0 to 17'), ([0,-1],'no item -1'), ([],'`items` is empty'),
    ([0,'x.jpg'],'either indices'), ('nowhere.jpg','There is no picture `nowhere.jpg`')])
def test_bad_items(learn, items, msg):
    with pytest.raises((ValueError,FileNotFoundError), match=msg): show_cam(learn, items)

def test_index_types(learn):
    want = show_cam(learn, [1,2])
    for o in (tensor([1,2]), np.array([1,2]), range(1,3), L(1,2), [tensor(1),2]): pd.testing.assert_frame_equal(show_cam(learn, o), want)

def test_place():
    names = 'upper left,top,upper right,left,centre,right,lower left,bottom,lower right'.split(',')
    maps = torch.zeros(10,9,12)
    for i in range(9): maps[i,3*(i//3)+1,4*(i%3)+2] = 1
    assert map_place(maps)==names+['everywhere']

def test_flat_maps_are_even(dls):
    learn = two(dls)
    for p in learn.model.heads.parameters(): p.data.zero_()
    df = show_cam(learn, 0)
    assert set(df['where'])=={'everywhere'} and np.allclose(df.in_box, df.box_area, atol=.02)

def test_box(birds, dls, learn):
    "The share of each map in the box, pixel by pixel; the transforms cut 4 of 73 pixels from the left and the top, and leave 64."
    df,boxes = show_cam(learn, [2,9], 'ensemble'),[]
    sem = item_cams(learn, [2,9])[1]
    ids = {n:int(i) for i,n in (o.split(' ') for o in (birds/'images.txt').read_text().splitlines())}
    rows = {int(i):[float(o) for o in r] for i,*r in (o.split() for o in (birds/'bounding_boxes.txt').read_text().splitlines())}
    for j,item in enumerate([2,9]):
        x,y,w,h = rows[ids[dls.valid_ds.items[item].relative_to(birds/'images').as_posix()]]
        a,b,c,d = (min(max(o-4, 0), 64) for o in (x,y,x+w,y+h))
        part = lambda n,lo,hi: max(0, min(n+1, hi)-max(n, lo))
        inside = sum(sem[j,r,q].item()*part(r, b, d)*part(q, a, c) for r in range(64) for q in range(64))
        assert abs(df.in_box[j]-inside)<.002 and abs(df.box_area[j]-(c-a)*(d-b)/64**2)<.005

def test_box_mass():
    maps = torch.arange(1.,13).view(1,3,4)
    assert box_mass(maps, tensor([[1,0,3,2]])).item()==2+3+6+7 and box_mass(maps, tensor([[0,0,4,3]])).item()==78
    assert box_mass(maps, tensor([[.5,2,1,2.5]])).item()==9/4 and box_mass(maps, tensor([[2,2,2,3]])).item()==0

def test_no_boxes(birds, dls):
    "Without a file of boxes, and with loaders that cut the boxes out, the columns are left out."
    plain = ImageDataLoaders.from_folder(birds/'images', valid_pct=.5, item_tfms=Resize(64), bs=8, num_workers=0)
    assert 'in_box' not in show_cam(two(plain), 0)
    df = pd.DataFrame(dict(name=[o.relative_to(birds).as_posix() for o in dls.valid_ds.items], label=[o.parent.name for o in dls.valid_ds.items]))
    table = ImageDataLoaders.from_df(df, birds, valid_pct=.5, item_tfms=Resize(64), bs=8, num_workers=0)
    assert 'in_box' not in show_cam(two(table), 0)

def test_item_cams(dls, learn):
    ims,maps,pred = item_cams(learn, [1,8])
    whole = branch_preds(learn)[0]
    x = dls.valid.new(get_idxs=lambda: [1,8], n=2, bs=2).one_batch()[0].as_subclass(Tensor)
    assert torch.equal(pred, whole.argmax(1)[[1,8]]) and ims.shape==(2,64,64,3)
    assert torch.allclose(maps, semantic_map(model_cam(learn.model, x, pred), (64,64)), atol=1e-6)

def test_one_pass(learn):
    "One pass through the trunk for all maps of a picture."
    calls = []
    hook = learn.model.trunk.register_forward_hook(lambda m,i,o: calls.append(len(o)))
    try:
        show_cam(learn, [0,1,2])
        assert calls==[3]
        item_cams(learn, [4])
        assert calls==[3,1]
        plot_confused_pairs(learn, pd.DataFrame(dict(a=[learn.dls.vocab[0]], b=[learn.dls.vocab[1]], errors=[1], images=[12], item_a=[0], item_b=[6])))
        assert calls==[3,1,2]
        branch_agreement(learn)
        assert calls==[3,1,2,8,8,2]
    finally: hook.remove()

def swin(): return SwinTransformer(img_size=64, patch_size=4, embed_dim=16, depths=(1,1), num_heads=(1,1), window_size=4, num_classes=3)

@pytest.mark.parametrize('make', [
    lambda dls: vision_learner(dls, 'test_vit', pretrained=False, img_size=64), lambda dls: Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*64*64, 3))),
    lambda dls: Learner(dls, nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(3*64*64, 3)))])
def test_no_maps(dls, make):
    learn = make(dls)
    for f in (show_cam,item_cams):
        with pytest.raises(ValueError, match="no spatial feature map.*such as 'resnet50'.*`confused_pairs`, `reliability`"): f(learn, [0])
    whole,_,y = branch_preds(learn)
    assert ece(whole, y)>=0

@pytest.mark.parametrize('make', [lambda: timm.create_model('test_vit', img_size=64, num_classes=3), swin])
def test_maps_of_tokens(dls, make):
    "A plain transformer, and a network with channels last"
    df = show_cam(Learner(dls, make()), [0])
    assert len(df)==1 and item_cams(Learner(dls, make()), [0])[1].shape[0]==1

def test_several_labels(birds):
    block = DataBlock((ImageBlock,MultiCategoryBlock), get_items=lambda p: sorted((p/'images').rglob('*.jpg')), get_y=lambda o: [o.parent.name,'bird'], item_tfms=Resize(64))
    learn = vision_learner(block.dataloaders(birds, bs=8, num_workers=0), 'test_resnet', pretrained=False)
    df = show_cam(learn, [0,1])
    probs,y = learn.get_preds()
    assert np.allclose(df.probability, probs[:2].max(1).values, atol=1e-5)
    assert df.truth.tolist()==[' + '.join(learn.dls.vocab[i] for i in o.nonzero()[:,0]) for o in y[:2]]
    with pytest.raises(ValueError, match='one class for each image'): plot_confused_pairs(learn)

def test_no_classes(birds):
    block = DataBlock((ImageBlock,RegressionBlock), get_items=lambda p: sorted((p/'images').rglob('*.jpg')), get_y=lambda o: 1., item_tfms=Resize(64))
    learn = vision_learner(block.dataloaders(birds, bs=8, num_workers=0), 'test_resnet', pretrained=False)
    for f in (show_cam,plot_confused_pairs):
        with pytest.raises(ValueError, match='names no classes'): f(learn)

# What stays as it was

looks = dict(show_cam=show_cam, pairs=plot_confused_pairs, agreement=branch_agreement, mixed=show_mixed, history=history, components=plot_components,
    new=lambda learn: show_cam(learn, learn.dls.valid_ds.items[:1]), item_cams=lambda learn: item_cams(learn, [0]),
    report=lambda learn: report(learn, history(learn), pd.DataFrame()))

@pytest.mark.parametrize('training', [True,False])
@pytest.mark.parametrize('name', ['two','gate','css','timm'])
def test_leaves_the_learner_alone(dls, name, training):
    "Also in mixed precision; training goes on afterwards."
    learn = learners[name](dls)
    learn.add_cbs([SnapMix(),MixedPrecision()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    learn.model.zero_grad()
    learn.model.train(training)
    before,was = state(learn),weights(learn)
    for k in looks.keys()-({'agreement'} if name=='timm' else {}):
        rand = random.getstate(),torch.get_rng_state()
        looks[k](learn)
        assert state(learn)==before and all(torch.equal(v, was[k]) for k,v in weights(learn).items()), k
        if k!='mixed': assert random.getstate()==rand[0] and torch.equal(torch.get_rng_state(), rand[1]), k
        plt.close('all')
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)

def test_after_an_error(learn):
    learn.model.train()
    before = state(learn)
    for f,says in ((lambda: show_cam(learn, 99), '99'), (lambda: show_cam(learn, 0, 7), '7'), (lambda: plot_confused_pairs(learn, pd.DataFrame(dict(a=['x']))), 'column')):
        with pytest.raises(ValueError, match=says): f()
    assert state(learn)==before

def test_after_export(dls, learn, tmp_path):
    "A learner that was loaded has no validation set, but can look at pictures."
    learn.export(tmp_path/'m.pkl')
    loaded,file = load_learner(tmp_path/'m.pkl'),dls.valid_ds.items[0]
    assert np.allclose(show_cam(loaded, file).probability, show_cam(learn, 0).probability, atol=1e-5)
    with pytest.raises(ValueError, match='the validation set has 0 images; pass paths'): show_cam(loaded, 0)

# Mixed images

class Known(Mix):
    "A mix whose record is known"
    def __init__(self, **kw):
        super().__init__()
        self.kw = kw
    def mix(self, x, y):
        n = len(x)
        rec = MixRecord(torch.arange(n).roll(1), torch.linspace(.1, .8, n), torch.linspace(.5, .2, n), **self.kw)
        self.seen = x,y,mix_pixels(x, rec)
        return self.seen[2],rec

@pytest.mark.parametrize('box,share', [((8,0,40,16),32*16/64**2), (torch.tensor([[0,0,8*i,8] for i in range(8)]),None), (None,1.)])
@pytest.mark.parametrize('make', [two,single['torchvision']])
def test_mixed(dls, box, share, make):
    m = Known(box_a=box, box_b=box, host_share=.4 if box is None else 0.)
    learn = make(dls, cbs=m)
    df = show_mixed(learn, 5)
    x,y,mixed = m.seen
    assert df.host.tolist()==[dls.vocab[o] for o in y[:5]] and df.donor.tolist()==[dls.vocab[o] for o in y.roll(1)[:5]]
    assert np.allclose(df.weight_host, torch.linspace(.1, .8, 8)[:5]) and np.allclose(df.weight_donor, torch.linspace(.5, .2, 8)[:5])
    assert np.allclose(df.box, [i*64/64**2 for i in range(5)] if share is None else share)
    axs = [ax for ax in plt.gcf().axes if ax.images]
    assert len(axs)==5
    mean,std = (torch.tensor(o) for o in data_stats(dls))
    ims = (mixed.cpu().permute(0,2,3,1)*std+mean).clamp(0, 1)
    for i,ax in enumerate(axs):
        assert np.allclose(ax.images[0].get_array(), ims[i], rtol=0, atol=1/255) and df.host[i] in ax.get_title() and f'{df.weight_donor[i]:.2f} {df.donor[i]}' in ax.get_title()
        rects = [o.get_bbox().bounds for o in ax.patches]
        want = [] if box is None else [(8,0,32,16)] if share else [(0,0,8*i,8)]
        assert np.allclose(rects, want)

@pytest.mark.parametrize('mix', [MixUp(), CutMix(per='sample'), SnapMix(), MixOneOf([MixUp(),SnapMix()], per='sample')])
@pytest.mark.parametrize('name', ['two','css','timm'])
def test_every_mix(dls, mix, name):
    learn = learners[name](dls)
    learn.add_cb(mix)
    df = show_mixed(learn)
    assert list(df)==['host','donor','weight_host','weight_donor','box'] and len(df)==4 and df.box.between(0, 1).all() and not df.isna().any().any()
    assert len(show_mixed(learn, 99))==8

def test_nothing_mixes(dls):
    with pytest.raises(ValueError, match='Nothing mixes here'): show_mixed(two(dls))
    with pytest.raises(ValueError, match="fastai's `CutMix` does not tell"): show_mixed(vision_learner(dls, resnet18, pretrained=False, cbs=StockCutMix()))
    class Never(CutMix):
        def mix(self, x, y): return None
    with pytest.raises(ValueError, match='mixed nothing in 100 draws'): show_mixed(two(dls, cbs=Never()))
    with pytest.raises(ValueError, match='`n` is 0'): show_mixed(two(dls, cbs=CutMix()), 0)

# Curves

def test_history(learn):
    df = history(learn)
    assert list(df)==['epoch','train_loss','valid_loss','accuracy','ce_mix','cross','ce_clean'] and len(df)==2
    assert df.iloc[:,1:].to_numpy().tolist()==[list(o) for o in learn.recorder.values]
    assert df.attrs==dict(parts=['ce_mix','cross','ce_clean'], weights=dict(ce_mix=1., cross=.5, ce_clean=1.))

def test_history_of_nothing(dls):
    "`validate` starts the record anew, and its row is no epoch of training."
    learn = two(dls, metrics=accuracy)
    with pytest.raises(ValueError, match='call `history` after `learn.fit`'): history(learn)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        learn.validate()
    for f in (history,plot_components):
        with pytest.raises(ValueError, match='right after `learn.fit`'): f(learn)

def test_components(learn):
    df = plot_components(learn)
    hist,ax = history(learn),plt.gcf().axes[0]
    assert df.index.tolist()==['ce_mix','cross','ce_clean'] and df.weight.tolist()==[1.,.5,1.] and list(df)==['weight',1,2]
    assert np.allclose(df[[1,2]].T, hist[['ce_mix','cross','ce_clean']])
    assert [o.get_label() for o in ax.lines]==['ce_mix × 1','cross × 0.5','ce_clean × 1']
    for line,c in zip(ax.lines, df.index): assert line.get_xdata().tolist()==[1,2] and np.allclose(line.get_ydata(), hist[c])
    own = plt.subplots()[1]
    pd.testing.assert_frame_equal(plot_components(hist, own), df)
    assert len(own.lines)==3

def test_components_without_parts_or_weights(dls, tmp_path):
    "A loss of one part is drawn whole; weights that follow from the batch are not shown; a table from a file has no weights."
    plain,three = vision_learner(dls, resnet18, pretrained=False, metrics=accuracy),css(dls)
    for o in (plain,three):
        with o.no_bar(), o.no_logging(): o.fit(1, 1e-3)
    assert plot_components(plain).index.tolist()==['train_loss'] and plot_components(plain)[1].tolist()==history(plain).train_loss.tolist()
    df = plot_components(three)
    assert df.index.tolist()==['ce_1','ce_2','kd_1','kd_2'] and list(df)==[1]
    history(three).to_csv(tmp_path/'h.csv', index=False)
    assert np.allclose(plot_components(pd.read_csv(tmp_path/'h.csv')), df)

def test_plot_history(learn):
    hist,axs = history(learn),plt.subplots(1, 3)[1]
    assert plot_history(hist, axs) is hist
    assert all(float(o).is_integer() for ax in axs for o in ax.get_xticks()) # no epoch 2.5
    assert [[o.get_label() for o in ax.lines] for ax in axs]==[['train_loss','valid_loss'],['accuracy'],['ce_mix','cross','ce_clean']]
    plain = plot_history(hist[['epoch','train_loss','valid_loss','accuracy']].copy())
    assert list(plain)==['epoch','train_loss','valid_loss','accuracy']

# Pairs

def test_confused_pairs_show_what_they_count():
    "The photograph of a pair is one that was taken for the other class, though another comes nearer to it on its way to a third"
    z = torch.tensor([[0.,3,5],[0,1,0],[2,0,0],[0,0,9]])
    df = confused_pairs(z, torch.tensor([0,0,1,2]), 'abc')
    assert df.iloc[0][['a','b','errors','item_a','item_b']].tolist()==['a','b',2,1,2]

def test_confused_pairs():
    "Against a count over images; a class without images has no item."
    g = torch.Generator().manual_seed(0)
    z,y = torch.randn(60,4,generator=g),torch.randint(0,3,(60,),generator=g)
    df,pred = confused_pairs(z, y, 'abcd', 6),z.argmax(1)
    for r in df.itertuples():
        a,b = 'abcd'.index(r.a),'abcd'.index(r.b)
        assert r.errors==sum(1 for t,p in zip(y.tolist(), pred.tolist()) if {t,p}=={a,b}) and r.images==sum(1 for t in y.tolist() if t in (a,b))
        for item,t,o in ((r.item_a,a,b),(r.item_b,b,a)):
            own = [(z[i,o]-z[i,t]).item() for i in range(60) if y[i]==t]
            assert item==-1 if not own else y[item]==t and (z[item,o]-z[item,t]).item()==max(own)
    assert df.errors.is_monotonic_decreasing and len(df)==6 and (df[df.b=='d'].item_b==-1).all() and (df.b=='d').any()
    assert len(confused_pairs(z, y, 'abcd', 2))==2 and not len(confused_pairs(torch.eye(3), torch.arange(3), 'abc'))

@pytest.mark.parametrize('name', learners)
def test_plot_pairs(dls, name):
    learn = shaken(learners[name](dls))
    whole,_,y = branch_preds(learn)
    pairs = confused_pairs(whole, y, dls.vocab)
    df = plot_confused_pairs(learn, pairs)
    assert len(df)==4*len(pairs)>0 and len(plt.gcf().axes)==6*len(pairs)
    pd.testing.assert_frame_equal(plot_confused_pairs(learn), df)
    for r in df.itertuples():
        assert r.truth==dls.vocab[y[r.item]] and r.predicted==dls.vocab[whole[r.item].argmax()] and r.map_of in r.pair.split(' / ')
        assert abs(r.probability-whole[r.item].softmax(0)[list(dls.vocab).index(r.map_of)].item())<1e-5
    assert df.map_of.tolist()==[o for r in pairs.itertuples() for o in (r.a,r.b,r.a,r.b)]
    assert df.item.tolist()==[o for r in pairs.itertuples() for o in (r.item_a,r.item_a,r.item_b,r.item_b)]

def test_pairs_draw_both_maps(dls, learn):
    v = dls.vocab
    pairs = pd.DataFrame(dict(a=[v[0],v[2]], b=[v[1],v[0]], errors=[3,2], images=[12,12], item_a=[2,13], item_b=[8,1]), index=[5,9])
    df,pics = plot_confused_pairs(learn, pairs),drawn()
    items,look = [2,8,13,1],_Look(learn, dls.valid.new(get_idxs=lambda: [2,8,13,1], n=4, bs=4).one_batch()[0])
    maps = [look.maps(-1, tensor(o)) for o in ([0,0,2,2],[1,1,0,0])]
    for j in range(4):
        three = pics[3*j:3*j+3]
        assert [len(o) for o in three]==[1,2,2] and all(np.array_equal(o[0], three[0][0]) for o in three)
        for c in range(2): assert np.allclose(three[1+c][1], maps[c][j], atol=1e-7)
    assert map_place(torch.stack([m[j] for j in range(4) for m in maps]))==df['where'].tolist() and df.item.tolist()==[o for o in items for _ in range(2)]
    assert df.errors.tolist()==[3]*4+[2]*4

def test_pairs_without_a_photograph(dls, learn):
    v = dls.vocab
    df = plot_confused_pairs(learn, pd.DataFrame(dict(a=[v[0]], b=[v[1]], errors=[3], images=[12], item_a=[-1], item_b=[8])))
    assert df.item.tolist()==[8,8] and [len(o) for o in drawn()]==[0,0,0,1,2,2]

def test_pairs_none(dls, learn):
    "Nothing confused: an empty table with its columns, and no figure."
    plt.close('all')
    some = plot_confused_pairs(learn)
    plt.close('all')
    df = plot_confused_pairs(learn, confused_pairs(torch.eye(3), torch.arange(3), 'abc'))
    assert not len(df) and set(df)<=set(some) and not plt.get_fignums()
    with pytest.raises(ValueError, match='no column `b`'): plot_confused_pairs(learn, pd.DataFrame(dict(a=['x'])))
    assert len(plot_confused_pairs(learn, k=1))<=4

# Agreement

@pytest.mark.parametrize('name', branchy)
def test_agreement(dls, name):
    learn = shaken(branchy[name](dls))
    whole,each,_ = branch_preds(learn)
    df,ps = branch_agreement(learn),[o.argmax(1).tolist() for o in (*each,whole)]
    assert df.index.tolist()==df.columns.tolist()==[f'branch {i}' for i in range(len(each))]+['ensemble']
    for i,a in enumerate(ps):
        for j,b in enumerate(ps): assert df.iloc[i,j]==pytest.approx(sum(p==q for p,q in zip(a, b))/18)

def test_agreement_on_other_data(dls, learn):
    dl = dls.test_dl(dls.train_ds.items[:5], with_labels=True, num_workers=0)
    whole,each,_ = branch_preds(learn, dl)
    assert branch_agreement(learn, dl).loc['branch 0','ensemble']==pytest.approx((each[0].argmax(1)==whole.argmax(1)).double().mean().item())

def test_plot_agreement():
    df = pd.DataFrame([[1,.25],[.25,1]], index=['branch 0','ensemble'], columns=['branch 0','ensemble'])
    ax = plt.subplots()[1]
    assert plot_branch_agreement(df, ax) is df
    assert [o.get_text() for o in ax.texts]==['1.00','0.25','0.25','1.00'] and np.array_equal(ax.images[0].get_array(), df)
    assert [o.get_text() for o in ax.get_yticklabels()]==['branch 0','ensemble']

@pytest.mark.parametrize('name', single)
def test_agreement_of_one(dls, name):
    with pytest.raises(ValueError, match='has one output'): branch_agreement(single[name](dls))

# Calibration

@pytest.mark.parametrize('bins', [1,4,10])
def test_reliability(bins):
    g = torch.Generator().manual_seed(0)
    z,y = 3*torch.randn(200,5,generator=g),torch.randint(0,5,(200,),generator=g)
    cells = {}
    for l,t in zip(z.double(), y.tolist()):
        total = sum(math.exp(o) for o in l.tolist())
        p = [math.exp(o)/total for o in l.tolist()]
        k = p.index(max(p))
        cells.setdefault(min(int(max(p)*bins), bins-1), []).append((max(p),k==t))
    df,err = reliability(z, y, bins),0
    assert df.index.tolist()==[f'{i/bins:.2f} to {(i+1)/bins:.2f}' for i in sorted(cells)] and df.images.sum()==200
    for (c,a,n),(_,o) in zip(df.to_numpy(), sorted(cells.items())):
        conf,acc = np.mean([p for p,_ in o]),np.mean([r for _,r in o])
        assert abs(c-conf)<1e-9 and abs(a-acc)<1e-9 and n==len(o)
        err += len(o)/200*abs(conf-acc)
    assert abs(ece(z, y, bins)-err)<1e-9 and isinstance(ece(z, y, bins), float)

def test_reliability_by_hand():
    probs,y = tensor([[.9,.1],[.1,.9],[.9,.1],[.7,.3]]),tensor([0,1,1,0])
    assert abs(ece(probs.log(), y, 5)-.25)<1e-6
    df = plot_reliability(reliability(probs.log(), y, 5))
    assert np.allclose(df.gap, [.3,2/3-.9]) and 'error 0.25' in plt.gcf().axes[0].get_title()
    assert np.allclose(plt.gcf().axes[0].collections[0].get_offsets(), [[.7,1],[.9,2/3]])
    assert reliability(tensor([[100.,0]]), tensor([0])).index.tolist()==['0.90 to 1.00']

@pytest.mark.parametrize('z,y,bins,msg', [(torch.eye(3),torch.arange(3),10,'probabilities.*get_preds'), (torch.randn(3,2),torch.arange(2),10,'shapes'),
    (torch.randn(3,2),torch.rand(3,2),10,'one class for each image'), (torch.randn(3,2),tensor([0,1,0]),0,'at least one'), (torch.randn(0,2),torch.zeros(0).long(),10,'no images')])
def test_bad_logits(z, y, bins, msg):
    for f in (reliability,ece):
        with pytest.raises(ValueError, match=msg): f(z, y, bins)

def test_bad_vocab():
    with pytest.raises(ValueError, match='names 2 classes, but `logits` has 3'): confused_pairs(torch.randn(2,3), tensor([0,1]), 'ab')

# One page

def test_report(learn):
    whole,_,y = branch_preds(learn)
    pairs = confused_pairs(whole, y, learn.dls.vocab, 2)
    plt.close('all')
    fig = report(learn, history(learn), pairs, 'A title')
    pics = drawn(fig)
    assert not plt.get_fignums() and len(fig.axes)==3+6*len(pairs) and [len(o) for o in pics[3:9]]==[1,2,2,1,2,2]
    assert fig.subfigs[0]._suptitle.get_text()=='A title'
    assert len(report(learn, history(learn), pairs[:0]).axes)==3
