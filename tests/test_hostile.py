"Files from strangers: lists, links, archives, tables and pictures that reach out, never end, crash a parser, or ask for all memory."
import contextlib,io,json,math,pickle,resource,sys,tarfile,zipfile
from pathlib import Path
from types import SimpleNamespace
import numpy as np,pandas as pd,pytest,torch
from PIL import Image
from fastai.vision.all import PILImage
from safetensors.torch import save_file
from scipy.io import savemat
from cekd_fastai.weights import load_weights
from cekd_fastai.branches import branch_net,load_net,save_net
from cekd_fastai.data.benchmarks import _FILES,BENCHMARKS,read_table
from cekd_fastai.data.check import presize,verify
from cekd_fastai.data.download import _addresses,_get,unpack
from cekd_fastai.data.folders import images_of
from cekd_fastai.data.image import LONGEST,ResizeShort,open_image
from cekd_fastai.data.readers import read_aircraft,read_cars,read_cub,read_dogs,read_pets
from cekd_fastai.data.safe import _PARSE,read_mats
from cekd_fastai.data.table import ImageTable
from cekd_fastai.deploy import Deployed
from cekd_fastai.files import read_saved
from cekd_fastai.meal.targets import TargetCache,unlabeled_dl
import cekd_fastai.predict # chkstyle: ignore
sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'benchmarks'))
import fuzz

def picture(file, k=0, size=(40,30)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (20*k%256, 99, 7)).save(file)
    return file

def put(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)

def fails(kind, *says):
    "The block ends with this kind of error, in one sentence that holds these words."
    ctx = pytest.raises(kind)
    @contextlib.contextmanager
    def _f():
        with ctx as e: yield
        text = str(e.value)
        assert all(o in text for o in says) and '\n' not in text, text
    return _f()

def cub(root, *more, n=8):
    "CUB's layout with `n` pictures of two classes, and lines for `more` pictures."
    names = [f'{"ab"[k%2]}/{k}.jpg' for k in range(n)]
    for k,o in enumerate(names): picture(root/'images'/o, k)
    names += more
    rows = list(enumerate(names, 1))
    put(root/'images.txt', ''.join(f'{i} {o}\n' for i,o in rows))
    put(root/'classes.txt', '1 a\n2 b\n')
    put(root/'image_class_labels.txt', ''.join(f'{i} {(i-1)%2+1}\n' for i,_ in rows))
    put(root/'train_test_split.txt', ''.join(f'{i} {int(i<=n/2)}\n' for i,_ in rows))
    return root

# Lists that name files outside

def test_good_lists_are_read(tmp_path): assert len(read_cub(cub(tmp_path/'cub')))==8

@pytest.mark.parametrize('name', ['../../photos/mine.jpg','a/../../../photos/mine.jpg','{tmp}/photos/mine.jpg','../../cub-evil/mine.jpg'])
def test_list_that_reaches_outside(tmp_path, name):
    "Refused when read, and when a copy is written: the picture outside stays as it is, and so does a program beside the copy."
    mine = [picture(tmp_path/o/'mine.jpg', size=(400,300)) for o in ('photos','cub-evil')]
    was = [o.read_bytes() for o in mine]
    root = cub(tmp_path/'cub', name.format(tmp=tmp_path))
    for f in (read_cub, lambda o: presize(o, 16), lambda o: presize(o, 16, dest=tmp_path/'copy')):
        with fails(ValueError, 'images.txt names 1 of 9 files outside of', 'mine.jpg'): f(root)
    assert [o.read_bytes() for o in mine]==was and not (tmp_path/'copy').exists()

@pytest.mark.parametrize('link,to,name', [('images/a/x.jpg','../../../photos/mine.jpg','a/x.jpg'), ('images/c','../../photos','c/mine.jpg'), ('images/a/d','../../../photos','a/d/mine.jpg')])
def test_link_that_reaches_outside(tmp_path, link, to, name):
    picture(tmp_path/'photos'/'mine.jpg')
    root = cub(tmp_path/'cub')
    (root/link).symlink_to(to)
    cub(root, name)
    for f in (read_cub, lambda o: presize(o, 16)):
        with fails(ValueError, 'names 1 of 9 files outside of', name): f(root)

def test_links_of_ones_own(tmp_path):
    "A link inside, and a whole folder on another disk, which a warning names."
    root = cub(tmp_path/'cub')
    (root/'images'/'a'/'x.jpg').symlink_to('0.jpg')
    assert len(read_cub(cub(root, 'a/x.jpg')))==9
    (root/'images').rename(tmp_path/'disk')
    (root/'images').symlink_to('../disk')
    with pytest.warns(UserWarning, match='links to another place, which are followed: images'): assert len(read_cub(root))==9

def test_label_file_that_is_a_link(tmp_path):
    "`presize` copies label files too."
    root = cub(tmp_path/'cub')
    (tmp_path/'secret').write_text('1 0\n')
    (root/'hierarchy.txt').symlink_to('../secret')
    with fails(ValueError, 'hierarchy.txt'): presize(root, 16)

@pytest.mark.parametrize('name', ['../mine.jpg','{tmp}/mine.jpg','a/../../mine.jpg'])
def test_csv_that_reaches_outside(tmp_path, name):
    "A file of a stranger names pictures beside it; a `DataFrame`, or `folder=`, is your own word."
    picture(tmp_path/'mine.jpg')
    root = tmp_path/'set'
    rows = [picture(root/f'{k}.jpg', k).name for k in range(8)] + [name.format(tmp=tmp_path)]
    put(root/'t.csv', 'file,label\n' + ''.join(f'{o},{"ab"[k%2]}\n' for k,o in enumerate(rows)))
    with fails(ValueError, 't.csv names 1 of 9 files outside of', 'mine.jpg'): read_table(root/'t.csv')

def test_csv_of_ones_own(tmp_path):
    "Whoever passes the folder that holds them all, or a `DataFrame`, knows the names."
    fs = [picture(tmp_path/'ab'[k%2]/f'{k}.jpg') for k in range(8)]
    put(tmp_path/'set'/'t.csv', 'file,label\n' + ''.join(f'{o},{o.parent.name}\n' for o in fs))
    with fails(ValueError, 't.csv names 8 of 8 files outside of'): read_table(tmp_path/'set'/'t.csv')
    assert len(ImageTable.from_df(tmp_path/'set'/'t.csv', folder='/'))==len(read_table(pd.read_csv(tmp_path/'set'/'t.csv')))==8

def aircraft(root, name='0000003'):
    base = root/'fgvc-aircraft-2013b'/'data'
    for k in range(8): picture(base/'images'/f'{k:07d}.jpg', k)
    ids = [f'{k:07d}' for k in range(8)]
    put(base/'variants.txt', 'A\nB\n')
    for part,o in (('trainval',ids[:3]+[name]), ('test',ids[4:])): put(base/f'images_variant_{part}.txt', ''.join(f'{i} {"AB"[k%2]}\n' for k,i in enumerate(o)))
    return root

def pets(root, name='a_2'):
    base = root/'oxford-iiit-pet'
    for o in ('a_1','a_2','a_3','b_1','b_2'): picture(base/'images'/f'{o}.jpg')
    put(base/'annotations'/'trainval.txt', f'a_1 1 1 1\n{name} 1 1 1\nb_1 2 1 1\n')
    put(base/'annotations'/'test.txt', 'a_3 1 1 1\nb_2 2 1 1\n')
    return root

def cars(root, name='00002.jpg', y=2, names=('A','B')):
    base = root/'stanford_cars'
    dt = [(o, object) for o in ('bbox_x1','bbox_y1','bbox_x2','bbox_y2','class','fname')]
    (base/'devkit').mkdir(parents=True, exist_ok=True)
    savemat(base/'devkit'/'cars_meta.mat', dict(class_names=np.array(names, dtype=object)))
    for file,folder in (('devkit/cars_train_annos.mat','cars_train'), ('cars_test_annos_withlabels.mat','cars_test')):
        rows = [(1,1,20,20,1,'00001.jpg'), (2,2,30,30,y,name if folder=='cars_train' else '00002.jpg')]
        savemat(base/file, dict(annotations=np.array(rows, dtype=dt)))
        for k in (1,2): picture(base/folder/f'{k:05d}.jpg', k)
    return root

def dogs(root, name='b/2.jpg'):
    fs = ['a/1.jpg','b/2.jpg','a/3.jpg','b/4.jpg']
    for o in fs: picture(root/'Images'/o)
    for part,o in (('train',[fs[0],name]), ('test',fs[2:])): savemat(root/f'{part}_list.mat', dict(file_list=np.array([[x] for x in o], dtype=object)))
    return root

LAYOUTS = {read_aircraft:(aircraft,'../../../mine'), read_pets:(pets,'../../../mine_1'), read_cars:(cars,'../../mine.jpg'), read_dogs:(dogs,'../../mine.jpg')}

@pytest.fixture
def at_home(monkeypatch):
    "MATLAB files are parsed here, in a thousandth of the time."
    code = _PARSE.split('# Windows has no such bounds\n')[1]
    def run(items, seconds, max_gb):
        out = io.StringIO()
        with contextlib.redirect_stdout(out): exec(code, dict(json=json, want=dict(items=items)))
        return out.getvalue().splitlines(),None
    monkeypatch.setattr('cekd_fastai.data.safe._run', run)

@pytest.mark.parametrize('read', LAYOUTS)
def test_other_lists_that_reach_outside(tmp_path, at_home, read):
    make,name = LAYOUTS[read]
    assert len(read(make(tmp_path/'good')))>=4
    picture(tmp_path/'mine.jpg')
    picture(tmp_path/'mine_1.jpg')
    with fails(ValueError, 'outside of', 'mine'): read(make(tmp_path/'bad', name))

# Lists that hold something else

@pytest.mark.parametrize('file,text', [('variants.txt',''), ('images_variant_test.txt','0000004\n'), ('images_variant_test.txt','0000004 Concorde\n'), ('images_variant_test.txt',''), ('images_box.txt','0000001 nan inf 3 4\n')])
def test_odd_aircraft(tmp_path, file, text):
    put(aircraft(tmp_path)/'fgvc-aircraft-2013b'/'data'/file, text)
    with fails((ValueError,FileNotFoundError), str(tmp_path)): read_aircraft(tmp_path)

@pytest.mark.parametrize('text', ['','a\n','a_1 x 1 1\n','a_1 9 1 1\n','a_1 0 1 1\n'])
def test_odd_pets(tmp_path, text):
    put(pets(tmp_path)/'oxford-iiit-pet'/'annotations'/'test.txt', text)
    with fails((ValueError,FileNotFoundError), str(tmp_path)): read_pets(tmp_path)

# Links that lead in circles, and to the whole disk

def test_link_to_the_root_of_the_disk(tmp_path):
    for o in ('a/1.jpg','a/2.jpg','b/1.jpg'): picture(tmp_path/o)
    (tmp_path/'a'/'all').symlink_to('/')
    with pytest.warns(UserWarning, match='read already: a/all'): assert len(images_of(tmp_path))==3

# Archives

def tar(file, *members, mode='w:gz'):
    "An archive of `(name, attributes, bytes)`."
    with tarfile.open(file, mode) as f:
        for name,attrs,data in members:
            o = tarfile.TarInfo(name)
            o.size = len(data)
            for k,v in attrs.items(): setattr(o, k, v)
            f.addfile(o, io.BytesIO(data) if data else None)
    return file

def link(to): return dict(type=tarfile.SYMTYPE, linkname=to)

@pytest.mark.parametrize('to', ['.','./','./.',''])
def test_archive_with_a_link_back(tmp_path, to):
    picture(tmp_path/'x.jpg')
    a = tar(tmp_path/'x.tgz', ('data/a/x.jpg', {}, (tmp_path/'x.jpg').read_bytes()), ('data/a/l0', link(to), b''))
    with fails(OSError, 'x.tgz cannot be extracted', "'data/a/l0' is a link to"): unpack(a, tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_archive_that_is_a_bomb(tmp_path, monkeypatch):
    "Packed tightly, sparse, of zip, and with a note larger than memory."
    monkeypatch.setattr('cekd_fastai.data.download._SMALL', 2**20)
    z,mb = bytes(2**18),2**20
    tgz = tar(tmp_path/'a.tgz', *((f'{k}', {}, z) for k in range(20)))
    sparse = tar(tmp_path/'b.tar', ('big', dict(pax_headers={'GNU.sparse.major':'0','GNU.sparse.minor':'1','GNU.sparse.map':'0,0','GNU.sparse.size':str(2**43)}), b''), mode='w')
    with zipfile.ZipFile(tmp_path/'c.zip', 'w', zipfile.ZIP_DEFLATED) as f:
        for k in range(20): f.writestr(str(k), z)
    note = tar(tmp_path/'d.tgz', ('a', dict(pax_headers={'comment':'x'*(3*mb)}), b''))
    for a,says in ((tgz,'grow to more than 1 MiB'), (sparse,'grow to more than 1 MiB'), (tmp_path/'c.zip','grow to more than 1 MiB'), (note,'more than 1 MiB')):
        with fails(OSError, a.name, says): unpack(a, tmp_path/'out')
        assert not (tmp_path/'out').exists() and not list(tmp_path.glob('.partial*'))
    assert len(unpack(tgz, tmp_path/'out', max_ratio=2000).ls())==20

def test_archive_of_many_files(tmp_path):
    a = tar(tmp_path/'x.tgz', *((str(k), {}, b'') for k in range(50)))
    with fails(OSError, 'more than 49 files', 'raise max_files'): unpack(a, tmp_path/'out', max_files=49)
    assert len(unpack(a, tmp_path/'out', max_files=50).ls())==50

def test_second_name_of_a_later_member(tmp_path):
    a = tar(tmp_path/'x.tar', ('a', dict(type=tarfile.LNKTYPE, linkname='b'), b''), ('b', {}, b'x'), mode='w')
    with fails(OSError, "'a' is a link to a later one"): unpack(a, tmp_path/'out')

@pytest.mark.parametrize('mode', ['w','w:gz','w:bz2','w:xz'])
def test_every_kind_of_tar(tmp_path, mode):
    a = tar(tmp_path/'x', ('d/a', {}, b'x'*5000), ('d/b', link('a'), b''), ('d/c', dict(type=tarfile.LNKTYPE, linkname='d/a'), b''), mode=mode)
    assert [o.read_bytes() for o in (unpack(a, tmp_path/'out')/'d').iterdir()]==[b'x'*5000]*3

# MATLAB files

def test_mats_that_are_broken(tmp_path):
    "Many bytes changed, cut short, empty, without the variable: one sentence each, from one process."
    good = tmp_path/'good.mat'
    savemat(good, dict(a=np.array([['x'],['y']], dtype=object)))
    raw = good.read_bytes()
    (tmp_path/'bad.mat').write_bytes(raw[:128]+b'\xff'*12+raw[140:])
    with fails(ValueError, 'bad.mat cannot be read as a MATLAB file'): read_mats([(good,'a'),(tmp_path/'bad.mat','a')])
    with fails(ValueError, 'good.mat cannot be read as a MATLAB file', 'it holds no b'): read_mats([(good,'b')])

def test_mat_bounds(tmp_path):
    "Time and memory are bounded; a crash is a sentence."
    good = tmp_path/'good.mat'
    savemat(good, dict(a=np.zeros(5)))
    with fails(ValueError, 'takes longer than 0.01 seconds'): read_mats([(good,'a')], seconds=.01)
    with fails(ValueError, 'good.mat'): read_mats([(good,'a')], max_gb=.05)

@pytest.mark.parametrize('kw', [dict(y=0), dict(y=9), dict(y='x'), dict(y=2.5), dict(names=('A','A'))])
def test_odd_cars(tmp_path, at_home, kw):
    with fails(ValueError, str(tmp_path)): read_cars(cars(tmp_path, **kw))

# Pictures

LONG = [(1,20_000), (20_000,1), (3,40_000), (LONGEST+1,1)]

@pytest.mark.parametrize('size', LONG)
def test_picture_that_is_too_long(tmp_path, size):
    f = tmp_path/'a.png'
    Image.new('L', size).save(f)
    picture(tmp_path/'b.png')
    df = verify(tmp_path)
    assert df.file.tolist()==[f] and df.fault[0]=='too long ({:,} x {:,})'.format(*size)
    for o in (f, str(f), f.read_bytes(), Image.open(f)):
        with fails((OSError,ValueError), 'too long'): open_image(o)
    with fails(OSError, 'too long'): open_image(f, draft=256)

def test_box_that_is_too_long(tmp_path):
    Image.new('RGB', (2000,1000)).save(tmp_path/'a.png')
    with fails(OSError, 'too long'): open_image(tmp_path/'a.png', box=(0,5,1900,1))
    assert open_image(tmp_path/'a.png', box=(0,5,1000,100)).size==(1000,100)

# Downloads

def test_addresses_are_safe():
    "https first, plain http only where a hash is known; each file of the registry has one."
    assert _addresses('http://a.org/x', None)==_addresses('https://a.org/x', None)==['https://a.org/x']
    assert _addresses('https://a.org/x', 'abc')==['https://a.org/x','http://a.org/x']
    for name,files in _FILES.items():
        for url,md5,_ in files: assert url.startswith('https://') and len(md5)==32, (name, url)
    assert not [o.name for o in BENCHMARKS.values() if o.source.startswith('http:')]

def test_http_is_the_last_resort(tmp_path, monkeypatch):
    seen = []
    def get(url, file, timeout):
        seen.append(url)
        if url[:5]=='https': raise OSError('no TLS here')
        file.write_bytes(b'x')
        return file
    monkeypatch.setattr('cekd_fastai.data.download.download_url', get)
    with fails(ConnectionError, 'no TLS here'): _get('http://a.org/x', tmp_path/'1')
    assert _get('http://a.org/x', tmp_path/'1', '9dd4e461268c8034f5c8564e155c67a6').exists()
    with fails(ConnectionError, 'its md5 is'): _get('http://a.org/x', tmp_path/'2', 'f'*32)
    assert seen==['https://a.org/x']*2+['http://a.org/x','https://a.org/x','http://a.org/x']

# Files of weights

@pytest.fixture(scope='module')
def net_file(tmp_path_factory):
    "A network in a file, as `deploy` writes it."
    file = tmp_path_factory.mktemp('net')/'net.pt'
    info = dict(vocab=['a','b','c'], mean=[.5]*3, std=[.2]*3, size=[32,32], steps=[['ResizeShort',dict(size=40)],['CropPad',dict(size=[32,32],pad_mode='zeros')]], batch_steps=[])
    save_net(branch_net('cifar_resnet8', 3, 2, pretrained=False), file, **info)
    return file

def test_flipped_byte(net_file, tmp_path):
    "Any byte of a file: what is read is what was written, or an error in one sentence."
    raw,rng = net_file.read_bytes(),np.random.default_rng(0)
    good,refused = load_net(net_file)[0].state_dict(),0
    for at in rng.integers(len(raw), size=40):
        (tmp_path/'b.pt').write_bytes(raw[:at] + bytes([raw[at] ^ 1<<rng.integers(8)]) + raw[at+1:])
        try: read = read_saved(tmp_path/'b.pt')[1]
        except ValueError as e:
            refused += 1
            assert 'b.pt` was not written by' in str(e) and '\n' not in str(e), str(e)
        else: assert all(torch.equal(v, read[k]) for k,v in good.items())
    assert refused>=30
    (tmp_path/'w.pth').write_bytes(raw[:at//2] + bytes([raw[at//2]^1]) + raw[at//2+1:])
    with fails(ValueError, 'is not a checkpoint that can be loaded safely', 'damaged'): load_weights(branch_net('cifar_resnet8', 3, 2, pretrained=False), tmp_path/'w.pth')

def test_changed_and_packed_again(net_file, tmp_path):
    "A weight that was changed before the file was packed has sound checksums of zip, and not ours."
    saved = torch.load(net_file, weights_only=True)
    saved['state_dict']['heads.0.1.bias'][0] += 1
    torch.save(saved, tmp_path/'b.pt')
    with fails(ValueError, 'it is damaged: its checksum differs'): load_net(tmp_path/'b.pt')

@pytest.mark.parametrize('value', [math.nan,math.inf])
def test_weights_that_are_not_finite(net_file, tmp_path, value):
    saved = torch.load(net_file, weights_only=True)
    saved['state_dict']['heads.0.1.bias'][0] = value
    torch.save(saved, tmp_path/'b.pt')
    with fails(ValueError, 'heads.0.1.bias holds numbers that are not finite'): load_net(tmp_path/'b.pt')
    save_file(saved['state_dict'], tmp_path/'w.safetensors')
    for o in ('b.pt','w.safetensors'):
        with fails(ValueError, o, 'holds numbers that are not finite, in heads.0.1.bias'): load_weights(branch_net('cifar_resnet8', 3, 2, pretrained=False), tmp_path/o)

def recipe(**kw): return lambda o: o['recipe'].update(kw)
def state(f): return lambda o: f(o['state_dict'])
WRONG = dict(no_dict=lambda o: o.clear(), a_list=lambda o: o.update(recipe=[1]), no_builder=recipe(build='evil'), a_number=recipe(build=3), # chkstyle: ignore
    states=lambda o: o.update(state_dict=[1]), words=state(lambda o: o.update({'heads.0.1.bias':'x'})),
    less=state(lambda o: o.pop('heads.0.1.bias')), more=state(lambda o: o.update(x=torch.ones(1))),
    shape=recipe(n_out=4), own=recipe(pretrained=True), path=recipe(checkpoint_path='x.pt'),
    hub=recipe(arch='hf-hub:evil/net'), local=recipe(arch='/etc/passwd'), arch=recipe(arch='resnet'), nothing=recipe(arch=None),
    unknown=recipe(zzz=1), below=recipe(n_branches=-1), split=recipe(split='zzz'), info=lambda o: o.update(info=3),
    deep=recipe(arch_args=[[[[[[1]]]]]]), tensor=recipe(n_out=torch.ones(3)),
    classes=recipe(n_out=20_000_000), branches=recipe(n_branches=10**6), giant=recipe(n_out=10**12), wide=recipe(arch='resnet18', width_per_group=10**6),
    claims=state(lambda o: o.update(x=torch.zeros(1).expand(10**9))),
    sparse=state(lambda o: o.update(x=torch.ones(2).to_sparse())), meta=state(lambda o: o.update(x=torch.ones(2, device='meta'))))

@pytest.mark.parametrize('how', WRONG)
def test_network_that_is_none(net_file, tmp_path, how):
    "Well-formed files with other content: an error that names the file, and no more memory than the file has."
    saved = torch.load(net_file, weights_only=True)
    WRONG[how](saved)
    saved.pop('sum', None)
    torch.save(saved, tmp_path/'b.pt')
    was = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with fails(ValueError, 'b.pt'): load_net(tmp_path/'b.pt')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-was < 700*2**10

def test_other_files_are_no_networks(tmp_path):
    for k,o in enumerate((b'', b'PK\x03\x04', b'no pickle', pickle.dumps(bytearray(9)), bytes(1000))):
        (tmp_path/f'{k}.pt').write_bytes(o)
        with fails(ValueError, f'{k}.pt` was not written by'): load_net(tmp_path/f'{k}.pt')
    with zipfile.ZipFile(tmp_path/'z.pt', 'w', zipfile.ZIP_DEFLATED) as f: f.writestr('x/data/0', bytes(10**6))
    with fails(ValueError, 'z.pt', 'torch does not pack them'): load_net(tmp_path/'z.pt')

def test_older_network_is_read(net_file, tmp_path):
    "Files from before there was a checksum."
    saved = torch.load(net_file, weights_only=True)
    del saved['sum']
    torch.save(saved, tmp_path/'b.pt')
    assert len(load_net(tmp_path/'b.pt')[1]['vocab'])==3

INFO = [dict(size=[32,10**6]), dict(std=[0,1,1]), dict(mean=[math.nan]*3), dict(mean='x'), dict(vocab=7), dict(vocab=[]), dict(vocab=torch.ones(3)),
    dict(steps=[['ResizeShort',dict(size=10**6)]]), dict(steps=3), dict(steps=[['x']]), dict(activation='evil'), dict(thresh='x'), dict(draft='x')]

@pytest.mark.parametrize('kw', INFO)
def test_description_that_is_none(net_file, tmp_path, kw):
    saved = torch.load(net_file, weights_only=True)
    saved['info'] |= kw
    del saved['sum']
    torch.save(saved, tmp_path/'b.pt')
    with fails(ValueError, 'b.pt', f'no sound {next(iter(kw))}'): Deployed(tmp_path/'b.pt')

def test_pictures_without_pixels(net_file, tmp_path):
    saved = torch.load(net_file, weights_only=True)
    saved['info']['steps'] = [['CropPad',dict(size=[32,0])]]
    del saved['sum']
    torch.save(saved, tmp_path/'b.pt')
    with fails(ValueError, 'b.pt', 'a side of them has no pixels'): Deployed(tmp_path/'b.pt')

@pytest.mark.parametrize('upright', [True,False])
def test_picture_for_a_network(net_file, tmp_path, upright):
    "Whether it opens pictures as this library does or as fastai's `ImageBlock` does"
    saved = torch.load(net_file, weights_only=True)
    saved['info']['upright'] = upright
    del saved['sum']
    torch.save(saved, tmp_path/'b.pt')
    d = Deployed(tmp_path/'b.pt')
    Image.new('RGB', (1,20_000)).save(tmp_path/'a.png')
    (tmp_path/'c.png').write_bytes(b'no picture')
    with fails(OSError, 'a.png', 'too long'): d.predict(tmp_path/'a.png')
    with fails(OSError, 'c.png', 'no known format'): d.predict(tmp_path/'c.png')
    with fails(ValueError, 'too long'): d.predict(Image.open(tmp_path/'a.png'))

def test_long_picture_through_other_doors(tmp_path):
    "An array, and a picture that fastai's own `ImageBlock` has opened: scaled without a bound it would take gigabytes."
    f = tmp_path/'a.png'
    Image.new('RGB', (1,20_000)).save(f)
    with fails(ValueError, 'too long'): open_image(np.zeros((20_000,1,3), np.uint8))
    with fails(ValueError, 'too long'): ResizeShort(512)(PILImage.create(f))

# Answers of teachers

def answers(folder, **kw):
    c = TargetCache(folder, kw, [3], 1, 10)
    return c,c.folder/'answers.npy'

ROWS = np.ones((1,10,4), np.float32)
SPOILT = [lambda f: f.write_bytes(f.read_bytes()[:-80]), lambda f: f.write_bytes(b''), lambda f: f.write_bytes(b'x'*500),
    lambda f: np.save(f, np.ones((1,10,5), np.float32)), lambda f: np.save(f, ROWS.astype('f8')),
    lambda f: np.save(f, np.asfortranarray(ROWS+np.arange(4, dtype=np.float32)))]

@pytest.mark.parametrize('spoil', SPOILT)
def test_answers_that_were_cut_short(tmp_path, spoil):
    c,file = answers(tmp_path)
    c.data[:] = 1
    c.mark(0)
    del c
    assert answers(tmp_path)[0].done==[0]
    spoil(file)
    with pytest.warns(UserWarning, match='was cut short or changed, so the teachers answer anew'): c,_ = answers(tmp_path)
    assert c.done==[] and c.data.shape==(1,10,4)

@pytest.mark.parametrize('note', ['','[]','{"sums":7}','{"sums":[[9,1],[-1,1],["x",1]]}','{"sums":[0]}','{','\x00','['*100_000])
def test_odd_note_of_answers(tmp_path, note):
    c,file = answers(tmp_path)
    c.note.write_text(note)
    assert answers(tmp_path)[0].done==[]

@pytest.mark.parametrize('spoil', [lambda c: c.data.__setitem__((0,4,1), 2), lambda c: c.note.write_text('{"sums":[[0,7]]}')])
def test_answers_that_were_changed(tmp_path, spoil):
    "They are not used, and an epoch that goes on in their midst is not noted as whole."
    def begin():
        c,_ = answers(tmp_path)
        c.start_view(0, [])
        return c
    c = begin()
    c.data[:] = 1
    c.mark(0)
    c.leave_view()
    assert begin().done==[0]
    spoil(c)
    with pytest.warns(UserWarning, match='not what was written there'): assert begin().done==[]
    c = begin()
    c.n_batches,c.sums = 1,[[0,7]] # from a checkpoint
    with pytest.warns(UserWarning, match='not what was written there'): c.resume()
    c.n_batches += 1
    c.end_view(2)
    assert c.done==[]

# Links that lead in circles, for whoever reads a folder of pictures

def test_circles_of_links(net_file, tmp_path):
    for k in range(3): picture(tmp_path/'a'/f'{k}.jpg')
    for o in ('a/l0','a/l1'): (tmp_path/o).symlink_to('..')
    assert len(Deployed(net_file).predict_folder(tmp_path, num_workers=0))==3
    dls = SimpleNamespace(train=SimpleNamespace(dataset=None))
    with fails(ValueError, 'data that can open files'): unlabeled_dl(dls, tmp_path)
    with fails(ValueError, 'has no images'): unlabeled_dl(dls, tmp_path/'none')

# A short round of benchmarks/fuzz.py

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [o for o in fuzz.READERS if o!='matlab']) # which starts a process for each input
def test_files_changed_at_random(tmp_path, name):
    n = dict(networks=15, folders=30, checkpoints=30).get(name, 100)
    res = dict(fuzz.run(name, range(n), tmp_path, limit=0))
    assert {i:o for i,o in res.items() if o not in ('result','named')}=={} and len(res)==n

def test_what_is_named():
    "The campaign tells errors of the library from those of others."
    def fail(e): raise e
    assert fuzz.outcome(lambda: read_mats([('none.mat','a')]))=='named' and fuzz.outcome(lambda: 3)=='result'
    for e in (KeyError('x'), ValueError('x'), OSError('x')): assert fuzz.outcome(lambda: fail(e)).startswith(type(e).__name__)
