# The virtual environment in .venv is used where it exists; `make PYTHON=...` names another interpreter.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)

.PHONY: install train test lint check

# torch first: asked for by its exact version, pip takes the build that the machine offers.
install:
	$(PYTHON) -m pip install --quiet torch==2.13.0
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[test,deepspeed,eval,quant,track]'

train:
	$(PYTHON) train.py --batch-size 2 --epochs 1

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

check: lint test
