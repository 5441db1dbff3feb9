# The virtual environment in .venv is used where it exists; `make PYTHON=...` names another interpreter.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)

.PHONY: train test lint check

train:
	$(PYTHON) train.py --batch-size 2 --epochs 1

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

check: lint test
