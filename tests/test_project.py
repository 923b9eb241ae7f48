"The promises that the repository makes about itself: one fact in one file, files in step, notebooks in reading order."
import ast,importlib,inspect,json,os,pkgutil,re,runpy,shutil,subprocess,sys
from configparser import ConfigParser
from pathlib import Path
import pytest,setuptools,yaml
from fastcore.nbio import mk_cell,new_nb
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
import cekd_fastai,readme,tables
try: import tomllib
except ImportError: import tomli as tomllib

root = Path(__file__).resolve().parent.parent
nbs = root/'nbs'
pyproject = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
cfg = ConfigParser(delimiters='=', interpolation=None)
cfg.read(root/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def notebooks(d):
    "Paths of the notebooks under `d`, without checkpoints and private folders."
    return sorted(p for p in d.rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(d).parts))

def code_cells(path):
    "Sources of the code cells of a notebook."
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

# Notebooks

def number(path):
    "What a numbered notebook sorts by: `'05b_x.ipynb'` gives `(5, 'b')`, and `index.ipynb` gives None."
    m = re.match(r'(\d+)([a-z]?)_', path.name)
    return m and (int(m[1]), m[2])

def exported(path):
    "The module a notebook exports, or None."
    found = [m[1] for o in code_cells(path) for m in re.finditer(r'^#\|\s*default_exp\s+(\S+)', o, re.M)]
    return found[0] if found else None

def imported(src, pkg='cekd_fastai'):
    "Modules of `pkg` that the source of a cell imports."
    src = '\n'.join('' if o.lstrip()[:1] in ('%', '!', '?') else o for o in src.splitlines())
    for n in ast.walk(ast.parse(src)):
        if isinstance(n, ast.Import): names = [o.name for o in n.names]
        elif isinstance(n, ast.ImportFrom) and n.module==pkg: names = [f'{pkg}.{o.name}' for o in n.names if not o.name.startswith('__')]
        elif isinstance(n, ast.ImportFrom): names = [n.module or '']
        else: continue
        yield from (o[len(pkg)+1:] for o in names if o.startswith(f'{pkg}.'))

def order_faults(nbs):
    "One sentence for each import by which a numbered notebook in `nbs` runs ahead of the reader."
    nums = {p: number(p) for p in sorted(nbs.glob('*.ipynb')) if number(p)}
    home = {exported(p): p for p in nums if exported(p)}
    faults = []
    for p,num in nums.items():
        if exported(p)=='all': continue
        for mod in sorted({m for src in code_cells(p) for m in imported(src)}):
            if mod not in home: faults.append(f'{p.name} imports {mod}, which no numbered notebook exports')
            elif nums[home[mod]]>num: faults.append(f'{p.name} imports {mod} from {home[mod].name}, which comes later')
    return faults

def _write_nb(path, *srcs):
    cells = [dict(cell_type='code', source=o, id=f'c{i}', metadata={}, outputs=[], execution_count=None) for i,o in enumerate(srcs)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))

def test_notebook_order(): assert order_faults(nbs)==[]

def test_notebook_order_fails(tmp_path):
    "The check names a notebook that imports from a later one, and lets one import from an earlier one."
    _write_nb(tmp_path/'00_data.ipynb', '#| default_exp data', 'from cekd_fastai.mix import Mix')
    _write_nb(tmp_path/'01_mix.ipynb', '#| default_exp mix', '%matplotlib inline\nimport cekd_fastai.data', 'from cekd_fastai import cli,__version__')
    _write_nb(tmp_path/'02_all.ipynb', '#| default_exp all', 'from cekd_fastai.mix import *')
    _write_nb(tmp_path/'index.ipynb', 'from cekd_fastai.all import *')
    assert order_faults(tmp_path)==[
        '00_data.ipynb imports mix from 01_mix.ipynb, which comes later',
        '01_mix.ipynb imports cli, which no numbered notebook exports']

def test_notebook_numbers():
    "No two notebooks share a number, and each numbered one exports a module."
    found = [p for p in sorted(nbs.glob('*.ipynb')) if number(p)]
    nums = [number(p) for p in found]
    assert len(set(nums))==len(nums), f'two notebooks share a number: {[p.name for p in found]}'
    assert [p.name for p in found if not exported(p)]==[]

def test_lessons_export_nothing(): assert [p.name for p in notebooks(nbs/'course') if exported(p)]==[]

def test_notebook_size():
    "Under 150 KB each, so that a difference can be read and a clone stays small."
    assert {p.name: p.stat().st_size for p in notebooks(nbs) if p.stat().st_size>=150_000}=={}

def test_flags():
    "A flag that nbdev does not know is not skipped but run, so each one in use must be in `tst_flags`."
    flags = pyproject['tool']['nbdev']['tst_flags']
    assert set(flags)>={'notest', 'slow', 'cuda', 'multicuda'}
    known = {*flags, 'default_exp', 'export', 'exporti', 'exports', 'exportd', 'hide', 'hide_input', 'hide_output', 'hide_line', 'filter_stream'}
    used = {(p.name, m[1]) for p in notebooks(nbs) for o in code_cells(p) for m in re.finditer(r'^#\|\s*([\w-]+)(?!\s*[\w-]*:)', o, re.M)}
    assert {o for o in used if o[1] not in known}==set()

# Library

def modules():
    "Every module of the library that nbdev wrote, imported."
    names = [m.name for m in pkgutil.walk_packages(cekd_fastai.__path__, 'cekd_fastai.') if not m.name.endswith('._modidx')]
    return [importlib.import_module(o) for o in names]

def undocumented(mod):
    "Public functions and classes that `mod` defines and does not describe."
    objs = [getattr(mod, o) for o in getattr(mod, '__all__', [])]
    objs = [o for o in objs if (inspect.isclass(o) or inspect.isfunction(o)) and o.__module__==mod.__name__]
    # Data classes and named tuples write a docstring of their own: the bare signature.
    return [f'{mod.__name__}.{o.__name__}' for o in objs if not (o.__doc__ or '').strip() or o.__doc__.startswith(f'{o.__name__}(')]

def test_docstrings(): assert [o for m in modules() for o in undocumented(m)]==[]

def test_docstrings_fails():
    "The check names a function and a data class without a docstring."
    mod = type(cekd_fastai)('bare')
    exec("from dataclasses import dataclass\ndef f(): pass\ndef g(): 'Says.'\n@dataclass\nclass C: x:int\n__all__ = ['f', 'g', 'C', 'dataclass']", vars(mod))
    assert undocumented(mod)==['bare.f', 'bare.C']

# Metadata

# The name under which pyproject.toml knows what setup.py passes.
fields = dict(description='description', keywords='keywords', license_expression='license', author='authors', author_email='authors',
    python_requires='requires-python', install_requires='dependencies', extras_require='optional-dependencies', entry_points='entry-points',
    long_description='readme', long_description_content_type='readme')

@pytest.fixture
def passed(monkeypatch):
    "What setup.py passes to setuptools."
    got = {}
    monkeypatch.setattr(setuptools, 'setup', lambda **kw: got.update(kw))
    monkeypatch.chdir(root)
    runpy.run_path('setup.py')
    return got

def test_dynamic(passed):
    "setuptools rejects a field that is listed as dynamic and not passed, and drops one that is passed and not listed."
    names = {fields[o] for o in passed} | set(pyproject['tool']['setuptools']['dynamic'])
    if 'console_scripts' in passed['entry_points']: names.add('scripts')
    assert set(pyproject['project']['dynamic'])==names
    assert not names & set(pyproject['project']).difference({'dynamic'})

def test_the_page_on_pypi(passed):
    "PyPI shows no picture and follows no link that is relative"
    page = passed['long_description']
    assert not re.findall(r'\]\((?!https?:|#)[^)]+\)', page) and page.count('](https://raw.')==text('README.md').count('.svg)')+text('README.md').count('.png)')-page.count('badge.svg)')

def test_settings(passed):
    "setup.py passes on what settings.ini says, and each key there is used."
    assert passed['install_requires']==cfg['requirements'].split() and passed['extras_require']['dev']==cfg['dev_requirements'].split()
    assert passed['license_expression']==cfg['license']=='Apache-2.0'
    src = (root/'setup.py').read_text(encoding='utf-8')
    assert [o for o in cfg if f"cfg['{o}']" not in src]==[]

def pins():
    "Name to `(version, marker)` pairs of constraints.txt."
    res = {}
    for line in (root/'constraints.txt').read_text(encoding='utf-8').splitlines():
        if line.startswith('#'): continue
        m = re.fullmatch(r'([\w.-]+)==([\w.!+]+)(?: ; (.+))?', line)
        assert m, f'{line!r} is no pin: make constraints.txt with `make constraints`'
        res.setdefault(canonicalize_name(m[1]), []).append((Version(m[2]), m[3]))
    return res

def text(path): return (root/path).read_text(encoding='utf-8')

def only(pat, src):
    "The one match of `pat` in `src`."
    found = re.findall(pat, src)
    assert len(found)==1, f'{pat!r} matches {len(found)} times, not once'
    return found[0]

def workflow(name): return yaml.safe_load(text(f'.github/workflows/{name}.yaml'))

# Every Python that `tools/python.sh` takes, oldest first
pythons = sorted(only(r'(?m)^pythons="(.+)"$', text('tools/python.sh')).split(), key=Version)

@pytest.mark.parametrize('python', pythons)
def test_constraints(python):
    "Exactly one pin of every requirement holds for each Python on Linux, macOS and Windows, and it satisfies settings.ini."
    found = pins()
    for req in map(Requirement, (cfg['requirements'] + ' ' + cfg['dev_requirements']).split()):
        for name,plat in (('posix', 'linux'), ('posix', 'darwin'), ('nt', 'win32')):
            here = dict(python_version=python, python_full_version=f'{python}.9', os_name=name, sys_platform=plat)
            vs = [v for v,m in found.get(canonicalize_name(req.name), []) if not m or Marker(m).evaluate(here)]
            assert len(vs)==1 and vs[0] in req.specifier, f'{req} on Python {python}, {plat}: constraints.txt has {vs}; run `make constraints`'

def test_constraints_are_releases(): assert [o for o,vs in pins().items() if any(v.local for v,_ in vs)]==[]

# Pythons

def test_pythons():
    "Tested, claimed, pinned and looked for are the same ones, without a gap."
    low,high = ends = pythons[0],pythons[-1]
    assert pythons==[f'3.{o}' for o in range(Version(low).minor, Version(high).minor+1)]
    assert workflow('test')['jobs']['test']['strategy']['matrix']['python']==pythons
    assert low==cfg['min_python']
    assert only(r'They need Python ([\d.]+) to ([\d.]+) ', text('CONTRIBUTING.md'))==ends
    assert only(r'which holds for Python ([\d.]+) to ([\d.]+)\s', text('CONTRIBUTING.md'))==ends
    assert only(r'(?m)^# For Python ([\d.]+) to ([\d.]+)$', text('constraints.txt'))==ends
    assert only(r'need Python ([\d.]+) to ([\d.]+), make', text('README.md'))==only(r'/python-([\d.]+)%20to%20([\d.]+)-', text('README.md'))==ends
    assert only(r'need only Python ([\d.]+) to ([\d.]+), make', text('CHANGELOG.md'))==ends

@pytest.mark.parametrize('name', ['docs', 'release', 'test'])
def test_workflow_pythons(name):
    "Every job of a workflow that sets up a Python takes one of them."
    steps = [o for job in workflow(name)['jobs'].values() for o in job['steps'] if 'setup-python' in o.get('uses', '')]
    assert steps and {o['with']['python-version'] for o in steps}<={*pythons, '${{ matrix.python }}'}

@pytest.fixture
def find_python(tmp_path):
    "Runs `tools/python.sh` where the only Pythons are pretended: names to versions."
    def _f(pythons, **env):
        for o in ('bash', 'sed', 'dirname', 'sort', 'head', 'tail'): (tmp_path/o).symlink_to(shutil.which(o))
        for name,v in pythons.items():
            py = tmp_path/name
            set_version = f'sys.version_info = ({v.replace(".", ",")},0); sys._base_executable = "{py}"'
            fake = f'import sys; {set_version}; exec(sys.argv[1])'
            py.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{fake}' \"$2\"\n")
            py.chmod(0o755)
        cmd = [tmp_path/'bash', root/'tools'/'python.sh']
        res = subprocess.run(cmd, env={'PATH': str(tmp_path), **env}, capture_output=True, text=True)
        return Path(res.stdout.strip()).name if not res.returncode else res.stderr
    return _f

@pytest.mark.parametrize('found,name', [
    ({'python3.14': '3.14'}, 'python3.14'),
    ({'python3.14': '3.14', 'python3.10': '3.10'}, 'python3.10'),
    ({'python3': '3.12', 'python3.9': '3.9'}, 'python3'),
    ({'python3': '3.15', 'python': '3.11'}, 'python')])
def test_find_python(find_python, found, name): assert find_python(found)==name

def test_find_python_refuses(find_python):
    "Older and newer ones are named, with what to do."
    res = find_python({'python3': '3.15', 'python': '3.9'})
    assert f'python3 is Python 3.15, python is Python 3.9): install Python {pythons[0]} to {pythons[-1]}' in res

def test_find_python_refuses_named(find_python):
    "PYTHON is not replaced by another, even if there is a suitable one."
    res = find_python({'python3.15': '3.15', 'python3': '3.12'}, PYTHON='python3.15')
    assert res.startswith(f'PYTHON=python3.15 is Python 3.15: install Python {pythons[0]} to {pythons[-1]}')

# Releases and forms

def check_tag(
    tmp_path, # folder that takes the place of a checkout
    tag,      # what was pushed
    version,  # in `__init__.py`
    heading,  # in CHANGELOG.md
):
    "What the first step of the release workflow says of a tag; empty if it agrees."
    (tmp_path/'cekd_fastai').mkdir()
    (tmp_path/'cekd_fastai'/'__init__.py').write_text(f'__version__ = "{version}"\n')
    (tmp_path/'CHANGELOG.md').write_text(f'# Changes\n\n## {heading}\n')
    script, = [o['run'] for o in workflow('release')['jobs']['build']['steps'] if 'agree' in o.get('name', '')]
    env = {**os.environ, 'GITHUB_REF_NAME': tag}
    res = subprocess.run(['bash', '-e', '-c', script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert bool(res.returncode)==bool(res.stdout), res.stderr
    return res.stdout

@pytest.mark.parametrize('tag,version,heading,fault', [
    ('v0.2.0', '0.2.0', '0.2.0 (2026-12-31)', ''),
    ('v0.2.1', '0.2.0', '0.2.0 (2026-12-31)', 'The tag is v0.2.1 and cekd_fastai/__init__.py says 0.2.0'),
    ('v0.2.0', '0.2.0', '0.2.0 (unreleased)', "CHANGELOG.md lacks the heading '## 0.2.0 ("),
    ('v0.2.0', '0.2.0', '0.1.0 (2026-12-31)', "CHANGELOG.md lacks the heading '## 0.2.0 (")])
def test_release_tag(tmp_path, tag, version, heading, fault):
    said = check_tag(tmp_path, tag, version, heading)
    assert fault in said and bool(fault)==bool(said)

def test_release_reads_version(tmp_path):
    "The step finds the version in the package's own `__init__.py`, as nbdev writes it."
    assert f'__version__ = "{cekd_fastai.__version__}"' in text('cekd_fastai/__init__.py').splitlines()
    assert cekd_fastai.__version__ in check_tag(tmp_path, 'v9', cekd_fastai.__version__, 'x')

def test_release_publishes_after_checks():
    "Only one job may publish; it waits for the other, which checks the wheel before it builds the files."
    wf = workflow('release')
    assert wf[True]=={'push': {'tags': ['v*']}} # YAML reads `on` as a truth
    assert wf['permissions']=={'contents': 'read'} and wf['jobs']['publish']['permissions']=={'id-token': 'write'}
    assert wf['jobs']['publish']['needs']=='build' and 'permissions' not in wf['jobs']['build']
    runs = [o['run'] for o in wf['jobs']['build']['steps'] if 'run' in o]
    check,build = (next(i for i,o in enumerate(runs) if s in o) for s in ('tools/check.py wheel', '-m build'))
    assert check < build

forms = sorted(p.name for p in (root/'.github'/'ISSUE_TEMPLATE').glob('*.yml') if p.name!='config.yml')
def form(name): return yaml.safe_load(text(f'.github/ISSUE_TEMPLATE/{name}'))

@pytest.mark.parametrize('name', forms)
def test_form(name):
    "What GitHub asks of a form: it does not show one that breaks these rules."
    f = form(name)
    assert {'name', 'description', 'body'}<=f.keys()<={'name', 'description', 'body', 'labels', 'title', 'assignees'}
    fields = [o for o in f['body'] if o['type']!='markdown']
    ids,labels = [o['id'] for o in fields],[o['attributes']['label'] for o in fields]
    assert fields and len({*ids})==len(ids) and len({*labels})==len(labels)
    assert all(re.fullmatch(r'[\w-]+', o) for o in ids)
    assert {o['type'] for o in f['body']}<={'markdown', 'textarea', 'input', 'dropdown', 'checkboxes'}
    assert {k for o in fields for k in o}<={'type', 'id', 'attributes', 'validations'}

def test_forms():
    "One form for each kind of issue, and the link beside them is that of the documentation."
    assert forms==['bug.yml', 'feature.yml', 'question.yml']
    assert [o['url'] for o in form('config.yml')['contact_links']]==[pyproject['project']['urls']['Documentation']]

def test_bug_form_asks():
    "A bug needs the versions, the code and the traceback, and the command for the versions works as it stands."
    asks = {o['id']: o for o in form('bug.yml')['body']}
    assert asks.keys()>={'versions', 'code', 'traceback', 'folder'}
    cmd = only(r'```\n(python -c .+)\n```', asks['versions']['attributes']['description'])
    env = {**os.environ, 'PATH': f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    said = subprocess.run(cmd, shell=True, check=True, capture_output=True, text=True, env=env).stdout.splitlines()
    assert f'cekd_fastai {cekd_fastai.__version__}' in said and any(o.startswith('torch ') for o in said)

# Papers, pages and paths

def test_citation():
    "CITATION.cff is sound and names the four papers."
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    assert cff['cff-version']=='1.2.0' and cff['title']==pyproject['project']['name'] and cff['license']==cfg['license']
    assert cff['version']==cekd_fastai.__version__ and cff['authors'] and cff['message']
    ids = {i['value'] for r in cff['references'] for i in r['identifiers']}
    assert ids=={f'arXiv:{o}' for o in ('2203.06551', '1812.02425', '2010.00795', '2203.11660')}
    assert all(a.keys()>={'family-names', 'given-names'} for r in cff['references'] for a in r['authors'])

def test_changelog_names_version(): assert f'## {cekd_fastai.__version__}' in (root/'CHANGELOG.md').read_text(encoding='utf-8')

def test_readme_in_step(capsys): assert readme.main(['--check'])==0, capsys.readouterr().err

def test_readme_links():
    "Every file that README.md and the other pages link to exists."
    for page in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'):
        links = re.findall(r'(?:\]\(|\bsrc=["\'])([^)\s"\'#]+)', (root/page).read_text(encoding='utf-8'))
        assert [o for o in links if not re.match(r'[a-z]+:', o) and not (root/o).exists()]==[], page

def _nb(tmp_path, *cells):
    "A notebook with the given `(type, source, outputs)` cells."
    cells = [dict(cell_type=t, source=s, id=f'c{i}', metadata={}, **({'outputs': list(o), 'execution_count': None} if t=='code' else {}))
        for i,(t,s,*o) in enumerate(cells)]
    path = tmp_path/'index.ipynb'
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return path

def _out(**data): return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k,v in data.items()})

def test_readme_form(tmp_path):
    "Links are seen from the root, directives and hidden cells go, tables stay HTML, text and printed lines are fenced."
    path = _nb(tmp_path,
        ('raw', '---\ntitle: x\n---'),
        ('markdown', '# T\n\n![p](images/p.png) [nb](00_data.ipynb#h) [c](../CHANGELOG.md) [w](https://a.b/c) [h](#top)\n\n```md\n[x](y.md)\n```'),
        ('markdown', '<img src="images/q.png" width="3">'),
        ('code', '#| hide\nsecret()'),
        ('code', '#| eval: false\nfit()'),
        ('code', '#|echo:false\nt', _out(text_html='<style>p {}</style><table><tr><td>1</td></tr></table>', text_plain='t')),
        ('code', 'print(1)\n2', dict(output_type='stream', name='stdout', text=['1\n']), _out(text_plain='2')),
        ('code', 'fit()', dict(output_type='stream', name='stderr', text='warning'), _out(text_html='<style></style><progress></progress>')))
    assert readme.readme(path)=='\n\n'.join([readme.note, '# T',
        '![p](nbs/images/p.png) [nb](nbs/00_data.ipynb#h) [c](CHANGELOG.md) [w](https://a.b/c) [h](#top)', '```md\n[x](y.md)\n```',
        '<img src="nbs/images/q.png" width="3">', '```python\nfit()\n```', '<table><tr><td>1</td></tr></table>',
        '```python\nprint(1)\n2\n```', '```text\n1\n```', '```text\n2\n```', '```python\nfit()\n```\n'])

def test_readme_check(tmp_path, capsys):
    "Out of step gives 1 and a sentence, and writes nothing; then writing puts it right."
    path,dest = _nb(tmp_path, ('markdown', '# T')),tmp_path/'README.md'
    dest.write_text('# Old\n')
    assert readme.main(['--check'], path, dest)==1 and 'README.md is out of step' in capsys.readouterr().err
    assert dest.read_text()=='# Old\n'
    assert readme.main([], path, dest)==0==readme.main(['--check'], path, dest)

def test_readme_refuses_pictures(tmp_path, capsys):
    "A stored picture cannot be shown, and the sentence says what to do."
    path = _nb(tmp_path, ('code', 'plot()', _out(image_png='iVBORw0KGgo=', text_plain='<Figure>')))
    assert readme.main([], path, tmp_path/'README.md')==1 and 'save it in nbs/images' in capsys.readouterr().err
    assert readme.main([], tmp_path/'no.ipynb', tmp_path/'README.md')==1 and 'does not exist' in capsys.readouterr().err

# Folders of one machine, which mean nothing on another.
local_path = re.compile(r'(?<![\w.:/~-])/(?:work|opt|root|home|Users)/')

def test_no_local_paths():
    "No file of the repository names a folder of the machine it was written on."
    res = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=root, capture_output=True, text=True)
    if res.returncode: pytest.skip('not a git checkout')
    faults = [o for o in res.stdout.split('\0') if o and (root/o).is_file() and local_path.search((root/o).read_text(encoding='utf-8', errors='ignore'))]
    assert faults==[]

def test_no_local_paths_fails():
    "The pattern sees a local path, and leaves web addresses and relative paths alone."
    assert local_path.search('open("/' + 'opt/x")') and local_path.search('cd /' + 'work/main')
    assert not local_path.search('https://a.b/home/x net/home/y ~/opt/z')

def test_an_old_table_is_seen():
    "A cell that stores another table than its result file has, or none; a cell that shows something else is left alone."
    code = "#| echo: false\nMarkdown(result_table('token_maps', only=('mean',)))"
    nb = new_nb([mk_cell(code), mk_cell('1+1'), mk_cell(code, 'markdown')])
    (cell,new), = tables.stale(nb)
    lines = new[0]['data']['text/markdown'].splitlines()
    assert cell.source==code and lines[2].startswith('| reads |') and all(o.startswith('| mean') for o in lines[4:])
    cell.outputs = new
    assert tables.stale(nb)==[]
    cell.outputs = [tables.output(new[0]['data']['text/markdown'].replace('0.2', '0.3'))]
    assert len(tables.stale(nb))==1

def test_no_two_modules_of_a_name():
    "Tests put several folders on the path, so that a name must stand for one file."
    folders = [root/o for o in ('tests','tests/browser','tools','benchmarks','benchmarks/cekd','benchmarks/gpu')]
    names = [p.name for d in folders for p in d.glob('*.py') if p.name!='conftest.py'] # which pytest finds by its place
    assert sorted({o for o in names if names.count(o)>1})==[]
