# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without these a test would wait for a display, or write beside the sources.
export MPLBACKEND := Agg
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# What makes an environment with an extra of pyproject.toml in it. Stamped, so that a
# second run installs nothing.
ENVIRONMENT = $(PYTHON) -m venv $(@D) && $(@D)/bin/pip install --quiet \
  --disable-pip-version-check --editable

$(VENV)/.examples $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml
	$(ENVIRONMENT) '.[$*]'
	@touch $@

# Others have one of their own: beside the TPU's library, CUDA's or a live torch the
# ordinary tests are not the same, and what themes ask for is to decide nothing elsewhere.
$(VENV)-bench/.bench $(VENV)-docs/.docs $(VENV)-mutants/.mutants: pyproject.toml
	$(ENVIRONMENT) '.[$(@F:.%=%)]'
	@touch $@

$(VENV)-tpu/.test: JAX := jax[tpu]
$(VENV)-gpu/.test: JAX := jax[cuda12-local]
$(VENV)-tpu/.test $(VENV)-gpu/.test: pyproject.toml
	$(ENVIRONMENT) . '$(JAX)' chex hypothesis pytest
	@touch $@

.PHONY: demo
demo: $(VENV)/.examples  ## Train on the digits, print the table, draw out/digits.png
	$(BIN)/python -m examples.digits $(ARGS)

# The tests of programs (lessons, benchmarks, the code of the site's pages, the command, what
# other processes run) are apart: a newcomer is spared their time. A worker that is done
# takes over what another has left.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
PROGRAMS := test_example_*.py test_benchmark_*.py test_pages.py \
  test_average_command.py test_export.py test_processes.py

.PHONY: test
test: $(VENV)/.test  ## Run the library's tests and the doctests
	$(PYTEST) $(PROGRAMS:%=--ignore-glob='tests/%') $(ARGS)

.PHONY: test-programs
test-programs: $(VENV)/.test  ## Run the tests of lessons, benchmarks, pages and processes
	$(PYTEST) $(PROGRAMS:%=tests/%) $(ARGS)

.PHONY: test-tpu
test-tpu: $(VENV)-tpu/.test  ## Ask the TPU compiler, without a TPU
	$(VENV)-tpu/bin/python -m pytest tests/tpu $(ARGS)

# On the CPU, or the plugin looks for CUDA.
.PHONY: test-gpu
test-gpu: $(VENV)-gpu/.test  ## Ask the GPU compiler, without a GPU
	JAX_PLATFORMS=cpu $(VENV)-gpu/bin/python -m pytest tests/gpu $(ARGS)

BENCHMARKS := step_cost training_loop transformer one_pass rate_sweep

.PHONY: bench
bench: $(VENV)-bench/.bench  ## Measure what it costs and what it buys; tables and pictures
	for name in $(BENCHMARKS); do \
	  $(VENV)-bench/bin/python -m benchmarks.$$name $(ARGS) || exit 1; done

# Fetched here once, so that neither the build nor a page asks another host for it.
MATHJAX := build/static/.mathjax-3.2.2
.PHONY: mathjax
mathjax: $(MATHJAX)  ## Fetch MathJax for the site (npm)
$(MATHJAX):
	rm -rf build/static && mkdir -p build/static/mathjax
	cd build/static && npm pack --silent mathjax@3.2.2 >/dev/null
	tar -xzf build/static/mathjax-3.2.2.tgz -C build/static/mathjax --strip-components=1 \
	  package/LICENSE package/es5/tex-mml-chtml.js package/es5/output/chtml/fonts
	rm build/static/mathjax-3.2.2.tgz
	@touch $@

.PHONY: docs
docs: $(VENV)-docs/.docs $(MATHJAX)  ## Build the documentation site in build/docs
	rm -rf build/docs
	$(VENV)-docs/bin/python -m sphinx -E -W --keep-going -q -d build/doctrees docs build/docs

.PHONY: test-docs
test-docs: docs  ## Build the site and look at it in Chromium
	$(VENV)-docs/bin/python -m pytest tests/site $(ARGS)

# For hours: `make mutants MODULE=_asgd` is one module of them.
.PHONY: mutants
mutants: $(VENV)-mutants/.mutants  ## Change the library a little: does a test notice?
	nice $(VENV)-mutants/bin/python -m tools.mutants $(MODULE) $(ARGS)

.PHONY: lint
lint: $(VENV)/.dev  ## Check style and format (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: types
types: $(VENV)/.dev  ## Check types (mypy)
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.dev  ## Format and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: dist
dist: $(VENV)/.dev  ## Build the wheel and the sdist, and check what an index would
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

.PHONY: clean
clean:  ## Remove what the targets made
	rm -rf .venv* .nox build dist out *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
