# Thin wrappers: create .venv, install with the constraints of the interpreter's line, run one command.
PYTHON ?= python3
VENV ?= .venv
LINE := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := constraints/py$(LINE).txt
BIN := $(VENV)/bin

.PHONY: quickstart test test-all lint benchmark

quickstart: $(VENV)/installed-plot-$(LINE)
	$(BIN)/python train.py --config=configs/lm_path.py:size=quickstart --workdir=runs/quickstart

test: $(VENV)/installed-dev-$(LINE)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/installed-dev-$(LINE)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu and not tpu_aot and not gpu_aot"

lint: $(VENV)/installed-dev-$(LINE)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

benchmark: $(VENV)/installed-plot-$(LINE)
	$(BIN)/python -m pallas_kernels.benchmark

$(VENV)/installed-%-$(LINE): setup.cfg $(CONSTRAINTS)
	@test -d $(VENV) && $(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(LINE)")' 2>/dev/null \
	  || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable '.[$*]'
	@touch $@

constraints/py%.txt:
	@echo "Python $(LINE) is not supported: there is no $@ (supported: $$(ls constraints | tr '\n' ' '))" >&2; exit 1
