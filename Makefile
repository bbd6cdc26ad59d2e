# Each target works from a fresh clone and repeats quickly: .venv is made once, and rebuilt only when what it is made of changes.
PYTHON ?= python3
PY := .venv/bin/python
PIP := .venv/bin/pip --disable-pip-version-check
TORCH := 2.13.0

SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.py) kdkernels/divergences.py \
	$(addprefix kdkernels/backends/,functors.py columns.py polynomials.py)

.PHONY: setup demo test oldest bench docs static launch sanitize lint clean

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

# A copy of what is built and tested, whose extension is its own: the normal build stays.
define copied
	mkdir -p $(1)
	rm -rf $(addprefix $(1)/,kdkernels tests benchmarks)
	cp -rp kdkernels tests benchmarks csrc setup.py pyproject.toml README.md LICENSE $(1)
	rm -f $(1)/kdkernels/*.so
endef

demo: setup
	$(PY) -m kdkernels demo

# A class or module of tests stays in one process, so that what it makes for all of them is made once.
test: setup
	$(PY) -m pytest -n auto --maxprocesses 4 --dist loadscope

# Losses and a few runs of KDTrainer, with the oldest versions that pyproject.toml takes, on the oldest Python; uv finds both.
# PYENV_VERSION lets pyenv, where it is, show that Python.
OLDEST := build/oldest
OLDEST_PYTHON := $(shell sed -n 's/^requires-python = ">=\(.*\)"$$/\1/p' pyproject.toml)
# Of KDTrainer what holds it to loops of one's own; families and warnings of newer releases are in the rest of its tests.
OLDEST_TESTS := tests/losses/test_autograd.py tests/losses/test_numerics.py tests/compat/test_liger.py
OLDEST_TESTS += $(addprefix tests/transformers/test_trainer.py::test_,training_is_that_of_a_plain_loop_over_whole_logits \
	okd_trains_both_as_a_plain_loop_does checkpointed_activations_change_nothing)

$(OLDEST)/.installed: .venv/.deps
	mkdir -p $(OLDEST)
	PYENV_VERSION=$(OLDEST_PYTHON) .venv/bin/uv venv --quiet --clear --python $(OLDEST_PYTHON) $(OLDEST)/.venv
	.venv/bin/uv pip install --quiet --python $(OLDEST)/.venv --resolution lowest-direct --requirements pyproject.toml \
		--extra demo --extra liger --extra test --extra transformers "setuptools>=77"
	touch $@

oldest: setup $(OLDEST)/.installed
	$(call copied,$(OLDEST))
	cd $(OLDEST) && $(PY) setup.py --quiet build_ext --inplace
	cd $(OLDEST) && $(PY) -m pytest -n auto --maxprocesses 4 --dist loadscope $(OLDEST_TESTS)

# The documentation's site, with warnings as errors; NO_MKDOCS_2_WARNING: its makers' advice on another program.
docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet
	@echo "build/site/index.html"

# Two to three hours on 2 cores, which should have nothing else to do.
bench: setup
	$(PY) -m pytest -o addopts= benchmarks --benchmark-only
	$(PY) -m benchmarks.linear
	$(PY) -m benchmarks.compare
	$(PY) -m benchmarks.limits
	$(PY) -m benchmarks.training
	$(PY) -m benchmarks.plots
	$(PY) -m benchmarks.readme

# Compiles every GPU kernel with the newest and the oldest supported Triton, and counts the bytes of a loss: minutes, no GPU.
OLDEST_TRITON := .venv/triton-3.6.0

$(OLDEST_TRITON)/.installed: .venv/.deps
	$(PIP) install --quiet --no-deps --target $(OLDEST_TRITON) $(subst -,==,$(notdir $(OLDEST_TRITON)))
	touch $@

static: setup $(OLDEST_TRITON)/.installed
	$(PY) -m benchmarks.static
	PYTHONPATH=$(OLDEST_TRITON) $(PY) -m benchmarks.static --compile-only

# Starts every GPU kernel on a driver that runs nothing. LAUNCH=--quick is what CI runs; what is compiled is kept in build/launch.
launch: setup
	$(PY) -m benchmarks.launch $(LAUNCH)

# Native code under AddressSanitizer and UndefinedBehaviorSanitizer, on every instruction set that this processor has: tests run in a
# copy with an extension of its own, so the normal build stays. Takes GCC; two to three minutes. Logits of spread 30 access nothing
# that those of 1 and 10 do not.
SANITIZED := build/sanitize
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)

sanitize: setup
	$(call copied,$(SANITIZED))
	cd $(SANITIZED) && KDKERNELS_SANITIZE=1 $(CURDIR)/$(PY) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && KDKERNELS_SANITIZE=1 LD_PRELOAD="$(SANITIZERS)" \
		ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		$(CURDIR)/$(PY) -m pytest -n auto --maxprocesses 4 -k "not triton and not reference and not 30.0" --fuzz-cases=2000 \
		tests/backends/test_sanitize.py tests/backends/test_backends.py tests/backends/test_blocks.py \
		tests/losses/test_special_values.py tests/fuzz

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv build csrc/generated kdkernels/*.so *.egg-info
