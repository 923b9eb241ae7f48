"Backbones from the Hugging Face hub and from folders of timm: built, deployed under the name of their architecture, refused in one sentence"
import json,time
import pytest,timm,torch
from timm.models import save_for_hf
from cekd_fastai import hub
from cekd_fastai.branches import branch_net,load_net,peer_net,save_net

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A model of timm as it lies on the hub, made with an argument of its own"
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=4, stem_width=8)
    res = tmp_path_factory.mktemp('shared')/'model'
    save_for_hf(model, res, model_args=dict(stem_width=8), safe_serialization=True)
    return res,model

@pytest.fixture
def no_network(monkeypatch, tmp_path):
    "A hub at an address where nobody listens, and an empty store"
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path/'store'))
    monkeypatch.setattr(hub, '_asked', {})
    return tmp_path/'store'

def fetched(store, name, folder):
    "Put the files of a folder where a download of `name` leaves them"
    where = store/f"models--{name.replace('/', '--')}"
    there = where/'snapshots'/'abc'
    there.mkdir(parents=True)
    (where/'refs').mkdir()
    (where/'refs'/'main').write_text('abc')
    for o in folder.iterdir(): (there/o.name).write_bytes(o.read_bytes())

def test_from_the_hub(folder, no_network, tmp_path):
    "Weights of a model that was fetched before, and a file that is built again without hub, folder or address"
    folder,model = folder
    fetched(no_network, 'someone/birds', folder)
    net = branch_net('hf-hub:someone/birds', 3).eval()
    assert torch.equal(net.trunk[0][0].weight, model.conv1[0].weight) and net.recipe['arch']=='test_resnet' and net.recipe['stem_width']==8
    save_net(net, tmp_path/'net.pt')
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load_net(tmp_path/'net.pt')[0](x), net(x))
    assert net.trunk.facts['stats'] is not None

def test_from_a_folder(folder):
    "A folder, alone and among peers"
    name = f'local-dir:{folder[0]}'
    assert branch_net(name, 3).recipe['arch']=='test_resnet'
    recipe = peer_net([name,'test_resnet'], 3, pretrained=False).recipe
    assert recipe['archs']==['test_resnet','test_resnet']
    assert recipe['arch_args'][0]['stem_width']==8 and recipe['arch_args'][1]=={}

@pytest.mark.parametrize('pretrained', [True,False])
def test_without_network(no_network, pretrained, capfd):
    "One sentence within seconds"
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match='The description or weights of `hf-hub:timm/resnet18.a1_in1k` could not be downloaded .*name of its architecture') as e:
        branch_net('hf-hub:timm/resnet18.a1_in1k', 3, pretrained=pretrained)
    assert time.perf_counter()-start<10 and '\n' not in str(e.value) and 'Retry' not in capfd.readouterr().err

def test_no_such_model(tmp_path):
    "A folder without a model, and one of a model that timm does not have"
    with pytest.raises(ValueError, match='is no folder with a model of timm'): branch_net(f'local-dir:{tmp_path}', 3)
    (tmp_path/'config.json').write_text(json.dumps(dict(architecture='resnet_of_2040', pretrained_cfg={})))
    with pytest.raises(ValueError, match='of an architecture that this timm does not know'): branch_net(f'local-dir:{tmp_path}', 3)
