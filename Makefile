# Everything runs from a fresh checkout: the environment is made once and again when its recipe changes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO ?= runs/demo

.PHONY: test check docs demo install clean

install: $(READY)

$(READY): pyproject.toml constraints.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,docs]"
	touch $@

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(TESTS)

check: $(READY) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

demo: $(READY)
	$(BIN)/formwright compare --task digits \
		--vary mixer=softmax,aft-full,aft-simple,aft-conv,mamba,gated-attention \
		--vary "position=learned(std=1.0),sinusoidal" \
		--match params --seeds 2 --steps 100 --out $(DEMO)

clean:
	rm -rf $(VENV) build site .mypy_cache .pytest_cache .ruff_cache
