"Networks for small images, their layers and their heads."
import pytest
import torch
from torch import nn

from nc_nbdev.lab.models import (
    BasicBlock,
    build_model,
    count_parameters,
    head_name,
    head_of,
    model_names,
    tap_layers,
    unwrap,
)


def tapped(model, x):
    "Shapes (without the batch) of what `tap_layers` names, by hooks written here."
    found = {}
    for layer in tap_layers(model):
        module = model.get_submodule(layer.removesuffix(":input"))
        if layer.endswith(":input"): module.register_forward_pre_hook(lambda m, i, n=layer: found.setdefault(n, []).append(i[0]))
        else: module.register_forward_hook(lambda m, i, o, n=layer: found.setdefault(n, []).append(o))
    model.eval()(x)
    assert all(len(v) == 1 for v in found.values())              # every layer runs once a pass
    return [found[n][0] for n in tap_layers(model)]


@pytest.mark.parametrize("size, channels", [(8, 1), (28, 1), (32, 3)])
@pytest.mark.parametrize("name", model_names)
def test_every_model_at_every_size(name, size, channels):
    model = build_model(name, 7, in_channels=channels, image_size=size)
    x = torch.randn(2, channels, size, size)
    values = tapped(model, x)
    W, b = head_of(model)
    assert (W.shape[0], b.shape) == (7, (7,))
    last = values[-1].flatten(1)                                 # the last tap is the input of the head ...
    assert torch.allclose(last @ W.T + b, model(x), atol=1e-4 * model(x).abs().max().item())     # ... and the head is linear
    spatial = [v.shape[-1] for v in values if v.ndim == 4]
    assert spatial == sorted(spatial, reverse=True)              # in order of depth
    assert len(set(tap_layers(model))) == len(tap_layers(model)) >= 3


@pytest.mark.parametrize("name, expected", [("resnet18", 11_173_962), ("resnet34", 21_282_122), ("resnet50", 23_520_842)])
def test_parameter_counts_of_the_literature(name, expected):
    assert count_parameters(build_model(name, 10)) == expected   # those of ResNets for CIFAR-10 with a 3x3 stem


def test_no_early_downsampling():
    x = torch.randn(1, 3, 32, 32)
    assert [v.shape[-1] for v in tapped(build_model("resnet18", 10), x)] == [32, 32, 16, 8, 1]
    assert [v.shape[-1] for v in tapped(build_model("densenet121", 10), x)[:3]] == [32, 16, 8]


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
        model = build_model("small_resnet", 5, width=width, depth=depth)
        assert head_of(model)[0].shape == (5, 4 * width)
        assert sum(isinstance(m, BasicBlock) for m in model.modules()) == 3 * depth
    assert tap_layers(build_model("mlp", 5, width=10, depth=4, image_size=8)) == ("layer1", "layer2", "layer3", "layer4")


@pytest.mark.parametrize("arguments, message", [
    (dict(name="resnet"), "expected one of small_resnet, mlp"), (dict(name="resnet18", width=8), "width cannot be changed"),
    (dict(name="vgg11_bn", depth=8), "depth cannot be changed"), (dict(name="mlp"), "image_size is needed"), (dict(name="small_resnet", width=0), "at least 1")])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message): build_model(num_classes=10, **arguments)


def test_head():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    W, b = head_of(model)
    assert torch.equal(W, model[2].weight) and torch.equal(b, torch.zeros(2)) and not W.requires_grad
    W.zero_()
    assert model[2].weight.abs().sum() > 0                       # a copy
    assert head_of(model, "0")[0].shape == (3, 4)
    with pytest.raises(ValueError, match="no nn.Linear"): head_of(nn.Conv2d(1, 2, 3))


def test_wrappers_are_seen_through():
    model = build_model("small_resnet", 3)
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model)), nn.DataParallel(torch.compile(model))):
        assert unwrap(wrapped) is model and tap_layers(wrapped) == tap_layers(model) and head_name(wrapped) == "head"


def test_layers_of_networks_from_elsewhere():
    import torchvision
    for build in (torchvision.models.resnet18, torchvision.models.vgg11, torchvision.models.densenet121, torchvision.models.vit_b_16, torchvision.models.mobilenet_v2):
        model = build()
        names = dict(model.named_modules())
        layers = tap_layers(model)
        assert len(layers) >= 2 and all(n.removesuffix(":input") in names for n in layers)
        assert layers[-1] in (f"{head_name(model)}:input", "avgpool")
    assert tap_layers(nn.Sequential(nn.Linear(3, 2))) == ("0:input",)


@pytest.mark.parametrize("name", ["small_resnet", "mlp", "resnet18", "vgg11_bn"])
def test_gradients_reach_every_weight(name):
    model = build_model(name, 4, image_size=8).train()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
