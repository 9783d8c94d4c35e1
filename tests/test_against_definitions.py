"""Every measure against its definition, written out in NumPy with loops, which call nothing of the package."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_statistics import exact_vci

import nc_nbdev as nc
from nc_nbdev.geometry import generalization, means, ood

FEW = settings(max_examples=40, deadline=None)


# --- the definitions ------------------------------------------------------------------------------


def class_means(H, y, K):
    "In extended precision, so that nothing is lost when features are far from the origin."
    return np.stack([H[y == c].astype(np.longdouble).mean(0) for c in range(K)])


def by_definition(H, y, W, b, K, mu_train=None, weighting="class"):
    "The measures of `CollapseMeasures`, for features (N, D) and labels (N,), W (K, D), b (K,)."
    H, y, W, b = (np.asarray(a.double() if torch.is_tensor(a) and a.is_floating_point() else a) for a in (H, y, W, b))
    N, D = H.shape
    mu = class_means(H, y, K)
    share = np.array([(y == c).mean() for c in range(K)]) if weighting == "sample" else np.full(K, 1 / K)
    mu_G = sum(s * m for s, m in zip(share, mu, strict=True))
    M = (mu - mu_G).astype(float)
    R = (H - mu[y]).astype(float)  # h_i - mu_{y_i}
    cov = [R[y == c].T @ R[y == c] / (y == c).sum() for c in range(K)]
    Sigma_W, Sigma_B = sum(s * C for s, C in zip(share, cov, strict=True)), M.T @ M / K
    rank = min(K - 1, D)
    u, s, vt = np.linalg.svd(Sigma_B)
    Sigma_B_pinv = (vt[:rank].T / s[:rank]) @ u[:, :rank].T
    v = [np.trace(C) for C in cov]
    pairs = [(c, d) for c in range(K) for d in range(K) if c != d]
    apart = {(c, d): float(((mu[c] - mu[d]) ** 2).sum()) for c, d in pairs}
    norms = np.linalg.norm(M, axis=1)
    cos = np.array([M[c] @ M[d] / (norms[c] * norms[d]) for c, d in pairs])
    etf = (np.eye(K) - np.ones((K, K)) / K) / math.sqrt(K - 1)
    unit = lambda A: A / np.linalg.norm(A)
    centres = mu if mu_train is None else np.asarray(mu_train)
    near = np.array([[((h - m) ** 2).sum() for m in centres] for h in H]).argmin(1)
    said = np.array([[W[c] @ h + b[c] for c in range(K)] for h in H]).argmax(1)
    return {
        "nc1_trace": np.trace(Sigma_W) / np.trace(Sigma_B),
        "nc1_pinv": np.trace(Sigma_W @ Sigma_B_pinv) / K,
        "cdnv": np.mean([(v[c] + v[d]) / (2 * apart[c, d]) for c, d in pairs]),
        "vci": 1 - np.trace(np.linalg.pinv(Sigma_W + Sigma_B, hermitian=True) @ Sigma_B) / rank,
        "nc2_norms": norms.std() / norms.mean(),
        "nc2_angles": cos.std(),
        "nc2_max_angle": np.abs(cos + 1 / (K - 1)).mean(),
        "nc2_etf": np.linalg.norm(unit(M @ M.T) - etf),
        "one_vs_rest_margin": margin(M / norms[:, None]) if K > D + 1 else None,
        "nc3_duality": np.linalg.norm(unit(W) - unit(M)),
        "nc3_etf": np.linalg.norm(unit(W @ M.T) - etf),
        "nc3_cosine": np.mean([W[c] @ M[c] / (np.linalg.norm(W[c]) * norms[c]) for c in range(K)]),
        "nc3_bias": float(np.linalg.norm((W.astype(np.longdouble) @ mu_G + b).astype(float))),
        "nc4_disagreement": (said != near).mean(),
        "ncc_accuracy": (near == y).mean(),
    }


def margin(U):
    "min over k of the distance from row k to the convex hull of the others."
    return min(distance_to_hull(U[k], np.delete(U, k, 0)) for k in range(len(U)))


def distance_to_hull(point, corners, steps=10_000):
    "Wolfe's conditional gradient with away steps and exact line search: slow, sure, and not the package's way."
    a = np.zeros(len(corners)); a[0] = 1
    for _ in range(steps):
        gradient = corners @ (a @ corners - point)
        to, away = gradient.argmin(), np.where(a > 0, gradient, -np.inf).argmax()
        if gradient[away] - gradient[to] < 1e-15: break
        d = corners[to] - corners[away]
        t = min((gradient[away] - gradient[to]) / (d @ d), a[away])
        a[to] += t; a[away] -= t
    return np.linalg.norm(a @ corners - point)


def four_variances(H, y, H_test, y_test, K, weighting="class"):
    "train, test and strong variance, sample by sample; of few samples the weak one, too, by trying every partition."
    H, H_test, y, y_test = (np.asarray(a.double() if a.is_floating_point() else a) for a in (H, H_test, y, y_test))
    mu, mu_test = class_means(H, y, K), class_means_or_nan(H_test, y_test, K)
    mu_G = mu.mean(0) if weighting == "class" else H.astype(np.longdouble).mean(0)
    between = ((mu - mu_G) ** 2).sum() / K
    mean = lambda X, points, labels: np.mean([((x - points[c]) ** 2).sum() for x, c in zip(X, labels, strict=True)])
    found = {"train": mean(H, mu, y), "test": mean(H_test, mu_test, y_test), "strong": mean(H_test, mu, y_test)}
    if K ** len(H_test) <= 3**7:
        found["weak"] = min(mean(H_test, class_means_or_nan(H_test, np.array(part), K), part)
                            for part in itertools.product(range(K), repeat=len(H_test)))
    return {name: float(value / between) for name, value in found.items()}


def class_means_or_nan(H, y, K):
    "As class_means; NaN, which no sample then asks for, where a class is absent."
    return np.stack([H[y == c].astype(np.longdouble).mean(0) if (y == c).any() else np.full(H.shape[1], np.nan)
        for c in range(K)])


# --- the inputs -----------------------------------------------------------------------------------


def problem(K, D, per_class=20, offset=0.0, spread=0.3, seed=0, unbalanced=False, dtype=torch.float64):
    "Features, shuffled labels and a classifier, whose bias fits the offset."
    torch.manual_seed(seed)
    y = torch.arange(K).repeat_interleave(torch.tensor([per_class * (1 + (c % 3) * unbalanced) for c in range(K)]))
    y = y[torch.randperm(len(y))]
    mu = torch.randn(K, D, dtype=torch.float64)
    H = (offset + mu[y] + spread * torch.randn(len(y), D, dtype=torch.float64)).to(dtype)
    W, b = torch.randn(K, D, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    return H, y, W, b - W @ torch.full((D,), float(offset), dtype=torch.float64)


INPUTS = {
    "random": dict(K=5, D=8),
    "two classes": dict(K=2, D=6),
    "two classes on a line": dict(K=2, D=1),
    "ten classes, unbalanced": dict(K=10, D=20, per_class=7, unbalanced=True, spread=1),
    "far from the origin": dict(K=4, D=6, offset=1e4, spread=1, unbalanced=True),
    "far, float32": dict(K=4, D=6, offset=1e3, spread=0.1, dtype=torch.float32),
    "more classes than dimensions": dict(K=9, D=3, unbalanced=True),
    "many more": dict(K=12, D=2, per_class=9),
    "tiny spread": dict(K=4, D=3, spread=1e-6),
    "tiny spread, far, float32": dict(K=4, D=3, spread=1e-4, offset=100, dtype=torch.float32),
    "fewer samples than dimensions": dict(K=3, D=40, per_class=4),
}


def agree(measured, expected, rel=1e-8, abs=1e-10):
    for name, value in measured.to_dict().items():
        assert (value is None) == (expected[name] is None), f"{name}: {measured.reasons.get(name)}"
        if value is None: continue
        # 1 - tr(...)/rank as written cancels, to about 1e-8 where Sigma_W is small or singular: see exact_vci below.
        # The other ratios must keep their digits however small they are.
        loose = {"vci": 1e-7, "nc1_trace": 0, "nc1_pinv": 0, "cdnv": 0}.get(name, abs)
        assert value == pytest.approx(expected[name], rel=rel, abs=loose), name


def without(expected, *names): return expected | dict.fromkeys(names)


def feed(stats, H, y, sizes):
    for h, c in zip(H.split(sizes), y.split(sizes), strict=True): stats.update(h, c)
    return stats


# --- the tests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["class", "sample"])
@pytest.mark.parametrize("name", INPUTS)
def test_features_streams_and_merged_streams(name, weighting):
    H, y, W, b = problem(**INPUTS[name])
    K, D = W.shape
    expected = by_definition(H, y, W, b, K, weighting=weighting)
    agree(nc.measure_features(H, y, num_classes=K, head=(W, b), weighting=weighting), expected)
    counts = y.bincount() if weighting == "class" else None
    empty = lambda: nc.ClassStatistics(K, D, within="full", class_counts=counts)
    N = len(H); sizes = [1, 1, N // 3, 1, N - N // 3 - 3]  # uneven, single samples among them
    stream = feed(empty(), H, y, sizes)
    parts = [feed(empty(), H[i::3], y[i::3], 5) for i in range(3)] + [empty()]
    memory = sum(nc.ClassStatistics.from_features(H[i::2], y[i::2], num_classes=K) for i in range(2))
    for stats in (stream, parts[2] + parts[3] + (parts[0] + parts[1]), memory):
        m = nc.measure_collapse(stats, (W, b), weighting=weighting)
        agree(m, without(expected, "nc4_disagreement", "ncc_accuracy"))
    if D <= 3 and weighting == "class" and "spread" in INPUTS[name]:
        assert nc.measure_collapse(stream).vci == pytest.approx(exact_vci(H, y, K), rel=1e-6)


@FEW
@given(st.integers(2, 7), st.integers(1, 12), st.sampled_from([0.0, 3.0, 100.0]), st.booleans(), st.integers(0, 999))
def test_random_inputs(K, D, offset, unbalanced, seed):
    H, y, W, b = problem(K, D, 15, offset, 0.5, seed, unbalanced)
    for weighting in ("class", "sample"):
        expected = by_definition(H, y, W, b, K, weighting=weighting)
        # the corner where classes nearly coincide is ill conditioned, for the definition as for the measure
        agree(nc.measure_features(H, y, num_classes=K, head=(W, b), weighting=weighting), expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("K, D, offset, spread", [(10, 20, 0, 1), (10, 20, 100, 1), (4, 3, 10, 1e-3), (10, 25, 1, 1e-4),
                                                  (12, 5, 50, 0.5), (2, 6, 100, 1)])
def test_float32_features_agree_with_float64(K, D, offset, spread):
    H, y, W, b = problem(K, D, 30, offset, spread, dtype=torch.float32)
    W, b = W.float(), b.float()
    agree(nc.measure_features(H, y, num_classes=K, head=(W, b)), by_definition(H, y, W, b, K), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("K, D, offset", [(2, 1, 0), (2, 9, 5), (3, 2, 100), (10, 9, 1), (10, 512, 0), (100, 128, 3)])
def test_an_exact_simplex_is_ideal(K, D, offset):
    "Rows I - 11^T/K, seen in coordinates: the simplex by its first definition."
    u, s, _ = np.linalg.svd(np.eye(K) - 1 / K)
    M = torch.zeros(K, D, dtype=torch.float64)
    M[:, : K - 1] = torch.from_numpy(u[:, : K - 1] * s[: K - 1])
    y = torch.arange(K).repeat(3)
    m = nc.measure_features((M + offset)[y], y, num_classes=K, head=(M, -M.sum(1) * offset))
    for name, value in m.to_dict().items():
        if value is not None: assert abs(value - (name in ("nc3_cosine", "ncc_accuracy"))) < 1e-7, name
    assert set(m.reasons) == {"one_vs_rest_margin"}


def test_test_features_are_measured_with_the_train_means():
    H, y, W, b = problem(4, 6, spread=1.5)
    H_test, y_test, _, _ = problem(4, 6, spread=1.5, seed=1)  # other means
    reference = nc.ClassStatistics.from_features(H, y, num_classes=4)
    m = nc.measure_features(H_test, y_test, num_classes=4, head=(W, b), reference=reference)
    agree(m, by_definition(H_test, y_test, W, b, 4, mu_train=class_means(H.numpy(), y.numpy(), 4)))
    assert m.ncc_accuracy < nc.measure_features(H_test, y_test, num_classes=4).ncc_accuracy


@pytest.mark.parametrize("weighting", ["class", "sample"])
@pytest.mark.parametrize("name", INPUTS)
def test_train_weak_test_and_strong(name, weighting):
    H, y, _, _ = problem(**INPUTS[name])
    H_test, y_test, _, _ = problem(**INPUTS[name] | dict(seed=1))
    K, keep = int(y.max()) + 1, y_test > 0  # class 0 is absent from the test set
    H_test, y_test = H_test[keep], y_test[keep]
    t = nc.test_collapse(H, y, H_test, y_test, weighting=weighting)
    expected = four_variances(H, y, H_test, y_test, K, weighting)
    for name in ("train", "test", "strong"): assert getattr(t, name) == pytest.approx(expected[name], rel=1e-8), name
    assert 0 <= t.weak <= t.test <= t.strong
    streams = [feed(nc.ClassStatistics(K, H.shape[1]), X, c, 11) for X, c in ((H, y), (H_test, y_test))]
    s = generalization.test_collapse_from_statistics(*streams, weighting=weighting)
    assert (s.train, s.test, s.strong) == pytest.approx((t.train, t.test, t.strong), rel=1e-8)


@FEW
@given(st.integers(2, 3), st.integers(1, 3), st.integers(0, 999))
def test_the_weak_variance_of_few_samples_is_the_best_partition(K, D, seed):
    H, y, _, _ = problem(K, D, 6, spread=0.7, seed=seed)
    H_test, y_test = torch.randn(6, D, dtype=torch.float64), torch.randint(K, (6,))
    expected = four_variances(H, y, H_test, y_test, K)
    weak = nc.test_collapse(H, y, H_test, y_test, num_classes=K, restarts=20).weak
    assert expected["weak"] * (1 - 1e-9) <= weak <= 1.2 * expected["weak"] + 1e-12


@pytest.mark.parametrize("K, D", [(4, 2), (6, 3), (12, 5), (5, 8)])
def test_measures_that_are_not_in_the_table(K, D):
    H, y, _, _ = problem(K, D, unbalanced=True)
    stats, mu = nc.ClassStatistics.from_features(H, y, num_classes=K), class_means(H.numpy(), y.numpy(),
        K).astype(float)
    far = torch.randn(30, D, dtype=torch.float64)
    for weighting, mu_G in (("class", mu.mean(0)), ("sample", H.numpy().mean(0))):
        M, v = mu - mu_G, far.numpy().mean(0) - mu_G
        U = M / np.linalg.norm(M, axis=1, keepdims=True)
        d = np.array([np.linalg.norm(U[c] - U[e]) for c in range(K) for e in range(K) if c != e])
        s = max(D - 2, 1)
        rows = stats.centred_means(weighting)
        found = {f.__name__: f(rows, centred=False)
                 for f in (means.one_vs_rest_margin, means.log_uniformity, means.riesz_uniformity)}
        found["nc5_ood"] = ood.nc5_ood(rows, far.mean(0) - stats.global_mean(weighting), centred=False)
        if weighting == "class": assert found == pytest.approx({n: getattr(means, n, ood.nc5_ood)(
            stats, *([far] if n == "nc5_ood" else [])) for n in found})
        assert found == pytest.approx({
            "one_vs_rest_margin": margin(U), "log_uniformity": -np.log(d).mean(),
            "riesz_uniformity": np.log((d**-s).mean()) / s,
            "nc5_ood": np.mean([abs(m @ v) / np.linalg.norm(m) / np.linalg.norm(v) for m in M])}, rel=1e-6)
