"""Claims 5 to 7 on made histories: a world in which all of them hold, and broken worlds in which verdicts change.

No test asserts the verdict of a trained network.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from nc_nbdev.lab.history import COLUMNS
from nc_nbdev.lab.probes import FeatureTask, linear_probe
from nc_nbdev.lab.runs import planned
from nc_nbdev.lab.settings import Settings
from nc_nbdev.paper import training_longer as longer
from nc_nbdev.paper import which_layer
from nc_nbdev.paper.train_vs_test import weak_decay
from nc_nbdev.vision.recipes import image_base

EPOCHS = np.array([0, 3, 5, 10, 19, 35, 53, 100])      # the snapshots of `quick`
SEEDS = range(20)                                      # as at `quick`: the bootstrap of few seeds is wide
FALLING, FLAT = (.8, .94, .96, .97, .96, .93, .88, .84), (.8, .94, .96, .97, .97, .97, .97, .97)
HIGH = (.2, .97, .98, .99, .99, .99, .99, .99)
NC1 = {"pairs": .002, "pairs, decay / 2": .01, "pairs, decay / 5": .04, "pairs, weak decay": .1}
ENDS = {"pairs": .86, "pairs, decay / 2": .91, "pairs, decay / 5": .94, "pairs, weak decay": .97}   # of the fine probe


def rows(curve, wobble=0.003, seeds=SEEDS, **columns):
    "A row a snapshot and seed: the curve, a little different for each."
    noise = np.random.default_rng(len(str(columns))).normal(0, wobble, (max(seeds) + 1, len(EPOCHS)))
    return [dict(run="made", split="test", layer="pool", seed=s, epoch=e, value=v + n) | columns
            for s in seeds for e, v, n in zip(EPOCHS, curve, noise[s], strict=True)]


def accuracy(condition, reached=10, test=HIGH, seeds=SEEDS):
    "Rows of the accuracy: on train images 1 from `reached` on."
    common = dict(condition=condition, measure="accuracy", layer="output", seeds=seeds)
    return rows(np.where(reached <= EPOCHS, 1.0, 0.6), 0, split="train", **common) + rows(test, **common)


def table(found): return pd.DataFrame(found, columns=list(COLUMNS))


def verdicts(module, history):
    numbers = module._numbers(history)
    return {s.id: s.claim(*numbers[s.id]).verdict for s in module.CLAIMS if s.id in numbers}


def swapped(history, one="pairs", other="pairs, weak decay"):
    "Two conditions exchanged."
    return history.assign(condition=history.condition.replace({one: other, other: one}))


def swap_in(history, condition, other):
    "`condition` replaced by a copy of `other`."
    kept, copy = history[history.condition != condition], history[history.condition == other]
    return pd.concat([kept, copy.assign(condition=condition)])


def backwards(history):
    "Every measure but the train accuracy and NC1 runs backwards in time."
    last_first = dict(zip(EPOCHS, EPOCHS[::-1], strict=True))
    return history.assign(epoch=history.epoch.where(history.split == "train", history.epoch.map(last_first)))


def unfitted(history, condition):
    "A condition whose train images are never all right."
    rows = (history.condition == condition) & (history.measure == "accuracy") & (history.split == "train")
    return history.assign(value=history.value.where(~rows, 0.6))


def fitted_last(history, condition):
    "A condition whose train images are all right at the last epoch alone."
    rows = (history.condition == condition) & (history.measure == "accuracy") & (history.split == "train")
    return history.assign(value=history.value.where(~rows, (history.epoch == EPOCHS[-1]).astype(float)))


def stopped(history, condition, epoch):
    "A condition measured until an epoch."
    return history[(history.condition != condition) | (history.epoch <= epoch)]


def probed_until(history, condition, epoch):
    "A condition that is trained to the end and probed until an epoch."
    return history[(history.condition != condition) | (history.measure != longer.PROBE) | (history.epoch <= epoch)]


def copies(history):
    "The first seed, as often as there are seeds."
    return pd.concat([history[history.seed == 0].assign(seed=s) for s in SEEDS])


def always_right(history):
    "Coarse test accuracy is 1 from the first epoch on."
    return history.assign(value=history.value.where((history.measure != "accuracy") | (history.split == "train"), 1.0))


def one_seed(history): return history[history.seed == 0]


# -- training longer -------------------------------------------------------------------------------------------------

def world(falling=FALLING, weak=FLAT, ends=ENDS, nc1=NC1, few=FALLING, letters=FALLING, left=.93, shuffled=.5,
          reached=10, tests=None):
    "A history in which claims 5a to 6a hold, with two halves as a second coarse task. The arguments break it."
    found, tests = [], tests or {}
    for name in ("fine", "pairs", "binary"):
        for condition, probe in ((name, falling), (f"{name}, weak decay", weak)):
            found += accuracy(condition, reached, tests.get(condition, HIGH))
            found += rows(probe, condition=condition, measure=longer.PROBE)
            found += rows(few if condition == name else FLAT, condition=condition, measure="few_shot")
            found += rows(letters if condition == name else FLAT, condition=condition, measure="probe_letters")
    for condition in longer._DECAYS[1:3]:
        found += accuracy(condition, reached, tests.get(condition, HIGH))
        found += rows([ends[condition]] * 8, condition=condition, measure=longer.PROBE)
    for condition, value in nc1.items():
        found += rows([value] * 8, value / 50, condition=condition, measure="nc1_trace", split="train")
    for condition in ("pairs", "pairs, weak decay"):
        found += rows([left] * 8, condition=condition, measure="reconstructed")
        found += rows([shuffled] * 8, condition=condition, measure="reconstructed_shuffled")
    return table(found)


def of(history): return verdicts(longer, history)


def test_a_world_in_which_everything_holds():
    assert of(world()) == dict.fromkeys(("5a", "5c", "5g", "5h", "5y", "6a"), "holds")


def test_without_decays_in_between_nothing_is_said_of_them():
    few = world()[lambda h: ~h.condition.isin(longer._DECAYS[1:3])]
    assert of(few) == dict.fromkeys(("5a", "5c", "5g", "5h", "5y"), "holds")


def shuffled_decays(history, seed=0):
    "The probe at the end of each decay in the place of another's, a seed differently: labels permuted."
    rng, history = np.random.default_rng(seed), history.copy()
    probes = (history.measure == longer.PROBE) & history.condition.isin(longer._DECAYS)
    for s in SEEDS:
        names = dict(zip(longer._DECAYS, rng.permutation(longer._DECAYS), strict=True))
        of_seed = probes & (history.seed == s)
        history.loc[of_seed, "condition"] = history.condition[of_seed].map(names)
    return history


BETTER = {c: [.2] + [a] * 7 for c, a in zip(NC1, (.95, .96, .97, .98), strict=True)}     # coarse tasks follow NC1

@pytest.mark.parametrize("claim, verdict, broken", [
    ("5a", "fails", lambda: world(falling=FLAT)),
    ("5a", "fails", lambda: world(falling=[.1] * 8, weak=[.1] * 8)),                # fine labels permuted
    ("5a", "fails", lambda: swapped(world())),                                       # the control swapped in
    ("5a", "control passes", lambda: swap_in(world(), "pairs, weak decay", "pairs")),   # it comes without decay
    ("5a", "not measured", lambda: backwards(world())),                              # all end untrained
    ("5a", "not measured", lambda: world(weak=[.1] * 8)),                            # a control that cannot fall
    ("5a", "not measured", lambda: world(tests={"pairs": [.2] * 8})),                # coarse labels permuted
    ("5a", "not measured", lambda: world(tests={"pairs, weak decay": [.2] * 8})),
    ("5y", "not measured", lambda: world(tests={"pairs": [.2] * 8})),
    ("5a", "fails", lambda: world(falling=HIGH)),                                    # the coarse labels probed
    ("5a", "not measured", lambda: world(reached=200)),                              # no terminal phase
    ("5a", "not measured", lambda: world(reached=40)),                               # one that starts too late
    ("5a", "not measured", lambda: world(reached=100)),
    ("5a", "not measured", lambda: unfitted(world(), "pairs, weak decay")),          # no matched control
    ("5a", "not measured", lambda: fitted_last(world(), "pairs, weak decay")),
    ("5a", "not measured", lambda: stopped(world(), "pairs, weak decay", 53)),
    ("5a", "undecided", lambda: one_seed(world())),
    ("5a", "undecided", lambda: world(weak=(.8, .94, .96, .97, .96, .95, .92, .92))),   # a control at the bar
    ("5a", "fails", lambda: world(falling=(.8, .99, .9, .86, .86, .86, .86, .86))),  # the fall was over before T0
    ("5a", "not measured", lambda: probed_until(world(), "pairs, weak decay", 53)),   # whose probe falls after that
    ("5c", "control passes", lambda: swap_in(world(), "binary, weak decay", "binary")),
    ("5g", "fails", lambda: world(few=FLAT)),
    ("5h", "fails", lambda: world(letters=FLAT)),
    ("5h", "fails", lambda: swapped(world(), "fine", "fine, weak decay")),
    ("5y", "fails", lambda: world(left=.52)),                                        # nothing left in the clusters
    ("5y", "control passes", lambda: world(shuffled=.93)),                           # any labels would do
    ("5y", "not measured", lambda: world(reached=200)),
    ("6a", "not measured", lambda: world(nc1=dict.fromkeys(NC1, .01))),              # no dose
    ("6a", "not measured", lambda: swap_in(world(), "pairs, decay / 2", "pairs")),   # a dose that is another one again
    ("6a", "not measured", lambda: always_right(world())),                           # a control that cannot follow
    ("6a", "not measured", lambda: copies(world())),                                 # one seed in the place of all
    ("5a", "not measured", lambda: copies(world())),
    ("6a", "not measured", lambda: world(nc1=dict(zip(NC1, (.9, .92, .94, .96), strict=True)))),   # hardly any
    ("6a", "not measured", lambda: world(tests=dict.fromkeys(NC1, [.2] * 8))),       # coarse labels permuted
    ("6a", "fails", lambda: world(nc1=dict(zip(NC1, (.1, .04, .01, .002), strict=True)))),   # less is worse
    ("6a", "fails", lambda: world(FLAT, ends=dict.fromkeys(ENDS, .97))),             # a probe that knows no decay
    ("6a", "control passes", lambda: world(tests=BETTER)),                           # the coarse task suffers as well
    ("6a", "undecided", lambda: one_seed(world())),
    ("6a", "undecided", lambda: world()[lambda h: h.seed < 3]),
    ("6a", "not measured", lambda: world(reached=200)),
    ("6a", "not measured", lambda: world(nc1=NC1 | {"pairs, weak decay": np.inf})),
    ("6a", "not measured", lambda: fitted_last(world(), "pairs, decay / 2")),
    ("6a", "not measured", lambda: stopped(world(), "pairs, decay / 2", 53)),
    ("6a", "not measured", lambda: unfitted(world(), "pairs, decay / 5")),           # a decay that is no dose
    ("6a", "not measured", lambda: probed_until(world(), "pairs, decay / 5", 53)),
])
def test_a_broken_world_changes_the_verdict(claim, verdict, broken):
    assert of(broken())[claim] == verdict


def test_probes_that_do_not_know_their_decay_hold_no_6a():
    assert [of(shuffled_decays(world(), seed))["6a"] for seed in range(10)].count("holds") == 0


def random_walk(rng, columns):
    "A walk a seed that starts at 0.95 and goes down as a rule: a trend without cause."
    return [row for s in SEEDS for row in rows(.95 + rng.normal(-.01, .02, len(EPOCHS)).cumsum(), 0, [s], **columns)]


def test_trends_without_cause_hold_nothing():
    "Treatment and control are walks of the same kind, with a trend: 5a and 6a hold no more often than chance has it."
    found, kept = [], world()
    probes = (kept.measure == longer.PROBE) & kept.condition.isin(longer._DECAYS)
    for i in range(20):
        rng = np.random.default_rng(i)
        walks = [row for c in longer._DECAYS for row in random_walk(rng, dict(condition=c, measure=longer.PROBE))]
        found.append(of(pd.concat([kept[~probes], table(walks)])))
    assert [v["5a"] for v in found].count("holds") <= 2 and [v["6a"] for v in found].count("holds") <= 1


def collapsing(size, noise=0.02, seed=0):
    "Features of four fine classes in two coarse ones, the fine ones `size` apart above a floor of noise."
    g, y = torch.Generator().manual_seed(seed), torch.arange(480) % 4
    apart = torch.randn(4, 3, generator=torch.Generator().manual_seed(9))
    H = torch.tensor([[-1., 0, 0], [1, 0, 0]])[y // 2] + size * apart[y] + noise * torch.randn(480, 3, generator=g)
    return FeatureTask(H[:240], y[:240], y[:240] // 2, H[240:], y[240:], y[240:] // 2)


def probed(change=lambda task: task):
    "Claim 5a where features of pairs collapse to a floor of noise, after a change to what is probed."
    sizes, seeds, kept = (.3, .3, .3, .3, .1, .03, .01, .003), range(3), world()
    found = [row for s in seeds for row in
             rows([linear_probe(change(collapsing(e, seed=s))).accuracy for e in sizes], 0, [s],
                  condition="pairs", measure=longer.PROBE)]
    kept = kept[kept.seed.isin(seeds) & ~((kept.measure == longer.PROBE) & (kept.condition == "pairs"))]
    return of(pd.concat([kept, table(found)]))["5a"]


def test_features_that_collapse_hold_5a_and_broken_measurements_of_them_do_not():
    assert probed() == "holds"
    shuffle = lambda t: replace(t, fine=t.fine[torch.randperm(240)], fine_test=t.fine_test[torch.randperm(240)])
    assert probed(shuffle) in ("fails", "undecided")
    assert probed(lambda t: replace(t, fine=t.coarse, fine_test=t.coarse_test)) == "fails"


def test_the_rank_correlation_is_spearman_s_and_a_constant_has_none():
    from scipy.stats import spearmanr
    x, y = np.random.default_rng(0).normal(size=(2, 4, 5)).round(0)
    y[:, 0] = 1
    found = longer._rank_correlations(x, y)
    assert found[0] == 0 and np.allclose(found[1:], [spearmanr(x[:, i], y[:, i]).statistic for i in range(1, 5)])
    assert np.isnan(longer._rank_correlations(x, y * np.nan)).all()
    assert np.isnan(longer._rank_correlations(np.where(np.arange(4)[:, None] == 0, np.inf, x), y)).all()
    ties = np.array([[0.1 + 0.2, 0.3, 0.5, 0.6]]).T                # equal but for rounding
    x = np.arange(4.)[:, None]
    assert longer._rank_correlations(x, ties) == longer._rank_correlations(x, ties.round(3)) < 1


def test_shuffling_within_groups():
    coarse, fine = torch.arange(40) % 2, torch.arange(40) % 4
    found = longer._shuffle_within(fine, coarse, 0)
    assert torch.equal(found % 2, coarse) and torch.equal(found.bincount(), fine.bincount())
    assert not torch.equal(found, fine) and torch.equal(found, longer._shuffle_within(fine, coarse, 0))


# -- which layer -----------------------------------------------------------------------------------------------------

EARLIER = {"stem": [.7] * 8, "stage1": [.8] * 8, "stage2": (.8, .9, .92, .94, .95, .95, .95, .95)}
LAYERS = (*EARLIER, "pool")


def depths(last=FALLING, weak=None, reached=10, **earlier):
    "A history in which 7a and 7c hold: the last layer falls, at weak decay it does not."
    found, weak = [], weak or dict(EARLIER, pool=FLAT)
    for name in ("pairs", "binary"):
        for condition, layers in ((name, EARLIER | earlier | {"pool": last}), (f"{name}, weak decay", weak)):
            found += accuracy(condition, reached)
            for layer in LAYERS: found += rows(layers[layer], condition=condition, measure=longer.PROBE, layer=layer)
    return table(found)


def of_layers(history): return verdicts(which_layer, history)


def test_layers_in_which_everything_holds():
    assert of_layers(depths()) == {"7a": "holds", "7c": "holds"}


def renamed_layers(history, order):
    "The values of a layer under the name of another."
    names = dict(zip(LAYERS, (LAYERS[i] for i in order), strict=True))
    moved = history.assign(layer=history.layer.replace(names))
    return moved.sort_values("layer", key=lambda c: c.map({n: i for i, n in enumerate(LAYERS)}), kind="stable")


def guessing(history, condition):
    "A condition whose test accuracy stays that of guessing."
    rows = (history.condition == condition) & (history.measure == "accuracy") & (history.split == "test")
    return history.assign(value=history.value.where(~rows, 0.2))


CHANCE = dict(stem=[.1] * 8, stage1=[.1] * 8, stage2=[.1] * 8)

@pytest.mark.parametrize("verdict, broken", [
    ("fails", lambda: depths(FLAT)),                                                 # the last layer does not fall
    ("fails", lambda: depths(FLAT, stage2=[.999] * 8)),                              # an earlier one always ahead
    ("fails", lambda: depths(stage2=FALLING, stage1=FALLING, stem=FALLING)),         # all layers fall alike
    ("fails", lambda: depths([.1] * 8, **CHANCE)),                                   # fine labels permuted
    ("fails", lambda: renamed_layers(depths(), (3, 1, 2, 0))),                       # layers in another order
    ("fails", lambda: renamed_layers(depths(), (0, 1, 3, 2))),
    ("fails", lambda: swapped(depths())),                                            # the control swapped in
    ("control passes", lambda: swap_in(depths(), "pairs, weak decay", "pairs")),     # it comes without decay
    ("not measured", lambda: backwards(depths())),                                   # all end untrained
    ("not measured", lambda: depths(weak=CHANCE | {"pool": [.1] * 8})),              # a control that cannot fall
    ("not measured", lambda: guessing(depths(), "pairs")),                           # coarse labels permuted
    ("not measured", lambda: depths(reached=200)),
    ("not measured", lambda: depths(reached=40)),
    ("not measured", lambda: unfitted(depths(), "pairs, weak decay")),               # no matched control
    ("not measured", lambda: fitted_last(depths(), "pairs, weak decay")),
    ("not measured", lambda: stopped(depths(), "pairs, weak decay", 53)),
    ("undecided", lambda: one_seed(depths())),
    ("undecided", lambda: depths(weak=dict(EARLIER, pool=(.8, .94, .96, .97, .96, .95, .95, .95)))),  # at the bar
])
def test_broken_layers_change_the_verdict(verdict, broken):
    assert of_layers(broken())["7a"] == verdict


def test_layers_that_walk_at_random_hold_nothing():
    found = []
    for i in range(20):
        rng, made = np.random.default_rng(i), depths()
        walks = [row for c in ("pairs", "pairs, weak decay") for layer in LAYERS
                 for row in random_walk(rng, dict(condition=c, measure=longer.PROBE, layer=layer))]
        made = made[~((made.measure == longer.PROBE) & made.condition.str.startswith("pairs"))]
        found.append(of_layers(pd.concat([made, table(walks)]))["7a"])
    assert found.count("holds") <= 1


# -- what is trained and measured ------------------------------------------------------------------------------------

def test_snapshots_of_a_window_are_of_each_seed():
    early, late = (accuracy("pairs", reached, seeds=range(1)) for reached in (8, 15))
    history = table(early + [dict(row, seed=1) for row in late])
    assert longer.first_snapshots(history, "pairs", EPOCHS).tolist() == [10, 19]
    never = table(accuracy("pairs", 200))
    assert longer.first_snapshots(never, "pairs", EPOCHS).isna().all()


def test_both_studies_train_the_same_coarse_runs_and_the_control_is_matched(tmp_path):
    settings = Settings(seeds=2, runs_dir=tmp_path)
    plans = [planned(lambda run=run: run.measure(settings, False)) for run in
             (longer.run_training_longer, which_layer.run_which_layer)]
    assert set(plans[1]) < set(plans[0]) and len(plans[0]) == 6 * 2 and len(plans[1]) == 2 * 2
    assert replace(image_base(settings), seed=0) in plans[0]          # that of study 1
    conditions = longer._conditions(settings, image_base(settings))
    assert conditions["pairs, weak decay"] == weak_decay(conditions["pairs"])
    decays = [conditions[c].weight_decay for c in longer._DECAYS]
    assert decays == sorted(decays, reverse=True) and len(set(decays)) == 4


def test_larger_scales_have_more_coarse_tasks():
    def tasks(**more):
        settings = Settings(**more)
        return [c for c in longer.coarse_tasks(settings, image_base(settings)) if "," not in c]

    assert tasks() == ["pairs"] and tasks(preset="laptop") == ["pairs", "binary"]
    assert tasks(preset="workstation") == ["pairs"]
    assert tasks(preset="paper") == ["pairs", "binary", "animals_vehicles"]
    assert tasks(preset="paper", datasets=("mnist",)) == ["pairs", "binary"]


@pytest.mark.parametrize("run, count", [(longer.run_training_longer, 7), (which_layer.run_which_layer, 3)],
                         ids=["training_longer", "which_layer"])
def test_two_epochs_claim_nothing(run, count, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)      # no worker processes
    tiny = dict(epochs=2, train_per_class=20, test_per_class=10, width=4, measure_points=4, snapshots=3)
    result = run(Settings(device="cpu", seeds=2, runs_dir=tmp_path, overrides=tiny), progress=False)
    assert len(result.claims) == count and "holds" not in {c.verdict for c in result.claims}
    notes = {c.id: c.note for c in result.claims}
    assert notes[result.claims[1].id] == "not trained at this scale" and "terminal phase" in result.claims[0].note
    assert result.figures[run.name].startswith(b"\x89PNG") and set(result.history.columns) == set(COLUMNS)
