"""What a change gives by itself, where it costs least to try: a linear head on the frozen features of a network from ImageNet, 50 birds.

    python benchmarks/first_changes.py --data-dir DIR

DIR holds `CUB_200_2011` and `weights/efficientnet_lite0.pth` and `..._lite2.pth`, as folders or as `.tgz` of these names. Features are computed once for every
picture, scaled on its short side and cut at its centre, and for its mirror image, of which training draws one. Each row changes one
thing of the first one, and all settings were fixed before anything was run. The official test part is read once a run, after the last epoch."""
import os,timm
from fastai.vision.all import *
from fastcore.script import call_parse
from cekd_fastai.all import *
from common import write_result # after fastai
from fine_tune import find

base = dict(arch='lite0', size=112, epochs=30, smooth=0., average=False, mirror=False)
changes = {'nothing': {}, 'label smoothing': dict(smooth=.1), 'backbone: EfficientNet-Lite2': dict(arch='lite2'), 'pictures of 160 px': dict(size=160),
    'three times the epochs': dict(epochs=90), 'average of the weights': dict(average=True), 'test-time augmentation: the mirror image': dict(mirror=True),
    'backbone, 160 px and mirror image': dict(arch='lite2', size=160, mirror=True)}

@torch.no_grad()
def features(arch, size, folder):
    "Features (picture or mirror, image, channel), labels and multiply-adds of a picture"
    name = f'tf_efficientnet_{arch}'
    weights = find(folder, 'weights')/f'efficientnet_{arch}.pth'
    net = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=dict(file=str(weights))).eval().to(memory_format=torch.channels_last)
    dls = fine_grained_dls(find(folder, 'CUB_200_2011'), size=size, bs=32, classes=50, stats=name)
    macs = []
    hooks = [o.register_forward_hook(lambda m,i,y: macs.append(m.weight.numel()*y.shape[2]*y.shape[3])) for o in net.modules() if isinstance(o, nn.Conv2d)]
    net(torch.zeros(1, 3, size, size))
    for o in hooks: o.remove()
    def _part(ds):
        dl = dls.test_dl(ds.items, num_workers=0)
        xs = [b[0].as_subclass(Tensor).contiguous(memory_format=torch.channels_last) for b in dl]
        return torch.stack([torch.cat([net(x) for x in xs]), torch.cat([net(x.flip(3)) for x in xs])])
    labels = lambda ds: tensor([int(o[1]) for o in ds])
    return _part(dls.train_ds),labels(dls.train_ds),_part(dls.valid_ds),labels(dls.valid_ds),sum(macs)/1e6

def accuracy_of(data, m, seed):
    "Train a head on features, and read the test part"
    x,y,xt,yt,_ = data
    set_seed(seed)
    head = nn.Linear(x.shape[-1], int(y.max())+1)
    opt = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=.01)
    n,bs = len(y),32
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, 2e-3, total_steps=m['epochs']*(n//bs))
    mean = deepcopy(head)
    for _ in range(m['epochs']):
        for idx in torch.randperm(n)[:n//bs*bs].view(-1, bs):
            loss = F.cross_entropy(head(x[torch.randint(2, (bs,)),idx]), y[idx], label_smoothing=m['smooth'])
            opt.zero_grad()
            loss.backward()
            opt.step()
            sched.step()
            for a,b in zip(mean.parameters(), head.parameters()): a.data.lerp_(b.data, .01)
    net = mean if m['average'] else head
    with torch.no_grad(): p = net(xt).softmax(2)
    return ((p.mean(0) if m['mirror'] else p[0]).argmax(1)==yt).float().mean().item()

def table(rows):
    "One line a change, with every seed and the difference from no change"
    ref = [100*r['accuracy'] for r in rows if r['change']=='nothing']
    lines = ['| one change | multiply-adds of an answer | accuracy % | each seed | gain |', '|---|---|---|---|---|']
    for name in changes:
        d = [r for r in rows if r['change']==name]
        acc = np.array([100*r['accuracy'] for r in d])
        cost = d[0]['cost']/next(r['cost'] for r in rows if r['change']=='nothing')
        gain = '' if name=='nothing' else f'{acc.mean()-np.mean(ref):+.1f}'
        lines.append(f"| {name} | {cost:.1f} | {acc.mean():.1f} ± {acc.std(ddof=1):.1f} | {', '.join(f'{o:.1f}' for o in acc)} | {gain} |")
    return '\n'.join(lines)

@call_parse
def main(
    data_dir:str=os.environ.get('CEKD_DATA', '.'), # Folder with data and weights
    seeds:int=3, # Number of seeds, from 0
):
    "Measure every change with every seed, and write the table."
    seen,rows = {},[]
    for name,c in changes.items():
        m = base|c
        key = m['arch'],m['size']
        if key not in seen: seen[key] = features(*key, data_dir)
        cost = seen[key][-1]*(1+m['mirror'])
        rows += [dict(change=name, seed=s, cost=round(cost, 1), accuracy=round(accuracy_of(seen[key], m, s), 5)) for s in range(seeds)]
        print(rows[-1], flush=True)
    title = 'One change at a time: a linear head on frozen features, first 50 classes of CUB-200-2011, EfficientNet-Lite0 at 112 px'
    write_result('first_changes', title, 'python benchmarks/first_changes.py', rows, table(rows))
    print(table(rows))
