"""Images per second through the loader: as the files are, after `presize`, and from memory.

    python benchmarks/loading.py                       # birds drawn and enlarged to the sizes that photos of benchmarks have
    python benchmarks/loading.py --path DIR --size 112 # a data set of your own

One process loads (num_workers=0), so that the numbers are of one core, and epochs of the three kinds alternate, so that whatever else the machine does
falls on all of them. A ratio above 1 is how many times faster an epoch of loading is. Drawn birds have less detail than photos, which decode more slowly."""
import shutil,statistics,tempfile,time
import torch
from concurrent.futures import ThreadPoolExecutor
from fastcore.script import call_parse
from fastai.vision.all import *
from cekd_fastai.data.benchmarks import read_table
from cekd_fastai.data.check import presize
from cekd_fastai.data.image import open_image
from cekd_fastai.data.loaders import fine_grained_dls
from cekd_fastai.drawing.dataset import make_birds
from common import write_result

def enlarged(birds, dest, short):
    "A copy of the drawn set whose pictures are 4:3 and have `short` pixels on the shortest side"
    shutil.copytree(birds, dest)
    def one(f): open_image(f).resize((short*4//3, short), Image.BICUBIC).save(f, quality=92)
    with ThreadPoolExecutor() as ex: list(ex.map(one, read_table(dest).files))
    return dest

def epoch(dls):
    "Images per second in one epoch of training"
    start,n = time.perf_counter(),0
    for xb,yb in dls.train: n += len(xb)
    return n/(time.perf_counter()-start)

def measure(path, size, bs, rounds, tmp):
    "A row of the table for the data set in `path`"
    start = time.perf_counter()
    small = presize(path, round(size*8/7), dest=tmp/f'{path.name}-small')
    spent = time.perf_counter()-start
    kw = dict(size=size, bs=bs, num_workers=0, device='cpu')
    kinds = dict(original=fine_grained_dls(path, **kw), presized=fine_grained_dls(small, **kw), memory=fine_grained_dls(small, in_memory=True, **kw))
    for o in kinds.values(): o.train.one_batch()
    rates = {k:[] for k in kinds}
    for _ in range(rounds):
        for k,o in kinds.items(): rates[k].append(epoch(o))
    med = {k:statistics.median(v) for k,v in rates.items()}
    sides = [min(Image.open(o).size) for o in read_table(path).files[:200]]
    return dict(shortest_side=statistics.median(sides), images=len(read_table(path)), presize_seconds=round(spent, 1), **{k:round(v, 1) for k,v in med.items()},
        ratio=round(med['presized']/med['original'], 2), memory_ratio=round(med['memory']/med['original'], 2), all={k:[round(o, 1) for o in v] for k,v in rates.items()})

@call_parse
def main(
    path:str='',                # Folder of a data set; drawn birds if empty
    size:int=224,               # Pixels
    bs:int=32,                  # Images in a batch
    sides:str='375,768,1536',   # Shortest sides of the enlarged birds, separated by commas
    n:int=200,                  # Drawn birds, in 10 classes
    rounds:int=5,               # Rounds of alternating epochs
    out:str='loading',          # Name of the result file, in benchmarks/results
):
    "Measure loading with and without `presize`, and from memory"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        if path: sets = [Path(path)]
        else:
            birds = make_birds(tmp/'birds', n_species=10, n_images=n//10, n_train=n//10-2, size=256, progress=False)
            sets = [enlarged(birds, tmp/f'birds{o}', int(o)) for o in sides.split(',')]
        rows = [measure(o, size, bs, rounds, tmp) for o in sets]
    lines = ['| shortest side of the files | files as they are | after `presize` | ratio | from memory | ratio |','|---|---|---|---|---|---|']
    lines += [f"| {r['shortest_side']:.0f} px | {r['original']:.0f} | {r['presized']:.0f} | {r['ratio']:.1f} | {r['memory']:.0f} | {r['memory_ratio']:.1f} |" for r in rows]
    said = f' --path {Path(path).name}' if path else f' --sides {sides} --n {n}'
    title = f'Images per second loaded by one process, for a network of {size} px'
    write_result(out, title, f'python benchmarks/loading.py --size {size} --bs {bs} --rounds {rounds}{said}', rows, lines)
    print('\n'.join(lines))
