# Everything a fresh clone needs is Python 3.11 or newer and make; the rest is set up below .venv and .local.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# KEEP=0 and KEEP=no count as not set.
yes = $(filter-out 0 no false off,$(1))

.PHONY: help setup demo demo-down unit test test-more test-all coverage chaos load bench lint types fmt docs wheel lock sbom clean secrets

help: ## this list; what plain "make" prints
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## .venv with the pinned packages; PYTHON=python3.12 names another Python

$(READY): requirements/dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON); name one: make PYTHON=python3.12 setup"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 setup"; exit 2; }
	@echo "setting up .venv: downloading the Python packages (about 300 MB, once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

# The gateway is JavaScript, with tools and tests of its own, in node_modules beside it; a demo needs none of them.
GATEWAY := services/local/gateway
GATEWAY_READY := $(GATEWAY)/node_modules/ready
NPM := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/npm --prefix $(GATEWAY) --loglevel=error

$(GATEWAY_READY): $(GATEWAY)/package.json $(GATEWAY)/package-lock.json | $(READY)
	@echo "setting up $(GATEWAY)/node_modules: downloading the gateway's tools (about 60 MB, once)"
	@$(NPM) ci --ignore-scripts --no-audit --no-fund
	@touch $@

demo: setup ## run the whole pipeline on real readings; KEEP=1 leaves it running, TLS=1 secures it
	@$(BIN)/sensor-pipeline demo $(if $(call yes,$(KEEP)),--keep) $(if $(call yes,$(TLS)),--tls)

demo-down: setup ## stop a demo that was left running
	@$(BIN)/sensor-pipeline demo --down

unit: setup ## the tests that need no servers
	@$(BIN)/python -m pytest tests/unit -m "not slow"

# Four workers, each with servers of its own; native servers have one database, which they would empty for each other.
WORKERS = $(if $(TEST_POSTGRE_HOST),,--numprocesses 4 --dist worksteal)

# What depends on the number of measurements, with more of them.
MORE := $(addprefix tests/unit/test_,$(addsuffix .py,blocks decoding reading sink)) \
	$(addprefix tests/integration/test_,$(addsuffix .py,blocks density measurements sink))

PYTEST := $(BIN)/python -m pytest --hypothesis-profile full

test: setup $(GATEWAY_READY) ## what must pass before a change lands, on a local stack that the tests start themselves
	@$(NPM) run --silent test
	@$(PYTEST) $(WORKERS) -m "not slow"

test-more: setup ## what depends on the number of measurements, with four of them
	@MEASUREMENTS=temperature,humidity,pressure,co2 $(PYTEST) $(WORKERS) -m "not slow" $(MORE)

test-all: setup $(GATEWAY_READY) ## all tests, and some of them with four measurements
	@$(NPM) run --silent test
	@$(PYTEST) $(WORKERS)
	@MEASUREMENTS=temperature,humidity,pressure,co2 $(PYTEST) $(WORKERS) $(MORE)

# What is killed says nothing; what is forked or started does.
coverage: setup ## which lines the tests run, those of their processes included: make coverage TESTS=tests/unit
	@rm -rf .local/coverage && mkdir -p .local/coverage
	@$(BIN)/coverage run -m pytest $(or $(TESTS),-m "not slow")
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

chaos: setup ## random kills, longer: RUNS=5 SEED=7
	@CHAOS_RUNS=$(or $(RUNS),1) CHAOS_SEED=$(or $(SEED),0) $(BIN)/python -m pytest tests/chaos/test_random_kills.py

load: setup ## a long load of history on native servers, then every summary is compared: ROWS=20000000
	@LOAD_ROWS=$(or $(ROWS),2000000) $(BIN)/python -m pytest -o faulthandler_timeout=0 tests/chaos/test_load.py

bench: setup ## ratios to a bare COPY in the same run
	@$(BIN)/python -m tests.benchmarks.bench

lint: setup $(GATEWAY_READY) ## ruff, and biome for the gateway: mistakes, style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(NPM) run --silent lint

types: setup $(GATEWAY_READY) ## mypy, and tsc for the gateway
	@$(BIN)/mypy
	@$(NPM) run --silent types

fmt: setup $(GATEWAY_READY) ## format the code, and fix what ruff and biome can fix
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@$(NPM) run --silent format

docs: setup ## write what is generated from the settings: docs/settings.md, .env.example, blocks of other files
	@$(BIN)/python -m tests.documents

wheel: setup ## dist/: the wheel that "pip install" takes
	@rm -rf build dist
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# Containers read the files as users of their own, so each is readable; others here cannot enter the directory.
SECRETS := postgre sensor_consumer sensor_etl sensor_grafana sensor_dashboard grafana_admin

secrets: ## generate passwords for docker-compose.secrets.yml in secrets/; existing ones stay
	@mkdir -p -m 700 secrets
	@for name in $(SECRETS); do \
		test -s secrets/$$name && continue; \
		(umask 077 && od -An -N24 -tx1 /dev/urandom | tr -d ' \n' >secrets/$$name) && chmod 444 secrets/$$name || exit 1; \
		echo "secrets/$$name"; \
	done

COMPILE := $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host

lock: setup ## pin the requirements again
	@$(BIN)/python -m pip install --quiet pip-tools
	@$(COMPILE) --output-file requirements/runtime.txt pyproject.toml
	@$(COMPILE) --extra local --extra dashboard --extra dev --constraint requirements/runtime.txt --output-file requirements/dev.txt pyproject.toml

# In an environment of its own: it is not one of our dependencies.
SBOM := .local/sbom
sbom: ## sbom.json (CycloneDX): every Python package of the image, with its version and hashes
	@$(PYTHON) -m venv $(SBOM)
	@$(SBOM)/bin/python -m pip install --quiet --disable-pip-version-check 'cyclonedx-bom>=7,<8'
	@$(SBOM)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --output-file sbom.json \
		requirements/runtime.txt

clean: ## remove everything that make created
	@rm -rf .venv .local $(GATEWAY)/node_modules sbom.json build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
