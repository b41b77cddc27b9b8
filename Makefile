PYTHON ?= python3
GPU_PYTHON ?= $(PYTHON)
BIN := .venv/bin
# The version of GPU machines with torch 2.11: kernels are compiled for it too, beside the installed one.
OLDEST_TRITON := 3.6.0

.PHONY: help install sweep test conformance test-slow test-all lint coverage gpu gpu-pack models ui docs

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

install: .venv/.installed  ## make .venv with pinned versions

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/triton-$(OLDEST_TRITON) triton==$(OLDEST_TRITON)
	@touch $@

sweep: install  ## train the quickstart sweep on real film and write its report
	$(BIN)/zoo sweep quickstart

test: install lint  ## ruff, mypy and the fast tests
	$(BIN)/pytest --numprocesses 2

conformance: install  ## the conformance suite on every method, and on the broken ones that it must catch
	$(BIN)/pytest --numprocesses 2 -m slow tests/test_conformance.py tests/test_mutants.py

test-slow: install  ## the slow tests that can run here; lists those that cannot
	$(BIN)/pytest --numprocesses 2 -m slow -rs

test-all: install lint  ## every test; installs what they need (as root, or with sudo); one that is skipped fails
	.ci/packages
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,browser,ray]'
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
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

ui: install  ## open MLflow's page on the quickstart's store
	$(BIN)/zoo ui
