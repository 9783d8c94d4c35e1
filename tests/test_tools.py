"""The tools of the workshop: the rules of the house, and the table of machines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nc_nbdev.lab.claims import Claim
from nc_nbdev.reproduce import part_name

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tools(monkeypatch):
    "Import a module of tools/ by its name."
    monkeypatch.syspath_prepend(ROOT / "tools")
    return __import__


def notebook(path, *sources):
    cells = [{"cell_type": "code", "id": f"c{k}", "metadata": {}, "source": s, "outputs": []}
             for k, s in enumerate(sources)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def test_statistics_of_a_notebook(tools, tmp_path):
    path = notebook(
        tmp_path / "a.ipynb", "#| default_exp a", "#| export\ndef one(x):\n\n    return x",
        "#| export\ndef _two(): pass", "one(1)", "#| export\nTHREE = 3",
        "#| export\n@patch\ndef four(self: A): pass", "#| export\nclass Five: pass", "0")
    found = tools("check_house").measure(path)
    assert found["lines"] == 3 + 2 + 2 + 3 + 2
    assert found["names"] == ["one", "THREE", "Five"]
    assert found["shown"] == [True, True, True, True]
    assert found["used"] == [True, False, False]
    assert found["run"] == 3
    assert found["long"] == 0


def house(folder, *sources, symbols="[{symbol: '$x$'}]"):
    "A project with a notebook for each source."
    for k, source in enumerate(sources): notebook(folder / f"nbs/lab/{k}.ipynb", f"#| export\n{source}")
    (folder / "nc_nbdev/lab").mkdir(parents=True)
    (folder / "nbs/symbols.yml").write_text(symbols, encoding="utf-8")
    return folder


def test_a_good_house_passes(tools, tmp_path):
    folder = house(tmp_path, "x = 1", "y = 1\nCLAIMS = ()", "CLAIMS = ()\n_z = 1", "_z = 2")
    assert tools("check_house").main(folder) == 0


@pytest.mark.parametrize("sources, symbols", [
    (["x = 1", "def x(): pass"], "[]"),
    (["x = '" + 120 * "a" + "'"], "[]"),
    (["x = 1"], r"[{symbol: '$K,\ D$'}, {symbol: '$D$'}]"),
])
def test_a_broken_rule_fails(tools, tmp_path, sources, symbols):
    assert tools("check_house").main(house(tmp_path, *sources, symbols=symbols)) == 1


def test_an_upward_arrow_fails(tools, tmp_path):
    folder = house(tmp_path, "x = 1")
    for room in ("paper", "lab"): (folder / "nc_nbdev" / room).mkdir(exist_ok=True)
    (folder / "nc_nbdev/paper/b.py").touch()
    (folder / "nc_nbdev/lab/a.py").write_text("NAME = 'paper.b'", encoding="utf-8")
    assert tools("check_house").main(folder) == 1


def test_a_long_description_of_a_figure_is_allowed(tools, tmp_path):
    path = notebook(tmp_path / "a.ipynb", f"#| fig-alt: \"{120 * 'a '}\"\nplot()")
    assert tools("check_house").measure(path)["long"] == 0


def test_machines_agree_or_not(tools):
    claim = Claim("1", "x is small", "here", "x", 1.0, "at most", (0.5, 0.6, 0.7), "y", (5.0, 6.0, 7.0), study="a")
    other = replace(claim, id="2")
    far = replace(other, values=(5.0, 6.0, 7.0))
    table = tools("machines").compare({"AVX2": [claim, other], "native": [claim, far]}, kept=[other])
    assert table.agree.tolist() == [True, False]
    assert table["native kept"].tolist() == ["nothing kept", "differs"] and table["AVX2 kept"]["a", "2"] == "agrees"
    assert table.spread["a", "1"] == 0 and table.spread["a", "2"] == pytest.approx(0.9)


def test_a_claim_that_one_machine_lacks_does_not_agree(tools):
    claim = Claim("1", "x is small", "here", "x", 1.0, "at most", (0.5, 0.6, 0.7), "y", (5.0, 6.0, 7.0), study="a")
    table = tools("machines").compare({"AVX2": [claim], "native": []}, kept=[])
    assert table.agree.tolist() == [False]


def test_as_no_more_than_the_processor_is(tools):
    names = tools("machines").machines()
    assert names[-1] == "native" and set(names) <= {"AVX2", "AVX512", "native"}


def test_a_machine_is_an_environment_with_folders_of_its_own(tools, monkeypatch, tmp_path):
    machines, calls = tools("machines"), []

    def run(command, env, check):
        calls.append((command, env))
        (tmp_path / "report").mkdir(exist_ok=True)
        (tmp_path / "report/claims.json").write_text("[]", encoding="utf-8")

    monkeypatch.setattr(machines.subprocess, "run", run)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    for name in ("AVX512", "native"): assert machines.reproduce(name, tmp_path, ["--seeds", "2"]) == []
    (command, avx512), (_, native) = calls
    assert command[1:] == ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "report"), "--seeds", "2"]
    assert avx512["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE"
    assert not machines.MACHINES["AVX2"].keys() & native.keys()


def test_claims_are_compared_with_those_of_their_data_set(tools):
    settings = tools("machines").settings_of
    asked = settings(["--studies", "paper", "--datasets", "mnist", "cifar10", "--seeds", "2"], "quick")
    assert part_name(asked) == "quick, mnist" and asked.seeds == 2
    assert part_name(settings(["--seeds", "2"], "quick")) == "quick, digits"
