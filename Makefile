# `make demo` and `make test` do all their set-up themselves: python3, make and the package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
# Where it is set, each process compiles all that it imports: 30 s in place of 10.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo card test test-fast test-distributed test-oldest test-app quality docs docs-serve dist clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

# The stamp is written last: an interrupted installation is taken up again by the next call.
$(VENV)/.installed: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[test,quality,docs]'
	@touch $@

demo: $(VENV)/.installed  ## Pretrain on the bundled digits, evaluate at 1, 2, 5, 10 labels a class, draw: runs/demo/
	$(BIN)/python scripts/demo.py

CARD := model_cards/msn-vit-digits
card: $(VENV)/.installed runs/demo/model/config.json  ## Measure what `make demo` trained, and write its model card: model_cards/msn-vit-digits/, and the Space's encoder
	$(BIN)/python scripts/evaluate_low_shot.py --model runs/demo/model --images_per_class 1 2 5 10 --num_splits 5 \
		--l2 0.0025 --output $(CARD)/low_shot.json
	$(BIN)/python scripts/make_model_card.py --checkpoint runs/demo/model --results $(CARD)/low_shot.json \
		--output $(CARD) --name $(notdir $(CARD)) --license apache-2.0 --plot --figures runs/demo/training.png
	cp $(addprefix runs/demo/model/,config.json model.safetensors preprocessor_config.json) spaces/low_shot/digits_encoder/

runs/demo/model/config.json:
	@$(MAKE) demo

# Tests of ranks mostly wait, for one another and for deadlines: three workers keep two cores busy. A file stays with one.
test: $(VENV)/.installed  ## Run all tests
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --durations 20

test-fast: $(VENV)/.installed  ## Run the tests that are not slow: an answer in 3 to 4 minutes
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile -m "not slow"

# uv resolves every direct dependency to the lowest version that pyproject.toml allows.
OLDEST := .venv-oldest
test-oldest:  ## Run the tests that are not slow with the oldest versions that pyproject.toml allows
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install --quiet --resolution lowest-direct --editable '.[test]'
	$(OLDEST)/bin/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

# Gradio wants an older Pillow than the other tests take, so it has an environment of its own.
APP := .venv-app
test-app:  ## Run the tests of `hf-msn app`, in a real browser (Chromium, for instance from apt)
	@which chromium chromium-browser google-chrome | grep -q . || { echo "There is no Chromium: apt-get install chromium"; exit 1; }
	@test -x $(APP)/bin/python || $(PYTHON) -m venv $(APP)
	$(APP)/bin/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(APP) $(APP)/bin/uv pip install --quiet --editable '.[test,app]' playwright
	$(APP)/bin/python -m pytest tests/app

test-distributed: $(VENV)/.installed  ## Run only the tests that spawn several processes
	$(BIN)/python -m pytest -m distributed

quality: $(VENV)/.installed  ## Lint, check the format and the types, and hold the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --noconftest tests/test_layers.py -k "not public_name"

docs: $(VENV)/.installed  ## Build the documentation site into site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed  ## Show the documentation site on http://127.0.0.1:8000 and build it anew at each change
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

dist: $(VENV)/.installed  ## Build the source distribution and the wheel into dist/, and check them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:  ## Remove the environment and what the demo made
	rm -rf $(VENV) $(OLDEST) $(APP) runs site build dist .mypy_cache
