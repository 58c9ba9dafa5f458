# Each target makes the environment that it needs; `make` alone prints this list.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
OLDEST := .venv-oldest

.DEFAULT_GOAL := help
.PHONY: help quickstart test check test-oldest drills drills-full bench clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[quickstart,tasks,dev]'
	@touch $@

quickstart: $(VENV)/.installed ## set up, then pretrain, fine-tune and report on film reviews (7 minutes on 2 cores with bfloat16, 15 without)
	$(BIN)/lmssl pretrain recipes/pretrain/quickstart.yaml --overwrite
	$(BIN)/lmssl finetune recipes/finetune/quickstart.yaml --overwrite
	@printf 'report: ' && $(BIN)/lmssl report runs/quickstart

test: $(VENV)/.installed ## set up and run the tests (two processes of one thread: 6 minutes on 2 cores without bfloat16, less with it)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-oldest: ## the tests with the lowest versions that pyproject.toml declares
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check --constraint tests/constraints-oldest.txt --editable '.[quickstart,tasks,dev]'
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal

drills: $(VENV)/.installed ## the fifteen reliability drills, lmssl and stock, reduced counts (under 35 minutes on 2 cores)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drills

drills-full: $(VENV)/.installed ## the same at full counts
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.drills --full

bench: $(VENV)/.installed ## the quick benches, ours and stock in turns; rewrites the table of docs/performance.md
	$(BIN)/python -m tests.bench

clean: ## remove environments and caches, keep runs
	rm -rf $(VENV) $(OLDEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
