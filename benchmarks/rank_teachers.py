"""Does what `rank_teachers` measures before a run predict the student after it?

Teachers of several architectures, lengths of training and label smoothings learn eight drawn species, from a backbone that has seen *other* species. Each alone then teaches a small student,
by its outputs and without labels (`MEAL` with `taps=0, adversarial=None, T=3`). The teachers are measured on a fifth of the training images that nobody trains on, the students on the test images.
For each column of the table: Spearman's rank correlation with the student's accuracy over the teachers, in each seed and mean. Every finished run is in the result file at once, and a second start goes on from there.

    python benchmarks/rank_teachers.py            # benchmarks/results/rank_teachers.json
    python benchmarks/rank_teachers.py --table    # print its tables"""
import json
from fastcore.script import call_parse
from fastai.vision.all import *
from cekd_fastai.all import *
from cekd_fastai.core import write_whole
from cekd_fastai.meal.rank import rank_teachers
from common import here,result_table,write_result # after fastai

runs = here.parent/'runs'/'rank_teachers'
archs = dict(resnet10t=dict(channels=(24,48,96,128)), test_resnet={}, test_efficientnet={})
backbone_lr = dict(resnet10t=3e-3, test_resnet=3e-3, test_efficientnet=8e-3)
pupil = 'test_resnet'
# architecture, epochs, label smoothing
teachers = {'resnet10t, 3 epochs':('resnet10t',3,0.), 'resnet10t, 8 epochs':('resnet10t',8,0.), 'resnet10t, 16 epochs':('resnet10t',16,0.),
    'resnet10t, 8 epochs, smoothing .2':('resnet10t',8,.2), 'test_resnet, 10 epochs':('test_resnet',10,0.), 'test_efficientnet, 10 epochs':('test_efficientnet',10,0.)}

def load(path, classes, seed=None):
    "Species of drawn birds; with a seed, a fifth of their training images is held out"
    return fine_grained_dls(path, size=56, bs=16, classes=classes, num_workers=0, in_memory=True, valid_pct=None if seed is None else .2, seed=seed or 0)

def drawn(n_species, n_images, n_train):
    "A folder of drawn birds"
    return make_birds(runs/f'birds{n_species}', n_species=n_species, n_images=n_images, n_train=n_train, size=64, progress=False, seed=7)

def backbone(arch, epochs):
    "Weights of an architecture trained on other species, made once"
    file = runs/f'backbone-{arch}-{epochs}.pth'
    if file.exists(): return file
    birds = drawn(24, 32, 30)
    set_seed(7)
    learn = branch_learner(load(birds, read_table(birds).classes[8:]), arch, 1, pretrained=False, arch_args=archs[arch], wd=.05)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, backbone_lr[arch])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, lambda p: torch.save(learn.model.state_dict(), p))
    return file

def fit(dls, arch, seed, epochs, a, cbs=(), **kwargs):
    "Train one network from the backbone of its architecture"
    set_seed(seed)
    args = archs[arch]|dict(num_classes=16)
    learn = branch_learner(dls, arch, 1, weights=backbone(arch, a.backbone_epochs), arch_args=args, wd=.05, cbs=list(cbs), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, a.lr)
    return learn

def tested(learn):
    "Accuracy on the test images"
    z,_,y = branch_preds(learn, dl=official_test_dl(learn.dls))
    return round((z.argmax(1)==y).float().mean().item(), 4)

columns = ['accuracy','ece','entropy','ratio','ratio all','agreement','multiply-adds (M)']

def tables(rows):
    "Every teacher with its numbers and its student, mean over the seeds, and the rank correlation of each column with the student"
    df = pd.DataFrame(rows)
    t = df[df.teacher!='labels']
    means = t.groupby('teacher', sort=False)[columns+['student']].mean()
    lines = [f"| teacher | {' | '.join(columns)} | **its student** |", '|---|'+'---|'*(len(columns)+1)]
    for k,r in means.iterrows(): lines.append(f"| {k} | {' | '.join(f'{r[c]:.3f}' if c!=columns[-1] else f'{r[c]:.0f}' for c in columns)} | {100*r.student:.1f} |")
    by_seed = {s:d.set_index('teacher') for s,d in t.groupby('seed')}
    corr = {c:[d[c].corr(d.student, method='spearman') for d in by_seed.values()] for c in columns}
    if len(by_seed)>1: corr = {c:[*v,means[c].corr(means.student, method='spearman')] for c,v in corr.items()}
    def cells(c): return ' | '.join(f'{o:+.2f}' for o in corr[c])
    names = [f'seed {s}' for s in by_seed]+['means over the seeds']*(len(by_seed)>1)
    lines2 = [f"| rank correlation with the student of | {' | '.join(names)} |", '|---|'+'---|'*len(names)]
    lines2 += [f'| {c} | {cells(c)} |' for c in columns]
    alone = df[df.teacher=='labels'].student
    base = f"\n\nThe same student by labels: {', '.join(f'{100*o:.1f}' for o in alone)} %." if len(alone) else ''
    return '\n'.join(lines),'\n'.join(lines2),base

def save(rows, a):
    first_,second,base = tables(rows)
    cmd = f'python benchmarks/rank_teachers.py --seeds {a.seeds} --epochs {a.epochs} --lr {a.lr} --backbone-epochs {a.backbone_epochs}'
    title = f'Six teachers of eight drawn species, each with a student of its own ({pupil}, {a.epochs} epochs)'
    write_result(a.name, title, cmd, rows, second+base+'\n\n'+first_)

def study(a):
    "All runs that the result file does not have yet"
    out = here/'results'/f'{a.name}.json'
    rows = json.loads(out.read_text())['runs'] if out.exists() else []
    have = {(r['seed'],r['teacher']) for r in rows}
    birds = drawn(8, 160, 60)
    for seed in range(a.seeds):
        if all((seed,k) in have for k in ['labels',*teachers]): continue
        dls,files = load(birds, None, seed+1),{}
        for k,(arch,epochs,smooth) in teachers.items():
            files[k] = runs/a.name/f'{k}-{seed}.pt'
            if files[k].exists(): continue
            loss = LabelSmoothingCrossEntropyFlat(eps=smooth) if smooth else CrossEntropyLossFlat()
            learn = fit(dls, arch, seed, epochs, a, loss_func=loss)
            save_net(learn.model, files[k], vocab=list(dls.vocab), mean=imagenet_stats[0], std=imagenet_stats[1])
            print(seed, k, tested(learn), flush=True)
        table = rank_teachers(dls, list(files.values()), dl=dls.valid)
        for k,file in files.items():
            if (seed,k) in have: continue
            learn = fit(dls, pupil, seed+100, a.epochs, a, [MEAL(file, taps=0, adversarial=None, T=3)])
            numbers = {c:round(float(v), 4) for c,v in table.loc[file.stem].items()}
            rows.append(dict(seed=seed, teacher=k, student=tested(learn), teacher_test=tested_file(file, dls), **numbers))
            print(rows[-1], flush=True)
            save(rows, a)
        if (seed,'labels') not in have:
            rows.append(dict(seed=seed, teacher='labels', student=tested(fit(dls, pupil, seed+100, a.epochs, a))))
            save(rows, a)
    print(*tables(rows), sep='\n\n')

def tested_file(file, dls):
    "Accuracy of a teacher on the test images"
    return round(rank_teachers(dls, [file], dl=official_test_dl(dls)).accuracy.iloc[0].item(), 4)

@call_parse
def main(
    seeds:int=1,      # Number of seeds, from 0
    epochs:int=6,     # Of every student
    lr:float=4e-3,    # Largest learning rate
    backbone_epochs:int=12, # Of each architecture on the other species
    name:str='rank_teachers', # Of the result file
    table:bool=False, # Print the tables instead
):
    "Measure teachers and their students, and collect the runs in benchmarks/results"
    a = SimpleNamespace(**locals())
    if table: print(result_table(name))
    else: study(a)
