# make quickstart: environment, install, compress the bundled model, evaluate it, report.
# make test:       environment, lint, types, every test.
# make docs:       the documentation as a site, in build/site.
# make test-fast:  the tests that take less than two minutes together, while working.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= out/bundled-4bit

.PHONY: quickstart lint test test-fast docs format clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/srcr compress bundled -o $(OUT) --bits 4 --calibration bundled --overwrite
	$(BIN)/srcr evaluate bundled $(OUT) --text bundled --tasks bundled --limit 500 --semantic --report --overwrite
	@echo
	@echo "compressed checkpoint: $(OUT)  (its README.md says what was done)"
	@echo "evaluation:            $(OUT)/evaluation.json"
	@echo "report to open:        $(OUT)/report.html"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist worksteal

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site: build/site/index.html"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build dist
