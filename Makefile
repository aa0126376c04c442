# make demo   trains PARROT and its baselines on a spoken demo corpus and reports
# make test   runs the quick tests; make test-all also the slow ones (crossed options, installs, every CUDA source)
# make mutants plants faults into the kernels and sees whether the tests notice (an hour or more)
# make fuzz   runs the ops on random options against the reference, and the readers on damaged files (half an hour)
# make sanitize runs the tests of the CPU kernels under the sanitizers for memory, undefined behaviour and threads
# make bench  measures the kernels beside their peers, in minutes, into runs/bench
# make gpu    on a machine with an NVIDIA GPU: build, tests, sanitizers, timings, profiles, into runs/gpu
# make figures draws the plots of docs/figures from the committed rows
# make docs   builds the documentation site into site/, strictly
# make install-matrix, wheels, typecheck, coverage: what a release is checked with, see docs/release.md
# All make .venv first, from nothing. Another torch: make demo TORCH="torch --index-url URL"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

# Without an NVIDIA driver CUDA kernels could not run, so the development install does not wait for nvcc.
export PARROT_BUILD_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,0)

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

CPP := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all mutants fuzz sanitize bench figures gpu lint format typecheck coverage docs install-matrix wheels doctor clean

demo: $(VENV)/.demo
	$(BIN)/parrot demo --output runs/demo

test: $(VENV)/.test
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(VENV)/.test
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal

mutants: $(VENV)/.test
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python tests/mutants.py

fuzz: $(VENV)/.test
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python tests/fuzz_ops.py --cases 20000
	$(BIN)/python tests/fuzz_files.py --cases 100000

sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitize.py

bench: $(VENV)/.bench
	$(BIN)/parrot bench --suite quick

gpu: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python -m benchmarks.campaign

figures: $(VENV)/.bench
	$(BIN)/python -m benchmarks.plot --figures docs/figures

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(CPP)

typecheck: $(VENV)/.dev
	$(BIN)/mypy

# Figures for Python and for the C++ of a build with gcov, into runs/coverage
coverage: $(VENV)/.dev
	$(BIN)/python tests/coverage_run.py

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PATH="$(BIN):$$PATH" $(BIN)/mkdocs build --strict

install-matrix:
	$(PYTHON) tests/install_matrix.py $(if $(filter command line,$(origin TORCH)),--torch "$(TORCH)")

# The sdist and a wheel for each Python found, checked, into dist/
wheels:
	$(PYTHON) tests/build_wheels.py

doctor: $(VENV)/.demo
	$(BIN)/python -m parrot_kernels

# One stamp per extra, so that `make test` after `make demo` adds only what is missing.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.%: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info parrot_kernels/_C*.so parrot_kernels/build_info.json
