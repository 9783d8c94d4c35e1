"""Systems of the room neighbours: label noise and plasticity."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_nbdev.lab.runs import SeedEachEpoch, set_seed
from nc_nbdev.neighbours import label_noise as ln
from nc_nbdev.neighbours import plasticity as pl

quick = settings(max_examples=20, deadline=None)
f64 = torch.float64


# --- label noise


def layer_peeled(H, W, y, lam, smoothing):
    "The objective of the layer-peeled model."
    loss = F.cross_entropy(H @ W.T, y, label_smoothing=smoothing)
    return loss + lam / 2 * (H.square().sum() + W.square().sum())


def smallest_objective(K, n, lam, smoothing, positive):
    "What `positive_margin` says that the minimum is."
    s, kappa = ln.positive_margin(K, math.sqrt(n) * lam, smoothing, positive), math.sqrt(n) * lam
    cost = math.sqrt(K * (K - 1)) if positive else K - 1
    return math.log1p((K - 1) * math.exp(-s)) + smoothing * (K - 1) / K * s + kappa * cost * s


def minimise(K, n, D, lam, smoothing, positive, seed):
    "Descent on W and on H = A^2 (or A): no bound is needed."
    g, y = torch.Generator().manual_seed(seed), torch.arange(K).repeat_interleave(n)
    A = torch.rand(K * n, D, generator=g, dtype=f64).requires_grad_()
    W = torch.randn(K, D, generator=g, dtype=f64).requires_grad_()
    optimiser = torch.optim.LBFGS([A, W], max_iter=3000, tolerance_grad=1e-11, tolerance_change=0,
                                  line_search_fn="strong_wolfe")
    def closure():
        optimiser.zero_grad()
        loss = layer_peeled(A.square() if positive else A, W, y, lam, smoothing)
        loss.backward()
        return loss
    optimiser.step(closure)
    with torch.no_grad(): return (A.square() if positive else A.clone()), W.clone(), y


@pytest.mark.parametrize(("K", "n", "lam", "smoothing"), [(2, 3, 0.05, 0.0), (3, 2, 0.03, 0.2), (5, 1, 0.02, 0.1)])
@pytest.mark.parametrize("positive", [True, False])
def test_minimum_of_the_layer_peeled_model(K, n, lam, smoothing, positive):
    expected = smallest_objective(K, n, lam, smoothing, positive)
    ends = [minimise(K, n, K + 2, lam, smoothing, positive, seed) for seed in range(4)]
    found = [layer_peeled(H, W, y, lam, smoothing).item() for H, W, y in ends]
    assert min(found) == pytest.approx(expected, abs=1e-7)
    H, W, y = ends[found.index(min(found))]
    means = torch.stack([H[y == c].mean(0) for c in range(K)])
    assert (H - means[y]).abs().max() < 1e-3
    cosines = F.normalize(means, dim=1) @ F.normalize(means, dim=1).T
    away = 0.0 if positive else -1 / (K - 1)
    assert (cosines[~torch.eye(K, dtype=bool)] - away).abs().max() < 1e-3
    z = H @ W.T
    own = z.gather(1, y[:, None]).squeeze(1)
    margin = own - (z.sum(1) - own) / (K - 1)
    torch.testing.assert_close(margin, torch.full_like(margin, ln.positive_margin(K, math.sqrt(n) * lam, smoothing,
                                                                                  positive)), rtol=1e-3, atol=1e-3)


@quick
@given(st.integers(2, 6), st.integers(1, 4), st.floats(1e-3, 0.5), st.floats(0, 0.9), st.integers(0, 10**6))
def test_no_positive_features_are_better(K, n, lam, smoothing, seed):
    g, y = torch.Generator().manual_seed(seed), torch.arange(K).repeat_interleave(n)
    bound = smallest_objective(K, n, lam, smoothing, positive=True)
    for scale in (0.1, 1.0, 3.0):
        H = scale * torch.rand(K * n, K, generator=g, dtype=f64)
        W = scale * torch.randn(K, K, generator=g, dtype=f64)
        assert layer_peeled(H, W, y, lam, smoothing) >= bound - 1e-12
        H = scale * torch.eye(K, dtype=f64)[y]                      # the right shape, another size
        W = scale * (torch.eye(K, dtype=f64) - 1 / K)
        assert layer_peeled(H, W, y, lam, smoothing) >= bound - 1e-12


def test_too_much_decay_leaves_nothing():
    assert ln.positive_margin(4, 1.0) == 0 and ln.positive_margin(4, 0.0) == math.inf
    for wrong in ((1, 0.1, 0.0), (4, -0.1, 0.0), (4, 0.1, 1.0)):
        with pytest.raises(ValueError, match="expected K >= 2"): ln.positive_margin(*wrong)


def test_memorisation_is_a_position_between_two_means():
    g = torch.Generator().manual_seed(0)
    means = torch.randn(3, 4, generator=g, dtype=f64)
    true, labels = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 2, 1, 2, 0])
    H = means[true].clone()
    H[3:] = means[true[3:]] + torch.tensor([0.0, 0.4, 1.0])[:, None] * (means[labels[3:]] - means[true[3:]])
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=g, dtype=f64)).Q
    for features in (H, 3 * H @ rotation + 7):
        torch.testing.assert_close(ln.memorisation(features, labels, true), torch.tensor([0.0, 0.4, 1.0], dtype=f64))
    with pytest.raises(ValueError, match="class"): ln.memorisation(H[1:], labels[1:], true[1:])


def test_noisy_digits_keep_the_right_labels():
    noisy, clean = (ln.NoisyDigits(seed=3, removed=r).tensors(None)["train"] for r in (False, True))
    wrong = noisy[1] != noisy[2]
    assert 0.1 < wrong.double().mean() < 0.3                        # a fifth redrawn, a tenth of which to the same
    assert torch.equal(clean[0], noisy[0][~wrong]) and torch.equal(clean[1], clean[2])


# --- plasticity


def test_a_task_is_drawn_by_seed_and_number():
    recipe, X = pl.TaskSequence(samples=20, steps=2), torch.arange(100.0)[:, None]
    tasks = [list(recipe.batches((X, None), epoch)) for epoch in (0, 0, 1)]
    for x, y in tasks[0]: assert torch.equal(x, tasks[1][0][0]) and torch.equal(y, tasks[1][0][1])
    assert not torch.equal(tasks[0][0][0], tasks[2][0][0]) and len(tasks[0][0][0].unique()) == 20


def test_holding_collapse_back_is_limited():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 10))
    x, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10
    plain = F.cross_entropy(model(x), y).item()
    assert pl._task_loss(model, x, y, 0.0).item() == pytest.approx(plain)
    assert plain - 5.001 <= pl._task_loss(model, x, y, 0.5).item() < plain


def test_fresh_networks_forget():
    "With a fresh network for every task the end does not depend on how many tasks came before with other samples."
    recipe = pl.TaskSequence(epochs=2, steps=3, samples=50, fresh=True)
    ends = []
    for fresh in (True, False):
        learn = replace(recipe, fresh=fresh).learner(None, "cpu")
        with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[SeedEachEpoch(recipe.seed)])
        ends.append([p.detach().clone() for p in learn.model.parameters()])
    set_seed(recipe.seed, 1)
    model = recipe.network()
    optimiser = torch.optim.Adam(model.parameters(), recipe.lr)
    for x, y in recipe.batches(recipe.tensors(None)["train"], 1):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    same = [torch.allclose(p, q, atol=1e-5) for p, q in zip(model.parameters(), ends[0], strict=True)]
    other = [torch.allclose(p, q, atol=1e-5) for p, q in zip(model.parameters(), ends[1], strict=True)]
    assert all(same) and not any(other)
