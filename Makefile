# make demo   set up, generate vetted trajectories from packaged problems, show the result
# make test   set up, lint, type-check, run the tests
# make gpu    the trainer's tests that need a GPU, in an environment with its torch
# make chaos  the long run through faults: hundreds of them over thousands of items
# The environment is .venv; all targets build what they need of it first.

SHELL := /bin/bash
# Another interpreter, in an environment of its own: make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON := python3
VENV := .venv
BIN := $(VENV)/bin
# The registry's newest torch brings gigabytes of CUDA; the tests want this one. A GPU user says
# `make test TORCH=` in an environment that has its own torch already.
TORCH ?= torch==2.13.0
PIP := UV_COMPILE_BYTECODE=1 $(BIN)/uv pip install --quiet --python $(BIN)/python

.PHONY: demo test gpu chaos lint setup bench requirements clean

setup: $(VENV)/.service

demo: $(VENV)/.service
	$(BIN)/tirgen generate nano --limit 320 --run-prefix demo

# In order of folders: long files first, so that neither half waits for the other at the end.
test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Not of `make test`: `make gpu TORCH=` where the environment has a torch for the GPU.
gpu: $(VENV)/.dev
	TIRGEN_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# 100 faults over 5000 items on each broker that is installed; needs namespaces, about 10 minutes each.
chaos: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.acceptance.chaos.suite

bench: $(VENV)/.dev
	@for file in bench/*.py; do OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

$(BIN)/uv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv

$(VENV)/.service: requirements/service.txt pyproject.toml | $(BIN)/uv
	$(PIP) -r requirements/service.txt
	$(PIP) --no-deps -e .
	@touch $@

# torch by pip, before the rest: uv would take the CUDA build (docs/decisions/0001-environments.md).
$(VENV)/.dev: $(VENV)/.service requirements/dev.txt requirements/train.txt
	$(if $(TORCH),$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)")
	$(PIP) -r requirements/dev.txt
	$(PIP) --no-build-isolation-package deepspeed -r requirements/train.txt
	@touch $@

COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
	--custom-compile-command "make requirements" pyproject.toml
requirements: | $(BIN)/uv
	$(COMPILE) --extra embedded --extra nano --extra metrics --extra redis -o requirements/service.txt
	$(COMPILE) --extra embedded --extra nano --extra metrics --extra redis --extra parquet --extra plot --extra curation --extra hub --extra otel --extra dev \
		-c requirements/service.txt -o requirements/dev.txt
	$(COMPILE) --extra train -c requirements/dev.txt --override requirements/no-torch.txt \
		-o requirements/train.txt

clean:
	rm -rf $(VENV) .tirgen .mypy_cache .ruff_cache .pytest_cache .hypothesis
