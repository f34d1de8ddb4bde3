PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format typecheck docs linkcheck notebooks bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment: made when there is none, brought up to date when what it is made from changes.
$(STAMP): pyproject.toml setup.cfg constraints.txt
	@echo "Installing pyro-fusion and its development tools into $(VENV) (some minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## fuse a few posteriors and show the result
	$(BIN)/pyro-fusion demo

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(STAMP) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## check the types
	$(BIN)/mypy

docs: $(STAMP) ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs . docs/_build/html
	@echo "docs/_build/html/index.html"

linkcheck: $(STAMP) ## ask for every web address in the documentation
	$(BIN)/python -m sphinx -q -b linkcheck -c docs . docs/_build/linkcheck

notebooks: $(STAMP) ## run the notebooks anew and keep what they print and draw
	$(BIN)/python -m tests.notebooks

bench: $(STAMP) ## run the benchmarks in small, which needs no data
	for name in simulation credible_sets estep topics motion_capture networks fisher; do \
		$(BIN)/python benchmarks/$$name.py --small || exit 1; done

clean: ## remove the environment, caches and build outputs
	rm -rf $(VENV) docs/_build .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
