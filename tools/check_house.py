"""The statistics of the house: a row for every room and notebook; exit status 1 when a rule is broken.

    python tools/check_house.py [FOLDER]   of the project, default this one

Columns: exported lines (nonblank); public names; median and maximum of the lines of an exported cell; the share of
exported cells with a definition that have an example among the next two code cells (shown), and of public definitions
that such an example uses by name (used); the longest run of exported cells without an example; code lines over 120
characters. An example is a code cell that is not exported.

Rules: no long line, no public name in two modules, no symbol defined twice, no import from a higher floor.
"""

import ast
import json
import re
import sys
from pathlib import Path
from statistics import median

import pandas as pd
import yaml

from nc_nbdev.rooms import ROOMS, package_imports, upward_arrows

LIMIT, EXPORT = 120, re.compile(r"^#\|\s*export", flags=re.M)
SHARED = {"CLAIMS"}   # what every study has


def code_cells(notebook):
    "The code cells as pairs: source, exported or not. The cell that names the module is left out."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [(s, bool(EXPORT.search(s))) for s in sources if not re.match(r"#\|\s*default_exp", s)]


def definitions(source):
    "The names of functions and classes, methods that are patched included, and of other public assignments."
    body = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body
    functions = [n for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    patched = [n.name for n in functions if any("patch" in ast.unparse(d) for d in n.decorator_list)]
    targets = [t for n in body if isinstance(n, ast.Assign | ast.AnnAssign)
               for t in (n.targets if isinstance(n, ast.Assign) else [n.target])]
    names = [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    public = [n for n in [*names, *(f.name for f in functions if f.name not in patched)] if not n.startswith("_")]
    return [f.name for f in functions], public


def long_lines(source):
    "A figure's description is one line however long, as nbdev reads it."
    return [line for line in source.splitlines() if len(line) > LIMIT and not line.startswith("#| fig-alt")]


def measure(notebook):
    "What the tables are made of."
    cells = code_cells(notebook)
    lines, sizes, shown, used, names, run, longest = 0, [], [], [], [], 0, 0
    for i, (source, exported) in enumerate(cells):
        run = run + 1 if exported else 0
        longest = max(longest, run)
        if not exported: continue
        length = sum(bool(line.strip()) for line in source.splitlines())
        lines += length
        defined, public = definitions(source)
        names += public
        if defined or public: sizes.append(length - 1)   # without the line #| export
        examples = [s for s, other in cells[i + 1:i + 3] if not other]
        if defined: shown.append(bool(examples))
        used += [any(re.search(rf"\b{n}\b", s) for s in examples) for n in defined if not n.startswith("_")]
    too_long = [line for source, _ in cells for line in long_lines(source)]
    return dict(lines=lines, names=names, sizes=sizes, shown=shown, used=used, run=longest, long=len(too_long))


def row(parts):
    "One line of the table from the measurements of some notebooks."
    join = lambda key: [x for p in parts for x in p[key]]
    share = lambda key: f"{100 * sum(join(key)) / len(join(key)):.0f} %" if join(key) else ""
    sizes = join("sizes") or [0]
    return dict(lines=sum(p["lines"] for p in parts), names=len(join("names")), median=f"{median(sizes):g}",
                max=max(sizes), shown=share("shown"), used=share("used"), run=max(p["run"] for p in parts),
                long=sum(p["long"] for p in parts))


def table(found):
    "Rooms with their notebooks, from {notebook's path in nbs/: measurements}."
    folders, rows = {Path(f).parent.as_posix() for f in found}, {}
    for room in sorted(folders, key=[*ROOMS, "."].index):
        inside = {f: m for f, m in found.items() if Path(f).parent.as_posix() == room}
        rows[room if room != "." else "top"] = row(list(inside.values()))
        rows |= {f"  {Path(f).stem}": row([m]) for f, m in inside.items()}
    return pd.DataFrame(rows | {"all": row(list(found.values()))}).T


def twice(places):
    "The names that stand in two places, with the places, from {place: names}."
    found = {}
    for place, names in places.items():
        for name in dict.fromkeys(names): found.setdefault(name, []).append(place)
    return [f"{name}: {', '.join(where)}" for name, where in found.items() if len(where) > 1]


def symbols(file):
    "The symbols of the table of notation by row; a row may define several."
    rows = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {f"row {k}": re.split(r",\\ |,\s+", r["symbol"].strip("$")) for k, r in enumerate(rows, start=1)}


def main(root):
    hidden = lambda path: any(part[0] in "._" for part in path.relative_to(root).parts)
    notebooks = [p for p in sorted(root.glob("nbs/**/*.ipynb")) if not hidden(p)]
    found = {p.relative_to(root / "nbs").as_posix(): measure(p) for p in notebooks}
    print(table(found).to_string())
    names = {f: [n for n in m["names"] if n not in SHARED] for f, m in found.items()}
    arrows = upward_arrows(package_imports(root / "nc_nbdev"))
    problems = {
        f"code lines over {LIMIT} characters": [f"{f}: {m['long']}" for f, m in found.items() if m["long"]],
        "public names defined in two modules": twice(names),
        "symbols defined twice": twice(symbols(root / "nbs/symbols.yml")),
        "imports from a higher floor": [f"{m} imports {i}" for m, i in arrows],
    }
    for title, lines in problems.items():
        if lines: print(f"\n{title}:", *lines, sep="\n  ")
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]).resolve()))
