# make demo   trains PARROT and its baselines on a spoken demo corpus and reports
# make test   runs the test suite; make test-all also what takes minutes (every CUDA source for every architecture)
# make bench  measures the kernels beside their peers, in minutes, into runs/bench
# All make .venv first, from nothing. Another torch: make demo TORCH="torch --index-url URL"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

# Without an NVIDIA driver CUDA kernels could not run, so the development install does not wait for nvcc.
export PARROT_BUILD_CUDA ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,0)

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-all bench lint format doctor clean

demo: $(VENV)/.demo
	$(BIN)/parrot demo --output runs/demo

test: $(VENV)/.test
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto -m "not slow"

test-all: $(VENV)/.test
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto

bench: $(VENV)/.bench
	$(BIN)/parrot bench --suite quick

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

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
	rm -rf $(VENV) build dist *.egg-info parrot_kernels/_C*.so parrot_kernels/build_info.json
