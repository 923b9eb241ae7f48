# make            prints the targets
# make train      installs once into .venv, then trains
# PYTHON=...      names the interpreter that .venv is made with (default: the first suitable one on PATH)
SHELL := bash
BIN := .venv/bin
PY := $(BIN)/python
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help install train test test-browser prepare lab edit docs constraints clean

help: ## print the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: ## make .venv with the package and its pinned dependencies
	@tools/install.sh

# glibc gives large arrays back to the system after each use, and gets them again page by page: to keep them saves a seventh of the time on a processor.
train: install ## train: the main job, with nothing but this command
	@MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000 $(PY) benchmarks/make_train.py

test: install ## run every check: style, sync, docs, wheel, notebooks, pytest
	@$(PY) tools/check.py

test-browser: install ## run lessons in JupyterLab and read the site, in a browser
	@$(PY) tools/browser.py

prepare: install ## after editing notebooks: export, clean, tables, README.md, page of results, style
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
	@$(PY) tools/tables.py
	@$(PY) tools/readme.py
	@$(PY) benchmarks/page.py
	@$(PY) tools/check.py style

# The first folder of kernels is this environment's, so that python3 is not some other one of the user's.
JUPYTER := JUPYTER_PATH="$(CURDIR)/.venv/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" $(BIN)/jupyter lab

lab: install ## open the first lesson in a copy that is yours; LAB_ARGS=... passes arguments to JupyterLab
	@$(PY) tools/lab.py
	@$(JUPYTER) --ServerApp.root_dir=lab --LabApp.default_url=/lab/tree/course/01_look_alikes.ipynb $(LAB_ARGS)

edit: install ## open the project's own notebooks, to change them
	@$(JUPYTER) --ServerApp.root_dir=nbs $(LAB_ARGS)

docs: install ## make the site of all notebooks in _docs
	@$(PY) tools/docs.py

constraints: ## refresh constraints.txt from settings.ini
	@tools/constraints.sh

clean: ## remove build leftovers and caches (.venv stays)
	@rm -rf build dist _proc _docs .pytest_cache *.egg-info
	@find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
