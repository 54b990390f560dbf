# Everything that is run on this project. `make help` lists it.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := s3dcp tests examples benchmarks

# The pin lives in pyproject.toml, once.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

# Looks at the clock, and is run when nothing else is.
ALONE := tests/test_serve_model.py
# Gives its process an accelerator.
APART := tests/test_accelerators.py

SOAK_SECONDS ?= 600

.DEFAULT_GOAL := help
.PHONY: help install lint types tests examples check test fuzz soak demo bench clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; do \
		printf '%-10s %s\n' "$$name" "$$text"; done

install: $(STAMP) ## Make .venv with the package (editable) and all that it is developed with

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "s3dcp needs Python 3.11 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first and alone: pip then takes the pinned build that the machine offers, before
	# any other requirement can have a say in which.
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

lint: install ## Check style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: install ## Check types, strictly
	$(BIN)/mypy

tests: install ## Run the tests, two processes at a time
	$(BIN)/pytest -n 2 --dist loadgroup --ignore=$(ALONE) --ignore=$(APART)
	$(BIN)/pytest $(APART)
	$(BIN)/pytest $(ALONE)

examples: install ## Run the examples' tests alone
	$(BIN)/pytest tests/test_examples.py $(ALONE)

# For each fuzzer; five times as many for those that make no request.
FUZZ_EXAMPLES ?= 10000

fuzz: install ## Fuzz the parsers at length; FUZZ_EXAMPLES says how long
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/pytest -n 2 --timeout 0 --hypothesis-profile fuzz tests/test_fuzz.py

bench: install ## Measure s3dcp beside its peers, and write benchmarks/README.md
	$(BIN)/python -m benchmarks

check: lint types tests ## Run every check

test: install check ## Install, then run every check: what CI runs

soak: install ## Save and load for SOAK_SECONDS (600), and in bulk: nothing may be left over
	SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/pytest tests/test_load.py --timeout 0

demo: install ## Train, kill and resume a small GPT against an embedded S3
	$(BIN)/python examples/demo.py

clean: ## Remove caches and build products (.venv stays)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
