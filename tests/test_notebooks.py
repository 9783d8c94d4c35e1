"""Every notebook runs top to bottom in a Jupyter kernel, as in JupyterLab."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / "nbs"
HIDDEN = (".", "_")
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb")
                   if not any(part.startswith(HIDDEN) for part in p.relative_to(NBS).parts))
LEFT_OUT = ("#| notest", "#| eval: false")   # cells that nbdev leaves out of its own test runs


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 10


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
def test_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    left_out = lambda c: c.cell_type == "code" and any(d in c.source for d in LEFT_OUT)
    notebook.cells = [c for c in notebook.cells if not left_out(c)]
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
