"""How hard are the synthetic birds? A linear model on raw pixels and a small network from scratch, on the default set.

    python benchmarks/synthetic_difficulty.py

writes benchmarks/results/synthetic_difficulty.json: accuracies, seeds, epochs, machine, versions and seconds.
"""
import json, os, platform, time, warnings
from pathlib import Path

import numpy as np, sklearn, timm, torch, torch.nn.functional as F
from fastcore.script import call_parse
from fastprogress import progress_bar
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cekd_fastai
from cekd_fastai.drawing.dataset import make_birds

def load(path, f):
    "The second column onwards of one of CUB's tables"
    return [l.split()[1:] for l in (path/f).read_text().splitlines()]

def read_set(path):
    "Pictures (n,96,96,3) uint8, labels from 0, genus of each label, and a mask of the training pictures"
    x = np.stack([np.asarray(Image.open(path/'images'/f)) for f, in load(path, 'images.txt')])
    y,train = (np.array([int(v) for v, in load(path, f)]) for f in ('image_class_labels.txt', 'train_test_split.txt'))
    genera = [c.split('_')[-1] for c, in load(path, 'classes.txt')]
    return x, y-1, np.array([sorted(set(genera)).index(g) for g in genera]), train == 1

def scores(pred, y, genus):
    "Accuracy on species, on genera, and on species among the pictures whose genus is right"
    ok = genus[pred] == genus[y]
    return dict(species=round(float((pred == y).mean()), 4), genus=round(float(ok.mean()), 4), species_given_genus=round(float((pred == y)[ok].mean()), 4))

def linear(x, y, genus, train, side, C):
    "Scores of multinomial logistic regression on standardised pixels, pictures scaled to `side`"
    z = np.stack([np.asarray(Image.fromarray(o).resize((side, side), Image.BOX)) for o in x]).reshape(len(x), -1).astype(np.float32)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=200))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', ConvergenceWarning)
        model.fit(z[train], y[train])
    return scores(model.predict(z[~train]), y[~train], genus)

def network(x, y, genus, train, epochs, seed, arch='resnet18', channels=(32,64,128,256), crop=88, bs=32, lr=3e-3, wd=.05, smooth=0., progress=True):
    "Test scores of a small ResNet from scratch: random crop and flip, AdamW, one cycle"
    torch.manual_seed(seed)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float()/255
    m,s = x[train].mean((0, 2, 3), keepdim=True),x[train].std((0, 2, 3), keepdim=True)
    x,y = ((x-m)/s).contiguous(memory_format=torch.channels_last),torch.from_numpy(y)
    xt,yt,xv,yv,pad = x[train],y[train],x[~train],y[~train],x.shape[-1]-crop
    net = timm.create_model(arch, channels=channels, num_classes=int(y.max())+1).to(memory_format=torch.channels_last)
    steps = len(xt)//bs
    opt = torch.optim.AdamW(net.parameters(), lr, weight_decay=wd)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps*epochs, pct_start=.25)
    net.train()
    for _ in progress_bar(range(epochs), display=progress, leave=False):
        for idx in torch.randperm(len(xt))[:steps*bs].view(steps, bs):
            i,j = torch.randint(pad+1, (2,)).tolist()
            b = torch.stack([o.flip(-1) if torch.rand(()) < .5 else o for o in xt[idx, :, i:i+crop, j:j+crop]])
            F.cross_entropy(net(b.contiguous(memory_format=torch.channels_last)), yt[idx], label_smoothing=smooth).backward()
            opt.step()
            opt.zero_grad()
            sched.step()
    net.eval()
    o = pad//2
    with torch.no_grad(): pred = torch.cat([net(b).argmax(1) for b in xv[:, :, o:o+crop, o:o+crop].split(100)])
    return scores(pred.numpy(), yv.numpy(), genus)

def table(res):
    "The accuracies as a markdown table"
    cells = [['classifier','species %','genus %','species, given the genus %']]
    for k,v in res.items():
        if not k.startswith(('linear_','network_')) or not isinstance(v, dict): continue
        cells.append([k.replace('_', ', ')] + [f'{100*v[o]:.1f}' for o in ('species','genus','species_given_genus')])
    cells.append(['chance',f"{100*res['chance']:.1f}",'',''])
    cells.insert(1, ['---']*4)
    return '\n'.join(f"| {' | '.join(o)} |" for o in cells)

@call_parse
def main(
    path:str='runs/birds', # where the birds are drawn
    epochs:int=25, # of the network
    long:int=50, # epochs of a longer run with label smoothing; 0 leaves it out
    n_seeds:int=3, # seeds of the network
    threads:int=1, # of torch
    out:str='benchmarks/results/synthetic_difficulty.json' # result file
):
    "Measure how hard the default synthetic birds are"
    torch.set_num_threads(threads)
    t0 = time.time()
    data = read_set(make_birds(path))
    res = dict(command=f'python benchmarks/synthetic_difficulty.py --epochs {epochs} --long {long} --n-seeds {n_seeds} --threads {threads}', seconds=dict(draw=round(time.time()-t0, 1)))
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    def timed(name, f, *args, **kw):
        t = time.time()
        res[name] = f(*data, *args, **kw)
        res['seconds'][name] = round(time.time()-t, 1)
        print(name, res[name], res['seconds'][name], flush=True)
    for side,Cs in ((32, (1., 1e-1, 1e-2, 1e-3, 1e-4)), (96, (1e-2, 1e-4))):
        for C in Cs: timed(f'linear_{side}px_C{C:g}', linear, side, C)
    for seed in range(n_seeds): timed(f'network_{epochs}ep_seed{seed}', network, epochs, seed)
    if long: timed(f'network_{long}ep_smoothed', network, long, 0, smooth=.1)
    nets = [v['species'] for k,v in res.items() if k.startswith(f'network_{epochs}ep_seed')]
    res |= dict(chance=.05, linear_best=max(v['species'] for k,v in res.items() if k.startswith('linear_')),
        network_mean=round(float(np.mean(nets)), 4), network_min=min(nets), network_max=max(nets), settings=json.loads((Path(path)/'birds.json').read_text()),
        machine=dict(processor=platform.machine(), system=platform.system(), cores=os.cpu_count(), threads=threads, device='cpu'),
        versions=dict(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__, sklearn=sklearn.__version__,
            numpy=np.__version__, pillow=Image.__version__, cekd_fastai=cekd_fastai.__version__))
    res |= dict(title='How hard the drawn birds are: accuracy on 400 test images of 20 species, by pixels and by a network from scratch', table=table(res))
    Path(out).write_text(json.dumps(res, indent=1)+'\n')
