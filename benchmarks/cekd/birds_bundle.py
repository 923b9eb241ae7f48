"The folder that a machine without network works from: pictures, weights and code."
import io,json,os,shutil,subprocess,sys,tarfile,tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from birds_plan import each_study

here = Path(__file__).resolve().parent

CONFIGS = ('birds','birds_search','long','seeds','meal50','cifar','birds_random','birds200','birds160','birds_cpu')
FILES = ('birds.py','birds_plan.py','birds_bundle.py','birds_pool.py','birds_queue.py','birds_tables.py','birds_train.py','variants.py','folded.py','long_train.py','goes_on.py','graphed.py','graph_check.py',*[f'{o}.json' for o in CONFIGS]) # What a machine needs of this folder

def unpack(file, to):
    with tarfile.open(file) as f: f.extractall(to, filter='data')

def square(file, size, quality, form='JPEG'):
    "The middle square of a picture, `size` pixels wide, as JPEG or WEBP"
    from PIL import Image
    im = Image.open(file).convert('RGB')
    (w,h),s = im.size,min(im.size)
    x,y = (w-s)//2,(h-s)//2
    out = io.BytesIO()
    im = im.crop((x,y,x+s,y+s)).resize((size,size), Image.LANCZOS)
    im.save(out, form, quality=quality, **(dict(optimize=True, progressive=True) if form=='JPEG' else dict(method=4)))
    return out.getvalue()

def pack(c, data_dir, bundle):
    "Pictures, and weights with the counters that the files leave out, in one folder; the number of pictures"
    bundle.mkdir(parents=True, exist_ok=True)
    n,archives = 0,{}
    for o in each_study(c).values():
        kept = archives.setdefault(o.get('data', 'birds'), o)
        if o['classes']>kept['classes']: archives[o.get('data', 'birds')] = o
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        for o in ARCHIVES:
            if (data_dir/o).is_file(): unpack(data_dir/o, tmp)
        for kind,o in archives.items(): n += (pack_cifar if kind=='cifar' else pack_birds)(o, tmp, bundle/f'{kind}.npz')
        for o in each_study(c).values(): pack_weights(o, tmp/'weights', bundle)
    note_commit(bundle)
    return n

ARCHIVES = ('CUB_200_2011.tgz','cifar100-mini.tgz','weights-efficientnet-lite.tgz','weights.tgz')

def pack_birds(c, folder, file):
    read = lambda f: dict(o.split(' ', 1) for o in (folder/'CUB_200_2011'/f).read_text().splitlines())
    names,labels,train = (read(o) for o in ('images.txt','image_class_labels.txt','train_test_split.txt'))
    ids = [i for i in names if int(labels[i])<=c['classes']]
    jpegs = [square(folder/'CUB_200_2011'/'images'/names[i], c['stored'], c['quality'], c.get('form', 'JPEG')) for i in ids]
    label,test = np.array([int(labels[i])-1 for i in ids], np.int16),np.array([train[i]=='0' for i in ids])
    return pack_files(file, jpegs, label, test)

def pack_cifar(c, folder, file):
    root = folder/'cifar100-mini'
    names = sorted(o.name for o in (root/'train').iterdir())[:c['classes']]
    files = [(part,k,o) for part in ('train','test') for k,name in enumerate(names) for o in sorted((root/part/name).iterdir())]
    label,test = np.array([k for _,k,_ in files], np.int16),np.array([part=='test' for part,_,_ in files])
    return pack_files(file, [o.read_bytes() for _,_,o in files], label, test)

def pack_files(file, files, label, test):
    "Write encoded pictures and what is known of them; how many there are"
    np.savez(file, jpegs=np.frombuffer(b''.join(files), np.uint8), ends=np.cumsum([len(o) for o in files]), label=label, test=test)
    return len(files)

def pack_weights(c, folder, bundle):
    "The files of weights that a study needs, with what they leave out: the counters of batch normalisation"
    import timm,torch
    own = [dict(arch=c['arch'], weights=c['weights'])] if c['weights'] else []
    for o in own+list(c.get('teachers', {}).values()):
        sd = torch.load(folder/o['weights'], map_location='cpu', weights_only=True)
        want = timm.create_model(o['arch']).state_dict()
        if not set(want)&set(sd): sd = dict(zip((k for k in want if not k.endswith('num_batches_tracked')), (v for k,v in sd.items() if not k.endswith('num_batches_tracked'))))
        lost = [k for k in want if k not in sd and not k.endswith('num_batches_tracked')]
        wrong = [k for k in want if k in sd and sd[k].shape!=want[k].shape]
        if lost or wrong: sys.exit(f"birds: {o['weights']} lacks {(lost+wrong)[0]}.")
        torch.save({k:sd.get(k, v) for k,v in want.items()}, bundle/o['weights'])

def note_commit(bundle):
    "Write which code the folder was made with"
    git = lambda *o: subprocess.run(['git',*o], cwd=here, capture_output=True, text=True).stdout.strip()
    commit = git('rev-parse','HEAD') + '+'*bool(git('status','--porcelain','../../cekd_fastai','.'))
    (bundle/'info.json').write_text(json.dumps(dict(commit=commit)))
    return commit

def prepare(c, data_dir, bundle):
    "Pictures, weights and the code in one folder"
    n,root = pack(c, data_dir, bundle),here.parents[1]
    ignore = shutil.ignore_patterns('__pycache__')
    for o in ('cekd_fastai','cekd'): shutil.rmtree(bundle/'src'/o, ignore_errors=True)
    shutil.copytree(root/'cekd_fastai', bundle/'src'/'cekd_fastai', ignore=ignore)
    (bundle/'src'/'cekd').mkdir()
    for o in FILES: shutil.copy(here/o, bundle/'src'/'cekd'/o)
    commit = note_commit(bundle)
    size = sum(o.stat().st_size for o in bundle.rglob('*') if o.is_file())
    print(f'{n} pictures, {size/2**20:.1f} MiB in {bundle}, commit {commit[:8]}')

def decode(bundle, classes, file, data='birds'):
    "Write the pictures of the first classes as one array; labels, and which are test pictures"
    from PIL import Image
    d = np.load(bundle/f'{data}.npz')
    blob,ends,label,test = d['jpegs'].tobytes(),d['ends'],d['label'],d['test']
    keep = np.flatnonzero(label<classes)
    def one(i): return np.asarray(Image.open(io.BytesIO(blob[ends[i-1] if i else 0:ends[i]])).convert('RGB')).transpose(2,0,1)
    with ThreadPoolExecutor(os.cpu_count()) as ex: ims = np.stack(list(ex.map(one, keep)))
    np.save(file, ims)
    return label[keep].astype(int),test[keep]

def decode_each(c, bundle, folder):
    "File of pictures, labels, and which are test pictures, by study; those of one kind are decoded once, for the study with most classes"
    res,whole = {},{}
    for name,o in sorted(each_study(c).items(), key=lambda o: -o[1]['classes']):
        file,kind = folder/f'{name}.npy',o.get('data', 'birds')
        if kind not in whole: whole[kind] = res[name] = (file,*decode(bundle, o['classes'], file, kind))
        else:
            pixels,label,test = whole[kind]
            keep = label<o['classes']
            np.save(file, np.load(pixels, mmap_mode='r')[keep])
            res[name] = file,label[keep],test[keep]
    return res
