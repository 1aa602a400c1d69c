# The two commands of the README, and what developers run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

quickstart: $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e '.[train]'
	$(BIN)/hero train quickstart

test: $(BIN)/python
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(BIN)/python
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hero hero_kernels

clean:
	rm -rf $(VENV) build *.egg-info hero_kernels/*.so
