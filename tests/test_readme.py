"What README claims stands in files that the repository holds, and no run writes to those files."
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs" / "reference"


def ignored(path):
    done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT)
    assert done.returncode in (0, 1)
    return done.returncode == 0


@pytest.mark.parametrize("path", [
    "outputs/tables/table2-tiny-kvasir.md", "outputs/figures/figure2-kvasir-tiny.png", "outputs/benchmark/tiny-cpu.json",
    "outputs/train-skin.ipynb", "outputs/skin-tiny/medart/done.json", "outputs/durations.csv", "outputs/features/a.npz",
])
def test_git_ignores_what_runs_write(path):
    assert ignored(path)


def test_git_keeps_the_reference_results(files):
    assert not ignored("outputs/reference/tables/a-new-table.csv")
    kept = {path.parts[1] for path in files if path.parts[0] == "outputs"}
    assert kept == {"README.md", "reference"}


def test_no_module_and_no_run_writes_to_the_reference(files):
    "They read it at most: it is renewed by `make reference` alone."
    for path in files:
        if path.parent.as_posix() == "medart" or re.fullmatch(r"nbs/[a-z]+\.ipynb", path.as_posix()) and path.stem != "index":
            assert "outputs/reference" not in (ROOT / path).read_text(encoding="utf-8"), path


def test_make_reference_renews_what_is_there_and_adds_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDART_OUTPUTS", raising=False)
    for name in ("tables/shown.csv", "tables/own.csv"):
        (tmp_path / "outputs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "outputs" / name).write_text("new")
    for name in ("tables/shown.csv", "figures/kept.csv"):
        path = tmp_path / "outputs/reference" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"))
    for command in ("git init -q", "git add outputs/reference", "make reference"):
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = {p.relative_to(tmp_path / "outputs/reference").as_posix(): p.read_text()
             for p in (tmp_path / "outputs/reference").rglob("*.csv")}
    assert found == {"tables/shown.csv": "new", "figures/kept.csv": "old"}
