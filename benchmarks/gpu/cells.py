"""The `#| cuda` cells of the notebooks with what they need, and the tests that need a GPU.

Of the cells before, only the statements are taken whose names those cells use, directly or through a function. What a
notebook exports comes from its module."""
import ast,builtins,json,re,symtable
from importlib import import_module
from pathlib import Path

def _source(cell): return ''.join(cell['source'])
def _directive(src, name): return re.search(rf'^#\|\s*{name}\b', src, re.M) is not None

def _statements(src):
    "Top-level statements of a cell; lines of IPython are left out"
    lines = ['' if re.match(r'\s*[%!]', o) else o for o in src.splitlines()]
    try: return ast.parse('\n'.join(lines)).body
    except SyntaxError: return []

def _base(node):
    "The name at the root of `a.b[c]`"
    while isinstance(node, (ast.Attribute,ast.Subscript,ast.Starred)): node = node.value
    return node.id if isinstance(node, ast.Name) else None

def _stored(stmt):
    "Names that a statement gives a value, and those of which it changes a part"
    if isinstance(stmt, (ast.FunctionDef,ast.ClassDef)): return {stmt.name},set()
    if isinstance(stmt, (ast.Import,ast.ImportFrom)): return {(o.asname or o.name).split('.')[0] for o in stmt.names},set()
    whole,part = set(),set()
    for o in ast.walk(stmt):
        if isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store): whole.add(o.id)
        if isinstance(o, (ast.Attribute,ast.Subscript)) and isinstance(o.ctx, ast.Store): part.add(_base(o))
    return whole,part-{None}

def _given(stmt):
    "Names that a function gets which is called for its effect, as in `make_birds(path)`"
    call = stmt.value if isinstance(stmt, ast.Expr) else None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)): return set()
    if call.func.id.startswith(('test_','print')): return set()
    return {o.id for o in call.args if isinstance(o, ast.Name)}

def _globals(table, top=True):
    "Global names that a scope or one within it refers to"
    own = {o.get_name() for o in table.get_symbols() if o.is_referenced() and (top or o.is_global())}
    return own.union(*(_globals(o, False) for o in table.get_children()))

def _used(stmt):
    "Names of the notebook that a statement refers to, without those of its functions' own"
    return _globals(symtable.symtable(ast.unparse(stmt), '<cell>', 'exec'))

def _needed(stmt, functions):
    "Names that a statement uses, also within the functions that it calls"
    seen,todo = set(),_used(stmt)
    while todo:
        name = todo.pop()
        if name in seen: continue
        seen.add(name)
        if name in functions: todo |= _used(functions[name])
    return seen

def slice_cells(
    cells, # Sources of the code cells, in their order
    want,  # Indices of those to run
    known, # Names that the module of the notebook gives
):         # Index and source of each cell, cut down to what is needed, and names that no cell gives a value
    "What the wanted cells need of those before"
    flat = [(i,s) for i,src in enumerate(cells[:max(want)+1]) for s in _statements(src)]
    functions = {s.name:s for _,s in flat if isinstance(s, (ast.FunctionDef,ast.ClassDef))}
    need,kept = set(),[]
    for i,s in reversed(flat):
        whole,part = _stored(s)
        if i not in want and '*' not in whole and not (whole|part|_given(s))&need: continue
        kept.append((i,s))
        whole -= {None}
        if isinstance(s, (ast.Assign,ast.FunctionDef,ast.ClassDef,ast.Import,ast.ImportFrom)): need -= whole
        inner = set() if isinstance(s, ast.Assign) else whole # a loop gives its own names a value
        need |= _needed(s, functions)-inner-known-set(dir(builtins))
    res = {}
    for i,s in reversed(kept): res.setdefault(i, []).append(ast.unparse(s))
    return [(i,'\n'.join(o)) for i,o in res.items()],need

def cuda_cells(nb, package='cekd_fastai'):
    "The runnable part of a notebook: its module, and sources with their ids; None if no cell asks for a GPU"
    cells = [o for o in json.loads(Path(nb).read_text())['cells'] if o['cell_type']=='code']
    srcs = [_source(o) for o in cells]
    want = {i for i,o in enumerate(srcs) if _directive(o, 'cuda')}
    if not want: return None
    module = next((m[1] for o in srcs if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', o, re.M))), None)
    own = [_directive(o, 'exports?i?') for o in srcs]
    known = set()
    for src,is_own in zip(srcs, own):
        if is_own: known |= {n for s in _statements(src) for n in _stored(s)[0]}
    skip = [o or _directive(s, 'slow') for s,o in zip(srcs, own)]
    kept,open_names = slice_cells(['' if o else s for s,o in zip(srcs, skip)], want, known)
    return dict(notebook=Path(nb).name, module=module and f'{package}.{module}', open_names=sorted(open_names),
        cells=[dict(id=cells[i]['id'], cuda=i in want, source=s) for i,s in kept])

def names_of(part):
    "The names that a notebook's module gives its cells"
    res = dict(vars(import_module(part['module']))) if part['module'] else {}
    return {k:v for k,v in res.items() if not k.startswith('__')}

def missing_names(part):
    "Names that the cells of a notebook use and that neither a cell before them nor its imports define"
    have = names_of(part)
    for s in (s for c in part['cells'] for s in _statements(c['source']) if isinstance(s, (ast.Import,ast.ImportFrom))):
        try: exec(ast.unparse(s), have)
        except ImportError as e: return [str(e)]
    return sorted(set(part['open_names'])-set(have))

def all_cuda_cells(nbs):
    "Of all notebooks in a folder"
    files = [o for o in sorted(Path(nbs).rglob('*.ipynb')) if '.ipynb_checkpoints' not in o.parts]
    return [o for o in map(cuda_cells, files) if o]

def cuda_tests(tests):
    "Node ids of the tests that are skipped without a GPU or marked cuda"
    res = []
    for f in sorted(Path(tests).glob('test_*.py')):
        for o in ast.walk(ast.parse(f.read_text())):
            if not isinstance(o, ast.FunctionDef): continue
            marks = [ast.unparse(d) for d in o.decorator_list]
            if any('not torch.cuda.is_available()' in d or 'mark.cuda' in d for d in marks): res.append(f'{f.name}::{o.name}')
    return res

def files_of_tests(tests):
    "Files that the tests for a GPU need: their own, and all that is no test, since they may import it"
    own = {o.partition('::')[0] for o in cuda_tests(tests)}
    return sorted(f for f in Path(tests).glob('*.py') if f.name in own or not f.name.startswith('test_'))
