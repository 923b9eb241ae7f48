"What a user hands over (folders, sheets, pictures, files) is taken for what it is, or refused in one sentence."
import pytest,torch
from fastai.vision.all import SGD,Image,get_image_files,noop,np,pd,set_seed,tensor
from fastai.vision.core import TensorImage
from cekd_fastai.all import Deployed,branch_learner,deploy,export_onnx,fine_grained_dls,make_birds,official_test_dl,open_image,read_table
from cekd_fastai.cli import _defaults
from cekd_fastai.files import read_torch
from cekd_fastai.job import with_recipe
from cekd_fastai.quantize import quantize_onnx

def draw(root, *names, n=4):
    for k,name in enumerate(names):
        (root/name).mkdir(parents=True, exist_ok=True)
        for i in range(n): Image.fromarray(np.full((12,12,3), 20*k+i, np.uint8)).save(root/name/f'{i}.png')
    return root

@pytest.fixture(scope='module')
def birds(tmp_path_factory): return make_birds(tmp_path_factory.mktemp('birds'), n_species=3, n_images=14, size=48, n_train=10, progress=False)

def made(birds, path, **kw):
    set_seed(kw.pop('seed', 0))
    dls = fine_grained_dls(birds, size=32, bs=8, num_workers=0, path=path)
    learn = branch_learner(dls, 'test_resnet', pretrained=False, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    return learn

@pytest.mark.parametrize('part', ['test','val','Validation'])
def test_pictures_laid_aside_beside_the_classes(tmp_path, part):
    root = draw(tmp_path, 'a', 'b', f'{part}/a', f'{part}/b')
    with pytest.raises(ValueError, match=f'has classes and {part}/ with a, b again: move the classes into .*train'): read_table(root)
    (root/'train').mkdir()
    for o in 'ab': (root/o).rename(root/'train'/o)
    assert read_table(root).classes==['a','b']

def test_a_class_called_test(tmp_path):
    with pytest.warns(UserWarning, match='test/ of .* is taken for a class'): assert len(read_table(draw(tmp_path, 'plane', 'test')).classes)==2

@pytest.mark.parametrize('opt', [None,SGD])
def test_weights_that_a_trained_learner_saved(birds, tmp_path, opt):
    learn = made(birds, tmp_path, **({} if opt is None else dict(opt_func=opt)))
    file = learn.save('s')
    net = branch_learner(learn.dls, 'test_resnet', weights=file).model
    for a,b in zip(net.trunk.parameters(), learn.model.trunk.parameters()): assert torch.equal(a, b)

def test_a_placeholder_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return (print, ('run',))
    for o in (Evil(),[np.dtype('f8'),Evil()]):
        torch.save(dict(model={'a':tensor(1.)}, opt=o), tmp_path/'evil.pt')
        with pytest.raises(ValueError, match='it is no file of torch, or holds objects'): read_torch(tmp_path/'evil.pt')

def test_a_table_is_of_the_network_that_was_read(birds, tmp_path):
    pictures,file,csv = get_image_files(birds)[:3],tmp_path/'n.pt',tmp_path/'o.csv'
    deploy(made(birds, tmp_path), file)
    d = Deployed(file)
    deploy(made(birds, tmp_path, seed=1), file)
    d.predict_folder(pictures, csv=csv)
    with pytest.raises(ValueError, match='has answers of'): Deployed(file).predict_folder(pictures, csv=csv)

@pytest.mark.parametrize('kw,near', [(dict(valid_pc=.3), "did you mean 'valid_pct'"),(dict(item_tfm=noop), "did you mean 'item_tfms'"),(dict(label_dlim=' '), 'label_dlim')])
def test_an_argument_that_no_loader_knows(birds, kw, near):
    with pytest.raises(TypeError, match=near): fine_grained_dls(birds, size=32, bs=8, **kw)

def test_arguments_of_the_loaders_pass(birds): assert fine_grained_dls(birds, size=32, bs=8, num_workers=0, val_bs=5, drop_last=False, device='cpu').valid.bs==5

@pytest.mark.parametrize('most,want', [(200,200),(1023,255),(4095,255),(16383,255),(65535,255),(2**31-1,255)])
def test_bits_of_a_deep_picture(most, want):
    a = np.linspace(0, most, 64).reshape(8,8)
    im = Image.fromarray(a.astype(np.uint16 if most<2**16 else np.int32))
    res = np.asarray(open_image(im))[...,0]
    assert res.max()==want and len(np.unique(res))>60

def test_a_float_picture_of_fastai(): assert np.asarray(open_image(TensorImage(torch.ones(3, 4, 4)))).min()==255

def sheet(root, **columns): return pd.DataFrame(dict(file=[f'{o}/{i}.png' for o in 'ab' for i in range(4)]) | columns)

def test_a_sheet_with_train_and_test(tmp_path):
    draw(tmp_path, 'a', 'b')
    df = sheet(tmp_path, breed=list('aaaabbbb'), split=['train','train','train','test']*2)
    t = read_table(df, folder=tmp_path, valid_col='split', label_col='breed')
    assert (t.n_train, t.n_valid, t.n_test)==(6,2,0)
    t = read_table(df, folder=tmp_path, valid_col='split', label_col='breed', valid_pct=.3)
    assert (t.n_train, t.n_valid, t.n_test)==(4,2,2)

def test_a_sheet_of_pictures_elsewhere(tmp_path):
    draw(tmp_path/'photos', 'a', 'b')
    df,file = sheet(tmp_path, label=list('aaaabbbb')),tmp_path/'lists'/'x.csv'
    file.parent.mkdir()
    df.assign(file=[str(tmp_path/'photos'/o) for o in df.file]).to_csv(file, index=False)
    with pytest.raises(ValueError, match='or pass the folder that holds them, folder= of a CSV file'): read_table(file)
    assert len(read_table(file, folder=tmp_path/'photos'))==8

def test_the_label_is_no_other_column(tmp_path):
    draw(tmp_path, 'a', 'b')
    y,parts = list('aaaabbbb'),[False,False,False,True]*2
    for df in (sheet(tmp_path, is_valid=parts, breed=y), sheet(tmp_path, breed=y)[['breed','file']], sheet(tmp_path, **{'2024':y})):
        assert read_table(df, folder=tmp_path).classes==['a','b']
    assert read_table(sheet(tmp_path, z=['x','y']*4, **{'2024':y}), folder=tmp_path, label_col=2024).classes==['a','b']
    with pytest.raises(ValueError, match="'split' would be the labels, but it names parts: pass valid_col='split'"): read_table(sheet(tmp_path, split=['train','test']*4, breed=y), folder=tmp_path)
    with pytest.raises(ValueError, match='has no column of labels beside file: pass fn_col= and label_col='): read_table(sheet(tmp_path), folder=tmp_path)

def test_a_class_of_one_picture_in_a_sheet(tmp_path):
    draw(tmp_path, 'a', 'b')
    with pytest.warns(UserWarning, match='no validation image of c, which has one image alone'): read_table(sheet(tmp_path, label=list('aaaabbbc')), folder=tmp_path)

def test_a_folder_with_the_name_of_a_benchmark(tmp_path, monkeypatch):
    draw(tmp_path/'dogs', 'a', 'b')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('cekd_fastai.data.benchmarks.fetch_url', lambda *args, **kw: (_ for _ in ()).throw(ConnectionError('no network')))
    with pytest.warns(UserWarning, match="for the folder here write './dogs'"), pytest.raises(ConnectionError): fine_grained_dls('dogs')
    assert read_table('./dogs').classes==['a','b']

def test_a_table_beside_a_recipe(tmp_path):
    args = _defaults() | dict(data=sheet(tmp_path), recipe='cekd-cub-resnet101')
    assert with_recipe(args, _defaults())['data'] is args['data']

def test_loaders_without_a_table():
    with pytest.raises(ValueError, match='`dls` knows no parts: build it with `fine_grained_dls`'): official_test_dl(object())

def test_remedies_that_exist(birds, tmp_path):
    (tmp_path/'x.png').write_bytes(b'x')
    with pytest.raises(OSError, match='replace or delete it$'): open_image(tmp_path/'x.png')
    with pytest.raises(FileNotFoundError, match='check the path$'): open_image(tmp_path/'y.png')
    with pytest.raises(ValueError, match='no file of torch'): Deployed(tmp_path/'x.png')
    dls = fine_grained_dls(birds, size=32, bs=8, num_workers=0)
    dls.train_ds.items[0] = tmp_path/'x.png'
    with pytest.raises(OSError, match='or leave such files out with verify=True'): dls.train_ds[0]

def test_a_suffix_says_who_wrote_the_file(birds, tmp_path):
    learn = made(birds, tmp_path)
    for o in ('n.onnx','n.pt2'):
        with pytest.raises(ValueError, match='has the suffix of a file of `export_'): deploy(learn, tmp_path/o)
    with pytest.raises(ValueError, match='give it the suffix .onnx'): export_onnx(learn, tmp_path/'n.pt')
    assert not list(tmp_path.glob('n.*'))

def test_pictures_to_calibrate_with(birds, tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime')
    file = export_onnx(made(birds, tmp_path), tmp_path/'n.onnx')
    monkeypatch.setenv('HOME', str(birds))
    one = get_image_files(birds)[0]
    for o in ('~/images',one,[one]): quantize_onnx(file, o, n=2, n_valid=2)
