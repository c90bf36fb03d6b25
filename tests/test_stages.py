"Each stage checks the one before: what was trained, generated and measured is used only while what it was made from is still so."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from damage import change, cut, empty, flip, missing
from everywhere import replace_everywhere
from medart.evaluation import paper_tables
from medart.evaluation import table_files
from medart.training import step as step_room

from medart.core.files import file_hash, write_atomic
from medart.core.records import (
    alone,
    read_record,
    record_fault,
    set_aside,
    write_record,
)
from medart.evaluation.classification import classify
from medart.data.loading import load_split
from medart.training.samples import samples_fault
from medart.training.sampling_runs import generate
from medart.training.checkpoints import (
    checkpoint_fault,
    load_checkpoint,
    save_checkpoint,
    set_aside_outdated,
)
from medart.training.logs import Log
from medart.training.runs import check_steps, divergence, finished
from medart.training.step import make_optimizer
from medart.training.trainer import train
from medart.evaluation.evaluator import evaluate
from medart.evaluation.results import results_path
from medart.training.models import load_model
from medart.recipes.recipe import recipe
from medart.recipes.runs import captions_dir, run_dir, samples_dir
from medart.method.caption_files import captions_for, captions_key

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("melanoma", "common_nevus")
SMALL = dict(
    scale="tiny",
    data="made",
    epochs=0.1,
    batch_size=4,
    interval=0,
    sample_every=0,
    checkpoint_every=1,
    gen_steps=2,
    gen_count=0,
    gen_block=10,
    size=64,
    extractor="data/tiny/vit-skin",
)


def draw(folder, first, n):
    for k, cls in enumerate(CLASSES):
        (folder / cls).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + n):
            pixels = np.random.default_rng([k, i]).integers(
                0, 255, (64, 64, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / cls / f"{i}.png")


def caption(r, split, word):
    s = load_split(r, split)
    texts = [f"a {word} image of {c}" for c in s.classes]
    write_atomic(
        captions_dir(r) / split / "metadata.csv",
        pd.DataFrame(dict(file_name=s.files, text=texts)).to_csv(index=False),
    )


def run():
    return recipe("skin", **SMALL)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    "A hundred made images, captioned, trained on, generated and measured, once for all tests."
    at = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MEDART_DATA", str(at / "data"))
        m.setenv("MEDART_OUTPUTS", str(at / "outputs"))
        draw(at / "data" / "made", 0, 50)
        (at / "data" / "tiny").symlink_to(ROOT / "data" / "tiny")
        for split in ("train", "test"):
            caption(run(), split, "sharp")
        train(run())
        generate(run())
        evaluate(run())
    return at


@pytest.fixture
def done(chain, tmp_path, monkeypatch):
    "A copy of it, and its recipe."
    shutil.copytree(chain, tmp_path / "chain", symlinks=True)
    monkeypatch.setenv("MEDART_DATA", str(tmp_path / "chain" / "data"))
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path / "chain" / "outputs"))
    return run()


def everything(r):
    "The bytes of what a run leaves, without what is timed and what is set aside."
    out = run_dir(r)
    kept = [
        f
        for f in out.rglob("*")
        if f.is_file() and "set-aside" not in f.parts and not f.name.startswith(".")
    ]
    return {
        str(f.relative_to(out)): file_hash(f)
        for f in kept
        if f.name not in ("timing.csv", "clock.json", "manifest.json", "done.json")
    }


def adapter(r):
    return run_dir(r) / "transformer_lora" / "adapter_model.safetensors"


# The data change


def test_what_is_done_is_not_done_again(done):
    before = {
        f: f.stat().st_mtime_ns
        for f in run_dir(done).rglob("*")
        if f.is_file() and not f.name.startswith(".")
    }
    train(done), generate(done), evaluate(done)
    assert {f: f.stat().st_mtime_ns for f in before} == before and paper_tables.to_run(
        done
    ) == []


def added(r):
    draw(Path(os.environ["MEDART_DATA"]) / "made", 50, 5)
    for split in ("train", "test"):
        caption(r, split, "sharp")


@pytest.mark.parametrize(
    "what",
    [added, lambda r: caption(r, "train", "blurred")],
    ids=["images added", "captions rewritten"],
)
def test_other_data_than_were_trained_on(done, what, capsys):
    what(done)
    for stage in (generate, evaluate):
        with pytest.raises(
            ValueError, match="the training images or their captions changed since"
        ):
            stage(done)
    assert generate(done, "a red star").exists(), "prompts of one's own need no data"
    assert paper_tables.to_run(done) == ["train", "generate", "evaluate"]
    was, checkpoints = (
        file_hash(adapter(done)),
        sorted(p.name for p in (run_dir(done) / "checkpoints").glob("step-*")),
    )
    train(done)
    said = capsys.readouterr().out
    assert (
        "was trained before, but the training images or their captions changed since"
        in said
    )
    kept = [
        f
        for f in run_dir(done).rglob("transformer_lora/adapter_model.safetensors")
        if "set-aside" in f.parts
    ]
    assert [file_hash(f) for f in kept] == [was] != [file_hash(adapter(done))]
    assert (
        sorted(
            p.name
            for p in (run_dir(done) / "checkpoints" / "set-aside").rglob("step-*")
        )
        == checkpoints
    )
    old = file_hash(next(samples_dir(done).rglob("*.png")))
    with pytest.raises(ValueError, match="the adapters"):
        evaluate(done)
    generate(done)
    assert old in {file_hash(f) for f in (run_dir(done) / "set-aside").rglob("*.png")}
    assert paper_tables.to_run(done) == ["evaluate"]
    evaluate(done)
    assert paper_tables.to_run(done) == []


def test_other_test_captions_than_were_generated(done, capsys):
    caption(done, "test", "blurred")
    with pytest.raises(
        ValueError, match="the captions or their images changed since.*generate.ipynb"
    ):
        evaluate(done)
    assert paper_tables.to_run(done) == ["generate", "evaluate"]
    generate(done)
    assert "until this happens again" in capsys.readouterr().out
    assert paper_tables.to_run(done) == ["evaluate"] and evaluate(done) is not None


def test_the_data_may_be_away_where_only_results_are_read(done):
    shutil.rmtree(Path(os.environ["MEDART_DATA"]) / "made")
    assert paper_tables.to_run(done) == []
    r = read_record(samples_dir(done) / "key.json")
    write_record(
        samples_dir(done) / "key.json",
        r["read"] | {"the adapters": "others"},
        r["files"],
    )
    assert paper_tables.to_run(done) == ["generate", "evaluate"]


def test_settings_of_another_run(done):
    other = replace(done, lr=2 * done.lr)
    shutil.copytree(run_dir(done), run_dir(other))
    shutil.rmtree(run_dir(other) / "checkpoints")
    with pytest.raises(ValueError, match="the settings changed since"):
        generate(other)
    assert not finished(other, captions_key(captions_for(other, "train")))


# Files change


HARM = [missing, empty, cut, flip]


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize(
    "name",
    [
        "done.json",
        "transformer_lora/adapter_model.safetensors",
        "text_encoder_lora/adapter_config.json",
    ],
)
def test_damaged_adapters_are_refused_and_written_anew(done, name, harm):
    want = everything(done)
    harm(run_dir(done) / name)
    with pytest.raises((ValueError, FileNotFoundError), match="[Tt]rain (again|first)"):
        generate(done)
    with pytest.raises(
        ValueError,
        match="is missing|is not the file|is damaged|there is no|changed since",
    ):
        evaluate(done)
    train(done)
    assert everything(done) == want
    train(done), generate(done), evaluate(done)
    assert everything(done) == want


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["melanoma/00000.png", "metadata.csv", "key.json"])
def test_damaged_images_are_refused_and_generated_again(done, name, harm):
    want = everything(done)
    file = samples_dir(done) / name
    name = file if file.exists() else next(samples_dir(done).rglob("*.png"))
    harm(name)
    with pytest.raises((ValueError, FileNotFoundError), match="generate"):
        evaluate(done)
    generate(done)
    assert everything(done) == want and samples_fault(done) == ""


def test_an_exchanged_image_is_refused_and_kept(done, capsys):
    want, files = everything(done), sorted(samples_dir(done).rglob("*.png"))
    shutil.copy(files[1], files[0])
    with pytest.raises(
        ValueError, match=f"{files[0].name} is not the file that was written"
    ):
        evaluate(done)
    generate(done)
    assert (
        "Setting aside 1 images" in capsys.readouterr().out and everything(done) == want
    )
    kept = run_dir(done) / "set-aside" / files[0].relative_to(run_dir(done))
    assert file_hash(kept) == file_hash(files[1])


def test_an_interrupted_generating_trusts_labels_alone(done):
    "Without hashes an image of other adapters, of another caption or without a label is generated again."
    want, files = everything(done), sorted(samples_dir(done).rglob("*.png"))
    r = read_record(samples_dir(done) / "key.json")
    write_record(samples_dir(done) / "key.json", r["read"])
    (samples_dir(done) / "metadata.csv").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="generate"):
        evaluate(done)
    shutil.copy(files[1], files[0])
    Image.open(files[2]).save(files[2])
    flip(files[3])
    generate(done)
    assert everything(done) == want


@pytest.mark.parametrize("harm", [missing, flip])
def test_damaged_results_are_measured_anew(done, harm):
    want = everything(done)
    harm(results_path(done, "metrics.json"))
    assert paper_tables.to_run(done) == ["evaluate"]
    evaluate(done)
    assert everything(done) == want


def test_a_table_shows_no_stale_number(done):
    made = lambda d, m, s: run()  # noqa: E731
    cells = paper_tables.table_cells(2, made, ["skin"])
    shown = cells.set_index(["method", "measure"]).loc["medart", "FD (vit-skin)"]
    assert shown.ours > 0 and not shown.stale
    record = read_record(run_dir(done) / "done.json")
    write_record(run_dir(done) / "done.json", record["read"], ["losses.csv"])
    cells = paper_tables.table_cells(2, made, ["skin"])
    shown = cells.set_index(["method", "measure"]).loc["medart", "FD (vit-skin)"]
    assert pd.isna(shown.ours) and shown.stale and shown.to_run == "generate evaluate"
    assert (
        table_files.wide(cells, "ours")[0]
        .loc["Med-Art", ("ours", "skin FD (vit-skin)")]
        .startswith("stale [")
    )


def test_classifiers_refuse_images_of_other_adapters(done):
    r = replace(done, gen_split="train", classifier_epochs=1)
    generate(r)
    classify(r, (0,))
    assert paper_tables.to_run(r, 4) == []
    change(adapter(r), lambda t, k: t.update({k: t[k] + 1}))
    with pytest.raises(
        ValueError, match="adapter_model.safetensors is not the file that was written"
    ):
        classify(r, (0,))
    caption(r, "train", "blurred")
    assert paper_tables.to_run(r, 4) == ["train", "generate", "classify"]


# Checkpoints


@pytest.fixture
def checkpoints(folders):
    r = recipe("skin", scale="tiny", keep_checkpoints=1)
    model = load_model(r)
    return r, model, make_optimizer(model, r), folders[1] / "checkpoints"


def names(folder):
    return sorted(p.name for p in folder.glob("step-*"))


def test_the_checkpoint_just_written_stays(checkpoints):
    r, model, opt, folder = checkpoints
    save_checkpoint(folder, model, opt, 40, Log([], []), r, "old")
    for step in (2, 4):
        new = save_checkpoint(folder, model, opt, step, Log([], []), r, "new")
        assert (
            checkpoint_fault(new) == ""
            and load_checkpoint(folder, model, opt, r, "new")[0] == step
        )
    assert names(folder) == ["step-0000004", "step-0000040"]
    set_aside_outdated(folder, r, "new", 50)
    assert names(folder) == ["step-0000004"] and names(
        folder / "set-aside" / "old"
    ) == ["step-0000040"]


def test_a_damaged_checkpoint_stands_in_no_ones_way(checkpoints):
    r, model, opt, folder = checkpoints
    flip(
        save_checkpoint(folder, model, opt, 9, Log([], []), r, "k")
        / "adapters.safetensors"
    )
    for step in (3, 6, 9):
        assert (
            checkpoint_fault(
                save_checkpoint(folder, model, opt, step, Log([], []), r, "k")
            )
            == ""
        )
    assert names(folder) == ["step-0000009"] and names(
        folder / "set-aside" / "replaced"
    ) == ["step-0000009"]


def test_steps_that_the_run_does_not_have(checkpoints, capsys):
    r, model, opt, folder = checkpoints
    save_checkpoint(folder, model, opt, 9, Log([], []), r, "k")
    set_aside_outdated(folder, r, "k", 8)
    assert "step-0000009: the run has 8 steps" in capsys.readouterr().out and not names(
        folder
    )


def test_an_older_checkpoint_of_another_recipe_is_not_rotated_away(checkpoints):
    r, model, opt, folder = checkpoints
    save_checkpoint(folder, model, opt, 1, Log([], []), replace(r, lr=1.0), "k")
    with pytest.raises(ValueError, match="another recipe"):
        set_aside_outdated(folder, r, "k", 8)


def test_stopped_after_the_data_changed_there_is_a_checkpoint(done, monkeypatch):
    r = replace(done, epochs=2.0, checkpoint_every=100, keep_checkpoints=1)
    train(r, stop_after=20)
    caption(r, "train", "blurred")
    update, calls = step_room.update, iter(range(100))

    def interrupted(*a):
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*a)

    replace_everywhere(monkeypatch, step_room.update, interrupted)
    with pytest.raises(
        KeyboardInterrupt, match="stopped after step 3 of 40, checkpoint saved"
    ):
        train(r)
    assert names(run_dir(r) / "checkpoints") == ["step-0000003"]
    assert [p.name for p in (run_dir(r) / "checkpoints" / "set-aside").glob("*/*")] == [
        "step-0000020"
    ]


# Ends that are none


def test_a_run_that_diverged_says_so_each_time(done):
    r = replace(done, lr=1e30, clip=0.0, epochs=0.2)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="diverged: .* Try a smaller lr"):
            train(r)
    assert not adapter(r).exists() and (run_dir(r) / "losses.csv").exists()
    with pytest.raises(ValueError, match="training diverged"):
        generate(r)
    assert paper_tables.to_run(r)[0] == "train"


@pytest.mark.parametrize(
    "rows,weights,says",
    [
        ([(0.1, 0)], [float("inf")], "the adapters hold"),
        ([(0.1, 0), (float("nan"), 1)], [1.0], "loss of the last step is nan"),
        ([(0.1, 0), (0.1, 1), (0.1, 1)], [1.0], "the last 2 updates"),
        ([(0.1, 1), (0.1, 0)], [1.0], ""),
        ([(0.1, 0), (0.1, 1)], [1.0], ""),
        ([], [1.0], ""),
    ],
)
def test_what_counts_as_diverged(rows, weights, says):
    found = divergence(
        [dict(loss=x, skipped=s) for x, s in rows], [torch.tensor(weights)]
    )
    assert says in found and bool(found) == bool(says)


def test_no_update_at_all_is_refused(done):
    r = replace(done, epochs=0.01)
    with pytest.raises(
        ValueError,
        match="epochs=0.01 of 80 training images in updates of 4 make no update.*epochs=0.05 or more",
    ):
        train(r)
    assert not (run_dir(r) / "done.json").exists()
    assert (
        check_steps(replace(r, epochs=0.05), 80) == 1
        and check_steps(replace(r, epochs=0.0), 80) == 0
    )


# Two at once


def test_the_second_says_who_is_at_work_and_a_dead_one_blocks_nobody(tmp_path):
    code = (
        "import time; from medart.core.records import alone\n"
        f"with alone({str(tmp_path)!r}, 'train'):\n"
        "    print('in', flush=True)\n    time.sleep(600)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "in\n"
        with pytest.raises(
            BlockingIOError,
            match=f"number {first.pid}.*train in .*run the same command again",
        ):
            with alone(tmp_path, "train", wait=0.1):
                pass
        with alone(tmp_path, "generate", wait=0.1):
            pass
    finally:
        first.kill()
        first.wait()
    with alone(tmp_path, "train", wait=5):
        pass


def test_stages_take_the_lock(done, monkeypatch):
    with alone(run_dir(done), "train"), alone(run_dir(done), samples_dir(done).name):
        finished_already = time.monotonic()
        train(done)
        assert time.monotonic() - finished_already < 4, (
            "what is complete waits for nobody"
        )
        flip(adapter(done))
        with pytest.raises(BlockingIOError, match="at work: train"):
            train(done)
    train(done)


# Records


def test_records_of_every_kind(tmp_path):
    write_atomic(tmp_path / "a", "x")
    at = tmp_path / "r.json"
    write_record(at, dict(x="1", y="2"), ["a"], more=[1, (2, 3), {"4": 0.1}])
    assert (
        record_fault(at, dict(x="1")) == "" and record_fault(at, dict(z="3")) == ""
    ), "what was not read is not asked"
    assert record_fault(at, dict(x="2", y="3")) == "x and y changed since"
    good = at.read_bytes()
    for k in range(len(good)):
        at.write_bytes(good[:k] + bytes([good[k] ^ 1]) + good[k + 1 :])
        same = json.dumps(json.loads(good), sort_keys=True)
        try:
            blank = json.dumps(json.loads(at.read_bytes()), sort_keys=True) == same
        except ValueError:
            blank = False
        assert blank or record_fault(at, {}), (
            f"a flipped bit in byte {k} is not noticed"
        )
    for harm in (empty, cut, missing):
        at.write_bytes(good)
        harm(at)
        assert record_fault(at, {}) and read_record(at) == {}


def test_what_is_set_aside_makes_room_only_for_its_like(tmp_path):
    for k in (1, 2):
        write_atomic(tmp_path / "run" / "a" / "f", str(k))
        assert (
            set_aside(tmp_path / "run" / "a", tmp_path / "run") / "f"
        ).read_text() == str(k)
    write_atomic(tmp_path / "run" / "a", "a file now")
    assert set_aside(tmp_path / "run" / "a", tmp_path / "run").is_file()
    write_atomic(tmp_path / "run" / "a", "3")
    set_aside(tmp_path / "run" / "a", tmp_path / "run", "other")
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("a")) == [
        "run/set-aside/a",
        "run/set-aside/other/a",
    ]
