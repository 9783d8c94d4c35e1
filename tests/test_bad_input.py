"""Bad input is an error that says what was seen and what was expected; what can be understood simply works."""

import importlib
import inspect
import math
import os
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import nc_nbdev as nc
from nc_nbdev.geometry import (
    duality,
    etf,
    generalization,
    means,
    measures,
    nearest_centre,
    ood,
    regression,
    statistics,
    variability,
)
from nc_nbdev.lab import claims, history, probes, recorder, runs, settings, store, studies, taps
from nc_nbdev.vision import data, loaders, models, recipes, sources, transfer

command = importlib.import_module("nc_nbdev.reproduce")
torch.manual_seed(0)
H, y, K = torch.randn(12, 4), torch.arange(12) % 3, 3
W, b = torch.randn(3, 4), torch.randn(3)
stats, trace = nc.ClassStatistics.from_features(H, y, num_classes=K), nc.ClassStatistics(3, 4).update(H, y)
M, NaN, logits = stats.means, math.nan, torch.randn(12, 3)
net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
bytes8, labels6 = torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 3
images = data.ImageData("x", bytes8, labels6, bytes8, labels6, ("a", "b", "c"))
recipe, statement = recipes.ImageRecipe(epochs=1), claims.Statement("s", "", "", "", at_least=1)
claim = statement.claim([2, 3, 4], [0, 0, 0])
task = probes.FeatureTask(H, y, y, H, y, y)
table = history.as_history([dict(epoch=e, split=s, layer="a", measure="accuracy", value=0.5)
                            for e in (1, 2) for s in ("train", "test")])


class Turned(nn.Module):
    "Gives (T, B, D) of (B, T, D)."
    def forward(self, x): return x.transpose(0, 1)


def metric(*arguments, **more):
    pytest.importorskip("torchmetrics")
    from nc_nbdev.lab.integrations import CollapseMetric
    return CollapseMetric(*arguments, **more)


WRONG = {}   # "function: what is wrong" -> (call, what the error says, its type)


def wrong(function, what, call, says, error=ValueError): WRONG[f"{function}: {what}"] = call, says, error


# --- geometry -------------------------------------------------------------------------------------

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
    "words for labels": ((H, ["a"] * 12), r"labels.* a list: expected a tensor.* numbers: .* np.unique\(y, return_inv"),
    "an array of words": ((H, np.array(["a"] * 12)), r"labels.* a ndarray: .*number words with np.unique\(y"),
    "labels of two axes": ((H, y[:, None]),
        r"labels have shape \(12, 1\), features \(12, 4\): expected one label a row; .* y.squeeze\(1\)"),
    "one-hot labels": ((H, torch.eye(3)[y]), r"shape \(12, 3\).*expected one label a row; of one-hot .* y.argmax\(1\)"),
    "too few labels": ((H, y[:5]), r"labels have shape \(5,\), features \(12, 4\): expected one label a row"),
    "one label": ((H, 1), r"labels have shape \(\), features \(12, 4\): expected one label a row"),
    "negative label": ((H, y - 1), "labels run from -1 to 1: expected 0..2; check num_classes"),
    "label K": ((H, y + 1), "labels run from 1 to 3: expected 0..2; check num_classes"),
}
EMPTY = {
    "no samples": ((H[:0], y[:0]), r"shape \(0, 4\): expected at least one sample"),
    "no features in them": ((H[:, :0], y), r"shape \(12, 0\): expected at least one sample of length >= 1"),
}

READS_FEATURES = {
    "ClassStatistics": lambda h, c: nc.ClassStatistics(K, 4, within="full").update(h, c),
    "ClassStatistics.from_features": lambda h, c: nc.ClassStatistics.from_features(h, c, num_classes=K),
    "measure_features": lambda h, c: nc.measure_features(h, c, num_classes=K, head=(W, b)),
    "test_collapse": lambda h, c: nc.test_collapse(h, c, H, y, num_classes=K),
    "test_collapse of test features": lambda h, c: nc.test_collapse(H, y, h, c, num_classes=K),
}
for reads, call in READS_FEATURES.items():
    for what, ((h, c), says) in (BATCHES | (EMPTY if reads != "ClassStatistics" else {})).items():
        wrong(reads, what, lambda _, call=call, h=h, c=c: call(h, c), says)

for value in (None, "3", 2.5, 3.0, 1, 0, -3, True, [3], torch.tensor([3, 4])):
    for reads, call in {"ClassStatistics": lambda v: nc.ClassStatistics(v, 4),
                        "ClassStatistics.from_features": lambda v: nc.ClassStatistics.from_features(H, y, v),
                        "measure_features": lambda v: nc.measure_features(H, y, num_classes=v)}.items():
        wrong(reads, f"num_classes {value!r}", lambda _, call=call, v=value: call(v),
              "num_classes is .*: expected the number of classes.* a whole number >= 2")
for value in (None, "4", 1.5, 0, -1):
    wrong("ClassStatistics", f"dim {value!r}", lambda _, v=value: nc.ClassStatistics(3, v),
          "dim is .*: expected the length of a feature vector, a whole number >= 1")

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
for what, (head, says) in HEADS.items():
    wrong("measure_features", f"head {what}",
          lambda _, head=head: nc.measure_features(H, y, num_classes=K, head=head), says)
    wrong("measure_collapse", f"head {what}", lambda _, head=head: nc.measure_collapse(stats, head), says)
    wrong("check_head", what, lambda _, head=head: measures.check_head(head, stats), says)

NO_STATISTICS = {"features": (H, "stats is a Tensor: expected ClassStatistics; for features, call measure_features"),
                 "nothing": (None, "stats is a NoneType: expected ClassStatistics")}
OF_STATISTICS = {"nc1_trace": variability.nc1_trace, "nc1_pinv": variability.nc1_pinv, "cdnv": variability.cdnv,
                 "vci": variability.vci, "measure_collapse": nc.measure_collapse,
                 "check_statistics": statistics.check_statistics}
for name, call in OF_STATISTICS.items():
    for what, (given, says) in NO_STATISTICS.items(): wrong(name, what, lambda _, c=call, g=given: c(g), says)

ROWS = {
    "nothing": (None, "rows is None: expected a tensor, or an array"), "a word": ("means", "rows is a str: expected"),
    "a network": (net, "rows is a Sequential: expected a tensor"),
    "one axis": (M[0], r"rows has shape \(4,\): expected \(K, D\), one row a class"),
    "three axes": (M[None], r"shape \(1, 3, 4\): expected \(K, D\)"), "one row": (M[:1], "K >= 2 and D >= 1"),
    "no length": (M[:, :0], "K >= 2 and D >= 1"), "NaN": (M * NaN, "rows holds NaN or infinity"),
    "complex": (M + 0j, "rows is torch.complex128: expected real numbers"),
    "coinciding means": (0 * M, "coincide|zero"),
}
OF_ROWS = ("nc2_norms", "nc2_angles", "nc2_max_angle", "nc2_etf", "one_vs_rest_margin", "log_uniformity",
           "riesz_uniformity")
for name in OF_ROWS:
    f = getattr(means, name)
    for what, (rows, says) in ROWS.items(): wrong(name, what, lambda _, f=f, rows=rows: f(rows), says)
    if not name.startswith("nc2"): continue
    wrong(name, "weighting of rows", lambda _, f=f: f(M, weighting="sample"),
          "rows have 'class' only; 'sample' needs ClassStatistics")
    wrong(name, "weighting", lambda _, f=f: f(stats, weighting="mean"), "weighting is 'mean'")

Yr = torch.randn(12, 2)
Numbers = regression.RegressionStatistics
numbers = Numbers.from_features(H, Yr)
for what, call, says in (
    ("RegressionStatistics: dim 0", lambda: Numbers(0, 2), "dim is 0: expected the length"),
    ("RegressionStatistics: dim a word", lambda: Numbers("a", 2), "dim is 'a': expected"),
    ("RegressionStatistics: targets", lambda: Numbers(3, -1), "num_targets is -1: expected how"),
    ("RegressionStatistics: centre", lambda: Numbers(4, 2, M[0, :3]), r"expected \(4,\), finite"),
    ("RegressionStatistics: centre NaN", lambda: Numbers(4, 2, NaN * M[0]), "4,.*, finite"),
    ("RegressionStatistics: complex", lambda: numbers.from_features(H, Yr + 0j), "targets are torch.complex64 .* real"),
    ("RegressionStatistics: one target", lambda: numbers.from_features(H, Yr[0, 0]), r"of shape \(\): expected real"),
    ("RegressionStatistics: NaN", lambda: numbers.from_features(NaN * H, Yr), "features or targets hold NaN"),
    ("RegressionStatistics: integers", lambda: numbers.from_features(H.long(), Yr), "expected floating-point"),
    ("RegressionStatistics: none", lambda: Numbers(4, 2).feature_covariance, "no samples: up"),
    ("RegressionStatistics: sum", lambda: numbers + 3, "what is added is a int: expected RegressionStatistics"),
    ("RegressionStatistics: other", lambda: numbers + numbers.from_features(H, Yr[:, 0]), "=2,.*=1,"),
    ("nrc1: features", lambda: regression.nrc1(H), "stats is a Tensor: expected RegressionStatistics; of features"),
    ("nrc1: classes", lambda: regression.nrc1(stats), "stats is a ClassStatistics: expected RegressionStatistics"),
    ("nrc1: other targets", lambda: regression.nrc1(numbers, reference=numbers.from_features(H, Yr[:, 0])),
     "reference is .*num_targets=1.*stats is .*num_targets=2.*expected the same"),
    ("nrc1: other features", lambda: regression.nrc1(numbers, reference=Numbers.from_features(W.T, Yr[:4])), "same d"),
    ("nrc2: the wrong way round", lambda: regression.nrc2(numbers, W[:2]), "stats is a Tensor: expected Reg"),
    ("nrc2: another W", lambda: regression.nrc2(W, numbers), r"W is torch.float32 of shape \(3, 4\): expected real"),
    ("nrc3: features", lambda: regression.nrc3(W[:2], H), "stats is a Tensor: expected RegressionStatistics"),
    ("nrc3: complex", lambda: regression.nrc3(W[:2] + 0j, numbers), "W is torch.complex64 of shape"),
): wrong(*what.split(": ", 1), lambda _, call=call: call(), says)

PAIRS = {
    "W transposed": ((W.T, M), r"W has shape \(4, 3\), the class means \(3, 4\): expected \(K, D\) of both"),
    "W of another K": ((W[:2], M), r"W has shape \(2, 4\)"), "no W": ((None, M), "W is None: expected a tensor"),
    "no means": ((W, None), "rows is None"), "W holds NaN": ((W * NaN, M), "W holds NaN or infinity"),
    "W is zero": ((0 * W, M), "zero"), "a layer": ((net[0], M), "W is a Linear: expected a tensor"),
    "the wrong way round": ((stats, W), "W is a ClassStatistics: expected a tensor"),
}
for name in ("nc3_duality", "nc3_etf", "nc3_cosine"):
    f = getattr(duality, name)
    for what, (pair, says) in PAIRS.items(): wrong(name, what, lambda _, f=f, pair=pair: f(*pair), says)
    wrong(name, "weighting of rows", lambda _, f=f: f(W, M, weighting="sample"), "rows have 'class' only")

LABELS = {"none": (None, "labels is None"), "float": (y.float(), "labels are torch.float32"),
          "words": (["a"] * 12, "labels is a list"), "boolean": (y > 0, "labels are torch.bool"),
          "complex": (y + 0j, "labels are torch.complex64"), "too few": (y[:5], r"shape \(5,\): expected \(12,\)"),
          "two axes": (y[:, None], r"shape \(12, 1\): expected \(12,\), one a sample"),
          "K": (y + 1, "from 1 to 3: expected integers 0..2"), "negative": (y - 1, "from -1 to 1: expected integers")}
for what, (c, says) in LABELS.items():
    wrong("ncc_accuracy", f"labels {what}", lambda _, c=c: nearest_centre.ncc_accuracy(H, c, M), says)
    wrong("logit_margin", f"labels {what}", lambda _, c=c: nearest_centre.logit_margin(logits, c), says)

FEATURES = {"none": (None, "features is None"), "integers": (H.long(), "features are torch.int64"),
            "one axis": (H[0], r"shape \(4,\): expected .*\(N, 4\)"), "of another D": (H[:, :2], r"\(12, 2\)"),
            "NaN": (H * NaN, "features hold NaN or infinity"), "none at all": (H[:0], "N >= 1"),
            "complex": (H + 0j, "complex64"), "8 bits": (H.to(torch.float8_e4m3fn), "float8")}
OF_FEATURES = {"nearest_centre": lambda h: nearest_centre.nearest_centre(h, M),
               "classifier_decision": lambda h: nearest_centre.classifier_decision(h, W, b),
               "both_decisions": lambda h: nearest_centre.both_decisions(h, W, b, M),
               "nc4_disagreement": lambda h: nearest_centre.nc4_disagreement(h, W, b, M),
               "as_features": lambda h: nearest_centre.as_features(h, 4)}
for name, call in OF_FEATURES.items():
    for what, (h, says) in FEATURES.items():
        if (name, what) != ("as_features", "NaN"): wrong(name, what, lambda _, c=call, h=h: c(h), says)

for value in (0, -1, None, "3", 2.5, True):
    for name in ("weak_variance", "weak_lower_bound"):
        f = getattr(generalization, name)
        if value is not True:
            wrong(name, f"num_points {value!r}", lambda _, f=f, v=value: f(H, v),
                  "num_points is .*: expected at least one point, a whole number")
    if value != 0: wrong("simplex_gram", repr(value), lambda _, v=value: etf.simplex_gram(v), "whole number of classes")
    wrong("simplex_etf", f"dim {value!r}", lambda _, v=value: etf.simplex_etf(4, v) if v is not None else
          etf.simplex_etf(None), "needs dim >= 3|whole number of classes")

few = nc.ClassStatistics(5, 4).update(H, y)  # classes 3 and 4 have no samples
NO_SAMPLES = r"2 of 5 classes have no samples \(3, 4\)"
for what, call, says in (
    ("measure_features: empty classes", lambda: nc.measure_features(H, y, num_classes=5), NO_SAMPLES),
    ("measure_collapse: empty classes", lambda: nc.measure_collapse(few), NO_SAMPLES),
    ("test_collapse: empty classes", lambda: nc.test_collapse(H, y, H, y, num_classes=5), NO_SAMPLES),
    ("class_rows: empty classes", lambda: means.class_rows(few), NO_SAMPLES),
    ("measure_collapse: no samples", lambda: nc.measure_collapse(nc.ClassStatistics(3, 4)), r"\(0, 1, 2\)"),
    ("measure_collapse: weighting", lambda: nc.measure_collapse(stats, weighting="mean"), "expected 'class'"),
    ("measure_features: weighting", lambda: nc.measure_features(H, y, num_classes=K, weighting=None),
     "weighting is None: expected 'class'"),
    ("test_collapse: weighting", lambda: nc.test_collapse(H, y, H, y, weighting="mean"), "weighting is 'mean'"),
    ("measure_features: reference of another K", lambda: nc.measure_features(H, y, num_classes=K, reference=few),
     "reference has K = 5, D = 4: expected K = 3, D = 4"),
    ("measure_features: means for reference", lambda: nc.measure_features(H, y, num_classes=K, reference=M),
     "reference is a Tensor: expected ClassStatistics"),
    ("measure_features: reference without samples",
     lambda: nc.measure_features(H, y, num_classes=K, reference=nc.ClassStatistics(3, 4)), "3 of 3 classes have no"),
    ("measure_features: meta", lambda: nc.measure_features(H.to("meta"), y, num_classes=K), "on meta: expected a dens"),
    ("measure_features: sparse", lambda: nc.measure_features(H.to_sparse(), y, num_classes=K), "sparse_coo"),
    ("measure_features: words", lambda: nc.measure_features(np.array([["a"] * 4] * 12), y, num_classes=K), "ndarray"),
    ("measure_features: ragged", lambda: nc.measure_features([[1.0, 2], [1.0]], y, num_classes=K), "a list: expected"),
    ("measure_features: masked", lambda: nc.measure_features(np.ma.masked_array(H, H > 0), y, num_classes=K),
     "masked entries: expected a plain array"),
    ("measure_features: numbers of 300 digits",
     lambda: nc.measure_features(H.double() * 1e300, y, num_classes=K), "squares overflow: divide the features"),
    ("measure_features: 8 bits", lambda: nc.measure_features(H.to(torch.float8_e4m3fn), y, num_classes=K), "16 bits"),
    ("ClassStatistics: another D", lambda: nc.ClassStatistics(3, 5).update(H, y), r"expected \(B, 5\)"),
    ("ClassStatistics: merge of another D", lambda: nc.ClassStatistics(3, 4) + nc.ClassStatistics(3, 5),
     "cannot merge.* dim=4 and dim=5: make them alike"),
    ("ClassStatistics: merge with a tensor", lambda: stats + H, "cannot add a Tensor to ClassStatistics: expected"),
    ("ClassStatistics: merge with nothing", lambda: stats + None, "cannot add a NoneType"),
    ("ClassStatistics: class_counts a word",
     lambda: nc.ClassStatistics(3, 4, "full", class_counts="many"), "class_counts is a str: expected a tensor"),
    ("ClassStatistics: class_counts boolean", lambda: nc.ClassStatistics(3, 4, "full", [True] * 3), "3 positive whole"),
    ("ClassStatistics: class_counts NaN", lambda: nc.ClassStatistics(3, 4, "full", [1, 2, NaN]), "3 positive whole"),
    ("ClassStatistics: within", lambda: nc.ClassStatistics(3, 4, "diagonal"), "within is 'diagonal': expected 'trace'"),
    ("ClassStatistics: ddof", lambda: stats.class_variances(ddof=-1), "ddof is -1: expected 0 or 1"),
    ("ClassStatistics: directions", lambda: stats.within_along(torch.ones(5, 2).double()), r"expected \(4, r\)"),
    ("ClassStatistics: all_reduce", lambda: stats.all_reduce(), "init_process_group"),
    ("as_tensor: none", lambda: statistics.as_tensor(None, "it"), "it is None: expected a tensor"),
    ("centre_rows: overflow", lambda: statistics.centre_rows(M * 1e300, M[0]), "squares overflow"),
    ("nc1_pinv: no matrix kept", lambda: variability.nc1_pinv(trace), "within='trace' keeps no covariance"),
    ("vci: no matrix kept", lambda: variability.vci(trace), "within='trace' keeps no covariance"),
    ("nc1_trace: weighting", lambda: variability.nc1_trace(stats, "mean"), "weighting is 'mean'"),
    ("cdnv: too few samples", lambda: variability.cdnv(stats, ddof=4), "class 0 has 4 samples: ddof=4 needs more"),
    ("simplex_etf: dtype", lambda: etf.simplex_etf(3, dtype=torch.int64), "dtype is torch.int64: expected a floating"),
    ("simplex_gram: infinity", lambda: etf.simplex_gram(math.inf), "num_classes is inf: a simplex needs a whole"),
    ("riesz_uniformity: exponent", lambda: means.riesz_uniformity(M, exponent="2"), "exponent is '2': expected a pos"),
    ("riesz_uniformity: exponent 0", lambda: means.riesz_uniformity(M, exponent=0), "exponent is 0: expected a pos"),
    ("unit_rows: a zero row", lambda: means.unit_rows(torch.eye(3) * torch.tensor([0.0, 1, 1])), r"of class \[0\]"),
    ("as_rows: words", lambda: means.as_rows("rows"), "rows is a str"),
    ("simplex_distance: zeros", lambda: means.simplex_distance(0 * M, M), "all rows are zero"),
    ("gram_distance: sizes", lambda: means.gram_distance(torch.eye(3), torch.eye(4)), r"\(3, 3\), target \(4, 4\)"),
    ("gram_distance: not square", lambda: means.gram_distance(W, W), r"expected \(K, K\) of both"),
    ("gram_distance: NaN", lambda: means.gram_distance(torch.eye(3) * NaN, torch.eye(3)), "gram holds NaN"),
    ("gram_distance: none", lambda: means.gram_distance(None, torch.eye(3)), "gram is None"),
    ("nc3_bias: bias", lambda: duality.nc3_bias(W, torch.ones(4), stats), r"b has shape \(4,\): expected \(3,\)"),
    ("nc3_bias: weighting of rows", lambda: duality.nc3_bias(W, b, M, weighting="sample"), "rows have 'class' only"),
    ("as_bias: NaN", lambda: duality.as_bias(b * NaN, W), "b holds NaN or infinity"),
    ("nearest_centre: no means", lambda: nearest_centre.nearest_centre(H, None), "means is None"),
    ("nearest_centre: statistics for means", lambda: nearest_centre.nearest_centre(H, stats), "means is a ClassSta"),
    ("classifier_decision: bias", lambda: nearest_centre.classifier_decision(H, W, b[:2]), r"b has shape \(2,\)"),
    ("both_decisions: W", lambda: nearest_centre.both_decisions(H, W[:2], None, M), "W has shape"),
    ("nc4_disagreement: W", lambda: nearest_centre.nc4_disagreement(H, W[:2], None, M), "W has shape"),
    ("logit_margin: none", lambda: nearest_centre.logit_margin(None, y), "logits is None"),
    ("logit_margin: integers", lambda: nearest_centre.logit_margin(logits.long(), y), "logits are torch.int64"),
    ("logit_margin: NaN", lambda: nearest_centre.logit_margin(logits * NaN, y), "logits hold NaN"),
    ("logit_margin: one class", lambda: nearest_centre.logit_margin(logits[:, :1], y), "K >= 2"),
    ("linearly_separable: NaN", lambda: nearest_centre.linearly_separable(H * NaN, y), "features hold NaN"),
    ("linearly_separable: float labels", lambda: nearest_centre.linearly_separable(H, y.float()), "whole number"),
    ("linearly_separable: labels of two axes",
     lambda: nearest_centre.linearly_separable(H, y[:, None]), r"shape \(12, 1\), of 12 features"),
    ("linearly_separable: one class", lambda: nearest_centre.linearly_separable(H, 0 * y), "two classes at least"),
    ("nc5_ood: another D", lambda: ood.nc5_ood(stats, H[:, :2]), r"ood has shape \(12, 2\): expected \(N, 4\)"),
    ("nc5_ood: a word", lambda: ood.nc5_ood(stats, "ood"), "ood is a str: expected a tensor"),
    ("nc5_ood: complex", lambda: ood.nc5_ood(stats, H + 0j), "ood is torch.complex64: expected real numbers"),
    ("nc5_ood: NaN", lambda: ood.nc5_ood(stats, H * NaN), "ood holds NaN"),
    ("test_collapse: test features of another D", lambda: nc.test_collapse(H, y, H[:, :2], y),
     "train has 3 classes of dimension 4, test 3 of 2: expected the same"),
    ("test_collapse: a label the train set lacks", lambda: nc.test_collapse(H, y, H, y + 1), "test set: labels run fr"),
    ("test_collapse: no train labels", lambda: nc.test_collapse(H, None, H, y), "train labels is None"),
    ("test_collapse: coinciding means", lambda: nc.test_collapse(torch.ones(12, 4), y, H, y), "class means coincide"),
    ("test_collapse: restarts", lambda: nc.test_collapse(H, y, H, y, restarts=-1), "restarts is -1"),
    ("test_collapse: seed", lambda: nc.test_collapse(H, y, H, y, seed="a"), "seed 'a': expected whole numbers"),
    ("test_collapse_from_statistics: features",
     lambda: generalization.test_collapse_from_statistics(H, stats), "train is a Tensor: expected ClassStatistics"),
    ("weak_variance: too few initial points", lambda: generalization.weak_variance(H, 3, initial=[M[:2]]),
     "initial has a set of 2 points: expected 3"),
    ("weak_variance: NaN", lambda: generalization.weak_variance(H * NaN, 3), "finite floating-point"),
    ("weak_lower_bound: no matrix kept", lambda: generalization.weak_lower_bound(trace, 3), "keeps no covariance"),
): wrong(*what.split(": ", 1), lambda _, call=call: call(), says)

# --- settings.ini, with file and line -------------------------------------------------------------


def from_file(text):
    "Recipes as a settings.ini with this text chooses them."
    def call(tmp):
        (tmp / "settings.ini").write_bytes(text if isinstance(text, bytes) else f"[DEFAULT]\n{text}\n".encode())
        return recipes.image_grid(settings.get_settings(tmp))
    return call


for text, says in {
    "preset = quik": "line 2: preset='quik': expected one of quick, .* did you mean 'quick'?",
    "\nseeds = three": "line 3: seeds = 'three' is not of type int", "seeds = 2.5": "line 2: seeds = '2.5' is not",
    "seeds = 0": "line 2: seeds=0: expected a whole number of at least 1", "seeds =": "line 2: seeds is empty",
    "first_seed = -1": "line 2: first_seed=-1: expected a whole number of at least 0",
    "device = gpu": "line 2: device='gpu': expected auto, cpu, cuda", "device = cuda:x": "line 2: device='cuda:x'",
    "seed = 3": "line 2: seed: studies set it; expected first_seed", "runs_dir =": "line 2: runs_dir is empty",
    "datasets = minst": "datasets='minst': expected one of .* did you mean 'mnist'?",
    "epoch = 3": "line 2: unknown key 'epoch'; did you mean 'epochs'?", "seds = 3": "did you mean 'seeds'?",
    "lr = 0.1\nepochs = many": "line 3: epochs = 'many' is not of type int", "lr = -1": "line 2: lr=-1.0: expected",
    "epochs =": "line 2: epochs = '' is not of type int", "classes = a b": "line 2: classes = 'a b' is not of type",
    "loss = hinge": "line 2: loss='hinge': expected one of cross_entropy, mse", "lr = %(x)s": "not of type float",
    "model = resnet": "line 2: model='resnet': expected one of .* did you mean 'resnet18'?|resnet34|resnet50",
    "this is no setting": r"settings.ini.* \[line\s+2\]", "seeds = 1\nseeds = 2": r"\[line\s+3\].*already exists",
    b"preset = quick": "settings.ini.*no section headers", b"\xff\xfe": "settings.ini.*can't decode",
    b"[studies]\nseeds = 2": r"section \[studies\]: expected \[DEFAULT\] only",
}.items(): wrong("get_settings", repr(text), from_file(text), says)

wrong("override", "a text that is no truth value", lambda _: settings.override(Flag(), {"on": "maybe"}),
      "on = 'maybe': expected true or false")


@dataclass(frozen=True)
class Flag:
    on: bool = True


def test_truth_values_and_home_in_settings(tmp_path):
    assert settings.override(Flag(), {"on": "False"}) == Flag(on=False)
    assert settings.override(Flag(on=False), {"on": "true"}) == Flag()
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ndata_dir = ~/images\n")
    assert settings.get_settings(tmp_path).data_dir == Path.home() / "images"


S, nowhere = settings.Settings, settings.Settings(runs_dir=Path("/nowhere"))
for what, call, says in (
    ("Settings: seeds", lambda: S(seeds="3"), "seeds='3': expected a whole number"),
    ("Settings: first_seed", lambda: S(first_seed=1.5), "first_seed=1.5: expected a whole number"),
    ("Settings: device", lambda: S(device=None), "device=None: expected auto"),
    ("pick_device: another name", lambda: settings.pick_device("gpu"), "device='gpu': expected auto"),
    ("pick_device: not here", lambda: settings.pick_device("cuda:99"), "device='cuda:99': not here"),
    ("log_epochs: epochs", lambda: settings.log_epochs(0, 5), "epochs=0: expected a whole number of at least 1"),
    ("log_epochs: points", lambda: settings.log_epochs(10, 1), "points=1: expected a whole number of at least 2"),
    ("override: an unknown field", lambda: settings.override(recipe, {"lrr": "1"}), "did you mean 'lr'?"),
    ("override: a text", lambda: settings.override(recipe, {"milestones": "a"}), "milestones = 'a' is not of type tup"),
    ("check_number: above", lambda: settings.check_number("x", 2, 0, 1), "x=2: expected a number between 0 and 1"),
    ("check_choice: a word", lambda: settings.check_choice("x", "b", ("a", None)), "x='b': expected one of a, None"),
    ("image_grid: overrides", lambda: recipes.image_grid(S(overrides={"lrr": "1"})), "did you mean 'lr'?"),
    ("image_base: datasets", lambda: recipes.image_base(S(datasets="minst")), "did you mean 'mnist'?"),
): wrong(*what.split(": ", 1), lambda _, call=call: call(), says)

# --- the laboratory -------------------------------------------------------------------------------

batch = [(H, y)]
for what, call, says in (
    ("measure: no network", lambda: nc.measure(None, batch), "model is None: expected a torch.nn.Module"),
    ("measure: a class", lambda: nc.measure(nn.Linear, batch), "model is <class.*expected a torch.nn.Module"),
    ("measure: no loader", lambda: nc.measure(net, None), "the loader is None: expected batches"),
    ("measure: no batches", lambda: nc.measure(net, []), "the loader gave no batches"),
    ("measure: a layer", lambda: nc.measure(net, batch, layers="3"), "no layer '3'; did you mean 0, 1, 2?"),
    ("measure: a batch of one", lambda: nc.measure(net, [H]), "a batch is a Tensor .*: expected .inputs, labels."),
    ("measure: words", lambda: nc.measure(net, [("a", "b")]), "labels is a str"),
    ("measure: float labels", lambda: nc.measure(net, [(H, y.float())]), "labels are torch.float32: expected integers"),
    ("measure: labels beyond K", lambda: nc.measure(net, [(H, y + 5)]), "labels run from 5 to 7: expected 0..2"),
    ("measure: NaN", lambda: nc.measure(net, [(H * NaN, y)]), "did the training diverge"),
    ("measure: num_classes", lambda: nc.measure(net, batch, num_classes="3"), "num_classes is '3'"),
    ("measure: head", lambda: nc.measure(net, batch, head="x"), "no layer 'x'"),
    ("measure: a layer for head", lambda: nc.measure(net, batch, head=net[2]), r"head is a Linear: .*\(W, b\)"),
    ("measure: W for head", lambda: nc.measure(net, batch, head=W), r"head is a Tensor: expected .*\(W, b\)"),
    ("measure: keep a number", lambda: nc.measure(net, batch, keep=3), "keep=3: expected 'last', 'all', 'none'"),
    ("measure: all ignored", lambda: nc.measure(net, [(H, 0 * y - 100)]), "at least one sample|have no samples"),
    ("measure: keep", lambda: nc.measure(net, batch, keep="x"), "keep='x': expected 'last', 'all', 'none'"),
    ("measure: pool", lambda: nc.measure(net, batch, pool="max"), "pool='max': expected 'avg', 'flatten' or a functio"),
    ("measure: a pool of no layer", lambda: nc.measure(net, batch, pool={"9": "avg"}), r"pool for \['9'\]: expected"),
    ("measure: output", lambda: nc.measure(net, batch, output="z"), "output='z': not in what the network gives"),
    ("measure: next_token", lambda: nc.measure(net, batch, next_token=True), r"expected \(B, T\) for both"),
    ("measure: bytes", lambda: nc.measure(net, [(H.byte(), y)]),
     r"inputs are torch.uint8, the weights torch.float32: convert.*b\[0\].float\(\) / 255"),
    ("measure: whole numbers", lambda: nc.measure(net, [(H.long(), y)]), "inputs are torch.int64, the weights"),
    ("measure: a lazy layer", lambda: nc.measure(nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3)), batch),
     "0.weight has no shape yet.*run one batch through it first"),
    ("measure: a lazy classifier", lambda: nc.measure(nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3)), batch),
     "1.weight has no shape yet"),
    ("measure: no weights", lambda: nc.measure(nn.Sequential(nn.Linear(4, 3, device="meta")), batch),
     "weights of this Sequential are on meta and have no values: load them"),
    ("measure: a layer alone", lambda: nc.measure(net[2], [(torch.randn(12, 5), y)]),
     r"Linear has no layers inside: wrap it, nn.Sequential\(model\), or call measure_features"),
    ("measure: no linear layer", lambda: nc.measure(nn.Sequential(nn.Conv2d(1, 3, 3)), batch, head=(W, b)),
     "has no nn.Linear and no 1x1 convolution at its end: name the layers to measure, layers="),
    ("measure: fewer labels", lambda: nc.measure(net, [(H, y[:9])]), "a batch has 12 inputs and 9 labels"),
    ("measure: time first", lambda: nc.measure(nn.Sequential(Turned(), nn.Linear(4, 3)), [(torch.randn(12, 5, 4), y)]),
     r"if it is \(T, B, D\), give pool=lambda t: t.mean\(0\)"),
    ("measure: one output", lambda: nc.measure(nn.Sequential(nn.Linear(4, 1)), [(H, y % 2)]),
     "the classifier has 1 output: for two classes pass num_classes=2 .* call measure_regression"),
    ("measure: one class", lambda: nc.measure(net, batch, [(H, 0 * y + 2)], absent="leave out"),
     "only one class has samples, 2: collapse compares at least two"),
    ("measure: a list of loaders", lambda: nc.measure(net, batch, [torch.utils.data.DataLoader(batch)] * 2),
     "test_dl is a list of loaders; several test sets: give {name: loader}"),
    ("compare: a table", lambda: (found := nc.measure(net, batch)).compare(found.frame),
     "a DataFrame to compare with: expected a report"),
    ("CollapseMetric: classes", lambda: metric(1, 5), "num_classes is 1: expected the number of classes"),
    ("CollapseMetric: a word", lambda: metric("4", 5), "num_classes is '4'"),
    ("CollapseMetric: dim", lambda: metric(4, 0), "dim is 0: expected the length of a feature vector"),
    ("CollapseMetric: a layer", lambda: metric(3, 5, head=net[2]), "head is a Linear: expected a function of no"),
    ("CollapseMetric: a pair", lambda: metric(3, 5, head=(W, b)), "head is a tuple: expected a function of no"),
    ("measure: references", lambda: nc.measure(net, batch, {"a": batch}, references={"b": "train"}), "expected names"),
    ("FeatureTaps: layers", lambda: taps.FeatureTaps(net, None), "layers=None: expected the name of a layer"),
    ("FeatureTaps: numbers", lambda: taps.FeatureTaps(net, [3]), r"layers=\[3\]: expected the name of a layer"),
    ("FeatureTaps: no layers", lambda: taps.FeatureTaps(net, []), "expected one or more, each once"),
    ("head_of: an unknown layer", lambda: taps.head_of(nn.ModuleDict({"head": nn.Linear(2, 3)}), "haed"), "mean head"),
    ("head_of: no classifier", lambda: taps.head_of(nn.ReLU()), "ReLU has no nn.Linear"),
    ("tap_layers: no network", lambda: taps.tap_layers("net"), "model is 'net': expected a torch.nn.Module"),
    ("pool_features: integers", lambda: taps.pool_features(y[:, None]), "expected floating activations"),
    ("CollapseRecorder: every", lambda: nc.CollapseRecorder(every=True), "every=True: expected a positive integer"),
    ("CollapseRecorder: epochs", lambda: nc.CollapseRecorder(epochs="log"), "epochs='log': expected numbers of epochs"),
    ("CollapseRecorder: negative epochs", lambda: nc.CollapseRecorder(epochs=[-1]), "expected numbers of epochs"),
    ("CollapseRecorder: a measure", lambda: recorder.CollapseRecorder().plot("nc9"), "no 'nc9' in the history"),
    ("recipe_id: no recipe", lambda: runs.recipe_id("digits"), "'digits': expected a recipe"),
    ("get_run: no recipe", lambda: runs.get_run(None, nowhere), "None: expected a recipe"),
    ("get_run: a list", lambda: runs.get_run([recipe], nowhere), "expected a recipe"),
    ("get_runs: one recipe", lambda: runs.get_runs(recipe, nowhere), "expected recipes in a list; for one, get_run"),
    ("curves: a measure", lambda: history.curves(table, "acuracy"), "no 'acuracy' .* did you mean 'accuracy'?"),
    ("curves: several", lambda: history.curves(table, "accuracy"), "several fit, say which split"),
    ("curves: columns", lambda: history.curves(table.drop(columns="split"), "accuracy"), r"lacks \['split'\]"),
    ("fall: a measure", lambda: history.fall(table, "nc9"), "no 'nc9' for"),
    ("final: none", lambda: history.final(history.curves(table, "accuracy", "test"), 0), "last=0: expected a whole"),
    ("FeatureTask: none", lambda: probes.FeatureTask(None, y, y, H, y, y), "train features: expected a tensor"),
    ("FeatureTask: float labels", lambda: probes.FeatureTask(H, y.float(), y, H, y, y), "expected torch.int64, one"),
    ("FeatureTask: too few labels", lambda: probes.FeatureTask(H, y[:3], y, H, y, y), r"train: 12 features, .*\(3,\)"),
    ("FeatureTask: another D", lambda: probes.FeatureTask(H, y, y, H[:, :2], y, y), "4 dimensions, test features 2"),
    ("FeatureTask: a new label", lambda: probes.FeatureTask(H, y, y, H, y + 1, y), "test label 3: the train labels en"),
    ("linear_probe: kind", lambda: probes.linear_probe(task, "standardized"), "did you mean 'standardised'?"),
    ("linear_probe: C", lambda: probes.linear_probe(task, "raw", C=-1), "C=-1: expected a number of at least"),
    ("fit_logistic: labels", lambda: probes.fit_logistic(H, y[:4]), r"features \(12, 4\), labels \(4,\)"),
    ("fit_logistic: NaN", lambda: probes.fit_logistic(H * NaN, y), "expected finite"),
    ("few_shot: shots", lambda: probes.few_shot(task, 0), "shots=0: expected a whole number of at least 1"),
    ("seed_interval: kind", lambda: claims.seed_interval([1], "z"), "kind='z': expected one of t, log-t"),
    ("seed_interval: level", lambda: claims.seed_interval([1, 2], level=95), "level=95: expected a number between 0 a"),
    ("seed_interval: no values", lambda: claims.seed_interval([]), "no values; expected one number a seed"),
    ("Statement: no bar", lambda: claims.Statement("s", "", "", ""), "statement s: expected one bar"),
    ("Statement: bar", lambda: claims.Statement("s", "", "", "", at_most=NaN), "statement s: bar=nan: expected"),
    ("Statement: bound", lambda: claims.Statement("s", "", "", "", 1, bound="middle"), "bound='middle': expected one"),
    ("Statement: a dot", lambda: claims.Statement("1.a", "", "", "", 1), "statement 1.a: expected an id without a dot"),
    ("Statement: log", lambda: claims.Statement("s", "", "", "", 0, interval="log-t"), "s: bar=0: .* a positive bar"),
    ("holm: one id", lambda: claims.holm([claim, claim]), r"claims \['s', 's'\]: expected each id once"),
    ("holm: others", lambda: claims.holm([claim], others=-3), "others=-3: expected a whole number of at least 0"),
    ("power: draws", lambda: claims.power(claim, 3, draws=0), "draws=0: expected a whole number of at least 1"),
    ("power: seeds", lambda: claims.power(claim, 3.0), "seeds=3.0: expected a whole number of at least 1"),
    ("prediction_interval: seeds", lambda: claims.prediction_interval(claim, 0), "seeds=0: expected a whole number"),
    ("study: one id", lambda: studies.study("d", "D", (statement,) * 2), "study d: .*'s', 's'.*: expected each id"),
    ("Claim: seeds that do not pair", lambda: statement.claim([1, 2], [1]), "2 values and 1 of the control"),
): wrong(*what.split(": ", 1), lambda _, call=call: call(), says)

Odd = make_dataclass("Odd", [("lr", object, 0.1)], frozen=True)
for value in (np.int64(1), np.float32(1), np.ones(2), torch.ones(2), Path("a"), {1}, (1, {2})):
    wrong("recipe_id", f"a field {value!r}", lambda _, v=value: runs.recipe_id(Odd(v)),
          f"^Odd: lr is a {type(value).__name__}, .*: expected what JSON has: numbers of Python, texts")

wrong("Entry", "a file that is not there", lambda tmp: store.Entry(tmp).path("x"), "x: no such file", FileNotFoundError)
wrong("load_claims", "a file that is not there", lambda tmp: claims.load_claims(tmp / "c"), "", FileNotFoundError)
wrong("Run", "weights that were not kept", lambda tmp: runs.Run(recipe, tmp).model(7), "no weights of epoch 7; kept")
wrong("Run", "no history", lambda tmp: runs.Run(recipe, tmp).history, "history.parquet: no such", FileNotFoundError)

# --- images ---------------------------------------------------------------------------------------

for what, call, says in (
    ("ImageData: none", lambda: replace(images, train_images=None), "train_images: expected uint8 .* got a NoneType"),
    ("ImageData: floats", lambda: replace(images, train_images=bytes8.float()), "got torch.float32 of shape"),
    ("ImageData: a list of labels", lambda: replace(images, train_labels=[0] * 6), "expected int64 .* got a list"),
    ("ImageData: one class", lambda: replace(images, classes=("a",)), "expected two or more names"),
    ("ImageData: two sizes", lambda: replace(images, test_images=bytes8[..., :4]), r"train images are \(1, 8, 8\)"),
    ("ImageData: subset", lambda: images.subset("1"), "train_per_class='1': expected a whole number"),
    ("ImageData: too many", lambda: images.subset(3), "asked for 3 samples of class 0, which has 2"),
    ("ImageData: classes twice", lambda: images.keep_classes((0, 0)), "expected two or more of 0..2, each once"),
    ("ImageData: classes as floats", lambda: images.keep_classes((0.0, 1.0)), "expected two or more of 0..2"),
    ("ImageData: coarsen nothing", lambda: images.coarsen(None), "partition None: expected at least 2 groups"),
    ("ImageData: coarsen words", lambda: images.coarsen(["a", "b", "c"]), "expected at least 2 groups"),
    ("ImageData: label noise", lambda: images.with_label_noise("all"), "fraction='all': expected a number between"),
    ("ImageData: imbalance", lambda: images.with_imbalance(NaN), "ratio=nan: expected a number of at least 1"),
    ("seeded: a fraction", lambda: data.seeded(1.5), "seed=1.5: expected a whole number of at least 0"),
    ("load_dataset: no name", lambda: sources.load_dataset(None), "name=None: expected the name of a data set"),
    ("load_dataset: seed", lambda: sources.load_dataset("digits", seed=-1), "seed=-1: expected a whole number"),
    ("templates: noise", lambda: sources.templates(-1), "noise=-1: expected a number between 0"),
    ("font_letters: letters", lambda: sources.font_letters(letters="A"), "letters='A': expected two or more"),
    ("font_letters: size", lambda: sources.font_letters(0), "size=0: expected a whole number of at least 1"),
    ("adapt_images: shape", lambda: sources.adapt_images(images, (2, 4, 4)), "expected 1 or 3 channels, height and"),
    ("TensorLoader: floats", lambda: loaders.TensorLoader(bytes8.float(), labels6), "expected torch.uint8 of shape"),
    ("TensorLoader: labels", lambda: loaders.TensorLoader(bytes8, labels6[:2]), "6 images and 2 labels"),
    ("TensorLoader: batch_size", lambda: loaders.TensorLoader(bytes8, labels6, 2.5), "batch_size=2.5: expected a whol"),
    ("TensorLoader: mean", lambda: loaders.TensorLoader(bytes8, labels6, mean=torch.ones(3)), "mean has shape"),
    ("TensorLoader: augment", lambda: loaders.TensorLoader(bytes8, labels6, augment="crop"), "did you mean 'crop_flip"),
    ("build_model: name", lambda: models.build_model("resnet19", 10), "did you mean 'resnet18'?|resnet"),
    ("build_model: num_classes", lambda: models.build_model("mlp", 0), "num_classes=0: expected a whole number"),
    ("build_model: width", lambda: models.build_model("mlp", 10, 1, 0), "width=0: expected a whole number"),
    ("measure_transfer: a measure", lambda: transfer.measure_transfer(None, ("x",)), "expected some of probe_raw"),
): wrong(*what.split(": ", 1), lambda _, call=call: call(), says)

for change, says in ((dict(model="resnet19"), "model='resnet19': expected"), (dict(loss="hinge"), "loss='hinge'"),
                     (dict(epochs="3"), "epochs='3': expected a whole number"), (dict(epochs=1.5), "epochs=1.5"),
                     (dict(epochs=None), "epochs=None"), (dict(batch_size=1), "batch_size=1: .* of at least 2"),
                     (dict(seed=1.5), "seed=1.5"), (dict(seed=True), "seed=True"), (dict(lr="x"), "lr='x': expected"),
                     (dict(lr=NaN), "lr=nan"), (dict(momentum=2), "momentum=2: expected a number between 0 and 1"),
                     (dict(width="4"), "width='4'"), (dict(train_per_class=0), "train_per_class=0"),
                     (dict(milestones=3), "milestones=3: expected incr"), (dict(classes=3), "classes=3: expected"),
                     (dict(milestones=(0.5, 0.2)), "expected incr"), (dict(coarse="pair"), "did you mean 'pairs'"),
                     (dict(dataset=None), "dataset=None"), (dict(label_noise=2), "label_noise=2: .* between 0 and 1")):
    wrong("ImageRecipe", str(change), lambda _, change=change: replace(recipe, **change), says)


def picture(path, size=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size)).save(path)


def folder(spoil):
    "The data set in a folder of pictures, one of which `spoil(path)` has spoilt."
    def call(tmp):
        for file in (tmp / s / c / "0.png" for s in ("train", "test") for c in ("cat", "dog")): picture(file)
        spoil(tmp / "train" / "cat" / "0.png")
        return sources.load_dataset(tmp)
    return call


def painted(mode, colour, kind="PNG"): return lambda path: Image.new(mode, (8, 8), colour).save(path, kind)


def to_link(target): return lambda path: (path.unlink(), os.symlink(target, path))


def huge(path):
    chunk = lambda name, d: struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


for what, spoil, says in (
    ("no image", lambda p: p.write_text("x"), "0.png: not an image that can be read"),
    ("an empty file", lambda p: p.write_bytes(b""), "0.png: not an image that can be read"),
    ("half an image", lambda p: p.write_bytes(p.read_bytes()[:40]), "0.png: not an image that can be read"),
    ("3.6 thousand million pixels", huge, "0.png: not an image that can be read.*decompression bomb"),
    ("16 bits", painted("I;16", 400), "0.png: not an image that can be read .its mode is I.*: expected 8 bits"),
    ("fractions", painted("F", 0.5, "TIFF"), "0.png: .*its mode is F: expected 8 bits a channel; scale"),
    ("transparent colour", painted("RGBA", (9, 9, 9, 0)), "0.png: .*some pixels are transparent: expected opaque"),
    ("transparent grey", painted("LA", (9, 0)), "0.png: .*some pixels are transparent"),
    ("a transparent colour of a palette", lambda p: Image.new("P", (8, 8)).save(p, transparency=0), "are transparent"),
    ("another size", lambda p: picture(p, 9), r"different sizes, \(8, 8\) and \(9, 9\)"),
    ("a class without images", lambda p: p.unlink(), r"\['cat'\] are not classes of both splits"),
    ("a dead link", to_link("/nowhere.png"), "0.png: not a file; expected images as train/<class>/<file>"),
    ("a link to itself", to_link("0.png"), "0.png: not a file"),
    ("a loop of links", to_link("../.."), "0.png: not a file"),
    ("a pipe", lambda p: (p.unlink(), os.mkfifo(p)), "0.png: not a file"),
): wrong("load_dataset", what, folder(spoil), says)


def archive(content):
    def call(tmp):
        (tmp / "a.tar.gz").write_bytes(content)
        return sources.load_dataset(tmp / "a.tar.gz")
    return call


for what, content in (("garbage", b"garbage"), ("nothing", b""), ("half a header", b"\x1f\x8b\x08")):
    wrong("load_dataset", f"an archive of {what}", archive(content), "a.tar.gz: not an archive that can be read")
wrong("load_dataset", "an empty folder", lambda tmp: sources.load_dataset(tmp), "expected images in train/<class>/ and")
wrong("load_dataset", "an unknown name", lambda tmp: sources.load_dataset("minst", tmp), "did you mean 'mnist'?",
      FileNotFoundError)
wrong("load_dataset", "no download", lambda tmp: sources.load_dataset("mnist", tmp, download=False), "download=False",
      FileNotFoundError)

# --- the studies ----------------------------------------------------------------------------------

for what, call, says in (
    ("study_names: a study", lambda: command.study_names("train_vs_tests"), "did you mean 'train_vs_test'?"),
    ("study_names: none", lambda: command.study_names([]), "studies is empty: expected names"),
    ("study_names: a room", lambda: command.study_names(["papr"]), "did you mean 'paper'?"),
    ("load_study: a study", lambda: command.load_study("cascades"), "did you mean 'cascade'?"),
    ("reproduce: a preset", lambda: nc.reproduce(preset="labtop"), "did you mean 'laptop'?"),
    ("reproduce: seeds", lambda: nc.reproduce(seeds="3", studies="cascade"), "seeds='3': expected a whole number"),
): wrong(*what.split(": ", 1), lambda _, call=call: call(), says)
wrong("confirm", "not registered", lambda tmp: command.confirm("quick", runs_dir=tmp / "runs"), "quick is not reg")
wrong("register", "a study", lambda tmp: command.register(S(runs_dir=tmp / "runs"), "cascades"), "mean 'cascade'?")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call(name, tmp_path, monkeypatch):
    call, says, error = WRONG[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.compile(says, re.S)): call(tmp_path)


@pytest.mark.parametrize("name", BATCHES)
def test_a_wrong_batch_leaves_no_trace_and_the_error_names_the_split(name):
    (h, c), _ = BATCHES[name]
    before = nc.ClassStatistics(K, 4, within="full")
    with pytest.raises(ValueError): before.update(h, c)
    assert before.counts.sum() == 0 and not before.means.any() and not before.scatter.any()
    with pytest.raises(ValueError, match="^train set: "): nc.test_collapse(h, c, H, y, num_classes=K)
    with pytest.raises(ValueError, match="^test set: "): nc.test_collapse(H, y, h, c, num_classes=K)


@pytest.mark.parametrize("module", [etf, statistics, variability, means, duality, nearest_centre, ood, measures,
                                    generalization, regression, settings, data, models, sources],
                         ids=lambda m: m.__name__.removeprefix("nc_nbdev."))
def test_every_function_that_raises_is_in_the_table(module):
    table = {name.partition(":")[0].partition(" ")[0].partition(".")[0] for name in WRONG}
    public = {n: getattr(module, n) for n in module.__all__}
    raises = {n for n, f in public.items() if callable(f) and "ValueError" in (inspect.getdoc(f) or "")}
    assert raises <= table, sorted(raises - table)


COMMANDS = {
    "--preset quik": "invalid choice: 'quik'", "--seeds x": "invalid int value: 'x'", "--bogus": "unrecognized",
    "--seeds 0": "seeds=0: expected a whole number of at least 1", "--plan more": "unrecognized arguments: more",
    "--studies cascades": "study='cascades': expected one of .*; did you mean 'cascade'?",
    "--datasets minst --studies cascade": "datasets='minst': .* did you mean 'mnist'?",
    "--confirm quick": "quick is not registered", "--confirm quik": "invalid choice",
    "--runs file/runs --studies random_labels": "file", "--out file --studies random_labels": "file",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_the_command_says_what_is_wrong_in_words_and_exits_2(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit) as exit: command.main(line.split())
    said = capsys.readouterr()
    assert exit.value.code == 2 and re.search(COMMANDS[line], said.err, re.S) and "Traceback" not in said.err


@pytest.mark.parametrize("text, says", [("preset = quik", "line 2: preset='quik'"), ("seeds = x", "line 2: seeds ="),
                                        ("epoch = 3", "line 2: unknown key 'epoch'; did you mean 'epochs'?")])
def test_the_command_names_the_line_of_settings_ini(text, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text(f"[DEFAULT]\n{text}\n")
    with pytest.raises(SystemExit) as exit: command.main(["--plan", "--studies", "cascade"])
    assert exit.value.code == 2 and says in capsys.readouterr().err


def test_the_installed_command_prints_no_traceback():
    code = [sys.executable, "-c", "from nc_nbdev.reproduce import main; main()", "--studies", "alchemy"]
    run = subprocess.run(code, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr and len(run.stderr.splitlines()) == 1


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


def test_a_batch_of_which_everything_is_ignored_changes_nothing():
    report, padded = nc.measure(net, batch), nc.measure(net, [*batch, (H, 0 * y - 100)])
    assert padded.frame.equals(report.frame)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int16"])
def test_labels_of_any_whole_type(dtype):
    assert nc.measure(net, [(H, y.numpy().astype(dtype))]).frame.equals(nc.measure(net, batch).frame)
