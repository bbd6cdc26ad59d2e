# Each target works from a fresh clone and repeats quickly: .venv is made once, and rebuilt only when what it is made of changes.
PYTHON ?= python3
PY := .venv/bin/python
PIP := .venv/bin/pip --disable-pip-version-check
TORCH := 2.13.0

SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.py) kdkernels/divergences.py

.PHONY: setup demo test bench static lint clean

setup: .venv/.built

.venv/.deps: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet torch==$(TORCH)
	$(PIP) install --quiet "setuptools>=77" wheel ninja numpy
	$(PIP) install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

.venv/.built: .venv/.deps setup.py $(SOURCES)
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: setup
	$(PY) -m kdkernels demo

test: setup
	$(PY) -m pytest -n auto --maxprocesses 4

bench: setup
	$(PY) -m pytest -o addopts= benchmarks --benchmark-only
	$(PY) -m benchmarks.linear
	$(PY) -m benchmarks.readme

# Compiles every GPU kernel and counts the bytes of a loss: minutes, no GPU.
static: setup
	$(PY) -m benchmarks.static

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv build csrc/generated kdkernels/*.so *.egg-info
