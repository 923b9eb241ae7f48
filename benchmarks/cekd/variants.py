"Forms of CEKD that the study compares on held-out images, and that the library does not have: each changes one thing."
import torch
from cekd_fastai.all import CEKD,Distill,SnapMix,kd_loss,mixed_loss
from cekd_fastai.cekd import teacher_logits
from cekd_fastai.core import amp_context
from cekd_fastai.losses import ramp_up,soft_probs
from cekd_fastai.own_targets import StoredTargets
from cekd_fastai.steps import step_pct

class ClassMeans(CEKD):
    "The soft target of an image is the mean prediction for its class: which classes are alike, and nothing of the image"
    means = None # Mean prediction for each class, shape (K, K), averaged over steps
    def __init__(self, keep=.9, **kwargs):
        super().__init__(**kwargs)
        self.keep = keep

    def before_fit(self):
        super().before_fit()
        self.means = None

    def _mixed_losses(self, z, y):
        self.learn_classes(soft_probs(teacher_logits(self.clean.logits.detach().float(), self.teacher), self.T)[0], y[0])
        self.ema_target = self.T*self.means[y[0]].clamp(min=1e-8).log()[None] # logits that are softened to the means
        return super()._mixed_losses(z, y)

    def learn_classes(self, q, y):
        "Take the predictions (B, K) for images of the classes `y` into the means"
        k = q.shape[1]
        if self.means is None: self.means = torch.eye(k, device=q.device)
        n = q.new_zeros(k).index_add_(0, y, q.new_ones(len(y)))[:,None]
        new = torch.zeros_like(self.means).index_add_(0, y, q)/n.clamp(min=1)
        self.means = torch.where(n>0, torch.lerp(new, self.means, self.keep), self.means)

class LastThird(CEKD):
    "The cross target in the last third of the run only"
    def weights(self): return super().weights() | dict(cross=self.w_cross*float(step_pct(self.learn)>=2/3))

class Annealed(CEKD):
    "The weight of the labels of clean images falls from twice its own to nothing"
    def weights(self): return super().weights() | dict(ce_clean=2*self.w_clean*(1-step_pct(self.learn)))

class WholePictures(CEKD):
    "The average of the weights teaches from the middle of whole pictures, whatever crop of them the network sees"
    def __init__(self, **kwargs): super().__init__(teacher='ema', **kwargs)
    def ema_logits(self, x):
        dl = self.learn.dls.train
        return super().ema_logits(dl.crops(dl.rows, dl.still()[1].to(x.device)[dl.rows]))

class Neighbours(SnapMix):
    "Mixes neighbours, which `BirdLoader` lays side by side by classes if the mix has `pairs`"
    def donors(self, n): return torch.arange(n)^1

class StoredForAll(StoredTargets):
    "An unmixed image learns its own stored target too"
    def soft_loss(self, z, rec=None):
        if rec is not None: return super().soft_loss(z, rec)
        return self.reduce(torch.where(self.known, kd_loss(z, self.soft, self.T, per_sample=True), 0.))

class TwoMixes(Distill):
    "Each pair is mixed in two ways, cut by the mix of the learner and blended with the same weights; on one what the other branch says of the other"
    min_branches,other = 2,None # `other`: logits of the blended images, shape (n, B, K)
    _stateattrs = Distill._stateattrs + ('other',)
    def __init__(self, weight=1., T=3., ramp=.3): self.weight,self.T,self.ramp = weight,T,ramp
    def part_names(self): return ['ce','cross']
    def weights(self): return dict(cross=self.weight*ramp_up(step_pct(self.learn), self.ramp))

    def before_batch(self):
        rec,x = self.record,self.mixer.host
        if rec is None: return
        a,b = (o[:,None,None,None] for o in (rec.lam_a,rec.lam_b))
        with amp_context(self.learn): self.other = self.net.branch_forward(a*x+b*x[rec.perm])[0].float()

    def reset_step(self):
        super().reset_step()
        self.other = None

    def losses(self):
        z,y,rec,lf = self.logits.float(),self.learn.yb[0],self.record,self.learn.loss_func
        if rec is None: return dict(ce=sum(lf(o, y) for o in z), cross=z.new_zeros(()))
        def teach(student, teacher): return kd_loss(student, soft_probs(teacher.detach(), self.T).flip(0), self.T)
        ce = sum(mixed_loss(lf, o, y, rec) for o in (*z,*self.other))
        return dict(ce=ce, cross=teach(z, self.other)+teach(self.other, z))
