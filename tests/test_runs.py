"""Runs on disk: killed and resumed, asked for twice, damaged, renamed or impossible."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch

from nc_nbdev.lab.runs import (
    Run,
    finished_runs,
    get_run,
    get_runs,
    list_runs,
    plan_table,
    planned,
    recipe_id,
    snapshot_epochs,
)
from nc_nbdev.lab.settings import Settings
from nc_nbdev.lab.store import DamagedFile
from nc_nbdev.vision.recipes import ImageRecipe

RECIPE = ImageRecipe(epochs=6, train_per_class=20, test_per_class=10, width=4, measure_points=8, snapshots=3)


def settings(tmp_path):
    return Settings(device="cpu", runs_dir=tmp_path / "runs")


def numbers(run):
    return run.history.drop(columns="run")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished run, its settings."
    here = settings(tmp_path_factory.mktemp("done"))
    return get_run(RECIPE, here, progress=False), here


@pytest.fixture
def copied(done, tmp_path):
    "A copy of it that a test may damage."
    import shutil
    run, here = done
    shutil.copytree(here.runs_dir, tmp_path / "runs")
    return get_run(RECIPE, settings(tmp_path), progress=False), settings(tmp_path)


def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path, done):
    "SIGKILL as soon as the first checkpoint is there; the run that goes on ends with the numbers of one never cut off."
    here = settings(tmp_path)
    folder = here.runs_dir / recipe_id(RECIPE)
    code = ("from pathlib import Path\nfrom nc_nbdev.vision.recipes import ImageRecipe\n"
            "from nc_nbdev.lab.runs import Run, _train_run\n"
            f"_train_run(Run({RECIPE!r}, Path({str(folder)!r})), 'cpu', False, 0.0)")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "checkpoint.pth").exists() and not (folder / "history.parquet").exists(), "not in the middle"
    assert list_runs(here.runs_dir).finished.tolist() == [False]
    pd.testing.assert_frame_equal(numbers(get_run(RECIPE, here, progress=False)), numbers(done[0]), check_exact=True)


def test_several_at_once_are_the_same_as_one_by_one(tmp_path):
    recipes = [replace(RECIPE, seed=s) for s in (0, 1, 0)]
    one_by_one = get_runs(recipes, settings(tmp_path / "a"), progress=False, n_jobs=1)
    together = get_runs(recipes, settings(tmp_path / "b"), progress=False, n_jobs=2)
    for a, b in zip(one_by_one, together, strict=True):
        pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)
    assert one_by_one[0].folder == one_by_one[2].folder != one_by_one[1].folder


def test_history_is_tidy(done):
    history = done[0].history
    assert list(history.columns) == ["run", "condition", "seed", "epoch", "split", "layer", "measure", "value"]
    assert not history.duplicated(["seed", "epoch", "split", "layer", "measure"]).any()
    assert set(history.split) == {"train", "test", "rest", "seen"} and history.epoch.max() == RECIPE.epochs
    test = history[history.split == "test"]
    wide = test.pivot_table(index=["epoch", "layer"], columns="measure", values="value")
    wide = wide.dropna(subset="weak_test_variance")
    order = ["weak_lower_variance", "weak_test_variance", "test_variance", "strong_test_variance"]
    assert len(wide) and (wide[order].diff(axis=1).iloc[:, 1:] >= -1e-9).all().all()


def test_kept_weights(done):
    run, _ = done
    features, labels = run.features(0, split="test")
    assert labels.shape == (100,) and all(len(H) == 100 for H in features.values())
    with pytest.raises(ValueError, match="no weights of epoch 7; kept are"): run.model(7)


@pytest.mark.parametrize("name", ["history.parquet", f"weights-{snapshot_epochs(RECIPE)[-1]:04d}.pth"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:]],
                         ids=["truncated", "empty", "a flipped bit"])
def test_damage_is_set_aside_and_trained_again(copied, done, name, damage):
    run, here = copied
    file = run.folder / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=name): again = get_run(RECIPE, here, progress=False)
    pd.testing.assert_frame_equal(numbers(again), numbers(done[0]), check_exact=True)
    assert (run.folder / f"{name}.damaged-1").exists() and again.model() is not None


def test_a_run_trained_anew_forgets_what_was_measured_with_its_earlier_weights(copied):
    run, here = copied
    run.entry.cached("answers-1.json", ["q"], lambda keys: {"q": 1.0})
    (run.folder / "weights-0000.pth").write_bytes(b"")
    with pytest.warns(UserWarning, match="weights-0000.pth"): again = get_run(RECIPE, here, progress=False)
    assert "answers-1.json" not in again.entry and len(again.made) == 1
    assert (run.folder / "history.parquet.damaged-1").exists()      # and nothing is lost


def test_a_finished_run_with_a_field_of_old_is_left_out(copied):
    run, here = copied
    known = run.entry.read_json("recipe.json")
    run.entry.write_json("recipe.json", known | {"changed": known["changed"] | {"no_such_field": 1}})
    with pytest.warns(UserWarning, match="no recipe of today's ImageRecipe .*no_such_field"):
        assert finished_runs(ImageRecipe, here) == []


def test_a_finished_run_of_another_default_is_left_out(copied, monkeypatch):
    run, here = copied
    known = run.entry.read_json("recipe.json")
    run.entry.write_json("recipe.json", known | {"momentum": 0.123})
    with pytest.warns(UserWarning, match="no recipe of today's ImageRecipe .*holds another recipe"):
        assert finished_runs(ImageRecipe, here) == []


def test_on_a_gpu_one_run_at_a_time_unless_more_are_asked_for(monkeypatch):
    from nc_nbdev.lab import runs
    asked = []
    monkeypatch.setattr(runs, "_attempts", lambda jobs, n_jobs: asked.append(n_jobs) or iter(()))
    jobs = [(abs, -1)] * 4
    runs.parallel(jobs, "", progress=False, device="cuda:0")
    with runs.workers(3): runs.parallel(jobs, "", progress=False, device="cuda:0")
    runs.parallel(jobs, "", progress=False, n_jobs=2, device="cuda:0")
    assert asked == [1, 3, 2]


def test_a_folder_of_another_recipe_is_refused(copied):
    run, here = copied
    other = replace(RECIPE, lr=0.5)
    run.folder.rename(run.folder.with_name(recipe_id(other)))
    with pytest.raises(DamagedFile, match="holds another recipe"): get_run(other, here, progress=False)


def test_runs_of_an_older_format_are_named_and_kept(tmp_path):
    old = tmp_path / "runs" / "0123456789abcdef"
    old.mkdir(parents=True)
    (old / "config.json").write_text(json.dumps({"dataset": "digits", "seed": 0}))
    (old / "history.parquet").write_bytes(b"old")
    table = list_runs(tmp_path / "runs")
    assert table.loc["0123456789abcdef", "format"] == 1 and finished_runs(ImageRecipe, settings(tmp_path)) == []
    get_run(replace(RECIPE, epochs=1), settings(tmp_path), progress=False)
    assert (old / "history.parquet").read_bytes() == b"old"


def test_a_new_field_orphans_no_run():
    @dataclass(frozen=True)
    class Later(ImageRecipe):
        sharpness: float = 0.0
    for changes in ({}, dict(seed=3), dict(lr=0.5, milestones=(0.5,))):
        assert recipe_id(Later(**changes)) == recipe_id(ImageRecipe(**changes))
    assert recipe_id(Later(sharpness=1.0)) != recipe_id(ImageRecipe())
    assert recipe_id(ImageRecipe(seed=1)) != recipe_id(ImageRecipe(seed=2))
    assert recipe_id(ImageRecipe(lr=1)) == recipe_id(ImageRecipe(lr=1.0)) != recipe_id(ImageRecipe())


def test_training_and_reading_draw_no_number_of_the_caller(tmp_path):
    recipe, here = replace(RECIPE, epochs=1), settings(tmp_path)
    calls = [lambda: get_run(recipe, here, progress=False)] * 2       # trained, then read
    calls += [lambda: get_run(recipe, here).model(), lambda: get_run(recipe, here).features()]
    for call in calls:
        torch.manual_seed(1); random.seed(1); np.random.seed(1)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        call()
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
        assert np.random.get_state()[1].tolist() == before[2]


def test_a_field_that_is_nan_is_read_back(tmp_path):
    @dataclass(frozen=True)
    class Hinted(ImageRecipe):
        hint: float = 0.0
    recipe = Hinted(**{**vars(RECIPE), "epochs": 1, "hint": float("nan")})
    first, again = (get_run(recipe, settings(tmp_path), progress=False) for _ in range(2))
    assert again.folder == first.folder and again.made == first.made
    assert [r.folder for r in finished_runs(Hinted, settings(tmp_path))] == [first.folder]


def test_weights_of_another_network_name_the_run(copied):
    run, _ = copied
    other = Run(replace(RECIPE, width=5), run.folder)                 # as if the code made another network now
    with pytest.raises(ValueError, match=f"{run.folder.name}: its weights do not fit .* ImageRecipe .* `version`"):
        other.model()


@dataclass(frozen=True)
class Fragile(ImageRecipe):
    "A recipe of which seed 5 cannot be trained."
    def learner(self, *args):
        if self.seed == 5: raise ZeroDivisionError("no learner for this seed")
        return super().learner(*args)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_one_that_fails_stops_no_other(tmp_path, n_jobs):
    recipes = [Fragile(**{**vars(RECIPE), "epochs": 1, "seed": s}) for s in (5, 0, 1)]
    with pytest.raises(RuntimeError, match="1 of 3 failed(.|\n)*seed=5(.|\n)*no learner for this seed"):
        get_runs(recipes, settings(tmp_path), progress=False, n_jobs=n_jobs)
    assert list_runs(tmp_path / "runs").finished.sum() == 2


def test_the_plan_trains_nothing(tmp_path, done):
    _, here = done
    recipes = planned(lambda: get_runs([RECIPE, replace(RECIPE, seed=1)], here))
    assert plan_table(recipes, here).state.tolist() == ["finished", "to train"]
    assert recipes == [RECIPE, replace(RECIPE, seed=1)] and len(list_runs(here.runs_dir)) == 1
    assert planned(lambda: None) == []


def test_missing_data_set_says_what_to_do(tmp_path):
    lost = Settings(device="cpu", runs_dir=tmp_path / "runs", data_dir=tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        get_run(replace(RECIPE, dataset=str(tmp_path / "nowhere")), lost, progress=False)
    assert not (tmp_path / "runs").exists()
