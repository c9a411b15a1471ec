# Every target works in .venv, which is made once and refreshed when pyproject.toml or
# constraints.txt change. The demos, test and bench install only what they need into it, each with a
# stamp of its own that is written last, so that an interrupted install is simply done again.
# Only test-ends works elsewhere, in .venv-oldest and .venv-newest, which are made the same way.

PYTHON ?= python3
# More arguments for the program that a target runs: make demo ARGS=--help, make test ARGS='-k noise'
ARGS ?=
# Processes that run the tests
JOBS ?= 2
# The interpreters of test-ends
OLDEST ?= python3.10
NEWEST ?= python3.13

VENV := .venv
BIN := $(VENV)/bin
# Called with the environment, and the constraints. Bytecode is written where it is first needed,
# which is faster than compiling all of torch.
INSTALL = $(1)/bin/python -m pip --disable-pip-version-check -qq install --no-compile -c $(2)
RUN_TESTS = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)
unexport PYTHONDONTWRITEBYTECODE

PYTHON_oldest = $(OLDEST)
PYTHON_newest = $(NEWEST)
CONSTRAINTS_oldest := constraints-oldest.txt
CONSTRAINTS_newest := constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo demo-deepspeed browser test test-ends test-oldest test-newest lint format bench convergence clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed-demo ## train small models with and without noiseopt and show the difference
	@$(BIN)/python -m noiseopt demo $(ARGS)

# Every run has a folder of its own, so that none goes on from an earlier one.
demo-deepspeed: $(VENV)/installed-demo-deepspeed ## train a small GPT with DeepSpeed at ZeRO stage 3 on two CPU ranks and show the decisions
	@DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone \
		--nproc-per-node 2 examples/deepspeed/train.py \
		--deepspeed_config examples/deepspeed/zero3.json \
		--checkpoint "runs/deepspeed-$$(date +%Y%m%d-%H%M%S)" $(ARGS)

test: $(VENV)/installed-dev browser ## run the tests
	@$(call RUN_TESTS,$(VENV))

# The report's page is tested in a real browser. Where it cannot be installed from here, those tests
# fail, and say what they need.
browser:
	@if ! { command -v chromium && command -v chromedriver; } >/dev/null 2>&1 \
		&& grep -qs '^ID=debian' /etc/os-release && [ "$$(id -u)" = 0 ]; then \
		echo "Installing Debian's chromium and chromium-driver (once; a minute)"; \
		export DEBIAN_FRONTEND=noninteractive; \
		{ apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } >/dev/null 2>&1 \
			|| echo "apt-get could not install them: the tests of the page will fail" >&2; \
	fi

# Both interpreters are looked for before the first test runs.
test-ends: browser .venv-oldest/created .venv-newest/created test-oldest test-newest ## run the tests with the oldest and the newest Python and torch

test-oldest test-newest: test-%: .venv-%/installed
	@.venv-$*/bin/python -c 'import platform, torch; print("The $*: Python", platform.python_version(), "and torch", torch.__version__)'
	@$(call RUN_TESTS,.venv-$*)

lint: $(VENV)/installed-dev ## check style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(VENV)/installed-dev ## put the sources into the house format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(VENV)/installed-bench ## measure the overhead, also across ranks, with DeepSpeed and of observers, and the estimator
	@$(BIN)/python benchmarks/overhead.py $(ARGS)
	@$(BIN)/python benchmarks/ranks.py $(ARGS)
	@$(BIN)/python benchmarks/deepspeed.py $(ARGS)
	@$(BIN)/python benchmarks/observers.py $(ARGS)
	@$(BIN)/python benchmarks/estimator.py $(ARGS)

convergence: $(VENV)/installed-bench ## run what is missing of the convergence benchmark, for hours, and draw its table
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.convergence run $(ARGS)
	@$(BIN)/python -m benchmarks.convergence table

clean: ## remove what building and testing left
	@rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -not -path './$(VENV)*/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and remove the environments
	@rm -rf $(VENV) .venv-oldest .venv-newest

$(VENV)/installed-demo: EXTRAS := wandb,demo
$(VENV)/installed-dev: EXTRAS := dev
$(VENV)/installed-demo-deepspeed: EXTRAS := wandb,demo,deepspeed
$(VENV)/installed-bench: EXTRAS := bench,deepspeed,wandb,tensorboard
$(VENV)/installed-%: $(VENV)/created pyproject.toml constraints.txt
	@echo "Installing noiseopt[$(EXTRAS)] into $(VENV) (once; a minute or two)"
	@$(call INSTALL,$(VENV),constraints.txt) setuptools
	@$(call INSTALL,$(VENV),constraints.txt) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/created:
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

.venv-oldest/installed: constraints-oldest.txt
.venv-newest/installed: constraints.txt
.venv-oldest/installed .venv-newest/installed: .venv-%/installed: .venv-%/created pyproject.toml
	@echo "Installing noiseopt[dev] with the versions in $(CONSTRAINTS_$*) into .venv-$* (once; some minutes)"
	@$(call INSTALL,.venv-$*,$(CONSTRAINTS_$*)) setuptools
	@$(call INSTALL,.venv-$*,$(CONSTRAINTS_$*)) --no-build-isolation -e '.[dev]'
	@touch $@

.venv-oldest/created .venv-newest/created: .venv-%/created:
	@$(PYTHON_$*) -c '' 2>/dev/null || { \
		echo "$(PYTHON_$*) does not run: install it, or name another with" \
			"make test-ends $$(echo $* | tr a-z A-Z)=path/to/python" >&2; \
		exit 1; }
	@$(PYTHON_$*) -m venv --clear .venv-$*
	@touch $@
