# `make test` and `make demo` set themselves up in .venv; they need only Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TRANSFORMER_LENS ?= ==3.9.0

# Logical cores; a worker costs the imports once more, so few of them.
PARALLEL = -n logical --maxprocesses 4 --dist worksteal

.PHONY: demo test lint types benchmarks clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]" "transformer-lens$(TRANSFORMER_LENS)"
	touch $@

demo: $(VENV)/installed
	$(BIN)/polylens demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST) --junitxml=$(VENV)/tests.xml

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python

benchmarks: $(VENV)/installed
	$(BIN)/python benchmarks/run.py
	$(BIN)/python -m benchmarks.accuracy
	for part in coefficients mixture layers growth; do $(BIN)/python benchmarks/core.py $$part; done

clean:
	rm -rf .venv .venv4 .pytest_cache .hypothesis
