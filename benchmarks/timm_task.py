"""A step of distillation here beside one of timm's `timm.task`: the same teacher, student, images and optimiser; the loss of each step, and the time as a ratio.

Logit distillation is `MEAL(teacher, taps=0, adversarial=None, T=3)` beside `LogitDistillationTask`, and feature distillation `MEAL(..., w_feat=1.)` beside `FeatureDistillationTask`, both without
labels. timm's training loop is the shortest that its tasks allow: forward, backward, step. Steps alternate in one process, so that whatever else the machine does falls on both.

    python benchmarks/timm_task.py                # benchmarks/results/timm_task.json"""
import statistics,time
import timm,torch
from fastcore.script import call_parse
from timm.task import FeatureDistillationTask,LogitDistillationTask
from fastai.vision.all import *
from cekd_fastai.all import *
from cekd_fastai.losses import soft_log_probs
from common import write_result

def theirs(task_type, student, teacher, lr, **kwargs):
    "A function that takes a step of timm's task and gives its distillation loss"
    task = task_type(student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=1., task_loss_weight=0., verbose=False, **kwargs)
    task.train()
    opt = torch.optim.SGD(task.trainable_module.parameters(), lr=lr)
    def step(x, y):
        out = task(x, y)
        out['loss'].backward()
        opt.step()
        opt.zero_grad()
        return out['kd_loss'].item()
    return step

def ours(student, teacher, n_out, lr, bs, size, **kwargs):
    "A function that takes a step of a learner and gives the parts of its loss"
    x = torch.randn(bs,3,size,size)
    data = L(zip(x, torch.zeros(bs).long()))
    dls = DataLoaders.from_dsets(data, data, bs=bs, num_workers=0, device='cpu')
    dls.c = n_out
    meal = MEAL(teacher, taps=0, adversarial=None, **kwargs)
    learn = branch_learner(dls, student, 1, keep_head=True, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=lr, cbs=meal, default_cbs=False)
    learn.add_cbs([TrainEvalCallback,CastToTensor])
    learn.create_opt()
    learn.opt.set_hypers(wd=0., mom=0.)
    learn.n_epoch,learn.n_iter,learn.epoch,learn.dl = 1,1000,0,dls.train
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    parts = {}
    class Keep(Callback):
        order,run_valid = 30,False
        def after_loss(self): parts.update({k:v.detach() for k,v in self.learn.meal.parts.items()})
    learn.add_cb(Keep())
    def step(x, y):
        learn.one_batch(0, (x,y))
        return {k:v.item() for k,v in parts.items()}
    return step

@call_parse
def main(
    student:str='resnet18', # Names in timm
    teacher:str='resnet34',
    size:int=96,  # Pixels
    bs:int=16,    # Images in a batch
    rounds:int=8, # Steps of each, in turns
    n_out:int=50, # Classes
    T:float=3.,   # Temperature of the logits
):
    "Compare losses and times of steps"
    rows,lr = [],1e-3
    for kind,task,more in (('logits',LogitDistillationTask,dict(temperature=T)),('pooled features',FeatureDistillationTask,{})):
        set_seed(0)
        a,big = timm.create_model(student, num_classes=n_out),timm.create_model(teacher, num_classes=n_out).eval()
        b = deepcopy(a)
        # features by themselves: timm's task has them alone, ours has the logits too, with weight 0 here
        own = dict(T=T) if kind=='logits' else dict(gammas=[0.], w_feat=1.)
        steps = dict(timm=theirs(task, a, deepcopy(big), lr, **more), cekd_fastai=ours(b, big, n_out, lr, bs, size, **own))
        times,gaps = {k:[] for k in steps},[]
        for i in range(rounds+1):
            x,y,loss = torch.randn(bs,3,size,size),torch.randint(0, n_out, (bs,)),{}
            for k,step in steps.items():
                start = time.perf_counter()
                loss[k] = step(x, y)
                if i: times[k].append(time.perf_counter()-start)
            if not i: first_loss = loss['timm']
            if kind=='logits':
                with torch.no_grad(): log_q = soft_log_probs(big(x), T)
                floor = -T*T*(log_q.exp()*log_q).sum(1).mean().item() # ours is the cross-entropy, which has the entropy of the teacher in it
                gaps.append(abs(loss['timm']-(loss['cekd_fastai']['sim']-floor)))
            elif a.num_features==big.num_features: gaps.append(abs(loss['timm']-loss['cekd_fastai']['feat'])) # no projection
        med = {k:statistics.median(v) for k,v in times.items()}
        rows.append(dict(kind=kind, student=student, teacher=teacher, time_ratio=round(med['cekd_fastai']/med['timm'], 3),
            loss=first_loss, loss_gap=max(gaps) if gaps else None, seconds={k:[round(o, 4) for o in v] for k,v in times.items()}))
    lines = ['| what is distilled | student, teacher | time of a step over timm\'s | loss of the first step | largest difference of the loss |','|---|---|---|---|---|']
    for r in rows:
        gap = f"{r['loss_gap']:.0e}" if r['loss_gap'] is not None else 'another start of the projection'
        lines.append(f"| {r['kind']} | {r['student']}, {r['teacher']} | {r['time_ratio']:.2f} | {r['loss']:.4f} | {gap} |")
    cmd = f'python benchmarks/timm_task.py --student {student} --teacher {teacher} --size {size} --bs {bs} --rounds {rounds}'
    write_result('timm_task', f'Distillation beside timm.task, {size} px, batch of {bs}, {rounds} steps', cmd, rows, lines)
    print('\n'.join(lines))
