"The study on real birds: softened labels against numbers worked out by hand, and the bookkeeping of its queue."
import subprocess,sys,time
from pathlib import Path
import pytest,torch
from fastai.vision.all import Callback,CancelValidException,DataLoaders,SGD,Learner,nn,tensor
from cekd_fastai.all import BranchNet,BranchLoss,CEKD,Mix,MixRecord

FOLDER = Path(__file__).parent.parent/'benchmarks'/'cekd'
sys.path[:0] = [str(FOLDER)]
import birds_plan,birds_queue,birds_tables
import birds_train as train

# A network that answers with what it is shown: its images are logits

class Rows:
    "A loader over given logits, batch by batch, that says which rows a batch holds"
    n_inp = 1
    def __init__(self, z, y, batches): self.z,self.y,self.batches,self.n,self.rows = z,y,batches,len(y),None
    def __len__(self): return len(self.batches)
    def to(self, device): return self
    def one_batch(self): return next(iter(self))
    def __iter__(self):
        for o in self.batches:
            self.rows = tensor(o)
            yield self.z[self.rows][:,:,None,None],self.y[self.rows]

class Keep(nn.Module):
    def forward(self, x): return x*self.w
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

class Silent(Callback):
    "No validation"
    def before_validate(self): raise CancelValidException

def learner(z, y, batches, cbs, n_branches=1):
    "Rate 0: the answers stay as they are"
    dl = Rows(z, y, batches)
    dls = DataLoaders(dl, dl)
    dls.c = z.shape[1]
    net = BranchNet(Keep(), [nn.Identity() for _ in range(n_branches)], [nn.Flatten() for _ in range(n_branches)])
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=0., cbs=[BranchLoss(),Silent(),*cbs])
    learn.remove_cb(learn.recorder)
    return learn

def fit(learn, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 0.)

LN = lambda *p: torch.tensor(p).log()
Z = torch.stack([LN(.7,.2,.1), LN(.5,.3,.2), LN(.6,.3,.1), LN(.1,.2,.7)])
Y = tensor([0,0,1,2])

# Online label smoothing

def test_online_labels():
    "Class 0: mean of two right answers; class 1 was never right: uniform; class 2: its one answer"
    cb = train.OnlineLabelSmoothing()
    learn = learner(Z, Y, [[0,1],[2,3]], [cb])
    losses = []
    class Spy(Callback):
        order = 10
        def after_loss(self): losses.append(self.learn.loss.item())
    learn.add_cb(Spy())
    fit(learn)
    want = tensor([[.6,.25,.15],[1/3]*3,[.1,.2,.7]])
    assert torch.allclose(cb.memory['soft'], want, atol=1e-6)
    # first epoch: labels and uniform second labels
    p = Z.exp()
    first = -(p[0,0].log()+p[1,0].log())/2 - (p[:2].log().sum()/3)/2
    assert losses[0]==pytest.approx(first.item(), abs=1e-5)
    fit(learn) # a second run goes on with the labels of the first
    soft = tensor([[.6,.25,.15],[.6,.25,.15],[1/3]*3,[.1,.2,.7]])
    second = -(p[0,0].log()+p[1,0].log())/2 - (soft[:2]*p[:2].log()).sum()/2
    assert torch.allclose(cb.memory['soft'], want, atol=1e-6) and losses[2]==pytest.approx(second.item(), abs=1e-5)

def test_online_labels_second_epoch():
    "The loss of an image is its cross-entropy towards its class and towards the label of its class"
    cb,losses = train.OnlineLabelSmoothing(),[]
    class Spy(Callback):
        order = 10
        def after_loss(self): losses.append(self.learn.loss.item())
    learn = learner(Z, Y, [[0,1,2,3]], [cb,Spy()])
    fit(learn, 2)
    p = Z.exp()
    soft = tensor([[.6,.25,.15],[.6,.25,.15],[1/3]*3,[.1,.2,.7]])
    want = -(p.log()[range(4),Y] + (soft*p.log()).sum(1)).mean()
    assert losses[1]==pytest.approx(want.item(), abs=1e-5)

def test_online_labels_limit():
    "A class whose label is almost sure keeps it, unless its images are all wrong"
    cb = train.OnlineLabelSmoothing()
    learn = learner(Z, Y, [[0,1,2,3]], [cb])
    class Sure(Callback):
        order = 10
        def before_train(self): cb.memory['soft'][:] = tensor([[.9,.05,.05],[.05,.9,.05],[.06,.06,.88]])
    learn.add_cb(Sure())
    fit(learn)
    assert torch.allclose(cb.memory['soft'], tensor([[.9,.05,.05],[1/3]*3,[.06,.06,.88]]))

# Progressive self-distillation

def test_progressive_labels():
    "Epoch 1 of 2: the label alone. Epoch 2: .8 of the image's answer of the epoch before"
    cb,seen,shares = train.PSKD(),[],[]
    class Spy(Callback):
        order = 4.7
        def before_batch(self):
            seen.append(cb.soft.clone())
            shares.append(cb.shares())
    learn = learner(Z, Y, [[3,1],[0,2]], [cb,Spy()])
    fit(learn, 2)
    hard = torch.eye(3)[Y]
    assert torch.allclose(seen[0], hard[[3,1]]) and torch.allclose(seen[1], hard[[0,2]])
    assert torch.allclose(seen[2], Z[[3,1]].exp(), atol=1e-6) and torch.allclose(seen[3], Z[[0,2]].exp(), atol=1e-6)
    assert shares[0]==pytest.approx((.6,.4)) and shares[-1]==pytest.approx((.2,.8))

# Stored targets

def halves(when):
    "A mix of each image with its neighbour, 3 to 1, in the batches of these numbers"
    class Halves(Mix):
        def mix(self, x, y):
            if self.learn.epoch*len(self.learn.dls.train)+self.learn.iter not in when: return None
            perm = tensor([1,0])
            return .75*x+.25*x[perm],MixRecord(perm, torch.full((2,), .75), torch.full((2,), .25), host_share=.75)
    return Halves(prob=1-1e-6) # soft labels need a mix that leaves batches alone

def test_stored_targets():
    "Answers at temperature T of unmixed batches, averaged over epochs, are the target of the mixes"
    T,cb,losses = 2.,train.StoredTargets(weight=1., T=2., ramp=0.),[]
    class Spy(Callback):
        order = 10
        def after_loss(self): losses.append(self.learn.loss_grad.item())
    learn = learner(Z, Y, [[0,3]], [halves([1]),cb,Spy()], n_branches=2)
    fit(learn, 2)
    q = (Z[[0,3]]/T).softmax(1)
    probs = cb.memory['probs']
    assert torch.allclose(probs[[0,3]], q, atol=1e-6) and probs[[1,2]].sum()==0 # not seen
    z = .75*Z[[0,3]]+.25*Z[[3,0]]
    t,p = .75*q+.25*q[[1,0]],(z/T).softmax(1)
    kl = (t*(t/p).log()).sum(1).mean()
    ce = -(.75*z.log_softmax(1)[range(2),[0,2]]+.25*z.log_softmax(1)[range(2),[2,0]]).mean()
    plain = -Z[[0,3]].log_softmax(1)[range(2),[0,2]].mean()
    assert losses==pytest.approx([2*plain.item(), 2*(ce+T*T*kl).item()], abs=1e-5)

def test_stored_targets_average():
    "An epoch moves the average halfway; a mix with an image that was never seen unmixed has labels alone"
    cb,soft = train.StoredTargets(T=1., ramp=0.),[]
    class Spy(Callback):
        order = 10
        def after_loss(self): soft.append(cb.soft_loss(self.learn.pred, self.learn.halves.record).item())
    learn = learner(Z, Y, [[0,3]], [halves([0]),cb,Spy()])
    class Other(Callback):
        order = 10
        def after_epoch(self):
            if self.epoch==1: self.learn.dls.train.z = Z.roll(1, 1)
    learn.add_cb(Other())
    fit(learn, 3)
    assert soft[0]==0
    assert torch.allclose(cb.memory['probs'][[0,3]], .5*Z[[0,3]].exp()+.5*Z.roll(1, 1)[[0,3]].exp(), atol=1e-6)

def test_cekd_with_soft_labels():
    "In CEKD's hard part the labels are the softened ones, and the clean pass is what they learn from"
    cb = train.OnlineLabelSmoothing()
    cekd = CEKD(w_cross=0, target='both')
    parts = []
    class Spy(Callback):
        order = 10
        def after_loss(self): parts.append({k:v.item() for k,v in cekd.parts.items()})
    learn = learner(Z, Y, [[0,3]], [halves([0,1]),cekd,cb,Spy()], n_branches=2)
    fit(learn, 2)
    lp = Z.log_softmax(1)[[0,3]]
    assert torch.allclose(cb.memory['soft'], torch.stack([lp[0].exp(),tensor([1/3]*3),lp[1].exp()]), atol=1e-6)
    t = torch.eye(3)[[0,2]]+lp.exp()
    assert parts[1]['ce_clean']==pytest.approx(2*-(t*lp).sum(1).mean().item(), abs=1e-5)
    zm = (.75*Z[[0,3]]+.25*Z[[3,0]]).log_softmax(1)
    assert parts[1]['ce_mix']==pytest.approx(2*-((.75*t+.25*t[[1,0]])*zm).sum(1).mean().item(), abs=1e-5)

def test_mixskd_logits():
    "Where mixed logits are the mixture of logits, the two teach each other nothing"
    cb,parts = train.MixSKDLogits(),[]
    class Spy(Callback):
        order = 10
        def after_loss(self): parts.append({k:v.item() for k,v in cb.parts.items()})
    fit(learner(Z, Y, [[0,3]], [halves([0]),cb,Spy()], n_branches=2))
    assert parts[0]['mutual']==pytest.approx(0, abs=1e-5)
    lp = Z.log_softmax(1)[[0,3]]
    assert parts[0]['ce_clean']==pytest.approx(-2*(lp[0,0]+lp[1,2]).item()/2, abs=1e-5)

# The loader

def loader(seed, n=8):
    c = dict(bs=4, size=6, crop=[.35,1.], ratio=[.75,1.33], test_crop=1.)
    ims = torch.arange(n*3*6*6).reshape(n,3,6,6).remainder(251).to(torch.uint8)
    return train.BirdLoader(ims, torch.arange(n), c, seed),ims

def test_loader():
    "Test images are the pictures; training images are the same for one seed, new in each epoch, and their rows are known"
    dl,ims = loader(None)
    x = torch.cat([o for o,_ in dl])
    assert torch.allclose(x, ims.float()/127.5-1, atol=1e-3)
    one,two = (loader(s)[0] for s in (1,1))
    first = [(dl.rows.clone(),x,y) for dl in [one] for x,y in dl]
    assert all(torch.equal(r, y) for r,_,y in first)
    assert sorted(torch.cat([r for r,_,_ in first]).tolist())==list(range(8))
    assert all(torch.equal(a, b) for (_,a,_),(b,_) in zip(first, two))
    assert not torch.equal(torch.cat([y for _,y in one]), torch.cat([y for _,_,y in first])) # another epoch
    assert not torch.equal(torch.cat([x for x,_ in loader(2)[0]]), torch.cat([x for _,x,_ in first]))

def test_split():
    "A fifth of each class of train is held out; nothing of the test part is touched"
    label,test = torch.arange(3).repeat_interleave(20).numpy(),(torch.arange(60)%2==0).numpy()
    tr,te = train.split(label, test, True, 0, .2)
    assert not set(tr)&set(te) and not test[tr].any() and not test[te].any()
    assert [int((label[te]==k).sum()) for k in range(3)]==[2,2,2] and len(tr)==24
    tr,te = train.split(label, test, False, 0, .2)
    assert not test[tr].any() and test[te].all() and len(tr)==len(te)==30

# The queue

def done_with(acc):
    "Selection rows with these accuracies by (row, rate, target, seed)"
    tried = birds_plan.trials(birds_plan.config, 20)
    runs = [j for o in tried.values() for v in o.values() for j in v]
    return {birds_plan.key(j): j|dict(accuracy=acc(j)) for j in runs}

def test_selection_comes_first():
    "Without rows there is nothing of the final stage; each run of the selection stands there once"
    todo = birds_plan.jobs(birds_plan.config, 20, {})
    assert {j['stage'] for j in todo}=={'select'} and len({birds_plan.key(j) for j in todo})==len(todo)==14

def test_choices():
    "The best on held-out images are what the final stage uses; of equal ones the first"
    acc = lambda j: .5+.1*(j['lr']==.0012)+.1*(j['row']=='CEKD + CutMix')+.01*(j['args'].get('target')=='both')
    todo = birds_plan.jobs(birds_plan.config, 20, done_with(acc))
    assert {j['stage'] for j in todo}=={'final'} and {j['lr'] for j in todo}=={.0012}
    first = todo[:8]
    assert [j['row'] for j in first if 'cekd' in j['methods']]==['CEKD + CutMix','clean + CutMix']
    assert first[5]['args']=={'target':'both'}
    assert birds_plan.jobs(birds_plan.config, 20, done_with(lambda j: .5))[0]['lr']==.0006

def test_budgets():
    "A method with two passes has half the epochs at equal compute"
    j = lambda row, compute: birds_plan.job(birds_plan.config, 'final', row, 0, compute, 30, 1e-3, 'separate')
    assert j('plain','equal compute')['epochs']==30 and j('CEKD + MixUp','equal compute')['epochs']==15
    assert j('CEKD + MixUp','equal epochs')['epochs']==30 and j('plain','double compute')['epochs']==60
    for row in birds_plan.config['rows']: assert j(row,'equal compute')['epochs']*j(row,'equal compute')['passes']==30

def test_rows_exist():
    "Every row that is asked for is defined, with any mix as the best one, and every mix of a row too"
    c = birds_plan.config
    for block in c['final']:
        for o in block['rows']: assert all(o.replace('BEST', b) in c['rows'] for b in c['select']['best']['rows'])
    assert all(r.get('mix') in (None,*c['mixes']) for r in c['rows'].values())

def test_unfinished_line(tmp_path):
    "What a killed process left is read up to its last whole line"
    f = tmp_path/'rows.jsonl'
    f.write_text('{"a": 1}\n{"b": ')
    assert birds_queue.read_rows(f, tmp_path/'none')==[dict(a=1)]
    birds_queue.add_row(f, dict(c=2))
    birds_queue.add_row(tmp_path/'new', dict(d=3))
    assert birds_queue.read_rows(f, tmp_path/'new')==[dict(a=1),dict(c=2),dict(d=3)]

def test_epochs_by_speed():
    "As many epochs as the time allows, within the bounds, an even number"
    e = [birds_queue.plan_epochs(birds_plan.config, r, 14, 3000, 350) for r in (1,18000,1e9)]
    c = birds_plan.config['epochs']
    assert e[0]==c['from'] and e[2]==c['to'] and e[0]<=e[1]<=e[2] and e[1]%2==0

GOOD = dict(accuracy=.5, each=[.5], ece=.1, train_accuracy=1., seconds=9.)

class Machine:
    "Workers without processes: every job takes no time; some fail"
    def __init__(self, n, bad=()): self.workers,self.bad,self.jobs = {o:None for o in map(Conn, range(n))},bad,[]
    def answers(self, conns, until):
        for o in conns:
            j = o.sent
            self.jobs.append(j)
            yield o,'run',dict(error='bad') if j['row'] in self.bad else dict(GOOD)
class Conn:
    def __init__(self, i): self.i = i
    def send(self, msg): self.sent = msg[1]

def test_queue(tmp_path):
    "Everything is run once; a method that fails stops nothing and is all that a second start has left"
    file = tmp_path/'rows.jsonl'
    pool = Machine(3, ('CutMix',))
    birds_queue.serve(pool, birds_plan.config, 20, [], file, time.time()+1e6, 3000, 1e9, {})
    rows = birds_queue.read_rows(file)
    assert len(rows)==len({birds_plan.key(r) for r in rows})==len(pool.jobs)
    assert {r['row'] for r in rows if 'error' in r}=={'CutMix'}
    assert {r['seed'] for r in rows if r['row']=='plain' and r['stage']=='final'}==set(range(5))
    again = Machine(3)
    birds_queue.serve(again, birds_plan.config, 20, rows, file, time.time()+1e6, 3000, 1e9, {})
    assert {j['row'] for j in again.jobs}=={'CutMix'}

def is_running(pid):
    "Whether a process exists that has not ended"
    try: return Path(f'/proc/{pid}/stat').read_text().split(')')[-1].split()[0]!='Z'
    except FileNotFoundError: return False

def test_deadline(tmp_path):
    "Nothing is started that cannot end in time"
    pool = Machine(3)
    birds_queue.serve(pool, birds_plan.config, 20, [], tmp_path/'rows.jsonl', time.time()+10, 3000, 3000, {})
    assert not pool.jobs

@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for the process in /proc')
def test_a_worker_ends_with_the_process_that_began_it(tmp_path):
    "One that was left alone would train its row to the end, and report it to nobody"
    lines = ['import sys,time,multiprocessing as mp', f'sys.path.insert(0, {str(FOLDER)!r})', 'import birds_pool', 'def work(conn):', '    birds_pool.end_with_parent()',
        "    conn.send('ready')", '    time.sleep(60)', "if __name__=='__main__':", "    mine,theirs = mp.get_context('spawn').Pipe()",
        "    p = mp.get_context('spawn').Process(target=work, args=(theirs,))", '    p.start()', '    mine.recv()', '    print(p.pid, flush=True)', '    time.sleep(60)']
    script = tmp_path/'parent.py'
    script.write_text('\n'.join(lines))
    parent = subprocess.Popen([sys.executable,script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    assert is_running(worker)
    parent.kill()
    parent.wait()
    until = time.time()+10
    while is_running(worker) and time.time()<until: time.sleep(.05)
    assert not is_running(worker)

def test_tables():
    "Paired differences are taken over common seeds"
    assert birds_tables.paired({0:.5,1:.6,2:.9}, {0:.4,1:.4})=='+15.0 ± 5.0 (+10.0, +20.0)'
    def r(row, seed, acc):
        j = birds_plan.job(birds_plan.config, 'final', row, seed, 'equal compute', 20, 1e-3, 'both')
        return j|GOOD|dict(accuracy=acc, each=[acc])
    bar = '2 branches, label smoothing'
    lines = birds_tables.final_table([r('plain', 0, .5), r('plain', 1, .6), r(bar, 0, .6), r(bar, 1, .8)], {1:.1, 2:.2}).split('\n')
    assert lines[2].startswith('| 2 branches, label smoothing | equal passes | 20 | 20 | 12.0 | 70.0 ± 10.0')
    assert '+15.0 ± 5.0 (+10.0, +20.0)' in lines[2]

def test_runs_on_a_gpu_and_on_processors():
    "A title says how many runs were not on the GPU, and their seconds are not averaged with those on it."
    def r(gpu, secs): return dict(machine=dict(gpu=gpu), seconds=secs)
    gpu,cpu = r('NVIDIA H200', 10),r(None, 1000)
    assert birds_tables.where([gpu,gpu])==', on one NVIDIA H200' and birds_tables.where([cpu])==''
    assert birds_tables.where([gpu,cpu,gpu])==', on one NVIDIA H200, 1 of 3 runs on processors'
    half = cpu|dict(precision='bf16')
    assert birds_tables.where([gpu,cpu,half])==', on one NVIDIA H200, 2 of 3 runs on processors (1 of them in bfloat16)'
    assert birds_tables.where([gpu,half])==', on one NVIDIA H200, 1 of 2 runs on processors in bfloat16'
    fast = gpu|dict(precision='bf16')
    assert birds_tables.where([fast,cpu])==', on one NVIDIA H200 in bfloat16, 1 of 2 runs on processors'
    assert birds_tables.where([gpu,fast,gpu])==', on one NVIDIA H200, 3 runs (1 of them in bfloat16)'
    assert birds_tables.seconds_of([gpu,cpu])==10 and birds_tables.seconds_of([cpu])==1000

def test_recorded_rows_are_not_run_again():
    "Rows keep the names that arguments had when they were recorded"
    c = birds_plan.config
    rows = birds_queue.read_rows(FOLDER/'results'/'birds.jsonl')
    done = {birds_plan.key(r):r for r in rows if 'stage' in r}
    rest = {birds_plan.key(j) for j in birds_plan.jobs(c, next(r['plan'] for r in rows if 'plan' in r), done)}
    assert done and not rest&done.keys()
    for name in ('clean + SnapMix','clean + MixUp','CEKD + SnapMix'):
        j = birds_plan.job(c, 'final', name, 0, 'equal compute', 20, .0012, 'separate')
        assert birds_plan.key(j) in done
        CEKD(**j['args'])
