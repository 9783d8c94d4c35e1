"""The closed forms of the unconstrained features models against slow, independent computations; and that a wrong formula would be seen."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar

from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.theory import deep_unconstrained as deep
from nc_nbdev.theory import unconstrained_ce as ce
from nc_nbdev.theory import unconstrained_mse as mse

decays = st.floats(1e-4, 0.5)
problems = st.builds(lambda K, extra, n, lw, lh, lb: ce.Problem(K, K + extra, n, lw, lh, lb),
                     st.integers(2, 6), st.integers(0, 2), st.integers(1, 6), decays, decays, decays)
few = settings(max_examples=40, deadline=None)


def largest_gradient(model, loss):
    return max(g.abs().max().item() for g in torch.autograd.grad(loss, list(model.parameters())))


@few
@given(problems)
def test_ce_minimum_is_the_minimum_of_the_scalar_problem(problem):
    K, lam = problem.num_classes, problem.strength
    found = minimize_scalar(lambda s: math.log1p((K - 1) * math.exp(-s)) + lam * (K - 1) * s, bounds=(0, 60), method="bounded", options=dict(xatol=1e-10))
    closed = ce.ce_minimum(problem)
    assert closed.loss <= found.fun + 1e-9
    assert closed.margin == pytest.approx(found.x, abs=1e-4)


@few
@given(problems)
def test_closed_forms_have_no_gradient_and_their_loss(problem):
    for solution, minimum, objective in ((ce.ce_solution, ce.ce_minimum, ce.ce_objective), (mse.mse_solution, mse.mse_minimum, mse.mse_objective)):
        model = solution(problem)
        loss = objective(model, problem)
        assert largest_gradient(model, loss) < 1e-12
        assert loss.item() == pytest.approx(minimum(problem).loss, rel=1e-12)
        assert model.W.detach().norm().item() == pytest.approx(minimum(problem).weight_norm, rel=1e-9, abs=1e-9)
        assert model.H.detach().norm().item() == pytest.approx(minimum(problem).feature_norm, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("margin", [lambda K, lam: math.log(1 / lam + (K - 1)), lambda K, lam: math.log(1 / lam - K), lambda K, lam: -math.log(lam)])
def test_a_wrong_margin_would_be_seen(margin, monkeypatch):
    problem = ce.Problem()
    closed = ce.ce_minimum(problem)
    wrong = margin(problem.num_classes, problem.strength)
    norm = closed.weight_norm * math.sqrt(wrong / closed.margin)
    monkeypatch.setattr(ce, "ce_minimum", lambda _: ce.Minimum(wrong, closed.loss, norm, norm))
    model = ce.ce_solution(problem)
    assert largest_gradient(model, ce.ce_objective(model, problem)) > 1e-6


@few
@given(problems, st.integers(0, 99), st.floats(0.05, 2))
def test_no_point_lies_below_the_minimum(problem, seed, scale):
    for bias in (True, False):
        model = ce.UnconstrainedFeatures(problem, seed, scale, bias)
        assert mse.mse_objective(model, problem).item() >= mse.mse_minimum(problem, bias).loss - 1e-12
    assert ce.ce_objective(ce.UnconstrainedFeatures(problem, seed, scale), problem).item() >= ce.ce_minimum(problem).loss - 1e-12


@few
@given(problems)
def test_threshold(problem):
    K = problem.num_classes
    below, above = problem.at_strength(0.999 / K), problem.at_strength(1.001 / K)
    assert below.strength == pytest.approx(0.999 / K) and 0 < ce.ce_minimum(below).margin < 0.01 * K
    assert ce.ce_minimum(above).weight_norm == 0 and ce.ce_minimum(above).loss == pytest.approx(math.log(K))
    assert mse.mse_minimum(above, bias=False).weight_norm == 0 < mse.mse_minimum(below, bias=False).weight_norm
    assert ce.lowest_curvature_at_zero(below) < 0 < ce.lowest_curvature_at_zero(above)


def test_curvature_at_zero():
    for problem in (ce.Problem(3, 2, 2, 0.1, 0.02, 0.3), ce.Problem(4, 4, 3, 0.03, 0.2, 0.5)):
        lowest = ce.hessian_eigenvalues_at_zero(problem)[0].item()
        assert lowest == pytest.approx(ce.lowest_curvature_at_zero(problem), abs=1e-12)


def test_laws_solve_their_differential_equations():
    problem = ce.Problem(per_class=3)
    K, n, N = problem.num_classes, problem.per_class, problem.num_classes * problem.per_class
    slope = lambda law, t: (law(t * (1 + 1e-4)) - law(t * (1 - 1e-4))) / (2e-4 * t)
    for t in (3.0, 1e3, 1e9):
        s = ce.flow_margin(t, problem)
        assert slope(lambda x: ce.flow_margin(x, problem), t) == pytest.approx(2 / math.sqrt(n) * s / (math.exp(s) + K - 1), rel=1e-4)
    for whiten, rhs in ((False, lambda w: K / N * w / (K + w**2) ** 2), (True, lambda w: w / (K + w**2) / N)):
        law = lambda t: mse.central_path_law(0.4, t, problem, whiten)  # noqa: B023
        for t in (5.0, 300.0, 2e4):
            assert slope(law, t) == pytest.approx(rhs(law(t)), rel=1e-4)


@pytest.mark.parametrize("relative", [0.2, 0.7, 0.97])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_deep_minimum_against_a_search_over_the_factors(depth, relative):
    problem = deep.deep_problem(depth, relative)
    K, N, m, lam = problem.num_classes, problem.num_classes * problem.per_class, problem.factors, np.array(problem.decays)
    cost = lambda s: (np.prod(s) - math.sqrt(problem.per_class)) ** 2 / (2 * N) + (lam * s**2).sum() / 2
    best = min((minimize(cost, np.full(m, start), method="BFGS", options=dict(gtol=1e-10)) for start in (0.7, 1.0, 1.5)), key=lambda r: r.fun)
    for bias, rank in ((True, K - 1), (False, K)):
        closed = deep.deep_minimum(problem, bias)
        assert closed.loss == pytest.approx(rank * best.fun, rel=1e-7)
        assert np.abs(best.x) == pytest.approx(np.array(closed.factors), rel=1e-3)


@few
@given(st.integers(1, 3), st.floats(0.1, 1.3), st.integers(0, 99), st.floats(0.3, 1.5))
def test_no_deep_linear_point_lies_below_the_minimum(depth, relative, seed, scale):
    problem = deep.deep_problem(depth, relative)
    for bias in (True, False):
        model = deep.DeepFeatures(problem, seed, scale, bias)
        with torch.no_grad(): model.b.fill_(1 / 4 if bias else 0)
        assert deep.deep_objective(model, problem).item() >= deep.deep_minimum(problem, bias).loss - 1e-12


def test_minimum_jumps_where_zero_becomes_better():
    for depth in (2, 3, 5):
        below, above = (deep.deep_minimum(deep.deep_problem(depth, x), bias=False) for x in (1 - 1e-6, 1 + 1e-6))
        assert below.singular == pytest.approx((depth - 1) / depth, abs=1e-4) and above.singular == 0
        assert below.loss == pytest.approx(0.5, abs=1e-5) and above.loss == pytest.approx(0.5)


def test_parts_of_the_loss_move_with_the_features():
    problem = ce.Problem(lb=0.0)
    model = ce.UnconstrainedFeatures(problem, 3)
    before = mse.mse_parts(model, problem)
    with torch.no_grad():  # the least-squares classifier itself: nothing is left of L-perp
        stats = ClassStatistics.from_features(model.H.detach(), model.y, num_classes=4, within="full")
        W, b = mse.least_squares_classifier(stats, problem.lw)
        model.W.copy_(W); model.b.copy_(b)
    after = mse.mse_parts(model, problem)
    assert before["perp"] > 0.1 and after["perp"] < 1e-24
    assert all(after[k] == pytest.approx(before[k]) for k in ("nc1", "nc23", "decay"))
    assert largest_gradient_of_classifier(model, problem) < 1e-12


def largest_gradient_of_classifier(model, problem):
    loss = mse.mse_objective(model, problem)
    return max(g.abs().max().item() for g in torch.autograd.grad(loss, [model.W, model.b]))


def test_bad_input():
    problem = ce.Problem(4, 2)
    with pytest.raises(ValueError, match="3 <= K"): ce.nc1_rate(problem)
    with pytest.raises(ValueError, match="free bias"): mse.mse_parts(ce.UnconstrainedFeatures(problem), problem)
    with pytest.raises(ValueError, match="L \\+ 1 decays"): deep.DeepProblem(widths=(4,), decays=(0.1,))
    with pytest.raises(ValueError, match="two layers"): deep.relu_solution(deep.deep_problem(3), torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="too small"): deep.relu_solution(deep.deep_problem(2, width=3), torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="no nonzero"): deep.deep_minimum(deep.deep_problem(2, 2.0), nonzero=True)
    collapsed_to_a_point = ce.UnconstrainedFeatures(problem, scale=0.0).measure
    with pytest.raises(ValueError): ce.worst_measure(collapsed_to_a_point())
