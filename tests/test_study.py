"The bookkeeping of the study: what counts as done, what is chosen, which rows a table shows; and the page of all results."
import copy,importlib.util,json
from pathlib import Path
import pytest

@pytest.fixture
def study():
    file = Path(__file__).parent.parent/'benchmarks'/'cekd'/'study.py'
    spec = importlib.util.spec_from_file_location('study', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def row(study, accuracy, *args, **kw): return study.job('cub50', *args, **kw) | dict(accuracy=accuracy, each=[accuracy], gmacs_per_image=1.)

def test_edited_settings_are_other_runs(study, monkeypatch):
    "A run that was done with another learning rate, or for other epochs, is not done"
    one = study.job('cub50', 'final', 'plain', 0)
    changed = copy.deepcopy(study.config)
    changed['settings']['cub50']['lr'] *= 2
    monkeypatch.setattr(study, 'config', changed)
    two = study.job('cub50', 'final', 'plain', 0)
    assert len({study.key(o) for o in (one, two, one|dict(epochs=one['epochs']+1), two|dict(seed=1))})==4 and study.key(one)==study.key(dict(one))

def test_chosen_on_common_seeds(study):
    "A candidate is not chosen for a lucky seed that the others did not have"
    sel = lambda acc, seed, mix: row(study, acc, 'select', 'CutMix', seed, mix)
    rows = [sel(.6, 0, 'cutmix half'), sel(.7, 0, 'cutmix all')]
    assert study.chosen(rows, 'CutMix')[0]=='cutmix all'
    assert study.chosen(rows+[sel(.99, 1, 'cutmix half')], 'CutMix')[0]=='cutmix all'
    assert study.chosen(rows+[sel(.99, 1, 'cutmix half'), sel(.5, 1, 'cutmix all')], 'CutMix')[0]=='cutmix half'
    assert study.chosen([], 'CutMix')[0]=='cutmix half'

def test_table_of_what_was_chosen(study, monkeypatch, tmp_path, capsys):
    "When another mix is chosen, runs with the one before are not averaged into its row"
    sel = [row(study, a, 'select', 'CutMix', 0, m) for a,m in ((.6,'cutmix half'), (.7,'cutmix all'))]
    final = [row(study, a, 'final', 'CutMix', s, m, None, 1) for m,a in (('cutmix half',.1), ('cutmix all',.8)) for s in (0,1)]
    info = dict(versions=dict(torch='0'), machine=dict(cores=1))
    monkeypatch.setattr(study, 'read_rows', lambda _: [o|info for o in sel+final])
    monkeypatch.setattr(study, 'here', tmp_path/'cekd')
    for o in ('cekd','results'): (tmp_path/o).mkdir()
    study.write_tables('cub50')
    said = capsys.readouterr().out
    assert '80.0, 80.0' in said
    assert '10.0' not in said and (tmp_path/'cekd'/'cub50.png').exists()

def test_renamed_arguments_leave_runs_done(study):
    "A finished run counts as done, though its arguments have had other names"
    raw = (study.here/'results'/'cub50.jsonl').read_text()
    assert '"alpha": 0' in raw
    jobs = {study.key(o) for o in study.select_jobs('cub50', range(1))}
    done = {study.key(o) for o in study.read_rows('cub50') if o['stage']=='select'}
    assert len(done)>20 and done<=jobs

def test_renamed_arguments_of_commands(benchmark):
    collect = benchmark('collect')
    was = dict(method='cekd', method_args=['beta=3','alpha=0','T=4'], mix_args=['alpha=5'])
    assert collect.today(was)==was|dict(method_args=['w_clean=3','w_cross=0','T=4'])
    other = dict(method='plain', mix_args=['alpha=5'])
    assert collect.today(other)==other

# The page of all results

@pytest.fixture
def benchmark(monkeypatch):
    "Import a module of the folder `benchmarks`"
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent/'benchmarks'))
    return importlib.import_module

def test_page_shows_all_results(benchmark):
    "Every result file has its table on the page, with the command that makes it"
    page = benchmark('page')
    text = (page.here/'README.md').read_text(encoding='utf-8')
    for o in (page.here/'results').glob('*.json'): assert f"(`{json.loads(o.read_text())['command']}`" in text, o.name

def test_page_takes_cells(benchmark):
    "A cell comes without its heading, and its links lead from the page to where they led from the notebook"
    page = benchmark('page')
    text = page.cell_text('nbs/studies/cekd.ipynb', 'birds-md')
    assert text.startswith('Now the same') and '](../benchmarks/README.md#' in text
    assert page.cell_text('nbs/studies/cekd.ipynb', 'title').count('](../nbs/43_cekd.ipynb)')==1

@pytest.mark.parametrize('line,fault', [('{{table nothing}}','no benchmarks/results/nothing.json'), ('{{cell nbs/x.ipynb a}}','nbs/x.ipynb, which does not exist'),
    ('{{cell nbs/studies/cekd.ipynb nothing}}','the cell `nothing`'), ('{{row a}}','begins with `table` or `cell`'), ('{{table online}}','shows no table of')])
def test_page_names_what_is_wrong(benchmark, line, fault):
    page = benchmark('page')
    with pytest.raises(page.PageError, match=fault): page.page(f'# Results\n\n{line}\n')
