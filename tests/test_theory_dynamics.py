"""Closed forms of the theory notebooks on held features, local elasticity and transfer, against independent computations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from torch import nn

from nc_nbdev.lab.data import load_dataset
from nc_nbdev.theory import local_elasticity as le
from nc_nbdev.theory import modelling_principles as mp
from nc_nbdev.theory import perturbation as pb
from nc_nbdev.theory import transfer_bound as tb

quick = settings(max_examples=25, deadline=None)
scale = st.floats(-2.5, 1).map(lambda e: 10**e)  # 0.003 to 10


# --- features held near a given matrix


@quick
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 6), scale)
def test_free_central_path_never_rises(seed, K, D, lw):
    H0, y = pb.noisy_classes(K, 5, D, seed=seed)
    assert pb.largest_rise(pb.path_nc1(pb.central_path(H0, y, lw, time=2.0)[1], y)) < 1e-12


def test_velocity_is_minus_the_gradient_of_the_model():
    (H0, y), lw, lh = pb.noisy_classes(3, 4, 5, seed=3), 0.05, 0.02
    start = H0 + 0.3 * torch.randn_like(H0)
    model = pb.AnchoredFeatures(H0, y, lw, lh)
    with torch.no_grad():
        model.H.copy_(start)
        model.W.copy_(pb.ridge_classifier(start, model.Y, lw))
    (gradient,) = torch.autograd.grad(model().sum(), model.H)
    W = model.W.detach()[0]
    velocity = -(start @ W.T - model.Y) @ W - len(y) * lh * (start - H0)
    torch.testing.assert_close(velocity, -len(y) * gradient[0], rtol=1e-10, atol=1e-12)


@quick
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 6))
def test_shrinkage_is_exact_far_from_collapse(seed, K, D):
    H0, y = pb.noisy_classes(K, 5, D, spread=2.0, seed=seed)
    H, W = pb.alternate(H0, y, 0.05, 0.05, tolerance=1e-12)
    centre = torch.eye(len(y), dtype=H.dtype) - torch.block_diag(*[torch.full((5, 5), 0.2, dtype=H.dtype)] * K)
    torch.testing.assert_close(centre @ H, centre @ H0 @ pb.shrinkage(W, 0.05, len(y)), rtol=1e-6, atol=1e-9)


@quick
@given(scale, scale, scale)
def test_collapsed_scale_is_stationary(c0, beta, kappa):
    h, w = pb.collapsed_scale(c0, beta, kappa)
    assert h > c0 and w == pytest.approx(h / (h * h + kappa))
    # beta (h - c0) loses digits where h is close to c0: compare h with the fixed point instead
    assert h == pytest.approx(c0 + (1 - h * w) * w / beta, rel=1e-9)


@quick
@given(scale, scale, scale, st.floats(0, 1))
def test_elasticities_are_derivatives_and_ordered(c0, beta, kappa, inside):
    def logs(b, k):
        h, w = pb.collapsed_scale(c0, b, k)
        tau = b / (b + w * w)
        return np.log([(inside * tau**2 + 1 - inside) * (c0 / h) ** 2, kappa_residual(h, k)])
    kappa_residual = lambda h, k: k / (h * h + k)
    e, u = pb.elasticities(c0, beta, kappa, inside), math.exp(1e-4)
    by_lh = (logs(beta * u, kappa) - logs(beta / u, kappa)) / 2e-4
    by_lw = (logs(beta, kappa * u) - logs(beta, kappa / u)) / 2e-4
    np.testing.assert_allclose([e.nc1_lh, e.residual_lh, e.nc1_lw, e.residual_lw], [*by_lh, *by_lw], rtol=1e-4, atol=1e-6)
    assert abs(e.nc1_lw) < e.nc1_lh and e.residual_lw > e.residual_lh


@pytest.mark.parametrize("kind", ["symmetric", "skew", "outside", "deviations"])
def test_each_part_of_the_first_order_prediction(kind):
    y = torch.arange(3).repeat_interleave(4)
    g, eps = torch.Generator().manual_seed(1), 1e-4
    A, base = torch.randn(3, 3, generator=g, dtype=torch.float64), torch.eye(3, 5, dtype=torch.float64)
    error = torch.zeros(12, 5, dtype=torch.float64)
    if kind == "symmetric": error[:, :3] = (A + A.T)[y]
    if kind == "skew": error[:, :3] = (A - A.T)[y]
    if kind == "outside": error[:, 3:] = torch.randn(3, 2, generator=g, dtype=torch.float64)[y]
    if kind == "deviations":
        error = torch.randn(12, 5, generator=g, dtype=torch.float64)
        error = error - error.reshape(3, 4, 5).mean(dim=1)[y]
    H0 = base[y] + eps * error
    H, _ = pb.alternate(H0, y, 0.03, 0.02)
    assert (H - pb.first_order(H0, y, 1.0, 0.03, 0.02).H).abs().max() < 50 * eps**2


def test_held_features_refuse_bad_input():
    H0, y = pb.noisy_classes()
    for bad in (dict(H0=H0[1:], y=y[1:]), dict(y=y[1:]), dict(lw=0.0), dict(lh=-1.0)):
        with pytest.raises(ValueError): pb.AnchoredFeatures(**{**dict(H0=H0, y=y, lw=0.1, lh=0.1), **bad})
    with pytest.raises(ValueError): pb.collapsed_scale(0.0, 1.0, 1.0)
    with pytest.raises(ValueError): pb.near_collapse(1.0, 0.1, num_classes=5, dim=4)


# --- local elasticity


@quick
@given(st.floats(0, 5), st.floats(-2, 2), st.floats(-2, 2), st.integers(2, 6), st.integers(2, 20))
def test_expected_traces_solve_their_equations(t, alpha, beta, K, n):
    D, dt, args = 3, 1e-4, (alpha, beta, 1.5, 0.7, K, n, 3, 0.8)
    (w0, b0), (w1, b1), (_, b) = (le.expected_traces(s, *args) for s in (t, t + dt, t + dt / 2))
    assert (w1 - w0) / dt == pytest.approx(0.64 * D * (1 - 1 / n), rel=1e-6)
    assert (b1 - b0) / dt == pytest.approx(2 * (alpha - beta) / K * b + 0.64 * D * (K - 1) / (K * n), rel=1e-5, abs=1e-7)
    assert le.expected_traces(0, *args) == pytest.approx((1.5, 0.7))


def test_fading_form_is_continuous_at_the_threshold():
    args = (100.0,), (2.0, 0.5, 4, 30, 6)
    below, at, above = (le.expected_nc1_fading(*args[0], c, *args[1]) for c in (2 - 1e-6, 2.0, 2 + 1e-6))
    assert below == pytest.approx(at, rel=1e-4) and above == pytest.approx(at, rel=1e-4)


def test_without_noise_the_simulation_is_the_matrix_exponential():
    X, _ = le.initial_features(runs=1, num_classes=3, per_class=2, dim=2)
    times = torch.linspace(0, 1, 20001, dtype=torch.float64)
    end = le.simulate(X, 1.3, -0.4, times, sigma=0.0).mean(dim=2)[0]
    E = torch.tensor([[1.3, -0.4, -0.4], [-0.4, 1.3, -0.4], [-0.4, -0.4, 1.3]], dtype=torch.float64)
    torch.testing.assert_close(end, torch.linalg.matrix_exp(E / 3) @ X.mean(dim=2)[0], rtol=1e-4, atol=1e-5)


@quick
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=6), st.lists(st.integers(-20, 20), min_size=1, max_size=6))
def test_separability_on_a_line(a, b):
    found = le.linearly_separable(*(torch.tensor(v, dtype=torch.float64)[:, None] for v in (a, b)))
    assert found == (max(a) < min(b) or max(b) < min(a))


@pytest.mark.parametrize("gap", [1.0, -1.0])
def test_margin_grows_exactly_when_elastic(gap):
    mu = 0.1 * torch.randn(4, 4, dtype=torch.float64)
    path = le.logit_margin(le.predict_separation(mu, torch.full((6,), gap), torch.linspace(0, 5, 6)))
    assert (path.diff() * gap > 0).all()
    assert le.logit_margin(torch.eye(4)).item() == 1


def test_influence_of_a_linear_model_and_its_copy():
    model = nn.Linear(5, 3, bias=False).double()
    before = model.weight.clone()
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.arange(3).repeat_interleave(10)
    stepped = torch.arange(30) % 2 == 0
    A, B = le.influence(model, x, y, stepped, size=1e-6)
    d = torch.eye(3, dtype=torch.float64) - 1 / 3
    r = torch.eye(3, dtype=torch.float64)[y] - model(x).softmax(dim=1).detach()
    for k in range(3):
        for l in range(3):
            J, i = stepped & (y == l), ~stepped & (y == k)
            assert A[k, l].item() == pytest.approx(float(((x[i] @ x[J].T) @ r[J]).mean(dim=0) @ d[k] / J.sum()), abs=1e-5)
            assert B[k, l].item() == pytest.approx(float(r[J].mean(dim=0) @ d[k]))
    assert torch.equal(model.weight, before)


def test_one_elasticity_for_all_is_no_gap():
    A = torch.rand(4, 4).double()
    assert le.elasticities(3 * A, A) == pytest.approx((3, 3))


# --- transfer


@quick
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(1, 3), st.floats(0.01, 2))
def test_bound_holds_for_any_distribution(seed, K, D, spread):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(K).repeat_interleave(20)
    noise = torch.randn(len(y), D, generator=g) / torch.rand(len(y), 1, generator=g).clamp(min=0.02)  # heavy tails
    H = torch.randn(K, D, generator=g)[y] + spread * noise * torch.rand(K, 1, generator=g)[y]
    V = tb.class_cdnv(H, y)
    assert tb.exact_centre_error(H, y) <= tb.few_shot_bound(V, K, None)
    assert tb.few_shot_error(H, y, 2, episodes=20) <= tb.few_shot_bound(V, K, 2) + 0.1


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.4])
def test_two_points_attain_cantelli(p):
    H, y = tb.two_point_classes(p)
    V = tb.class_cdnv(H, y)
    assert tb.exact_centre_error(H, y) == p
    assert 4 * V / (1 + 4 * V) == pytest.approx(p, rel=1e-6)
    assert p <= tb.few_shot_bound(V, 2, None) == pytest.approx(p / (1 - p), rel=1e-6)


@pytest.mark.parametrize("D", [1, 3, 20])
def test_gaussian_error_with_many_shots_is_that_of_the_midplane(D):
    sigma = 0.4
    assert tb.gaussian_few_shot_error(D * sigma**2, D, 10**5) == pytest.approx(norm.cdf(-0.5 / sigma), rel=2e-3)


@quick
@given(st.floats(0.02, 2), st.integers(1, 20), st.integers(1, 10))
def test_gaussian_error_obeys_the_bound_and_falls_with_shots(V, D, n):
    error = tb.gaussian_few_shot_error(V, D, n)
    assert error <= tb.few_shot_bound(V, 2, n) and tb.gaussian_few_shot_error(V, D, n + 1) <= error * (1 + 1e-6) + 1e-12


def test_classes_are_kept_and_renamed():
    digits = load_dataset("digits")
    part = digits.keep_classes([7, 2])
    assert part.classes == ("7", "2") and part.num_classes == 2
    assert torch.equal(part.train_images[part.train_labels == 0], digits.train_images[digits.train_labels == 7])
    source, unseen = tb.split_classes(digits, 5, seed=4)
    assert not set(source.classes) & set(unseen.classes) and (source.num_classes, unseen.num_classes) == (5, 3)
    for bad in ([1], [1, 1], [0, 10]):
        with pytest.raises(ValueError): digits.keep_classes(bad)


# --- the map


def test_the_map_names_modules_that_exist():
    from importlib.util import find_spec
    assert len(mp.MODELS) == 9 and all(find_spec(f"nc_nbdev.theory.{m.study}") for m in mp.MODELS)
    with pytest.raises(ValueError): mp.theory_claims(["perpetual_motion"])
