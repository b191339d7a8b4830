# make demo   train a small Moneta on the standard library's source, see examples/pretrain.py (minutes, no downloads but pip's)
# make test   lint, type check and tests, all that CI runs
# make lint   only lint and type check
#
# Needs python3 (3.11 or newer) with venv and pip; everything goes into VENV.

PYTHON ?= python3
VENV ?= .venv
DEMO_FLAGS ?=
PYTEST_FLAGS ?= -n 2
# Without a GPU a plain `pip install torch` may bring gigabytes of CUDA libraries.
PIP_FLAGS ?= $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/pretrain.py $(DEMO_FLAGS)

# One thread for each test process: two processes with two threads each are slower on two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest modeling_tests $(PYTEST_FLAGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest kernels/tests $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/ty check --python $(VENV)

clean:
	rm -rf $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints-cpu.txt
	$(PIP) $(PIP_FLAGS) -e '.[train,viz]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints-cpu.txt
	$(PIP) $(PIP_FLAGS) -e '.[dev]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
