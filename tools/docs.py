"""Make the site in _docs from the notebooks: python tools/docs.py [folder]
nbdev says what a cell shows and where a name is defined, Sphinx makes the pages, and a reader needs no network."""
import ast,html,inspect,re,shutil,sys,tempfile,warnings
from base64 import b64decode
from fontTools import subset
from functools import lru_cache,reduce
from html.parser import HTMLParser
from importlib import import_module
from importlib.resources import files
from io import BytesIO,StringIO
from os.path import relpath
from pathlib import Path
from posixpath import normpath
from unittest.mock import patch
from docutils import nodes
from fastcore.docments import DocmentTbl,docments,docstring
from latex2mathml.converter import convert
from nbdev.config import get_config,nbpath2html
from nbdev.doclinks import NbdevLookup
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics,filter_stream_,hide_line,rm_header_dash,strip_ansi
from nbdev.showdoc import showdoc_nm
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.search.en import SearchEnglish
from sphinx.util import logging
from sphinx.util.docutils import docutils_namespace,patch_docutils
from readme import _html,_text

root = Path(__file__).resolve().parent.parent
icon = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><circle cx="5" cy="8" r="5" fill="#1e8449"/><circle cx="11" cy="8" r="5" fill="#c0392b" opacity=".7"/></svg>'
_code = re.compile(r'^(```+|~~~+).*?^\1[ \t]*$|(?<!`)(`+)(?!`).*?(?<!`)\2(?!`)', re.M|re.S)
_links = re.compile(r'(\]\(|\b(?:src|href)=["\'])([^)\s"\']+)')
_picture = re.compile(r'!\[([^\]]*)\]\(https?:[^)]*\)')
_exports = {'export', 'exports', 'exporti'}

class DocsError(ValueError):
    "A notebook that cannot become a page; the message names it and what is at fault."

_config = lru_cache(get_config)

class Lookup(NbdevLookup):
    "Links from names in backticks to their definitions, except in headings."
    def link_line(self, l): return l if l.startswith('#') else super().link_line(l)

def mathml(
    tex,     # formula without its dollars
    display, # 'inline' or 'block'
):
    "The formula as MathML, which browsers draw by themselves."
    try: res = convert(tex, display=display)
    except Exception as e: raise DocsError(f"the formula {tex!r} has no MathML ({type(e).__name__})") from e
    if lost := re.search(r'\\[a-zA-Z]+', re.sub(r'<annotation.*', '', res)): raise DocsError(f"the formula {tex!r} has no MathML for {lost[0]}")
    return res.replace('negativethinmathspace', '-0.167em')

def _visit_math(display):
    def _visit(self, node):
        tex = node.astext()
        wide = ' wide' if display=='inline' and len(tex)>30 else ''
        try: self.body.append(f'<span class="math {display}{wide}">{mathml(tex, display)}</span>')
        except ValueError as e: logging.getLogger(__name__).warning(e, location=node)
        raise nodes.SkipNode
    return _visit

def _name_sections(app, doctree):
    "Give the section of a symbol the anchor by which nbdev links to it, and any other section that has it another one."
    marks = {re.search('id="(.+?)"', o.astext())[1]: o for o in doctree.findall(nodes.raw) if 'class="symbol"' in o.astext()}
    for o in doctree.findall(nodes.section): o['ids'] = [f'{i}-section' if i in marks else i for i in o['ids']]
    for anchor,o in marks.items():
        o.next_node(nodes.section, descend=False, ascend=True)['ids'] = [anchor]
        o.parent.remove(o)

def _titles(
    tocs, # headings of each page
):
    "The title of each page without the headings below it"
    tocs = {k: v.deepcopy() for k,v in tocs.items()}
    for o in (o for toc in tocs.values() for o in toc if next(o.findall(addnodes.toctree), None) is None): o[1:] = []
    return tocs

def _name_titles(app, pagename, templatename, context, doctree):
    "The navigation is made for each page anew, and names titles alone: spare it a copy of every heading of every page."
    make,env = context.get('toctree'),app.env
    if not hasattr(app, 'titles'): app.titles = _titles(env.tocs)
    def _toctree(**kw):
        with patch.object(env, 'tocs', app.titles): return make(**kw)
    if make: context['toctree'] = _toctree

class Stems(SearchEnglish):
    "The same words come on every page: their stems are found once."
    lang = 'en'
    @lru_cache(None)
    def stem(self, word): return super().stem(word)

@lru_cache
def math_font():
    "STIX Two Math (SIL Open Font Licence), which the package ziamath has, cut down to what formulas use: phones often have no font for formulas."
    opts = subset.Options(flavor='woff', layout_features=['ssty','dtls','flac','ccmp'], name_IDs=['*'])
    font,cut,buf = subset.load_font(files('ziamath')/'fonts'/'STIXTwoMath-Regular.ttf', opts),subset.Subsetter(opts),BytesIO()
    # Letters and Greek, accents, operators and arrows, brackets, and the alphabets of formulas.
    blocks = (32,128),(0xa0,0x100),(0x2b0,0x400),(0x2000,0x2400),(0x27e6,0x27f0),(0x1d434,0x1d4a0),(0x1d538,0x1d56c),(0x1d6a4,0x1d71c)
    cut.populate(unicodes=[i for a,b in blocks for i in range(a, b)])
    cut.subset(font)
    subset.save_font(font, buf, opts)
    return buf.getvalue()

def setup(
    app, # Sphinx, which calls this as it does for any extension
):
    "Sphinx's hooks: formulas as MathML and anchors as nbdev's."
    app.add_html_math_renderer('mathml', (_visit_math('inline'), None), (_visit_math('block'), None))
    app.connect('doctree-read', _name_sections, priority=100)
    app.connect('html-page-context', _name_titles, priority=100) # before the theme, which asks for it
    app.add_search_language(Stems)
    return dict(parallel_read_safe=True)

def _raw(s): return f'`````{{raw}} html\n{s}\n`````'

def _outside_code(f, md):
    parts,end = [],0
    for m in _code.finditer(md):
        parts += [f(md[end:m.start()]), m[0]]
        end = m.end()
    return ''.join(parts) + f(md[end:])

def _shown(cell):
    "Is it code that a reader sees?"
    ds = cell.directives_
    return cell.cell_type=='code' and not ds.keys()&{'hide', 'default_exp'} and ds.get('include')!='false' and cell.source.strip()!=''

def _data(o): return {t: ''.join(v) for t,v in o.get('data', {}).items() if isinstance(v, (str, list))}

def _words(cell):
    "What the picture of a cell shows"
    return cell.directives_.get('fig-alt', '').strip('"') or f'Picture drawn by {cell.source.strip().splitlines()[-1]}'

class Page:
    "One notebook as Markdown for Sphinx."
    def __init__(self,
        site, # site that it belongs to
        nb,   # path of the notebook in the folder of notebooks
    ):
        self.site,self.nb,self.depth,self.mod = site,nb,1,None
        self.html = nbpath2html(nb)
        procs = [strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics]
        with patch('nbdev.processors.get_config', _config): self.cells = NBProcessor(site.nbs/nb, procs, process=True).nb.cells # one asks at each cell

    def __str__(self): return f'{self.site.nbs.name}/{self.nb.as_posix()}'

    def resolve(self,
        link, # target as the notebook has it
    ):
        "The target as the page has it: notebooks are pages, files of the repository are links to it, pictures are copied."
        if link.startswith(self.site.url): return relpath(link[len(self.site.url):].lstrip('/') or 'index.html', self.html.parent)
        if re.match(r'[a-z][a-z0-9+.-]*:|[/#]', link, re.I): return link
        name,_,frag = link.partition('#')
        path = normpath((self.nb.parent/name).as_posix())
        if page := self.site.pages.get(path): return relpath(page.html, self.html.parent) + (f'#{frag.lower()}' if frag else '')
        file = self.site.nbs/path
        if not file.exists(): return link
        if file.suffix in ('.png', '.jpg', '.jpeg', '.svg', '.gif', '.webp'): self.site.assets.add(path)
        else: return f"{self.site.repo}/{file.resolve().relative_to(self.site.nbs.resolve().parent).as_posix()}"
        return link

    def relink(self,
        md, # Markdown of a cell
    ):
        "Markdown with names and targets linked; pictures of other sites give way to their text, as they would need the network."
        def _targets(s):
            s = re.sub(r'\s*\$\$(.+?)\$\$\s*', r'\n\n$$\1$$\n\n', s, flags=re.S)
            return _links.sub(lambda m: m[1]+self.resolve(m[2]), _picture.sub(r'\1', s))
        return _outside_code(_targets, self.site.lookup.linkify(md))

    def source(self, src, fold=None, summary='Code'):
        "Code as a block, folded if `fold` is 'true' and foldable if it is 'show'."
        md = f'`````python\n{src}\n`````'
        if fold is None: return [md]
        return [_raw(f'<details{" open" if fold=="show" else ""}>\n<summary>{html.escape(summary)}</summary>'), md, _raw('</details>')]

    def output(self, o, cell, k):
        "One output: pictures as files, tables as they are, anything else as text."
        if o['output_type']=='error': raise DocsError(f"{self} stores an error in cell `{cell.id}`: run it again and save its outputs.")
        if o['output_type']=='stream': return '' if o['name']=='stderr' else _pre(_text(o['text']))
        data = _data(o)
        for t,ext in (('image/png', 'png'), ('image/jpeg', 'jpg')):
            if t in data:
                file = self.site.write(f'_out/{self.html.stem}-{cell.id}-{k}.{ext}', b64decode(data[t]))
                return f'![{_escaped(_words(cell))}](/{file})'
        if 'text/markdown' in data and 'text/html' not in data: return self.relink(data['text/markdown'])
        if 'text/html' in data: return _wrap(_html(data['text/html']))
        return _pre(_text(data.get('text/plain', '')))

    def symbol(self, name):
        "The object of that name in the module that the notebook exports."
        try: return reduce(getattr, name.split('.'), self.mod)
        except AttributeError as e: raise DocsError(f'{self} exports {name}, which its module lacks: run `make prepare`.') from e

    def described(self, name):
        "Is `name` public, with a docstring of its own?"
        return not any(o[0]=='_' for o in name.split('.')) and bool(self.symbol(name).__doc__)

    def heading(self, name):
        "Heading of the entry of a name, with the anchor that nbdev links to."
        self.site.entries.setdefault(self.mod, set()).add(name)
        return [_raw(f'<span id="{name.lower()}" class="symbol"></span>'), f"{'#'*min(self.depth+1, 6)} `{name}`"]

    def card(self, name, node=None):
        "Heading, docstring, parameters and methods of a symbol, whose definition is `node`."
        obj = self.symbol(name)
        res = self.heading(name)
        if doc := docstring(obj): res.append(self.relink(doc))
        if tbl := self.parameters(obj, node): res.append(self.relink(tbl))
        if isinstance(obj, type): res += self.methods(name, obj)
        return res

    def comments(self, node):
        "Comments of the parameters that a definition takes over from other functions with `delegates`."
        calls = [o for o in getattr(node, 'decorator_list', []) if isinstance(o, ast.Call) and getattr(o.func, 'id', '')=='delegates' and o.args]
        found = [eval(ast.unparse(o.args[0]), vars(self.mod)) for o in reversed(calls)]
        return {k: v for f in found for k,v in docments(f, returns=False).items() if v}

    def parameters(self, obj, node):
        "Table of parameters in two columns, which fit on a phone: the parameter as a signature has it, and its comment."
        dm = DocmentTbl(obj).dm
        more = self.comments(node)
        rows = [(_signature(k, d), _known(d['docment']) or more.get(k, '')) for k,d in dm.items() if k!='return']
        if not any(doc for _,doc in rows): return ''
        back = dm.get('return', {})
        if not isinstance(obj, type) and (doc := _known(back.get('docment'))): rows.append((f'returns{_signature("", back)}', doc))
        return '\n'.join(['| Parameter | |', '|---|---|', *[f'| {_ticked(sig)} | {_cell(doc)} |' for sig,doc in rows]])

    def constant(self, cell, node):
        "Heading of a public constant, the comment beside it, and the names in it."
        name,val = node.targets[0].id,self.symbol(node.targets[0].id)
        said = re.search(rf'^{name} *=.*?# *(?!chkstyle)(.+)$', cell.source, re.M)
        if isinstance(val, (set, frozenset)): val = sorted(val, key=str) # the same page each time
        words = [o for o in (val if isinstance(val, (dict, list, tuple)) else ()) if isinstance(o, str)]
        shown = ', '.join(f'`{o}`' for o in words) or (f'`{val!r}`' if isinstance(val, (int, float, str)) and len(repr(val))<80 else '')
        return [*self.heading(name), *[o for o in (said and self.relink(said[1]), shown) if o]]

    def constants(self, cell):
        "Entries of the constants of an exported cell that the module lists as public."
        public = getattr(self.mod, '__all__', ())
        tops = [o for o in cell.parsed_() or [] if isinstance(o, ast.Assign) and len(o.targets)==1 and isinstance(o.targets[0], ast.Name)]
        return [b for o in tops if o.targets[0].id in public for b in self.constant(cell, o)]

    def methods(self, name, cls):
        "Table of the public methods that `cls` itself documents."
        rows = [f'| `{o}` | {docstring(f)} |' for o,f in vars(cls).items() if o[0]!='_' and callable(f) and docstring(f)]
        return [self.relink('\n'.join(['| Method | |', '|---|---|', *rows]))] if rows else []

    def exported(self, cell):
        "Documentation of the public symbols of an exported cell, and its source."
        tops = [o for o in cell.parsed_() or [] if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
        names = [n for o in tops for n in _listed(showdoc_nm(o))]
        cards = [n for n in names if 'exporti' not in cell.directives_ and self.described(n)]
        inner = [f'{o.name}.{f.name}' for o in tops if isinstance(o, ast.ClassDef) for f in o.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
        ids = ''.join(f'<span id="{html.escape(n.lower())}"></span>' for n in dict.fromkeys([*names, *inner]) if n not in cards)
        nodes = {n: o for o in tops for n in _listed(showdoc_nm(o))}
        shown = [o for n in cards for o in self.card(n, nodes[n])]
        if 'exporti' not in cell.directives_: shown += self.constants(cell)
        return shown + ([_raw(ids)] if ids else []) + self.source(cell.source, 'true', 'Source')

    def cell_md(self, cell):
        "Markdown blocks of one cell, none for a hidden one."
        ds = cell.directives_
        if cell.metadata.get('jp-MarkdownHeadingCollapsed'): return [] # the page folds solutions below a word of its own
        if cell.cell_type=='markdown':
            for m in re.finditer(r'^(#{1,6}) ', _code.sub('', cell.source), re.M): self.depth = len(m[1])
            return [self.relink(cell.source)]
        if 'default_exp' in ds and self.site.lib: self.mod = import_module(f"{self.site.lib}.{ds['default_exp']}")
        if not _shown(cell): return []
        if _exports&ds.keys(): return self.exported(cell)
        fold = (ds['code-fold'] or 'true') if 'code-fold' in ds and ds['code-fold']!='false' else None
        summary = ds.get('code-summary', 'Code').strip('"')
        code = [] if ds.get('echo')=='false' else self.source(cell.source, fold, summary)
        outs = [] if ds.get('output')=='false' else [self.output(o, cell, k) for k,o in enumerate(cell.get('outputs', []))]
        outs = [o for o in outs if o]
        # What a solution prints would give it away, so it is folded too.
        return code[:-1]+outs+code[-1:] if fold and summary=='Solution' else code+outs

    def printed(self, cell):
        "What the cell shows, in words: text as it is, a picture by its name"
        outs = cell.get('outputs', []) if cell.directives_.get('output')!='false' else []
        for o in outs:
            if o['output_type']=='stream' and o['name']=='stderr': continue
            data = _data(o)
            if any(t.startswith('image/') for t in data): yield f'*{_words(cell)}*'
            elif 'text/markdown' in data: yield data['text/markdown']
            elif said := _text(''.join(o.get('text', '')) or data.get('text/plain', '')): yield said

    def plain(self):
        "The page in Markdown for programs that read it: words, code and what it printed"
        res = []
        for cell in self.cells:
            ds = cell.directives_
            if cell.cell_type=='markdown': res.append(_outside_code(lambda s: _links.sub(lambda m: m[1]+self.resolve(m[2]), s), cell.source))
            elif _shown(cell):
                code = [] if ds.get('echo')=='false' else [f'```python\n{cell.source.strip()}\n```']
                res += [*code,*self.printed(cell)]
        return '\n\n'.join(res)+'\n'

    def title(self):
        "Title and the line below it, which starts with `>`."
        top = next(c.source for c in self.cells if c.cell_type=='markdown')
        sub = re.search(r'^> (.+)$', top, re.M)
        return re.search(r'^# (.+)$', top, re.M)[1],sub[1] if sub else ''

    def md(self):
        "The page in Markdown."
        blocks = [o for c in self.cells for o in self.cell_md(c)]
        return '\n\n'.join([*blocks, f'---\n\nThis page is the notebook [{self}]({self.site.repo}/{self}).', ''])

def _escaped(s): return re.sub(r'([][*_`$<])', r'\\\1', s)

def _listed(o): return o if isinstance(o, list) else [o]

def _known(o): return '' if o in (None, inspect.Parameter.empty) else o

def _ticked(s): return f'`{s}`' if '`' not in s else f'`` {s} ``'

def _cell(s): return s.replace('\n', ' ').replace('|', r'\|')

def _signature(name, d):
    "A parameter with type and default, on one line and with the bars of a table escaped."
    kind = _known(d.get('anno'))
    kind = getattr(kind, '__name__', None) or str(kind) if kind!='' else ''
    default = d.get('default', inspect.Parameter.empty)
    res = name + (f':{kind}' if kind and kind!='NoneType' else '')
    if default is not inspect.Parameter.empty: res += f'={default.__name__ if callable(default) and hasattr(default, "__name__") else repr(default)}'
    return _cell(res if len(res)<120 else f'{res[:117]}...')

def _wrap(s): return _raw(f'<div class="output">\n{s}\n</div>') if s.strip() else ''

def _pre(s): return _wrap(f"<pre>{html.escape(s.removeprefix('```text').removesuffix('```').strip(chr(10)), quote=False)}</pre>") if s else ''

# Guides in the order in which a reader needs them; those that are not named here follow
guides = ('my_folder', 'csv_labels', 'few_rare_wrong', 'which_method', 'backbones', 'accuracy_per_hour', 'speed_memory', 'several_gpus', 'resume',
    'predict_folder', 'onnx', 'web_page', 'share', 'from_fastai', 'own_method', 'reproduce_paper', 'troubleshooting')

captions = {'howto':'How to', 'course':'Course', 'studies':'Studies', '.':'Reference'} # folder of notebooks to its part of the navigation

class Site:
    "The pages of a folder of notebooks."
    def __init__(self,
        nbs,         # folder of the notebooks
        src,         # folder to write Sphinx's sources into
        lookup=None, # what links names to definitions, as `Lookup` does
        lib=None,    # package whose symbols are documented
        url='https://none.invalid', # address that `lookup` gives to the site
        repo='https://none.invalid', # address of the repository's files
    ):
        self.nbs,self.src,self.lib,self.url,self.repo = Path(nbs),Path(src),lib,url,repo
        self.lookup,self.pages,self.assets,self.entries = lookup or Lookup(),{},set(),{}
        found = sorted(p.relative_to(self.nbs) for p in self.nbs.rglob('*.ipynb'))
        for p in found:
            if not any(o[0] in '._' for o in p.parts): self.pages[p.as_posix()] = Page(self, p)

    def write(self, name, data):
        "Write a file among the sources, and return its name."
        file = self.src/name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data if isinstance(data, bytes) else data.encode())
        return name

    def parts(self):
        "Pages of each part of the navigation, in the order in which one reads them."
        def _place(p): return (guides.index(p.nb.stem) if p.nb.stem in guides else len(guides)-1, not p.nb.stem[0].isdigit() and p.nb.parent.name=='course')
        pages = [p for p in self.pages.values() if p.nb.as_posix()!='index.ipynb']
        return {name: sorted((p for p in pages if p.nb.parent.as_posix()==folder), key=_place) for folder,name in captions.items()}

    def finder(self):
        "Markdown of the front page's list: each guide and lesson with the line below its title."
        lines = []
        for name in ('How to', 'Course'):
            if pages := self.parts()[name]: lines += [f'## {name}', '\n'.join(f'- [{t}]({p.html.as_posix()})\\\n  {sub}' for p in pages for t,sub in [p.title()])]
        return '\n\n'.join(lines)

    def front(self, page):
        "Markdown of the first page: the README without badges and tables, and with the list of guides and lessons after its picture."
        blocks = [o for c in page.cells if c.cell_type=='markdown' for o in page.cell_md(c)]
        md = '\n\n'.join(o for o in blocks if not o.startswith('## The course'))
        md = re.sub(r'(?m)^\[!\[.*\n?|^\[test\].*\n?', '', md) # badges
        md = re.sub(r'(?m)^\|.*\n?', '', md)
        first,sep,rest = md.partition('\n## ')
        return '\n\n'.join([first, self.finder(), sep.strip('\n')+rest, ''])

    def toc(self):
        "The navigation: a part for each folder, and the reference last."
        parts = self.parts()
        pages = [p for p in self.pages.values() if p.nb.as_posix()!='index.ipynb']
        if left := [str(p) for p in pages if p.nb.parent.as_posix() not in captions]: raise DocsError(f'{left[0]} is in a folder that has no part in the navigation: name it in `captions`.')
        lines = {k: '\n'.join(p.html.with_suffix('').as_posix() for p in v) for k,v in parts.items() if v}
        return '\n\n'.join(f'```{{toctree}}\n:hidden:\n:maxdepth: 1\n:caption: {k}\n\n{v}\n```' for k,v in lines.items())

    def build(self,
        out, # folder for the site
    ):
        "Write the pages and let Sphinx make the site; raises `DocsError` at the first fault."
        for p in self.pages.values(): self.write(p.html.with_suffix('.md'), self.front(p)+self.toc() if p.nb.as_posix()=='index.ipynb' else p.md())
        for mod,seen in self.entries.items():
            if left := [o for o in getattr(mod, '__all__', ()) if o not in seen]: raise DocsError(f'{mod.__name__} exports {left[0]}, which has no entry on its page: give it a docstring.')
        for o in self.assets: self.write(o, (self.nbs/o).read_bytes())
        for name,o in (('site.css', 'docs.css'), ('tables.js', 'docs_tables.js')): self.write(f'_static/{name}', (root/'tools'/o).read_text(encoding='utf-8'))
        self.write('_static/icon.svg', icon)
        self.write('_static/math.woff', math_font())
        said = StringIO()
        with patch_docutils(),docutils_namespace(): Sphinx(self.src, None, out, f'{out}_trees', 'html', conf, status=None, warning=said).build()
        faults = re.sub(r'\x1b\[[\d;]*m|WARNING: ', '', said.getvalue()).replace(f'{self.src}/', '').strip()
        if faults: raise DocsError(f'{faults}\nCorrect the notebooks of these pages.')
        for o in self.assets: shutil.copyfile(self.nbs/o, _made(Path(out)/o))
        for p in self.pages.values(): _made(Path(out)/f'{p.html}.md').write_text(p.plain(), encoding='utf-8') # the address that each module names
        _made(Path(out)/'.nojekyll').touch()
        check(out, {p.html.as_posix(): str(p) for p in self.pages.values()})

def _made(p):
    p.parent.mkdir(parents=True, exist_ok=True)
    return p

_dull = re.compile(r'</(?!script|style)\w+>|<span(?: class="[\w -]*")?>') # most tags of a page, which name nothing

class _Refs(HTMLParser):
    "Anchors of a page, what it links to and what it loads."
    def __init__(self, s):
        super().__init__()
        self.ids,self.links,self.loads = set(),[],[]
        self.feed(_dull.sub('', s))
    def handle_starttag(self, tag, attrs):
        d = dict(attrs)
        if d.get('id'): self.ids.add(d['id'])
        if tag=='a' and d.get('href'): self.links.append(d['href'])
        if tag in ('img', 'script', 'source', 'iframe') and d.get('src'): self.loads.append(d['src'])
        if tag=='link' and d.get('rel') in ('stylesheet', 'icon', 'preload', 'prefetch'): self.loads.append(d['href'])

def check(
    out,     # folder of the site
    sources, # page to notebook
):
    "Raise `DocsError` if a page links to or shows what is not in the site, or loads something from the network."
    out = Path(out)
    pages = {p.relative_to(out).as_posix(): _Refs(p.read_text(encoding='utf-8')) for p in out.rglob('*.html')}
    for name,p in pages.items():
        where = f'{name} (made from {sources.get(name, "no notebook")})'
        for o in p.loads+p.links:
            if re.match('https?:|//', o):
                if o in p.loads: raise DocsError(f"{where} loads {o} from the network: keep a copy beside the notebook.")
            elif not re.match('[a-z]+:', o) and (why := _missing(out, pages, name, o)): raise DocsError(f"{where} refers to {o}, but {why}: correct the link.")

def _missing(out, pages, name, link):
    path,_,frag = link.partition('#')
    path = normpath((Path(name).parent/path.partition('?')[0]).as_posix()) if path else name
    if not (out/path).is_file(): return f'the site has no {path}'
    return f'{path} has no such heading or name' if frag and path in pages and frag not in pages[path].ids else None

conf = dict(project='cekd_fastai', html_title='cekd_fastai', language='en', extensions=['myst_parser', 'docs'], smartquotes=False,
    myst_enable_extensions=['dollarmath'], myst_all_links_external=True, html_math_renderer='mathml', suppress_warnings=['myst.header', 'misc.highlighting_failure', 'image.not_readable'],
    html_theme='furo', html_static_path=['_static'], html_css_files=['site.css'], html_js_files=['tables.js'],
    html_favicon='_static/icon.svg', html_search_scorer=str(root/'tools'/'docs_search.js'), html_copy_source=False, html_show_copyright=False)

def main(
    args, # command line: the folder of the site, `_docs` by default
):
    "Make the site and return 0, or say in a sentence what is wrong and return 1."
    warnings.simplefilter('ignore', FutureWarning) # torch has some while it is imported, which say nothing about the site
    dest = Path(args[0] if args else root/'_docs').resolve()
    cfg = get_config(path=root)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp).resolve()
        try:
            Site(root/'nbs', tmp/'src', lib=cfg.lib_path.name, url=f'{cfg.doc_host}{cfg.doc_baseurl}', repo=f'{cfg.git_url}/blob/{cfg.branch}').build(tmp/'html')
        except DocsError as e:
            print(e, file=sys.stderr)
            return 1
        shutil.rmtree(dest, ignore_errors=True)
        shutil.copytree(tmp/'html', dest)
    print(f'{sum(1 for _ in dest.rglob("*.html"))} pages in {dest}: open {dest/"index.html"}')
    return 0

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
