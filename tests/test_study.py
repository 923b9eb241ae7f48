"The bookkeeping of the study: what counts as done, what is chosen, and which rows a table shows."
import copy,importlib.util
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
