# Two commands do everything from a fresh clone: `make train` and `make test`.
# Another interpreter: make train PYTHON=python3.12. More flags: make train ARGS=--config.epochs=5

PYTHON ?= python3
VENV ?= .venv
TPU_VENV ?= .venv-tpu
WORKDIR ?= runs/digits
ARGS ?=

# A step on a CPU allocates much memory and frees it. glibc keeps it for the next step, so that the
# system need not clear and map each page again: a tenth of the time of a large step.
export MALLOC_TRIM_THRESHOLD_ := 1099511627776
export MALLOC_MMAP_MAX_ := 0

PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: help train test test-oldest test-newest mnist cifar10-look sequences lambda-networks shakespeare2d tabular notebooks owner faults devices fuzz \
	benchmark benchmark-step benchmark-context benchmark-peers benchmark-torch tpu-compile clean

help: ## show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z0-9-]+):[^\#]*\#\# /  make \1\t/'

train: $(VENV)/.train ## train the Terminator on the bundled digits; call again to resume
	@$(VENV)/bin/python -m terminator_jax.train --config=experiments/digits.py --workdir=$(WORKDIR) $(ARGS)

test: $(VENV)/.test ## check the style and run the tests
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

# Both ends of what setup.cfg admits, each in an environment of its own: .venv-oldest, .venv-newest.
# The oldest versions have wheels for the oldest Python.
test-oldest: PYTHON := python3.11
test-oldest: RESOLUTION := lowest-direct
test-oldest: ## run the tests with the oldest versions that setup.cfg admits
test-newest: PYTHON = $(shell for n in 13 12 11; do python3.$$n -c "" 2>&- && echo python3.$$n && break; done)
test-newest: RESOLUTION := highest
test-newest: ## run the tests with the newest versions, on the newest Python there is
test-oldest test-newest: test-%:
	@$(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.venv-$*/bin/uv pip install --quiet --python .venv-$* --upgrade --resolution $(RESOLUTION) --editable '.[train,test]'
	@.venv-$*/bin/python --version
	@.venv-$*/bin/uv pip list --quiet --python .venv-$*
	@.venv-$*/bin/python -m pytest --numprocesses=2 --dist=loadfile $(ARGS)

# Slow proofs, whose results are in docs/results.md; TFDS_DATA_DIR names where the data sets are.
mnist: $(VENV)/.train ## train on MNIST: minutes on a GPU, hours without
	@$(VENV)/bin/python -m terminator_jax.train --config=experiments/mnist.py --workdir=runs/mnist $(ARGS)

cifar10-look: $(VENV)/.train ## two epochs on a tenth of CIFAR-10
	@$(VENV)/bin/python -m terminator_jax.train --config=experiments/cifar10.py \
	  --workdir=runs/cifar10-look '--config.data.train_split=train[:5000]' --config.epochs=2 \
	  --config.optimizer.warmup_epochs=0.5 $(ARGS)

sequences: $(VENV)/.train ## train on sequences of pixels: MNIST in order and permuted, an hour each
	@$(VENV)/bin/python -m terminator_jax.train --config=experiments/smnist.py --workdir=runs/smnist $(ARGS)
	@$(VENV)/bin/python -m terminator_jax.train --config=experiments/pmnist.py --workdir=runs/pmnist $(ARGS)

lambda-networks: $(VENV)/.train ## train lambda networks and plain twins on digits and MNIST: an hour
	@for data in digits mnist; do for network in lambda resnet; do \
	  $(VENV)/bin/python -m terminator_jax.train --config=experiments/$${network}_$${data}.py \
	    --workdir=runs/$${network}_$${data} $(ARGS) || exit; done; done

shakespeare2d: $(VENV)/.train ## train on Tiny Shakespeare and fill grids with text: half an hour
	@$(VENV)/bin/python -m terminator_jax.train --config=experiments/shakespeare2d.py \
	  --workdir=runs/shakespeare2d $(ARGS)
	@$(VENV)/bin/python benchmarks/decoding.py runs/shakespeare2d

tabular: $(VENV)/.train ## tables of scikit-learn beside its own models, three minutes: docs/results.md
	@$(VENV)/bin/python benchmarks/tabular.py

# Each in an empty folder, so that what it trains begins from the start; without the times of its
# cells. With `--update` jupytext would keep the outputs of before.
notebooks: $(VENV)/.notebooks ## run the notebooks/*.py and write their .ipynb: ten minutes on a CPU
	@for notebook in notebooks/*.py; do folder=$$(mktemp -d); \
	  $(VENV)/bin/jupytext --quiet --to ipynb --set-kernel python3 --execute --run-path $$folder \
	    $$notebook || exit; rm -r $$folder; done
	@$(VENV)/bin/jupyter nbconvert --log-level=ERROR --to notebook --inplace --ClearMetadataPreprocessor.enabled=True \
	  --ClearMetadataPreprocessor.clear_notebook_metadata=False notebooks/*.ipynb

faults: $(VENV)/.train ## kill trainings and damage their files, half an hour: docs/reliability.md
	@PYTHONPATH=benchmarks JAX_PLATFORMS=cpu $(VENV)/bin/python tests/faults/kills.py
	@PYTHONPATH=benchmarks JAX_PLATFORMS=cpu $(VENV)/bin/python tests/faults/faults.py

devices: $(VENV)/.train ## train on 1, 4 and 8 virtual devices and in two processes: docs/reliability.md
	@PYTHONPATH=benchmarks JAX_PLATFORMS=cpu $(VENV)/bin/python tests/faults/devices.py

fuzz: $(VENV)/.train ## feed damaged inputs to what reads them, minutes: docs/reliability.md
	@PYTHONPATH=benchmarks JAX_PLATFORMS=cpu $(VENV)/bin/python tests/faults/fuzz.py

owner: ## name the GitHub account that the notebooks are opened and installed from: make owner OWNER=name
	@test -n "$(OWNER)" || { echo "which account? make owner OWNER=name" >&2; exit 2; }
	@sed -i.bak -E 's#(github(\.com)?)/[^/]+/terminator-jax#\1/$(OWNER)/terminator-jax#g' \
	  README.md notebooks/*.py notebooks/*.ipynb && rm README.md.bak notebooks/*.bak

# Beside PyTorch, where that is installed too: .venv/bin/pip install torch
benchmark: $(VENV)/.train ## measure convolutions, a quarter of an hour on a quiet machine: docs/performance.md
	@$(VENV)/bin/python benchmarks/convolution.py

benchmark-step: $(VENV)/.train ## measure training steps, half an hour on a quiet machine: docs/performance.md
	@$(VENV)/bin/python benchmarks/step.py
	@$(VENV)/bin/python benchmarks/input.py
	@$(VENV)/bin/python benchmarks/growth.py

benchmark-context: $(VENV)/.train ## measure layers for full context beside each other, minutes: docs/performance.md
	@$(PIP_INSTALL) --editable '.[train,bench]'
	@$(VENV)/bin/python benchmarks/context.py

benchmark-peers: $(VENV)/.train ## measure layers beside PyTorch packages, minutes: docs/performance.md
	@$(PIP_INSTALL) --editable '.[train,peers]'
	@$(VENV)/bin/python benchmarks/peers.py

# PyTorch and JAX each for the device they are to be compared on: on a GPU, install jax[cuda12] too.
benchmark-torch: $(VENV)/.train ## measure the training step beside plain PyTorch, on one device: minutes on a GPU
	@$(PIP_INSTALL) --editable '.[train,peers]'
	@$(VENV)/bin/python benchmarks/torch_step.py $(ARGS)

# In an environment of its own, since libtpu disturbs processes that are for the CPU alone.
tpu-compile: $(TPU_VENV)/.tpu ## compile the training step for TPUs, without one, an hour: docs/performance.md
	@$(TPU_VENV)/bin/python benchmarks/tpu_compile.py $(ARGS)

clean: ## remove the virtual environments
	rm -rf $(VENV) $(TPU_VENV) .venv-oldest .venv-newest

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is not: try make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# An empty file in the venv says that an extra is installed: the next call does not ask pip again.
$(VENV)/.train: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "Installing terminator-jax for training into $(VENV) (once, some minutes)"
	@$(PIP_INSTALL) --editable '.[train]'
	@touch $@

# jax2onnx asks for an older orbax, which its conversion does not use.
$(VENV)/.test: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "Installing terminator-jax for training and tests into $(VENV) (once, some minutes)"
	@$(PIP_INSTALL) --editable '.[train,test]'
	@$(PIP_INSTALL) --no-deps 'jax2onnx==0.17.1'
	@$(PIP_INSTALL) jaxtyping onnx onnx-ir onnxruntime
	@touch $(VENV)/.train $@

$(VENV)/.notebooks: setup.cfg pyproject.toml | $(VENV)/bin/python
	@echo "Installing terminator-jax for training and notebooks into $(VENV) (once, some minutes)"
	@$(PIP_INSTALL) --editable '.[train,notebooks]'
	@touch $(VENV)/.train $@

$(TPU_VENV)/.tpu: setup.cfg pyproject.toml
	@echo "Installing terminator-jax and libtpu into $(TPU_VENV) (once, some minutes)"
	@$(PYTHON) -m venv $(TPU_VENV)
	@$(TPU_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[train]' libtpu
	@touch $@
