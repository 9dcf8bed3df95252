# Two commands for a newcomer: `make demo` and `make test`. Both make the environment first and can be repeated at no cost.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv where present (it does not read pip's settings, so it is told where pip's local files lie), pip elsewhere
UV := $(shell command -v uv 2>/dev/null)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

.PHONY: demo test lint types install readme clean

demo: install ## run the first study on real images and write the page
	$(BIN)/fewer run backprop-free-mlps
	$(BIN)/fewer report

test: install lint types ## lint, types, all tests
	$(BIN)/python -m pytest -m alone
	$(BIN)/python -m pytest -m "not alone" -n 2 --dist loadgroup

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/pyright

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	@echo "Making the environment in $(VENV) (torch and the libraries that the methods drop into; a few minutes the first time)"
ifeq ($(UV),)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --progress-bar on -c constraints.txt torch
	$(BIN)/python -m pip install -qq --progress-bar on -c constraints.txt -e '.[all,test]'
else
	$(UV) venv --allow-existing --seed -p $(PYTHON) $(VENV)
	$(UV) pip install -p $(VENV) -c constraints.txt torch
	$(UV) pip install -p $(VENV) -c constraints.txt -e '.[all,test]'
endif
	@touch $@

readme: install ## bring the README's list of methods up to date
	$(BIN)/python -c "import pathlib; from fewer import papers; from fewer.report.readme import with_methods; \
	file = pathlib.Path('README.md'); file.write_text(with_methods(file.read_text(), [c for c in papers.cards() if c.package.startswith('fewer.')]))"

clean: ## take away the environment and everything that was run
	rm -rf $(VENV) fewer-runs artifacts
