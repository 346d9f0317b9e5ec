# Everything a newcomer needs is `make demo` and `make test`; both set up .venv first.
# TORCH: what to install as torch. The default is a CPU build where the machine offers one by that number; elsewhere, for a
# CPU build: make test TORCH="torch --index-url <the index of CPU wheels>", for CUDA: make test TORCH=torch
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# REQUIREMENTS: a file of pinned dependencies, in the place of the newest that there are.
REQUIREMENTS ?=

.PHONY: demo test test-slow test-some test-matrix cases mutation check bench clean

$(VENV)/.done: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(if $(REQUIREMENTS),--requirement $(REQUIREMENTS)) --editable ".[test]"
	touch $@

demo: $(VENV)/.done
	$(BIN)/python examples/demo.py demo

test: $(VENV)/.done
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.done
	$(BIN)/python -m pytest -m slow

# What dependencies are most likely to break: importing, mapping, stores, growing cubes, layouts, catalogues.
SOME = architecture sentinel2 mapping store growing object_stores overviews layouts catalogues cog

test-some: $(VENV)/.done
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal $(SOME:%=tests/test_%.py)

# The same on other Pythons with the newest dependencies, and with the lowest that pyproject.toml allows (see .ci/matrix).
# A Python whose torch is a CUDA build takes 7 GB for a while, in FOLDER.
MATRIX = 3.11 3.12 3.13 3.14 lowest
FOLDER = build/matrix

test-matrix:
	mkdir -p $(FOLDER)
	.ci/matrix $(FOLDER) $(MATRIX)

# Programs that found faults once; CASES=attack/16 runs one of them.
cases: $(VENV)/.done
	$(BIN)/python tests/cases.py $(CASES)

# Changes of the code that no test notices: MODULE="native overlap" for some modules, SAMPLE=0 for all changes (hours).
SAMPLE = 60

mutation: $(VENV)/.done
	$(BIN)/python -m pip install --quiet --editable ".[mutation]"
	$(BIN)/python benchmarks/mutations.py $(MODULE) --sample $(SAMPLE)

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
