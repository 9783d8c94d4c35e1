"Measuring a network in one pass over a split, and the recorder that does so while it is trained."
import copy
import random
import warnings
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from fastai.data import load as fastai_loader
from small_net import Batches, Net, Words, all_by_hand, few_digits, hooks, loaders, trained_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nc_nbdev.geometry.generalization import test_collapse as direct_collapse
from nc_nbdev.geometry.measures import measure_features
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.lab.history import COLUMNS, curves
from nc_nbdev.lab.recorder import CollapseRecorder, clean_loader, undisturbed
from nc_nbdev.lab.regression import measure_regression
from nc_nbdev.lab.report import MEANINGS, CollapseReport, collect, compare_splits, measure
from nc_nbdev.lab.taps import head_of, layer_features, tap_layers


@pytest.fixture(scope="module")
def data(): return few_digits()


@pytest.fixture(scope="module")
def net(data): return trained_net(data)


# -- the network and the loader ------------------------------------------------------------------------------------

def test_network_is_left_as_it_was(net, data):
    model = copy.deepcopy(net).train()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    measure(model, *loaders(data))
    wrong = [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]))]
    with pytest.raises(ValueError): measure(model, wrong, num_classes=10)
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0
    for name, value in model.state_dict().items(): assert torch.equal(value, state[name]), name


def test_network_in_half_precision(net, data):
    model, dl = copy.deepcopy(net).bfloat16(), loaders(data)[0]
    half, full = (measure(m, dl, layers="pool").measures["train"]["pool"] for m in (model, net))
    assert half.nc1_trace == pytest.approx(full.nc1_trace, rel=0.05)
    double = measure(copy.deepcopy(net).double(), dl, layers="pool").measures["train"]["pool"]
    assert double.nc1_trace == pytest.approx(full.nc1_trace, rel=1e-5)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_networks(net, data, wrap):
    dl = loaders(data)[0]
    assert measure(wrap(net), dl).frame.equals(measure(net, dl).frame)


def test_no_batches(net):
    with pytest.raises(ValueError, match="no batches"): collect(net, [], "pool", 10)


# -- collecting --------------------------------------------------------------------------------------------------

def test_collect_against_features_in_memory(net, data):
    clean, test = loaders(data, 37)
    train = collect(net, clean, tap_layers(net), 10, keep=("stage1",), head="head")
    H, H_test = all_by_hand(net, clean), all_by_hand(net, test)
    for layer, stats in train.statistics.items():
        direct = ClassStatistics.from_features(H[layer], data.y, num_classes=10)
        assert torch.equal(stats.counts, direct.counts)
        assert torch.allclose(stats.means, direct.means, atol=1e-6)
        assert torch.allclose(stats.class_scatter, direct.class_scatter, rtol=1e-5)
    assert list(train.features) == ["stage1"] and torch.allclose(train.features["stage1"], H["stage1"], atol=1e-6)
    assert train.head_layers == ("pool",)
    model = copy.deepcopy(net).eval()
    with torch.no_grad(): predicted = torch.cat([model(x) for x, _ in clean]).argmax(1)
    assert torch.equal(train.predictions, predicted) and train.accuracy == (predicted == data.y).double().mean().item()
    found = collect(net, test, tap_layers(net), 10, reference=train.statistics)
    for layer in tap_layers(net):
        nearest = torch.cdist(H_test[layer].double(), train.statistics[layer].means).argmin(1)
        assert torch.equal(found.nearest[layer], nearest)


def test_head_is_found_by_its_input_not_by_its_dimension(data):
    hidden = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)]
    model, dl = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10)), loaders(data)[0]
    layers = ("1", "2", "3", "4:input")
    assert collect(model, dl, layers, 10, head="4").head_layers == ("3", "4:input")
    m = measure(model, dl, layers=layers).measures["train"]
    assert m["2"].nc3_duality is None and "head" in m["2"].reasons["nc3_duality"] and m["3"].nc3_duality is not None


# -- measuring ---------------------------------------------------------------------------------------------------

def close(found, expected):
    for name, value in expected.items():
        if value is None: assert found[name] is None, name
        else: assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("batch_size", [37, 512])
def test_measure_against_the_direct_computation(net, data, batch_size):
    clean, test = loaders(data, batch_size)
    report = measure(net, clean, test, keep="all")
    H, H_test = all_by_hand(net, clean), all_by_hand(net, test)
    for layer in tap_layers(net):
        head = (net.head.weight.detach(), net.head.bias.detach()) if layer == "pool" else None
        reference = ClassStatistics.from_features(H[layer], data.y, num_classes=10)
        options = dict(num_classes=10, head=head, reference=reference)
        for split, features, y in (("train", H, data.y), ("test", H_test, data.test_y)):
            direct = measure_features(features[layer], y, **options)
            close(report.measures[split][layer].to_dict(), direct.to_dict())
        direct = direct_collapse(H[layer], data.y, H_test[layer], data.test_y)
        close(report.test_collapse[layer].to_dict(), direct.to_dict())


def test_keeping_features_changes_what_can_be_had(net, data):
    clean, test = loaders(data)
    last, none = measure(net, clean, test), measure(net, clean, test, keep="none")
    stem = last.measures["train"]["stem"]
    assert stem.ncc_accuracy is None and "keep" in stem.reasons["ncc_accuracy"]
    assert last.measures["train"]["pool"].ncc_accuracy is not None and last.test_collapse["pool"].weak is not None
    assert none.measures["train"]["pool"].ncc_accuracy is None and none.test_collapse["pool"].weak is None
    for layer in tap_layers(net):
        a, b = last.measures["test"][layer].to_dict(), none.measures["test"][layer].to_dict()
        close(a, b)                                                              # the test set needs nothing kept
    assert last.test_collapse["pool"].weak <= last.test_collapse["pool"].test <= last.test_collapse["pool"].strong
    with pytest.raises(ValueError, match="keep='some'"): measure(net, clean, keep="some")


def test_unbalanced_classes(net, data):
    some = torch.cat([(data.y == c).nonzero().flatten()[:30 - 2 * c] for c in range(10)])
    dl = type(loaders(data)[0])(data.x[some], data.y[some], 64)
    H, y = layer_features(net, dl, "pool")
    direct = measure_features(H["pool"], y, num_classes=10).to_dict()
    for keep in ("last", "none"):
        found = measure(net, dl, layers="pool", keep=keep).measures["train"]["pool"].to_dict()
        for name in ("nc1_trace", "nc1_pinv", "cdnv", "vci", "nc2_etf"):
            assert found[name] == pytest.approx(direct[name], rel=1e-5), (name, keep)
    plain = list(dl)                                             # a loader that does not know its labels
    stream = measure(net, plain, layers="pool", keep="none").measures["train"]["pool"]
    assert stream.nc1_pinv is None and "class_counts" in stream.reasons["nc1_pinv"]
    for arguments in (dict(keep="last"), dict(keep="none", class_counts=y.bincount(minlength=10))):
        found = measure(net, plain, layers="pool", **arguments).measures["train"]["pool"]
        assert found.nc1_pinv == pytest.approx(direct["nc1_pinv"], rel=1e-5)


def test_report(net, data):
    clean, test = loaders(data)
    report = measure(net, clean, {"test": test, "seen": clean})
    frame = report.frame
    assert isinstance(report, CollapseReport) and list(frame.columns) == ["split", "layer", "measure", "value"]
    assert not frame.duplicated(["split", "layer", "measure"]).any() and frame.value.notna().all()
    assert set(frame.split) == {"train", "test", "seen"} and set(frame.layer) == {"output", *tap_layers(net)}
    value = frame.set_index(["split", "layer", "measure"]).value
    assert value["test", "output", "accuracy"] == report.accuracy["test"]
    found = report.test_collapse["pool"]
    assert value["train", "pool", "train_variance"] == found.train
    assert value["test", "pool", "strong_test_variance"] == found.strong
    lower, weak = value["test", "pool", "weak_lower_variance"], value["test", "pool", "weak_test_variance"]
    assert (lower, weak) == (found.weak_lower, found.weak) and 0 < lower <= weak
    assert value["seen", "pool", "strong_test_variance"] == pytest.approx(value["train", "pool", "train_variance"])
    assert report.test_collapse is report.collapse["test"]
    assert report.table().loc["nc1_trace", ("test", "stem")] == value["test", "stem", "nc1_trace"]
    assert measure(net, clean).test_collapse == {}


def test_a_report_fits_a_page(net, data):
    "What is shown has few columns, a row for each layer of each split, and the notes."
    report = measure(net, *loaders(data))
    head, *rows = report._repr_html_().split("</tr>")[:-1]
    assert len(rows) == 2 * len(report.layers) and head.count("<th") <= 12
    assert "nc1_trace" in repr(report) and max(map(len, repr(report).splitlines()[:-2])) < 100
    assert f"train {report.accuracy['train']:.4g}" in repr(report)
    assert "no classifier was asked for" in repr(measure(net, loaders(data)[0], head=None, num_classes=10))


def test_a_part_of_the_train_set_against_the_rest(net, data):
    "The statistics of the reference are its own: the other splits and the train set do not enter."
    clean, test = loaders(data)
    part = torch.arange(300) % 3 == 0
    rest, seen = (type(clean)(data.x[which], data.y[which]) for which in (~part, part))
    report = measure(net, clean, {"seen": seen, "test": test, "rest": rest}, keep="all", references={"seen": "rest"})
    H = all_by_hand(net, clean)
    for layer in tap_layers(net):
        direct = direct_collapse(H[layer][~part], data.y[~part], H[layer][part], data.y[part])
        close(report.collapse["seen"][layer].to_dict(), direct.to_dict())
        value = report.frame.set_index(["split", "layer", "measure"]).value.xs(layer, level="layer")
        assert value["rest", "train_variance"] == pytest.approx(direct.train, rel=1e-4)
        assert value["seen", "strong_test_variance"] == pytest.approx(direct.strong, rel=1e-4)
        reference = ClassStatistics.from_features(H[layer][~part], data.y[~part], num_classes=10)
        near = measure_features(H[layer][part], data.y[part], num_classes=10, reference=reference).ncc_accuracy
        assert report.measures["seen"][layer].ncc_accuracy == pytest.approx(near)
    assert "rest" not in report.collapse and report.references == {"seen": "rest", "test": "train"}
    plain = measure(net, clean, test, keep="all").frame
    both = report.frame[report.frame.split.isin(("train", "test"))].reset_index(drop=True)
    pd.testing.assert_frame_equal(both, plain)                                    # nothing else has changed


@pytest.mark.parametrize("references", [{"seen": "rset"}, {"sene": "rest"}, {"seen": "rest", "rest": "train"},
                                        {"train": "rest"}, {"seen": "seen"}])
def test_unknown_references(net, data, references):
    clean, test = loaders(data)
    tests = {"seen": clean, "rest": test}
    with pytest.raises(ValueError, match="expected names"): measure(net, clean, tests, references=references)
    with pytest.raises(ValueError, match="other than 'train'"): measure(net, clean, {"train": test})


def test_passes_made_by_oneself(net, data):
    clean, test = loaders(data)
    train = collect(net, clean, tap_layers(net), 10, keep=("pool",), head="head")
    unseen = collect(net, test, tap_layers(net), 10, keep=("pool",), reference=train.statistics)
    report = compare_splits(train, {"test": unseen}, head=head_of(net))
    pd.testing.assert_frame_equal(report.frame, measure(net, clean, test).frame)


def test_heads_of_all_kinds(net, data):
    dl = loaders(data)[0]
    W, b = net.head.weight.detach(), net.head.bias.detach()
    auto = measure(net, dl).measures["train"]["pool"]
    close(measure(net, dl, head="head").measures["train"]["pool"].to_dict(), auto.to_dict())
    close(measure(net, dl, head=(W, b)).measures["train"]["pool"].to_dict(), auto.to_dict())
    close(measure(net, dl, head=(W, b), keep="none").measures["train"]["pool"].to_dict(), auto.to_dict())
    other = measure(net, dl, head=(W.flip(0), b)).measures["train"]["pool"]
    assert other.nc3_duality != pytest.approx(auto.nc3_duality) and other.nc1_trace == auto.nc1_trace
    without = measure(net, dl, head=None, num_classes=10)
    assert without.measures["train"]["pool"].nc3_duality is None and without.notes
    elsewhere = measure(net, dl, layers=("stem", "stage2"))
    assert "head:input" in elsewhere.notes[0]
    with pytest.raises(ValueError, match="num_classes is needed"): measure(net, dl, head=None)
    with pytest.raises(ValueError, match="expected nn.Linear"): measure(net, dl, head="stem")
    with pytest.raises(ValueError, match="did you mean head"): measure(net, dl, head="haed")
    more = measure(net, [(x, y % 5) for x, y in dl], num_classes=5)      # a head for more classes than there are
    assert more.accuracy["train"] is None and "10 outputs, there are 5 classes" in more.notes[0]
    assert more.measures["train"]["pool"].nc1_trace > 0


def test_network_without_a_linear_layer(data):
    model, dl = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 10, 6), nn.Flatten()), loaders(data)[0]
    report = measure(model, dl, layers=("0", "3"), num_classes=10)
    assert "no nn.Linear" in report.notes[0] and report.accuracy["train"] is not None
    assert report.measures["train"]["0"].nc1_trace > 0
    with pytest.raises(ValueError, match="num_classes is needed"): measure(model, dl, layers="0")


@pytest.mark.parametrize("change", [lambda y: y + 1, lambda y: -y, lambda y: y.float(), lambda y: y[:, None],
                                    lambda y: y[:-1]])
def test_bad_labels(net, data, change):
    with pytest.raises(ValueError, match="labels"): measure(net, [(x, change(y)) for x, y in loaders(data)[0]])


def test_empty_class_names_the_split(net, data):
    clean, test = loaders(data)
    few = [(x[y != 3], y[y != 3]) for x, y in test]
    with pytest.raises(ValueError, match="train set: .*no samples"): measure(net, few, test)
    with pytest.raises(ValueError, match="test set: .*no samples"): measure(net, clean, few)


def test_diverged_network(net, data):
    model = copy.deepcopy(net)
    with torch.no_grad(): model.stage2[0].conv1.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"): measure(model, loaders(data)[0])


def test_several_classifiers_are_named(data):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10), nn.Linear(16, 10)
        def forward(self, x):
            x = self.body(x.flatten(1))
            return self.second(x), self.first(x)
    dl, model = loaders(data)[0], Two()
    note, = measure(model, dl, layers="body").notes
    assert note.startswith("head guessed: second") and "first" in note          # its output is the network's first
    for output, name in ((0, "second"), (1, "first")):
        found, named = (measure(model, dl, layers="body", output=output, **head) for head in ({}, {"head": name}))
        pd.testing.assert_frame_equal(found.frame, named.frame)
        assert found.notes == ()
        assert named.notes == ()
    chosen = measure(model, dl, layers="body", head="first")
    note, = chosen.notes                                                        # the accuracy is of the other
    assert note.startswith("head: the network decides otherwise") and "output=" in note
    assert chosen.measures["train"]["body"].nc3_duality is not None


def test_classifiers_whose_mean_is_the_output(data):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 10), nn.Linear(64, 10)
        def forward(self, x): return self.first(x.flatten(1)) / 2 + self.second(x.flatten(1)) / 2
    note, other = measure(Mean(), loaders(data)[0], layers="first:input").notes
    assert note.startswith("head guessed: second") and "first" in note and "decides otherwise" in other


class LastToken(Words):
    "The classifier runs at every token, and the output is that of the last."
    def forward(self, input_ids): return super().forward(input_ids)["logits"][:, -1]


class Hard(nn.Linear):
    "A linear layer that computes something else."
    def forward(self, x): return -torch.cdist(x, self.weight)


AFTER = {
    "a norm": lambda: (nn.Linear(64, 10), nn.BatchNorm1d(10)),
    "positions": lambda: (nn.Unflatten(1, (16, 2, 2)), nn.Conv2d(16, 10, 1, bias=False), nn.Threshold(0.3, 0),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "a forward of its own": lambda: (Hard(64, 10),)}


@pytest.mark.parametrize("kind", AFTER)
def test_a_classifier_that_is_not_what_the_network_computes(kind, data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), *AFTER[kind]()).eval()
    if kind == "a norm": model[-1].running_mean[:5] = 3
    clean, test = loaders(data)
    note, = (report := measure(model, clean, test)).notes
    H, _ = layer_features(model, clean, layer := report.layers[-1])
    W, b = head_of(model)
    with torch.no_grad(): out = torch.cat([model(x) for x, _ in clean])
    share = ((H[layer] @ W.T + b).argmax(1) != out.argmax(1)).double().mean().item()
    assert share > 0.05 and note.startswith("head: the network decides otherwise than W h + b for ")
    assert float(note.partition("for ")[2].partition(" %")[0]) == pytest.approx(100 * share, abs=8)
    assert measure(model, clean, head=None, num_classes=10).notes[0].startswith("No NC3")
    assert measure(model, clean, keep="none").notes == ()             # without features nothing is compared


def test_features_that_the_classifier_does_not_read():
    torch.manual_seed(0)
    model, batches = LastToken(), [(torch.randint(0, 7, (200, 5)), torch.arange(200) % 7)]
    note, = measure(model, batches, layers="head:input").notes
    assert "decides otherwise" in note
    last = measure(model, batches, layers="head:input", pool=lambda t: t[:, -1])
    assert last.notes == () and last.measures["train"]["head:input"].nc4_disagreement is not None


class Repeats(nn.Module):
    "A block that runs more than once, one that never runs, and a classifier that may run twice."
    def __init__(self, heads=1):
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.stem, self.shared, self.unused, self.last = nn.Linear(64, 64), block(), block(), block()
        self.head, self.heads = nn.Linear(64, 10), heads
    def forward(self, x):
        x = self.stem(x.flatten(1))
        for _ in range(3): x = self.shared(x)
        for _ in range(self.heads): out = self.head(self.last(x))
        return out


def test_proposed_layers_that_do_not_run_once_are_left_out(data):
    torch.manual_seed(0)
    clean, test = loaders(data, 64)
    model, layers = Repeats(), ("stem", "shared", "unused", "head:input")
    assert tap_layers(model) == layers
    for options in ({}, {"keep": "all"}, {"references": {"test": "more"}}):
        report = measure(model, clean, {"test": test, "more": test}, **options)
        given = measure(model, clean, {"test": test, "more": test}, layers=("stem", "head:input"), **options)
        assert report.layers == ("stem", "head:input") and report.frame.equals(given.frame) and given.notes == ()
        assert [note.partition(" in the")[0] for note in report.notes] == [
            "Left out: layer 'shared' ran 3 times", "Left out: layer 'unused' ran 0 times"]
    with pytest.raises(ValueError, match="'shared' ran 3 times"): measure(model, clean, layers=layers)
    with pytest.raises(ValueError, match="'head:input' ran 2 times"): measure(Repeats(heads=2), clean)


def test_regression_leaves_out_proposed_layers_that_do_not_run_once(data):
    torch.manual_seed(0)
    numbers = [(x, torch.randn(len(x), 10) + x.flatten(1)[:, :10]) for x, _ in loaders(data, 64)[0]]
    model, left_out = Repeats(), {"shared": 3, "unused": 0}
    for call in (measure, measure_regression):
        report = call(model, numbers, {"test": numbers})
        given = call(model, numbers, {"test": numbers}, layers=("stem", "head:input"))
        assert report.layers == ("stem", "head:input") and report.frame.equals(given.frame)
        assert [n.partition(" in the")[0] for n in report.notes if n not in given.notes] == [
            f"Left out: layer '{layer}' ran {times} times" for layer, times in left_out.items()]
    with pytest.raises(ValueError, match="'shared' ran 3 times"): measure(model, numbers, layers=("stem", "shared"))


def test_the_last_layer_of_regression_belongs_to_the_layer_that_it_reads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(200, 4)
    numbers = [(x[i:i + 64], x[i:i + 64, :2] + torch.randn(len(x[i:i + 64]), 2)) for i in range(0, 200, 64)]
    def found(**options):
        report = measure(model, numbers, **options)
        return {layer for layer in report.frame.query("measure == 'nrc2'").layer}, report.notes
    assert found() == ({"4:input"}, ()) and found(layers=("3", "1")) == found(layers=("1", "3")) == ({"3"}, ())
    none, note = found(layers="1")
    assert none == set() and note == ("No NRC2 and NRC3: none of the layers is the input of the last; add '4:input'.",)
    assert found(layers="1", head=(model[4].weight, None))[0] == {"1"}             # as the caller says
    assert found(head=None) == (set(), ("No NRC2 and NRC3: no last layer was asked for.",))
    classes = [(x, torch.arange(200) % 2)]
    with pytest.raises(ValueError, match="num_classes is needed"): measure(model, classes, head=None)


def test_the_heading_of_a_measure_is_not_a_split(data):
    page = measure(Net(), loaders(data)[0], layers="pool").to_html()       # no test set: no train variance
    assert "<th>train</th>" in page and 'title="spread of train samples' not in page


def test_parts_that_take_no_hooks(data):
    "A part of torch.jit, and one that torch.compile has compiled before."
    clean, _ = loaders(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                # torch.jit.script is deprecated
        body = torch.jit.script(nn.Sequential(nn.Linear(64, 16), nn.ReLU()))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), body, nn.Linear(16, 10))
    assert tap_layers(model) == ("1", "3:input") == measure(model, clean).layers
    with pytest.raises(ValueError, match="'2' is compiled by torch.jit"): measure(model, clean, layers=("1", "2"))
    assert hooks(model) == 0
    part = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)])
    model = nn.Sequential(nn.Flatten(), torch.compile(part, backend="eager"), nn.Linear(64, 10)).eval()
    with torch.no_grad(): model(data.x)
    report = measure(model, clean)
    assert report.layers[-1] == "2:input" and report.measures["train"]["2:input"].nc3_duality is not None


def test_rows_and_a_bias_of_the_network_itself(data):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())
            self.scale, self.W, self.b = (nn.Parameter(torch.randn(s)) for s in ((10,), (10, 16), (10,)))
        def forward(self, x): return nn.functional.linear(self.body(x), self.W, self.b)
    torch.manual_seed(0)
    model, (clean, test) = Own(), loaders(data)
    report = measure(model, clean, test)
    given = measure(model, clean, test, layers="body", head=(model.W.detach(), model.b.detach()))
    assert report.notes == ("head guessed: the output is that of body by the rows of W.",)
    found, direct = (r.measures["test"]["body"].to_dict() for r in (report, given))
    close(found, direct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [nn.Identity(), nn.Softmax(1), nn.LogSoftmax(1), nn.Threshold(-1e3, 0)])
def test_what_changes_no_decision_is_not_said(last, dtype, data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10), last).to(dtype)
    clean, test = loaders(data)
    assert measure(model, clean, test).notes == ()


def test_pool_by_layer(net, data):
    dl = loaders(data)[0]
    largest = lambda t: t.amax((2, 3))
    found = measure(net, dl, pool={"stage1": largest}).measures["train"]
    for layer, pool in (("stage1", largest), ("stage2", "avg")):
        assert found[layer].nc1_trace == measure(net, dl, layers=layer, pool=pool).measures["train"][layer].nc1_trace
    with pytest.raises(ValueError, match="pool for .*'stage9'"): measure(net, dl, pool={"stage9": "avg"})


def sentences(n, seed):
    "Batches of whole numbers that depend on the one before, with masks, each its own length."
    torch.manual_seed(seed)
    for length in (9, 12, 5):
        ids = (torch.randint(0, 7, (n, 1)) + torch.randint(1, 3, (n, length)).cumsum(1)) % 7
        yield dict(input_ids=ids, attention_mask=(torch.rand(n, length).cumsum(1) < 0.45 * length).long(), labels=ids)


def test_tokens_against_features_in_memory():
    "One row a token: the same numbers as of all tokens in memory, without keeping them."
    model, (train, test) = Words().eval(), (list(sentences(30, seed)) for seed in (0, 1))
    found = {}
    for name, batches in (("train", train), ("test", test)):
        H, y, right = [], [], []
        for batch in batches:
            with torch.no_grad(): out = model(batch["input_ids"], batch["attention_mask"])
            seen = (batch["attention_mask"][:, :-1] * batch["attention_mask"][:, 1:]) > 0
            H.append(out["hidden"][:, :-1][seen]); y.append(batch["input_ids"][:, 1:][seen])
            right.append(out["logits"][:, :-1].argmax(-1)[seen] == y[-1])
        found[name] = torch.cat(H), torch.cat(y), torch.cat(right).double().mean().item()
    report = measure(model, train, test, output="logits", next_token=True)
    assert report.layers[-1] == "head:input" and report.num_classes == 7
    (H, y, accuracy), (H_test, y_test, _) = found["train"], found["test"]
    assert report.accuracy["train"] == pytest.approx(accuracy)
    m, direct = report.measures["train"]["head:input"], measure_features(H, y, num_classes=7, head=head_of(model))
    for name in ("nc1_trace", "nc2_etf", "nc3_duality", "cdnv"):
        assert getattr(m, name) == pytest.approx(getattr(direct, name), rel=1e-4)
    assert m.num_samples == len(y) and m.ncc_accuracy is None and "keep" in m.reasons["ncc_accuracy"]
    expected = direct_collapse(H, y, H_test, y_test)
    assert report.test_collapse["head:input"].strong == pytest.approx(expected.strong, rel=1e-4)
    kept = measure(model, train, test, output="logits", next_token=True, keep="last").measures["train"]["head:input"]
    assert kept.nc4_disagreement == pytest.approx(direct.nc4_disagreement)
    passed = collect(model, train, "head:input", 7, keep=None, reading=dict(next_token=True))
    assert passed.features == {}


def test_classifier_that_is_a_convolution(data):
    model = torchvision.models.squeezenet1_1(num_classes=10)
    dl = [(nn.functional.interpolate(x, 32).expand(-1, 3, -1, -1), y) for x, y in loaders(data)[1]]
    m = measure(model, dl).measures["train"]["classifier.1:input"]
    assert m.dim == 512 and m.nc3_duality is not None and m.nc4_disagreement is not None


def test_transformer_and_flattened_features(data):
    torch.manual_seed(0)
    sizes = dict(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)
    model = torchvision.models.VisionTransformer(**sizes, num_classes=10)
    nn.init.normal_(model.heads.head.weight)   # torchvision starts it at zero: no angle
    dl = [(x.expand(-1, 3, -1, -1), y) for x, y in loaders(data)[0]]
    layers = ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "heads.head:input")
    report = measure(model, dl, layers=layers)
    assert report.measures["train"][layers[-1]].nc3_duality is not None
    assert report.measures["train"][layers[0]].dim == 16
    token = layer_features(model, dl, "encoder.ln", pool=lambda t: t[:, 0])[0]["encoder.ln"]
    assert torch.allclose(token, layer_features(model, dl, layers[-1])[0][layers[-1]], atol=1e-5)
    flat = measure(model, dl, layers=layers[0], pool="flatten").measures["train"][layers[0]]
    assert flat.dim == 5 * 16


def test_fastai_loaders_and_tensors(net, data):
    from fastai.data.core import DataLoaders
    from fastai.torch_core import TensorCategory, TensorImage
    clean, test = loaders(data)
    dls = DataLoaders([(TensorImage(x), TensorCategory(y)) for x, y in clean], test)
    assert measure(net, dls.train, dls.valid).frame.equals(measure(net, list(clean), test).frame)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measure_on_a_gpu(net, data):
    model = copy.deepcopy(net)
    cpu = measure(model, *loaders(data), keep="all").frame
    gpu = measure(model.cuda(), *([(x.cuda(), y.cuda()) for x, y in dl] for dl in loaders(data)), keep="all").frame
    mixed = measure(model, *loaders(data), keep="all").frame                 # batches on the CPU, network on the GPU
    for other in (gpu, mixed): assert cpu.value.to_numpy() == pytest.approx(other.value.to_numpy(), rel=1e-2, abs=1e-3)


# -- the recorder ------------------------------------------------------------------------------------------------------

def learner(data, **arguments):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    torch.manual_seed(0)
    train, test = loaders(data, 64)
    return Learner(DataLoaders(train, test), Net(), nn.CrossEntropyLoss(), lr=0.01, **arguments)


def fit(learn, epochs):
    with learn.no_logging(): learn.fit(epochs)
    return learn


def test_recorder_writes_the_tidy_table(data):
    recorder = CollapseRecorder("pool", every=2, run="a", condition="cross-entropy", seed=7)
    learn = fit(learner(data, cbs=recorder), 5)
    history = recorder.history
    assert tuple(history.columns) == COLUMNS and set(history.epoch) == {0, 2, 4, 5}
    assert set(zip(history.run, history.condition, history.seed, strict=True)) == {("a", "cross-entropy", 7)}
    assert not history.duplicated(["epoch", "split", "layer", "measure"]).any()
    last = measure(learn.model, *loaders(data), layers="pool").frame.set_index(["split", "layer", "measure"]).value
    found = history[history.epoch == 5].set_index(["split", "layer", "measure"]).value
    assert found.to_dict() == pytest.approx(last.to_dict(), rel=1e-4, abs=1e-6)
    assert list(curves(history, "nc1_trace", "test").columns) == [7]
    assert len(recorder.plot("train_variance").lines) == 1
    with pytest.raises(ValueError, match="no 'nc9' in the history"): recorder.plot("nc9")


def test_recorder_compares_with_a_reference(data):
    clean, test = loaders(data)
    recorder = CollapseRecorder("pool", epochs=[1], test_dl={"seen": clean, "rest": test}, references={"seen": "rest"})
    history = fit(learner(data, cbs=recorder), 2).collapse_recorder.history
    assert set(history.epoch) == {1}
    assert set(history[history.measure == "train_variance"].split) == {"rest"}
    assert set(history[history.measure == "weak_lower_variance"].split) == {"seen"}


def test_watching_changes_nothing(data):
    watched, alone = fit(learner(data, cbs=CollapseRecorder()), 2), fit(learner(data), 2)
    for p, q in zip(watched.model.parameters(), alone.model.parameters(), strict=True): assert torch.equal(p, q)


def test_a_second_fit_is_measured_on_its_own_data(data):
    follows, given = CollapseRecorder("pool"), loaders(data)
    learn, kept = learner(data, cbs=follows), CollapseRecorder("pool", train_dl=given[0], test_dl=given[1])
    smaller = copy.copy(learn.dls)
    smaller.loaders = [Batches(dl.x[:150], dl.y[:150], 50) for dl in learn.dls.loaders]
    fit(learn, 1).add_cb(kept)
    learn.dls = smaller
    fit(learn, 1)
    for recorder, seen in ((follows, smaller.loaders), (kept, given)):
        found = recorder.history.query("epoch == epoch.max()").value.to_numpy()
        assert found == pytest.approx(measure(learn.model, *seen, layers="pool").frame.value.to_numpy(), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*not measured")
@pytest.mark.parametrize("layers", [None, "pool"])
def test_a_training_that_goes_wrong_is_noted(data, layers):
    recorder = CollapseRecorder(layers)
    with (learn := learner(data, cbs=recorder)).no_logging(): learn.fit(2, 1e30)
    assert recorder.history.query("epoch == 2 and measure == 'nc1_trace'").value.isna().any() and 2 in recorder.reasons


def test_a_recorder_that_measures_nothing_says_so(data):
    recorder = CollapseRecorder("pool", epochs=[2])
    with pytest.warns(UserWarning, match=r"epochs=\[2\]: this fit runs epochs 1 to 1 and measures none; give"):
        learn = fit(learner(data, cbs=recorder), 1)
    with warnings.catch_warnings(action="error", category=UserWarning):
        fit(learn, 1)
        fit(learner(data, cbs=CollapseRecorder("pool", epochs=[0])), 1)
    assert {*recorder.history.epoch} == {2}
    resumed = learner(data, cbs=CollapseRecorder("pool", epochs=[2]))
    with resumed.no_logging(), pytest.warns(UserWarning, match="this fit runs epochs 4 to 5"):
        resumed.fit(5, start_epoch=3)


def test_a_recorder_of_a_training_that_goes_on(data):
    recorder = CollapseRecorder("pool", every=2)
    with (learn := learner(data)).no_logging(): learn.fit(5, cbs=recorder, start_epoch=3)
    assert sorted(recorder.history.epoch.unique()) == [3, 4, 5]


class Squeezing(Net):
    "Loses the dimension of a batch of one sample."
    def forward(self, x): return super().forward(x).squeeze(0)


@pytest.mark.filterwarnings("ignore")     # those of tracing
@pytest.mark.parametrize("call, message", [
    (lambda net, dl: measure(net, dl, batch=lambda b: (*b, b[1])), r"batch= gave a tuple of Tensor .*the pair"),
    (lambda net, dl: measure(net, dl, batch=lambda b: b[0]), r"batch= gave a Tensor \(100.*the pair"),
    (lambda net, dl: measure(net, dl, "conv", pool=lambda a: a.numpy().mean((2, 3))), "pool gave ndarray, expected T"),
    (lambda net, dl: measure(torch.jit.trace(net, next(iter(dl))[0]), dl), "a network of torch.jit"),
    (lambda net, dl: measure(Squeezing(), [*dl, tuple(t[:1] for t in next(iter(dl)))]),
     r"output of batch 3 is not \(B, K\).*squeezes"),
], ids=["three", "one", "array", "jit", "squeeze"])
def test_what_a_user_gives_that_does_not_fit_is_named(net, data, call, message):
    with pytest.raises(ValueError, match=message): call(net, DataLoader(TensorDataset(data.x, data.y), 100))


def test_a_report_of_a_dead_layer_is_drawn(data):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad(): net[1].bias.fill_(-1e3)
    report = measure(net, *loaders(data), layers="3:input")
    assert "nc1_trace" not in set(report.frame.measure) and "<svg" in report.to_html()
    drawn, = report.plot()
    assert drawn.get_ylabel() == "ncc_accuracy" and all(np.isfinite(line.get_ydata()).all() for line in drawn.lines)
    without = measure(net, loaders(data)[0], layers="3:input", keep="none")
    assert "ncc_accuracy" not in set(without.frame.measure) and "All measures" in without.to_html()
    with pytest.raises(ValueError, match="no measure of a layer to draw"): without.plot()


def test_a_recorder_belongs_to_one_network(data):
    recorder = CollapseRecorder("pool")
    learn = fit(learner(data, cbs=recorder), 1)
    learn.model = nn.DataParallel(learn.model)
    assert set(fit(learn, 1).collapse_recorder.history.epoch) == {0, 1, 2}    # a wrapper is the same network
    rows = len(recorder.rows)
    with pytest.raises(ValueError, match="another network, a Net, .* make a new one"):
        fit(learner(data, cbs=recorder), 1)
    assert len(recorder.rows) == rows


def test_batches_of_other_forms(net, data):
    clean, test = loaders(data)
    expected = measure(net, clean, test).frame
    named = [[{"image": x.numpy(), "label": y.numpy()} for x, y in dl] for dl in (clean, test)]
    one_hot = [[(x, nn.functional.one_hot(y, 10).float()) for x, y in dl] for dl in (clean, test)]
    read = lambda b: (b[0], b[1].argmax(1))
    pd.testing.assert_frame_equal(measure(net, *named).frame, expected)
    pd.testing.assert_frame_equal(measure(net, *one_hot, batch=read).frame, expected)
    with pytest.raises(ValueError, match="argmax"): measure(net, *one_hot)
    histories = [fit(learner(data, cbs=CollapseRecorder(epochs=[0], train_dl=train, test_dl=held, **options)), 1)
                 .collapse_recorder.history for (train, held), options in
                 (((clean, test), {}), (named, {}), (one_hot, dict(batch=read)))]
    for history in histories: pd.testing.assert_frame_equal(history, histories[0])


def test_clean_loaders(data):
    train, _ = loaders(data, 64)
    train.augment, train.drop_last = "crop_flip", True
    clean = clean_loader(train)
    assert torch.equal(torch.cat([y for _, y in clean]), data.y)
    assert clean.augment is None and train.augment == "crop_flip"
    assert clean_loader(batches := [1, 2]) is batches


def test_undisturbed():
    import numpy as np
    torch_state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(ZeroDivisionError), undisturbed():
        torch.rand(3); random.random(); np.random.rand()
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()


@pytest.mark.parametrize("every", [0, -1, 1.5, "linear"])
def test_recorder_refuses(every):
    with pytest.raises(ValueError, match="expected a positive integer or 'log'"): CollapseRecorder(every=every)


# -- showing a report --------------------------------------------------------------------------------------------------

class Escapes(HTMLParser):
    "The names of the tags of a page, and its text."
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs): self.tags.append(tag)

    def handle_data(self, data): self.text += data


def test_names_are_escaped(data):
    "Names of layers and splits, and notes, are text on the page whatever they hold."
    evil = "<script>alert(1)</script>"
    holder, linear = nn.Module(), nn.Linear(64, 10)
    holder.add_module(evil, linear)
    holder.forward = lambda x: linear(x.flatten(1))
    splits = loaders(data)[0], {evil: loaders(data)[1]}
    report = measure(holder, *splits, layers=f"{evil}:input", head=None, num_classes=10)
    report = replace(report, notes=(f"a note about {evil} & $x$",))
    for page in (report._repr_html_(), report.to_html()):
        found = Escapes(page)
        assert "script" not in found.tags and found.tags.count("table") >= 1 and evil in found.text


def test_headings_say_what_they_mean(net, data):
    html = measure(net, *loaders(data))._repr_html_()
    for name, (short, why) in MEANINGS.items(): assert f'title="{why}">{short}</th>' in html, name


def test_plot_has_a_line_a_split(net, data):
    report = measure(net, *loaders(data), keep="all")
    axes = report.plot("nc1_trace", "vci")
    values = [line.get_ydata().tolist() for line in axes[0].lines]
    assert values == [[report.measures[s][la].nc1_trace for la in report.layers] for s in ("train", "test")]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == list(report.layers)
    assert len(report.plot()) == 3 and report.plot("vci", axes=[axes[1]])[0] is axes[1]
    with pytest.raises(ValueError, match="no .'nc9'. in this report"): report.plot("nc9")


def test_reports_compared(net, data):
    clean, test = loaders(data)
    a, b = measure(net, clean, test), measure(Net(), clean)
    table = a.compare(b)
    assert list(table.columns) == ["this", "other", "ratio"]
    this, other = (r.measures["train"]["pool"].nc1_trace for r in (a, b))
    assert table.loc["train", "pool", "nc1_trace"].tolist() == pytest.approx([this, other, other / this])
    assert table.xs("test").other.isna().all() and (a.compare(a).ratio.dropna() == 1).all()
    assert len(b.compare(a)) == len(table)


# -- classes without samples, and classifiers of other kinds -----------------------------------------------------------

def text(words=(0, 2, 3, 5), rows=12, length=9):
    torch.manual_seed(1)
    ids = torch.tensor(words)[torch.randint(0, len(words), (rows, length))]
    return [dict(input_ids=part, labels=part) for part in ids.split(4)]


def test_absent_words_are_left_out():
    "As if the words that occur had been numbered 0, 1, ...; the memory is that of these words."
    model, words = Words(50_000).eval(), torch.tensor([11, 400, 401, 49_999])
    train, test = text(words=words.tolist()), text(words=(11, 401, 7), rows=8)
    report = measure(model, train, test, layers=("blocks.0", "head:input"), next_token=True)
    number = torch.full((50_000,), -100).index_put((words,), torch.arange(4))
    few = measure(model, train, layers=("blocks.0", "head:input"), next_token=True, absent="error",
                  head=(model.head.weight[words].detach(), torch.zeros(4)),
                  batch=lambda b: ({"input_ids": b["input_ids"]}, number[b["labels"]]))
    for layer in few.layers:
        found, direct = (r.measures["train"][layer].to_dict() for r in (report, few))
        close({k: v for k, v in found.items() if k not in ("nc1_pinv", "vci")}, {k: v for k, v in direct.items()
              if k not in ("nc1_pinv", "vci")})
    assert report.num_classes == 50_000 and report.measures["train"]["head:input"].num_classes == 4
    assert "49996 of 50000 classes have no samples (0, 1, 2, 3, 4, ...)" in report.notes[0] and len(report.notes) == 3
    statistics = collect(model, train, "head:input", 50_000, reading=dict(next_token=True)).statistics
    assert statistics["head:input"].means.shape == (4, 8)


def test_absent_classes_of_a_test_set():
    "Test tokens are compared with the train means of their own words, and with the nearest of all train means."
    model, train, test = Words().eval(), text(words=(1, 4, 6)), text(words=(1, 2, 6))
    report = measure(model, train, test, layers="head:input", next_token=True, keep="all")
    H, y = {}, {}
    for name, batches in (("train", train), ("test", test)):
        with torch.no_grad(): hidden = torch.cat([model(b["input_ids"]).hidden for b in batches])
        H[name], y[name] = hidden[:, :-1].flatten(0, 1), torch.cat([b["labels"] for b in batches])[:, 1:].flatten()
    means = {c: H["train"][y["train"] == c].double().mean(0) for c in (1, 4, 6)}
    nearest = torch.tensor([min(means, key=lambda c: (h - means[c]).norm()) for h in H["test"].double()])
    measures = report.measures["test"]["head:input"]
    known = torch.isin(y["test"], torch.tensor([1, 6]))
    assert measures.ncc_accuracy == pytest.approx((nearest == y["test"])[known].double().mean().item())
    logits = H["test"] @ model.head.weight.detach().T
    assert measures.nc4_disagreement == pytest.approx((nearest != logits.argmax(1))[known].double().mean().item())
    assert any(f"{int((~known).sum())} samples are of classes that the train set lacks" in n for n in report.notes)
    drift = torch.stack([h - means[c.item()] for h, c in zip(H["test"][known].double(), y["test"][known], strict=True)])
    M = torch.stack(list(means.values()))
    between = (M - M.mean(0)).square().sum(1).mean()
    assert report.test_collapse["head:input"].strong == pytest.approx((drift.square().sum(1).mean() / between).item())
    train_near = torch.tensor([min(means, key=lambda c: (h - means[c]).norm()) for h in H["train"].double()])
    right = (train_near == y["train"]).double().mean().item()
    assert report.measures["train"]["head:input"].ncc_accuracy == pytest.approx(right)


def test_absent_classes_of_images(net, data):
    clean, test = loaders(data)
    few = [(x[y % 3 == 0], y[y % 3 == 0]) for x, y in test]                                      # 0, 3, 6, 9
    with pytest.raises(ValueError, match="absent=.leave out"): measure(net, clean, few)
    report, whole = measure(net, clean, few, absent="leave out"), measure(net, clean, test)
    assert report.measures["test"]["pool"].num_classes == 4 and "6 of 10 classes" in report.notes[0]
    close(report.measures["train"]["pool"].to_dict(), whole.measures["train"]["pool"].to_dict())
    H, y = layer_features(net, few, "pool")
    rows = (net.head.weight[::3].detach(), net.head.bias[::3].detach())
    direct = measure_features(H["pool"], y // 3, num_classes=4, head=rows).to_dict()
    found = report.measures["test"]["pool"].to_dict()
    for name in ("nc1_trace", "nc1_pinv", "vci", "cdnv", "nc2_etf", "nc3_duality"):
        assert found[name] == pytest.approx(direct[name], rel=1e-4), name
    with pytest.raises(ValueError, match="absent='no'"): measure(net, clean, absent="no")


def test_head_that_is_guessed_wrong_is_said():
    "Layers are registered in another order than they run: the last one registered is not the classifier."
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.body = nn.Linear(8, 4), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        def forward(self, x): return self.fc(self.body(x))
    model, batches = Reversed(), [(torch.randn(40, 6), torch.arange(40) % 4)]
    with pytest.raises(ValueError, match="head guessed: body.2, but .* choose by head="): measure(model, batches)
    found, right = measure(model, batches, num_classes=4), measure(model, batches, head="fc")
    assert found.accuracy == right.accuracy and found.accuracy["train"] is not None
    with pytest.raises(ValueError, match="num_classes is 0"): measure(model, batches, num_classes=0)


class Tied(Words):
    "The embedding is the classifier, and no module is."
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), None

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks: x = block(x)
        return self.norm(x) @ self.embed.weight.T


@pytest.mark.parametrize("options", [{}, {"head": "embed"}, {"layers": ("blocks.0", "norm")}])
def test_tied_embeddings(options):
    model, batches = Tied(), text(words=range(7), rows=40)
    pair = model.embed.weight.detach(), None
    given = measure(model, batches, layers=("blocks.0", "norm"), head=pair, next_token=True)
    found = measure(model, (b for b in batches), next_token=True, **options)
    assert found.layers[-1] == "norm" and "embed.weight" in found.notes[0]
    close(found.measures["train"]["norm"].to_dict(), given.measures["train"]["norm"].to_dict())
    assert found.measures["train"]["norm"].nc3_duality is not None
    with pytest.raises(ValueError, match="no layer gives the output"): measure(Words(), batches, head="embed")


class Compares(nn.Module):
    "Cosines with the rows of a matrix, in its own layer."
    def __init__(self, transposed=False):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(*((64, 10) if transposed else (10, 64))))
        self.transposed = transposed

    def forward(self, x):
        W = self.rows.T if self.transposed else self.rows
        return 20 * nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(W))


class Root(Compares):
    "The same, where the rows belong to the network itself."
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 64)

    def forward(self, x): return super().forward(self.body(x.flatten(1)))


@pytest.mark.parametrize("kind", ["layer", "transposed", "network"])
def test_classifiers_that_compare_directions(kind, data):
    torch.manual_seed(0)
    head = Compares(kind == "transposed")
    model = Root() if kind == "network" else nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), head)
    report = measure(model, *loaders(data))
    rows = model.rows if kind == "network" else head.rows.T if kind == "transposed" else head.rows
    layer = report.layers[-1]
    assert layer == ("body" if kind == "network" else "3:input")
    direct = measure(model, *loaders(data), layers=layer, head=(nn.functional.normalize(rows.detach()), None))
    for split in ("train", "test"):
        close(report.measures[split][layer].to_dict(), direct.measures[split][layer].to_dict())
    H, y = layer_features(model, loaders(data)[0], layer)
    right = (H[layer] @ nn.functional.normalize(rows.detach()).T).argmax(1) == y
    assert report.accuracy["train"] == pytest.approx(right.double().mean().item())


def test_a_layer_that_is_no_classifier(data):
    class Odd(Compares):
        def forward(self, x): return x.square() @ self.rows.T
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), Odd())
    with pytest.raises(ValueError, match="give the classifier"): measure(model, loaders(data)[0])
    assert measure(model, loaders(data)[0], head=None, num_classes=10).accuracy["train"] is not None


def plain_loader(samples, **more): return torch.utils.data.DataLoader(samples, 16, **more)


LOADERS = {     # where each keeps the generator that shuffles
    "of all": lambda s, g: plain_loader(s, shuffle=True),
    "its own": lambda s, g: plain_loader(s, shuffle=True, generator=g),
    "of its sampler": lambda s, g: plain_loader(s, sampler=torch.utils.data.RandomSampler(s, generator=g)),
    "of fastai": lambda s, g: fastai_loader.DataLoader(s, bs=16, shuffle=True),
}
LOOKS = {
    "measure": lambda net, dl: measure(net, dl, {"more": dl}),
    "measure, by name": lambda net, dl: measure(model=net, train_dl=dl),
    "collect": lambda net, dl: collect(net, dl, "0", 4),
    "layer_features": lambda net, dl: layer_features(net, dl, "0"),
    "regression": lambda net, dl: measure(net, dl, batch=lambda b: (b[0], b[0] + b[1][:, None])),
}


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("loader", LOADERS)
def test_measuring_in_a_loop_of_ones_own_does_not_change_the_training(loader, look):
    "A loader draws the seed of its workers from the generator that shuffles and drops out."
    def train(look):
        torch.manual_seed(0); random.seed(0)
        x, y = torch.randn(40, 6), torch.arange(40) % 4
        dl = LOADERS[loader](list(zip(x, y, strict=True)), torch.Generator().manual_seed(1))
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, 4))
        optimiser = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            for xb, yb in dl:
                optimiser.zero_grad(); nn.functional.cross_entropy(model(xb), yb).backward(); optimiser.step()
            look(model, dl)
        return model[0].weight
    assert torch.equal(train(LOOKS[look]), train(lambda *_: None))


def test_a_branch_of_several_by_name():
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.shape, self.colour = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 7)
        def forward(self, x):
            h = self.body(x)
            return {"colour": self.colour(h), "shape": self.shape(h)}
    batch = [(torch.randn(40, 6), torch.arange(40) % 4)]
    for given in ({"head": "shape"}, {"num_classes": 4}):
        report = measure(Tasks(), batch, output="shape", **given)
        assert report.layers == ("body", "shape:input") and report.notes == ()
        assert report.measures["train"]["shape:input"].nc3_duality is not None


def test_a_report_says_where_the_channels_may_be():
    model = nn.Sequential(nn.Conv1d(3, 6, 3), nn.Flatten(), nn.Linear(36, 4))
    batch = [(torch.randn(40, 3, 8), torch.arange(40) % 4)]
    report = measure(model, batch, batch)
    note, = report.notes
    assert note.startswith("Layer 0: the activation (B, 6, 6) was read as (B, C, L)")
    assert measure(model, batch, pool={"0": lambda t: t.mean(2)}).frame.equals(measure(model, batch).frame)


def rows_of(recorder, measures, splits, layers=("a", "b")):
    same = dict(run="", condition="", seed=0)
    recorder.rows = [same | dict(epoch=e, split=s, layer=la, measure=m, value=-1.0 if m == "r2" else 1.0)
                     for m in measures for e in (0, 1) for s in splits for la in layers]
    return recorder


def test_every_split_of_a_recorder_is_drawn():
    recorder = rows_of(CollapseRecorder(), ("nc1_trace",), ("train", "val", "new"))
    _, ax = plt.subplots()
    lines = recorder.plot(ax=ax).lines
    assert [line.get_linestyle() for line in lines] == ["-", "-", "--", "--", ":", ":"]
    assert ax.get_legend().get_title().get_text() == "layer (dashed: val, dotted: new)"
    for split in ("test", "val"):                                     # measures that the train set has not
        recorder, (_, ax) = rows_of(CollapseRecorder(), ("strong_test_variance",), (split,)), plt.subplots()
        assert [line.get_label() for line in recorder.plot("strong_test_variance", ax).lines] == ["a", "b"]
        assert ax.get_legend().get_title().get_text() == f"layer (dashed: {split})"
    recorder, (_, ax) = rows_of(CollapseRecorder(), ("nrc1", "r2"), ("train",)), plt.subplots()
    assert recorder.plot(ax=ax).get_ylabel() == "nrc1" and recorder.plot("r2", ax).get_yscale() == "linear"
    plt.close("all")


def test_plots_of_accuracy_and_on_axes_that_are_too_few(net, data):
    report = measure(net, *loaders(data))
    ax, = report.plot("accuracy")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[report.accuracy["train"]], [report.accuracy["test"]]]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["output"]
    with pytest.raises(ValueError, match="2 measures and 1 axes"): report.plot("nc1_trace", "nc2_etf", axes=ax)


def test_several_test_sets_without_names(net, data):
    test = DataLoader(TensorDataset(data.test_x, data.test_y), 100)
    with pytest.raises(ValueError, match="list of loaders; several test sets: give {name: loader}"):
        measure(net, test, [test, test])


def test_what_is_missing_is_said_once_with_its_reason(net, data):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    with torch.no_grad(): flat[1].bias.fill_(-1e3)
    notes = measure(flat, *loaders(data), layers=("2", "3:input")).notes
    notes = [note for note in notes if note.startswith("Without NC1 or NC2")]
    assert len(notes) == 1 and "2 (train), 3:input (train), 2 (test)" in notes[0] and "class means coincide" in notes[0]
    report = measure(net, *loaders(data))
    assert report.notes == ()
    reasons = report.measures["train"][report.layers[0]].reasons
    assert reasons["nc3_duality"] == f"the classifier (head) reads {report.layers[-1]}"
    without = measure(net, loaders(data)[0], head=None, num_classes=10).measures["train"][report.layers[0]].reasons
    assert without["nc3_duality"].startswith("needs the classifier")


def test_options_for_classes_are_not_for_numbers():
    x = torch.randn(40, 6)
    model, batch = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)), [(x, x[:, 0] + 0.1)]
    assert measure(model, batch).notes == ()
    note, = measure(model, batch, keep="all", absent="error", ignore_index=3).notes
    assert note == "Not used for numbers to predict: keep, ignore_index, absent."


def test_a_report_of_numbers_draws_itself():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    report = measure(net, DataLoader(TensorDataset(torch.randn(40, 4), torch.randn(40, 2)), 10))
    nrc1, r2 = report.plot("nrc1", "r2")
    assert [len(ax.lines) for ax in (nrc1, r2)] == [1, 1] and len(r2.lines[0].get_ydata()) == 1
    assert report.plot()[0].get_ylabel() == "nrc1"
    plt.close("all")
