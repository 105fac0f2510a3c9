# make demo   environment, then the main job on an embedded default
# make test   environment, then lint, types, site and tests
# make docs   the site over docs/, in build/site, with its links checked
VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# test processes: each loads torch, so four at most
JOBS   ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n < 4 ? n : 4 )))
BIN    := $(VENV)/bin
# one thread a test process: the processes share the cores already
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.PHONY: env demo test lint format types docs pages doctor clean
.DEFAULT_GOAL := env

env:
	@$(PYTHON) tools/dev/setup_env.py --venv $(VENV)

demo: env
	$(BIN)/python tools/demo.py

test: env lint types docs
	$(PYTEST)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: env
	$(BIN)/mypy

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# pages that are written from the code and the stored measurements; tests compare them
pages: env
	set -e; for script in tools/dev/write_*_docs.py tools/dev/write_*_reference.py \
	    tools/dev/write_preset_page.py tools/zoo/write_models_page.py; do $(BIN)/python $$script; done

doctor: env
	$(BIN)/python -m gplq_mm doctor

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find gplq_mm tools tests configs -name __pycache__ -type d -prune -exec rm -rf {} +
