"What benchmark scripts, notebooks and the page of all results share. It needs nothing of the library, so it starts at once."
import json,re,statistics
from pathlib import Path
import pandas as pd

here = Path(__file__).resolve().parent

def table(rows, seconds=False):
    "Accuracy of each method over its seeds as a markdown table, with the seconds of a run where nothing else was running"
    df = pd.DataFrame(rows)
    df['single'] = df.branches.map(lambda o: sum(o)/len(o))
    g = df.groupby('method', sort=False)
    pct = lambda s: f'{100*s.mean():.1f}' + (f' ± {100*s.std():.1f}' if len(s)>1 else '')
    cells = [['method','accuracy %','mean branch %','each run %']+['seconds']*seconds]
    for m,d in g: cells.append([m, pct(d.accuracy), pct(d.single), ', '.join(f'{100*a:.1f}' for a in d.accuracy)] + [f'{d.seconds.mean():.0f}']*seconds)
    cells.insert(1, ['---']*len(cells[0]))
    return '\n'.join(f"| {' | '.join(o)} |" for o in cells)

def result_table(
    name,    # Of a result file, in benchmarks/results
    only=(), # Keep the rows that begin with one of these words
    having='', # Keep the rows that hold this text, or one of several
    cols=(), # Keep these columns
):
    "The table of a committed result file, with the command and machine that it came from"
    out = here/'results'/f'{name}.json'
    if not out.exists(): return f'(no `benchmarks/results/{name}.json` yet)'
    res = json.loads(out.read_text())
    where = f"{res['machine']['cores']} CPU cores, torch {res['versions']['torch']}"
    head,rule,*rows = (res['table'] if 'table' in res else table(res['runs'])).split('\n')
    if only: rows = [o for o in rows if o.startswith(tuple(f'| {k}' for k in only))]
    rows = [o for o in rows if any(k in o for k in ([having] if isinstance(having, str) else having))]
    lines = [head,rule,*rows]
    if cols: # of a file with one table; some have two, of different columns
        names = [o.strip() for o in head.strip('|').split('|')]
        idxs = [names.index(o) for o in cols]
        lines = ['|'+'|'.join(o.strip('|').split('|')[i] for i in idxs)+'|' for o in lines]
    return f"**{res['title']}** (`{res['command']}`, {where})\n\n" + '\n'.join(lines)

def write_result(
    name,    # Of the result file, in benchmarks/results
    title,   # Of its table
    command, # That made it
    rows,    # Its runs
    lines,   # Its table, as text or as lines
    **more   # Further entries
):
    "Write a result file, whole or not at all"
    from cekd_fastai.core import write_whole # here, since this file starts without the library
    from cekd_fastai.results import about
    info,table = about({}),lines if isinstance(lines, str) else '\n'.join(lines)
    res = dict(title=title, command=command, versions=info['versions'], machine=info['machine'], table=table, runs=rows, **more)
    write_whole(here/'results'/f'{name}.json', lambda p: p.write_text(json.dumps(res, indent=1)+'\n'))

def over(gain):
    "Mean of paired differences, with its standard error where there are several"
    return f'{statistics.mean(gain):+.1f}' + (f' ± {statistics.stdev(gain)/len(gain)**.5:.1f}' if len(gain)>1 else '')

def paired(rows, base='plain'):
    "Points of each method over `base` with the same seed, as `{method: one number a seed}`"
    acc = {(r['method'],r['seed']):100*r['accuracy'] for r in rows}
    res = {}
    for k,seed in acc:
        if k!=base and (base,seed) in acc: res.setdefault(k, []).append(acc[k,seed]-acc[base,seed])
    return res

def paired_table(
    rows,   # Runs, each with method, seed, accuracy and the accuracy on its training images, `train`
    epochs, # {method: its epochs, in words}, in the order of the lines
    share,  # {method: its multiply-adds over those of `base`}
    base='plain', # What the others are compared with
):
    "One line for each method: its epochs, its accuracy, and its gain over `base` with the same seed"
    gain = paired(rows, base)
    lines = [f'| method | epochs | multiply-adds | training images % | test images % | over {base} | each seed |','|---|---|---|---|---|---|---|']
    for k,words in epochs.items():
        d = [r for r in rows if r['method']==k]
        if not d: continue
        known,acc = (f'{100*statistics.mean(r[o] for r in d):.1f}' for o in ('train','accuracy'))
        each = ', '.join(f"{100*r['accuracy']:.1f}" for r in d)
        lines.append(f"| {k} | {words} | {share[k]:.2f} | {known} | {acc} | {over(gain[k]) if gain.get(k) else ''} | {each} |")
    return '\n'.join(lines)

def status(key):
    "A line of this process's status on Linux, such as `VmRSS` or the peak `VmHWM`, in GiB"
    return int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/2**20
