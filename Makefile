# `make reproduce` and `make test` work on a fresh checkout: they make .venv, install, and run.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export MPLBACKEND ?= Agg

.PHONY: reproduce test check docs lab bench machines lowest wheel

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

reproduce: .venv/installed          ## the paper's studies at the preset quick, and their scoreboard
	$(BIN)/nc-reproduce --preset quick --studies paper

check: .venv/installed              ## notebooks, package and README in step; the rules of the house; lint
	$(BIN)/python tools/check_sync.py
	$(BIN)/python tools/check_house.py
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff check --quiet --isolated --select F nc_nbdev

test: check reproduce docs          ## everything
	$(BIN)/pytest -n 2 --maxschedchunk 1 --durations 15 tests/test_notebooks.py
	NC_DOCS=_docs $(BIN)/pytest -n 2 --dist worksteal --ignore tests/test_notebooks.py

docs: .venv/installed               ## the site, into _docs/
	$(BIN)/python tools/docs.py

lab: .venv/installed                ## the notebooks in JupyterLab
	$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name python3
	$(BIN)/jupyter lab --notebook-dir nbs

bench: .venv/installed              ## speed of statistics, measuring and training; memory of the measures
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python benchmarks/statistics.py --curves
	$(BIN)/python benchmarks/measuring.py
	$(BIN)/python benchmarks/training.py

machines: .venv/installed           ## the paper's verdicts as three processors would give them
	$(BIN)/python tools/machines.py runs/machines/table.csv --preset quick --studies paper

lowest:                             ## the oldest versions that pyproject.toml allows: tests of measures, files and runs
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install --quiet uv
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct \
		--requirements pyproject.toml 'pytest>=8.2' 'hypothesis>=6.100'
	PYTHONPATH=. build/lowest/bin/python -m pytest -q tests/test_bad_input.py tests/test_statistics.py \
		tests/test_measures.py tests/test_store.py tests/test_history.py tests/test_claims.py tests/test_runs.py

wheel:                              ## the wheel, installed in an empty environment and run in an empty folder
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	build/wheel/venv/bin/python -m pip install --quiet build/wheel/*.whl
	cd build/wheel/empty && printf '[DEFAULT]\nseeds = 2\nepochs = 3\ntrain_per_class = 20\n' > settings.ini && \
		../venv/bin/nc-reproduce --studies train_vs_test
