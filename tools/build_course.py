"""The course: one notebook with solutions for each lesson, and all that is made from it. `make course` does all three.

- `python tools/build_course.py mark` tells nbgrader which cells of nbs/solutions are gaps, checks and open answers;
- `python tools/build_course.py` writes the students' notebooks to nbs/course, without solutions;
- `python tools/build_course.py slides` makes slides from these in build/slides, to be shown without a network.

With `--check`, the first two write nothing, name what they would change, and fail if there is something.
"""

import argparse
import importlib.util
import json
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from nbgrader.preprocessors import ClearSolutions
from traitlets.config import Config, PyFileConfigLoader

ROOT = Path(__file__).resolve().parent.parent
SOLVED, COURSE, SLIDES = "nbs/solutions", "nbs/course", "build/slides"
MARKER = re.compile(r"^\s*### (BEGIN|END) SOLUTION *$", re.MULTILINE)
CHECK = re.compile(r"^check_(answer|key|function)\(", re.MULTILINE)
POINTS = dict(check=2, open=4)
HIDE = "hide-input"  # a tag for code that is not shown on slides
LINES = 12  # of code with a figure on a slide
ROOM = 400  # characters on a slide that leave room for a figure


def lessons(root):
    "The notebooks with solutions."
    return sorted((root / SOLVED).glob("[0-9]_*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def text_of(notebook):
    "A notebook as nbdev-clean writes it."
    split = nbformat.v4.nbjson.JSONWriter().writes(notebook, split_lines=True)
    notebook = json.loads(split)
    return json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"


# What nbgrader has to know


def role(cell):
    "`gap`, `check`, `open` (an answer that a person grades), or None."
    if cell.cell_type == "markdown":
        known = cell.metadata.get("nbgrader", {}).get("solution")
        return "open" if known or MARKER.search(cell.source) else None
    if MARKER.search(cell.source):
        return "gap"
    return "check" if CHECK.search(cell.source) else None


def mark(notebook):
    "Tell nbgrader the role of each cell; an open answer then needs no marker in its text."
    for cell in notebook.cells:
        part = role(cell)
        cell.metadata.pop("nbgrader", None)
        if part == "open":
            cell.source = MARKER.sub("", cell.source).strip()
        if part:
            cell.metadata["nbgrader"] = dict(
                schema_version=3,
                grade_id=cell.id,
                solution=part != "check",
                grade=part != "gap",
                locked=part == "check",
                task=False,
            )
            if part in POINTS:
                cell.metadata["nbgrader"]["points"] = POINTS[part]
    return notebook


def marked(root):
    "Path and text of each solved lesson, as it should be."
    return {path: text_of(mark(read(path))) for path in lessons(root)}


# The students' notebooks


def nbgrader_config():
    "tools/nbgrader_config.py"
    loader = PyFileConfigLoader("nbgrader_config.py", path=str(ROOT / "tools"))
    return Config(loader.load_config())


def without_solutions(notebook):
    "The gaps empty, and so the outputs of gaps and of checks."
    clear = ClearSolutions(config=nbgrader_config())
    notebook, _ = clear.preprocess(mark(notebook), {})
    for cell in notebook.cells:
        if cell.cell_type == "code" and "nbgrader" in cell.metadata:
            cell.outputs = []
    return notebook


def for_students(root):
    "Path and text of each student's notebook, as it should be."
    texts = {}
    for path in lessons(root):
        notebook = without_solutions(read(path))
        notebook.cells[0].source = (
            f"{notebook.cells[0].source.rstrip()}\n\n"
            "*Each exercise has a check that gives hints. When you are done, compare "
            f"with the [solutions](../solutions/{path.name}).*"
        )
        texts[root / COURSE / path.name] = text_of(notebook)
    return texts


# Slides


def shows_figure(cell):
    return any(
        "image/png" in output.get("data", {}) for output in cell.get("outputs", [])
    )


def slide_type(cell, after, length):
    "What the author chose, or: headings and tasks begin a slide, figures and gaps are on it while there is room."
    chosen = cell.metadata.get("slideshow", {}).get("slide_type")
    if chosen:
        return chosen
    if cell.cell_type == "markdown" and role(cell) is None:
        asks = after is not None and after.metadata.get("nbgrader", {}).get("solution")
        return "slide" if cell.source.startswith("#") or asks else "skip"
    if shows_figure(cell):
        return "-" if length < ROOM else "slide"
    return "-" if cell.metadata.get("nbgrader", {}).get("grade") is False else "skip"


def for_slides(notebook):
    "Each cell with its place on the slides, long code hidden; links lead to notebooks from where slides lie."
    cells = notebook.cells
    if cells[1].cell_type == "markdown":  # goals, beside the title
        cells[1].metadata.setdefault("slideshow", {}).setdefault("slide_type", "-")
    length = 0
    for cell, after in zip(cells, [*cells[1:], None]):
        kind = slide_type(cell, after, length)
        cell.metadata["slideshow"] = dict(slide_type=kind)
        if kind in ("slide", "subslide"):
            length = 0
        if kind not in ("skip", "notes"):
            length += ROOM if "nbgrader" in cell.metadata else len(cell.source)
        if shows_figure(cell) and len(cell.source.splitlines()) > LINES:
            cell.metadata["tags"] = [HIDE]
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](../", "](../../nbs/")
    return notebook


def package_folder(name):
    return Path(importlib.util.find_spec(name).origin).parent


def copy_libraries(folder):
    "reveal.js and MathJax, as installed with the development requirements."
    reveal = package_folder("sphinx_revealjs") / "_static/revealjs"
    mathjax = package_folder("sphinx-mathjax-offline") / "static/mathjax"
    for part in ("dist", "plugin/notes", "LICENSE"):
        copy = shutil.copytree if (reveal / part).is_dir() else shutil.copy2
        (folder / "reveal" / part).parent.mkdir(parents=True, exist_ok=True)
        copy(reveal / part, folder / "reveal" / part)
    shutil.copytree(
        mathjax / "output/chtml/fonts", folder / "mathjax/output/chtml/fonts"
    )
    shutil.copy2(mathjax / "tex-chtml.js", folder / "mathjax")


def build_slides(root, folder):
    "An HTML file for each lesson; everything it loads lies beside it."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    copy_libraries(folder)
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {HIDE}
    exporter = SlidesExporter(
        config=config,
        extra_template_paths=[str(ROOT / "tools")],
        template_file="slides.html.j2",
        reveal_url_prefix="reveal",
        reveal_theme="white",
        embed_images=True,
    )
    for path in lessons(root):
        resources = dict(metadata=dict(name=path.stem, path=str(path.parent)))
        notebook = for_slides(without_solutions(read(path)))
        html, _ = exporter.from_notebook_node(notebook, resources)
        (folder / f"{path.stem}.html").write_text(html, encoding="utf-8")
        print(folder / f"{path.stem}.html")


def write(texts, root, check):
    "Write files that differ; or, to check, fail and name them."
    old = {path: path.read_text("utf-8") if path.exists() else "" for path in texts}
    differ = [path for path in texts if old[path] != texts[path]]
    names = [str(path.relative_to(root)) for path in differ]
    if check and differ:
        raise SystemExit(f"`make course` would change {', '.join(names)}")
    for path, name in zip(differ, names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path], encoding="utf-8")
        print(name)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="?", default="build", choices=["mark", "build", "slides"]
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="of another repository")
    given = parser.parse_args(arguments)
    if given.what == "slides":
        build_slides(given.root, given.root / SLIDES)
        return
    texts = (marked if given.what == "mark" else for_students)(given.root)
    write(texts, given.root, given.check)


if __name__ == "__main__":
    main()
