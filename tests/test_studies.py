"""The command and the studies: what they write, and that a broken study cannot pass."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from nc_nbdev import studies
from nc_nbdev.lab.runs import get_run, get_runs
from nc_nbdev.lab.settings import RunConfig, Settings, get_settings
from nc_nbdev.paper.train_vs_test import claims_train_vs_test

TINY = dict(epochs=1, train_per_class=20, test_per_class=10, width=4, snapshots=0)


@pytest.fixture(scope="module")
def history():
    "The runs of study 1 at the preset quick."
    settings = replace(get_settings(), preset="quick", seeds=3)
    return pd.concat(r.history for r in get_runs([replace(settings.base, seed=s) for s in range(3)], settings, progress=False))


def verdicts(history):
    return {c.id: c.verdict for c in claims_train_vs_test(history)}


def test_measuring_train_twice_flips_the_verdict(history):
    broken = history.copy()
    broken = broken[broken.split != "test"]
    twice = broken[broken.split == "seen"].assign(split="test")
    found = verdicts(pd.concat([broken, twice]))
    assert not {found[c] for c in ("1b", "2a", "2b", "3a", "3b")} & {"holds"}


def test_an_untrained_network_claims_nothing(history):
    start = history[history.epoch == 0]
    assert set(verdicts(pd.concat([start, start.assign(epoch=1)])).values()) <= {"not measured", "fails"}


def test_training_for_one_epoch_flips_the_verdict(tmp_path):
    settings = Settings(device="cpu", runs_dir=tmp_path)
    runs = [get_run(RunConfig(**TINY, seed=s), settings, progress=False) for s in range(3)]
    assert "holds" not in verdicts(pd.concat(r.history for r in runs)).values()


def test_one_seed_decides_nothing(history):
    assert set(verdicts(history[history.seed == 0]).values()) == {"undecided"}


@pytest.fixture
def tiny_project(tmp_path, monkeypatch):
    "A folder whose settings make every run tiny."
    lines = "\n".join(f"{k} = {v}" for k, v in TINY.items())
    (tmp_path / "settings.ini").write_text(f"[DEFAULT]\ndevice = cpu\nseeds = 2\n{lines}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_writes_the_report(tiny_project, capsys):
    studies.main(["--studies", "train_vs_test", "--out", "report"])
    printed, out = capsys.readouterr().out, tiny_project / "report"
    claims = json.loads((out / "claims.json").read_text())
    assert [c["id"] for c in claims] == [f"{n}{part}{loss}" for loss in ("", ".mse") for n in (1, 2, 3) for part in "ab"]
    assert all(c["verdict"] in printed and c["control"] for c in claims)
    assert len(pd.read_parquet(out / "history.parquet")) > 100
    page = (out / "report.html").read_text()
    assert page.count("<img alt=") == len(list((out / "figures").glob("*.png"))) == 2 and "http" not in page


def test_a_second_call_reads(tiny_project, monkeypatch):
    first = studies.reproduce(studies="train_vs_test", out="a", progress=False)
    monkeypatch.setattr(studies, "_compute", lambda *args: pytest.fail("computed again"))
    assert studies.reproduce(studies="train_vs_test", out="b", progress=False) == first


def test_a_study_that_breaks_leaves_nothing_behind(tiny_project, monkeypatch):
    monkeypatch.setattr("nc_nbdev.paper.train_vs_test.claims_train_vs_test", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): studies.reproduce(studies="train_vs_test", progress=False)
    assert not list((tiny_project / "runs" / "studies").glob("train_vs_test*"))


@pytest.mark.parametrize("argv, said", [(["--studies", "alchemy"], "unknown study"), (["--seeds", "0"], "seeds=0: expected at least 1")])
def test_command_rejects(argv, said, tiny_project, capsys):
    with pytest.raises(SystemExit) as exit: studies.main(argv)
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_what_is_asked_for_replaces_the_file(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\npreset = laptop\ndatasets = mnist\n")
    monkeypatch.chdir(tmp_path)
    assert {c.dataset for c in studies._settings(None, None, ["cifar10"]).grid} == {"cifar10"}
    assert studies._settings("quick", 5, ["digits"]).seeds == 5
    with pytest.raises(ValueError, match="datasets=.'mnist'.: preset quick has digits"): studies._settings("quick", None, None)
