"""The reference pages hold what their data files hold, and the glossary covers every measure."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from fastcore.nbio import read_nb

import nc_nbdev as nc
from nc_nbdev._modidx import d as index

NBS = Path(__file__).resolve().parents[1] / "nbs"
GLOSSARY = [e for group in yaml.safe_load((NBS / "glossary.yml").read_text(encoding="utf-8")) for e in group["entries"]]
BIB = (NBS / "references.bib").read_text(encoding="utf-8")
KEYS = re.findall(r"^@\w+\s*\{([^,\s]+)", BIB, flags=re.M)
ABOUT = {"num_classes", "dim", "num_samples", "reasons"}  # what a result says about itself: not measures


def _page(name):
    "The Markdown that a reference notebook stores as output."
    outputs = [o for cell in read_nb(NBS / name).cells for o in cell.get("outputs", [])]
    return "\n".join("".join(o["data"].get("text/markdown", "")) for o in outputs)


@pytest.mark.parametrize("result", ["CollapseMeasures", "TestCollapse"])
def test_glossary_covers(result):
    "Every field of the two results has an entry, and no entry names a field that is not there."
    from nc_nbdev.geometry.generalization import TestCollapse

    fields = dataclasses.fields({"CollapseMeasures": nc.CollapseMeasures, "TestCollapse": TestCollapse}[result])
    entries = {e["field"].partition(".")[2] for e in GLOSSARY if e.get("field", "").startswith(result)}
    assert {f.name for f in fields} - ABOUT == entries


def test_glossary_functions_are_in_the_api():
    "The link of each entry's function resolves to a page."
    symbols = {name.rpartition(".")[2] for module in index["syms"].values() for name in module}
    assert not [e["name"] for e in GLOSSARY if e["function"] not in symbols]


def test_glossary_sources_are_in_the_references():
    assert {e["source"] for e in GLOSSARY} <= set(KEYS)


def test_glossary_entries_are_complete():
    names = [e["name"] for e in GLOSSARY]
    assert len(names) == len(set(names))
    assert not [e["name"] for e in GLOSSARY if not all(e.get(k) for k in ("formula", "range", "zero", "source", "function"))]


def test_pages_are_in_step():
    "Run the notebook again after a change of its data file."
    glossary, symbols, references = map(_page, ("glossary.ipynb", "symbols.ipynb", "references.ipynb"))
    assert re.findall(r"^### (\S+)$", glossary, flags=re.M) == [e["name"] for e in GLOSSARY]
    assert all(e["formula"] in glossary and e["zero"] in glossary for e in GLOSSARY)
    assert all(r["meaning"] in symbols for r in yaml.safe_load((NBS / "symbols.yml").read_text(encoding="utf-8")))
    assert sorted(re.findall(r"`(\S+)`$", references, flags=re.M)) == sorted(KEYS)


def test_bibliography():
    assert len(KEYS) == len(set(KEYS))
    assert all(re.fullmatch(r"[a-z]+\d{4}[a-z]?", key) for key in KEYS)
    entries = re.split(r"^@", BIB, flags=re.M)[1:]
    assert not [e.partition(",")[0] for e in entries if not all(re.search(rf"\b{k}\s*=", e) for k in ("author", "title", "year"))]
    numbers = [n for n in re.findall(r"eprint\s*=\s*\{([^}]*)\}", BIB)]
    assert len(numbers) == len(set(numbers))
    assert all(re.fullmatch(r"\d{4}\.\d{4,5}", n) for n in numbers)


def test_notebooks_cite_what_is_there():
    "Every link to the references names an entry, by its key or by the year it was published."
    anchors = set(re.findall(r'id="([^"]+)"', _page("references.ipynb")))
    cited = {(p.name, key) for p in NBS.rglob("*.ipynb") for key in re.findall(r"references\.ipynb#([\w-]+)", p.read_text(encoding="utf-8"))}
    assert not sorted((name, key) for name, key in cited if key not in anchors)
