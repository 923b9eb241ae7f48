"Forms of CEKD that the study compares on held-out images, and that the library does not have: each changes one thing."
import torch
from cekd_fastai.all import CEKD,SnapMix
from cekd_fastai.cekd import teacher_logits
from cekd_fastai.losses import soft_probs
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
        self.learn_classes(soft_probs(teacher_logits(self.clean.logits.detach().float(), self.teacher), self.T)[0], y)
        self.ema_target = self.T*self.means[y].clamp(min=1e-8).log()[None] # logits that are softened to the means
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

class Neighbours(SnapMix):
    "Mixes neighbours, which `BirdLoader` lays side by side by classes if the mix has `pairs`"
    def donors(self, n): return torch.arange(n)^1
