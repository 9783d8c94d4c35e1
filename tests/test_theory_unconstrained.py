"""The closed forms of the unconstrained features models against slow, independent computations.

And that a wrong formula would be seen.
Identities stand here and not among the claims: they hold for every input or the code is wrong.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from nc_nbdev.geometry.etf import simplex_etf
from nc_nbdev.theory import deep_unconstrained as deep
from nc_nbdev.theory import free_features as free
from nc_nbdev.theory import unconstrained_ce as ce
from nc_nbdev.theory import unconstrained_mse as mse
from nc_nbdev.theory.free_features import FreeFeatures, Problem, largest_gradient

decays = st.floats(1e-4, 0.5)
sizes = (st.integers(2, 6), st.integers(0, 2), st.integers(1, 6))
build = lambda loss: st.builds(lambda K, extra, n, lw, lh, lb: Problem(K, K + extra, n, lw, lh, lb, loss=loss),
                               *sizes, decays, decays, decays)
few = settings(max_examples=40, deadline=None)
eye = lambda K: torch.eye(K, dtype=torch.float64)


# free features

def reference(model):
    "The objective of a model of one start, sample by sample, from the formula."
    p, K, value = model.problem, model.problem.num_classes, 0.0
    shares, costs = p.shares or (1 / K,) * K, p.costs or (1.0,) * K
    for h, c in zip(model.H, model.y.tolist(), strict=True):
        z = h
        for W in list(model.weights)[:-1]: z = (W @ z).relu() if p.relu else W @ z
        z = p.tau * model.W @ z + model.b
        loss = z.logsumexp(0) - z[c] if p.loss == "ce" else (z - eye(K)[c]).square().sum() / 2
        value = value + shares[c] / p.per_class * loss
        if not p.sphere: value = value + p.lh / 2 * costs[c] * h.square().sum()
    if p.sphere: return value
    for W, decay in zip(model.weights, p.decays[1:], strict=True): value = value + decay / 2 * W.square().sum()
    return value + (p.lb / 2 * model.b.square().sum() if p.lb < math.inf else 0)


@few
@given(build("ce"), st.sampled_from(["ce", "mse"]), *[st.booleans()] * 3, st.integers(0, 99))
def test_the_objective_is_the_formula(problem, loss, relu, hidden, uneven, seed):
    K = problem.num_classes
    rising = tuple(range(1, K + 1))
    lists = dict(shares=tuple(c / sum(rising) for c in rising), costs=rising) if uneven else {}
    layers = ((K, 0.1), (3, 0.3)) if hidden else ()
    model = FreeFeatures(replace(problem, loss=loss, relu=relu, hidden=layers, **lists), seed)
    assert model().item() == pytest.approx(reference(model).item(), rel=1e-12)


def test_spheres_keep_their_rows_and_have_no_decay():
    problem = Problem(sphere=True, lb=math.inf, tau=3.0)
    model = FreeFeatures(problem, starts=3)
    assert model.split()[1]().item() == pytest.approx(reference(model.split()[1]).item(), rel=1e-12)
    before = model()
    for part in (free.descend(model, [0, 50], rate=1.0)[-1].model.H, model.W):
        assert part.norm(dim=-1).sub(1).abs().max() < 1e-14
    assert (model() < before).all()


def test_starts_side_by_side_do_not_touch_each_other():
    problem = Problem(hidden=((5, 0.1),), loss="mse")
    together = FreeFeatures(problem, seed=3, starts=4)
    alone = [free.descend(m, [30], rate=0.3)[-1].model for m in together.split()]
    free.descend(together, [30], rate=0.3)
    for a, b in zip(together.split(), alone, strict=True):
        assert (a.H - b.H).abs().max() < 1e-13 and (a.W - b.W).abs().max() < 1e-13


def test_a_flow_keeps_its_time_and_boosts_features():
    model = FreeFeatures(Problem(), starts=2)
    first, last = free.descend(model, [0, 4], rate=lambda m, loss: 1 / (1 + loss))
    assert first.time.tolist() == [0, 0] and last.time.shape == (2,) and (last.time > 0).all()
    start, once, more = (FreeFeatures(Problem(), 1) for _ in range(3))
    free.descend(once, [1], rate=0.1)
    free.descend(more, [1], rate=0.1, boost=7.0)
    assert (7 * (once.H - start.H) - (more.H - start.H)).abs().max() < 1e-14 and torch.equal(once.W, more.W)


def test_a_tiny_loss_keeps_its_digits():
    corners = simplex_etf(4, 6)
    model = FreeFeatures.at(Problem(tau=300.0, lb=math.inf), corners.repeat_interleave(5, 0), corners)
    assert model.losses()[0].item() == pytest.approx(3 * math.exp(-400), rel=1e-12)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(model.losses().sum(), list(model.parameters())))


def test_an_anchor_moves_the_penalty():
    H0 = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = FreeFeatures(Problem(lh=0.3), anchor=H0)
    near = FreeFeatures.at(model.problem, H0, model.W, b=model.b, anchor=H0)
    assert near.decay().item() == pytest.approx(0.005 * (near.W.square().sum() + near.b.square().sum()).item())


def test_minimise_says_where_it_did_not_arrive():
    with pytest.raises(ValueError, match="stopped at a gradient"):
        free.minimise(FreeFeatures(Problem(lw=0.0, lh=0.0, lb=math.inf)), tolerance=1e-300)


def test_bad_problems():
    for wrong in (dict(loss="hinge"), dict(num_classes=1), dict(dim=0), dict(lw=-1.0), dict(tau=0.0),
                  dict(shares=(0.5, 0.5)), dict(shares=(0.1,) * 4), dict(costs=(1, 1, 1, 0)), dict(sphere=True)):
        with pytest.raises(ValueError, match="expected|no bias"): Problem(**wrong)
    with pytest.raises(ValueError, match="anchor of shape"): FreeFeatures(Problem(), anchor=torch.zeros(2, 2))


# cross-entropy

@few
@given(build("ce"))
def test_ce_minimum_is_the_minimum_of_the_scalar_problem(problem):
    K, strength = problem.num_classes, problem.strength
    found = minimize_scalar(lambda s: math.log1p((K - 1) * math.exp(-s)) + strength * (K - 1) * s, bounds=(0, 60),
                            method="bounded", options=dict(xatol=1e-10))
    closed = ce.ce_minimum(problem)
    assert closed.loss <= found.fun + 1e-9
    assert closed.margin == pytest.approx(found.x, abs=1e-4)


@few
@given(build("ce"), build("mse"))
def test_closed_forms_have_no_gradient_and_their_loss(first, second):
    both = (first, ce.ce_solution, ce.ce_minimum), (second, mse.mse_solution, mse.mse_minimum)
    for problem, solution, minimum in both:
        model = solution(problem)
        assert largest_gradient(model) < 1e-12
        assert model().item() == pytest.approx(minimum(problem).loss, rel=1e-12)
        assert model.W.detach().norm().item() == pytest.approx(minimum(problem).weight_norm, rel=1e-9, abs=1e-9)
        assert model.H.detach().norm().item() == pytest.approx(minimum(problem).feature_norm, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("margin", [
    lambda K, k: math.log(1 / k + (K - 1)), lambda K, k: math.log(1 / k - K), lambda K, k: -math.log(k)])
def test_a_wrong_margin_would_be_seen(margin, monkeypatch):
    problem = Problem()
    closed = ce.ce_minimum(problem)
    wrong = margin(problem.num_classes, problem.strength)
    norm = closed.weight_norm * math.sqrt(wrong / closed.margin)
    monkeypatch.setattr(ce, "ce_minimum", lambda _: ce.Minimum(wrong, closed.loss, norm, norm))
    assert largest_gradient(ce.ce_solution(problem)) > 1e-6


@few
@given(build("ce"), build("mse"), st.integers(0, 99), st.floats(0.05, 2))
def test_no_point_lies_below_the_minimum(first, second, seed, scale):
    assert FreeFeatures(first, seed, scale)().item() >= ce.ce_minimum(first).loss - 1e-12
    for problem in (second, replace(second, lb=0.0), replace(second, lb=math.inf)):
        assert FreeFeatures(problem, seed, scale)().item() >= mse.mse_minimum(problem).loss - 1e-12


@few
@given(build("ce"))
def test_threshold(problem):
    K = problem.num_classes
    below, above = problem.at_strength(0.999 / K), problem.at_strength(1.001 / K)
    assert below.strength == pytest.approx(0.999 / K) and 0 < ce.ce_minimum(below).margin < 0.01 * K
    assert ce.ce_minimum(above).weight_norm == 0 and ce.ce_minimum(above).loss == pytest.approx(math.log(K))
    unbiased = lambda p: mse.mse_minimum(replace(p, lb=math.inf, loss="mse")).weight_norm
    assert unbiased(above) == 0 < unbiased(below)
    assert ce.lowest_curvature_at_zero(below) < 0 < ce.lowest_curvature_at_zero(above)


@pytest.mark.parametrize("relative", [0.5, 0.9, 1.1])
@pytest.mark.parametrize("size", [(3, 2, 4), (4, 6, 3), (5, 4, 2)])
@pytest.mark.parametrize("lw, lh", [(1e-2, 2e-3), (1e-3, 1e-1)])
def test_curvature_at_zero(size, lw, lh, relative):
    problem = Problem(*size, lw, lh, 0.3).at_strength(relative / size[0])
    lowest = torch.linalg.eigvalsh(free.hessian(FreeFeatures(problem, scale=0.0)))[0].item()
    assert lowest == pytest.approx(ce.lowest_curvature_at_zero(problem), abs=1e-12)
    assert (lowest < 0) == (relative < 1)


def test_laws_solve_their_differential_equations():
    problem = Problem(per_class=3)
    K, n, N = problem.num_classes, problem.per_class, problem.num_classes * problem.per_class
    slope = lambda law, t: (law(t * (1 + 1e-4)) - law(t * (1 - 1e-4))) / (2e-4 * t)
    for t in (3.0, 1e3, 1e9):
        s = ce.flow_margin(t, problem)
        speed = 2 / math.sqrt(n) * s / (math.exp(s) + K - 1)
        assert slope(lambda x: ce.flow_margin(x, problem), t) == pytest.approx(speed, rel=1e-4)
    for whiten, rhs in ((False, lambda w: K / N * w / (K + w**2) ** 2), (True, lambda w: w / (K + w**2) / N)):
        law = lambda t: mse.renormalised_law(0.4, t, problem, whiten)  # noqa: B023
        for t in (5.0, 300.0, 2e4):
            assert slope(law, t) == pytest.approx(rhs(law(t)), rel=1e-4)


def test_a_wrong_law_of_the_margin_would_be_seen(monkeypatch):
    bare, law = replace(Problem(), lw=0.0, lh=0.0, lb=math.inf), ce.flow_margin
    monkeypatch.setattr(ce, "flow_margin", lambda t, problem: law(t / 4, problem))      # a clock that is slow
    assert ce._flow_ends(bare, [range(10, 14)], 0.01)[1][0] > {s.id: s for s in ce.CLAIMS}["T1e"].at_most


# squared error

@pytest.mark.parametrize(("K", "n"), [(2, 3), (4, 5)])
def test_growth_from_a_small_start_is_the_curvature_at_zero(K, n):
    model = FreeFeatures(Problem(K, 5, n, 0.0, 0.0, 0.0, loss="mse"), scale=0.0)
    with torch.no_grad(): model.b.fill_(1 / K)
    lowest = torch.linalg.eigvalsh(free.hessian(model))[0].item()
    assert lowest == pytest.approx(-mse.linear_rate(model.problem), rel=1e-9)


@few
@given(build("mse"), st.integers(0, 99), st.floats(0.05, 2))
def test_the_parts_sum_to_the_loss(problem, seed, scale):
    model = FreeFeatures(replace(problem, lb=0.0, per_class=max(2, problem.per_class)), seed, scale)
    assert sum(mse.mse_parts(model).values()) == pytest.approx(model().item(), rel=1e-10)


def test_parts_of_the_loss_move_with_the_features():
    problem = Problem(loss="mse", lb=0.0)
    model = FreeFeatures(problem, 3)
    before = mse.mse_parts(model)
    with torch.no_grad():  # the least-squares classifier, from the normal equations: nothing is left of L-perp
        X = torch.cat([model.H, torch.ones(20, 1)], 1)
        penalty = 20 * problem.lw * torch.diag(torch.tensor([1.0] * 6 + [0.0], dtype=torch.float64))
        solved = torch.linalg.solve(X.T @ X + penalty, X.T @ model.Y).T
        model.W.copy_(solved[:, :6])
        model.b.copy_(solved[:, 6])
    after = mse.mse_parts(model)
    assert before["perp"] > 0.1 and after["perp"] < 1e-24
    assert all(after[k] == pytest.approx(before[k]) for k in ("nc1", "nc23", "decay"))
    assert sum(mse.mse_parts(replace_decay(model)).values()) != pytest.approx(model().item(), rel=1e-3)


def replace_decay(model):
    "The same parameters, another decay of W: the wrong least squares."
    return FreeFeatures.at(replace(model.problem, lw=1.0), model.H, model.W, b=model.b)


# several layers

@pytest.mark.parametrize("relative", [0.2, 0.7, 0.97])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_deep_minimum_against_a_search_over_the_factors(depth, relative):
    problem = deep.deep_problem(depth, relative)
    K, N, m, lam = problem.num_classes, problem.num_classes * problem.per_class, depth + 1, np.array(problem.decays)
    cost = lambda s: (np.prod(s) - math.sqrt(problem.per_class)) ** 2 / (2 * N) + (lam * s**2).sum() / 2
    search = lambda start: minimize(cost, np.full(m, start), method="BFGS", options=dict(gtol=1e-10))
    best = min((search(start) for start in (0.7, 1.0, 1.5)), key=lambda r: r.fun)
    for lb, rank in ((0.0, K - 1), (math.inf, K)):
        closed = deep.deep_minimum(replace(problem, lb=lb))
        assert closed.loss == pytest.approx(rank * best.fun, rel=1e-7)
        assert np.abs(best.x) == pytest.approx(np.array(closed.factors), rel=1e-3)


@few
@given(st.integers(1, 3), st.floats(0.1, 1.3), st.integers(0, 99), st.floats(0.3, 1.5))
def test_no_deep_linear_point_lies_below_the_minimum(depth, relative, seed, scale):
    for lb in (0.0, math.inf):
        model = FreeFeatures(deep.deep_problem(depth, relative, lb=lb), seed, scale)
        with torch.no_grad(): model.b.fill_(0 if lb else 1 / 4)
        assert model().item() >= deep.deep_minimum(model.problem).loss - 1e-12


def test_minimum_jumps_where_zero_becomes_better():
    for depth in (2, 3, 4):
        below, above = (deep.deep_minimum(deep.deep_problem(depth, x, lb=math.inf)) for x in (1 - 1e-6, 1 + 1e-6))
        assert below.singular == pytest.approx((depth - 1) / depth, abs=1e-4) and above.singular == 0
        assert below.loss == pytest.approx(0.5, abs=1e-5) and above.loss == pytest.approx(0.5)


@pytest.mark.parametrize("relative", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("depth, better", [(2, False), (3, False), (4, True), (5, True)])
def test_low_rank_beats_collapse_from_four_layers_on(depth, better, relative):
    model = deep.low_rank_solution(5, depth, relative)
    K, m, r = 10, depth + 1, 5
    assert (model().item() < deep.deep_minimum(model.problem).loss) == better == (r ** (m - 2) / (2 * K ** (m - 3)) < 1)
    logits = model.logits().detach()
    assert (logits - logits.max() * model.Y).abs().max() < 1e-12
    assert [torch.linalg.matrix_rank(h).item() for h in model.layers()] == [5] * (depth - 1) + [10]


@few
@given(st.integers(0, 999))
def test_below_a_relu_every_frame_without_positive_correlations_costs_the_same(seed):
    problem = Problem(4, 6, 3, 0.2, 0.1, math.inf, "mse", ((6, 0.05),), relu=True).at_strength(0.05)
    draw = torch.rand(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    off = (draw + draw.T) * (1 - eye(4))
    for R, equal in ((eye(4) - off / torch.linalg.eigvalsh(off).max(), True), (eye(4) + 0.3 * off, False)):
        values, vectors = torch.linalg.eigh(R)
        if values.min() < -1e-9: continue
        root = torch.cat([vectors * values.clamp(min=0).sqrt(), torch.zeros(4, 2)], 1).double()
        s0, s1, s2 = deep.deep_minimum(problem).factors
        weights = torch.cat([s1 * root, torch.zeros(2, 6)]), torch.cat([s2 * eye(4), torch.zeros(4, 2)], 1)
        loss = FreeFeatures.at(problem, s0 / math.sqrt(3) * root.repeat_interleave(3, 0), *weights)().item()
        assert (loss == pytest.approx(deep.deep_minimum(problem).loss, rel=1e-10)) == equal


def test_bad_input():
    with pytest.raises(ValueError, match="3 <= K"): ce.nc1_rate(Problem(4, 2))
    with pytest.raises(ValueError, match="free bias"): mse.mse_parts(FreeFeatures(Problem(loss="mse")))
    with pytest.raises(ValueError, match="no nonzero"): deep.deep_minimum(deep.deep_problem(2, 2.0), nonzero=True)
    with pytest.raises(ValueError, match="free bias"): deep.deep_minimum(replace(deep.deep_problem(2), lb=1.0))
    with pytest.raises(ValueError): free.worst_measure(FreeFeatures(Problem(), scale=0.0).measures()[0])


@pytest.mark.parametrize("wrong", [
    dict(tau=2.0), dict(dim=2), dict(lw=0.0), dict(lh=0.0), dict(hidden=((6, 0.1),)), dict(costs=(1, 1, 1, 2)),
    dict(shares=(0.4, 0.3, 0.2, 0.1)), dict(sphere=True, lb=math.inf)])
@pytest.mark.parametrize("minimum, loss", [(ce.ce_minimum, "ce"), (mse.mse_minimum, "mse")])
def test_closed_forms_refuse_what_they_do_not_cover(minimum, loss, wrong):
    problem = Problem(loss=loss).at_strength(0.05)
    minimum(replace(problem, shares=(0.25,) * 4, costs=(1,) * 4))  # equal classes, spelt out
    with pytest.raises(ValueError, match="closed form is for|dim=2"): minimum(replace(problem, **wrong))
    with pytest.raises(ValueError, match="closed form is for"):
        minimum(replace(problem, loss="mse" if loss == "ce" else "ce"))


def test_closed_forms_where_one_dimension_less_is_enough():
    narrow = Problem(dim=3, loss="mse").at_strength(0.05)
    with pytest.raises(ValueError, match="rank 4"): mse.mse_minimum(replace(narrow, lb=math.inf))
    free_bias = replace(narrow, lb=0.0)
    solution = mse.mse_solution(free_bias)
    assert largest_gradient(solution) < 1e-12
    assert solution().item() == pytest.approx(mse.mse_minimum(free_bias).loss, rel=1e-12)
    for gone, minimum in ((Problem(dim=1), ce.ce_minimum), (Problem(dim=1, loss="mse"), mse.mse_minimum)):
        assert minimum(gone.at_strength(0.3)).weight_norm == 0  # beyond the threshold the minimum is zero in any dim


def test_rate_within_classes_needs_two_samples_and_knows_two_classes():
    with pytest.raises(ValueError, match="per_class=1"): ce.nc1_rate(Problem(per_class=1))
    with pytest.raises(ValueError, match="K = 2 <= D"): ce.nc1_rate(Problem(2, 1))
    two = Problem(2, 3, 3, 0.01, 0.002, math.inf)
    matrix = free.hessian(ce.ce_solution(two))
    within = torch.kron(eye(2), torch.kron(eye(3) - 1 / 3, eye(3)))  # moves features against their class mean
    within = torch.block_diag(within, torch.zeros(len(matrix) - len(within), len(matrix) - len(within)))
    values = torch.linalg.eigvalsh((within @ matrix @ within + (eye(len(matrix)) - within)).double())
    assert values.min().item() == pytest.approx(ce.nc1_rate(two), rel=1e-9)


def test_models_move_to_another_device_whole():
    model = FreeFeatures(Problem(lb=math.inf)).to("meta")
    assert model.b.device.type == "meta" and model().device.type == "meta"


@pytest.mark.parametrize("starts", [None, 3])
def test_descent_stays_on_the_device_of_the_model(starts, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: torch.tensor(True))      # "meta" has no numbers
    model = FreeFeatures(Problem(), starts=starts).to("meta")
    for rate in (0.1, lambda model, loss: 0.1 / loss):
        [end] = free.descend(model, [2], rate)
        assert end.model.H.device.type == end.time.device.type == "meta"


def test_descent_says_where_the_loss_is_no_number():
    cold = FreeFeatures(Problem(3, 2, 1, lb=math.inf, sphere=True, tau=2000.0), seed=3)
    with torch.no_grad():
        for A in (cold.H, cold.W): A.copy_(torch.nn.functional.normalize(simplex_etf(3, 2).double()))
    with pytest.raises(ValueError, match="at step 0"): free.descend(cold, [1], 0.1, objective=lambda m: m().log())


def test_a_construction_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="no point of this form"): deep.low_rank_solution(5, 2, 0.95)
