"""Do the verdicts depend on the processor? The same command, run as three processors would run it, and a table.

    python tools/machines.py results/machines/2026-11-24.csv --studies paper

Further arguments go to nc-reproduce. A network trained on another instruction set rounds differently, so its numbers
differ. The table has the numbers and verdicts of each, and whether they agree with the kept results. Each machine has
its own folder of runs below `runs/machines`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd

from nc_nbdev.lab.claims import agreement, load_claims
from nc_nbdev.lab.settings import get_settings
from nc_nbdev.reproduce import environment, kept_results, part_name

MACHINES = {
    "AVX2": dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    "AVX512": dict(ATEN_CPU_CAPABILITY="avx512", ONEDNN_MAX_CPU_ISA="AVX512_CORE", MKL_ENABLE_INSTRUCTIONS="AVX512"),
    "native": {},
}


def machines():
    "The machines that this processor can be; to ask for instructions that it lacks would end in a crash."
    from torch.backends.cpu import get_cpu_capability

    return {"AVX512": [*MACHINES], "AVX2": ["AVX2", "native"]}.get(get_cpu_capability(), ["native"])


def reproduce(name, folder, arguments):
    "Run nc-reproduce as the machine `name`; its claims."
    environment = {k: v for k, v in os.environ.items() if k not in MACHINES["AVX2"]} | MACHINES[name]
    command = [Path(sys.executable).with_name("nc-reproduce"), "--runs", folder / "runs", "--out", folder / "report"]
    subprocess.run([str(c) for c in [*command, *arguments]], env=environment, check=True)
    return load_claims(folder / "report/claims.json")


def compare(claims, kept):
    "A row a claim: number, verdict and agreement with the kept one on each machine, how far numbers are apart."
    columns = {}
    for machine, found in claims.items():
        index = pd.MultiIndex.from_tuples([(c.study, c.id) for c in found], names=["study", "claim"])
        columns[machine] = pd.Series([c.measured[0] for c in found], index)
        columns[f"{machine} verdict"] = pd.Series([c.verdict for c in found], index)
        words = agreement(found, kept).agreement
        columns[f"{machine} kept"] = pd.Series([words.get(c.id, "nothing kept") for c in found], index)
    table = pd.DataFrame(columns)
    numbers, verdicts = table[[*claims]], table[[f"{machine} verdict" for machine in claims]]
    size = numbers.abs().max(axis=1)
    table["spread"] = ((numbers.max(axis=1) - numbers.min(axis=1)) / size.where(size > 0, 1)).round(4)
    table["agree"] = verdicts.nunique(axis=1, dropna=False) == 1
    return table


def settings_of(arguments, scale):
    "The settings of nc-reproduce with these arguments."
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--datasets", nargs="+")
    parser.add_argument("--seeds", type=int)
    asked = {name: value for name, value in vars(parser.parse_known_args(arguments)[0]).items() if value}
    return get_settings(preset=scale, **asked)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="the file to write (CSV)")
    parser.add_argument("--folder", type=Path, default=Path("runs/machines"), help="of the runs and reports")
    options, arguments = parser.parse_known_args()
    claims = {name: reproduce(name, options.folder / name, arguments) for name in machines()}
    scale = next(iter(claims.values()))[0].scale
    settings = settings_of(arguments, scale)
    kept = kept_results("results").get(part_name(settings), [])
    table = compare(claims, kept)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.table)
    made = environment() | {"scale": scale, "seeds": [*settings.seed_range]}
    options.table.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    for machine in claims:
        words = table[f"{machine} kept"].value_counts().to_dict()
        print(f"{machine}, compared with the kept results: " + ", ".join(f"{n} {word}" for word, n in words.items()))
    print(f"{table.agree.sum()} of {len(table)} claims have the same verdict on {', '.join(claims)}: {options.table}")
    if not table.agree.all(): print(table[~table.agree].to_string())


if __name__ == "__main__":
    main()
