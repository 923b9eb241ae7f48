"""The recommended recipe beside fastai's `fine_tune`: the same network, weights, statistics and picture size, at equal compute.

    python benchmarks/fine_tune.py --data-dir DIR --stage select # rate of `fine_tune`, frozen norms and soft targets, on a fifth of 50 birds' training images
    python benchmarks/fine_tune.py --data-dir DIR --which flowers # 12 flowers; also birds50 and birds200
    python benchmarks/fine_tune.py --data-dir DIR --stage time   # steps of both sides in turns, and how pictures are loaded
    python benchmarks/fine_tune.py --stage table

DIR holds `CUB_200_2011`, `oxford-flowers17-12classes` and `weights/efficientnet_lite0.pth`, as folders or as `.tgz` of these names.
`fine_tune` is written as a fastai user writes it: pictures scaled and cropped to 160 pixels, `aug_transforms`, `vision_learner`,
`fine_tune(epochs)`. A step is a forward and a backward pass; the epoch with a frozen body counts two thirds, since its norms are
trained and the gradient passes the whole body. The recipe here has as many *whole* epochs as fit into the same multiply-adds.
Both sides use `ChannelsLast`, which changes the speed alone. The test part is read once, after the last epoch. A finished run
is in the result file at once, and a second start goes on there."""
import json,os,statistics,tarfile,time
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from fastcore.script import call_parse
from cekd_fastai.all import *
from cekd_fastai.data.benchmarks import read_table
from common import here,write_result # after fastai

arch,size,bs = 'tf_efficientnet_lite0',96,32
trunk,branch = 44.7,25.9 # million multiply-adds of a forward pass at 96 pixels
# Epochs of `fine_tune` after the frozen one, and classes
birds = dict(data='CUB_200_2011', classes=50, epochs=8, title='50 birds')
sets = dict(flowers=dict(data='oxford-flowers17-12classes', classes=None, epochs=5, title='12 flowers'), birds50=birds,
    birds200=birds|dict(classes=None, epochs=5, title='200 birds'), birds50_long=birds|dict(epochs=27, title='50 birds, long'))

# What is compared. `recommended` is two branches with label smoothing as `recommended(arch).learner(dls)` gives them. `fastai` says which part of the recipe a fastai user's code has taken over
methods = {'fine_tune': dict(fastai=()), 'recommended': dict(branches=2, recommended=True),
    'recommended, norms trained': dict(branches=2, recommended=True, freeze_bn=False), 'recommended, stored targets': dict(branches=2, recommended=True, stored=True),
    'recommended, online label smoothing': dict(branches=2, recommended=True, online=True), 'fine_tune, rate chosen': dict(fastai=(), chosen=True),
    'plain': dict(branches=1), 'label smoothing': dict(branches=1, smooth=.1),
    '2 branches': dict(branches=2), '2 branches, label smoothing': dict(branches=2, smooth=.1),
    'SnapMix': dict(branches=1, mix=True, passes=7/6), 'CEKD + SnapMix, label smoothing': dict(branches=2, smooth=.1, mix=True, cekd=True, passes=1.5)}
# Half of the batches are mixed. For these SnapMix looks at the clean images once, a third of a step, and CEKD trains on them too, a whole step
# Where the difference comes from. Of a timm model `fine_tune` makes two groups, and its body learns at the rate over `lr_mult`, 100
stairs = {'fine_tune, lr_mult=1': dict(fastai=(), mult=1), 'fine_tune, crops and flips only': dict(fastai=('loader',)), '... and kept statistics of norms': dict(fastai=('loader','norms')),
    '... and all layers from the first epoch': dict(fastai=('loader','norms','whole'))}
user_rates = [2e-3,5e-3,1e-2] # of `fine_tune`: the default first
rate = 1e-3 # of the recipe, ten times as much for heads: near the best on held-out images of 100 birds (cekd/results/birds.jsonl)

def find(folder, name):
    "A data set or the weights in `folder`, unpacked into runs/data where only the archive is there"
    if (Path(folder)/name).exists(): return Path(folder)/name
    pack = Path(folder)/('weights-efficientnet-lite.tgz' if name=='weights' else f'{name}.tgz')
    if not pack.exists(): raise SystemExit(f'fine_tune: neither {name} nor {pack.name} is in {folder}: pass the folder that has it as --data-dir.')
    out = here.parent/'runs'/'data'
    if not (out/name).exists():
        with tarfile.open(pack) as f: f.extractall(out, filter='data')
    return out/name

def user_dls(table, size=size, whole=160, stats=None):
    "Loaders as a fastai user writes them, with the split of the table; `vision_learner` adds the statistics of pretrained weights"
    valid = set(np.array(table.files, dtype=object)[table.is_valid])
    files = lambda t: [f for f,o in zip(t.files, t.is_test) if not o]
    block = DataBlock((ImageBlock,CategoryBlock), get_items=files, get_y=parent_label, splitter=FuncSplitter(lambda f: f in valid),
        item_tfms=Resize(whole), batch_tfms=aug_transforms(size=size, min_scale=.75)+([Normalize.from_stats(*stats)] if stats else []))
    return block.dataloaders(table, bs=bs, num_workers=0)

def keep_norms(model):
    "Let norms in training mode use, and keep, the statistics that they have"
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()

class KeepNorms(Callback):
    "Norms keep their statistics, also those whose weights are trained; fastai's `BnFreeze` leaves these alone, and `vision_learner` trains all"
    run_after = TrainEvalCallback
    def before_train(self): keep_norms(self.learn.model)

class NoValid(Callback):
    "No validation during training"
    order = -100
    def before_validate(self): raise CancelValidException

def make(s, m, seed, folder, held_out):
    "The learner of a method"
    source,weights = find(folder, s['data']),find(folder, 'weights')/'efficientnet_lite0.pth'
    split = dict(classes=s['classes'], valid_pct=.2, seed=seed) if held_out else dict(classes=s['classes'])
    own = m.get('fastai')
    set_seed(seed)
    if own==(): dls = user_dls(read_table(source, **split))
    else: dls = fine_grained_dls(source, size=size, bs=bs, stats=arch, in_memory=True, **split)
    set_seed(seed)
    if 'recommended' in m:
        freeze = m.get('freeze_bn', True)
        cbs = [ChannelsLast()]+[MixUp(prob=.6),StoredTargets()]*('stored' in m)+[OnlineLabelSmoothing()]*('online' in m)
        own = dict(loss_func=CrossEntropyLossFlat()) if 'online' in m else {} # which has soft labels of its own
        return recommended(arch).learner(dls, pretrained=False, weights=weights, freeze_bn=freeze, metrics=accuracy, cbs=cbs, **own)
    if own is None:
        loss = CrossEntropyLossFlat() if not m.get('smooth') else LabelSmoothingCrossEntropyFlat(eps=m['smooth'])
        return branch_learner(dls, arch, m['branches'], pretrained=False, weights=weights, freeze_bn=True, loss_func=loss,
            metrics=accuracy, cbs=[ChannelsLast()]+[SnapMix(prob=.5)]*('mix' in m)+[CEKD()]*('cekd' in m))
    cbs = [ChannelsLast()]+[KeepNorms()]*('norms' in own)
    return vision_learner(dls, arch, metrics=accuracy, pretrained_cfg_overlay=dict(file=str(weights)), cbs=cbs)

def cost(m):
    "Multiply-adds of an epoch of the recipe over those of an epoch of `fine_tune`"
    return m.get('passes', 1)*(trunk+m['branches']*branch)/(trunk+branch)

def epochs_of(m, E):
    "Whole epochs within the multiply-adds of one frozen and `E` further epochs of `fine_tune`"
    return int((E+2/3)/cost(m)) if m.get('fastai') is None else E

def compute(m, E):
    "Multiply-adds of a run over those of `fine_tune`"
    if m.get('fastai') is None: share = epochs_of(m, E)*cost(m)
    else: share = E+(0 if 'whole' in m['fastai'] else 2/3)
    return share/(E+2/3)

def is_fair(m, E):
    "Whether whole epochs of a row come close to the multiply-adds of `fine_tune`; other rows are not run"
    return compute(m, E)>.8

def fit(learn, m, E, lr):
    own = m.get('fastai')
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(NoValid()):
        if 'recommended' in m: return learn.fit_one_cycle(epochs_of(m, E)) # its rates are in `learn.lr`
        if own is None:
            n = len(learn.splitter(learn.model))
            return learn.fit_one_cycle(epochs_of(m, E), [lr]*(n-1)+[10*lr])
        if 'whole' not in own: return learn.fine_tune(E, lr, lr_mult=m.get('mult', 100))
        learn.unfreeze()
        learn.fit_one_cycle(E, [lr,10*lr])

def one_run(name, m, key, seed, folder, lr, held_out=False):
    "Train, then read the test part once"
    s = sets[key]
    learn,start = make(s, m, seed, folder, held_out),time.time()
    fit(learn, m, s['epochs'], lr)
    secs = time.time()-start
    with learn.no_bar(), learn.no_logging(): acc = float(learn.validate()[1])
    return dict(set=key, stage='select' if held_out else 'final', method=name, seed=seed, rate=lr, epochs=epochs_of(m, s['epochs']),
        compute=round(compute(m, s['epochs']), 3), accuracy=round(acc, 5), images=len(learn.dls.valid_ds), seconds=round(secs, 1))

def best(rows):
    "The rate of `fine_tune` that was best on held-out training images; the default where nothing was chosen"
    runs = {r['rate']:r['accuracy'] for r in rows if r['stage']=='select' and r['method']=='fine_tune'}
    return max(runs, key=runs.get) if runs else user_rates[0]

def select_table(rows):
    "One line a method, rate and number of epochs, with every fifth that was held out"
    got = {}
    for r in rows:
        if r['stage']=='select': got.setdefault((r['method'],r['rate'],r['epochs']), {})[r['seed']] = f"{100*r['accuracy']:.1f}"
    lines = ['| 50 birds, held-out fifth of train | rate | epochs | accuracy % |','|---|---|---|---|']
    return lines + [f"| {m} | {lr:g} | {n} | {', '.join(d[o] for o in sorted(d))} |" for (m,lr,n),d in got.items()]

def final_table(rows):
    "One line a set and method, with every seed and the difference from `fine_tune` of the same seed"
    lines = ['| data | method | epochs | multiply-adds | accuracy % | each seed | over fine_tune |','|---|---|---|---|---|---|---|']
    for key,s in sets.items():
        got = [r for r in rows if r['stage']=='final' and r['set']==key]
        base = {r['seed']:r['accuracy'] for r in got if r['method']=='fine_tune'}
        for name in {**methods,**stairs}:
            d = sorted((r for r in got if r['method']==name), key=lambda r: r['seed'])
            if not d: continue
            acc = pd.Series([100*r['accuracy'] for r in d])
            gain = pd.Series([100*(r['accuracy']-base[r['seed']]) for r in d if r['seed'] in base])
            pm = lambda o: f'{o.mean():.1f}' + (f' ± {o.std()/len(o)**.5:.1f}' if len(o)>1 else '')
            more = '' if name=='fine_tune' or not len(gain) else ('+' if gain.mean()>0 else '')+pm(gain)
            frozen = '' if compute({**methods,**stairs}[name], s['epochs'])!=1 else '1 + '
            lines.append(f"| {s['title']} | {name} | {frozen}{d[0]['epochs']} | {d[0]['compute']:.2f} | {pm(acc)} | {', '.join(f'{o:.1f}' for o in acc)} | {more} |")
    return lines

def time_table(rows):
    lines = ['| a step of | ms of training | ms with loading | over fine_tune |','|---|---|---|---|']
    return lines + [f"| {r['step']} | {r['train']:.0f} | {r['all']:.0f} | {r['share']:.2f} |" for r in rows]

def write_tables(rows, stage):
    "The result file of a stage; with `table`, of both"
    what = 'EfficientNet-Lite0 from ImageNet weights, 96 px'
    chosen,final = ([r for r in rows if r['stage']==o] for o in ('select','final'))
    command = 'python benchmarks/fine_tune.py'
    if chosen and stage!='final': write_result('fine_tune_select', f'Choices on held-out training images: {what}', f'{command} --stage select', chosen, select_table(rows))
    if not final or stage=='select': return
    had = ','.join(k for k in sets if any(r['set']==k for r in final))
    command += f" --which {had} --seeds {1+max(r['seed'] for r in final)}" + ' --stair'*any(r['method'] in stairs for r in final)
    write_result('fine_tune', f'The recipe beside fine_tune at equal compute, official test parts: {what}', command, final, final_table(rows))

def times(folder, rounds):
    "Steps of both sides in turns: medians of training alone, and with the loading of the batch"
    s,runs,two = sets['birds50'],{},'2 branches, label smoothing'
    who = {'fine_tune, frozen body': ('fine_tune',True)} | {k: (k,False) for k in ('fine_tune','plain',two)}
    for k,(name,frozen) in who.items():
        learn = make(s, methods[name], 0, folder, True)
        learn.freeze() if frozen else learn.unfreeze()
        learn.model.train()
        if methods[name].get('fastai') is None: keep_norms(learn.model)
        learn.create_opt()
        learn.model.to(memory_format=torch.channels_last)
        runs[k] = dict(learn=learn, it=iter(learn.dls.train), train=[], all=[])
    for i in range(rounds+1):
        for r in runs.values():
            t0 = time.perf_counter()
            x,y = next(r['it'])
            x = x.contiguous(memory_format=torch.channels_last)
            t1 = time.perf_counter()
            learn = r['learn']
            out = learn.model(x)
            each = [out] if isinstance(out, Tensor) else out[0] # a network with branches gives the logits of each, then features
            sum(learn.loss_func(o, y) for o in each).backward()
            learn.opt.step()
            learn.opt.zero_grad()
            t2 = time.perf_counter()
            if not i: continue # the first round warms up
            r['train'].append(1000*(t2-t1))
            r['all'].append(1000*(t2-t0))
    rows = [dict(step=k, train=statistics.median(r['train']), all=statistics.median(r['all'])) for k,r in runs.items()]
    ref = next(r['all'] for r in rows if r['step']=='fine_tune')
    for r in rows: r['share'] = r['all']/ref
    title = f'A step of either side, batches of 32 at 96 px, in turns; medians of {rounds}, one thread of a busy machine'
    write_result('fine_tune_time', title, 'python benchmarks/fine_tune.py --stage time', rows, time_table(rows))
    print('\n'.join(time_table(rows)))

@call_parse
def main(
    data_dir:str=os.environ.get('CEKD_DATA', '.'), # Folder with data and weights
    stage:str='final', # select, final, time or table
    which:str='flowers,birds50,birds200', # Which data, with commas
    only:str=None, # Names of methods, with semicolons; all if None
    seeds:int=3,   # Number of seeds, from 0
    first:int=0,   # The first seed
    stair:bool=False, # Also the stairs from `fine_tune` to the recipe
    rounds:int=15, # Of `time`
    minutes:float=1e9, # Start no run after this time
):
    "Run what is missing of a stage, then write its table"
    torch.set_num_threads(1)
    begin = time.time()
    files = [here/'results'/f'{o}.json' for o in ('fine_tune_select','fine_tune')]
    rows = [r for f in files if f.exists() for r in json.loads(f.read_text())['runs']]
    done = {(r['set'],r['stage'],r['method'],r['seed'],r['rate']) for r in rows}
    def run(name, m, key, seed, lr, held_out=False):
        if (key,'select' if held_out else 'final',name,seed,lr) in done or time.time()-begin>60*minutes: return
        row = one_run(name, m, key, seed, data_dir, lr, held_out)
        rows.append(row)
        write_tables(rows, stage)
        print(f"{key}, {name}, seed {seed}, rate {lr:g}: {row['accuracy']:.1%} in {row['seconds']:.0f} s", flush=True)
    if stage=='time': return times(data_dir, rounds)
    if stage=='select':
        for lr in user_rates: run('fine_tune', methods['fine_tune'], 'birds50', 0, lr, True)
        for o in ('recommended','recommended, norms trained','recommended, stored targets'): run(o, methods[o], 'birds50', 0, rate, True)
        for seed in range(first, seeds):
            for o in ('recommended','recommended, online label smoothing'): run(o, methods[o], 'birds50', seed, rate, True)
            for o in ('recommended, stored targets','recommended','recommended, online label smoothing'): run(o, methods[o], 'birds50_long', seed, rate, True)
    if stage=='final':
        for key in which.split(','):
            for seed in range(first, seeds):
                for name,m in {**methods, **(stairs if stair else {})}.items():
                    if only and name not in only.split(';'): continue
                    if not is_fair(m, sets[key]['epochs']): continue
                    own = m.get('fastai')
                    lr = best(rows) if m.get('chosen') else user_rates[0]
                    if m.get('chosen') and lr==user_rates[0]: continue # it is the default
                    run(name, m, key, seed, rate if own is None or 'whole' in own else lr)
    write_tables(rows, stage)
    print('\n'.join([*select_table(rows),'',*final_table(rows)]))
