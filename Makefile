PYTHON ?= python3
GPU_PYTHON ?= $(PYTHON)
BIN := .venv/bin
# Python compiles a module when it is first imported, and most modules of most packages never are: pip need not.
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
EDITABLE := $(PIP_INSTALL) --constraint constraints.txt --editable
# The version of GPU machines with torch 2.11: kernels are compiled for it too, beside the installed one.
OLDEST_TRITON := 3.6.0
OLDEST := .venv/triton-$(OLDEST_TRITON)

.PHONY: help install sweep test fast conformance extras test-slow test-all lint coverage gpu gpu-pack models ui docs

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: .venv/.installed  ## make .venv with pinned versions

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(EDITABLE) '.[dev]'
	@touch $@

$(OLDEST): | install
	$(PIP_INSTALL) --no-deps --target $@ triton==$(OLDEST_TRITON)

sweep: install  ## train the quickstart sweep on real film and write its report
	$(BIN)/zoo sweep quickstart

test: install  ## ruff, mypy and the fast tests
	$(MAKE) --jobs 2 lint fast

fast: install  ## the fast tests alone
	$(BIN)/pytest --numprocesses 2 --dist loadfile

conformance: install  ## the conformance suite on every method, and on the broken ones that it must catch
	$(BIN)/pytest --numprocesses 2 -m slow tests/test_conformance.py tests/test_mutants.py

extras: install  ## install what some slow tests need: Ray and others from pip, Chromium and SLURM (as root, or with sudo)
	$(EDITABLE) '.[dev,browser,ray,consistency]'
	.ci/packages

test-slow: install $(OLDEST)  ## the slow tests that can run here; lists those that cannot
	$(BIN)/pytest --numprocesses 2 -m slow -rs $(ARGS)

test-all: extras lint $(OLDEST)  ## every test, with all that they need installed; one that is skipped fails
	$(BIN)/pytest --numprocesses 2 -m '' --fail-skipped

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

coverage: install  ## fast and slow tests, and which lines of sparse_zoo they run (at least 95 %)
	$(BIN)/pytest --numprocesses 2 -m '' --cov sparse_zoo --cov-report term:skip-covered

gpu:  ## what only a GPU can tell: checks, speed, a training step; ten minutes, with the system's torch
	$(GPU_PYTHON) -m experiments.tools.gpu

gpu-pack: install  ## kernels compiled here and packages, for a machine with a GPU and no network
	$(BIN)/python -m experiments.tools.gpu.pack

models: install  ## tiny random pretrained models of each family, in models/
	$(BIN)/python -m experiments.tools.tiny_models models

docs: install  ## the documentation as a site, in site/; fails on a broken link
	$(EDITABLE) '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

ui: install  ## open MLflow's page on the quickstart's store
	$(BIN)/zoo ui
