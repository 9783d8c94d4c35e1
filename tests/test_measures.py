"The measures under invariances, in hard numerics, where something cannot be had, and under other conventions."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_against_definitions import problem

import nc_nbdev as nc
from nc_nbdev.geometry import duality, means, nearest_centre, ood, variability
from nc_nbdev.geometry.etf import simplex_etf, simplex_gram
from nc_nbdev.geometry.regression import RegressionStatistics, nrc1, nrc2
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.geometry.variability import nc1_pinv, vci

FEW = settings(max_examples=40, deadline=None)


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


def test_vci_does_not_depend_on_the_units_of_a_dimension():
    g, y = torch.Generator().manual_seed(0), torch.arange(1200) % 4
    for D, dtype in ((8, torch.float64), (300, torch.float32)):
        H = (torch.randn(1200, D, generator=g) + torch.randn(4, D, generator=g)[y]).to(dtype)
        plain = vci(ClassStatistics.from_features(H, y, 4))
        units = torch.ones(D, dtype=dtype)
        units[0] = 1e-7
        for source in (H * units, (H * units).double(), H.double() * torch.logspace(-5, 5, D).double()):
            assert vci(ClassStatistics.from_features(source, y, 4)) == pytest.approx(plain, rel=1e-4)


def test_what_the_caller_changes_later_changes_no_statistics():
    g, y = torch.Generator().manual_seed(0), torch.arange(60) % 3
    H, counts, centre = torch.randn(60, 5, generator=g), torch.full((3,), 20), torch.zeros(5, dtype=torch.float64)
    found = []
    for spoil in (False, True):
        weighted = ClassStatistics(3, 5, "full", counts)
        numbers = RegressionStatistics(5, 2, centre)
        for part in (slice(0, 30), slice(30, 60)):
            weighted.update(H[part], y[part])
            numbers.update(H[part], H[part, :2])
            if spoil: counts.fill_(7); centre.fill_(5)
        found.append((nc1_pinv(weighted), nrc1(numbers)))
    assert found[0] == found[1]


def test_nrc_of_tiny_features_and_of_a_last_layer_that_is_zero():
    H = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of = lambda scale: RegressionStatistics.from_features(H * scale, H[:, :2])
    assert nrc1(of(1e-13)) == pytest.approx(nrc1(of(1.0)))
    with pytest.raises(ValueError, match="full rank"): nrc2(torch.zeros(2, 6), of(1.0))


def test_head_without_bias_and_parameters_with_gradients():
    H, y, W, _ = problem(3, 5)
    layer = torch.nn.Linear(5, 3)
    m = nc.measure_features(H.requires_grad_(), y, num_classes=3, head=(layer.weight, layer.bias))
    assert isinstance(m.nc3_duality, float)
    assert nc.measure_features(H, y, num_classes=3, head=(W, None)) == nc.measure_features(
        H, y, num_classes=3, head=(W, torch.zeros(3)))


# --- NC4 ------------------------------------------------------------------------------------------


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


@FEW
@given(st.integers(2, 40), st.integers(1, 30), st.sampled_from([0.0, 1, 1e3, 1e6]),
    st.sampled_from([1e-30, 1e-9, 1e-3, 1, 1e25]),
       st.sampled_from([1e-3, 1, 100]), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 999))
def test_decisions_are_those_of_float64_at_every_scale(K, D, offset, scale, noise, dtype, seed):
    "Noise of 100 leaves close scores, tiny and huge scales under- and overflow in float32: none of it may decide."
    torch.manual_seed(seed)
    mu = scale * (offset + torch.randn(K, D, dtype=torch.float64))
    H = (mu[torch.randint(K, (60,))] + scale * noise * torch.randn(60, D, dtype=torch.float64)).to(dtype)
    expected = (H.double()[:, None] - mu).div(scale).square().sum(2).argmin(1)
    assert nearest_centre.nearest_centre(H, mu).equal(expected)
    W, b = torch.randn(K, D, dtype=torch.float64), scale * torch.randn(K, dtype=torch.float64)
    assert nearest_centre.classifier_decision(H, W, b).equal((H.double() @ W.T + b).argmax(1))


def test_what_float32_cannot_tell_is_looked_at_again(monkeypatch):
    "Lead of 1e-9 in scores near 1: float32 sees a tie, and would answer 0."
    asked = []
    largest = nearest_centre._largest
    monkeypatch.setattr(nearest_centre, "_largest", lambda x, *a: asked.append((x.dtype, len(x))) or largest(x, *a))
    mu = torch.tensor([[1.0, 0], [1 - 1e-9, 0], [-2, 0]], dtype=torch.float64)
    H = torch.tensor([[0.0, 0], [-3, 0], [0, 5]], dtype=torch.float64)
    assert nearest_centre.nearest_centre(H, mu).tolist() == [1, 2, 1]
    assert asked == [(torch.float32, 3), (torch.float64, 2)]
    assert nearest_centre.classifier_decision(H - 1, mu.flip(1), None).tolist() == [2, 2, 0]


def test_exact_ties_go_to_the_smallest_class():
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) + 1000
    H = torch.tensor([[0.0, 0], [0, 1], [-1, 0], [1, 0]]) + 1000
    assert nearest_centre.nearest_centre(H, corners).tolist() == [0, 0, 2, 0]
    assert nearest_centre.nearest_centre(torch.ones(3, 2), torch.ones(5, 2)).tolist() == [0, 0, 0]


def test_reduced_precision_of_float32_products_is_not_used():
    torch.manual_seed(0)
    mu = 1 + 1e-4 * torch.randn(50, 40, dtype=torch.float64)
    H = torch.randn(300, 40)
    expected = (H.double()[:, None] - mu).square().sum(2).argmin(1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert nearest_centre.nearest_centre(H, mu).equal(expected)
    finally: torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16): assert nearest_centre.nearest_centre(H, mu).equal(expected)


@FEW
@given(st.integers(2, 80), st.integers(1, 30), st.sampled_from([0.0, 1, 1e4, 1e9, 1e30]),
       st.sampled_from([0.0, 1e-4, 1]), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_both_decisions_are_those_of_one_rule_alone(K, D, offset, length, dtype, seed):
    "They share the centre of the means, which the offsets of the classifier must follow; W = 0 leaves ties."
    torch.manual_seed(seed)
    mu = offset + torch.randn(K, D, dtype=torch.float64)
    H, W, b = (mu[torch.randint(K, (60,))] + torch.randn(60, D)).to(dtype), length * torch.randn(K, D), torch.randn(K)
    decision, near = nearest_centre.both_decisions(H, W, b, mu)
    assert decision.equal(nearest_centre.classifier_decision(H, W, b))
    assert near.equal(nearest_centre.nearest_centre(H, mu))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("K", [3, 70])
def test_one_feature_that_is_no_number_is_refused(bad, K):
    H, W = torch.randn(600, 4), torch.randn(K, 4)
    H[555, 2] = bad
    for job in (lambda: nearest_centre.nearest_centre(H, W), lambda: nearest_centre.classifier_decision(H, W),
                lambda: nearest_centre.both_decisions(H, W, None, W)):
        with pytest.raises(ValueError, match="NaN or infinity"): job()
    long = torch.cat([H, torch.randn(600, 296)], 1)
    for within in "trace", "full":
        with pytest.raises(ValueError, match="1 of 600 feature rows hold NaN or infinity, the first is row 555"):
            ClassStatistics.from_features(long, torch.arange(600) % K, K, within)


def test_disagreement_with_and_without_bias():
    H, y, W, b = problem(4, 6)
    mu = torch.randn(4, 6)
    near = nearest_centre.nearest_centre(H, mu)
    for with_bias in (True, False):
        expected = ((H @ W.T + with_bias * b).argmax(1) != near).double().mean().item()
        assert nearest_centre.nc4_disagreement(H, W, b, mu, with_bias=with_bias) == expected


# --- NC2 where no simplex fits --------------------------------------------------------------------


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


# --- conventions ----------------------------------------------------------------------------------


def test_conventions_of_nc2_and_nc3():
    mu, W = torch.randn(4, 6).double() + 1, torch.randn(4, 6).double()
    norms = W.norm(dim=1)
    assert means.nc2_norms(W, centred=False) == pytest.approx((norms.std(correction=0) / norms.mean()).item())
    assert duality.nc3_duality(W, mu, squared=True) == pytest.approx(duality.nc3_duality(W, mu) ** 2)
    assert duality.nc3_duality(mu, mu, centred=False) == pytest.approx(0, abs=1e-12)
    assert duality.nc3_duality(mu, mu) > 0.1
    assert duality.nc3_duality(W, mu, squared=True,
        row_normalised=True) == pytest.approx(8 * (1 - duality.nc3_cosine(W, mu)))


@pytest.mark.parametrize("rows, eps", [(100 + 0.01 * torch.randn(40, 3).double(), 1e-12), (torch.ones(40, 3), 1e-15),
                                       (1 + 1e-3 * torch.randn(7, 3).double(), 1e-12), (torch.randn(50, 3) + 1, 1e-12)])
def test_angles_of_many_rows_that_are_nearly_parallel(rows, eps):
    U = means.unit_rows(rows.double())
    far = torch.cdist(U, U, compute_mode="donot_use_mm_for_euclid_dist")[~torch.eye(len(U), dtype=torch.bool)].square()
    assert means.nc2_angles(rows, centred=False) == pytest.approx(far.std(correction=0).item() / 2, abs=eps)


def test_features_whose_squares_underflow_say_so():
    H, y, _, _ = problem(3, 5)
    with pytest.raises(ValueError, match="so small that their squares"):
        variability.nc1_trace(nc.ClassStatistics.from_features(H * 1e-200, y, num_classes=3))
    assert "so small that their squares" in nc.measure_features(H * 1e-200, y, num_classes=3).reasons["nc2_etf"]


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
    sample = stats.global_mean("sample")  # another centre is subtracted beforehand
    assert ood.nc5_ood(stats.means - sample, far.mean(0) - sample, centred=False) == pytest.approx(expected)


# --- Gram matrices, margins, separability ---------------------------------------------------------

@FEW
@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_gram_distance(K, D, seed, scale):
    torch.manual_seed(seed)
    A, B = torch.randn(2, K, D, dtype=torch.float64)
    distance = means.gram_distance(A @ A.T, B @ B.T)
    assert 0 <= distance <= math.sqrt(2) + 1e-12  # neither has a negative eigenvalue
    assert distance == pytest.approx(means.gram_distance(scale * B @ B.T, A @ A.T), rel=1e-9)
    assert means.gram_distance(scale * A @ A.T, A @ A.T) == pytest.approx(0, abs=1e-12)
    assert means.nc2_etf(A, centred=False) == pytest.approx(means.gram_distance(A @ A.T, simplex_gram(K)))
    assert means.gram_distance(torch.eye(K), torch.eye(K).double()) == 0  # the target takes the dtype of the first
    with pytest.raises(ValueError, match="rows are zero"): means.gram_distance(0 * A @ A.T, B @ B.T)
    with pytest.raises(ValueError, match="rows are zero"): means.gram_distance(A @ A.T, 0 * B @ B.T)


@FEW
@given(st.integers(2, 6), st.integers(2, 20), st.integers(0, 10**6))
def test_logit_margin(K, N, seed):
    torch.manual_seed(seed)
    logits, y = torch.randn(3, N, K), torch.randint(K, (N,))
    found = nearest_centre.logit_margin(logits, y)
    assert found.shape == (3, N)
    for s in range(3):
        for i in range(N):
            row = logits[s, i].tolist()
            assert found[s, i].item() == pytest.approx(row[y[i]] - max(v for k, v in enumerate(row) if k != y[i]))
    with pytest.raises(ValueError, match="expected integers 0.."): nearest_centre.logit_margin(logits, y + K)
    with pytest.raises(ValueError, match="one a sample"): nearest_centre.logit_margin(logits[:, :-1], y)
    with pytest.raises(ValueError, match="K >= 2"): nearest_centre.logit_margin(logits[..., :1], y * 0)


@FEW
@given(st.integers(2, 4), st.integers(1, 4), st.integers(0, 10**6), st.sampled_from([(1, 0), (1e-4, 1e3), (1e4, -7)]))
def test_what_a_linear_classifier_labels_is_separable(K, D, seed, scale_and_shift):
    torch.manual_seed(seed)
    (scale, shift), W = scale_and_shift, torch.randn(K, D, dtype=torch.float64)
    H = torch.randn(30, D, dtype=torch.float64)
    scores = H @ W.T
    sure = scores.topk(2, 1).values.diff(dim=1).abs().flatten() > 1e-2
    H, y = H[sure], scores.argmax(1)[sure]
    if len(y.unique()) < 2: return
    assert nearest_centre.linearly_separable(scale * H + shift, y)
    doubled = torch.cat([H, H[:1]]), torch.cat([y, (y[:1] + 1) % K])  # one sample, once with another label
    assert not nearest_centre.linearly_separable(scale * doubled[0] + shift, doubled[1])


def test_separability_of_known_sets():
    ring = torch.tensor([[math.cos(a), math.sin(a)] for a in range(12)])
    inside = torch.cat([ring, 0.1 * ring])
    assert not nearest_centre.linearly_separable(inside, torch.arange(24) // 12)
    assert nearest_centre.linearly_separable(torch.cat([inside, inside.norm(dim=1, keepdim=True)], 1),
        torch.arange(24) // 12)
    assert nearest_centre.linearly_separable(ring, torch.arange(12))  # corners of a convex polygon, one class each
    with pytest.raises(ValueError, match="two classes"): nearest_centre.linearly_separable(ring, torch.zeros(12).long())
    with pytest.raises(ValueError, match="11 labels"): nearest_centre.linearly_separable(ring, torch.arange(11))


@pytest.mark.parametrize("name", ["nc2_norms", "nc2_angles", "nc2_max_angle", "nc2_etf"])
def test_the_global_mean_is_a_named_convention(name):
    "Unbalanced classes: centred at the mean of the samples, as an argument and by hand."
    measure, y = getattr(means, name), torch.arange(3).repeat_interleave(torch.tensor([4, 8, 40]))
    stats = nc.ClassStatistics.from_features(torch.randn(52, 6) + 3 * torch.eye(3, 6)[y], y, num_classes=3)
    by_hand = measure(stats.means - stats.global_mean("sample"), centred=False)
    assert measure(stats, weighting="sample") == pytest.approx(by_hand) and measure(stats) != pytest.approx(by_hand)


@pytest.mark.parametrize("name", ["nc3_duality", "nc3_etf", "nc3_cosine"])
def test_the_global_mean_is_a_named_convention_of_duality(name):
    measure, y = getattr(duality, name), torch.arange(3).repeat_interleave(torch.tensor([4, 8, 40]))
    stats = nc.ClassStatistics.from_features(torch.randn(52, 6) + 3 * torch.eye(3, 6)[y], y, num_classes=3)
    W = torch.randn(3, 6)
    by_hand = measure(W, stats.means - stats.global_mean("sample"), centred=False)
    assert measure(W, stats, weighting="sample") == pytest.approx(by_hand)
    assert measure(W, stats) != pytest.approx(by_hand)


@pytest.mark.parametrize("K", [70, 300])
@pytest.mark.parametrize("offset", [0, 1000])
def test_decisions_among_many_classes(K, offset):
    "Where processors multiply bfloat16, a coarse product comes first: classes in close pairs are what it cannot tell."
    torch.manual_seed(0)
    mu = torch.randn(K, 96, dtype=torch.float64)
    mu[1::2] = mu[::2] + 1e-3 * torch.randn(K // 2, 96)
    H = (offset + mu[torch.randint(K, (800,))] + 1e-3 * torch.randn(800, 96)).float()
    expected = (H.double()[:, None] - mu - offset).square().sum(2).argmin(1)
    assert nearest_centre.nearest_centre(H, mu + offset).equal(expected)
    assert nearest_centre.classifier_decision(H, mu, None).equal((H.double() @ mu.T).argmax(1))


def test_the_rounding_of_a_coarse_score_is_counted():
    "Both factors are rounded in the same direction, and so is the product: 0 would be the answer of bfloat16."
    high, low = torch.full((257,), 1 + 2**-8 + 1e-4), torch.full((257,), 1 + 2**-8 - 1e-4)
    pair = torch.block_diag(high[None], low[None])
    W = torch.cat([pair, -pair.sum(0, keepdim=True).expand(64, -1) / 64])
    x, b = torch.cat([high, low])[None], torch.zeros(66)
    for lead in (0.01, 0.1, 0.15):
        b[1] = (x.double() @ (pair[0] - pair[1]).double()).item() + lead
        assert nearest_centre.classifier_decision(x, W, b).tolist() == [1], lead


@pytest.mark.parametrize("K", [10, 70])
@pytest.mark.parametrize("size, length", [(1e-24, 1e18), (1e-40, 1e18), (1e18, 1e-24), (1e18, 1e-35)])
def test_lengths_whose_squares_underflow_decide_nothing(K, size, length):
    "The length of 1e-24 is 0 in float32, its product with 1e18 is not; classes in pairs differ in the ninth digit."
    torch.manual_seed(0)
    x, W = size * torch.randn(300, 64), length * torch.randn(K, 64, dtype=torch.float64)
    W[1::2] = W[::2] + 1e-8 * length * torch.randn(K // 2, 64)
    assert nearest_centre.classifier_decision(x, W).equal((x.double() @ W.T).argmax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_score_that_may_overflow_is_looked_at_again(dtype):
    "3.395e38 is a number of float32 and not of bfloat16, where it is infinite and would lead."
    x, rows = torch.tensor([[1.0], [0.5]]).to(dtype), torch.tensor([[3.38e38], [1e38]]).to(dtype)
    t, norm = torch.tensor([[0.0, 3.395e38]]), rows.float().norm(dim=1).amax()[None]
    unsure = nearest_centre._largest(x, rows[None], t, norm, t[:, 1])[1]
    assert unsure.all()


@pytest.mark.parametrize("scale", [1e-160, 1e-85, 1e78, 1e150])
@pytest.mark.parametrize("K, D", [(4, 3), (means.TILE + 5, 3), (means.TILE + 5, means.TILE)])
def test_shape_of_tiny_and_huge_rows(K, D, scale):
    rows = torch.randn(K, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert means.nc2_etf(rows * scale, centred=False) == pytest.approx(means.nc2_etf(rows, centred=False), rel=1e-9)
    if K == 4:
        gram = rows @ rows.T
        assert means.gram_distance(gram * scale, simplex_gram(K)) == pytest.approx(
            means.gram_distance(gram, simplex_gram(K)), rel=1e-9)
