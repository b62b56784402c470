# A fresh machine needs only Python 3.11+ and make: the environment is made by the first command that needs it.
PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
NEED_GB     ?=
PYTEST_ARGS ?= --numprocesses logical --maxprocesses 4 --dist loadfile
MUTATE_ARGS ?=
VERSIONS_ARGS ?=

export PIP_ARGS

RUN   := $(VENV)/bin/python -m
STAMP := $(VENV)/.advcl-hub-installed

.PHONY: help demo test test-all coverage test-versions mutate check format clean
.DEFAULT_GOAL := help

help:  ## list the commands (this text)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  VENV=path      another virtual environment than .venv"
	@echo "  PYTHON=path    the Python that makes the environment"
	@echo "  PIP_ARGS=...   options for pip, such as --extra-index-url with PyTorch's CPU builds"
	@echo "  NEED_GB=number free disk space to insist on before installing (CPU builds need about 2)"
	@echo "  PYTEST_ARGS=.. options for pytest, in place of the parallel run"
	@echo "  MUTATE_ARGS=.. options for tests.mutate, such as --only WORD; VERSIONS_ARGS=.. for .ci/versions.py, such as --only NAME"

demo: $(STAMP)  ## attack two released encoders, then pretrain, attack, compare and export two small ones: runs/demo
	@echo "demo: python -m train.demo --output runs/demo"
	@$(RUN) train.demo --output runs/demo

# One thread a process: the tests run in several, which would fight for the cores.
test: $(STAMP)  ## run the tests, except the slow ones
	@echo "test: python -m pytest -m 'not slow' $(PYTEST_ARGS)"
	@OMP_NUM_THREADS=1 $(RUN) pytest -m 'not slow' $(PYTEST_ARGS)

test-all: $(STAMP)  ## run all tests that this machine can run
	@echo "test-all: python -m pytest $(PYTEST_ARGS)"
	@OMP_NUM_THREADS=1 $(RUN) pytest $(PYTEST_ARGS)

coverage: $(STAMP)  ## run all tests, and list the lines and branches of the library that none of them reaches
	@echo "coverage: python -m coverage run -m pytest $(PYTEST_ARGS)"
	@$(RUN) coverage erase
	@OMP_NUM_THREADS=1 $(RUN) coverage run -m pytest $(PYTEST_ARGS); status=$$?; \
	    $(RUN) coverage combine --quiet && $(RUN) coverage report && exit $$status

test-versions: $(STAMP)  ## run the tests with the lowest and the newest versions that pyproject.toml allows: .versions
	@$(VENV)/bin/python .ci/versions.py $(VERSIONS_ARGS)

mutate: $(STAMP)  ## make faults in a copy of the project and see that the tests notice each of them
	@echo "mutate: python -m tests.mutate $(MUTATE_ARGS)"
	@OMP_NUM_THREADS=1 $(RUN) tests.mutate $(MUTATE_ARGS)

check: $(STAMP)  ## lint (ruff), formatting (ruff format) and types (mypy)
	@echo "check: ruff check"
	@$(RUN) ruff check .
	@echo "check: ruff format --check"
	@$(RUN) ruff format --check .
	@echo "check: mypy"
	@$(RUN) mypy

format: $(STAMP)  ## format the code and mend what ruff can mend
	@$(RUN) ruff check --fix --quiet . || true
	@$(RUN) ruff format .

clean:  ## remove caches and build files; the environment and runs/ stay
	@echo "clean: caches and build files"
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	@find advcl_hub train tests .ci -name __pycache__ -type d -prune -exec rm -rf {} +

# The first Python that starts runs the script; the script looks for one that is new enough.
$(STAMP): pyproject.toml
	@for python in '$(PYTHON)' python3 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 6))' 2>/dev/null; then \
	        exec "$$python" .ci/bootstrap.py --python '$(PYTHON)' --venv '$(VENV)' --stamp '$@' \
	            --pip-args="$$PIP_ARGS" $(if $(NEED_GB),--need-gb '$(NEED_GB)'); \
	    fi; \
	done; \
	echo "setup: no Python found (tried $(PYTHON) and python3); install Python 3.11 or newer," \
	    "or name one: make PYTHON=/path/to/python3.12" >&2; \
	exit 1
