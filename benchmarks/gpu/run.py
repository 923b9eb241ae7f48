"""Run the checks on a GPU within a budget: `python benchmarks/gpu/run.py [--seconds 150] [--dry]`.

What a GPU can disprove runs first, in parallel: cells and tests that ask for one, short runs, synchronisations of a step,
numbers in half precision and compiled. Then, alone on the device, times and peak memory, and last, with a limit of its own
(`--study`), one seed of the study on 200 species. Each result is a line of `results.jsonl` in the output folder; a second
start goes on where the first ended. A process that ends before its time is started again: the item that ended it is its
result, and the next one runs."""
import argparse,json,os,shutil,signal,subprocess,sys,time
from pathlib import Path
from checks import STAGES,done_rows,here

TOGETHER = [['cells','tests','fit'],['sync'],['numbers'],['compiled']]
ALONE = ['peaks','mixing','steps']
LAST = ['study']
RETRIES = 3 # of a process that ends before its time
LIMIT = 540 # seconds that `--then` and the checks may take together

def start(stages, a, seconds, log):
    "A process for some stages"
    cmd = [sys.executable, str(here/'checks.py'), *stages, '--out', str(a.out), '--seconds', f'{seconds:.0f}'] + ['--dry']*a.dry
    env = dict(os.environ, PYTHONUNBUFFERED='1', TOKENIZERS_PARALLELISM='false')
    return subprocess.Popen(cmd, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)

def finish(procs, end, again, out):
    "Wait for `[stages, process]` until `end`; `again` starts those that broke off, and those that are late are ended, with what they started"
    tries,broken = {},[]
    while time.time()<end and any(p.poll()!=0 for _,p in procs):
        for o in [o for o in procs if o[1].poll()]: # a code that is not 0
            k = tries[id(o)] = tries.get(id(o), 0)+1
            if k<=RETRIES: o[1] = again(o[0], end-time.time())
            else:
                broken.append(o)
                procs.remove(o)
        time.sleep(.2)
    late = [o for o in procs if o[1].poll() is None]
    for stages,p in late:
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        for s in stages: (out/f'{s}.begun').unlink(missing_ok=True) # time ended it, not the item
    for stages,_ in late:
        for s in stages: note(out, stage=s, item='(process)', ok=None, note='ended at its time limit; start again to go on')
    for stages,p in broken:
        for s in stages: note(out, stage=s, item='(process)', ok=False, error=f'ended with code {p.returncode} {RETRIES+1} times; log.txt has why')

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
    p.add_argument('--study', type=float, default=330, help='seconds that the study on 200 species may take after them; 0: without it')
    p.add_argument('--out', type=Path, default=Path(os.environ.get('OUT') or 'gpu-results'), help='folder of the results')
    p.add_argument('--dry', action='store_true', help='without a GPU: tiny sizes, and a GPU that knows shapes only')
    p.add_argument('--resume', type=Path, help='results.jsonl of an earlier run to go on from')
    p.add_argument('--only', nargs='+', choices=STAGES, help='these stages only')
    p.add_argument('--then', help='a command that gets the rest of the time, e.g. a study')
    a = p.parse_args()
    begin = time.time()
    a.out.mkdir(parents=True, exist_ok=True)
    for o in ('results.jsonl','birds200.jsonl') if a.resume else (): # the study's rows lie beside the results
        if a.resume.with_name(o).exists() and not (a.out/o).exists(): shutil.copy(a.resume.with_name(o), a.out/o)
    wanted = lambda stages: [s for s in stages if not a.only or s in a.only]
    end = begin+a.seconds
    with open(a.out/'log.txt', 'a') as log:
        share = .55 if wanted(ALONE) else 1.
        first = end-(1-share)*a.seconds
        again = lambda s,seconds: start(s, a, seconds-5, log)
        procs = [[s,again(s, share*a.seconds)] for s in map(wanted, TOGETHER) if s]
        finish(procs, first, again, a.out)
        if wanted(ALONE): finish([[wanted(ALONE),again(wanted(ALONE), end-time.time())]], end, again, a.out)
        if wanted(LAST) and a.study:
            stop = time.time()+min(a.study, LIMIT-(time.time()-begin))
            finish([[LAST,again(LAST, stop-time.time())]], stop, again, a.out)
    text = summary(done_rows(a.out))
    (a.out/'summary.md').write_text(text+'\n')
    print(text, flush=True)
    print(f'\n{time.time()-begin:.0f} seconds', flush=True)
    if a.then:
        try: sys.exit(subprocess.run(a.then, shell=True, timeout=max(LIMIT-(time.time()-begin), 1)).returncode)
        except subprocess.TimeoutExpired: print('The command after the checks ran out of time.')
