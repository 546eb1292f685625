# Each target sets up what it needs: a virtual environment with the exact versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test test-slow check install clean

quickstart: install  ## train, cache, explain, score, report: the whole way on the embedded model
	HF_HUB_OFFLINE=1 $(BIN)/sae-italian quickstart --out quickstart --resume

test: install  ## the default test suite
	$(BIN)/python -m pytest -m "not slow"

test-slow: install  ## everything
	$(BIN)/python -m pytest

check: install  ## formatter, linter, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

clean:
	rm -rf $(VENV) build dist quickstart runs
