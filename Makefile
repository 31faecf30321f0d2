# `make demo` and `make test` do all their set-up themselves: python3, make and the package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test test-distributed quality clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# The stamp is written last: an interrupted installation is taken up again by the next call.
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,quality]'
	@touch $@

demo: $(VENV)/.installed  ## Pretrain on the bundled digits, evaluate at 1, 2, 5, 10 labels a class, draw: runs/demo/
	$(BIN)/python scripts/demo.py

test: $(VENV)/.installed  ## Run all tests
	$(BIN)/python -m pytest

test-distributed: $(VENV)/.installed  ## Run only the tests that spawn several processes
	$(BIN)/python -m pytest -m distributed

quality: $(VENV)/.installed  ## Lint, check the format, and hold the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_layers.py

clean:  ## Remove the environment and what the demo made
	rm -rf $(VENV) runs
