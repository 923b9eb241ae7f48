"""Run tests/browser with the Chromium of this machine: python tools/browser.py [arguments of pytest]
`CHROME` names a browser. Without one, root installs Debian's if apt is there, and anybody else is told and gets 0."""
import os,shutil,subprocess,sys
from importlib.util import find_spec
from pathlib import Path

root = Path(__file__).resolve().parent.parent
names = 'chromium','chromium-browser','google-chrome','google-chrome-stable'

def chromium(
    install=True, # install it with apt, where that is possible?
):
    "Path of a browser of Chromium's family, or None."
    if named := os.environ.get('CHROME'):
        if not shutil.which(named): sys.exit(f'CHROME={named} is no program: name the browser by its path.')
        return shutil.which(named)
    if found := next(filter(None, map(shutil.which, names)), None): return found
    if install and hasattr(os, 'geteuid') and os.geteuid()==0 and shutil.which('apt-get'):
        print('Installing chromium with apt-get', flush=True)
        for cmd in ('update', 'install -y --no-install-recommends chromium'):
            subprocess.run(['apt-get', '-qq', *cmd.split()], env={**os.environ, 'DEBIAN_FRONTEND': 'noninteractive'}, stdout=subprocess.DEVNULL)
        return chromium(install=False)

def main(
    args, # passed on to pytest
):
    "Exit code of pytest, or 0 where there is nothing to test with."
    if not find_spec('playwright'): return print('Browser tests skipped: install the package playwright (`make install` does).') or 0
    if not (chrome := chromium()): return print(f'Browser tests skipped: no Chromium. Install one, or name it as in `CHROME=/path/to/chrome make test-browser`.') or 0
    cmd = [sys.executable, '-m', 'pytest', 'tests/browser', *args]
    return subprocess.run(cmd, cwd=root, env={**os.environ, 'CEKD_BROWSER': chrome}, stdin=subprocess.DEVNULL).returncode

if __name__=='__main__': sys.exit(main(sys.argv[1:]))
