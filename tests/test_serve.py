"The page and its JSON: the numbers of the file, limits, and what strangers send. All of it over HTTP, in this process."
import asyncio,base64,io,re,socket,sys,tempfile,zlib
import numpy as np,pytest,torch
from PIL import Image
from fastai.vision.all import set_seed
from cekd_fastai.all import branch_learner,deploy,fine_grained_dls,make_birds
from cekd_fastai import explain
from cekd_fastai.explain import _training,add_examples
from cekd_fastai.onnx_file import export_onnx
from cekd_fastai.page import PAGE
from cekd_fastai.predict import open_net
from cekd_fastai.commands import cekd_serve
from cekd_fastai.serve import _only_here,serve_app

pytest.importorskip('starlette')
from starlette.testclient import TestClient

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=3, n_images=6, n_train=4, size=72, progress=False)

@pytest.fixture(scope='module')
def learn(birds):
    set_seed(1)
    return branch_learner(fine_grained_dls(birds, size=64, bs=8, num_workers=0), 'test_resnet', pretrained=False)

@pytest.fixture(scope='module')
def file(learn, tmp_path_factory): return add_examples(deploy(learn, tmp_path_factory.mktemp('net')/'birds.pt'), learn.dls, n=2)

@pytest.fixture(scope='module')
def plain(learn, tmp_path_factory): return deploy(learn, tmp_path_factory.mktemp('net')/'plain.pt')

@pytest.fixture(scope='module')
def client(file): return TestClient(serve_app(file, max_mb=.2, max_files=5, max_total_mb=.5, max_pixels=1_000_000))

def send(client, *files, **data):
    "Status and JSON for pairs of a name and bytes."
    r = client.post('/predict', files=[('files', o) for o in files], data=data)
    return r.status_code,r.json()

def encoded(im, kind='PNG', **kw):
    buf = io.BytesIO()
    im.save(buf, kind, **kw)
    return buf.getvalue()

def bomb(side=40_000):
    "A PNG of a few bytes whose head speaks of many pixels."
    im = bytearray(encoded(Image.new('L', (8,8))))
    head = b'IHDR'+side.to_bytes(4, 'big')*2+im[24:29]
    im[12:29],im[29:33] = head,zlib.crc32(head).to_bytes(4, 'big')
    return bytes(im)

def test_numbers_of_the_file(client, file, learn):
    "One request with several pictures: the classes and probabilities that the file gives, in the order of the pictures."
    d,files = open_net(file),learn.dls.valid.items[:3]
    status,res = send(client, *[(o.name, o.read_bytes()) for o in files], top=2)
    assert status==200 and res['model']=='birds.pt' and [o['name'] for o in res['pictures']]==[o.name for o in files]
    for f,o in zip(files, res['pictures']):
        want = d.predict(f, 2)
        assert [c['name'] for c in o['classes']]==list(want) and all(abs(c['prob']-want[c['name']])<1e-5 for c in o['classes'])
        assert set(o)=={'name','classes'}

def test_strangers(client, learn):
    "A broken file, an empty one, a bomb, a large one, one that is no photo format and a hostile name spoil nothing for the good one."
    good = learn.dls.valid.items[0].read_bytes()
    huge = good+bytes(250_000)
    status,res = send(client, ('cut.png', good[:len(good)//2]), ('bomb.png', bomb()), ('large.png', huge), ('../..\\<img src=x onerror=alert(1)>.png', good))
    cut,boom,large,fine = res['pictures']
    assert status==200 and 'broken' in cut['error'] and '1,000,000' in boom['error'] and 'at most 0.2' in large['error']
    assert fine['name']=='<img src=x onerror=alert(1)>.png' and len(fine['classes'])==3
    assert [o['error'] for o in send(client, ('empty.jpg', b''), ('x.eps', b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n'))[1]['pictures']] \
        ==['This is not a picture, or it is broken.']*2
    grey = encoded(Image.new('L', (1001,1000)))
    assert '1,001 × 1,000' in send(client, ('g.png', grey))[1]['pictures'][0]['error']

@pytest.mark.parametrize('side', [2_000,12_000,40_000])
def test_bombs_are_not_decoded(client, side, monkeypatch):
    "Pillow warns of some sizes and refuses others; here all of them are one sentence, by the head alone."
    data = bomb(side)
    Image.init() # one of Pillow's own formats draws a picture when it is loaded
    monkeypatch.setattr(Image.Image, 'load', lambda *a: pytest.fail('decoded'))
    assert 'pixels' in send(client, ('bomb.png', data))[1]['pictures'][0]['error']

def test_refused_requests(client, learn):
    "Too many pictures, too much in all, no picture, no form, a wrong `top`: one sentence each and a status of 4xx."
    good = learn.dls.valid.items[0].read_bytes()
    assert send(client, *[(f'{i}.png', good) for i in range(6)])==(400, dict(error='The form cannot be read: Too many files. Maximum number of files is 5.'))
    status,res = send(client, *[(f'{i}.png', bytes(150_000)) for i in range(4)])
    assert status==413 and 'more than 0.5 MB' in res['error']
    r = client.post('/predict', content=(bytes(100_000) for _ in range(8)), headers={'content-type': 'multipart/form-data; boundary=x'}) # says no length
    assert r.status_code in (400,413) and 'error' in r.json()
    assert client.post('/predict', content=good).status_code==400 and 'as a form' in client.post('/predict', content=good).json()['error']
    assert client.post('/predict', content=b'--', headers={'content-type': 'multipart/form-data'}).json()['error'].startswith('The form cannot be read')
    for top in ('0','4','-1','two'): assert send(client, ('a.png', good), top=top)==(400, dict(error=f'`top` is {top!r}: send a whole number from 1 to 3.'))
    assert send(client, top=2)[0]==400
    assert client.get('/predict').status_code==405 and client.get('/../birds.pt').status_code==404

def test_a_visitor_who_leaves(client, caplog):
    "A connection that ends within its pictures is no fault of the server, and leaves no traceback"
    sent = []
    async def receive(): return dict(type='http.disconnect')
    async def send(o): sent.append(o)
    scope = dict(type='http', method='POST', path='/predict', raw_path=b'/predict', query_string=b'', root_path='', scheme='http', http_version='1.1',
        headers=[(b'content-type', b'multipart/form-data; boundary=x'),(b'host', b'127.0.0.1')], server=('127.0.0.1',80), client=('127.0.0.1',1))
    asyncio.run(client.app(scope, receive, send))
    assert sent[0]['status']==400 and not caplog.records

def test_length_is_counted(file, monkeypatch):
    "A body that does not say its length is cut off as soon as it is too long."
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    read,sent = [],[]
    async def receive():
        read.append(len(read))
        return dict(type='http.request', body=bytes(100_000) if read[-1] else head, more_body=len(read)<100)
    async def send(o): sent.append(o)
    scope = dict(type='http', method='POST', path='/predict', raw_path=b'/predict', query_string=b'', root_path='', scheme='http', http_version='1.1',
        headers=[(b'content-type', b'multipart/form-data; boundary=x'),(b'host', b'127.0.0.1')], server=('127.0.0.1',80), client=('127.0.0.1',1))
    asyncio.run(serve_app(file, max_total_mb=.5)(scope, receive, send))
    assert sent[0]['status']==413 and len(read)<10

def test_nothing_is_written(plain, monkeypatch):
    "An upload beyond Starlette's one megabyte in memory makes no file, nor does a name."
    monkeypatch.setattr(tempfile, 'TemporaryFile', lambda *a, **k: pytest.fail('written'))
    big = encoded(Image.effect_noise((1400,1000), 90).convert('RGB'))
    assert len(big)>1_500_000
    assert 'classes' in send(TestClient(serve_app(plain)), ('big.png', big))[1]['pictures'][0]

def jpeg(url):
    assert url.startswith('data:image/jpeg;base64,')
    return Image.open(io.BytesIO(base64.b64decode(url.split(',')[1])))

def test_reasons(client, learn, plain):
    "What the network sees, where it looks, and training pictures; the file without examples has a note instead."
    f = learn.dls.train.items[0]
    o = send(client, (f.name, f.read_bytes()), explain=1)[1]['pictures'][0]
    assert jpeg(o['seen']).size==jpeg(o['looks']).size==(64,64) and o['seen']!=o['looks']
    assert len(o['similar'])==4 and {s['name'] for s in o['similar']}<=set(learn.dls.vocab) and jpeg(o['similar'][0]['picture']).size==(72,72)
    assert o['similar']==sorted(o['similar'], key=lambda s: -s['similarity'])
    without = TestClient(serve_app(plain))
    assert without.get('/model').json()['notes']==['Similar training pictures are not shown: the file has none in it.']
    assert 'similar' not in send(without, (f.name, f.read_bytes()), explain=1)[1]['pictures'][0]

def test_where_and_similar_by_hand(file, learn, monkeypatch):
    "The glow lies where the map is, and each stored picture is found beside its label"
    d = open_net(file)
    ims = list(_training(learn.dls, 2))
    for im,label in ims:
        (name,s,picture),*_ = d.similar(im)
        shown,own = (np.asarray(o.convert('RGB').resize((32,32)), dtype=float) for o in (picture,d.input.open(im)))
        assert name==label and s>.99 and abs(shown-own).mean()<8
    corner = torch.zeros(1,2,2)
    corner[0,0,1] = 1.
    monkeypatch.setattr(explain, 'model_cam', lambda net, x, y: corner)
    seen = np.asarray(explain._seen(d, d.input.batch_of([im])), dtype=float)
    moved = abs(np.asarray(d.where(im), dtype=float)-seen).mean(-1)
    h = len(moved)//4
    assert moved[:h,-h:].mean()>10 and moved[-h:,:h].max()<1

def test_onnx(file, learn, tmp_path):
    "An ONNX file answers the same, without maps and examples, and says so."
    pytest.importorskip('onnxruntime')
    client = TestClient(serve_app(export_onnx(file, tmp_path/'birds.onnx')))
    about = client.get('/model').json()
    assert not about['looks'] and not about['similar'] and 'gives probabilities only' in about['notes'][0]
    f = learn.dls.valid.items[0]
    o = send(client, (f.name, f.read_bytes()), explain=1)[1]['pictures'][0]
    assert set(o)=={'name','classes','seen'}
    want = open_net(file).predict(f)
    assert all(abs(c['prob']-want[c['name']])<1e-4 for c in o['classes'])

def test_page(client):
    "The page, its style and its script, with headers that let it load from here alone."
    r = client.get('/')
    assert r.text==PAGE and "default-src 'none'" in r.headers['content-security-policy'] and r.headers['x-content-type-options']=='nosniff'
    for o in re.findall(r'(?:href|src)="(page[^"]+)"', PAGE): assert client.get(f'/{o}').status_code==200
    assert client.get('/model').json()['classes'][0].startswith('001.')

def test_other_sites(file, learn):
    "A page of another site may not send pictures, and a request by another name of this computer is refused."
    client = TestClient(_only_here(serve_app(file), '127.0.0.1'), base_url='http://127.0.0.1:8000')
    good = ('a.png', learn.dls.valid.items[0].read_bytes())
    assert client.get('/model').status_code==200
    assert client.get('/model', headers=dict(host='evil.example')).status_code==400
    r = client.post('/predict', files=[('files', good)], headers={'sec-fetch-site': 'cross-site'})
    assert r.status_code==403 and 'another site' in r.json()['error']
    assert client.post('/predict', files=[('files', good)], headers={'sec-fetch-site': 'same-origin'}).status_code==200
    assert TestClient(_only_here(serve_app(file), '0.0.0.0')).get('/model', headers=dict(host='lab.example')).status_code==200

def test_command_faults(file, tmp_path, monkeypatch):
    "One sentence that names the fault, and an exit status."
    with pytest.raises(SystemExit, match='cekd-serve: There is no file'): cekd_serve(str(tmp_path/'none.pt'))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(SystemExit, match=f'cekd-serve: cannot listen at 127.0.0.1, port {port} .*: pass another --port'): cekd_serve(str(file), port=port)
    with pytest.raises(SystemExit, match='cekd-serve: cannot listen at no.such.host'): cekd_serve(str(file), host='no.such.host')
    monkeypatch.setitem(sys.modules, 'uvicorn', None)
    with pytest.raises(SystemExit, match='The page needs uvicorn, .*run `pip install starlette uvicorn python-multipart`'): cekd_serve(str(file))

def test_command_listens_here_alone(file, monkeypatch, capsys):
    "Bound to 127.0.0.1 unless a host is given."
    import uvicorn
    bound = []
    monkeypatch.setattr(uvicorn.Server, 'run', lambda self, sockets: bound.append(sockets[0].getsockname()))
    cekd_serve(str(file), port=0)
    assert bound[0][0]=='127.0.0.1' and f'http://127.0.0.1:{bound[0][1]}' in capsys.readouterr().out
    cekd_serve(str(file), host='0.0.0.0', port=0)
    assert bound[1][0]=='0.0.0.0'

def test_formats_and_sizes_are_those_of_predicting(client, file):
    from cekd_fastai.data.image import IMAGE_SUFFIXES
    Image.init()
    im = Image.new('RGB', (60,60), 'red')
    for kind in sorted({Image.EXTENSION[o] for o in IMAGE_SUFFIXES if Image.EXTENSION.get(o) in Image.SAVE}):
        assert 'classes' in send(client, ('a', encoded(im, kind)))[1]['pictures'][0], kind
    with pytest.raises(ValueError, match='Pillow opens none above'): serve_app(file, max_pixels=400_000_000)
