# make            prints the targets
# make train      installs once into .venv, then trains
# PYTHON=...      names the interpreter that .venv is made with (default: the first suitable one on PATH)
SHELL := bash
BIN := .venv/bin
PY := $(BIN)/python
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help install train test prepare lab constraints clean

help: ## print the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: ## make .venv with the package and its pinned dependencies
	@tools/install.sh

train: install ## train: the main job, with nothing but this command
	@$(PY) benchmarks/make_train.py

test: install ## run every check: style, sync, notebooks, wheel, pytest
	@$(PY) tools/check.py

prepare: install ## after editing notebooks: export, clean, README.md, style
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
	@$(PY) tools/readme.py
	@$(PY) tools/check.py style

lab: install ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs

constraints: ## refresh constraints.txt from settings.ini
	@tools/constraints.sh

clean: ## remove build leftovers and caches (.venv stays)
	@rm -rf build dist _proc _docs .pytest_cache *.egg-info
	@find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf
