"""What nbdev's processing of notebooks for the docs needs beside its own steps: `doc_procs` in pyproject.toml. Written by hand."""

import re

from fastcore.nbio import mk_cell, read_nb
from nbdev.process import Processor
from nbdev.processors import add_links

NESTED = re.compile(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(([^)]*)\)")  # [[`name`](symbol link)](the author's link)


class Prose(Processor):
    """Keep the text under the title, which nbdev drops with the title's cell; drop the `#|` lines of text cells, which nbdev
    shows; undo a symbol link inside a link; and name types in signatures without the `__main__` they were run in."""

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
                    out["data"]["text/markdown"] = "".join(md).replace("__main__.", "")
