"Beyond training: whatever stage is killed, or refused by the disk, at whatever write, ends in the same bytes when it is run again."

import builtins
import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from everywhere import replace_everywhere
from medart.training import caption_store, checkpoints
from medart.core import files as files_room
from medart.training import runs
from medart.evaluation.classification import classify
from medart.evaluation.classifier_results import read_classification
from medart.core.figures import save_figure, save_table
from medart.core.files import file_hash, read_kept, write_atomic, write_kept
from medart.core.records import write_record
from medart.data.loading import load_split
from medart.training.sampling_runs import generate
from medart.training.trainer import train
from medart.evaluation.evaluator import evaluate
from medart.evaluation.results import read_results, results_path
from medart.training.adapters import save_adapters
from medart.training.models import load_model
from medart.data.phantoms import write_phantoms
from medart.recipes.recipe import recipe
from medart.recipes.runs import captions_dir, classifier_dir, run_dir
from medart.evaluation.paper_tables import to_run
from medart.evaluation.prompt_figures import prompts_figure
from medart.evaluation.table_files import write_table
from medart.workflows.remaining_work import lacks_captions
from medart.method.caption_files import captions_for
from medart.training.captioning import write_captions
from medart.evaluation.caption_quality import validity
from medart.training.caption_store import append_line, read_lines

ROOT = Path(__file__).resolve().parent.parent
EVERY = int(
    os.environ.get("MEDART_EVERY_WRITE", 0)
)  # 1: every write of every stage fails once, which takes an hour
SMALL = dict(
    scale="tiny",
    data="made",
    epochs=0.5,
    batch_size=4,
    interval=0,
    sample_every=0,
    checkpoint_every=1,
    gen_steps=2,
    gen_count=0,
    gen_split="train",
    gen_block=4,
    size=64,
    classifier_epochs=1,
    caption_block=5,
    caption_retries=0,
)
TIMED = {"timing.csv", "clock.json", "manifest.json", "done.json", "durations.csv"}


def run():
    return recipe("skin", **SMALL)


def caption(r):
    save_table(validity(write_captions(r, "test")), captions_dir(r) / "validity.csv")


def tables(r):
    write_table(2, lambda d, m, s: r, ["skin"], (0,))
    save_figure(
        prompts_figure([r], 2),
        Path(os.environ["MEDART_OUTPUTS"]) / "figures" / "prompts.png",
    )


STAGES = dict(
    caption=caption,
    train=train,
    generate=generate,
    evaluate=evaluate,
    classify=lambda r: classify(r, (0,)),
    tables=tables,
)


def draw(folder):
    for i in range(22):
        to = (
            folder
            / ("train" if i < 12 else "test")
            / ("melanoma", "common_nevus")[i % 2]
            / f"{i}.png"
        )
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        ).save(to)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    "What each stage finds lies in a folder of its name, what all leave in `end`; and how often each one writes."
    at, threads, writes = tmp_path_factory.mktemp("robust"), torch.get_num_threads(), {}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MEDART_DATA", str(at / "data"))
        draw(at / "data" / "made")
        (at / "data" / "tiny").symlink_to(ROOT / "data" / "tiny")
        m.setenv("MEDART_OUTPUTS", str(at / "now"))
        (at / "now").mkdir()
        load_split(run(), "test")
        for name, stage in STAGES.items():
            shutil.copytree(at / "now", at / name)
            with pytest.MonkeyPatch.context() as watching:
                disk = Disk(watching)
                stage(run())
            writes[name] = disk.n
        (at / "now").rename(at / "end")
        m.setenv("MEDART_OUTPUTS", str(at / "end"))
        yield at, writes
    torch.set_num_threads(threads)


@pytest.fixture
def before(chain, tmp_path, monkeypatch):
    "Puts into an empty outputs folder what a stage finds, and says what it has to leave."
    (at, _), out = chain, tmp_path / "outputs"
    monkeypatch.setenv("MEDART_DATA", str(at / "data"))
    monkeypatch.setenv("MEDART_OUTPUTS", str(out))
    after = dict(zip(STAGES, [*list(STAGES)[1:], "end"]), end="end")

    def go(stage):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(at / stage, out)
        return contents(at / after[stage])

    return go


def contents(folder=None):
    "The bytes of what lies in an outputs folder, without what is timed; and no file is half-written."
    folder = Path(folder or os.environ["MEDART_OUTPUTS"])
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in TIMED]
    assert not [f for f in files if f.suffix == ".part"], "half-written files are left"
    return {
        str(f.relative_to(folder)): file_hash(f)
        for f in files
        if f.suffix not in (".lock", ".pid")
    }


def in_child(work):
    "Run in a fork of this warmed process: its number. What it says goes nowhere."
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BlockingIOError as e:
            status = 3 if "is at work" in str(e) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    return pid


def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Disk:
    "Counts every call that writes, and lets one of them fail: a write by half, the others before they begin."

    def __init__(self, monkeypatch, at=-1, fault=None):
        self.at, self.fault, self.n, self.where = at, fault, 0, []
        for name in ("fsync", "replace", "mkdir"):
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))
        share_files = files_room.share_files
        replace_everywhere(monkeypatch, share_files, self.watched(share_files))
        for module in (files_room, caption_store, checkpoints):
            monkeypatch.setattr(module, "open", self.open, raising=False)

    def strike(self, what, partly=lambda: None):
        self.n += 1
        self.where.append(what)
        if self.n - 1 != self.at:
            return
        partly()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.fault, os.strerror(self.fault))

    def watched(self, f):
        def call(*a, **k):
            self.strike(f"{f.__name__} {a[-1]}")
            return f(*a, **k)

        return call

    def open(self, path, mode="r", **k):
        f = builtins.open(path, mode, **k)
        if mode not in ("wb", "ab", "ab+"):
            return f
        write = f.write

        class File:
            def __enter__(s):
                return s

            def __exit__(s, *e):
                f.close()

            def __getattr__(s, name):
                return getattr(f, name)

            def write(s, data):
                self.strike(
                    f"write {path}", lambda: (write(data[: len(data) // 2]), f.flush())
                )
                return write(data)

        return File()


def some(chain, stage, few=2):
    "Which writes of a stage are to fail: a few, that of its record among them, or every n-th."
    n = chain[1][stage]
    if EVERY:
        return range(0, n, EVERY)
    few = 1 if stage in ("evaluate", "tables") else few  # they take longest
    return [round((n - 3) * (k + 1) / few) for k in range(few)]


def in_child_to_the_end(stage):
    assert end(in_child(lambda: STAGES[stage](run()))) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_a_write_and_run_again(chain, before, stage):
    for at in some(chain, stage):
        want = before(stage)

        def work():
            Disk(pytest.MonkeyPatch(), at, "kill")
            STAGES[stage](run())

        assert end(in_child(work)) == -signal.SIGKILL, at
        in_child_to_the_end(stage)
        assert contents() == want, at
    print(stage, chain[1][stage], "writes", len(some(chain, stage)), "kills")


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_is_full_or_fails_is_said(chain, before, stage):
    for at in some(chain, stage):
        want, fault = before(stage), (errno.ENOSPC, errno.EIO)[at % 2]
        with pytest.MonkeyPatch.context() as m:
            disk = Disk(m, at, fault)
            try:
                STAGES[stage](run())
            except OSError as e:
                assert e.errno == fault and re.search(
                    "could not be written.*Make room", str(e)
                ), (at, disk.where[at])
                assert os.strerror(fault) in str(e) and "MEDART_OUTPUTS" in str(e)
            else:
                assert disk.where[at].startswith("mkdir"), (
                    at,
                    disk.where[at],
                )  # of a folder that was there
        STAGES[stage](run())
        assert contents() == want, at


@pytest.mark.parametrize("stage", STAGES)
def test_two_at_once(before, stage):
    want = before(stage)
    both = [in_child(lambda: STAGES[stage](run())) for _ in range(2)]
    ends = {end(pid) for pid in both}
    assert 0 in ends and ends <= {0, 3}, (
        "one that did not end well said that the other is at work"
    )
    assert contents() == want


# What is kept


def flip(path, k=None):
    b = bytearray(path.read_bytes())
    b[len(b) // 2 if k is None else k] ^= 1
    path.write_bytes(b)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def empty(path):
    path.write_bytes(b"")


HARM = [flip, cut, empty]


def forget(r, *names):
    "Take results away, so that a stage has to ask its caches."
    for path in [p for name in names for p in run_dir(r).glob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "cache,stage,results",
    [
        ("latents/*.safetensors", "train", ("checkpoints", "done.json")),
        ("features/*.npz", "evaluate", ("metrics*.json",)),
        ("*/classifiers/*.npz", "classify", ()),
        ("*/captions/*/test/drafts/*.jsonl", "caption", ()),
        ("*/captions/*/test/shortened/*.jsonl", "caption", ()),
        ("*/captions/*/test/metadata.csv", "caption", ()),
        ("*/captions/*/test/captions.json", "caption", ()),
    ],
)
def test_a_damaged_cache_is_computed_anew(before, cache, stage, results):
    want, out, r = before("end"), Path(os.environ["MEDART_OUTPUTS"]), run()
    files = sorted(out.glob(cache))
    assert files
    for k, file in enumerate(files):
        HARM[k % 3](file)
    forget(r, *results)
    STAGES[stage](r)
    got = contents()
    changed = [f for f in want if got.get(f) != want[f]]
    assert all(f.endswith(".jsonl") for f in changed), (
        "only the store of drafts has another order of lines"
    )


def test_no_lost_bit_of_what_is_kept_goes_unnoticed(tmp_path):
    file = write_kept(tmp_path / "kept", b"features of images")
    for k in range(file.stat().st_size):
        flip(file, k)
        assert read_kept(file) == b"", k
        flip(file, k)
    assert (
        read_kept(file) == b"features of images"
        and read_kept(tmp_path / "none") == read_kept(tmp_path) == b""
    )
    file.write_bytes(file.read_bytes()[:9])
    assert read_kept(file) == b""


def test_no_lost_bit_of_a_draft_goes_unnoticed(tmp_path):
    file, keys = tmp_path / "0.jsonl", dict(a="1", b="1")
    for name in keys:
        append_line(
            file,
            dict(
                name=name,
                key="1",
                text="It has a border, 5 µm wide.",
                drafts=[dict(fault="")],
            ),
        )
    good = read_lines(tmp_path, keys)
    assert set(good) == {"a", "b"}
    for k in range(file.stat().st_size):
        flip(file, k)
        found = read_lines(tmp_path, keys)
        assert len(found) < 2 and all(found[name] == good[name] for name in found), k
        flip(file, k)


def test_a_line_that_a_full_disk_has_torn_is_written_again(tmp_path, monkeypatch):
    file, keys = tmp_path / "0.jsonl", dict(a="1", b="1")
    append_line(file, dict(name="a", key="1"))
    for at in (1, 2):  # the write, by half, and seeing it to the disk
        with monkeypatch.context() as m:
            Disk(m, at, errno.ENOSPC)
            with pytest.raises(
                OSError, match="0.jsonl could not be written. Make room"
            ):
                append_line(file, dict(name="b", key="1"))
        assert "a" in read_lines(tmp_path, keys)
    if "b" not in read_lines(tmp_path, keys):
        append_line(file, dict(name="b", key="1"))
    assert [line[:11] for line in file.read_text().splitlines()] == [
        '{"name": "a',
        '{"name": "b',
    ]


@pytest.mark.parametrize("harm", [*HARM, Path.unlink])
def test_captions_that_are_not_those_written_are_refused(before, harm):
    before("end")
    r = run()
    table = captions_dir(r) / "test" / "metadata.csv"
    texts = captions_for(r, "test").texts
    harm(table)
    with pytest.raises(
        ValueError,
        match="captions in .* are refused: metadata.csv is .*Run caption again.*caption.ipynb",
    ):
        captions_for(r, "test")
    assert lacks_captions(r) and to_run(r) == ["generate", "evaluate"], (
        "reproduce writes them anew"
    )
    caption(r)
    assert captions_for(r, "test").texts == texts and not to_run(r)


def test_captions_of_ones_own_need_no_record(before):
    before("end")
    r = run()
    table = captions_dir(r) / "test" / "metadata.csv"
    table.write_text(table.read_text().replace("A dermoscopic", "A sharp dermoscopic"))
    table.with_name("captions.json").unlink()
    assert all(
        t.startswith("A sharp dermoscopic") for t in captions_for(r, "test").texts
    )


def test_no_lost_bit_of_results_is_shown(before):
    before("end")
    r = run()
    for path, read in (
        (results_path(r, "metrics.json"), read_results),
        (classifier_dir(r) / "classifier.json", read_classification),
    ):
        good, size = read(r), path.stat().st_size
        seal = path.read_bytes().index(b'"seal"')
        for k in sorted({*range(seal, size), *range(0, size, size // 60)}):
            flip(path, k)
            try:
                assert read(r) == good, f"byte {k}: only a blank may be another one"
            except ValueError as e:
                assert "is damaged" in str(e)
            flip(path, k)


def test_phantoms_that_lost_a_bit_are_drawn_again(tmp_path):
    counts = dict(train=dict(melanoma=2, common_nevus=1), test=dict(melanoma=1))
    folder = write_phantoms("skin", tmp_path / "p", counts=counts)
    want = contents(folder)
    for name in ("train/melanoma/00001.png", "test/metadata.csv", "phantom.json"):
        for harm in HARM:
            harm(folder / name)
            write_phantoms("skin", folder, counts=counts)
            assert contents(folder) == want, (name, harm)
    flip(folder / "phantom.json"), flip(folder / "train/melanoma/00000.png")
    write_phantoms("skin", folder, counts=counts)
    assert contents(folder) == want, "without a note every image is compared"
    write_record(folder / "phantom.json", {"the drawing": ""})
    (folder / "train/melanoma/00000.png").unlink()
    write_phantoms("skin", folder, counts=counts)
    assert contents(folder) == want, "what a kill has left is completed"


# Weights


def pickled(path):
    torch.save({k: v.clone() for k, v in load_file(path).items()}, path)


def halves(path):
    save_file(
        {
            k: v[..., : v.shape[-1] // 2].contiguous()
            for k, v in load_file(path).items()
        },
        path,
    )


@pytest.mark.parametrize("harm", [pickled, halves, flip])
def test_adapters_are_refused_by_name_and_written_anew(before, harm):
    want = before("end")
    r = run()
    path = run_dir(r) / "transformer_lora" / "adapter_model.safetensors"
    harm(path)
    for stage in (generate, evaluate):
        with pytest.raises(
            ValueError,
            match="adapter_model.safetensors is not the file that was written",
        ):
            stage(r)
    with (
        pytest.raises(ValueError, match="transformer_lora is refused|cannot be read")
        if harm is not flip
        else nullcontext()
    ):
        load_model(
            r, adapters=run_dir(r)
        )  # a flipped bit is another number: the record alone knows
    train(r)
    assert {f: h for f, h in contents().items() if "set-aside" not in f} == want


def test_what_safetensors_says_of_a_full_disk_is_said_as_of_any_other(
    before, tmp_path, capfd
):
    "The kernel itself refuses to write more than 20 kB to a file."
    before("train")
    model = load_model(run())

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        save_adapters(model, tmp_path / "adapters")

    assert end(in_child(work)) == 1
    assert re.search(
        r"_lora could not be written. Make room there", capfd.readouterr().err
    )
    assert not list((tmp_path / "adapters").iterdir())


def test_a_file_that_cannot_grow_is_said(before, capfd):
    before("evaluate")

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
        evaluate(run())

    assert end(in_child(work)) == 1
    assert re.search(
        r"npz could not be written. Make room there, or set MEDART_OUTPUTS",
        capfd.readouterr().err,
    )


# Two at once, and what is left of one


def test_a_run_that_another_process_has_just_finished_is_not_done_again(
    before, monkeypatch
):
    "It was asked for before the end of the first, and got the lock after it."
    want = before("end")
    true, asked = runs.finished, iter([False])
    replace_everywhere(
        monkeypatch, true, lambda *a: next(asked, None) is None and true(*a)
    )
    train(run())
    assert contents() == want and next(asked, None) is None


def test_the_part_of_a_killed_process_is_removed_and_that_of_a_living_one_stays(
    tmp_path,
):
    dead = in_child(lambda: None)
    end(dead)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    parts = [
        tmp_path / f".a.csv.{files_room._MACHINE}-{pid}.part"
        for pid in (dead, other.pid)
    ] + [tmp_path / ".a.csv.0-1.part"]
    for part in parts:
        part.write_text("half")
    write_atomic(tmp_path / "b", "")
    other.communicate(b"\n")
    assert [part.exists() for part in parts] == [False, True, True]
