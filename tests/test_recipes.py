"Image recipes: what they refuse, what a seed draws, what is measured, and going on after an interruption."
from copy import copy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException

from nc_nbdev.lab.report import measure
from nc_nbdev.lab.runs import one_thread
from nc_nbdev.lab.settings import SCALES, Settings
from nc_nbdev.vision.models import model_names
from nc_nbdev.vision.recipes import PRESETS, ImageRecipe, image_base, image_grid
from nc_nbdev.vision.sources import dataset_names
from nc_nbdev.vision.training import learning_rate, train

TINY = ImageRecipe(epochs=3, train_per_class=20, test_per_class=10, width=4, batch_size=32)


class Stop(Callback):
    def after_epoch(self):
        if self.epoch == 1: raise CancelFitException


@pytest.mark.parametrize("change, message", [
    (dict(loss="hinge"), "loss='hinge': expected one of"), (dict(precision="fp16"), "precision"),
    (dict(memory_format="nchw"), "memory_format"), (dict(epochs=0), "epochs=0"), (dict(seed=-1), "seed=-1"),
    (dict(lr=float("nan")), "lr=nan"), (dict(warmup=2), "warmup=2"), (dict(label_noise=1.5), "label_noise=1.5"),
    (dict(data_seed=-1), "data_seed=-1"), (dict(milestones=(0.5, 0.2)), "milestones"),
    (dict(imbalance=0.5), "imbalance=0.5")])
def test_bad_fields(change, message):
    with pytest.raises(ValueError, match=message): ImageRecipe(**change)


def test_a_seed_draws_the_data_unless_the_recipe_says_otherwise():
    images = lambda **kw: replace(TINY, **kw).data().train_images
    assert not torch.equal(images(seed=0), images(seed=1))
    assert torch.equal(images(seed=0, data_seed=3), images(seed=1, data_seed=3))
    assert torch.equal(images(seed=3), images(seed=0, data_seed=3))
    four = replace(TINY, classes=(1, 3, 8, 9), coarse="pairs", label_noise=0.5).data()
    assert four.classes == ("1+3", "8+9") and four.fine_classes == ("1", "3", "8", "9")
    assert len(four.clean_train_labels) == 80


@pytest.mark.parametrize("imbalance", [1, 5])
def test_seen_and_rest_are_the_train_set_in_two_parts(imbalance):
    splits = ImageRecipe(imbalance=imbalance).loaders()
    assert list(splits)[:2] == ["train", "test"]
    rows = {name: sorted(bytes(x) for x in dl.images.flatten(1).numpy()) for name, dl in splits.items()}
    assert sorted(rows["seen"] + rows["rest"]) == rows["train"]
    assert len(rows["seen"]) == min(len(rows["test"]), len(rows["train"]) // 4)
    share = splits["seen"].class_counts / splits["train"].class_counts
    assert (share - share.mean()).abs().max() < 0.05                # stratified
    assert all(not dl.shuffle and dl.augment is None for dl in splits.values())


def test_a_small_class_is_in_both_parts_of_the_train_set():
    few, splits = replace(TINY, train_per_class=2), ImageRecipe(imbalance=80).loaders()
    assert splits["train"].class_counts[-1] == 2
    for found in (splits, few.loaders()):
        assert (found["seen"].class_counts > 0).all() and (found["rest"].class_counts > 0).all()
    with pytest.raises(ValueError, match=r"classes \[9\] have 1 image each: expected two or more.*lower imbalance="):
        ImageRecipe(imbalance=100).loaders()


def test_parts_of_the_train_set_are_measured_in_its_pass():
    model, splits, ran = TINY.learner().model, TINY.loaders(), []
    alone = {name: copy(dl) for name, dl in splits.items()}
    for dl in alone.values(): vars(dl).pop("whole", None)
    model.register_forward_hook(lambda *_: ran.append(len(ran)))
    frames, runs = [], []
    for found in (splits, alone):
        tests, before = {name: dl for name, dl in found.items() if name != "train"}, len(ran)
        frames.append(measure(model, found["train"], tests, references=TINY.references).frame)
        runs.append(len(ran) - before)
    assert runs == [2, 4]                                           # passes of one batch: train and test, or all four
    pd.testing.assert_frame_equal(*frames, rtol=1e-4)


@pytest.mark.parametrize("change", [
    dict(), dict(precision="bf16", augment="crop_flip"), dict(schedule="step", loss="mse")])
def test_stopped_and_resumed_is_the_same_to_the_last_bit(change):
    recipe = replace(TINY, **change)
    whole, again, stopped, resumed = (recipe.learner() for _ in range(4))
    train(whole, recipe)
    train(again, recipe)
    train(stopped, recipe, [Stop()])
    torch.rand(7)
    resumed.create_opt()
    for part in ("model", "opt"): getattr(resumed, part).load_state_dict(getattr(stopped, part).state_dict())
    with one_thread(): resumed.fit(recipe.epochs, start_epoch=2)        # as `train` does
    for a, b, c in zip(*(learn.model.state_dict().values() for learn in (whole, again, resumed)), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.dtype in (torch.float32, torch.int64)


def test_training_is_silent_and_memory_formats_agree(capfd):
    results = []
    for memory_format in ("contiguous", "channels_last"):
        recipe = replace(TINY, memory_format=memory_format)
        learn = recipe.learner()
        learn.fit(1)
        results.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
    assert torch.allclose(*results, atol=1e-3)
    assert capfd.readouterr().out == ""


def test_learning_rate():
    recipe = ImageRecipe(lr=1.0, warmup=0.1)
    assert learning_rate(recipe, 0) == 0 and learning_rate(recipe, 1) == pytest.approx(0)
    assert learning_rate(replace(recipe, schedule="constant"), 0.05) == pytest.approx(0.5)
    steps = [learning_rate(replace(recipe, schedule="step", warmup=0.0), t) for t in (0, 0.4, 0.9)]
    assert steps == pytest.approx([1, 0.1, 0.01])


def test_presets_name_only_what_there_is():
    assert tuple(PRESETS) == SCALES
    for preset in PRESETS.values():
        assert len(set(preset.grid)) == len(preset.grid)
        for r in preset.grid: assert r.model in model_names and r.dataset in dataset_names and r.cost() > 0
        assert image_grid(Settings(preset=preset.name)) == preset.grid


def test_settings_choose_recipes(tmp_path):
    assert [r.dataset for r in image_grid(Settings(preset="laptop", datasets=("cifar10",)))] == ["cifar10", "cifar10"]
    fashion = image_grid(Settings(preset="laptop", datasets=("fashion_mnist",)))
    assert [r.loss for r in fashion] == ["cross_entropy", "mse"]
    assert image_base(Settings(datasets=("templates-0.3",))).dataset == "templates-0.3"
    assert len(image_grid(Settings(overrides={"loss": "mse"}))) == 1
    (tmp_path / "pets").mkdir()
    assert image_base(Settings(datasets=("pets",), data_dir=tmp_path)).dataset == "pets"
    with pytest.raises(ValueError, match="did you mean 'mnist'"): image_grid(Settings(datasets=("minst",)))
    with pytest.raises(ValueError, match="lr"): image_grid(Settings(overrides={"lrr": "1"}))
