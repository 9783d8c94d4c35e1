"""Studies and the command: what they write, when they compute again; a broken study of train and test cannot pass."""

import json
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from nc_nbdev.lab.claims import Statement, load_claims, save_claims
from nc_nbdev.lab.history import as_history
from nc_nbdev.lab.runs import TrainingEnded
from nc_nbdev.lab.settings import Settings
from nc_nbdev.lab.studies import Measured, code_used, study
from nc_nbdev.paper import train_vs_test
from nc_nbdev.paper.train_vs_test import CLAIMS, _numbers
from nc_nbdev.vision.recipes import ImageRecipe, image_grid

command = import_module("nc_nbdev.reproduce")      # the module; `nc_nbdev.reproduce` is called as its function
TINY = dict(epochs=1, train_per_class=20, test_per_class=10, width=4, snapshots=2)
EPOCHS = [0, 1, 2, 3, 5, 7, 10, 14, 19, 27, 38, 53, 72, 100]
NAMES = ("pair", "pair, weak decay", "separable classes")
RESULTS = Path(__file__).parents[1] / "results"


# -- study 1 on made histories ---------------------------------------------------------------------------------------

def curve(end, power, seed):
    "A variance that is 1 until epoch 3, then a power law to `end`; seeds and epochs differ by a few percent."
    t = np.maximum(np.array(EPOCHS, float), 3) / 3
    rng = np.random.default_rng([seed, int(1e6 * end), int(100 * abs(power))])
    seeds = (1 + 0.03 * np.sin(7 * seed + 1)) * np.exp(rng.normal(0, 0.01, len(EPOCHS)))      # slopes differ, too
    return np.maximum(t ** power, 0) * end / (100 / 3) ** power * seeds


def world(train=(0.001, -2), strong=(0.03, -0.3), weak=(0.025, -0.3), decay=(0.1, -0.1), apart=(0.001, -2),
          seen=1.0, seeds=5):
    "A history in which everything holds, unless told otherwise: (value at the end, slope) of each variance."
    values = {NAMES[0]: (train, strong, weak), NAMES[1]: (decay, decay, decay), NAMES[2]: (apart, apart, apart)}
    rows = []
    for name, (a, s, w) in values.items():
        for seed in range(seeds):
            measured = {("train", "train_variance"): curve(*a, seed), ("rest", "train_variance"): curve(*a, seed + 1),
                        ("test", "strong_test_variance"): curve(*s, seed),
                        ("test", "weak_test_variance"): 1.1 * curve(*w, seed),
                        ("test", "weak_certified_variance"): curve(*w, seed),
                        ("test", "weak_lower_variance"): 0.9 * curve(*w, seed),
                        ("seen", "strong_test_variance"): seen * curve(*a, seed),
                        ("seen", "weak_test_variance"): seen * curve(*a, seed + 2),
                        ("train", "accuracy"): (np.array(EPOCHS) >= 3).astype(float),
                        ("test", "accuracy"): np.full(len(EPOCHS), 0.95)}
            rows += [dict(run="r", condition=name, seed=seed, epoch=e, split=split, layer="pool", measure=m, value=v)
                     for (split, m), many in measured.items() for e, v in zip(EPOCHS, many, strict=True)]
    return pd.DataFrame(rows)


def verdicts(history):
    numbers = _numbers(history, "pair", 10)
    return {s.id: s.claim(*numbers[s.id]).verdict for s in CLAIMS}


def squashed(power):
    "Test variances that are a power of the train variance: test collapse does occur, only slower."
    other = (0.001 ** power, -2 * power)
    return world(strong=(1.2 * other[0], other[1]), weak=other)


def touched(history, condition):
    "A condition whose train images are all right after epoch 3, and never again."
    rows = (history.condition == condition) & (history.measure == "accuracy") & (history.split == "train")
    return history.assign(value=history.value.where(~rows | (history.epoch <= 3), 0.9895))


def swap_seen(history):
    "Seen and rest in the place of test and train."
    seen = history[history.split == "seen"].assign(split="test")
    below = [seen[seen.measure == "weak_test_variance"].assign(measure=m) for m in
             ("weak_lower_variance", "weak_certified_variance")]
    return pd.concat([history[(history.split != "test") | (history.measure == "accuracy")], seen, *below])


def changed(history, condition, split, accuracy):
    "Another accuracy."
    rows = (history.condition == condition) & (history.split == split) & (history.measure == "accuracy")
    return history.assign(value=history.value.where(~rows, accuracy))


def late_control(history):
    "The control is fitted late, after it has fallen as fast as the treatment in the treatment's terminal phase."
    mine = history.condition == "pair, weak decay"
    fitted = mine & (history.measure == "accuracy") & (history.split == "train")
    slow = history.value.where(~fitted, (history.epoch >= 27).astype(float))
    return history.assign(value=slow.where(~mine | (history.measure != "train_variance"),
                                           (history.epoch.clip(3, 53) / 3.0) ** -1.0))


def fitted_at(history, condition, epoch):
    "A condition whose train images are all right from an epoch on."
    mine = (history.condition == condition) & (history.measure == "accuracy") & (history.split == "train")
    return history.assign(value=history.value.where(~mine, (history.epoch >= epoch).astype(float)))


def test_a_world_in_which_everything_holds():
    assert verdicts(world()) == dict.fromkeys([s.id for s in CLAIMS], "holds")
    numbers = _numbers(world(), "pair", 10)
    for s in CLAIMS:                                      # the seeds of this world disagree: an interval has a width
        number, low, high = s.claim(*numbers[s.id]).measured
        assert low < number * (1 - 1e-6 * np.sign(number)) and number * (1 + 1e-6 * np.sign(number)) < high, s.id


BROKEN = {
    "train stops at T0": (lambda: world(train=(0.1, -0.05)), ["1a", "1b"]),
    "train falls slowly": (lambda: world(train=(0.005, -0.3)), ["1a"]),
    "the control collapses as well": (lambda: world(decay=(0.001, -2)), ["1a", "1b"]),
    "strong collapse happens": (lambda: world(strong=(0.001, -2)), ["2a", "2b", "2c"]),
    "weak collapse happens": (lambda: world(strong=(20, -0.3), weak=(0.001, -2)), ["3a", "3b", "3d"]),
    "test is the root of train": (lambda: squashed(0.5), ["2b", "3b"]),
    "test is train to the 0.7": (lambda: squashed(0.7), ["2b", "3b"]),
    "no positive control": (lambda: world(apart=(0.03, -0.3)), ["2a", "3a"]),
    "train images measured as test images": (lambda: swap_seen(world()), ["2a", "2b", "2c", "3a", "3b", "3d"]),
    "seen images stay behind too": (lambda: world(seen=30.0), ["2c", "3d"]),
    "the lower bound is nothing": (lambda: world(weak=(1e-6, -0.3)), ["3a"]),
    "the certified bound falls, K-means is stuck": (lambda: world().assign(value=lambda h: h.value.where(
        h.measure != "weak_certified_variance", h.value * (h.epoch / 3.) ** -1.5)), ["3a", "3b"]),
    "no terminal phase": (lambda: world().assign(value=lambda h: h.value.where(h.measure != "accuracy", 0.5)),
                          ["1a", "1b", "2a", "2b", "3a", "3b"]),
    "the terminal phase is left again": (lambda: world().assign(
        value=lambda h: h.value.where((h.measure != "accuracy") | (h.epoch < 100), 0.9)), ["1a", "2a", "2b", "3b"]),
    "train features spread again": (lambda: world(train=(0.05, 0.2)), ["1a", "2b", "3b"]),
    "train features spread again, test features collapse": (lambda: world(
        train=(0.05, 0.2), strong=(0.005, -1), weak=(0.005, -1)), ["2a", "2b", "3a", "3b"]),
    "train images, not collapsed yet, measured as test images": (
        lambda: swap_seen(world(train=(0.02, -1))), ["2a", "3a"]),
    "a certified bound that is too large": (lambda: world().assign(value=lambda h: h.value.where(
        h.measure != "weak_certified_variance", 50 * h.value)), ["3a", "3b"]),
    "test images at chance": (lambda: changed(world(), "pair", "test", 0.1), ["1a", "1b", "2a", "2b", "2c", "3a"]),
    "the control is never fitted": (lambda: changed(world(), "pair, weak decay", "train", 0.6), ["1a"]),
    "the control falls while the treatment does": (lambda: late_control(world()), ["1a"]),
    "bounds of the untrained network and of T": (lambda: world(strong=(20, -0.3), weak=(0.001, -2))[lambda h: (
        h.measure != "weak_certified_variance") | h.epoch.isin([0, 100])], ["3a", "3b"]),
    "the terminal phase is the last epoch": (
        lambda: fitted_at(world(), NAMES[0], 100), ["1a", "1b", "2a", "2b", "3a", "3b"]),
    "that of the control is": (lambda: fitted_at(world(), NAMES[1], 100), ["1a"]),
    "train features spread at the last epoch, which is the terminal phase": (lambda: fitted_at(world().assign(
        value=lambda h: h.value.where((h.measure != "train_variance") | (h.epoch < 100), 1.03 * h.value)),
        NAMES[0], 100), ["3b"]),
    "bounds of earlier epochs": (lambda: world(strong=(20, -0.3), weak=(0.001, -2))[lambda h: (
        h.measure != "weak_certified_variance") | h.epoch.isin([14, 19])], ["3a", "3b"]),
    "the control was stopped early": (
        lambda: world()[lambda h: (h.condition != NAMES[1]) | (h.epoch < 50)], ["1a", "1b"]),
    "train features spread again at the end": (lambda: world().assign(value=lambda h: h.value.where(
        (h.measure != "train_variance") | (h.split != "train") | (h.epoch < 53), h.value * (h.epoch / 38) ** 4)),
        ["1a", "1b"]),
    "weak variance above strong": (lambda: world(strong=(.011, -.3), weak=(.3, -.1)), ["3a", "3b", "3d"]),
    "K-means below the spectral bound once": (lambda: world().assign(value=lambda h: h.value.where(
        (h.measure != "weak_test_variance") | (h.split != "test") | (h.epoch != 19), h.value / 20)), ["3a", "3b"]),
    "train images are all right once": (lambda: touched(world(), NAMES[0]), ["1a", "1b", "2a", "2b", "3a", "3b"]),
    "copies of one seed": (lambda: pd.concat([world(seeds=1).assign(seed=s) for s in range(5)]),
                           ["1a", "1b", "2a", "2b", "2c", "3a", "3b", "3d"]),
    "the terminal phase is three epochs": (lambda: fitted_at(world(), NAMES[0], 53), ["3b"]),
    "one seed": (lambda: world(seeds=1), ["1a", "1b", "2a", "2b", "2c", "3a", "3b", "3d"]),
}


@pytest.mark.parametrize("broken, flipped", BROKEN.values(), ids=BROKEN)
def test_a_broken_world_flips(broken, flipped):
    found = verdicts(broken())
    assert "holds" not in {found[c] for c in flipped}, found


@pytest.mark.parametrize("num_classes, learned, guessed", [(2, 0.6, 0.54), (10, 0.2, 0.18), (100, 0.021, 0.019)])
def test_a_network_that_has_learned_is_told_from_one_that_guesses(num_classes, learned, guessed):
    for accuracy, verdict in ((learned, "holds"), (guessed, "not measured")):
        numbers = _numbers(changed(world(), NAMES[0], "test", accuracy), "pair", num_classes)
        assert {s.claim(*numbers[s.id]).verdict for s in CLAIMS} == {verdict}


def test_other_seeds_are_no_control():
    with pytest.raises(ValueError, match=r"seeds of conditions .*'pair, weak decay': \[7, 8"):
        verdicts(world().assign(seed=lambda h: h.seed + 7 * (h.condition == NAMES[1])))


def test_a_better_partition_than_k_means_cannot_save_weak_collapse():
    "The verdicts on weak collapse rest on bounds: a bad K-means, which is larger, makes none of them hold."
    history = world(strong=(20, -0.3), weak=(0.001, -2))
    bad = history.assign(value=history.value.where(history.measure != "weak_test_variance", 5.0))
    assert verdicts(bad)["3a"] == verdicts(history)["3a"] == "undecided"
    assert "holds" not in (verdicts(bad)["3b"], verdicts(history)["3b"])
    good = world(strong=(20, -0.3))
    worse = good.assign(value=good.value.where(good.measure != "weak_test_variance", 5.0))
    assert verdicts(good)["3b"] == "holds" != verdicts(worse)["3b"]


def test_where_test_collapse_does_happen_its_absence_fails():
    found = verdicts(world(strong=(0.001, -2), weak=(0.001, -2)))
    assert found["2a"] == "fails" and found["2b"] == "fails"


# -- the decorator and the command ----------------------------------------------------------------------------------

@pytest.fixture
def tiny_project(tmp_path, monkeypatch):
    "A folder whose settings make every run tiny."
    lines = "\n".join(f"{k} = {v}" for k, v in TINY.items())
    (tmp_path / "settings.ini").write_text(f"[DEFAULT]\ndevice = cpu\nseeds = 2\n{lines}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_vs_test, "SEPARABLE", ImageRecipe(**TINY))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*not measured")
def test_a_training_that_goes_wrong_is_not_measured(tiny_project):
    with (tiny_project / "settings.ini").open("a") as file: file.write("lr = 1e30\n")
    claims = train_vs_test.run_train_vs_test(progress=False).claims
    assert {c.verdict for c in claims} == {"not measured"} and all("training went wrong" in c.note for c in claims)


def test_one_that_goes_wrong_leaves_the_others(monkeypatch):
    made = lambda name, value, **reasons: SimpleNamespace(folder=Path(name), reasons=reasons, history=as_history(
        [dict(epoch=1, split="train", layer="pool", measure="train_variance", value=value)], name))
    sound, ended, infinite = made("a", 1.), made("b", 1., ended=1), made("c", float("nan"))
    monkeypatch.setattr(train_vs_test, "measure_runs", lambda jobs, *rest: [run.history for _, run, _ in jobs])
    ask = lambda *runs: train_vs_test.asked([(c, (None, run, {})) for c, run in runs], Settings(), False)
    assert ask(("full", sound), ("full", ended), ("full", infinite)).run.tolist() == ["a"]
    for wrong in (ended, infinite):
        with pytest.raises(TrainingEnded, match=f"weak, run {wrong.folder}"): ask(("full", sound), ("weak", wrong))


def test_command_writes_the_report(tiny_project, capsys):
    command.main(["--studies", "train_vs_test", "--out", "report"])
    printed, out = capsys.readouterr().out, tiny_project / "report"
    claims = json.loads((out / "claims.json").read_text())
    assert [c["id"] for c in claims] == [f"{s.id}{loss}" for s in CLAIMS for loss in ("", ".mse")]
    assert all(c["verdict"] in printed and c["control"] for c in claims) and "runs in all" in printed
    assert "holds" not in {c["verdict"] for c in claims}                  # after one epoch nothing is claimed
    history = pd.read_parquet(out / "history.parquet")
    assert len(history) > 100 and set(history.condition) >= {"separable classes", "digits, small_resnet, squared error"}
    page = (out / "report.html").read_text()
    assert page.count("<img alt=") == len(list((out / "figures").glob("*.png"))) == 1 and "http" not in page


def test_a_second_call_reads(tiny_project, monkeypatch):
    first = command.reproduce(studies="train_vs_test", out="a", progress=False)
    monkeypatch.setattr("nc_nbdev.lab.studies._compute", lambda *args: pytest.fail("computed again"))
    again = command.reproduce(studies="train_vs_test", out="b", progress=False)
    assert [repr(c) for c in again] == [repr(c) for c in first]           # repr, since NaN is not equal to itself


def test_a_study_that_breaks_leaves_nothing_behind(tiny_project, monkeypatch):
    monkeypatch.setattr(train_vs_test, "_numbers", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): command.reproduce(studies="train_vs_test", progress=False)
    assert not list((tiny_project / "runs" / "studies").glob("train_vs_test*/result.json"))


def test_the_plan_runs_nothing(tiny_project, capsys):
    command.main(["--plan", "--studies", "train_vs_test"])
    assert "8 of them to train" in capsys.readouterr().out and not (tiny_project / "runs").exists()


def test_the_plan_calls_no_study_that_has_no_runs(tiny_project, monkeypatch):
    simulation = command.load_study("other_losses")
    monkeypatch.setattr(simulation, "measure", lambda *args: pytest.fail("computed for a plan"))
    found = command.plan(command._settings(), ["other_losses", "train_vs_test"])
    assert {name for names in found.studies for name in names} == {"train_vs_test"} and len(found) == 8


@pytest.mark.parametrize("argv, said", [(["--studies", "alchemy"], "expected one of train_vs_test"),
                                        (["--confirm", "paper"], "paper is not registered"),
                                        (["--seeds", "0"], "seeds=0: expected a whole number of at least 1")])
def test_command_rejects(argv, said, tiny_project, capsys):
    with pytest.raises(SystemExit) as exit: command.main(argv)
    assert exit.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("line, given", [
    ("--confirm quick --plan --seeds 0 --studies random_labels --out x", "--seeds, --studies, --out, --plan"),
    ("--confirm quick --preset laptop", "--preset"), ("--confirm quick --datasets mnist", "--datasets"),
    ("--confirm quick --verify", "--verify"), ("--verify --plan --jobs 2", "--plan, --jobs"),
    ("--plan --out x", "--out")])
def test_an_option_that_would_be_ignored_is_an_error(line, given, tiny_project, monkeypatch, capsys):
    for name in ("confirm", "_run", "plan", "damaged_files"):
        monkeypatch.setattr(command, name, lambda *args, **kwargs: pytest.fail("was run"))
    with pytest.raises(SystemExit) as exit: command.main(line.split())
    assert exit.value.code == 2 and f"{line.split()[0]} with {given}: expected" in capsys.readouterr().err


def test_a_confirmation_uses_the_folder_and_the_workers(tiny_project, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(command, "confirm", lambda scale, **places: (seen.update(places, scale=scale) or [], "there"))
    monkeypatch.setattr(command, "format_scoreboard", lambda claims: "")
    command.main(["--confirm", "quick", "--runs", "elsewhere", "--jobs", "1"])
    assert seen.pop("results").resolve() == (tiny_project / "results").resolve()         # wherever the runs are
    assert seen == {"scale": "quick", "runs_dir": Path("elsewhere")} and "kept in there" in capsys.readouterr().out


@pytest.mark.parametrize("text, said", [
    ("presett = laptop", "line 3: unknown key 'presett'; did you mean 'preset'?"),
    ("epochs = many", "line 3: epochs = 'many' is not of type int"),
    ("dataset = cifar", "line 3: dataset='cifar': expected one of digits, .*; did you mean 'cifar10'?"),
    ("dataset =", "line 3: dataset='': expected one of digits"),
    ("datasets = cifar", "datasets='cifar': expected one of digits, .*; did you mean 'cifar10'?")])
@pytest.mark.parametrize("study", ["graphs", "other_losses", "cascade"])
def test_unknown_names_are_found_before_any_study(text, said, study, tmp_path, monkeypatch, capsys):
    (tmp_path / "settings.ini").write_text(f"[DEFAULT]\npreset = quick\n{text}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "load_study", lambda name: pytest.fail("a study was looked at"))
    for more in ([], ["--plan"]):
        with pytest.raises(SystemExit) as exit: command.main(["--studies", study, *more])
        assert exit.value.code == 2 and re.search(said, capsys.readouterr().err)
    with pytest.raises(ValueError, match=said): command.reproduce(studies=study, progress=False)
    with pytest.raises(ValueError, match=said): command.register(command._settings(), study)


@pytest.mark.parametrize("name", ["mnist", "templates-0.3", "mine", "data/mine", "~/mine", "here"])
def test_a_data_set_is_known_by_its_name_or_by_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for folder in ("data/mine", "here"): (tmp_path / folder).mkdir(parents=True)
    assert image_grid(Settings(overrides={"dataset": name}, data_dir=tmp_path / "data"))[0].dataset == name


def test_what_is_asked_for_replaces_the_file(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\npreset = laptop\ndatasets = mnist\n")
    monkeypatch.chdir(tmp_path)
    assert command._settings(datasets=("cifar10",)).datasets == ("cifar10",)
    assert command._settings(preset="quick", seeds=5).seeds == 5


def test_registered_then_confirmed(tiny_project):
    "The run that was registered, once, in a folder of its own; other code is refused; nothing is overwritten."
    settings = replace(command._settings(), first_seed=1000, seeds=2)
    entry = command.register(settings, "random_labels", note="a test")
    assert [s["id"] for s in entry["statements"]] and entry["runs"] and entry["seeds"] == 2
    with pytest.raises(ValueError, match="is registered with this code"): command.register(settings, "random_labels")
    file = tiny_project / "results" / "registration.json"
    as_registered = file.read_text()
    file.write_text(as_registered.replace(entry["runs"][0], "image-of-another-precision"))
    with pytest.raises(ValueError, match="here 2 are others"): command.confirm("quick", progress=False)
    file.write_text(as_registered.replace(entry["code"], "f" * 16))
    with pytest.raises(ValueError, match="was registered with the code ffff"): command.confirm("quick", progress=False)


@pytest.mark.parametrize("folder", sorted(f.parent for f in RESULTS.glob("*/*/history.parquet")), ids=lambda f: f.name)
def test_kept_numbers_follow_from_the_kept_measurements(folder):
    claims, history = load_claims(folder / "claims.json"), pd.read_parquet(folder / "history.parquet")
    for name in dict.fromkeys(c.study for c in claims):
        numbers = import_module(f"nc_nbdev.paper.{name}")._numbers
        pair = history.condition.iloc[0]                                 # of study 1: data set, network, loss
        more = {"random_labels": [10], "train_vs_test": [pair, 10]}.get(name, [])
        for id, (values, control) in numbers(history, *more).items():
            [claim] = (c for c in claims if c.id == id)
            assert claim.values == pytest.approx(list(values), rel=1e-5, abs=1e-6, nan_ok=True), id
            assert claim.control_values == pytest.approx(list(control), rel=1e-5, abs=1e-6, nan_ok=True), id


def test_designs_that_would_share_a_folder_are_refused(tiny_project):
    "An evaluation is named by the values of overrides: of 24 snapshots and 24 epochs it could not be told which."
    settings = command._settings(first_seed=1000, seeds=2)
    command.register(replace(settings, overrides={"snapshots": 24}), "random_labels")
    with pytest.raises(ValueError, match="is registered with this code"):
        command.register(replace(settings, overrides={"epochs": 24}), "random_labels")
    command.register(replace(settings, overrides={"epochs": 25}), "random_labels")


@pytest.mark.parametrize("first, seeds, free", [
    (1000, 10, True), (1001, 10, False), (1010, 3, False), (1013, 3, False), (1014, 2, True), (1020, 30, True)])
def test_seeds_of_a_new_design_may_stand_beside_those_of_an_old_one(tiny_project, monkeypatch, first, seeds, free):
    command.register(command._settings(first_seed=1010, seeds=4), "random_labels")
    monkeypatch.setattr(command, "code_hash", lambda names: "of today")
    new = command._settings(first_seed=first, seeds=seeds)
    if free: assert command.register(new, "random_labels")["first_seed"] == first
    else:
        with pytest.raises(ValueError, match="seeds from 1010 on were"): command.register(new, "random_labels")


def test_a_confirmed_design_is_kept_once(tiny_project, monkeypatch):
    settings = command._settings(first_seed=1000, seeds=2)
    command.register(replace(settings, datasets=("templates-0.3",)), "random_labels")
    command.register(settings, "random_labels")
    first = command.confirm("quick", progress=False)[1]                  # the older of the two that wait
    claims, out = command.confirm("quick", progress=False)
    assert "-templates-0.3-" in first.name and "-templates-0.3-" not in out.name
    assert json.loads((out / "environment.json").read_text())["seeds"] == [1000, 1001]
    with monkeypatch.context() as later, pytest.raises(ValueError, match="seeds from 1000 on were registered"):
        later.setattr(command, "code_hash", lambda names: "of today")
        command.register(replace(settings, first_seed=1001), "random_labels")
    assert sorted(p.name for p in out.iterdir()) == ["claims.json", "environment.json", "figures", "history.parquet"]
    made = json.loads((out / "environment.json").read_text())["runs"]
    assert sum(row["number"] for row in made) == len(command.plan(settings, ["random_labels"]))
    assert {row["commit"] for row in made} == {command.environment()["commit"]}
    by_depth = lambda history: history.groupby(["measure", "split", "run"]).layer.agg(lambda s: list(dict.fromkeys(s)))
    measured = command.load_study("random_labels")(settings).history
    assert by_depth(pd.read_parquet(out / "history.parquet")).to_dict() == by_depth(measured).to_dict()
    assert len(claims[0].values) == 2
    [shown] = (out / "figures").iterdir()
    assert command.kept_figure(tiny_project / "results", shown.stem) == shown
    assert command.kept_figure(tiny_project / "results", shown.stem, command.part_name(settings)) == shown
    assert command.kept_figure(tiny_project / "results", shown.stem, "paper, cifar10") is None
    assert command.kept_figure(tiny_project / "results", "no_such_figure") is None
    assert command.kept_figures(shown.stem, settings).startswith(b"\x89PNG")
    assert command.kept_figures("no_such_figure", settings) is None
    assert len(command.kept_results(tiny_project / "results")[command.part_name(settings)]) == len(claims)
    with pytest.raises(ValueError, match="kept results are not overwritten"): command.confirm("quick", progress=False)


def test_a_report_does_not_go_among_the_kept_results(tiny_project, capsys):
    for out in ("results", "results/quick/2026-01-01-x"):
        with pytest.raises(SystemExit): command.main(["--studies", "random_labels", "--out", out])
        assert "whose results are not overwritten" in capsys.readouterr().err
    assert not Path("results").exists()


def test_a_design_that_was_changed_by_hand_is_not_confirmed(tiny_project):
    command.register(command._settings(first_seed=1000, seeds=2), "random_labels")
    file = tiny_project / "results" / "registration.json"
    [entry] = json.loads(file.read_text())
    entry["statements"][0]["at_most"] = 99
    file.write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="statements of quick are not those"): command.confirm("quick", progress=False)


def test_results_of_other_runs_are_not_confirmed(tiny_project, monkeypatch):
    command.register(command._settings(first_seed=1000, seeds=2), "random_labels")
    monkeypatch.setattr(command, "_run", lambda *_: [SimpleNamespace(history=pd.DataFrame({"run": ["image-0"]}))])
    with pytest.raises(ValueError, match="of 1 runs that are not registered"): command.confirm("quick", progress=False)
    assert not (tiny_project / "results" / "quick").exists()


def test_kept_results_are_the_newest_that_stand(tmp_path):
    made = Statement("a", "", "", "", at_least=1).claim([2, 2], [0, 0])
    for day, value in (("2026-01-01-x", 1.0), ("2026-01-02-y", 2.0), ("2026-01-03-z", 3.0)):
        (tmp_path / "quick" / day).mkdir(parents=True)
        save_claims([replace(made, values=(value, value))], tmp_path / "quick" / day / "claims.json")
    (tmp_path / "quick" / "2026-01-03-z" / "superseded.txt").write_text("a mistake\n")
    assert command.kept_results(tmp_path)["quick, digits"][0].values == (2.0, 2.0)
    assert load_claims(tmp_path / "quick" / "2026-01-03-z" / "claims.json")[0].values == (3.0, 3.0)


def test_parts_of_a_scale_stand_side_by_side(tmp_path):
    "Claims of the same data are put together, as registered; other data have a name of their own."
    made = lambda id, value: Statement(id, "", "", "", at_least=1).claim([value, value], [0, 0])
    def keep(folder, *claims):
        (tmp_path / "laptop" / folder).mkdir(parents=True)
        save_claims(claims, tmp_path / "laptop" / folder / "claims.json")
    keep("2026-01-01-fff", made("a", 1.0), made("b", 2.0))
    keep("2026-01-01-eee-cifar10", made("b", 3.0), made("c", 4.0))
    keep("2026-01-01-eee-mnist", made("a", 5.0))
    (tmp_path / "registration.json").write_text(json.dumps([
        dict(scale="laptop", code=code, datasets=[data], date="2026-01-01") for code, data in
        (("fff", "cifar10"), ("eee", "cifar10"), ("eee", "mnist"))]))
    found = {name: {c.id: c.values[0] for c in claims} for name, claims in command.kept_results(tmp_path).items()}
    assert found == {"laptop, cifar10": {"a": 1.0, "b": 3.0, "c": 4.0}, "laptop, mnist": {"a": 5.0}}
    assert command.part_name(Settings("laptop", datasets=("mnist",))) in found


def test_a_design_with_a_tuple_is_read_back(tmp_path):
    made = Statement("a", "", "", "", at_least=1).claim([2, 2], [0, 0])
    design = dict(scale="quick", code="fff", datasets=[], date="2026-11-30", overrides={"milestones": (0.2, 0.5)})
    folder = tmp_path / "quick" / f"2026-11-30-fff-{design['overrides']['milestones']}"
    folder.mkdir(parents=True)
    save_claims([made], folder / "claims.json")
    (tmp_path / "registration.json").write_text(json.dumps([design]))
    assert command.measured_design(json.loads(json.dumps(design)), folder)
    assert [c.id for claims in command.kept_results(tmp_path).values() for c in claims] == ["a"]


def test_a_result_is_kept_until_its_code_changes(tmp_path, monkeypatch):
    "A study of a package of one's own: read while its file is the same, computed when it is not."
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    source = """
from nc_nbdev.lab.claims import Statement
from nc_nbdev.lab.studies import Measured, code_used, study
CALLS = []
@study('mine', 'Mine', (Statement('a', '', '', '', at_least=1),))
def run_mine(settings, progress):
    CALLS.append(1)
    return Measured({'a': ([2.0, 2.1, 2.2], [0.0, 0.1, 0.1])})
"""
    file = tmp_path / "mine" / "work.py"
    file.write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    import importlib
    work, here = importlib.import_module("mine.work"), Settings(runs_dir=tmp_path / "runs")
    for _ in range(2): assert work.run_mine(here)["a"].verdict == "holds"
    assert len(work.CALLS) == 1
    file.write_text(source + "# a remark\n")
    work.run_mine(here)
    work.run_mine(replace(here, seeds=4))
    assert len(work.CALLS) == 3


def test_a_result_of_a_script_is_kept_until_a_module_beside_it_changes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in {"a_script.py": "import json, a_helper, a_parcel.deep", "a_helper.py": "import numpy",
                       "a_parcel/__init__.py": "", "a_parcel/deep.py": "", "a_stranger.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert code_used("a_script") == {name: tmp_path / f"{name.replace('.', '/')}.py"
                                     for name in ("a_script", "a_helper", "a_parcel.deep")}


def test_the_module_can_be_called_whoever_imports_first():
    import nc_nbdev as nc
    with pytest.raises(ValueError, match="expected one of train_vs_test"): nc.reproduce(studies="alchemy")
    with pytest.raises(ValueError, match="expected one of train_vs_test"): command.reproduce(studies="alchemy")


def test_what_is_not_measured_and_what_was_never_stated():
    said = (Statement("a", "", "", "", at_least=1),)
    def nothing(settings, progress): return Measured({}, notes={"a": "why"})
    def more(settings, progress): return Measured({"b": ([1], [2])})
    def array(settings, progress): return Measured({"a": np.array([[2.0, 2.1, 2.2], [0.0, 0.1, 0.1]])})
    for f in (nothing, more, array): f.__module__ = "__main__"                    # as in a notebook: computed, not kept
    found = study("s", "S", said)(nothing)(Settings())["a"]
    assert (found.verdict, found.note) == ("not measured", "why")
    assert study("s", "S", said)(array)(Settings())["a"].verdict == "holds"
    with pytest.raises(ValueError, match="numbers for"): study("s", "S", said)(more)(Settings())
