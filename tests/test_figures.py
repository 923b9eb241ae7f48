"Pictures show themselves where they are drawn, in the middle of a cell or at its end, and once."
import matplotlib,pytest
from matplotlib import pyplot as plt
from fastai.vision.all import accuracy
from cekd_fastai.all import CEKD,SnapMix,branch_learner,confused_pairs,fine_grained_dls,history,make_birds,report
from cekd_fastai.branches import branch_preds

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    birds = make_birds(tmp_path_factory.mktemp('drawn')/'birds', n_species=3, n_images=6, n_train=4, size=48, progress=False)
    dls = fine_grained_dls(birds, size=32, bs=8, num_workers=0)
    learn = branch_learner(dls, 'test_resnet', pretrained=False, metrics=accuracy, cbs=[SnapMix(),CEKD()])
    with learn.no_bar(),learn.no_logging(): learn.fit(1)
    return learn

@pytest.fixture
def cell():
    "Run a cell in a shell whose pictures go into the notebook; returns how many it showed."
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    before,shell = matplotlib.get_backend(),InteractiveShell.instance()
    matplotlib.use('module://matplotlib_inline.backend_inline')
    def run(code, **names):
        shell.push(names)
        with capture_output() as out: res = shell.run_cell(code, store_history=True)
        res.raise_error()
        return sum('image/png' in o.data for o in out.outputs)
    yield run
    matplotlib.use(before)
    InteractiveShell.clear_instance()

def pictures(learn):
    z,_,y = branch_preds(learn)
    pairs = confused_pairs(z, y, learn.dls.vocab)
    return dict(mix=lambda: learn.snap_mix.show(2), report=lambda: report(learn, history(learn), pairs))

@pytest.mark.parametrize('name', ['mix','report'])
def test_shown_once(learn, cell, name):
    f = pictures(learn)[name]
    assert cell('f()\n1+1', f=f)==1 # in the middle
    assert cell('f()')==1 # at the end
    assert cell('fig = f()\nfig')==1 # named, and at the end
    assert cell('fig')==1 and cell('fig')==1 # in later cells
    assert cell('fig.savefig("/dev/null", format="png")')==0 and plt.get_fignums()==[]

def test_without_a_notebook(learn):
    "The figure is returned, closed and silent."
    fig = learn.snap_mix.show(2)
    assert type(fig) is plt.Figure and plt.get_fignums()==[]
