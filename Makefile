# Two commands: `make demo` and `make test`. Both set up their own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
# Pinned, and installed before anything that depends on it: no other package chooses a torch.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0

# Tests run in this many processes, each file in one of them, with one thread each where a model is
# small: threads of several processes would wait for one another.
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint bench clean

demo: $(READY)
	$(BIN)/diffit-kernels demo

test: $(READY) lint
	$(PYTEST) -m "not slow"

test-all: $(READY) lint
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

bench: $(READY)
	$(BIN)/python -m pytest benchmarks

$(READY): pyproject.toml setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(TORCH) $(TRITON)
	$(BIN)/python -m pip install -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build diffit_kernels/_native_*.so *.egg-info .pytest_cache .ruff_cache .benchmarks
