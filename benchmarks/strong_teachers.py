"""MEAL where its claim is meant to hold: teachers that know ImageNet and are far above the student, which starts from random weights.

    python benchmarks/strong_teachers.py --data-dir DIR --stage select # rate of the student by labels, on a fifth of the training images
    python benchmarks/strong_teachers.py --data-dir DIR --seeds 3      # benchmarks/results/strong_teachers.json

DIR holds the folders `oxford-flowers17-12classes` and `weights`, the latter with the files of three backbones. Three teachers are fine-tuned on the same training
images; the student is a small residual network that trains for many epochs, until it knows its images by heart. All students of a seed
have the same initial weights, images and epochs; what the teachers cost on top is in the last column.
Student and teachers see the same crops, ten of each image, whose answers are stored; students by labels see new crops all the time. The test part is read once, after the last epoch; a second start goes on where the first ended."""
import json,os,time
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from fastcore.script import call_parse
from cekd_fastai.all import *
from cekd_fastai.meal.callback import MEAL
from common import here,over,write_result # after fastai
from fine_tune import NoValid,find

size,bs,epochs,views = 56,32,100,10
pupil,small = 'resnet10t',dict(channels=(16,32,64,96))
teachers = dict(tf_efficientnet_lite0='efficientnet_lite0.pth', tf_efficientnet_lite2='efficientnet_lite2.pth', mobilenetv2_100='mobilenet_v2_tfquant.pth')
teacher_epochs,teacher_rate = 12,1e-3
rates = [3e-3,1e-2] # of the student; the best by labels on held-out images serves all

mean = dict(choose='mean', adversarial=None, taps=0)
methods = {'labels': {}, 'labels, label smoothing': dict(smooth=.1), 'mean of the teachers': mean,
    'MEAL, no adversary': dict(adversarial=None), "MEAL, 'joint'": dict(adversarial='joint'),
    "MEAL, 'joint', and labels": dict(adversarial='joint', w_hard=1.)}

def loaders(folder, seed, held_out):
    "The 12 flowers; `held_out` replaces the test part by a fifth of the training images"
    split = dict(valid_pct=.2, seed=seed) if held_out else {}
    set_seed(seed)
    return fine_grained_dls(find(folder, 'oxford-flowers17-12classes'), size=size, bs=bs, stats=imagenet_stats, in_memory=True, **split)

def fit(learn, n, lr, heads=1):
    "Train, heads at `heads` times the rate, and give the seconds it took"
    groups,start = len(learn.splitter(learn.model)),time.time()
    rates = [lr]*(groups-1)+[lr*heads]
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(NoValid()): learn.fit_one_cycle(n, rates)
    return round(time.time()-start, 1)

def score(learn):
    "Accuracy on training and test images"
    with learn.no_bar(), learn.no_logging(): known,acc = (float(learn.validate(ds_idx=i)[1]) for i in (0,1))
    return dict(accuracy=round(acc, 5), train=round(known, 5), images=len(learn.dls.valid_ds))

def teacher(arch, folder, seed, held_out, rows):
    "File of a teacher that is fine-tuned on the training images, made once"
    file = here.parent/'runs'/'strong_teachers'/f"{arch}-{seed}{'-held' if held_out else ''}.pt"
    if file.exists(): return file
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = find(folder, 'weights')/teachers[arch]
    dls = loaders(folder, seed, held_out)
    set_seed(seed)
    loss = LabelSmoothingCrossEntropyFlat(eps=.1)
    learn = branch_learner(dls, arch, 1, pretrained=False, weights=weights, freeze_bn=True, loss_func=loss, metrics=accuracy, cbs=ChannelsLast())
    secs = fit(learn, teacher_epochs, teacher_rate, heads=10)
    if not held_out: rows.append(dict(stage='teacher', method=f'teacher, {arch}', seed=seed, rate=teacher_rate, epochs=teacher_epochs, seconds=secs, **score(learn)))
    deploy(learn, file)
    return file

def student(name, folder, seed, lr, held_out, rows):
    "Train a student, then read the test part once"
    o = dict(methods[name])
    smooth = o.pop('smooth', 0)
    files = [teacher(a, folder, seed, held_out, rows) for a in teachers] if o else []
    dls = loaders(folder, seed, held_out)
    if o: o |= dict(cache_targets=True, views=views, cache_dir=here.parent/'runs'/'strong_teachers'/f'answers-{time.time_ns()}')
    cbs = [ChannelsLast()] + ([MEAL(files, **o)] if o else [])
    loss = LabelSmoothingCrossEntropyFlat(eps=smooth) if smooth else CrossEntropyLossFlat()
    set_seed(seed)
    learn = branch_learner(dls, pupil, 1, pretrained=False, arch_args=small, wd=.05, loss_func=loss, metrics=accuracy, cbs=cbs)
    secs = fit(learn, epochs, lr)
    return dict(stage='select' if held_out else 'final', method=name, seed=seed, rate=lr, epochs=epochs, seconds=secs, **score(learn))

def best(rows):
    "The rate that was best by labels on held-out training images"
    runs = {r['rate']:r['accuracy'] for r in rows if r['stage']=='select'}
    return max(runs, key=runs.get) if runs else rates[1]

def table(rows):
    "One line for each network: accuracy on training and test images, and its gain over the student by labels of the same seed"
    base = {r['seed']:r['accuracy'] for r in rows if r['stage']=='final' and r['method']=='labels'}
    cost = {r['seed']:r['seconds'] for r in rows if r['stage']=='final' and r['method']=='labels'}
    lines = ['| network | training images % | test images % | each seed | over labels | time |','|---|---|---|---|---|---|']
    for name in dict.fromkeys([*(f'teacher, {a}' for a in teachers),*methods]):
        d = sorted((r for r in rows if r['method']==name and r['stage'] in ('final','teacher')), key=lambda r: r['seed'])
        if not d: continue
        acc = [100*r['accuracy'] for r in d]
        gain = [100*(r['accuracy']-base[r['seed']]) for r in d if r['seed'] in base and name in methods and name!='labels']
        time_ = f"{np.mean([r['seconds']/cost[r['seed']] for r in d if r['seed'] in cost]):.2f}" if name in methods and cost else ''
        lines.append(f"| {name} | {100*np.mean([r['train'] for r in d]):.1f} | {np.mean(acc):.1f} | {', '.join(f'{o:.1f}' for o in acc)} | {over(gain) if gain else ''} | {time_} |")
    return '\n'.join(lines)

def write(rows):
    "The result file of the study"
    title = f'MEAL with strong teachers: 12 flowers at {size} px, three teachers from ImageNet weights, a small ResNet from random weights that trains for {epochs} epochs'
    seeds = 1+max((r['seed'] for r in rows if r['stage']=='final'), default=0)
    write_result('strong_teachers', title, f'python benchmarks/strong_teachers.py --seeds {seeds}', rows, table(rows))

@call_parse
def main(
    data_dir:str=os.environ.get('CEKD_DATA', '.'), # Folder with data and weights
    stage:str='final', # select, final or table
    only:str=None, # Names of methods, with semicolons; all if None
    seeds:int=3,   # Number of seeds, from 0
):
    "Train what is missing, and print the table"
    torch.set_num_threads(1)
    file = here/'results'/'strong_teachers.json'
    rows = json.loads(file.read_text())['runs'] if file.exists() else []
    def run(name, seed, lr, held_out=False):
        if any((r['stage'],r['method'],r['seed'],r['rate'])==('select' if held_out else 'final',name,seed,lr) for r in rows): return
        rows.append(student(name, data_dir, seed, lr, held_out, rows))
        write(rows)
        print(rows[-1], flush=True)
    if stage=='select':
        for lr in rates: run('labels', 0, lr, held_out=True)
    if stage=='final':
        for seed in range(seeds):
            for name in methods:
                if not only or name in only.split(';'): run(name, seed, best(rows))
    print(table(rows))
