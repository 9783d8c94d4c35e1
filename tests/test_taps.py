"Features by hooks, and measuring a network in one pass over a split."
import copy

import pytest
import torch
from torch import nn

import nc_nbdev as nc
from nc_nbdev.geometry.measures import measure_features
from nc_nbdev.geometry.statistics import ClassStatistics
from nc_nbdev.lab.data import load_dataset, loaders
from nc_nbdev.lab.models import build_model, tap_layers
from nc_nbdev.lab.taps import CollapseReport, FeatureTaps, collect, evaluating, layer_features, measure, pool_features


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits").subset(30, 12, seed=0)


@pytest.fixture(scope="module")
def net(data):
    "A small residual net, trained for a few steps so that its batch statistics are not the initial ones."
    torch.manual_seed(0)
    model = build_model("small_resnet", 10, in_channels=1, width=8)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(5):
        for x, y in loaders(data, 100)[0]: nn.functional.cross_entropy(model(x), y).backward(); optimiser.step(); optimiser.zero_grad()
    return model


def by_hand(model, x):
    "The layers of a SmallResNet, one after another."
    found = {"stem": model.stem(x)}
    found["stage1"] = model.stage1(found["stem"])
    found["stage2"] = model.stage2(found["stage1"])
    found["pool"] = model.pool(model.stage3(found["stage2"]))
    return found


def all_by_hand(model, dl):
    model = copy.deepcopy(model).eval()
    with torch.no_grad(): batches = [by_hand(model, x) for x, _ in dl]
    return {layer: torch.cat([b[layer].mean((2, 3)) if b[layer].ndim == 4 else b[layer] for b in batches]) for layer in batches[0]}


def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- pooling -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, pool, expected", [
    ((2, 7), "avg", lambda t: t), ((2, 5, 7), "avg", lambda t: t.mean(1)), ((2, 7, 3, 4), "avg", lambda t: t.mean((2, 3))),
    ((2, 7, 3, 4, 5), "avg", lambda t: t.mean((2, 3, 4))), ((2, 7, 3, 4), "flatten", lambda t: t.reshape(2, 84)),
    ((2, 7), "flatten", lambda t: t), ((2, 5, 7), lambda t: t[:, 0], lambda t: t[:, 0]), ((2, 3, 4, 7), lambda t: t.mean((1, 2)), lambda t: t.mean((1, 2)))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pooling(shape, pool, expected, dtype):
    t = torch.randn(shape).to(dtype).requires_grad_()
    vectors = pool_features(t, pool)
    wide = t.detach().float() if dtype in (torch.float16, torch.bfloat16) else t.detach()
    assert vectors.dtype == wide.dtype and not vectors.requires_grad
    assert torch.allclose(vectors, expected(wide), rtol=1e-6, atol=1e-6)
    before = vectors.clone()
    with torch.no_grad(): t.fill_(99)
    assert torch.equal(vectors, before)                         # not a view


@pytest.mark.parametrize("t, pool", [(torch.ones(3), "avg"), (torch.ones(2, 3, dtype=torch.int64), "avg"), (torch.ones(2, 3), "max"),
                                     (torch.ones(2, 3, 4), lambda t: t), (torch.ones(2, 3), lambda t: t[:1])])
def test_bad_pooling(t, pool):
    with pytest.raises(ValueError): pool_features(t, pool)


# -- taps --------------------------------------------------------------------------------------------------------

def test_taps_against_the_direct_computation(net):
    x, model = torch.randn(5, 1, 8, 8), copy.deepcopy(net).eval()
    with FeatureTaps(model, tap_layers(model)) as taps: model(x)
    for layer, value in by_hand(model, x).items():
        assert torch.allclose(taps[layer], value.mean((2, 3)) if value.ndim == 4 else value, atol=1e-6)
        assert not taps[layer].requires_grad
    assert hooks(model) == 0
    with FeatureTaps(model, ("stage1", "head:input"), pool="flatten") as taps: model(x)
    assert torch.equal(taps["stage1"], by_hand(model, x)["stage1"].flatten(1)) and torch.equal(taps["head:input"], by_hand(model, x)["pool"])


def test_gradients_of_the_network_are_untouched(net):
    x, (a, b) = torch.randn(4, 1, 8, 8), (copy.deepcopy(net), copy.deepcopy(net))
    a(x).sum().backward()
    with FeatureTaps(b, tap_layers(b), pool="flatten"): b(x).sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True): assert torch.equal(p.grad, q.grad)


def test_hooks_go_away_with_an_exception(net):
    with pytest.raises(ZeroDivisionError), FeatureTaps(net, tap_layers(net)):
        assert hooks(net) > 0
        raise ZeroDivisionError
    assert hooks(net) == 0


def test_only_the_last_pass_is_there(net):
    model = copy.deepcopy(net).eval()
    with FeatureTaps(model, "pool") as taps:
        model(torch.randn(7, 1, 8, 8))
        with pytest.raises(RuntimeError): model(torch.randn(3, 2, 8, 8))     # fails before the layer
        with pytest.raises(ValueError, match="ran 0 times"): taps["pool"]
        model(torch.randn(3, 1, 8, 8))
        assert taps["pool"].shape == (3, 32)


def test_in_place_relu_after_a_layer():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    x = torch.randn(8, 4)
    for pool in ("avg", "flatten"):
        with FeatureTaps(model, "0", pool) as taps, torch.no_grad(): model(x)
        assert torch.allclose(taps["0"], model[0](x)) and (taps["0"] < 0).any()


def test_layer_that_runs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.once = nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x): return self.once(self.shared(self.shared(x)))
    model = Twice()
    with FeatureTaps(model, ("shared", "shared:input", "once")) as taps: model(torch.randn(3, 4))
    for layer in ("shared", "shared:input"):
        with pytest.raises(ValueError, match="ran 2 times"): taps[layer]
    assert taps["once"].shape == (3, 2)
    batches = [(torch.randn(6, 4), torch.arange(6) % 2)]
    with pytest.raises(ValueError, match="ran 2 times"): collect(model, batches, ("shared",), 2)
    assert hooks(model) == 0
    assert collect(model, batches, ("once:input",), 2).layers == ("once:input",)


@pytest.mark.parametrize("wrap", [lambda t: (t, None), lambda t: [t, t + 1], lambda t: {"hidden": t}, lambda t: ((t,), 3), lambda t: (None, t)])
def test_layers_that_return_more_than_a_tensor(wrap):
    class Returns(nn.Module):
        def forward(self, x): return wrap(x)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Returns()
        def forward(self, x): self.inner(x); return x
    x = torch.randn(2, 5)
    with FeatureTaps(model := Net(), "inner") as taps: model(x)
    assert torch.equal(taps["inner"], x)


def test_input_given_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)
        def forward(self, x): return self.head(input=x)
    x = torch.randn(4, 3)
    with FeatureTaps(model := Net(), "head:input") as taps: model(x)
    assert torch.equal(taps["head:input"], x)


@pytest.mark.parametrize("layers, message", [("stage4", "did you mean stage"), ("pol", "did you mean pool"), (("pool", "pool"), "each once"), ((), "one or more"),
                                             ("", "has no layer"), ("haed:input", "did you mean head")])
def test_unknown_layers(net, layers, message):
    with pytest.raises(ValueError, match=message): FeatureTaps(net, layers)
    with pytest.raises(ValueError, match=message): layer_features(net, [], layers)


def test_untapped_layer(net):
    with FeatureTaps(net, "pool") as taps, pytest.raises(ValueError, match="'stem' is not tapped; tapped are pool"): taps["stem"]


# -- running -----------------------------------------------------------------------------------------------------

def test_network_and_loader_are_left_as_they_were(net, data):
    model = copy.deepcopy(net).train()
    model.stem.eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    dl = loaders(data, 64)[0].set_epoch(3)
    measure(model, dl, loaders(data)[2])
    assert [m.training for m in model.modules()] == modes and dl.epoch == 3 and hooks(model) == 0
    for name, value in model.state_dict().items(): assert torch.equal(value, state[name]), name     # batch statistics as well
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluating(model): raise ZeroDivisionError
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError): measure(model, [(torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 10]))], num_classes=10)
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 300, 512])
def test_batches_do_not_matter(net, data, batch_size):
    whole = layer_features(net, loaders(data)[1], tap_layers(net))
    parts = layer_features(net, loaders(data, measure_batch_size=batch_size)[1], tap_layers(net))
    for layer in tap_layers(net): assert torch.allclose(whole[0][layer], parts[0][layer], atol=1e-5)
    assert torch.equal(whole[1], parts[1])
    hand = all_by_hand(net, loaders(data)[1])
    for layer in tap_layers(net): assert torch.allclose(hand[layer], whole[0][layer], atol=1e-6)


def test_autocast_outside_changes_nothing(net, data):
    dl = loaders(data)[1]
    plain = layer_features(net, dl, "pool")[0]["pool"]
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = layer_features(net, dl, "pool")[0]["pool"]
    assert torch.equal(plain, inside)


def test_network_in_half_precision(net, data):
    model, dl = copy.deepcopy(net).bfloat16(), loaders(data)[1]
    half, full = (measure(m, dl, layers="pool").measures["train"]["pool"] for m in (model, net))
    assert half.nc1_trace == pytest.approx(full.nc1_trace, rel=0.05)
    double = measure(copy.deepcopy(net).double(), dl, layers="pool").measures["train"]["pool"]
    assert double.nc1_trace == pytest.approx(full.nc1_trace, rel=1e-5)


def test_augmented_and_incomplete_loaders(net, data):
    train, clean, _ = loaders(data, 64, augment="crop_flip")
    with pytest.raises(ValueError, match="augment='crop_flip'"): collect(net, train, "pool", 10)
    clean.drop_last, clean.batch_size = True, 64
    with pytest.warns(UserWarning, match="drop_last"): collect(net, clean, "pool", 10)
    with pytest.raises(ValueError, match="no batches"): collect(net, [], "pool", 10)
    with pytest.raises(ValueError, match="no batches"): layer_features(net, [], "pool")


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_networks(net, data, wrap):
    dl = loaders(data)[1]
    assert measure(wrap(net), dl).frame.equals(measure(net, dl).frame)


def test_inputs_of_other_kinds(data):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)
        def forward(self, a, b): return self.head((a + b).flatten(1))
    torch.manual_seed(0)
    model, dl = Sum(), loaders(data)[1]
    several = [((x, 2 * x), y) for x, y in dl]
    named = [(dict(b=2 * x, a=x), y) for x, y in dl]
    assert measure(model, several).frame.equals(measure(model, named).frame)


# -- collecting --------------------------------------------------------------------------------------------------

def test_collect_against_features_in_memory(net, data):
    _, clean, test = loaders(data, measure_batch_size=37)
    train = collect(net, clean, tap_layers(net), 10, keep=("stage1",))
    H, H_test = all_by_hand(net, clean), all_by_hand(net, test)
    for layer, stats in train.statistics.items():
        direct = ClassStatistics.from_features(H[layer], data.train_labels, num_classes=10)
        assert torch.equal(stats.counts, direct.counts)
        assert torch.allclose(stats.means, direct.means, atol=1e-6) and torch.allclose(stats.class_scatter, direct.class_scatter, rtol=1e-5)
    assert list(train.features) == ["stage1"] and torch.allclose(train.features["stage1"], H["stage1"], atol=1e-6)
    assert train.head_layers == ("pool",)
    model = copy.deepcopy(net).eval()
    with torch.no_grad(): predicted = torch.cat([model(x) for x, _ in clean]).argmax(1)
    assert torch.equal(train.predictions, predicted) and train.accuracy == (predicted == data.train_labels).double().mean().item()
    found = collect(net, test, tap_layers(net), 10, reference=train.statistics)
    for layer in tap_layers(net):
        nearest = torch.cdist(H_test[layer].double(), train.statistics[layer].means).argmin(1)
        assert torch.equal(found.nearest[layer], nearest)


def test_head_is_found_by_its_input_not_by_its_dimension(data):
    model, dl = build_model("mlp", 10, in_channels=1, width=32, image_size=8), loaders(data)[1]
    layers = ("layer1", "layer2", "layer3", "head:input")
    assert collect(model, dl, layers, 10).head_layers == ("layer3", "head:input")
    m = measure(model, dl, layers=layers).measures["train"]
    assert m["layer2"].nc3_duality is None and "head" in m["layer2"].reasons["nc3_duality"] and m["layer3"].nc3_duality is not None


# -- measuring ---------------------------------------------------------------------------------------------------

def close(found, expected):
    for name, value in expected.items():
        if value is None: assert found[name] is None, name
        else: assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("batch_size", [37, 512])
def test_measure_against_the_direct_computation(net, data, batch_size):
    _, clean, test = loaders(data, measure_batch_size=batch_size)
    report = measure(net, clean, test, keep="all")
    H, H_test = all_by_hand(net, clean), all_by_hand(net, test)
    for layer in tap_layers(net):
        head = (net.head.weight.detach(), net.head.bias.detach()) if layer == "pool" else None
        reference = ClassStatistics.from_features(H[layer], data.train_labels, num_classes=10)
        close(report.measures["train"][layer].to_dict(), measure_features(H[layer], data.train_labels, num_classes=10, head=head).to_dict())
        close(report.measures["test"][layer].to_dict(), measure_features(H_test[layer], data.test_labels, num_classes=10, head=head, reference=reference).to_dict())
        direct = nc.test_collapse(H[layer], data.train_labels, H_test[layer], data.test_labels)
        close(report.test_collapse[layer].to_dict(), direct.to_dict())


def test_keeping_features_changes_what_can_be_had(net, data):
    _, clean, test = loaders(data)
    last, none = measure(net, clean, test), measure(net, clean, test, keep="none")
    assert last.measures["train"]["stem"].ncc_accuracy is None and "keep" in last.measures["train"]["stem"].reasons["ncc_accuracy"]
    assert last.measures["train"]["pool"].ncc_accuracy is not None and last.test_collapse["pool"].weak is not None
    assert none.measures["train"]["pool"].ncc_accuracy is None and none.test_collapse["pool"].weak is None
    for layer in tap_layers(net):
        a, b = last.measures["test"][layer].to_dict(), none.measures["test"][layer].to_dict()
        close(a, b)                                                              # the test set needs nothing kept
    assert last.test_collapse["pool"].weak <= last.test_collapse["pool"].test <= last.test_collapse["pool"].strong
    with pytest.raises(ValueError, match="keep: \\['some'\\]"): measure(net, clean, keep="some")


def test_unbalanced_classes(net, data):
    dl = loaders(load_dataset("digits").with_imbalance(10))[1]
    H, y = layer_features(net, dl, "pool")
    for weighting in ("class", "sample"):
        direct = measure_features(H["pool"], y, num_classes=10, weighting=weighting).to_dict()
        for keep in ("last", "none"):
            found = measure(net, dl, layers="pool", weighting=weighting, keep=keep).measures["train"]["pool"].to_dict()
            for name in ("nc1_trace", "nc1_pinv", "cdnv", "vci", "nc2_etf"): assert found[name] == pytest.approx(direct[name], rel=1e-5), (name, weighting, keep)
    plain = list(dl)                                                             # a loader that does not know its labels
    stream = measure(net, plain, layers="pool", keep="none").measures["train"]["pool"]
    assert stream.nc1_pinv is None and "class_counts" in stream.reasons["nc1_pinv"]
    direct = measure_features(H["pool"], y, num_classes=10).nc1_pinv
    for arguments in (dict(keep="last"), dict(keep="none", class_counts=y.bincount(minlength=10))):
        assert measure(net, plain, layers="pool", **arguments).measures["train"]["pool"].nc1_pinv == pytest.approx(direct, rel=1e-5)


def test_report(net, data):
    _, clean, test = loaders(data)
    report = measure(net, clean, {"test": test, "seen": clean})
    frame = report.frame
    assert isinstance(report, CollapseReport) and list(frame.columns) == ["split", "layer", "measure", "value"]
    assert not frame.duplicated(["split", "layer", "measure"]).any() and frame.value.notna().all()
    assert set(frame.split) == {"train", "test", "seen"} and set(frame.layer) == {"output", *tap_layers(net)}
    value = frame.set_index(["split", "layer", "measure"]).value
    assert value["test", "output", "accuracy"] == report.accuracy["test"]
    assert value["test", "pool", "strong_test_variance"] == report.test_collapse["pool"].strong
    assert value["train", "pool", "train_variance"] == report.test_collapse["pool"].train
    assert value["seen", "pool", "strong_test_variance"] == pytest.approx(value["train", "pool", "train_variance"])
    assert report.test_collapse is report.collapse["test"]
    assert "nc1_trace" in repr(report) and "<table" in report._repr_html_() and "pool" in repr(report)
    assert measure(net, clean).test_collapse == {}


def test_heads_of_all_kinds(net, data):
    dl = loaders(data)[1]
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
    more = measure(net, [(x, y % 5) for x, y in dl], num_classes=5)              # a head for more classes than there are
    assert more.accuracy["train"] is None and "10 outputs, there are 5 classes" in more.notes[0] and more.measures["train"]["pool"].nc1_trace > 0


def test_network_without_a_linear_layer(data):
    model, dl = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 10, 6), nn.Flatten()), loaders(data)[1]
    report = measure(model, dl, layers=("0", "3"), num_classes=10)
    assert "no nn.Linear" in report.notes[0] and report.accuracy["train"] is not None and report.measures["train"]["0"].nc1_trace > 0
    with pytest.raises(ValueError, match="num_classes is needed"): measure(model, dl, layers="0")


@pytest.mark.parametrize("change, message", [(lambda y: y + 1, "labels"), (lambda y: -y, "labels"), (lambda y: y.float(), "labels"), (lambda y: y[:, None], "labels"),
                                             (lambda y: y[:-1], "labels")])
def test_bad_labels(net, data, change, message):
    with pytest.raises(ValueError, match=message): measure(net, [(x, change(y)) for x, y in loaders(data)[1]])


def test_empty_class_names_the_split(net, data):
    _, clean, test = loaders(data)
    few = [(x[y != 3], y[y != 3]) for x, y in test]
    with pytest.raises(ValueError, match="train set: .*no samples"): measure(net, few, test)
    with pytest.raises(ValueError, match="test set: .*no samples"): measure(net, clean, few)


def test_diverged_network(net, data):
    model = copy.deepcopy(net)
    with torch.no_grad(): model.stage2[0].conv1.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"): measure(model, loaders(data)[1])


def test_transformer_and_flattened_features(data):
    import torchvision
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    nn.init.normal_(model.heads.head.weight)                                     # torchvision starts it at zero, where no angle is defined
    dl = [(x.expand(-1, 3, -1, -1), y) for x, y in loaders(data)[1]]
    layers = ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1", "heads.head:input")
    report = measure(model, dl, layers=layers)
    assert report.measures["train"][layers[-1]].nc3_duality is not None and report.measures["train"][layers[0]].dim == 16
    token = layer_features(model, dl, "encoder.ln", pool=lambda t: t[:, 0])[0]["encoder.ln"]
    assert torch.allclose(token, layer_features(model, dl, layers[-1])[0][layers[-1]], atol=1e-5)
    flat = measure(model, dl, layers=layers[0], pool="flatten").measures["train"][layers[0]]
    assert flat.dim == 5 * 16


def test_fastai_loaders_and_tensors(net, data):
    from fastai.data.core import DataLoaders
    from fastai.torch_core import TensorCategory, TensorImage
    _, clean, test = loaders(data)
    dls = DataLoaders([(TensorImage(x), TensorCategory(y)) for x, y in clean], test)
    assert measure(net, dls.train, dls.valid).frame.equals(measure(net, list(clean), test).frame)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measure_on_a_gpu(net, data):
    model = copy.deepcopy(net)
    cpu = measure(model, *loaders(data)[1:], keep="all").frame
    gpu = measure(model.cuda(), *loaders(data, device="cuda")[1:], keep="all").frame
    mixed = measure(model, *loaders(data)[1:], keep="all").frame                 # batches on the CPU, network on the GPU
    for other in (gpu, mixed): assert cpu.value.to_numpy() == pytest.approx(other.value.to_numpy(), rel=1e-2, abs=1e-3)
