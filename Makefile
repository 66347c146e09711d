# The four commands, the same everywhere. PYTHON picks the interpreter for the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Installing compiles these.
NATIVE := $(wildcard edgeflex/native/*.cpp edgeflex/native/*.h)

.PHONY: quickstart test check unit clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@ $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/edgeflex quickstart

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.installed-test
	$(BIN)/pytest -n auto -m 'not slow' tests/unit tests/architecture

test: check
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist
