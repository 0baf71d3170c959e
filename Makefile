# Two commands: `make demo` and `make test`. Both make the environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= auto
INSTALL := $(BIN)/python tools/install.py $(BIN)/python

.PHONY: help demo test lint types imports check format clean
help:
	@echo "make demo    merge, convert, extract, export the shipped example and show what came out"
	@echo "make test    run the tests"
	@echo "make check   lint, types, imports, tests"

# What the demo takes; torch first and by its exact version: a CPU build that is at hand is taken, and nothing else pulls a larger one.
$(VENV)/.demo: pyproject.toml constraints.txt
	@echo "making an environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@$(INSTALL) --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(VENV)/.ready: $(VENV)/.demo
	@$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(VENV)/.demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

imports: $(VENV)/.ready
	$(BIN)/lint-imports

check: lint types imports test

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
