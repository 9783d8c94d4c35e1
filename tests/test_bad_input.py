"""Bad input is a ValueError that says what was seen and what was expected; what can be understood simply works."""

import numpy as np
import pytest
import torch

import nc_nbdev as nc
from nc_nbdev.geometry import nearest_centre
from nc_nbdev.geometry.ood import nc5_ood

torch.manual_seed(0)
H, y, K = torch.randn(12, 4), torch.arange(12) % 3, 3
W, b = torch.randn(3, 4), torch.randn(3)
stats = nc.ClassStatistics.from_features(H, y, num_classes=K)

# What can be wrong with features and labels: (features, labels), and what the error must say
BATCHES = {
    "no features": ((None, y), "features.* None: expected a tensor, or an array"),
    "a word for features": (("features", y), "features.* a str: expected a tensor"),
    "one axis": ((H[0], y), r"shape \(4,\): expected \(B, (D|4)\); pool over space"),
    "three axes": ((H[None], y), r"shape \(1, 12, 4\): expected \(B, (D|4)\); pool over space"),
    "integer features": ((H.long(), y),
        r"features are torch.int64: expected a floating point dtype of 16 bits or more"),
    "complex features": ((H + 0j, y), "complex64: expected a floating point dtype of 16"),
    "NaN": ((H.index_fill(0, torch.tensor([7]), torch.nan), y),
        "1 of 12 feature rows hold NaN or infinity, the first is row 7"),
    "infinity": ((H / 0, y), "12 of 12 feature rows hold NaN or infinity.*did the training diverge"),
    "no labels": ((H, None), "labels.* None: expected a tensor, or an array"),
    "float labels": ((H, y.float()), r"labels are torch.float32: expected integers 0..2; convert with y.long\(\)"),
    "boolean labels": ((H, y > 0), "labels are torch.bool: expected integers 0..2"),
    "words for labels": ((H, ["a"] * 12), "labels.* a list: expected a tensor"),
    "labels of two axes": ((H, y[:, None]),
        r"labels have shape \(12, 1\), features \(12, 4\): expected one label a row"),
    "too few labels": ((H, y[:5]), r"labels have shape \(5,\), features \(12, 4\): expected one label a row"),
    "one label": ((H, 1), r"labels have shape \(\), features \(12, 4\): expected one label a row"),
    "negative label": ((H, y - 1), "labels run from -1 to 1: expected 0..2; check num_classes"),
    "label K": ((H, y + 1), "labels run from 1 to 3: expected 0..2; check num_classes"),
}
EMPTY = {
    "no samples": ((H[:0], y[:0]), r"shape \(0, 4\): expected at least one sample"),
    "no features in them": ((H[:, :0], y), r"shape \(12, 0\): expected at least one sample of length >= 1"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_features_and_labels(name):
    (h, c), says = BATCHES[name]
    before = nc.ClassStatistics(K, 4, within="full")
    calls = [lambda: before.update(h, c), lambda: nc.ClassStatistics.from_features(h, c, num_classes=K),
             lambda: nc.measure_features(h, c, num_classes=K, head=(W, b)),
             lambda: nc.test_collapse(h, c, H, y, num_classes=K), lambda: nc.test_collapse(H, y, h, c, num_classes=K)]
    for call in calls:
        with pytest.raises(ValueError, match=says): call()
    assert before.counts.sum() == 0 and not before.means.any() and not before.scatter.any()
    for split, call in zip(("train", "test"), calls[-2:], strict=True):
        with pytest.raises(ValueError, match=f"^{split} set: "): call()


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_measure(name):
    (h, c), says = EMPTY[name]
    for call in (lambda: nc.ClassStatistics.from_features(h, c, num_classes=K),
        lambda: nc.measure_features(h, c, num_classes=K),
                 lambda: nc.test_collapse(h, c, H, y, num_classes=K), lambda: nc.test_collapse(H, y, h, c)):
        with pytest.raises(ValueError, match=says): call()


@pytest.mark.parametrize("value", [None, "3", 2.5, 3.0, 1, 0, -3, True, [3], torch.tensor([3, 4])])
def test_number_of_classes(value):
    calls = [lambda: nc.ClassStatistics(value, 4), lambda: nc.ClassStatistics.from_features(H, y, num_classes=value),
             lambda: nc.measure_features(H, y, num_classes=value)]
    if value is not None: calls.append(lambda: nc.test_collapse(H, y, H, y, num_classes=value))
    for call in calls:
        with pytest.raises(ValueError,
            match="num_classes is .*: expected the number of classes.* a whole number >= 2"): call()


@pytest.mark.parametrize("value", [None, "4", 1.5, 0, -1])
def test_dimension(value):
    with pytest.raises(ValueError, match="dim is .*: expected the length of a feature vector, a whole number >= 1"):
        nc.ClassStatistics(3, value)


HEADS = {
    "another K": ((torch.ones(4, 4), None), r"head's W has shape \(4, 4\): expected \(3, 4\)"),
    "transposed": ((W.T, None), r"head's W has shape \(4, 3\): expected \(3, 4\)"),
    "a row": ((W[0], b), r"head's W has shape \(4,\): expected \(K, D\)"),
    "integers": ((W.long(), b), "head's W is torch.int64: expected floating-point"),
    "complex": ((W + 0j, b), "head's W is torch.complex64: expected floating-point"),
    "integer bias": ((W, b.long()), "head's b is torch.int64: expected floating-point"),
    "bias of another K": ((W, torch.ones(4)), r"b has shape \(4,\): expected \(3,\), one bias a class"),
    "bias of two axes": ((W, b[:, None]), r"b has shape \(3, 1\): expected \(3,\)"),
    "NaN in W": ((W * torch.nan, b), "head's W holds NaN or infinity"),
    "infinity in b": ((W, b / 0), "b holds NaN or infinity"),
    "a layer": (torch.nn.Linear(4, 3),
        r"head is a Linear: expected the pair \(W, b\); of a Linear, \(fc.weight, fc.bias\)"),
    "a layer in the pair": ((torch.nn.Linear(4, 3), None), "head's W is a Linear: expected a tensor"),
    "W alone": (W, r"head is a Tensor: expected the pair"),
    "three things": ((W, b, b), r"head is a tuple of 3: expected the pair"),
    "nothing in it": ((None, None), "head's W is None: expected a tensor"),
    "a dictionary": ({"weight": W, "bias": b}, "head is a dict: expected the pair"),
}


@pytest.mark.parametrize("name", HEADS)
def test_head(name):
    head, says = HEADS[name]
    for call in (lambda: nc.measure_features(H, y, num_classes=K, head=head), lambda: nc.measure_collapse(stats, head)):
        with pytest.raises(ValueError, match=says): call()


empty = nc.ClassStatistics(5, 4).update(H, y)  # classes 3 and 4 have no samples
OTHERS = {
    "empty classes in memory": (lambda: nc.measure_features(H, y, num_classes=5),
        r"2 of 5 classes have no samples \(3, 4\)"),
    "empty classes in a stream": (lambda: nc.measure_collapse(empty), r"2 of 5 classes have no samples \(3, 4\)"),
    "empty train class": (lambda: nc.test_collapse(H, y, H, y, num_classes=5),
        r"2 of 5 classes have no samples \(3, 4\)"),
    "nothing streamed": (lambda: nc.measure_collapse(nc.ClassStatistics(3, 4)),
        r"3 of 3 classes have no samples \(0, 1, 2\)"),
    "features for statistics": (lambda: nc.measure_collapse(H),
        "stats is a Tensor: expected ClassStatistics; for features"),
    "nothing for statistics": (lambda: nc.measure_collapse(None), "stats is a NoneType: expected ClassStatistics"),
    "weighting": (lambda: nc.measure_collapse(stats, weighting="mean"), "weighting is 'mean': expected 'class'"),
    "weighting, features": (lambda: nc.measure_features(H, y, num_classes=K, weighting=None),
        "weighting is None: expected 'class'"),
    "weighting, test": (lambda: nc.test_collapse(H, y, H, y, weighting="mean"),
        "weighting is 'mean': expected 'class'"),
    "reference of another K": (lambda: nc.measure_features(H, y, num_classes=K, reference=empty),
                               "reference has K = 5, D = 4: expected K = 3, D = 4"),
    "reference of another D": (lambda: nc.measure_features(H, y, num_classes=K, reference=nc.ClassStatistics(3, 9)),
                               "reference has K = 3, D = 9: expected K = 3, D = 4"),
    "reference without samples": (lambda: nc.measure_features(H, y, num_classes=K, reference=nc.ClassStatistics(3, 4)),
                                  "3 of 3 classes have no samples"),
    "means for reference": (lambda: nc.measure_features(H, y, num_classes=K, reference=stats.means),
                            "reference is a Tensor: expected ClassStatistics; for features"),
    "batch of another D": (lambda: nc.ClassStatistics(3, 5).update(H, y), r"shape \(12, 4\): expected \(B, 5\)"),
    "merge of another D": (lambda: nc.ClassStatistics(3, 4) + nc.ClassStatistics(3, 5),
        "cannot merge.* dim=4 and dim=5: make them"),
    "merge of another K": (lambda: nc.ClassStatistics(3, 4) + nc.ClassStatistics(2, 4),
        "num_classes=3 and num_classes=2"),
    "merge with a tensor": (lambda: nc.ClassStatistics(3, 4) + H, "cannot add a Tensor to ClassStatistics: expected"),
    "merge with nothing": (lambda: stats + None, "cannot add a NoneType to ClassStatistics: expected"),
    "class counts": (lambda: nc.ClassStatistics(3, 4, within="full", class_counts="many"),
        "class_counts is a str: expected a tensor"),
    "test features of another D": (lambda: nc.test_collapse(H, y, H[:, :2], y),
                                   "train has 3 classes of dimension 4, test 3 of 2: expected the same"),
    "a test label the train set lacks": (lambda: nc.test_collapse(H, y, H, y + 1),
        "test set: labels run from 1 to 3: expected 0..2"),
    "no train labels": (lambda: nc.test_collapse(H, None, H, y), "train labels is None: expected a tensor"),
    "train means that coincide": (lambda: nc.test_collapse(torch.ones(12, 4), y, H, y), "train class means coincide"),
    "NaN, nearest centre": (lambda: nearest_centre.nearest_centre(H * torch.nan, W), "NaN or infinity"),
    "features of another D, nearest centre": (lambda: nearest_centre.nearest_centre(H[:, :2], W),
        r"shape \(12, 2\): expected .*\(N, 4\)"),
    "nothing, nearest centre": (lambda: nearest_centre.nearest_centre(None, W), "features is None: expected a tensor"),
    "ood of another D": (lambda: nc5_ood(stats, H[:, :2]), r"ood has shape \(12, 2\): expected \(N, 4\)"),
    "ood as a word": (lambda: nc5_ood(stats, "ood"), "ood is a str: expected a tensor"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    call, says = OTHERS[name]
    with pytest.raises(ValueError, match=says): call()


# --- what works -----------------------------------------------------------------------------------

h, c = H.double().numpy(), y.numpy()
frozen = h.copy(); frozen.flags.writeable = False
WELCOME = {
    "arrays": (h, c), "lists": (h.tolist(), c.tolist()), "a list of labels": (H.double(), c.tolist()),
    "an array of features": (h, y), "an array of labels": (H.double(), c), "a read-only array": (frozen, c),
    "an array read backwards": (h[::-1], c[::-1]), "an array in Fortran's order": (np.asfortranarray(h), c),
    "gradients": (H.double().requires_grad_(), y), "a tuple of labels": (H.double(), tuple(c.tolist())),
} | {f"labels in {d}": (H.double(), y.to(d)) for d in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WELCOME)
def test_what_can_be_understood_works(name):
    f, labels = WELCOME[name]
    expected = nc.measure_features(H.double(), y, num_classes=K, head=(W, b)).to_dict()
    del expected["one_vs_rest_margin"]  # None: a simplex fits
    heads = [(W, b), (W.double().numpy(), b.double().numpy()), [W.double().tolist(), b.double().tolist()]]
    found = [nc.measure_features(f, labels, num_classes=k, head=head) for head in heads
        for k in (3, np.int64(3), torch.tensor(3))]
    found.append(nc.measure_features(f, labels, num_classes=K, head=(W, b), reference=stats))
    for m in found: assert {k: m.to_dict()[k] for k in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    stream = nc.ClassStatistics(K, 4, within="full").update(f, labels)
    assert nc.measure_collapse(stream, heads[1]).vci == pytest.approx(expected["vci"])
    t = nc.test_collapse(f, labels, f, labels)
    assert t.train == pytest.approx(expected["nc1_trace"], rel=1e-6) and t.weak <= t.test == pytest.approx(t.strong)
    assert nearest_centre.ncc_accuracy(f, labels, stats.means.numpy()) == expected["ncc_accuracy"]


def test_features_in_memory_are_not_copied():
    a = np.random.default_rng(0).standard_normal((30, 4))
    s = nc.ClassStatistics.from_features(a, np.arange(30) % 3, num_classes=3)
    assert s._features[0].H.data_ptr() == a.ctypes.data
