"A browser, JupyterLab as `make lab` starts it, and the site as `make docs` makes it; all of it is skipped unless `make test-browser` runs it."
import json,os,shlex,signal,socket,subprocess,sys,threading,time,urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler,ThreadingHTTPServer
from pathlib import Path
import pytest

root = Path(__file__).resolve().parents[2]
token = 'browser-test'

def pytest_collection_modifyitems(items):
    "Mark what needs a browser, so that `make test` passes without one."
    if os.environ.get('CEKD_BROWSER'): return
    for o in items:
        if Path(__file__).parent in Path(o.path).parents: o.add_marker(pytest.mark.skip(reason='needs a browser: run `make test-browser`'))

@pytest.fixture(scope='session')
def shots():
    "The folder for screenshots and the log of JupyterLab, which git ignores."
    d = root/'runs'/'browser'
    d.mkdir(parents=True, exist_ok=True)
    return d

@pytest.fixture(scope='session')
def browser():
    "Chromium, without a window."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=os.environ['CEKD_BROWSER'], args=['--no-sandbox'] if os.name=='posix' and os.geteuid()==0 else [])
        yield b
        b.close()

def free_port():
    "A port that nobody listens on."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

# Every cell in the page, nothing saved behind our back, no questions about news.
settings = {'notebook-extension/tracker': dict(windowingMode='none'), 'docmanager-extension/plugin': dict(autosave=False),
    'apputils-extension/notification': dict(checkForUpdates=False, fetchNews='false')}

def make_home(d):
    "A user with settings for the test and kernels of their own by the name python3, which start nothing."
    for k,v in settings.items():
        f = d/'.jupyter'/'lab'/'user-settings'/'@jupyterlab'/f'{k}.jupyterlab-settings'
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(v))
    for o in ('.local/share/jupyter', 'shadow'):
        f = d/o/'kernels'/'python3'/'kernel.json'
        f.parent.mkdir(parents=True)
        f.write_text(json.dumps(dict(argv=['false', '{connection_file}'], display_name='Another', language='python')))

@pytest.fixture(scope='session')
def lab(tmp_path_factory, shots):
    "Function from a path to its address in a JupyterLab that `make lab` started, in the home of such a user."
    home,port = tmp_path_factory.mktemp('home'),free_port()
    make_home(home)
    args = ['--no-browser', '--allow-root', f'--port={port}', '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}', '--expose-app-in-browser',
        f'--FileCheckpoints.checkpoint_dir={home}/checkpoints']
    env = {**os.environ, 'HOME': str(home), 'JUPYTER_PATH': str(home/'shadow'), 'JUPYTER_PREFER_ENV_PATH': '0', 'IN_TEST': '1'}
    log = shots/'lab.log'
    with open(log, 'w') as f:
        proc = subprocess.Popen(['make', '--no-print-directory', 'lab', f'LAB_ARGS={shlex.join(args)}'], cwd=root, env=env, stdout=f, stderr=f,
            stdin=subprocess.DEVNULL, start_new_session=True)
    url = f'http://127.0.0.1:{port}'
    try:
        wait_for(f'{url}/api', proc, log)
        yield lambda path: f'{url}/{path}?token={token}'
    finally:
        os.killpg(proc.pid, signal.SIGTERM)
        proc.wait(60)

def wait_for(url, proc, log, seconds=300):
    "Return once `url` answers; fails with the end of the log if the process ends or time is up."
    for _ in range(seconds):
        try: return urllib.request.urlopen(url).close()
        except OSError: time.sleep(1)
        if proc.poll() is not None: break
    pytest.fail(f'{url} does not answer:\n' + '\n'.join(log.read_text().splitlines()[-20:]))

class Quiet(SimpleHTTPRequestHandler):
    "A file server that writes no log."
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Address and folder of the freshly made site, served below a path as GitHub Pages does."
    d = tmp_path_factory.mktemp('site')
    dest = d/'cekd_fastai'
    res = subprocess.run([sys.executable, 'tools/docs.py', str(dest)], cwd=root, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(d)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/cekd_fastai', dest
    server.shutdown()
