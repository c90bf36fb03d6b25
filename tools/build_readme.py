"""Builds README.md from nbs/index.ipynb.

The notebook lies in nbs/ and README.md one folder up, so relative links (images/x.png, 00_core.ipynb, ../data/README.md)
are rewritten to hold from there. Cells that begin with #| hide stay out.
"""

import posixpath
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Built from nbs/index.ipynb by `make readme`: edit the notebook. -->\n\n"
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
LINK = re.compile(r"""(\]\(|(?:src|href)=")(?![a-z]+:|[#/])([^\s")]+)""")


def from_root(match):
    "`](images/x.png` as seen from nbs/ -> `](nbs/images/x.png` as seen from the repository root."
    return match[1] + posixpath.normpath(posixpath.join("nbs", match[2]))


def relink(text):
    "Rewrite the relative links of a markdown cell, leaving code spans alone."
    parts = CODE.split(text)
    parts[::2] = [LINK.sub(from_root, part) for part in parts[::2]]
    return "".join(parts)


def build(notebook):
    "README text of a notebook."
    nb = nbformat.read(notebook, as_version=4)
    nb.metadata["language_info"] = {
        "name": "python"
    }  # nbdev_clean drops it; code fences want it
    nb.cells = [
        cell
        for cell in nb.cells
        if cell.cell_type != "raw" and not cell.source.startswith("#| hide")
    ]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = relink(cell.source)
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources["outputs"]:
        raise SystemExit(
            "index.ipynb draws an image in a cell: save it under nbs/images/ and link to it instead."
        )
    return NOTE + text.strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(
        build(ROOT / "nbs" / "index.ipynb"), encoding="utf-8"
    )
