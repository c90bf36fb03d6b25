"Every file is looked at once: again, at the same time, and when something fails."

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import pandas as pd
import pytest
from everywhere import replace_everywhere
from medart.data import images as images_room
from medart.data import scan as scan_room
from medart.data import storage
from drawn import put
from medart.core.files import file_hash
from medart.data.preparation import prepare
from medart.data.reports import with_names
from medart.data.scan import scan
from medart.recipes.datasets import DATASETS
from drawn import report

SKIN = DATASETS["skin"]


# Again, and at the same time


def snapshot(out):
    return {
        str(f.relative_to(out)): f.stat().st_mtime_ns
        for f in out.rglob("*")
        if f.is_file() and f.name != ".prepare.lock"
    }


def looked_at(monkeypatch):
    "The files that check_image is called for from now on."
    seen, real = [], scan_room.check_image
    replace_everywhere(
        monkeypatch,
        scan_room.check_image,
        lambda file, root, pool: (seen.append(file), real(file, root, pool))[1],
    )
    return seen


def test_finished_work_is_not_done_again_and_changes_are(tree, tmp_path, monkeypatch):
    out = prepare(tree, SKIN, tmp_path / "out")
    before, seen = snapshot(out), looked_at(monkeypatch)
    assert (
        prepare(tree, SKIN, tmp_path / "out") == out
        and snapshot(out) == before
        and not seen
    )
    first, was = (
        report(out, "manifest.csv"),
        dict(with_names(out)[["source", "split"]].values),
    )
    gone = first.file[3]
    (out / gone).unlink()
    prepare(tree, SKIN, out)
    assert (out / gone).exists() and not seen
    put(tree, "melanoma/new.jpg", 70)
    put(tree, "melanoma/3.jpg", 71)
    (tree / "melanoma/4.jpg").unlink()
    prepare(tree, SKIN, out)
    assert sorted(seen) == ["melanoma/3.jpg", "melanoma/new.jpg"]
    m = with_names(out)
    assert "melanoma/4.jpg" not in set(m.source) and len(m) == 20
    assert (
        {
            f"{s}/{f}"
            for s in ("train", "test")
            for f in report(out / s, "metadata.csv").file_name
        }
        == set(m.file)
        == {
            str(f.relative_to(out))
            for s in ("train", "test")
            for f in (out / s).rglob("*.jpg")
        }
    )
    assert all(
        file_hash(out / r.file) == r.sha256
        and file_hash(tree / r.source) == r.source_sha256
        for r in m.itertuples()
    )
    assert all(
        r.split == was[r.source]
        for r in m.itertuples()
        if r.source not in ("melanoma/new.jpg", "melanoma/3.jpg")
    )
    shutil.rmtree(out)
    prepare(tree, SKIN, out)
    assert sorted(m.source_sha256) == sorted(report(out, "manifest.csv").source_sha256)


def test_a_stopped_scan_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    want = report(prepare(tree, SKIN, tmp_path / "want"), "manifest.csv")
    files = sorted(str(f.relative_to(tree)) for f in tree.rglob("*.jpg"))
    scan(tree, files[:12], tmp_path / "out")
    with open(tmp_path / "out" / storage.LOCAL_NAMES, "a") as f:
        f.write('{"file": "melanoma/9.j')  # killed in the middle of a line
    (tmp_path / "out/pool/.half.jpg.1").write_bytes(b"x")
    seen = looked_at(monkeypatch)
    out = prepare(tree, SKIN, tmp_path / "out")
    assert sorted(seen) == files[12:]
    pd.testing.assert_frame_equal(want, report(out, "manifest.csv"))
    assert not (out / "pool/.half.jpg.1").exists()


def test_two_at_once_do_the_work_once(tree, tmp_path, monkeypatch):
    seen = looked_at(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        assert (
            list(pool.map(lambda _: prepare(tree, SKIN, tmp_path / "out"), range(4)))
            == [tmp_path / "out"] * 4
        )
    assert len(seen) == 20 and len(report(tmp_path / "out", "manifest.csv")) == 20


def test_processes_find_what_threads_find(tree, tmp_path):
    files = sorted(str(f.relative_to(tree)) for f in tree.rglob("*.jpg"))
    assert scan(tree, files, tmp_path / "a", processes=True) == scan(
        tree, files, tmp_path / "b", processes=False
    )


def test_one_file_that_breaks_everything_does_not_stop_the_run(
    tree, tmp_path, monkeypatch
):
    real = images_room.clean_image
    replace_everywhere(
        monkeypatch,
        images_room.clean_image,
        lambda b: (
            (_ for _ in ()).throw(MemoryError("no room"))
            if b == (tree / "melanoma/5.jpg").read_bytes()
            else real(b)
        ),
    )
    out = prepare(tree, SKIN, tmp_path / "out")
    q = with_names(out, "quarantine")[["source", "class", "reason", "detail"]]
    assert q.values.tolist() == [
        ["melanoma/5.jpg", "melanoma", "unreadable", "MemoryError: no room"]
    ]


def test_a_full_disk_is_no_fault_of_the_images(tree, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(tree, SKIN, tmp_path / "out")
    monkeypatch.undo()
    assert not len(report(prepare(tree, SKIN, tmp_path / "out"), "quarantine.csv"))


def test_folders_without_images_and_without_leave_are_named(tmp_path):
    (tmp_path / "none/melanoma").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="class folders, for example polyps/1.jpg"
    ):
        prepare(tmp_path / "none", SKIN, tmp_path / "out")
    (tmp_path / "none/melanoma/1.jpg").touch()
    with pytest.raises(FileNotFoundError, match="1 files: empty"):
        prepare(tmp_path / "none", SKIN, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="MEDART_DATA"):
        prepare(tmp_path / "none", SKIN, tmp_path / "file/out")
