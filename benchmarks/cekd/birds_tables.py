"What came out of a study: its tables with paired differences, and its figure."
import json,math
from pathlib import Path
import numpy as np
from PIL import Image
from birds_plan import config,looks
from birds_queue import read_rows

here = Path(__file__).resolve().parent

def spread(a, form='.1f'):
    "Mean, with its standard error where there are several"
    return f'{np.mean(a):{form}}' + (f' ± {np.std(a, ddof=1)/math.sqrt(len(a)):.1f}' if len(a)>1 else '')
def pct(a): return spread(100*np.asarray(a))

def paired(a, b):
    "Differences of two rows by seed in points, `{seed: accuracy}` each: mean, standard error, and each"
    d = [100*(a[s]-b[s]) for s in sorted(a.keys()&b.keys())]
    if not d: return ''
    return f"{spread(d, '+.1f')} ({', '.join(f'{o:+.1f}' for o in d)})"

def md(cells):
    cells = [cells[0],['---']*len(cells[0]),*cells[1:]]
    return '\n'.join(f"| {' | '.join(map(str, o))} |" for o in cells)

def grouped(rows):
    "Rows of the stage `final` by compute and name, best mean first"
    res = {}
    for r in rows:
        if r.get('stage')=='final' and 'accuracy' in r: res.setdefault((r['compute'],r['row']), {})[r['seed']] = r
    order,mean = ['equal compute','equal epochs','double compute'],lambda v: np.mean([r['accuracy'] for r in v.values()])
    return dict(sorted(res.items(), key=lambda o: (order.index(o[0][0]), -mean(o[1]))))

def asked(r, gmacs):
    "Multiply-adds of the answers of MEAL's teachers for an image: of one of them, drawn at random, or of all"
    if 'meal' not in r['methods']: return 0.
    one = r['args'].get('choose', 'random')=='random'
    return (np.mean if one else np.sum)(gmacs['teachers'])

SAID = {'equal compute':'equal passes','double compute':'double passes'} # a second branch costs more beside them
HEAD = ['method','budget','epochs','passes an image','GMAC an image','accuracy %','mean branch %','calibration error %','train %']
HEAD += ['seconds','seeds']

def teacher_lines(rows):
    "One line for each teacher: what it knows of the test part; of a seed whose rows had several sets of teachers, that of most rows"
    sets,each = {},{}
    for r in rows:
        if r.get('stage')=='final' and 'teachers' in r and not {'wrong','labelled'}&r['args'].keys():
            sets.setdefault(r['seed'], []).append(tuple(r['teachers'].items()))
    for seed,o in sets.items():
        for k,v in max(o, key=o.count): each.setdefault(k, {})[seed] = v
    named = lambda k: 'the teachers together' if k=='ensemble' else f'teacher {k}'
    return [[named(k),*['']*4,pct(list(v.values())),*['']*4,len(v),'',''] for k,v in each.items()]

def gpu_of(r): return r.get('machine', {}).get('gpu')

def seconds_of(rs):
    "Mean of the seconds, those on a GPU where some of the runs were there"
    return np.mean([r['seconds'] for r in rs if gpu_of(r)] or [r['seconds'] for r in rs])

def where(rows):
    "In words, which runs were made on a GPU, and which were not"
    there,others = [r for r in rows if gpu_of(r)],[r for r in rows if not gpu_of(r)]
    if not there: return ''
    def in_half(part):
        half = sum(r.get('precision')=='bf16' for r in part)
        return '' if not half else ' in bfloat16' if half==len(part) else f' ({half} of them in bfloat16)'
    of = f', {len(others)} of {len(rows)} runs on processors{in_half(others)}' if others else ''
    many = f', {len(there)} runs' if 0<sum(r.get('precision')=='bf16' for r in there)<len(there) else ''
    return f', on one {gpu_of(there[-1])}{many}{in_half(there)}{of}'

def final_table(rows, gmacs, c=config):
    "One line for each method and budget: level, calibration, and paired differences from the rows that all are held against"
    against = c.get('against', ['plain','2 branches, label smoothing'])
    g,cells = grouped(rows),[HEAD+[f'against {o}' for o in against],*teacher_lines(rows)]
    acc = {k:{s:r['accuracy'] for s,r in v.items()} for k,v in g.items()}
    rivals = [('equal compute',o) for o in against]
    for k,v in g.items():
        rs = list(v.values())
        r,mean = rs[0],lambda k: np.mean([o[k] for o in rs])
        passes = r['epochs']*r['passes']
        level = [pct([o['accuracy'] for o in rs]),pct([np.mean(o['each']) for o in rs]),f"{100*mean('ece'):.1f}",f"{100*mean('train_accuracy'):.1f}"]
        diffs = [paired(acc[k], acc[o]) if o in acc and o!=k else '' for o in rivals]
        gmac = 3*(passes+r['epochs']*looks(c, r))*gmacs[r['branches']]*(1+('css' in r['methods'])) + passes*asked(r, gmacs) # backward costs twice as much as forward; CSS has two networks
        cells.append([k[1],SAID.get(k[0], k[0]),r['epochs'],passes,f'{gmac:.1f}',*level,f'{seconds_of(rs):.0f}',len(rs),*diffs])
    return md(cells)

def select_table(rows, c=config):
    "One line for each setting that was tried on the held-out part; best first, and held against rivals, where the study names some"
    res,against = {},c['select'].get('against', [])
    for r in rows:
        if r.get('stage')!='select' or 'accuracy' not in r: continue
        res.setdefault((r['row'],r['lr'],r['args'].get('target', ''),r['epochs']), {})[r['seed']] = r
    acc = {k:{s:r['accuracy'] for s,r in v.items()} for k,v in res.items()}
    if against: res = dict(sorted(res.items(), key=lambda o: -np.mean(list(acc[o[0]].values()))))
    rivals = [next((v for k,v in acc.items() if k[0]==o), {}) for o in against]
    cells = [['method','rate','target','epochs','accuracy % (held-out)','train %','seeds',*(f'against {o}' for o in against)]]
    for what,v in res.items():
        diffs = ['' if acc[what] is o else paired(acc[what], o) for o in rivals]
        cells.append([*what,pct(list(acc[what].values())),f"{100*np.mean([o['train_accuracy'] for o in v.values()]):.1f}",len(v),*diffs])
    return md(cells)

def figure(rows, file):
    "Accuracy of every seed over methods, one panel for each budget"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    g = grouped(rows)
    level = lambda n: np.mean([r['accuracy'] for (_,m),v in g.items() if m==n for r in v.values()])
    names = sorted({n for _,n in g}, key=level)
    fig,ax = plt.subplots(figsize=(7,.3*len(names)+1.2), dpi=80)
    for compute,dy,color in (('equal compute',0,'C0'),('equal epochs',.2,'C1'),('double compute',-.2,'C2')):
        at = [(names.index(n)+dy,[100*r['accuracy'] for r in v.values()]) for (o,n),v in g.items() if o==compute]
        if not at: continue
        x,y = [a for _,v in at for a in v],[y for y,v in at for _ in v]
        ax.scatter(x, y, s=14, color=color, alpha=.6, label=SAID.get(compute, compute))
        ax.scatter([np.mean(v) for _,v in at], [y for y,_ in at], s=90, color=color, marker='|')
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xlabel('accuracy on the official test part, %')
    ax.legend(fontsize=7)
    fig.tight_layout()
    fig.savefig(file)
    plt.close(fig)
    Image.open(file).convert('RGB').quantize(64, dither=0).save(file, optimize=True) # it lies in a notebook, too

def forward_gmacs(c, rows=()):
    "Multiply-adds of a forward pass of one image, by number of branches, in milliards; of each teacher as `teachers`"
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from cekd_fastai.all import branch_net
    def of(arch, n, **kw):
        net = branch_net(arch, c['classes'], n, pretrained=False, **kw).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as count: net(torch.zeros(1,3,c['size'],c['size']))
        return count.get_total_flops()/2e9
    taught = [of(o['arch'], 1, **o.get('args', {})) for o in c.get('teachers', {}).values()]
    return {n:of(c['arch'], n) for n in sorted({1,2}|{r['branches'] for r in rows if 'branches' in r})} | dict(teachers=taught)

def table(c, out, whole=None):
    "Write tables and figure where the documentation finds them; `whole` is the queue that the study was run in"
    name,whole = c['name'],whole or c['name']
    rows = read_rows(out/f'{name}.jsonl')
    full = [r for r in rows if 'accuracy' in r]
    if not full: return print(f'No rows yet in {out/f"{name}.jsonl"}.')
    info = {k:([r for r in full if gpu_of(r)] or full)[-1][k] for k in ('versions','machine')}
    tables = dict(select=('candidates on a held-out fifth of train',select_table(rows, c)),
        final=('official test part',final_table(rows, forward_gmacs(c, rows), c)))
    for part,(what,text) in tables.items():
        if text.count('\n')<2: continue # nothing was chosen, or has been read of the test part
        of = [r for r in full if r['stage']==part]
        half = all(r.get('precision')=='bf16' for r in of)
        res = dict(title=f"{c['title']}: {what}{where(of)}", command='python benchmarks/cekd/birds.py run' + f' --config {whole}'*(name!='birds') + ' --precision bf16'*half, **info, table=text)
        res |= dict(rows=f'benchmarks/cekd/results/{name}.jsonl')
        (here.parent/'results'/f"{c.get('result', f'cekd_{name}')}_{part}.json").write_text(json.dumps(res, indent=1)+'\n')
        print(text, end='\n\n')
    for r in rows:
        if 'error' in r: print('error:', r['row'], r['seed'], r['error'])
    if any(r.get('stage')=='final' for r in full): figure(rows, here/f'{name}.png')
