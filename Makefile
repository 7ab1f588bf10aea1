# make train     trains a BLIND-VALM of the toy world: its CLIP, its language model, the probes
# make toyworld  trains all variants over five seeds, draws the bias curve, writes the report: hours
# make test      format, lint, types, and the tests that do not take long; needs no torch
# make faults    processes that are killed, stopped, doubled and hung, one and several: docs/reliability.md
# make test-all  the same with torch, FAISS, lm-evaluation-harness, emulated stores and the slow tests, and XLA's optimizations left on
#
# Everything runs in $(VENV), made on first use and brought up to date when pyproject.toml or
# constraints.txt changes. With another Python: make test PYTHON=python3.12 VENV=.venv312

# the first of these that is there; 3.11 is the one with exact versions
PYTHON ?= $(or $(firstword $(shell for p in python3.11 python3.12 python3.13; do command -v $$p; done)),python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
# play gs:// and s3:// in tests/test_emulated_stores.py
EMULATORS = 'moto[s3]' flask flask-cors gcp-storage-emulator

# processes that run tests, each a file at a time
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile
# constraints.txt holds the tested versions of Python 3.11; other Pythons follow pyproject.toml.
VENV_VERSION = $(shell $(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PIP_INSTALL = $(BIN)/python -m pip install $(if $(filter 3.11,$(VENV_VERSION)),-c constraints.txt)

# What one test has compiled the next ones read, in all processes; test-all compiles everything.
COMPILED = $(abspath $(VENV))/compiled
SHARING = JAX_COMPILATION_CACHE_DIR=$(COMPILED) \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# Without XLA's fusion emitters a small program compiles in 3/5 of the time; test-all has them.
QUICK = XLA_FLAGS="--xla_cpu_use_fusion_emitters=false $$XLA_FLAGS"

.DEFAULT_GOAL := test
.PHONY: train toyworld test faults test-all checks install extras

train: $(VENV)/installed
	$(BIN)/python -m blindvalm_jax.toyworld --workdir=runs/first --seeds=1 --variants=blind_valm_eos --steps=3000

toyworld: $(VENV)/installed
	$(BIN)/python -m blindvalm_jax.toyworld --workdir=runs/toyworld --first_seed=5 --stated_heldout=0.02,0.05,0.1,0.25,0.5

test: checks
	rm -rf $(COMPILED)
	$(QUICK) $(SHARING) $(PYTEST) -m "not slow and not faults"

# Tests that share nothing: one by one, so that no process has the longest file to itself at the end.
faults: install
	rm -rf $(COMPILED)
	$(QUICK) $(SHARING) $(PYTEST) --dist worksteal -m faults

test-all: extras checks
	OPTIMIZED_TESTS=1 $(PYTEST)

checks: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/installed-test

extras: $(VENV)/installed-extras

$(VENV)/installed: pyproject.toml constraints.txt $(VENV)/created
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt $(VENV)/created
	$(PIP_INSTALL) -e '.[test]'
	@touch $@

$(VENV)/installed-extras: $(VENV)/installed-test
	$(PIP_INSTALL) -e '.[test,faiss,harness,gs,s3,tensorboard,wandb]' accelerate peft $(TORCH) $(EMULATORS)
	@touch $@

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || \
	  { echo "error: needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is none of them here;" \
	    "set PYTHON, e.g. make test PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A Python that was asked for must not be passed over because the environment has another.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(VENV)/created),)
ifneq ($(shell $(PYTHON) -V 2>&1),$(shell $(BIN)/python -V))
$(error $(VENV) holds $(shell $(BIN)/python -V), not $(PYTHON): remove it, or name another with VENV=)
endif
endif
endif
