# Everything a newcomer needs is `make demo` and `make test`; both set up .venv first.
# TORCH: what to install as torch. The default is a CPU build where the machine offers one by that number; elsewhere, for a
# CPU build: make test TORCH="torch --index-url <the index of CPU wheels>", for CUDA: make test TORCH=torch
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow check bench clean

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: $(VENV)/.done
	$(BIN)/python examples/demo.py demo

test: $(VENV)/.done
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.done
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.done
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/gaps.py
	$(BIN)/python benchmarks/depths.py
	$(BIN)/python benchmarks/bfloat16.py
	$(BIN)/python benchmarks/pipeline.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/cluster.py
	$(BIN)/python benchmarks/quality.py --adapt
	$(BIN)/python benchmarks/sixty.py

clean:
	rm -rf $(VENV) demo
