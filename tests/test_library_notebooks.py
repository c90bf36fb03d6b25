"Every library notebook runs from top to bottom in a fresh process; the file on disk is left alone."

import json
import re
from pathlib import Path

import pytest
from notebook_runner import BLANK

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/[0-9][0-9]_*.ipynb"))
CHECK = re.compile(r"(?<!def )\bcheck_(answer|key|function)\(")


def name(path):
    return f"{path.parent.name}/{path.stem}"


def code(path):
    "Source of each cell of code, and what it shows."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [
        ("".join(cell["source"]), json.dumps(cell["outputs"]))
        for cell in found
        if cell["cell_type"] == "code"
    ]


def read_solutions():
    "Notebook -> what stands in place of its blanks, in their order."
    found = json.loads(
        (ROOT / "nbs" / "solutions" / "library.ipynb").read_text("utf-8")
    )
    solutions = {}
    for text in ["".join(cell["source"]) for cell in found["cells"]]:
        if link := re.match(r"### \[.*\]\(\.\./(.*)\.ipynb\)", text):
            solutions[link[1]] = re.findall(
                r"^```python\n(.*?)\n```", text, re.M | re.S
            )
    return solutions


SOLUTIONS = read_solutions()


def test_there_are_library_notebooks():
    assert NOTEBOOKS, "no library notebook in nbs/"


def test_each_exercise_is_blank_and_says_so():
    "The notebook on exercises alone calls its checks otherwise, to show what they say."
    calls = [
        (name(path), *cell)
        for path in NOTEBOOKS
        for cell in code(path)
        if CHECK.search(cell[0])
    ]
    assert {at for at, source, _ in calls if not BLANK.search(source)} == {
        "core/06_exercises"
    }
    assert not [
        at
        for at, source, shown in calls
        if BLANK.search(source) and "Your turn." not in shown
    ]


def test_each_exercise_has_a_solution():
    blanks = {
        name(path): sum(bool(BLANK.search(source)) for source, _ in code(path))
        for path in NOTEBOOKS
    }
    wanted = {at: n for at, n in blanks.items() if n}
    assert {at: len(lines) for at, lines in SOLUTIONS.items()} == wanted


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_notebook_runs(path, run_notebook):
    "Its exercises blank, and then solved."
    run_notebook(path, solutions=SOLUTIONS.get(name(path), []))
