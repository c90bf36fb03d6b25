"""Builds the documentation site from the notebooks as they are stored: `make docs`, then open build/docs/_build/html/index.html.

Nothing is executed and nothing is downloaded: the site can be read and searched without a network.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "build" / "docs"
COURSE = ("project", "playground", "lecturers")  # come after the lessons
PARTS = {
    "course": "The course",
    "method": "The method",
    ".": "Runs",
    "recipes": "The paper's settings",
    "data": "Images",
    "training": "Training",
    "evaluation": "Evaluation",
    "bundled": "The bundled models",
    "workflows": "What joins the stages",
    "core": "Files, seeds and figures",
    "solutions": "The course: solutions",
}
CONFIG = {
    "title": "Med-Art",
    "author": "Med-Art contributors",
    "copyright": "",
    "only_build_toc_files": True,
    "execute": {"execute_notebooks": "off"},
    "html": {"use_issues_button": False, "use_repository_button": False},
    "sphinx": {
        # MathJax comes from a package, not from a server.
        "extra_extensions": ["sphinx-mathjax-offline"],
        "config": {
            "nb_merge_streams": True,
            "nb_code_prompt_show": "Show the code",
            "nb_code_prompt_hide": "Hide the code",
            "myst_heading_anchors": 3,
            # Widgets and equations would otherwise be drawn by programs from elsewhere.
            "nb_ipywidgets_js": {},
            "mathjax_path": "mathjax/tex-chtml.js",
            # Beside a page stand the rooms, and of its own room the notebooks: short to read, and quick to build.
            "html_theme_options": {"collapse_navbar": True},
            "myst_update_mathjax": False,
            # Links to tables and licences lead to files of the repository, which are no pages.
            "suppress_warnings": [
                "myst.header",
                "myst.xref_missing",
                "mystnb.unknown_mime_type",
            ],
        },
    },
}
# Code is 88 columns wide: it fits on a page of 1,280 pixels at this size.
CSS = """
.bd-page-width {max-width: 100rem}
.bd-sidebar-primary {flex-basis: 15rem}
.bd-sidebar-secondary {flex-basis: 12rem}
.bd-main .bd-content .bd-article-container {max-width: 56rem}
div.cell pre, div.highlight pre {font-size: 12px; padding: 0.6em}
"""


def is_run(notebook):
    "A run has a cell tagged `parameters`."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return any("parameters" in cell["metadata"].get("tags", []) for cell in cells)


def chapters(folder):
    "Its notebooks, numbered ones first; of those directly in nbs/ the runs."
    found = sorted((ROOT / "nbs" / folder).glob("*.ipynb"))
    if folder == ".":
        found = filter(is_run, found)
    if folder == "course":
        found.sort(
            key=lambda path: COURSE.index(path.stem) if path.stem in COURSE else -1
        )
    return [{"file": str(path.relative_to(ROOT).with_suffix(""))} for path in found]


def contents():
    "README first, then the course and the packages in the order in which one reads them, solutions at the end."
    rooms = [
        {"file": f"rooms/{room_page(folder)}", "sections": chapters(folder)}
        for folder in PARTS
        if chapters(folder)
    ]
    about = [{"file": name} for name in ("CONTRIBUTING", "CHANGELOG")]
    return {"format": "jb-book", "root": "README", "chapters": rooms + about}


def room_page(folder):
    "Name of the page that lists a folder's notebooks."
    return "runs" if folder == "." else folder


def promise(notebook):
    "Title of a notebook, and the line below it that says what it gives."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join(
        "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"
    )
    title = re.search(r"^# (.+)$", text, re.M)
    line = re.search(r"^> (.+)$", text, re.M)
    return title[1] if title else notebook.stem, line[1] if line else ""


def write_rooms():
    "A page for each folder: its notebooks in order, each with its promise."
    (BOOK / "rooms").mkdir()
    for folder, caption in PARTS.items():
        lines = [f"# {caption}", ""]
        for chapter in chapters(folder):
            title, line = promise(ROOT / f"{chapter['file']}.ipynb")
            lines.append(f"- [{title}](../{chapter['file']}.ipynb): {line}")
        page = BOOK / "rooms" / f"{room_page(folder)}.md"
        page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def copy_sources():
    "What the site shows: README, notebooks and the pictures that they link to."
    shutil.rmtree(BOOK, ignore_errors=True)
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    shown = re.compile(
        r"(README|CONTRIBUTING|CHANGELOG)\.md$|nbs/|outputs/reference/|data/README"
    )
    for name in filter(shown.match, tracked):
        if (ROOT / name).is_file():
            (BOOK / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, BOOK / name)


def fold_machinery():
    "Take out the cells that only nbdev reads, and fold those that only import."
    for path in (BOOK / "nbs").rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            code = "".join(cell["source"])
            if cell["cell_type"] == "code" and (tag := folding(code)):
                cell["metadata"].setdefault("tags", []).append(tag)
        path.write_text(json.dumps(notebook), encoding="utf-8")


def folding(code):
    "The tag that takes out or folds a cell of the site, or nothing."
    if re.match(r"#\| default_exp", code):
        return "remove-cell"
    try:
        lines = ast.parse(re.sub(r"(?m)^[%!].*", "", code)).body
    except SyntaxError:  # a cell for IPython alone
        return None
    imports = lines and all(isinstance(x, (ast.Import, ast.ImportFrom)) for x in lines)
    return "hide-input" if imports else None


def style():
    "What the theme is told: sizes that fit the code."
    folder = BOOK / "_static"
    folder.mkdir()
    (folder / "medart.css").write_text(CSS, encoding="utf-8")


def main():
    copy_sources()
    fold_machinery()
    write_rooms()
    style()
    (BOOK / "_config.yml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    (BOOK / "_toc.yml").write_text(
        yaml.safe_dump(contents(), sort_keys=False), encoding="utf-8"
    )
    program = Path(sys.executable).parent / "jupyter-book"
    command = [str(program), "build", "--quiet", str(BOOK)]
    done = subprocess.run(command, cwd=ROOT)
    page = BOOK / "_build" / "html" / "README.html"
    if done.returncode or not page.exists():
        raise SystemExit("The site was not built: see the messages above.")
    print(f"Open {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
