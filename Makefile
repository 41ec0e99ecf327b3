# The two commands that a newcomer needs are `make demo` and `make test`; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -e -u -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test test-cluster bench clean

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
WORKERS ?= 2

help:  ## list these commands
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

install: $(INSTALLED)  ## put the pinned requirements into .venv, unless they are there

# The stamp comes last, so an installation that was interrupted is taken up again. On a terminal
# pip's many lines become one that changes.
$(INSTALLED): requirements/requirements.txt requirements/requirements-dev.txt requirements/lock.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $$($(PYTHON) -V) is too old, the requirements need Python 3.11 or newer;" \
	    "name one: make $(or $(MAKECMDGOALS),install) PYTHON=python3.12" >&2; exit 2; }
	@echo "Installing the requirements into .venv; this takes some minutes, once."
	@$(PYTHON) -m venv .venv || \
	  { echo "error: $(PYTHON) cannot make a virtual environment;" \
	    "on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@if [ -t 1 ]; then \
	  $(BIN)/pip install -r requirements/requirements-dev.txt | \
	    while IFS= read -r line; do printf '\r\033[K%.100s' "$$line"; done; printf '\r\033[K'; \
	else \
	  $(BIN)/pip install --quiet -r requirements/requirements-dev.txt; \
	fi
	@$(BIN)/python tools/register_lm_eval.py >/dev/null
	@touch $@
	@echo "Installed."

demo: install  ## tokenize, train on four processes, generate, evaluate, plot: everything in demo/
	@$(BIN)/python tools/demo.py

# WORKERS tests at a time: each worker has torch and all, twice; most tests use one core, some four.
test: install  ## style, types and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

# On Debian: hosts are namespaces, and what is missing of Slurm, MPI and ssh is installed.
test-cluster: install  ## launch on several hosts, made on this machine; needs root
	$(BIN)/pytest tests/clusters

# Those that can be run have a main.
bench: install  ## the benchmarks in their quick form
	@for benchmark in $$(grep -l __main__ benchmarks/*.py); do \
	  echo "$$benchmark --quick"; $(BIN)/python $$benchmark --quick; \
	done

clean:  ## remove demo/ and caches; .venv stays
	rm -rf demo .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
