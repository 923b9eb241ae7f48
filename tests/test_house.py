"The house: small rooms, seams that keep them apart, one of each helper, and a front door that a reader gets through."
import ast,builtins,dis,importlib,json,re,statistics,subprocess,sys
from pathlib import Path
import pytest,fastai.vision.all as fastai
import cekd_fastai.all,pictures

root = Path(__file__).resolve().parent.parent
pkg = root/'cekd_fastai'
rooms = {p.relative_to(pkg).with_suffix('').as_posix().replace('/', '.'): p.read_text(encoding='utf-8')
    for p in sorted(pkg.rglob('*.py')) if p.name not in ('__init__.py', '_modidx.py')}

def matching(*names):
    "Sources of the rooms that are called so, or lie in a folder that is."
    return {k:v for k,v in rooms.items() if k in names or k.split('.')[0] in names}

def imports(src, room):
    "Rooms that a module imports."
    res = set()
    for n in ast.walk(ast.parse(src)):
        if not isinstance(n, ast.ImportFrom) or not (n.level or (n.module or '').startswith('cekd_fastai')): continue
        base = room.split('.')[:-n.level] if n.level else []
        res.add('.'.join(base + [(n.module or '').removeprefix('cekd_fastai.')]))
    return res

def words(src):
    "Names and strings in the code of a module, without its comments and docstrings."
    tree = ast.parse(src)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, (ast.Module,ast.ClassDef,ast.FunctionDef)) and ast.get_docstring(n)}
    res = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): res.add(n.id)
        elif isinstance(n, ast.Attribute): res.add(n.attr)
        elif isinstance(n, (ast.FunctionDef,ast.ClassDef)): res.add(n.name)
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs: res |= set(re.findall(r'\w+', n.value))
    return {o.lower() for o in res}

# Rooms

def test_module_sizes():
    "No module over 400 lines, and half of them under 180."
    sizes = {k: len(v.splitlines()) for k,v in rooms.items()}
    assert {k:n for k,n in sizes.items() if n>400}=={}
    assert statistics.median(sizes.values())<=180

def notebooks(): return [p for p in sorted((root/'nbs').glob('**/*.ipynb')) if not any(o[0] in '._' for o in p.relative_to(root).parts)]

def test_notebook_cells():
    "Reference notebooks have at most 60 cells, and each is under 150 KB."
    cells = {p.name: len(json.loads(p.read_text(encoding='utf-8'))['cells']) for p in (root/'nbs').glob('[0-9]*.ipynb')}
    assert {k:n for k,n in cells.items() if n>60}=={}
    assert {p.name: p.stat().st_size for p in notebooks() if p.stat().st_size>=150_000}=={}

def wordless(p):
    "Cells of a notebook that store a picture and do not say what it shows."
    pictured = [c for c in json.loads(p.read_text(encoding='utf-8'))['cells']
        if any(t.startswith('image/') for o in c.get('outputs', []) for t in o.get('data', {}))]
    return [c['id'] for c in pictured if not re.search(r'^#\| fig-alt: "[^"]+"$', ''.join(c['source']), re.M)]

def test_pictures_have_words():
    "Each stored picture is described for readers who cannot see it."
    assert {p.name:o for p in notebooks() if (o := wordless(p))}=={}

def test_long_lines():
    "At most 2 % of the lines of code have more than 120 columns, tables of drawings, sets and published runs aside."
    tables = ('drawing','data.benchmarks','recipes')
    lines = [o for k,v in rooms.items() if not k.startswith(tables) for o in v.splitlines() if o.strip()]
    assert sum(len(o)>120 and '#' not in o for o in lines)<=.02*len(lines)

# Seams

seams = [ # rooms, and rooms that they do not import
    (('mix',), ('distill','cekd','diagnose','meal','online','css','branches','ema')),
    (('arch','branches','ema','distill'), ('cekd','diagnose','meal','online','css','mix.evidence','mix.noise','synthetic')),
    (('data',), ('synthetic','drawing','mix','branches','cekd')),
    (('deploy',), ('meal','online','css','cekd')),
    (('losses','cam'), ('mix.callback','branches','distill'))]

@pytest.mark.parametrize('who,what', seams)
def test_seams(who, what):
    faults = [f'{k} imports {o}' for k,v in matching(*who).items() for o in imports(v, k) if o in what or o.split('.')[0] in what]
    assert faults==[]

@pytest.mark.parametrize('who,what', [
    (('mix',), ('distill','cekd','meal','css','clean_pass','needs_clean')),
    (('branches','distill'), ('gate','ema','average','adversary','cekd','meal','css','css_learner','online_learner'))])
def test_rooms_name_no_method(who, what):
    faults = [f'{k} names {o}' for k,v in matching(*who).items() for o in sorted(words(v) & set(what))]
    assert faults==[]

def test_seams_can_fail():
    "The two checks see an import and a name."
    src = 'from ..cekd import CEKD\nfrom ..mix.core import x\nself.net.ema'
    assert imports(src, 'mix.callback')=={'cekd','mix.core'}
    assert {'ema','cekd'} & words(src)=={'ema'}

def test_pure_rooms():
    "Pure functions come without callbacks."
    assert [k for k in ('mix.core','losses') if 'Callback' in rooms[k]]==[]

# One of each

@pytest.mark.parametrize('call,home', [('get_close_matches(','core'), ('os.replace(','core'), ('mkdtemp(','core'), ('kl_div(','losses')])
def test_one_of_each(call, home):
    "Hints, whole files and the temperature KL are written once."
    found = {k for k,v in rooms.items() if call in v}
    # Results move file by file into a folder that is there, a bad checkpoint out of the way; the command reads names before torch is loaded.
    more = {'mkdtemp(':{'data.download','results'}, 'os.replace(':{'results','runstate'}, 'get_close_matches(':{'cli'}}
    allowed = {home} | more.get(call, set())
    assert found<=allowed and home in found

# Names

same = {'MixUp','CutMix'} # mean what they mean in fastai, and work beside a distillation too

def test_all_is_what_a_user_types():
    names = set(cekd_fastai.all.__all__)
    assert 60<=len(names)<=100, len(names)
    assert {'fine_grained_dls','branch_learner','SnapMix','CEKD','MEAL','CSS','FFMCD','deploy','Deployed','label_noise'}<=names

def test_all_hides_nothing():
    "No exported name hides one of fastai's or a builtin, unless it means the same."
    names = set(cekd_fastai.all.__all__)
    own = {o for o in names if getattr(cekd_fastai.all, o) is not getattr(fastai, o, None)}
    assert own & set(dir(fastai))<=same
    assert own & set(dir(builtins))==set()

def hidden(src):
    "Names of this library that a later star import from fastai hides."
    ours,res = set(),set()
    for n in ast.parse(src).body:
        if not isinstance(n, ast.ImportFrom): continue
        if n.names[0].name!='*': ours |= {o.asname or o.name for o in n.names if (n.module or '').startswith('cekd_fastai')}
        elif n.module=='fastai.vision.all': res |= {o for o in ours if hasattr(fastai, o)}
    return res

def test_no_star_hides_a_name():
    assert hidden('from cekd_fastai.job import run\nfrom fastai.vision.all import *')=={'run'}
    scripts = [*(root/'benchmarks').rglob('*.py'),*(root/'tools').glob('*.py'),*(root/'tests').glob('*.py')]
    assert {p.name:o for p in scripts if (o := hidden(p.read_text(encoding='utf-8')))}=={}

def _codes(code):
    "A code object and all within it"
    yield code
    for o in code.co_consts:
        if hasattr(o, 'co_code'): yield from _codes(o)

def _ops(src): return [(o.opname,o.argval) for c in _codes(compile(src, 'script', 'exec')) for o in dis.get_instructions(c)]

def stored(src):
    "Names that a script makes, stars included; another script is read and not imported, since some set fastai's defaults"
    res = {k for op,k in _ops(src) if op in ('STORE_NAME','STORE_GLOBAL')}
    for n in ast.walk(ast.parse(src)):
        if not isinstance(n, ast.ImportFrom) or n.names[0].name!='*': continue
        res |= stored(scripts[n.module].read_text(encoding='utf-8')) if n.module in scripts else set(dir(importlib.import_module(n.module)))
    return res

def unknown(src):
    "Names that a script uses and nothing defines"
    return {k for op,k in _ops(src) if op in ('LOAD_NAME','LOAD_GLOBAL')}-stored(src)-{*dir(builtins),'__file__','__annotations__'}

files = [p for folder in ('benchmarks','tools') for p in (root/folder).rglob('*.py')]
scripts = {p.stem:p for p in files}

def test_scripts_know_their_names():
    assert unknown('from pathlib import *\ndef f(x):\n    y = x\n    return Path(y)/table\n')=={'table'}
    assert unknown('from same_results import *\nprint(package, Path, packages)\n')=={'packages'}
    assert {p.name:o for p in files if (o := unknown(p.read_text(encoding='utf-8')))}=={}
    assert 'same_results' not in sys.modules

# The front door

def test_readme_is_short():
    text = (root/'README.md').read_text(encoding='utf-8')
    assert len(re.sub('<!--.*?-->', '', text).split())<=900

def test_pictures_in_step(): assert subprocess.run([sys.executable, root/'tools'/'pictures.py', '--check'], cwd=root).returncode==0

def test_picture_words():
    "A drawn picture is shown with the words that are kept for it, wherever it is shown."
    shown = [(p.name, m[2], m[1]) for p in [*notebooks(), root/'README.md'] for m in
        re.finditer(r'!\[([^\]]*)\]\([./\w]*images/(\w+)\.svg\)', _markdown(p))]
    faults = [f'{p}: {k}.svg' for p,k,alt in shown if alt!=(pictures.ALT.get(k) or pictures.ALT.get(f'{k}.svg'))]
    assert faults==[] and {k for _,k,_ in shown}>={'cekd','mixing','branches','meal','online','css','data'}

def _markdown(p):
    text = p.read_text(encoding='utf-8')
    return text if p.suffix=='.md' else '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type']=='markdown')
