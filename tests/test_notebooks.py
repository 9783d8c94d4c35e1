"""Every notebook runs top to bottom in a Jupyter kernel, as in JupyterLab."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parents[1] / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 10


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(NBS)))
def test_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    # cells that nbdev leaves out of its own test runs are left out here too
    notebook.cells = [c for c in notebook.cells if not (c.cell_type == "code" and any(d in c.source for d in ("#| notest", "#| eval: false")))]
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
