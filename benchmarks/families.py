"""Which families of timm become a network with branches: the smallest model of each, with random weights, at 96 px or the size that it asks for.

    python benchmarks/families.py          # every check
    python benchmarks/families.py --quick  # does it build, and are the logits those of the model

For each family it asks: does it build, and what does it say if not; does the network with one branch and the same classifier give
the logits of the model to 1e-4, also where it is split in the middle and at the head; are private stages equal copies that share nothing
with the trunk; does a step of SnapMix and CEKD give a finite loss and a finite gradient to every parameter; has the class activation
map the aspect of the picture; does a file of `save_net` give the same logits. The result is written after each family, so a run that
was stopped goes on where it was. Name families to try only these, again."""
import json,tempfile,time,warnings
import timm,torch
from fastcore.script import call_parse
from fastai.vision.all import *
from timm.models import list_models,list_modules
from cekd_fastai.core import write_whole
from cekd_fastai.results import about
from cekd_fastai.arch import chain,make_arch,trial_images
from cekd_fastai.branches import branch_net,branch_splitter,load_net,save_net
from cekd_fastai.cam import Mapped,model_cam
from cekd_fastai.cekd import CEKD
from cekd_fastai.graph import divide
from cekd_fastai.distill import BranchLoss,Components
from cekd_fastai.mix.snapmix import SnapMix
from common import here

out = here/'results'/'families.json'
CHECKS = 'equal split private step cam file'.split()

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

def distance(a, b): return (a-b).abs().max().item()/max(1, b.abs().max().item())

def middle(model):
    "Name of a part in the middle of a model"
    try: names = [n for n,_ in chain(model)[0]]
    except ValueError: names = [k for k,m in divide(model, split='head')[0].body.named_modules() if k and not list(m.children())]
    blocks = [n for n in names if n.split('.')[0] in ('blocks','stages','layers','features','levels','transformers','network')]
    name = (blocks or names)[len(blocks or names)//2]
    return '.'.join(name.split('.')[:2])

def whole(parts, x): return parts[2](parts[1](parts[0](x)))

def check_step(net, x):
    "Loss of a step of SnapMix and CEKD, and the parameters that have no finite gradient"
    bad,losses = [],[]
    class Gradients(Callback):
        def after_backward(self):
            losses.append(float(self.learn.loss_grad))
            ps = list(self.model.named_parameters())
            bad.extend(n for n,p in ps if p.requires_grad and (p.grad is None or not p.grad.isfinite().all()))
    dl = DataLoader(list(zip(torch.cat([x,x.flip(-1)]), tensor([0,1,2,0]))), bs=4)
    cbs = [BranchLoss(),Components(),SnapMix(),CEKD(),Gradients()]
    learn = Learner(DataLoaders(dl, dl), net, CrossEntropyLossFlat(), splitter=branch_splitter, cbs=cbs, path=here)
    with learn.no_bar(),learn.no_logging(): learn.fit(1, 1e-4)
    return losses[0],bad

def build(name, **kwargs):
    "The model `name`; networks that take pictures of any size get small ones"
    model = make_arch(name, pretrained=False, **kwargs)[0].eval()
    if not kwargs and not model.default_cfg.get('fixed_input_size'): model.default_cfg = dict(model.default_cfg, input_size=(3,96,96))
    return model

def check_one(model, x):
    "Logits of one branch with the classifier of the model against those of the model, as entries of a row, and the logits"
    with torch.no_grad():
        want = model(x)
        one = branch_net(deepcopy(model), want.shape[1], 1, keep_head=True).eval()
        return dict(builds=True, chain=not isinstance(one.heads[0], Mapped), equal=distance(one(x), want)),want

def check_same(model, name, x):
    "Logits of one branch, and of the parts of two other splits, against those of the model, as entries of a row"
    row,want = check_one(model, x)
    with torch.no_grad():
        row['middle'] = middle(model)
        parts = [divide(model, name, o) for o in (row['middle'],'head')]
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

def check(name, quick, **kwargs):
    "What is true of the model `name`, as a row"
    model = build(name, **kwargs)
    x = trial_images(model)
    row = dict(params=sum(o.numel() for o in model.parameters()), size=x.shape[-1])
    if quick: return row|check_one(model, x)[0]
    row |= check_same(model, name, x)
    net = branch_net(name, 3, 2, pretrained=False, **kwargs).eval()
    row |= check_two(net, x)
    loss,bad = check_step(net, x)
    return row|dict(step=math.isfinite(loss) and not bad, without_gradient=bad[:8])

def same_alone(r):
    "Has a row passed the first check only, as nothing else was tried?"
    return 'step' not in r and r.get('equal', 1)<1e-4

def works(r):
    "Does a row pass every check?"
    return all(k in r for k in CHECKS) and max(r['equal'], r['split'])<1e-4 and r['private'] and r['step'] and r['cam'] and r['file']

def status(r):
    "A word for a row"
    if works(r): return 'yes'
    if same_alone(r): return 'same logits'
    return 'refused' if 'builds' in r else 'not tried'

def table(rows):
    "All families as a table, those that are out first"
    head = ['family','model','M parameters','was a chain','works','private share','places','reason if not']
    cells = [head,['---']*len(head)]
    for r in sorted(rows, key=lambda r: (works(r), r['family'])):
        places = ' x '.join(map(str, r.get('places', [])))
        private = f"{r['share']:.0%}" if 'share' in r else ''
        params = f"{r['params']/1e6:.1f}" if 'params' in r else ''
        yes = ['no','yes']
        cells.append([r['family'],r['model'],params,yes[r.get('chain', False)],status(r),private,places,'' if works(r) or same_alone(r) else reason(r)])
    return '\n'.join(f"| {' | '.join(o)} |" for o in cells)

def reason(r):
    "Why a row does not pass"
    if r.get('error'): return r['error'].replace('|', '/')
    failed = [k for k in ('equal','split') if r.get(k, 1)>=1e-4] + [k for k in ('private','step','cam','file') if not r.get(k)]
    return ', '.join(failed)

def save(rows):
    n = sum(map(works, rows))
    built = n+sum(map(same_alone, rows))
    title = f'{built} of the {len(rows)} families of timm {timm.__version__} become a network with branches, and {n} have passed every check'
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
    again = families.split(',') if families else [o for o in sorted(list_modules()) if not rows.get(o, {}).get('error') and 'step' not in rows.get(o, {})]
    for family in again:
        start,old = time.time(),rows.get(family, {})
        row = dict(family=family, model=old.get('model') or smallest(family))
        torch.manual_seed(0)
        try:
            try: row |= check(row['model'], quick, img_size=96) # faster, where a network can be made for it
            except Exception: row |= check(row['model'], quick)
        except Exception as e: row |= dict(builds=False, error=f"{type(e).__name__}: {str(e).splitlines()[0][:300]}")
        row['seconds'] = round(time.time()-start)
        rows = known() | {family:row} # two runs may share the work
        print(family, row['model'], 'works' if works(row) else reason(row), row['seconds'], flush=True)
        save(list(rows.values()))
