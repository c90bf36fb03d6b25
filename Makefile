# Two commands to know: `make demo` shows the whole method on small models, `make test` checks the repository.
PYTHON ?= python3
VENV   := .venv
READY  := $(VENV)/.ready
IN_VENV := . $(VENV)/bin/activate &&

# Jupyter looks for kernels here first: notebooks run in this environment whatever kernels the user has installed.
export JUPYTER_PATH := $(CURDIR)/$(VENV)/share/jupyter
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test notebooks examples course readme docs reference clean

help:
	@echo "make demo       train, generate, evaluate, classify and tables at tiny scale: outputs/*.ipynb"
	@echo "make test       lint, then run every test and every numbered notebook"
	@echo "make notebooks  write medart/ and re-execute the library's and the course's notebooks in place"
	@echo "make examples   run the run notebooks once at tiny scale and store what they show in nbs/"
	@echo "make course     write students' notebooks from the solved ones, and slides: nbs/course, build/slides"
	@echo "make readme     write README.md from nbs/index.ipynb"
	@echo "make docs       a site of README and all notebooks, to read and search offline: build/docs"
	@echo "make reference  renew outputs/reference from your own outputs/tables, figures and benchmark"
	@echo "make setup      only make the environment in $(VENV), as the others do first"
	@echo "make clean      remove $(VENV) and caches; data/ and outputs/ stay"

setup: $(READY)

# Made once, and again when the list of packages changes.
$(READY): settings.ini setup.py pyproject.toml constraints.txt tools/quiet_kernel.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or later is needed and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12" % v[:2])'
	@echo "Installing into $(VENV): some minutes and some GB the first time."
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q -c constraints.txt -e '.[dev]'
	$(VENV)/bin/python tools/quiet_kernel.py
	@touch $@

# Every stage is a papermill command, which is printed; what can run at the same time does.
demo: $(READY)
	$(IN_VENV) python tools/demo.py
	@echo
	@echo "Done, with small models on drawn images. Have a look at:"
	@echo "  outputs/caption-skin.ipynb, outputs/train-skin.ipynb, outputs/generate-skin.ipynb, outputs/evaluate-skin.ipynb,"
	@echo "  outputs/classify-skin.ipynb, outputs/tables.ipynb"
	@find "$${MEDART_OUTPUTS:-outputs}"/tables -name 'table*-tiny-skin.md' | sort | sed 's/^/  /'
	@find "$${MEDART_OUTPUTS:-outputs}"/skin-tiny/captions "$${MEDART_OUTPUTS:-outputs}"/skin-tiny/medart -maxdepth 2 -name '*.png' ! -path '*/samples/*' | sort | sed 's/^/  /'

test: $(READY)
	$(IN_VENV) ruff check --output-format=concise nbs medart tests tools setup.py
	$(IN_VENV) ruff format --check --quiet nbs tests tools setup.py
	$(IN_VENV) pytest -n auto --maxprocesses 4 --dist worksteal

notebooks: $(READY)
	$(IN_VENV) nbdev-export
	$(IN_VENV) for nb in nbs/*/[0-9][0-9]_*.ipynb nbs/solutions/*.ipynb nbs/course/[!1-9]*.ipynb; do \
	  jupyter nbconvert --to notebook --execute --inplace $$nb || exit 1; done
	$(IN_VENV) python tools/shrink_outputs.py nbs/*/*.ipynb
	$(IN_VENV) nbdev-clean
	$(IN_VENV) python tools/build_course.py

examples: $(READY)
	$(IN_VENV) python tools/execute_runs.py
	$(IN_VENV) python tools/shrink_outputs.py nbs/*.ipynb
	$(IN_VENV) nbdev-clean

course: $(READY)
	$(IN_VENV) python tools/build_course.py mark
	$(IN_VENV) python tools/build_course.py
	$(IN_VENV) python tools/build_course.py slides

readme: $(READY)
	$(IN_VENV) python tools/build_readme.py

docs: $(READY)
	$(IN_VENV) python tools/build_docs.py

# No run writes to outputs/reference: what is shown there is copied on purpose, file by file of those it holds.
reference:
	@git ls-files outputs/reference | while read -r f; do \
	  new="$${MEDART_OUTPUTS:-outputs}/$${f#outputs/reference/}"; \
	  if [ -f "$$new" ]; then cp "$$new" "$$f"; echo "$$f"; fi; \
	done

clean:
	rm -rf $(VENV) build medart.egg-info .pytest_cache .ruff_cache
	find medart nbs tests tools \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
