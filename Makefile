# `make train` and `make test` need Python 3.10 or newer, git and make: they prepare the environment .venv first, once,
# and again when what is to be installed has changed.
#
#   make train BASE_PYTHON=python3.12    makes .venv with another Python than python3
#   make train TORCH_INDEX=URL           takes torch from there
#   make train PYTHON=python             uses an environment of your own, and installs nothing

ifeq ($(origin PYTHON),undefined)
PYTHON := $(if $(filter Windows_NT,$(OS)),.venv/Scripts/python.exe,.venv/bin/python)
VENV := $(PYTHON)
READY_TO_RUN := .venv/ready-to-run
READY_TO_TEST := .venv/ready-to-test
endif

BASE_PYTHON ?= $(or $(shell command -v python3),python)
EXTRAS := test,deepspeed,eval,quant,track
WHAT_IS_INSTALLED := setup.cfg pyproject.toml constraints.txt .ci/install_torch.py

.PHONY: train test lint types check quick install

train: $(READY_TO_RUN)
	$(PYTHON) train.py --batch-size 2 --epochs 1

# A process of tests for each core, with one thread each; the tests of a file share what they set up.
# In the order of the folders: ordered by the number of tests, files of few and long ones would come last, one process
# would be left with the last of them, and the others with nothing.
test: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)
test: export TOKENIZERS_PARALLELISM := false
test: $(READY_TO_TEST)
	$(PYTHON) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 25

lint: $(READY_TO_TEST)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

# A type checker over both towers; strict on what a program of one's own imports (pyproject.toml).
types: $(READY_TO_TEST)
	$(PYTHON) -m mypy

check: lint types test

# While you work: the tests of what has changed since the last commit (SINCE=COMMIT: since that one), lint and types.
SINCE ?= HEAD
quick: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)
quick: export TOKENIZERS_PARALLELISM := false
quick: lint types
	$(PYTHON) -m pytest --numprocesses auto $$($(PYTHON) .ci/changed_tests.py $(SINCE))

# Everything that the tests need, into .venv or into the environment of PYTHON.
install: $(VENV)
	@echo "Installing the packages that the tests need; this takes some minutes."
	$(PYTHON) .ci/install_torch.py $(TORCH_INDEX)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'

ifdef VENV
$(VENV):
	$(BASE_PYTHON) .ci/make_venv.py .venv

$(READY_TO_RUN): $(WHAT_IS_INSTALLED) | $(VENV)
	@echo "Installing the packages that training needs; this takes some minutes."
	$(PYTHON) .ci/install_torch.py $(TORCH_INDEX)
	$(PYTHON) -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(READY_TO_TEST): $(WHAT_IS_INSTALLED) | $(VENV)
	@$(MAKE) --no-print-directory install
	@touch $(READY_TO_RUN) $@
endif
