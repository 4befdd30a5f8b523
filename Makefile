# Development commands; `make` alone lists them. Everything is installed into $(VENV), created with $(PYTHON).
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check
# constraints.txt, with the torch that is installed in place of the pinned one: a CUDA or Intel build stays what it is.
PINNED := $(STAMPS)/constraints.txt
TORCH_VERSION := import importlib.metadata as m; print(m.version("torch"))
PLUGINS := $(wildcard plugins/*)
TYPED := $(wildcard core/src $(addsuffix /src,$(PLUGINS)) tools benchmarks examples/*/src)
# The arguments of a test are fixtures and parameters: its body is checked, its signature may stay bare.
TYPED_TESTS := --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls --no-warn-return-any

PLUGIN_blackwell := plugins/cuda_blackwell
PLUGIN_marlin := plugins/cuda_marlin
PLUGIN_xpu := plugins/xpu

.DELETE_ON_ERROR:
.PHONY: help demo test check install docs bench wheels clean FORCE

help:
	@echo 'make demo                    install core and run the checkpoint in examples/'
	@echo 'make install PLATFORM=NAME   install core, the plugin for NAME (marlin, blackwell or xpu) and its vendor packages'
	@echo 'make test                    the whole test suite, with coverage (PYTEST_ARGS="..." adds arguments)'
	@echo 'make check                   ruff and mypy'
	@echo 'make docs                    regenerate what is generated in docs/'
	@echo 'make bench                   run the benchmarks'
	@echo 'make wheels                  build the wheels of all distributions into dist/'
	@echo 'make clean                   remove everything above has made, except $(VENV)'

demo: $(STAMPS)/core
	$(BIN)/halfbyte run examples/tiny-python-lm --max-new-tokens 32 --prompt "$$(printf 'class Node:\n    def __init__(self, ')"

test: $(STAMPS)/dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) --cov

check: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/mypy --cache-dir .mypy_cache/tests $(TYPED_TESTS) tests

install: $(if $(PLUGIN_$(PLATFORM)),$(STAMPS)/install-$(PLATFORM))
ifeq ($(PLUGIN_$(PLATFORM)),)
	@echo 'usage: make install PLATFORM=marlin|blackwell|xpu (not "$(PLATFORM)")' >&2; exit 2
endif

docs: $(STAMPS)/dev
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python benchmarks/write_tables.py

bench: $(STAMPS)/dev
	set -e; for benchmark in benchmarks/bench_*.py; do $(BIN)/python "$$benchmark"; done

wheels: $(STAMPS)/dev
	set -e; for project in core $(PLUGINS); do $(BIN)/python -m build --wheel --no-isolation --outdir dist "$$project"; done

clean:
	rm -rf dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "halfbyte needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; say which one to use: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

# The pip that comes with Python may be too old for dependency groups.
$(STAMPS)/pip: constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt --upgrade pip
	mkdir -p $(STAMPS) && touch $@

# Looked at every time, written only when the installed torch has changed.
$(PINNED): $(STAMPS)/pip FORCE
	@$(BIN)/python -c '$(TORCH_VERSION)' >/dev/null 2>&1 || $(PIP) install -c constraints.txt torch
	@version=$$($(BIN)/python -c '$(TORCH_VERSION)') && sed "s/^torch==.*/torch==$$version/" constraints.txt > $@.new
	@cmp -s $@.new $@ || cp $@.new $@

FORCE:

$(STAMPS)/core: $(PINNED) core/pyproject.toml
	$(PIP) install -c $(PINNED) -e 'core[transformers]'
	touch $@

# Without the plugins' vendor packages: what the tests need of those is doubled. Of FlashInfer the Python code is needed.
$(STAMPS)/dev: $(PINNED) $(wildcard pyproject.toml core/pyproject.toml plugins/*/pyproject.toml)
	$(PIP) install -c $(PINNED) --group dev -e 'core[transformers,conformance]'
	$(PIP) install --no-deps $(addprefix -e ,$(PLUGINS))
	$(if $(filter Linux,$(shell uname)),$(PIP) install --no-deps --group flashinfer)
	touch $@

$(STAMPS)/install-%: $(PINNED) core/pyproject.toml plugins/*/pyproject.toml
	$(PIP) install -c $(PINNED) -e 'core[transformers]' -e $(PLUGIN_$*)
	touch $@
