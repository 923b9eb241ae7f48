"""Training with one CUDA graph an epoch: its first step is captured, the others replay it, so that launching costs next to nothing.

Whatever a step does on the device is replayed, whatever it does in Python is not: so a method may use it only if its steps of one epoch
launch the same work. Rates reach the device with every step; momentum and ramps move once an epoch, from capture to capture.
`graph_check.py` compares each with training step by step."""
import gc,torch
from fastai.basics import Callback,Learner
from fastai.callback.schedule import ParamScheduler

REPEATS = ('dml','kdcl','one','okddip','ffl','diversity','css','meal') # methods whose steps of one epoch launch the same work
def repeats(j):
    "Do all steps of an epoch of this run launch the same work?"
    return j['mix'] is None and all(o in REPEATS for o in j['methods']) and j['args'].get('choose')!='random'

class CudaCapture:
    "Record what a step does on the device; a new graph takes the memory of the one before"
    def __init__(self): self.pool,self.graph = torch.cuda.graph_pool_handle(),None
    def __call__(self, step):
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        gc.disable() # what it would free belongs to other steps
        try:
            graph.capture_begin(pool=self.pool, capture_error_mode='thread_local')
            try: step()
            finally: graph.capture_end()
        finally: gc.enable()
        self.graph = graph
        graph.replay()
        return graph.replay

WARM = 3 # steps of a run before the first is captured

class HeldMomentum(Callback):
    "Step by step, the momentum that graphs have: in each epoch that of the step that is captured"
    order = ParamScheduler.order+1
    def before_batch(self):
        if not self.training: return
        if self.iter==0 or self.train_iter<=WARM: self.held = [o['mom'] for o in self.learn.opt.hypers]
        else: self.learn.opt.set_hyper('mom', self.held)

class GraphedLoop:
    "The loop over the batches of an epoch for a `Learner` whose loader is a `BirdLoader`"
    def __init__(self, learn, capture, warm=WARM): self.learn,self.capture,self.warm,self.rates,self.at = learn,capture,warm,None,None

    def batch(self, rows, theta):
        dl = self.learn.dl
        dl.rows = rows
        return dl.crops(rows, theta),dl.y[rows]

    def step(self):
        "One step of the optimiser, whose rates lie on the device"
        groups = self.learn.opt.opt.param_groups
        now = [g['lr'] for g in groups]
        for g,o in zip(groups, self.rates): g['lr'] = o
        self.learn.opt.step()
        for g,o in zip(groups, now): g['lr'] = o

    def send_rates(self):
        for o,g in zip(self.rates, self.learn.opt.opt.param_groups): o.fill_(g['lr'])

    def all_batches(self):
        learn,dl = self.learn,self.learn.dl
        if not learn.training: return Learner.all_batches(learn)
        rows,theta = (o.to(dl.device) for o in dl.draw())
        learn.n_iter,first = len(dl),0
        part = lambda i: slice(i*dl.bs, (i+1)*dl.bs)
        while self.warm and first<learn.n_iter:
            learn.one_batch(first, self.batch(rows[part(first)], theta[part(first)]))
            self.warm,first = self.warm-1,first+1
        if first==learn.n_iter: return
        if self.rates is None: self.rates = [torch.zeros((), device=dl.device) for _ in learn.opt.opt.param_groups]
        self.at = rows[part(first)].clone(),theta[part(first)].clone()
        schedules = [o for o in learn.cbs if isinstance(o, ParamScheduler)]
        for o in schedules: o.before_batch()
        self.send_rates()
        learn._step = self.step
        try: replay = self.capture(lambda: learn.one_batch(first, self.batch(*self.at)))
        finally: del learn._step
        for i in range(first+1, learn.n_iter):
            learn.iter = i
            for o in schedules: o.before_batch()
            self.send_rates()
            for o,new in zip(self.at, (rows,theta)): o.copy_(new[part(i)])
            replay()
            learn.pct_train += 1/(learn.n_iter*learn.n_epoch) # what TrainEvalCallback does in other steps
            learn.train_iter += 1

def optimisers(learn):
    "Those that the steps of a learner use: its own, and that of MEAL's discriminators"
    own = [getattr(getattr(learn.model, o, None), 'opt', None) for o in ('adversary','projection')]
    return [learn.opt.opt,*[o for o in own if o]]

def fit_graphed(learn, fit):
    "`fit()`, its training epochs by graphs"
    if learn.opt is None: learn.create_opt()
    for g in (g for o in optimisers(learn) for g in o.param_groups):
        if 'capturable' in g: g['capturable'] = True
    learn.all_batches = GraphedLoop(learn, CudaCapture()).all_batches
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(torch.cuda.Stream()): fit()
    finally: del learn.all_batches
    torch.cuda.synchronize()
