"Layers, classifiers and features by hooks, of any network."
import copy
import warnings
from collections import UserDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from small_net import Net, Output, Words, all_by_hand, by_hand, few_digits, hooks, loaders, trained_net
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler
from torchvision.models.resnet import BasicBlock

from nc_nbdev.lab.regression import measure_regression
from nc_nbdev.lab.report import collect, measure
from nc_nbdev.lab.taps import (
    FeatureTaps,
    evaluating,
    head_name,
    head_of,
    layer_features,
    loose_rows,
    pool_features,
    tap_layers,
    tapped_batches,
    unwrap,
)


@pytest.fixture(scope="module")
def data(): return few_digits()


@pytest.fixture(scope="module")
def net(data): return trained_net(data)


# -- pooling -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape, pool, width", [((2, 7), "avg", 7), ((2, 5, 7), "avg", 7), ((2, 7, 3, 4), "avg", 7),
    ((2, 7, 3, 4, 5), "avg", 7), ((2, 7, 3, 4), "flatten", 84), ((2, 5, 7), lambda t: t[:, 0], 7)])
def test_pooling(shape, pool, width, dtype):
    t = torch.randn(shape).to(dtype).requires_grad_()
    vectors = pool_features(t, pool)
    wide = t.detach().float() if dtype in (torch.float16, torch.bfloat16) else t.detach()
    assert vectors.shape == (2, width) and vectors.dtype == wide.dtype and not vectors.requires_grad
    if pool == "avg": assert torch.allclose(vectors.mean(1), wide.flatten(1).mean(1), atol=1e-6)   # all positions
    before = vectors.clone()
    with torch.no_grad(): t.fill_(99)
    assert torch.equal(vectors, before)                         # not a view


@pytest.mark.parametrize("t, pool", [
    (torch.ones(3), "avg"), (torch.ones(2, 3, dtype=torch.int64), "avg"), (torch.ones(2, 3), "max"),
    (torch.ones(2, 3, 4), lambda t: t), (torch.ones(2, 3, 4), lambda t: t[:1, 0])])
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
    assert torch.equal(taps["stage1"], by_hand(model, x)["stage1"].flatten(1))
    assert torch.equal(taps["head:input"], by_hand(model, x)["pool"])


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
    with pytest.raises(ValueError, match="ran 2 times"): layer_features(model, batches, "shared")
    assert hooks(model) == 0
    assert layer_features(model, batches, "once:input")[0]["once:input"].shape == (6, 4)


@pytest.mark.parametrize("wrap", [lambda t: (t, None), lambda t: [t, t + 1], lambda t: {"hidden": t},
                                  lambda t: ((t,), 3), lambda t: (None, t)])
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


@pytest.mark.parametrize("layers, message", [
    ("stage4", "did you mean stage"), ("pol", "did you mean pool"), (("pool", "pool"), "each once"),
    ((), "one or more"), ("", "has no layer"), ("haed:input", "did you mean head")])
def test_unknown_layers(net, layers, message):
    with pytest.raises(ValueError, match=message): FeatureTaps(net, layers)
    with pytest.raises(ValueError, match=message): layer_features(net, [], layers)


def test_untapped_layer(net):
    with FeatureTaps(net, "pool") as taps, pytest.raises(ValueError, match="'stem' is not tapped"): taps["stem"]


# -- running -----------------------------------------------------------------------------------------------------

def test_network_and_loader_are_left_as_they_were(net, data):
    model = copy.deepcopy(net).train()
    model.stem.eval()
    modes, state = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    dl = loaders(data, 64)[0].set_epoch(3)
    layer_features(model, dl, model.tap_names)
    assert [m.training for m in model.modules()] == modes and dl.epoch == 3 and hooks(model) == 0
    for name, value in model.state_dict().items(): assert torch.equal(value, state[name]), name
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluating(model): raise ZeroDivisionError
    with pytest.raises(RuntimeError): layer_features(model, [(torch.randn(4, 3, 8, 8), torch.arange(4))], "pool")
    assert [m.training for m in model.modules()] == modes and hooks(model) == 0


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_batches_do_not_matter(net, data, batch_size):
    whole = layer_features(net, loaders(data)[1], tap_layers(net))
    parts = layer_features(net, loaders(data, batch_size)[1], tap_layers(net))
    for layer in tap_layers(net): assert torch.allclose(whole[0][layer], parts[0][layer], atol=1e-5)
    assert torch.equal(whole[1], parts[1])
    hand = all_by_hand(net, loaders(data)[1])
    for layer in tap_layers(net): assert torch.allclose(hand[layer], whole[0][layer], atol=1e-6)


@pytest.mark.parametrize("module", [
    nn.LSTM(4, 6), nn.TransformerEncoderLayer(4, 2, 8), nn.MultiheadAttention(4, 2),
    nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 1, enable_nested_tensor=False)])
def test_time_before_the_batch(module):
    "An error for as many positions as samples, as for other numbers, where the shape alone is read."
    inputs = (torch.randn(5, 5, 4),) * (3 if isinstance(module, nn.MultiheadAttention) else 1)
    model = nn.ModuleList([module])
    for layer in ("0", "0:input"):
        with pytest.raises(ValueError, match=rf"layer '{layer}': .*batch_first=False inside; give pool="), \
             FeatureTaps(model, layer): model[0](*inputs)
    with FeatureTaps(model, "0", lambda t: t.mean(0)) as taps: model[0](*inputs)
    assert taps["0"].shape == (5, module.hidden_size if isinstance(module, nn.LSTM) else 4)


def test_a_block_that_transposes_inside_may_have_as_many_positions_as_samples():
    "A module of one's own gives (B, T, D), whatever its attention is told: its last batch may have any size."
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.MultiheadAttention(4, 1)
        def forward(self, x): return self.mix(*[x.mT.permute(2, 0, 1)] * 3)[0].transpose(0, 1)
    t = torch.randn(5, 5, 4)
    with FeatureTaps(model := nn.ModuleList([Block()]), "0") as taps: out = model[0](t)
    torch.testing.assert_close(taps["0"], out.mean(1))


def test_autocast_outside_changes_nothing(net, data):
    dl = loaders(data)[1]
    plain = layer_features(net, dl, "pool")[0]["pool"]
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = layer_features(net, dl, "pool")[0]["pool"]
    assert torch.equal(plain, inside)


def parametrized(wrap):
    "A network of three linear layers in training mode, some wrapped, and batches for it."
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(6, 8)), nn.ReLU(), wrap(nn.Linear(8, 8)), nn.ReLU(), wrap(nn.Linear(8, 3)))
    return model, [(torch.randn(30, 6), torch.arange(30) % 3)]


@pytest.mark.parametrize("read", [
    lambda model, dl: tap_layers(model), lambda model, dl: head_name(model, 3), lambda model, dl: head_of(model),
    measure, lambda model, dl: measure(model=model, train_dl=dl, num_classes=3, layers="2"),
    lambda model, dl: collect(model, dl, "2", 3, head="4"), lambda model, dl: layer_features(model, dl, "2"),
    lambda model, dl: measure_regression(model, [(x, torch.randn(30, 3)) for x, _ in dl])])
def test_weights_that_change_when_they_are_read_in_training_mode(read):
    model, dl = parametrized(parametrizations.spectral_norm)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    read(model, dl)
    assert [m.training for m in model.modules()] == modes and all(modes)
    for name, value in model.state_dict().items(): assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm,
                                  parametrizations.orthogonal])
def test_parametrized_weights_are_no_layers_of_their_own(wrap):
    (model, dl), (plain, _) = parametrized(wrap), parametrized(lambda layer: layer)
    assert tap_layers(model) == tap_layers(plain) == ("0", "2", "4:input") and head_name(model) == "4"
    assert torch.equal(head_of(model)[0], model.eval()[4].weight) and loose_rows(model) == []
    report = measure(model, dl)
    assert report.layers == ("0", "2", "4:input") and report.notes == ()
    for i in (0, 2, 4): plain[i].weight.data, plain[i].bias.data = model[i].weight.detach(), model[i].bias.detach()
    assert measure(plain, dl).frame.equals(report.frame)


class Merged(nn.Linear):
    "An adapter that adds itself to the weights for evaluation, and counts how often."
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.A, self.merged, self.times = nn.Parameter(torch.randn(outputs, inputs)), False, 0
    def train(self, mode=True):
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.A.data
            self.merged, self.times = not mode, self.times + 1
        return super().train(mode)
    def forward(self, x): return nn.functional.linear(x, self.weight + (0 if self.merged else self.A), self.bias)


def test_the_classifier_is_that_of_evaluation():
    model, dl = parametrized(lambda layer: layer)
    model[4] = Merged(8, 3)
    W = (model[4].weight + model[4].A).detach()
    assert torch.equal(head_of(model)[0], W) and not model[4].merged
    before = model[4].times
    report = measure(model, dl, dl)
    assert model[4].times == before + 2                          # to evaluation and back
    assert report.frame.equals(measure(model.eval(), dl, dl).frame)


def test_a_linear_layer_with_a_forward_of_its_own():
    "One that compares directions is found to do so; one that takes other inputs has the weights that it has."
    class Cosine(nn.Linear):
        def forward(self, x): return 10 * nn.functional.linear(*map(nn.functional.normalize, (x, self.weight)))
    class Margin(nn.Linear):
        def forward(self, x, y): return super().forward(x) - y
    W, b = head_of(nn.Sequential(Cosine(8, 3)))
    assert torch.allclose(W.norm(dim=1), torch.ones(3)) and torch.equal(b, torch.zeros(3))
    W, b = head_of(margin := nn.Sequential(Margin(8, 3)))
    assert torch.equal(W, margin[0].weight) and torch.equal(b, margin[0].bias)


def test_generators_of_samplers_and_what_they_leave_out():
    samples = TensorDataset(torch.randn(30, 6), torch.arange(30) % 3)
    model, generator = parametrized(lambda layer: layer)[0], torch.Generator().manual_seed(3)
    state = generator.get_state()
    def loader(drop_last=False, **options):
        sampler = RandomSampler(samples, generator=generator, **options)
        return DataLoader(samples, batch_sampler=BatchSampler(sampler, 20, drop_last))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(model, loader(), loader())
    assert torch.equal(generator.get_state(), state)
    with pytest.warns(UserWarning, match="drop_last=True leaves"): measure(model, loader(drop_last=True))
    with pytest.warns(UserWarning, match="replacement=True of"): layer_features(model, loader(replacement=True), "0")
    weighted = DataLoader(samples, 10, sampler=WeightedRandomSampler(torch.ones(30), 60))
    with pytest.warns(UserWarning, match="replacement=True of"): measure(model, weighted, absent="leave out")


def test_loaders_that_cannot_be_measured(net, data):
    train, _ = loaders(data, 64)
    train.augment = "crop_flip"
    with pytest.raises(ValueError, match="augment='crop_flip'"): layer_features(net, train, "pool")
    train.augment, train.drop_last = None, True
    with pytest.warns(UserWarning, match="drop_last"): layer_features(net, train, "pool")
    with pytest.raises(ValueError, match="no batches"): layer_features(net, [], "pool")


def test_inputs_of_other_kinds(data):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)
        def forward(self, a, b): return {"logits": self.head((a + b).flatten(1))}
    model, dl = Sum(), loaders(data)[1]
    several, named = ([((x, 2 * x), y) for x, y in dl], [(dict(b=2 * x, a=x), y) for x, y in dl])
    outputs = [torch.cat([out for _, out, _ in tapped_batches(model, batches, "head")]) for batches in (several, named)]
    assert torch.equal(*outputs) and outputs[0].shape == (120, 10)


class TwoImages(nn.Module):
    "Takes two images and a size that is not needed."
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, a, b, size=None): return self.head((a - 2 * b).flatten(1))


Pair = namedtuple("Pair", "image klass")
Named = namedtuple("Named", "image label")
Several = namedtuple("Several", "label left right")


class UserBatch(UserDict):
    "A mapping that is no dict, with a device of its own."
    def to(self, device): return self


@pytest.mark.parametrize("form", [
    lambda x, y: [x, y], lambda x, y: (x.numpy(), y.numpy()), lambda x, y: ([x], y.tolist()),
    lambda x, y: (x, y, y + 50), lambda x, y: (x, y, torch.rand(len(x))), lambda x, y: {"pixels": x, "label": y},
    lambda x, y: {"x": x, "y": y},
    lambda x, y: {"target": y.numpy(), "x": x.numpy()}, lambda x, y: UserBatch(x=x, labels=y), Pair, Named,
    lambda x, y: ({"image": x}, y)])
def test_batches_of_one_input(net, data, form):
    plain = layer_features(net, dl := loaders(data)[1], "pool")
    found = layer_features(net, [form(x, y) for x, y in dl], "pool")
    assert torch.equal(found[0]["pool"], plain[0]["pool"]) and torch.equal(found[1], plain[1])


@pytest.mark.parametrize("form", [
    lambda a, b, y: (a, b, y), lambda a, b, y: ((a, b), y), lambda a, b, y: [a, b, y, torch.rand(len(a))],
    lambda a, b, y: {"b": b, "a": a, "labels": y}, lambda a, b, y: {"size": 3, "y": y, "b": b.numpy(), "a": a},
    lambda a, b, y: Several(y, a, b), lambda a, b, y: ({"b": b, "a": a}, y),
    lambda a, b, y: (Several(None, a, b)[1:], y)])
def test_batches_of_several_inputs(data, form):
    model, y = TwoImages(), data.test_y
    (_, out, labels), = tapped_batches(model, [form(data.test_x, data.test_x.flip(0), y)], "head")
    assert torch.allclose(out, model(data.test_x, data.test_x.flip(0))) and torch.equal(labels, y)


@pytest.mark.parametrize("model, batch, message", [
    (Net, torch.ones(3, 1, 8, 8), r"a Tensor \(3, 1, 8, 8\): expected"), 
    (Net, (torch.ones(3, 1, 8, 8),), "a tuple of T"),
    (Net, {"x": torch.ones(3, 1, 8, 8), "classes": torch.ones(3)}, "dict with the names x, classes"),
    (Net, 3, "an? int"),
    (Net, {"u": 1, "v": 2, "y": torch.ones(3)}, r"Net.forward\(x\) does not take u, v"), (Net, None, "NoneType"),
    (TwoImages, (torch.ones(3), torch.ones(3), torch.arange(3), torch.arange(3)), "a tuple of Tensor"),
    (TwoImages, (torch.ones(3, 64), torch.ones(3, 64), torch.ones(3)), "a tuple of Tensor"),
    (Net, (torch.ones(3, 1, 8, 8), "abc"), "labels is a str"),
    (Net, (torch.ones(3, 1, 8, 8), {"y": 1}), "labels is a dict"),
    (Net, (torch.ones(3, 1, 8, 8), torch.ones(3, 10)), "argmax")])
def test_batches_that_are_not_understood(model, batch, message):
    with pytest.raises(ValueError, match=message): layer_features(model(), [batch], "head")


def test_batches_are_read_by_a_function(net, data):
    dl = loaders(data)[1]
    odd = [SimpleNamespace(image=x, truth=nn.functional.one_hot(y).double()) for x, y in dl]
    read = lambda b: (b.image, b.truth.argmax(1))
    found, plain = layer_features(net, odd, "pool", batch=read), layer_features(net, dl, "pool")
    assert torch.equal(found[0]["pool"], plain[0]["pool"])
    with pytest.raises(ValueError, match="SimpleNamespace: expected.*batch="): layer_features(net, odd, "pool")


def test_structures_are_placed_as_they_are(data):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)
        def forward(self, parts, words=None):
            assert words == ["a", "b"] and isinstance(parts["pair"], Pair) and parts["scale"] == 2
            return self.head(parts["pair"].image.flatten(1))
    x, model = data.test_x[:2], Nested().double()
    batch = {"parts": {"pair": Pair(x.numpy(), [None]), "scale": 2}, "words": ["a", "b"], "y": np.array([0, 1])}
    features = layer_features(model, [batch], "head:input")[0]["head:input"]
    assert features.dtype == torch.float64 and torch.equal(features, x.flatten(1).double())


# -- pools by layer, several outputs, tokens ---------------------------------------------------------------------------

def test_pools_by_layer(net, data):
    x, model = data.test_x[:5], copy.deepcopy(net).eval()
    largest = lambda t: t.amax((2, 3))
    with FeatureTaps(model, model.tap_names, {"stem": "flatten", "stage1": largest}) as taps: model(x)
    found = by_hand(model, x)
    assert torch.equal(taps["stem"], found["stem"].flatten(1)) and torch.equal(taps["stage1"], largest(found["stage1"]))
    assert torch.allclose(taps["stage2"], found["stage2"].mean((2, 3)), atol=1e-6)
    with (FeatureTaps(model, model.tap_names, largest) as one,
          FeatureTaps(model, model.tap_names, {"default": largest}) as two): model(x)
    for layer in model.tap_names: assert torch.equal(one[layer], two[layer])
    assert torch.equal(one["pool"], found["pool"])                # (B, D) already
    with pytest.raises(ValueError, match="'stage4'"): FeatureTaps(model, "stem", {"stage4": "avg"})


@pytest.mark.parametrize("outputs", [lambda a, b: (a, b), lambda a, b: {"u": a, "v": b}, lambda a, b: Output(u=a, v=b),
                                     lambda a, b: Pair(a, b), lambda a, b: [a, {"v": b}], lambda a, b: (a, (None, b))])
def test_output_by_name_or_place(outputs):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        def forward(self, x): return outputs(self.a(x), self.b(x))
    model, x = Several(), torch.randn(2, 4)
    names = {0: "a", 1: "b", None: "a"} | dict(zip(getattr(outputs(1, 2), "keys", lambda: ())(), "ab", strict=False))
    for output, layer in names.items():
        (taps, out, _), = tapped_batches(model, [(x, torch.arange(2))], ("a", "b"), output=output)
        assert torch.equal(out, taps[layer])
    for output in (2, "w"):
        with pytest.raises(ValueError, match=f"output={output!r}"):
            next(tapped_batches(model, [(x, torch.arange(2))], "a", output=output))
    with pytest.raises(ValueError, match="a Tensor"):
        next(tapped_batches(nn.Sequential(nn.Linear(4, 3)), [(x, torch.arange(2))], "0", output=0))


def test_a_number_beside_the_output():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)
        def forward(self, x): return {"loss": torch.tensor(1.), "logits": self.a(x)}
    (_, out, _), = tapped_batches(Loss(), [(torch.randn(2, 4), torch.arange(2))], "a")
    assert out.shape == (2, 3)


def sentences():
    "Whole numbers (6, 9), and a mask that leaves 4 to 9 of them."
    torch.manual_seed(0)
    return torch.randint(0, 7, (6, 9)), torch.arange(9) < torch.tensor([9, 4, 8, 9, 5, 7])[:, None]


@pytest.mark.parametrize("batch_size, length", [(1, 9), (2, 9), (6, 9), (6, 40)])
def test_texts_are_averaged_over_their_own_tokens(batch_size, length):
    "Whatever the other texts of a batch, and however far all are filled up."
    ids, mask = sentences()
    model, layers, y = Words().eval(), ("blocks.0", "head:input"), torch.arange(6) % 2
    own = [dict(input_ids=ids[i][mask[i]][None], labels=y[i:i + 1]) for i in range(6)]
    alone, _ = layer_features(model, own, layers)
    ids, mask = (nn.functional.pad(t, (0, length - 9)) for t in (ids, mask.long()))
    parts = zip(ids.split(batch_size), mask.split(batch_size), y.split(batch_size), strict=True)
    dl = [dict(input_ids=a, attention_mask=b, labels=c) for a, b, c in parts]
    found, labels = layer_features(model, dl, layers)
    assert torch.equal(labels, y)
    for layer in layers: assert torch.allclose(found[layer], alone[layer], atol=1e-6)
    first, one = (layer_features(model, texts, layers, lambda t: t[:, 0])[0] for texts in (dl, own))
    for layer in layers: assert torch.allclose(first[layer], one[layer], atol=1e-6)            # a function sees it all


def test_a_mask_without_zeros_changes_nothing_and_one_without_ones_is_an_error():
    ids, _ = sentences()
    model, y, ones = Words().eval(), torch.arange(6), torch.ones_like(ids)
    plain = layer_features(model, [dict(input_ids=ids, labels=y)], "blocks.1")[0]["blocks.1"]
    seen = layer_features(model, [dict(input_ids=ids, attention_mask=ones, labels=y)], "blocks.1")[0]["blocks.1"]
    assert torch.equal(plain, seen)
    ones[3] = 0
    batch = dict(input_ids=ids, attention_mask=ones, labels=y)
    with pytest.raises(ValueError, match="sample 3 of a batch: its att"): layer_features(model, [batch], "blocks.1")
    batch["labels"] = torch.where(y == 3, -100, y)
    some = layer_features(model, [batch], "blocks.1")[0]["blocks.1"]
    assert torch.allclose(some, plain[y != 3], atol=1e-6)
    with FeatureTaps(model, "embed") as taps:                                     # of others, positions are not tokens
        taps.mask = torch.eye(6)
        model(ids)
    assert torch.equal(taps["embed"], model.embed(ids).mean(1).detach())


@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_against_a_loop(shift):
    ids, mask = sentences()
    y = torch.where(torch.rand(6, 9) < 0.2, -100, torch.randint(0, 7, (6, 9)))
    model = Words().eval()
    with torch.no_grad(): out = model(ids, mask.long())
    rows, labels, logits = [], [], []
    for b in range(6):
        for t in range(9 - shift):
            if mask[b, t] and mask[b, t + shift] and y[b, t + shift] != -100:
                rows.append(out["hidden"][b, t]); labels.append(y[b, t + shift]); logits.append(out["logits"][b, t])
    batch = dict(input_ids=ids, attention_mask=mask.long(), labels=y)
    (taps, found, targets), = tapped_batches(model, [batch], "head:input", output="logits", next_token=bool(shift))
    assert torch.equal(targets, torch.stack(labels))
    assert torch.allclose(taps["head:input"], torch.stack(rows), atol=1e-6)
    assert torch.allclose(found[taps.rows], torch.stack(logits), atol=1e-6)


def test_ignored_samples(net, data):
    dl = loaders(data)[1]
    some = [(x, torch.where(y == 3, -100, y)) for x, y in dl]
    features, y = layer_features(net, some, "pool")
    whole = layer_features(net, dl, "pool")
    assert torch.equal(features["pool"], whole[0]["pool"][whole[1] != 3]) and torch.equal(y, whole[1][whole[1] != 3])
    near = list(tapped_batches(net, [(x, y.byte()) for x, y in dl], "pool", ignore_index=3))[0]
    assert torch.equal(near[2], y)
    bytes_ = [(x, torch.full_like(y, 156).byte()) for x, y in dl]    # -100 modulo 256 is a label like others
    assert len(layer_features(net, bytes_, "pool")[1]) == len(whole[1])


@pytest.mark.parametrize("y, options, message", [
    (lambda ids: ids[:, :-1], {}, "expected .B, T. for both"), 
    (lambda ids: ids[:, 0], dict(next_token=True), "expected .B"),
    (lambda ids: nn.functional.one_hot(ids), {}, "expected .B, T. for both"), (lambda ids: ids.float(), {}, "argmax")])
def test_labels_that_are_no_tokens(y, options, message):
    ids, mask = sentences()
    batch = dict(input_ids=ids, attention_mask=mask, labels=y(ids))
    with pytest.raises(ValueError, match=message): next(tapped_batches(Words(), [batch], "head:input", **options))


def test_whole_numbers_that_are_one_hot(net, data):
    batch = data.test_x, nn.functional.one_hot(data.test_y)
    for layer in ("pool", "stem"):
        with pytest.raises(ValueError, match="argmax"): layer_features(net, [batch], layer)


# -- classifiers -------------------------------------------------------------------------------------------------

def test_classifier():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    W, b = head_of(model)
    assert torch.equal(W, model[2].weight) and torch.equal(b, torch.zeros(2)) and not W.requires_grad
    W.zero_()
    assert model[2].weight.abs().sum() > 0                       # a copy
    assert head_of(model, "0")[0].shape == (3, 4)
    assert head_name(model) == "2" and head_name(model, 3) == "0" and head_name(model, 7) == "2"
    with pytest.raises(ValueError, match="expected nn.Linear or a 1x1 convolution"): head_of(model, "1")
    with pytest.raises(ValueError, match="has no nn.Linear"): head_of(nn.Sequential(nn.Conv2d(1, 2, 3)))


def test_classifier_that_is_a_convolution():
    "A 1x1 convolution counts when nothing with weights comes after it, and gives the same map at every position."
    body = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Linear(8, 8))
    model = nn.Sequential(body, nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert head_name(model) == "1" and tap_layers(model)[-1] == "1:input"
    W, b = head_of(model)
    features = layer_features(model, [(x := torch.randn(3, 1, 8, 8), torch.arange(3))], "1:input")[0]["1:input"]
    assert torch.allclose(features @ W.T + b, model(x), atol=1e-6)
    assert head_name(body) == "1"                                # not the convolution before it


def test_wrappers_are_seen_through():
    model = Net()
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        assert unwrap(wrapped) is model and tap_layers(wrapped) == tap_layers(model) and head_name(wrapped) == "head"


# -- layers worth measuring --------------------------------------------------------------------------------------

def runs_once(model, x):
    "The proposed layers, after a pass that shows that each gives one vector a sample."
    layers = tap_layers(model)
    found = layer_features(model, [(x, torch.zeros(len(x)))], layers)[0]
    assert all(H.shape[0] == len(x) for H in found.values()) and layers[-1] == f"{head_name(model)}:input"
    return layers


@pytest.mark.parametrize("name, expected", [
    ("resnet18", "bn1 layer1 layer2 layer3"), ("vgg11", "features.2 features.5 features.10 features.15"),
    ("densenet121", "features.denseblock1 features.denseblock2 features.denseblock3"),
    ("swin_t", "features.1 features.3 features.5"), ("squeezenet1_1", "features.4 features.7 features.10"),
    ("mobilenet_v3_small", "features.2 features.5 features.8"), ("shufflenet_v2_x0_5", "conv1 stage2 stage3 stage4"),
    ("alexnet", "features.2 features.5"), ("efficientnet_b0", "features.1 features.3 features.5")])
def test_layers_of_networks_from_elsewhere(name, expected):
    model = torchvision.models.get_model(name, num_classes=10)
    assert runs_once(model, torch.randn(2, 3, 64, 64)) == (*expected.split(), f"{head_name(model)}:input")


def transformer_block(): return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


class Transformer(nn.Module):
    "Tokens of 4 numbers through equal blocks: in a list, in a chain, or in a module that runs its list."
    def __init__(self, kind, depth=9):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        self.blocks = nn.TransformerEncoder(transformer_block(), depth) if kind == "encoder" else (
            kind(transformer_block() for _ in range(depth)) if kind is nn.ModuleList
            else kind(*[transformer_block() for _ in range(depth)]))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks if isinstance(self.blocks, nn.ModuleList) else [self.blocks]: x = block(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential, "encoder"])
def test_every_equal_block_is_tapped(kind):
    "All but the last, which the input of the classifier stands for; also where one block has more weights."
    prefix = "blocks.layers." if kind == "encoder" else "blocks."
    expected = ("embed", *(f"{prefix}{i}" for i in range(8)), "head:input")
    assert runs_once(Transformer(kind), torch.randn(2, 5, 4)) == expected
    model = Transformer(kind)
    model.get_submodule(f"{prefix}0").extra = nn.Linear(3, 3)
    assert tap_layers(model) == expected


@pytest.mark.parametrize("depth", [3, 9])
def test_stages_of_a_residual_network_stay_whole(depth):
    "Also where the last one is most of the network and its blocks are all alike."
    def stage(width): return nn.Sequential(*(BasicBlock(width, width) for _ in range(depth)))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), stage(8), stage(16), stage(32), nn.Linear(32, 10))
    assert tap_layers(net) == ("0", "1", "2", "4:input")


def test_the_block_that_holds_the_depth_is_opened():
    "A stem or a last convolution with parts of its own beside it makes no difference."
    stages = nn.Sequential(*(nn.Sequential(BasicBlock(8, 8)) for _ in range(4)))
    stem, end = (nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)) for _ in range(2))
    assert tap_layers(nn.Sequential(stem, stages, end, nn.Linear(8, 10))) == (
        "0", "1.0", "1.1", "1.2", "1.3", "3:input")


def test_a_list_is_never_tapped():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.stages = nn.ModuleList(nn.ModuleList([block(), block()]) for _ in range(2))
            self.head = nn.Linear(4, 3)
        def forward(self, x):
            for stage in self.stages:
                for block in stage: x = block(x)
            return self.head(x)
    assert runs_once(Stages(), torch.randn(2, 4)) == ("stages.0.0", "stages.0.1", "stages.1.0", "head:input")


def test_a_chain_that_is_only_looped_over_is_asked_for():
    "It looks as if it was called, so it is tapped; the error says what to do, and doing it works."
    class Looped(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
            self.rest, self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 3)
        def forward(self, x):
            for stage in self.stages: x = stage(x)
            return self.head(self.rest(x))
    model, batches = Looped(), [(torch.randn(6, 4), torch.arange(6) % 3)]
    assert tap_layers(model)[0] == "stages"
    with pytest.raises(ValueError, match="layer 'stages' ran 0 times.*: tap a layer after or inside it"):
        layer_features(model, batches, tap_layers(model))
    features, _ = layer_features(model, batches, ("stages.0", "stages.1", "head:input"))
    assert {layer: tuple(H.shape) for layer, H in features.items()} == dict.fromkeys(
        ("stages.0", "stages.1", "head:input"), (6, 4))


def test_small_networks_and_networks_that_say_so():
    chain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    assert runs_once(chain, torch.randn(2, 3)) == ("0", "2", "5:input")
    assert tap_layers(nn.Sequential(nn.Linear(3, 2))) == ("0:input",)
    chain.tap_names = ["1", "4"]
    assert tap_layers(chain) == ("1", "4")


# -- where the channels are --------------------------------------------------------------------------------------

def tapped(model, layer, *shape, **pool):
    with FeatureTaps(model, layer, **pool) as taps, torch.no_grad(): model.eval()(torch.randn(3, *shape))
    return taps


class Axes(nn.Module):
    "Modules in a chain, with the axes of what the last gives in another order."
    def __init__(self, *modules, axes): super().__init__(); self.body, self.axes = nn.Sequential(*modules), axes
    def forward(self, x): return self.body(x).permute(self.axes)


class Joined(nn.Module):
    "Modules side by side, what they give one after another."
    def __init__(self, *modules): super().__init__(); self.parts = nn.ModuleList(modules)
    def forward(self, x): return torch.cat([part(x) for part in self.parts], 1)


@pytest.mark.parametrize("module, shape, axes, sure", [
    (nn.Conv1d(3, 6, 3), (3, 20), 2, True),
    (nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.MaxPool1d(2)), (3, 20), 2, True),
    (nn.Sequential(nn.Conv1d(3, 12, 3), nn.GLU(1)), (3, 20), 2, False),
    (nn.Conv1d(3, 6, 3), (3, 8), 2, False),                                            # as many positions as channels
    (Axes(nn.Conv1d(3, 6, 3), axes=(0, 2, 1)), (3, 20), 1, True),                      # to tokens
    (nn.Sequential(Axes(nn.Conv1d(3, 6, 3), axes=(0, 2, 1)), nn.LayerNorm(6)), (3, 20), 1, True),
    (Axes(nn.LayerNorm(3), axes=(0, 2, 1)), (20, 3), 2, True),
    (nn.Linear(3, 6), (6, 3), 1, True), (nn.GRU(3, 6, batch_first=True), (9, 3), 1, True),
    (Axes(nn.Linear(3, 6), axes=(0, 2, 1)), (20, 3), 1, False),                        # a linear layer may mix tokens
    (nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), (6, 6), 1, True),
    (nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Flatten(2)), (3, 8, 8), 2, True),
    (nn.Sequential(nn.Conv2d(3, 16, 2, 2), nn.Flatten(2)), (3, 8, 8), 1, False),
    (nn.Identity(), (9, 3), 1, False),
    (nn.Conv2d(3, 6, 3), (3, 8, 8), (2, 3), True),
    (nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU()), (3, 4, 8), (2, 3), True),
    (nn.Conv3d(3, 6, 3), (3, 4, 5, 6), (2, 3, 4), True),
    (nn.Sequential(Axes(nn.Conv2d(3, 6, 3), axes=(0, 2, 3, 1)), nn.LayerNorm(6)), (3, 7, 8), (1, 2), True),
    (nn.Linear(3, 5), (7, 8, 3), (1, 2), True),
    (Axes(nn.Linear(3, 5), axes=(0, 3, 1, 2)), (7, 8, 3), (2, 3), True),               # as in ConvNeXt
    (nn.Linear(3, 7), (7, 7, 3), (2, 3), False),
    (Axes(nn.Conv2d(3, 9, 3), axes=(0, 2, 3, 1)), (3, 8, 8), (1, 2), True),            # channels last, without a norm
    (Axes(nn.Conv2d(3, 9, 3), axes=(0, 2, 3, 1)), (3, 7, 8), (1, 2), True),
    (Axes(nn.Conv2d(3, 5, 3), axes=(0, 2, 3, 1)), (3, 9, 8), (2, 3), False),           # or 7 channels of several layers
    (Joined(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)), (3, 8, 8), (2, 3), True),
    (Joined(nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3)), (3, 7, 8), (2, 3), False),
])
def test_channels_are_where_the_last_layer_put_them(module, shape, axes, sure):
    torch.manual_seed(0)
    model = nn.Sequential(module)
    torch.manual_seed(1); taps = tapped(model, "0", *shape)
    mean = lambda t: t.mean(axes)
    torch.manual_seed(1); by_hand = tapped(model, "0", *shape, pool=mean)
    assert torch.allclose(taps["0"], by_hand["0"], atol=1e-6)
    assert (not taps.doubts) == sure and by_hand.doubts == {}
    if not sure:                                                  # the note says how to have the other
        torch.manual_seed(1)
        pool = eval(taps.doubts["0"].partition("give pool=")[2].rstrip("."))
        assert tapped(model, "0", *shape, pool=pool)["0"].shape[0] == 3


def test_channels_of_what_goes_into_a_layer():
    for head, shape, width in ((nn.Linear(6, 2), (4, 5, 6), 6), (nn.Conv2d(6, 2, 1), (6, 4, 5), 6)):
        taps = tapped(nn.Sequential(nn.Identity(), head), "1:input", *shape)
        assert taps["1:input"].shape == (3, width) and taps.doubts == {}


# -- a classifier of several -------------------------------------------------------------------------------------

class Branches(nn.Module):
    "Two tasks with layers of their own, and a classifier for training alone that comes last."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.shape = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))
        self.colour = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 7))
        self.extra = nn.Linear(8, 4)
    def forward(self, x):
        h = self.body(x)
        found = {"shape": self.shape(h), "colour": self.colour(h)}
        return found | {"extra": self.extra(h)} if self.training else found


@pytest.mark.parametrize("head", ["shape.2", "colour.2", "extra"])
def test_layers_of_the_classifier_that_is_named(head):
    layers = tap_layers(Branches(), head=head)
    assert layers == ("body", f"{head}:input") and tap_layers(nn.DataParallel(Branches()), head=head) == layers


def test_a_named_classifier_of_a_plain_network_changes_nothing(net):
    resnet, vgg = torchvision.models.resnet18(), torchvision.models.vgg11()
    for model, head in ((net, "head"), (resnet, "fc"), (vgg, "classifier.6"),
                        (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3)), "3")):
        assert tap_layers(model, head=head) == tap_layers(model)
