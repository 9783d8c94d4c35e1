"Probes: the optimum against autograd and scikit-learn, invariances, known cases, reconstructed labels, bad input."

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from nc_nbdev.geometry.nearest_centre import ncc_accuracy
from nc_nbdev.lab import probes
from nc_nbdev.lab.probes import FeatureTask, fit_logistic, fit_transform, linear_probe

FEW = settings(max_examples=25, deadline=None)


def blobs(N=60, D=5, K=4, spread=1.0, seed=0):
    "Gaussian classes: features (N, D) and labels."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(N) % K
    return torch.randn(K, D, generator=g)[y] + spread * torch.randn(N, D, generator=g), y


def nested(epsilon=0.1, n=60, D=6, spread=0.3, seed=0):
    "Two coarse classes, a unit apart, of two fine ones each, epsilon apart."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(8 * n) % 4
    far = torch.zeros(2, D)
    far[1, 0] = 1
    H = far[y // 2] + epsilon * (torch.randn(4, D, generator=g)[y] + spread * torch.randn(8 * n, D, generator=g))
    train, test = slice(0, 4 * n), slice(4 * n, None)
    return FeatureTask(H[train], y[train], y[train] // 2, H[test], y[test], y[test] // 2)


def shuffled(task, seed=0):
    return replace(task, fine=task.fine[torch.randperm(len(task.fine), generator=torch.Generator().manual_seed(seed))])


# -- the optimum -------------------------------------------------------------------------------------------------

def objective(A, X, y, C):
    "The objective written down, for autograd."
    return F.cross_entropy(X @ A[:, :-1].T + A[:, -1], y) + A[:, :-1].square().sum() / (2 * C * len(y))


@FEW
@given(st.integers(8, 60), st.integers(1, 8), st.integers(2, 4), st.sampled_from([1e-3, 0.1, 3]),
       st.sampled_from([1e-2, 1, 1e3]), st.integers(0, 10**6))
def test_gradient_vanishes_at_the_fit(N, D, K, spread, C, seed):
    X, y = blobs(N, D, K, spread, seed)
    fit = fit_logistic(X, y, C, tol=1e-12)
    A = fit.weights.clone().requires_grad_()
    value = objective(A, X.double(), y, C)
    value.backward()
    assert A.grad.abs().max() < 1e-5 and abs(value.item() - fit.objective) < 1e-12 and fit.gap < 1e-12


@pytest.mark.parametrize("C", [1e-2, 1, 1e2])
def test_same_as_scikit_learn(C):
    X, y = blobs(200, 6, 5)
    ours = fit_logistic(X, y, C).scores(X.double()).softmax(1)
    other = LogisticRegression(C=C, tol=1e-10, max_iter=10_000).fit(X.double().numpy(), y.numpy())
    assert np.allclose(ours, other.predict_proba(X.double().numpy()), atol=5e-4)


@pytest.mark.parametrize("spread", [0.1, 1e-3, 1e-5])
def test_the_gap_is_the_distance_to_the_minimum(spread):
    "Features with two scales, where first-order methods stall: a longer search finds nothing below the gap."
    task = nested(spread)
    X = fit_transform(task.train, "standardised")(task.train)
    fit, longer = fit_logistic(X, task.fine, 1e4), fit_logistic(X, task.fine, 1e4, tol=1e-15, max_steps=300)
    assert -1e-12 < fit.objective - longer.objective < 1e-8


def test_the_start_does_not_matter():
    X, y = blobs()
    far = torch.randn(4, 6, dtype=torch.float64)
    found = [fit_logistic(X, y, start=start, tol=1e-14).scores(X).softmax(1) for start in (far, None)]
    assert torch.allclose(*found, atol=1e-6)


def test_says_where_it_has_not_converged():
    X, y = blobs()
    with pytest.warns(UserWarning, match="gap"): fit = fit_logistic(X, y, 1e3, max_steps=1)
    assert fit.gap > 1e-8


@pytest.mark.parametrize("y", [torch.tensor([0, 0, 2, 2]), torch.tensor([-1, 0, 1, 1])])
def test_rejects_missing_classes(y):
    with pytest.raises(ValueError, match="expected every class"): fit_logistic(torch.randn(4, 2), y)


# -- preparations ------------------------------------------------------------------------------------------------

@FEW
@given(st.integers(0, 10**6))
def test_invariances(seed):
    "Raw: rotation, translation, scale. Standardised: each coordinate's scale. Whitened: every invertible linear map."
    g = torch.Generator().manual_seed(seed)
    task = nested(0.3, seed=seed)
    D = task.train.shape[1]
    rotation = torch.linalg.qr(torch.randn(D, D, generator=g))[0]
    maps = {"raw": 7 * rotation, "standardised": torch.diag(torch.rand(D, generator=g) * 10 + 0.1),
            "whitened": rotation @ torch.diag(torch.rand(D, generator=g) + 0.5)}
    for kind, T in maps.items():
        moved = replace(task, train=task.train.double() @ T.double() + 3, test=task.test.double() @ T.double() + 3)
        same = linear_probe(task, kind, C=1.0).predictions == linear_probe(moved, kind, C=1.0).predictions
        assert same.double().mean() > 0.99, kind


def test_directions_without_spread_are_left_out():
    task = nested()
    dead = torch.cat([task.train, torch.full((len(task.train), 2), 5.0) + 1e-9 * torch.randn(len(task.train), 2)], 1)
    assert fit_transform(dead.double(), "standardised")(dead)[:, -2:].abs().max() == 0
    assert fit_transform(dead, "whitened", task.coarse)(dead).shape[1] == 6


def test_transform_is_fitted_on_the_train_set():
    task = nested()
    for kind in probes.TRANSFORMS:
        f = fit_transform(task.train, kind, task.coarse)
        assert torch.equal(f(task.test[:3]), f(task.test)[:3]), kind


@pytest.mark.parametrize("call, said", [
    (lambda t: fit_transform(t.train, "cooked"), "expected one of raw"),
    (lambda t: fit_transform(t.train, "whitened"), "coarse"),
    (lambda t: fit_transform(t.coarse[:, None].float(), "whitened", t.coarse), "no spread"),
    (lambda t: replace(t, train=t.train.log()), "NaN"),
    (lambda t: replace(t, fine=t.fine[:5]), "labels"),
    (lambda t: replace(t, coarse=t.coarse - 1), "0 or more"),
    (lambda t: replace(t, test=t.test[:, :2]), "dimensions"),
    (lambda t: replace(t, fine_test=t.fine_test + 1), "test label 4"),
    (lambda t: replace(t, train=t.train[0]), "floating"),
    (lambda t: replace(t, fine=torch.where(torch.arange(240) == 0, 4, t.fine)), "at least 2")])
def test_bad_input(call, said):
    with pytest.raises(ValueError, match=said): call(nested())


# -- the probe ---------------------------------------------------------------------------------------------------

def test_held_out_samples_are_a_fifth_of_every_class():
    y = torch.cat([torch.zeros(50), torch.ones(20), torch.full((2,), 2)]).long()
    held = probes.hold_out(y)
    assert y[held].bincount().tolist() == [10, 4, 1] and torch.equal(held, probes.hold_out(y))
    assert not torch.equal(held, probes.hold_out(y, seed=1))


def test_the_penalty_is_the_best_on_held_out_samples():
    X, y = blobs(300, 20, 4, spread=2.0)
    C, _, path = probes.choose_penalty(X, y)
    losses = [loss for _, loss in path]
    assert C == path[int(np.argmin(losses))][0] and len(path) < len(probes.PENALTIES) and losses[-1] > 1.2 * min(losses)


def test_a_bump_on_a_plateau_does_not_end_the_path():
    "Collapsed so far that a small C finds the coarse classes only: the held-out loss stays near log 2 and then falls."
    task = nested(1e-5)
    X = fit_transform(task.train.double(), "raw")(task.train)
    C, _, path = probes.choose_penalty(X, task.fine)
    assert C == path[-1][0] == max(probes.PENALTIES) and path[3][1] > 0.6


def test_small_differences_need_the_penalty_chosen():
    "The counterpoint in one assertion: C = 1 loses what is only small, the ordinary and the whitened probe find it."
    task = nested(1e-4, spread=0.6)
    turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    task = replace(task, train=task.train.double() @ turned, test=task.test.double() @ turned)
    assert linear_probe(task, C=1.0).accuracy < 0.8
    assert min(linear_probe(task).accuracy, linear_probe(task, "whitened").accuracy) > 0.9


def test_shuffled_labels_give_chance():
    found = linear_probe(shuffled(nested()))
    assert found.accuracy < 0.4 and found.gap < 1e-8


def test_a_fixed_penalty_has_no_held_out_accuracy():
    assert np.isnan(linear_probe(nested(), C=1.0).held_out_accuracy) and linear_probe(nested()).held_out_accuracy > 0.9


# -- clusters and centres ----------------------------------------------------------------------------------------

def test_kmeans_finds_the_fine_classes_at_any_scale():
    for epsilon in (0.1, 1e-4): assert min(probes.residual_kmeans(nested(epsilon))) > 0.97
    task = nested()
    assert probes.residual_kmeans(replace(task, fine=2 * task.coarse + torch.randint(2, (240,))))[0] < 0.65


def test_kmeans_is_matched_as_well_as_any_names():
    "Agreement is the best over all ways to name the clusters: three fine classes in one coarse."
    H, y = blobs(90, 4, 3, spread=1.5)
    task = FeatureTask(H, y, torch.zeros_like(y), H, y, torch.zeros_like(y))
    labels, _ = probes._clusters(H, H, 3)
    best = max((torch.tensor(names)[labels] == y).double().mean().item() for names in itertools.permutations(range(3)))
    assert probes.residual_kmeans(task)[0] == pytest.approx(best) == probes.residual_kmeans(task)[1]


def test_few_shot_with_all_examples_is_the_nearest_centre_rule():
    task = nested(spread=2.0)
    means = torch.stack([task.train[task.fine == c].double().mean(0) for c in range(4)])
    assert probes.few_shot(task, shots=1000) == pytest.approx(ncc_accuracy(task.test, task.fine_test, means))
    assert probes.few_shot(task, 2) < probes.few_shot(task, 30)


def test_labels_are_reconstructed_with_their_names():
    task = nested()
    train, test = probes.reconstructed_labels(task)
    assert (train == task.fine).double().mean() > 0.97 and (test == task.fine_test).double().mean() > 0.97
    assert torch.equal(train // 2, task.coarse) and torch.equal(test // 2, task.coarse_test)


@pytest.mark.parametrize("epsilon", [0.1, 1e-3])
def test_a_classifier_of_reconstructed_labels_knows_the_true_ones(epsilon):
    found = probes.reconstructed_probe(nested(epsilon))
    assert found.accuracy > 0.95 and found.gap < 1e-8


def test_reconstructed_labels_do_not_know_what_is_not_in_the_features():
    "Fine labels by chance inside the coarse classes: one half, since the classifier finds the coarse class."
    task = nested()
    coin = torch.randint(2, (2, 240), generator=torch.Generator().manual_seed(0))
    task = replace(task, fine=2 * task.coarse + coin[0], fine_test=2 * task.coarse_test + coin[1])
    assert abs(probes.reconstructed_probe(task).accuracy - 0.5) < 0.1


def test_true_fine_labels_only_name_the_clusters():
    "Other labels with the same best names give the same reconstruction."
    task = nested()
    few_wrong = torch.where(torch.arange(240) % 60 == 0, task.fine // 2 * 2 + (task.fine + 1) % 2, task.fine)
    found = [probes.reconstructed_labels(t) for t in (task, replace(task, fine=few_wrong))]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_clusters_of_one_sample_are_left_out():
    "An outlier takes a cluster for itself, so that one fine class has no cluster of its own."
    task = nested()
    H = task.train.clone()
    H[0] += 100
    found = probes.reconstructed_probe(replace(task, train=H))
    assert 0.5 < found.accuracy < 0.8


def test_weak_penalties_are_solved_too():
    "Two scales, nearly separable: the intercept's free direction does not slow the solver down."
    task = nested(1e-3, spread=1.0)
    X = fit_transform(task.train.double(), "raw")(task.train)
    fit = fit_logistic(X, task.fine, 1e6)
    assert fit.gap < 1e-8 and fit.steps < 100
    assert fit.weights[:, :-1].sum(0).abs().max() < 1e-6 * fit.weights.abs().max()
