# Two commands start everything: `make demo` and `make test`. Both create .venv first where it is missing
# or older than what it is made from; `make check` is the whole gate.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready
JOBS   ?= 2
TESTS  ?=

MAKEFLAGS += --no-print-directory

.PHONY: help install demo test check format lint types benchmark clean

help:
	@echo "make demo       train the forum's net by hand, optimised and native, side by side"
	@echo "make test       run the tests (JOBS=2 processes; TESTS=tests/test_demo.py for a part)"
	@echo "make check      format, lint, types and tests: the whole gate"
	@echo "make format     let ruff format and fix"
	@echo "make benchmark  measure again and rewrite benchmarks/results"
	@echo "make clean      remove .venv and everything generated"

install: $(READY)

# torch by its pinned version first: a looser requirement, resolved with the rest, may take a newer
# release with gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  "bnrewrite needs Python 3.11 or later, $(PYTHON) is %d.%d: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m bnrewrite.kernels.generated # what calls kernels, built ahead
	@touch $(READY)

demo: $(READY)
	$(BIN)/python -m examples.demo

# one thread per process: two processes with two threads each fight over two cores
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) $(TESTS)

check: lint types test

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

benchmark: $(READY)
	$(BIN)/python -m benchmarks.norms
	$(BIN)/python -m benchmarks.network_norms
	$(BIN)/python -m benchmarks.onnx_norms
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m benchmarks.rewriter
	$(BIN)/torchrun --nproc-per-node 2 -m benchmarks.soak
	$(BIN)/python -m benchmarks.kernel_builds
	$(BIN)/python -m benchmarks.training_steps --keep-memory

clean:
	rm -rf $(VENV) build dist *.egg-info examples/output .pytest_cache .mypy_cache .ruff_cache .hypothesis
