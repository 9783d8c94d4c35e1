"""Verdicts on made numbers: the three conditions, Holm's rule, agreement with kept numbers."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nc_nbdev.lab.claims import (
    Statement,
    agreement,
    holm,
    load_claims,
    p_value,
    power,
    prediction_interval,
    save_claims,
    seed_interval,
)

UP = Statement("u", "It is large", "x", "c", at_least=1.0)
DOWN = Statement("d", "It is small", "x", "c", at_most=1.0)
NAN = math.nan


@pytest.mark.parametrize("statement, values, control, verdict", [
    (UP, [2, 2.1, 2.2], [0, .1, .2], "holds"),
    (UP, [0, .1, .2], [0, .1, .2], "fails"),
    (UP, [2, 2.1, 2.2], [2, 2.1, 2.3], "control passes"),
    (UP, [2, 2.1, 2.2], [.9, 1, 1.1], "undecided"),             # the control's interval reaches the bar
    (UP, [0, 1, 4], [0, 0, 0.1], "undecided"),
    (UP, [2, NAN, 2.2], [0, .1, .2], "not measured"),
    (UP, [2, 2.1, 2.2], [0, NAN, .2], "not measured"),
    (UP, [5], [0], "undecided"),
    (UP, [5, 6], [0, .1], "undecided"),                         # two seeds
    (UP, [2, 2, 2 + 1e-12], [0, .1, .2], "undecided"),          # one run, three times
    (DOWN, [.1, .2, .15], [2, 2.1, 2.2], "holds"),
    (DOWN, [2, 2.1, 2.2], [.1, .2, .15], "fails"),
    (DOWN, [.1, .2, .15], [.1, .2, .16], "control passes"),
])
def test_verdicts(statement, values, control, verdict):
    assert statement.claim(values, control).verdict == verdict


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=2, max_size=8), st.sampled_from(["t", "range"]))
def test_what_holds_differs_from_its_control(pairs, interval):
    claim = replace(UP, interval=interval).claim(*zip(*pairs, strict=True))
    if claim.verdict == "holds": assert claim.contrast[1] > 0 and claim.control_measured[2] < 1 <= claim.measured[1]


def test_pairing_takes_out_what_seeds_share():
    shared = np.array([0.0, 1, 2, 3, 4])
    claim = replace(UP, at_least=0.5).claim(shared + 5, shared + 4.9 - 5)
    assert claim.contrast[1] > 5 and math.isclose(claim.contrast[0], 5.1)


def test_unequal_seeds_are_refused():
    with pytest.raises(ValueError, match="3 values and 2 of the control"): UP.claim([1, 2, 3], [1, 2])


@pytest.mark.parametrize("bad", [dict(at_least=1.0, at_most=2.0), {}, dict(at_least=1.0, interval="guess")])
def test_a_statement_has_one_bar_and_a_known_interval(bad):
    with pytest.raises(ValueError, match="statement s"): Statement("s", "", "", "", **bad)


def test_bounded_numbers_need_six_seeds():
    assert seed_interval([.9, 1, 1, 1, 1], "expanded")[1:] == (-math.inf, math.inf)
    centre, lo, hi = seed_interval([.9, 1, 1, .8, .9, 1], "expanded")
    assert 0.8 <= lo < centre < hi <= 1        # never outside what can be


def test_holm_is_holm():
    "Against the textbook: sorted p-values times what is left, never falling."
    rng = np.random.default_rng(0)
    claims = [replace(UP, id=str(i)).claim(rng.normal(1.5, .3, 8), rng.normal(0, .3, 8)) for i in range(6)]
    p = sorted((p_value(c), c.id) for c in claims)
    expected = np.maximum.accumulate([min(1, (6 - i) * v) for i, (v, _) in enumerate(p)])
    assert holm(claims) == pytest.approx({name: e for (_, name), e in zip(p, expected, strict=True)})


def test_p_values_of_nothing():
    assert p_value(UP.claim([NAN, 1], [0, 0])) == 1 and p_value(UP.claim([2], [0])) == 1
    assert p_value(UP.claim([0.5, 0.6, 0.4], [0, 0, 0])) > 0.9
    for same in ([3, 3, 3], [1.7, 1.7], [1.3] * 10, [3.3] * 6):           # seeds without spread are no evidence,
        assert p_value(UP.claim(same, [0] * len(same))) == 1             # whatever rounding makes of their mean
    with pytest.raises(ValueError, match="a range has no p-value"):
        p_value(replace(UP, interval="range").claim([2, 3], [0, 1]))
    none = replace(UP.claim([1, 2, 3], [.1, .1, .12]), id="z", bar=0.0, interval="log-t")      # 0 has no logarithm
    sure = UP.claim([3, 3.1, 2.9], [0, .1, 0])
    assert p_value(none) == 1 and holm([none, sure]) == holm([sure, none]) == {"z": 1, UP.id: 2 * p_value(sure)}


def test_the_signs_of_few_seeds_are_enumerated():
    bounded = replace(UP, at_least=0.5, interval="expanded")
    assert p_value(bounded.claim([.9, 1, .8, .7, .9, 1], [0] * 6)) == 1 / 64
    values = [.9, .3, .8, .7, .9, .2]
    signs = np.array(list(itertools.product([1, -1], repeat=6)))
    differences = np.array(values) - 0.5
    assert p_value(bounded.claim(values, [0] * 6)) == np.mean(signs @ differences >= differences.sum() - 1e-12)


def test_seeds_that_sit_on_the_bar_are_no_evidence_however_many():
    bounded = replace(UP, at_least=0.5, interval="expanded")
    for above, exact in ((3, 1 / 8), (4, 1 / 16), (6, 1 / 64)):
        for seeds in (above + 4, 20):                              # all signs, and 20,000 that are drawn
            values = [0.5 + 0.1 * (i + 1) for i in range(above)] + [0.5] * (seeds - above)
            assert p_value(bounded.claim(values, [0] * seeds)) == pytest.approx(exact, rel=0.15)


def test_a_bound_from_the_wrong_side_is_refused():
    for wrong in (dict(at_least=1, bound="upper"), dict(at_most=1, bound="lower")):
        with pytest.raises(ValueError, match="statement s, at (least|most) a bar: bound"):
            Statement("s", "", "", "", **wrong)


def test_false_alarms_are_as_rare_as_said():
    "With no effect at all, new seeds differ from kept ones in one case of a thousand, not in one of twenty."
    rng = np.random.default_rng(1)
    misses = 0
    for _ in range(2000):
        lo, hi = prediction_interval(UP.claim(rng.normal(size=20), np.zeros(20)), seeds=3)
        misses += not lo <= rng.normal(size=3).mean() <= hi
    assert misses <= 10


def test_agreement_names_what_differs():
    kept = [UP.claim([2, 2.1, 2.2, 2.1], [0] * 4), DOWN.claim([.1, .2, .15, .1], [2] * 4)]
    here = [UP.claim([2.05, 2.15], [0, 0]), DOWN.claim([7, 8], [2, 2]), replace(UP, id="new").claim([1, 2], [0, 0])]
    assert dict(agreement(here, kept).agreement) == {"u": "agrees", "d": "differs"}
    assert agreement([UP.claim([NAN, 2], [0, 0])], kept).agreement.tolist() == ["not measured"]


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12))
def test_a_log_interval_is_positive_and_holds_its_centre(values):
    centre, lo, hi = seed_interval(values, "log-t")
    assert 0 < centre and lo <= centre * (1 + 1e-9) and centre <= hi * (1 + 1e-9)


def test_claims_are_read_back(tmp_path):
    claims = [UP.claim([1, 2], [0, 0], study="s", scale="quick", note="n"),
              replace(DOWN, primary=True).claim([NAN], [1])]
    save_claims(claims, tmp_path / "c.json")
    back = load_claims(tmp_path / "c.json")
    assert back[0] == claims[0] and back[1].primary and math.isnan(back[1].values[0])


def test_power_grows_with_seeds_and_with_the_distance_from_the_bar():
    control, spread = np.array([0, .1, 0, -.1, 0, .1]), np.array([-.3, .1, .2, 0, -.1, .1])
    made = lambda centre: UP.claim(centre + spread, control)
    assert power(made(3.0), 5) == 1 and power(made(1.0), 20) < 0.2 and power(made(0.0), 20) == 0
    assert power(made(1.12), 4) < power(made(1.12), 30)
    assert power(UP.claim([NAN], [NAN]), 20) == 0
