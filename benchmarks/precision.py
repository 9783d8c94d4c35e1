"""What bfloat16 changes in the numbers of the claims: the digits recipe in float32 and in bf16, the same seeds.

    python benchmarks/precision.py            minutes on two cores; the runs are kept with all others

A measure is changed where Welch's t-test over seeds says so at the level 0.01. The table is kept as
results/benchmarks/precision.csv, and beside it the machine and the versions.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import ttest_ind

from nc_nbdev.lab.runs import get_runs
from nc_nbdev.lab.settings import get_settings
from nc_nbdev.reproduce import environment
from nc_nbdev.vision.recipes import ImageRecipe

MEASURES = {"train": ("train_variance", "nc1_trace", "nc2_etf", "nc3_duality", "ncc_accuracy"),
            "test": ("weak_test_variance", "test_variance", "strong_test_variance", "nc4_disagreement")}


def last(run):
    "Logarithms of the measures of the last layer at the end; shares of samples as they are."
    rows = run.history.query("epoch == @run.recipe.epochs and layer == 'pool'").set_index(["split", "measure"]).value
    scale = lambda name: float if name in ("ncc_accuracy", "nc4_disagreement") else np.log10
    return {(split, name): scale(name)(rows[split, name]) for split, names in MEASURES.items() for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    machine = environment() | {"seeds": args.seeds}        # before files are written, for the state of the checkout
    recipes = [replace(ImageRecipe(precision=p), seed=s) for p in ("float32", "bf16") for s in range(args.seeds)]
    values = pd.DataFrame([last(run) for run in get_runs(recipes, get_settings())])
    exact, coarse = values[: args.seeds], values[args.seeds :]
    table = pd.DataFrame({"float32": exact.mean(), "bf16": coarse.mean(), "spread of seeds": exact.std()})
    table["p"] = ttest_ind(exact, coarse, equal_var=False).pvalue
    print(table.round(3).to_string())
    changed = table.index[table.p < 0.01].tolist()
    print(f"bar: no measure changed by bf16, {args.seeds} seeds: {f'MISSED by {changed}' if changed else 'met'}")
    file = Path(__file__).parents[1] / "results/benchmarks/precision.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    table.index = pd.MultiIndex.from_tuples(table.index, names=["split", "measure"])
    table.round(5).to_csv(file, lineterminator="\n")
    file.with_suffix(".json").write_text(json.dumps(machine, indent=1) + "\n")


if __name__ == "__main__": main()
