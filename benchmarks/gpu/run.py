"""Run the checks on a GPU within a budget: `python benchmarks/gpu/run.py [--seconds 150] [--dry]`.

What a GPU can disprove runs first, in parallel: cells and tests that ask for one, short runs, synchronisations of a step,
numbers in half precision and compiled. Then, alone on the device, times and peak memory. Each result is a line of
`results.jsonl` in the output folder; a second start goes on where the first ended."""
import argparse,json,os,shutil,signal,subprocess,sys,time
from pathlib import Path
from checks import STAGES,done_rows,here

TOGETHER = [['cells','tests','fit'],['sync'],['numbers'],['compiled']]
ALONE = ['peaks','mixing','steps']
LIMIT = 540 # seconds that `--then` and the checks may take together

def start(stages, a, seconds, log):
    "A process for some stages"
    cmd = [sys.executable, str(here/'checks.py'), *stages, '--out', str(a.out), '--seconds', f'{seconds:.0f}'] + ['--dry']*a.dry
    env = dict(os.environ, PYTHONUNBUFFERED='1', TOKENIZERS_PARALLELISM='false')
    return subprocess.Popen(cmd, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)

def finish(procs, end):
    "Wait for processes until `end`; those that are late are ended, with what they started"
    late = []
    for stages,p in procs:
        try: p.wait(max(end-time.time(), .1))
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)
            p.wait()
            late += stages
    return late

def note(out, **row):
    with open(out/'results.jsonl', 'a') as f: f.write(json.dumps(row)+'\n')

def summary(rows):
    "The results as text: counts of each stage, what failed, and the tables of time and memory"
    last = {(r['stage'],r['item']):r for r in rows}.values()
    lines = ['| stage | good | failed | not run or skipped |','|---|---|---|---|']
    for s in dict.fromkeys(r['stage'] for r in last):
        n = [sum(r['stage']==s and r.get('ok') is o for r in last) for o in (True,False,None)]
        lines.append(f'| {s} | {n[0]} | {n[1]} | {n[2]} |')
    lines += ['','Failed or not run:']
    for r in last:
        if r.get('ok') is True: continue
        what = r.get('error') or r.get('ours') or r.get('note') or {k:v for k,v in r.items() if k not in ('stage','item','ok','seconds')}
        lines.append(f"- {r['stage']}, {r['item']}: {str(what)[:220]}" + (f" ({r['where']})" if r.get('where') else ''))
    waits = sorted({o for r in last for o in r.get('others') or ()})
    if waits: lines += ['','Waits outside the library: '+'; '.join(waits[:6])]
    steps = [r for r in last if r['stage']=='steps' and 'ms' in r]
    if steps: lines += ['','| step of | ms | time over plain | multiply-adds over plain | over the bound of plain | over peak | memory over plain |','|---|---|---|---|---|---|---|']
    keys = ('ms','over_plain','flops_over_plain','over_bound_of_plain','over_peak','memory_over_plain')
    lines += [f"| {r['item']} | "+' | '.join(str(r.get(k, '')) for k in keys)+' |' for r in steps]
    mixing = [r for r in last if r['stage']=='mixing' and 'ms' in r]
    if mixing: lines += ['','| mixing | ms | over ours |','|---|---|---|']
    lines += [f"| {r['item']} | {r['ms']} | {r['over_ours']} |" for r in mixing]
    return '\n'.join(lines)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float, default=150, help='budget of the checks')
    p.add_argument('--out', type=Path, default=Path(os.environ.get('OUT') or 'gpu-results'), help='folder of the results')
    p.add_argument('--dry', action='store_true', help='without a GPU: tiny sizes, and a GPU that knows shapes only')
    p.add_argument('--resume', type=Path, help='results.jsonl of an earlier run to go on from')
    p.add_argument('--only', nargs='+', choices=STAGES, help='these stages only')
    p.add_argument('--then', help='a command that gets the rest of the time, e.g. a study')
    a = p.parse_args()
    begin = time.time()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.resume and a.resume.exists() and not (a.out/'results.jsonl').exists(): shutil.copy(a.resume, a.out/'results.jsonl')
    wanted = lambda stages: [s for s in stages if not a.only or s in a.only]
    end = begin+a.seconds
    with open(a.out/'log.txt', 'a') as log:
        share = .55 if wanted(ALONE) else 1.
        first = end-(1-share)*a.seconds
        procs = [(s,start(s, a, share*a.seconds-5, log)) for s in map(wanted, TOGETHER) if s]
        late = finish(procs, first)
        if wanted(ALONE):
            left = end-time.time()
            late += finish([(wanted(ALONE),start(wanted(ALONE), a, left-5, log))], end)
    for s in late: note(a.out, stage=s, item='(process)', ok=None, note='ended at its time limit; start again to go on')
    text = summary(done_rows(a.out))
    (a.out/'summary.md').write_text(text+'\n')
    print(text, flush=True)
    print(f'\n{time.time()-begin:.0f} seconds', flush=True)
    if a.then:
        try: sys.exit(subprocess.run(a.then, shell=True, timeout=max(LIMIT-(time.time()-begin), 1)).returncode)
        except subprocess.TimeoutExpired: print('The command after the checks ran out of time.')
