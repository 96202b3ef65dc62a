# `make demo` and `make test` set up everything they need in .venv; nothing is installed outside of it.

PYTHON ?= python3 python3.13 python3.12 python3.11
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BUDGET ?= 10m
WORKERS ?= 2
SCENARIO ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINS := pyproject.toml constraints.txt

.PHONY: help demo test lint format bench coverage clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      find the balance point of a ResNet-20 on Fashion-MNIST; the result lies in runs/demo'
	@echo 'make test      run the whole test suite'
	@echo 'make lint      check style, format and types'
	@echo 'make format    put the style right where that can be done by machine'
	@echo 'make bench     run the benchmark scenarios, or one: make bench SCENARIO=name'
	@echo 'make coverage  try the methods and runtimes on many architectures'
	@echo 'make clean     remove .venv, runs and what tools leave behind'

demo: .venv/full.stamp
	@if [ -e runs/demo/study.db ]; then verb='resume runs/demo'; else verb='demo --out runs/demo'; fi; \
	echo "$(BIN)/trimpoint $$verb --budget $(BUDGET)"; \
	$(BIN)/trimpoint $$verb --budget $(BUDGET) || [ $$? -eq 3 ] # 3: it ran to its end, and nothing met the goal

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -q

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev.stamp
	$(BIN)/python -m benchmarks.run $(SCENARIO)

coverage: .venv/dev.stamp
	$(BIN)/python -m benchmarks.coverage

clean:
	rm -rf .venv runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python of at least 3.11 that can make an environment; a half-made environment is made again.
.venv/python.stamp:
	@found=; \
	for candidate in $(PYTHON); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo 'trimpoint needs Python 3.11 or newer. Got none of: $(PYTHON)' >&2; \
	    echo >&2; echo 'hint: sudo apt-get install python3 python3-venv, or make PYTHON=/path/to/python3' >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$found has no module to make environments with (venv, ensurepip)." >&2; \
	    echo >&2; echo 'hint: sudo apt-get install python3-venv' >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then "$$found" -m venv --clear .venv; fi
	@touch $@

# PyTorch from its own index of CPU builds where that can be reached; elsewhere what pip finds, as everything else.
.venv/torch.stamp: .venv/python.stamp constraints.txt
	$(PIP) install --quiet --no-deps --retries 1 --timeout 60 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	@touch $@

.venv/full.stamp: .venv/torch.stamp $(PINS)
	$(PIP) install --quiet -c constraints.txt -e '.[full]'
	@touch $@

.venv/dev.stamp: .venv/torch.stamp $(PINS)
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch .venv/full.stamp $@
