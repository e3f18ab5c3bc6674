# make demo: install into .venv and run the demonstration. make test: the whole check.
PYTHON ?= python3
BIN := .venv/bin
# Arguments for pytest, such as make test PYTEST="-n 2 -k conv".
PYTEST ?= -n 2

.PHONY: demo test

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/legocompress demo

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST)
