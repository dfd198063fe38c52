PYTHON ?= python3
BIN := .venv/bin
# A CPU allocator that keeps freed tensors instead of handing them back to the kernel: up to twice the speed.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184
export MALLOC_TOP_PAD_ ?= 268435456

.PHONY: demo test quick faults lint docs-pages setup clean

demo: setup
	$(BIN)/gradsift demo

# A file of tests goes to one process as a whole, and each process has one thread: threads of two that share a core wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

test: setup lint
	$(PYTEST)

# Everything that is not marked slow: under 3 minutes on two cores.
quick: setup
	$(PYTEST) -m "not slow"

# 200 SIGKILLs over real runs (about 6 minutes on two cores), then long fuzzing.
faults: setup
	$(BIN)/python -m tests.faults.killed --kills 200
	GRADSIFT_FUZZ=5000 $(BIN)/python -m pytest tests/faults/test_fuzz.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check gradsift tests bench docs
	$(BIN)/pyright
	$(BIN)/lint-imports

# The pages that are written from the code: after a change of a flag, a setting or a method.
docs-pages: setup
	for page in cli methods settings; do \
		if test -f docs/generate_$$page.py; then $(BIN)/python docs/generate_$$page.py || exit 1; fi; \
	done

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info
