"From a trained learner to others: files that are written again, guests of the page, two runs at once, pictures in memory, folders that are shut."
import asyncio,csv,io,os,socket,sys,threading,time,types,urllib.request
from pathlib import Path
import numpy as np,pytest,torch
from PIL import Image
from fastai.vision.all import DataBlock,CategoryBlock,ImageBlock,Recorder,Resize,get_image_files,load_learner,parent_label,set_seed,vision_learner
from cekd_fastai.all import CEKD,CutMix,Deployed,branch_learner,branch_preds,deploy,fine_grained_dls,make_birds,predict_folder
from cekd_fastai import predict,serve
from cekd_fastai.core import held
from cekd_fastai.data.folders import images_of,read_folders
from cekd_fastai.explain import add_examples
from cekd_fastai.interpret.history import history,plot_components
from cekd_fastai.interpret.items import _item_batch
from cekd_fastai.interpret.maps import item_cams
from cekd_fastai.quantize import quantize_onnx
from cekd_fastai.serve import listening,serve_app
from cekd_fastai.share import to_hub

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=3, n_images=6, n_train=4, size=72, progress=False)

@pytest.fixture(scope='module')
def learn(birds):
    set_seed(1)
    return branch_learner(fine_grained_dls(birds, size=64, bs=8, num_workers=0), 'test_resnet', pretrained=False)

@pytest.fixture
def file(learn, tmp_path): return deploy(learn, tmp_path/'birds.pt')

def photos(folder, n, size=(40,30)):
    "`n` pictures of one colour each."
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n): Image.new('RGB', size, (i%256,90,40)).save(folder/f'{i:03}.png')
    return folder

def rows(path):
    with open(path, newline='', encoding='utf-8') as f: return list(csv.reader(f))[1:]

def test_written_again(learn, file, tmp_path):
    "The same network is the same file, whatever its name, so its table goes on; training pictures inside change no answer."
    again = deploy(learn, tmp_path/'elsewhere'/'other.pt')
    assert again.read_bytes()==file.read_bytes()
    folder,table = photos(tmp_path/'photos', 3),tmp_path/'out.csv'
    predict_folder(file, folder, csv=table)
    digest,net = Deployed(file).digest,file.read_bytes()
    add_examples(file, learn.dls, n=1)
    assert Deployed(file).digest==digest and file.read_bytes()!=net
    photos(folder, 5)
    assert len(predict_folder(file, folder, csv=table))==5 and len(rows(table))==5
    with torch.no_grad(): next(learn.model.parameters()).add_(1e-3)
    assert Deployed(deploy(learn, tmp_path/'new.pt')).digest!=digest

def get(url):
    with urllib.request.urlopen(url, timeout=20) as r: return r.status

@pytest.fixture
def server(file):
    pytest.importorskip('uvicorn')
    server,sock = listening(file, port=0)
    t = threading.Thread(target=server.run, kwargs=dict(sockets=[sock]), daemon=True)
    t.start()
    while not server.started: time.sleep(.05)
    yield sock.getsockname()[1]
    server.should_exit = True
    t.join(20)

def test_guests_who_say_nothing(server):
    "Browsers open several connections before they use one: they lock nobody out."
    idle = [socket.create_connection(('127.0.0.1', server)) for _ in range(60)]
    try: assert [get(f'http://127.0.0.1:{server}/{o}') for o in ('','model','page.js')]==[200]*3
    finally:
        for o in idle: o.close()

def scope():
    return dict(type='http', method='POST', path='/predict', raw_path=b'/predict', query_string=b'', root_path='', scheme='http', http_version='1.1',
        headers=[(b'content-type', b'multipart/form-data; boundary=x'),(b'host', b'127.0.0.1')], server=('127.0.0.1',80), client=('127.0.0.1',1))

def test_at_once(file, monkeypatch):
    "A request that stops halfway ends, and one too many is told to come again."
    pytest.importorskip('starlette')
    monkeypatch.setattr(serve, '_PATIENCE', .2)
    monkeypatch.setattr(serve, '_AT_ONCE', 2)
    app = serve_app(file)
    async def one():
        parts = [dict(type='http.request', body=b'--x\r\n', more_body=True)]
        async def receive():
            if parts: return parts.pop()
            await asyncio.sleep(60)
        sent = []
        async def send(o): sent.append(o)
        await app(scope(), receive, send)
        return sent[0]['status'],sent[1]['body'].decode()
    async def all_of_them(): return await asyncio.gather(*[one() for _ in range(3)])
    res = sorted(asyncio.run(all_of_them()))
    assert [o[0] for o in res]==[408,408,503] and 'for 0.2 seconds' in res[0][1] and 'in a moment' in res[2][1]
    assert [o[0] for o in asyncio.run(all_of_them())].count(408)==2 # those that ended hold no place

def test_in_a_frame(file):
    "Nobody shows the page in a page of his own, but for a site that was named."
    pytest.importorskip('starlette')
    from starlette.testclient import TestClient
    def said(**kw): return TestClient(serve_app(file, **kw)).get('/').headers['content-security-policy']
    assert said().endswith("frame-ancestors 'none'") and said(frame='https://huggingface.co').endswith('frame-ancestors https://huggingface.co')
    for bad in ('huggingface.co','https://a.b; script-src *','https://a.b/c','*'):
        with pytest.raises(ValueError, match='pass the address of a site alone'): serve_app(file, frame=bad)

def test_a_long_picture_has_its_own_sentence(file):
    pytest.importorskip('starlette')
    from starlette.testclient import TestClient
    buf = io.BytesIO()
    Image.new('RGB', (3000,20)).save(buf, 'PNG')
    res = TestClient(serve_app(file)).post('/predict', files=[('files', ('a.png', buf.getvalue()))]).json()
    assert 'it is too long: 3,000 x 20 pixels' in res['pictures'][0]['error']

def test_maps_from_several_threads(birds, tmp_path):
    "A network of tokens: the map of each thread is that of its own picture."
    set_seed(0)
    dls = fine_grained_dls(birds, size=160, bs=4, num_workers=0)
    d = Deployed(deploy(branch_learner(dls, 'test_vit', pretrained=False), tmp_path/'vit.pt'))
    files = dls.valid.items[:4]
    want = [np.asarray(d.where(o, d.vocab[0])) for o in files]
    wrong = []
    def work(f, w):
        for _ in range(12):
            if not np.array_equal(np.asarray(d.where(f, d.vocab[0])), w): wrong.append(f)
    threads = [threading.Thread(target=work, args=o) for o in zip(files, want)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert not wrong

def test_a_readme_stays(learn, tmp_path):
    "A card takes the place of a card, and of nothing else; it names the folder it lies in."
    pytest.importorskip('huggingface_hub')
    (tmp_path/'README.md').write_text('# My project')
    with pytest.raises(FileExistsError, match='was not written by `to_hub`'): to_hub(learn, folder=tmp_path)
    assert (tmp_path/'README.md').read_text()=='# My project' and not (tmp_path/'model.pt').exists()
    folder = tmp_path/'finches'
    for _ in range(2): to_hub(learn, folder=folder)
    assert "from_hub('path/to/finches')" in (folder/'README.md').read_text()

def test_card_without_a_recorder(learn, tmp_path):
    pytest.importorskip('huggingface_hub')
    rec = learn.recorder
    learn.remove_cb(Recorder)
    try: assert (to_hub(learn, folder=tmp_path/'a')/'README.md').exists()
    finally: learn.add_cb(rec)

@pytest.mark.skipif(os.name=='nt' or sys.platform=='darwin', reason='such names are not possible here')
def test_names_of_another_encoding(birds, tmp_path):
    "A class whose name no text could hold is refused while it is read, with and without parts."
    for at in ('flat','parts/train','parts/valid'):
        for name in (b'wren',b'caf\xe9'):
            folder = Path(os.fsdecode(os.fsencode(tmp_path/at)+b'/'+name))
            photos(folder, 4)
    for o in ('flat','parts'):
        with pytest.raises(ValueError, match=r"b'caf\\xe9' in .* is not UTF-8: rename it"): read_folders(tmp_path/o)

def test_two_runs_into_one_table(file, tmp_path, monkeypatch):
    "The second is refused, and rows that stand there twice are made one."
    folder,table = photos(tmp_path/'photos', 3),tmp_path/'out.csv'
    predict_folder(file, folder, csv=table)
    text = table.read_text()
    table.write_text(text+''.join(text.splitlines(True)[1:]))
    assert len(predict_folder(file, folder, csv=table))==3 and len(rows(table))==3
    with held(table, tmp_path/'.out.csv.lock', 'taken'):
        with pytest.raises(FileExistsError, match='being written by another run'): predict_folder(file, folder, csv=table)
    assert sorted(o.name for o in tmp_path.iterdir())==['birds.pt','out.csv','photos']

def test_lock_on_windows(tmp_path, monkeypatch):
    "Without `fcntl` it is the lock of Windows, and what cannot be deleted there is no fault."
    calls = []
    def locking(fd, mode, n):
        calls.append((mode,n))
        if len(calls)==2: raise OSError(13, 'Permission denied')
    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.setitem(sys.modules, 'msvcrt', types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    with held(tmp_path, tmp_path/'lock', 'is taken'):
        with pytest.raises(FileExistsError, match='is taken'):
            with held(tmp_path, tmp_path/'lock', 'is taken'): pass
    assert calls==[(2,1)]*2

def test_a_folder_that_is_shut(file, tmp_path, monkeypatch):
    "The root of a card has folders of the system: its pictures are predicted, and the folder is named; training stops there."
    photos(tmp_path/'DCIM'/'a', 2)
    photos(tmp_path/'DCIM'/'b', 2)
    (tmp_path/'DCIM'/'lost+found').mkdir()
    real = os.scandir
    def scandir(path):
        if os.fspath(path).endswith('lost+found'): raise PermissionError(13, 'Permission denied', os.fspath(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.warns(UserWarning, match='lost.found: not open to you'): df = predict_folder(file, tmp_path/'DCIM')
    assert len(df)==4
    with pytest.warns(UserWarning, match='not open to you'): assert len(images_of(tmp_path/'DCIM'))==4
    with pytest.raises(PermissionError): read_folders(tmp_path/'DCIM')

@pytest.fixture(scope='module')
def stock(birds):
    "A learner of fastai's own, whose loaders do not normalise."
    def split(o): return [range(0,12),range(12,18)]
    block = DataBlock((ImageBlock,CategoryBlock), get_items=get_image_files, splitter=split, get_y=parent_label, item_tfms=Resize(64))
    return vision_learner(block.dataloaders(birds, bs=6, num_workers=0), 'test_resnet', pretrained=False, normalize=False)

@pytest.mark.parametrize('mode', ['RGB','L','P','RGBA','LA','I;16'])
@pytest.mark.parametrize('whose', ['ours','stock'])
def test_pictures_in_memory(learn, stock, mode, whose):
    "An image of any mode, its bytes and its array are one picture each."
    l = dict(ours=learn, stock=stock)[whose]
    im = Image.new('L', (50,40), 99).convert(mode)
    buf = io.BytesIO()
    im.save(buf, 'PNG')
    for o in (im,buf.getvalue(),[im,im]):
        assert len(_item_batch(l, o).x)==(2 if isinstance(o, list) else 1), (mode,type(o))
        item_cams(l, o)

def test_arrays_and_numbers_of_items(learn):
    a = np.zeros((40,50,3), np.uint8)
    assert len(item_cams(learn, a))==len(item_cams(learn, torch.tensor(1)))==len(item_cams(learn, np.int64(1)))
    assert torch.equal(_item_batch(learn, torch.tensor(1)).x, _item_batch(learn, 1).x)
    d = Image.fromarray(a)
    assert torch.equal(_item_batch(learn, a).x, _item_batch(learn, d).x)

def test_without_labels(learn, birds):
    "What the branches say to new pictures needs no labels."
    files = get_image_files(birds)[:5]
    whole,each,y = branch_preds(learn, learn.dls.test_dl(files, num_workers=0))
    assert whole.shape==(5,3) and each.shape[1:]==(5,3) and y is None

def test_one_sentence_each(learn, file, birds, tmp_path):
    "Loaders without pictures, a learner where a file is meant, half precision, a class that is a number."
    learn.export(tmp_path/'l.pkl')
    with pytest.raises(ValueError, match='no training pictures'): add_examples(file, load_learner(tmp_path/'l.pkl').dls)
    with pytest.raises(TypeError, match='BranchLearner`: write a learner with `deploy`'): predict_folder(learn, birds)
    learn.model.bfloat16()
    try:
        with pytest.raises(ValueError, match='bfloat16, .*learn.model.float'): deploy(learn, tmp_path/'b.pt')
    finally: learn.model.float()
    d = Deployed(file)
    d.vocab = ['1','2','3']
    assert d.where(Image.new('RGB', (64,64)), 2).size==(64,64)
    with pytest.raises(ValueError, match="no class 7: choose from 1, 2, 3"): d.where(Image.new('RGB', (64,64)), 7)

def test_one_picture_to_calibrate(learn, tmp_path):
    pytest.importorskip('onnxruntime')
    from cekd_fastai.onnx_file import export_onnx
    f = export_onnx(learn, tmp_path/'birds.onnx')
    im = Image.new('RGB', (64,64), 'red')
    assert quantize_onnx(f, [im]).exists() and quantize_onnx(f, im).exists()
    with pytest.raises(ValueError, match='to measure on'): quantize_onnx(f, [], tmp_path/'none.onnx')
    assert not (tmp_path/'none.onnx').exists()

def test_parts_of_a_method_that_was_removed(birds):
    "The history of a fit knows the parts of its loss, whoever owns the loss now."
    set_seed(2)
    learn = branch_learner(fine_grained_dls(birds, size=48, bs=6, num_workers=0), 'test_resnet', pretrained=False, cbs=[CutMix(),CEKD()])
    with learn.no_logging(): learn.fit(1)
    with_it = history(learn)
    learn.remove_cb(CEKD)
    assert history(learn).attrs['parts']==with_it.attrs['parts']!=[] and history(learn).attrs['weights']=={}
    assert list(plot_components(learn).index)==with_it.attrs['parts']
    with learn.no_logging(): learn.fit(1)
    assert history(learn).attrs['parts']==[] # its own loss is `train_loss`

@pytest.mark.skipif(sys.platform!='linux', reason='no fork')
def test_readers_without_a_guard(file, tmp_path, monkeypatch):
    "A script without `if __name__=='__main__'` reads with several processes, also where new ones start from a server."
    folder = photos(tmp_path/'photos', 20)
    text = f"import multiprocessing as mp; mp.set_start_method('forkserver')\nfrom cekd_fastai.predict import predict_folder\nprint(len(predict_folder({str(file)!r}, {str(folder)!r}, bs=8, num_workers=2)))\n"
    (tmp_path/'script.py').write_text(text)
    import subprocess
    res = subprocess.run([sys.executable, '-W', 'ignore', tmp_path/'script.py'], capture_output=True, text=True)
    assert res.stdout.split()[-1:]==['20'], res.stderr[-500:]
    class Ended(list):
        def __iter__(self): raise RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly')
    monkeypatch.setattr(predict, '_loader', lambda *a: Ended([1,2]))
    with pytest.raises(RuntimeError, match='pass num_workers=0'): predict_folder(file, folder)
