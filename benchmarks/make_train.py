"""The main job, `make train`: look-alikes of which there are few images, known by heart, four ways for the same multiply-adds.

    make train
    python benchmarks/synthetic.py --few --first 0 --seeds 5 # the same with more seeds: benchmarks/results/make_train.json

Each of 20 drawn species has four training images, so every way here knows them all in the end, as it does on real birds. As there, nobody starts from random
weights: a small backbone is trained first, on 28 *other* species, and all start from it and keep its statistics of batch normalisation, as `recommended` has it.
All have the rates and the decay of plain training. Two branches cost a little more for each image, and CEKD passes each image twice, clean and mixed, so they have fewer epochs."""
import json,multiprocessing as mp,signal,sys,time
from concurrent.futures import process as pools # fastcore has a ProcessPoolExecutor of its own
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
n_images,n_train = 40,4 # of a species: four to train on, the others for the test
# timm's ResNet-10-T with narrow layers; half of the stem, which would otherwise take two thirds of the multiply-adds
net = dict(channels=(24,48,96,128), stem_width=16, num_classes=28)
trunk,branch = 25.97,2.44 # million multiply-adds at 84 pixels, which are a crop from the 96 of the drawn birds
common = dict(classes=20, arch='resnet10t', arch_args=[f'{k}={v}' for k,v in net.items()], size=84, bs=16, epochs=80, lr=2e-3, wd=.05, freeze_bn=True, in_memory=True)
smooth = dict(label_smoothing=.1)
methods = {'plain': dict(method='plain', n_branches=1), 'label smoothing': dict(method='plain', n_branches=1, **smooth),
    '2 branches, label smoothing': dict(method='plain', n_branches=2, **smooth),
    'CEKD + MixUp, label smoothing': dict(method='cekd', n_branches=2, mix='mixup', **smooth)}
recipe,cekd = '2 branches, label smoothing','CEKD + MixUp, label smoothing'

def cost(name):
    "Multiply-adds of an image over those in plain training"
    m = methods[name]
    return (trunk+m['n_branches']*branch)*(2 if m['method']=='cekd' else 1)/(trunk+branch)
def epochs_of(name):
    "Whole epochs for the multiply-adds of plain training"
    return round(common['epochs']/cost(name))
def share(name):
    "Multiply-adds of a way over those of plain training"
    return epochs_of(name)*cost(name)/common['epochs']

def all_birds():
    "Drawings of 48 species: 20 to tell apart, and 28 others for the backbone"
    return make_birds(runs/f'birds48_{n_train}', n_species=48, n_images=n_images, n_train=n_train, seed=7)

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
    "Validate four times in a training, for the curves of a report; the record has no numbers (NaN) of other epochs"
    order = -100
    def before_validate(self):
        if (self.epoch+1)*4%self.n_epoch>3: raise CancelValidException
    def after_cancel_validate(self): self.learn.recorder.log += [math.nan]*(1+len(self.learn.metrics))

def quietly(learn, f, cb):
    "The result of `f` with a callback, without a progress bar and a line for each epoch"
    with learn.no_bar(), learn.no_logging(), learn.added_cbs(cb): return f()

def run(args):
    "Train one way, write its report and model where `args` has a folder for them, and read the training images too"
    learn = build(args)
    secs = quietly(learn, lambda: train(learn, args), Seldom()) # in every run, since a validation draws random numbers
    if args['out']:
        with out_folder(args['out'], True) as out: res = save_run(learn, out, args, secs)
    else: res = evaluate(learn)[0] | dict(seconds=round(secs, 1))
    with learn.no_bar(), learn.no_logging(): res['train'] = float(learn.validate(ds_idx=0)[1])
    return res

def table_of(rows):
    "One line for each way, with its gain over plain training of the same seed"
    return paired_table(rows, {k:epochs_of(k) for k in methods}, {k:share(k) for k in methods})

def seeds_table(names, seeds):
    "The table of the result file, after training what is missing from it"
    title = f"Few images of look-alikes: 20 species of drawn birds, {n_train} training images of each, {common['size']} px, " + \
        f"{20*(n_images-n_train)} test images, a small ResNet that knows 28 other species, equal multiply-adds"
    labels = {k:methods[k] | dict(epochs=epochs_of(k)) for k in names}
    args = common | dict(data=str(all_birds()))
    command = f'python benchmarks/synthetic.py --few --first 0 --seeds {1+max(seeds)}'
    rows = collect('make_train', labels, args, seeds, command, title, hide=['data'], table=table_of,
        run=lambda o: run(o | dict(out=None, weights=str(backbone(o['seed']))))) # a seed is the whole job once more, its backbone too
    return table_of(rows)

def kept_rows():
    "Runs of the committed result file"
    return json.loads((here/'results'/'make_train.json').read_text())['runs']

def against(gain):
    "In words, whether paired differences are above or below nothing: by two standard errors or more"
    m,se = np.mean(gain),np.std(gain, ddof=1)/len(gain)**.5
    return 'above' if m>2*se else 'below' if m<-2*se else 'level with'

def closing(rows, kept):
    "What was gained over what, for which compute: by the run at hand, and by the committed seeds"
    acc = {r['method']:100*r['accuracy'] for r in rows}
    now = lambda k: f'{acc[k]-acc["plain"]:+.1f}'
    gain = paired(kept)
    n = len({r['seed'] for r in kept})
    per = [f'{k} {over(v)}, {against(v)} it' for k,v in gain.items()]
    controls = [f'{against(g)} {k} ({over(g)})' for k in methods if k not in ('plain',cekd) for g in [paired(kept, k)[cekd]]]
    return [f'This run: two branches with label smoothing, which `recommended` gives, have {acc[recipe]:.1f} % where plain training has {acc["plain"]:.1f}: '
        f'{now(recipe)} points for {share(recipe):.2f} times its multiply-adds. Label smoothing alone: {now("label smoothing")}. '
        f'CEKD, which passes each image clean and mixed and so has {epochs_of(cekd)} epochs instead of {common["epochs"]}: {now(cekd)}.',
        f'Over {n} seeds, each with a backbone of its own, in points over plain training of the same seed ± standard error, two of which count as a difference: {"; ".join(per)}.',
        f'CEKD beside its controls: {" and ".join(controls)}. On photographs of birds label smoothing and a second branch gain two to four points: benchmarks/README.md.']

def _start(threads):
    "A process that trains has its share of the cores, and Ctrl-C ends it without a word"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)

def run_all(jobs, n):
    "Results of `run` for each of `jobs`, in order, in `n` processes side by side: so small a network makes poor use of two cores"
    if n<2:
        yield from map(run, jobs)
        return
    with pools.ProcessPoolExecutor(n, mp.get_context('spawn'), _start, (max(1, num_cpus()//n),)) as ex:
        try: yield from ex.map(run, jobs)
        except pools.BrokenProcessPool as e:
            raise OSError('A process that trains was killed, often for want of memory: close other programs, and start again.') from e
        except BaseException:
            for p in mp.active_children(): p.terminate()
            raise

def main(seed=0):
    "Train the four ways, and print their table and what it means"
    start,rows = time.time(),[]
    args = defaults | common | dict(data=str(all_birds()), weights=str(backbone(seed)), seed=seed)
    print(f'Birds and backbone are there ({time.time()-start:.0f} s). Four ways to train, each on {20*n_train} images of 20 species:', flush=True)
    def out(k): return str(runs/'make_train'/k.replace(' ', '')) if k in (recipe,cekd) else None
    jobs = [args | m | dict(epochs=epochs_of(k), out=out(k)) for k,m in methods.items()]
    n = 1 if torch.cuda.is_available() else min(2, num_cpus())
    for k,res in zip(methods, run_all(jobs, n)):
        rows.append(dict(method=k, seed=seed, **res))
        print(f'{k}: {100*res["accuracy"]:.1f} % after {res["seconds"]:.0f} s of training', flush=True)
    print(f'\n20 species of drawn birds, {n_train} training images of each, {20*(n_images-n_train)} test images, seed {seed} ({time.time()-start:.0f} s in all):\n')
    print(table_of(rows), *closing(rows, kept_rows()), sep='\n\n')
    print(f'\nReports and models: {runs/"make_train"}. How this set was chosen, and the same on photographs: benchmarks/README.md.')

if __name__=='__main__':
    try: main()
    except (ValueError,OSError) as e: sys.exit(f'make train: {one_sentence(e)}')
    except KeyboardInterrupt: sys.exit(130)
