# `make demo` and `make test` install everything that a fresh machine needs.

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.installed

# Python 3.12, for the stack without NeMo: what is on PATH, or pyenv's. A shim of pyenv's may not run.
PYTHON312 ?= $(shell for python in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12.*/bin/python3.12; \
  do "$$python" -c '' 2>/dev/null && command -v "$$python" && break; done)
VENV_MEGATRON ?= .venv-megatron
BIN_MEGATRON := $(abspath $(VENV_MEGATRON))/bin
INSTALLED_MEGATRON := $(VENV_MEGATRON)/.installed

# Where nothing may be written, hundreds of processes would each compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-real test test-thorough test-fast test-megatron test-slurm test-all lint clean

demo: $(INSTALLED)  ## The main job on a laptop: dense Llama → 8-expert MoE, with a picture.
	PATH="$(BIN):$$PATH" examples/demo.sh

demo-real: $(INSTALLED)  ## A real model, SmolLM2-135M: upcycled, verified, trained a little, exported.
	PATH="$(BIN):$$PATH" examples/demo_real.sh

# Tests of 2 to 4 ranks keep as many cores busy, so few processes suffice. The files keep their order:
# the long ones come first.
PROCESSES ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : cores < 12 ? cores / 2 : 6)))
SEVERAL := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadgroup --no-loadscope-reorder
test: $(INSTALLED)  ## All tests that belong to every change; PROCESSES=2 runs two files at a time.
	$(SEVERAL) -m "not thorough and not slow"

test-thorough: $(INSTALLED)  ## What `make test` proves, over all mappings, kinds of models and accidents.
	$(SEVERAL) -m "thorough and not slow"

test-fast: $(INSTALLED)  ## What needs no NeMo, no Megatron-Core and no other process: a minute or two.
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup -m "not thorough and not slow" tests/unit

test-megatron: $(INSTALLED_MEGATRON)  ## The front for Megatron-LM and Bridge, on Megatron-Core 0.19 without NeMo.
	$(BIN_MEGATRON)/python -m pytest -m "not slow" tests/megatron

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
	rm -rf $(VENV) $(VENV_MEGATRON) demo

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"Found Python {v[0]}.{v[1]}, expected 3.10 or newer; set, for example, PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing NeMo, Megatron-Core and PyTorch (about 2.7 GB, takes some minutes) …"
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --editable '.[nemo,demo,dev,eval]'
	@touch $@

$(INSTALLED_MEGATRON): pyproject.toml constraints-megatron.txt
	@test -n "$(strip $(PYTHON312))" || { echo "No python3.12 found, on PATH or in pyenv; Megatron-Core 0.19 needs Python 3.12. Install it, or set PYTHON312=/path/to/python3.12"; exit 1; }
	@$(PYTHON312) -c 'import sys; v = sys.version_info; v >= (3, 12) or sys.exit(f"Found Python {v[0]}.{v[1]}, expected 3.12 or newer; set, for example, PYTHON312=python3.12")'
	$(PYTHON312) -m venv $(VENV_MEGATRON)
	@echo "Installing Megatron-Core 0.19 and PyTorch (about 5 GB with CUDA's libraries, some minutes) …"
	$(BIN_MEGATRON)/pip install --disable-pip-version-check --constraint constraints-megatron.txt --editable '.[megatron]' psutil pytest
	@touch $@
