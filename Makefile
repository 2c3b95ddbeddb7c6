.DEFAULT_GOAL := help
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# What pip makes of this: on Linux x86 PyPI serves the CUDA build (gigabytes), and a local mirror that has a CPU build the
# latter. To choose: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

.PHONY: help demo test lint types unit slow bench clean

help: ## show what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# What the tests need besides: other tools that read a result.
$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	@touch $@

demo: $(VENV)/.installed ## merge the small trained Switch Transformer in six ways and compare (a minute)
	$(BIN)/hf-mcsmoe demo

test: lint types unit ## lint, types and tests (under ten minutes on 2 cores)

lint: $(VENV)/.ready ## ruff, lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready ## mypy
	$(BIN)/mypy

unit: $(VENV)/.ready ## the tests that need nothing but the repository
	$(BIN)/python -m pytest -n 2 -m "not slow"

slow: $(VENV)/.ready ## the slow tests and those on real data, where ../shared/data is there
	$(BIN)/python -m pytest -n 2 -m slow

bench: $(VENV)/.ready ## time and memory as ratios within one run
	$(BIN)/python examples/benchmarks/run_all.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
