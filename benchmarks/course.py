"""Seconds that each lesson of the course takes: for a reader, and under `make test` (`IN_TEST`, one thread).

    python benchmarks/course.py                      # every lesson in both modes, three times
    python benchmarks/course.py --only 03_mixing     # one lesson; the others keep their rows
    python benchmarks/course.py --only 03_mixing --store-outputs   # run it once and keep its outputs in the notebook

Each run is a copy of the notebook in a process of its own, so the seconds hold the start of the kernel and the imports. The table has the
shortest and the longest run; the file has the load of the machine before each, as a lesson takes longer where other things run."""
import json,os,re,shutil,subprocess,sys,tempfile
from base64 import b64decode,b64encode
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from PIL import Image
from fastcore.script import call_parse
from cekd_fastai.core import write_whole
from cekd_fastai.results import about
from common import here

course = here.parent/'nbs'/'course'
modes = dict(reader={}, test=dict(IN_TEST='1', OMP_NUM_THREADS='1'))

def executed(path, mode, tmp):
    "A copy of the lesson in `tmp` with its outputs, and the seconds of the run on the clock and of processors, with the load before it"
    env = {k:v for k,v in os.environ.items() if k not in (*modes['test'],'MPLBACKEND')} | modes[mode] # figures are shown in the notebook
    env['JUPYTER_PATH'] = os.pathsep.join(filter(None, [f'{sys.prefix}/share/jupyter', env.get('JUPYTER_PATH')]))
    nb = shutil.copy(path, tmp)
    cmd = [sys.executable, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', '--ExecutePreprocessor.timeout=3600', nb]
    load = round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None
    before = os.times()
    res = subprocess.run(cmd, cwd=tmp, env=env, capture_output=True, text=True)
    spent = [b-a for a,b in zip(before, os.times())]
    if res.returncode: sys.exit(f'{path.name} failed as {mode}:\n' + '\n'.join(res.stderr.splitlines()[-20:]))
    return json.loads(Path(nb).read_text(encoding='utf-8')),dict(seconds=round(spent[4], 1), cpu=round(spent[2]+spent[3], 1), load=load)

most = 149_000 # bytes of a notebook

def smallest(png, quality):
    "Kind and bytes of a picture: JPEG, or PNG of 64 colours for a plot of lines"
    im,f = Image.open(BytesIO(png)).convert('RGB'),BytesIO()
    if im.getcolors(2000): im.quantize(64, dither=0).save(f, 'png', optimize=True)
    else: im.save(f, 'jpeg', quality=quality, optimize=True, progressive=True)
    return f'image/{Image.open(f).format.lower()}',f.getvalue()

def slim(o, quality=70):
    "An output without styles, repeated lines and a second copy of its table, and with a small picture, or None if it then shows nothing"
    if 'execution_count' in o: o['execution_count'] = None
    if o['output_type']=='stream':
        lines = ''.join(o['text']).splitlines(True)
        o['text'] = [b for a,b in zip(['',*lines], lines) if a!=b]
        return o if o['name']!='stderr' else None
    data = o.get('data', {})
    if 'image/png' in data:
        kind,small = smallest(b64decode(data.pop('image/png')), quality)
        data[kind] = b64encode(small).decode()
    if 'text/html' not in data: return o
    page = re.sub(r'<(style|script)\b.*?</\1>\s*|<progress\b.*?</progress>', '', ''.join(data['text/html']), flags=re.S)
    if not re.sub(r'<[^>]+>|\s', '', page): return None
    page = re.sub(r'\n\s*(?=<t[hd]\b|</tr>)', '', page.strip()) # a line for each row of a table, not for each of its cells
    data['text/html'] = re.sub(r'\n\s+', '\n', page).splitlines(True)
    data.pop('text/markdown', None)
    if ''.join(data.get('text/plain', '')).lstrip().startswith('<'): del data['text/plain']
    return o

def with_outputs(nb, ran, quality):
    "The text of a notebook with the outputs of its run"
    for cell,new in zip(nb['cells'], ran['cells']):
        if cell['cell_type']=='code': cell['outputs'] = [o for o in (slim(deepcopy(o), quality) for o in new['outputs']) if o]
    return json.dumps(nb, indent=1, ensure_ascii=False)+'\n'

def store(path):
    "Run the lesson once as a reader does, put its outputs into the notebook, its pictures as good as there is room for, and return the seconds"
    with tempfile.TemporaryDirectory() as tmp: ran,spent = executed(path, 'reader', tmp)
    nb = json.loads(path.read_text(encoding='utf-8'))
    for quality in (70,60,50,40):
        text = with_outputs(nb, ran, quality)
        if len(text.encode())<most: break
    write_whole(path, lambda f: f.write_text(text, encoding='utf-8'))
    return spent

def measured(path, mode, times):
    "Seconds of some runs"
    with tempfile.TemporaryDirectory() as tmp: return [executed(path, mode, tmp)[1] for _ in range(times)]

def spread(runs):
    "Shortest and longest of some runs in whole seconds"
    s = sorted(round(r['seconds']) for r in runs)
    return ' to '.join(dict.fromkeys(map(str, s[:1]+s[-1:])))

def table(rows):
    "The rows as a markdown table"
    lines = ['| lesson | for a reader (s) | under test (s) |', '|---|---|---|']
    return '\n'.join(lines + [f"| {r['lesson']} | {spread(r['reader'])} | {spread(r['test'])} |" for r in rows])

@call_parse
def main(
    only:str=None, # Lesson to run, without suffix; None for all of them
    times:int=3, # Runs of each lesson in each mode
    store_outputs:bool=False, # Run once more as a reader does, and keep the outputs in the notebook?
    out:str=str(here/'results'/'course.json'), # File for the result
):
    "Run the lessons in both modes and write their seconds, with machine and versions, to a file."
    paths = [p for p in sorted(course.glob('[0-9]*.ipynb')) if only in (None, p.stem)]
    if not paths: sys.exit(f'No lesson {only or ""} in {course.parent.name}/{course.name}: the names are {", ".join(p.stem for p in sorted(course.glob("*.ipynb")))}.')
    out = Path(out)
    rows = {r['lesson']: r for r in json.loads(out.read_text())['runs']} if out.exists() else {}
    for p in paths:
        old = rows.get(p.stem) or dict(lesson=p.stem, reader=[], test=[])
        runs = dict(reader=old['reader']+[store(p)]) if store_outputs else {m: measured(p, m, times) for m in modes}
        rows[p.stem] = old | runs
        print(table([rows[p.stem]]).splitlines()[-1], flush=True)
        info,kept = about({}),[rows[o] for o in sorted(rows)]
        res = dict(title='Seconds of the lessons', command='python benchmarks/course.py', versions=info['versions'], machine=info['machine'], table=table(kept), runs=kept)
        write_whole(out, lambda f: f.write_text(json.dumps(res, indent=1)+'\n'))
