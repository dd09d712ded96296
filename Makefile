# Two commands for people: `make demo` and `make test`. Everything lives in .venv; nothing is installed elsewhere.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# All tests, two at a time. Whoever names tests gets them one after the other, unless they ask.
PYTEST_ARGS ?= --numprocesses 2

.PHONY: demo test check bench proto docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.all
	@$(BIN)/broker demo

test: $(VENV)/.test
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.test
	@$(BIN)/python -m tests.bench $(BENCH_ARGS)

# Format, lint, types, floors, generated files.
check: $(VENV)/.test
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m broker._proto.generate --check

# docs/reference, from the program itself.
docs: $(VENV)/.test
	@$(BIN)/python -m tests.reference

proto: $(VENV)/.test
	@$(BIN)/python -m broker._proto.generate

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "broker needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.all: pyproject.toml $(VENV)/bin/python
	@echo "installing into $(VENV) (once; about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/bin/python
	@echo "installing into $(VENV) with the test extras (once; about a minute)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ $(VENV)/.all

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
