"""Which classifier is fitted on a teacher's frozen features: logistic regression or ridge regression in closed form, with which strength, from how many images?

Features are the pooled ones of the last layer, in one pass without augmentation. Fitted on the training images, judged on the official test images: accuracy, the mean log-probability of
the right class (what a student is taught with), and the seconds of the fit. 'chosen' takes the strength that is best on a fifth of the training images, then fits on all of them;
'kept' is the fit on the other four fifths itself.

    python benchmarks/teacher_heads.py            # CUB's first 50 classes, 12 flowers (`CEKD_DATA` names the folder of their archives) and the drawn birds"""
import os,tarfile,time,warnings
import timm,torch
import torch.nn.functional as F
from fastcore.script import call_parse
from sklearn.linear_model import LogisticRegression
from fastai.vision.all import *
from cekd_fastai.all import *
from common import here,write_result

cache = here.parent/'runs'/'teacher_heads'
strengths = dict(logistic=(1e-3,1e-2,1e-1,1.,10.), ridge=(1e-3,1e-2,1e-1,1.,10.))
backbones = dict(efficientnet_lite0=('tf_efficientnet_lite0','weights-efficientnet-lite'), mobilenet_v2_tfquant=('mobilenetv2_100','weights'))

def unpacked(name):
    "The folder of a pack of real data"
    folder = Path(os.environ.get('CEKD_DATA') or here.parents[1]/'shared'/'data')
    dest = cache/name
    if not dest.exists():
        with tarfile.open(folder/f'{name}.tgz') as f: f.extractall(dest, filter='data')
    inner = [o for o in dest.iterdir()]
    return inner[0] if len(inner)==1 and inner[0].is_dir() else dest

def parts(net, dls):
    "Features and classes of the training images, without augmentation, and of the test images"
    res = []
    for dl in (dls.train.new(shuffle=False, drop_last=False),dls.valid):
        with dl.dataset.set_split_idx(1), torch.no_grad(): rows = [(net(x.as_subclass(Tensor)),y.as_subclass(Tensor)) for x,y in dl]
        res.append((torch.cat([f for f,_ in rows]),torch.cat([y for _,y in rows])))
    return res

def features(data, backbone, n_classes, size):
    "Features of a data set by a backbone, computed once"
    file = cache/f'{data}-{backbone}-{size}.pt'
    if file.exists(): return torch.load(file)
    arch,pack = backbones[backbone]
    net = load_weights(timm.create_model(arch, pad_type='same'), first(unpacked(pack).rglob(f'{backbone}.pth'))).eval()
    net.reset_classifier(0)
    own = dict(mean=[.5]*3, std=[.5]*3) if 'lite' in backbone else dict(mean=imagenet_stats[0], std=imagenet_stats[1])
    path = 'synthetic' if data=='birds' else unpacked(data)
    dls = fine_grained_dls(path, size=size, bs=50, classes=n_classes, num_workers=0, stats=(own['mean'],own['std']))
    res = parts(net, dls)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(res, file)
    return res

def logistic(f, y, k, C):
    "Weights (K, d) and biases (K,) of a logistic regression"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # that the iterations are at their end
        m = LogisticRegression(C=C, max_iter=200).fit(f.numpy(), y.numpy())
    return torch.tensor(m.coef_, dtype=torch.float),torch.tensor(m.intercept_, dtype=torch.float)

def ridge(f, y, k, strength):
    "The same of a ridge regression on one-hot labels; its outputs are no logits, so one factor is fitted on the same images"
    mean,t = f.mean(0),F.one_hot(y, k).float()
    x,base = (f-mean).double(),t.mean(0)
    A = x.T@x + strength*len(x)*torch.eye(x.shape[1])
    w = torch.linalg.solve(A, x.T@(t-base).double()).T.float()
    z = (f-mean)@w.T+base
    factor = min((1,3,10,20,30,50,100), key=lambda a: F.cross_entropy(a*z, y).item())
    return factor*w,factor*(base-mean@w.T)

def judged(fit, train, test, k, strength):
    "Accuracy and log-probability on `test` of a fit on `train`, and its seconds"
    (f,y),(ft,yt) = train,test
    mean,std = f.mean(0),f.std(0).clamp(min=1e-6)
    start = time.perf_counter()
    w,b = fit((f-mean)/std, y, k, strength)
    seconds = time.perf_counter()-start
    z = ((ft-mean)/std)@w.T+b
    return dict(accuracy=round((z.argmax(1)==yt).float().mean().item(), 4), log_prob=round(-F.cross_entropy(z, yt).item(), 4), seconds=round(seconds, 2))

def halves(y, seed):
    "Rows to fit on and a fifth of each class to choose with"
    g,held = torch.Generator().manual_seed(seed),torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        rows = (y==c).nonzero()[:,0]
        held[rows[torch.randperm(len(rows), generator=g)[:max(len(rows)//5, 1)]]] = True
    return ~held,held

@call_parse
def main(
    sets:str='oxford-flowers17-12classes,birds,CUB_200_2011', # Data sets, separated by commas
    seeds:int=3, # Draws of the images to choose with
):
    "Compare the fits"
    rows = []
    for data in sets.split(','):
        for backbone in (backbones if data!='birds' else ['mobilenet_v2_tfquant']):
            size = 84 if data=='birds' else 112
            train,test = features(data, backbone, 50 if 'CUB' in data else None, size)
            k,key = int(train[1].max())+1,dict(data=data, backbone=backbone)
            for fit in (logistic,ridge):
                name = fit.__name__
                for s in strengths[name]: rows.append(dict(**key, fit=name, strength=s, **judged(fit, train, test, k, s)))
                for seed in range(seeds):
                    rest,held = halves(train[1], seed)
                    a,b = [(train[0][m],train[1][m]) for m in (rest,held)]
                    s = max(strengths[name], key=lambda s: judged(fit, a, b, k, s)['log_prob'])
                    rows.append(dict(**key, fit=name, strength='chosen', seed=seed, chose=s, **judged(fit, train, test, k, s)))
                    rows.append(dict(**key, fit=name, strength='kept', seed=seed, chose=s, **judged(fit, a, test, k, s)))
            print(pd.DataFrame(rows[-2*(5+2*seeds):]).to_string(), flush=True)
    df = pd.DataFrame(rows)
    lines = ['| data | backbone | fit | strength | accuracy % | log-probability | seconds |','|---|---|---|---|---|---|---|']
    for key,d in df.groupby(['data','backbone','fit','strength'], sort=False):
        if key[2]=='ridge' and key[3] not in ('chosen','kept'): continue # they are in `runs`
        lines.append(f"| {' | '.join(map(str, key))} | {100*d.accuracy.mean():.1f} | {d.log_prob.mean():.3f} | {d.seconds.mean():.1f} |")
    command = f'python benchmarks/teacher_heads.py --sets {sets} --seeds {seeds}'
    write_result('teacher_heads', 'A classifier fitted on frozen features', command, rows, lines)
    print('\n'.join(lines))
