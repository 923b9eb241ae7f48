"A run that goes wrong: batches that are not finite, in every method and mix, and runs that have nothing else any more."
import math,warnings
import pytest,torch
import numpy as np
from fastai.vision.all import (Callback,CategoryBlock,CrossEntropyLossFlat,DataBlock,DataLoaders,Image,ImageBlock,IndexSplitter,L,Path,SGD,accuracy,
    get_image_files,set_seed,store_attr)
from cekd_fastai.branches import branch_net
from cekd_fastai.cekd import CEKD
from cekd_fastai.checkpoint import Checkpoint
from cekd_fastai.guard import Diverged,Guard,all_finite,batch_files
from cekd_fastai.learner import branch_learner,css_learner,meal_learner,online_learner
from cekd_fastai.mix.callback import CutMix,Mix,MixUp
from cekd_fastai.mix.snapmix import MixOneOf,SnapMix
from cekd_fastai.online.callback import ONLINE

arch,n_out = 'cifar_resnet8',3
kw = dict(pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy)

def toy(bad=(5,), value=math.nan, n=12, valid_bad=()):
    "Loaders of three batches of four pictures; those in `bad` have one pixel that is not finite"
    g = torch.Generator().manual_seed(0)
    x,y = torch.randn(n, 3, 32, 32, generator=g),torch.randint(0, n_out, (n,), generator=g)
    for i in bad: x[i,0,3,3] = value
    v = x[:8].nan_to_num(0., 0., 0.)
    for i in valid_bad: v[i,0,3,3] = value
    dls = DataLoaders.from_dsets(L(zip(x,y)), L(zip(v,y)), bs=4, num_workers=0, device='cpu', shuffle=False, drop_last=False)
    dls.c = n_out
    return dls

def teachers(): return [branch_net(arch, n_out, 1, pretrained=False).eval()]

def mixed(cbs): return cbs if any(isinstance(o, Mix) for o in cbs) else [CutMix(),*cbs] # CEKD needs a mix

def plain(d, *cbs): return branch_learner(d, arch, 1, cbs=cbs, **kw)

def cekd(d, *cbs): return branch_learner(d, arch, cbs=[CEKD(teacher='ema', validate_ema=True),*mixed(cbs)], **kw)

def meal(d, *cbs): return meal_learner(d, arch, teachers(), cbs=cbs, **kw)

def css(d, *cbs): return css_learner(d, (arch,arch), 2, cbs=cbs, **kw)

METHODS = dict(plain=plain, cekd=cekd, meal=meal, css=css)
METHODS |= {o: (lambda d,*cbs,o=o: online_learner(d, arch, o, cbs=cbs, **kw)) for o in ONLINE}
MIXES = dict(none=list, mixup=lambda: [MixUp()], cutmix=lambda: [CutMix()], snapmix=lambda: [SnapMix()],
    oneof=lambda: [MixOneOf([MixUp(),CutMix(),SnapMix()])])

def quiet(learn, n=1, lr=.01):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(n, lr)
    return learn

def sound(learn):
    "Whether weights, statistics, average and discriminators are finite"
    net = learn.model
    adversary = getattr(net, 'adversary', None)
    tensors = [*net.parameters(), *net.buffers(), *(adversary.nets.parameters() if adversary else ())]
    return bool(all_finite(tensors))

@pytest.mark.parametrize('method', METHODS)
def test_bad_pixel_without(method):
    "What happens without: one pixel kills every method."
    assert not sound(quiet(METHODS[method](toy())))

@pytest.mark.parametrize('mix', MIXES)
@pytest.mark.parametrize('method', METHODS)
def test_bad_pixel(method, mix, tmp_path):
    "One pixel costs its batch, and nothing else."
    guard = Guard(folder=tmp_path)
    learn = quiet(METHODS[method](toy(value=math.inf), *MIXES[mix](), guard), 2)
    assert sound(learn) and guard.skipped==2 and guard.in_row==0
    assert np.isfinite(np.array(list(learn.recorder.values), dtype=float)).all()
    assert len(list(tmp_path.iterdir()))==2

class Spoil(Callback):
    "Makes the loss of one batch infinite, after everyone has added to it"
    order,run_valid = 8,False
    def __init__(self, at, value): store_attr()
    def after_loss(self):
        if self.learn.train_iter in self.at: self.learn.loss_grad = self.learn.loss_grad*self.value

@pytest.mark.parametrize('value', [math.nan,math.inf,-math.inf])
@pytest.mark.parametrize('method', ['plain','cekd','meal','one'])
def test_bad_loss(method, value, tmp_path):
    "A loss that is not finite costs its step: weights, statistics and average are those of a run without the batch."
    guard = Guard(folder=tmp_path)
    learn = METHODS[method](toy(()), guard, Spoil([1], value))
    before = {}
    class Look(Callback):
        run_valid = False
        def before_batch(self): before[self.learn.iter] = {k:v.clone() for k,v in self.model.state_dict().items() if v.is_floating_point() and '_extra' not in k}
    learn.add_cb(Look())
    quiet(learn)
    assert guard.skipped==1 and sound(learn)
    assert all(torch.equal(before[1][k], before[2][k]) for k in before[1])
    assert not all(torch.equal(before[0][k], before[1][k]) for k in before[1])

def test_unlabelled_and_discriminators():
    "A gradient that is not finite leaves the discriminators of MEAL as sound as they were."
    learn = METHODS['meal'](toy(()))
    a = learn.model.adversary
    a.opt_step([torch.full_like(p, math.nan) for p in a.nets.parameters()])
    assert all_finite(a.nets.parameters())
    assert all(all_finite(list(s.values())) for s in a.opt.state.values())

def test_stops(tmp_path):
    "Several in a row end the run with one sentence that names the rate and the pictures."
    with pytest.raises(Diverged, match='not finite in 3 batches in a row, the last with row 8, .*learning rate is 0.01'):
        quiet(METHODS['plain'](toy(()), Guard(3, tmp_path), Spoil(range(99), math.nan)))

def test_short_epoch_stops(tmp_path):
    "An epoch without one good batch ends a run that has fewer batches than it takes in a row."
    with pytest.raises(Diverged, match='diverged in epoch 0: not one of its 3 batches was finite; the learning rate is 0.01'):
        quiet(METHODS['plain'](toy(()), Guard(50, tmp_path), Spoil(range(99), math.nan)))

def test_high_rate_stops(tmp_path):
    "A rate that nobody survives is said, whatever breaks first."
    learn = branch_learner(toy(()), arch, cbs=Guard(folder=tmp_path), opt_func=SGD, **kw)
    with pytest.raises(Diverged, match='diverged in epoch'): quiet(learn, 5, 1e8)

def test_validation(tmp_path):
    "A picture of the validation set that is not finite is named and left out of its loss."
    guard = Guard(folder=tmp_path)
    learn = quiet(METHODS['plain'](toy((), valid_bad=[1]), guard))
    assert math.isfinite(learn.recorder.values[0][1]) and guard.skipped==1 and guard.in_row==0

def test_outside_of_a_fit(tmp_path):
    "Predictions and the search for a rate are left alone."
    guard = Guard(folder=tmp_path)
    learn = quiet(METHODS['plain'](toy((), valid_bad=[1]), guard))
    preds = learn.get_preds()[0]
    assert len(preds)==8 and torch.isnan(preds).any()
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert not guard.fitting

def test_counts_go_on(tmp_path):
    "A run that is resumed keeps its counts."
    def make(*cbs): return METHODS['plain'](toy(), Guard(folder=tmp_path/'bad'), Checkpoint(tmp_path/'run', signals=False), *cbs)
    class Die(Callback):
        def before_epoch(self):
            if self.epoch==2: raise SystemExit
    with pytest.raises(SystemExit): quiet(make(Die()), 3)
    learn = quiet(make(), 3)
    assert learn.guard.skipped==3

def test_same_without_faults(tmp_path):
    "A sound run is the same with and without, bit for bit."
    def run(*cbs):
        set_seed(1)
        return quiet(METHODS['cekd'](toy(()), SnapMix(), *cbs), 2)
    a,b = run(),run(Guard(folder=tmp_path))
    assert all(torch.equal(p, q) for p,q in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    assert a.recorder.values==b.recorder.values and not list(tmp_path.iterdir())

def test_scaler(tmp_path):
    "With a scaler, gradients that overflow are its business until nothing is left to halve."
    class Scaler:
        scale = 2.**16
        def is_enabled(self): return True
        def get_scale(self): return self.scale
    guard = Guard(folder=tmp_path)
    learn = METHODS['plain'](toy(()), guard)
    learn.scaler = Scaler()
    class Overflow(Callback):
        order,run_valid = -6,False
        def before_step(self): next(self.learn.model.parameters()).grad.fill_(math.inf)
        def after_step(self):
            for p in self.learn.model.parameters(): p.data.nan_to_num_(0., 0., 0.)
    learn.add_cb(Overflow())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    assert guard.skipped==0
    Scaler.scale = .5
    with pytest.raises(Diverged): quiet(learn, 2)

def test_files(tmp_path):
    "Pictures are named by their files, shuffled and with workers too."
    for i in range(6): Image.new('RGB', (8,8), (i*40,0,0)).save(tmp_path/f'{i}.png')
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, get_y=lambda o: int(o.stem)%2, splitter=IndexSplitter([0]))
    dls = block.dataloaders(tmp_path, bs=2, num_workers=0, device='cpu')
    for i,(x,_) in enumerate(dls.train):
        reds = (x[:,0,0,0]*255/40).round().int().tolist()
        assert [int(Path(o).stem) for o in batch_files(dls.train, i)]==reds

def test_kept_batch(tmp_path):
    "What is kept can be opened without code."
    from safetensors.torch import load_file
    quiet(METHODS['plain'](toy(), Guard(folder=tmp_path, keep=1)), 2)
    assert len(list(tmp_path.iterdir()))==1
    o = load_file(tmp_path/'epoch0-batch1.safetensors')
    assert o['x'].shape==(4,3,32,32) and torch.isnan(o['x']).sum()==1 and len(o['y0'])==4

@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'),'safetensors'])
def test_a_batch_that_cannot_be_kept(tmp_path, monkeypatch, error):
    "A full disk is a warning, and no file is named that is not there; the run goes on"
    from safetensors import SafetensorError
    from cekd_fastai import guard
    def full(*args): raise SafetensorError('I/O error: No space left on device') if error=='safetensors' else error
    monkeypatch.setattr(guard, 'save_file', full)
    words = []
    monkeypatch.setattr(guard, 'warn', words.append)
    learn = quiet(METHODS['plain'](toy(), Guard(folder=tmp_path, keep=1)), 1)
    said = ' '.join(words)
    assert 'was not kept' in said and 'not finite in batch 1 of epoch 0, so it is left out (' in said and 'it is kept in' not in said
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
