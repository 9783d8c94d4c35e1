"""Keep what a run of a larger preset has left, as small tables beside the notebooks.

    nc-reproduce --preset laptop --studies paper --datasets mnist cifar10 --out reports
    python tools/keep_results.py reports results/laptop "CIFAR-10 decoded from JPEG files"

Writes claims.json, environment.json with the remark, and train_vs_test.parquet: the curves of study 1. What is kept
already is not overwritten.
"""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd

MEASURES = ["accuracy", "train_variance", "test_variance", "strong_test_variance", "weak_test_variance"]


def keep(source, target, remark):
    "Copy claims and environment, and the curves of study 1 at the last layer."
    target.mkdir(parents=True)   # raises FileExistsError
    shutil.copy(source / "claims.json", target)
    environment = json.loads((source / "environment.json").read_text())
    (target / "environment.json").write_text(json.dumps({**environment, "remark": remark}, indent=1) + "\n")
    history = pd.read_parquet(source / "history.parquet")
    study = history.condition.str.contains("cross-entropy|squared error", na=False)
    if not study.any(): raise SystemExit(f"{source / 'history.parquet'} holds no runs of train_vs_test: run it too")
    kept = history[study & history.layer.isin(["output", "pool"]) & history.measure.isin(MEASURES)]
    kept.to_parquet(target / "train_vs_test.parquet", index=False)


if __name__ == "__main__": keep(Path(sys.argv[1]), Path(sys.argv[2]), " ".join(sys.argv[3:]))
