# Each target makes its own environment in .venv; a second run finds it there. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := hf_speechllm training tests $(wildcard benchmarks)

.DEFAULT_GOAL := help
.PHONY: help transcribe test lint format clean

help:
	@echo "make transcribe   transcribe samples/ with the default model: reference, hypothesis, WER and speed"
	@echo "make test         run the tests (PYTEST_ARGS='-m slow' and the like are passed on)"
	@echo "make lint         check style and format"
	@echo "make format       fix style and format"
	@echo "make clean        remove the environment and everything generated"

transcribe: $(VENV)/.installed-eval
	$(BIN)/speechllm transcribe --references samples/transcripts.tsv samples

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and pinned: the other packages would choose its newest version and build.
$(VENV)/.installed-torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing torch ..."
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.installed-eval: $(VENV)/.installed-torch pyproject.toml
	@echo "installing hf-speechllm ..."
	$(PIP) --editable '.[eval]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-torch pyproject.toml
	@echo "installing hf-speechllm with the tools for development ..."
	$(PIP) --editable '.[train,eval,dev]'
	@touch $@
