"""What nbdev needs beside its own steps: `doc_procs` and `export_procs` in pyproject.toml. Written by hand."""

import hashlib
import html
import json
import re
from pathlib import Path
from urllib.parse import quote

from fastcore.nbio import mk_cell, read_nb
from nbdev import config
from nbdev.config import get_config
from nbdev.process import Processor
from nbdev.processors import add_links

NESTED = re.compile(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(([^)]*)\)")  # [[`name`](symbol link)](the author's link)
PLOTLY = "application/vnd.plotly.v1+json"
TRACES = {"cone", "isosurface", "mesh3d", "scatter", "scatter3d", "streamtube", "surface", "volume"}  # vendor/plotly's
RELEASED = """(figure) => {  // a press shorter than the drawing of its frame leaves plotly's slider held: it would stay
  let held = false;
  figure.on("plotly_sliderstart", () => { held = true; });
  figure.on("plotly_sliderend", () => { held = false; });
  figure.on("plotly_redraw", () => { for (const s of figure._fullLayout.sliders ?? []) s._dragging &&= held; });
}"""
SOURCE = re.compile(r"\[source\]\(/blob/[^)]*\)\{[^}]*\}\s*")  # show_doc's link to a repository without an address

# nbdev lists a module in llms.txt and in the package's docstring when its own has more than three lines, counting the
# address of its page. Without an address three lines are a summary and an overview.
config._substantive = lambda docstring: len(docstring.strip().splitlines()) > 2


class ModuleList(Processor):
    "Does nothing itself: named in `export_procs`, it makes nbdev-export load this module, and thus list all modules."


class Prose(Processor):
    """Keep the text under the title, which nbdev drops with the title's cell; drop the `#|` lines of text cells, which
    nbdev shows; undo a symbol link inside a link; name types in signatures without the `__main__` they were run in."""

    def begin(self):
        title, head = read_nb(self.nb.path_).cells[0], r"\A# .*\s+(?:> .*\s*)*"
        if title.cell_type == "markdown" and (text := re.sub(head, "", title.source)) != title.source and text.strip():
            opening = mk_cell(text, "markdown")
            add_links(opening)
            self.nb.cells.insert(1, opening)
        for cell in self.nb.cells:
            if cell.cell_type == "markdown":
                cell.source = NESTED.sub(r"[\1](\2)", re.sub(r"\A(#\|.*\n)+", "", cell.source))
            for out in cell.get("outputs", []):
                if md := out.get("data", {}).get("text/markdown"):
                    md = "".join(md).replace("__main__.", "")
                    out["data"]["text/markdown"] = md if get_config().git_url else SOURCE.sub("", md)


def notebook_path(nb):
    "The notebook's path in the repository, with forward slashes."
    return Path(nb.path_).resolve().relative_to(get_config().config_path.resolve()).as_posix()


def run_links(path):
    "Where the notebook at `path` runs without installing anything, by site; empty when the repository has no address."
    cfg = get_config()
    if not cfg.git_url: return {}
    repo, path = cfg.git_url.removeprefix("https://github.com/"), quote(path)
    return {"Colab": f"https://colab.research.google.com/github/{repo}/blob/{cfg.branch}/{path}",
            "Binder": f"https://mybinder.org/v2/gh/{repo}/{cfg.branch}?labpath={quote(path, safe='')}"}


class RunLinks(Processor):
    "Put links to Colab and Binder under the title of every page."

    def begin(self):
        links = run_links(notebook_path(self.nb))
        if not links: return
        links = " · ".join(f'<a href="{url}">{name}</a>' for name, url in links.items())
        note = f"in Colab, start with <code>%pip install git+{get_config().git_url}</code>"
        text = f'<p class="run-links">Run this page: {links} <small>({note})</small></p>'
        self.nb.cells.insert(1, mk_cell(text, "markdown"))


def plotly_html(figure, name, script, alt):
    "A plotly figure (its JSON as stored) as HTML: a box called `name`, and the script at `script` that fills it."
    traces = {t.get("type", "scatter") for t in figure["data"]}
    if traces - TRACES:
        raise ValueError(f"{sorted(traces - TRACES)}: the site's plotly draws {sorted(TRACES)} only; use matplotlib")
    parts = {k: figure[k] for k in ("data", "layout", "frames") if k in figure}
    data = json.dumps(parts, separators=(",", ":")).replace("</", "<\\/")
    height = int(figure["layout"].get("height", 450))
    return (f'<div class="plotly-figure" id="{name}" role="group" aria-label="{html.escape(alt)}" '
            f'style="height:{height}px"></div>\n'
            f'<script src="{script}"></script>\n<script>Plotly.newPlot("{name}", '
            f'Object.assign({data}, {{config: {{responsive: true, displaylogo: false, scrollZoom: false}}}}))'
            f'.then({RELEASED});</script>')


class PlotlyFigures(Processor):
    "Draw the plotly figures that a notebook stores as data with the script in nbs/vendor/plotly: no network needed."

    def begin(self):
        path = notebook_path(self.nb)
        depth = len(Path(self.nb.path_).resolve().relative_to(get_config().nbs_path.resolve()).parts) - 1
        for i, cell in enumerate(self.nb.cells):
            for out in cell.get("outputs", []):
                if not (figure := out.get("data", {}).pop(PLOTLY, None)): continue
                alt = re.search(r"^#\|\s*fig-alt:\s*(.+)$", cell.source, flags=re.M)
                if not alt: raise ValueError(f"{path}, cell {i}: a plotly figure needs `#| fig-alt:`")
                name = "plotly-" + hashlib.sha256(f"{path}{i}".encode()).hexdigest()[:8]
                script = "../" * depth + "vendor/plotly/plotly-gl3d.min.js"
                out["data"] = {"text/html": plotly_html(figure, name, script, alt[1].strip("\"' "))}
