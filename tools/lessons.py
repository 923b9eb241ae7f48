"""What every lesson of the course keeps to, one sentence for each breach: python tools/lessons.py [notebooks]
A lesson is read as JSON and never run, so this takes no time."""
import ast,json,re,sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from PIL import Image

root = Path(__file__).resolve().parent.parent
course = root/'nbs'/'course'
names = ('01_look_alikes', '02_your_photographs', '03_mixing', '04_two_heads', '05_cekd_from_scratch', '06_many_teachers', '07_staying_different', '08_out_of_the_notebook')
blob = 'cekd-fastai/cekd_fastai/blob/main/nbs/course'
install = r"""#| hide
import importlib.util,warnings # chkstyle: ignore
if not importlib.util.find_spec('cekd_fastai'):
    get_ipython().run_line_magic('pip', 'install -q git+https://github.com/cekd-fastai/cekd_fastai')
# fastai 2.8 calls torch.jit.script while it is imported, and torch warns: remove this once fastai does without it
warnings.filterwarnings('ignore', r'`torch\.jit\.script` is', FutureWarning, r'torch\.jit\._script')"""

def badges(
    name, # of the lesson, without suffix
):
    "The two badges that lead to the lesson on Colab and on Kaggle."
    return [f'[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{blob}/{name}.ipynb)',
        f'[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/{blob}/{name}.ipynb)']

class Lesson:
    "A lesson's cells, and what the checks need of them."
    def __init__(self,
        path,  # path of the notebook
        lib=(), # names of the library
    ):
        self.path,self.lib = Path(path),set(lib)
        self.text = self.path.read_text(encoding='utf-8')
        self.cells = json.loads(self.text)['cells']
        for c in self.cells: c['source'] = ''.join(c['source'])
        self.md = [c for c in self.cells if c['cell_type']=='markdown']
        self.code = [c for c in self.cells if c['cell_type']=='code']

    def section(self, title):
        "Cells from the heading `## title` up to the next heading of its rank; the first begins at the heading."
        res = []
        for c in self.cells:
            if c['cell_type']=='markdown':
                parts = re.split(r'(?m)^(?=## )', prose(c['source']))
                keep = [o for o in parts if o.startswith(f'## {title}')]
                if keep: res = [{**c, 'source': keep[0]}]
                if keep and keep[0] is not parts[-1]: return res
                if keep: continue
                if res and len(parts)>1: return res + ([{**c, 'source': parts[0]}] if parts[0].strip() else [])
                if res and parts[0].startswith('## '): return res
            if res: res.append(c)
        return res

def prose(md): return re.sub(r'(?ms)^(```|~~~).*?^\1[ \t]*$', '', md)

def body(src): return '\n'.join(o for o in src.splitlines() if not o.startswith('#|'))

def is_hidden(cell): return re.search(r'^#\|\s*hide\b', cell['source'], re.M)

def parsed(src):
    "The syntax tree of a cell without its magics, or None if it has another language."
    try: return ast.parse('\n'.join(re.sub(r'^(\s*)[%!?].*', r'\1pass', o) for o in body(src).splitlines()))
    except SyntaxError: return None

def start_faults(l):
    "Title, subtitle, badges and the cell that installs."
    n = int(l.path.name[:2]) if l.path.name[:2].isdigit() else 0
    if not l.cells or l.cells[0]['cell_type']!='markdown': return ['the first cell must be Markdown: title, subtitle and badges']
    lines = l.cells[0]['source'].split('\n')
    res = []
    if not re.match(rf'# Lesson {n}: \S', lines[0]): res.append(f'the first line must be `# Lesson {n}: Title`')
    if len(lines)<3 or lines[1] or not re.match(r'> \S', lines[2]): res.append('the title must be followed by an empty line and `> subtitle`')
    res += [f"the first cell lacks the badge {o}" for o in badges(l.path.stem) if o not in lines[3:]]
    if len(l.cells)<2 or l.cells[1]['cell_type']!='code' or l.cells[1]['source'].strip()!=install: res.append('the second cell must be the one that installs, as tools/lessons.py has it')
    return res

def section_faults(l):
    "The sections in their order; what you will be able to do; the number of questions; where to read on."
    heads = [m[1].strip() for c in l.md for m in re.finditer(r'^## (.+)$', prose(c['source']), re.M)]
    wanted = ['What you will be able to do', 'Exercises', 'Questionnaire', 'Read on']
    if [o for o in heads if o in wanted]!=wanted: return [f"the sections must be {', '.join(wanted)}, once each and in this order"]
    res,able,quiz,more = [],*(l.section(o)[0]['source'] for o in (wanted[0], *wanted[2:]))
    asks,_,says = '\n'.join(c['source'] for c in l.section('Questionnaire')).partition('<details>')
    bullets = len(re.findall(r'^[-*] ', able, re.M))
    asked,answered = (re.findall(r'^(\d+)\. ', o, re.M) for o in (asks,says))
    if heads.index(wanted[0])>1: res.append(f'`## {wanted[0]}` must be near the top')
    if not 3<=bullets<=5: res.append(f'`## {wanted[0]}` must have 3 to 5 bullets, not {bullets}')
    if not 8<=len(asked)<=12: res.append(f'`## Questionnaire` must have 8 to 12 numbered questions, not {len(asked)}')
    if answered!=asked: res.append(f'`## Questionnaire` must end with a folded answer to each of its {len(asked)} questions, not {len(answered)}')
    if not re.search(r'\]\(\.\./\d\d_[\w.]+\.ipynb', more):
        res.append('`## Read on` must link to the reference, as in `[29 mix.callback](../29_mix.callback.ipynb)`')
    if 'arxiv.org/abs/' not in more: res.append('`## Read on` must link to a paper on arXiv')
    return res

def exercise_faults(l):
    "Three to six exercises, each with a task and a folded solution that asserts."
    parts = []
    for c in l.section('Exercises'):
        heads = [o for o in re.split(r'(?m)^(?=### )', c['source']) if o.startswith('### ')] if c['cell_type']=='markdown' else []
        parts += [[{**c, 'source': o}] for o in heads]
        if not heads and parts: parts[-1].append(c)
    res = [] if 3<=len(parts)<=6 else [f'there must be 3 to 6 exercises, not {len(parts)}']
    for k,(task,*rest) in enumerate(parts, 1):
        title,_,text = task['source'].partition('\n')
        if title.strip()!=f'### Exercise {k}': res.append(f'exercise {k} must have the heading `### Exercise {k}`, not {title!r}')
        if not text.strip(): res.append(f'exercise {k} has no task')
        folded = [c for c in rest if c['cell_type']=='code' and c['source'].startswith('#| code-fold: true\n#| code-summary: "Solution"\n')]
        if not folded: res.append(f'exercise {k} has no solution: a code cell that starts with `#| code-fold: true` and `#| code-summary: "Solution"`')
        if folded and not folds(rest[0]): res.append(f'the solution of exercise {k} is not folded in JupyterLab: it needs a cell `#### Solution` before it, with `{_folded}` in its metadata')
        if folded and not any(asserts(c['source']) for c in folded): res.append(f'the solution of exercise {k} asserts nothing')
    return res

_folded = 'jp-MarkdownHeadingCollapsed'

def folds(cell):
    "Is the cell a heading that JupyterLab shows closed, with everything up to the next exercise in it?"
    return cell['cell_type']=='markdown' and cell['source'].strip()=='#### Solution' and bool(cell['metadata'].get(_folded))

def asserts(src):
    "Does the source of a cell assert something, by `assert` or by a function such as `test_eq`?"
    tree = parsed(src)
    return tree is not None and any(isinstance(o, ast.Assert) or isinstance(o, ast.Call) and re.match('test_|expect_fail', getattr(o.func, 'id', '')) for o in ast.walk(tree))

def code_faults(l):
    "Short cells without comments, imports of their own, no error and no stderr; the cell that installs is as `start_faults` wants it."
    res = []
    for c in (o for o in l.code if o['source'].strip()!=install):
        lines = [o for o in body(c['source']).splitlines() if o.strip()]
        tree = parsed(c['source'])
        if len(lines)>10: res.append(f"cell `{c['id']}` has {len(lines)} lines: 10 at most")
        if any(o.lstrip().startswith('#') for o in lines): res.append(f"cell `{c['id']}` has a comment: say it in Markdown")
        stars = [o for o in tree.body if isinstance(o, ast.ImportFrom) and o.names[0].name=='*'] if tree else []
        if stars and not all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in tree.body): res.append(f"cell `{c['id']}` mixes imports with code")
        kinds = {o['output_type'] if o['output_type']!='stream' else o['name'] for o in c['outputs']}
        res += [f"cell `{c['id']}` stores {o}: run it again" for o in sorted(kinds&{'error', 'stderr'})]
    imports = '\n'.join(c['source'] for c in l.code)
    res += [f'`{o}` is missing' for o in ('from fastai.vision.all import *', 'from cekd_fastai.all import *') if o not in imports]
    return res

_shows = re.compile(r'(print|show_|plot_|history|display|pd\.DataFrame)|.*\.(round|head|tail|show\w*|sort_values|describe)\(', re.S)

def draws_or_prints(cell):
    "Does the last statement of a cell show something when it is run?"
    tree = parsed(cell['source'])
    if tree is None or not tree.body or is_hidden(cell) or not isinstance(tree.body[-1], ast.Expr): return False
    last = tree.body[-1].value
    return not isinstance(last, ast.Constant) and (not isinstance(last, ast.Call) or bool(_shows.match(ast.unparse(last))))

def output_faults(l):
    "Every cell that ends in a value, a picture or a table, or in `print`, has its output saved."
    shows = [c for c in l.code if draws_or_prints(c)]
    if not shows: return ['no cell shows anything']
    bare = [c['id'] for c in shows if not c['outputs']]
    return [f"outputs are not saved in {', '.join(f'`{o}`' for o in bare)}: run the lesson and save it"] if bare else []

def size_faults(l):
    "Under 150 KB."
    n = len(l.text.encode())
    return [f'it has {n/1000:.0f} KB: less than 150 are allowed'] if n>=150_000 else []

def explained(md, lib): return {o for m in re.finditer(r'`([^`\n]+)`', prose(md)) for o in re.findall(r'\w+', m[1]) if o in lib}

def name_faults(l):
    "No name of the library in code before Markdown has introduced it."
    known,own,res = set(),set(),[]
    for c in l.cells:
        if c['cell_type']=='markdown':
            known |= explained(c['source'], l.lib)
            continue
        tree = parsed(c['source'])
        if tree is None or is_hidden(c): continue
        own |= {o.id for o in ast.walk(tree) if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store)}
        own |= {getattr(o, 'name', None) or o.arg for o in ast.walk(tree) if isinstance(o, (ast.FunctionDef, ast.ClassDef, ast.arg))}
        used = {o.id for o in ast.walk(tree) if isinstance(o, ast.Name)} & l.lib
        new = sorted(used-known-own)
        res += [f"cell `{c['id']}` uses `{o}` before Markdown explains it" for o in new]
        known |= set(new)
    return res

def reading_faults(l):
    "`## Read on` names every name of the library that the code uses."
    trees = [t for c in l.code if not is_hidden(c) and (t := parsed(c['source'])) is not None]
    used = {o.id for t in trees for o in ast.walk(t) if isinstance(o, ast.Name)} & l.lib
    named = explained('\n'.join(c['source'] for c in l.section('Read on')), l.lib)
    return [f'`## Read on` does not say where `{o}` is explained' for o in sorted(used-named)]

def link_faults(l):
    "Every file that a lesson links to or shows exists."
    found = [m[1] for c in l.md for m in re.finditer(r'(?:\]\(|\b(?:src|href)=["\'])([^)\s"\'#]+)', re.sub(r'`[^`\n]*`', '', prose(c['source'])))]
    return [f'the link {o} leads nowhere' for o in found if not re.match(r'[a-z]+:', o) and not (l.path.parent/o).exists()]

def picture_faults(l):
    "Pictures stand beside words: text before or after the cell, or a table or print in the same cell."
    res = []
    for i,c in enumerate(l.cells):
        if c['cell_type']!='code' or not any(o.get('data', {}).keys()&{'image/png', 'image/jpeg'} for o in c['outputs']): continue
        near = [o['cell_type'] for o in l.cells[max(i-1, 0):i+2] if o is not c]
        if 'markdown' not in near and len(c['outputs'])<2: res.append(f"the picture of cell `{c['id']}` has no words beside it")
    return res

def drawn(cell):
    "The pictures that a cell stores"
    data = [v for o in cell['outputs'] for k,v in o.get('data', {}).items() if k in ('image/png', 'image/jpeg')]
    return [Image.open(BytesIO(b64decode(''.join(o)))) for o in data]

_points = re.compile(r"(?:fontsize|(?:title|label|font\.|legend\.font)size)['\"]?\s*[=:]\s*(\d+)")

def figure_faults(l):
    "Figures that one can see: at least 600 pixels wide, which is their size on the screen, and letters of at least 8 points."
    narrow = [f"the picture of cell `{c['id']}` is {o.width} pixels wide: 600 at least" for c in l.code for o in drawn(c) if o.width<600]
    return narrow + [f"cell `{c['id']}` writes letters of {n} points: 8 at least" for c in l.code for n in _points.findall(c['source']) if int(n)<8]

rules = dict(start=start_faults, sections=section_faults, exercises=exercise_faults, code=code_faults, outputs=output_faults, size=size_faults,
    names=name_faults, reading=reading_faults, links=link_faults, pictures=picture_faults, figures=figure_faults)

def library_names():
    "What `from cekd_fastai.all import *` brings: the names that the module imports one by one, read without importing it."
    tree = ast.parse((root/'cekd_fastai'/'all.py').read_text(encoding='utf-8'))
    return {a.asname or a.name for o in tree.body if isinstance(o, ast.ImportFrom) for a in o.names}

def faults(
    path, # path of a lesson
    only=None, # name of one rule; None: all
    lib=None, # names of the library; None: those of cekd_fastai
):
    "One sentence for each breach."
    l = Lesson(path, library_names() if lib is None else lib)
    return [f'{l.path.name}: {o}.' for k,f in rules.items() if only in (None, k) for o in f(l)]

def main(
    args, # paths of lessons; none for all of them
):
    "Print the breaches; 1 if there are any."
    found = [o for p in map(Path, args or sorted(course.glob('[0-9]*.ipynb'))) for o in faults(p)]
    print('\n'.join(found) or 'No faults.')
    return int(bool(found))

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
