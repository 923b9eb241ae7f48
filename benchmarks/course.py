"""Seconds that each lesson of the course takes: for a reader, and under `make test` (`IN_TEST`, one thread).

    python benchmarks/course.py                      # every lesson in both modes, three times
    python benchmarks/course.py --only 03_mixing     # one lesson; the others keep their rows
    python benchmarks/course.py --only 03_mixing --store-outputs   # run it once and keep its outputs in the notebook

Each run is a copy of the notebook in a process of its own, so the seconds hold the start of the kernel and the imports. The table has
the shortest and the longest run, with the load of the machine before each of them: on a machine that is busy otherwise a lesson takes longer."""
import json,os,re,shutil,subprocess,sys,tempfile,time
from pathlib import Path
from fastcore.script import call_parse
from cekd_fastai.core import write_whole
from cekd_fastai.train import about
from common import here

course = here.parent/'nbs'/'course'
modes = dict(reader={}, test=dict(IN_TEST='1', OMP_NUM_THREADS='1'))

def executed(path, mode, tmp):
    "A copy of the lesson in `tmp` with its outputs, and the wall-clock seconds of the run, which must not fail"
    env = {k:v for k,v in os.environ.items() if k not in (*modes['test'],'MPLBACKEND')} | modes[mode] # figures are shown in the notebook
    env['JUPYTER_PATH'] = os.pathsep.join(filter(None, [f'{sys.prefix}/share/jupyter', env.get('JUPYTER_PATH')]))
    nb = shutil.copy(path, tmp)
    cmd = [sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', '--ExecutePreprocessor.timeout=1800', nb]
    start = time.perf_counter()
    res = subprocess.run(cmd, cwd=tmp, env=env, capture_output=True, text=True)
    spent = time.perf_counter()-start
    if res.returncode: sys.exit(f'{path.name} failed as {mode}:\n' + '\n'.join(res.stderr.splitlines()[-20:]))
    return json.loads(Path(nb).read_text(encoding='utf-8')),spent

def slim(o):
    "An output without styles and without a second copy of its table, or None if it then shows nothing"
    if 'execution_count' in o: o['execution_count'] = None
    if o['output_type']=='stream': return o if o['name']!='stderr' else None
    data = o.get('data', {})
    if 'text/html' not in data: return o
    page = re.sub(r'<(style|script)\b.*?</\1>\s*|<progress\b.*?</progress>', '', ''.join(data['text/html']), flags=re.S)
    if not re.sub(r'<[^>]+>|\s', '', page): return None
    data['text/html'] = page.strip().splitlines(True)
    data.pop('text/markdown', None)
    if ''.join(data.get('text/plain', '')).lstrip().startswith('<'): del data['text/plain']
    return o

def store(path):
    "Run the lesson once as a reader does, and put its outputs into the notebook"
    with tempfile.TemporaryDirectory() as tmp: ran,_ = executed(path, 'reader', tmp)
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell,new in zip(nb['cells'], ran['cells']):
        if cell['cell_type']=='code': cell['outputs'] = [o for o in map(slim, new['outputs']) if o]
    write_whole(path, lambda f: f.write_text(json.dumps(nb, indent=1, ensure_ascii=False)+'\n', encoding='utf-8'))

def measured(path, mode, times):
    "Seconds of some runs, each with the load of the machine before it"
    res = []
    for _ in range(times):
        load = os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
        with tempfile.TemporaryDirectory() as tmp: spent = executed(path, mode, tmp)[1]
        res.append(dict(seconds=round(spent, 1), load=load and round(load, 1)))
    return res

def spread(runs):
    "Shortest and longest of some runs in whole seconds"
    s = sorted(round(r['seconds']) for r in runs)
    return f'{s[0]}' if s[0]==s[-1] else f'{s[0]} to {s[-1]}'

def table(rows):
    "The rows as a markdown table"
    lines = ['| lesson | for a reader (s) | under test (s) |', '|---|---|---|']
    return '\n'.join(lines + [f"| {r['lesson']} | {spread(r['reader'])} | {spread(r['test'])} |" for r in rows])

@call_parse
def main(
    only:str=None, # Lesson to run, without suffix; None for all of them
    times:int=3, # Runs of each lesson in each mode
    store_outputs:bool=False, # Run once and keep the outputs in the notebook, without a measurement?
    out:str=str(here/'results'/'course.json'), # File for the result
):
    "Run the lessons in both modes and write their seconds, with machine and versions, to a file."
    paths = [p for p in sorted(course.glob('[0-9]*.ipynb')) if only in (None, p.stem)]
    if not paths: sys.exit(f'No lesson {only or ""} in {course.parent.name}/{course.name}: the names are {", ".join(p.stem for p in sorted(course.glob("*.ipynb")))}.')
    if store_outputs:
        for p in paths: store(p)
        return
    out = Path(out)
    rows = {r['lesson']: r for r in json.loads(out.read_text())['runs']} if out.exists() else {}
    for p in paths:
        rows[p.stem] = dict(lesson=p.stem) | {m: measured(p, m, times) for m in modes}
        print(table([rows[p.stem]]).splitlines()[-1], flush=True)
        info,kept = about({}),[rows[o] for o in sorted(rows)]
        res = dict(title='Seconds of the lessons', command='python benchmarks/course.py', versions=info['versions'], machine=info['machine'], table=table(kept), runs=kept)
        write_whole(out, lambda f: f.write_text(json.dumps(res, indent=1)+'\n'))
