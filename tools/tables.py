"Store in the notebooks the tables that their cells take from result files; with --check, only name the cells that differ."
import re,sys
from pathlib import Path
from fastcore.nbio import read_nb,write_nb

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/'benchmarks'))
from common import result_table # chkstyle: ignore

_table = re.compile(r'^Markdown\((result_table\(.*\))\)\s*$', re.M)

def output(text):
    "What a cell stores that shows `text` as markdown"
    data = {'text/markdown': text, 'text/plain': '<IPython.core.display.Markdown object>'}
    return dict(data=data, execution_count=None, metadata={}, output_type='execute_result')

def stale(nb):
    "Cells of a notebook whose stored table is not that of the result file, each with what it should store"
    found = [(c, _table.search(c.source)) for c in nb.cells if c.cell_type=='code']
    new = [(c, [output(eval(m[1], dict(result_table=result_table)))]) for c,m in found if m] # chkstyle: ignore
    return [(c,o) for c,o in new if c.outputs!=o]

def main(check):
    "Store what differs, or give one sentence that names it"
    faults = []
    for p in sorted((root/'nbs').rglob('*.ipynb')):
        nb = read_nb(p)
        old = stale(nb)
        faults += [f'{p.relative_to(root)}, cell `{c.id}`' for c,_ in old]
        for c,o in old: c.outputs = o
        if old and not check: write_nb(nb, p)
    if check and faults: return f"The stored tables are not those of benchmarks/results: {'; '.join(faults)}. Run `make prepare`."

if __name__=='__main__': sys.exit(main('--check' in sys.argv[1:]))
