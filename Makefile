# `make reproduce` and `make test` work on a fresh checkout: they make .venv, install, and run.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

.PHONY: reproduce test check docs lab bench

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

reproduce: .venv/installed          ## train, measure, and print the scoreboard at the preset quick
	$(BIN)/nc-reproduce --preset quick

check: .venv/installed              ## notebooks, package and README in step; lint
	$(BIN)/python tools/check_sync.py
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff check --quiet --isolated --select F nc_nbdev

test: check reproduce docs          ## everything
	NC_DOCS=_docs $(BIN)/pytest -n 2 --dist loadgroup

docs: .venv/installed               ## the site, into _docs/
	$(BIN)/python tools/docs.py

lab: .venv/installed                ## the notebooks in JupyterLab
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name python3
	$(BIN)/jupyter lab --notebook-dir nbs

bench: .venv/installed              ## speed and memory of the measures
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python benchmarks/statistics.py
