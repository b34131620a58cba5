# Every target does its own set-up; all that it needs beforehand is make and a Python >= 3.11.
# Another interpreter gets an environment of its own: make PYTHON=python3.12 test

PYTHON = python3
DEMO = runs/demo

# XLA on a CPU allocates the scratch space of a program at every call; in huge pages glibc gets it
# from Linux with a fortieth of the page faults (20,238 to 534 in a step of tools/bench_cpu.py).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV = $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
RUN = $(VENV)/bin/python

# The pins belong to the oldest supported interpreter, the last one for jax 0.10; on the newer ones
# the newest releases that pyproject.toml allows are what is tested.
PINS = $(if $(filter 3.11,$(VERSION)),--constraint constraints.txt)
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check $(PINS) --editable

# A stamp is younger than the files that say what to install, or the installation runs again.
BASE = $(VENV)/.base-$(VERSION)
FULL = $(VENV)/.full-$(VERSION)

.PHONY: help setup test test-slow aot demo lint format clean check-python
.DELETE_ON_ERROR:

help:
	@echo 'make demo        train SFT -> rubric RL -> cache RL on the tiny world, evaluate, write $(DEMO)/report.html'
	@echo 'make test        the tests, but for the slow ones, which make test-slow runs'
	@echo 'make aot         what the real TPU compiler (libtpu, 200 MB) says to kernels and steps; no TPU needed'
	@echo 'make lint        ruff: format and lint (make format rewrites)'
	@echo 'make setup       only the set-up, $(VENV)'
	@echo 'make clean       remove the environments, the caches and $(DEMO)'
	@echo 'make PYTHON=python3.12 test   the same on another interpreter'

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo 'qed_jax needs Python >= 3.11 and "$(PYTHON)" is $(or $(VERSION),not one that runs): try make PYTHON=python3.12' >&2; exit 1; }

$(BASE): pyproject.toml constraints.txt | check-python
	@$(RUN) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(VERSION)")' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	@echo 'installing into $(VENV) (Python $(VERSION)); minutes the first time'
	$(INSTALL) .
	@touch $@

$(FULL): $(BASE)
	$(INSTALL) '.[test]'
	@touch $@

setup: $(FULL)

# A process for each core, up to four, which take files in turn: each holds up to 4 GB.
PYTEST = $(RUN) -m pytest -n auto --maxprocesses=4 --dist loadfile

test: $(FULL)
	$(PYTEST) -m 'not slow and not aot'

test-slow: $(FULL)
	$(PYTEST) -m slow

aot: $(FULL)
	$(INSTALL) '.[test,aot]' || echo 'libtpu cannot be had here: the tests that need it will be skipped'
	$(RUN) -m pytest -m aot -rs

lint: $(FULL)
	$(RUN) -m ruff format --check
	$(RUN) -m ruff check

format: $(FULL)
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

# The whole pipeline on the tiny world. Run it again after an interruption and it goes on.
TRAIN = $(RUN) -m qed_jax.train
EVALUATE = $(RUN) -m qed_jax.evaluate --config=configs/evaluate.py:tiny

demo: $(BASE)
	$(TRAIN) --config=configs/sft.py:tiny --workdir=$(DEMO)/sft
	$(TRAIN) --config=configs/rl.py:tiny --workdir=$(DEMO)/rl --config.init=$(DEMO)/sft
	$(TRAIN) --config=configs/cache_rl.py:tiny --workdir=$(DEMO)/cache_rl --config.init=$(DEMO)/sft
	$(EVALUATE) --workdir=$(DEMO)/evaluate/untrained --config.policy=$(DEMO)/sft --config.untrained=True --config.label=untrained
	$(EVALUATE) --workdir=$(DEMO)/evaluate/sft --config.policy=$(DEMO)/sft --config.label=SFT
	$(EVALUATE) --workdir=$(DEMO)/evaluate/rl --config.policy=$(DEMO)/rl --config.label='rubric RL' --config.summariser=$(DEMO)/sft
	$(EVALUATE) --workdir=$(DEMO)/evaluate/cache_rl --config.policy=$(DEMO)/cache_rl --config.label='cache RL' --config.summariser=$(DEMO)/sft
	$(RUN) -m qed_jax.report --workdir=$(DEMO)

clean:
	rm -rf .venv .venv-* .jax_cache .pytest_cache .hypothesis .ruff_cache $(DEMO)
