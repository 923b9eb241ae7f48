"""Seconds that each lesson of the course takes: for a reader, and under `make test` (`IN_TEST`, one thread).

    python benchmarks/course.py                      # every lesson in both modes
    python benchmarks/course.py --only 03_mixing     # one lesson; the others keep their rows

Each run is a copy of the notebook in a process of its own, so the seconds hold the start of the kernel and the imports, and the notebook stays as it is."""
import json,os,shutil,subprocess,sys,tempfile,time
from pathlib import Path
from fastcore.script import call_parse
from cekd_fastai.core import write_whole
from cekd_fastai.train import about
from common import here

course = here.parent/'nbs'/'course'
modes = dict(reader={}, test=dict(IN_TEST='1', OMP_NUM_THREADS='1'))

def seconds(path, mode):
    "Wall-clock seconds of one run of the lesson, which must not fail"
    env = {k:v for k,v in os.environ.items() if k not in modes['test']} | modes[mode]
    env['JUPYTER_PATH'] = os.pathsep.join(filter(None, [f'{sys.prefix}/share/jupyter', env.get('JUPYTER_PATH')]))
    with tempfile.TemporaryDirectory() as tmp:
        nb = shutil.copy(path, tmp)
        cmd = [sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', '--ExecutePreprocessor.timeout=1800', nb]
        start = time.perf_counter()
        res = subprocess.run(cmd, cwd=tmp, env=env, capture_output=True, text=True)
        spent = time.perf_counter()-start
    if res.returncode: sys.exit(f'{path.name} failed as {mode}:\n' + '\n'.join(res.stderr.splitlines()[-20:]))
    return round(spent, 1)

def table(rows):
    "The rows as a markdown table"
    lines = ['| lesson | for a reader (s) | under test (s) |', '|---|---|---|']
    return '\n'.join(lines + [f"| {r['lesson']} | {r['reader']:.0f} | {r['test']:.0f} |" for r in rows])

@call_parse
def main(
    only:str=None, # Lesson to run, without suffix; None for all of them
    out:str=str(here/'results'/'course.json'), # File for the result
):
    "Run the lessons in both modes and write their seconds, with machine and versions, to a file."
    paths = [p for p in sorted(course.glob('*.ipynb')) if only in (None, p.stem)]
    if not paths: sys.exit(f'No lesson {only or ""} in {course.parent.name}/{course.name}: the names are {", ".join(p.stem for p in sorted(course.glob("*.ipynb")))}.')
    out = Path(out)
    rows = {r['lesson']: r for r in json.loads(out.read_text())['runs']} if out.exists() else {}
    for p in paths:
        rows[p.stem] = dict(lesson=p.stem) | {m: seconds(p, m) for m in modes}
        print(table([rows[p.stem]]).splitlines()[-1], flush=True)
        info,kept = about({}),[rows[o] for o in sorted(rows)]
        res = dict(title='Seconds of the lessons', command='python benchmarks/course.py', versions=info['versions'], machine=info['machine'], table=table(kept), runs=kept)
        write_whole(out, lambda f: f.write_text(json.dumps(res, indent=1)+'\n'))
