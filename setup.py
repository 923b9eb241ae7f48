"The only reader of settings.ini: hands its fields to setuptools under the names that pyproject.toml lists as dynamic."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

cfg = ConfigParser(delimiters='=', interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

def absolute(text, version):
    "A Markdown page for PyPI, which shows no picture and follows no link that is relative: those of the release on GitHub"
    home,raw = 'https://github.com/cekd-fastai/cekd_fastai/blob','https://raw.githubusercontent.com/cekd-fastai/cekd_fastai'
    def target(m): return f"]({raw if m[1].endswith(('.svg','.png')) else home}/v{version}/{m[1]})"
    return re.sub(r'\]\((?!https?:|#|mailto:)([^)]+)\)', target, text)

version = re.search(r'__version__ = "(.+)"', Path('cekd_fastai/__init__.py').read_text(encoding='utf-8'))[1]
page = absolute(Path('README.md').read_text(encoding='utf-8'), version)

setup(description=cfg['description'], long_description=page, long_description_content_type='text/markdown',
    keywords=cfg['keywords'].split(), license_expression=cfg['license'],
    author=cfg['author'], author_email=cfg['author_email'], python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(), extras_require=dict(dev=cfg['dev_requirements'].split(),
        heic=cfg['heic_requirements'].split(), check=cfg['check_requirements'].split(),
        onnx=cfg['onnx_requirements'].split(), serve=cfg['serve_requirements'].split()), # chkstyle: ignore
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['cekd_fastai=cekd_fastai._modidx:d']})
