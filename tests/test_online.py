"Online distillation: every method's loss against a reference written as loops, gradients, and its manners as a fastai citizen."
from types import SimpleNamespace
import math
import numpy as np, forks, pytest, torch, torch.nn.functional as F
from fastai.vision.all import (BCEWithLogitsLossFlat,Callback,CancelFitException,CrossEntropyLossFlat,CSVLogger,DataLoaders,L,Learner,SaveModelCallback,
    accuracy,nn)
from fastai.callback.training import GradientAccumulation
from cekd_fastai.cekd import CEKD
from cekd_fastai.branches import branch_net,branch_splitter,save_net
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.mix.callback import CutMix,MixUp
from cekd_fastai.mix.snapmix import SnapMix
from cekd_fastai.learner import online_learner
from cekd_fastai.losses import kd_loss
from cekd_fastai.online.callback import FFMCD,ONE,ONLINE,OnlineKD
from cekd_fastai.online.diversity import diversity
from cekd_fastai.online.gates import FFMGate,LeaderGate,SafeBN
from cekd_fastai.online.cd import CD_FORMS,cd_loss,classifier_weight
from cekd_fastai.online.net import gate_net

methods = list(ONLINE)

# ---- references: numbers, one sample, one class, one pair after the other

def np_softmax(z, T=1.):
    e = [math.exp((v-max(z))/T) for v in z]
    return [v/sum(e) for v in e]

def np_ce(z, y): return sum(-math.log(np_softmax(o)[c]) for o,c in zip(z, y))/len(y)

def np_kd(z, t, T):
    "T*T*KL(teacher || student), mean over the batch"
    tot = 0.
    for zs,zt in zip(z, t):
        p,q = np_softmax(zt, T),np_softmax(zs, T)
        tot += sum(a*math.log(a/b) for a,b in zip(p, q))
    return T*T*tot/len(z)

def np_mean(zs): return [[sum(z[b][k] for z in zs)/len(zs) for k in range(len(zs[0][0]))] for b in range(len(zs[0]))]

def np_cd(ws, form):
    tot,pairs = 0.,[(i,j) for i in range(len(ws)) for j in range(i+1, len(ws))]
    for i,j in pairs:
        a,b = ws[i],ws[j]
        if form=='cos':
            cs = [abs(sum(u*v for u,v in zip(p, q)))/math.sqrt(sum(u*u for u in p)*sum(v*v for v in q)) for p,q in zip(a, b)]
            tot += sum(cs)/len(cs)/len(pairs)
            continue
        m = [[sum(a[k][c]*b[k][d] for k in range(len(a))) for d in range(len(b[0]))] for c in range(len(a[0]))]
        tot += math.sqrt(sum(v*v for r in m for v in r)) if form=='fro' else sum(abs(v) for r in m for v in r)
    return tot

def np_total(method, z, e, y, r, T, ws, queries, keys):
    "Total loss as in the table of the notebook; `z` logits of the branches, `e` of the ensemble"
    n = len(z)
    ce = sum(np_ce(o, y) for o in z)
    if method=='dml': return ce + r*sum(sum(np_kd(z[i], z[j], T) for j in range(n) if j!=i)/(n-1) for i in range(n))
    if method=='kdcl': return ce + r*sum(np_kd(o, np_mean(z), T) for o in z)
    if method=='one': return ce + np_ce(e, y) + r*sum(np_kd(o, e, T) for o in z)
    if method=='diversity': return ce + np_ce(e, y) + r*sum(np_kd(o, e, T) for o in z) + 5e-8*np_cd(ws, 'fro')
    if method=='ffl': return ce + np_ce(e, y) + r*(np_kd(z[0], e, T)+np_kd(z[1], e, T)+np_kd(e, np_mean(z), T))
    peers,soft = z[:-1],0.
    for i in range(n-1):
        t = []
        for b in range(len(y)):
            a = np_softmax([sum(u*v for u,v in zip(queries[i][b], keys[j][b])) for j in range(n-1)])
            t.append([sum(a[j]*peers[j][b][k] for j in range(n-1)) for k in range(len(peers[0][0]))])
        soft += np_kd(peers[i], t, T)
    return ce + r*(soft + np_kd(z[-1], np_mean(peers), T))

# ---- a small learner and a way to look into its first step

def make_dls(n=32, bs=8, k=4):
    g = torch.Generator().manual_seed(0)
    ds = L(zip(torch.randn(n,3,32,32, generator=g), torch.randint(0, k, (n,), generator=g)))
    dls = DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0, device='cpu', shuffle=False)
    dls.c = k
    return dls

@pytest.fixture(scope='module')
def dls(): return make_dls()

def make(dls, method='diversity', cbs=None, **kw):
    kw = dict(pretrained=False, loss_func=CrossEntropyLossFlat(), metrics=accuracy) | kw
    return online_learner(dls, 'cifar_resnet8', method, cbs=cbs, **kw)

class Look(Callback):
    "Keep what the first step computed, and stop"
    order = 8
    def after_loss(self):
        cb = self.learn.cbs[[isinstance(o, OnlineKD) for o in self.learn.cbs].index(True)]
        self.z,self.feats,self.e,self.targ = cb.logits.detach(),[f.detach() for f in cb.feats],self.learn.pred.detach(),self.learn.yb[0]
        self.total,self.shown,self.parts,self.rec = self.learn.loss_grad.detach(),self.learn.loss.clone(),{k:v.detach() for k,v in cb.parts.items()},cb.record
    def before_step(self):
        self.grads = {k:None if p.grad is None else p.grad.clone() for k,p in self.learn.model.named_parameters()}
        raise CancelFitException

def quiet(learn, *a, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(*a, **kw)

def step(learn):
    quiet(learn, 1, cbs=(c:=Look()))
    return c

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('T', [3.,1.])
def test_total_loss(dls, method, T):
    "On the first step the ramp is exp(-5), but DML has none"
    torch.manual_seed(0)
    learn = make(dls, ONLINE[method](T=T))
    s,net = step(learn),learn.model
    z,e,y = s.z.tolist(),s.e.tolist(),s.targ.tolist()
    ws = [classifier_weight(h).tolist() for h in net.heads]
    u = [f.mean((2,3)) for f in s.feats]
    q,k = ([lin(o).tolist() for o in u] for lin in (net.gate.query,net.gate.key)) if method=='okddip' else (None,None)
    r = 1. if method=='dml' else math.exp(-5)
    want = np_total(method, z, e, y, r, T, ws, q, k)
    assert abs(s.total.item()-want)<2e-5*abs(want)
    hard = len(z) + (method in ('one','diversity','ffl'))
    assert abs(s.shown.item()-want/hard)<1e-5*abs(want)

@pytest.mark.parametrize('method', methods)
def test_targets_without_ramp(dls, method):
    "With full weight on the soft terms an error in any of them shows"
    torch.manual_seed(1)
    learn = make(dls, ONLINE[method](ramp=0))
    for p in learn.model.heads.parameters(): p.data.mul_(5)
    s,net = step(learn),learn.model
    u = [f.mean((2,3)) for f in s.feats]
    q,k = ([lin(o).tolist() for o in u] for lin in (net.gate.query,net.gate.key)) if method=='okddip' else (None,None)
    want = np_total(method, s.z.tolist(), s.e.tolist(), s.targ.tolist(), 1., 3., [classifier_weight(h).tolist() for h in net.heads], q, k)
    soft = sum(v.item() for k,v in s.parts.items() if k.startswith('kd'))
    assert soft>.1 and abs(s.total.item()-want)<2e-5*abs(want)

def test_okddip_targets_reference():
    "Queries of one peer against keys of all, itself included, without scaling; the leader takes no part"
    torch.manual_seed(0)
    gate,feats,z = LeaderGate(4, 16, None, 5),[torch.randn(3,16,2,2) for _ in range(4)],torch.randn(4,3,5)
    for p in gate.parameters(): p.data.mul_(8)
    got,w = gate.targets(z, feats),{k:p.detach().numpy() for k,p in gate.named_parameters()}
    pool = [[f[b].numpy().mean((1,2)) for b in range(3)] for f in feats[:3]]
    for b in range(3):
        for i in range(3):
            a = np_softmax([float((w['query.weight']@pool[i][b])@(w['key.weight']@pool[j][b])) for j in range(3)])
            assert max(a)>.4
            want = sum(a[j]*z[j,b].numpy() for j in range(3))
            assert np.allclose(got[i,b].detach().numpy(), want, atol=1e-4)

@pytest.mark.parametrize('form', CD_FORMS)
def test_cd_forms(form):
    torch.manual_seed(0)
    ws = [torch.randn(3,5) for _ in range(3)]
    assert abs(cd_loss(ws, form).item()-np_cd([w.tolist() for w in ws], form))<1e-4

def np_conv(x, w, groups):
    "3 x 3 depthwise or 1 x 1 full convolution of one image (C,h,w)"
    c,h,wd = x.shape
    if groups==1: return np.einsum('oc,chw->ohw', w[:,:,0,0], x)
    p,out = np.pad(x, ((0,0),(1,1),(1,1))),np.zeros_like(x)
    for i in range(h):
        for j in range(wd): out[:,i,j] = (p[:,i:i+3,j:j+3]*w[:,0]).sum((1,2))
    return out

def test_ffm_gate_reference():
    "Concatenate, depthwise, pointwise, pool, linear, ReLU, softmax; with statistics 0 and 1 batch normalisation only scales"
    torch.manual_seed(0)
    gate = FFMGate(2, 3, None, 4).eval()
    feats = [torch.randn(2,3,4,5) for _ in range(2)]
    s,sd = 1/math.sqrt(1+1e-5),{k:v.numpy() for k,v in gate.state_dict().items()}
    for b in range(2):
        x = np.concatenate([f[b].numpy() for f in feats])
        x = np.maximum(np_conv(x, sd['fuse.0.weight'], 6)*s, 0)
        x = np.maximum(np_conv(x, sd['fuse.3.weight'], 1)*s, 0)
        v = np.maximum((sd['score.0.weight']@x.mean((1,2))+sd['score.0.bias'])*s, 0)
        assert np.allclose(gate.weights(feats)[:,b,0].detach().numpy(), np_softmax(v.tolist()), atol=1e-5)

@pytest.mark.parametrize('gate', ['ffm','one','fau','mean'])
def test_gated_sum(gate):
    torch.manual_seed(0)
    net = gate_net('cifar_resnet8', 4, 3, gate, pretrained=False).eval()
    x = torch.randn(5,3,32,32)
    with torch.no_grad():
        logits,feats = net.branch_forward(x)
        w = net.gate.weights(feats)
        got = net(x)
    assert w.shape==(3, *((1,1) if gate=='mean' else (5,4) if gate=='fau' else (5,1))) and torch.allclose(w.sum(0), torch.ones_like(w[0]), atol=1e-6)
    for b in range(5):
        for k in range(4):
            want = sum(w[i, min(b, w.shape[1]-1), min(k, w.shape[2]-1)]*logits[i,b,k] for i in range(3))
            assert abs(got[b,k]-want)<1e-5

# ---- gradients

def grad_of(part, method, wrt, dls, **kw):
    "Gradient of one part of the loss with respect to tensors of the network"
    torch.manual_seed(0)
    learn = make(dls, ONLINE[method](**kw))
    class Grab(Callback):
        order = 8
        def after_loss(self):
            o = [c for c in self.learn.cbs if isinstance(c, OnlineKD)][0]
            self.res = torch.autograd.grad(o.parts[part], wrt(o, self.learn.model), retain_graph=True, allow_unused=True)
            raise CancelFitException
    quiet(learn, 1, cbs=(g:=Grab()))
    return g.res

@pytest.mark.parametrize('form', CD_FORMS)
def test_diversification_trains(dls, form):
    "The term has a gradient in every classifier, and a step with a large weight lowers it"
    gs = grad_of('cd', 'diversity', lambda o, net: [h[-1].weight for h in net.heads], dls, form=form)
    assert len(gs)==3 and all(g is not None and g.abs().sum()>1e-4 for g in gs)
    torch.manual_seed(0)
    learn = make(dls, FFMCD(w_cd=10., form=form))
    ws = lambda: [classifier_weight(h).detach().clone() for h in learn.model.heads]
    before = cd_loss(ws(), form)
    quiet(learn, 2, 1e-2)
    assert cd_loss(ws(), form)<.9*before

@pytest.mark.parametrize('method,detach', [(m,d) for m in methods if m not in ('kdcl','okddip') for d in (True,False)])
def test_detach(dls, method, detach):
    "Whether the soft terms reach what made the target"
    gate = lambda o, net: list(net.gate.parameters())
    if method=='dml': # no gate: one term alone tells
        z = torch.randn(3,2,4, requires_grad=True)
        cb = ONLINE[method](detach=detach)
        (cb.kd(z[0], z[1])).backward()
        assert (z.grad[1].abs().sum()>0)!=detach
        return
    gs = [g for g in grad_of('kd', method, gate, dls, detach=detach) if g is not None]
    assert (sum(g.abs().sum() for g in gs)>1e-8 if gs else False)!=detach

@pytest.mark.parametrize('detach', [True,False])
def test_attention_always_learns(dls, detach):
    "Queries and keys of OKDDip get their gradient with detached targets as well, the maps of the branches get none through them"
    cb,z = ONLINE['okddip'](detach=detach),torch.randn(3, 2, 4)
    cb.feats = [torch.randn(2, 8, 3, 3, requires_grad=True) for _ in range(3)]
    cb.soft(z, None, SimpleNamespace(gate=LeaderGate(3, 8, None, 4)))['kd'].backward()
    assert all((f.grad is None)==detach for f in cb.feats[:-1])
    gate = lambda o, net: list(net.gate.parameters())
    gs = [g for g in grad_of('kd', 'okddip', gate, dls, detach=detach) if g is not None]
    assert gs and sum(g.abs().sum() for g in gs)>1e-8

def test_official_detach_and_ramp():
    cbs = {k:v() for k,v in ONLINE.items()}
    assert {k:(c.detach,c.ramp,c.T) for k,c in cbs.items()}==dict(diversity=(True,.27,3.), one=(True,.27,3.), okddip=(False,.27,3.), ffl=(True,.27,3.),
        dml=(False,0.,3.), kdcl=(True,.27,3.))
    assert cbs['diversity'].w_cd==5e-8 and cbs['diversity'].form=='fro'

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('kw', [dict(w_kd=3.), dict(T=1.), dict(ramp=.5), 'detach'])
def test_options_matter(dls, method, kw):
    if kw=='detach':
        if method=='kdcl': pytest.skip('its target has no gradient either way, so there is no such option')
        kw = dict(detach=not ONLINE[method]().detach)
    def grads(**k):
        torch.manual_seed(0)
        learn = make(dls, ONLINE[method](**(dict(ramp=0.) | k)))
        for p in learn.model.heads.parameters(): p.data.mul_(5)
        g = step(learn).grads
        return torch.cat([v.flatten() for v in g.values() if v is not None])
    a,b,c = grads(),grads(),grads(**kw)
    assert torch.equal(a, b)
    assert len(a)!=len(c) or not torch.allclose(a, c, atol=1e-5)

@pytest.mark.parametrize('method', methods)
def test_everything_is_trained(dls, method):
    "Each parameter of the network has a gradient; of OKDDip's queries and keys because its targets are not detached"
    torch.manual_seed(0)
    learn = make(dls, method)
    s = step(learn)
    assert not [k for k,g in s.grads.items() if g is None]
    if method in ('one','diversity','ffl'): assert sum(g.abs().sum() for k,g in s.grads.items() if k.startswith('gate.'))>0
    opt = {id(p) for g in learn.opt.param_lists for p in g}
    assert opt=={id(p) for p in learn.model.parameters()}

# ---- mixing

@pytest.mark.parametrize('mix', [MixUp,CutMix,SnapMix])
@pytest.mark.parametrize('method', methods)
def test_mixed_hard_losses(dls, method, mix):
    "Hard losses follow both labels, soft ones the logits alone"
    torch.manual_seed(0)
    s = step(make(dls, method, mix()))
    assert s.rec is not None
    y,la,lb = s.targ,s.rec.lam_a,s.rec.lam_b
    one = lambda z, i: la[i]*F.cross_entropy(z[i], y[i]) + lb[i]*F.cross_entropy(z[i], y[s.rec.perm[i]])
    ce = lambda z: sum(one(z, i) for i in range(len(y)))/len(y)
    assert torch.allclose(s.parts['ce'], sum(ce(o) for o in s.z), atol=1e-4)
    if 'ce_ens' in s.parts: assert torch.allclose(s.parts['ce_ens'], ce(s.e), atol=1e-4)
    if method=='kdcl': assert torch.allclose(s.parts['kd'], sum(kd_loss(o, s.z.mean(0), 3., logit_target=True) for o in s.z), atol=1e-4)

# ---- citizen

def ok(learn):
    probs,y = learn.get_preds()
    assert torch.allclose(probs.sum(1), torch.ones(len(y)), atol=1e-4)
    assert abs(learn.validate()[0]-F.nll_loss(probs.log(), y).item())<1e-3
    return probs

@pytest.mark.parametrize('method', methods)
def test_habits(dls, method, tmp_path):
    "lr_find, save and load, freeze, fine_tune, columns, and what validation measures"
    torch.manual_seed(0)
    learn = make(dls, method, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(show_plot=False, num_it=5)
        ok(learn)
        learn.fit(1, 1e-3, cbs=[CSVLogger(), SaveModelCallback(monitor='kd', comp=np.less)])
        head = (tmp_path/'history.csv').read_text().splitlines()[0].split(',')
        assert head[4:-1]==learn.cbs[[isinstance(o, OnlineKD) for o in learn.cbs].index(True)].part_names()
        learn.save('now')
        before = ok(learn)
        learn.fit(1, 1e-2)
        learn.load('now')
        assert torch.allclose(ok(learn), before, atol=1e-5)
        learn.freeze()
        net = learn.model
        grads = lambda m: [p.requires_grad for p in m.parameters() if p.ndim>1]
        assert not any(grads(net.trunk)+grads(net.branches)) and all(grads(net.heads)+grads(net.gate))
        learn.fine_tune(1, 1e-3)
        assert all(grads(net))
    ok(learn)

def test_tta(tmp_path):
    from cekd_fastai.drawing.dataset import make_birds
    from cekd_fastai.data.loaders import fine_grained_dls
    path = make_birds(tmp_path/'birds', n_species=2, n_images=8, n_train=6, size=64, progress=False)
    learn = online_learner(fine_grained_dls(path, size=56, bs=4, num_workers=0), 'test_resnet', pretrained=False)
    with learn.no_bar():
        probs,y = learn.tta(n=2)
        assert torch.allclose(probs.sum(1), torch.ones(len(y)), atol=1e-4)
        assert learn.predict(learn.dls.valid.items[0])[2].shape==(2,)

@pytest.mark.parametrize('method', methods)
def test_accumulation(dls, method):
    "A loss divided over accumulated batches gives the same gradient"
    res = []
    for cbs in (None, GradientAccumulation(n_acc=8)):
        torch.manual_seed(0)
        res.append(step(make(dls, method, cbs)).grads)
    for k,g in res[0].items(): assert torch.allclose(g, res[1][k], atol=1e-5), k

@pytest.mark.parametrize('method', methods)
@pytest.mark.parametrize('half', ['to_fp16','to_bf16'])
def test_half_precision(dls, method, half):
    "fastai's mixed precision, as far as it acts on a CPU"
    learn = getattr(make(dls, method), half)()
    quiet(learn, 1, 1e-3)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])
    ok(learn)

@pytest.mark.parametrize('method', methods)
def test_autocast(dls, method):
    "The forward pass and the loss in bfloat16 on the CPU: close to float32, and finite"
    class Cast(Callback):
        order = 3
        def before_batch(self):
            self.ctx = torch.autocast('cpu', dtype=torch.bfloat16)
            self.ctx.__enter__()
        def after_cancel_fit(self): self.ctx.__exit__(None, None, None)
    losses = []
    for cbs in (None, Cast()):
        torch.manual_seed(0)
        losses.append(step(make(dls, method, cbs)).total)
    assert losses[1].dtype==torch.float32 and torch.allclose(*losses, rtol=.03)

@pytest.mark.parametrize('method', methods)
def test_batch_of_one(method):
    learn = make(make_dls(n=4, bs=1), method)
    quiet(learn, 1, 1e-4)
    assert all(math.isfinite(v) for v in learn.recorder.values[-1])

def test_batch_norm_of_one_image():
    bn = SafeBN(3).train()
    x = torch.randn(1,3)
    assert torch.allclose(bn(x), x, atol=1e-4) and bn.num_batches_tracked==0
    y = torch.randn(8,3)
    assert torch.allclose(bn(y), nn.BatchNorm1d(3)(y), atol=1e-6) and bn.num_batches_tracked==1

@pytest.mark.parametrize('where', ['before_batch','after_pred','after_loss','before_step','after_batch','before_validate'])
@pytest.mark.parametrize('ex', [KeyboardInterrupt,CancelFitException,ZeroDivisionError])
def test_interrupts_leave_nothing(dls, where, ex):
    class Stop(Callback):
        order = 45
        def stop(self): raise ex('stopped') if ex is ZeroDivisionError else ex
    setattr(Stop, where, Stop.stop)
    learn = make(dls, 'one', CutMix())
    try: quiet(learn, 1, 0., wd=0., cbs=Stop())
    except (KeyboardInterrupt,ZeroDivisionError): pass
    learn.model.eval()
    ok(learn)
    quiet(learn, 1, 1e-3)
    assert len(learn.recorder.values[-1])==6 and learn.one.logits is None and learn.one.feats is None

def test_no_graph_outlives_the_step(dls):
    "The shared map that the gate looks at goes with the step"
    import gc,weakref
    learn = make(dls, 'one')
    refs = []
    class Ref(Callback):
        order,run_valid = 8,False
        def after_loss(self): refs.append(weakref.ref(self.learn.one.feats.shared))
    quiet(learn, 1, 1e-3, cbs=Ref())
    gc.collect()
    assert refs and not any(r() is not None for r in refs[:-1])

@pytest.mark.parametrize('method', ['diversity','okddip','ffl'])
def test_export_in_a_fresh_process(tmp_path, method):
    from cekd_fastai.drawing.dataset import make_birds
    from cekd_fastai.data.loaders import fine_grained_dls
    path = make_birds(tmp_path/'birds', n_species=2, n_images=8, n_train=6, size=64, progress=False)
    learn = online_learner(fine_grained_dls(path, size=56, bs=4, num_workers=0), 'test_resnet', method, pretrained=False, cbs=CutMix())
    quiet(learn, 1, 1e-3)
    file = learn.dls.valid.items[0]
    learn.export(tmp_path/'net.pkl')
    save_net(learn.model.eval().subnet(), tmp_path/'net.pt')
    torch.manual_seed(0)
    torch.save(x:=torch.randn(2,3,56,56), tmp_path/'x.pt')
    with learn.no_bar(): want = learn.predict(file)[2]
    code = ("import sys,torch\nfrom pathlib import Path\nfrom fastai.vision.all import load_learner\nimport cekd_fastai.online.diversity\nfrom cekd_fastai.branches import load_net\n"
        "p,f = Path(sys.argv[1]),sys.argv[2]\nl = load_learner(p/'net.pkl')\nwith l.no_bar(): a = l.predict(f)[2]\n"
        "with torch.no_grad(): torch.save((a, load_net(p/'net.pt')[0](torch.load(p/'x.pt'))), p/'out.pt')\n")
    p = forks.run(code, tmp_path, file)
    assert p.returncode==0, p.stderr
    probs,z = torch.load(tmp_path/'out.pt', weights_only=False)
    with torch.no_grad(): assert torch.allclose(z, learn.model.eval()(x), atol=1e-5)
    assert torch.allclose(torch.as_tensor(probs), torch.as_tensor(want), atol=1e-5)

def test_resume(dls, tmp_path):
    "A saved gate and optimiser go on in a new learner as they would have"
    def new():
        torch.manual_seed(0)
        return make(dls, path=tmp_path)
    a = new()
    quiet(a, 1, 1e-3)
    a.save('half')
    quiet(a, 1, 1e-3)
    b = new()
    for p in b.model.parameters(): p.data.add_(1)
    b.create_opt()
    b.load('half')
    quiet(b, 1, 1e-3)
    for (k,p),q in zip(a.model.state_dict().items(), b.model.state_dict().values()): assert torch.allclose(p.float(), q.float(), atol=1e-5), k

# ---- diversity

def loop_diversity(learn):
    net,rows,dis,ens,each = learn.model.eval(),[],[],[],[]
    with torch.no_grad():
        for x,y in learn.dls.valid:
            logits,feats = net.branch_forward(x)
            z,e = net.class_logits(logits),net(x)
            for b in range(len(y)):
                p = [o[b].softmax(0) for o in z]
                for i in range(len(p)):
                    for j in range(i):
                        rows.append(math.sqrt(((p[i]-p[j])**2).sum()))
                        dis.append(p[i].argmax()!=p[j].argmax())
                ens.append(e[b].argmax()==y[b])
                each.append([o.argmax()==y[b] for o in p])
    return np.mean(rows),np.mean(dis),np.mean(ens)-np.mean(each)

@pytest.mark.parametrize('which', ['diversity','okddip','cekd'])
def test_diversity(dls, which):
    torch.manual_seed(0)
    if which=='cekd':
        net,cbs = branch_net('cifar_resnet8', 4, pretrained=False),[BranchLoss(),Components(),CutMix(),CEKD()]
        learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), splitter=branch_splitter, cbs=cbs)
    else: learn = make(dls, which)
    quiet(learn, 1, 1e-2)
    learn.model.train()
    d = diversity(learn)
    assert learn.model.training
    assert np.allclose((d.distance,d.disagreement,d.gain), loop_diversity(learn), atol=1e-5)
    assert 'ensemble' in repr(d) and '<table' in d._repr_html_() and len(d.plot().axes)==3

# ---- bad input

def test_refused(dls):
    for kw,msg in ((dict(n_branches=1),'One branch has no peer'), (dict(gate='ffn'),"There is no gate 'ffn'"), (dict(loss_func=BCEWithLogitsLossFlat()),'for several labels'),
        (dict(method='dml', gate='ffm'),"`DML` needs the gate 'mean', but the network has 'ffm'"), (dict(method='okddip', n_branches=2),'needs at least 3 branches'),
        (dict(method='ffl', n_branches=4),'defined for two branches'), (dict(method='kd'),"There is no method of online distillation 'kd'"), (dict(cbs=CEKD()),'keep one of them'),
        (dict(split='layer7'),"did you mean 'layer")):
        with pytest.raises(ValueError, match=msg): make(dls, **kw)
    with pytest.raises(ValueError, match='`method` is a `CutMix`'): make(dls, CutMix())
    with pytest.raises(ValueError, match='trains a network with branches'): Learner(dls, nn.Linear(2,2), loss_func=F.cross_entropy, cbs=ONE())
    for cbs in (BranchLoss(),[CutMix(),CEKD()]): # nothing in these losses reaches a gate
        with pytest.raises(ValueError, match='no loss for the gate of the network'): Learner(dls, gate_net('cifar_resnet8', 4, pretrained=False), loss_func=F.cross_entropy, cbs=cbs)
        Learner(dls, gate_net('cifar_resnet8', 4, gate='mean', pretrained=False), loss_func=F.cross_entropy, cbs=cbs)
    with pytest.raises(ValueError, match="`ONE` needs the gate 'one', but the network has 'mean'"):
        Learner(dls, branch_net('cifar_resnet8', 4, pretrained=False), loss_func=CrossEntropyLossFlat(), cbs=ONE())
    with pytest.raises(ValueError, match='cannot be told from `dls`'):
        bad = make_dls()
        del bad.c
        make(bad)
