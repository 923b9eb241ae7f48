"The site of a project with two notebooks: what is shown, where links lead, and the sentence that a broken one gives."
import json,shutil,sys
from base64 import b64encode
from io import BytesIO
import pytest
from PIL import Image
import browser,docs

def _png():
    f = BytesIO()
    Image.new('RGB', (2,2)).save(f, 'png')
    return f.getvalue()

png = _png()

class Names(docs.Lookup):
    "A lookup of a few names, in place of nbdev's index."
    def __init__(self, **syms): self.syms,self.entries,self.aliases = {k: f'https://mini.example/base/{v}' for k,v in syms.items()},{},{}

def out(**data): return dict(output_type='display_data', metadata={}, data={k.replace('_', '/'): v for k,v in data.items()})

def printed(s, name='stdout'): return dict(output_type='stream', name=name, text=s)

def write(path, *cells):
    "A notebook with `(type, source, *more)` cells, where more is the outputs of code or the metadata of text."
    def cell(i, t, s, *more):
        if t=='markdown': return dict(cell_type=t, source=s, id=f'c{i}', metadata=dict(*more))
        return dict(cell_type=t, source=s, id=f'c{i}', metadata={}, outputs=list(more), execution_count=None)
    cells = [cell(i, *o) for i,o in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=cells, metadata={'kernelspec': {'language': 'python', 'name': 'python3'}}, nbformat=4, nbformat_minor=5)))

source = '''"A module"
def double(
    x:int, # Number to double
    n=2,   # How often; see `Pot`
):
    "Twice `x`"
    return x*n

def _hidden(x): return x

class Pot:
    "Holds things"
    def put(self, x): "Put `x` in, as `double` does"

from fastcore.meta import delegates
KINDS = ('clay','iron') # Kinds of pots
@delegates(double)
def more(**kwargs): "More of it"
__all__ = ['double','Pot','KINDS','more']
'''

@pytest.fixture
def project(tmp_path, monkeypatch):
    "A package `minidocs`, an index, a numbered notebook that documents it, and a lesson."
    (tmp_path/'minidocs').mkdir()
    (tmp_path/'minidocs'/'__init__.py').touch()
    (tmp_path/'minidocs'/'core.py').write_text(source)
    (tmp_path/'LICENSE').touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    for o in ('minidocs', 'minidocs.core'): monkeypatch.delitem(sys.modules, o, raising=False)
    nbs = tmp_path/'nbs'
    (nbs/'images').mkdir(parents=True)
    (nbs/'images'/'p.png').write_bytes(png)
    write(nbs/'index.ipynb', ('markdown', '# Mini\n\n> small\n\n[core](01_core.ipynb#Double-it) [licence](../LICENSE) [w](https://w.example)\n\n![a dot](images/p.png)'))
    write(nbs/'01_core.ipynb', ('code', '#| default_exp core'), ('code', '#| hide\nsecret = 1'),
        ('markdown', '# Core\n\nPrice `$5`, $x_1^2$ and `Pot`.\n$$\\frac{a}{b}$$\n$$\\lambda$$\n\n## Double it\n\n```\n[no](nolink.md) `Pot`\n```\n\n## `Pot` here\n\n## Double'),
        ('code', '#| export\n' + source.split('\n\n')[0].split('\n', 1)[1]), ('code', '#| export\ndef _hidden(x): return x'), ('code', '#| export\nclass Pot: pass'),
        ('code', '#| echo: false\nunseen', printed('seen\n'), printed('warned', 'stderr')), ('code', '#| output: false\nkept', printed('dropped')),
        ('code', 'draw(1)', out(image_png=b64encode(png).decode(), text_plain='<Figure>')),
        ('code', 'df', out(text_html='<style scoped>p {}</style><table class="dataframe"><tr><td>1</td></tr></table>', text_plain='1')),
        ('markdown', '#### Solution', {'jp-MarkdownHeadingCollapsed': True}),
        ('code', '#| code-fold: true\n#| code-summary: "Solution"\nassert answer', printed('forty-two')),
        ('code', '#| code-fold: show\n#| code-summary: "Open"\nopened', printed('two')),
        ('code', "#| export\nKINDS = ('clay','iron') # Kinds of pots"), ('code', '#| export\n@delegates(double)\ndef more(**kwargs): "More of it"'))
    write(nbs/'course'/'01_first.ipynb', ('markdown', '# Lesson 1: First\n\n[![In Colab](https://c.example/b.svg)](https://c.example/x) `double` [core](../01_core.ipynb) [c](../core.html#pot)'))
    return tmp_path

names = dict(double='core.html#double', Pot='core.html#pot', _hidden='core.html#_hidden')

def build(project):
    "Folder of the site, and a function that gives a page's text."
    site = docs.Site(project/'nbs', project/'src', Names(**names), 'minidocs', 'https://mini.example/base', 'https://mini.example/blob/main')
    site.build(project/'html')
    return lambda o: (project/'html'/o).read_text()

def add(project, *cells): write(project/'nbs'/'02_more.ipynb', ('markdown', '# More'), *cells)

def test_links(project):
    "Notebooks become pages, names lead to their definitions, files of the repository to it, and pictures keep their words."
    page = build(project)
    index,core,first = (page(o) for o in ('index.html', 'core.html', 'course/first.html'))
    for o in ('href="core.html#double-it"', 'href="https://mini.example/blob/main/LICENSE"', 'href="https://w.example"', 'alt="a dot"'): assert o in index
    for o in ('href="../core.html#double"', 'href="../core.html"', 'href="../core.html#pot"', '>In Colab</a>'): assert o in first
    assert 'c.example/b.svg' not in first and '[no](nolink.md) `Pot`' in core
    assert 'href="course/first.html"' in index and 'Lesson 1: First' in page('searchindex.js')

def test_symbols(project):
    "A symbol has nbdev's anchor, its docstring, a table of its parameters and methods, and its source; a private one has anchor and source."
    core = build(project)('core.html')
    for o in ('id="double"', 'id="pot"', 'id="_hidden"', 'Twice', 'Number to double', 'Put <code', 'How often; see <a'): assert o in core, o
    assert core.count('id="double"')==1==core.count('id="double-section"') and '<h2><code' in core and '<h3><code class="docutils literal notranslate"><span class="pre">_hidden' not in core
    assert core.count('<details>\n<summary>Source</summary>')==5

def test_entries(project):
    "A constant has an entry with its comment and its names; a parameter taken over from another function keeps its comment; a table has two columns."
    core = build(project)('core.html')
    kinds,more = core[core.index('id="kinds"'):core.index('id="more"')],core[core.index('id="more"'):]
    assert all(o in kinds for o in ('Kinds of pots', 'clay', 'iron'))
    assert 'n:int=2' in more and 'How often; see <a' in more
    assert '>x:int<' in core.replace('<span class="pre">', '').replace('</span>', '') and 'Type' not in core

def test_no_entry(project):
    "A public name without an entry is no page."
    (project/'minidocs'/'core.py').write_text(source.replace("'more']", "'more','bare']") + '\ndef bare(): pass\n')
    with pytest.raises(docs.DocsError, match='minidocs.core exports bare, which has no entry'): build(project)

def test_front_page(project):
    "The first page lists the lessons with the line below their titles, and has no tables and no badges."
    write(project/'nbs'/'index.ipynb', ('markdown', '# Mini\n\n> small\n\n[![t](https://w.example/b.svg)](https://w.example)\n\nWords.'),
        ('markdown', '## Install\n\nso\n\n| a | b |\n|---|---|\n| 1 | long |\n'), ('markdown', '## The course and more\n\ngone'))
    write(project/'nbs'/'howto'/'troubleshooting.ipynb', ('markdown', '# Troubles\n\n> Find yours'))
    write(project/'nbs'/'howto'/'my_folder.ipynb', ('markdown', '# A folder\n\n> Of your own'))
    index = build(project)('index.html')
    index = index[index.index('<article'):index.index('</article')]
    assert index.index('Of your own') < index.index('Find yours') < index.index('Lesson 1: First') < index.index('Install')
    assert 'Words.' in index and not [o for o in ('<table', 'b.svg', 'gone') if o in index]

def test_directives(project):
    "Hidden cells, hidden code, hidden output, folds and streams."
    core = build(project)('core.html')
    assert 'secret' not in core and 'unseen' not in core and '<pre>seen</pre>' in core and 'warned' not in core
    assert '>kept<' in core and 'dropped' not in core
    folded = core[core.index('<details>\n<summary>Solution'):]
    folded = folded[:folded.index('</details>')]
    assert '<summary>Solution</summary>' in folded and 'answer' in folded and 'forty-two' in folded
    assert core.count('Solution')==1 # the heading that folds it in JupyterLab is left out
    assert core.index('<summary>Open') < core.index('>opened<') < core.index('<pre>two</pre>')

def test_outputs(project):
    "Pictures become files with words for those who cannot see them, tables stay, styles go."
    core = build(project)('core.html')
    assert 'alt="Picture drawn by draw(1)"' in core and '<table class="dataframe">' in core and 'scoped' not in core
    assert (project/'html'/'_images'/'core-c8-0.png').read_bytes()==png

def test_markdown(project):
    "Beside each page lies its Markdown, at the address that modules name: words, code and what was printed, and no hidden cell."
    page = build(project)
    core,first = page('core.html.md'),page('course/first.html.md')
    for o in ('# Core', '`Pot`', '```python\ndef double(', '```text\nseen\n```', '*Picture drawn by draw(1)*', '```python\ndf\n```'): assert o in core, o
    assert '```text\n```' not in core and core.count('```')%2==0
    assert not [o for o in ('secret', 'unseen', 'warned', 'dropped', '<details', 'default_exp') if o in core]
    assert '[core](../core.html)' in first

def test_formulas(project):
    "Formulas are MathML, in the text and on lines of their own; dollars in code are dollars."
    core = build(project)('core.html')
    assert core.count('<math ')==3 and core.count('display="block"')==2 and '<mfrac>' in core and '$5' in core and '$x' not in core
    assert docs.mathml(r'\tfrac12', 'inline').count('<mn>')==2

def test_no_network(project):
    "No page loads anything from elsewhere."
    page = build(project)
    loads = [o for p in (project/'html').rglob('*.html') for o in docs._Refs(p.read_text()).loads]
    assert loads and not [o for o in loads if o.startswith(('http', '//'))]

faulty = [('[x](nowhere.ipynb)', 'more.html (made from nbs/02_more.ipynb) refers to nowhere.ipynb, but the site has no nowhere.ipynb: correct the link.'),
    ('[x](core.html#nothing)', 'more.html (made from nbs/02_more.ipynb) refers to core.html#nothing, but core.html has no such heading or name: correct the link.'),
    ('[x](#top)', 'refers to #top, but more.html has no such heading or name'), ('![p](images/q.png)', 'refers to images/q.png'),
    ('<img src="https://w.example/p.png">', 'more.html (made from nbs/02_more.ipynb) loads https://w.example/p.png from the network'),
    (r'It is $x^$.', 'more.md:3: the formula'), (r'It is $\nosuch x$.', r"has no MathML for \nosuch")]

@pytest.mark.parametrize('md,said', faulty)
def test_faults(project, md, said):
    "One sentence names the page and what is wrong with it."
    add(project, ('markdown', md))
    with pytest.raises(docs.DocsError) as e: build(project)
    assert said in str(e.value)

def test_stored_error(project):
    "A stored error is no page."
    add(project, ('code', '1/0', dict(output_type='error', ename='E', evalue='', traceback=[])))
    with pytest.raises(docs.DocsError, match='nbs/02_more.ipynb stores an error in cell `c1`'): build(project)

def test_not_exported(project):
    "A name that the module lacks was not exported."
    add(project, ('code', '#| default_exp core'), ('code', '#| export\ndef fresh(): "New"'))
    with pytest.raises(docs.DocsError, match='nbs/02_more.ipynb exports fresh, which its module lacks'): build(project)

def test_main_says_it(monkeypatch, capsys, tmp_path):
    "On the command line a fault is a sentence and 1, and leaves the old site alone."
    def _fail(self, out): raise docs.DocsError('a.html refers to b')
    monkeypatch.setattr(docs.Site, 'build', _fail)
    monkeypatch.setattr(docs.Site, '__init__', lambda self, *args, **kw: None)
    assert docs.main([str(tmp_path)])==1 and capsys.readouterr().err=='a.html refers to b\n' and tmp_path.exists()

# Browser tests where there is no browser

def test_no_chromium(monkeypatch, capsys):
    "Without Chromium, or without playwright, the browser tests are skipped with a message and 0; a wrong `CHROME` is an error."
    monkeypatch.delenv('CHROME', raising=False)
    monkeypatch.setattr(shutil, 'which', lambda o: None)
    assert browser.main([])==0 and 'no Chromium' in capsys.readouterr().out
    monkeypatch.setattr(browser, 'find_spec', lambda o: None)
    assert browser.main([])==0 and 'playwright' in capsys.readouterr().out
    monkeypatch.setenv('CHROME', 'nowhere')
    with pytest.raises(SystemExit, match='CHROME=nowhere is no program'): browser.chromium()

def test_apt(monkeypatch):
    "Root gets Debian's Chromium from apt, once."
    cmds,found = [],{'apt-get': '/usr/bin/apt-get'}
    def _run(cmd, **kw):
        cmds.append(cmd[2])
        if cmd[2]=='install': found['chromium'] = '/usr/bin/chromium'
    monkeypatch.delenv('CHROME', raising=False)
    monkeypatch.setattr(shutil, 'which', found.get)
    monkeypatch.setattr(browser.os, 'geteuid', lambda: 0, raising=False)
    monkeypatch.setattr(browser.subprocess, 'run', _run)
    assert browser.chromium()=='/usr/bin/chromium'==browser.chromium() and cmds==['update', 'install']
    monkeypatch.setattr(browser.os, 'geteuid', lambda: 1, raising=False)
    del found['chromium']
    assert browser.chromium() is None
