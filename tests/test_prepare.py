"Preparation: what is no file, names of patients, images that come later, classes too small, damage, kills and full disks."

import errno
import hashlib
import json
import os
import random
import re
import shutil
import socket
import time
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image, ImageCms

import drawn
from everywhere import replace_everywhere
from medart.core import figures
from medart.core import files as files_room
from medart.data import preparation
from medart.data import scan as scan_room
from medart.data import sources

from medart.core.files import file_hash, read_file, write_atomic
from medart.core.records import alone, write_record
from medart.data.loading import load_split
from medart.data.preparation import prepare
from medart.data.reports import prune_prepared, with_names
from medart.data.splits import remember_sides
from medart.data.storage import LOCAL_NAMES, link_file, store_file, write_private
from medart.recipes.datasets import Dataset, read_dataset
from medart.recipes.recipe import recipe

picture = partial(drawn.picture, size=(48, 40))
put = partial(drawn.put, size=(48, 40))
OWN = Dataset("own", "fundus", "color, shape", {}, None, None, "", "FD")


def own(*classes):
    return Dataset(
        "own", "fundus", "color, shape", dict.fromkeys(classes, 0), None, None, "", "FD"
    )


def fill(folder, n=10, classes="ab", start=0):
    for k, c in enumerate(classes):
        for i in range(start, start + n):
            put(folder, f"{c}/{i}.png", 1000 * k + i)
    return folder


def sides(out):
    return dict(with_names(out)[["source", "split"]].values)


def contents(out):
    "Hash of every file but those of the lock."
    return {
        f.relative_to(out).as_posix(): file_hash(f)
        for f in sorted(out.rglob("*"))
        if f.is_file() and not f.name.startswith(".prepare")
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "Two classes of ten images, and what they become: to be copied, not changed."
    home = tmp_path_factory.mktemp("base")
    fill(home / "raw")
    prepare(home / "raw", OWN, home / "out")
    return home


@pytest.fixture
def raw(base, tmp_path):
    return Path(shutil.copytree(base / "raw", tmp_path / "raw"))


@pytest.fixture
def done(base, tmp_path, raw):
    shutil.copytree(base / "out", tmp_path / "out")
    prepare(raw, OWN, tmp_path / "out")
    return tmp_path / "out"


# What is no file


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


NO_FILES = {
    "pipe": (os.mkfifo, "a named pipe, not a file"),
    "device": (lambda p: os.symlink("/dev/zero", p), "a device, not a file"),
    "terminal": (lambda p: os.symlink("/dev/tty", p), "a device, not a file"),
    "socket": (make_socket, "a socket, not a file"),
    "folder": (os.mkdir, "a folder, not a file"),
    "link to a folder": (lambda p: os.symlink(p.parent, p), "a folder, not a file"),
    "link to nothing": (lambda p: os.symlink("gone", p), "a link that leads nowhere"),
    "link to itself": (lambda p: os.symlink(p.name, p), "a link that leads nowhere"),
}


def test_only_ordinary_files_are_opened_and_all_others_are_quarantined(raw, tmp_path):
    for name, (make, _) in NO_FILES.items():
        make(raw / f"a/{name}.png")
    os.symlink("/proc/kmsg", raw / "a/kernel.png")
    out = prepare(raw, OWN, tmp_path / "out")
    q = with_names(out, "quarantine").set_index("source")
    assert {Path(f).stem: d for f, d in q.detail.items()} == {
        k: d for k, (_, d) in NO_FILES.items()
    } | {"kernel": "0 bytes"}
    assert len(pd.read_csv(out / "manifest.csv")) == 20


@pytest.mark.parametrize(
    "name", ["labels.csv", "metadata.jsonl", "notes.txt", "ages.xlsx", "dataset.yaml"]
)
def test_no_table_or_note_is_waited_for(raw, tmp_path, name):
    os.mkfifo(raw / name)
    with pytest.raises(ValueError, match=f"{name} is a named pipe, not a file"):
        if name == "dataset.yaml":
            read_dataset("own", raw / name)
        prepare(raw, OWN, tmp_path / "out")


def test_no_archive_is_waited_for(tmp_path):
    (tmp_path / "own").mkdir()
    os.mkfifo(tmp_path / "own/images.zip")
    with pytest.raises(ValueError, match="images.zip is no ordinary file"):
        sources.get_source(OWN, tmp_path / "own")


def test_a_file_that_grows_or_is_huge_is_read_to_its_bound(tmp_path, monkeypatch):
    f = tmp_path / "a.png"
    f.write_bytes(b"12345678")
    with pytest.raises(files_room.NotAFile, match="8|GB"):
        read_file(f, most=4)
    real = os.fstat

    def grown(fd):
        s = real(fd)
        with open(f, "ab") as more:
            more.write(b"x" * 100)
        return s

    monkeypatch.setattr(os, "fstat", grown)
    with pytest.raises(files_room.NotAFile, match="changes while it is read"):
        read_file(f)


def test_folders_and_files_that_may_not_be_read_are_said(raw, tmp_path, monkeypatch):
    real = files_room.read_file

    def closed(path, *most):
        if Path(path).name == "3.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *most)

    replace_everywhere(monkeypatch, files_room.read_file, closed)
    q = pd.read_csv(prepare(raw, OWN, tmp_path / "out") / "quarantine.csv")
    assert (
        q[["reason", "detail"]].values.tolist()
        == [["unreadable", "Permission denied"]] * 2
    )
    monkeypatch.undo()
    (raw / "a/3.png").touch()
    assert not len(
        pd.read_csv(prepare(raw, OWN, tmp_path / "out") / "quarantine.csv")
    ), "looked at again"
    real_scan = os.scandir

    def shut(path):
        if Path(path).name == "b":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_scan(path)

    monkeypatch.setattr(os, "scandir", shut)
    with pytest.raises(PermissionError, match="may not be opened.*whole class"):
        prepare(raw, OWN, tmp_path / "other")


def test_a_lock_that_is_never_released_ends_the_wait(raw, tmp_path, monkeypatch):
    real = alone
    replace_everywhere(
        monkeypatch, real, lambda folder, stage, wait=0: real(folder, stage, 0.1)
    )
    with real(tmp_path / "out", "prepare"):
        with pytest.raises(BlockingIOError, match=f"number {os.getpid()}"):
            prepare(raw, OWN, tmp_path / "out")
    with sources._turn(tmp_path / "a.zip"):
        with pytest.raises(
            BlockingIOError,
            match="Another process has been fetching or unpacking a.zip",
        ):
            with sources._turn(tmp_path / "a.zip", wait=0.1):
                pass


# Names of patients

WHO = "Mueller_Anna"


def named(folder):
    "Class folders and a table of patients in which a patient's name stands wherever it can."
    home = folder / WHO
    profile = bytearray(
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    at = bytes(profile).find("sRGB".encode("utf-16-be"))
    profile[at : at + 8] = WHO[:4].encode("utf-16-be")
    for i in range(20):
        put(
            home,
            f"{WHO}/{'ab'[i % 2]}/{WHO} {i}.{'jpg' if i < 12 else WHO}",
            i,
            format="JPEG",
            quality=95,
            comment=WHO.encode(),
            icc_profile=bytes(profile) if i == 3 else b"",
        )
    shutil.copy(home / f"{WHO}/a/{WHO} 0.jpg", home / f"{WHO}/b/copy of {WHO}.jpg")
    (home / f"{WHO}/a/{WHO} broken.jpg").write_bytes(b"\xff\xd8\xff" + WHO.encode())
    os.mkfifo(home / f"{WHO}/a/{WHO} pipe.jpg")
    os.symlink("nowhere", home / f"{WHO}/a/{WHO} link.jpg")
    put(home, f"{WHO}/{WHO} loose.jpg", 90)
    (home / f"{WHO}/{WHO}.dcm").write_bytes(bytes(128) + b"DICM")
    (home / f"{WHO}/report.{WHO}").write_text("x")
    return home


def table_of(home):
    rows = [
        (f.relative_to(home).as_posix(), f.parent.name, f"{WHO} {i}")
        for i, f in enumerate(sorted(home.rglob("*.jpg")))
        if f.parent.name in "ab"
    ]
    rows += [(f"{WHO} gone.jpg", "a", "1"), (f"{WHO}/{WHO} loose.jpg", WHO, "2")]
    pd.DataFrame(rows, columns=["file", "label", "patient_id"]).to_csv(
        home / f"{WHO}.csv", index=False
    )


@pytest.mark.parametrize("layout", ["folders", "table"])
def test_a_name_stands_in_one_local_file_alone(tmp_path, capsys, layout):
    home = named(tmp_path)
    if layout == "table":
        for f in home.rglob(f"*.{WHO}"):
            f.unlink()
        table_of(home)
    for again in range(2):
        out = prepare(home, own("a", "b"), tmp_path / "out")
        put(home, f"{WHO}/a/later {WHO}.jpg", 77)
        if layout == "table":
            table_of(home)
    (home / f"{WHO}/a/later {WHO}.jpg").unlink()
    out = prepare(home, own("a", "b"), tmp_path / "out")
    said = capsys.readouterr()
    spoken = said.out + said.err
    assert not re.search("mueller|anna", spoken, re.I), spoken
    traces = re.compile(rb"mueller|anna|m\0u\0e\0l", re.I)
    assert [
        f.name
        for f in out.rglob("*")
        if f.is_file()
        and (
            traces.search(f.read_bytes())
            or re.search("mueller|anna", f.relative_to(out).as_posix(), re.I)
        )
    ] == [LOCAL_NAMES]
    assert (out / LOCAL_NAMES).stat().st_mode & 0o777 == 0o600
    assert "Keep it to yourself" in (out / LOCAL_NAMES).read_text().split("\n")[0]
    q, c = with_names(out, "quarantine"), with_names(out, "duplicates")
    assert (
        q.source.str.contains(WHO).all()
        and len(q) >= 4
        and (layout == "table") == q.detail.str.contains("the table").any()
    )
    assert {WHO in a and WHO in b for a, b in zip(c.a, c.b)} == {True}
    (out / LOCAL_NAMES).unlink()  # to share the folder
    before = contents(out)
    prepare(home, own("a", "b"), out)
    assert contents(out) == before, "it is whole without the names"


def test_names_of_an_earlier_version_go(raw, done):
    (done / "scan.jsonl").write_text(WHO)
    put(raw, "a/new.png", 50)
    assert not (prepare(raw, OWN, done) / "scan.jsonl").exists()


def test_the_folder_of_prepared_images_tells_two_sources_apart_and_names_none(tmp_path):
    a, b = (preparation.prepared_dir(tmp_path / x / WHO, OWN) for x in "ab")
    assert a != b and WHO not in a.name and a.name.startswith("own~")


# Images that come later


def test_known_images_keep_their_sides_when_images_come_go_and_come_back(
    raw, done, tmp_path, capsys
):
    was = sides(done)
    fill(raw, 20, start=10)
    now = sides(prepare(raw, OWN, done))
    assert now.items() >= was.items() and "40 new images" in capsys.readouterr().out
    assert Counter(f[0] for f, s in now.items() if s == "test") == dict(a=6, b=6), (
        "each class tends to its fifth"
    )
    gone = [f for f in now if hashlib.md5(f.encode()).digest()[0] % 3 == 0]
    for f in gone:
        shutil.move(raw / f, tmp_path / f.replace("/", "-"))
    fewer = sides(prepare(raw, OWN, done))
    assert not fewer.keys() & set(gone) and fewer.items() <= now.items()
    for f in gone:
        shutil.move(tmp_path / f.replace("/", "-"), raw / f)
    assert sides(prepare(raw, OWN, done)) == now


def test_sides_outlive_new_names_new_labels_and_a_lost_or_damaged_memory(raw, done):
    was = {file_hash(raw / f): s for f, s in sides(done).items()}
    one, other = [f for f, s in sides(done).items() if s == "test" and f[0] == "a"][:2]
    shutil.move(raw / one, raw / "b/relabelled.png")
    shutil.move(raw / other, raw / "a/renamed.png")
    for spoil in (
        lambda: None,
        (done / "split.json").unlink,
        lambda: (done / "split.json").write_text('{"sides'),
        lambda: (done / "split.json").write_text(
            (done / "split.json").read_text().replace('"train"', '"test"')
        ),
        lambda: (done / "prepared.json").write_text("{}"),
    ):
        spoil()
        assert {
            file_hash(raw / f): s for f, s in sides(prepare(raw, OWN, done)).items()
        } == was


def with_patients(raw, rows):
    pd.DataFrame(rows, columns=["file", "label", "patient_id"]).to_csv(
        raw / "labels.csv", index=False
    )


def test_new_images_join_their_kin_even_those_that_are_gone(tmp_path):
    raw, rows = tmp_path / "raw", []
    for i in range(24):
        put(raw, f"{i}.png", i)
        rows.append((f"{i}.png", "ab"[i % 2], f"P{i // 2}"))
    with_patients(raw, rows)
    out = prepare(raw, OWN, tmp_path / "out")
    was = sides(out)
    gone = [next(f for f in was if was[f] == s) for s in ("train", "test")]
    for f in gone:
        (raw / f).unlink()
    rows = [r for r in rows if r[0] not in gone]
    more = []
    for k, f in enumerate(gone):
        old = picture(int(f[:-4]))
        put(raw, f"copy {k}.jpg", old, quality=60)
        put(raw, f"mirrored {k}.png", old.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        put(raw, f"patient {k}.png", 500 + k)
        more += [
            (f"copy {k}.jpg", "a", f"N{k}"),
            (f"mirrored {k}.png", "b", ""),
            (f"patient {k}.png", "a", f"P{int(f[:-4]) // 2}"),
        ]
    with_patients(raw, rows + more)
    now = sides(prepare(raw, OWN, out))
    assert {f: now[f] for f, *_ in more} == {
        f: was[gone[int(f.split(".")[0][-1])]] for f, *_ in more
    }
    assert all(now[f] == s for f, s in was.items() if f not in gone)


def test_a_new_image_between_train_and_test_is_left_out(tmp_path):
    raw, rows = tmp_path / "raw", []
    for i in range(20):
        put(raw, f"{i}.png", i)
        rows.append((f"{i}.png", "ab"[i % 2], f"P{i}"))
    with_patients(raw, rows)
    out = prepare(raw, OWN, tmp_path / "out")
    was = sides(out)
    a, b = (next(f for f in was if was[f] == s) for s in ("train", "test"))
    put(raw, "between.jpg", picture(int(a[:-4])), quality=60)
    with_patients(raw, rows + [("between.jpg", "a", f"P{b[:-4]}")])
    for _ in range(2):
        assert sides(prepare(raw, OWN, out)) == was
        q = with_names(out, "quarantine")
        assert q[["source", "reason"]].values.tolist() == [
            ["between.jpg", "in between"]
        ]
        (out / "prepared.json").unlink()
    # it turns out that a training and a test image are of one patient: the test image goes
    (raw / "between.jpg").unlink()
    with_patients(raw, [(f, c, "P" if f in (a, b) else p) for f, c, p in rows])
    assert sides(prepare(raw, OWN, out)) == {f: s for f, s in was.items() if f != b}
    assert with_names(out, "quarantine").source.tolist() == [b]


def test_the_split_does_not_depend_on_how_often_preparation_ran(tmp_path):
    fill(tmp_path / "raw", 12)
    first = sides(prepare(tmp_path / "raw", OWN, tmp_path / "a"))
    (tmp_path / "a/prepared.json").unlink()
    assert sides(prepare(tmp_path / "raw", OWN, tmp_path / "a")) == first
    assert sides(prepare(tmp_path / "raw", OWN, tmp_path / "b")) == first
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sides(prepare(tmp_path / "raw", OWN, tmp_path / "a", seed=1)) != first, (
        "another seed is another split"
    )


# Every class is trained on and tested


def refused(raw, out, *words, d=OWN):
    with pytest.raises(ValueError, match="cannot be split") as e:
        prepare(raw, d, out)
    assert all(w in str(e.value) for w in words), str(e.value)
    assert not (out / "prepared.json").exists() and not (out / "train").exists()


def test_a_class_that_cannot_be_split_is_refused_with_its_name_and_the_ways_out(
    raw, tmp_path
):
    out = tmp_path / "out"
    put(raw, "lonely/0.png", 90)
    refused(
        raw,
        out,
        "- lonely: there is 1 image, and 2 are the least",
        "Add images",
        "categories",
    )
    shutil.copy(raw / "lonely/0.png", raw / "lonely/same.png")
    refused(raw, out, "- lonely: no ", "image: its 2 images are tied")
    (raw / "lonely/same.png").write_bytes(b"no image")
    (raw / "lonely/0.png").write_bytes(b"")
    refused(raw, out, "- lonely: none of its 2 images can be used")
    shutil.rmtree(raw / "lonely")
    refused(raw, out, "- lonely: dataset.yaml lists it", d=own("a", "b", "lonely"))
    put(raw, "lonely/0.png", 90)
    prepare(raw, own("a", "b"), out)
    put(raw, "lonely/1.png", 91)
    assert Counter(
        s
        for f, s in sides(prepare(raw, OWN, tmp_path / "two")).items()
        if "lonely" in f
    ) == dict(train=1, test=1)


def test_one_patient_or_one_class_in_two_splits_is_refused(tmp_path):
    raw = tmp_path / "raw"
    for s, c, n in (
        ("train", "a", 4),
        ("test", "a", 2),
        ("train", "b", 3),
        ("val", "b", 2),
        ("test", "c", 2),
    ):
        for i in range(n):
            put(raw, f"{s}/{c}/{i}.png", len(list(raw.rglob("*.png"))))
    refused(
        raw,
        tmp_path / "out",
        "- c: the split that came with the images has no train image",
        "- b: the split that came with the images has no test image",
        "remove the split",
    )


def test_what_was_not_used_and_what_will_be_cut_is_said(raw, tmp_path, capsys):
    (raw / "scan.dcm").write_bytes(b"x")
    (raw / "a/scan.dcm").write_bytes(bytes(128) + b"DICM")
    (raw / "ages.csv").write_text("site,age\nnorth,50\n")
    (raw / f"x.{WHO}").touch()
    (raw / "readme.md").touch()
    (raw / "Thumbs.db").touch()
    put(raw, "a/wide.png", picture(70, size=(400, 40)))
    put(raw, "loose.png", picture(71))
    told = json.loads(
        (prepare(raw, OWN, tmp_path / "out") / "prepared.json").read_text()
    )["remarks"]
    assert (
        "1 of 21 images are more than twice as long as wide: a square shows less than half of each"
        in told
    )
    assert any(x.startswith("3 left out: in no class folder") for x in told), told
    assert any(re.fullmatch("not used: .*1 .md, .*1 table", x) for x in told), told
    assert told[0] in capsys.readouterr().out


# Damage


def spoilt(path, how):
    b = path.read_bytes()
    if how == "cut":
        path.write_bytes(b[: len(b) // 2])
    if how == "flipped":
        path.write_bytes(
            b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :]
        )
    if how == "empty":
        path.write_bytes(b"")
    if how == "gone":
        path.unlink()
    if how == "folder":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone"])
def test_damage_is_found_and_mended(raw, done, how):
    want = contents(done)
    files = [
        next((done / "train").rglob("*.png")),
        next((done / "test").rglob("*.png")),
        done / "train/metadata.csv",
        done / "manifest.csv",
        done / "prepared.json",
        done / "split.json",
    ]
    for f in files:
        spoilt(f, how)
        prepare(raw, OWN, done)
        assert contents(done) == want, f.name
    for f in files[:2] + [next((done / "pool").iterdir()), done / LOCAL_NAMES]:
        f.exists() and spoilt(f, how)
    (done / "manifest.csv").unlink()
    prepare(raw, OWN, done)
    assert contents(done) == want


def test_what_others_put_beside_stays_and_work_is_not_done_again(
    raw, done, monkeypatch
):
    (done / "train/.DS_Store").write_bytes(b"x")
    put(done, "train/a/mine.png", 5)
    os.utime(
        next((done / "test").rglob("*.png"))
    )  # a copy to another disk changes dates
    replace_everywhere(monkeypatch, preparation._fill, None)
    prepare(raw, OWN, done)
    monkeypatch.undo()
    put(raw, "a/new.png", 60)
    prepare(raw, OWN, done)
    assert (done / "train/.DS_Store").exists() and (done / "train/a/mine.png").exists()


def test_a_damaged_folder_without_its_sources_is_refused(raw, done, monkeypatch):
    monkeypatch.setenv("MEDART_DATA", str(done.parent))
    (raw / "dataset.yaml").write_text("modality: fundus\nfeatures: color\n")
    (done / "dataset.yaml").write_text("modality: fundus\nfeatures: color\n")
    r = recipe("own", scale="tiny", data="out", captions="simple")
    assert len(load_split(r, "test")) == 4
    spoilt(next((done / "train").rglob("*.png")), "flipped")
    with pytest.raises(
        ValueError,
        match="was prepared before, and train/.* is not the image that was stored",
    ):
        load_split(r, "test")


# Kills, and disks that are full


def start(raw, out):
    p = get_context("fork").Process(target=prepare, args=(raw, OWN, out))
    p.start()
    return p


def test_killed_at_any_step_and_run_again_gives_the_same_bytes(
    base, tmp_path, monkeypatch
):
    "The process ends at its n-th change to the disk, for every n: what a kill leaves."

    class Killed(BaseException):
        pass

    want, n, steps = contents(base / "out"), [0], [0]

    def counted(f):
        def step(*a, **k):
            n[0] += 1
            if n[0] == steps[0]:
                raise Killed
            return f(*a, **k)

        return step

    for writer in (
        store_file,
        link_file,
        write_atomic,
        write_record,
        write_private,
        remember_sides,
        prune_prepared,
    ):
        replace_everywhere(monkeypatch, writer, counted(writer))
    ended = False
    while not ended:
        steps[0], n[0] = steps[0] + 1 + steps[0] // 2, 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            prepare(base / "raw", OWN, tmp_path / "out")
            ended = True
        except Killed:
            steps[0], kept = 0, steps[0]
            prepare(base / "raw", OWN, tmp_path / "out")
            steps[0] = kept
        assert contents(tmp_path / "out") == want, steps[0]
    assert steps[0] > 40


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="a process that is killed is forked from this one"
)
@pytest.mark.parametrize("seed", range(int(os.environ.get("MEDART_KILLS", 3))))
def test_sigkill_at_a_random_moment_then_two_at_once_give_the_same_bytes(
    base, tmp_path, seed
):
    want, g = contents(base / "out"), random.Random(seed)
    p = start(base / "raw", tmp_path / "out")
    time.sleep(g.uniform(0.02, 0.6))
    p.kill()
    p.join()
    for p in [start(base / "raw", tmp_path / "out") for _ in range(2)]:
        p.join(60)
        assert p.exitcode == 0
    assert contents(tmp_path / "out") == want


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_write_is_said_and_the_next_run_ends_well(
    base, tmp_path, monkeypatch, code
):
    want, n, fails = contents(base / "out"), [0], [0]

    def failing(f, half):
        def write(path, content, *a, **k):
            n[0] += 1
            if n[0] == fails[0]:
                half(path, content)
                raise OSError(code, os.strerror(code))
            return f(path, content, *a, **k)

        return write

    real = Path.write_bytes
    monkeypatch.setattr(
        Path, "write_bytes", failing(real, lambda p, b: real(p, b[: len(b) // 2]))
    )
    for writer in (write_atomic, write_private):
        half = lambda p, s: real(
            Path(p).with_name(f".{Path(p).name}.1.part"), s.encode()[:9]
        )
        replace_everywhere(monkeypatch, writer, failing(writer, half))
    replace_everywhere(
        monkeypatch,
        figures.write_atomic,
        failing(files_room.write_atomic, lambda p, s: None),
    )
    for step in range(1, 200, 8):
        fails[0], n[0] = step, 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        try:
            prepare(base / "raw", OWN, tmp_path / "out")
            break
        except OSError as e:
            assert (
                e.errno == code
                and "Make room" in str(e)
                and "out was written" in str(e)
            )
        assert not (tmp_path / "out/prepared.json").exists()
        fails[0] = 0
        prepare(base / "raw", OWN, tmp_path / "out")
        assert contents(tmp_path / "out") == want
    assert step > 20


# Other systems


def test_nothing_that_only_linux_has_is_needed(base, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    with monkeypatch.context() as m:
        m.delattr(os, "O_NONBLOCK")
        assert len(read_file(base / "raw/a/0.png")) > 1000
    monkeypatch.delattr(os, "link")
    monkeypatch.setattr(scan_room, "get_all_start_methods", lambda: ["spawn"])
    monkeypatch.setattr(preparation, "_DISK", {errno.ENOSPC, errno.EIO})
    out = prepare(base / "raw", OWN, tmp_path / "out")
    assert contents(out) == contents(base / "out")
    assert next((out / "train").rglob("*.png")).stat().st_nlink == 1
    prepare(base / "raw", OWN, out)
    assert scan_room._workers(5000, True)._mp_context.get_start_method() == "spawn"
