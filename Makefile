# The commands of the project. `make train` and `make test` work on a fresh machine with Python 3.11 or newer and gcc.
# The first that runs and is new enough; a name on the PATH may be a shim that does not run.
PYTHON   ?= $(shell for p in python3 python3.11 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV     := .venv
RECIPE   ?= quickstart
STRATEGY ?=
NPROC    ?=
ARGS     ?=
KILLS    ?= 50
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: setup train test test-slurm test-faults verify bench lint clean

setup: $(VENV)/.installed  ## make .venv with the pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

train: setup  ## fine-tune: RECIPE=, STRATEGY=, NPROC=, ARGS="--lr 1e-4 ..."
	manyrank train $(RECIPE) $(if $(STRATEGY),--strategy $(STRATEGY)) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

test: setup  ## every test that needs no GPU
	pytest $(ARGS)

test-slurm: setup  ## a real SLURM job over two nodes on this machine; as root on Debian, it installs SLURM first
	@command -v slurmctld > /dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge; }
	pytest tests/test_slurm.py

test-faults: setup  ## a run of two processes that is killed KILLS times
	MANYRANK_KILLS=$(KILLS) pytest tests/test_faults.py

verify: setup  ## every strategy against one process
	manyrank verify $(ARGS)

bench: setup  ## one step against transformers' Trainer, and the preparation of data, as tables
	python tests/bench_trainer.py $(ARGS)
	python tests/bench_data.py

lint: setup
	ruff check . && ruff format --check .

clean:
	rm -rf $(VENV) output
