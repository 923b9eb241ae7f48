"""Hand every reader of the library thousands of files that were changed at random, and count what comes of it.

    python benchmarks/fuzz.py --n 10000 --minutes 30

Each input is a good file with one to three changes: bits, bytes cut out, put in or doubled, lines with hostile names and numbers, values replaced within
a structure that stays well-formed. Input number i of a reader is always the same, so a run that stops goes on where it was, and `--show READER I` repeats one.
The outcome is a *result*, a *named* error (one line, raised by the library itself), a *raw* error, a *hang* of more than 20 seconds, or a *crash*.
Readers run in processes of their own, 200 inputs each, which may take 4 GiB above what Python has loaded; the largest growth of one is in the table. Files beside the data
are compared after each of them. The program that parses MATLAB files, which the library starts for each reading, runs here in forks of one process that has scipy loaded."""
import argparse,collections,copy,hashlib,io,json,os,random,re,resource,select,shutil,signal,subprocess,sys,tarfile,tempfile,time,traceback,warnings,zipfile
from pathlib import Path
from types import SimpleNamespace
from common import here

# Changes to bytes

def flip(b, rng):
    "Another bit in up to eight bytes"
    for _ in range(rng.choice((1,1,2,8))): b[rng.randrange(len(b))] ^= 1<<rng.randrange(8)

def cut(b, rng): del b[rng.randrange(len(b)):]
def leave_out(b, rng):
    at = rng.randrange(len(b))
    del b[at:at+rng.choice((1,4,50))]

def double(b, rng):
    at = rng.randrange(len(b))
    b[at:at] = b[at:at+rng.choice((1,16,200))]

def numbers(b, rng):
    "A number at the border of what fits, in the place of another"
    at = rng.randrange(len(b))
    new = rng.choice((b'\xff'*4, b'\0'*4, b'\xff\xff\xff\x7f', b'\0\0\0\x80', b'\xff'*8, bytes(8)))
    b[at:at+len(new)] = new

def noise(b, rng):
    at = rng.randrange(len(b))
    b[at:at] = rng.randbytes(rng.choice((1,3,40)))

BYTES = (flip,flip,flip,cut,leave_out,double,numbers,noise)

def spoil_bytes(data, rng):
    "A file's bytes with one to three changes"
    b = bytearray(data)
    for _ in range(rng.choice((1,1,2,3))):
        if b: rng.choice(BYTES)(b, rng)
    return bytes(b)

# Changes to lines

WORDS = ('../../photos/mine.jpg','/etc/passwd','a/../../../photos/mine.jpg','..','.','a\0b','0','-1','1e999','nan','inf','99999999999999999999','1.5','x'*5000,'ä☃','\ud800','"',"'",',;\t','\\','','True','None',
    '%s','{0}','CON','a'*300+'.jpg','images','../images','~','$HOME','a/link.jpg','all/mine.jpg','\u2028','\r','0x10','١')

def spoil_line(line, rng):
    "A line with another word, a word more or less, or something between them"
    parts = re.split(r'([ ,\t])', line)
    at = rng.randrange(len(parts))
    how = rng.randrange(4)
    if how==0: parts[at] = rng.choice(WORDS)
    elif how==1: parts[at:at] = [rng.choice(WORDS),' ']
    elif how==2: del parts[at:at+2]
    else: parts[at] = ''.join(rng.sample(parts[at], len(parts[at])))
    return ''.join(parts)

def spoil_text(data, rng):
    "A text file with other lines, or saved in another way; sometimes with other bytes"
    if rng.random()<.2: return spoil_bytes(data, rng)
    lines = data.decode().split('\n')
    for _ in range(rng.choice((1,1,2,3))):
        at = rng.randrange(len(lines))
        how = rng.randrange(6)
        if how<3: lines[at] = spoil_line(lines[at], rng)
        elif how==3: lines.insert(at, rng.choice(lines))
        elif how==4: lines.insert(at, ' '.join(rng.choices(WORDS, k=rng.choice((1,2,5)))))
        elif len(lines)>1: del lines[at]
    enc = rng.choice(('utf-8',)*8+('utf-16','utf-8-sig','utf-16-le','utf-7'))
    return '\n'.join(lines).encode(enc, 'surrogatepass')

# Changes within a structure

VALUES = (None,True,0,-1,2**31,2**63,1e308,float('nan'),float('inf'),'','x','../x','hf-hub:a/b','/etc/passwd',[],{},[[]],[1,2,3],{'a':1},'9'*400,(),b'x')

def leaves(o, path=()):
    "Paths of all values in nested dictionaries and lists; the first nine of a list, as random states have hundreds"
    res = [path]
    for k,v in (o.items() if isinstance(o, dict) else enumerate(o[:9]) if isinstance(o, list) else ()): res += leaves(v, (*path,k))
    return res

def spoil_tree(o, rng, values=VALUES):
    "`o` with one to three values replaced, taken out or renamed"
    for _ in range(rng.choice((1,1,2,3))):
        path = rng.choice([p for p in leaves(o) if p] or [()])
        if not path: return o
        at = o
        for k in path[:-1]: at = at[k]
        how = rng.randrange(4)
        if how==0: at.pop(path[-1])
        elif how==1 and isinstance(at, dict): at[rng.choice(('x','pretrained','~',7))] = at.pop(path[-1])
        else: at[path[-1]] = rng.choice(values)
    return o

# The readers: each makes a folder, and gives what changes it and what reads it

READERS = {}
def reader(f):
    READERS[f.__name__] = f
    return f

def texts(folder, names, read):
    "A reader of text files"
    good = {folder/o: (folder/o).read_bytes() for o in names}
    def spoil(rng):
        file = rng.choice(list(good))
        file.write_bytes(spoil_text(good[file], rng))
    def mend():
        for k,v in good.items(): k.write_bytes(v)
    return spoil,lambda: read(folder),mend

def one_file(file, spoil, read):
    "A reader of a single file, whose bytes `spoil` makes from its good ones"
    data = file.read_bytes()
    return (lambda rng: file.write_bytes(spoil(data, rng))),(lambda: read(file)),lambda: None

def picture(file, k=0):
    from PIL import Image
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (24,18), (20*k%256,99,7)).save(file)
    return file

def put(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)

@reader
def cub(root):
    "Lists of CUB, and a smaller copy"
    from cekd_fastai.data.readers import read_cub
    from cekd_fastai.data.check import presize
    names = [f'{"ab"[k%2]}/{k}.jpg' for k in range(8)]
    for k,o in enumerate(names): picture(root/'images'/o, k)
    (root/'images'/'a'/'link.jpg').symlink_to('../../../photos/mine.jpg')
    (root/'images'/'all').symlink_to('../../photos')
    put(root/'images.txt', ''.join(f'{i} {o}\n' for i,o in enumerate(names, 1)))
    put(root/'classes.txt', '1 a\n2 b\n')
    put(root/'image_class_labels.txt', ''.join(f'{i} {2-i%2}\n' for i in range(1, 9)))
    put(root/'train_test_split.txt', ''.join(f'{i} {int(i<5)}\n' for i in range(1, 9)))
    put(root/'bounding_boxes.txt', ''.join(f'{i} 1.0 2.0 9.0 8.0\n' for i in range(1, 9)))
    def read(o):
        read_cub(o)
        shutil.rmtree(presize(o, 12, n_workers=1))
    return texts(root, ['images.txt','classes.txt','image_class_labels.txt','train_test_split.txt','bounding_boxes.txt'], read)

@reader
def aircraft(root):
    "Lists of Aircraft"
    from cekd_fastai.data.readers import read_aircraft
    base = root/'fgvc-aircraft-2013b'/'data'
    for k in range(8): picture(base/'images'/f'{k:07d}.jpg', k)
    put(base/'variants.txt', 'A-1\nB 2\n')
    for part,ids in (('trainval',range(4)), ('test',range(4, 8))): put(base/f'images_variant_{part}.txt', ''.join(f'{k:07d} {("A-1","B 2")[k%2]}\n' for k in ids))
    put(base/'images_box.txt', ''.join(f'{k:07d} 1 1 20 15\n' for k in range(8)))
    names = [f'fgvc-aircraft-2013b/data/{o}.txt' for o in ('variants','images_variant_trainval','images_variant_test','images_box')]
    return texts(root, names, read_aircraft)

@reader
def pets(root):
    "Lists of Pets"
    from cekd_fastai.data.readers import read_pets
    base = root/'oxford-iiit-pet'
    for o in ('a_1','a_2','a_3','b_1','b_2'): picture(base/'images'/f'{o}.jpg')
    put(base/'annotations'/'trainval.txt', 'a_1 1 1 1\na_2 1 1 1\nb_1 2 1 1\n')
    put(base/'annotations'/'test.txt', 'a_3 1 1 1\nb_2 2 1 1\n')
    return texts(root, [f'oxford-iiit-pet/annotations/{o}.txt' for o in ('trainval','test')], read_pets)

@reader
def csv(root):
    "A CSV file of names, labels and parts"
    from cekd_fastai.data.benchmarks import read_table
    rows = [f'{picture(root/f"{k}.jpg", k).name},{"ab"[k%2]},{("train","valid")[k>3]}' for k in range(8)]
    put(root/'t.csv', '\n'.join(['file,label,is_valid', *rows, '']))
    return one_file(root/'t.csv', spoil_text, lambda o: read_table(o))

@reader
def folders(root):
    "Folders with odd names, links and files"
    from cekd_fastai.data.benchmarks import read_table
    from cekd_fastai.data.check import verify
    data = picture(root/'a.jpg').read_bytes()
    def spoil(rng):
        places = [root/'set'/o for o in ('a','b')]
        for o in places: (o/'x.jpg').parent.mkdir(parents=True)
        for _ in range(rng.randrange(4, 20)):
            at = rng.choice(places)
            name = re.sub('[/\0\ud800]', '_', rng.choice(WORDS))[:200].strip('.') or rng.choice(('train','test','valid','images','Train','x'))
            new = at/(name+rng.choice(('','.jpg','.JPG','.txt','.png')))
            if os.path.lexists(new): continue
            how = rng.randrange(4)
            if how==0: new.mkdir()
            elif how==1: new.symlink_to(rng.choice(('.','..','../..','/','a','x.jpg','../b',str(root/'set'),'../../photos','loop')))
            else: new.write_bytes(data if how==2 else spoil_bytes(data, rng))
            if how==0: places.append(new)
    def read(_=None):
        verify(root/'set')
        read_table(root/'set')
    return spoil,read,lambda: shutil.rmtree(root/'set')

@reader
def archives(root):
    "Tar and zip files"
    from cekd_fastai.data.download import unpack
    kinds = ('w','w:gz','w:bz2','w:xz')
    root.mkdir(parents=True, exist_ok=True)
    def pack(members, kind):
        out = io.BytesIO()
        if kind=='zip':
            with zipfile.ZipFile(out, 'w', zipfile.ZIP_DEFLATED) as f:
                for name,_,data in members: f.writestr(name or 'x', data)
            return out.getvalue()
        with tarfile.open(fileobj=out, mode=kind) as f:
            for name,attrs,data in members:
                o = tarfile.TarInfo(name)
                o.size = len(data)
                for k,v in attrs.items(): setattr(o, k, v)
                f.addfile(o, io.BytesIO(data) if data else None)
        return out.getvalue()
    good = [('d/a',{},b'x'*700), ('d/b',{},b'y'*50), ('d/l',dict(type=tarfile.SYMTYPE, linkname='a'),b''), ('e',dict(type=tarfile.DIRTYPE),b''), ('d/h',dict(type=tarfile.LNKTYPE, linkname='d/a'),b'')]
    types = (tarfile.SYMTYPE,tarfile.LNKTYPE,tarfile.FIFOTYPE,tarfile.CHRTYPE,tarfile.DIRTYPE,tarfile.REGTYPE,b'S',b'x')
    def other(rng):
        attrs = dict(type=rng.choice(types), linkname=re.sub('[\ud800]', '', rng.choice(WORDS)), mode=rng.choice((0,0o777,0o4755)), size=rng.choice((0,0,-1,2**33,2**43)))
        return re.sub('[\ud800]', '', rng.choice(WORDS)),{k:v for k,v in attrs.items() if rng.random()<.5},b''
    def spoil(rng):
        members = list(good)
        for _ in range(rng.randrange(3)): members.insert(rng.randrange(len(members)), other(rng))
        try: data = pack(members, rng.choice((*kinds,'zip')))
        except (ValueError,KeyError,OverflowError): data = pack(good, rng.choice(kinds))
        (root/'a.tgz').write_bytes(spoil_bytes(data, rng) if rng.random()<.6 else data)
    return spoil,lambda: unpack(root/'a.tgz', root/'out'),lambda: shutil.rmtree(root/'out', ignore_errors=True)

_SERVER = """
import io,json,os,sys,threading,traceback
import numpy as np
from scipy.io import loadmat,savemat
savemat(b := io.BytesIO(), dict(a=np.array([['x']], dtype=object)))
loadmat(io.BytesIO(b.getvalue())) # so that a fork loads nothing any more
for line in sys.stdin:
    program,arg = json.loads(line)
    pipes = [os.pipe(),os.pipe()]
    pid = os.fork()
    if not pid:
        for fd,(r,w) in zip((1,2), pipes): os.dup2(w, fd)
        sys.argv,code = ['-c',arg],0
        try: exec(program, dict(__name__='__main__'))
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    for _,w in pipes: os.close(w)
    texts = {}
    def take(k, fd):
        with open(fd) as f: texts[k] = f.read()
    ts = [threading.Thread(target=take, args=(k,r)) for k,(r,_) in enumerate(pipes)]
    for o in ts: o.start()
    for o in ts: o.join()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code,texts[0],texts[1]]), flush=True)
"""

class ForkServer:
    "`subprocess.run` of a Python program, in forks of one process that has scipy loaded"
    p = None
    def run(self, cmd, **kwargs):
        if self.p is None: self.p = subprocess.Popen([cmd[0],'-I','-c',_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kwargs['env'])
        try:
            print(json.dumps(cmd[-2:]), file=self.p.stdin, flush=True)
            if not select.select([self.p.stdout], [], [], 6)[0]: # perhaps for the fork's sake: again as the library does it, with its time limit
                self.p.kill()
                self.p = None
                return subprocess.run(cmd, **kwargs)
            code,out,err = json.loads(self.p.stdout.readline())
        except BaseException: # a hang too: the next one gets a new server
            if self.p: self.p.kill()
            self.p = None
            raise
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

@reader
def matlab(root):
    "Lists of Dogs, in MATLAB files"
    import numpy as np
    from cekd_fastai.data import safe
    safe.subprocess = SimpleNamespace(run=ForkServer().run, TimeoutExpired=subprocess.TimeoutExpired, DEVNULL=subprocess.DEVNULL)
    from scipy.io import savemat
    from cekd_fastai.data.readers import read_dogs
    fs = ['a/1.jpg','b/2.jpg','a/3.jpg','b/4.jpg']
    for o in fs: picture(root/'Images'/o)
    for part,o in (('train',fs[:2]), ('test',fs[2:])): savemat(root/f'{part}_list.mat', dict(file_list=np.array([[x] for x in o], dtype=object)))
    return one_file(root/'test_list.mat', spoil_bytes, lambda o: read_dogs(root))

@reader
def pictures(root):
    "Pictures of seven formats, opened, scaled and verified"
    from PIL import Image
    from cekd_fastai.data.image import ResizeShort,open_image,unreadable
    root.mkdir(parents=True, exist_ok=True)
    im,good = Image.radial_gradient('L').resize((40,30)).convert('RGB'),[]
    for fmt in ('JPEG','PNG','GIF','WEBP','TIFF','BMP','PPM'):
        out = io.BytesIO()
        im.save(out, fmt, **(dict(exif=b'Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0') if fmt=='JPEG' else {}))
        good.append(out.getvalue())
    file = root/'a.jpg'
    def read(_=None):
        unreadable([file])
        ResizeShort(64)(open_image(file, draft=64))
        open_image(file.read_bytes(), box=(3,4,20,10))
    return (lambda rng: file.write_bytes(spoil_bytes(rng.choice(good), rng))),read,lambda: None

def small_net(root):
    from cekd_fastai.branches import branch_net,save_net
    root.mkdir(parents=True, exist_ok=True)
    net = branch_net('cifar_resnet8', 3, 1, pretrained=False)
    info = dict(vocab=['a','b','c'], mean=[.5]*3, std=[.2]*3, size=[32,32], batch_steps=[], upright=True, draft=None, activation='softmax', thresh=.5,
        steps=[['ResizeShort',dict(size=40)],['CropPad',dict(size=[32,32], pad_mode='zeros')]])
    save_net(net, root/'net.pt', **info)
    return net

@reader
def networks(root):
    "Files of `deploy`: other bytes, and recipes and records that are well-formed"
    import torch
    from cekd_fastai.deploy import Deployed
    small_net(root)
    file = root/'net.pt'
    data,im = file.read_bytes(),picture(root/'a.jpg')
    good = torch.load(file, weights_only=True)
    good.pop('sum')
    right,now = Deployed(file).predict(im),{}
    def spoil(rng):
        now['forged'] = rng.random()>=.4
        if not now['forged']: return file.write_bytes(spoil_bytes(data, rng))
        saved = copy.deepcopy(good)
        part = rng.choice(('recipe','info','info','all'))
        if part=='all': spoil_tree(saved, rng, (*VALUES, torch.ones(3), torch.zeros(1).expand(2**33), torch.full((3,), float('nan'))))
        else: spoil_tree(saved[part], rng)
        torch.save(saved, file)
    def read():
        answer = Deployed(file).predict(im)
        assert now['forged'] or answer==right, 'another answer'
    return spoil,read,lambda: None

@reader
def weights(root):
    "Weights for a network, in three formats"
    import torch
    from safetensors.torch import save
    from cekd_fastai.weights import load_weights
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    root.mkdir(parents=True, exist_ok=True)
    sd,good = {k:v.clone() for k,v in net.state_dict().items()},{}
    for suffix,old in (('pth',False),('old.pth',True)):
        out = io.BytesIO()
        torch.save(sd, out, _use_new_zipfile_serialization=not old)
        good[suffix] = out.getvalue()
    good['safetensors'] = save(sd)
    now = {}
    def spoil(rng):
        now['file'] = root/f"w.{(k := rng.choice(list(good)))}"
        now['whole'] = rng.random()<.7
        if now['whole']: return now['file'].write_bytes(spoil_bytes(good[k], rng))
        values = (*VALUES, torch.ones(4), torch.zeros(1).expand(2**33), torch.full((4,), float('nan')), torch.ones(4).to_sparse())
        torch.save(spoil_tree(dict(sd), rng, values), now['file'])
    def read():
        load_weights(net, now['file'])
        summed = now['whole'] and now['file'].name=='w.pth' # the two other formats have no checksums
        assert not summed or all(torch.equal(v, net.state_dict()[k]) for k,v in sd.items()), 'other weights'
    return spoil,read,lambda: None

@reader
def checkpoints(root):
    "Checkpoints of a run that goes on: other bytes, and other contents under a good checksum"
    import torch
    from fastai.vision.all import Callback,DataLoaders,Learner,L,MSELossFlat,set_seed
    from safetensors.torch import load,save
    from cekd_fastai.checkpoint import Checkpoint
    from cekd_fastai.runstate import _body,_note,checkpoint_files
    class Die(Callback):
        "Ends the run in its second epoch"
        def before_batch(self):
            if (self.epoch,self.iter)==(1,1): raise SystemExit
    items = L((torch.tensor([k,1.]),torch.tensor([k/2])) for k in range(4))
    def trained(*cbs, every=0):
        set_seed(1)
        dls = DataLoaders.from_dsets(items, items[:2], bs=2, num_workers=0, device='cpu', shuffle=True)
        learn = Learner(dls, torch.nn.Linear(2, 1), loss_func=MSELossFlat(), cbs=[Checkpoint(root, every=every, minutes=0, signals=False),*cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, .1)
        return learn.model.weight.detach().clone()
    def clear():
        for o in root.iterdir(): o.unlink()
    whole = trained()
    clear()
    try: trained(Die(), every=1)
    except SystemExit: good = {o: o.read_bytes() for o in checkpoint_files(root)}
    file = max(good)
    body = _body(file)
    tensors,text = load(body),json.dumps(_note(body))
    now = {}
    def spoil(rng):
        clear()
        for k,v in good.items(): k.write_bytes(v)
        now['forged'] = rng.random()>=.3
        if not now['forged']: return file.write_bytes(spoil_bytes(good[file], rng))
        note = spoil_tree(json.loads(text), rng, [o for o in VALUES if not isinstance(o, bytes)])
        new = save(tensors, dict(state=json.dumps(note)))
        if rng.random()<.2: new = spoil_bytes(new, rng)
        file.write_bytes(f'cekd-checkpoint 1 {hashlib.sha256(new).hexdigest()}\n'.encode()+new)
    def read():
        ended = trained()
        assert now['forged'] or torch.equal(ended, whole), 'other weights'
    return spoil,read,lambda: None

@reader
def answers(root):
    "Stored answers of teachers, and the note beside them"
    import numpy as np
    from cekd_fastai.meal.targets import TargetCache
    c = TargetCache(root, {}, [3], 1, 6)
    c.data[:] = 1
    c.mark(0)
    good = {o: o.read_bytes() for o in (c.folder/'answers.npy',c.note)}
    def spoil(rng):
        file = rng.choice(list(good))
        if file.suffix=='.npy' and rng.random()<.4:
            new = np.ones(rng.choice(((1,6,4),(1,6,5),(6,4),(2**20,),())), rng.choice((np.float32,'f8','>f4','U3','?')))
            return np.save(file, new)
        file.write_bytes((spoil_bytes if file.suffix=='.npy' else spoil_text)(good[file], rng))
    def mend():
        for k,v in good.items(): k.write_bytes(v)
    def read():
        again = TargetCache(root, {}, [3], 1, 6)
        again.view = 0
        again.check()
        assert again.data.shape==(1,6,4) and (not again.done or (again.data==1).all()), 'wrong answers'
    return spoil,read,mend

# Running

ours = here.parent/'cekd_fastai'
MEMORY = '/dev/shm' # Linux keeps files of this folder in memory, which spares waiting for a disk

_FASTAI = re.compile(r'^Exception occured in `\w+` when calling event `\w+`:\s')
def is_named(e, last):
    "Whether an error was raised by the library itself, in one line; what fastai puts before one of a callback is not counted"
    return isinstance(e, (ValueError,OSError)) and not isinstance(e, UnicodeError) and last.is_relative_to(ours) and '\n' not in _FASTAI.sub('', str(e))

def outcome(read):
    "What reading gives: `result`, `named`, or a raw error in words"
    try: read()
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        if is_named(e, Path(last.filename)): return 'named'
        return f'{type(e).__name__}: {str(e)[:150]} ({Path(last.filename).name}, line {last.lineno})'
    return 'result'

class Hang(BaseException): pass
def _hang(*args): raise Hang

def one(name, i, parts):
    "Outcome of input number `i`"
    spoil,read,mend = parts
    spoil(random.Random(f'{name}-{i}'))
    try: return outcome(read)
    finally: mend()

def run(
    name,     # Of a reader
    idxs,     # Numbers of inputs
    tmp,      # An empty folder
    limit=20, # Seconds after which reading counts as a hang; 0: none
):            # Yields number and outcome
    "Outcomes of some inputs of one reader, in this process"
    import torch
    picture(tmp/'photos'/'mine.jpg')
    torch.manual_seed(0) # the same networks in each process
    parts = READERS[name](tmp/'set')
    warnings.simplefilter('ignore')
    if limit: signal.signal(signal.SIGALRM, _hang)
    for i in idxs:
        if limit: signal.alarm(limit)
        try: yield i,one(name, i, parts)
        except Hang: yield i,'hang'
        finally: signal.alarm(0)

def outside(tmp):
    "What lies beside the folder of the data"
    files = [o for o in tmp.rglob('*') if o.is_file() and not o.is_relative_to(tmp/'set')]
    return {str(o.relative_to(tmp)): hashlib.sha256(o.read_bytes()).hexdigest() for o in files}

def child(name, idxs, out):
    "Do some inputs in a process of its own; returns the number of the input at which it was, None if it came through"
    pid = os.fork()
    if pid==0:
        tmp = Path(tempfile.mkdtemp(dir=MEMORY if Path(MEMORY).is_dir() else None))
        was = int(Path('/proc/self/statm').read_text().split()[0])*4096
        resource.setrlimit(resource.RLIMIT_AS, (was+4*2**30,)*2)
        resource.setrlimit(resource.RLIMIT_CORE, (0,0))
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with open(out, 'a') as f, open(os.devnull, 'w') as null:
            sys.stdout = sys.stderr = null
            beside = None
            for i,res in run(name, idxs, tmp):
                if beside is None: beside = outside(tmp)
                f.write(json.dumps([i,res])+'\n')
                f.flush()
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-base)/2**10
            changed = {k:v for k,v in outside(tmp).items() if beside.get(k)!=v}
            f.write(json.dumps(['end',round(grown),len(changed)])+'\n')
        shutil.rmtree(tmp, ignore_errors=True)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def campaign(name, n, until, folder):
    "Do the inputs of one reader that are left, until the time is over"
    out = folder/f'{name}.jsonl'
    while time.time()<until:
        done = [json.loads(o) for o in out.read_text().splitlines()] if out.exists() else []
        left = sorted(set(range(n))-{o[0] for o in done})[:200]
        if not left: break
        code = child(name, left, out)
        if code:
            seen = {json.loads(o)[0] for o in out.read_text().splitlines()} if out.exists() else set()
            at = next((i for i in left if i not in seen), left[-1])
            with open(out, 'a') as f: f.write(json.dumps([at,f'crash ({code})'])+'\n')

def summary(folder):
    "A row for each reader, and what was raw, hung or crashed"
    rows,faults = [],{}
    for name in READERS:
        if not (folder/f'{name}.jsonl').exists(): continue
        lines = [json.loads(o) for o in (folder/f'{name}.jsonl').read_text().splitlines()]
        ends = [o for o in lines if o[0]=='end']
        seen = {o[0]:o[1] for o in lines if o[0]!='end'}
        kinds = collections.Counter(o if o in ('result','named','hang') else 'crash' if o.startswith('crash') else 'raw' for o in seen.values())
        about = READERS[name].__doc__
        count = {k:kinds[k] for k in ('result','named','raw','hang','crash')}
        row = dict(reader=name, about=about, inputs=len(seen)) | count
        rows.append(row | dict(peak_mib=max([o[1] for o in ends], default=0), outside=sum(o[2] for o in ends)))
        faults |= {f'{name} {i}':o for i,o in seen.items() if o not in ('result','named')}
    return rows,faults

def write(folder, command):
    "The result file"
    import torch,PIL,scipy
    rows,faults = summary(folder)
    head = ['reader','inputs','result','named error','raw error','hang','crash','peak MiB','changed outside']
    cells = [[o['about'],f"{o['inputs']:,}",f"{o['result']:,}",f"{o['named']:,}",*(o[k] for k in ('raw','hang','crash','peak_mib','outside'))] for o in rows]
    table = '\n'.join(f"| {' | '.join(map(str, o))} |" for o in [head,['---']*len(head),*cells])
    versions = dict(torch=torch.__version__, pillow=PIL.__version__, scipy=scipy.__version__)
    res = dict(title='Files changed at random', command=command, machine=dict(cores=os.cpu_count()), versions=versions, runs=rows, faults=faults, table=table)
    (here/'results'/'fuzz.json').write_text(json.dumps(res, indent=1)+'\n')

if __name__=='__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--n', type=int, default=10_000, help='inputs of each reader')
    p.add_argument('--minutes', type=float, default=60, help='time in all')
    p.add_argument('--readers', nargs='*', default=list(READERS))
    p.add_argument('--folder', type=Path, default=Path(tempfile.gettempdir())/'fuzz', help='where outcomes are kept, to go on')
    p.add_argument('--show', nargs=2, help='a reader and the number of an input: read it here')
    a = p.parse_args()
    a.folder.mkdir(parents=True, exist_ok=True)
    import torch,cekd_fastai.all # chkstyle: ignore
    # once, before the processes are made
    torch.set_num_threads(1)
    if a.show:
        tmp = Path(tempfile.mkdtemp())
        picture(tmp/'photos'/'mine.jpg')
        torch.manual_seed(0)
        spoil,read,_ = READERS[a.show[0]](tmp/'set')
        spoil(random.Random('-'.join(a.show)))
        read()
        sys.exit()
    until = time.time()+60*a.minutes
    for k,name in enumerate(a.readers):
        left = (until-time.time())/(len(a.readers)-k)
        campaign(name, a.n, time.time()+left, a.folder)
    write(a.folder, f"python benchmarks/fuzz.py --n {a.n} --minutes {a.minutes:g}")
