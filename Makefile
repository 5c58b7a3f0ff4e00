# Every command calls the environment's own Python by its path: nothing needs to be activated.
PYTHON ?= python3
# A misspelled variable would be passed over in silence.
KNOWN := PYTHON TEXT
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
ifneq ($(filter-out $(KNOWN),$(GIVEN)),)
$(error There is no option $(filter-out $(KNOWN),$(GIVEN)): expected $(KNOWN))
endif
# Threads that wait spin briefly, then sleep. Spinning on, as by default, two notebooks that are
# open at once each run twenty times slower.
export GOMP_SPINCOUNT := 5000

PY := .venv/bin/python
TEXT_READY := report/.work/corpus.txt
SITE := report/.work/site
HTML := report/.work/html
SINGLE := report/.work/single
SPHINX := $(PY) -m sphinx -q -W --keep-going -E -c notebooks/_site
# The longest first, so that none of them is left to run alone.
LONG := $(foreach number,02 07 08 05 04,$(wildcard notebooks/$(number)_*.ipynb))
PLACES := $(addprefix notebooks/,[0-9]*.ipynb index.ipynb slides.ipynb)
NOTEBOOKS := $(LONG) $(filter-out $(LONG),$(wildcard $(PLACES)))
EXECUTED := $(NOTEBOOKS:notebooks/%=$(SITE)/%)
PAGES := $(wildcard notebooks/*.md)

.DELETE_ON_ERROR:
.PHONY: help report pages test test-all test-report lab sweep bench notebooks setup lint clean FORCE

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

report: .venv/.ready  ## set up, execute the notebooks, render report/index.html: only what changed
	@$(MAKE) --no-print-directory -j2 pages

# With one thread, as for the report: the models are small, and numbers the same to the last digit.
test test-all: export OMP_NUM_THREADS := 1
test: .venv/.ready $(TEXT_READY)  ## set up, then run every notebook and every example as a test
	$(PY) -m pytest

test-all: .venv/.transformers $(TEXT_READY)  ## the same, with models of the transformers library
	$(PY) -m pytest

test-report: report  ## test the report and JupyterLab in a browser: what is shown, and what moves
	$(PY) -m pytest -o addopts= -rs notebooks/tests/test_report.py
	$(PY) -m pytest -o addopts= -rs -s notebooks/tests/test_lab.py

lab: .venv/.ready $(TEXT_READY)  ## open the notebooks in JupyterLab, at a page that says where to begin
	@$(PY) -m nbformat.sign notebooks/*.ipynb > /dev/null  # else JupyterLab hides stored figures
	$(PY) -m jupyterlab notebooks --LabApp.default_url="/lab/tree/start.ipynb" \
		--LabApp.news_url=None  # it would ask whether to fetch them

sweep: .venv/.ready $(TEXT_READY)  ## train the runs that data/runs.csv still misses (hours)
	$(PY) data/sweep.py

bench: .venv/.ready $(TEXT_READY)  ## measure here what it all costs: data/bench.csv (minutes)
	$(PY) data/bench.py

notebooks: .venv/.ready $(TEXT_READY)  ## execute the notebooks in place, to store new outputs
	$(PY) notebooks/_site/execute.py $(NOTEBOOKS)

setup: .venv/.ready  ## only create .venv, with everything installed

lint: .venv/.ready  ## check the style of code and notebooks
	$(PY) -m ruff check .

clean:  ## remove the report and caches; .venv and data/ stay
	rm -rf report build *.egg-info .pytest_cache .ruff_cache notebooks/.ipynb_checkpoints

# ---- set-up: the stamp comes last, so that one that failed is taken up again ----

.venv/.ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Install Python \
	3.11 or newer, or say make PYTHON=/path/to/python3: this is $(PYTHON)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt -e .
	@touch $@

.venv/.transformers: .venv/.ready
	$(PY) -m pip install --disable-pip-version-check -c requirements.txt -e '.[transformers]'
	@touch $@

# make report TEXT=my.txt, and likewise test and lab: on a text of one's own. With quotes, as paths
# may have spaces.
export CORPUS := $(if $(filter command,$(origin TEXT)),own_text,shakespeare_char)
PREPARE := $(if $(filter command,$(origin TEXT)),--text="$$TEXT" --name) $(CORPUS)

# Looked at every time, but changed only when the corpus is another one.
$(TEXT_READY): .venv/.ready FORCE
	@mkdir -p $(@D)
	@$(PY) data/prepare.py $(PREPARE) > $@.new
	@cat $@.new
	@cmp -s $@.new $@ || mv $@.new $@

# ---- the report: notebooks are executed two at a time, with a thread each ----

$(EXECUTED): export OMP_NUM_THREADS := 1
$(SITE)/%.ipynb: notebooks/%.ipynb $(wildcard notebooks/*.py) notebooks/_site/execute.py \
    $(wildcard *.py data/*.py data/*.csv) .venv/.ready $(TEXT_READY)
	@mkdir -p $(@D)
	@$(PY) notebooks/_site/execute.py $< --output-dir $(@D) > $(@:.ipynb=.time)
	@cat $(@:.ipynb=.time)

# Slides show figures as other notebooks have stored them.
$(SITE)/slides.ipynb: $(filter-out notebooks/slides.ipynb,$(NOTEBOOKS))

# What 02 trains, these load.
$(filter $(addprefix $(SITE)/,03% 04% 08% 09% index% slides%),$(EXECUTED)): | $(SITE)/02_training.ipynb
data/explorer-data.js: notebooks/_site/explorer.py notebooks/explore.py notebooks/figures.py \
    $(wildcard *.py data/*.py) .venv/.ready $(TEXT_READY) | $(SITE)/02_training.ipynb
	@cd notebooks && OMP_NUM_THREADS=1 ../$(PY) -m _site.explorer

# The pages' folder is filled anew: a notebook or a page may be gone.
report/.work/filled: $(EXECUTED) $(PAGES) data/explorer-data.js \
    $(wildcard notebooks/_site/*.* notebooks/_site/templates/* notebooks/_site/_static/*) \
    $(wildcard notebooks/solutions/*.py) notebooks/exercises.py LICENSE pyproject.toml Makefile
	@rm -rf $(filter-out $(EXECUTED),$(wildcard $(SITE)/*.ipynb $(SITE)/*.md))
	@mkdir -p report/.work/data && cp $(PAGES) $(SITE) && cp data/*.csv report/.work/data
	@touch $@

# The index goes first and comes last: while it is there, so is all that belongs to it.
report/index.html: report/.work/filled
	@rm -rf $(HTML)
	$(SPHINX) -d report/.work/doctrees $(SITE) $(HTML)
	@rm -rf $@ $(filter-out report/one-file.html,$(wildcard report/*))
	@mv $(HTML)/index.html report/.work && mv $(HTML)/* report && mv report/.work/index.html $@

report/one-file.html: report/.work/filled
	@rm -rf $(SINGLE)
	$(SPHINX) -b singlehtml -d report/.work/doctrees-single $(SITE) $(SINGLE)
	@$(PY) notebooks/_site/single_file.py $(SINGLE)/index.html report/.work/one-file.html
	@mv report/.work/one-file.html $@

pages: report/index.html report/one-file.html
	@echo "Seconds that each notebook took when it was last executed:"
	@cat $(EXECUTED:.ipynb=.time)
	@echo "The report: $(CURDIR)/report/index.html"
