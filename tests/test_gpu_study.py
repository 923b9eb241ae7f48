"The GPU kit's study on 200 species, at a size for a processor, and what happens when an item ends its process."
import subprocess,sys,time
from pathlib import Path
import pytest
repo = Path(__file__).resolve().parents[1]
GPU = repo/'benchmarks'/'gpu'
sys.path[:0] = [str(GPU),str(repo/'benchmarks'/'cekd')]
import checks,run
import birds_bundle,birds_plan,birds_queue

pytestmark = pytest.mark.filterwarnings('ignore')

# --- a process that breaks off

PROGRAM = f'''import os,sys
sys.path.insert(0, {str(GPU)!r})
from checks import Run
run = Run('toy', sys.argv[1], 60, True)
open(run.out/'starts', 'a').write('.')
for k in run.each(['a','b','c','d']): run.do(k, (lambda: os._exit(9)) if k in ('b','c') else dict)
'''

def started(out): return lambda stages, seconds: subprocess.Popen([sys.executable, '-c', PROGRAM, str(out)])

def test_an_item_that_ends_its_process_is_a_result(tmp_path):
    "The two that end it are failures, the others are good, and nothing runs twice."
    again = started(tmp_path)
    run.finish([[['toy'],again(['toy'], 9)]], time.time()+30, again, tmp_path)
    rows = checks.done_rows(tmp_path)
    assert [(r['item'],r['ok']) for r in rows]==[('a',True),('b',False),('c',False),('d',True)]
    assert (tmp_path/'starts').read_text()=='...' and 'b: the process ended' in run.summary(rows)
    assert not (tmp_path/'toy.begun').exists()

def test_a_process_that_never_comes_up_is_a_result(tmp_path):
    again = lambda stages, seconds: subprocess.Popen([sys.executable, '-c', 'raise SystemExit(5)'])
    run.finish([[['toy'],again(0, 0)]], time.time()+30, again, tmp_path)
    assert [(r['stage'],r['ok'],r['error'][:17]) for r in checks.done_rows(tmp_path)]==[('toy',False,'ended with code 5')]

def test_an_item_that_time_ended_runs_again(tmp_path):
    again = lambda stages, seconds: subprocess.Popen([sys.executable, '-c', f"open({str(tmp_path/'toy.begun')!r}, 'w').write('a'); import time; time.sleep(60)"], start_new_session=True)
    p = again(0, 0)
    while not (tmp_path/'toy.begun').exists(): time.sleep(.02)
    run.finish([[['toy'],p]], time.time()+.1, again, tmp_path)
    assert p.poll() is not None and [(r['item'],r['ok']) for r in checks.done_rows(tmp_path)]==[('(process)',None)]
    assert checks.Run('toy', tmp_path, 9, True).done=={'(process)'}

# --- the study

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Drawn birds in the place of the 200 species: settings, bundle, and a bench that trains on them"
    folder = tmp_path_factory.mktemp('birds')
    c = checks.tiny_birds(folder)
    label,test = birds_bundle.decode(folder, c['classes'], folder/'pixels.npy')
    from birds_train import Bench
    return c,folder,Bench(folder, folder/'pixels.npy', label, test, c, 'cpu')

rows200 = list(dict.fromkeys(o['row'] for o in birds_plan.jobs(birds_plan.read_config('birds200'), 20, {})))

def test_the_study_has_one_seed_of_all_first_and_chooses_nothing():
    jobs = birds_plan.jobs(birds_plan.read_config('birds200'), 20, {})
    assert {(j['stage'],j['lr']) for j in jobs}=={('final',.0012)} and [j['seed'] for j in jobs[:15]]==[0]*15
    assert {j['seed'] for j in jobs[15:]}=={1,2} and {j['row'] for j in jobs[15:]}<=set(rows200)
    assert {j['epochs']*j['passes'] for j in jobs}=={20}
    assert {'plain','label smoothing','2 branches, label smoothing','CEKD + SnapMix','CEKD + SnapMix, label smoothing'}<=set(rows200)

@pytest.mark.parametrize('row', rows200)
def test_every_row_of_the_study_trains(tiny, row):
    c,_,bench = tiny
    j = next(o for o in birds_plan.jobs(c, 2, {}) if o['row']==row)
    r = bench.run(j, time.time()+100)
    assert r['images']==8 and r['train_images']==16 and 0<=r['accuracy']<=1 and r['loss']==r['loss']

def test_the_step_of_the_kit_goes_on_where_it_ended(tmp_path, monkeypatch):
    "The first start ends after two rows and a failed one, the second makes the rest, the third runs nothing."
    calls = []
    def made(c, bundle, out, seconds, device, workers, begin):
        "In the place of the processes: rows of the first two runs, then of all"
        file = out/f"{c['name']}.jsonl"
        done = {birds_plan.key(r):r for r in birds_queue.read_rows(file) if 'accuracy' in r}
        todo = birds_plan.jobs(c, 2, done)
        calls.append((len(todo),device))
        for j in todo[:2] if len(calls)==1 else todo: birds_queue.add_row(file, j|dict(accuracy=.5, seconds=1.))
        if len(calls)==1: birds_queue.add_row(file, todo[2]|dict(error='RuntimeError: out of memory'))
    monkeypatch.setattr(birds_queue, 'run', made)
    for _ in range(3): checks.study(checks.Run('study', tmp_path, 50, True))
    assert calls==[(37,'cpu'),(35,'cpu')]
    rows = checks.done_rows(tmp_path)
    assert [(r['item'],r['ok']) for r in rows[:3]]==[(rows200[0],True),(rows200[1],True),(rows200[2],False)]
    assert rows[3]['item']=='(rest)' and rows[3]['ok'] is None and 'start again' in rows[3]['note']
    assert {r['item'] for r in rows if r['ok']}==set(rows200)
