# Everything a contributor runs. Needs python3 (3.11 or newer), make and a package index; the rest is set up in .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
PIP    := $(BIN)/python -m pip --disable-pip-version-check
OUT    ?= slimc-demo
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format types check bench clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install slimc with everything that the demo and the tests need

demo: $(STAMP) ## train a small network on real data, compress, prove, export and measure it (OUT=DIR)
	$(BIN)/slimc demo --out $(OUT)

test: $(STAMP) ## run the quick tests, two at a time (JOBS=8: eight)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(STAMP) ## run every test, the slow ones included
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## put style and formatting right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check the types of the package and of the tests
	$(BIN)/mypy -p slimc
	$(BIN)/mypy tests
	MYPYPATH=tests $(BIN)/mypy -p bench

check: lint types test ## everything that a change must pass

bench: $(STAMP) ## measure speed, growth with depth and memory against Torch-Pruning, about 10 minutes on an idle machine
	@echo "bench: about 10 minutes on two idle cores; results go to bench/results (the other scripts: bench/README.md)"
	$(BIN)/python -m bench.speed
	$(BIN)/python -m bench.scale
	$(BIN)/python -m bench.memory

clean: ## delete caches and build products
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find slimc graph exporters tests bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## delete .venv as well
	rm -rf $(VENV)

# The stamp makes the second run quick: nothing is installed until one of these two files changes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "setup: $(PYTHON) must be Python 3.11 or newer (another one: make setup PYTHON=python3.12)" >&2; exit 1; }
	@echo "setup: 1/3 virtual environment in $(VENV)"
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) \
	  || { echo "setup: '$(PYTHON) -m venv' failed (Debian and Ubuntu ship it apart, as python3-venv)" >&2; exit 1; }
	@echo "setup: 2/3 torch and torchvision, the pair in constraints.txt (large downloads, minutes the first time)"
	@$(PIP) install -c constraints.txt torch torchvision \
	  || { echo "setup: installing torch and torchvision failed; the reason is above" >&2; exit 1; }
	@echo "setup: 3/3 slimc with the extras cpu and dev"
	@$(PIP) install --quiet -c constraints.txt -e '.[cpu,dev]' \
	  || { echo "setup: installing slimc or one of its dependencies failed; the reason is above" >&2; exit 1; }
	@touch $@
	@echo "setup: done"
