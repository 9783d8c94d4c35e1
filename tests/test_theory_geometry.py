"""Closed forms on spheres, of many classes and of unbalanced classes, against independent computations."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_nbdev.geometry.etf import simplex_etf
from nc_nbdev.geometry.means import gram_distance, nc2_etf, one_vs_rest_margin
from nc_nbdev.geometry.nearest_centre import logit_margin
from nc_nbdev.theory import many_classes as mc
from nc_nbdev.theory import minority_collapse as mino
from nc_nbdev.theory import normalised as nm
from nc_nbdev.theory.free_features import FreeFeatures, Problem, descend

quick = settings(max_examples=20, deadline=None)


def simplex(K, D):
    return F.normalize(simplex_etf(K, D).double(), dim=1)


# --- normalised features


@quick
@given(st.integers(2, 7), st.floats(0.1, 20), st.integers(0, 2), st.integers(0, 10**6))
def test_smallest_loss_is_the_simplex_and_a_lower_bound(K, tau, spare, seed):
    D = K - 1 + spare
    problem = nm.on_spheres(K, D, tau=tau)
    value = nm.smallest_loss(problem)
    assert FreeFeatures.at(problem, simplex(K, D), simplex(K, D))().item() == pytest.approx(value, rel=1e-6, abs=1e-13)
    random = FreeFeatures(problem, seed, starts=200)
    assert random().min() >= value - 1e-12
    assert FreeFeatures.at(problem, random.W, random.W)().min() >= value - 1e-12  # dual, and not a simplex


def test_only_collapsed_simplices_have_the_smallest_loss():
    "The geometry at the minimum is the same fact as its value: T2a needs no second claim."
    problem = nm.on_spheres(4, 5, 3, tau=2.0)
    end = descend(FreeFeatures(problem, starts=6), [1500])[0].model
    assert (end() - nm.smallest_loss(problem)).abs().max() < 1e-10
    for one in end.split():
        m = one.measures()[0]
        assert max(m.nc1_trace, m.nc2_etf, m.nc3_duality) < 1e-5
    moved = end.split()[0]
    with torch.no_grad(): moved.H[0] = F.normalize(moved.H[0] + 0.1 * torch.ones(5, dtype=torch.float64), dim=0)
    assert moved().item() > nm.smallest_loss(problem) + 1e-5


@pytest.mark.parametrize(("K", "spare", "n", "tau"), [(3, 0, 2, 1.0), (3, 1, 3, 2.5), (4, 2, 2, 0.7), (5, 0, 2, 3.0)])
def test_variability_rate_is_an_eigenvalue_of_the_hessian(K, spare, n, tau):
    D, problem = K - 1 + spare, nm.on_spheres(K, K - 1 + spare, n, tau)
    W = simplex(K, D)
    eigenvalues = torch.linalg.eigvalsh(nm.sphere_hessian(FreeFeatures.at(problem, W.repeat_interleave(n, 0), W)))
    rate = nm.variability_rate(problem)
    assert int(((eigenvalues - rate).abs() < 1e-10).sum()) >= K * (n - 1)
    assert eigenvalues[0] > -1e-10  # a minimum
    assert rate == pytest.approx(nm.measured_rate(problem, starts=1)[0], rel=0.02)


def test_curvature_away_from_critical_points_knows_no_radial_direction():
    model = FreeFeatures(nm.on_spheres(3, 4, 2, 1.7), seed=1)
    H, X = nm.sphere_hessian(model), torch.cat([model.H, model.W]).detach()
    assert (H @ torch.block_diag(*X[:, :, None])).abs().max() < 1e-12 < H.abs().max()


@pytest.mark.parametrize(("K", "D", "n"), [(3, 2, 1), (4, 3, 2), (3, 4, 4)])
def test_coincident_point_is_a_strict_saddle(K, D, n):
    w = torch.eye(D, dtype=torch.float64)[:1]
    model = FreeFeatures.at(nm.on_spheres(K, D, n, 1.7), w.expand(K * n, D), w.expand(K, D))
    lowest = torch.linalg.eigvalsh(nm.sphere_hessian(model))[0]
    assert lowest.item() == pytest.approx(-1.7 / (K * math.sqrt(n)), abs=1e-12)


def test_critical_points_are_critical_and_strict_saddles_where_the_theorem_says_so():
    problem = nm.on_spheres(3, 4, tau=2.0)
    found = nm.critical_points(problem, starts=12, seed=5)
    above = found[:, 0] > 1e-9
    assert above.sum() >= 6 and found[:, 0].min() > -1e-12
    assert found[above, 1].max() < -1 / 3
    assert any(abs(v - (math.log(3) - nm.smallest_loss(problem))) < 1e-8 for v in found[:, 0].tolist())


def test_descent_never_leaves_the_sphere_and_never_goes_up():
    path = descend(FreeFeatures(nm.on_spheres(4, 5, 3, 2.0), seed=3, starts=6), range(60), rate=0.5)
    for _, _, model in path:
        assert (model.W.norm(dim=-1) - 1).abs().max() < 1e-12 and (model.H.norm(dim=-1) - 1).abs().max() < 1e-12
    assert torch.stack([s.model().detach() for s in path]).diff(dim=0).max() < 1e-12


# --- many classes


@pytest.mark.parametrize(("K", "D"), [(K, D) for D in range(2, 7) for K in range(2, 2 * D + 1)] + [(11, 2)])
def test_softmax_codes_have_the_best_margin(K, D):
    rows = mc.softmax_code(K, D)
    assert rows.shape == (K, D) and (rows.norm(dim=1) - 1).abs().max() < 1e-9
    assert one_vs_rest_margin(rows, centred=False) == pytest.approx(mc.best_margin(K, D), abs=1e-8)


@quick
@given(st.sampled_from([(3, 3), (4, 3), (4, 2), (5, 2), (8, 2), (5, 3), (6, 3), (7, 4), (8, 4)]),
       st.integers(0, 10**6), st.floats(0, 1))
def test_no_rows_beat_the_best_margin(case, seed, mix):
    random = FreeFeatures(nm.on_spheres(*case), seed).W.detach()
    rows = F.normalize(mix * mc.softmax_code(*case) + (1 - mix) * random, dim=1)
    assert one_vs_rest_margin(rows, centred=False) <= mc.best_margin(*case) + 1e-9


def test_an_acute_angle_costs_margin_beyond_the_simplex():
    eye = torch.eye(3, dtype=torch.float64)
    square = torch.cat([eye[:2], -eye[:2], eye[2:]])  # (5, 3), no acute angle
    assert one_vs_rest_margin(square, centred=False) == pytest.approx(1)
    tilted = square.clone()
    tilted[4] = F.normalize(eye[2] + 0.2 * eye[0], dim=0)
    assert one_vs_rest_margin(tilted, centred=False) < 0.99


@quick
@given(st.sampled_from([(4, 3), (7, 2), (5, 3), (8, 4)]), st.floats(-1, 9))
def test_margin_bound_is_below_the_optimum_and_tight_when_cold(case, exponent):
    tau, K, best = 2.0**exponent, case[0], mc.best_margin(*case)
    assert mc.margin_bound(K, best, tau) <= best - math.log(K * (K - 1)) / tau + 1e-9
    assert mc.margin_bound(K, best, 1e6) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("case", [(5, 2), (5, 3)])
def test_minimisers_keep_the_margin_bound_and_random_rows_do_not(case):
    "The bound is a theorem, so it is a test; that random rows violate it says that it is not empty."
    best = mc.best_margin(*case)
    for tau, end in mc.cool(*case, starts=3, steps=250).items():
        smallest = logit_margin(end.H @ end.W.mT, end.y).amin(-1)
        assert smallest.min() >= mc.margin_bound(case[0], best, tau)
    random = FreeFeatures(nm.on_spheres(*case), starts=20).W.detach()
    assert max(one_vs_rest_margin(w, centred=False) for w in random) < mc.margin_bound(case[0], best, 128)


def test_a_descent_cut_off_is_not_at_the_tammes_points():
    "A margin below 1 alone would also be had by an optimiser that failed."
    full, cut = (mc.row_margins(mc.cool(7, 3, starts=3, steps=steps)[128.0]) for steps in (400, 3))
    assert max(abs(m - mc.tammes_margins[7]) for m in full) < 0.01
    assert max(cut) < 0.7 < mc.tammes_margins[7] < 1


def test_tammes_margins_are_those_of_known_arrangements():
    golden = (1 + 5**0.5) / 2
    corners = torch.tensor([[0, a, b * golden] for a in (1, -1) for b in (1, -1)], dtype=torch.float64)
    icosahedron = F.normalize(torch.cat([corners.roll(i, 1) for i in range(3)]), dim=1)
    gram = icosahedron @ icosahedron.T - 2 * torch.eye(12)
    assert 1 - gram.max().item() == pytest.approx(mc.tammes_margins[12], abs=1e-12)
    assert one_vs_rest_margin(icosahedron, centred=False) == pytest.approx(mc.tammes_margins[12], abs=1e-9)


def test_the_loss_at_low_temperature_counts_orthogonal_pairs_inside_blocks_too():
    pair, triangle = mc.softmax_code(2, 1), mc.softmax_code(3, 2)
    right = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.5**0.5, -0.5**0.5]], dtype=torch.float64)
    codes = {16: mc.softmax_code(6, 4), 18: torch.block_diag(triangle, triangle), 20: torch.block_diag(right, triangle),
             22: torch.block_diag(pair, triangle, torch.ones(1, 1, dtype=torch.float64))}
    for pairs, W in codes.items():
        assert mc.orthogonal_pairs(W) == pairs
        assert one_vs_rest_margin(W, centred=False) == pytest.approx(1)
        f = FreeFeatures.at(nm.on_spheres(6, 4, tau=128.0), W, W)()
        assert (6 * (f.log() + 128).exp()).item() == pytest.approx(pairs, rel=1e-6)
    assert len(set(codes)) == 4 and min(codes) == 16  # `softmax_code` has the fewest


@quick
@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 10**6))
def test_nc2_etf_has_the_floor(K, D, seed):
    rows = torch.randn(K, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert nc2_etf(rows) >= math.sqrt(max(0, 2 - 2 * math.sqrt(min(1, D / (K - 1))))) - 1e-9


def test_unknown_optimum_is_an_error():
    with pytest.raises(ValueError, match="known"): mc.best_margin(7, 3)
    with pytest.raises(ValueError, match="at least 2"): mc.best_margin(1, 3)
    with pytest.raises(ValueError, match="needs at least"): nm.variability_rate(nm.on_spheres(5, 3, 2))


# --- unbalanced classes


@pytest.mark.parametrize(("k_A", "k_B", "n_A", "n_B", "lw", "lh", "how"), [
    (2, 2, 30, 6, 0.01, 0.01, {}), (1, 3, 40, 4, 0.02, 0.005, {}), (3, 2, 50, 3, 0.01, 0.01, {"cost": "class"}),
    (2, 3, 60, 5, 0.01, 0.01, {"reweighted": True}), (2, 2, 200, 2, 0.02, 0.02, {})])
def test_two_groups_agree_with_descent(k_A, k_B, n_A, n_B, lw, lh, how):
    problem = mino.peeled([n_A] * k_A + [n_B] * k_B, lw, lh, **how)
    model, small = mino.minimum(problem, seed=1), mino.two_groups(problem, k_A)
    assert model().item() == pytest.approx(small.value, abs=1e-9)
    groups = (k_A, slice(0, k_A)), (k_B, slice(k_A, None))
    for (k, group), margin, cosine in zip(groups, small.margins, small.cosines, strict=True):
        if k < 2: assert math.isnan(cosine)
        elif not math.isnan(cosine):
            assert mino.twin_margin(model, group) == pytest.approx(margin, abs=1e-3)
            assert mino.group_cosine(model.W, group) == pytest.approx(cosine, abs=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=2, max_size=3, unique=True), st.floats(-2.5, -1.3),
       st.booleans(), st.booleans())
def test_twins_merge_exactly_when_predicted(sizes, exponent, per_class, reweighted):
    lam, cost = 10**exponent, "class" if per_class else "sample"
    problem = mino.peeled([n for n in sizes for _ in range(2)], lam, lam, cost, reweighted)
    model = mino.minimum(problem)
    for g, predicted in enumerate(mino.merges(problem)[::2]):
        slack = problem.shares[2 * g] / math.sqrt(problem.costs[2 * g]) / problem.lam - 1
        if abs(slack) < 0.05: continue  # at the threshold itself descent is slow
        assert (mino.twin_margin(model, slice(2 * g, 2 * g + 2)) < 1e-3) == predicted == (slack < 0)


@pytest.mark.parametrize("cost", ["sample", "class"])
@pytest.mark.parametrize(("k_A", "k_B", "n_B", "lam"), [(3, 3, 10, 5e-3), (1, 4, 3, 2e-2)])
def test_critical_ratio_is_where_small_classes_begin_to_merge(k_A, k_B, n_B, lam, cost):
    r = mino.critical_ratio(k_A, k_B, n_B, lam, cost)
    at = lambda ratio: mino.merges(mino.peeled([ratio * n_B] * k_A + [n_B] * k_B, lam, lam, cost))
    assert not at(0.999 * r)[-1] and at(1.001 * r)[-1] and not at(1.001 * r)[0]


def test_penalties_enter_through_their_product_only():
    sizes = [40, 40, 9, 9]
    a, b = (mino.minimum(mino.peeled(sizes, *p)) for p in ((0.01, 0.01), (0.1, 0.001)))
    assert a().item() == pytest.approx(b().item(), abs=1e-10)
    assert gram_distance(a.W @ a.W.T, b.W @ b.W.T) < 1e-4


def test_oversampling_gives_the_simplex_back_only_where_a_feature_pays_when_it_is_drawn():
    counts = [80] * 3 + [10] * 3
    small, large = slice(3, 6), slice(0, 3)
    none, drawn, always = (mino.descend_batches(counts, 0.02, *how, starts=1).W[0].detach()
                           for how in ((False,), (True,), (True, False)))
    assert nc2_etf(drawn) < 1e-3
    assert mino.group_cosine(none, small) > 0.999 > 0 > mino.group_cosine(none, large)
    assert mino.group_cosine(always, large) > 0.999 > 0 > mino.group_cosine(always, small)


def test_seli_is_the_svd_of_the_label_matrix():
    counts = [9, 4, 4, 1]
    labels = np.repeat(np.arange(4), counts)
    Z = np.eye(4)[:, labels] - 1 / 4  # (K, N)
    U, S, _ = np.linalg.svd(Z, full_matrices=False)
    assert gram_distance(mino.seli_gram(counts), torch.from_numpy(U @ np.diag(S) @ U.T)) < 1e-7


def test_cross_entropy_comes_near_seli_as_the_penalty_goes_to_zero():
    counts = [100, 30, 10]
    far = []
    for lam in (1e-2, 1e-4, 1e-6):
        W = mino.minimum(mino.peeled(counts, lam, lam)).W
        far.append(gram_distance(W @ W.T, mino.seli_gram(counts)))
    assert far[0] > far[1] > far[2] and far[2] < 0.1


def test_bad_problems_are_errors():
    with pytest.raises(ValueError, match="positive"): mino.peeled([3, 0], 0.1, 0.1)
    with pytest.raises(ValueError, match="at least 2"): mino.peeled([3], 0.1, 0.1)
    with pytest.raises(ValueError, match="sum to"): Problem(2, 2, 1, shares=(0.5, 0.6), lb=math.inf)
    with pytest.raises(ValueError, match="cost"): mino.peeled([3, 3], 0.1, 0.1, cost="per sample")
    with pytest.raises(ValueError, match="two groups"): mino.two_groups(mino.peeled([3, 2, 1], 0.1, 0.1), 1)
    with pytest.raises(ValueError, match="nothing to merge"): mino.critical_ratio(3, 1, 5, 0.01)
    with pytest.raises(ValueError, match="apart at the first"):
        mino.locate_merging(lambda r: mino.peeled([10 * r] * 2 + [10] * 2, 5e-3, 5e-3), slice(2, None), (1, 2))


def test_oversampling_has_a_threshold_of_its_own():
    "A feature that pays when it is drawn pays N / K times as much as one class once."
    counts, drawn = [80] * 3 + [10] * 3, 45
    edge = 1 / (6 * math.sqrt(drawn))
    for relative in (0.8, 1.2):
        same = mino.peeled(counts, relative * edge, relative * edge * drawn, cost="class", reweighted=True)
        assert set(mino.merges(same)) == {relative > 1}
        found = mino.descend_batches(counts, relative * edge, starts=1).W[0].detach().norm().item()
        assert found == pytest.approx(mino.minimum(same).W.norm().item(), rel=0.02, abs=1e-3)


def test_rates_and_shapes_that_do_not_exist_are_errors():
    with pytest.raises(ValueError, match="per_class=1"): nm.variability_rate(nm.on_spheres(4, 5))
    with pytest.raises(ValueError, match="per_class=1"): nm.measured_rate(nm.on_spheres(4, 5))
    with pytest.raises(ValueError, match="positive number for every class"): mino.seli_gram([10, 0, 5])
