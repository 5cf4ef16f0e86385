# make quickstart: environment, install, compress the bundled model, evaluate it, report.
# make test:       environment, lint, types, every test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
OUT ?= out/bundled-25-4bit

.PHONY: quickstart test format clean

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
	$(BIN)/srcr compress bundled -o $(OUT) --sparsity 0.25 --bits 4 --calibration bundled --overwrite
	$(BIN)/srcr evaluate bundled $(OUT) --text bundled --tasks bundled --limit 500 --semantic --report --overwrite
	@echo
	@echo "compressed checkpoint: $(OUT)  (its README.md says what was done)"
	@echo "evaluation:            $(OUT)/evaluation.json"
	@echo "report to open:        $(OUT)/report.html"

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build dist
