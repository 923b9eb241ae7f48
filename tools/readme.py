"Make README.md from nbs/index.ipynb; with --check, only say whether the two are in step."
import re,sys
from pathlib import Path
from posixpath import normpath
from fastcore.nbio import read_nb

root = Path(__file__).resolve().parent.parent
note = '<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, then run `make prepare`. -->'
_fence = re.compile(r'^(```|~~~).*?^\1[ \t]*$', re.M|re.S)
_links = re.compile(r'(\]\(|\b(?:src|href)=["\'])([^)\s"\'#]+)')
_hidden = {'hide', 'include: false'}

class NotebookError(ValueError):
    "A cell of the notebook that has no form in README.md."

def relink(
    text,       # markdown as it stands in a notebook of the folder `nbs`
    base='nbs', # folder of that notebook, seen from the README
):
    "Markdown with its relative links and pictures seen from the README; fenced code stays as it is."
    def _link(m): return m[1] + (m[2] if re.match(r'[a-z][a-z0-9+.-]*:|/', m[2], re.I) else normpath(f'{base}/{m[2]}'))
    parts,end = [],0
    for m in _fence.finditer(text):
        parts += [_links.sub(_link, text[end:m.start()]), m[0]]
        end = m.end()
    return ''.join(parts) + _links.sub(_link, text[end:])

def directives(
    src, # source of a cell
):
    "The directives that open a cell as a set of strings (`'hide'`, `'eval: false'`), and the source below them."
    lines = src.splitlines()
    n = next((i for i,o in enumerate(lines) if o.strip() and not o.lstrip().startswith('#|')), len(lines))
    found = {re.sub(r'\s*:\s*', ': ', o.strip()[2:].strip()) for o in lines[:n] if o.strip()}
    return found, '\n'.join(lines[n:]).strip('\n')

def _html(s):
    "`s` without what a README cannot show: styles, scripts and progress bars."
    s = re.sub(r'<(style|script)\b.*?</\1>|<progress\b.*?</progress>', '', s, flags=re.S)
    return '' if not re.search(r'<(table|img|p|a|ul|ol|pre|details)\b', s) else re.sub(r'\n\s*\n+', '\n', s).strip()

def output(
    o,    # one output of a code cell
    cell, # its cell, which an error names
):
    "Markdown of one output: markdown as it is, tables as HTML, anything else as fenced text."
    if o['output_type']=='error': raise NotebookError(f"Cell `{cell.id}` of the notebook stores an error: run it again and save its outputs.")
    if o['output_type']=='stream': return '' if o['name']=='stderr' else _text(o['text'])
    data = {k: ''.join(v) for k,v in o['data'].items() if isinstance(v, (str, list))}
    if 'text/markdown' in data: return relink(data['text/markdown']).strip()
    if 'text/html' in data: return _html(data['text/html'])
    if any(k.startswith('image/') for k in data): raise NotebookError(
        f"Cell `{cell.id}` of the notebook stores a picture: save it in nbs/images, show it from a markdown cell, and give the cell `#| output: false`.")
    return _text(data.get('text/plain', ''))

def _text(s):
    s = re.sub(r'\x1b\[[0-9;]*m', '', ''.join(s)).strip('\n')
    return f'```text\n{s}\n```' if s.strip() else ''

def cell_md(
    cell, # cell of the notebook
):
    "Markdown parts of one cell, none for a hidden one."
    ds,src = directives(cell.source)
    if ds & _hidden or cell.cell_type not in ('markdown', 'code'): return []
    if cell.cell_type=='markdown': return [relink(src).strip()]
    shown = [] if 'echo: false' in ds else [f'```python\n{src}\n```']
    outs = [] if 'output: false' in ds else [output(o, cell) for o in cell.get('outputs', [])]
    return (shown if src.strip() else []) + outs

def readme(
    nb, # path of the notebook
):
    "README.md as one string."
    nb = Path(nb)
    if not nb.exists(): raise FileNotFoundError(f"{nb} does not exist: README.md is made from it, so write it or restore it with git.")
    return '\n\n'.join([note] + [p for c in read_nb(nb).cells for p in cell_md(c) if p]) + '\n'

def write_or_check(
    args,   # Command line: nothing, or `--check`
    make,   # Function that gives the text
    dest,   # File to write or compare
    source, # What `dest` is made from, for the message
):
    "Write `dest` and return 0; with `--check` leave it alone and return 1 if it is out of step"
    if args not in ([], ['--check']): return _say(f'Usage: python {Path(sys.argv[0]).name} [--check]')
    try: text = make()
    except (NotebookError, FileNotFoundError) as e: return _say(e)
    same = dest.exists() and dest.read_text(encoding='utf-8')==text
    if same: return 0
    if args: return _say(f'{dest.name} is out of step with {source}: run `make prepare` and commit the result.')
    dest.write_text(text, encoding='utf-8')
    return 0

def _say(msg):
    print(msg, file=sys.stderr)
    return 1

def main(
    args,                          # Command line: nothing, or `--check`
    nb=root/'nbs'/'index.ipynb',   # Notebook to read
    dest=root/'README.md',         # File to write or compare
):
    "Write README.md, or with `--check` compare it"
    return write_or_check(args, lambda: readme(nb), dest, f'{nb.parent.name}/{nb.name}')

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
