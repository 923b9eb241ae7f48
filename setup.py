"The only reader of settings.ini: hands its fields to setuptools under the names that pyproject.toml lists as dynamic."
from configparser import ConfigParser
from setuptools import setup

cfg = ConfigParser(delimiters='=', interpolation=None)
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(description=cfg['description'], keywords=cfg['keywords'].split(), license_expression=cfg['license'],
    author=cfg['author'], author_email=cfg['author_email'], python_requires=f">={cfg['min_python']}",
    install_requires=cfg['requirements'].split(), extras_require=dict(dev=cfg['dev_requirements'].split(),
        heic=cfg['heic_requirements'].split(), check=cfg['check_requirements'].split(),
        onnx=cfg['onnx_requirements'].split(), serve=cfg['serve_requirements'].split()), # chkstyle: ignore
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['cekd_fastai=cekd_fastai._modidx:d']})
