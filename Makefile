# `make demo` and `make test` need Python 3.11+, git and make; everything else they install into .venv.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
# Of two pins of one name, the first counts.
CONSTRAINTS := constraints.txt
SOURCES := hf_tying tests examples model_cards
# Two workers of one thread each: what a small CI machine has. No test may ask the Hub for anything.
# `worksteal` gives each worker one half of the files, so that what a file prepares for its tests is made once.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(RUN) -m pytest -n 2 --dist worksteal

.PHONY: cards demo docs test test-fast test-oldest test-newest test-random test-upstream quality style

demo: $(INSTALLED)
	$(RUN) -m hf_tying demo

test: $(INSTALLED)
	$(PYTEST)

# In less than a minute: files of every room that go through no long list of models, start no process and train little.
test-fast: $(INSTALLED)
	$(PYTEST) -m "not slow" $(addprefix tests/,$(FAST))

FAST := test_extras.py test_rooms.py cli data/test_parallel.py data/test_tokenizers.py data/test_words.py demo \
    diagnostics/test_geometry.py docs/test_pages.py hub/test_adapters.py hub/test_cards.py \
    losses/test_arithmetic.py losses/test_backends.py \
    losses/test_backward.py losses/test_bad_input.py losses/test_chunks.py losses/test_extreme_logits.py \
    losses/test_modules.py metrics models/test_lstm.py objectives/test_adapters.py objectives/test_declarations.py \
    objectives/test_deferred_logits.py objectives/test_loss_functions.py objectives/test_materialized_logits.py \
    objectives/test_objective.py objectives/test_objective_refusals.py objectives/test_outputs.py \
    objectives/test_refusals.py peft/test_bad_input.py peft/test_merging.py \
    peft/test_several_adapters.py peft/test_weighted.py projection report ties/test_absent_values.py \
    ties/test_bad_files.py ties/test_bad_input.py ties/test_class_form.py ties/test_extensions.py \
    ties/test_flows_adapters.py ties/test_flows_declarations.py ties/test_flows_loading.py \
    ties/test_flows_state_dicts.py ties/test_names_of.py ties/test_plain_modules.py ties/test_roles.py \
    ties/test_state_dicts_are_plain.py \
    training/test_arguments.py training/test_averaging.py training/test_recipes.py training/test_translation.py \
    vocabularies

# The whole suite at an end of the range of transformers (`TESTED` in hf_tying/hook.py), in .venv-oldest or .venv-newest.
test-oldest test-newest: test-%:
	$(MAKE) test VENV=.venv-$* CONSTRAINTS="constraints-$*.txt constraints.txt"

# Every test in an order that is drawn, and printed as a seed: make test-random SEED=<that one> repeats it.
test-random: $(INSTALLED)
	$(PYTEST) -p randomly $(SEED:%=--randomly-seed=%)

# Long: transformers' common model tests and PEFT's tests of LoRA, from their source distributions; then every class of
# transformers, its roles, its life beside an untouched model's, and what importing the package alone does to it; and what
# loaders, which pip installs for it, do with files beside the forecast.
test-upstream: $(INSTALLED)
	$(RUN) -m tests.upstream
	ZOO=1 $(PYTEST) tests/test_zoo.py tests/depth/test_patterns.py tests/depth/test_second_process.py \
		tests/training/test_resuming_processes.py --timeout 1800
	$(RUN) -m tests.upstream.import_alone
	$(RUN) -m tests.upstream.sweep
	$(RUN) -m tests.upstream.loaders
	ZOO=1 HOSTILE_CASES=2000 SWEEPS=3000 $(PYTEST) tests/report/test_stock_table.py tests/doctor/test_hostile_files.py \
		tests/losses/test_random_options.py tests/ties/test_properties.py --timeout 1800

# The cards of the reference runs, from the results in model_cards/records.
cards: $(INSTALLED)
	$(RUN) model_cards/make.py

quality: $(INSTALLED_DEV)
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m basedpyright --pythonpath $(RUN)

style: $(INSTALLED_DEV)
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

# The documents as a site in build/docs; a warning is an error.
docs: $(INSTALLED_DEV)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --site-dir build/docs

$(RUN):
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('hf_tying needs Python 3.11 or newer, this is '\
	    + sys.version.split()[0] + ': make $(MAKECMDGOALS) PYTHON=<a newer one>')"
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than these files exactly when what is installed is what they ask for.
$(INSTALLED): setup.cfg pyproject.toml $(CONSTRAINTS) | $(RUN)
	awk -F== '!pinned[$$1]++' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(RUN) -m pip install --editable '.[test]' --constraint $(VENV)/constraints.txt
	touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(RUN) -m pip install --editable '.[dev]' --constraint $(VENV)/constraints.txt
	touch $@
