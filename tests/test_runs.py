"""Runs on disk: killed and resumed, asked for twice, damaged or impossible."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pandas as pd
import pytest

from nc_nbdev.lab.recorder import CollapseRecorder
from nc_nbdev.lab.runs import get_run, get_runs
from nc_nbdev.lab.settings import RunConfig, Settings, config_id

CONFIG = RunConfig(epochs=6, train_per_class=20, test_per_class=10, width=4, measure_points=8, snapshots=3)


def settings(tmp_path):
    return Settings(device="cpu", runs_dir=tmp_path / "runs")


def numbers(run):
    return run.history.drop(columns="run")


def test_killed_and_resumed_is_the_same_to_the_last_bit(tmp_path):
    "SIGKILL as soon as the first checkpoint is there; the run asked for again ends with the numbers of one never cut off."
    whole = get_run(CONFIG, settings(tmp_path / "whole"), progress=False)
    config = replace(CONFIG)
    folder = tmp_path / "cut" / "runs" / config_id(config)
    code = ("from pathlib import Path\nfrom nc_nbdev.lab.settings import RunConfig\nfrom nc_nbdev.lab.runs import _train_run\n"
            f"_train_run({config!r}, Path({str(folder)!r}), Path('data'), 'cpu', False, 0.0)")
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "checkpoint.pth").exists() and not (folder / "history.parquet").exists(), "the run was not cut off in the middle"
    resumed = get_run(config, settings(tmp_path / "cut"), progress=False)
    pd.testing.assert_frame_equal(numbers(resumed), numbers(whole), check_exact=True)


def test_several_at_once_are_the_same_as_one_by_one(tmp_path):
    configs = [replace(CONFIG, seed=s) for s in (0, 1, 0)]
    one_by_one = get_runs(configs, settings(tmp_path / "a"), progress=False, n_jobs=1)
    together = get_runs(configs, settings(tmp_path / "b"), progress=False, n_jobs=2)
    for a, b in zip(one_by_one, together, strict=True): pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)
    assert one_by_one[0].folder == one_by_one[2].folder != one_by_one[1].folder


def test_history_is_tidy(tmp_path):
    history = get_run(CONFIG, settings(tmp_path), progress=False).history
    assert list(history.columns) == ["run", "seed", "epoch", "split", "layer", "measure", "value"]
    assert not history.duplicated(["seed", "epoch", "split", "layer", "measure"]).any()
    assert set(history.split) == {"train", "test", "seen"} and history.epoch.max() == CONFIG.epochs
    wide = history[history.split == "test"].pivot_table(index=["epoch", "layer"], columns="measure", values="value").dropna(
        subset=["weak_test_variance"])
    assert len(wide) and (wide.weak_test_variance <= wide.test_variance).all() and (wide.test_variance <= wide.strong_test_variance).all()


def test_kept_weights(tmp_path):
    run = get_run(CONFIG, settings(tmp_path), progress=False)
    features, labels = run.features(0, split="test")
    assert labels.shape == (100,) and all(len(H) == 100 for H in features.values())
    with pytest.raises(ValueError, match="no weights of epoch 5; kept are"): run.model(5)


def test_missing_data_set_says_what_to_do(tmp_path):
    lost = Settings(device="cpu", runs_dir=tmp_path / "runs", data_dir=tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        get_run(replace(CONFIG, dataset=str(tmp_path / "nowhere")), lost, progress=False)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("every", [0, -1, "often", 2.5])
def test_recorder_rejects_every(every):
    with pytest.raises(ValueError, match="expected a positive integer or 'log'"): CollapseRecorder(every=every)
