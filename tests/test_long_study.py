"The studies of long runs: what is done to labels and pictures by hand-worked numbers, a run of each kind, and one queue for several studies."
import itertools,json,re,shutil,sys,time
from pathlib import Path
import numpy as np,pytest,torch

repo = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(repo/'benchmarks'/'gpu'),str(repo/'benchmarks'/'cekd')]
import birds,birds_bundle,birds_plan,birds_queue,birds_tables,checks,long_train
from fastai.callback.core import Callback
from graphed import GraphedLoop,HeldMomentum

pytestmark = pytest.mark.filterwarnings('ignore')

# --- labels and pictures

def test_wrong_labels_are_as_many_as_asked_for_and_wrong():
    y = np.arange(20)%5
    z = long_train.wrong_labels(y, .4, 5, 0)
    assert (y!=z).sum()==8 and set(z)<=set(range(5)) and (long_train.wrong_labels(y, .4, 5, 0)==z).all()
    assert (long_train.wrong_labels(y, 0, 5, 0)==y).all() and (y==np.arange(20)%5).all()

def test_half_of_each_class_is_labelled():
    label,rows = np.repeat([0,1], 6),np.array([0,1,2,3,6,7,8,9])
    got = long_train.labelled_rows(label, rows, .5, 0)
    assert set(got)<=set(rows) and [int((label[got]==k).sum()) for k in (0,1)]==[2,2]
    assert (long_train.labelled_rows(label, rows, 1, 0)==rows).all()

def test_pictures_move_by_whole_places():
    "A picture of one bright place: it is one bright place afterwards, at most `pad` away, and nothing comes in from beyond"
    ims = torch.zeros(40, 3, 8, 8, dtype=torch.uint8)+127
    ims[:,:,3,3] = 255
    dl = long_train.PadLoader(ims, torch.arange(40), dict(bs=40, size=8, pad=2), 0)
    x,_ = next(iter(dl))
    spot = (x[:,0]>.9).nonzero()
    assert len(spot)==40 and x.max()<=1.001
    down = spot[:,1]-3
    assert set(down.tolist())==set(range(-2, 3))
    across = torch.minimum((spot[:,2]-3).abs(), (spot[:,2]-4).abs()) # mirrored pictures have it at 4
    assert across.max()<=2 and len(set(spot[:,2].tolist()))>4

# --- runs

@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Drawn birds and tiny networks in the place of photographs; a bench for each of the two studies"
    import timm
    folder = tmp_path_factory.mktemp('long')
    c = checks.tiny_birds(folder)
    label,test = birds_bundle.decode(folder, c['classes'], folder/'pixels.npy')
    small = dict(classes=4, size=32, bs=8, arch='test_resnet', layouts=['channels_first'])
    meal = birds_plan.read_config('meal50')|small
    del meal['teacher_taps']
    meal['teachers'] = {k:dict(arch=k, weights=f'{k}.pth') for k in ('test_efficientnet','test_resnet')}
    meal['teacher'] = meal['teacher']|dict(epochs=1)
    for k in meal['teachers']: torch.save(timm.create_model(k).state_dict(), folder/f'{k}.pth')
    cs = dict(meal50=meal, cifar=birds_plan.read_config('cifar')|small|dict(pad=4, arch='cifar_resnet8'))
    return {k:long_train.Bench(folder, folder/'pixels.npy', label, test, o, 'cpu') for k,o in cs.items()}

def run(bench, row, **kw):
    j = birds_plan.job(bench.c, 'final', row, 0, 'equal compute', 1, .03, '-')|kw
    return bench.run(j, time.time()+100)

@pytest.mark.parametrize('row', ['labels, label smoothing','labels of half of the images','mean of the teachers','MEAL, joint, 20 % wrong','labels and MEAL, joint'])
def test_students(tiny, row):
    r = run(tiny['meal50'], row)
    assert r['images']==8 and 0<=r['accuracy']<=1 and r['train_images']==(8 if 'half' in row else 16)
    assert set(r.get('teachers', ()))==({'test_efficientnet','test_resnet','ensemble'} if 'MEAL' in row or 'teachers' in row else set())

class Watch(Callback):
    "Counts steps of training, and ends the run in the last one of an epoch, as a signal would"
    steps,resumable = 0,False # nothing of it goes into a file
    def __init__(self, kill_in=None): self.kill_in = kill_in
    def before_batch(self):
        if not self.training: return
        self.steps += 1
        if self.epoch==self.kill_in and self.iter==self.n_iter-1: raise SystemExit

SOME = [('cifar',o) for o in ('plain','FFM + CD','OKDDip','DML','CSS')] + [('meal50',o) for o in ('MEAL without adversary','MEAL, joint','labels of half of the images')]
@pytest.mark.parametrize('study,row', SOME)
def test_a_killed_run_goes_on(tiny, study, row, tmp_path, monkeypatch):
    "It ends with the figures of one that was not killed, and says when it began; nothing is trained twice"
    bench,make = tiny[study],tiny[study].learner
    def watched(watch):
        monkeypatch.setattr(bench, 'learner', lambda *o: make(*o).add_cb(watch))
        return run(bench, row, epochs=4)
    whole,rest = Watch(),Watch()
    want = watched(whole)
    monkeypatch.setattr(bench, 'c', bench.c|dict(keep=str(tmp_path), commit='first'))
    with pytest.raises(SystemExit): watched(Watch(2))
    bench.c['commit'] = 'second'
    res = watched(rest)
    for k in ('accuracy','ece','loss','train_accuracy','each'): assert res[k]==want[k], k
    n_epochs = 8 if 'half' in row else 4
    assert rest.steps*n_epochs==whole.steps*(n_epochs-2) and res['begun']=='first'
    again = watched(last := Watch()) # ended after the training, before its row was written
    assert last.steps==0 and again['kept']==res['kept'] and again['loss']==want['loss']

@pytest.mark.parametrize('row', ['plain','ONE','FFM + CD','CSS'])
def test_mixed_precision_on_processors(tiny, row, monkeypatch):
    "Maps are bfloat16, weights and what stands in a row are not; without the option, all is in full precision"
    bench,seen = tiny['cifar'],[]
    for precision,want in ((None,torch.float32),('bf16',torch.bfloat16)):
        monkeypatch.setitem(bench.c, 'precision', precision)
        j = birds_plan.job(bench.c, 'final', row, 0, 'equal compute', 1, .03, '-')
        learn = bench.learner(j, bench.loaders(j)[0])
        first = next(o for o in learn.model.modules() if isinstance(o, torch.nn.Conv2d))
        hook = first.register_forward_hook(lambda m,x,y: seen.append(y.dtype))
        bench.fit_job(learn, j, [long_train.Lean(time.time()+100)])
        hook.remove()
        assert seen.pop()==want and first.weight.dtype==torch.float32
    assert 0<=run(bench, row)['accuracy']<=1

def test_an_unknown_precision_is_refused():
    "A row would say that it was trained in a precision that it was not"
    with pytest.raises(SystemExit, match="'fp16', but it is bf16 or left out"): birds.main('table', precision='fp16')

def test_a_student_begins_alike_whether_its_teachers_are_there_or_not(tiny):
    "With the weights of the student by labels, too"
    bench,nets = tiny['meal50'],[]
    for row in ('labels','MEAL without adversary','MEAL without adversary'):
        j = birds_plan.job(bench.c, 'final', row, 5, 'equal compute', 1, .03, '-')
        if row!='labels' and len(nets)<2: assert not any(bench.teacher_file(j, k).exists() for k in bench.c['teachers'])
        nets.append(bench.learner(j, bench.loaders(j)[0]).model.state_dict())
    assert all(torch.equal(v, o[k]) for o in nets[1:] for k,v in nets[0].items())

def test_teachers_are_trained_once_for_all_students_of_the_same_labels(tiny, tmp_path):
    "In later runs too, unless how they are trained is another"
    bench = tiny['meal50']
    j = birds_plan.job(bench.c, 'final', 'MEAL, joint', 0, 'equal compute', 1, .03, '-')
    bench.teachers(j)
    was = {k:bench.teacher_file(j, k).stat().st_mtime_ns for k in bench.c['teachers']}
    bench.teachers(j)
    assert was=={k:bench.teacher_file(j, k).stat().st_mtime_ns for k in bench.c['teachers']}
    wrong = birds_plan.job(bench.c, 'final', 'MEAL, joint, 20 % wrong', 0, 'equal compute', 1, .03, '-')
    assert bench.teacher_file(wrong, 'test_resnet')!=bench.teacher_file(j, 'test_resnet')
    def later(**o): return long_train.Bench(bench.bundle, shutil.copy(bench.pixels, tmp_path), bench.label, bench.test, bench.c|o, 'cpu')
    later().teachers(j)
    assert not [*tmp_path.glob('*.begun')] and was=={k:bench.teacher_file(j, k).stat().st_mtime_ns for k in bench.c['teachers']}
    assert later(teacher=bench.c['teacher']|dict(epochs=9)).teacher_file(j, 'test_resnet')!=bench.teacher_file(j, 'test_resnet')

@pytest.mark.parametrize('row', ['3 branches, label smoothing','DML','OKDDip','FFL','FFM + CD','CSS'])
def test_branches(tiny, row):
    r = run(tiny['cifar'], row)
    assert r['images']==8 and len(r['each'])==birds_plan.read_config('cifar')['rows'][row]['branches']*(1+(row=='CSS'))
    assert ('accuracy_net1' in r)==(row=='CSS')

def test_branches_start_apart(tiny):
    bench = tiny['cifar']
    j = birds_plan.job(bench.c, 'final', '3 branches', 0, 'equal compute', 1, .03, '-')
    net = bench.learner(j, bench.loaders(j)[0]).model
    a,b = (next(p for p in o.parameters() if p.ndim==4) for o in list(net.branches)[:2])
    assert not torch.equal(a, b)

# --- one queue

@pytest.mark.parametrize('queue', ['long','seeds'])
def test_rows_exist(queue):
    for name,c in birds_plan.read_config(queue)['studies'].items():
        asked = {o.replace('BEST', b) for block in c['final'] for o in block.get('rows', block.get('with')) for b in c['select']['best']['rows']}
        assert asked<=set(c['rows']), name

def test_the_first_block_of_each_study_comes_first():
    c,done = birds_plan.read_config('long'),{}
    first = birds_plan.jobs(c, None, done)
    assert {j['study'] for j in first[:9]}=={'meal50','cifar','birds_random'} and all(j['stage']=='select' for j in first[:9])
    assert {j['study'] for j in first[9:]}=={'birds160','birds200'} # the others wait for their rates
    done = {birds_plan.key(j):j|dict(accuracy=j['lr']) for j in first[:9]}
    then = birds_plan.jobs(c, None, done)
    assert {j['lr'] for j in then if j['study'] not in ('birds160','birds200')}=={.3}
    n = len(c['studies']['meal50']['final'][0]['rows'])
    assert [j['study'] for j in then[:n]]==['meal50']*n and not {birds_plan.key(j) for j in then}&done.keys()

def test_a_queue_may_say_which_of_its_studies_wait():
    "The search goes on first, since its blocks wait for each other"
    c = birds_plan.read_config('seeds')
    rows = birds_queue.known_rows(c, repo/'benchmarks'/'cekd'/'results', Path('none'))
    done = {birds_plan.key(r):r for r in rows if 'stage' in r and (r['stage']=='select' and r['study']!='birds_search')}
    order = [k for k,_ in itertools.groupby(j['study'] for j in birds_plan.jobs(c, None, done))]
    assert order[:2]==['birds_search','meal50'] and set(order)==set(c['studies'])

def test_a_row_says_how_it_was_computed_where_its_study_does():
    c = dict(studies=dict(a=dict(precision='bf16', folded=True), b={}))
    assert birds_queue.way_of(c, dict(study='a'))==dict(precision='bf16', folded=True) and birds_queue.way_of(c, dict(study='b'))=={}

class Conn:
    def send(self, msg): self.sent = msg[1]
class Machine:
    "Workers without processes"
    def __init__(self): self.workers = {Conn():None}
    def answers(self, conns, until):
        for o in conns: yield o,'run',dict(accuracy=.5, each=[.5], ece=.1, train_accuracy=1., seconds=9.)

def test_each_study_has_its_file_and_is_not_run_again(tmp_path):
    c = birds_plan.read_config('long')
    n = dict.fromkeys(c['studies'], 100)
    serve = lambda: birds_queue.serve(Machine(), c, None, birds_queue.known_rows(c, tmp_path/'none', tmp_path/'long.jsonl'), tmp_path/'long.jsonl', time.time()+1e6, n, 1e9, {})
    serve()
    count = {o:len((tmp_path/f'{o}.jsonl').read_text().splitlines()) for o in c['studies']}
    assert count['meal50']==3+15*3+2*3+3+3 and count['cifar']==3+12*3+2*3 and not (tmp_path/'long.jsonl').exists()
    assert 'study' not in json.loads((tmp_path/'cifar.jsonl').read_text().splitlines()[0])
    serve()
    assert count=={o:len((tmp_path/f'{o}.jsonl').read_text().splitlines()) for o in c['studies']}

def test_what_is_kept_of_a_run_goes_when_its_row_is_written(tmp_path):
    c = birds_plan.read_config('cifar')
    (kept := tmp_path/'kept').mkdir()
    class Keeps(Machine):
        def answers(self, conns, until):
            for conn,what,value in super().answers(conns, until): yield conn,what,value|dict(kept=str(kept))
    birds_queue.serve(Keeps(), c, 150, [], tmp_path/'cifar.jsonl', time.time()+1e6, 100, 1e9, {})
    rows = birds_queue.read_rows(tmp_path/'cifar.jsonl')
    assert rows and not kept.exists() and not any('kept' in r for r in rows)

def test_recorded_rows_are_not_run_again():
    c = birds_plan.read_config('long')
    rows = birds_queue.known_rows(c, Path('none'), repo/'benchmarks'/'cekd'/'results'/'long.jsonl')
    done = {birds_plan.key(r):r for r in rows if 'stage' in r}
    left = {birds_plan.key(j) for j in birds_plan.jobs(c, None, done)}
    every = {birds_plan.key(j) for j in birds_plan.jobs(c, None, {k:r for k,r in done.items() if r['stage']=='select'})}
    assert len(done)==sum('stage' in r for r in rows)>0 and not left&done.keys() and every-left==done.keys()-{k for k,r in done.items() if r['stage']=='select'}

def test_teachers_have_lines_in_the_table():
    c = birds_plan.read_config('meal50')
    rows = birds_queue.read_rows(repo/'benchmarks'/'cekd'/'results'/'meal50.jsonl')
    lines = birds_tables.final_table(rows, {1:.2, 'teachers':[.1,.2,.3]}, c).split('\n')
    gmac = {o.split(' | ')[0][2:]:o.split(' | ')[4] for o in lines[6:]}
    assert (gmac['labels, 20 % wrong'],gmac['one random teacher'],gmac['mean of the teachers'])==('120.0','160.0','240.0') # 200 times .6, and .2 or .6 of answers
    assert [o.split(' |')[0] for o in lines[2:6]]==['| teacher Lite0','| teacher Lite2','| teacher MobileNetV2','| the teachers together']
    assert lines[0].endswith('against labels | against labels, label smoothing |')

def test_of_several_sets_of_teachers_the_table_shows_that_of_most_rows():
    def r(seed, acc, **args): return dict(stage='final', seed=seed, args=args, teachers=dict(Lite0=acc))
    line, = birds_tables.teacher_lines([r(0, .6), r(0, .6), r(0, .5), r(0, .2, wrong=.4), r(1, .8)])
    assert line[0]=='teacher Lite0' and line[5].startswith('70.0 ±') and 2 in line

def test_pictures_of_one_kind_are_decoded_once(tmp_path, monkeypatch):
    checks.tiny_birds(tmp_path, 4)
    c = dict(studies={k:dict(classes=n) for k,n in dict(few=2, all=4).items()})
    calls,decode = [],birds_bundle.decode
    monkeypatch.setattr(birds_bundle, 'decode', lambda bundle, n, file, kind: calls.append(n) or decode(bundle, n, file, kind))
    data = birds_bundle.decode_each(c, tmp_path, tmp_path)
    want,label,test = decode(tmp_path, 2, tmp_path/'want.npy'),*data['few'][1:]
    assert calls==[4] and (want[0]==label).all() and (want[1]==test).all() and set(label)=={0,1}
    assert (np.load(data['few'][0])==np.load(tmp_path/'want.npy')).all() and len(np.load(data['all'][0]))==2*len(label)

def test_graphed_epochs_train_as_steps_do(tiny):
    def trained(graphed):
        bench,j = tiny['cifar'],birds_plan.job(tiny['cifar'].c, 'final', 'plain', 0, 'equal compute', 3, .05, '-')
        dls,_ = bench.loaders(j)
        learn = bench.learner(j, dls)
        loop,replays,groups = GraphedLoop(learn, None),[],lambda: learn.opt.opt.param_groups
        def replay(): # what a graph launches, without the events of Python, and with the momentum of its capture
            for g in groups(): g['momentum'] = loop.held
            x,y = loop.batch(*loop.at)
            learn.loss_func(learn.model(x)[0][0], y).backward()
            loop.step()
            learn.opt.zero_grad()
            replays.append(1)
        def capture(step):
            step()
            loop.held = groups()[0]['momentum']
            return replay
        loop.capture = capture
        if graphed: learn.all_batches = loop.all_batches
        with learn.no_bar(),learn.no_logging(): learn.fit_one_cycle(6, .05, cbs=[] if graphed else HeldMomentum())
        return torch.cat([o.detach().flatten() for o in learn.model.parameters()]),len(replays),learn.train_iter
    plain,_,steps = trained(False)
    graphs,replays,same = trained(True)
    assert steps==same and 0<replays<steps
    torch.testing.assert_close(graphs, plain, rtol=1e-4, atol=1e-5)

def test_runs_that_differ_in_labels_alone_do_the_same_work():
    import graph_check
    c = birds_plan.read_config('meal50')
    of = lambda row: graph_check.work_of(birds_plan.job(c, 'final', row, 0, 'equal compute', 2, .1, '-'))
    assert of('labels')==of('labels, 40 % wrong')==of('labels, label smoothing')!=of('MEAL, joint')==of('MEAL, joint, half of the images labelled')!=of('MEAL, grl')
    repeats = [o for o in c['rows'] if graph_check.repeats(birds_plan.job(c, 'final', o, 0, 'equal compute', 2, .1, '-'))]
    assert set(c['rows'])-set(repeats)=={'one random teacher','labels, MixUp'} # another one is asked in each step, another mix drawn
    b = birds_plan.read_config('birds_random')
    assert not any(graph_check.repeats(birds_plan.job(b, 'final', o, 0, 'equal compute', 2, .1, 'separate')) for o in ('SnapMix','CEKD + SnapMix','2 branches, PS-KD'))

def test_the_kit_has_all_that_its_study_reads(tmp_path):
    "In a folder that holds nothing else"
    import prepare,shutil,subprocess,sys
    for o in prepare.STUDIED: shutil.copy(repo/'benchmarks'/'cekd'/o, tmp_path/o)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r},{str(repo)!r}]; import birds_bundle,birds_plan,birds_queue,birds_train; birds_plan.read_config('birds200'); print(birds_queue.__file__)"
    assert str(tmp_path) in subprocess.run([sys.executable,'-W','ignore','-c',code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

def test_files_for_another_machine_bring_what_they_import():
    import prepare
    here = {o.stem for o in (repo/'benchmarks'/'cekd').glob('*.py')}
    def imported(file): return {o for o in re.findall(r'^(?:from|import) (\w+)', (repo/'benchmarks'/'cekd'/file).read_text(), re.M) if o in here}
    for files in (birds_bundle.FILES,prepare.STUDIED):
        needs = set().union(*(imported(o) for o in files if o.endswith('.py')))
        assert {f'{o}.py' for o in needs}<=set(files)
    assert {f'{o}.json' for o in birds_plan.read_config('long')['studies']}<=set(birds_bundle.FILES)

def test_single_rows_may_be_asked_for():
    c = birds_plan.read_config('birds200')|dict(only=['2 branches','no such row'])
    assert [(j['row'],j['seed']) for j in birds_plan.jobs(c, 20, {})]==[('2 branches',o) for o in (0,1,2)]
