# SPDX-License-Identifier: Apache-2.0
# Everything one does with this repository. `make help` lists it.
#
# PYTHON=python3.12      the Python to start from
# VENV=.venv             where packages go
# TORCH='torch==2.11.*'  the torch to install there
# SKIP_INSTALL=1         use PYTHON as it is, with python/deepcompile built in place
# NEWEST=1               make test: also the end-to-end tests on the newest torch
# STEPS=200              make demo: training steps
# RANKS=2                make demo: processes (one a GPU where there are GPUs)
# WORLDS=4               make test-gpu: only with so many ranks, e.g. 4 or 2,4; default: 2 and all GPUs
# BENCH=bench-output     make bench: folder of rows, charts and logs
# TIME_LIMIT=1380        make bench: seconds, then what is left waits for the next make bench
# SWEEP='--force'        make bench: more options of the sweep (deepcompile bench --help)
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.11.*
RANKS ?= 2
STEPS ?=
OUT ?= demo-output
BENCH ?= bench-output
TIME_LIMIT ?= 1380
SWEEP ?=

ifeq ($(SKIP_INSTALL),1)
  PY := $(PYTHON)
  export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
  READY :=
else
  PY := $(VENV)/bin/python
  READY := install
endif

.DEFAULT_GOAL := help
.PHONY: help install demo bench test test-gpu test-core test-python test-dist lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

install:  ## make .venv, install what is needed, build
	@PYTHON=$(PYTHON) tools/bootstrap.sh $(VENV) '$(TORCH)'

demo: $(READY)  ## train a small Llama on 2 ranks, write demo-output/report.html
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) -m torch.distributed.run --standalone \
	  --nproc-per-node $(RANKS) examples/demo/train.py --out $(OUT) $(if $(STEPS),--steps $(STEPS))

bench: $(READY)  ## the benchmark's sweep as this machine can run it, with charts, in 25 minutes at most
	@$(PY) -m deepcompile.bench.sweep here --time-limit $(TIME_LIMIT) --result_dir "$(BENCH)" \
	  --logs "$(BENCH)/logs" $(SWEEP); \
	code=$$?; [ $$code -le 1 ] || [ $$code -eq 3 ] || exit $$code; \
	if $(PY) -c 'import matplotlib' 2>/dev/null; then \
	  $(PY) -m deepcompile plot --result_dir "$(BENCH)" || exit 2; \
	else echo "no charts, as matplotlib is not installed: pip install 'deepcompile[bench]'"; fi; \
	[ $$code -ne 3 ] || echo "the time was over: make bench again measures what is left"; \
	exit $$code

test test-dist: export FOR_TESTS := 1
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
	rm -rf build demo-output bench-output logs .pytest_cache .ruff_cache
	rm -f .venv*/.stamps/build
