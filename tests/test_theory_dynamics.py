"""Closed forms of theory on held features, local elasticity and transfer, against independent computations."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

from nc_nbdev.geometry.nearest_centre import ncc_accuracy
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.lab.probes import FeatureTask, few_shot
from nc_nbdev.lab.settings import get_settings
from nc_nbdev.theory import local_elasticity as le
from nc_nbdev.theory import perturbation as pb
from nc_nbdev.theory import transfer_bound as tb
from nc_nbdev.theory.free_features import FreeFeatures, Problem, Snapshot, descend, largest_gradient
from nc_nbdev.vision.sources import load_dataset

quick = settings(max_examples=25, deadline=None)
scale = st.floats(-2.5, 1).map(lambda e: 10**e)  # 0.003 to 10


def held(K=4, D=8, n=5, lw=0.05, lh=0.05):
    return Problem(K, D, n, lw, lh, math.inf, "mse")


# --- features held near a given matrix


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 6), scale)
def test_free_central_path_never_rises(seed, K, D, lw):
    problem = held(K, D, lw=lw, lh=0.0)
    H = pb.noisy_anchor(problem, seed=seed)
    start = FreeFeatures.at(problem, H, pb.ridge_classifier(problem, H))
    path = descend(start, range(0, 101, 5), rate=min(0.02, 0.5 * K * lw), boost=5 * K, objective=pb.on_central_path)
    assert pb.largest_rise(pb.path_nc1(path)) < 1e-12


def test_on_the_central_path_the_gradient_of_the_classifier_is_zero_and_that_of_features_is_the_partial_one():
    problem = held(3, 5, 4, 0.05, 0.02)
    H0, g = pb.noisy_anchor(problem, seed=3), torch.Generator().manual_seed(0)
    H = H0 + 0.3 * torch.randn(H0.shape, generator=g, dtype=H0.dtype)
    model = FreeFeatures.at(problem, H, torch.zeros(3, 5), anchor=H0)
    of_H, of_W = torch.autograd.grad(pb.on_central_path(model), (model.H, model.W))
    W = pb.ridge_classifier(problem, H)
    velocity = -(H @ W.T - model.Y) @ W - len(H) * problem.lh * (H - H0)
    torch.testing.assert_close(velocity, -len(H) * of_H, rtol=1e-10, atol=1e-12)
    assert of_W.abs().max() < 1e-14


@quick
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 6))
def test_shrinkage_is_exact_far_from_collapse(seed, K, D):
    problem = held(K, D)
    H0 = pb.noisy_anchor(problem, spread=2.0, seed=seed)
    model = pb.settle(problem, H0)
    assert largest_gradient(model) < 1e-10
    deviation = lambda H: H - H.unflatten(0, (K, 5)).mean(dim=1).repeat_interleave(5, 0)
    expected = deviation(H0) @ pb.shrinkage(model.W.detach(), 5 * K * problem.lh)
    torch.testing.assert_close(deviation(model.H.detach()), expected, rtol=1e-6, atol=1e-9)


@quick
@given(scale, scale, scale)
def test_collapsed_scale_is_stationary(c0, gamma_h, gamma_w):
    h, w = pb.collapsed_scale(c0, gamma_h, gamma_w)
    assert h > c0 and w == pytest.approx(h / (h * h + gamma_w))
    # gamma_h (h - c0) loses digits where h is close to c0: compare h with the fixed point instead
    assert h == pytest.approx(c0 + (1 - h * w) * w / gamma_h, rel=1e-9)


@quick
@given(scale, scale, scale, st.floats(0, 1))
def test_responses_are_derivatives_and_ordered(c0, gamma_h, gamma_w, inside):
    def logs(b, k):
        h, w = pb.collapsed_scale(c0, b, k)
        return np.log([(inside * (b / (b + w * w)) ** 2 + 1 - inside) * (c0 / h) ** 2, k / (h * h + k)])
    r, u = pb.responses(c0, gamma_h, gamma_w, inside), math.exp(1e-4)
    by_h = (logs(gamma_h * u, gamma_w) - logs(gamma_h / u, gamma_w)) / 2e-4
    by_w = (logs(gamma_h, gamma_w * u) - logs(gamma_h, gamma_w / u)) / 2e-4
    found = [r["nc1 by lh"], r["residual by lh"], r["nc1 by lw"], r["residual by lw"]]
    np.testing.assert_allclose(found, [*by_h, *by_w], rtol=1e-4, atol=1e-6)
    assert abs(r["nc1 by lw"]) < r["nc1 by lh"] and r["residual by lw"] > r["residual by lh"]


@pytest.mark.parametrize("kind", ["symmetric", "skew", "outside", "deviations"])
def test_each_part_of_the_first_order_prediction(kind):
    problem, y = held(3, 5, 4, 0.03, 0.02), torch.arange(3).repeat_interleave(4)
    g, eps = torch.Generator().manual_seed(1), 1e-4
    A, error = torch.randn(3, 3, generator=g, dtype=torch.float64), torch.zeros(12, 5, dtype=torch.float64)
    if kind == "symmetric": error[:, :3] = (A + A.T)[y]
    if kind == "skew": error[:, :3] = (A - A.T)[y]
    if kind == "outside": error[:, 3:] = torch.randn(3, 2, generator=g, dtype=torch.float64)[y]
    if kind == "deviations":
        error = torch.randn(12, 5, generator=g, dtype=torch.float64)
        error = error - error.reshape(3, 4, 5).mean(dim=1)[y]
    H0 = torch.eye(3, 5, dtype=torch.float64)[y] + eps * error
    assert (pb.settle(problem, H0).H.detach() - pb.first_order(problem, H0, 1.0)).abs().max() < 50 * eps**2


def test_path_nc1_of_several_starts_is_that_of_each():
    problem = held()
    H = torch.stack([pb.noisy_anchor(problem, seed=s) for s in range(3)])
    together = pb.path_nc1([Snapshot(0, 0, FreeFeatures.at(problem, H, torch.zeros(3, 4, 8)))])[0]
    alone = [pb.path_nc1([Snapshot(0, 0, FreeFeatures.at(problem, h, torch.zeros(4, 8)))]).item() for h in H]
    torch.testing.assert_close(together, torch.tensor(alone, dtype=torch.float64))


def test_held_features_refuse_bad_input():
    with pytest.raises(ValueError, match="positive"): pb.collapsed_scale(0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="orthogonal"): pb.noisy_anchor(held(5, 4), scale=1.0)
    with pytest.raises(ValueError, match="positive"): pb.first_order(held(lh=0.0), pb.noisy_anchor(held()), 1.0)


# --- local elasticity


@quick
@given(st.floats(0, 5), st.floats(-2, 2), st.floats(-2, 2), st.integers(2, 6), st.integers(2, 20))
def test_expected_traces_solve_their_equations(t, alpha, beta, K, n):
    D, dt, args = 3, 1e-4, (alpha, beta, 1.5, 0.7, K, n, 3, 0.8)
    (w0, b0), (w1, b1), (_, b) = (le.expected_traces(s, *args) for s in (t, t + dt, t + dt / 2))
    assert (w1 - w0) / dt == pytest.approx(0.64 * D * (1 - 1 / n), rel=1e-6)
    slope = 2 * (alpha - beta) / K * b + 0.64 * D * (K - 1) / (K * n)
    assert (b1 - b0) / dt == pytest.approx(slope, rel=1e-5, abs=1e-7)
    assert le.expected_traces(0, *args) == pytest.approx((1.5, 0.7))


@pytest.mark.parametrize("seed", range(3))
def test_many_samples_separate_and_nc1_follows_its_closed_form_exactly_when_alpha_exceeds_beta(seed):
    times = torch.linspace(0, 20, 201, dtype=torch.float64)
    for alpha, beta in ((2, 1), (1, 1), (1, 2)):
        start, g = le.initial_features(runs=6, seed=seed)
        end = le.simulate(start, alpha, beta, times, generator=g)
        share = le.share_separated(end[:3])
        assert share > 0.95 if alpha > beta else share < 0.05
        within, between = le.class_traces(start).mean(dim=0).tolist()
        pairs = (alpha, beta), (beta, alpha)
        guess = {pair: le.expected_traces(20, *pair, within, between, 4, 30, 6) for pair in pairs}
        w, b = le.class_traces(end).mean(dim=0).tolist()
        error = {pair: abs(math.log(w / b) - math.log(x / y)) for pair, (x, y) in guess.items()}
        assert error[alpha, beta] < 0.3 and (alpha == beta or error[beta, alpha] > 1)


def test_few_samples_are_separable_without_any_elasticity():
    times = torch.linspace(0, 20, 51, dtype=torch.float64)
    start, g = le.initial_features(runs=4, per_class=3, dim=6)  # 2 n = 6 <= D + 1
    assert le.share_separated(le.simulate(start, 1, 1, times, generator=g)) == 1


def test_fading_form_is_continuous_at_the_threshold_and_falls_there_like_one_over_log_t():
    args = 2.0, 0.5, 4, 30, 6
    below, at, above = (le.expected_nc1_fading(100.0, c, *args) for c in (2 - 1e-6, 2.0, 2 + 1e-6))
    assert below == pytest.approx(at, rel=1e-4) and above == pytest.approx(at, rel=1e-4)
    for t in (1e64, 1e128, 1e256):
        assert le.expected_nc1_fading(t, 2.0, *args) * math.log(t) == pytest.approx(4 * 29 / 3, rel=0.03)
    assert le.expected_nc1_fading(1e256, 1.9, *args) == pytest.approx(4 * 29 * 0.05 / 3, rel=1e-6)


def test_without_noise_the_simulation_is_the_matrix_exponential():
    H, _ = le.initial_features(runs=1, num_classes=3, per_class=2, dim=2)
    times = torch.linspace(0, 1, 20001, dtype=torch.float64)
    end = le.simulate(H, 1.3, -0.4, times, sigma=0.0).mean(dim=2)[0]
    E = torch.tensor([[1.3, -0.4, -0.4], [-0.4, 1.3, -0.4], [-0.4, -0.4, 1.3]], dtype=torch.float64)
    torch.testing.assert_close(end, torch.linalg.matrix_exp(E / 3) @ H.mean(dim=2)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gap", [1.0, -1.0])
def test_margin_grows_exactly_when_elastic(gap):
    mu = 0.1 * torch.randn(4, 4, dtype=torch.float64)
    path = le.mean_margin(le.predict_separation(mu, torch.full((6,), gap), torch.linspace(0, 5, 6)))
    assert (path.diff() * gap > 0).all()
    assert le.mean_margin(torch.eye(4)).item() == 1


def test_margin_of_the_simplex_grows_as_its_equation_says():
    start, times = 1.5 * torch.eye(4, dtype=torch.float64), torch.tensor([0.0, 1e-4], dtype=torch.float64)
    path = le.predict_separation(start, torch.full((2,), 0.6, dtype=torch.float64), times, substeps=1)
    speed = (le.mean_margin(path[1]) - le.mean_margin(path[0])).item() / 1e-4
    assert speed == pytest.approx(0.6 / (math.exp(1.5) + 3), rel=1e-6)


def test_elasticities_of_a_linear_model_and_its_copy():
    model = nn.Linear(5, 3, bias=False).double()
    before = model.weight.clone()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.arange(3).repeat_interleave(10)
    stepped = torch.arange(30) % 2 == 0
    change, residual = le.class_steps(model, x, y, stepped, size=1e-6)
    r = torch.eye(3, dtype=torch.float64)[y] - model(x).softmax(dim=1).detach()
    d = torch.eye(3, dtype=torch.float64) - 1 / 3
    A = torch.zeros(3, 3, dtype=torch.float64)
    for k in range(3):
        for l in range(3):
            J, i = stepped & (y == l), ~stepped & (y == k)
            A[l, k] = ((x[i] @ x[J].T) @ r[J]).mean(dim=0) @ d[k] / J.sum()
            assert residual[l, k].item() == pytest.approx(float(r[J].mean(dim=0) @ d[k]))
    alpha, beta = le.elasticities(change, residual, y.masked_fill(stepped, -1))
    off = ~torch.eye(3, dtype=torch.bool)
    assert alpha == pytest.approx(float(A.trace() / residual.trace()), rel=1e-4)
    assert beta == pytest.approx(float(A[off].sum() / residual[off].sum()), rel=1e-4)
    assert torch.equal(model.weight, before)


def test_one_elasticity_for_all_is_no_gap():
    residual = torch.rand(4, 4).double()
    residual -= residual.mean(dim=1, keepdim=True)
    change = 3 * residual[:, None].expand(4, 8, 4)  # every sample moves by three times the residual of the step
    assert le.elasticities(change, residual, torch.arange(4).repeat(2)) == pytest.approx((3, 3))


# --- transfer


def draw_classes(seed, K, D, spread, per_class):
    "A function that draws independent samples of K heavy-tailed classes in D dimensions."
    g = torch.Generator().manual_seed(seed)
    means, size = torch.randn(K, D, generator=g), spread * torch.rand(K, 1, generator=g)
    def draw():
        y = torch.arange(K).repeat_interleave(per_class)
        noise = torch.randn(len(y), D, generator=g) / torch.rand(len(y), 1, generator=g).clamp(min=0.02)
        return (means[y] + size[y] * noise).double(), y
    return draw


@quick
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 3), st.floats(0.01, 2))
def test_bound_holds_for_any_distribution(seed, K, D, spread):
    draw = draw_classes(seed, K, D, spread, 400)
    (H, y), (queries, labels) = draw(), draw()
    V, means = tb.class_cdnv(H, y), ClassStatistics.from_features(H, y, num_classes=K).means
    assert 1 - ncc_accuracy(H, y, means) <= tb.few_shot_bound(V, K, None)      # these points are the distribution
    everything = torch.cat([H, queries]), torch.cat([y, labels])
    error = 1 - few_shot(FeatureTask(H, y, y, queries, labels, labels), 2)
    assert error <= tb.few_shot_bound(tb.class_cdnv(*everything), K, 2) + 0.1  # a sample of it


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.4])
def test_two_points_attain_cantelli(p):
    H, y = tb.two_point_classes(p)
    V, means = tb.class_cdnv(H, y), ClassStatistics.from_features(H, y, num_classes=2).means
    assert 1 - ncc_accuracy(H, y, means) == pytest.approx(p)
    assert 4 * V / (1 + 4 * V) == pytest.approx(p, rel=1e-6)
    assert p <= tb.few_shot_bound(V, 2, None) == pytest.approx(p / (1 - p), rel=1e-6)


@pytest.mark.parametrize("D", [1, 3, 20])
def test_gaussian_error_with_many_shots_is_that_of_the_midplane(D):
    sigma = 0.4
    assert tb.gaussian_few_shot_error(D * sigma**2, D, 10**5) == pytest.approx(norm.cdf(-0.5 / sigma), rel=2e-3)


@pytest.mark.parametrize(("V", "n"), [(0.005, 1), (0.01, 5), (0.5, 2)])
def test_gaussian_error_on_a_line_is_that_of_two_signs(V, n):
    side, order = norm.cdf(-0.5 / (V * (1 + 0.5 / n)) ** 0.5), norm.cdf(-((n / (2 * V)) ** 0.5))
    assert tb.gaussian_few_shot_error(V, 1, n) == pytest.approx(side * (1 - order) + order * (1 - side), rel=1e-6)


@quick
@given(st.floats(0.02, 2), st.integers(1, 20), st.integers(1, 10))
def test_gaussian_error_obeys_the_bound_and_falls_with_shots(V, D, n):
    error = tb.gaussian_few_shot_error(V, D, n)
    assert error <= tb.few_shot_bound(V, 2, n) and tb.gaussian_few_shot_error(V, D, n + 1) <= error * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("shots", [1, 2])
def test_gaussian_error_against_simulation_and_not_that_of_exact_centres(shots):
    sigma, g = (0.3 / 4) ** 0.5, torch.Generator().manual_seed(0)
    h, own, other = (sigma / m**0.5 * torch.randn(100_000, 4, generator=g) for m in (1, shots, shots))
    other[:, 0] += 1
    error = ((h - other).square().sum(dim=1) <= (h - own).square().sum(dim=1)).double().mean().item()
    assert tb.gaussian_few_shot_error(0.3, 4, shots) == pytest.approx(error, abs=0.006)
    assert tb.gaussian_few_shot_error(0.3, 4, 10**6) < error - 0.02


def test_source_and_unseen_classes_are_disjoint():
    scale = get_settings(preset="quick", datasets=(), overrides={})
    recipe, unseen = tb.transfer_recipe(scale, 5, seed=4)
    assert not set(recipe.classes) & set(unseen) and (len(recipe.classes), len(unseen)) == (5, 3)
    assert tb.transfer_recipe(scale, 2, seed=4)[1] == unseen != tb.transfer_recipe(scale, 2, seed=5)[1]
    with pytest.raises(ValueError, match="expected 2 to 7"): tb.transfer_recipe(scale, 8, seed=0)


def test_the_number_of_source_classes_changes_neither_images_nor_steps():
    scale = get_settings(preset="quick", datasets=(), overrides={})
    recipes = {k: tb.transfer_recipe(scale, k, seed=4)[0] for k in (2, 4, 7)}
    images = {k: len(r.data(scale.data_dir).train_images) for k, r in recipes.items()}
    assert images == {2: 240, 4: 240, 7: 238} and {-(-n // 64) for n in images.values()} == {4}
    plain = {replace(r, classes=(), train_per_class=None) for r in recipes.values()}
    assert len(plain) == 1 and plain.pop().batch_size == 64


def test_classes_are_kept_and_renamed():
    digits = load_dataset("digits")
    part = digits.keep_classes([7, 2])
    assert part.classes == ("7", "2") and part.num_classes == 2
    assert torch.equal(part.train_images[part.train_labels == 0], digits.train_images[digits.train_labels == 7])
    for bad in ([1], [1, 1], [0, 10]):
        with pytest.raises(ValueError): digits.keep_classes(bad)


# --- what is claimed


def verdicts(page, values):
    "id -> verdict, for id -> (values, values of the control)."
    return {s.id: s.claim(*values[s.id]).verdict for s in page.CLAIMS if s.id in values}


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "holds"), (0.5, "fails"), (1.5, "control passes")])
def test_another_critical_constant_would_be_seen(factor, expected, monkeypatch):
    "A world whose classes separate at a constant of K/2 / factor."
    simulate = le.simulate
    faster = lambda H, alpha, *args, **more: simulate(H, lambda t: factor * alpha(t), *args, **more)
    monkeypatch.setattr(le, "simulate", faster)
    shares = tuple([le._faded_share(c, seed) for seed in (200, 201, 202)] for c in (3.0, 2.0))
    assert verdicts(le, {"T8d": shares}) == {"T8d": expected}


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "holds"), (0.5, "fails"), (2.0, "control passes")])
def test_another_constant_of_the_error_bound_would_be_seen(factor, expected, monkeypatch):
    bound = tb.few_shot_bound
    monkeypatch.setattr(tb, "few_shot_bound", lambda *args: factor * bound(*args))
    ratios = np.array([tb._largest_ratio(seed) for seed in range(200, 203)])
    assert verdicts(tb, {"T9a": (ratios, 2 * ratios)}) == {"T9a": expected}


@pytest.mark.parametrize(("helped_by", "expected"), [("classes", "holds"), ("images", "fails")])
def test_images_are_not_taken_for_classes(helped_by, expected, monkeypatch):
    "Unseen classes are easier after more source classes, or only after more images."
    def made(recipe, unseen, kind):
        classes = len(recipe.classes)
        seen = classes if helped_by == "classes" else classes * recipe.train_per_class
        error = 0.5 if kind == "untrained" else 0.1 + 1 / seen
        error *= 1 + 0.001 * recipe.seed / classes                       # no two seeds are alike
        rows = [dict(cdnv=0.1, error_1=error, error_5=error, error_20=error)] * 3
        return pd.DataFrame(rows, index=["train", "test", "unseen"])
    monkeypatch.setattr(tb, "get_runs", lambda recipes, *_: recipes)
    monkeypatch.setattr(tb, "transfer_table", made)
    scale = get_settings(preset="quick", seeds=3, datasets=(), overrides={})
    assert verdicts(tb, tb.run_transfer_bound.measure(scale, False).values)["T9f"] == expected


@pytest.mark.parametrize("page", [pb, le, tb])
def test_claims_of_theory_are_exploratory_and_name_their_source(page):
    assert all(s.source and not s.primary for s in page.CLAIMS)
    assert len({s.id for s in page.CLAIMS}) == len(page.CLAIMS)


def test_values_out_of_range_are_errors():
    with pytest.raises(ValueError, match="larger denominator"): tb.two_point_classes(0.0004)
    with pytest.raises(ValueError, match="larger denominator"): tb.two_point_classes(0.4999)
    with pytest.raises(ValueError, match="cdnv >= 0"): tb.gaussian_few_shot_error(-0.1, 4, 5)
    for tiny in (0.0, 5e-324, 1e-12): assert tb.gaussian_few_shot_error(tiny, 4, 5) == 0
    for values in ([1.0], [1e-30, 1e-31]):
        with pytest.raises(ValueError, match="two or more"): pb.largest_rise(torch.tensor(values))


def test_two_points_err_in_a_share_of_one_minus_x_of_their_bound():
    "So this part of T9a is an identity."
    for share in (0.002, 0.1):
        H, y = tb.two_point_classes(share)
        means = ClassStatistics.from_features(H, y, num_classes=2).means
        ratio = (1 - ncc_accuracy(H, y, means)) / tb.few_shot_bound(tb.class_cdnv(H, y), 2, None)
        assert ratio == pytest.approx(1 - share, rel=1e-6)
