# `make help` lists what there is to run. Nothing is needed beforehand but Python 3.11 or newer with
# pip, and GNU make: each target makes the environment it runs in, below .venv, on first use.

PYTHON ?= python3
# Further options of the program that a target runs: make demo ARGS="--duration 5"
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two editable installs at once would write the same metadata.
.NOTPARALLEL:
.PHONY: help demo test test-environment test-plain test-compiled test-wheel check lint types imports bench docs docs-links pins clean
.PHONY: coverage explore model soak fuzz faults sanitize

# Such as 3.14.6 or, free-threaded, 3.14.6t; "old 3.10.1"; empty if $(PYTHON) does not run.
VERSION := $(shell $(PYTHON) -c 'import sys; v = sys.version_info; \
	print("old " * (v < (3, 11)) + "%d.%d.%d" % v[:3] + getattr(sys, "abiflags", ""))' 2>/dev/null)
KEY := $(subst old ,old-,$(or $(VERSION),none))

unusable = $(if $(VERSION),$(if $(filter old,$(VERSION)),$(error \
	ShardedFlight needs Python 3.11 or newer, but $(PYTHON) is $(lastword $(VERSION)): \
	set PYTHON to another one)),$(error \
	$(PYTHON) does not run: set PYTHON to a Python 3.11 or newer))

# One environment for each purpose and interpreter, remade when the pins or the project change.
env = .venv/$1-$(KEY)
run = $(call env,$1)/bin/python -m

# Other libraries to compare with: one that cannot be installed is not measured, and that is said.
peers = $1 -m pip install --disable-pip-version-check --quiet --no-deps -r requirements/peers.txt || \
	grep -v "^\#" requirements/peers.txt | while read -r peer; do \
		$1 -m pip install --disable-pip-version-check --quiet --no-deps "$$peer" || \
			echo "Without $$peer"; \
	done

.venv/%-$(KEY)/made: requirements/%.txt requirements/peers.txt requirements/build.txt pyproject.toml
	$(unusable)@echo "Making $(@D)"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install --disable-pip-version-check --no-compile \
		-r requirements/build.txt -r requirements/$*.txt
	@$(if $(filter bench test,$*),$(call peers,$(@D)/bin/python))
	@touch $@

.PRECIOUS: .venv/%-$(KEY)/made

# The package in that environment, its core compiled anew when it changes. Environments of one
# interpreter share the compiled core, which is in src, beside the plain one. Where it could not be
# compiled, the next `make` tries again.
.venv/%-$(KEY)/built: .venv/%-$(KEY)/made setup.py src/shardedflight/_core.py \
		src/shardedflight/_core.pxd
	@SHARDEDFLIGHT_PURE= $(@D)/bin/python -m pip install --disable-pip-version-check --quiet \
		--no-build-isolation --no-deps --editable .
	@if $(call is_compiled,$(@D)); then touch $@; else \
		echo "The core could not be compiled, so there is only the plain one."; \
		echo "SHARDEDFLIGHT_REQUIRE_COMPILED=1 make test says why."; \
	fi

# The plain core can be chosen where both are, so that variable says what to run, not what to build.
is_compiled = SHARDEDFLIGHT_PURE= $1/bin/python -c 'import sys, shardedflight; \
	sys.exit(not shardedflight.__compiled__)'
plain := SHARDEDFLIGHT_PURE=1 SHARDEDFLIGHT_REQUIRE_COMPILED=
compiled := SHARDEDFLIGHT_PURE= SHARDEDFLIGHT_REQUIRE_COMPILED=1

help:
	@echo "make demo    a stampede on a real HTTP server, with and without a flight (ARGS=--help)"
	@echo "make test    the tests, of the plain core and of the compiled one (ARGS=\"-k forget\");"
	@echo "             test-plain and test-compiled run one half, test-wheel the built wheel's"
	@echo "make check   lint, formatting, types and import layering"
	@echo "make bench   the dashboard of measured ratios (ARGS=--help)"
	@echo "make explore, model, soak, fuzz, faults, sanitize"
	@echo "             look for faults, SECONDS=600 for so long: docs/proof.md (ARGS=--help)"
	@echo "make coverage  which lines and branches the tests run"
	@echo "make docs    the documentation as pages, in build/docs; their code is run by make test"
	@echo "             docs-links asks the sites that they link to, which needs the internet"
	@echo "make pins    resolve requirements/*.txt anew from pyproject.toml"
	@echo "make clean   remove everything that these made"
	@echo "Add PYTHON=python3.14t to use another interpreter than python3."

demo bench: %: .venv/%-$(KEY)/built
	@$(call run,$@) shardedflight $@ $(ARGS)

# The last line is the summary of the second run, or of the first if that failed.
test: .venv/test-$(KEY)/built
	@$(plain) $(call run,test) pytest $(ARGS)
	@if $(call is_compiled,$(<D)); then $(compiled) $(call run,test) pytest $(ARGS); fi

# Programs of proof/, which look for as long as they are told: docs/proof.md.
explore model soak fuzz faults sanitize: %: .venv/test-$(KEY)/built
	@$(call run,test) proof.$@ $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

# Of the plain core: coverage.py does not see into the compiled one. Hung tests end by a signal, for
# pytest-timeout's other way ends the process, and with it what was measured.
coverage: .venv/test-$(KEY)/built
	@rm -rf build/coverage; mkdir -p build/coverage
	@$(plain) $(call run,test) coverage run -m pytest --timeout-method=signal \
		-m "not whole and not untraced" $(ARGS) || echo "Some tests failed: the figures are too low."
	@$(call run,test) coverage combine --quiet
	@$(call run,test) coverage report --show-missing --skip-covered --include="src/shardedflight/*"
	@$(call run,test) coverage report --fail-under=100 --include="src/shardedflight/_core.py"
	@$(call run,test) coverage report --fail-under=95 --format=total --include="src/shardedflight/*"

# What the tests run in, made but not used.
test-environment: .venv/test-$(KEY)/built

test-plain test-compiled: test-%: .venv/test-$(KEY)/built
	@$($*) $(call run,test) pytest $(ARGS)

test-wheel: .venv/test-$(KEY)/built
	@if $(call is_compiled,$(<D)); then $(compiled); else $(plain); fi; \
		export SHARDEDFLIGHT_PURE SHARDEDFLIGHT_REQUIRE_COMPILED; \
		$(call run,test) pytest tests/test_packaging.py -m whole -s $(ARGS)

# Warnings are errors, links between the documents among them. conf.py takes the package from src.
sphinx = $(call run,docs) sphinx -W --keep-going -q -d build/docs/doctrees

docs: .venv/docs-$(KEY)/made
	@$(sphinx) -b html $(ARGS) docs build/docs/html
	@echo "The documentation is in build/docs/html/index.html"

docs-links: .venv/docs-$(KEY)/made
	@$(sphinx) -b linkcheck $(ARGS) docs build/docs/links

check: lint types imports

lint: .venv/check-$(KEY)/made
	@echo "ruff check"; $(call run,check) ruff check
	@echo "ruff format"; $(call run,check) ruff format --check

types: .venv/check-$(KEY)/made
	@echo "mypy"; $(call run,check) mypy
	@echo "pyright"; $(call run,check) pyright --pythonpath $(call env,check)/bin/python

imports: .venv/check-$(KEY)/made
	@echo "import-linter"; PYTHONPATH=src $(call env,check)/bin/lint-imports

# Pins that still fit are kept: ARGS=--upgrade chooses all anew.
resolve = $(call run,pins) uv pip compile --quiet --universal --fork-strategy fewest \
	--python-version 3.11 --no-annotate --no-emit-index-url --no-emit-find-links \
	--custom-compile-command 'make pins'
all := --extra check --extra test --extra demo --extra bench --extra docs

pins: .venv/pins-$(KEY)/made
	@$(resolve) $(ARGS) $(all) pyproject.toml -o requirements/check.txt
	@$(resolve) --extra test --extra demo --extra bench --extra docs -c requirements/check.txt \
		pyproject.toml -o requirements/test.txt
	@$(resolve) --extra docs --extra httpx --extra prometheus --extra opentelemetry \
		--extra host --extra redis -c requirements/check.txt pyproject.toml -o requirements/docs.txt
	@$(resolve) --extra demo -c requirements/check.txt pyproject.toml -o requirements/demo.txt
	@$(resolve) --extra bench -c requirements/check.txt pyproject.toml -o requirements/bench.txt
	@$(resolve) --extra peers -c requirements/check.txt pyproject.toml -o requirements/peers.txt
	@$(call env,pins)/bin/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
		| tr " " "\n" | $(resolve) -c requirements/check.txt - -o requirements/build.txt

clean:
	rm -rf .venv bench-results build dist src/*.egg-info shardedflight-demo.html
	rm -f src/shardedflight/*.so src/shardedflight/*.pyd
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
