# SPDX-License-Identifier: Apache-2.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests must not wait for a display, or write next to the sources.
export MPLBACKEND := Agg
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help

.PHONY: help
help:  ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

# Creates an environment with an extra of pyproject.toml. A stamp file records it, so that
# later runs install nothing.
ENVIRONMENT = $(PYTHON) -m venv $(@D) && $(@D)/bin/pip install --quiet \
  --disable-pip-version-check --editable

$(VENV)/.examples $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml
	$(ENVIRONMENT) '.[$*]'
	@touch $@

# These get their own environments: libtpu, CUDA or torch would change the ordinary tests,
# and the docs theme pins versions.
$(VENV)-bench/.bench $(VENV)-docs/.docs: pyproject.toml
	$(ENVIRONMENT) '.[$(@F:.%=%)]'
	@touch $@

$(VENV)-tpu/.test: JAX := jax[tpu]
$(VENV)-gpu/.test: JAX := jax[cuda12-local]
$(VENV)-tpu/.test $(VENV)-gpu/.test: pyproject.toml
	$(ENVIRONMENT) . '$(JAX)' chex hypothesis pytest
	@touch $@

.PHONY: demo
demo: $(VENV)/.examples  ## Train on digits; print a table and draw out/digits.png
	$(BIN)/python -m examples.digits $(ARGS)

# Tests of programs have their own target, which keeps `make test` short. `worksteal` moves
# tests from a busy worker to an idle one.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
PROGRAMS := test_examples.py test_first_ema.py test_benchmarks.py test_studies.py \
  test_average_command.py test_export.py test_processes.py

.PHONY: test
test: $(VENV)/.test  ## Run the library's tests and the doctests
	$(PYTEST) $(PROGRAMS:%=--ignore=tests/%) $(ARGS)

.PHONY: test-programs
test-programs: $(VENV)/.test  ## Run the tests of examples, benchmarks, studies, pages
	$(PYTEST) $(PROGRAMS:%=tests/%) $(ARGS)

.PHONY: test-tpu
test-tpu: $(VENV)-tpu/.test  ## Compile for TPU and check the result (no TPU needed)
	$(VENV)-tpu/bin/python -m pytest tests/tpu $(ARGS)

# JAX_PLATFORMS keeps the plugin from looking for CUDA.
.PHONY: test-gpu
test-gpu: $(VENV)-gpu/.test  ## Compile for GPU and check the result (no GPU needed)
	JAX_PLATFORMS=cpu $(VENV)-gpu/bin/python -m pytest tests/gpu $(ARGS)

BENCHMARKS := step_cost training_loop transformer
STUDIES := one_pass rate_sweep
RUN = for name in $(1); do $(VENV)-bench/bin/python -m $$name $(ARGS) || exit 1; done

.PHONY: bench
bench: $(VENV)-bench/.bench  ## Run the benchmarks; write tables and plots
	$(call RUN,$(BENCHMARKS:%=benchmarks.%))

.PHONY: studies
studies: $(VENV)-bench/.bench  ## Run the short studies; write tables and plots
	$(call RUN,$(STUDIES:%=studies.%))

# Downloaded once, so that neither the build nor a page loads it from another host.
MATHJAX := build/static/.mathjax-3.2.2
.PHONY: mathjax
mathjax: $(MATHJAX)  ## Download MathJax for the documentation (npm)
$(MATHJAX):
	rm -rf build/static && mkdir -p build/static/mathjax
	cd build/static && npm pack --silent mathjax@3.2.2 >/dev/null
	tar -xzf build/static/mathjax-3.2.2.tgz -C build/static/mathjax --strip-components=1 \
	  package/LICENSE package/es5/tex-mml-chtml.js package/es5/output/chtml/fonts
	rm build/static/mathjax-3.2.2.tgz
	@touch $@

# Executes the pages whose code changed since the last build (build/jupyter_cache).
.PHONY: docs
docs: $(VENV)-docs/.docs $(MATHJAX)  ## Build the documentation in build/docs
	rm -rf build/docs
	$(VENV)-docs/bin/python -m sphinx -E -W --keep-going -q -j 2 -d build/doctrees docs build/docs

.PHONY: test-docs
test-docs: docs  ## Build the documentation and test it in Chromium
	$(VENV)-docs/bin/python -m pytest tests/site $(ARGS)

.PHONY: lint
lint: $(VENV)/.dev  ## Check style and format (ruff), and workflows (zizmor)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/zizmor --offline --quiet --min-severity medium .github/workflows

.PHONY: types
types: $(VENV)/.dev  ## Check types (mypy)
	$(BIN)/mypy

.PHONY: format
format: $(VENV)/.dev  ## Format and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: dist
dist: $(VENV)/.dev  ## Build and check the wheel and the sdist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

.PHONY: clean
clean:  ## Remove everything the targets create
	rm -rf .venv* .nox build dist out *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
