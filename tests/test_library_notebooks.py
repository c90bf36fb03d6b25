"Every library notebook runs from top to bottom in a fresh process; the file on disk is left alone."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*/[0-9][0-9]_*.ipynb"))


def test_there_are_library_notebooks():
    assert NOTEBOOKS, "no library notebook in nbs/"


@pytest.fixture(scope="module")
def runner():
    "A process that has imported the large libraries and forks one for each notebook."
    program = Path(__file__).with_name("notebook_runner.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize(
    "path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_notebook_runs(path, folders, runner, tmp_path):
    log = tmp_path / "log.txt"
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    job = dict(path=str(path), env=env, log=str(log))
    runner.stdin.write(json.dumps(job) + "\n")
    runner.stdin.flush()
    status = json.loads(runner.stdout.readline())
    assert status == 0, log.read_text(encoding="utf-8")[-6000:]
