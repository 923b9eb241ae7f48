"""Gather what a bare machine with Python, torch and timm needs to run the checks: `python benchmarks/gpu/prepare.py`.

It writes `.gpu/wheels` (fastai and its small dependencies), `.gpu/kit` (the library, the checks, the cells of notebooks,
tests, a few small photographs where an archive of CIFAR-100 is at hand, all 200 species of CUB at 128 px and the weights of
EfficientNet-Lite0 where their archives are) and `.gpu/kit/run.sh`, which installs and runs. Both are under 60 MB together."""
import argparse,json,os,shutil,subprocess,sys,tarfile
from importlib import metadata
from pathlib import Path
from cells import all_cuda_cells,missing_names,files_of_tests

repo = Path(__file__).resolve().parents[2]
MOST = 60 # MB of wheels and kit
STUDY = repo/'benchmarks'/'cekd' # the study on birds
STUDIED = ('birds.py','birds_plan.py','birds_bundle.py','birds_pool.py','birds_queue.py','birds_tables.py','birds_train.py','variants.py','folded.py','goes_on.py','graphed.py','birds.json','birds200.json') # what it needs
CARRIED = ['fastai','fastcore','fasttransform','fastdownload','fastprogress','python-fasthtml','plum-dispatch','beartype','starlette','itsdangerous','python-multipart',
    'httpx2','httpcore2','truststore']
# What the machine has; the check below lets nothing else be imported.
GIVEN = ['torch','torchvision','timm','triton','numpy','pandas','scipy','scikit-learn','matplotlib','pillow','requests','pyyaml','packaging','cloudpickle','rich','typing-extensions',
    'safetensors','huggingface-hub','accelerate','psutil','anyio','h11','idna','certifi','pytest','urllib3','charset-normalizer','tqdm','filelock','fsspec','sympy','mpmath','jinja2',
    'markupsafe','networkx','setuptools','python-dateutil','six','cycler','kiwisolver','pyparsing','contourpy','fonttools','joblib','threadpoolctl','markdown-it-py','mdurl','pygments',
    'narwhals','cuda-bindings','cuda-pathfinder','cuda-toolkit','iniconfig','pluggy']
PLATFORMS = [f'--platform={o}' for o in ('manylinux_2_28_x86_64','manylinux_2_17_x86_64','manylinux2014_x86_64')]

RUN = '''#!/usr/bin/env bash
# Installs the wheels beside this folder for this machine's python3 and runs the checks; all arguments are theirs.
set -euo pipefail
cd "$(dirname "$0")"
site=${SITE:-/tmp/gpu-kit-site}
[ -d "$site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" ../wheels/*.whl
export PYTHONPATH=$site:$PWD/src
exec python3 src/benchmarks/gpu/run.py "$@"
'''

IMPORTS = '''
import sys,importlib.metadata as md
from importlib.util import spec_from_loader
allowed = {o.lower().replace('_','-') for o in sys.argv[1].split(',')}
tops = {k:{o.lower().replace('_','-') for o in v} for k,v in md.packages_distributions().items()}
class Refuse: # what only looks for a module goes on, what imports it ends
    def create_module(self, spec): raise ModuleNotFoundError(f'No module named {spec.name!r} on the machine', name=spec.name)
    def exec_module(self, module): pass
    def find_spec(self, name, path=None, target=None):
        top = name.partition('.')[0]
        if top in tops and not tops[top]&allowed and top not in ('cekd_fastai','_distutils_hack','pkg_resources','fixtures'): return spec_from_loader(name, self)
sys.meta_path.insert(0, Refuse())
from fastai.vision.all import *
from fastai.callback.channelslast import ChannelsLast
import names
names.modules()
import pytest
'''

def wheels(folder):
    "Download the wheels that the folder lacks, in the versions of this environment"
    folder.mkdir(parents=True, exist_ok=True)
    have = [o.name.lower().replace('_', '-') for o in folder.glob('*.whl')]
    need = [f'{o}=={metadata.version(o)}' for o in CARRIED if not any(h.startswith(f'{o}-{metadata.version(o)}-') for h in have)]
    if not need: return
    cmd = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--python-version', '3.12', '--implementation', 'cp', *PLATFORMS, '-d', str(folder)]
    subprocess.run(cmd+need, check=True)

def photographs(archive, dest, n_classes=20, n_train=20, n_test=5):
    "A few small photographs in class folders, `train` and `valid`"
    counts = {}
    with tarfile.open(archive) as f:
        members = sorted((o for o in f.getmembers() if o.isfile() and o.name.endswith('.png')), key=lambda o: o.name)
        classes = sorted({Path(o.name).parent.name for o in members})[:n_classes]
        for o in members:
            part,c = Path(o.name).parts[-3:-1]
            k,n = (part,c),n_train if part=='train' else n_test
            if c not in classes or counts.get(k, 0)>=n: continue
            counts[k] = counts.get(k, 0)+1
            file = dest/('train' if part=='train' else 'valid')/c/Path(o.name).name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(f.extractfile(o).read())

def species(folder, dest):
    "All 200 species and the weights for the study, if `folder` has their archives; packed once"
    sys.path.insert(0, str(STUDY))
    import birds_bundle,birds_plan
    if (dest/'birds.npz').exists(): return birds_bundle.note_commit(dest)
    if all((folder/f'{o}.tgz').is_file() for o in ('CUB_200_2011','weights-efficientnet-lite')): birds_bundle.pack(birds_plan.read_config('birds200'), folder, dest)

def copy(src, dest): shutil.copytree(src, dest, ignore=shutil.ignore_patterns('__pycache__','*.pyc'))

if __name__=='__main__':
    data = Path(os.environ.get('CEKD_DATA') or repo.parent/'shared'/'data')
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=repo/'.gpu'/'kit')
    p.add_argument('--wheels', type=Path, default=repo/'.gpu'/'wheels')
    p.add_argument('--pictures', type=Path, default=data/'cifar100-mini.tgz', help='archive with train/CLASS/*.png and test/CLASS/*.png')
    p.add_argument('--birds', type=Path, default=data, help='folder with CUB_200_2011.tgz and weights-efficientnet-lite.tgz')
    a = p.parse_args()
    wheels(a.wheels)
    packed = a.out.parent/'birds200'
    species(a.birds, packed)
    shutil.rmtree(a.out, ignore_errors=True)
    src = a.out/'src'
    copy(repo/'cekd_fastai', src/'cekd_fastai')
    copy(repo/'benchmarks'/'gpu', src/'benchmarks'/'gpu')
    (src/'benchmarks'/'cekd').mkdir()
    for o in STUDIED: shutil.copy(STUDY/o, src/'benchmarks'/'cekd'/o)
    (src/'tests').mkdir()
    for o in files_of_tests(repo/'tests'): shutil.copy(o, src/'tests'/o.name)
    parts = all_cuda_cells(repo/'nbs')
    for o in parts:
        if lost := missing_names(o): print(f"WARNING: {o['notebook']}: its `#| cuda` cells cannot run, for want of {lost}")
    (src/'benchmarks'/'gpu'/'cells.json').write_text(json.dumps(parts, indent=1))
    if a.pictures.is_file(): photographs(a.pictures, a.out/'data'/'pictures')
    if packed.is_dir(): shutil.copytree(packed, a.out/'data'/'birds')
    (a.out/'run.sh').write_text(RUN)
    (a.out/'run.sh').chmod(0o755)
    env = dict(os.environ, PYTHONPATH=f"{src}{os.pathsep}{src/'benchmarks'/'gpu'}")
    subprocess.run([sys.executable, '-W', 'ignore', '-c', IMPORTS, ','.join(CARRIED+GIVEN)], check=True, env=env)
    size = lambda d: sum(o.stat().st_size for o in d.rglob('*') if o.is_file())/2**20
    if (total := size(a.out)+size(a.wheels))>MOST: sys.exit(f'prepare: wheels and kit have {total:.1f} MB, more than {MOST}.')
    print(f'{a.out}: {size(a.out):.1f} MB; {a.wheels}: {size(a.wheels):.1f} MB; {len(parts)} notebooks with cells for a GPU')
