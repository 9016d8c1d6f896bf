# The first call of any target sets everything up; it needs Python 3.11 or later, make and the package index.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: run test test-slow check docs bench clean

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

docs: .venv/.docs ## guide and reference as a static site in site/; a link that leads nowhere ends it
	$(BIN)/mkdocs build --strict

bench: $(READY) ## the measurements behind the numbers of the guide
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

.venv/.docs: $(READY)
	$(PIP) --editable '.[dev,docs]'
	touch $@

clean:
	rm -rf .venv
