"Networks of torchvision, timm and transformers with random weights: each is measured, or asks for what it needs."
import warnings
from math import isfinite

import pytest
import torch
from torchvision import models as tv
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from nc_nbdev.lab import report as report_module
from nc_nbdev.lab.report import measure


@pytest.fixture(autouse=True)
def light(monkeypatch):
    "No covariances of thousands of dimensions: those are tested elsewhere. No warnings of sizes nobody trains with."
    monkeypatch.setattr(report_module, "within_for", lambda dim: "trace")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check(model, batch, **options):
    "The last layer has NC1, the classifier is found and layers before it; the report, to ask for more."
    report = measure(model, [batch], **options)
    last = report.measures["train"][report.layers[-1]]
    assert isfinite(last.nc1_trace) and last.nc1_trace > 0
    assert len(report.layers) > 2 and report.accuracy["train"] is not None
    assert not any("No NC3" in note for note in report.notes)
    return report


def image_batch(size):
    "Twelve images of three classes."
    y = torch.arange(12) % 3
    return torch.randn(12, 3, size, size) + y[:, None, None, None], y


# -- torchvision -------------------------------------------------------------------------------------------------

SWIN = dict(patch_size=[4, 4], embed_dim=16, depths=[1, 1, 5, 1], num_heads=[1, 2, 2, 4], window_size=[4, 4])
TORCHVISION = {name: (lambda name=name: tv.get_model(name, num_classes=3), 32) for name in (
    "resnet18", "resnet34", "resnet50", "resnext50_32x4d", "squeezenet1_1", "densenet121", "mobilenet_v2",
    "mobilenet_v3_small", "mobilenet_v3_large", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "mnasnet0_5",
    "mnasnet0_75", "mnasnet1_0", "efficientnet_b0", "efficientnet_b1", "regnet_y_400mf", "regnet_x_400mf",
    "convnext_tiny")}
TORCHVISION |= {
    "squeezenet1_0": (lambda: tv.squeezenet1_0(num_classes=3), 64),
    "googlenet": (lambda: tv.googlenet(num_classes=3, aux_logits=False, init_weights=False), 64),
    "googlenet with aux": (lambda: tv.googlenet(num_classes=3, aux_logits=True, init_weights=False), 64),
    "inception_v3": (lambda: tv.inception_v3(num_classes=3, init_weights=False), 75),
    "swin": (lambda: tv.SwinTransformer(**SWIN, num_classes=3), 64),
    "swin_v2": (lambda: tv.SwinTransformer(
        **SWIN, num_classes=3, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 64),
    "vit": (lambda: tv.VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3), 32),
    "maxvit": (lambda: tv.MaxVit(
        (64, 64), stem_channels=8, partition_size=2, block_channels=[8, 8, 16, 16], block_layers=[1, 1, 1, 1],
        head_dim=4, stochastic_depth_prob=0, num_classes=3), 64)}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    make, size = TORCHVISION[name]
    report = check(make(), image_batch(size))
    if name == "vit": assert len(report.layers) == 7                # a tap for each block but the last


# -- timm --------------------------------------------------------------------------------------------------------

FLAT = dict(img_size=32, depth=5, embed_dim=32, num_heads=2)
TIMM = {name: {} for name in (
    "test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_byobnet", "test_mambaout",
    "mobilenetv3_small_050", "ghostnet_050", "mobilevit_xxs", "edgenext_xx_small", "inception_next_atto",
    "convnext_atto", "repvit_m0_9", "fastvit_t8", "resnetv2_50", "pvt_v2_b0")}
TIMM |= {
    "vit_tiny_patch16_224": FLAT, "beit_base_patch16_224": FLAT, "deit_tiny_distilled_patch16_224": FLAT,
    "cait_xxs24_224": FLAT, "eva02_tiny_patch14_224": dict(img_size=28, depth=5), "levit_128s": dict(img_size=64),
    "xcit_nano_12_p16_224": dict(img_size=64),
    "swin_tiny_patch4_window7_224": dict(img_size=64, window_size=4, embed_dim=24)}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    size = TIMM[name].get("img_size", 64)
    report = check(timm.create_model(name, num_classes=3, **TIMM[name]), image_batch(size))
    if name.startswith(("vit", "beit", "deit", "eva02")): assert {f"blocks.{i}" for i in range(4)} <= {*report.layers}
    if name.startswith(("fastvit", "resnetv2", "pvt")): assert {"stages.0", "stages.1", "stages.2"} <= {*report.layers}
    if name.startswith(("deit", "levit")): assert "head_dist" in report.notes[0]            # two heads: it says so


# -- transformers ------------------------------------------------------------------------------------------------

def images():
    x, y = image_batch(32)
    return dict(pixel_values=x, labels=y)


def sentences():
    "Twelve sentences of three classes; the last ones are padded."
    mask = (torch.arange(8) < torch.tensor([8] * 9 + [5] * 3)[:, None]).long()
    return dict(input_ids=torch.randint(1, 40, (12, 8)) * mask, attention_mask=mask, labels=torch.arange(12) % 3)


def tags(): return sentences() | dict(labels=torch.arange(96).view(12, 8) % 3)


def text():
    ids = torch.randint(1, 6, (12, 8))
    return dict(input_ids=ids, labels=ids)


BLOCKS = dict(hidden_size=16, num_hidden_layers=5, num_attention_heads=2, intermediate_size=32)
WORDS = dict(BLOCKS, vocab_size=40, max_position_embeddings=20)
GPT = dict(n_embd=16, n_layer=5, n_head=2, vocab_size=40, n_positions=16, pad_token_id=0)
T5 = dict(d_model=16, d_ff=32, d_kv=8, num_layers=5, num_heads=2, vocab_size=40)
TRANSFORMERS = {        # class: (its configuration, the batches it takes)
    "BertForSequenceClassification": (WORDS, sentences), "BertForTokenClassification": (WORDS, tags),
    "RobertaForSequenceClassification": (WORDS, sentences),
    "DistilBertForSequenceClassification": (
        dict(vocab_size=40, dim=16, n_layers=5, n_heads=2, hidden_dim=32), sentences),
    "GPT2LMHeadModel": (GPT, text), "GPT2ForSequenceClassification": (GPT, sentences),
    "LlamaForCausalLM": (dict(BLOCKS, vocab_size=40), text),
    "ViTForImageClassification": (dict(BLOCKS, image_size=32, patch_size=8), images),
    "ConvNextForImageClassification": (dict(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 2, 1]), images),
    "T5ForTokenClassification": (T5, tags)}


def made(name, sizes):
    "A network of transformers with three classes and random weights."
    kind = getattr(pytest.importorskip("transformers"), name)
    return kind(kind.config_class(**sizes, **({} if name.endswith("LM") else {"num_labels": 3})))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    sizes, batch = TRANSFORMERS[name]
    options = dict(next_token=True) if batch is text else {}
    report = check(made(name, sizes), batch(), **options)
    if not name.startswith("ConvNext"): assert len(report.layers) >= 5           # a tap for each block but the last
    if options: assert report.layers[-1] == "lm_head:input"


def test_an_encoder_without_a_classifier_asks_for_the_classes():
    model, batch = made("T5EncoderModel", T5), sentences()
    with pytest.raises(ValueError, match="num_classes"): measure(model, [batch], head=None)
    report = measure(model, [batch], head=None, num_classes=3)
    assert report.accuracy["train"] is None and report.measures["train"][report.layers[-1]].nc1_trace > 0
