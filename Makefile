# `make demo` and `make test` need Python 3.11+, git and make; everything else they install into .venv.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
SOURCES := hf_tying tests examples

.PHONY: demo test test-upstream quality style

demo: $(INSTALLED)
	$(RUN) -m hf_tying demo

# Two workers of one thread each: what a small CI machine has. No test may ask the Hub for anything.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -n 2

# The common model tests of transformers itself and PEFT's tests of LoRA, fetched from their source distributions.
test-upstream: $(INSTALLED)
	$(RUN) -m tests.upstream

quality: $(INSTALLED_DEV)
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)

style: $(INSTALLED_DEV)
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

$(RUN):
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('hf_tying needs Python 3.11 or newer, this is '\
	    + sys.version.split()[0] + ': make $(MAKECMDGOALS) PYTHON=<a newer one>')"
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than these files exactly when what is installed is what they ask for.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt | $(RUN)
	$(RUN) -m pip install --editable '.[test]' --constraint constraints.txt
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(RUN) -m pip install --editable '.[dev]' --constraint constraints.txt
	touch $@
