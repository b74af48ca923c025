# Every target sets itself up in .venv (`newest` and `lowest` in ones of their own); it needs only
# Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS ?= constraints.txt
TRANSFORMER_LENS ?= ==3.9.0

# Logical cores; a worker costs the imports once more, so few of them.
PARALLEL = -n logical --maxprocesses 4 --dist worksteal

# What runs no model: the same on every TransformerLens.
WITHOUT_MODEL = $(addprefix --ignore=tests/,activations files fitting \
	polynomials/test_factored.py polynomials/test_saving.py \
	polynomials/test_explained_variance.py report/test_figure.py test_laws.py)

# Python 3.10, the lowest that pyproject.toml allows, where there is one.
PYTHON310 = $(shell for python in python3.10 "$$(pyenv prefix 3.10 2>/dev/null)/bin/python"; do \
	"$$python" -c "" 2>/dev/null && echo "$$python" && exit; done; echo $(PYTHON))

.PHONY: docs notebooks demo test newest lowest laws coverage lint types benchmarks gpu clean

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet --no-compile -c $(CONSTRAINTS) -e ".[dev]" "transformer-lens$(TRANSFORMER_LENS)"
	touch $@

demo: $(VENV)/installed
	$(BIN)/polylens demo

# The processes of a run share what one of them has compiled.
unexport PYTHONDONTWRITEBYTECODE

TEST = -m pytest -q $(PARALLEL) $(PYTEST) --junitxml=$(VENV)/tests.xml

test: $(VENV)/installed
	$(BIN)/python $(TEST)

# The tests on the newest TransformerLens 4, and the rest of the long ones.
newest:
	$(MAKE) test VENV=.venv4 TRANSFORMER_LENS=">=4" PYTEST="-m 'not smollm2 and not laws' $(WITHOUT_MODEL)"

# What most depends on versions, on the lowest ones that pyproject.toml allows.
LOWEST = $(addprefix tests/,activations files fitting inputs polynomials calibration saving \
	hosts/test_torch.py hosts/test_hosts_agree.py test_lens.py test_function_of_text.py \
	test_weights_as_they_are.py test_public_names.py)
lowest:
	$(MAKE) test VENV=.venv-lowest PYTHON="$(PYTHON310)" CONSTRAINTS=constraints-lowest.txt PYTEST="-m 'not laws' $(LOWEST)"

# The laws on hundreds of random examples instead of the same few.
laws: $(VENV)/installed
	$(BIN)/python -m pytest -q $(PARALLEL) -m "hypothesis or laws" --hypothesis-profile=laws

# The tests, and which lines and branches of each file they reach.
coverage: $(VENV)/installed
	$(BIN)/coverage erase
	$(BIN)/coverage run $(TEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright --pythonpath $(BIN)/python

# The site of docs/, strict: a link that leads nowhere fails.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir $(VENV)/site

# The notebooks, run from their first cell to their last; `--write` keeps what they show.
notebooks: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[notebooks]"
	$(BIN)/python scripts/notebooks.py

benchmarks: $(VENV)/installed
	$(BIN)/python benchmarks/run.py
	$(BIN)/python -m benchmarks.accuracy
	for part in coefficients mixture layers growth; do $(BIN)/python benchmarks/core.py $$part; done

# Tests and benchmarks on a GPU, to benchmarks/GPU.md, with the torch and transformers that are
# there and without a network: WHEELS is a folder with wheels of what is missing (polylens' own
# among them, whose version is read), which go to build/gpu.
WHEELS ?= .whl
gpu:
	$(PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target build/gpu $(WHEELS)/*.whl
	PYTHONPATH=src:build/gpu $(PYTHON) -m pytest -q -p no:cacheprovider tests/test_gpu.py
	PYTHONPATH=src:build/gpu $(PYTHON) -m benchmarks.gpu

clean:
	rm -rf build .venv .venv4 .venv-lowest .pytest_cache .hypothesis .coverage*
