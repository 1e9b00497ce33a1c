# make train: set up everything and run the main job.   make test: set up and pass the tests.

PYTHON ?= $(or $(shell for v in 3.12 3.11 3.13; do python$$v -c '' 2>/dev/null && echo python$$v && break; done),python3)
VENV ?= .venv
BIN := $(VENV)/bin
ARMS ?= plain wide dendrites

.PHONY: install train test lint clean

install: $(VENV)/installed

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %s" % sys.version)'
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python $(PYTHON) $(VENV) && \
		VIRTUAL_ENV=$(VENV) uv pip install --requirement requirements.txt --editable . ; \
	else \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --requirement requirements.txt --editable . ; \
	fi
	@touch $@

train: install
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		crossval.py $(ARMS:%=configs/quickstart/%.yaml) --last --folds 10 --seeds 1 2 3 4 --output_dir runs/quickstart

# The tests of the page in web/ need transformers.js. They are skipped without npm.
tests/web/node_modules/.installed: tests/web/package.json tests/web/package-lock.json
	@if command -v npm >/dev/null; then \
		cd tests/web && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error && touch node_modules/.installed || \
		echo "The packages of tests/web were not installed, so the tests that need them are skipped." ; \
	fi

test: install tests/web/node_modules/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs *.egg-info
