"""Make benchmarks/README.md, the page of all results, from benchmarks/page.md; with --check, only say whether the two are in step.

In page.md a line `{{table NAME}}` stands for the table of benchmarks/results/NAME.json, with its command and machine, and a line
`{{cell NOTEBOOK ID}}` for the text of a cell, so that each table is read in one place, its notebook. Every result file has its line."""
import json,re,sys
from pathlib import Path
from common import here,result_table
root = here.parent
sys.path.insert(0, str(root/'tools'))
from readme import NotebookError,relink,write_or_check # of README.md, which needs the same links seen from elsewhere

note = '<!-- Made from benchmarks/page.md by benchmarks/page.py: edit that, then run `make prepare`. -->'
_line = re.compile(r'^\{\{(.*)\}\}$', re.M)

class PageError(NotebookError):
    "A line of page.md that names nothing, or a result file without a line."

def cell_text(
    nb, # Path of a notebook, from the root of the repository
    id, # Id of a markdown cell
):
    "Text of a cell without its headings, with links seen from the page"
    file = root/nb
    if not file.exists(): raise PageError(f'page.md names the notebook {nb}, which does not exist: correct its path.')
    cells = {o['id']: ''.join(o['source']) for o in json.loads(file.read_text(encoding='utf-8'))['cells']}
    if id not in cells: raise PageError(f'page.md names the cell `{id}` of {nb}, which does not exist: correct its id.')
    text = re.sub(r'^#+ .*\n+', '', cells[id], flags=re.M)
    text = text.replace('](#', f']({file.name}#') # a link inside the notebook
    return relink(text, f'../{Path(nb).parent}').strip()

def table_text(
    name, # Of a file in benchmarks/results
):
    "Table of a result file"
    if not (here/'results'/f'{name}.json').exists(): raise PageError(f'page.md names the table {name}, but there is no benchmarks/results/{name}.json.')
    return result_table(name)

def page(
    template, # Text of page.md
):
    "The page as one string"
    used = set()
    def _filled(m):
        kind,*args = m[1].split()
        if kind not in ('table','cell'): raise PageError(f'page.md has the line {m[0]}, but a line begins with `table` or `cell`.')
        if kind=='cell': return cell_text(*args)
        used.add(args[0])
        return table_text(*args)
    res = _line.sub(_filled, template)
    left = sorted({o.stem for o in (here/'results').glob('*.json')}-used)
    if left: raise PageError(f'page.md shows no table of {", ".join(left)}: add a line {{{{table {left[0]}}}}} and how to read it.')
    return f'{note}\n\n{res.strip()}\n'

def main(
    args, # Command line: nothing, or `--check`
):
    "Write the page, or with `--check` compare it"
    make = lambda: page((here/'page.md').read_text(encoding='utf-8'))
    return write_or_check(args, make, here/'README.md', 'page.md, the results or a notebook')

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
