# `make demo` and `make test` work in a fresh clone: each makes .venv, installs the pinned set and runs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test lint types clean

help:
	@echo "make demo   write a small random-weight checkpoint and generate demo/out/*.mp4 from demo prompts"
	@echo "make test   ruff, mypy and every test"
	@echo "make lint   ruff only          make types  mypy only          make clean  remove .venv and demo output"

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ospnext needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V). Set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/ospnext init-random --preset tiny --output demo/checkpoint --overwrite
	rm -rf demo/out
	$(BIN)/ospnext generate --prompts configs/demo_prompts.txt --model demo/checkpoint --config configs/demo.yaml --output demo/out

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check -q .

types: $(STAMP)
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
