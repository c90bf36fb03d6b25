"""The project of the course: the folder that comes with it, and its notebook up to the run. What it reads of a run is
tested in test_own, where there is one."""

import json
from pathlib import Path

import pandas as pd

from medart.data.found_folder import draw_found_folder

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "course" / "project.ipynb"


def test_the_folder_is_the_same_twice_and_never_written_over(tmp_path):
    one, two = (draw_found_folder(tmp_path / name) for name in "ab")
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert len(files) > 50
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    listed = pd.read_csv(one / "list.csv", sep=";")
    lying = {p.as_posix() for p in files if p.suffix in (".jpg", ".png")}
    assert set(listed.image) - lying == {"camera A/IMG_0093.jpg"}
    assert lying - set(listed.image) == {"camera B/scan 92.png"}


def test_what_comes_before_the_run_works_on_a_new_machine(
    folders, run_notebook, tmp_path
):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (run,) = [i for i, text in enumerate(sources) if "papermill.execute" in text]
    notebook["cells"] = notebook["cells"][:run]
    copy = tmp_path / "project.ipynb"
    copy.write_text(json.dumps(notebook), encoding="utf-8")
    run_notebook(copy)
    assert (folders[0] / "found" / "dataset.yaml").is_file()
    assert (folders[0] / "prepared" / "found" / "prepared.json").is_file()
