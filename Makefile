# SPDX-License-Identifier: Apache-2.0
# Everything one does with this repository. `make help` lists it.
#
# PYTHON=python3.12      the Python to start from
# VENV=.venv             where packages go
# TORCH='torch==2.11.*'  the torch to install there
# SKIP_INSTALL=1         use PYTHON as it is, with python/deepcompile built in place
# NEWEST=1               make test: also the end-to-end tests on the newest torch
# STEPS=180              make demo: training steps
# RANKS=2                make demo: processes (one a GPU where there are GPUs)
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.11.*
RANKS ?= 2
STEPS ?=
OUT ?= demo-output

ifeq ($(SKIP_INSTALL),1)
  PY := $(PYTHON)
  export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
  READY :=
else
  PY := $(VENV)/bin/python
  READY := install
endif

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu test-core test-python test-dist lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install:  ## make .venv, install what is needed, build
	@PYTHON=$(PYTHON) tools/bootstrap.sh $(VENV) '$(TORCH)'

demo: $(READY)  ## train a small Llama on 2 ranks, write demo-output/report.html
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m torch.distributed.run --standalone \
	  --nproc-per-node $(RANKS) examples/demo/train.py --out $(OUT) $(if $(STEPS),--steps $(STEPS))

test: $(READY)  ## every test, in order, with one total at the end
	@PYTHON=$(PYTHON) $(PY) tools/run_tests.py $(if $(filter 1,$(NEWEST)),--newest)

test-gpu: $(READY)  ## the GPU tests, on all visible GPUs
	@$(PY) tools/run_tests.py --only gpu --only gpu-alone

test-core: $(READY)  ## the C++ tests
	@$(PY) tools/run_tests.py --only core

test-python: $(READY)  ## the Python tests of one process
	@$(PY) tools/run_tests.py --only python

test-dist: $(READY)  ## the tests on 2 and 4 ranks
	@$(PY) tools/run_tests.py --only dist

lint: $(READY)  ## form of the sources, includes, sizes, links, limits
	@$(PY) tools/lint.py

format: $(READY)  ## rewrite the sources in the right form
	@$(PY) tools/lint.py --fix

clean:  ## remove builds and results, keep .venv's packages
	rm -rf build demo-output logs .pytest_cache .ruff_cache
	rm -f .venv*/.stamps/build
