# Every command calls the environment's own Python by its path: nothing needs to be activated.
PYTHON ?= python3
# A misspelled variable would be passed over in silence.
KNOWN := PYTHON TEXT NANOGPT SITE_URL
UNKNOWN := $(strip $(foreach name,$(filter-out $(KNOWN),$(.VARIABLES)),$(if $(filter command,$(origin $(name))),$(name))))
ifdef UNKNOWN
$(error There is no option $(UNKNOWN): expected $(KNOWN))
endif
# Threads that wait spin briefly, then sleep: spinning on, as by default, two notebooks at once each run twenty times slower.
export GOMP_SPINCOUNT := 5000
PY := .venv/bin/python
SITE := report/.work/site
HTML := report/.work/html
SINGLE := report/.work/single
TEXT_READY := report/.work/corpus.txt
NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb)) notebooks/index.ipynb
EXECUTED := $(NOTEBOOKS:notebooks/%=$(SITE)/%)
PAGES := $(wildcard notebooks/*.md)
OTHERS := data/others.py data/finetune.py data/reactions.csv data/antibodies.csv data/finetuning.csv \
    data/bench.py data/bench.csv data/context.py data/context.csv
SPHINX := $(PY) -m sphinx -q -W --keep-going -E -c notebooks

.PHONY: help report pages test test-all test-report mutants lab sweep bench notebooks setup installed lint clean FORCE
.DELETE_ON_ERROR:
# In their order: a notebook may load what an earlier one has trained.
.NOTPARALLEL:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

report: .venv/.ready  ## set up, execute the notebooks, render report/index.html: only what changed
	@$(PY) notebooks/alone.py report/.lock $(MAKE) --no-print-directory pages

pages: report/index.html
	@echo "Seconds that each notebook took when it was last executed:"
	@cat $(EXECUTED:.ipynb=.time)
	@echo "The report: $(CURDIR)/report/index.html"

test: .venv/.ready $(TEXT_READY)  ## set up, then run every notebook and every example as a test
	$(PY) -m pytest

test-all: .venv/.transformers $(TEXT_READY)  ## the same, with models of the transformers library, which it installs
	$(PY) -m pytest

test-report: report  ## test the report in a browser: pages, links, formulas, accessibility
	$(PY) -m pytest -o addopts= -rs notebooks/tests/test_report.py notebooks/tests/test_explorer.py \
	    notebooks/tests/test_essay.py

mutants: .venv/.ready $(TEXT_READY)  ## plant faults at random, count those that the tests see (an hour or two)
	$(PY) notebooks/tests/mutants.py

lab: .venv/.ready $(TEXT_READY)  ## open the notebooks in JupyterLab
	$(PY) -m jupyterlab notebooks

sweep: .venv/.ready $(TEXT_READY)  ## train the runs that data/second_edition.csv still misses (hours)
	$(PY) data/sweep.py

bench: .venv/.ready $(TEXT_READY)  ## measure what training, capture and the split cost here: data/bench.csv (minutes)
	$(PY) data/bench.py $(if $(NANOGPT),--nanogpt $(NANOGPT))

notebooks: .venv/.ready $(TEXT_READY)  ## execute the notebooks in place, to store new outputs (for developers)
	$(PY) notebooks/execute.py $(NOTEBOOKS)

setup: .venv/.ready  ## only create .venv, with everything installed

lint: .venv/.ready  ## check the style of code and notebooks
	$(PY) -m ruff check .

clean:  ## remove the report and caches; .venv and data/ stay
	rm -rf report build *.egg-info .pytest_cache .ruff_cache notebooks/.ipynb_checkpoints

# The stamp comes last: a set-up that failed or was interrupted is taken up again.
.venv/.ready: requirements.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	    { echo "There is no $(PYTHON) here: install Python 3.11 or newer, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + sys.version.split()[0] \
	    + ": install Python 3.11 or newer, or say make PYTHON=/path/to/python3")'
	@$(PYTHON) notebooks/alone.py .venv/.lock $(MAKE) --no-print-directory installed
	@touch $@

installed:
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	$(PY) -m pip install --disable-pip-version-check --no-deps -e .

.venv/.transformers: .venv/.ready
	@$(PYTHON) notebooks/alone.py .venv/.lock $(PY) -m pip install --disable-pip-version-check -c requirements.txt \
	    -e '.[transformers]'
	@touch $@

# make report TEXT=my.txt, and likewise test and lab: on a text of one's own. The quotes are for paths with spaces.
ifeq ($(origin TEXT), command line)
export CORPUS := own_text
PREPARE := --text="$$TEXT" --name $(CORPUS)
else
export CORPUS := shakespeare_char
PREPARE := $(CORPUS)
endif

# Looked at every time, but changed only when the corpus is another one.
$(TEXT_READY): .venv/.ready FORCE
	@mkdir -p $(@D)
	@$(PY) data/prepare.py $(PREPARE) > $@.new
	@cat $@.new
	@cmp -s $@.new $@ || mv $@.new $@

$(SITE)/%.ipynb: notebooks/%.ipynb notebooks/exercises.py notebooks/narrow.py helpers.py model_local.py data/results.csv data/second_edition.csv data/sweep.py \
    $(OTHERS) .venv/.ready $(TEXT_READY)
	@mkdir -p $(@D)
	@$(PY) notebooks/execute.py $< --output-dir $(@D) > $(@:.ipynb=.time)
	@cat $(@:.ipynb=.time)

report/index.html: $(EXECUTED) $(PAGES) $(wildcard notebooks/_static/* notebooks/_templates/* notebooks/solutions/*) notebooks/references.bib notebooks/conf.py \
    notebooks/pages.py notebooks/single_file.py notebooks/publish.py LICENSE pyproject.toml Makefile
	@rm -rf $(HTML) $(SINGLE) $(filter-out $(EXECUTED),$(wildcard $(SITE)/*.ipynb $(SITE)/*.md))
	@mkdir -p report/.work/data && cp $(PAGES) $(SITE) && cp data/*.csv report/.work/data
	$(SPHINX) -d report/.work/doctrees $(SITE) $(HTML)
	$(SPHINX) -b singlehtml -d report/.work/doctrees-single $(SITE) $(SINGLE)
	$(PY) notebooks/single_file.py $(SINGLE)/index.html $(HTML)/one-file.html
	@$(PY) notebooks/publish.py $(HTML) report
