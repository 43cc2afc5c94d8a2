# Every target sets up what it needs and is safe to repeat. Needs only make and Python 3.11 or newer (PYTHON=python3.12 chooses another).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check types format bench gpu docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install revq into it, every version pinned

# The stamp is written last, so that an interrupted installation is done again. PIP_CONSTRAINT (older pip) and PIP_BUILD_CONSTRAINT
# (pip 25.3 and newer) pin the build backend too.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "revq needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "installing revq into $(VENV) (the first time downloads about 3 GB, most of it PyTorch) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[cpu,dev]'
	@touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $(DOCS_STAMP)

demo: install ## the whole pipeline on embedded photographs, offline, a few minutes on a CPU
	$(BIN)/revq demo

test: install ## all tests, on two processes
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory types

# The package is this very folder, whatever its name: mypy needs to see it under its own.
types: install ## types alone
	@mkdir -p $(VENV)/mypy && ln -sfn ../.. $(VENV)/mypy/revq
	cd $(VENV)/mypy && ../bin/mypy --config-file revq/pyproject.toml revq/*.py revq/cache revq/models revq/stages revq/pipeline revq/benchmarks

format: install ## mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## speed and memory, measured as ratios in one run
	@$(BIN)/revq weights || echo "the networks that judge cannot be had: what needs them is left out"
	@for script in benchmarks/bench_*.py; do $(BIN)/python "$$script" || exit 1; done

gpu: install ## everything that only a GPU can show, in under nine minutes
	$(BIN)/python benchmarks/gpu.py

# Offline and strict: a broken link is an error. The docstrings are read from links, since the package is this very folder, whatever its name.
docs: $(DOCS_STAMP) ## build the documentation site into site/
	@mkdir -p $(VENV)/package/revq && ln -sf $(CURDIR)/*.py $(patsubst %/__init__.py,$(CURDIR)/%,$(wildcard */__init__.py)) $(VENV)/package/revq/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean: ## remove .venv, caches and the demo's output
	rm -rf $(VENV) revq-demo site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
