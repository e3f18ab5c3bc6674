# make demo: install into .venv and run the demonstration. make test: the whole check.
# make help lists the targets.
PYTHON ?= python3
.DEFAULT_GOAL := demo
BIN := .venv/bin
# Arguments for pytest, such as make test PYTEST="-n 2 -k conv".
PYTEST ?= -n 2

.PHONY: help demo test test-fast coverage format docs

help:
	@echo "make demo       compress the shipped network"
	@echo "make test       the whole check: ruff, mypy, all tests"
	@echo "make test-fast  the tests that are not marked slow"
	@echo "make coverage   all tests, and the lines that they do not reach"
	@echo "make format     repair what ruff can repair, and format"
	@echo "make docs       build the documentation into site/"

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

demo: .venv/installed
	$(BIN)/legocompress demo

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST)

test-fast: .venv/installed-test
	$(BIN)/python -m pytest $(PYTEST) -m "not slow"

coverage: .venv/installed-test
	$(BIN)/python -m pytest $(PYTEST) --cov --cov-report=term-missing:skip-covered

format: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
