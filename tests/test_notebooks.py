"""Every notebook runs top to bottom in a process of its own; the tutorial in a Jupyter kernel too, as in JupyterLab."""

import contextlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbdev.test import test_nb as execute

NBS = Path(__file__).resolve().parents[1] / "nbs"
TIMEOUT = 1800      # seconds: a page that comes first trains what it shows
HIDDEN = (".", "_")
ASKS_FOR_ALL = "nc_nbdev.reproduce import"    # pages about all studies come last: they find the studies on disk
NOTEBOOKS = sorted((p for p in NBS.rglob("*.ipynb")
                    if not any(part.startswith(HIDDEN) for part in p.relative_to(NBS).parts)),
                   key=lambda p: (ASKS_FOR_ALL in p.read_text(encoding="utf-8"), p))

# A fork of a process that has imported the package starts in no time; a kernel takes three to five seconds, 80 times.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["nbdev.test", "nc_nbdev.reproduce", "nc_nbdev.paper.train_vs_test"])


def _run(path, log):
    "Run the cells as `nbdev-test` does; what they print goes to a file."
    multiprocessing.set_start_method("fork", force=True)      # the default here, as in a kernel
    pages = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    os.environ["LOKY_MAX_CPU_COUNT"] = str(max(1, os.cpu_count() // pages))    # with one, a page starts no workers
    signal.alarm(TIMEOUT)
    os.setsid()
    with open(log, "w") as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    passed, _ = execute(path, skip_flags=["notest"], cell_timeout=TIMEOUT)
    sys.stdout.flush()
    os._exit(not passed)                            # at once: workers of joblib wait five minutes for more to do


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 10


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
def test_notebook(path, tmp_path):
    log = tmp_path / "log"
    process = PROCESSES.Process(target=_run, args=(path, log))
    process.start()
    process.join()
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)    # those workers
    assert process.exitcode == 0, log.read_text()


def test_a_notebook_that_fails_is_a_failure(tmp_path):
    cell = nbformat.v4.new_code_cell("1 / 0")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "wrong.ipynb")
    with pytest.raises(AssertionError, match="ZeroDivisionError"): test_notebook(tmp_path / "wrong.ipynb", tmp_path)


@pytest.mark.notebook
def test_in_a_jupyter_kernel():
    path = NBS / "tutorial.ipynb"
    NotebookClient(nbformat.read(path, as_version=4), timeout=TIMEOUT, kernel_name="python3",
                   resources={"metadata": {"path": str(path.parent)}}).execute()
