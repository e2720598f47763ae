# The commands of the project. `make train` and `make test` work on a fresh machine with Python 3.11 or newer and gcc.
# The first that runs and is new enough; a name on the PATH may be a shim that does not run.
PYTHON   ?= $(shell for p in python3 python3.11 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV     := .venv
RECIPE   ?= quickstart
STRATEGY ?=
NPROC    ?=
ARGS     ?=
RUN      ?= output/$(RECIPE)
KILLS    ?= 50
JOBS     ?= 2
# The build of torch: cu126 (driver 525 or newer), cu130 (580 or newer), cpu, auto (the one for this machine); empty: PyPI's.
# It stays until another one is asked for.
BUILT       := $(strip $(shell cat $(VENV)/.torch-index 2>/dev/null))
TORCH_INDEX ?= $(BUILT)
ifeq ($(TORCH_INDEX),auto)
override TORCH_INDEX := $(or $(shell $(PYTHON) src/manyrank/topology/cuda_driver.py),$(error no torch was chosen))
endif
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

ifneq ($(filter-out cu126 cu130 cpu,$(TORCH_INDEX)),)
$(error there is no build $(TORCH_INDEX) of this torch: TORCH_INDEX is one of cu126, cu130, cpu, auto, or empty)
endif

.PHONY: setup train plan test test-hosts test-nightly test-slurm test-faults first-hour cuda-dry doctor verify chat merge bench bench-counts bench-gpu gpu-check bench-data bench-save lint audit help clean

setup: $(VENV)/.installed  ## make .venv with the pinned versions; TORCH_INDEX=auto for an older driver or GPU

# To pip and uv any build of the pinned version is the installed one, so another build is uninstalled first.
ifneq ($(TORCH_INDEX),$(BUILT))
.PHONY: $(VENV)/.installed
endif
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(if $(filter-out $(BUILT)-,$(TORCH_INDEX)-),$(VENV)/bin/pip uninstall -qq -y torch)
	$(if $(TORCH_INDEX),$(VENV)/bin/pip install -q uv)
	$(if $(TORCH_INDEX),$(VENV)/bin/uv pip install -q --python $(VENV)/bin/python --torch-backend=$(TORCH_INDEX) -c constraints.txt torch)
	$(VENV)/bin/pip install -q -c constraints.txt torch
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[dev]"
	@echo $(TORCH_INDEX) > $(VENV)/.torch-index
	@touch $@

train: setup  ## fine-tune: RECIPE=, STRATEGY=, NPROC=, ARGS="--lr 1e-4 ..."
	manyrank train $(RECIPE) $(if $(STRATEGY),--strategy $(STRATEGY)) $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

plan: setup  ## memory and speed of RECIPE on every strategy: ARGS="--gpu H100-80GB --nproc 8"
	manyrank plan $(RECIPE) $(ARGS)

chat: setup  ## talk to what RUN has trained: ARGS="--compare"
	manyrank chat $(RUN) $(ARGS)

merge: setup  ## RUN's adapter into its base: ARGS="--dtype bfloat16"
	manyrank merge $(RUN) $(ARGS)

test: setup  ## the default tier of the tests, on CPUs; JOBS= processes, a core each
	pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-hosts: setup  ## two hosts, SLURM, full disks, a browser
	pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "hosts and not nightly" $(ARGS)

test-nightly: setup  ## what takes minutes each: random kills, whole matrices, stories, benchmarks; and cuda-dry
	pytest -m nightly $(ARGS); code=$$?; $(MAKE) cuda-dry ARGS= && exit $$code

first-hour: setup  ## what people type first, and what must be true, as a table: ARGS=--nightly, or words of ids
	python tests/support/first_hour.py $(ARGS)

# Not from a local folder of wheels, where torch may be built for CPUs.
CUDA_VENV := .venv-cuda
$(CUDA_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null $(CUDA_VENV)/bin/pip install -q -c constraints.txt torch "nvidia-cuda-crt==13.0.*" "nvidia-cuda-cccl==13.0.*"
	$(CUDA_VENV)/bin/python -c 'import torch; assert torch.version.cuda, "this torch is built for CPUs"'
	PIP_FIND_LINKS= PIP_CONFIG_FILE=/dev/null $(CUDA_VENV)/bin/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

cuda-dry: $(CUDA_VENV)/.installed  ## the CUDA path on stand-in libraries, without a GPU (3 GB of wheels)
	$(CUDA_VENV)/bin/python tests/fake_cuda/build.py $(CUDA_VENV)/fake_cuda
	FAKECUDA_DEVICES=4 timeout 1800 tests/fake_cuda/run.sh $(CUDA_VENV) $(CUDA_VENV)/fake_cuda pytest -v --durations=5 -m cuda tests/fake_cuda $(ARGS)

test-slurm: setup  ## a real SLURM job over two nodes on this machine; as root on Debian, it installs SLURM first
	@command -v slurmctld > /dev/null || { apt-get update -qq && apt-get install -y -qq slurm-wlm munge; }
	pytest -m hosts tests/launchers/test_slurm.py

test-faults: setup  ## a run of two processes that is killed KILLS times
	MANYRANK_KILLS=$(KILLS) pytest -m "" tests/checkpoint/test_faults.py

doctor: setup  ## examine this machine: NPROC=, ARGS="my.yaml --json"
	manyrank doctor $(if $(NPROC),--nproc $(NPROC)) $(ARGS)

verify: setup  ## every strategy against one process
	manyrank verify $(ARGS)

bench: setup  ## speed, memory and losses against trl and bare loops: ARGS="--rounds 5 --output docs/bench"
	python benchmarks/speed.py $(ARGS)

bench-counts: setup  ## counts of a step against the stored ones: ARGS=--update stores them anew
	python benchmarks/counts.py $(ARGS)

bench-gpu: setup  ## speed and memory of real architectures with random weights on a GPU: ARGS=--toy tries it on the CPU
	python benchmarks/gpu.py $(ARGS)

gpu-check: setup  ## the first quarter of an hour on a GPU, written to docs/gpu.json and docs/gpu.md: ARGS="--only speed"
	python benchmarks/gpu_check.py $(ARGS); code=$$?; python docs/make_gpu.py; exit $$code

bench-data: setup  ## the preparation of data, as tables: ARGS=ROWS.jsonl
	python benchmarks/prepare_data.py $(ARGS)

bench-save: setup  ## what a checkpoint costs: ARGS=FOLDER on the disk to measure
	python benchmarks/save_checkpoint.py $(ARGS)

story-%: setup launch/stories/%.sh  ## a whole story: traces, pairs, code, chat, retrieval or grpo; RAW=, MODEL=, ARGS=, see docs/stories.md
	launch/stories/$*.sh $(ARGS)

lint: setup  ## ruff and the types of the packages without torch
	ruff check . && ruff format --check . && pyrefly check

audit: setup  ## known vulnerabilities of the pinned versions
	pip install -q pip-audit
	pip-audit --no-deps --disable-pip -r constraints.txt

help:  ## this list
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

clean:
	rm -rf $(VENV) output
