# One command each; every target sets up what it needs and reuses what is there.
#
#   make reproduce                     the paper's claims and figures, measured
#   make test PYTHON=python3.13        another interpreter: it gets an environment of its own
#   make reproduce ARGS="--quick"      options for `gflow reproduce`; for `make test`, options for pytest

PYTHON ?= python3
ARGS ?=

# The interpreter itself; pyenv's shim for a version that is installed but not activated does not run.
PYENV_ROOT ?= $(HOME)/.pyenv
INTERPRETER := $(firstword $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null) \
	$(wildcard $(PYENV_ROOT)/versions/*/bin/$(PYTHON)))
# One environment for each version of Python: .venv-3.11, .venv-3.13, ...
VERSION := $(if $(INTERPRETER),$(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin
SOURCES := $(wildcard gflow tests benchmarks notebooks examples docs)

# By uv, and by pip where uv cannot be had or cannot reach the index: both read the same constraints.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What one process has compiled the next reads.
JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS
# Imports are compiled once, not by every process.
unexport PYTHONDONTWRITEBYTECODE
install = @echo "==> $(VENV): installing gflow$(1) at the versions of constraints.txt"; \
	{ $(BIN)/uv pip install --quiet --python $(BIN)/python --constraints constraints.txt \
	    --build-constraints constraints.txt --editable ".$(1)" || \
	  { echo "==> $(VENV): uv failed; trying pip"; \
	    $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".$(1)"; }; } \
	&& touch $@

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help reproduce test lint format types check docs benchmarks dev constraints clean

help:  ## this list
	@echo "make TARGET [PYTHON=python3.13] [ARGS=...]"
	@sed -n 's/^\([a-z]*\):.*##\(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

reproduce: $(VENV)/.with-core  ## set up, then measure the paper's claims and draw its figures
	$(BIN)/python -m gflow reproduce $(ARGS)

test: $(VENV)/.with-test  ## set up, then run all tests
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.with-dev  ## ruff: lint and format, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.with-dev  ## ruff: fix and format in place
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(VENV)/.with-dev  ## basedpyright on the package
	$(BIN)/basedpyright --pythonpath $(BIN)/python

check: lint types test  ## lint, types and test

benchmarks: $(VENV)/.with-test  ## run every script of benchmarks/, then make the tables
	$(BIN)/python benchmarks/run.py $(ARGS)
	$(BIN)/python docs/readme.py --benchmarks

docs: $(VENV)/.with-docs  ## the documentation, in site/, without network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "==> open site/index.html"

dev: $(VENV)/.with-dev  ## the environment with every tool, nothing run
	@echo "==> $(VENV) is ready: source $(BIN)/activate"

constraints: $(VENV)/.with-dev  ## renew constraints.txt: newest versions, every Python from 3.11
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate --quiet \
	  --no-emit-package gflow --output-file constraints.txt

clean:  ## remove environments and caches
	rm -rf .venv-* .jax_cache .pytest_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. A stamp says what is installed; it is renewed when the project or its pins change.

$(VENV)/.python:
	@if [ -z "$(VERSION)" ]; then \
	  echo "error: '$(PYTHON)' does not run; name a Python >= 3.11, e.g. make PYTHON=python3.12" >&2; exit 1; fi
	@$(INTERPRETER) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is Python $(VERSION); gflow needs >= 3.11: make PYTHON=python3.12" >&2; exit 1; }
	@echo "==> $(VENV): new environment for Python $(VERSION)"
	@$(INTERPRETER) -m venv --clear $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python$(VERSION)-venv" >&2; exit 1; }
	@echo "==> $(VENV): installing uv"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt uv \
	  || echo "==> $(VENV): no uv to be had; pip will do, more slowly"
	@touch $@

$(VENV)/.with-core: $(VENV)/.python pyproject.toml constraints.txt
	$(call install)

$(VENV)/.with-test: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,[test])

$(VENV)/.with-docs: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,[docs])

$(VENV)/.with-dev: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,[dev])
