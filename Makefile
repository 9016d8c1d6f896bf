# The first call of any target sets everything up; it needs Python 3.11 or later, make and the package index.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: run test test-slow check bench clean

run: $(READY) ## the quickstart
	$(BIN)/python -m scripts.train experiment=quickstart

test: $(READY) ## the default tests: minutes on two cores
	$(BIN)/python -m pytest -n 2

test-slow: .venv/.launchers ## the long ones, with joblib, Ray and submitit: half an hour
	$(BIN)/python -m pytest -m slow

check: $(READY) ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## the measurements behind the numbers in the README
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.report

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	touch $(READY)

.venv/.launchers: $(READY)
	$(PIP) --editable '.[dev,joblib,ray,slurm]'
	touch $@

clean:
	rm -rf .venv
