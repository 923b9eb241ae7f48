"What every lesson of the course keeps to, and that each rule catches a lesson that does not."
import copy,json,lab,lessons,pytest
from base64 import b64encode
from io import BytesIO
from PIL import Image

found = sorted(lessons.course.glob('[0-9]*.ipynb'))

@pytest.mark.parametrize('rule', lessons.rules)
@pytest.mark.parametrize('path', found, ids=[o.stem for o in found])
def test_lesson(path, rule): assert lessons.faults(path, rule)==[]

def test_no_other_lessons(): assert {o.stem for o in found}-set(lessons.names)==set()

def test_all_lessons(): assert [o for o in lessons.names if not (lessons.course/f'{o}.ipynb').exists()]==[]

def test_library_names():
    "The names read from the source are those that the star import brings."
    import cekd_fastai.all
    assert lessons.library_names()==set(cekd_fastai.all.__all__)

# A lesson without faults, and one with a fault for every rule

name,lib = '02_small',{'make_birds', 'CEKD'}

def md(s): return dict(cell_type='markdown', id=f'm{abs(hash(s))%10**6}', metadata={}, source=s)

def code(s, *outputs, id='c', **meta): return dict(cell_type='code', id=id, metadata=meta, source=s, outputs=list(outputs), execution_count=None)

def text(s): return dict(output_type='stream', name='stdout', text=s)

def picture(width=600):
    f = BytesIO()
    Image.new('1', (width,9)).save(f, 'png')
    return dict(output_type='display_data', metadata={}, data={'image/png': b64encode(f.getvalue()).decode(), 'text/plain': '<Figure>'})

solution = '#| code-fold: true\n#| code-summary: "Solution"\nassert 1+1==2'

def heading(k): return dict(cell_type='markdown', id=f'h{k}', metadata={'jp-MarkdownHeadingCollapsed':True}, source='#### Solution')

def good():
    "The cells of a lesson that keeps every rule."
    exercises = [o for k in (1,2,3) for o in (md(f'### Exercise {k}\n\nDo it.'), heading(k), code(solution, id=f's{k}'))]
    return [md('\n'.join(['# Lesson 2: Small', '', '> A small one', '', *lessons.badges(name)])), code(lessons.install, id='install'),
        md('Hello.\n\n## What you will be able to do\n\n- a\n- b\n- c'), md('Imports.'),
        code('from fastai.vision.all import *\nfrom cekd_fastai.all import *', id='imports'),
        md('## Birds\n\n`make_birds` draws birds. See [mix](../29_mix.callback.ipynb) and `[x](no.ipynb)`.'),
        code('x = make_birds()\nprint(x)', text('3\n'), id='birds'), code('plot_it()', picture(), id='plot'), md('A picture of it.'),
        md('## Exercises\n\nTry them.'), *exercises,
        md('## Questionnaire\n\n' + '\n'.join(f'{i}. Why?' for i in range(1, 9))),
        md('<details>\n<summary>Answers</summary>\n\n' + '\n'.join(f'{i}. So.' for i in range(1, 9)) + '\n\n</details>'),
        md('## Read on\n\n`make_birds`: [29 mix.callback](../29_mix.callback.ipynb), [paper](https://arxiv.org/abs/1)')]

def judged(cells, tmp_path):
    "Faults of a lesson with these cells, by rule."
    path = tmp_path/'course'/f'{name}.ipynb'
    path.parent.mkdir(exist_ok=True)
    (tmp_path/'29_mix.callback.ipynb').touch()
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return {k: lessons.faults(path, k, lib) for k in lessons.rules}

def test_good_lesson(tmp_path): assert judged(good(), tmp_path)=={k: [] for k in lessons.rules}

def at(cells, s): return next((c for c in cells if c['id']==s), None) or next(c for c in cells if s in c['source'])

def swap(s, old, new):
    "A change of the first cell with `s` in it."
    def _f(cells): at(cells, s)['source'] = at(cells, s)['source'].replace(old, new)
    return _f

def put(s, **kw):
    "New fields for the first cell with `s` in it."
    return lambda cells: at(cells, s).update(kw)

def insert(s, cell): return lambda cells: cells.insert(cells.index(at(cells, s)), cell)

def remove(s): return lambda cells: cells.remove(at(cells, s))

wrong = [('start', swap('# Lesson 2', '# Lesson 2', '# Lesson 3'), 'the first line must be `# Lesson 2: Title`'),
    ('start', swap('# Lesson 2', '> A', 'A'), 'subtitle'),
    ('start', swap('# Lesson 2', 'colab-badge', 'badge'), 'lacks the badge [![Open in Colab]'),
    ('start', swap('# Lesson 2', f'{name}.ipynb)\n[![Open in K', 'no.ipynb)\n[![Open in K'), 'lacks the badge [![Open in Colab]'),
    ('start', swap('install', 'install -q ', 'install '), 'the one that installs'),
    ('sections', swap('Hello', '## What you will be able', '## What you can'), 'the sections must be'),
    ('sections', swap('## Questionnaire', '## Questionnaire', '## Questions'), 'the sections must be'),
    ('sections', swap('Hello', '\n- b\n- c', ''), '3 to 5 bullets, not 1'),
    ('sections', swap('## Questionnaire', '8. Why?', ''), '8 to 12 numbered questions, not 7'),
    ('sections', swap('<details>', '8. So.', ''), 'a folded answer to each of its 8 questions, not 7'),
    ('sections', remove('<details>'), 'a folded answer to each of its 8 questions, not 0'),
    ('sections', swap('## Read on', '../29_mix.callback.ipynb', 'https://a.b'), 'must link to the reference'),
    ('sections', swap('## Read on', 'arxiv.org', 'a.org'), 'a paper on arXiv'),
    ('sections', insert('Hello', md('## One\n\n## Two')), 'near the top'),
    ('exercises', remove('### Exercise 3'), '3 to 6 exercises, not 2'),
    ('exercises', swap('### Exercise 2', 'Exercise 2', 'Exercise 5'), 'exercise 2 must have the heading'),
    ('exercises', swap('### Exercise 2', 'Do it.', ''), 'exercise 2 has no task'),
    ('exercises', remove('s2'), 'exercise 2 has no solution'),
    ('exercises', swap('s2', '"Solution"', '"Code"'), 'exercise 2 has no solution'),
    ('exercises', swap('s3', 'assert ', ''), 'the solution of exercise 3 asserts nothing'),
    ('exercises', put('h1', metadata={}), 'not folded in JupyterLab'),
    ('code', swap('birds', 'print', '\n'*3 + 'y = 1\n'*9 + 'print'), 'cell `birds` has 11 lines'),
    ('code', swap('birds', 'print', '# why\nprint'), 'cell `birds` has a comment'),
    ('code', swap('imports', 'from cekd', 'x = 1\nfrom cekd'), 'cell `imports` mixes imports'),
    ('code', swap('imports', 'from cekd_fastai.all import *', 'import cekd_fastai'), '`from cekd_fastai.all import *` is missing'),
    ('code', put('birds', outputs=[dict(output_type='error', ename='E', evalue='', traceback=[])]), 'cell `birds` stores error'),
    ('code', put('birds', outputs=[dict(output_type='stream', name='stderr', text='w')]), 'cell `birds` stores stderr'),
    ('outputs', put('birds', outputs=[]), 'not saved in `birds`'),
    ('outputs', put('plot', source='plot_it().round(2)', outputs=[]), 'not saved in `plot`'),
    ('size', put('birds', outputs=[text('x'*150_000)]), 'less than 150 are allowed'),
    ('names', swap('birds', 'print', 'CEKD()\nprint'), 'cell `birds` uses `CEKD`'),
    ('names', swap('## Birds', '`make_birds`', 'make_birds'), 'cell `birds` uses `make_birds`'),
    ('reading', swap('## Read on', '`make_birds`', 'birds'), 'does not say where `make_birds` is explained'),
    ('links', swap('## Birds', '../29_mix', '29_mix'), 'the link 29_mix.callback.ipynb leads nowhere'),
    ('links', insert('Hello', md('<img src="no.png">')), 'the link no.png leads nowhere'),
    ('figures', put('plot', outputs=[picture(599)]), 'is 599 pixels wide'),
    ('figures', swap('plot', 'plot_it()', 'plot_it(fontsize=7)'), 'letters of 7 points'),
    ('figures', swap('plot', 'plot_it()', "plt.rcParams.update({'axes.titlesize':6})"), 'letters of 6 points'),
    ('pictures', insert('A picture of it.', code('y', text('2'), id='bare')), 'the picture of cell `plot`')]

@pytest.mark.parametrize('rule,change,said', wrong, ids=[f'{r}-{i}' for i,(r,*_) in enumerate(wrong)])
def test_wrong_lesson(rule, change, said, tmp_path):
    "Each rule names what breaks it, in sentences that start with the file."
    cells = copy.deepcopy(good())
    change(cells)
    res = judged(cells, tmp_path)
    assert any(said in o for o in res[rule]) and all(o.startswith(f'{name}.ipynb: ') for o in res[rule]), res

def test_every_rule_is_tested(): assert {r for r,*_ in wrong}==set(lessons.rules)

def test_command(capsys, tmp_path):
    "On the command line: 1 and the sentences, or 0."
    judged(good()[1:], tmp_path)
    path = tmp_path/'course'/f'{name}.ipynb'
    assert lessons.main([path])==1 and 'first cell must be Markdown' in capsys.readouterr().out

# What is stored of a run

@pytest.fixture
def stored(monkeypatch):
    "The script that runs the lessons and keeps their outputs"
    monkeypatch.syspath_prepend(lessons.root/'benchmarks')
    import course
    return course

def shown(im):
    "The output of a cell that shows a picture"
    f = BytesIO()
    im.save(f, 'png')
    return dict(output_type='display_data', metadata={}, data={'image/png': b64encode(f.getvalue()).decode(), 'text/plain': '<Figure>'})

def test_stored_pictures(stored):
    "A plot of a few lines stays PNG, a picture of many colours becomes JPEG, and neither changes its size."
    lines = Image.new('RGB', (620,260), 'white')
    for i in range(620): lines.putpixel((i, i%260), (31,119,180))
    noise = Image.merge('RGB', [Image.effect_noise((620,260), 80) for _ in range(3)])
    for im,kind in ((lines,'image/png'), (noise,'image/jpeg')):
        before = shown(im)
        n = len(before['data']['image/png'])
        kept = stored.slim(before)
        assert set(kept['data'])=={kind,'text/plain'} and len(kept['data'][kind])<=n
        assert [o.size for o in lessons.drawn(dict(outputs=[kept]))]==[im.size]

def test_stored_text(stored):
    "Warnings, progress bars and the numbers of cells are not stored, and a line that repeats itself is stored once."
    assert stored.slim(text('new\nnew\n1\nnew\n'))['text']==['new\n', '1\n', 'new\n']
    page = lambda s: dict(output_type='display_data', metadata={}, data={'text/html': s, 'text/plain': '<IPython.core.display.HTML object>'})
    assert stored.slim(dict(output_type='stream', name='stderr', text='w')) is None and stored.slim(page('<style>a {}</style><progress>3</progress>')) is None
    table = '<style>a {}</style>\n<table>\n  <tr>\n    <td>1</td>\n  </tr>\n</table>\n'
    assert stored.slim(dict(page(table), execution_count=3))['data']=={'text/html': ['<table>\n', '<tr><td>1</td></tr>\n', '</table>']}

def test_stored_whole(stored, tmp_path, monkeypatch):
    "A lesson with many pictures is stored within its size, one with few has better ones."
    noise = Image.merge('RGB', [Image.effect_noise((620,260), 40) for _ in range(3)])
    def size(n):
        cells = [code('plot_it()', *[shown(noise) for _ in range(n)])]
        path = tmp_path/'01_x.ipynb'
        path.write_text(json.dumps(dict(cells=cells)))
        monkeypatch.setattr(stored, 'executed', lambda *a: (dict(cells=copy.deepcopy(cells)),1.))
        assert stored.store(path)==1.
        return path.stat().st_size
    one = size(1)
    monkeypatch.setattr(stored, 'most', int(2*one))
    assert one<size(2)<2*one and size(1)==one

# The learner's working copy

@pytest.fixture
def copied(tmp_path):
    "Folder of notebooks and its fresh copy"
    src,dst = tmp_path/'nbs',tmp_path/'lab'
    (src/'course').mkdir(parents=True)
    for o in ('00_core.ipynb', 'course/01_birds.ipynb', 'course/02_mix.ipynb', '.hidden.ipynb'): (src/o).write_text(f'{o} as first copied')
    assert lab.refresh(src, dst)==[]
    return src,dst

def test_copy_has_every_notebook(copied):
    src,dst = copied
    assert {p.relative_to(dst).as_posix() for p in dst.rglob('*.ipynb')}=={'00_core.ipynb', 'course/01_birds.ipynb', 'course/02_mix.ipynb'}

def test_untouched_copy_follows(copied):
    src,dst = copied
    (src/'00_core.ipynb').write_text('better')
    (src/'course/02_mix.ipynb').unlink()
    assert lab.refresh(src, dst)==[]
    assert (dst/'00_core.ipynb').read_text()=='better'
    assert not (dst/'course/02_mix.ipynb').exists()

def test_learners_work_stays(copied):
    src,dst = copied
    mine = dst/'course/01_birds.ipynb'
    mine.write_text('my notes')
    assert lab.refresh(src, dst)==[] and mine.read_text()=='my notes'
    (src/'course/01_birds.ipynb').write_text('better')
    for _ in range(2): assert lab.refresh(src, dst)==['course/01_birds.ipynb'] and mine.read_text()=='my notes'
    (src/'course/02_mix.ipynb').unlink()
    (dst/'course/02_mix.ipynb').write_text('my notes')
    lab.refresh(src, dst)
    assert (dst/'course/02_mix.ipynb').read_text()=='my notes'
    mine.rename(dst/'course/mine.ipynb')
    assert lab.refresh(src, dst)==[] and mine.read_text()=='better'

def test_lost_record_overwrites_nothing(copied):
    src,dst = copied
    (dst/'00_core.ipynb').write_text('my notes')
    (dst/lab.record).write_text('{cut')
    (src/'00_core.ipynb').write_text('better')
    assert lab.refresh(src, dst)==['00_core.ipynb'] and (dst/'00_core.ipynb').read_text()=='my notes'
