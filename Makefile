# Two commands: `make demo` and `make test`. Both make the environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= auto
INSTALL := $(BIN)/python tools/install.py $(BIN)/python

.PHONY: help demo test coverage lint types imports check audit docs format clean
help:
	@echo "make demo      merge, convert, extract, export the shipped example and show what came out"
	@echo "make test      run the tests"
	@echo "make coverage  the tests, and which lines of the product they run"
	@echo "make check     lint, types, imports, tests"
	@echo "make docs      the documentation as a site, in site/"
	@echo "make audit     known vulnerabilities of the versions in constraints.txt (asks PyPI)"

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

coverage: $(VENV)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term:skip-covered

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

imports: $(VENV)/.ready
	$(BIN)/lint-imports

check: lint types imports test

docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# In an environment of its own, which is no part of what is audited. Without --strict, a version that PyPI does not know of passes.
audit:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	.audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off --requirement constraints.txt

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .audit demo-out site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
