# Needs Python 3.10 or newer; everything else is installed into .venv, from the versions in constraints.txt.
#
#   make demo ARGS="--quick"      ARGS go to the command behind the target
#   make test PYTHON=python3.12   another Python, for a fresh .venv

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PIP_REQUIRE_VIRTUALENV := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz sanitize kernels cuda lint format bench bench-ops gpu clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 16

install: $(STAMP) ## .venv with the package, its extension and all tools

# The stamp is written last, so that an interrupted installation is taken up again and not mistaken for a finished one.
# PyTorch comes first and by itself: the package's extension is compiled against it, without build isolation.
$(STAMP): pyproject.toml constraints.txt setup.py racecar_kernels/cuda_toolkit.py $(wildcard csrc/* csrc/cuda/*)
	@command -v $(PYTHON) >/dev/null || { echo "no Python is named $(PYTHON); try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else \
	  "Python 3.10 or newer is needed, %s is %d.%d; try: make PYTHON=python3.12" % (sys.executable, v[0], v[1]))'
	@rm -f $@
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet -c constraints.txt torch numpy setuptools ninja
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'from racecar_kernels import extension as e; print("compiled extension:", e.why_not() or "in use")'
	@touch $@

demo: $(STAMP) ## the main job on handwritten digits: a table, and a report with pictures
	$(BIN)/racecar demo --out racecar-demo $(ARGS)

# Workers of one thread each: two processes that each use all cores slow each other down many times over.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
test: $(STAMP) ## all tests with line coverage; ARGS="tests/test_measure.py --no-cov" for one file, WORKERS=0 for one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term --cov-report=html $(ARGS)
	@echo "lines that no test runs: htmlcov/index.html"

CASES ?= 10000
fuzz: $(STAMP) ## CASES=10000 random calls of the public ops, right or refused; ARGS="--seed 7" repeats a run
	$(BIN)/python tests/fuzz.py --cases $(CASES) $(ARGS)

sanitize: $(STAMP) ## the tests of the C++ under AddressSanitizer and UBSan; ARGS="tests/test_pointwise.py" for a part
	bash .ci/sanitize $(BIN)/python $(ARGS)

kernels: $(STAMP) ## compiles every shipped Triton kernel for sm_80, sm_90 and sm_100, without a GPU, and reads it back
	PYTHONPATH="$(CURDIR):$(CURDIR)/python" $(BIN)/python -m bench.compile_kernels $(ARGS)

cuda: $(STAMP) ## compiles every CUDA kernel with nvcc for all architectures, without a GPU, and reads it back
	PYTHONPATH="$(CURDIR):$(CURDIR)/python" $(BIN)/python -m bench.compile_cuda $(ARGS)

lint: $(STAMP) ## ruff, clang-format and mypy, as CI runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')
	$(BIN)/mypy

format: $(STAMP) ## rewrites the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inl')

bench: $(STAMP) ## step time, kept and peak bytes against plain training, on this CPU
	$(BIN)/racecar bench $(ARGS)

bench-ops: $(STAMP) ## single operators and chains by pytest-benchmark; ARGS="-k MNIST" for some
	$(BIN)/python -m pytest bench/test_ops.py --benchmark-only --benchmark-group-by=group --benchmark-sort=mean \
	  --benchmark-columns=median,iqr,rounds $(ARGS)

# On purpose without .venv: a GPU machine has its own PyTorch, and perhaps no network.
gpu: ## tests and figures on a GPU into OUT=dir, with PYTHON's own PyTorch; DRY=1: the same code on the CPU
	@test -n "$(OUT)" || { echo 'say where to write: make gpu OUT=gpu-results (DRY=1 to try it on the CPU)' >&2; exit 2; }
	PYTHONPATH="$(CURDIR):$(CURDIR)/python$${PYTHONPATH:+:$$PYTHONPATH}" \
	  $(PYTHON) -m bench.gpu --out "$(OUT)" $(if $(filter-out 0,$(DRY)),--dry-run) $(ARGS)

clean: ## removes what make and the tools made, .venv included
	rm -rf $(VENV) build dist ./*.egg-info python/*.egg-info racecar_kernels/_C*.so racecar-demo out htmlcov .coverage \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
