"""Class statistics and the NC1 measures against slow float64 computations: random inputs, processes, bad input."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nc_nbdev.geometry.etf import simplex_etf, simplex_gram
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.geometry.variability import cdnv, nc1_pinv, nc1_trace, vci

MEASURES = (nc1_trace, nc1_pinv, cdnv, vci)
WEIGHTINGS = ("class", "sample")
few = settings(max_examples=25, deadline=None)


def close(a, b, rtol, atol=0.0):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert (a - b).abs().max() <= atol + rtol * b.abs().max(), f"{a} and {b} differ by more than {rtol}"


def make(K, D, sizes, *, seed=0, spread=1.0, offset=0.0, dtype=torch.float64):
    "Features in random order with sizes[c] samples of class c, and a spread that differs by class and direction."
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(K).repeat_interleave(torch.as_tensor(sizes))
    y = y[torch.randperm(len(y), generator=g)]
    mu = torch.randn(K, D, generator=g, dtype=torch.float64)
    A = torch.randn(D, D, generator=g, dtype=torch.float64) / D**0.5 + torch.eye(D, dtype=torch.float64)
    noise = torch.randn(len(y), D, generator=g, dtype=torch.float64) @ A * (1 + y[:, None] % 3)
    return (mu[y] + spread * noise + offset).to(dtype), y


def two_pass(H, y, K, weighting="class"):
    "Every NC1 measure straight from the definitions, in float64."
    H = H.double()
    n = torch.stack([(y == c).sum() for c in range(K)]).double()
    mu = torch.stack([H[y == c].mean(0) for c in range(K)])
    S = torch.stack([(H[y == c] - mu[c]).T @ (H[y == c] - mu[c]) for c in range(K)])
    w = torch.full((K,), 1 / K, dtype=torch.float64) if weighting == "class" else n / n.sum()
    M = mu - w @ mu
    Sigma_W, Sigma_B = ((w / n)[:, None, None] * S).sum(0), M.T @ M / K
    v = torch.stack([s.trace() for s in S]) / n
    d2 = (mu[:, None] - mu[None]).square().sum(-1)
    off = ~torch.eye(K, dtype=torch.bool)
    r = min(K - 1, H.shape[1])
    values, vectors = torch.linalg.eigh(Sigma_B)
    inverse = vectors[:, -r:] / values[-r:] @ vectors[:, -r:].T
    return {"means": mu, "M": M, "Sigma_W": Sigma_W, "Sigma_B": Sigma_B,
            "nc1_trace": Sigma_W.trace() / Sigma_B.trace(), "nc1_pinv": (Sigma_W @ inverse).trace() / K,
            "cdnv": ((v[:, None] + v) / (2 * d2))[off].mean(),
            "vci": 1 - (torch.linalg.pinv(Sigma_W + Sigma_B, hermitian=True) @ Sigma_B).trace() / r}


def value(measure, stats, weighting): return measure(stats) if measure is cdnv else measure(stats, weighting)


def check_all(stats, expected, weighting="class", rtol=1e-9):
    close(stats.means, expected["means"], 1e-12)
    close(stats.within_covariance(weighting), expected["Sigma_W"], rtol)
    close(stats.between_covariance(weighting), expected["Sigma_B"], rtol)
    for measure in MEASURES:
        noise = 1e-11 if measure is vci else 0  # of the slow computation, 1 - tr(...), when the answer is 0
        close(value(measure, stats, weighting), expected[measure.__name__], rtol, noise)


def exact_vci(H, y, K):
    "vci in rational arithmetic, without any rounding: the float64 definition has no digits left near collapse."
    D, rows = H.shape[1], [[Fraction(x) for x in h] for h in H.double().tolist()]
    groups = [[h for h, c in zip(rows, y.tolist(), strict=True) if c == k] for k in range(K)]
    mu = [[sum(column) / len(g) for column in zip(*g, strict=True)] for g in groups]
    M = [[m - sum(column) / K for m, column in zip(row, zip(*mu, strict=True), strict=True)] for row in mu]
    def gram(X): return [[sum(x[i] * x[j] for x in X) for j in range(D)] for i in range(D)]
    within = [gram([[a - b for a, b in zip(h, m, strict=True)] for h in g]) for g, m in zip(groups, mu, strict=True)]
    B = [[x / K for x in row] for row in gram(M)]
    T = [[B[i][j] + sum(S[i][j] / len(g) for S, g in zip(within, groups, strict=True)) / K for j in range(D)]
        for i in range(D)]
    table = [T[i] + B[i] for i in range(D)]  # Gauss-Jordan: [T | B] -> [1 | T^-1 B]; T is positive definite
    for i in range(D):
        table[i] = [x / table[i][i] for x in table[i]]
        for j in range(D):
            if j != i: table[j] = [a - table[j][i] * b for a, b in zip(table[j], table[i], strict=True)]
    return float(1 - sum(table[i][D + i] for i in range(D)) / min(K - 1, D))


def cut(length, generator):
    "Random uneven pieces of a length, single samples among them."
    points = torch.randint(0, length + 1, (4,), generator=generator).tolist()
    points = sorted({0, 1, length, *points})
    return [slice(a, b) for a, b in zip(points, points[1:], strict=False)]


sizes_of_classes = st.integers(2, 6).flatmap(lambda K: st.lists(st.integers(3, 30), min_size=K, max_size=K))


# ---- one pass is the two-pass result

@few
@given(sizes=sizes_of_classes, D=st.integers(1, 9), seed=st.integers(0, 10**6), weighting=st.sampled_from(WEIGHTINGS))
def test_features_in_memory_match_the_definitions(sizes, D, seed, weighting):
    K = len(sizes)
    H, y = make(K, D, sizes, seed=seed, offset=3.0)
    expected = two_pass(H, y, K, weighting)
    stats = ClassStatistics.from_features(H, y, num_classes=K)
    s = torch.linalg.svdvals(expected["M"])[: min(K - 1, D)]
    assume(s[-1] > 1e-2 * s[0])  # or the slow computation, not ours, loses the digits
    check_all(stats, expected, weighting, rtol=1e-8)


@few
@given(sizes=sizes_of_classes, D=st.integers(2, 70), seed=st.integers(0, 10**6), weighting=st.sampled_from(WEIGHTINGS))
def test_streaming_in_uneven_batches_is_one_shot(sizes, D, seed, weighting):
    K = len(sizes)
    H, y = make(K, D, sizes, seed=seed, offset=10.0)
    counts = torch.tensor(sizes) if weighting == "class" else None
    stream = ClassStatistics(K, D, within="full", class_counts=counts)
    for part in cut(len(y), torch.Generator().manual_seed(seed)): stream.update(H[part], y[part])
    whole = ClassStatistics.from_features(H, y, num_classes=K)
    assert stream.counts.tolist() == sizes
    close(stream.means, whole.means, 1e-12)
    close(stream.class_scatter, whole.class_scatter, 1e-10)
    close(stream.within_covariance(weighting), whole.within_covariance(weighting), 1e-10)


@few
@given(sizes=sizes_of_classes, D=st.integers(1, 9), seed=st.integers(0, 10**6), weighting=st.sampled_from(WEIGHTINGS))
def test_features_read_once_keep_one_weighting_and_no_reference(sizes, D, seed, weighting):
    H, y = make(len(sizes), D, sizes, seed=seed, offset=3.0)
    once = ClassStatistics.from_features(H, y, num_classes=len(sizes), weighting=weighting)
    lazy = ClassStatistics.from_features(H, y, num_classes=len(sizes))
    assert not once._features and lazy._features
    close(once.within_covariance(weighting), lazy.within_covariance(weighting), 1e-10)
    if len(set(sizes)) == 1: return
    with pytest.raises(ValueError, match="weight"):
        once.within_covariance({"class": "sample", "sample": "class"}[weighting])


@few
@given(sizes=sizes_of_classes, D=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_total_covariance_needs_no_labels(sizes, D, seed):
    K = len(sizes)
    H, y = make(K, D, sizes, seed=seed, offset=3.0)
    expected = torch.cov(H.T, correction=0).reshape(D, D)
    stream = ClassStatistics(K + 1, D, within="full")  # the last class stays empty
    for part in cut(len(y), torch.Generator().manual_seed(seed)): stream.update(H[part], y[part])
    balanced = ClassStatistics(K, D, within="full", class_counts=[4] * K)
    few, labels = make(K, D, [4] * K, seed=seed)
    close(balanced.update(few, labels).total_covariance(), torch.cov(few.T, correction=0).reshape(D, D), 1e-10)
    for stats in (stream, ClassStatistics.from_features(H, y, num_classes=K)):
        close(stats.total_covariance(), expected, 1e-10)
    with pytest.raises(ValueError, match="within='full'"): ClassStatistics(K, D).update(H, y).total_covariance()


@few
@given(sizes=sizes_of_classes, seed=st.integers(0, 10**6), in_memory=st.booleans())
def test_merge_order_does_not_matter(sizes, seed, in_memory):
    K, D = len(sizes), 5
    H, y = make(K, D, sizes, seed=seed, offset=10.0)
    def one(part):
        if in_memory: return ClassStatistics.from_features(H[part], y[part], num_classes=K)
        return ClassStatistics(K, D, within="full").update(H[part], y[part])
    parts = [one(part) for part in cut(len(y), torch.Generator().manual_seed(seed))]
    before = [p.means.clone() for p in parts]
    whole = ClassStatistics.from_features(H, y, num_classes=K)
    for merged in (sum(parts), sum(reversed(parts)), parts[0] + sum(parts[1:])):
        close(merged.means, whole.means, 1e-12)
        close(merged.scatter, whole.scatter, 1e-10)
        close(merged.within_trace(), whole.within_trace(), 1e-10)
        if in_memory: close(merged.within_covariance("class"), whole.within_covariance("class"), 1e-10)
    assert all(torch.equal(p.means, b) for p, b in zip(parts, before, strict=True)), "a + b must leave a and b alone"


def test_single_samples_one_by_one():
    H, y = make(3, 4, [5, 1, 9], offset=100.0)
    stream = ClassStatistics(3, 4, within="full", class_counts=torch.tensor([5, 1, 9]))
    for i in range(len(y)): stream.update(H[i : i + 1], y[i : i + 1])
    check_all(stream, two_pass(H, y, 3), rtol=1e-8)


def test_merging_memory_and_stream_and_updating_features_in_memory():
    H, y = make(3, 4, [20, 20, 20])
    memory = ClassStatistics.from_features(H[:30], y[:30], num_classes=3)
    stream = ClassStatistics(3, 4, within="full").update(H[30:], y[30:])
    for stats in (memory + stream, stream + memory, memory.update(H[30:], y[30:])): check_all(stats, two_pass(H, y, 3))


@pytest.mark.parametrize("K, D", [(2, 1), (2, 7), (12, 2), (12, 5), (5, 200), (300, 130)])
def test_shapes_from_two_classes_to_more_classes_than_dimensions(K, D):
    H, y = make(K, D, [4] * K, spread=0.1)
    check_all(ClassStatistics.from_features(H, y, num_classes=K), two_pass(H, y, K), rtol=1e-7)


def test_fewer_samples_than_dimensions():
    H, y = make(4, 40, [3, 4, 5, 6])  # N - K = 14 < D
    stats, expected = ClassStatistics.from_features(H, y, num_classes=4), two_pass(H, y, 4)
    close(nc1_pinv(stats), expected["nc1_pinv"], 1e-9)
    assert abs(vci(stats)) < 1e-9 and abs(expected["vci"]) < 1e-9
    H, y = make(4, 15, [3, 4, 5, 6])  # 14 = D - 1
    close(vci(ClassStatistics.from_features(H, y, num_classes=4)), two_pass(H, y, 4)["vci"], 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("spread", [1, 1e-5])
def test_fewer_samples_than_dimensions_make_no_matrix(dtype, weighting, spread, monkeypatch):
    "Samples in 20 of 300 dimensions, so that vci is not 0: as by the (D, D) covariance of a stream."
    H, y = make(4, 20, [30, 40, 50, 60], spread=spread)
    H = torch.nn.functional.pad(H, (0, 280)) if dtype == torch.float32 else H @ simplex_etf(20, 300)
    H = H.to(dtype)
    expected = vci(ClassStatistics.from_features(H.double(), y, num_classes=4, weighting=weighting), weighting)
    stats = ClassStatistics.from_features(H, y, num_classes=4)
    together = sum(ClassStatistics.from_features(H[i], y[i], num_classes=4) for i in (slice(0, 90), slice(90, None)))
    for name in ("_coarse_covariance", "within_covariance"): monkeypatch.setattr(ClassStatistics, name, None)
    close([vci(stats, weighting), vci(together, weighting)], [expected, expected], 1e-8)
    assert expected > 1e-3 * spread**2


# ---- precision

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_state_is_float64_whatever_the_dtype(dtype):
    H, y = make(3, 6, [30, 40, 50], dtype=dtype, spread=0.3)
    expected = two_pass(H, y, 3)  # of the rounded features
    stats = ClassStatistics.from_features(H, y, num_classes=3)
    assert stats.means.dtype == stats.class_scatter.dtype == stats.scatter.dtype == torch.float64
    check_all(stats, expected)
    check_all(ClassStatistics(3, 6, within="full", class_counts=[30, 40, 50]).update(H, y), expected)


def test_half_precision_features_whose_sum_overflows_are_finite():
    H = torch.full((400, 4), 60_000.0, dtype=torch.float16)
    H[::2] = 30_000
    stats = ClassStatistics(2, 4).update(H, torch.arange(400) % 2)
    assert stats.means.tolist() == [[30_000.0] * 4, [60_000.0] * 4]


@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("batch", [1, 37, 10_000])
def test_float32_far_from_the_origin_to_five_digits(spread, batch):
    H, y = make(4, 6, [80, 90, 100, 110], spread=spread / 10, offset=100.0, dtype=torch.float32)
    expected = two_pass(H, y, 4) | {"vci": exact_vci(H, y, 4)}
    stream = ClassStatistics(4, 6, within="full", class_counts=[80, 90, 100, 110])
    for h, c in zip(H.split(batch), y.split(batch), strict=True): stream.update(h, c)
    for stats in (stream, ClassStatistics.from_features(H, y, num_classes=4)):
        for measure in MEASURES: close(measure(stats), expected[measure.__name__], 1e-6)
    if spread == 1e-4: assert nc1_trace(stream) < 1e-7


def test_the_shortcut_that_cancels_would_have_failed():
    "Offset 10, spread 1e-3: in float32 E|x|^2 - |E x|^2 is wrong in the first digit."
    x = (10 + 1e-3 * torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))).float()
    y = torch.arange(5000) % 2
    exact = two_pass(x, y, 2)["Sigma_W"].item()
    shortcut = (x.square().mean() - x.mean().square()).item()
    assert abs(shortcut - exact) > 0.3 * exact
    close(ClassStatistics.from_features(x, y, num_classes=2).within_trace(), exact, 1e-9)


def test_a_small_vci_keeps_its_digits():
    "1 - tr(pinv(Sigma_T) Sigma_B)/rank has none left here; the answer is known in closed form for K = 2, D = 1."
    h = torch.tensor([-1 - 2.0**-30, -1 + 2.0**-30, 1 - 2.0**-30, 1 + 2.0**-30], dtype=torch.float64)
    stats = ClassStatistics.from_features(h[:, None], torch.tensor([0, 0, 1, 1]), num_classes=2)
    close(vci(stats), 2.0**-60 / (1 + 2.0**-60), 1e-12)


@pytest.mark.parametrize("K, D", [(2, 1), (3, 2), (10, 9), (10, 64), (40, 39)])
@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_exact_simplex_gives_zero(K, D, offset, dtype):
    points = (simplex_etf(K, D, seed=1) + offset).to(dtype)
    y = torch.arange(K).repeat(6)
    for stats in (ClassStatistics.from_features(points[y], y, num_classes=K),
                  ClassStatistics(K, D, within="full").update(points[y], y)):
        for measure in MEASURES: assert 0 <= measure(stats) < 1e-12, measure.__name__


# ---- invariances

@few
@given(sizes=sizes_of_classes, seed=st.integers(0, 10**6), weighting=st.sampled_from(WEIGHTINGS),
       scale=st.floats(1e-3, 1e3), offset=st.floats(-100, 100))
def test_invariant_under_rotation_translation_scaling_and_relabelling(sizes, seed, weighting, scale, offset):
    K, D = len(sizes), 6
    H, y = make(K, D, sizes, seed=seed)
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    names = torch.randperm(K, generator=g)
    before = ClassStatistics.from_features(H, y, num_classes=K)
    after = ClassStatistics.from_features(scale * (H @ Q + offset), names[y], num_classes=K)
    for measure in MEASURES:  # vci is 0 when samples are fewer than dimensions
        close(value(measure, after, weighting), value(measure, before, weighting), 1e-7, 1e-13 if measure is vci else 0)


@few
@given(sizes=sizes_of_classes, D=st.integers(5, 12), seed=st.integers(0, 10**6), weighting=st.sampled_from(WEIGHTINGS))
def test_pinv_and_vci_are_invariant_under_invertible_maps(sizes, D, seed, weighting):
    K = len(sizes)
    H, y = make(K, D, sizes, seed=seed)
    g = torch.Generator().manual_seed(seed)
    def map_of(D): return torch.randn(D, D, generator=g, dtype=torch.float64) + 6 * torch.eye(D, dtype=torch.float64)
    before, after = (ClassStatistics.from_features(X, y, num_classes=K) for X in (H, H @ map_of(D)))
    assume(vci(before, weighting) > 1e-6)  # 0 when samples are fewer than dimensions
    close(vci(after, weighting), vci(before, weighting), 1e-6)
    D = K - 1  # nc1_pinv is invariant where the pseudo-inverse is an inverse: in the span of the means
    before, after = (ClassStatistics.from_features(X, y, num_classes=K) for X in (H[:, :D], H[:, :D] @ map_of(D)))
    s = torch.linalg.svdvals(before.centred_means())[:D]
    assume(s[-1] > 1e-2 * s[0])
    close(nc1_pinv(after, weighting), nc1_pinv(before, weighting), 1e-6)


@few
@given(K=st.integers(2, 30), extra=st.integers(0, 9), seed=st.integers(0, 10**6))
def test_simplex_etf_is_one(K, extra, seed):
    M = simplex_etf(K, K - 1 + extra, seed=seed)
    close(M @ M.T / torch.linalg.matrix_norm(M @ M.T), simplex_gram(K), 1e-12)
    close(M.norm(dim=1), torch.ones(K), 1e-12)
    assert M.sum(0).abs().max() < 1e-12


# ---- conventions

def test_named_conventions():
    H, y = make(4, 5, [3, 4, 5, 60])
    stats = ClassStatistics.from_features(H, y, num_classes=4)
    close(nc1_pinv(stats, divide_by_K=False), 4 * nc1_pinv(stats), 1e-12)
    assert abs(nc1_trace(stats, "sample") / nc1_trace(stats, "class") - 1) > 0.01
    v = torch.stack([(H[y == c] - H[y == c].mean(0)).square().sum() / ((y == c).sum() - 1) for c in range(4)])
    close(stats.class_variances(ddof=1), v, 1e-12)
    assert cdnv(stats, ddof=1) > cdnv(stats)
    close(stats.global_mean("sample"), H.mean(0), 1e-12)


def test_a_stream_of_unbalanced_classes_says_what_it_cannot_do():
    H, y = make(3, 4, [5, 6, 7])
    pooled = ClassStatistics(3, 4, within="full").update(H, y)
    with pytest.raises(ValueError, match="class_counts="): nc1_pinv(pooled)
    close(nc1_pinv(pooled, "sample"), two_pass(H, y, 3, "sample")["nc1_pinv"], 1e-9)
    weighted = ClassStatistics(3, 4, within="full", class_counts=[5, 6, 7]).update(H[:9], y[:9])
    with pytest.raises(ValueError, match=r"class_counts=\[5, 6, 7\]"): weighted.within_covariance()
    weighted.update(H[9:], y[9:])
    close(vci(weighted), two_pass(H, y, 3)["vci"], 1e-9)
    with pytest.raises(ValueError, match="weighted for"): weighted.within_covariance("sample")


# ---- state belongs to the statistics

def test_nothing_aliases_the_callers_features():
    H, y = torch.randn(8, 3).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    kept = H.clone()
    stats = ClassStatistics(3, 3, within="full").update(H[:3], y[:3])  # one sample a class: the mean is the sample
    H.zero_()
    assert torch.equal(stats.means, kept[:3])
    stats.means.fill_(7)
    assert not H.any()
    memory = ClassStatistics.from_features(kept, y, num_classes=3)
    before = kept.clone()
    nc1_pinv(memory), vci(memory)
    assert torch.equal(kept, before), "features must not be written to"
    memory = ClassStatistics.from_features(kept, y, num_classes=3)
    kept += 1
    with pytest.raises(ValueError, match="changed in place"): vci(memory)


@pytest.mark.parametrize("D", [3, 300])
@pytest.mark.parametrize("measure", [nc1_pinv, vci])
@pytest.mark.parametrize("write", [lambda H, y: H.__imul__(3), lambda H, y: H.__setitem__(slice(None), H[::-1].copy()),
                                   lambda H, y: y.__setitem__(slice(None), y[::-1].copy())])
def test_an_array_that_is_used_again_is_refused(D, measure, write):
    H, y = (t.numpy() for t in make(3, D, [200, 150, 200], dtype=torch.float32))
    stats = ClassStatistics.from_features(H, y, num_classes=3)
    write(H, y)
    with pytest.raises(ValueError, match="changed in place"): measure(stats)


def test_gradients_inference_mode_and_subclasses_are_no_matter():
    H, y = make(3, 4, [5, 6, 7])
    class Sub(torch.Tensor): pass
    with torch.inference_mode(): inference = ClassStatistics.from_features(H.clone(), y, num_classes=3)
    for stats in (inference, ClassStatistics.from_features(H.clone().requires_grad_(), y, num_classes=3),
                  ClassStatistics.from_features(H.as_subclass(Sub), y.as_subclass(Sub), num_classes=3),
                  ClassStatistics.from_features(H, y.to(torch.uint8), num_classes=3)):
        assert type(stats.means) is torch.Tensor and not stats.means.requires_grad
        close(vci(stats), two_pass(H, y, 3)["vci"], 1e-9)


def test_trace_keeps_no_matrix_and_no_features():
    H, y = make(3, 50, [5, 6, 7])
    for stats in (ClassStatistics(3, 50).update(H, y),
        ClassStatistics.from_features(H, y, num_classes=3, within="trace")):
        assert stats.scatter is None and not stats._features
        assert sum(t.numel() for t in vars(stats).values() if isinstance(t, torch.Tensor)) == 3 + 3 * 50 + 3
        close(nc1_trace(stats), two_pass(H, y, 3)["nc1_trace"], 1e-9)
        with pytest.raises(ValueError, match="within='full'"): nc1_pinv(stats)
        with pytest.raises(ValueError, match="within='full'"): vci(stats)


def test_an_empty_batch_changes_nothing():
    H, y = make(2, 3, [4, 5])
    stats = ClassStatistics(2, 3, within="full").update(H, y)
    before = stats.means.clone()
    stats.update(H[:0], y[:0])
    assert torch.equal(stats.means, before) and stats.counts.tolist() == [4, 5]


# ---- bad input

good = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("H, y, says", [
    (torch.zeros(6), good[1], "pool over space"), (torch.zeros(6, 2, 4, 4), good[1], "pool over space"),
    (torch.zeros(6, 3), good[1], r"expected \(B, 2\)"), (good[0][:5], good[1], "one label a row"),
    (good[0], good[1][:, None], "one label a row"), (good[0], good[1].float(), r"expected integers 0..2"),
    (good[0], good[1] > 0, "expected integers"), (good[0], good[1] + 1, "run from 1 to 3"),
    (good[0], good[1] - 1, "run from -1 to 1"), (good[0].long(), good[1], "floating point"),
    (good[0] / 0, good[1], "6 of 6 feature rows"),
        (good[0].index_fill(0, torch.tensor([4]), torch.inf), good[1], "row 4"),
])
def test_a_bad_batch_is_refused_and_leaves_no_trace(H, y, says):
    stats = ClassStatistics(3, 2, within="full")
    with pytest.raises(ValueError, match=says): stats.update(H, y)
    assert stats.counts.sum() == 0 and not stats.means.any() and not stats.scatter.any()
    if "(B, 2)" not in says.replace("\\", ""):
        with pytest.raises(ValueError, match=says): ClassStatistics.from_features(H, y, num_classes=3)


@pytest.mark.parametrize("make_bad, says", [
    (lambda: ClassStatistics(1, 2), "num_classes is 1"), (lambda: ClassStatistics(3, 0), "dim is 0"),
    (lambda: ClassStatistics(3, 2, within="diag"), "'trace'"),
    (lambda: ClassStatistics(3, 2, class_counts=[1, 2, 3]), "within='full'"),
    (lambda: ClassStatistics(3, 2, within="full", class_counts=[1, 2]), "3 positive whole numbers"),
    (lambda: ClassStatistics(3, 2, within="full", class_counts=[1, 2, 0]), "3 positive whole numbers"),
    (lambda: ClassStatistics.from_features(torch.zeros(0, 2), torch.zeros(0).long(), num_classes=3),
        "at least one sample"),
    (lambda: ClassStatistics.from_features(*good, num_classes=1), "num_classes is 1"),
    (lambda: ClassStatistics.from_features(*good, num_classes=3, weighting="mean"), "weighting is 'mean'"),
    (lambda: ClassStatistics(3, 2) + ClassStatistics(4, 2), "num_classes=3 and num_classes=4"),
    (lambda: ClassStatistics(3, 2) + ClassStatistics(3, 5), "dim=2 and dim=5"),
    (lambda: ClassStatistics(3, 2) + ClassStatistics(3, 2, within="full"), "within="),
    (lambda: ClassStatistics(3, 2).all_reduce(), "init_process_group"),
    (lambda: nc1_trace(ClassStatistics.from_features(*good, num_classes=3), "both"), "weighting is 'both'"),
    (lambda: ClassStatistics.from_features(*good, num_classes=3).class_variances(ddof=2), "ddof=2"),
    (lambda: simplex_etf(4, 2), "dim >= 3"), (lambda: simplex_gram(1), "2 or more"),
])
def test_bad_use_is_refused(make_bad, says):
    with pytest.raises(ValueError, match=says): make_bad()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_empty_classes_are_named_and_never_count_as_zero(measure, weighting):
    stats = ClassStatistics.from_features(*good, num_classes=5)
    with pytest.raises(ValueError, match=r"2 of 5 classes have no samples \(3, 4\)"): value(measure, stats, weighting)


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3])
def test_class_means_that_coincide_are_refused(value):
    H, y = torch.full((31, 4), value).double(), torch.arange(31) % 3
    H[:6] += torch.tensor([1.0, 1, 1, -1, -1, -1])[:, None]  # a spread, around one and the same mean
    stats = ClassStatistics.from_features(H, y, num_classes=3)
    for measure in (nc1_trace, nc1_pinv, vci):
        with pytest.raises(ValueError, match="all class means coincide"): measure(stats)
    with pytest.raises(ValueError, match="have the same mean"): cdnv(stats)


def test_two_classes_of_many_that_coincide():
    H, y = make(100, 3, [2] * 100)
    H[y == 97] = H[y == 66]
    stats = ClassStatistics.from_features(H, y, num_classes=100)
    with pytest.raises(ValueError, match="classes 66 and 97"): cdnv(stats)
    assert nc1_trace(stats) > 0


# ---- several processes

def shares(rank):
    "Uneven shares: the second process has a few samples, and none of class 0."
    H, y = make(3, 70, [40, 30, 35], offset=5.0)
    mine = torch.arange(105) % 2 == 0 if rank is None else ((torch.arange(105) < 90) | (y == 0)) == (rank == 0)
    return (H, y) if rank is None else (H[mine], y[mine])


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        H, y = shares(rank)
        states = {"trace": ClassStatistics(3, 70).update(H, y),
                  "full": ClassStatistics(3, 70, within="full", class_counts=[40, 30, 35]).update(H, y),
                  "memory": ClassStatistics.from_features(H, y, num_classes=3)}
        for name, stats in states.items():
            stats.all_reduce()
            torch.save((stats.counts, stats.means, stats.class_scatter, stats.scatter), f"{folder}/{name}{rank}.pt")
        try: ClassStatistics(3 + rank, 70).all_reduce()
        except ValueError as error: assert "num_classes=3 and num_classes=4" in str(error)
        else: raise AssertionError("processes with different K must not merge")
    finally: dist.destroy_process_group()


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_of_features_of_unequal_classes_says_what_it_keeps(again):
    "The scatter of all samples, or the one that was asked for; the error says how to ask."
    H, y = torch.randn(60, 5), torch.cat([torch.arange(3), torch.zeros(57)]).long()
    whole = ClassStatistics.from_features(H, y, num_classes=3)
    one = ClassStatistics.from_features(H, y, num_classes=3, weighting="class")
    assert torch.allclose(again(whole).within_covariance("sample"), whole.within_covariance("sample"))
    with pytest.raises(ValueError, match="copied, pickled or updated, unless made with weighting='class'"):
        again(whole).within_covariance("class")
    assert torch.allclose(again(one).within_covariance("class"), whole.within_covariance("class"))
    assert torch.allclose((whole + whole).within_covariance("class"), whole.within_covariance("class"))


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one(tmp_path):
    mp.spawn(work, args=(tmp_path,), nprocs=2)
    H, y = shares(None)
    local = [shares(rank) for rank in range(2)]
    assert (local[1][1] != 0).all() and len(local[1][1]) < len(local[0][1]) / 4
    sums = {"trace": sum(ClassStatistics(3, 70).update(*part) for part in local),
            "full": sum(ClassStatistics(3, 70, within="full", class_counts=[40, 30, 35]).update(*part)
                for part in local),
            "memory": sum(ClassStatistics(3, 70, within="full").update(*part) for part in local)}
    for name, merged in sums.items():
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        for a, b, c in zip(first, second, (merged.counts, merged.means, merged.class_scatter, merged.scatter),
            strict=True):
            assert (a is b is c is None) or torch.equal(a, b), "all processes end with the same bits"
            if a is not None: close(a, c, 1e-12)
    check_all(sums["full"], two_pass(H, y, 3), rtol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    H, y = make(3, 70, [40, 30, 35], dtype=torch.float32)
    expected = two_pass(H, y, 3)
    check_all(ClassStatistics.from_features(H.cuda(), y, num_classes=3), {k: v.cuda() for k, v in expected.items()})
    stream = ClassStatistics(3, 70, within="full", class_counts=[40, 30, 35], device="cuda")
    check_all(stream.update(H, y), {k: v.cuda() for k, v in expected.items()})


# -- some of the classes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["stream", "weighted", "memory", "trace"])
def test_classes_taken(kind):
    "The classes that occur, in another order and with a place for one more, are as if they had been numbered so."
    y = torch.tensor([7, 2, 7, 9, 2, 7, 9, 9, 9])
    H, number = torch.randn(len(y), 3), torch.full((10,), -1).index_put((torch.tensor([9, 2, 7]),), torch.arange(3))
    def build(y, K, extra=0):
        if kind == "memory": return ClassStatistics.from_features(H, y, K)
        sizes = y.bincount(minlength=K).clamp(min=1) if kind == "weighted" else None
        return ClassStatistics(K, 3, "trace" if kind == "trace" else "full", sizes).update(H, y)
    taken, direct = build(y, 10).take(torch.tensor([9, 2, 7])), build(number[y], 3)
    for name in ("counts", "means", "class_scatter"):
        assert torch.allclose(getattr(taken, name), getattr(direct, name)), name
    assert taken.within == direct.within and (kind == "trace" or torch.allclose(taken.scatter, direct.scatter))
    if kind in ("weighted", "memory"): assert torch.allclose(taken.within_covariance(), direct.within_covariance())
    room = build(y, 10).take(torch.tensor([9, 2, 7, -1]))
    assert room.counts.tolist() == [4, 2, 3, 0]
    if kind == "stream": assert torch.allclose(room.update(H, y.clamp(max=3)).counts, torch.tensor([4, 2, 5, 7]))
    fewer = build(y, 10).take(torch.tensor([7, 2]))
    assert fewer.within == "trace" and torch.allclose(fewer.class_variances(), direct.class_variances()[[2, 1]])


@pytest.mark.parametrize("classes", [[0, 0], [0, 3], [0.0, 1.0]])
def test_classes_that_cannot_be_taken(classes):
    with pytest.raises(ValueError, match="each once"): ClassStatistics(3, 2).take(torch.tensor(classes))


# ---- long features, read in float32

def long_features(K, D, N, *, seed=0, spread=1.0, offset=0.0, decay=0.0, dtype=torch.float32):
    "Features (N, D) of K classes of unequal size, whose spread falls by `decay` decades over directions; all classes."
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(K), torch.randint(K, (2, N - K), generator=g).amin(0)])
    noise = torch.randn(N, D, generator=g, dtype=torch.float64) * torch.logspace(0, -decay, D, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0]
    return (torch.randn(K, D, generator=g, dtype=torch.float64)[y] + spread * noise @ turn + offset).to(dtype), y


@pytest.mark.parametrize("K, D, N", [(10, 256, 1500), (90, 300, 2500), (3, 700, 900), (400, 256, 1200)])
@pytest.mark.parametrize("spread, offset, decay", [(1, 0, 0), (1e-4, 1, 0), (1, 100, 1), (0.1, 0, 6)])
def test_long_float32_features_are_measured_as_in_float64(K, D, N, spread, offset, decay):
    H, y = long_features(K, D, N, spread=spread, offset=offset, decay=decay)
    for weighting in WEIGHTINGS:
        exact, stats = (ClassStatistics.from_features(X, y, num_classes=K) for X in (H.double(), H))
        close(stats.means - exact.means, 0, 0, 1e-6 * spread)
        close(stats.class_scatter, exact.class_scatter, 1e-6)
        for measure in (nc1_trace, cdnv, nc1_pinv, vci):
            expected = value(measure, exact, weighting)
            assert abs(value(measure, stats, weighting) - expected) <= 5e-6 * expected + 1e-12, measure.__name__
        again = ClassStatistics.from_features(H, y, num_classes=K)
        vci(again, weighting)  # leaves its covariance to nc1_pinv
        close(nc1_pinv(again, weighting), nc1_pinv(exact, weighting), 5e-6)
        close(again.within_covariance(weighting), exact.within_covariance(weighting), 1e-5)


def test_an_outlier_as_the_first_sample_and_numbers_beyond_squares_in_float32():
    H, y = long_features(4, 256, 600)
    first = H.clone()
    first[:4] *= 1e5
    for X in (first, H * 1e-20, H * 1e-25, H * 1e25, torch.where(y[:, None] == 2, H[2], H), H.bfloat16()):
        stats, exact = (ClassStatistics.from_features(h, y, num_classes=4) for h in (X, X.double()))
        close(stats.means, exact.means, 1e-7)
        close(stats.class_scatter, exact.class_scatter, 1e-6)
        close(vci(stats), vci(exact), 1e-5)
        close(nc1_pinv(stats), nc1_pinv(exact), 1e-5)  # after vci, whose covariance it uses


def test_an_exact_simplex_of_long_features_gives_zero():
    points = (simplex_etf(5, 300, seed=1) + 7).float()
    stats = ClassStatistics.from_features(points[torch.arange(60) % 5], torch.arange(60) % 5, num_classes=5)
    assert all(0 <= measure(stats) < 1e-12 for measure in MEASURES)


def test_a_class_without_samples_among_long_features():
    H, y = long_features(4, 256, 300)
    stats = ClassStatistics.from_features(H, y + (y > 1), num_classes=5)
    assert stats.counts[2] == 0 and not stats.means[2].any()
    with pytest.raises(ValueError, match="no samples"): nc1_trace(stats)


def test_reduced_precision_is_not_used_for_long_features():
    H, y = long_features(4, 256, 600, spread=1e-3)
    expected = [measure(ClassStatistics.from_features(H.double(), y, num_classes=4)) for measure in MEASURES]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        found = [measure(ClassStatistics.from_features(H, y, num_classes=4)) for measure in MEASURES]
    finally: torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        cast = [measure(ClassStatistics.from_features(H, y, num_classes=4)) for measure in MEASURES]
    close(found, expected, 1e-5)
    close(cast, expected, 1e-5)
