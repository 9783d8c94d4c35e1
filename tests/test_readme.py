"""README.md says what nbs/index.ipynb says."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from nbdev.config import get_config

from nc_nbdev import _docs
from nc_nbdev.rooms import ROOMS

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


def test_the_examples_run_as_a_script(tmp_path):
    "All but the last, which trains the runs of a study. No cell of the notebook that is not shown has imported."
    *blocks, study = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.S | re.M)
    assert "nc.reproduce" in study and len(blocks) == 4
    run = subprocess.run([sys.executable, "-c", "".join(blocks)], cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"})
    assert run.returncode == 0, run.stderr


def test_sidebar_lists_every_notebook(docs_tool):
    written = (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8")
    pages = [p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").glob("**/[!_.]*.ipynb")]
    assert not [p for p in pages if f"- {p}\n" not in written and "/." not in p]


def test_no_address_without_a_repository():
    if get_config(ROOT).git_url: return
    assert not re.search(r"nc-nbdev|mybinder\.org|colab\.research|github\.com|github\.io|git\+https|\]\(/", TEXT)


def test_with_a_repository_a_page_runs_elsewhere(monkeypatch):
    monkeypatch.setattr(_docs, "get_config", lambda: SimpleNamespace(git_url="https://github.com/a/b", branch="main"))
    assert _docs.run_links("nbs/lab/00_x.ipynb") == {
        "Colab": "https://colab.research.google.com/github/a/b/blob/main/nbs/lab/00_x.ipynb",
        "Binder": "https://mybinder.org/v2/gh/a/b/main?labpath=nbs%2Flab%2F00_x.ipynb"}


def test_with_a_repository_the_site_names_it(docs_tool):
    named = {"repo-url": "https://github.com/a/b", "site-url": "https://a.io/b", "navbar": {}}
    docs_tool.addresses(named)
    assert named["navbar"]["tools"][0]["href"] == "https://github.com/a/b" and named["site-url"] == "https://a.io/b"
    without = {"repo-url": "", "repo-actions": ["source"], "site-url": "/", "navbar": {}}
    docs_tool.addresses(without)
    assert without == {"navbar": {}}


def test_every_room_has_a_title(docs_tool):
    assert list(docs_tool.ROOMS) == [room for room in ROOMS if room != "reproduce"]   # a page, no folder
