"The measures against slow definitions in float64, at their ideals, under invariances, in hard numerics, with bad input."

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nc_nbdev as nc
from nc_nbdev.geometry import duality, means, nearest_centre, ood
from nc_nbdev.geometry.etf import simplex_etf

FEW = settings(max_examples=40, deadline=None)


def slow(H, y, W, b, K, mu_train=None, weighting="class"):
    "Every measure by its formula: numpy, float64, loops over classes and pairs, dense pseudo-inverses."
    H, W, b, y = (a.double().numpy() for a in (H, W, b, y))
    y, N = y.astype(int), len(H)
    mu = np.stack([H[y == c].mean(0) for c in range(K)])
    share = np.array([(y == c).mean() for c in range(K)]) if weighting == "sample" else np.full(K, 1 / K)
    mu_G = share @ mu
    M = mu - mu_G
    cov = [(H[y == c] - mu[c]).T @ (H[y == c] - mu[c]) / (y == c).sum() for c in range(K)]
    Sigma_W = sum(s * C for s, C in zip(share, cov, strict=True))
    Sigma_B = M.T @ M / K  # the weighting moves mu_G only
    rank = min(K - 1, H.shape[1])
    u, s, vt = np.linalg.svd(Sigma_B)
    Sigma_B_pinv = (vt[:rank].T / s[:rank]) @ u[:, :rank].T
    v = np.array([np.trace(C) for C in cov])
    pairs = [(c, d) for c in range(K) for d in range(K) if c != d]
    cos = np.array([M[c] @ M[d] / np.linalg.norm(M[c]) / np.linalg.norm(M[d]) for c, d in pairs])
    norms = np.linalg.norm(M, axis=1)
    etf = (np.eye(K) - 1 / K) / math.sqrt(K - 1)
    unit = lambda A: A / np.linalg.norm(A)
    near = np.array([[((h - m) ** 2).sum() for m in (mu if mu_train is None else mu_train)] for h in H]).argmin(1)
    return {
        "nc1_trace": np.trace(Sigma_W) / np.trace(Sigma_B),
        "nc1_pinv": np.trace(Sigma_W @ Sigma_B_pinv) / K,
        "cdnv": np.mean([(v[c] + v[d]) / 2 / ((mu[c] - mu[d]) ** 2).sum() for c, d in pairs]),
        "vci": 1 - np.trace(np.linalg.pinv(Sigma_W + Sigma_B) @ Sigma_B) / rank,
        "nc2_norms": norms.std() / norms.mean(),
        "nc2_angles": cos.std(),
        "nc2_max_angle": np.abs(cos + 1 / (K - 1)).mean(),
        "nc2_etf": np.linalg.norm(unit(M @ M.T) - etf),
        "nc3_duality": np.linalg.norm(unit(W) - unit(M)),
        "nc3_etf": np.linalg.norm(unit(W @ M.T) - etf),
        "nc3_cosine": np.mean([W[c] @ M[c] / np.linalg.norm(W[c]) / norms[c] for c in range(K)]),
        "nc3_bias": np.linalg.norm(W @ mu_G + b),
        "nc4_disagreement": ((H @ W.T + b).argmax(1) != near).mean(),
        "ncc_accuracy": (near == y).mean(),
        "num_samples": N,
    }


def problem(K, D, per_class=20, offset=0.0, spread=0.3, seed=0, unbalanced=False, dtype=torch.float64):
    torch.manual_seed(seed)
    counts = [per_class * (1 + (c % 3) * unbalanced) for c in range(K)]
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    y = y[torch.randperm(len(y))]
    mu = torch.randn(K, D, dtype=torch.float64)
    H = (offset + mu[y] + spread * torch.randn(len(y), D, dtype=torch.float64)).to(dtype)
    W, b = torch.randn(K, D, dtype=torch.float64), torch.randn(K, dtype=torch.float64)
    return H, y, W, b - W @ torch.full((D,), float(offset), dtype=torch.float64)


def agree(measured, expected, rel=1e-8, abs=1e-10):
    for name, value in measured.to_dict().items():
        if value is None or name == "one_vs_rest_margin": continue
        # 1 - tr(...)/rank cancels in the slow formula of vci, to about 1e-8 where Sigma_W is small or singular
        assert value == pytest.approx(expected[name], rel=rel, abs=1e-7 if name == "vci" else abs), name


@FEW
@given(st.integers(2, 7), st.integers(1, 12), st.sampled_from([0.0, 3.0, 100.0]), st.booleans(), st.integers(0, 999))
def test_every_measure_is_its_formula(K, D, offset, unbalanced, seed):
    H, y, W, b = problem(K, D, 15, offset, 0.5, seed, unbalanced)
    if D == 1 and K == 2: return agree(nc.measure_features(H, y, num_classes=K), slow(H, y, W, b, K), abs=1e-9)
    for weighting in ("class", "sample"):
        m = nc.measure_features(H, y, num_classes=K, head=(W, b), weighting=weighting)
        agree(m, slow(H, y, W, b, K, weighting=weighting), rel=1e-6, abs=1e-9)
        assert {n for n, v in m.to_dict().items() if v is None} == ({"one_vs_rest_margin"} if K <= D + 1 else set())


@pytest.mark.parametrize("K, D, offset, spread", [(10, 20, 0, 1), (10, 20, 100, 1), (4, 3, 10, 1e-3), (10, 512, 1, 1e-4),
                                                  (12, 5, 50, 0.5), (2, 6, 100, 1)])
def test_float32_features_agree_with_float64(K, D, offset, spread):
    H, y, W, b = problem(K, D, 30, offset, spread, dtype=torch.float32)
    m = nc.measure_features(H, y, num_classes=K, head=(W.float(), b.float()))
    agree(m, slow(H, y, W.float(), b.float(), K), rel=1e-5, abs=1e-12)


def test_streams_and_merged_streams_give_the_same():
    H, y, W, b = problem(5, 8, 21, offset=30)
    whole = nc.measure_collapse(nc.ClassStatistics.from_features(H, y, num_classes=5, within="full"), (W, b))
    halves = [nc.ClassStatistics(5, 8, within="full"), nc.ClassStatistics(5, 8, within="full")]
    for i, a in enumerate(range(0, len(H), 13)): halves[i % 2].update(H[a : a + 13], y[a : a + 13])
    merged = nc.measure_collapse(halves[0] + halves[1], (W, b)).to_dict()
    for name, value in whole.to_dict().items():
        assert (value is None and merged[name] is None) or merged[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("K, D, offset", [(2, 1, 0), (2, 9, 5), (3, 2, 100), (10, 9, 1), (10, 512, 0), (100, 128, 3)])
def test_exact_simplex_is_ideal(K, D, offset):
    M = simplex_etf(K, D).double()
    y = torch.arange(K).repeat(3)
    m = nc.measure_features((M + offset)[y], y, num_classes=K, head=(M, -M.sum(1) * offset))
    for name, value in m.to_dict().items():
        if value is not None: assert abs(value - (name in ("nc3_cosine", "ncc_accuracy"))) < 1e-7, name
    assert set(m.reasons) == {"one_vs_rest_margin"}


@FEW
@given(st.integers(2, 6), st.integers(2, 9), st.integers(0, 999), st.floats(-3, 3))
def test_invariances(K, D, seed, log_scale):
    H, y, W, b = problem(K, D, 12, seed=seed)
    Q, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    scale, t, order = 10**log_scale, torch.randn(D, dtype=torch.float64), torch.randperm(K)
    back = order.argsort()  # the row of class order[c] is the old row c
    W_moved = (W @ Q / scale)[back]
    b_moved = (b - W @ Q @ t)[back]
    before = nc.measure_features(H, y, num_classes=K, head=(W, b)).to_dict()
    after = nc.measure_features(scale * (H @ Q + t), order[y], num_classes=K, head=(W_moved, b_moved)).to_dict()
    for name, value in before.items():
        assert (value is None and after[name] is None) or after[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_reference_means_are_used():
    H, y, W, b = problem(4, 6, spread=1.5)
    H_test, y_test, _, _ = problem(4, 6, spread=1.5, seed=1)  # other means
    reference = nc.ClassStatistics.from_features(H, y, num_classes=4)
    m = nc.measure_features(H_test, y_test, num_classes=4, head=(W, b), reference=reference)
    agree(m, slow(H_test, y_test, W, b, 4, mu_train=reference.means.numpy()))
    assert m.ncc_accuracy < nc.measure_features(H_test, y_test, num_classes=4).ncc_accuracy


def test_what_cannot_be_had_is_none_and_says_why():
    H, y, _, _ = problem(3, 5)
    m = nc.measure_features(H, y, num_classes=3)
    missing = {name for name, value in m.to_dict().items() if value is None}
    assert missing == {"nc3_duality", "nc3_etf", "nc3_cosine", "nc3_bias", "nc4_disagreement", "one_vs_rest_margin"}
    assert set(m.reasons) == missing and "head" in m.reasons["nc3_bias"]
    trace_only = nc.measure_collapse(nc.ClassStatistics.from_features(H, y, num_classes=3, within="trace"))
    assert trace_only.nc1_pinv is None and trace_only.nc1_trace == pytest.approx(m.nc1_trace)
    assert set(trace_only.reasons) == {n for n, v in trace_only.to_dict().items() if v is None}
    assert "none" in repr(trace_only) and "<table" in trace_only._repr_html_()


def test_dead_and_degenerate_features_do_not_stop_a_run():
    y = torch.arange(3).repeat(5)
    dead = nc.measure_features(torch.full((15, 4), 0.1), y, num_classes=3, head=(torch.zeros(3, 4), None))
    assert dead.nc1_trace is None and dead.nc2_etf is None and dead.nc3_cosine is None
    line = nc.measure_features(torch.tensor([[-1.0], [0.0], [1.0]])[y], y, num_classes=3)  # class 1 has no direction
    assert line.nc2_angles is None and "class [1]" in line.reasons["nc2_angles"] and line.nc2_norms > 0
    for m in (dead, line):
        assert all(v is None or math.isfinite(v) for v in m.to_dict().values())
        assert set(m.reasons) == {n for n, v in m.to_dict().items() if v is None}


def test_head_without_bias_and_parameters_with_gradients():
    H, y, W, _ = problem(3, 5)
    layer = torch.nn.Linear(5, 3)
    m = nc.measure_features(H.requires_grad_(), y, num_classes=3, head=(layer.weight, layer.bias))
    assert isinstance(m.nc3_duality, float)
    assert nc.measure_features(H, y, num_classes=3, head=(W, None)) == nc.measure_features(
        H, y, num_classes=3, head=(W, torch.zeros(3)))


BAD = {
    "one axis": (lambda H, y: dict(H=H[0]), "shape"),
    "three axes": (lambda H, y: dict(H=H[None]), "shape"),
    "integer features": (lambda H, y: dict(H=H.long()), "(?i)float"),
    "no samples": (lambda H, y: dict(H=H[:0], y=y[:0]), "(?i)sample|class|shape"),
    "too few labels": (lambda H, y: dict(y=y[:4]), "(?i)label|shape"),
    "labels of two axes": (lambda H, y: dict(y=y[:, None]), "(?i)label|shape"),
    "float labels": (lambda H, y: dict(y=y.double()), "(?i)integer"),
    "label too large": (lambda H, y: dict(y=y + 1), "3"),
    "negative label": (lambda H, y: dict(y=y - 1), "-1"),
    "empty class": (lambda H, y: dict(num_classes=5), "3.*4"),
    "one class": (lambda H, y: dict(num_classes=1, y=0 * y), "(?i)class"),
    "NaN": (lambda H, y: dict(H=H * torch.nan), "(?i)nan"),
    "infinite": (lambda H, y: dict(H=H / 0), "(?i)inf|nan"),
    "head of another K": (lambda H, y: dict(head=(torch.ones(4, 4), None)), r"\(4, 4\)"),
    "head transposed": (lambda H, y: dict(head=(torch.ones(4, 3), None)), r"\(4, 3\)"),
    "bias of another K": (lambda H, y: dict(head=(torch.ones(3, 4), torch.ones(4))), r"\(4,\)"),
    "NaN in head": (lambda H, y: dict(head=(torch.full((3, 4), torch.nan), None)), "(?i)nan"),
    "layer as head": (lambda H, y: dict(head=torch.nn.Linear(4, 3)), "weight"),
    "layer in head": (lambda H, y: dict(head=(torch.nn.Linear(4, 3), None)), "Linear"),
    "nothing in head": (lambda H, y: dict(head=(None, None)), "W"),
    "tensor as head": (lambda H, y: dict(head=torch.ones(3, 4)), "pair"),
    "weighting": (lambda H, y: dict(weighting="mean"), "mean"),
    "reference of another D": (lambda H, y: dict(reference=nc.ClassStatistics(3, 9)), "9"),
    "empty reference": (lambda H, y: dict(reference=nc.ClassStatistics(3, 4)), "(?i)class"),
    "means as reference": (lambda H, y: dict(reference=torch.ones(3, 4)), "ClassStatistics"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    make, message = BAD[name]
    torch.manual_seed(0)
    H, y = torch.randn(12, 4), torch.arange(12) % 3
    with pytest.raises(ValueError, match=message): nc.measure_features(**(dict(H=H, y=y, num_classes=3) | make(H, y)))


def test_measure_collapse_refuses_features():
    with pytest.raises(ValueError, match="ClassStatistics"): nc.measure_collapse(torch.randn(5, 3))


# --- NC4 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset, spread", [(1000, 1e-3), (0, 1), (1e4, 1e-2), (100, 1e-4)])
def test_nearest_centre_survives_offsets(offset, spread):
    torch.manual_seed(0)
    y = torch.arange(500) % 10
    mu = offset + spread * torch.randn(10, 64, dtype=torch.float64)
    H = (mu[y] + spread * torch.randn(500, 64)).float()
    expected = (H.double()[:, None] - mu).square().sum(2).argmin(1)
    assert nearest_centre.nearest_centre(H, mu).equal(expected)
    assert nearest_centre.nearest_centre(H.requires_grad_(), mu).equal(expected)


def test_nearest_centre_in_chunks_and_ties():
    torch.manual_seed(0)
    H, mu = torch.randn(5000, 1000), torch.randn(3, 1000, dtype=torch.float64)  # two chunks
    assert nearest_centre.nearest_centre(H, mu).equal(torch.cdist(H.double(), mu).argmin(1))
    assert nearest_centre.nearest_centre(torch.zeros(1, 1), torch.tensor([[2.0], [1.0], [-1.0]])).tolist() == [1]
    assert nearest_centre.classifier_decision(torch.ones(1, 1), torch.tensor([[0.0], [1.0], [1.0]])).tolist() == [1]


def test_disagreement_with_and_without_bias():
    H, y, W, b = problem(4, 6)
    mu = torch.randn(4, 6)
    near = nearest_centre.nearest_centre(H, mu)
    for with_bias in (True, False):
        expected = ((H @ W.T + with_bias * b).argmax(1) != near).double().mean().item()
        assert nearest_centre.nc4_disagreement(H, W, b, mu, with_bias=with_bias) == expected


# --- NC2 where no simplex fits -----------------------------------------------------------------------------------------


def hull_distance_by_search(point, others, steps=4000):
    "Frank-Wolfe with exact line search: slow, independent, an upper bound that converges."
    x = others.mean(0)
    for _ in range(steps):
        corner = others[((x - point) @ others.T).argmin()]
        d = corner - x
        if (d @ d) == 0: break
        x = x + np.clip((point - x) @ d / (d @ d), 0, 1) * d
    return np.linalg.norm(x - point)


@pytest.mark.parametrize("K, D", [(4, 2), (6, 3), (12, 5), (5, 8)])
def test_one_vs_rest_margin_is_the_distance_to_the_hull(K, D):
    torch.manual_seed(K)
    U = torch.nn.functional.normalize(torch.randn(K, D, dtype=torch.float64), dim=1)
    slow_margin = min(hull_distance_by_search(U[k].numpy(), np.delete(U.numpy(), k, 0)) for k in range(K))
    assert means.one_vs_rest_margin(U, centred=False) == pytest.approx(slow_margin, abs=5e-3)
    assert means.one_vs_rest_margin(U, centred=False) <= slow_margin + 1e-9


def test_a_row_inside_the_hull_has_margin_zero():
    rows = torch.tensor([[1.0, 0], [1, 0], [-1, 1]])
    assert means.one_vs_rest_margin(rows, centred=False) == pytest.approx(0, abs=1e-7)
    assert means.log_uniformity(rows, centred=False) == math.inf == means.riesz_uniformity(rows, centred=False)


@pytest.mark.parametrize("D", [3, 64, 512, 4096])
def test_riesz_kernel_neither_underflows_nor_overflows(D):
    K = 20
    spread = means.riesz_uniformity(torch.randn(K, D))
    assert math.isfinite(spread) and spread >= -0.5 * math.log(2 * K / (K - 1)) - 1e-12
    near = torch.nn.functional.normalize(torch.ones(K, D) + 1e-4 * torch.randn(K, D), dim=1)
    assert math.isfinite(means.riesz_uniformity(near, centred=False))


@FEW
@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 999))
def test_only_a_simplex_attains_the_uniformity_bound(K, D, seed):
    torch.manual_seed(seed)
    rows, bound = torch.randn(K, D, dtype=torch.float64), -0.5 * math.log(2 * K / (K - 1))
    energies = [f(rows, centred=False) for f in (means.log_uniformity, means.riesz_uniformity)]
    assert all(e >= bound - 1e-12 for e in energies)
    assert energies[1] >= energies[0] - 1e-12  # Jensen
    if K <= D + 1: assert means.log_uniformity(simplex_etf(K, D)) == pytest.approx(bound, abs=1e-6)


def test_many_classes_in_many_dimensions():
    K, D = 1000, 2048  # K x K x D differences would take 16 GB
    mu = torch.randn(K, D, dtype=torch.float64)
    assert abs(means.nc2_angles(mu) - 1 / math.sqrt(D)) < 1e-3
    assert means.log_uniformity(mu) == pytest.approx(-0.5 * math.log(2), abs=1e-2)
    assert nearest_centre.nearest_centre(mu[:50].float(), mu).equal(torch.arange(50))


# --- conventions -------------------------------------------------------------------------------------------------------


def test_conventions_of_nc2_and_nc3():
    mu, W = torch.randn(4, 6).double() + 1, torch.randn(4, 6).double()
    norms = W.norm(dim=1)
    assert means.nc2_norms(W, centred=False) == pytest.approx((norms.std(correction=0) / norms.mean()).item())
    assert duality.nc3_duality(W, mu, squared=True) == pytest.approx(duality.nc3_duality(W, mu) ** 2)
    assert duality.nc3_duality(mu, mu, centred=False) == pytest.approx(0, abs=1e-12)
    assert duality.nc3_duality(mu, mu) > 0.1
    assert duality.nc3_duality(W, mu, squared=True, row_normalised=True) == pytest.approx(8 * (1 - duality.nc3_cosine(W, mu)))
    with pytest.raises(ValueError, match="counts"): means.nc2_norms(W, weighting="sample")


def test_nc5():
    mu, far = torch.randn(4, 6).double(), torch.randn(30, 6).double()
    M, v = mu - mu.mean(0), far.mean(0) - mu.mean(0)
    cos = torch.nn.functional.cosine_similarity(M, v[None])
    assert ood.nc5_ood(mu, far) == pytest.approx(cos.abs().mean().item())
    raw = torch.nn.functional.cosine_similarity(mu, far.mean(0)[None])
    assert ood.nc5_ood(mu, far, centred=False) == pytest.approx(raw.abs().mean().item())
    H, y, _, _ = problem(4, 6, unbalanced=True)
    stats = nc.ClassStatistics.from_features(H, y, num_classes=4)
    M, v = stats.means - H.mean(0), far.mean(0) - H.mean(0)
    expected = torch.nn.functional.cosine_similarity(M, v[None]).abs().mean().item()
    assert ood.nc5_ood(stats, far, weighting="sample") == pytest.approx(expected)
