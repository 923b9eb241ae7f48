"""Which families of timm become a network with branches: the smallest model of each, with random weights, at 96 px or the size that it asks for.

    python benchmarks/families.py          # every check
    python benchmarks/families.py --quick  # does it build, and are the logits those of the model

For each family it asks: does it build, and what does it say if not; does the network with one branch and the same classifier give
the logits of the model to 1e-4, also where it is split in the middle and at the head; are private stages equal copies that share nothing
with the trunk; does a step of SnapMix and CEKD give a finite loss and a finite gradient to every parameter; has the class activation
map the aspect of the picture; does a file of `save_net` give the same logits; does the answer stay the same with the trunk
computed again (gradients of a training step), compiled parts (backend eager: only whether torch can compile them) and channels last in
memory. Three families begin with models that are too large to be tried here, so theirs are made narrow and shallow. The result is written after each family, so a run that
was stopped goes on where it was. Name families to try only these, again."""
import json,tempfile,time,warnings
import timm,torch
from fastcore.script import call_parse
from fastai.vision.all import *
from timm.models import list_models,list_modules
from cekd_fastai.core import one_sentence,write_whole
from cekd_fastai.results import about
from cekd_fastai.arch import chain,make_arch,trial_images
from cekd_fastai.branches import branch_net,branch_splitter,frozen_norm_stats,load_net,save_net
from cekd_fastai.cam import Mapped,model_cam
from cekd_fastai.cekd import CEKD
from cekd_fastai.compiled import heavy_parts
from cekd_fastai.graph import divide
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.mix.snapmix import SnapMix
from common import here

out = here/'results'/'families.json'
CHECKS = 'equal split private step cam file again compiled last'.split()
_narrow = dict(embed_dim=64, depth=4, num_heads=4, num_classes=10) # by default they have no classifier
SMALL = dict(qwen3_vit=_narrow | dict(img_size=96), deepseek_vit=_narrow | dict(img_size=98), # patches of 14 pixels
    gemma4_vit=_narrow | dict(img_size=96, head_dim=16, intermediate_size=128))
LARGE = dict(csatv2=256, halonet_h1=256, inception_resnet_v2=192, inception_v3=192, inception_v4=192) # pixels, where 96 leave a map of one place
SPLITS = dict(gemma4_vit='head') # its steps ask whether patches are missing, so torch.fx cannot write them down

def _size(name):
    "Number of parameters of a model, without making them; None if it cannot be told"
    try:
        with torch.device('meta'): return sum(o.numel() for o in timm.create_model(name, pretrained=False).parameters())
    except Exception: return None

def smallest(family):
    "Name of the smallest model of a family"
    sizes = {o:_size(o) for o in list_models(module=family)}
    known = {k:v for k,v in sizes.items() if v}
    return min(known, key=known.get) if known else first(sizes)

WORDS = dict(again='trunk computed again', compiled='compiled', last='channels last')

def distance(a, b): return (a-b).abs().max().item()/max(1, b.abs().max().item())

def middle(model):
    "Name of a part in the middle of a model"
    try: names = [n for n,_ in chain(model)[0]]
    except ValueError: names = [o.target for o in divide(model, split='head')[0].body.graph.nodes if o.op=='call_module']
    names = [n.removeprefix('encoder.') for n in names]
    blocks = [n for n in names if n.split('.')[0] in ('blocks','stages','layers','features','levels','transformers','network')]
    name = (blocks or names)[len(blocks or names)//2]
    name = '.'.join(name.split('.')[:2])
    return f'encoder.{name}' if hasattr(model, 'encoder') else name

def whole(parts, x): return parts[2](parts[1](parts[0](x)))

def check_step(net, x):
    "Loss of a step of SnapMix and CEKD, and the parameters that have no finite gradient"
    bad,losses = [],[]
    class Gradients(Callback):
        def after_backward(self):
            losses.append(float(self.learn.loss_grad))
            ps = list(self.model.named_parameters())
            bad.extend(n for n,p in ps if p.requires_grad and (p.grad is None or not p.grad.isfinite().all()))
        def after_step(self): raise CancelFitException # without a validation
    dl = DataLoader(list(zip(torch.cat([x,x.flip(-1)]), tensor([0,1,2,0]))), bs=4)
    cbs = [BranchLoss(),Components(),SnapMix(),CEKD(),Gradients()]
    learn = Learner(DataLoaders(dl, dl), net, CrossEntropyLossFlat(), splitter=branch_splitter, opt_func=SGD, cbs=cbs, path=here)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-4)
    return losses[0],bad

def gradients(net, x):
    "Gradients of the trunk after a training pass"
    torch.manual_seed(0)
    net.zero_grad()
    net(x)[0].square().mean().backward()
    return [p.grad.clone() for p in net.trunk.parameters() if p.grad is not None]

def check_again(net, x):
    "Are the gradients of the trunk the same if its activations are computed again?"
    net.train()
    with frozen_norm_stats(net): want = gradients(net, x)
    net.grad_checkpoint = True
    with frozen_norm_stats(net): found = gradients(net, x)
    net.grad_checkpoint = False
    net.zero_grad()
    return len(found)==len(want)>0 and all(distance(a, b)<1e-4 for a,b in zip(found, want))

def check_compiled(net, x, want):
    "Are the logits the same with compiled parts?"
    torch._dynamo.reset()
    parts = heavy_parts(net)
    for m in parts: m.compile(backend='eager')
    with torch.no_grad(): found = net(x)
    for m in parts: m._compiled_call_impl = None
    return distance(found, want)<1e-4

def check_ways(name, x, split, **kwargs):
    "Three ways to run a network with two branches that must not change its answer, as entries of a row"
    net = branch_net(name, 3, 2, split, pretrained=False, **kwargs).eval()
    with torch.no_grad(): want = net(x)
    row = dict(again=check_again(net, x))
    net.eval()
    row['compiled'] = check_compiled(net, x, want)
    last = dict(memory_format=torch.channels_last)
    with torch.no_grad(): row['last'] = distance(net.to(**last)(x.to(**last)), want)<1e-4
    return row

def build(name, **kwargs):
    "The model `name`; networks that take pictures of any size get small ones"
    model = make_arch(name, pretrained=False, **kwargs)[0].eval()
    if not model.num_classes: model.reset_classifier(10) # some come without a classifier, which is what is compared here
    side = LARGE.get(name, 96)
    if not kwargs and not model.default_cfg.get('fixed_input_size'): model.default_cfg = dict(model.default_cfg, input_size=(3,side,side))
    return model

def check_one(model, x, split=None):
    "Logits of one branch with the classifier of the model against those of the model, as entries of a row, and the logits"
    with torch.no_grad():
        want = model(x)
        one = branch_net(deepcopy(model), want.shape[1], 1, split, keep_head=True).eval()
        return dict(builds=True, chain=not isinstance(one.heads[0], Mapped), equal=distance(one(x), want)),want

def check_same(model, name, x, split=None):
    "Logits of one branch, and of the parts of two other splits, against those of the model, as entries of a row"
    row,want = check_one(model, x, split)
    with torch.no_grad():
        row['middle'] = split or middle(model)
        parts = [divide(model, name, o) for o in {row['middle'],'head'}]
        for o in parts: o[2].eval()
        return row|dict(split=max(distance(whole(o, x), want) for o in parts))

def check_two(net, x):
    "Private stages, class activation maps and a file of a network with two branches, as entries of a row"
    a,b = [list(o.parameters()) for o in net.branches]
    ids = [id(o) for m in (net.trunk,*net.branches) for o in m.parameters()]
    row = dict(private=len(set(ids))==len(ids) and all(torch.equal(p, q) for p,q in zip(a, b)))
    row['share'] = sum(o.numel() for o in a)/sum(o.numel() for m in (net.trunk,net.branches[0],net.heads[0]) for o in m.parameters())
    cam = model_cam(net.train(), x, tensor([0,1]), training=True) # features of deep random networks vanish in evaluation mode
    net.eval()
    row['places'] = list(cam.shape[1:])
    row['cam'] = cam.shape[1]*x.shape[3]==cam.shape[2]*x.shape[2] and bool(cam.isfinite().all()) and cam.std((1,2)).min().item()>0
    with tempfile.TemporaryDirectory() as tmp, torch.no_grad():
        save_net(net, Path(tmp)/'net.pt')
        row['file'] = torch.equal(load_net(Path(tmp)/'net.pt')[0](x), net(x))
    return row

def check(name, quick, known, split=None, **kwargs):
    "What is true of the model `name` and not `known` yet, as a row"
    model = build(name, **kwargs)
    x = trial_images(model)
    row = dict(params=sum(o.numel() for o in model.parameters()), size=x.shape[-1])
    if quick: return row|check_one(model, x, split)[0]
    if 'step' not in known:
        row |= check_same(model, name, x, split)
        net = branch_net(name, 3, 2, split, pretrained=False, **kwargs).eval()
        row |= check_two(net, x)
        loss,bad = check_step(net, x)
        row |= dict(step=math.isfinite(loss) and not bad, without_gradient=bad[:8])
    return row|check_ways(name, x, split, **kwargs)

def same_alone(r):
    "Has a row passed the first check only, as nothing else was tried?"
    return 'step' not in r and r.get('equal', 1)<1e-4

def _passes(r, checks): return all(k in r for k in checks) and max(r['equal'], r['split'])<1e-4 and all(r[k] for k in checks[2:])

def learns(r):
    "Does a row pass every check but the last three, which came later, or all?"
    return _passes(r, CHECKS[:-3]) and not any(r.get(k) is False for k in CHECKS)

def works(r):
    "Does a row pass every check?"
    return _passes(r, CHECKS)

def status(r):
    "A word for a row"
    narrow = f", split='{SPLITS[r['family']]}'" if r['family'] in SPLITS else ''
    if learns(r): return f'yes{narrow}'
    if same_alone(r): return 'same logits'
    return 'refused' if 'builds' in r else 'not tried'

def table(rows):
    "All families as a table, those that are out first"
    head = ['family','model','M parameters','was a chain','works','private share','places',*WORDS.values(),'reason if not']
    cells = [head,['---']*len(head)]
    for r in sorted(rows, key=lambda r: (learns(r), r['family'])):
        places = ' x '.join(map(str, r.get('places', [])))
        private = f"{r['share']:.0%}" if 'share' in r else ''
        params = f"{r['params']/1e6:.1f}" if 'params' in r else ''
        yes = ['no','yes']
        same = [yes[r[o]] if o in r else '' for o in WORDS]
        cells.append([r['family'],r['model'],params,yes[r.get('chain', False)],status(r),private,places,*same,'' if learns(r) or same_alone(r) else reason(r)])
    return '\n'.join(f"| {' | '.join(o)} |" for o in cells)

def reason(r):
    "Why a row does not pass"
    if r.get('error'): return r['error'].replace('|', '/')
    failed = [k for k in ('equal','split') if r.get(k, 1)>=1e-4] + [k for k in CHECKS[2:] if not r.get(k)]
    return ', '.join(WORDS.get(o, o) for o in failed)

def cost(r):
    "How long a row will take, as far as one can say; the short ones come first"
    return r.get('seconds') or r.get('params', 5e6)/1e6

def save(rows):
    n_all,n = sum(map(works, rows)),sum(map(learns, rows))
    built = sum(r.get('equal', 1)<1e-4 for r in rows)
    title = f'{built} of the {len(rows)} families of timm {timm.__version__} become a network with branches, {n} train, and {n_all} passed every check'
    about_it = dict(title=title, command='python benchmarks/families.py', **about({}))
    text = json.dumps(about_it | dict(runs=rows, table=table(rows)), indent=1)
    write_whole(out, lambda f: Path(f).write_text(text))

@call_parse
def main(
    families:str='', # Families to try again, separated by commas; empty: all that have not been tried in full yet
    quick:bool=False, # Only build them and compare the logits
):
    "Try the smallest model of each family"
    warnings.simplefilter('ignore')
    defaults.use_cuda = False
    def known(): return {r['family']:r for r in json.loads(out.read_text())['runs']} if out.exists() else {}
    rows = known()
    again = families.split(',') if families else [o for o in sorted(list_modules()) if not rows.get(o, {}).get('error') and CHECKS[-1] not in rows.get(o, {})]
    again.sort(key=lambda o: cost(rows.get(o, {})))
    for family in again:
        start,old = time.time(),rows.get(family, {})
        old = {k:v for k,v in old.items() if k not in ('builds','error')} if not families else {k:old[k] for k in ('model',) if k in old}
        row = old | dict(family=family, model=old.get('model') or smallest(family))
        torch.manual_seed(0)
        split,args = SPLITS.get(family),SMALL.get(family, dict(img_size=96)) # faster, where a network can be made for it
        try:
            try: row |= check(row['model'], quick, old, split, **args)
            except Exception:
                if family in SMALL: raise
                row |= check(row['model'], quick, old, split)
        except Exception as e: row |= dict(builds=False, error=f"{type(e).__name__}: {one_sentence(e)[:300]}")
        row['seconds'] = round(time.time()-start)
        rows = known() | {family:row} # two runs may share the work
        print(family, row['model'], 'works' if works(row) else reason(row), row['seconds'], flush=True)
        save(list(rows.values()))
