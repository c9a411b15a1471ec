# Every target works in .venv, which is made once and refreshed when pyproject.toml or
# constraints.txt change. demo, test and bench install only what they need into it, each with a
# stamp of its own that is written last, so that an interrupted install is simply done again.

PYTHON ?= python3
# More arguments for the program that a target runs: make demo ARGS=--help, make test ARGS='-k noise'
ARGS ?=
# Processes that run the tests
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# Bytecode is written where it is first needed, which is faster than compiling all of torch.
INSTALL := $(PIP) install --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed-demo ## train small models with and without noiseopt and show the difference
	@$(BIN)/python -m noiseopt demo $(ARGS)

test: $(VENV)/installed-dev ## run the tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

lint: $(VENV)/installed-dev ## check style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(VENV)/installed-dev ## put the sources into the house format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/installed-bench ## measure the overhead and the estimator against its peers
	@$(BIN)/python benchmarks/overhead.py $(ARGS)
	@$(BIN)/python benchmarks/estimator.py $(ARGS)

clean: ## remove what building and testing left
	@rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and remove .venv
	@rm -rf $(VENV)

$(VENV)/installed-demo: EXTRAS := wandb,demo
$(VENV)/installed-dev: EXTRAS := dev
$(VENV)/installed-bench: EXTRAS := bench
$(VENV)/installed-%: $(VENV)/created pyproject.toml constraints.txt
	@echo "Installing noiseopt[$(EXTRAS)] into $(VENV) (once; a minute or two)"
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/created:
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
