"""The main job, `make train`: look-alikes of which there are few images, known by heart. Four ways to train a network, then a smaller one that it teaches.

    make train
    python benchmarks/synthetic.py --few --first 0 --seeds 5 # the same with more seeds: benchmarks/results/make_train.json

Each of 20 drawn species has four training images, so every way here knows nearly all of them in the end, as it does on real birds. As there, nobody starts from random
weights: a small backbone is trained first, on 28 *other* species, and all start from it and keep its statistics of batch normalisation, as `recommended` has it.
All have the rates and the decay of plain training. Two branches cost a little more for each image, and CEKD passes each image twice, clean and mixed, so they have fewer epochs.

The students are smaller and start from random weights. Three learn from labels: as they are, smoothed, and mixed by MixUp. Two learn from the outputs of the networks just trained (MEAL), with
no label at all: on the same images, and on these and others that nobody has labelled. What a teacher computes for a student counts, so the taught ones have fewer epochs; the training of the teachers
themselves, which are there anyway, does not."""
import json,multiprocessing as mp,signal,sys,time
from contextlib import redirect_stdout
from io import StringIO
from concurrent.futures import Future,process as pools # fastcore has a ProcessPoolExecutor of its own
from cekd_fastai import job # chkstyle: ignore; before fastai, whose import makes torch warn: this room filters the warning
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
from cekd_fastai.all import *
from cekd_fastai.core import one_sentence,write_whole
from cekd_fastai.results import evaluate,out_folder,save_run
from cekd_fastai.train import build,train
from collect import collect,defaults # after fastai, which has a `defaults` of its own
from common import here,over,paired,paired_table
from fine_tune import NoValid

runs = here.parent/'runs'
n_images,n_train,n_more = 40,4,30 # of a species: four of the first to train on, the others for the test; and images without labels
# timm's ResNet-10-T with narrow layers; half of the stem, which would otherwise take two thirds of the multiply-adds
net = dict(channels=(24,48,96,128), stem_width=16, num_classes=28)
small = dict(channels=(16,32,64,96), stem_width=16)
trunk,branch,student = 25.97,2.44,20.12 # million multiply-adds at 84 pixels, which are a crop from the 96 of the drawn birds
def values(net): return [f'{k}={v}' for k,v in net.items()]
common = dict(classes=20, arch='resnet10t', size=84, bs=16, wd=.05, in_memory=True)
smooth = dict(label_smoothing=.1)

known = dict(arch_args=values(net), lr=2e-3, freeze_bn=True)
ways = {'plain': dict(method='plain', n_branches=1), 'label smoothing': dict(method='plain', n_branches=1, **smooth),
    '2 branches, label smoothing': dict(method='plain', n_branches=2, **smooth),
    'CEKD + MixUp, label smoothing': dict(method='cekd', n_branches=2, mix='mixup', **smooth)}
recipe,cekd = '2 branches, label smoothing','CEKD + MixUp, label smoothing'

fresh = dict(arch_args=values(small), lr=1e-2, no_pretrained=True, n_branches=1)
outputs = ['T=4','taps=0'] # the softened outputs alone: neither feature maps nor discriminators
students = {'labels': dict(method='plain'), 'smoothed labels': dict(method='plain', **smooth), 'labels, MixUp': dict(method='plain', mix='mixup'),
    'MEAL by outputs': dict(method='meal', adversarial='none', method_args=outputs),
    f'MEAL by outputs, {20*n_more} images more': dict(method='meal', adversarial='none', method_args=[*outputs,'unlabeled=birds20_more'])}
teachers = recipe,cekd # one of them, drawn anew, in each step
taught = [k for k,m in students.items() if m['method']=='meal']
methods = {k:known|m for k,m in ways.items()} | {k:fresh|m for k,m in students.items()}
reported = (*teachers,taught[-1]) # these write a report and their network

def cost(name):
    "Multiply-adds of an image over those of plain training, or over those of a student by labels; without labels a batch has twice the images"
    m = methods[name]
    if name in taught: return (1+(trunk+2*branch)/(3*student))*(2 if 'unlabeled' in m['method_args'][-1] else 1)
    if name in students: return 1.
    return (trunk+m['n_branches']*branch)*(2 if m['method']=='cekd' else 1)/(trunk+branch)
def plain_epochs(name): return 100 if name in students else 50
def epochs_of(name):
    "Whole epochs for the multiply-adds of plain training, or of a student by labels"
    return round(plain_epochs(name)/cost(name))
def share(name):
    "Multiply-adds of a row over those of plain training, or of a student by labels"
    return epochs_of(name)*cost(name)/plain_epochs(name)

def all_birds():
    "Drawings of 48 species: 20 to tell apart, and 28 others for the backbone"
    return make_birds(runs/f'birds48_{n_train}', n_species=48, n_images=n_images, n_train=n_train, seed=7)

def more_birds():
    "Further drawings of the 20 species, whose labels nobody reads"
    return make_birds(runs/'birds20_more', n_species=20, n_images=n_more, n_train=n_more-1, seed=8)

def pretrained(
    file,     # Where its weights are, or will be
    dls,      # Makes the data of other species
    net,      # Arguments of the ResNet-10-T
    epochs,
    seed=7,
    cbs=None, # Callbacks of the training
):
    "File with the weights of a small network that knows other species, which is trained if the file is not there"
    if file.exists(): return file
    print('A backbone first, on 28 other species', flush=True)
    set_seed(seed)
    learn = branch_learner(dls(), 'resnet10t', 1, pretrained=False, arch_args=net, wd=.05, metrics=accuracy, cbs=ChannelsLast())
    quietly(learn, lambda: learn.fit_one_cycle(epochs, 3e-3), cbs)
    write_whole(file, lambda p: torch.save(learn.model.state_dict(), p))
    return file

def backbone(seed=0, epochs=12):
    "Weights of a small network that knows the 28 other species, made once for each seed; nothing is tested on these, so it learns from all of their images"
    def dls():
        t = read_table(all_birds())
        t = t.subset(t.classes[20:])
        rest = ImageTable(t.files, t.labels, [i%n_images==0 for i in range(len(t))], classes=t.classes, root=t.root) # a table needs some to validate on
        return fine_grained_dls(rest, size=common['size'], bs=16, in_memory=True)
    return pretrained(runs/f'front_backbone{seed}.pth', dls, net, epochs, 7+seed, NoValid())

class Seldom(Callback):
    "Validate twice in a training, for the curves of a report; the record has no numbers (NaN) of other epochs"
    order = -100
    def before_validate(self):
        if (self.epoch+1)*2%self.n_epoch>1: raise CancelValidException
    def after_cancel_validate(self): self.learn.recorder.log += [math.nan]*(1+len(self.learn.metrics))

def quietly(learn, f, cb):
    "The result of `f` with a callback, without a progress bar and a line for each epoch"
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cb): return f()

def out_of(k, seed): return runs/'make_train'/f'{k.replace(" ", "")}-{seed}'

def job(k, seed):
    "Arguments of a row, as for `cekd_train`"
    return defaults | common | methods[k] | dict(epochs=epochs_of(k), seed=seed, data=str(all_birds()), out=str(out_of(k, seed)))

def network(k, seed):
    "The network of a row, which is trained if it is not there"
    file = out_of(k, seed)/'model.pt'
    if not file.exists(): run(job(k, seed))
    return str(file)

def with_files(args):
    "The arguments with the files that a row begins with: weights, or teachers and images without labels"
    if not args['no_pretrained']: return args | dict(weights=str(backbone(args['seed'])))
    if args['method']!='meal': return args
    own = [o.replace('=birds20_more', f'={more_birds()}/images') for o in args['method_args']]
    return args | dict(method_args=own, teachers=[network(k, args['seed']) for k in teachers])

def run(args):
    "Train one row, write its report and network if that is asked for, and read the training images too"
    args = with_files(args)
    with redirect_stdout(StringIO()): # progress of what takes a second, and the names of new heads
        learn = build(args)
        secs = quietly(learn, lambda: train(learn, args), Seldom()) # in every run, since a validation draws random numbers
        if args['out'] in [str(out_of(k, args['seed'])) for k in reported]:
            with out_folder(args['out'], True) as out: res = save_run(learn, out, args, secs)
        else: res = evaluate(learn)[0] | dict(seconds=round(secs, 1))
        res['train'] = float(learn.validate(ds_idx=0)[1])
    return res

def table_of(rows):
    "A table of the ways and one of the students, each row with its gain over the first one of the same seed"
    return '\n\n'.join(paired_table(rows, {k:epochs_of(k) for k in o}, {k:share(k) for k in o}, base=first(o)) for o in (ways,students))

def seeds_table(names, seeds):
    "The tables of the result file, after training what is missing from it"
    title = f"Few images of look-alikes: 20 species of drawn birds, {n_train} training images of each, {common['size']} px, {20*(n_images-n_train)} test images. " + \
        "First a small ResNet that knows 28 other species; then a smaller one from random weights, by labels or by the outputs of two networks above. Equal multiply-adds, with those of teachers"
    labels = {k:methods[k] | dict(epochs=epochs_of(k)) for k in names}
    args = common | dict(data=str(all_birds()))
    command = f'python benchmarks/synthetic.py --few --first 0 --seeds {1+max(seeds)}'
    # a seed is the whole job once more, its backbone too
    return table_of(collect('make_train', labels, args, seeds, command, title, hide=['data'], table=table_of, run=run))

def kept_rows():
    "Runs of the committed result file"
    return json.loads((here/'results'/'make_train.json').read_text())['runs']

def against(gain):
    "In words, whether paired differences are above or below nothing: by two standard errors or more"
    m,se = np.mean(gain),np.std(gain, ddof=1)/len(gain)**.5
    return 'above' if m>2*se else 'below' if m<-2*se else 'level with'

def gains(kept, names):
    "In words, what rows have over the first of them in the committed seeds"
    base,*others = names
    gain = paired(kept, base)
    return '; '.join(f'{k} {over(gain[k])}, {against(gain[k])} it' for k in others)

def closing(rows, kept):
    "What was gained over what, for which compute: by the run at hand, and by the committed seeds"
    acc = {r['method']:100*r['accuracy'] for r in rows}
    alone,more = taught
    gain = paired(kept, 'labels')
    best = max((k for k in gain if k in students and k not in taught), key=lambda k: np.mean(gain[k]))
    def now(k): return f'{acc[k]:.1f} ({acc[k]-acc["labels"]:+.1f})'
    n = len({r['seed'] for r in kept})
    controls = [f'{against(g)} {k} ({over(g)})' for k in ways if k not in ('plain',cekd) for g in [paired(kept, k)[cekd]]]
    return [f'This run: a small student that starts from random weights has {acc["labels"]:.1f} % by the labels of its {20*n_train} images, {now("smoothed labels")} by smoothed labels. '
        f'By the outputs of two networks above, on the same images, without their labels, and for the same multiply-adds: {now(alone)}. '
        f'With {20*n_more} images more, which nobody has labelled: {now(more)}.',
        f'Over {n} seeds, each with a backbone of its own, in points over labels of the same seed ± standard error, two of which count as a difference: {gains(kept, students)}. '
        f'{alone} over {best}, the best by labels: {over(paired(kept, best)[alone])}.',
        f'The networks above, in points over plain training: {gains(kept, ways)}. CEKD, which passes each image clean and mixed and so has {epochs_of(cekd)} epochs instead of {plain_epochs(cekd)}, '
        f'beside its controls: {" and ".join(controls)}.',
        'The networks above began at a backbone that knows 28 other species, and what it took to train them is not in the multiply-adds of a student.',
        'On photographs of birds label smoothing and a second branch gain two to four points in twenty epochs (in six or eight nothing), '
        'and a student with strong teachers nine to ten over labels, seven to eight over smoothed ones: benchmarks/README.md.']

def _start(threads):
    "A process that trains has its share of the cores, and Ctrl-C ends it without a word"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)

class InTurn:
    "An executor that does at once what is submitted"
    def submit(self, f, *args):
        res = Future()
        res.set_result(f(*args))
        return res

@contextmanager
def executor(n):
    "`n` processes side by side, since so small a network makes poor use of two cores; or this process"
    if n<2:
        yield InTurn()
        return
    with pools.ProcessPoolExecutor(n, mp.get_context('spawn'), _start, (max(1, num_cpus()//n),)) as ex:
        try: yield ex
        except pools.BrokenProcessPool as e:
            raise OSError('A process that trains was killed, often for want of memory: close other programs, and start again.') from e
        except BaseException:
            for p in mp.active_children(): p.terminate()
            raise

def results(ex, seed):
    "`(row, result)` of each row; the backbone comes before the ways, and the teachers before those they teach"
    def start(names): return {k:ex.submit(run, job(k, seed)) for k in names}
    def ended(futures): return ((k,f.result()) for k,f in futures.items())
    ready = ex.submit(backbone, seed)
    alone = start([k for k in students if k not in taught]) # need no backbone
    ready.result()
    teach,rest = start(teachers),start([k for k in ways if k not in teachers])
    yield from ended(alone)
    yield from ended(teach)
    last = start(taught)
    yield from ended(rest)
    yield from ended(last)

def main(seed=0):
    "Train the four ways and the students, and print their tables and what they mean"
    start,rows = time.time(),[]
    all_birds(), more_birds()
    print(f'The birds are drawn ({time.time()-start:.0f} s). Four ways to train on {20*n_train} images of 20 species, and five students:', flush=True)
    with executor(1 if torch.cuda.is_available() else min(2, num_cpus())) as ex:
        for k,res in results(ex, seed):
            rows.append(dict(method=k, seed=seed, **res))
            print(f'{k}: {100*res["accuracy"]:.1f} % after {res["seconds"]:.0f} s of training', flush=True)
    print(f'\n20 species of drawn birds, {n_train} training images of each, {20*(n_images-n_train)} test images, seed {seed} ({time.time()-start:.0f} s in all):\n')
    print(table_of(rows), *closing(rows, kept_rows()), sep='\n\n')
    print(f'\nReports and models: {runs/"make_train"}. How this set was chosen, and the same on photographs: benchmarks/README.md.')

if __name__=='__main__':
    try: main()
    except (ValueError,OSError) as e: sys.exit(f'make train: {one_sentence(e)}')
    except KeyboardInterrupt: sys.exit(130)
