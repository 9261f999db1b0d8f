# Every target sets up what it needs: `make demo` and `make test` work in a fresh clone.
#
#   PYTHON=python3.12        the interpreter that .venv is made with, 3.11 or newer (default python3)
#   TORCH_INDEX=URL          one more index to find torch in; for a machine without a GPU
#                            https://download.pytorch.org/whl/cpu saves gigabytes of CUDA packages
#   PYTEST_ARGS="-x -k nsf"  further arguments for pytest

PYTHON ?= python3
TORCH_INDEX ?=
PYTEST_ARGS ?=

# Paths are relative throughout, so that a space in the path of the checkout does no harm.
PY := .venv/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check --no-input $(QUIET) -c constraints.txt
QUIET = $(if $(wildcard .venv/.installed-*),--quiet)

# What is installed is noted in .venv, under a key made of all that the installation depends on: with the same
# key no pip is called; a new entry point, version or constraint, or a moved checkout, installs again.
KEY := $(shell { pwd; sed -n '/^__version__/p' pyroflows/__init__.py; cat pyproject.toml constraints.txt; } \
	| cksum | cut -d ' ' -f 1)
DONE := .venv/.installed-$(KEY)
COVERED_demo := demo
COVERED_test := demo test
COVERED_docs := demo docs
COVERED_dev := demo test docs dev

# One thread a process: the tensors are small, and threads that wait for a core that another process holds can make
# a step fifty times slower.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
PYTEST := $(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow lint format types imports docs ci clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

install: $(DONE)-dev  ## install everything for development; again after a new entry-point line

demo: $(DONE)-demo  ## fit flows to small data sets and draw what they learn
	.venv/bin/pyroflows demo

test: $(DONE)-test  ## the everyday tests
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: $(DONE)-test  ## the tests that only CI runs
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(DONE)-dev  ## ruff: lint and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(DONE)-dev  ## mend what ruff can mend
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(DONE)-dev  ## mypy --strict
	$(PY) -m mypy

imports: $(DONE)-dev  ## the floors: imports go down only
	.venv/bin/lint-imports

docs: $(DONE)-docs  ## build docs/_build/html, running the tutorials
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

ci:  ## everything that has to pass before a merge
	.ci/run

clean:  ## remove what was built and all caches; .venv stays
	rm -rf build dist docs/_build docs/_generated docs/tutorials demo-output jupyter_execute .jupyter_cache
	rm -rf .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find pyroflows tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# --- installation ---------------------------------------------------------------------------------------

REMEDY = delete .venv if there is one, and name a newer one: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12
CHECK_VERSION = import sys; v = sys.version_info[:2]; sys.exit(v < (3, 11) and \
  "pyroflows needs Python 3.11 or newer, and this is %d.%d (%s): $(REMEDY)" % (*v, sys.executable))

# torch goes first and pinned: left to the resolver, it may bring gigabytes of CUDA packages. The build backend
# is kept in .venv, so that an installation with nothing new to fetch needs no network.
$(DONE)-demo $(DONE)-test $(DONE)-docs $(DONE)-dev: $(DONE)-%: $(PY)
	@$(PY) -c '$(CHECK_VERSION)'
	@$(PY) -m pip --version > /dev/null 2>&1 || $(PY) -m ensurepip
	@echo "Setting up .venv for 'make $(firstword $(MAKECMDGOALS))'; the first time takes a few minutes."
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") torch
	$(PIP) "hatchling>=1.24" editables
	$(PIP) --no-build-isolation -e ".[$*]"
	@find .venv -maxdepth 1 -name '.installed-*' ! -name '.installed-$(KEY)-*' -delete
	@touch $(addprefix $(DONE)-,$(COVERED_$*))

$(PY):
	@command -v "$(PYTHON)" > /dev/null || { echo "There is no $(PYTHON) here; $(REMEDY)" >&2; exit 1; }
	@"$(PYTHON)" -c '$(CHECK_VERSION)'
	@"$(PYTHON)" -m venv --clear .venv || { rm -rf .venv; \
	  echo "$(PYTHON) -m venv failed. On Debian and Ubuntu, install the package python3-venv." >&2; exit 1; }
