"""Is there anything to win by repairing the labels of mixed images? Drawn birds, whose diagnostic parts are known, with the label that the visible evidence deserves.

    python benchmarks/oracle.py --seeds 5 # benchmarks/results/oracle.json; a second start goes on where the first ended

The 20 species, the backbone and the schedule are those of `few_images.py`: few images, for so many epochs that plain training knows them all.
Half of the batches are mixed, in epochs as many as those of plain training. An *oracle* label is the share of each source in the diagnostic parts
that the mixed image still shows (`oracle_weights`), followed through each random crop and mirror image; where nothing of either is to be seen, the label stays. No distillation can
know more than that, so what the oracle gains over the same mix bounds what a repaired label can."""
import json,time
from dataclasses import replace
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from fastcore.script import call_parse
from cekd_fastai.all import *
from cekd_fastai.mix.evidence import Evidence,evidence_batches,oracle_weights
from synthetic import backbone,net
from common import here,over,write_result # after fastai
from few_images import epochs,per_class,rate,runs,size,wd
from fine_tune import NoValid

whole = 64 # pixels of a picture, of which a view shows `size`
methods = {'plain': {}, 'label smoothing': dict(smooth=.1)}
methods |= {f'{m.__name__}{o}': dict(mix=m, oracle=bool(o)) for m in (MixUp,CutMix,SnapMix) for o in ('',', oracle')}

class Views(Callback):
    "A crop of each picture, mirrored in half of them, with what it is known by there; the centre in validation"
    order = Mix.order-1
    def __init__(self, rects, weights): self.rects,self.weights = rects,weights
    def before_batch(self):
        x,idxs = self.learn.xb
        n = len(x)
        start = torch.randint(whole-size+1, (n,2)) if self.training else torch.full((n,2), (whole-size)//2)
        mirror = torch.rand(n)<.5 if self.training else torch.zeros(n, dtype=torch.bool)
        views = [o[:,t:t+size,l:l+size] for o,(l,t) in zip(x, start.tolist())]
        views = torch.stack([o.flip(2) if m else o for o,m in zip(views, mirror)])
        self.learn.xb = (views.contiguous(memory_format=torch.channels_last),)
        if self.training: self.evidence = self.seen(idxs, start, mirror)

    def seen(self, idxs, start, mirror):
        "Evidence in the pixels of the views"
        rects = self.rects[idxs]-start.repeat(1, 2)[:,None]
        left,top,right,bottom = rects.unbind(-1)
        m = mirror[:,None]
        left,right = torch.where(m, size-right, left),torch.where(m, size-left, right)
        x,y = (left+right)/2,(top+bottom)/2
        inside = (x>=0)&(x<size)&(y>=0)&(y<size)
        return Evidence(torch.stack([left,top,right,bottom], -1), self.weights[idxs]*inside)

class Oracle(Callback):
    "Give mixed images the label that they deserve"
    order,run_valid = Mix.order+.5,False
    def before_batch(self):
        mix = next(cb for cb in self.learn.cbs if isinstance(cb, Mix))
        rec = mix.record
        if rec is None: return
        w = oracle_weights(rec, self.views.evidence)
        known = rec.mixed & ~w.isnan()
        mix.record = replace(rec, lam_a=torch.where(known, w, rec.lam_a), lam_b=torch.where(known, 1-w, rec.lam_b))

def data(birds):
    "Loaders of whole pictures with their numbers, and what the training pictures are known by"
    dls = fine_grained_dls(birds, size=whole, recipe='squeeze', num_workers=0)
    known = list(evidence_batches(dls))
    x,y = (torch.cat([o[i] for o in known]) for i in range(2))
    rects,weights = (torch.cat([getattr(o[2], k) for o in known]) for k in ('rects','weights'))
    test = [(a.as_subclass(Tensor),b.as_subclass(Tensor)) for a,b in dls.valid]
    xt,yt = map(torch.cat, zip(*test))
    def items(x, y): return L(zip(x, torch.arange(len(x)), y))
    res = DataLoaders.from_dsets(items(x, y), items(xt, yt), bs=32, val_bs=128, num_workers=0, device='cpu')
    res.c,res.vocab = len(dls.vocab),dls.vocab
    return res,(rects,weights)

def train(name, seed, dls, known, weights):
    "Train one way, then read the test images once"
    m,start = methods[name],time.time()
    loss = LabelSmoothingCrossEntropyFlat(eps=m['smooth']) if 'smooth' in m else CrossEntropyLossFlat()
    cbs = [ChannelsLast(),Views(*known)] + ([m['mix'](prob=.5)] if 'mix' in m else []) + ([Oracle()] if m.get('oracle') else [])
    set_seed(seed)
    learn = branch_learner(dls, 'resnet10t', 1, pretrained=False, weights=weights, arch_args=net, loss_func=loss, wd=wd, metrics=accuracy, cbs=cbs)
    lrs = [rate]*(len(learn.splitter(learn.model))-1)+[10*rate]
    with learn.no_bar(), learn.no_logging():
        with learn.added_cbs(NoValid()): learn.fit_one_cycle(epochs, lrs)
        acc = float(learn.validate()[1])
    return dict(method=name, seed=seed, accuracy=round(acc, 5), seconds=round(time.time()-start, 1))

def table(rows):
    "One line for each way, with its gain over plain training and over the same mix with its own label, paired by seed"
    acc = {(r['method'],r['seed']):100*r['accuracy'] for r in rows}
    lines = ['| method | test images % | each seed | over plain | over the same mix |','|---|---|---|---|---|']
    for k in methods:
        seeds = [s for o,s in acc if o==k]
        if not seeds: continue
        def gain(other): return over([acc[k,s]-acc[other,s] for s in seeds if (other,s) in acc])
        mean,each = np.mean([acc[k,s] for s in seeds]),', '.join(f'{acc[k,s]:.1f}' for s in seeds)
        own = k.removesuffix(', oracle')
        lines.append(f"| {k} | {mean:.1f} | {each} | {gain('plain') if k!='plain' else ''} | {gain(own) if own!=k else ''} |")
    return '\n'.join(lines)

def write(rows):
    "The result file of the study"
    title = f'Labels that the visible evidence deserves: 20 species of drawn birds, {per_class} training images of each, {size} px, {epochs} epochs, half of the batches mixed, 1,000 test images'
    write_result('oracle', title, f"python benchmarks/oracle.py --seeds {1+max(r['seed'] for r in rows)}", rows, table(rows))

@call_parse
def main(
    seeds:int=5, # Number of seeds, from 0
):
    "Train each way that is missing, and print the table"
    out = here/'results'/'oracle.json'
    weights = backbone(size=size)
    birds = make_birds(runs/f'birds20_{per_class}', n_species=20, n_images=per_class+50, n_train=per_class)
    rows = json.loads(out.read_text())['runs'] if out.exists() else []
    dls,known = data(birds)
    for seed in range(seeds):
        for name in methods:
            if any((r['method'],r['seed'])==(name,seed) for r in rows): continue
            rows.append(train(name, seed, dls, known, weights))
            print(rows[-1], flush=True)
            write(rows)
    print(table(rows))
