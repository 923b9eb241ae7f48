"""MEAL on the drawn birds: three teachers of different architecture, their ensemble, and a student by labels, by distillation and by MEAL, the students for the same number of epochs.

As in `make train`, nobody starts from random weights: each architecture is first trained on 28 *other* drawn species. The noise study shuffles a share of the training labels
(seeded); its teachers learn from the same wrong labels as the student that it is compared with. Every finished run is in the result file at once, and a second start goes on from there.

    python benchmarks/meal.py             # the study, benchmarks/results/meal.json
    python benchmarks/meal.py --cost      # cost at inference, of a step and in memory, benchmarks/results/meal_cost.json
    python benchmarks/meal.py --table     # print the tables of both"""
import json,statistics,subprocess,sys,time
import torch
from fastcore.script import call_parse
from torch.utils.flop_counter import FlopCounterMode
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from cekd_fastai.all import *
from cekd_fastai.meal.callback import MEAL
from cekd_fastai.core import write_whole
from common import here,result_table,status,write_result # after fastai

runs = here.parent/'runs'/'meal'
small = dict(channels=(24,48,96,128))
archs = dict(resnet10t=small, test_resnet={}, test_efficientnet={}) # small networks that learn from scratch on a few hundred images
backbone_lr = dict(resnet10t=3e-3, test_resnet=3e-3, test_efficientnet=8e-3)
pupil = 'resnet10t'
methods = {'labels': None, 'distillation': dict(adversarial=None, taps=0), 'distillation, mean of the teachers': dict(adversarial=None, taps=0, choose='mean'),
    'MEAL, no adversary': dict(adversarial=None), "MEAL, 'joint'": dict(adversarial='joint'),
    "MEAL, 'grl'": dict(adversarial='grl'), "MEAL, 'alternate'": dict(adversarial='alternate')}
noisy = ['labels', 'distillation, mean of the teachers', "MEAL, 'joint'"]

def backbone(arch, epochs):
    "Weights of an architecture trained on drawn species other than those of the study, made once"
    file = runs/f'backbone-{arch}-{epochs}.pth'
    if file.exists(): return file
    print(f'A backbone for {arch}, on 28 other species', flush=True)
    birds = make_birds(here.parent/'runs'/'birds48', n_species=48, n_images=31, n_train=30, seed=7)
    dls = fine_grained_dls(birds, size=84, bs=32, classes=read_table(birds).classes[20:], in_memory=True)
    set_seed(7)
    learn = branch_learner(dls, arch, 1, pretrained=False, arch_args=archs[arch], wd=.05, cbs=ChannelsLast())
    with learn.no_bar(): learn.fit_one_cycle(epochs, backbone_lr[arch])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda p: torch.save({k:v for k,v in learn.model.state_dict().items() if not k.startswith('heads')}, p))
    return file

def data(noise, seed):
    "The drawn birds, with a share of the training labels shuffled among themselves"
    dls = fine_grained_dls('synthetic', size=84, bs=32, in_memory=True)
    y,g = dls.train.targets,torch.Generator().manual_seed(1000*seed+int(100*noise))
    idx = torch.randperm(len(y), generator=g)[:int(noise*len(y))]
    y[idx] = y[idx][torch.randperm(len(idx), generator=g)]
    return dls

def fit(dls, arch, seed, a, *cbs, epochs=None):
    "Train one network on what the callbacks make of the data"
    set_seed(seed)
    learn = branch_learner(dls, arch, 1, pretrained=False, arch_args=archs[arch], wd=.05, metrics=accuracy, cbs=[ChannelsLast(),*cbs])
    learn.model.load_state_dict(torch.load(backbone(arch, a.backbone_epochs), weights_only=True), strict=False)
    start,groups = time.perf_counter(),len(learn.splitter(learn.model))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs or a.epochs, [a.lr]*(groups-1)+[a.lr*10])
    return learn,round(time.perf_counter()-start, 1)

class Results:
    "The rows of a result file, written after each"
    def __init__(self, a):
        self.file,self.a = here/'results'/f'{a.name}.json',a
        self.rows = json.loads(self.file.read_text())['runs'] if self.file.exists() else []
    def has(self, **key): return any(all(r[k]==v for k,v in key.items()) for r in self.rows)
    def add(self, learn, seconds, **key):
        with learn.no_bar(), learn.no_logging(): loss,acc = learn.validate()
        self.put(accuracy=round(acc, 4), valid_loss=round(loss, 4), seconds=seconds, **key)
    def put(self, **row):
        self.rows.append(row)
        print({k:v for k,v in row.items()}, flush=True)
        a = self.a
        title = f'20 species of drawn birds, 84 px, three teachers and one student ({pupil}) that know 28 other species; {a.teacher_epochs} epochs for a teacher, {a.epochs} for a student'
        self.file.parent.mkdir(exist_ok=True)
        command = f'python benchmarks/meal.py --seeds {a.seeds} --epochs {a.epochs} --teacher-epochs {a.teacher_epochs} --lr {a.lr}'
        write_result(self.file.stem, title, command, self.rows, table(self.rows))

def table(rows):
    "Accuracy by method and share of shuffled labels, mean ± standard deviation over seeds, and each seed"
    df = pd.DataFrame(rows)
    levels = sorted(df.noise.unique())
    def cell(d): return '' if not len(d) else f'{100*d.mean():.1f}' + (f' ± {100*d.std():.1f}' if len(d)>1 else '') + f" ({', '.join(f'{100*o:.1f}' for o in d)})"
    lines = ['| accuracy % | '+' | '.join('clean labels' if not n else f'{n:.0%} shuffled' for n in levels)+' |', '|---|'+'---|'*len(levels)]
    for m in dict.fromkeys(df.method): lines.append(f'| {m} | '+' | '.join(cell(df[(df.method==m)&(df.noise==n)].accuracy) for n in levels)+' |')
    return '\n'.join(lines)

def study(a):
    "All runs that the result file does not have yet"
    res = Results(a)
    for seed in range(a.seeds):
        for noise in a.noise:
            files = [runs/a.name/f'{arch}-{noise}-{seed}-{a.teacher_epochs}.pt' for arch in archs]
            students = {f'student, {m}':m for m in (methods if not noise else noisy)}
            key = dict(noise=noise, seed=seed)
            if all(res.has(method=m, **key) for m in ['ensemble of the teachers',*students]): continue
            dls = data(noise, seed)
            for arch,file in zip(archs, files):
                if file.exists() and res.has(method=f'teacher, {arch}', **key): continue
                learn,seconds = fit(dls, arch, seed, a, epochs=a.teacher_epochs)
                save_net(learn.model, file, vocab=list(dls.vocab), mean=imagenet_stats[0], std=imagenet_stats[1])
                if not res.has(method=f'teacher, {arch}', **key): res.add(learn, seconds, method=f'teacher, {arch}', **key)
            for label,m in students.items():
                if res.has(method=label, **key): continue
                cb = [] if methods[m] is None else [MEAL(files, **methods[m])]
                if cb and not res.has(method='ensemble of the teachers', **key):
                    acc = branch_learner(dls, pupil, 1, pretrained=False, arch_args=small, cbs=cb).meal.teacher_accuracy()['ensemble']
                    res.put(method='ensemble of the teachers', accuracy=round(acc, 4), **key)
                    cb = [MEAL(files, **methods[m])]
                learn,seconds = fit(dls, pupil, seed+100, a, *cb) # another seed than the teacher of its architecture
                res.add(learn, seconds, method=label, **key)
    print(table(res.rows))

def macs(model, x):
    "Multiply-adds of one pass"
    with torch.no_grad(), FlopCounterMode(display=False) as count: model.eval()(x)
    return count.get_total_flops()/2

def ready(n, arch, teacher, size, bs, **kwargs):
    "A learner in the middle of training with `n` teachers, without progress bar and recorder"
    x,y = torch.randn(bs,3,size,size),torch.randint(0,50,(bs,))
    dls = DataLoaders.from_dsets(L(zip(x,y)), L(zip(x,y)), bs=bs, num_workers=0, device='cpu')
    dls.c = 50
    file = runs/f'random-{teacher}.pt'
    if not file.exists(): save_net(branch_net(teacher, 50, 1, pretrained=False), file)
    cbs = [MEAL([file]*n, **kwargs)] if n else []
    learn = branch_learner(dls, arch, 1, pretrained=False, loss_func=CrossEntropyLossFlat(), cbs=cbs, default_cbs=False)
    learn.add_cbs([TrainEvalCallback,CastToTensor])
    learn.create_opt()
    learn.n_epoch,learn.n_iter,learn.epoch,learn.dl = 1,1000,0,dls.train
    for e in ('before_fit','before_epoch','before_train'): learn(e)
    return learn,(x,y)

def timed(f, times):
    start = time.perf_counter()
    f()
    times.append(time.perf_counter()-start)

def memory(n, arch, teacher, size, bs):
    "Peak resident memory in GiB of three steps in a process of its own"
    learn,b = ready(n, arch, teacher, size, bs)
    for _ in range(3): learn.one_batch(0, b)
    print(status('VmHWM')) # `getrusage` would inherit the peak of the parent

def cost(a):
    "Steps of all settings alternate in one process, so that whatever else the machine does falls on all of them"
    rows,size,bs = [],a.size,a.bs
    for arch,teacher in (('resnet18','resnet34'),('mobilenetv2_100','mobilenetv2_100')):
        learns = {n:ready(n, arch, teacher, size, bs) for n in (0,1,5)}
        x,net = learns[1][1][0],learns[1][0].meal.teachers[0]
        ms,mt = macs(branch_net(arch, 50, 1, pretrained=False), x),macs(net, x)
        times = {k:[] for k in (0,1,5,'teacher','student')}
        alone = branch_net(arch, 50, 1, pretrained=False).eval()
        def infer(m):
            with torch.no_grad(): m(x)
        for i in range(a.rounds+1):
            for n,(l,b) in learns.items(): timed(lambda: l.one_batch(0, b), times[n])
            timed(lambda: infer(net), times['teacher'])
            timed(lambda: infer(alone), times['student'])
            if not i: times = {k:[] for k in times}
        t = {k:statistics.median(v) for k,v in times.items()}
        here_ = lambda n: float(subprocess.run([sys.executable, __file__, '--memory', str(n), '--pair', f'{arch},{teacher}', '--size', str(size), '--bs', str(bs)],
            capture_output=True, text=True, check=True).stdout.split()[-1])
        mem = {n:here_(n) for n in (0,1,5)}
        for n in (1,5): rows.append(dict(student=arch, teacher=teacher, teachers=n, mac_ratio=round((3*ms+mt)/(3*ms), 3), time_ratio=round(t[n]/t[0], 3),
            over_macs=round(t[n]/t[0]*3*ms/(3*ms+mt), 3), over_times=round(t[n]/(t[0]+t['teacher']), 3),
            ensemble_time=round(n*t['teacher']/t['student'], 2), ensemble_macs=round(n*mt/ms, 2), peak_gb=round(mem[n], 3), peak_alone_gb=round(mem[0], 3),
            seconds={str(k):[round(o, 4) for o in v] for k,v in times.items()}))
    lines = ['| student | teachers | multiply-adds of a step over the student alone | its time over the student alone | time over bound by multiply-adds | over measured student step + teacher pass | '
        'inference of the ensemble over the student: multiply-adds, time | peak memory, student alone and with MEAL (GiB) |','|---|---|---|---|---|---|---|---|']
    lines += [f"| {r['student']} | {r['teachers']} × {r['teacher']} | {r['mac_ratio']:.2f} | {r['time_ratio']:.2f} | {r['over_macs']:.2f} | {r['over_times']:.2f} | "
        f"{r['ensemble_macs']:.1f}, {r['ensemble_time']:.1f} | {r['peak_alone_gb']:.2f}, {r['peak_gb']:.2f} |" for r in rows]
    command = f'python benchmarks/meal.py --cost --size {size} --bs {bs} --rounds {a.rounds}'
    name = 'meal_cost' if a.name=='meal' else f'{a.name}_cost'
    write_result(name, f'Cost of MEAL, {size} px, batch of {bs}, one teacher drawn per step', command, rows, lines)
    print('\n'.join(lines))

@call_parse
def main(
    seeds:int=3,       # Number of seeds, from 0
    epochs:int=12,     # Of every student
    teacher_epochs:int=20, # Of every teacher
    lr:float=2e-3,     # Largest learning rate; ten times that for the heads
    backbone_epochs:int=15, # Of each architecture on the other species
    no_noise:bool=False,    # Leave the noise study out
    name:str='meal',   # Of the result file
    cost:bool=False,   # Measure cost instead
    table:bool=False,  # Print the tables instead
    size:int=112,      # Pixels, for the cost
    bs:int=32,         # Images in a batch, for the cost
    rounds:int=8,      # Rounds of alternating steps, for the cost
    memory:int=None,   # Peak memory with so many teachers; used by the cost itself
    pair:str=None,     # Student and teacher, with `memory`
):
    "Measure MEAL, and collect the runs in benchmarks/results"
    a = SimpleNamespace(**locals())
    a.noise = [0.] if no_noise else [0.,.2,.4]
    if memory is not None: globals()['memory'](memory, *pair.split(','), size, bs)
    elif table: print(result_table(name), result_table(f'{name}_cost'), sep='\n\n')
    elif cost: globals()['cost'](a)
    else: study(a)
