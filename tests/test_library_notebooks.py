"Every numbered notebook runs from top to bottom in a fresh kernel; the file on disk is left alone."

import os
import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NBS = Path(__file__).resolve().parent.parent / "nbs"
NUMBERED = sorted(
    path for path in NBS.glob("*/*.ipynb") if re.match(r"\d\d_", path.stem)
)
SECONDS = 1800  # for one notebook: none takes two minutes alone; this only ends one that hangs


def test_there_are_numbered_notebooks():
    assert NUMBERED, f"no numbered notebook in {NBS}"


@pytest.mark.parametrize(
    "path", NUMBERED, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_notebook_runs(path, folders):
    notebook = nbformat.read(path, as_version=4)
    end = time.monotonic() + SECONDS
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout_func=lambda cell: max(1, int(end - time.monotonic())),
        resources={"metadata": {"path": str(path.parent)}},
    )
    env = {
        name: value for name, value in os.environ.items() if name != "MPLBACKEND"
    }  # figures inline, as for a reader
    client.execute(env=env)
