# Everything below makes .venv on first use. PYTHON=python3.12 make test chooses another interpreter; SEEDS=10000 make simulate
# runs as many worlds. make bench is for a machine that does nothing else, for half an hour; XENNA=VENV/bin/python
# names a virtual environment with cosmos-xenna, to be measured beside.
PYTHON ?= python3
SEEDS ?= 1000
BIN := .venv/bin
INSTALLED := .venv/installed
PROJECTS := pyproject.toml plugins/shapes/pyproject.toml plugins/diffusers/pyproject.toml plugins/example/pyproject.toml \
	plugins/filters/pyproject.toml plugins/comfy/pyproject.toml

.PHONY: demo test lint bench simulate docs

# Its processes compile nothing anew that another has compiled, as those of the tests.
demo: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= $(BIN)/latentmill run txt2img

# Three files of tests at a time, each in one thread: two cores are what there is everywhere, and some tests wait. tests/conftest.py
# has the slow files first; xdist's own order has the files of many tests first, and a slow one of few tests last. A hundred
# processes are started, and none compiles anew what another has compiled, whatever the environment says of bytecode.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

simulate: $(INSTALLED)
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

docs: $(INSTALLED)
	$(BIN)/python docs/make.py
	$(BIN)/python docs/suites.py
	$(BIN)/python docs/schedulers.py
	$(BIN)/python plugins/diffusers/tests/test_pipeline.py
	$(BIN)/python plugins/diffusers/tests/test_traced.py
	WRITE_DOCS=1 FAULTS=all $(BIN)/python -m pytest -q tests/faults -k fault_of

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(if $(XENNA),--xenna $(XENNA))

$(INSTALLED): constraints.txt $(PROJECTS)
	@echo "Installing into .venv; torch and Ray are large, so the first time takes minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
		-e '.[test,dev]' -e plugins/shapes -e plugins/diffusers -e plugins/example -e plugins/filters -e plugins/comfy
	@touch $@
