# `make` lists what there is. VENV=dir puts the environment elsewhere.
SHELL := bash
VENV ?= .venv
# Without compiled modules every start of Python would take half a minute.
unexport PYTHONDONTWRITEBYTECODE
NEWEST := $(VENV)-newest
PYTHON := $(VENV)/bin/python
# What is compiled lies in the user's cache; this only says that it has been tried with this environment.
KERNEL := $(VENV)/.kernels-built
# What setuptools leaves behind in a checkout.
BUILT := build arkv/build arkv_bench.egg-info arkv/arkv.egg-info
PYTEST := TQDM_DISABLE=1 $(PYTHON) -m pytest
# Each test computes with one thread.
FAST := $(PYTEST) -m "not slow" -n auto --maxprocesses 8 --dist worksteal
# Two files at a time: many wait for other processes, and each may hold a real model.
SLOW := $(PYTEST) -m slow -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env env-newest system-deps demo test gate check lint format types docs wheels clean lock

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## the environment, .venv: minutes once, then nothing while the pins stay the same
	@scripts/setup_env.sh --venv "$(VENV)"
	@$(MAKE) --no-print-directory $(KERNEL)

# It makes decoding faster; without a C compiler everything works too, which a line says.
$(KERNEL): $(wildcard arkv/kernels/cpu/*.[ch]) arkv/kernels/cpu/building.py constraints.txt
	@$(PYTHON) -m arkv.kernels && touch $@ || true

env-newest: env ## a second one beside it with the newest transformers, for the slow tests
	@scripts/setup_env.sh --venv "$(NEWEST)" --base "$(VENV)" --newest-transformers

# A new environment has only what it needs; `make env` adds the rest.
demo: ## the methods side by side on a small model, with the report: see runs/demo
	@[ -x "$(VENV)/bin/arkv-bench" ] || scripts/setup_env.sh --venv "$(VENV)" --extras ""
	@$(MAKE) --no-print-directory $(KERNEL)
	@"$(VENV)/bin/arkv-bench" run --preset demo --outdir runs/demo
	@"$(VENV)/bin/arkv-bench" report runs/demo --html runs/demo/page.html

# Every step runs, whatever the ones before it said. Last come the closing lines of both pytest runs.
test: env-newest ## everything: lint, types, fast tests, slow tests, the regression gate
	@set -o pipefail; logs=$$(mktemp -d); trap 'rm -rf "$$logs"' EXIT; failed=; \
	if [ "$${CI:-}" = true ]; then $(MAKE) --no-print-directory system-deps $(KERNEL); fi; \
	for step in lint types; do $(MAKE) --no-print-directory $$step || failed="$$failed $$step"; done; \
	$(FAST) 2>&1 | tee "$$logs/fast" || failed="$$failed fast-tests"; \
	$(SLOW) 2>&1 | tee "$$logs/slow" || failed="$$failed slow-tests"; \
	$(MAKE) --no-print-directory gate || failed="$$failed gate"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; fi; \
	for lane in fast slow; do grep -E '^=.* in [0-9.]+s' "$$logs/$$lane" | tail -n 1; done; \
	[ -z "$$failed" ]

# On hardware of its own the baseline's speed says little, so that here only a slowdown to a half fails.
gate: env ## the preset ci against results/ci: scores, divergence, bytes
	@"$(VENV)/bin/arkv-bench" run --preset ci --outdir runs/ci --fresh
	@"$(VENV)/bin/arkv-bench" check runs/ci --against results/ci --speed-tolerance 0.5

check: lint types ## lint, types and the fast tests: before every commit
	@$(FAST)

lint: env ## ruff: rules and format
	@$(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .

format: env ## ruff: mend what can be mended by itself
	@$(PYTHON) -m ruff check --fix --exit-zero . && $(PYTHON) -m ruff format .

types: env ## mypy: strict for arkv, plain for bench and tasks
	@$(PYTHON) -m mypy

system-deps: ## a browser for the tests that open a page, and a C compiler: installed by root on Debian, named elsewhere
	@lacking=; \
	command -v chromium chromium-browser google-chrome >/dev/null || lacking="chromium fonts-dejavu-core"; \
	command -v cc >/dev/null || lacking="$$lacking gcc libc6-dev"; \
	if [ -z "$$lacking" ]; then \
	    echo "system packages: there"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get -qq update >/dev/null && \
	    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$lacking >/dev/null; then \
	    echo "system packages: $$lacking installed"; \
	else \
	    echo "system packages: tests that need them are skipped: apt-get install $$lacking"; \
	fi

docs: env ## docs/commands anew from the code
	@$(PYTHON) scripts/make_docs.py

# A wheel is built from its sdist, so that both hold the same, and never what an older build left in build/.
wheels: env ## dist/: sdist and wheel of arkv and of arkv-bench
	@rm -rf dist $(BUILT)
	@for project in arkv .; do \
	    (cd $$project && $(abspath $(PYTHON)) -c "from setuptools.build_meta import build_sdist as b; b('$(CURDIR)/dist')" \
	        >/dev/null) || exit 1; \
	done
	@$(PYTHON) -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist dist/*.tar.gz
	@rm -rf $(BUILT); ls dist

clean: ## caches and build outputs; environments and runs stay
	@rm -rf dist $(BUILT) .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find arkv bench tasks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One resolution for every Python and platform. Lines already in the file stay as long as they fit.
lock: ## constraints.txt anew from both pyproject.toml (needs uv)
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv"; exit 1; }
	@head=$$(grep '^#' constraints.txt) && body=$$(mktemp) && cp constraints.txt "$$body" && \
	uv pip compile -q --universal --python-version 3.10 --all-extras --no-annotate --no-header --no-emit-package arkv pyproject.toml -o "$$body" >/dev/null && \
	{ echo "$$head"; grep -vE '^(nvidia-|cuda-|setuptools)' "$$body"; } >constraints.txt && rm "$$body"
