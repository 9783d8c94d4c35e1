"""README.md says what nbs/index.ipynb says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def docs_tool(monkeypatch):
    "tools/docs.py as a module."
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.chdir(ROOT)
    import docs

    return docs


def test_in_step():
    run = subprocess.run([sys.executable, "tools/docs.py", "--check-readme"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_changed_readme_is_noticed(docs_tool, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(TEXT + "one line more\n", encoding="utf-8")
    monkeypatch.setattr(docs_tool, "ROOT", tmp_path)
    assert "-one line more" in docs_tool.check_generated()


def test_relative_links_lead_to_files():
    targets = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", TEXT)]
    assert not [t for t in targets if not (ROOT / t).exists()]


def test_nothing_of_the_notebook_shows():
    outside = re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M)
    assert not re.search(r"^#\||^:::|<IPython|^---$", outside, flags=re.M)


def test_sidebar_lists_every_notebook(docs_tool):
    written = (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").glob("**/[!_.]*.ipynb")]
    assert not [p for p in pages if f"- {p}\n" not in written and "/." not in p]
