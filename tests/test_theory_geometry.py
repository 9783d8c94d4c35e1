"""Closed forms of the theory notebooks on spheres, many classes and unbalanced classes, against independent computations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_nbdev.geometry.etf import simplex_etf
from nc_nbdev.geometry.means import nc2_etf, one_vs_rest_margin
from nc_nbdev.theory import many_classes as mc
from nc_nbdev.theory import minority_collapse as mino
from nc_nbdev.theory import normalised as nm

quick = settings(max_examples=20, deadline=None)


def simplex(K, D):
    return F.normalize(simplex_etf(K, D).double(), dim=1)


# --- normalised features


@quick
@given(st.integers(2, 7), st.floats(0.1, 20), st.integers(0, 2), st.integers(0, 10**6))
def test_smallest_loss_is_the_simplex_and_a_lower_bound(K, tau, spare, seed):
    D, y = K - 1 + spare, torch.arange(K)
    value = nm.smallest_loss(K, tau)
    assert nm.normalised_loss(simplex(K, D), simplex(K, D), y, tau).item() == pytest.approx(value, rel=1e-6, abs=1e-13)
    W, H, _ = nm.random_spheres(K, D, 1, 200, seed)
    assert nm.normalised_loss(W, H, y, tau).min() >= value - 1e-12
    assert nm.normalised_loss(W, W, y, tau).min() >= value - 1e-12  # dual, and not a simplex


@pytest.mark.parametrize(("K", "spare", "n", "tau"), [(3, 0, 2, 1.0), (3, 1, 3, 2.5), (4, 2, 2, 0.7), (5, 0, 2, 3.0)])
def test_variability_rate_is_an_eigenvalue_of_the_hessian(K, spare, n, tau):
    D, y = K - 1 + spare, torch.arange(K).repeat_interleave(n)
    W = simplex(K, D)
    eigenvalues = torch.linalg.eigvalsh(nm.riemannian_hessian(W, W[y], y, tau))
    rate = nm.variability_rate(K, D, n, tau)
    assert int(((eigenvalues - rate).abs() < 1e-10).sum()) >= K * (n - 1)
    assert eigenvalues[0] > -1e-10  # a minimum
    assert rate == pytest.approx(nm.measured_rate(K, D, n, tau, starts=1)[0], rel=0.02)


@pytest.mark.parametrize(("K", "D", "n"), [(3, 2, 1), (4, 3, 2), (3, 4, 4)])
def test_coincident_point_is_a_strict_saddle(K, D, n):
    w = torch.eye(D, dtype=torch.float64)[:1]
    y = torch.arange(K).repeat_interleave(n)
    lowest = torch.linalg.eigvalsh(nm.riemannian_hessian(w.expand(K, D), w.expand(K * n, D), y, 1.7))[0]
    assert lowest.item() == pytest.approx(-1.7 / (K * math.sqrt(n)), abs=1e-12)


def test_descent_never_leaves_the_sphere_and_never_goes_up():
    W, H, y = nm.random_spheres(4, 5, 3, 6, seed=3)
    losses = []
    for _, (W, H) in zip(range(60), nm.riemannian_descent(W, H, y, 2.0, lr=0.5), strict=False):  # noqa: B020
        assert (W.norm(dim=-1) - 1).abs().max() < 1e-12 and (H.norm(dim=-1) - 1).abs().max() < 1e-12
        losses.append(nm.normalised_loss(W, H, y, 2.0))
    assert torch.stack(losses).diff(dim=0).max() < 1e-12


# --- many classes


@pytest.mark.parametrize(("K", "D"), [(K, D) for D in range(2, 7) for K in range(2, 2 * D + 1)] + [(11, 2)])
def test_softmax_codes_have_the_best_margin(K, D):
    rows = mc.softmax_code(K, D)
    assert rows.shape == (K, D) and (rows.norm(dim=1) - 1).abs().max() < 1e-9
    assert one_vs_rest_margin(rows, centred=False) == pytest.approx(mc.best_margin(K, D), abs=1e-8)


@quick
@given(st.sampled_from([(3, 3), (4, 3), (4, 2), (5, 2), (8, 2), (5, 3), (6, 3), (7, 4), (8, 4)]), st.integers(0, 10**6), st.floats(0, 1))
def test_no_rows_beat_the_best_margin(case, seed, mix):
    rows = F.normalize(mix * mc.softmax_code(*case) + (1 - mix) * nm.random_spheres(*case, 1, 1, seed)[0][0], dim=1)
    assert one_vs_rest_margin(rows, centred=False) <= mc.best_margin(*case) + 1e-9


def test_an_acute_angle_costs_margin_beyond_the_simplex():
    eye = torch.eye(3, dtype=torch.float64)
    square = torch.cat([eye[:2], -eye[:2], eye[2:]])  # (5, 3), no acute angle
    assert one_vs_rest_margin(square, centred=False) == pytest.approx(1)
    tilted = square.clone()
    tilted[4] = F.normalize(eye[2] + 0.2 * eye[0], dim=0)
    assert one_vs_rest_margin(tilted, centred=False) < 0.99


@quick
@given(st.sampled_from([(4, 3), (7, 2), (5, 3), (8, 4)]), st.floats(-9, 1))
def test_temperature_bound_is_below_the_optimum_and_tight_when_cold(case, exponent):
    T, K = 2.0**exponent, case[0]
    bound, best = mc.margin_at_temperature(*case, T), mc.best_margin(*case)
    assert bound <= best - T * math.log(K * (K - 1)) + 1e-9  # convexity: it costs at least that much
    assert mc.margin_at_temperature(*case, 1e-6) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("T", [2.0, 0.1, 1 / 64])
def test_soft_margin_slope_is_its_derivative(T):
    W, H, _ = nm.random_spheres(5, 3, 1, 1, seed=1)
    W, H = W[0], H[0]
    Z = (H @ W.T).requires_grad_()
    margins = (Z / T) - (Z / T).diag()[:, None]
    wrong = margins.masked_fill(torch.eye(5, dtype=torch.bool), -math.inf).logsumexp(1)
    value = -T * F.softplus(wrong).mean().log()
    ours, slope = mc.soft_margin(W, H, T)
    assert ours.item() == pytest.approx(value.item(), abs=1e-10)
    assert (torch.autograd.grad(value, Z)[0] - slope).abs().max() < 1e-9


@quick
@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 10**6))
def test_nc2_etf_has_the_floor(K, D, seed):
    rows = torch.randn(K, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert nc2_etf(rows) >= mc.etf_floor(K, D) - 1e-9


def test_unknown_optimum_is_an_error():
    with pytest.raises(ValueError, match="known"): mc.best_margin(7, 3)
    with pytest.raises(ValueError, match="at least 2"): mc.best_margin(1, 3)
    with pytest.raises(ValueError, match="needs at least"): nm.variability_rate(5, 3, 2, 1.0)


# --- unbalanced classes


@pytest.mark.parametrize(("k_A", "k_B", "n_A", "n_B", "lw", "lh", "how"), [
    (2, 2, 30, 6, 0.01, 0.01, {}), (1, 3, 40, 4, 0.02, 0.005, {}), (3, 2, 50, 3, 0.01, 0.01, {"cost": "class"}),
    (2, 3, 60, 5, 0.01, 0.01, {"reweighted": True}), (2, 2, 200, 2, 0.02, 0.02, {})])
def test_two_groups_agree_with_descent(k_A, k_B, n_A, n_B, lw, lh, how):
    problem = mino.peeled([n_A] * k_A + [n_B] * k_B, lw, lh, **how)
    W, H, value = mino.minimise(problem, seed=1)
    small = mino.two_groups(problem, k_A)
    assert value == pytest.approx(small.value, abs=1e-9)
    for k, group, gap, cosine in zip((k_A, k_B), (slice(0, k_A), slice(k_A, None)), small.gaps, small.cosines, strict=True):
        if k < 2: assert math.isnan(cosine)
        elif not math.isnan(cosine):
            assert mino.twin_gap(W, H, group) == pytest.approx(gap, abs=1e-3)
            assert mino.group_cosine(W, group) == pytest.approx(cosine, abs=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=3, unique=True), st.floats(-2.5, -1.3), st.booleans(), st.booleans())
def test_twins_merge_exactly_when_predicted(sizes, exponent, per_class, reweighted):
    problem = mino.peeled([n for n in sizes for _ in range(2)], 10**exponent, 10**exponent, "class" if per_class else "sample", reweighted)
    W, H, _ = mino.minimise(problem)
    for g, predicted in enumerate(mino.merges(problem)[::2]):
        slack = problem.shares[2 * g] / math.sqrt(problem.costs[2 * g]) / problem.lam - 1
        if abs(slack) < 0.05: continue  # at the threshold itself descent is slow
        assert (mino.twin_gap(W, H, slice(2 * g, 2 * g + 2)) < 1e-3) == predicted == (slack < 0)


def test_penalties_enter_through_their_product_only():
    sizes = [40, 40, 9, 9]
    a, b = (mino.minimise(mino.peeled(sizes, *p)) for p in ((0.01, 0.01), (0.1, 0.001)))
    assert a[2] == pytest.approx(b[2], abs=1e-10)
    assert (mino.gram_of(a[0]) - mino.gram_of(b[0])).norm() < 1e-4


def test_seli_is_the_svd_of_the_label_matrix():
    counts = [9, 4, 4, 1]
    labels = np.repeat(np.arange(4), counts)
    Z = np.eye(4)[:, labels] - 1 / 4  # (K, N)
    U, S, _ = np.linalg.svd(Z, full_matrices=False)
    gram = U @ np.diag(S) @ U.T
    assert np.abs(mino.seli_gram(counts).numpy() - gram / np.linalg.norm(gram)).max() < 1e-7
    W, H = mino.max_margin(counts, seed=2)
    assert (mino.gram_of(W) - mino.seli_gram(counts)).norm() < 1e-3
    assert (W @ H.T - (torch.eye(4) - 0.25)).abs().max() < 5e-3


def test_bad_problems_are_errors():
    with pytest.raises(ValueError, match="positive"): mino.peeled([3, 0], 0.1, 0.1)
    with pytest.raises(ValueError, match="sum to"): mino.LayerPeeled((0.5, 0.6), (1, 1), 0.1, 0.1)
    with pytest.raises(ValueError, match="cost"): mino.peeled([3, 3], 0.1, 0.1, cost="per sample")
    with pytest.raises(ValueError, match="two groups"): mino.two_groups(mino.peeled([3, 2, 1], 0.1, 0.1), 1)
    with pytest.raises(ValueError, match="nothing to merge"): mino.critical_ratio(3, 1, 5, 0.01)
    with pytest.raises(ValueError, match="apart at the first"):
        mino.locate_merging(lambda r: mino.peeled([10 * r] * 2 + [10] * 2, 5e-3, 5e-3), slice(2, None), (1, 2))
