"Claims 5 to 7: histories in which they hold, and the same studies broken on purpose, whose verdicts must flip."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from nc_nbdev.lab.probes import FeatureTask, linear_probe
from nc_nbdev.lab.settings import RunConfig, Settings
from nc_nbdev.paper import training_longer as longer
from nc_nbdev.paper import which_layer as layers_study

EPOCHS, SEEDS, LAYERS, NUM_TEST = (0, 3, 6, 12, 19, 38, 76, 150), range(3), ("stem", "stage1", "stage2", "pool"), 1000


def rows(measure, curve, split="test", layer="pool", seeds=SEEDS):
    "One measure at every snapshot: the curve, a little different for each seed."
    values = [(s, e, v + 0.002 * (s - 1) * (e > 0)) for s in seeds for e, v in zip(EPOCHS, curve, strict=True)]
    return pd.DataFrame([dict(run=f"r{s}", seed=s, epoch=e, split=split, layer=layer, measure=measure, value=v) for s, e, v in values])


COLLAPSE = (5, .3, .2, .1, .06, .03, .008, .001)
FALLING, FLAT = (.9, .95, .97, .97, .95, .93, .88, .8), (.9, .96, .965, .97, .975, .98, .985, .99)


def history(probe=FALLING, few_shot=(.5, .8, .85, .8, .7, .6, .5, .4), left=.8, letters=FALLING, nc1=COLLAPSE, accuracy=(.5, .95, 1, 1, 1, 1, 1, 1)):
    "A made-up history of one task; its terminal phase starts at epoch 6."
    train = rows("accuracy", accuracy, "train").assign(value=lambda t: t.value.round(2))
    return pd.concat([train, rows("accuracy", FLAT), rows("nc1_trace", nc1, "train").assign(value=lambda t: t.value.abs()), rows("probe_standardised", probe),
                      rows("few_shot", few_shot), rows("residual_kmeans", [left] * 8), rows("probe_letters", letters)])


def decays(probes=(.97, .93, .8), nc1s=(.08, .02, .001)):
    return {w: history(probe=[p] * 8, nc1=[c] * 8).query("epoch == 150") for w, p, c in zip((.001, .003, .01), probes, nc1s, strict=True)}


def tasks(**changes):
    fine = history(probe=FLAT, few_shot=FLAT)
    return {"fine": fine, "pairs": history(), "binary": history(), **decays(), **changes}


def verdicts(histories, chance=(.52, .53, .51)):
    return {c.id: c.verdict for c in longer.claims_training_longer(histories, chance)}


def test_histories_in_which_everything_holds():
    assert verdicts(tasks()) == dict.fromkeys(("5a", "5b", "5c", "5d", "5g", "5h", "5y", "6a", "6b"), "holds")
    with_animals = verdicts(tasks(animals_vehicles=history()))
    assert with_animals["5e"] == with_animals["5f"] == "holds"


@pytest.mark.parametrize("broken, fallen", [
    (dict(pairs=history(probe=[.1] * 8, few_shot=[.1] * 8)), {"5a": "fails", "5b": "control passes", "5g": "fails", "6a": "fails"}),   # fine labels shuffled
    (dict(pairs=history(probe=[1.] * 8, few_shot=[1.] * 8)), {"5a": "fails", "5g": "fails", "6a": "fails"}),                          # train measured twice
    (dict(pairs=history(accuracy=[.5] * 8)), {"5a": "not measured", "5b": "not measured", "5g": "not measured"}),                     # no terminal phase
    (dict(fine=history(probe=FALLING, few_shot=FALLING)), {"5a": "control passes", "5g": "control passes", "6a": "control passes"}),  # a task with itself
    (dict(pairs=history(probe=FALLING[::-1])), {"5a": "fails", "6a": "fails"}),                                                       # time backwards
    (dict(pairs=history(nc1=COLLAPSE[::-1])), {"6a": "fails"}),
    (dict(pairs=history(left=.52)), {"5y": "fails"}),
    (dict(fine=history(probe=FLAT, few_shot=FLAT, letters=FLAT)), {"5h": "fails"}),
    (decays(probes=(.8, .93, .97)), {"6b": "fails"}), (decays(probes=(.9, .9, .9)), {"6b": "fails"}),
    (decays(nc1s=(.02, .02, .02)), {"6b": "fails"}),
], ids=["labels shuffled", "train twice", "no terminal phase", "own control", "time backwards", "collapse backwards", "nothing left", "no fall elsewhere",
        "decays backwards", "decays level", "no collapse"])
def test_a_broken_study_flips(broken, fallen):
    found = verdicts(tasks() | broken)
    assert {k: found[k] for k in fallen} == fallen


def test_a_coarse_task_that_suffers():
    pairs = history()
    pairs.loc[(pairs.measure == "accuracy") & (pairs.split == "test") & (pairs.epoch == 150), "value"] -= 0.1
    assert verdicts(tasks(pairs=pairs))["5b"] == "fails"


def test_clusters_of_shuffled_labels_as_good_as_the_true_ones():
    assert verdicts(tasks(), chance=(.8, .8, .8))["5y"] == "control passes"


def test_one_seed_decides_nothing():
    one = {t: h[h.seed == 0] for t, h in tasks().items()}
    assert set(verdicts(one, chance=(.5,)).values()) == {"undecided"}


def test_the_window_is_of_snapshots():
    start, last = longer.window(history(accuracy=(.5, .9, .9, .9, .9999, 1, 1, 1)), "probe_standardised")
    assert set(start) == {19.0} and last == 150
    never, _ = longer.window(history(accuracy=[.5] * 7 + [1]), "probe_standardised")
    assert never.isna().all()           # reached at the end only: there is no phase to speak of


def test_rank_correlation():
    assert longer.rank_correlation([1, 2, 3], [1, 10, 11]) == pytest.approx(1) and longer.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert longer.rank_correlation([1, 2, 3], [5, 5, 5]) == 0 and np.isnan(longer.rank_correlation([1, np.nan], [1, 2]))


def test_shuffling_within_groups():
    coarse, fine = torch.arange(40) % 2, torch.arange(40) % 4
    found = longer.shuffle_within(fine, coarse)
    assert torch.equal(found % 2, coarse) and torch.equal(found.bincount(), fine.bincount()) and not torch.equal(found, fine)


def collapsing(epsilon, noise=0.02, seed=0):
    "Features of four fine classes in two coarse ones, the fine ones epsilon apart above a floor of noise."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(480) % 4
    H = torch.tensor([[-1., 0, 0], [1, 0, 0]])[y // 2] + epsilon * torch.randn(4, 3, generator=torch.Generator().manual_seed(9))[y] + noise * torch.randn(480, 3, generator=g)
    return FeatureTask(H[:240], y[:240], y[:240] // 2, H[240:], y[240:], y[240:] // 2)


def probed(change=lambda task: task):
    "Claim 5a on features that collapse to a floor of noise, one probe a snapshot, after a change to what is probed."
    sizes = (.3, .3, .3, .3, .1, .03, .01, .003)
    parts = [rows("probe_standardised", [linear_probe(change(collapsing(e, seed=s))).accuracy for e in sizes], seeds=[s]) for s in SEEDS]
    pairs = history()
    return verdicts(tasks(pairs=pd.concat([pairs[pairs.measure != "probe_standardised"], *parts])))


def test_features_that_collapse_hold_5a_and_broken_measurements_of_them_do_not():
    assert probed()["5a"] == "holds"
    shuffle = lambda t: replace(t, fine=t.fine[torch.randperm(240)], fine_test=t.fine_test[torch.randperm(240)])
    coarse = lambda t: replace(t, fine=t.coarse, fine_test=t.coarse_test)
    assert probed(shuffle)["5a"] in ("fails", "undecided") and probed(coarse)["5a"] == "fails"


# -- which layer -------------------------------------------------------------------------------------------------

EARLIER = {"stem": [.7] * 8, "stage1": [.8] * 8, "stage2": (.8, .9, .92, .94, .95, .95, .96, .96)}

def by_layer(last=FALLING, **earlier):
    curves = {**EARLIER, **earlier, "pool": last}
    return pd.concat([rows("accuracy", (.5, .95, 1, 1, 1, 1, 1, 1), "train"), *[rows("probe_standardised", c, layer=n) for n, c in curves.items()]])


def layer_verdicts(pairs, fine=None):
    found = layers_study.claims_which_layer({"fine": by_layer(FLAT) if fine is None else fine, "pairs": pairs, "binary": pairs}, LAYERS, NUM_TEST)
    return {c.id: c.verdict for c in found}


def test_layers_in_which_everything_holds():
    assert layer_verdicts(by_layer()) == dict.fromkeys(("7a", "7b", "7c", "7d"), "holds")


@pytest.mark.parametrize("pairs, fine, expected", [
    (by_layer(FLAT), None, "fails"),                                                         # the last layer does not fall
    (by_layer(FALLING, stage2=[.1] * 8, stage1=[.1] * 8, stem=[.1] * 8), None, "fails"),     # shuffled labels in the earlier layers
    (by_layer([.1] * 8, stage2=[.1] * 8, stage1=[.1] * 8, stem=[.1] * 8), None, "fails"),    # and in all
    (by_layer(), by_layer(), "control passes"),
], ids=["last layer flat", "earlier layers shuffled", "all shuffled", "own control"])
def test_broken_layers_flip(pairs, fine, expected):
    found = layer_verdicts(pairs, fine)
    assert found["7a"] == found["7b"] == expected


def test_the_best_layer_is_the_deepest_of_equals():
    assert layers_study.best_layer([.8, .95, .94], 360) == 2 and layers_study.best_layer([.8, .95, .90], 360) == 1
    assert layers_study.best_layer([.8, .95, .94], 10**6) == 1 and layers_study.best_layer([1, 1, 1], 10) == 2
    with pytest.raises(ValueError, match="every layer"): layers_study.best_layer([.8, np.nan], 10)


def test_drift_counts_layers_towards_the_input():
    assert layers_study.drift(by_layer(), LAYERS, NUM_TEST).tolist() == [1, 1, 1]
    assert layers_study.drift(by_layer(stage1=[.98] * 8, stage2=[.5] * 8), LAYERS, 50).tolist() == [2, 2, 2]


# -- the studies, tiny -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    "Settings whose runs are of one epoch."
    overrides = dict(epochs=1, train_per_class=20, test_per_class=10, width=4, measure_points=2, snapshots=2)
    return Settings(device="cpu", seeds=2, runs_dir=tmp_path_factory.mktemp("runs"), data_dir=tmp_path_factory.mktemp("data"), overrides=overrides)


@pytest.mark.parametrize("module, run", [(longer, "run_training_longer"), (layers_study, "run_which_layer")])
def test_after_one_epoch_nothing_holds(one_epoch, module, run, monkeypatch):
    for m in (longer, layers_study): monkeypatch.setattr(m, "MORE_SEEDS", {})
    monkeypatch.setattr("os.cpu_count", lambda: 1)      # no worker processes
    result = getattr(module, run)(one_epoch, progress=False)
    assert "holds" not in {c.verdict for c in result.claims} and result.figures and result.name in run
    assert {"run", "seed", "epoch", "split", "layer", "measure", "value"} == set(result.history.columns)
    if module is longer:
        assert [c.id for c in result.claims] == ["5a", "5b", "5c", "5d", "5g", "5h", "5y", "6a", "6b"]
        assert "mnist" in next(c.note for c in result.claims if c.id == "5h") and "terminal phase" in result.claims[0].note


def test_what_is_trained():
    settings = Settings(preset="laptop")
    plans = {c.dataset: longer.study_configs(c, c == settings.base) for c in settings.grid if c.loss == "cross_entropy"}
    assert "animals_vehicles" in plans["cifar10"] and "animals_vehicles" not in plans["mnist"]
    assert [t for t in plans["mnist"] if isinstance(t, float)] == [.001, .003, .01] and not [t for t in plans["cifar10"] if isinstance(t, float)]
    assert plans["mnist"][.01] == plans["mnist"]["pairs"] and plans["mnist"]["fine"].coarse is None
    assert not [t for t in longer.study_configs(RunConfig(weight_decay=0.0)) if isinstance(t, float)]
