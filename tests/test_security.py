"""Nothing that comes from outside is run: no pickles, no paths to outside, no network, no markup from names."""

import ast
import io
import json
import re
import subprocess
import sys
import tarfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import nc_nbdev as nc
from nc_nbdev import _docs
from nc_nbdev.lab.claims import Statement, scoreboard
from nc_nbdev.lab.runs import Run
from nc_nbdev.lab.settings import Settings
from nc_nbdev.lab.store import Entry
from nc_nbdev.lab.studies import StudyResult
from nc_nbdev.vision import sources
from nc_nbdev.vision.recipes import ImageRecipe
from nc_nbdev.vision.sources import load_dataset

ROOT = Path(__file__).resolve().parents[1]
MODULES = [*sorted((ROOT / "nc_nbdev").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py"))]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(q[0] in "._" for q in p.parts[-3:])]
MARKUP = "<script>alert(1)</script>"

# --- pickles --------------------------------------------------------------------------------------

SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}   # call -> what it must say
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "os.system", "pd.read_pickle", "joblib.load", "yaml.load", "yaml.unsafe_load",
         "torch.jit.load", "torch.hub.load"}


def unsafe(source):
    "What a source does that may run what a file holds."
    for node in ast.walk(ast.parse(source)):
        names = {a.name.split(".")[0] for a in getattr(node, "names", []) if hasattr(a, "name")}
        if isinstance(node, ast.Import | ast.ImportFrom):
            if found := UNSAFE & (names | {(getattr(node, "module", "") or "").split(".")[0]}): yield f"import {found}"
        if not isinstance(node, ast.Call): continue
        name, said = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in CALLS or said.get("shell") == "True": yield name
        if name in SAFE and said.get(SAFE[name][0]) != str(SAFE[name][1]): yield f"{name} without {SAFE[name][0]}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path): assert not list(unsafe(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import load", "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)",
    "eval('1')", "run('ls', shell=True)", "pd.read_pickle(f)"])
def test_the_search_finds(source): assert list(unsafe(source))


class Payload:
    "Writes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.write_text, (self.path, "ran")


def test_weights_with_a_payload_do_not_run_it(tmp_path):
    run = Run(ImageRecipe(epochs=1), tmp_path / "run")
    with run.entry.write("weights-0001.pth") as draft: torch.save({"x": Payload(tmp_path / "ran")}, draft)
    with pytest.raises(Exception, match="(?i)weights.only"): run.model(1)
    assert not (tmp_path / "ran").exists()


def test_decoded_images_with_a_payload_do_not_run_it(tmp_path):
    for split in ("train", "test"):
        for c in ("cat", "dog"): picture(tmp_path / "pets" / split / c / "0.png")
    load_dataset("pets", tmp_path)
    with Entry(tmp_path / "pets.decoded").write("arrays.pt") as draft: torch.save(Payload(tmp_path / "ran"), draft)
    try: load_dataset("pets", tmp_path)
    except Exception as error: assert "weights_only" in str(error).replace(" ", "_").lower()
    assert not (tmp_path / "ran").exists()


def test_a_data_set_that_is_not_the_published_one_is_not_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        torch.save(Payload(tmp_path / "ran"), folder / name, _use_new_zipfile_serialization=False)
    with pytest.raises(FileNotFoundError, match="cifar10.*corrupted"): load_dataset("cifar10", tmp_path, download=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", sources._TORCHVISION)
def test_what_is_downloaded_has_a_checksum(name):
    from torchvision import datasets
    kind = getattr(datasets, sources._TORCHVISION[name][0])
    sums = [getattr(kind, "tgz_md5", None), *(r[-1] for r in getattr(kind, "resources", [])),
            *(r[-1] for r in getattr(kind, "split_list", {}).values())]
    assert [s for s in sums if s] and all(re.fullmatch("[0-9a-f]{32}", s) for s in sums if s is not None)


# --- archives -------------------------------------------------------------------------------------


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


def archive(path, *members):
    "A tar archive of (name, type, size) members; contents are zeros."
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "/etc/passwd", size
            tar.addfile(member, io.BytesIO(bytes(size)))
    return path


EVIL = {"upwards": ("../train/cat/0.png", tarfile.REGTYPE), "upwards inside": ("train/../../0.png", tarfile.REGTYPE),
        "absolute": ("/train/cat/0.png", tarfile.REGTYPE), "absolute in Windows": ("\\train/0.png", tarfile.REGTYPE),
        "link": ("train/cat/0.png", tarfile.SYMTYPE), "hard link": ("train/cat/0.png", tarfile.LNKTYPE),
        "device": ("train/cat/0.png", tarfile.CHRTYPE), "disk": ("train/cat/0.png", tarfile.BLKTYPE),
        "pipe": ("train/cat/0.png", tarfile.FIFOTYPE)}


@pytest.mark.parametrize("what", EVIL)
def test_an_archive_that_reaches_outside_is_refused(what, tmp_path):
    path = archive(tmp_path / "a.tar.gz", (*EVIL[what], 0))
    with pytest.raises(ValueError, match="refusing .* a link, a device, or a path to outside"): load_dataset(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("members", [[("zeros.bin", tarfile.REGTYPE, 2**21)],
                                     [(f"train/cat/{i}", tarfile.DIRTYPE, 0) for i in range(3000)]],
                         ids=["one large file", "many members"])
def test_an_archive_that_is_far_larger_unpacked_is_refused(members, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_room", 2**18)
    path = archive(tmp_path / "a.tar.gz", *members)
    with pytest.raises(ValueError, match="refusing .* the archive is too large unpacked"): load_dataset(path)


# --- network --------------------------------------------------------------------------------------

OFFLINE = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"): raise SystemExit(f"network: {event} {args}")
sys.addaudithook(hook)
"""
EVERYTHING = """
import pkgutil, importlib, nc_nbdev
for m in pkgutil.walk_packages(nc_nbdev.__path__, "nc_nbdev."):
    if not m.name.rpartition(".")[2].startswith("_"): importlib.import_module(m.name)
from nc_nbdev.vision.sources import load_dataset
load_dataset("digits"); load_dataset("templates")
"""


def test_importing_everything_needs_no_network():
    run = subprocess.run([sys.executable, "-c", OFFLINE + EVERYTHING], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    run = subprocess.run([sys.executable, "-c", OFFLINE + "import socket; socket.create_connection(('a.example', 80))"],
                         capture_output=True, text=True)
    assert "network: socket.getaddrinfo" in run.stderr


def test_tests_have_no_network():
    import socket
    with pytest.raises(OSError, match="tests are offline"): socket.create_connection(("a.example", 80), 1)
    with pytest.raises(OSError, match="tests are offline"): socket.create_connection(("192.0.2.1", 80), 1)


# --- markup ---------------------------------------------------------------------------------------


def free_of_markup(html):
    assert "&lt;script&gt;" in html and "<script>alert" not in html


def test_names_of_layers_and_splits_are_text():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(MARKUP.replace(".", ""), nn.Linear(4, 5)); self.head = nn.Linear(5, 3)
        def forward(self, x): return self.head(next(self.children())(x))
    batch = [(torch.randn(12, 4), torch.arange(12) % 3)]
    report = nc.measure(Odd(), batch, {MARKUP: batch}, layers=(MARKUP.replace(".", ""), "head:input"))
    for html in (report._repr_html_(), report.to_html()): free_of_markup(html)
    m = replace(report.measures["train"]["head:input"], vci=None, reasons={"vci": MARKUP})
    free_of_markup(m._repr_html_())


def test_statements_titles_and_notes_are_text():
    statement = Statement(MARKUP, MARKUP, MARKUP, MARKUP, at_least=1, source=MARKUP, reason=MARKUP)
    claims = [statement.claim([2.0, 2.1], [0.0, 0.1], study=MARKUP, note=MARKUP)]
    result = StudyResult(MARKUP, MARKUP, claims, None, {MARKUP: b""})
    html = import_module("nc_nbdev.reproduce").report_html([result], Settings())
    for text in (html, scoreboard(claims)._repr_html_(), result._repr_html_()): free_of_markup(text)
    assert html.count("<script") == 0


def test_the_data_of_a_plotly_figure_cannot_end_its_script():
    figure = dict(data=[dict(type="scatter3d", name="</script>" + MARKUP)], layout={})
    html = _docs.plotly_html(figure, "plotly-1", "plotly.js", alt='"><img src=x onerror=alert(1)>')
    assert html.count("</script>") == 2 and "<img" not in html and "onerror" in html


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_the_outputs_of_a_notebook_hold_no_script(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            assert not {m for m in data if "javascript" in m}
            html = "".join("".join(data.get(m, "")) for m in ("text/html", "text/markdown", "image/svg+xml"))
            assert not re.search(r"<script|javascript:|<[^>]+\son\w+\s*=", html)
