# Every target makes the virtual environment when it is missing and reuses it otherwise.
.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-kill test-cluster test-browser test-gpu test-wheels bench lint up down lock clean

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

help:  ## Show what can be made.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml infra/constraints.txt
	@echo "Installing into $(VENV); the first time takes minutes."
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
		|| { echo "Python 3.11 or 3.12 is needed; $(PYTHON) is $$($(PYTHON) --version). Set PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# With uv, where there is one, in a fraction of the time; pip, where there is none or it finds no package index.
	@{ command -v uv >/dev/null && uv pip install --quiet --python $(BIN)/python -c infra/constraints.txt -e '.[dev]'; } \
		|| $(BIN)/pip install --quiet --disable-pip-version-check -c infra/constraints.txt -e '.[dev]'
	@# The backport that img2dataset asks for hides the standard library's module from Prefect's temporary server.
	@$(BIN)/pip uninstall --quiet --disable-pip-version-check --yes dataclasses
	@touch $@

demo: $(STAMP)  ## Run the whole mission on the sample corpus: from a list of URLs to a registered model.
	@$(BIN)/imagerag demo

JOBS ?= 3

test: $(STAMP)  ## Run the unit and engine tests, JOBS files at a time.
	@# More than there are cores: much of an engine test is waiting. The long ones first. A job takes 2 GB, and its Ray more.
	@$(BIN)/pytest -m "not cluster and not browser and not gpu and not wheels" --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-unit: $(STAMP)  ## Run the tests that take seconds.
	@$(BIN)/pytest -m "not engines and not cluster and not browser and not gpu and not wheels"

KILLS ?= 30

test-kill: $(STAMP)  ## Kill drivers, workers and writers of all stages KILLS times, at moments that SEED says.
	@KILLS=$(KILLS) $(BIN)/pytest -s tests/kills -k "random_kills or table_identical"

test-cluster: $(STAMP)  ## Run a corpus through PostgreSQL, S3 and two Ray nodes on this machine; needs PostgreSQL and root.
	@CLUSTER_REQUIRED=1 $(BIN)/pytest -m cluster

test-browser: $(STAMP)  ## Use the UIs of Prefect and MLflow in Chromium; needs Chromium.
	@$(BIN)/pytest -m browser

test-gpu: $(STAMP)  ## Run the tests that need a GPU.
	@$(BIN)/pytest -m gpu

test-wheels: $(STAMP)  ## Serve models offline, in MLflow's own environments; needs a package index, uv and pyenv.
	@$(BIN)/pytest -m wheels

bench: $(STAMP)  ## Measure speed and memory against peers; writes the table that the README shows.
	@$(BIN)/python -m tests.bench

lint: $(STAMP)  ## Check style, types and formatting.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

up: $(STAMP)  ## Start the Prefect and MLflow servers and a worker for this home; prints the UIs' addresses.
	@$(BIN)/imagerag up

down:  ## Stop what `make up` started.
	@test ! -x $(BIN)/imagerag || $(BIN)/imagerag down

lock: $(STAMP)  ## Write the installed versions to infra/constraints.txt.
	@{ sed -n '/^#/p' infra/constraints.txt; $(BIN)/pip freeze --exclude-editable | sed -E 's/(\+cpu| @ .*)$$//' | sort -f; } > infra/constraints.tmp
	@mv infra/constraints.tmp infra/constraints.txt

clean: down  ## Remove the virtual environment and caches; the data stays (`imagerag purge` deletes that).
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
