"What a person sees of long work: one line a bar, in a notebook that is saved as in a terminal."

import io
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

LOOP = """
import time
from medart.core.progress import progress
for _ in progress(range(40), desc="generating", delay=.2, mininterval=0): time.sleep(.02)
"""


CELLS = dict(
    twice=LOOP + LOOP.replace("generating", "reading") + LOOP.replace("40", "30"),
    later=LOOP,
    failing=LOOP.replace("time.sleep(.02)", "time.sleep(.02); 1/(_ - 25)"),
    short="for _ in progress(range(3)): pass",
)


@pytest.fixture(scope="module")
def outputs():
    "What a notebook keeps of each of these cells, executed as papermill and nbconvert do."
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS.values()]
    nb = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(nb, kernel_name="python3", timeout=120, allow_errors=True).execute()
    return {name: cell.outputs for name, cell in zip(CELLS, nb.cells)}


def text(output):
    return output["data"]["text/plain"]


def test_bars_of_one_name_share_a_line_and_others_have_their_own(outputs):
    first, second = outputs["twice"]
    assert first.output_type == second.output_type == "display_data"
    assert text(first).startswith("generating: 100%") and "30/30" in text(first)
    assert text(second).startswith("reading: 100%") and "40/40" in text(second)


def test_a_saved_line_holds_no_carriage_return(outputs):
    assert not any("\r" in text(output) for output in outputs["twice"])


def test_a_cell_run_later_has_a_line_of_its_own(outputs):
    (line,) = outputs["later"]
    assert "40/40" in text(line)


def test_a_loop_that_fails_keeps_how_far_it_came(outputs):
    line, error = outputs["failing"]
    assert "/40" in text(line) and "40/40" not in text(line)
    assert error.ename == "ZeroDivisionError"


def test_short_work_shows_nothing(outputs):
    assert outputs["short"] == []


def test_in_a_terminal_it_is_an_ordinary_bar():
    done = subprocess.run([sys.executable, "-c", LOOP], capture_output=True)
    assert b"40/40" in done.stderr and b"\r" in done.stderr and done.stdout == b""


def test_a_bar_goes_where_it_is_told():
    from medart.core.progress import progress

    there = io.StringIO()
    assert list(progress("abc", file=there, delay=0)) == ["a", "b", "c"]
    assert "3/3" in there.getvalue()
