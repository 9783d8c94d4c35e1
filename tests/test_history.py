"""The tidy table: a terminal phase that stays, falls and slopes of made curves."""

import numpy as np
import pandas as pd
import pytest

from nc_nbdev.lab.history import curves, fall, final, late_slope, matched, tpt_start, value_at

EPOCHS = [0, 1, 2, 3, 5, 8, 13, 20, 32, 50, 80, 100]


def made(curve, accuracy, condition="c", seeds=(0,)):
    "A history with one measure and the train accuracy, functions of epoch and seed."
    row = lambda s, e, m, f: dict(run="r", condition=condition, seed=s, epoch=e, split="train", layer="pool", measure=m,
                                  value=float(f(e, s)))
    measures = (("train_variance", curve), ("accuracy", accuracy))
    rows = [row(s, e, m, f) for s in seeds for e in EPOCHS for m, f in measures]
    return pd.DataFrame(rows)


def test_a_first_touch_is_no_terminal_phase():
    history = made(lambda e, s: 1, lambda e, s: 1.0 if e == 3 or e >= 20 else 0.9)
    assert tpt_start(history)[0] == 20
    assert np.isnan(tpt_start(made(lambda e, s: 1, lambda e, s: 0.9 if e == 100 else 1.0))[0])     # left at the end


@pytest.mark.parametrize("power", [0, -0.5, -2])
def test_the_late_slope_of_a_power_law_is_its_power(power):
    history = made(lambda e, s: max(e, 0.5) ** power, lambda e, s: float(e >= 3))
    assert late_slope(history, "train_variance") == pytest.approx([power], abs=1e-9)


def test_the_late_slope_sees_the_second_half_only():
    history = made(lambda e, s: max(e, 0.5) ** -3 if e < 17 else 17.0 ** -3, lambda e, s: float(e >= 3))
    assert late_slope(history, "train_variance") == pytest.approx([0], abs=1e-9)


def test_a_terminal_phase_from_epoch_0_has_no_second_half_on_a_log_axis():
    assert np.isnan(late_slope(made(lambda e, s: 1 / (1 + e), lambda e, s: 1.0), "train_variance")).all()


def test_without_a_terminal_phase_nothing_is_measured():
    history = made(lambda e, s: 1 / (1 + e), lambda e, s: 0.5)
    assert np.isnan(fall(history, "train_variance")).all() and np.isnan(late_slope(history, "train_variance")).all()
    late = made(lambda e, s: 1 / (1 + e), lambda e, s: float(e >= 80))
    assert np.isnan(fall(late, "train_variance")).all()          # it starts where the end is averaged


def test_a_common_window():
    history = pd.concat([made(lambda e, s: 1 / (1 + e), lambda e, s: float(e >= 5), "a", (0, 1)),
                         made(lambda e, s: 2 / (1 + e), lambda e, s: float(e >= 20), "b", (0, 1))])
    start = tpt_start(history, condition="a")
    both = [fall(history, "train_variance", condition=c, log=True, start=start, last=1) for c in "ab"]
    assert both[0] == pytest.approx(both[1]) and both[0] == pytest.approx(np.log10([101 / 6] * 2))


def test_values_and_the_end():
    table = curves(made(lambda e, s: 10.0 ** -s * (1 + e), lambda e, s: 1.0, seeds=(0, 2)), "train_variance")
    found = value_at(table, pd.Series({0: 5.0, 2: np.nan}))
    assert found[0] == 6 and np.isnan(found[1])
    assert value_at(table, pd.Series({0: 6.0, 2: 6.0})) == pytest.approx([9, 0.09])    # the next one measured
    assert final(table, last=2) == pytest.approx([91, 0.91])
    assert final(table, 2, log=True)[0] == pytest.approx((81 * 101) ** .5)


@pytest.mark.parametrize("asked, said", [(dict(measure="nc9"), "no 'nc9'"),
                                         (dict(measure="train_variance", layer="x"), "layer='x'"),
                                         (dict(measure="train_variance"), "say which condition")])
def test_what_is_not_there_or_ambiguous(asked, said):
    history = pd.concat([made(lambda e, s: 1, lambda e, s: 1, c) for c in "ab"])
    with pytest.raises(ValueError, match=said): curves(history, **asked)


def test_a_history_without_names_comes_back_from_a_file(tmp_path):
    "An empty condition and an empty run are NaN when pandas reads them."
    history = made(lambda e, s: (1 + s) / (1 + e), lambda e, s: float(e >= 5), condition="", seeds=(0, 1))
    history = history.assign(run="")
    history.to_csv(tmp_path / "h.csv", index=False)
    read = pd.read_csv(tmp_path / "h.csv")
    assert read.condition.isna().all()
    for condition in (None, ""):
        pd.testing.assert_frame_equal(curves(read, "accuracy", condition=condition), curves(history, "accuracy"))
    assert tpt_start(read).tolist() == [5, 5] and matched(read, "").tolist() == [1, 1]
    with pytest.raises(ValueError, match="say which condition: \\['', 'c'\\]"):
        curves(pd.concat([read, read.assign(condition="c")]), "accuracy")


def test_runs_of_one_seed_are_not_mixed():
    history = made(lambda e, s: 1.0, lambda e, s: 1.0)
    with pytest.raises(ValueError, match="runs \\['b', 'r'\\] have the same seed, 0: give each its own seed="):
        curves(pd.concat([history, history.assign(run="b")]), "accuracy")
    later = history.assign(run="b", epoch=history.epoch + 1000)
    assert len(curves(pd.concat([history, later]), "accuracy")) == 2 * len(EPOCHS)    # a run that was continued
