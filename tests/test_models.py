"Networks for small images, their layers and their heads."
import pytest
import torch
from torch import nn

from nc_nbdev.vision.models import MLP, BasicBlock, SmallResNet, build_model, count_parameters, model_names


def tapped(model, x):
    "What the layers of `tap_names` give, by hooks written here."
    found = {}
    def keep(name, value): found.setdefault(name, []).append(value)
    for layer in model.tap_names:
        module = model.get_submodule(layer.removesuffix(":input"))
        if layer.endswith(":input"): module.register_forward_pre_hook(lambda m, i, n=layer: keep(n, i[0]))
        else: module.register_forward_hook(lambda m, i, o, n=layer: keep(n, o))
    model.eval()(x)
    assert all(len(v) == 1 for v in found.values())              # every layer runs once a pass
    assert tuple(found) == model.tap_names                       # in order of depth
    return [v for [v] in found.values()]


@pytest.mark.parametrize("size, channels", [(8, 1), (28, 1), (32, 3)])
@pytest.mark.parametrize("name", model_names)
def test_every_model_at_every_size(name, size, channels):
    model = build_model(name, 7, in_channels=channels, image_size=size)
    x = torch.randn(2, channels, size, size)
    values = tapped(model, x)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    assert head.weight.shape[0] == 7
    last = values[-1].flatten(1)                                 # the last tap is the input of the head
    assert torch.allclose(head(last), model(x), atol=1e-4 * model(x).abs().max().item())
    spatial = [v.shape[-1] for v in values if v.ndim == 4]
    assert spatial == sorted(spatial, reverse=True)              # in order of depth
    assert len(set(model.tap_names)) == len(model.tap_names) >= (3 if name == "mlp" else 6)


@pytest.mark.parametrize("name, expected", [
    ("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842)])
def test_parameter_counts_of_the_literature(name, expected):
    assert count_parameters(build_model(name, 10)) == expected   # those of ResNets for CIFAR-10 with a 3x3 stem


def test_no_early_downsampling():
    x = torch.randn(1, 3, 32, 32)
    assert [v.shape[-1] for v in tapped(build_model("resnet18", 10), x)] == [32, 32, 32, 16, 16, 8, 8, 4, 1]
    assert [v.shape[-1] for v in tapped(build_model("densenet121", 10), x)[:4]] == [32, 32, 16, 8]


@pytest.mark.parametrize("size, pools", [(8, 3), (28, 4), (32, 5), (64, 5)])
def test_vgg_keeps_as_many_pools_as_fit(size, pools):
    model = build_model("vgg11_bn", 10, image_size=size)
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == pools
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)


def test_same_seed_same_weights():
    def weights(seed, name):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_model(name, 3, image_size=8).parameters()])
    for name in ("small_resnet", "mlp", "resnet18"):
        assert torch.equal(weights(0, name), weights(0, name)) and not torch.equal(weights(0, name), weights(1, name))


def test_width_and_depth():
    for width, depth in ((8, 1), (16, 3)):
        model = SmallResNet(5, width=width, depth=depth)
        assert model.head.weight.shape == (5, 4 * width)
        assert sum(isinstance(m, BasicBlock) for m in model.modules()) == 3 * depth
        assert len(tapped(model, torch.randn(2, 3, 8, 8))) == 4 + 3 * depth
    assert MLP(5, 64, width=10, depth=4).tap_names == ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize("arguments, message", [
    (dict(name="resnet"), "expected one of small_resnet, mlp"),
    (dict(name="resnet18", width=8), "width cannot be changed"),
    (dict(name="small_resnet", width=0), "at least 1")])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message): build_model(num_classes=10, **arguments)


@pytest.mark.parametrize("name", ["small_resnet", "mlp", "resnet18", "vgg11_bn"])
def test_gradients_reach_every_weight(name):
    model = build_model(name, 4, image_size=8).train()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
