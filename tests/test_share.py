"The folder and the card of a network, there and back: locally, over a small server that stands in for the hub, and without a network."
import http.server,socket,threading,time
from pathlib import Path
from types import SimpleNamespace
import huggingface_hub,pytest,torch
from fastai.vision.all import BCEWithLogitsLossFlat,accuracy,set_seed
from cekd_fastai.all import CutMix,branch_learner,fine_grained_dls,make_birds
from cekd_fastai.share import from_hub,to_hub

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    birds = make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=3, n_images=10, n_train=6, size=48, progress=False)
    set_seed(1)
    return branch_learner(fine_grained_dls(birds, size=32, bs=8, num_workers=0), 'test_resnet', pretrained=False, metrics=accuracy, cbs=CutMix())

@pytest.fixture(scope='module')
def folder(learn, tmp_path_factory): return to_hub(learn, folder=tmp_path_factory.mktemp('hub')/'finches', about='Drawn | birds.', k=2)

def same(learn, d):
    with learn.no_bar(): p = learn.get_preds()[0]
    return (d(learn.dls.valid.items)-p).abs().max()<1e-3

def test_folder_there_and_back(learn, folder):
    assert sorted(o.name for o in folder.iterdir())==['README.md','model.pt'] and same(learn, from_hub(folder))

def test_card(learn, folder):
    "Its numbers are those of the learner, its head is what the hub reads, and its code names the file."
    card = huggingface_hub.ModelCard.load(folder/'README.md')
    with learn.no_bar(): acc,(p,y) = learn.validate()[1],learn.get_preds()
    n = len(y)
    assert card.data.library_name=='cekd_fastai' and card.data.eval_results[0].metric_value==round(acc, 4)
    assert f'**Accuracy {acc:.1%} ± {(acc*(1-acc)/n)**.5:.1%}** (standard error) on {n} validation pictures of 3 classes.' in card.text
    for i,name in enumerate(learn.dls.vocab):
        of,right = (y==i).sum(),((y==i)&(p.argmax(1)==i)).sum()
        assert f'| {name} | {of} | {right/of:.2f} |' in card.text
    assert "from_hub('path/to/finches')" in card.text and 'Drawn | birds.' in card.text and '| arch | test_resnet |' in card.text and '| callbacks | CutMix |' in card.text
    wrong = (p.argmax(1)!=y).sum()
    assert ('## Confused pairs\n\n| a | b | errors | images |' in card.text) == bool(wrong)

def test_upload(learn, monkeypatch):
    "What is sent: a repository that nobody else sees, two files, and nothing else."
    sent = {}
    monkeypatch.setattr('cekd_fastai.share._out_of_reach', lambda url: None)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    def make(self, repo, private, exist_ok):
        sent.update(repo=repo, private=private)
        return f'https://huggingface.co/{repo}'
    def upload(self, repo_id, folder_path, allow_patterns, **kw):
        folder = Path(folder_path)
        sent.update(files=sorted(o.name for o in folder.iterdir()), card=(folder/'README.md').read_text())
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', make)
    monkeypatch.setattr(huggingface_hub.HfApi, 'upload_folder', upload)
    assert to_hub(learn, 'me/finches')=='https://huggingface.co/me/finches'
    assert (sent['repo'],sent['private'],sent['files'])==('me/finches',True,['README.md','model.pt']) and "from_hub('me/finches')" in sent['card']
    def refused(*a, **k): raise huggingface_hub.errors.LocalTokenNotFoundError('Token is required, but no token found.')
    monkeypatch.setattr(huggingface_hub.HfApi, 'create_repo', refused)
    with pytest.raises(ValueError, match='The hub refused .*hf auth login'): to_hub(learn, 'me/finches')

class Hub(http.server.BaseHTTPRequestHandler):
    "What the hub answers to a download of `model.pt`."
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def answer(self, body):
        data = self.server.file if self.path.split('?')[0] in ('/','/me/finches/resolve/main/model.pt') else None
        self.send_response(200 if data else 404)
        for k,v in {'ETag':'"abc"', 'X-Repo-Commit':'a'*40, 'Content-Length':len(data or b''), **({} if data else {'X-Error-Code':'RepoNotFound'})}.items(): self.send_header(k, str(v))
        self.end_headers()
        if body and data: self.wfile.write(data)
    def log_message(self, *args): pass

def test_download(learn, folder, tmp_path, monkeypatch):
    "From a server; a second time from what was downloaded, with a warning, when it is gone; a name that is not there is one sentence."
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.file = (folder/'model.pt').read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}'
    try:
        assert same(learn, from_hub('me/finches', endpoint=url))
        with pytest.raises(ValueError, match='no such repository, or it is private'): from_hub('me/sparrows', endpoint=url)
    finally:
        server.shutdown()
        server.server_close()
    with pytest.warns(UserWarning, match='out of reach .*Using the copy'): d = from_hub('me/finches', endpoint=url)
    assert same(learn, d)

@pytest.mark.parametrize('kind', ['closed','silent','nameless','offline'])
def test_out_of_reach(learn, kind, monkeypatch):
    "One sentence within ten seconds, whatever is wrong with the way."
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', kind=='offline')
    monkeypatch.setattr('cekd_fastai.share._SECONDS', 1)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        if kind=='silent': s.listen()
        url = 'http://no-such-host.invalid' if kind=='nameless' else f'http://127.0.0.1:{s.getsockname()[1]}'
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r'The hub at http\S+ is out of reach .*: write a folder with `to_hub'): to_hub(learn, 'me/finches', endpoint=url)
        with pytest.raises(ConnectionError, match='out of reach .*: pass a folder that `to_hub` wrote'): from_hub('me/none', endpoint=url)
        assert time.monotonic()-start<10

def test_refusals(learn, tmp_path):
    with pytest.raises(ValueError, match='needs `repo`'): to_hub(learn)
    with pytest.raises(ValueError, match='k=0'): to_hub(learn, folder=tmp_path/'x', k=0)
    with pytest.raises(FileNotFoundError, match='has no `model.pt`'): from_hub(tmp_path)
    before = learn.loss_func
    learn.loss_func = BCEWithLogitsLossFlat()
    try:
        with pytest.raises(ValueError, match='one class a picture'): to_hub(learn, folder=tmp_path/'x')
    finally: learn.loss_func = before
    assert not (tmp_path/'x').exists()

def test_a_hub_that_goes_away(monkeypatch):
    "It answers, and then the connection breaks: no word of a repository without a network"
    monkeypatch.setattr('cekd_fastai.share._out_of_reach', lambda url: None)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    def broken(*args, **kwargs): raise huggingface_hub.errors.LocalEntryNotFoundError('the connection was lost')
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', broken)
    with pytest.raises(ConnectionError, match='answered, and then was out of reach'): from_hub('me/finches')

def test_networks_of_others():
    with pytest.raises(ValueError, match='make the learner with `branch_learner`'): to_hub(SimpleNamespace(model=torch.nn.Linear(1, 1)), folder='x')
