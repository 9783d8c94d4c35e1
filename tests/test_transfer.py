"Transfer from snapshots: every measure, what is kept on disk, fine-tuning, other data, bad input."

import itertools
from dataclasses import replace

import pytest
import torch

from nc_nbdev.lab.history import COLUMNS
from nc_nbdev.lab.probes import linear_probe, reconstructed_probe
from nc_nbdev.lab.runs import get_run
from nc_nbdev.lab.settings import Settings
from nc_nbdev.lab.taps import head_name
from nc_nbdev.vision import transfer
from nc_nbdev.vision.recipes import ImageRecipe
from nc_nbdev.vision.sources import adapt_images, font_letters, load_dataset
from nc_nbdev.vision.transfer import measure_transfer

# -- data --------------------------------------------------------------------------------------------------------

def test_letters():
    data = font_letters(8, per_class=24)
    assert data.image_shape == (1, 8, 8) and data.num_classes == 10 and data.test_labels.bincount().tolist() == [6] * 10
    assert torch.equal(data.train_images, font_letters(8, per_class=24).train_images)
    assert not torch.equal(data.train_images, font_letters(8, per_class=24, seed=1).train_images)
    assert linear_probe(transfer.pixel_task(data)).accuracy > 0.4       # there is something to read


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 16, 16), (3, 32, 32)])
def test_adapted_images(shape):
    data = font_letters(16, per_class=4)
    found = adapt_images(data, shape)
    assert found.image_shape == shape and torch.equal(found.train_labels, data.train_labels)
    assert abs(found.train_images.float().mean() - data.train_images.float().mean()) < 2
    assert torch.equal(adapt_images(data, data.image_shape).train_images, data.train_images)


def test_other_data_that_is_there_is_used(tmp_path):
    from PIL import Image
    recipe = ImageRecipe(dataset="digits")
    assert transfer.other_data(recipe, tmp_path)[1] == ["mnist", "fashion_mnist"]
    for split, c, i in itertools.product(("train", "test"), "ab", range(3)):
        folder = tmp_path / "mnist" / split / c
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), 40 * i).save(folder / f"{i}.png")
    found, missing = transfer.other_data(recipe, tmp_path)
    assert [d.name for d in found] == ["letters", "mnist"] and missing == ["fashion_mnist"]
    assert len(found[1].train_labels) == 6


def test_pixels_of_large_images_are_reduced():
    small = load_dataset("digits").subset(40, 20).coarsen("pairs")
    task, reduced = transfer.pixel_task(small), transfer.pixel_task(adapt_images(small, (3, 16, 16)))
    assert task.train.shape == (400, 64) and reduced.train.shape == (400, 256)
    assert torch.equal(task.coarse, task.fine // 2)
    assert abs(linear_probe(task).accuracy - linear_probe(reduced).accuracy) < 0.1


# -- runs --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    recipe = ImageRecipe(coarse="pairs", epochs=3, train_per_class=30, test_per_class=10, width=4, snapshots=2,
                         measure_points=4)
    return get_run(recipe, Settings(device="cpu", runs_dir=tmp_path_factory.mktemp("runs")), progress=False)


def test_every_measure_of_every_layer(run):
    table = measure_transfer(run, layers=("stage1", "pool"))
    assert tuple(table.columns) == COLUMNS and set(transfer.MEASURES) <= set(table.measure)
    assert sorted(set(table.epoch)) == [0, 3] and list(dict.fromkeys(table.layer)) == ["stage1", "pool"]
    assert table[~table.measure.str.endswith("_C")].value.between(0, 1).all()
    assert table[table.measure.str.endswith("_gap")].value.max() < 1e-8
    task = transfer.feature_tasks(run, 3, ("pool",))["pool"]
    expected = {"probe_raw": linear_probe(task, "raw").accuracy, "reconstructed": reconstructed_probe(task).accuracy}
    for measure, value in expected.items():
        assert table[(table.epoch == 3) & (table.layer == "pool") & (table.measure == measure)].value.item() == value


def test_what_is_known_is_read(run, monkeypatch):
    first = measure_transfer(run, ("few_shot",))
    monkeypatch.setattr(transfer, "feature_tasks", lambda *args: pytest.fail("measured again"))
    assert first.equals(measure_transfer(run, ("few_shot",)))


def test_what_was_measured_before_an_interruption_is_kept(run, monkeypatch):
    ask = transfer.MEASURES["probe_fixed"]
    calls = []
    def interrupted(task):
        calls.append(task)
        if len(calls) == 2: raise KeyboardInterrupt
        return ask(task)
    monkeypatch.setitem(transfer.MEASURES, "probe_fixed", interrupted)
    with pytest.raises(KeyboardInterrupt): measure_transfer(run, ("probe_fixed",), layers=("stage2",))
    assert measure_transfer(run, ("probe_fixed",), layers=("stage2",)).epoch.nunique() == 2 and len(calls) == 3


def test_tasks_have_the_labels_before_coarsening(run):
    task = transfer.feature_tasks(run, 3, ("pool",))["pool"]
    assert torch.equal(task.coarse, task.fine // 2) and task.num_classes == 10
    assert torch.equal(task.coarse_test, task.fine_test // 2)


def test_noisy_labels_are_not_probed_for():
    data = load_dataset("digits").with_label_noise(1.0)
    assert torch.equal(transfer.fine_labels(data)[0], load_dataset("digits").train_labels)


def test_fine_tuning_starts_from_the_snapshot(run, monkeypatch):
    seen = {}
    monkeypatch.setattr(transfer, "train", lambda learn, recipe: seen.update(learn=learn, recipe=recipe))
    transfer.fine_tune(run, 3)
    model = seen["learn"].model
    head, old, new = head_name(model), run.model(3).state_dict(), model.state_dict()
    assert all(torch.equal(old[k], new[k]) for k in old if not k.startswith(head))
    assert new[f"{head}.weight"].shape[0] == 10 and seen["recipe"].epochs == 10
    assert torch.equal(seen["learn"].dls.train.labels.bincount(), torch.full((10,), 20))


def test_fine_tuning_learns(run):
    assert transfer.fine_tune_history(run, [3]).value.item() > 0.3      # 0.1 is chance


def test_many_runs_give_the_same_tables(run):
    letters = [font_letters(per_class=8)]
    jobs = [(measure_transfer, run, dict(measures=("few_shot",))),
            (transfer.other_data_history, run, dict(others=letters, epochs=(3,)))]
    tables = transfer.measure_runs(jobs, progress=False)
    assert tables[0].equals(measure_transfer(run, ("few_shot",))) and tables[1].measure.tolist() == ["probe_letters"]


def test_other_images_of_the_same_name_are_measured_anew(run):
    for s in (0, 1, 0): transfer.other_data_history(run, [font_letters(per_class=12, seed=s)], (3,))
    known = run.entry.read_json(f"other-data-{transfer.VERSION}.json")
    assert sum(key.startswith("3/letters:") for key in known) >= 2


def test_a_job_that_fails_is_named(run):
    with pytest.raises(RuntimeError, match="alchemy"):
        transfer.measure_runs([(measure_transfer, run, dict(measures=("alchemy",)))], progress=False)


def test_asking_for_what_is_not_there(run):
    with pytest.raises(ValueError, match="expected some of probe_raw"): measure_transfer(run, ("alchemy",))
    with pytest.raises(ValueError, match="no weights of epoch 1"): measure_transfer(run, ("few_shot",), epochs=(1,))
    none = replace(run, recipe=replace(run.recipe, snapshots=0))
    with pytest.raises(ValueError, match="keeps no weights"): measure_transfer(none, ("few_shot",))
