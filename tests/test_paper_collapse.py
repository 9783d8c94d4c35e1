"Claims 4 and 8 on the runs of the preset quick, and the same studies broken on purpose, whose verdicts must flip."

from dataclasses import replace

import pandas as pd
import pytest

from nc_nbdev.lab.models import tap_layers
from nc_nbdev.lab.runs import get_runs
from nc_nbdev.lab.settings import Settings, get_settings
from nc_nbdev.paper import cascade, random_labels

TINY = dict(epochs=1, train_per_class=20, test_per_class=10, width=4, measure_points=2, snapshots=2)


@pytest.fixture(scope="module")
def quick():
    return replace(get_settings(), preset="quick", seeds=3, overrides={})


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    "Settings whose runs are of one epoch."
    return Settings(device="cpu", seeds=2, runs_dir=tmp_path_factory.mktemp("runs"), overrides=TINY)


def swap(history, **parts):
    "The history with the rows of some measures or splits taken from elsewhere: split=other split."
    (old, new), = parts.items()
    return pd.concat([history[history.split != old], history[history.split == new].assign(split=old)])


# -- random labels -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def histories(quick): return random_labels.label_runs(quick, progress=False)


def of_labels(histories): return {c.id: c.verdict for c in random_labels.claims_random_labels(histories, 10)}


@pytest.mark.parametrize("broken, claim", [
    (lambda h: {**h, "random labels": h["true labels"]}, "4b"),                              # labels never redrawn
    (lambda h: {**h, "random labels": swap(h["random labels"], test="train")}, "4b"),        # train measured twice
    (lambda h: {**h, "random labels": h["random labels"][h["random labels"].epoch <= 1]}, "4a"),   # stopped before the terminal phase
    (lambda h: {**h, "no weight decay": h["true labels"]}, "4c"),
    (lambda h: {**h, "true labels": h["no weight decay"], "no weight decay": h["true labels"]}, "4c"),
], ids=["true labels", "train twice", "stopped early", "the same decay", "decays swapped"])
def test_a_broken_study_of_labels_flips(histories, broken, claim):
    assert of_labels(broken(histories))[claim] != "holds"


def test_one_seed_decides_nothing(histories):
    assert set(of_labels({n: h[h.seed == 0] for n, h in histories.items()}).values()) == {"undecided"}


def test_one_epoch_of_random_labels_claims_nothing(one_epoch):
    assert "holds" not in {c.verdict for c in random_labels.run_random_labels(one_epoch, progress=False).claims}


# -- the cascade ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(quick):
    found = get_runs([replace(quick.base, label_noise=noise, seed=s) for noise in (0.0, 1.0) for s in range(3)], quick, progress=False)
    return found[:3], found[3:], tap_layers(found[0].model(0))


@pytest.fixture(scope="module")
def separations(runs, quick): return [[cascade.separation(r, e) for r in runs[0]] for e in (quick.base.epochs, 0)]


def of_cascade(runs, separations, change=lambda h: h, layers=None):
    true, random, taps = runs
    history, noise = (pd.concat(r.history for r in part) for part in (true, random))
    return {c.id: c.verdict for c in cascade.claims_cascade(change(history), noise, layers or taps, *separations)}


def level_off(history):
    "Test NC1 of the earlier layers as it was at epoch 12 ever after."
    earlier = (history.split == "test") & (history.measure == "nc1_trace") & (history.layer != "pool") & (history.epoch > 12)
    then = history[(history.split == "test") & (history.measure == "nc1_trace") & (history.epoch == 12)].set_index(["seed", "layer"]).value
    level = history.copy()
    level.loc[earlier, "value"] = [then[s, n] for s, n in zip(level.seed[earlier], level.layer[earlier], strict=True)]
    return level


def test_a_broken_cascade_flips(runs, separations):
    upside_down = of_cascade(runs, separations, layers=runs[2][::-1])
    assert upside_down["8a"] != "holds" and upside_down["8c"] != "holds"
    stopped = of_cascade(runs, separations, lambda h: h[h.epoch <= 1])
    assert {stopped[k] for k in ("8b", "8c", "8d")} == {"not measured"}


def test_train_measured_twice_does_not_level_off(runs, separations):
    assert of_cascade(runs, separations, lambda h: swap(level_off(h), test="seen"))["8d"] != "holds"


def test_the_same_runs_on_both_sides_flip_the_cascade(runs, separations):
    memorised = (runs[1], runs[1], runs[2])
    assert of_cascade(memorised, separations)["8b"] != "holds"


def test_one_epoch_of_the_cascade_has_no_terminal_phase(one_epoch):
    found = {c.id: c.verdict for c in cascade.run_cascade(one_epoch, progress=False).claims}
    assert {found[k] for k in ("8b", "8c", "8d")} == {"not measured"} and found["8a"] != "holds"
