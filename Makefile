# The two commands of the README are `make demo` and `make test`. Python 3.11 or newer is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

CLIENTS := .venv-clients
NODE_CLIENTS := .clients

.PHONY: demo test lint format schema bench chaos clients clean

demo: $(VENV)/.demo
	$(BIN)/asyncproxy demo $(ARGS)

# One process more than there are cores: some of the tests wait.
test: $(VENV)/.dev
	$(BIN)/pytest --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The JSON Schema of the configuration, for editors. A test holds it equal to the code.
schema: $(VENV)/.dev
	$(BIN)/python -c 'from asyncproxy.config.load import json_schema; print(json_schema(), end="")' > config.schema.json

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

# Proxies, stores and the gateway are killed at random moments; says what was lost. ARGS='--kills 200' goes on for
# longer. One outage in front of real processes: python -m tests.chaos.outages restart --away 60.
chaos: $(VENV)/.dev
	$(BIN)/python -m tests.chaos $(ARGS)

# Every kind of client through nginx, from a slow upstream, and what the pages in docs/clients/ tell them to do.
clients: $(VENV)/.dev $(CLIENTS)/.ready $(NODE_CLIENTS)/.ready
	@tests/clients/need-nginx
	$(BIN)/python -m tests.clients --python $(CLIENTS)/bin/python --node $(NODE_CLIENTS) $(ARGS)
	CLIENTS_PYTHON=$(abspath $(CLIENTS)/bin/python) CLIENTS_NODE=$(abspath $(NODE_CLIENTS)) \
		$(BIN)/pytest tests/test_client_pages.py

clean:
	rm -rf $(VENV) $(CLIENTS) $(NODE_CLIENTS) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("asyncproxy needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --group test --group lint
	touch $@

$(CLIENTS)/.ready: $(VENV)/bin/python
	$(BIN)/python -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade \
		httpx langchain-openai llama-index-embeddings-openai openai requests
	touch $@

# No lock file: what is tried is what a new user gets today.
$(NODE_CLIENTS)/.ready:
	@command -v npm >/dev/null || { echo 'make clients needs npm (Node.js 20 or newer)' >&2; exit 1; }
	mkdir -p $(NODE_CLIENTS)
	npm install --silent --no-save --no-package-lock --no-audit --no-fund --prefix $(NODE_CLIENTS) openai
	touch $@
