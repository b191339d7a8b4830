# make demo   train a small Moneta on the standard library's source, see examples/pretrain.py (minutes, no downloads but pip's)
# make test   lint, type check and tests, the first and longest of what CI runs; `test-oldest` and `test-triton36` follow
# make test-slow   the tests of `make test` and those that repeat them with more combinations (hours)
# make lint   only lint and type check
# make test-oldest   models, cache, generation, adapters and training on the oldest Transformers that pyproject.toml admits
# make test-triton36 what Triton 3.6, that of PyTorch 2.11, makes of the kernels: compiled for GPUs, without one
# make triton36      only its environment, in which kernels/precompile.py compiles ahead for such a GPU
#
# Needs python3 (3.11 or newer) with venv and pip; everything goes into VENV.

PYTHON ?= python3
VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
TRITON36_VENV ?= .venv-triton36
DEMO_FLAGS ?=
# Workers that have nothing left take tests from the others: the longest take minutes.
PYTEST_FLAGS ?= -n 2 --dist worksteal
# Without a GPU a plain `pip install torch` may bring gigabytes of CUDA libraries.
PIP_FLAGS ?= $(if $(shell command -v nvidia-smi),,-c constraints-cpu.txt)

BIN := $(VENV)/bin
# Compiling all that is installed takes minutes, most of it for modules that are never imported.
INSTALL := -m pip install --disable-pip-version-check --no-input --no-compile
PIP := $(BIN)/python $(INSTALL)

.PHONY: demo test test-slow test-oldest test-triton36 triton36 lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/pretrain.py $(DEMO_FLAGS)

# One thread for each test process: two processes with two threads each are slower on two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest modeling_tests $(PYTEST_FLAGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest kernels/tests $(PYTEST_FLAGS)

test-slow:
	RUN_SLOW=1 $(MAKE) test

# What moves with Transformers: names of arguments, caches, generation, saved memories, PEFT, Trainer. Two families and
# their hybrids are enough: none of that differs between them. Nor do sharding and export, which the newest versions show.
RANGE_TESTS := $(addprefix modeling_tests/test_,transformers_contract.py inputs.py generation_miras.py \
	speculation.py saved_memory.py configuration_miras.py registration.py peft.py trainer.py \
	modeling_miras.py::MonetaHybridModelTest)

test-oldest: $(OLDEST_VENV)/.test
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest $(RANGE_TESTS) -k "not memora and not fsdp2 and not tp_ and not torch_export" \
		$(PYTEST_FLAGS)

# Compiles only, so it needs neither Transformers nor the models' tests; the interpreter's tests run on the newest.
test-triton36: triton36
	OMP_NUM_THREADS=1 $(TRITON36_VENV)/bin/python -m pytest kernels/tests/test_compile_report.py \
		kernels/tests/test_precompile.py $(PYTEST_FLAGS)

triton36: $(TRITON36_VENV)/.triton36

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/ty check --python $(VENV)

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(TRITON36_VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints-cpu.txt
	$(PIP) $(PIP_FLAGS) -e '.[train,viz]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints-cpu.txt
	$(PIP) $(PIP_FLAGS) -e '.[dev]'
	touch $@

$(OLDEST_VENV)/.test: $(OLDEST_VENV)/bin/python pyproject.toml constraints-oldest.txt
	$(OLDEST_VENV)/bin/python $(INSTALL) -c constraints-oldest.txt \
		-e '.[train,peft,trl,test]'
	touch $@

$(TRITON36_VENV)/.triton36: $(TRITON36_VENV)/bin/python constraints-triton36.txt
	$(TRITON36_VENV)/bin/python $(INSTALL) -c constraints-triton36.txt \
		torch triton numpy pytest pytest-xdist
	touch $@

$(VENV)/bin/python $(OLDEST_VENV)/bin/python $(TRITON36_VENV)/bin/python:
	$(PYTHON) -m venv $(@:/bin/python=)
