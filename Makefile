# `make demo` and `make test` install everything that a fresh machine needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-fast test-slurm test-all lint clean

demo: $(INSTALLED)  ## The main job on a laptop: dense Llama → 8-expert MoE, with a picture.
	PATH="$(BIN):$$PATH" examples/demo.sh

test: $(INSTALLED)  ## All tests that belong to every change.
	$(BIN)/python -m pytest -m "not slow"

test-fast: $(INSTALLED)  ## What needs no NeMo, no Megatron-Core and no other process: under a minute.
	$(BIN)/python -m pytest -m "not slow" tests/unit

test-slurm: $(INSTALLED)  ## On a Slurm that the tests start; needs Slurm installed, and root.
	$(BIN)/python -m pytest -rs tests/end_to_end/test_slurm.py

test-all: $(INSTALLED)  ## All tests, the slow ones included: the whole demo, notebooks, Slurm.
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## Format, style, types, import contracts.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:  ## Remove the environment and the demo's files.
	rm -rf $(VENV) demo

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"Found Python {v[0]}.{v[1]}, expected 3.10 or newer; set, for example, PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing NeMo, Megatron-Core and PyTorch (about 2.7 GB, takes some minutes) …"
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[nemo,demo,dev,eval]'
	@touch $@
