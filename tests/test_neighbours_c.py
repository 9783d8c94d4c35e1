"""Systems of the room neighbours: label noise, plasticity, complexity of features, few shots, margins."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_nbdev.geometry.etf import simplex_etf
from nc_nbdev.lab.runs import SeedEachEpoch, set_seed
from nc_nbdev.neighbours import feature_complexity as fc
from nc_nbdev.neighbours import few_shot as fs
from nc_nbdev.neighbours import label_noise as ln
from nc_nbdev.neighbours import margins as mg
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


def test_memorisation_of_a_label_without_right_samples_is_refused():
    H = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="2"): ln.memorisation(H, torch.tensor([0, 1, 0, 1, 0, 2]),
                                                               torch.tensor([0, 1, 0, 1, 0, 1]))


def test_noisy_digits_keep_the_right_labels():
    noisy, clean = (ln.NoisyDigits(seed=3, removed=r).tensors(None)["train"] for r in (False, True))
    wrong = noisy[1] != noisy[2]
    assert 0.1 < wrong.double().mean() < 0.3                        # a fifth redrawn, a tenth of which to the same
    assert torch.equal(clean[0], noisy[0][~wrong]) and torch.equal(clean[1], clean[2])


# --- margins


@quick
@given(st.integers(2, 6), st.integers(1, 9), st.floats(0.01, 30), st.integers(0, 10**6))
def test_cross_entropy_bounds_the_smallest_margin(K, N, scale, seed):
    g = torch.Generator().manual_seed(seed)
    z, y = scale * torch.randn(N, K, generator=g, dtype=f64), torch.randint(K, (N,), generator=g)
    own = z.gather(1, y[:, None]).squeeze(1)
    margin = (own - z.scatter(1, y[:, None], -torch.inf).amax(1)).min().item()
    loss = F.cross_entropy(z, y).item()
    if loss < 1e-12: return
    low, high = mg.margin_bounds(loss, N, K)
    assert low <= margin + 1e-6 and margin <= high + 1e-6


def test_both_ends_of_the_margin_bounds_are_attained():
    for m in (-2.0, 0.5, 8.0):
        z = torch.tensor([[m, 0.0, 0.0], [m, 0.0, 0.0]], dtype=f64)             # all other classes equal
        assert mg.margin_bounds(F.cross_entropy(z, torch.tensor([0, 0])).item(), 2, 3)[1] == pytest.approx(m)
        z = torch.tensor([[m, 0.0, -200.0], [900.0, 0.0, 0.0]], dtype=f64)      # one sample has the whole loss
        assert mg.margin_bounds(F.cross_entropy(z, torch.tensor([0, 0])).item(), 2, 3)[0] == pytest.approx(m)


@quick
@given(st.integers(2, 6), st.integers(1, 3), st.booleans(), st.integers(0, 10**6))
def test_collapse_is_the_largest_margin(K, n, near, seed):
    g, y = torch.Generator().manual_seed(seed), torch.arange(K).repeat_interleave(n)
    W = simplex_etf(K, K + 1, seed=1)
    assert mg.normalised_margin(3 * W[y], 0.1 * W, y) == pytest.approx(K / (K - 1))
    noise = 0.3 if near else 10.0
    H, V = (A + noise * torch.randn(A.shape, generator=g, dtype=f64) for A in (W[y], W))
    assert mg.normalised_margin(H, V, y) < K / (K - 1)


@quick
@given(st.integers(2, 6), st.integers(0, 3), st.integers(0, 10**6))
def test_permuting_the_vertices_is_a_rotation(K, spare, seed):
    W, g = simplex_etf(K, K - 1 + spare, seed=2), torch.Generator().manual_seed(seed)
    order = torch.randperm(K, generator=g)
    Q = mg.vertex_rotation(W, order)
    torch.testing.assert_close(Q @ Q.T, torch.eye(len(Q), dtype=f64))
    torch.testing.assert_close(W @ Q, W[order])
    with pytest.raises(ValueError, match="not a simplex"):
        mg.vertex_rotation(torch.diag(torch.tensor([1.0, 2, 3], dtype=f64)), torch.tensor([1, 2, 0]))


def test_rotations_and_bounds_at_every_scale():
    simplex, order, g = simplex_etf(4, 6).float(), torch.tensor([2, 0, 3, 1]), torch.Generator().manual_seed(0)
    for scale in (1e-6, 1.0, 1e4):
        Q = mg.vertex_rotation(simplex * scale, order)
        assert torch.allclose(simplex @ Q, simplex[order], atol=1e-5)
        with pytest.raises(ValueError, match="not a simplex"):
            mg.vertex_rotation(torch.randn(4, 6, generator=g) * scale, order)
    assert mg.margin_bounds(800.0, 10, 3) == pytest.approx((-8000, math.log(2) - 800))


def test_another_alignment_is_another_start():
    "Training with permuted vertices is training with a rotated last layer, to rounding."
    W, order = simplex_etf(3, 4, seed=3), torch.tensor([1, 2, 0])
    Q = mg.vertex_rotation(W, order)
    x, y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=f64), torch.arange(12) % 3
    ends = []
    for vertices, first in ((W[order], torch.eye(4, dtype=f64)), (W, Q), (W, torch.eye(4, dtype=f64))):
        torch.manual_seed(1)
        body = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).double()
        with torch.no_grad():
            for p in body[-1].parameters(): p.copy_(first @ p)
        optimiser = torch.optim.SGD(body.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(40):
            optimiser.zero_grad()
            F.cross_entropy(body(x) @ vertices.T, y).backward()
            optimiser.step()
        ends.append((body(x) @ vertices.T).detach())
    assert (ends[0] - ends[1]).abs().max() < 1e-9 < 1e-2 < (ends[0] - ends[2]).abs().max()
    for wrong in ((0.0, 3, 4), (1.0, 0, 4), (1.0, 3, 1)):
        with pytest.raises(ValueError, match="expected loss > 0"): mg.margin_bounds(*wrong)


# --- complexity of features


def layer(A, B, x): return F.relu(x @ A[:, :-1].T + A[:, -1]) @ B.T


def copied(units, copies, stretch, seed):
    "A random layer, and one that computes the same with `copies` of every unit, of other scales if `stretch`."
    g = torch.Generator().manual_seed(seed)
    A, B, x = (torch.randn(*shape, generator=g, dtype=f64) for shape in ((units, 5), (3, units), (40, 4)))
    index = torch.arange(units).repeat(copies)[torch.randperm(units * copies, generator=g)]
    scale = 0.5 + 2 * torch.rand(units * copies, generator=g, dtype=f64)
    if not stretch: scale = torch.ones_like(scale)
    return (A, B), (A[index] * scale[:, None], B[:, index] / scale / copies), x


@quick
@given(st.integers(2, 6), st.integers(1, 4), st.booleans(), st.integers(0, 10**6))
def test_merging_undoes_copies(units, copies, stretch, seed):
    few, many, x = copied(units, copies, stretch, seed)
    torch.testing.assert_close(layer(*many, x), layer(*few, x))
    path = {len(A): (A, B) for A, B in fc.merging_path(*many)}
    assert list(path) == list(range(units * copies, 0, -1))
    torch.testing.assert_close(layer(*path[units], x), layer(*few, x), rtol=1e-6, atol=1e-6)
    if not stretch and copies != 3:          # of three equal units it merges two: their sum is far from the third
        merged = fc.iterative_merging(*many, 1e-9)
        assert len(merged[0]) == units
        torch.testing.assert_close(layer(*merged, x), layer(*few, x), rtol=1e-6, atol=1e-6)


def test_merging_keeps_different_units_and_stops_at_the_threshold():
    few, _, x = copied(6, 1, False, 3)
    A, B = fc.iterative_merging(*few, 0.0)
    assert torch.equal(A, few[0]) and torch.equal(B, few[1])
    sizes = [len(fc.iterative_merging(*few, t)[0]) for t in (0.0, 0.3, 0.6, 1.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 6 and sizes[-1] < 6
    with pytest.raises(ValueError, match="between 0 and 1"): fc.iterative_merging(*few, -0.1)


def test_equal_units_far_from_the_origin_are_merged_first_and_halves_are_read():
    A = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 100
    rows = torch.cat([A, A])
    assert (fc._distances(rows)[torch.arange(40), torch.arange(40) + 40] == 0).all()
    merged, _ = fc.iterative_merging(torch.eye(4).repeat(2, 1).half(), torch.ones(2, 8).half(), 0.0)
    assert len(merged) == 4
    silent = torch.cat([torch.eye(3, 6), torch.zeros(2, 6)]).half()                          # units without weights
    assert all(A.isfinite().all() and B.isfinite().all() for A, B in fc.merging_path(silent, torch.eye(2, 5).half()))


def test_complexity_is_where_the_accuracy_falls():
    few, many, x = copied(4, 3, True, 1)
    steps = {k: 1.0 if k >= 4 else 0.995 if k >= 3 else 0.5 for k in range(1, 13)}
    assert fc.path_complexity(*many, lambda A, B: steps[len(A)]) == 3
    assert fc.path_complexity(*many, lambda A, B: steps[len(A)], drop=0.0) == 4
    assert fc.path_complexity(*many, lambda A, B: 1.0) == 1


# --- few shots


@quick
@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_prototypes_are_a_linear_classifier(K, n, seed):
    g = torch.Generator().manual_seed(seed)
    shots, queries = torch.randn(K, n, 6, generator=g, dtype=f64), torch.randn(7, 6, generator=g, dtype=f64)
    means = torch.stack([s.mean(0) for s in shots])
    z = fs.prototype_logits(shots, queries)
    slow = torch.tensor([[-sum((a - b) ** 2 for a, b in zip(q, m, strict=True)) for m in means.tolist()]
                         for q in queries.tolist()], dtype=f64)
    torch.testing.assert_close(z, slow, rtol=1e-5, atol=1e-5)
    linear = queries @ (2 * means).T - means.square().sum(1)
    torch.testing.assert_close(z.softmax(1), linear.softmax(1), rtol=1e-5, atol=1e-5)


def test_prototypes_far_from_the_origin_do_not_depend_on_the_number_of_queries():
    g = torch.Generator().manual_seed(0)
    centres = 100 + 0.05 * torch.randn(5, 16, generator=g)
    queries = centres.repeat(20, 1) + 1e-3 * torch.randn(100, 16, generator=g)
    together = fs.prototype_logits(centres[:, None], queries)
    alone = torch.cat([fs.prototype_logits(centres[:, None], q) for q in queries.split(20)])
    assert torch.equal(together, alone) and (together.argmax(1) == torch.arange(100) % 5).all()


def test_episodes_have_ten_images_of_each_of_five_letters():
    recipe = fs.FewShotLetters(steps=3)
    y = torch.arange(20).repeat(12)
    X = y.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)             # an image says its letter
    for x, queries in recipe.batches((X, y), 1):
        letters = x[:, 0, 0, 0].view(5, 10)
        assert (letters == letters[:, :1]).all() and len(letters[:, 0].unique()) == 5
        assert queries.tolist() == [c for c in range(5) for _ in range(5)]
    again = [x for x, _ in recipe.batches((X, y), 1)]
    assert torch.equal(again[-1], x) and not torch.equal(again[0], again[1])


def test_accuracy_among_five_classes_does_not_depend_on_how_many_there_are():
    y = torch.arange(20).repeat(60)
    H = 5 * torch.eye(20)[y] + 1.5 * torch.randn(1200, 20, generator=torch.Generator().manual_seed(0))
    many, few = fs._five_way(H, y), fs._five_way(H[y < 6], y[y < 6])
    assert many == pytest.approx(few, abs=0.03) and many < 1
    assert fs._five_way(torch.eye(20)[y], y) == 1


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
