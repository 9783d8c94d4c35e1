"""What holds for every measure, whatever the features: invariances, streams, shrinking, order and bounds.

`pytest --hypothesis-profile=long tests/test_properties.py` draws 1,000 examples of each, above 10,000 in all.
"""

import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

import nc_nbdev as nc
from nc_nbdev.geometry import nearest_centre
from nc_nbdev.geometry.duality import nc3_bias, nc3_cosine, nc3_duality, nc3_etf
from nc_nbdev.geometry.etf import simplex_etf
from nc_nbdev.geometry.generalization import test_collapse_from_statistics as from_statistics
from nc_nbdev.geometry.generalization import weak_lower_bound
from nc_nbdev.geometry.means import (
    log_uniformity,
    nc2_angles,
    nc2_etf,
    nc2_max_angle,
    nc2_norms,
    one_vs_rest_margin,
    riesz_uniformity,
)
from nc_nbdev.geometry.ood import nc5_ood
from nc_nbdev.geometry.variability import cdnv, nc1_pinv, nc1_trace, vci

LONG = settings.default.max_examples > 100
several = settings(max_examples=1000 if LONG else 40, deadline=None, derandomize=not LONG,
                   suppress_health_check=list(HealthCheck))

OF_STATISTICS = {f.__name__: f for f in (nc1_trace, nc1_pinv, vci, cdnv, nc2_norms, nc2_angles, nc2_max_angle, nc2_etf,
                                         one_vs_rest_margin, log_uniformity)}
OF_STATISTICS["riesz_uniformity"] = partial(riesz_uniformity, exponent=2.0)
OF_W = {f.__name__: f for f in (nc3_duality, nc3_etf, nc3_cosine)}


class Features:
    "Float64 features of classes that differ in size, place and spread, with a classifier."

    def __init__(self, sizes, D, seed, spread=1.0):
        self.K, self.D, g = len(sizes), D, torch.Generator().manual_seed(seed)
        self.normal = normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
        self.permutation = lambda n: torch.randperm(n, generator=g)
        y = torch.arange(self.K).repeat_interleave(torch.tensor(sizes))
        self.y = y[self.permutation(len(y))]
        self.mu = normal(self.K, D)
        self.H = self.mu[self.y] + spread * (1 + self.y[:, None] % 3) * (normal(len(y), D) @ normal(D, D) / D**0.5)
        self.W, self.b = normal(self.K, D), normal(self.K)

    def statistics(self, H=None, y=None):
        return nc.ClassStatistics.from_features(self.H if H is None else H, self.y if y is None else y, self.K)

    def rotation(self): return torch.linalg.qr(self.normal(self.D, self.D))[0]


sizes_of_classes = st.integers(2, 6).flatmap(lambda K: st.lists(st.integers(2, 12), min_size=K, max_size=K))
problems = st.builds(Features, sizes_of_classes, st.integers(2, 9), st.integers(0, 10**6),
                     st.sampled_from([1e-3, 0.1, 1.0, 10.0]))


def well_posed(f, stats):
    "Leave out means that nearly coincide: the number of their directions is then a matter of rounding."
    s = torch.linalg.svdvals(stats.centred_means())[: min(f.K - 1, f.D)]
    norms = stats.centred_means().norm(dim=1)
    assume(s[-1] > 1e-3 * s[0] and norms.min() > 1e-2 * norms.max())
    return stats


def same(found, expected, rtol=1e-6, atol=1e-8): assert found == pytest.approx(expected, rel=rtol, abs=atol)


# --- invariances ----------------------------------------------------------------------------------


@several
@given(problems, st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_rotation_scale_shift_and_order_change_no_measure_of_statistics(f, scale, shift):
    before = well_posed(f, f.statistics())
    names, order = f.permutation(f.K), f.permutation(len(f.y))
    H = scale * (f.H @ f.rotation() + shift * f.normal(f.D))
    after = f.statistics(H[order], names[f.y[order]])
    for name, measure in OF_STATISTICS.items(): same(measure(after), measure(before)), name


@several
@given(problems, st.floats(1e-2, 1e2), st.floats(1e-2, 1e2))
def test_a_common_rotation_and_two_scales_change_no_measure_of_duality(f, scale_W, scale_M):
    M = well_posed(f, f.statistics()).centred_means()
    Q, names = f.rotation(), f.permutation(f.K)
    for measure in OF_W.values():
        same(measure(scale_W * (f.W @ Q)[names], scale_M * (M @ Q)[names]), measure(f.W, M))
    stats, turned = f.statistics(), f.statistics(f.H @ Q)
    same(nc3_bias(f.W @ Q, f.b, turned), nc3_bias(f.W, f.b, stats))
    far = f.normal(20, f.D) + 3
    same(nc5_ood(scale_M * (stats.means @ Q), scale_M * (far @ Q)), nc5_ood(stats, far))


@several
@given(problems, st.floats(1e-2, 1e2), st.floats(-10, 10))
def test_decisions_follow_rotation_scale_and_shift(f, scale, shift):
    means, Q = f.statistics().means, f.rotation()
    decision, near = nearest_centre.both_decisions(f.H, f.W, f.b, means)
    gap = torch.cdist(f.H, means).topk(2, 1, largest=False).values.diff(dim=1)
    margin = (f.H @ f.W.T + f.b).topk(2, 1).values.diff(dim=1)
    assume(gap.abs().min() > 1e-6 and margin.abs().min() > 1e-6)
    s = shift * f.normal(f.D)
    moved = [scale * (A @ Q + s) for A in (f.H, means)]
    W = f.W @ Q / scale
    assert nearest_centre.nearest_centre(*moved).equal(near)
    assert nearest_centre.classifier_decision(moved[0], W, f.b - scale * W @ s).equal(decision)


@several
@given(problems, st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_the_dtype_of_features_is_not_the_precision_of_measures(f, dtype):
    H = f.H.to(dtype)
    low, high = f.statistics(H), well_posed(f, f.statistics(H.double()))
    for measure in OF_STATISTICS.values(): same(measure(low), measure(high), 1e-9, 1e-12)


# --- streaming = merging = one shot ---------------------------------------------------------------


def cut(f, pieces):
    "Random uneven pieces, empty ones among them."
    part = torch.randint(pieces, (len(f.y),), generator=torch.Generator().manual_seed(int(f.y.sum())))
    return [(f.H[part == i], f.y[part == i]) for i in range(pieces)]


@several
@given(problems, st.integers(1, 6))
def test_streams_and_sums_are_the_whole(f, pieces):
    whole, counts = well_posed(f, f.statistics()), f.y.bincount(minlength=f.K)
    stream = nc.ClassStatistics(f.K, f.D, "full", counts)
    parts = [nc.ClassStatistics(f.K, f.D, "full", counts).update(*piece) for piece in cut(f, pieces)]
    for piece in cut(f, pieces): stream.update(*piece)
    in_memory = [f.statistics(*piece) for piece in cut(f, pieces) if len(piece[1])]
    expected = {name: measure(whole) for name, measure in OF_STATISTICS.items()}
    for stats in (stream, sum(parts), sum(reversed(parts)), sum(in_memory), sum(in_memory[1:]) + in_memory[0]):
        assert stats.counts.equal(counts)
        for name, measure in OF_STATISTICS.items(): same(measure(stats), expected[name], 1e-7, 1e-9)


# --- towards collapse -----------------------------------------------------------------------------


@several
@given(problems, st.floats(0, 1))
def test_shrinking_towards_the_means(f, t):
    stats = well_posed(f, f.statistics())
    closer = f.statistics(stats.means[f.y] + t * (f.H - stats.means[f.y]))
    for measure in (nc1_trace, nc1_pinv, cdnv): same(measure(closer), t**2 * measure(stats), 1e-6, 1e-12)
    assert vci(closer) <= vci(stats) * (1 + 1e-9) + 1e-12
    for measure in (nc2_norms, nc2_angles, nc2_max_angle, nc2_etf): same(measure(closer), measure(stats))
    for measure in OF_W.values(): same(measure(f.W, closer), measure(f.W, stats))
    shrunk = stats.means[f.y] + t * (f.H - stats.means[f.y])
    accuracy = [nearest_centre.ncc_accuracy(H, f.y, stats.means) for H in (shrunk, f.H)]
    assert accuracy[0] >= accuracy[1] - 1e-12 and (t > 0 or accuracy[0] == 1)


@several
@given(st.integers(2, 8), st.integers(0, 6), st.integers(0, 10**6), st.floats(1e-3, 1e3), st.integers(1, 5))
def test_at_collapse_every_measure_is_at_its_end(K, extra, seed, scale, n):
    M = scale * simplex_etf(K, K - 1 + extra, seed=seed)
    y = torch.arange(K).repeat(n)
    m = nc.measure_features(M[y] + 7, y, num_classes=K, head=(M, None)).to_dict()
    ends = {"nc3_cosine": 1, "ncc_accuracy": 1}
    unbound = {"one_vs_rest_margin", "nc3_bias", "nc4_disagreement"}   # no simplex is missing; W 7 is no 0
    for name in m.keys() - unbound: same(m[name], ends.get(name, 0), atol=1e-7)


# --- order and bounds -----------------------------------------------------------------------------


@several
@given(problems, st.integers(0, 3))
def test_weak_is_below_test_is_below_strong(f, seed):
    train = f.statistics()
    order = f.permutation(len(f.y))[: max(2, len(f.y) // 2)]
    H, y = f.H[order] + 0.3 * f.normal(len(order), f.D), f.y[order]
    found = nc.test_collapse(f.H, f.y, H, y, restarts=1, seed=seed, num_classes=f.K)
    assert 0 <= found.weak_lower <= found.weak <= found.test <= found.strong * (1 + 1e-12)
    tighter = weak_lower_bound(H, f.K, steps=5) / train.between_trace()
    assert tighter <= found.weak * (1 + 1e-9) + 1e-12
    streamed = from_statistics(train, nc.ClassStatistics(f.K, f.D, "full").update(H, y))
    same([streamed.train, streamed.test, streamed.strong], [found.train, found.test, found.strong])
    own = from_statistics(train, train)
    same([own.test, own.strong, own.train], [nc1_trace(train, "sample") * train.between_trace("sample") /
                                             train.between_trace()] * 3)


@several
@given(problems)
def test_bounds(f):
    stats, K = well_posed(f, f.statistics()), f.K
    m, eps = nc.measure_features(f.H, f.y, num_classes=K, head=(f.W, f.b)).to_dict(), 1e-9
    lowest = {"nc3_cosine": -1}
    highest = {"vci": 1, "nc2_angles": 1, "nc2_max_angle": 1 + 1 / (K - 1), "nc2_etf": math.sqrt(2), "nc3_duality": 2,
               "nc3_etf": 2, "nc3_cosine": 1, "nc4_disagreement": 1, "ncc_accuracy": 1, "one_vs_rest_margin": 2}
    for name, value in m.items():
        if value is not None: assert lowest.get(name, 0) - eps <= value <= highest.get(name, math.inf) + eps, name
    assert m["nc1_pinv"] >= 0 and one_vs_rest_margin(stats) <= K / (K - 1) + 1e-7
    uniform = -0.5 * math.log(2 * K / (K - 1))
    assert riesz_uniformity(stats) >= log_uniformity(stats) - eps >= uniform - 2 * eps
    assert 0 <= nc5_ood(stats, f.normal(9, f.D)) <= 1 + eps
    again = nc.measure_collapse(stats, (f.W, f.b)).to_dict()
    same([m[k] for k, v in again.items() if v is not None], [v for v in again.values() if v is not None])


# --- statistics, in any order of calls ------------------------------------------------------------

K, D = 3, 4


class AnyOrder(RuleBasedStateMachine):
    "Statistics beside the samples they should know of."

    def __init__(self):
        super().__init__()
        self.known, self.folder = [], type(self).folder

    def sample(self, seed, n):
        g = torch.Generator().manual_seed(seed)
        H = 5 + torch.randn(n, D, generator=g)
        return H.double(), torch.randint(K, (n,), generator=g)

    def pick(self, i): return self.known[i % len(self.known)]

    @rule(seed=st.integers(0, 99), n=st.integers(1, 9), in_memory=st.booleans())
    def begin(self, seed, n, in_memory):
        H, y = self.sample(seed, n)
        if in_memory: stats = nc.ClassStatistics.from_features(H, y, K)
        else: stats = nc.ClassStatistics(K, D, "full").update(H, y)
        self.known = [*self.known[-3:], (stats, H.clone(), y)]

    @rule(i=st.integers(0, 9), seed=st.integers(0, 99), n=st.integers(0, 9))
    def update(self, i, seed, n):
        if not self.known: return
        stats, H, y = self.pick(i)
        h, c = self.sample(seed, n)
        assert stats.update(h, c) is stats
        self.known[i % len(self.known)] = stats, torch.cat([H, h]), torch.cat([y, c])
        h.zero_()   # what was read is kept

    @rule(i=st.integers(0, 9), j=st.integers(0, 9))
    def add(self, i, j):
        if not self.known: return
        (a, Ha, ya), (b, Hb, yb) = self.pick(i), self.pick(j)
        self.known = [*self.known[-3:], (a + b, torch.cat([Ha, Hb]), torch.cat([ya, yb]))]

    @rule(i=st.integers(0, 9))
    def copy(self, i):
        if not self.known: return
        stats, H, y = self.pick(i)
        self.known = [*self.known[-3:], (deepcopy(stats), H, y)]

    @rule(i=st.integers(0, 9))
    def all_reduce(self, i):
        if not self.known: return
        stats, _, _ = self.pick(i)
        assert stats.all_reduce() is stats

    @rule(i=st.integers(0, 9))
    def save_and_load(self, i):
        if not self.known: return
        stats, H, y = self.pick(i)
        torch.save(stats, self.folder / "stats.pt")
        with torch.serialization.safe_globals([nc.ClassStatistics]):
            loaded = torch.load(self.folder / "stats.pt", weights_only=True)
        self.known[i % len(self.known)] = loaded, H, y

    @invariant()
    def know_their_samples(self):
        for stats, H, y in self.known:
            assert stats.counts.tolist() == np.bincount(y, minlength=K).tolist()
            R = H.clone()
            for c in y.unique().tolist():
                mu = H[y == c].mean(0)
                torch.testing.assert_close(stats.means[c], mu, rtol=1e-12, atol=1e-12)
                R[y == c] -= mu
                same(stats.class_scatter[c].item(), R[y == c].square().sum().item(), 1e-9, 1e-9)
            torch.testing.assert_close(stats.scatter, R.T @ R, rtol=1e-9, atol=1e-9)


@pytest.fixture
def one_process(tmp_path):
    if not dist.is_available() or not dist.is_gloo_available(): pytest.skip("torch was built without gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield tmp_path
    dist.destroy_process_group()


def test_statistics_know_their_samples_whatever_the_order_of_calls(one_process):
    AnyOrder.folder = one_process
    run_state_machine_as_test(AnyOrder, settings=settings(several, stateful_step_count=15))
