"""Real birds, whole network: what each method is worth when plain training knows its training images by heart.

    python benchmarks/cekd/birds.py prepare --data-dir DIR --bundle BUNDLE
    python benchmarks/cekd/birds.py run --bundle BUNDLE --out OUT --seconds 500
    python benchmarks/cekd/birds.py table --out OUT
    python benchmarks/cekd/birds.py run --bundle BUNDLE --out OUT --config birds200 # all 200 species, a step of the kit in benchmarks/gpu

`prepare` puts pictures, weights and the package into one folder, for a machine without network; DIR holds `CUB_200_2011.tgz` and
`weights-efficientnet-lite.tgz`. `run` chooses settings on a held-out part of train, then reads the official test part; it goes on from
`birds.jsonl` in OUT and in BUNDLE, and ends when the time is up. On processors a run that was ended goes on at
its last epoch, which lies in `killed` in OUT; frozen norms are computed there within their convolutions (`folded.py`), which gives
the same function faster. `table` writes tables and figure from the rows.

`birds.json` says what is run, in which order, and by which rule settings are chosen. One pass is one image forward and backward through
the network. *Equal compute*, in tables *equal passes*: every method has the passes of plain training, so one that runs clean and mixed images has half the epochs.
*Equal epochs*: such a method has all the epochs, and twice the passes. *Double compute*: one without a clean pass, with twice the passes.
SnapMix's look at the unmixed image adds a third of a pass, and a second branch less than one; neither is counted as a pass: the table says
what by multiply-adds. Runs of one seed begin at the same weights and see the same crops in the same order. The test part is read once,
after the last epoch of a run of the stage `final`. Seconds are those of a run beside those of the other processes."""
import sys,time
from pathlib import Path
from fastcore.script import call_parse
from birds_bundle import prepare
from birds_plan import each_study,read_config
from birds_queue import run
from birds_tables import table

here = Path(__file__).resolve().parent

@call_parse
def main(
    stage:str, # prepare, run or table
    bundle:str='birds', # Folder with pictures, weights and code
    out:str=str(here/'results'), # Folder of the rows
    data_dir:str='.', # Folder with the packed data set and weights
    seconds:float=1e9, # End after this time
    device:str='cuda', # Or cpu
    workers:int=None, # Processes
    classes:int=None, # Fewer classes, to try it out
    epochs:int=None, # These epochs, to try it out
    precision:str=None, # bf16: mixed precision; without, TF32 on a GPU and full precision on processors
    only:str=None, # Rows of the stage `final`, separated by semicolons; all if None
    config:str='birds', # The study: birds, birds_search, birds160, birds200, birds_random, meal50, cifar, or several in one queue: long, seeds
):
    "Prepare, run or show the study on real birds"
    if precision not in (None,'bf16'): sys.exit(f'birds: --precision is {precision!r}, but it is bf16 or left out.')
    begin,c = time.time(),read_config(config)
    for o in each_study(c).values():
        if precision: o['precision'] = c['precision'] = precision
        if only: o['only'] = only.split(';')
        if classes: o['classes'] = classes
        if epochs: o['epochs'] = o['epochs']|{'from':epochs,'to':epochs}
    bundle,out = Path(bundle),Path(out)
    if stage=='prepare': prepare(c, Path(data_dir), bundle)
    elif stage=='run': run(c, bundle, out, seconds, device, workers or c['workers'], begin)
    elif stage=='table':
        for o in each_study(c).values(): table(o, out, c['name'])
    else: sys.exit(f'birds: the stage is {stage!r}, but it is prepare, run or table.')
