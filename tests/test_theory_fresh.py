"""Other losses, shallow networks on data, and fresh data, against independent computations; one letter, one meaning."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.theory import data_aware as da
from nc_nbdev.theory import deep_unconstrained as deep
from nc_nbdev.theory import fresh_data as fd
from nc_nbdev.theory import other_losses as ol
from nc_nbdev.theory.free_features import FreeFeatures, Problem
from nc_nbdev.theory.normalised import on_spheres
from nc_nbdev.theory.transfer_bound import class_cdnv
from nc_nbdev.theory.unconstrained_ce import nc1_rate

quick = settings(max_examples=12, deadline=None)
decay = st.floats(1e-3, 0.1)
sizes = st.integers(3, 5), st.integers(0, 1), st.integers(1, 3)


# other losses

@settings(max_examples=3, deadline=None)
@given(*sizes, decay, decay, st.integers(0, 99), st.floats(0.1, 2))
def test_no_point_lies_below_the_minimum_of_a_loss_and_the_solution_attains_it(K, spare, n, lw, lh, seed, scale):
    problem = Problem(K, K - 1 + spare, n, lw, lh, 0.0)
    for loss in ol.LOSSES.values():
        minimum, solution = ol.loss_minimum(loss, problem), ol.loss_solution(loss, problem)
        assert ol.mean_loss(FreeFeatures(problem, seed, scale), loss).item() >= minimum.value - 1e-10
        value = ol.mean_loss(solution, loss)
        assert value.item() == pytest.approx(minimum.value, rel=1e-9)
        assert max(g.abs().max() for g in torch.autograd.grad(value, [solution.H, solution.W, solution.b])) < 1e-6


@pytest.mark.parametrize("K, n", [(3, 2), (4, 3)])
@pytest.mark.parametrize("name", list(ol.LOSSES))
def test_rate_of_a_loss_is_an_eigenvalue_within_a_class(name, K, n):
    "Move two samples of a class against each other: the second derivative along that line is the smallest rate."
    problem, loss = Problem(K, K - 1, n, 0.02, 0.005, 0.0), ol.LOSSES[name]
    solution = ol.loss_solution(loss, problem)
    H = solution.H.detach()
    along = lambda x: _objective(solution, torch.cat([(H[0] + x)[None], (H[1] - x)[None], H[2:]]), loss)
    second = torch.func.hessian(along)(torch.zeros(K - 1, dtype=torch.float64)) / 2
    assert torch.linalg.eigvalsh(second).min().item() == pytest.approx(ol.loss_rate(loss, problem), rel=1e-5)
    if name == "cross-entropy": assert nc1_rate(problem) == pytest.approx(ol.loss_rate(loss, problem), rel=1e-6)


def _objective(model, H, loss):
    p = model.problem
    squares = p.lh * H.square().sum() + p.lw * model.W.square().sum()
    return loss(H @ model.W.T + model.b, model.Y).mean() + squares / 2


@quick
@given(st.integers(2, 5), st.integers(2, 4), st.floats(0.2, 8), st.integers(0, 99))
def test_contrastive_minimum_is_a_lower_bound(K, n, tau, seed):
    problem = on_spheres(K, K, n, tau)
    H = FreeFeatures(problem, seed, starts=50).H.detach()
    y = FreeFeatures(problem).y
    collapsed = H[:, ::n].repeat_interleave(n, 1)  # collapsed on points that are no simplex
    for some in (H, collapsed):
        assert ol.contrastive_losses(some, y, tau).mean(-1).min() >= ol.contrastive_minimum(problem) - 1e-12


# shallow networks on data

@quick
@given(st.integers(2, 4), st.integers(1, 5), st.integers(4, 16), st.integers(0, 99), st.sampled_from([0.0, 2.0]))
def test_flat_direction_agrees_with_a_linear_program(K, n, d, seed, signal):
    X, y = da.signal_and_noise(d, signal, K, n, seed)
    own, rest = X[y == 0], X[y > 0]
    there = linprog(np.zeros(d), rest, np.zeros(len(rest)), own, np.ones(n), bounds=(None, None)).status == 0
    found = da.flat_direction(X, y == 0)
    assert (found is not None) == there
    if there: assert np.abs(own @ found - 1).max() < 1e-7 and (rest @ found).max() < 1e-7


def test_probability_of_noise_is_a_probability_and_rises_with_the_dimension():
    for K, n in ((2, 3), (3, 4), (5, 2)):
        values = [da.noise_probability(d, K, n) for d in range(K * n + 2)]
        assert values == sorted(values) and values[n - 1] == 0 < values[n] and values[K * n - 1] < 1 == values[K * n]


# unequal classes

@pytest.mark.parametrize("depth", [1, 2, 3])
def test_unequal_gains_against_a_search_over_each_class(depth):
    counts, decays = (300, 40, 6), [0.004, 0.001, 0.002, 0.003][: depth + 1]
    gains, value = deep.class_gains(counts, decays)
    N, m, u = sum(counts), depth + 1, np.linspace(0, 1.1, 200_001)
    cost = [n / (2 * N) * (1 - u**m) ** 2 + m / 2 * (math.prod(decays) * n) ** (1 / m) * u**2 for n in counts]
    assert value == pytest.approx(sum(c.min() for c in cost), rel=1e-8)
    assert gains == pytest.approx([u[c.argmin()] ** m for c in cost], abs=1e-4)


# fresh data

@quick
@given(st.integers(2, 4), st.integers(2, 4), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 999))
def test_fresh_bound_holds_whatever_moves(K, D, spread, push, seed):
    g = torch.Generator().manual_seed(seed)
    y, centres = torch.arange(K).repeat_interleave(6), 6 * torch.randn(K, D, generator=g, dtype=torch.float64)
    noise = lambda: torch.randn(len(y), D, generator=g, dtype=torch.float64)
    H = centres[y] + spread * noise()
    mixed = H[torch.randperm(6, generator=g) + 6 * y.view(K, 6)[:, :1]].flatten(0, 1)
    fresh = mixed * (1 - 0.3 * push) + push * noise()
    w = [fd.transport(H[y == c], fresh[y == c]) for c in range(K)]
    stats = ClassStatistics.from_features(H, y, num_classes=K)
    assert class_cdnv(fresh, y) <= fd.fresh_cdnv_bound(stats, w) * (1 + 1e-9)


def test_fresh_bound_is_attained_by_classes_that_spread():
    "Deviations grow by a half: the root of the variance grows by exactly the distance moved."
    y = torch.arange(2).repeat_interleave(20)
    E = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).view(2, 20, 3)
    E, far = (E - E.mean(1, keepdim=True)).flatten(0, 1), 1e6 * y[:, None] * torch.ones(3, dtype=torch.float64)
    w = [0.5 * E[y == c].square().sum(1).mean().sqrt().item() for c in (0, 1)]
    bound = fd.fresh_cdnv_bound(ClassStatistics.from_features(far + E, y, num_classes=2), w)
    assert class_cdnv(far + 1.5 * E, y) == pytest.approx(bound, rel=1e-4, abs=0)


def test_transport_far_from_the_origin_and_the_generator_of_the_caller():
    x = 1e5 + torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert fd.transport(x.requires_grad_(), x + 1e-3) == pytest.approx(1e-3 * 5**0.5, rel=1e-4)
    before = torch.get_rng_state()
    fd._network(2, 8, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_transport_on_a_line_pairs_in_order():
    a, b = (torch.randn(30, 1, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    assert fd.transport(a, b) == pytest.approx((a.sort(0).values - b.sort(0).values).square().mean().sqrt().item())


@pytest.mark.parametrize(("steps", "depth"), [(0, math.nan), (150, 1)])
def test_a_network_that_does_not_fit_its_labels_has_no_depth(steps, depth, monkeypatch):
    "Else labels that are not fitted would look like labels that need many layers."
    fit = fd._fit
    monkeypatch.setattr(fd, "_fit", lambda model, X, y, loss, _, rate: fit(model, X, y, loss, steps, rate))
    found, accuracy = fd._depth(100, "true")
    assert found == pytest.approx(depth, nan_ok=True) and (accuracy >= 0.99) == (steps > 0)
    statement = {s.id: s for s in fd.CLAIMS}["T95c"]
    assert (statement.claim([6, 6, found] * 2, [0, 0, 1] * 2).verdict == "not measured") == (steps == 0)


def test_rates_of_losses_need_two_samples_and_know_two_classes():
    with pytest.raises(ValueError, match="per_class=1"): ol.loss_rate(ol.LOSSES["focal"], Problem(per_class=1, lb=0.0))
    for loss in ol.LOSSES.values(): assert ol.loss_rate(loss, Problem(2, 3, 3, 0.01, 0.002, 0.0)) == 0.002


def test_contrastive_losses_stay_on_their_device():
    H, y = torch.randn(6, 3, device="meta"), torch.zeros(6, dtype=torch.long, device="meta")
    assert ol.contrastive_losses(H, y).device.type == "meta"


# one letter, one meaning

NBS = Path(__file__).parents[1] / "nbs"
MATHS = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$([^$]+?)\$", flags=re.S)
WORDS = re.compile(r"\\(?:text|texttt|mathtt|mathrm|mathbf|mathbb|operatorname|begin|end)\{[^}]*\}")


def letters(markdown):
    "The single letters in the mathematics of a cell, phi among them; commands and words are left out."
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", markdown, flags=re.S)
    found = " ".join(m[0] or m[1] for m in MATHS.findall(plain))
    found = re.sub(r"\\(?:var)?phi\b", " φ ", WORDS.sub(" ", found))
    return set(re.findall(r"(?<![A-Za-z])[A-Za-zφ](?![A-Za-z])", re.sub(r"\\[a-zA-Z]+", " ", found)))


def test_letters_with_a_place_are_used_there_only():
    "A row of symbols.yml with `pages` gives a letter one meaning on these pages of theory, and none elsewhere."
    rows = [r for r in yaml.safe_load((NBS / "symbols.yml").read_text(encoding="utf-8")) if "pages" in r]
    places = {letter: set(r["pages"]) for r in rows for letter in r["letters"]}
    assert {"p", "q", "a", "φ"} <= places.keys()
    for notebook in sorted((NBS / "theory").glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        used = set().union(*(letters("".join(c["source"])) for c in cells if c["cell_type"] == "markdown"))
        wrong = {letter for letter in used & places.keys() if notebook.stem not in places[letter]}
        assert not wrong, f"{notebook.stem}: {wrong} stand for something else, see symbols.yml"


def test_a_letter_with_another_meaning_would_be_seen():
    assert letters(r"Take $q = 1 - \rho$ and $\varphi(t)$.") == {"q", "t", "φ"}
    assert letters(r"`p = 1` and $\operatorname{p} + \rho_q$") == {"q"}
