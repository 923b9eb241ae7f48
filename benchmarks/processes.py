"""Throughput of training in two processes over one, on this machine.

    python benchmarks/processes.py

Both are started in turns, as `cekd-train --launch` starts them, by the agent of `torchrun`; only the library is loaded once, and the processes are forks. Each has one thread,
and a step has equally many images in both, so one core is compared with two. The figure of a run is that of its `result.json`: images of all epochs over the seconds of the training,
validations included, the start of the processes not. The table has medians over the rounds; on a machine that does other things at the same time, read the ratio and not the rates."""
import argparse,contextlib,io,json,os,statistics,tempfile
from functools import partial
from pathlib import Path
import torch
from torch.distributed.launcher.api import LaunchConfig,elastic_launch
from cekd_fastai.cli import cekd_train
from cekd_fastai.drawing.dataset import make_birds
from common import here

def trained(n, out, opts):
    "Images per second of a run in `n` processes"
    how = dict(rdzv_backend='c10d', rdzv_endpoint='localhost:0', run_id=out.name, start_method='fork', monitor_interval=.1)
    run = partial(cekd_train, **opts | dict(bs=opts['bs']//n, out=out))
    elastic_launch(LaunchConfig(1, 1, n, **how), quietly)(run)
    return json.loads((out/'result.json').read_text())['images_per_s']

def quietly(f):
    with contextlib.redirect_stdout(io.StringIO()): f()

def write(rates, bs, command):
    "The result file"
    med = {n: statistics.median(v) for n,v in rates.items()}
    head = ['processes','images in a step','images per second','each round','over one process']
    cells = [[n,bs,f'{med[n]:.1f}',', '.join(f'{o:.1f}' for o in v),f'{med[n]/med[1]:.2f}'] for n,v in rates.items()]
    table = '\n'.join(f"| {' | '.join(map(str, o))} |" for o in [head,['---']*len(head),*cells])
    rows = [dict(processes=n, images_per_s=v) for n,v in rates.items()]
    res = dict(title='Throughput of two processes', command=command, machine=dict(cores=os.cpu_count()), versions=dict(torch=torch.__version__), runs=rows, table=table)
    (here/'results'/'processes.json').write_text(json.dumps(res, indent=1)+'\n')

def main(rounds, bs):
    "Rounds of one run each, every other one in the other order"
    rates = {1:[], 2:[]}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        make_birds(tmp/'birds', n_species=4, n_images=18, n_train=16, size=72, n_workers=0, progress=False)
        opts = dict(data=tmp/'birds', arch='resnet18', size=64, bs=bs, epochs=1, method='plain', no_pretrained=True, num_workers=0, device='cpu')
        for k in range(rounds):
            for n in (1,2) if k%2==0 else (2,1):
                rates[n].append(trained(n, tmp/f'run{k}-{n}', opts))
                print(n, rates[n][-1], flush=True)
            write(rates, bs, f'python benchmarks/processes.py --rounds {rounds}')

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--bs', type=int, default=32, help='images in a step of all processes')
    a = p.parse_args()
    torch.set_num_threads(1)
    main(a.rounds, a.bs)
