"""What the studies of long runs train beside the mixes of `birds_train`: students of MEAL, online distillation and CSS, all from random weights.

Teachers of MEAL are fine-tuned by the first run that needs them, on the labels that its student would have, and lie in the
bundle for the others, of later runs too."""
import json,os,time,zlib
from pathlib import Path
import numpy as np,torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import DataLoaders,OptimWrapper,partial,set_seed
from cekd_fastai.all import MEAL,branch_learner,branch_net,branch_preds,css_learner,online_learner
import birds_train
from birds_train import BirdLoader,Lean,callbacks,split

class PadLoader(BirdLoader):
    "Pictures that are shifted by up to `pad` places, beyond whose border all is the mean, and flipped"
    def draw(self):
        n,c = self.n,self.c
        g = torch.Generator().manual_seed(1000*self.seed+self.epoch)
        self.epoch += 1
        x,y = (2*torch.randint(-c['pad'], c['pad']+1, (2,n), generator=g)/c['size'])
        flip = torch.where(torch.rand(n, generator=g)<.5, -1., 1.)
        z,one = torch.zeros(n),torch.ones(n)
        return torch.randperm(n, generator=g),torch.stack([flip,z,x, z,one,y], 1).view(n, 2, 3)

    def crops(self, rows, theta):
        size,x = self.c['size'],self.ims[rows].float()/127.5-1
        grid = F.affine_grid(theta, (len(rows),3,size,size), align_corners=False)
        x = F.grid_sample(x, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
        return x.contiguous(memory_format=torch.channels_last) if self.last else x

def wrong_labels(y, share, n_classes, seed):
    "The same labels, of which a share is replaced by other classes"
    rng,y = np.random.default_rng(seed),y.copy()
    at = rng.permutation(len(y))[:round(share*len(y))]
    y[at] = (y[at]+rng.integers(1, n_classes, len(at)))%n_classes
    return y

def labelled_rows(label, rows, share, seed):
    "A share of the rows of each class"
    if share==1: return rows
    rng = np.random.default_rng(seed)
    groups = [rng.permutation(rows[label[rows]==k]) for k in np.unique(label[rows])]
    return np.sort(np.concatenate([o[:round(share*len(o))] for o in groups]))

def optimiser(c, cuda):
    "Nesterov's momentum or AdamW of torch, as one call for all weights where the device has that"
    if c['opt']=='sgd': return partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9, nesterov=True, weight_decay=c['wd'], fused=cuda)
    return partial(OptimWrapper, opt=torch.optim.AdamW, weight_decay=c['wd'], fused=cuda)

ONLINE = ('dml','kdcl','one','okddip','ffl','diversity')

class Bench(birds_train.Bench):
    "Pictures on one device, and runs of any method on them"
    def __init__(self, bundle, pixels, label, test, c, device):
        super().__init__(bundle, pixels, label, test, c|dict(weights=c['weights'] or ''), device)
        self.bundle,self.pixels = Path(bundle),Path(pixels)

    def rows_of(self, j):
        "Rows to train on, their labels, and the rows to test on"
        args,seed = j['args'],j['seed']
        tr,te = split(self.label, self.test, j['stage']=='select', seed, self.c['valid_pct'])
        all_labels = self.label.copy()
        all_labels[tr] = wrong_labels(self.label[tr], args.get('wrong', 0), int(self.label.max())+1, seed)
        part = labelled_rows(self.label, tr, args.get('labelled', 1), seed)
        return (tr if 'meal' in j['methods'] else part),part,te,all_labels

    def loader(self, rows, label, seed=None):
        kind = PadLoader if 'pad' in self.c else BirdLoader
        rows = torch.from_numpy(rows).to(self.device)
        y = torch.from_numpy(label).long().to(self.device)
        return kind(self.ims[rows], y[rows], self.c, seed, self.layout=='channels_last')

    def loaders(self, j):
        tr,_,te,label = self.rows_of(j)
        dls = DataLoaders(self.loader(tr, label, j['seed']), self.loader(te, self.label), device=self.device)
        dls.c = int(self.label.max())+1
        return dls,self.loader(tr, label)

    def learner(self, j, dls):
        "The learner of a job; nothing in its steps waits for the device"
        c,m,kw = self.c,j['methods'],{}
        teachers = self.teachers(j) if 'meal' in m else None # before the seed, since one that is trained here draws numbers
        set_seed(j['seed'])
        if c.get('own_start') and j['branches']>1: kw['own_start'] = True
        kw |= dict(pretrained=False, freeze_bn=c['freeze_bn'], loss_func=nn.CrossEntropyLoss(label_smoothing=j['smoothing']), opt_func=optimiser(c, self.device.type=='cuda'))
        online = next((o for o in m if o in ONLINE), None)
        if online: learn = online_learner(dls, c['arch'], online, j['branches'], **kw)
        elif 'css' in m: learn = css_learner(dls, (c['arch'],c['arch']), j['branches'], **kw)
        elif 'meal' in m:
            own = {k:v for k,v in j['args'].items() if k not in ('wrong','labelled')}
            if own.get('taps')!=0 and 'teacher_taps' in c: own['teacher_taps'] = c['teacher_taps']
            if self.answers_kept(j): own |= dict(cache_targets=True, cache_dir=self.bundle/'answers', views=j['epochs'])
            learn = branch_learner(dls, c['arch'], 1, cbs=MEAL(teachers, **own), **kw)
        else: learn = branch_learner(dls, c['arch'], j['branches'], cbs=callbacks(j, c), **kw)
        self.set_up(learn)
        dls.train.epoch = 0 # whatever was looked at on the way: the same crops for all
        return learn

    def run(self, j, deadline):
        "Train and test; what a row says about it, or None when the time was up"
        dls,seen = self.loaders(j)
        learn,start = self.learner(j, dls),time.time()
        res = self.trained(j, learn, dls, seen, start, deadline)
        if not res or 'meal' not in j['methods']: return res
        return res | dict(teachers=self.teacher_accuracy(j), answers_kept=self.answers_kept(j))

    def answers_kept(self, j):
        "Whether the answers to all crops of a run are kept for the other rows that show the same teachers the same crops"
        return self.device.type=='cpu' and j['row'] in self.c.get('shared_answers', [])

    def fit_job(self, learn, j, cbs):
        "As many steps, whatever is labelled"
        share = 1 if 'meal' in j['methods'] else j['args'].get('labelled', 1)
        self.fit(learn, round(j['epochs']/share), j['lr'], self.c['head_lr'], cbs)

    # Teachers

    def teacher_file(self, j, name):
        wrong,part = j['args'].get('wrong', 0),j['args'].get('labelled', 1)
        how = json.dumps([self.c[o] for o in ('teacher','crop','size','bs')]+[self.c['teachers'][name]])
        return self.bundle/f"{self.c['name']}-{name}-{j['stage']}-{wrong}-{part}-{j['seed']}-{zlib.crc32(how.encode()):08x}.pt"

    def teachers(self, j):
        "The teachers of a run; the first run that needs one trains it"
        names = list(self.c['teachers'])
        first = hash((j['row'],os.getpid()))%len(names) # so that several processes begin with different ones
        for name in names[first:]+names[:first]: self.make_teacher(j, name)
        for name in names: self.await_teacher(j, name)
        return [self.teacher_net(name, self.teacher_file(j, name)) for name in names]

    def make_teacher(self, j, name):
        "Fine-tune a teacher and write it, unless an earlier run has, or another process of this one has begun to"
        file = self.teacher_file(j, name)
        if file.exists(): return
        begun = self.pixels.with_name(file.name).with_suffix('.begun') # it goes with this run, the teacher stays
        try: os.close(os.open(begun, os.O_CREAT|os.O_EXCL))
        except FileExistsError: return
        t,o = self.c['teacher'],self.c['teachers'][name]
        _,part,te,label = self.rows_of(j)
        dls = DataLoaders(self.loader(part, label, j['seed']), self.loader(te, self.label), device=self.device)
        dls.c = int(self.label.max())+1
        set_seed(j['seed'])
        learn = branch_learner(dls, o['arch'], 1, pretrained=False, weights=self.bundle/o['weights'], freeze_bn=t['freeze_bn'], arch_args=o.get('args'),
            loss_func=nn.CrossEntropyLoss(label_smoothing=t['smoothing']), opt_func=optimiser(t, self.device.type=='cuda'))
        self.set_up(learn, half=self.device.type=='cuda') # on processors their large depthwise convolutions are slower so
        self.fit(learn, t['epochs'], t['lr'], t['head_lr'], [Lean(1e12)])
        z,_,y = branch_preds(learn, dls.valid)
        whole = file.with_suffix('.part')
        torch.save(dict(weights=learn.model.state_dict(), accuracy=(z.argmax(1)==y).float().mean().item(), logits=z), whole)
        whole.rename(file)

    def await_teacher(self, j, name, seconds=3600):
        file,end = self.teacher_file(j, name),time.time()+seconds
        while not file.exists():
            if time.time()>end: raise RuntimeError(f'the teacher {file.name} did not come in {seconds} s')
            time.sleep(.1)

    def teacher_net(self, name, file):
        o = self.c['teachers'][name]
        net = branch_net(o['arch'], int(self.label.max())+1, 1, pretrained=False, **(o.get('args') or {}))
        net.load_state_dict(torch.load(file, map_location='cpu', weights_only=True)['weights'])
        return net.to(self.device)

    def teacher_accuracy(self, j):
        "On the pictures that the student is tested on: of each, and of the mean of their probabilities"
        kept = {o:torch.load(self.teacher_file(j, o), map_location='cpu', weights_only=True) for o in self.c['teachers']}
        y = torch.from_numpy(self.label[self.rows_of(j)[2]])
        mean = sum(o['logits'].softmax(1) for o in kept.values())
        res = {k:round(o['accuracy'], 5) for k,o in kept.items()}
        return res | dict(ensemble=round((mean.argmax(1)==y).float().mean().item(), 5))
