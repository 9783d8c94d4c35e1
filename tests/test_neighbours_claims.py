"""Claims of the room neighbours on made histories: worlds in which they hold, and broken ones in which verdicts change.

No test asserts the verdict of a trained network.
"""

from types import SimpleNamespace
from zlib import crc32

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from nc_nbdev.lab.history import COLUMNS
from nc_nbdev.lab.settings import Settings
from nc_nbdev.neighbours import convergence as co
from nc_nbdev.neighbours import feature_collapse as words_page
from nc_nbdev.neighbours import feature_complexity as fc
from nc_nbdev.neighbours import few_shot as fs
from nc_nbdev.neighbours import graphs as gr
from nc_nbdev.neighbours import grokking as gk
from nc_nbdev.neighbours import language_models as lm


def verdict(monkeypatch, module, run, world, claim):
    "The verdict where a world, (measure, split, layer) -> function from a condition to start and end, was measured."
    def made(conditions, *_):
        def rows(condition, key, start, end):
            for seed in range(3):
                less = 1 - crc32(f"{condition} {key} {seed}".encode()) % 100 / 10**7        # seeds differ a little
                for epoch in range(6):
                    value = (start if epoch < 2 else end) ** (1 + seed / 100) * less
                    yield "made", condition, seed, epoch, key[1], key[2], key[0], value
        return pd.DataFrame([row for key, of in world.items() for c in conditions for row in rows(c, key, *of(c))],
                            columns=list(COLUMNS))
    monkeypatch.setattr(module, "histories", made)
    found = run.measure(Settings(), False).values
    plt.close("all")
    return next(s for s in module.CLAIMS if s.id == claim).claim(*found[claim]).verdict


# --- grokking


def grokking(nc1=None, **accuracies):
    "Test accuracies, and NC1 of one hidden layer; the changes break the world."
    reached = {"no decay": 0.0, "rewarded": 0.2, **{name.replace("_", " "): a for name, a in accuracies.items()}}
    return {("accuracy", "train", "output"): lambda c: (0.1, 1.0),
            ("accuracy", "test", "output"): lambda c: (0.05, reached.get(c, 0.97)),
            ("nc1_trace", "train", "features"): lambda c: (20.0, 0.03 if c == "two layers" else nc1 or 5.5),
            ("relative_flatness", "train", "output"): lambda c: (100.0, 10.0)}


@pytest.mark.parametrize("claim, expected, changes", [
    ("nf2", "holds", {}), ("nf3", "holds", {}), ("nf5", "holds", {}),
    ("nf2", "not measured", dict(one_layer=0.0)),                          # it does not generalise
    ("nf2", "fails", dict(nc1=0.05)),                                      # it collapses
    ("nf3", "fails", dict(rewarded=0.95)),                                 # as the abstract of the paper says
    ("nf3", "control passes", dict(digits_rewarded=0.3)),
    ("nf5", "fails", dict(held_back=0.5)),
    ("nf5", "control passes", dict(rewarded=0.97)),
])
def test_grokking(monkeypatch, claim, expected, changes):
    assert verdict(monkeypatch, gk, gk.run_grokking, grokking(**changes), claim) == expected


# --- words and concepts


@pytest.mark.parametrize("expected, words", [("holds", 0.6), ("not measured", 0.05)])      # lengths collapse, too
def test_lengths_that_collapse_are_no_second_type(monkeypatch, expected, words):
    def made(conditions, *_):
        def history(c, seed):
            nc1 = {"words": words if c == "zipf, many" else 1e-3, "directions": 1e-4}
            rows = [("made", c, seed, e, "train", where, "nc1_trace", value ** (1 + seed / 100))
                    for e in range(4) for where, value in nc1.items()]
            rows += [("made", c, seed, e, "test", "output", "accuracy", 0.9) for e in range(4)]
            return pd.DataFrame(rows, columns=list(COLUMNS))
        return {c: [SimpleNamespace(history=history(c, s), model=lambda: None, recipe=None,
                                    loaders=lambda: {"test": [()]}) for s in range(3)] for c in conditions}
    monkeypatch.setattr(words_page, "condition_runs", made)
    for name in ("rarity_gap", "one_example_accuracy", "_length_error"):
        monkeypatch.setattr(words_page, name, lambda *_: 0.5)
    for name in ("recorded", "_figure"): monkeypatch.setattr(words_page, name, lambda *_: None)
    found = words_page.run_feature_collapse.measure(Settings(), False).values["na4"]
    assert next(s for s in words_page.CLAIMS if s.id == "na4").claim(*found).verdict == expected


# --- language models

FALLS, RISES, WAVERS = (4.5, 4.2, 3.8, 3.5), (3.5, 3.8, 4.2, 4.5), (3.5, 4.5, 3.4, 4.4)      # by width
HALVES = (4.5, 3.5, 2.8, 2.0)


def language(untrained=WAVERS, trained=FALLS, shuffled=WAVERS):
    "Geometry by width of language models before training, after it, and of those of the shuffled corpus."
    def geometry(condition):
        corpus, width = condition.split()
        at = (4, 8, 16, 32).index(int(width))
        return untrained[at], (trained if corpus == "language" else shuffled)[at]
    def loss(condition): return 5.5, (4.4, 4.2, 3.9, 3.4)[(4, 8, 16, 32).index(int(condition.split()[1]))]
    names = ("cdnv", "uniformity_dispersion", "duality_dispersion", "nc4_agreement")
    return {("loss", "test", "output"): loss, **{(name, "train", "features"): geometry for name in names}}


@pytest.mark.parametrize("claim, expected, changes", [
    ("nd1", "holds", {}), ("nd2", "holds", {}), ("nd3", "holds", {}),
    ("nd1", "control passes", dict(untrained=FALLS)),                      # width alone
    ("nd2", "control passes", dict(untrained=FALLS)),
    ("nd3", "control passes", dict(shuffled=FALLS)),
    ("nd1", "fails", dict(trained=RISES)),
    ("nd2", "fails", dict(trained=WAVERS)),
    ("nd3", "fails", dict(trained=RISES)),
    ("nd6", "holds", dict(shuffled=HALVES)),
    ("nd6", "control passes", dict(shuffled=HALVES, untrained=HALVES)),    # before training, too
])
def test_language_models(monkeypatch, claim, expected, changes):
    assert verdict(monkeypatch, lm, lm.run_language_models, language(**changes), claim) == expected


# --- features at convergence


@pytest.mark.parametrize("expected, early, fact", [
    ("holds", 0.9, 0.9998),
    ("fails", 0.9, 0.99),                                                  # the ansatz is as near in its worst layer
    ("control passes", 0.9998, 0.9998),                                    # it was as far after 50 steps
])
def test_the_worst_layers_are_compared(monkeypatch, expected, early, fact):
    world = {("duality_error", "train", "output"): lambda c: (1.0, 0.05)}
    for k, ansatz in ((1, 0.98), (2, 0.99), (3, 1.0)):
        layer = f"layer {k}"
        world["fact_error", "train", layer] = lambda c: (1.0, 0.05)
        world["fact_cosine", "train", layer] = lambda c: (early, fact)
        world["nfa_cosine", "train", layer] = lambda c, ansatz=ansatz: (ansatz, ansatz)
    assert verdict(monkeypatch, co, co.run_convergence, world, "ng3") == expected


# --- few shots


@pytest.mark.parametrize("expected, unseen, test", [
    ("holds", (6.0, 1.5), (4.0, 0.12)),
    ("fails", (60.0, 1.5), (4.0, 0.12)),                                   # untrained they were as much wider
    ("control passes", (6.0, 1.5), (4.0, 1.0)),                            # new images of known letters, too
])
def test_unseen_letters_fall_less(monkeypatch, expected, unseen, test):
    splits = dict(train=(4.0, 0.1), test=test, unseen=unseen)
    world = {("nc1_trace", split, "features"): lambda c, pair=pair: pair for split, pair in splits.items()}
    assert verdict(monkeypatch, fs, fs.run_few_shot, world, "nj4") == expected


@pytest.mark.parametrize("expected, wide, narrow", [
    ("holds", (4.0, 0.5), (8.0, 4.0)),
    ("fails", (1.0, 0.5), (8.0, 4.0)),                                     # a smaller end, and no larger fall
])
def test_falls_of_two_widths_are_compared(monkeypatch, expected, wide, narrow):
    ends = {"episodes, width 16": wide, "episodes, width 2": narrow}
    world = {("nc1_trace", split, "features"): lambda c: (2.0, 1.0) for split in ("test", "unseen")}
    world["nc1_trace", "train", "features"] = lambda c: ends.get(c, (2.0, 1.0))
    assert verdict(monkeypatch, fs, fs.run_few_shot, world, "nj2") == expected


# --- complexity of features


@pytest.mark.parametrize("claim, expected, digits, random, ifm", [
    ("nk1", "holds", 0.2, 0.9, 0.9),
    ("nk1", "control passes", 0.2, 0.2, 0.9),                              # random labels can be merged as well
    ("nk1", "fails", 0.9, 0.9, 0.9),
    ("nk2", "fails", 0.2, 0.9, 0.9),
])
def test_units_are_merged(monkeypatch, claim, expected, digits, random, ifm):
    def left(condition):
        units = int(condition.rpartition(" ")[2]) * (random if condition.startswith("random") else digits)
        return units, units
    def all_of(condition): return (int(condition.rpartition(" ")[2]) * ifm,) * 2
    world = {(f"{name}_complexity", "train", f"layer{k}"): of for name, of in (("path", left), ("ifm", all_of))
             for k in (1, 2)}
    assert verdict(monkeypatch, fc, fc.run_feature_complexity, world, claim) == expected


# --- graphs


def graphs(regular=0.2, **accuracies):
    "Networks that fit their graphs, and collapse further on regular ones; the changes break the world."
    reached = {name.replace("_", " ").strip(): a for name, a in accuracies.items()}
    nc1 = lambda c: (10.0, {"regular": regular, "no communities": 10.0}.get(c, 2.0))
    depth = gr.CommunityGraphs().depth
    return {("accuracy", "train", "output"): lambda c: (0.5, reached.get(c.partition(",")[0], 1.0)),
            **{("nc1_trace", split, f"layer {n}"): nc1 for split in ("train", "test") for n in (1, depth)}}


@pytest.mark.parametrize("claim, expected, changes", [
    ("nb5", "holds", {}), ("nb6", "holds", {}),
    ("nb5", "not measured", dict(communities=0.9)),
    ("nb6", "fails", dict(regular=2.0)),
    ("nb6", "not measured", dict(random_12=0.5)),                          # far from collapse, since nothing is learned
    ("nb6", "not measured", dict(regular_=0.5)),
])
def test_graphs(monkeypatch, claim, expected, changes):
    monkeypatch.setattr(gr, "_free_values", lambda seed, *_: (0.01, 0.1, 0.2, 0.3))
    monkeypatch.setattr(gr, "_free_on_train_graphs", lambda recipe: 0.01 + recipe.seed / 1000)
    assert verdict(monkeypatch, gr, gr.run_graphs, graphs(**changes), claim) == expected
