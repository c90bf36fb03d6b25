"Every library notebook runs from top to bottom in a fresh process; the file on disk is left alone."

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/[0-9][0-9]_*.ipynb"))


def test_there_are_library_notebooks():
    assert NOTEBOOKS, "no library notebook in nbs/"


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_notebook_runs(path, run_notebook):
    run_notebook(path)
