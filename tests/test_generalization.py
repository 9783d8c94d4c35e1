"Train, weak and strong test collapse: the order, the definitions, known optima, invariances, bad input."

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nc_nbdev as nc
from nc_nbdev.geometry import generalization as gen
from nc_nbdev.geometry.etf import simplex_etf

FEW = settings(max_examples=60, deadline=None)


def by_definition(H, y, H_test, y_test, K):
    "train, test and strong, sample by sample in float64."
    H, H_test = H.double(), H_test.double()
    mu = torch.stack([H[y == c].mean(0) for c in range(K)])
    between = (mu - mu.mean(0)).square().sum(1).mean().item()
    test_sum = sum(
        (H_test[y_test == c] - H_test[y_test == c].mean(0)).square().sum().item() for c in range(K)
            if (y_test == c).any()
    )
    train = (H - mu[y]).square().sum(1).mean().item()
    strong = (H_test - mu[y_test]).square().sum(1).mean().item()
    return train / between, test_sum / len(H_test) / between, strong / between


@st.composite
def splits(draw):
    "Two random splits: any K, D, sizes, offset and spread; test sets may lack classes and hold few distinct points."
    K, D = draw(st.integers(2, 6)), draw(st.integers(1, 8))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    y = torch.cat([torch.arange(K), torch.randint(K, (draw(st.integers(0, 30)),))])
    y_test = torch.randint(K, (draw(st.integers(1, 30)),))
    offset, spread = draw(st.sampled_from([0, 1, 100])), draw(st.sampled_from([0, 1e-4, 0.1, 3]))
    mu = torch.randn(K, D, dtype=torch.float64)
    H = offset + mu[y] + spread * torch.randn(len(y), D)
    H_test = offset + mu[y_test] + spread * torch.randn(len(y_test), D)
    if draw(st.booleans()):  # few distinct test points: fewer than K, or more
        distinct = H_test[: draw(st.integers(1, K + 2))]
        H_test = distinct[torch.randint(len(distinct), (len(H_test),))]
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return H.to(dtype), y, H_test.to(dtype), y_test, K


@FEW
@given(splits())
def test_weak_below_test_below_strong(data):
    H, y, H_test, y_test, K = data
    t = nc.test_collapse(H, y, H_test, y_test, num_classes=K, restarts=1)
    assert 0 <= t.weak_lower <= t.weak <= t.test <= t.strong
    streams = nc.ClassStatistics(K, H.shape[1]).update(H, y), nc.ClassStatistics(K, H.shape[1], "full").update(H_test,
        y_test)
    s = gen.test_collapse_from_statistics(*streams)
    assert s.weak is None and 0 <= s.weak_lower <= s.test <= s.strong
    assert s.weak_lower == pytest.approx(t.weak_lower, rel=1e-6, abs=1e-10)
    train, test, strong = by_definition(*data)
    size, between = torch.cat([H, H_test]).abs().max().item(), nc.ClassStatistics.from_features(H, y, K).between_trace()
    for value, expected in ((t.train, train), (t.test, test), (t.strong, strong)):
        rounding = 1e-15 * size * (expected / between) ** 0.5        # of differences of numbers of this size
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-18 + rounding)


@FEW
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(2, 7), st.integers(1, 3))
def test_weak_variance_is_an_upper_bound_of_the_optimum_and_near_it(seed, K, N, D):
    torch.manual_seed(seed)
    H = torch.randn(N, D, dtype=torch.float64)
    if seed % 3 == 0: H = H.round()  # ties and repeated points

    def cost(part):
        parts = [H[torch.tensor(part) == k] for k in set(part)]
        return sum((p - p.mean(0)).square().sum().item() for p in parts) / N

    optimum = min(cost(part) for part in itertools.product(range(K), repeat=N))
    assert gen.weak_variance(H, K, restarts=1) >= optimum * (1 - 1e-9)
    assert gen.weak_lower_bound(H, K) <= optimum * (1 + 1e-9) + 1e-15
    assert gen.weak_lower_bound(H, K, steps=15) <= optimum * (1 + 1e-9) + 1e-12
    # no start is sure to find it; k-means++ is within 8 (ln K + 2) of it on average, and 20 of them in practice near 1
    assert gen.weak_variance(H, K, restarts=20) <= 1.2 * optimum + 1e-12


@pytest.mark.parametrize("K", [2, 3, 5])
def test_weak_variance_on_a_line(K):
    torch.manual_seed(K)
    line = torch.randn(24, 1, dtype=torch.float64).sort(0).values
    cuts = [[0, *c, 24] for c in itertools.combinations(range(1, 24), K - 1)]
    costs = [sum((line[a:b] - line[a:b].mean()).square().sum().item() for a, b in itertools.pairwise(c)) for c in cuts]
    assert gen.weak_variance(line, K, restarts=20) == pytest.approx(min(costs) / 24, rel=1e-9)


def test_weak_variance_uses_its_starts():
    # two far pairs and one random start that cannot be trusted: the initial points alone give the optimum
    H = torch.tensor([[0.0, 0], [0, 1], [100, 0], [100, 1]])
    assert gen.weak_variance(H, 2, initial=[torch.tensor([[0.0, 0.5], [100, 0.5]])], restarts=0) == pytest.approx(0.25)
    # a start that is a local optimum of Lloyd's algorithm stays one: an upper bound, not the optimum
    assert gen.weak_variance(H, 2, initial=[torch.tensor([[50.0, 0], [50, 1]])], restarts=0) == pytest.approx(2500)
    # all initial points in one place, so that parts are empty
    assert gen.weak_variance(H, 2, initial=[torch.zeros(2, 2)], restarts=0) == pytest.approx(0.25)


def test_weak_variance_of_discrete_features_is_zero():
    torch.manual_seed(0)
    points = 1000 + torch.randn(10, 700)
    assert gen.weak_variance(points[torch.randint(10, (300,))], 10) < 1e-20  # N < D
    assert gen.weak_variance(points[torch.randint(10, (900,))], 10) < 1e-20  # N > D
    assert gen.weak_variance(points[torch.randint(3, (300,))], 10) < 1e-20  # fewer distinct points than K
    assert gen.weak_variance(points[:7], 10) == 0  # fewer samples than K
    assert gen.weak_variance(points[torch.randint(10, (300,))], 9) > 1


def test_lower_bound_of_known_features():
    torch.manual_seed(0)
    points = torch.randn(6, 40)
    assert gen.weak_lower_bound(points[torch.arange(60) % 6], 6) < 1e-12  # discrete
    assert gen.weak_lower_bound(points[torch.arange(60) % 6], 5) > 0
    H = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([5.0, 2, 1])
    variances = torch.linalg.eigvalsh(torch.cov(H.T, correction=0))
    for k, expected in enumerate([variances.sum(), variances[:2].sum(), variances[0], 0], start=1):
        assert gen.weak_lower_bound(H, k) == pytest.approx(float(expected))
    assert gen.weak_lower_bound(H + 100, 2) == pytest.approx(gen.weak_lower_bound(H, 2))
    with pytest.raises(ValueError, match="finite"): gen.weak_lower_bound(H * torch.nan, 2)
    with pytest.raises(ValueError, match="no samples"): gen.weak_lower_bound(nc.ClassStatistics(2, 3), 2)
    stream = nc.ClassStatistics(2, 3).update(H, torch.arange(500) % 2)
    with pytest.raises(ValueError, match="keeps no covariance"): gen.weak_lower_bound(stream, 2)


@pytest.mark.parametrize("K, spread", [(3, 0.2), (3, 1.0), (6, 0.5)])
def test_the_certified_bound_lies_between_the_spectral_one_and_k_means(K, spread):
    torch.manual_seed(K)
    H = torch.randn(K, 5, dtype=torch.float64)[torch.arange(90) % K] + spread * torch.randn(90, 5, dtype=torch.float64)
    bounds = [gen.weak_lower_bound(H, K, steps=steps) for steps in (0, 5, 20, 80)]
    assert all(b <= gen.weak_variance(H, K, restarts=20) * (1 + 1e-9) for b in bounds)
    assert bounds[0] <= min(bounds[1:]) + 1e-12 and bounds[-1] > 1.2 * bounds[0]
    turned = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert gen.weak_lower_bound(3 * H @ turned + 7, K, steps=20) == pytest.approx(9 * bounds[2], rel=1e-6)


def test_the_certified_bound_of_known_features():
    line = torch.tensor([[0.0], [0.1], [1], [1.1], [5], [5.1]], dtype=torch.float64)
    assert gen.weak_lower_bound(line, 3) == 0 and gen.weak_variance(line, 3) == pytest.approx(0.0025)
    assert gen.weak_lower_bound(line, 3, steps=200) == pytest.approx(0.0025, rel=0.02)
    assert gen.weak_lower_bound(line.repeat(5, 1) * 0, 3, steps=3) == 0      # no scatter at all
    assert gen.weak_lower_bound(line[:3], 3, steps=3) == 0                   # every sample is its own point
    with pytest.raises(ValueError, match="finite"): gen.weak_lower_bound(line * torch.nan, 2, steps=3)


def test_many_samples_are_bounded_in_parts():
    torch.manual_seed(0)
    H = torch.randn(4, 3, dtype=torch.float64)[torch.arange(900) % 4] + 0.3 * torch.randn(900, 3, dtype=torch.float64)
    assert 0.6 < gen.weak_lower_bound(H, 4, steps=30) / gen.weak_variance(H, 4) <= 1


def test_rotation_into_the_span_is_exact():
    torch.manual_seed(0)
    H = torch.randn(40, 6, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(90, 6, dtype=torch.float64))
    assert gen.weak_variance(H @ Q.T + 5, 4, seed=1) == pytest.approx(gen.weak_variance(H, 4, seed=1), rel=1e-6)


def test_statistics_give_the_same_without_weak():
    torch.manual_seed(0)
    H, H_test = 100 + torch.randn(90, 7), 101 + torch.randn(60, 7)
    y, y_test = torch.arange(90) % 4, torch.randint(3, (60,))  # class 3 is absent from the test set
    train, test = nc.ClassStatistics(4, 7), nc.ClassStatistics(4, 7)
    for a in range(0, 90, 16): train.update(H[a : a + 16], y[a : a + 16])
    for a in range(0, 60, 7): test.update(H_test[a : a + 7], y_test[a : a + 7])
    streamed = gen.test_collapse_from_statistics(train, test)
    t = nc.test_collapse(H, y, H_test, y_test)
    assert streamed.weak is None and streamed.weak_lower is None  # these streams keep no covariance
    weighted = nc.ClassStatistics(4, 7, "full", test.counts.clamp(min=1)).update(H_test, y_test)
    assert gen.test_collapse_from_statistics(train, weighted).weak_lower is None  # nor one of all samples alike
    full = nc.ClassStatistics(4, 7, "full").update(H_test, y_test)
    assert gen.test_collapse_from_statistics(train, full).weak_lower == pytest.approx(t.weak_lower)
    for name in ("train", "test", "strong"):
        assert getattr(streamed, name) == pytest.approx(getattr(t, name), rel=1e-10)
    assert (t.train, t.test, t.strong) == pytest.approx(by_definition(H, y, H_test, y_test, 4), rel=1e-9)


def test_invariances():
    torch.manual_seed(0)
    H, H_test = torch.randn(80, 5, dtype=torch.float64), torch.randn(70, 5, dtype=torch.float64)
    y, y_test = torch.arange(80) % 3, torch.randint(3, (70,))
    H, H_test = H + 8 * torch.eye(3, 5)[y], H_test + 8 * torch.eye(3, 5)[y_test]
    Q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    order = torch.tensor([2, 0, 1])
    moved = nc.test_collapse(7 * (H @ Q - 30), order[y], 7 * (H_test @ Q - 30), order[y_test])
    assert list(moved.to_dict().values()) == pytest.approx(list(nc.test_collapse(H, y, H_test,
        y_test).to_dict().values()))


def test_same_seed_same_bits():
    torch.manual_seed(0)
    args = torch.randn(50, 4), torch.arange(50) % 5, torch.randn(200, 4), torch.randint(5, (200,))
    assert nc.test_collapse(*args, seed=3) == nc.test_collapse(*args, seed=3)


@pytest.mark.parametrize("offset, spread", [(0, 1e-4), (100, 1), (10, 0.1), (1, 1e-2)])
def test_float32_agrees_with_float64(offset, spread):
    torch.manual_seed(0)
    y, y_test = torch.arange(1000) % 10, torch.arange(500) % 10
    mu = simplex_etf(10, 64).double()
    H = (offset + mu[y] + spread * torch.randn(1000, 64)).float()
    H_test = (offset + mu[y_test] + 2 * spread * torch.randn(500, 64)).float()
    t = nc.test_collapse(H, y, H_test, y_test)
    assert (t.train, t.test, t.strong) == pytest.approx(by_definition(H, y, H_test, y_test, 10), rel=1e-5)


def test_exact_simplex():
    M, y = simplex_etf(10, 30).double() + 3, torch.arange(10).repeat(4)
    t = nc.test_collapse(M[y], y, M[y], y)
    assert max(t.to_dict().values()) < 1e-12


def test_label_noise_under_strong_collapse_costs_what_the_notebook_says():
    M, y = simplex_etf(5, 8).double(), torch.arange(5).repeat(20)
    wrong = torch.where(torch.arange(100) < 30, (y + 1) % 5, y)
    t = nc.test_collapse(M[y], y, M[wrong], y)
    assert t.weak < 1e-12 and t.strong == pytest.approx(2 * 5 / 4 * 0.3)


def test_bad_settings():
    torch.manual_seed(0)
    H, y = torch.randn(12, 4), torch.arange(12) % 3
    with pytest.raises(ValueError, match="weighting"): nc.test_collapse(H, y, H, y, weighting="mean")
    with pytest.raises(ValueError, match="start"): gen.weak_variance(H, 3, restarts=0)
    a, b = nc.ClassStatistics.from_features(H, y, num_classes=3), nc.ClassStatistics(3, 4)
    with pytest.raises(ValueError, match="no samples"): gen.test_collapse_from_statistics(a, b)
    with pytest.raises(ValueError, match="ClassStatistics"): gen.test_collapse_from_statistics(H, a)
    with pytest.raises(ValueError, match="classes"): gen.test_collapse_from_statistics(a, nc.ClassStatistics(4, 4))
