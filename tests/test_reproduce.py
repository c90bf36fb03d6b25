"Many rows by one command: what fails holds up nothing, what is done is not done again, and a stop loses nothing."

import os
import re
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread

import nbformat
import pandas as pd
import pytest
from small_rows import FEW, row_of

from medart.data import loading
from medart.evaluation import paper_tables
from medart.evaluation import results
from medart.workflows import processes
from medart.workflows import remaining_work
from medart.workflows import reproduce as reproduce_room
from medart.workflows.sweeps import Sweep
from medart.core.files import write_atomic
from medart.core.randomness import stable_hash
from medart.core.records import write_record
from medart.training.samples import generated_from
from medart.training.sampling_plan import sampling_plan
from medart.training.runs import IMAGES
from medart.data.phantoms import write_phantoms
from medart.recipes.recipe import recipe
from medart.recipes.runs import captions_dir, run_dir, samples_dir
from medart.method.caption_files import captions_for, captions_key

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("kernels")  # imported already
SMALL = dict(
    scale="tiny",
    data="made",
    epochs=1.0,
    batch_size=2,
    interval=2,
    solver_steps=2,
    gen_steps=2,
    captions="simple",
)


def row(method, **changes):
    return row_of(SMALL, method, changes)


def test_a_stop_lets_training_save_and_loses_nothing(made, folders):
    r = row("no_hldf", epochs=500.0, checkpoint_every=3, keep_checkpoints=1)

    def stop_when_it_trains():
        while not list(run_dir(r).glob("checkpoints/step-*")):
            if len(remaining_work.read_times()):
                return  # it has ended by itself, which the test will not like
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=stop_when_it_trains).start()
    with pytest.raises(KeyboardInterrupt, match="SIGTERM: stopped.* 3 stages are left"):
        reproduce_room.reproduce([r])
    step = re.search(
        r"SIGINT: stopped after step (\d+) of 2000, checkpoint saved. Run the same command again",
        (folders[1] / paper_tables.executed(r, "train")).read_text(),
    )
    assert step and [f.name for f in run_dir(r).glob("checkpoints/step-*")] == [
        f"step-{int(step[1]):07d}"
    ]
    assert remaining_work.read_times().end.tolist() == ["stopped"] and [
        n for n, _ in remaining_work.left(r)
    ] == ["train", "generate", "evaluate"]


def test_names_of_executed_notebooks_do_not_collide(folders):
    rs = [
        row("medart"),
        row("medart", seed=1),
        row("medart", epochs=2.0),
        row("dora"),
        replace(row("medart"), gen_steps=3),
        recipe("kvasir", scale="tiny"),
    ]
    for stage, many in (
        ("train", 5),
        ("generate", 6),
        ("evaluate", 6),
        ("classify", 6),
    ):
        assert len({paper_tables.executed(r, stage) for r in rs}) == many
    long = row(
        "medart",
        weight_decay=0.123456,
        min_snr=3.25,
        clip=0.75,
        caption_dropout=0.125,
        lr=0.00031,
        rank=12,
        alpha=13,
        guidance=3.75,
        max_tokens=48,
        checkpoint_every=7,
        dora_text=True,
        backprop_last_k=1,
    )
    assert len(paper_tables.executed(long, "train")) < 200 and paper_tables.executed(
        long, "train"
    ) != paper_tables.executed(replace(long, seed=1), "train")
    w = paper_tables.words(rs[1], "train")
    assert (
        w[:3]
        == [
            "papermill",
            "nbs/train.ipynb",
            str(folders[1] / paper_tables.executed(rs[1], "train")),
        ]
        and w[w.index("seed") + 1] == "1"
    )
    assert shlex.join(w) in paper_tables.commands(rs[1], 2), (
        "what is printed is what is run"
    )


def test_what_is_left_of_a_row(made, folders):
    r = row("medart", captions="vsg")
    assert [n for n, _ in remaining_work.left(r, ("evaluate", "classify"))] == [
        "caption",
        "train",
        "generate",
        "evaluate",
        "generate",
        "classify",
    ]
    write_phantoms("skin", folders[0] / "few", counts=FEW)
    assert [
        n for n, _ in remaining_work.left(row("medart", captions="vsg", data="few"))
    ][0] == "caption", "what is known of a drawing is not what a describer sees"
    other = row("medart", captions="vsg", seed=1)
    assert paper_tables.executed(r, "caption") == paper_tables.executed(
        other, "caption"
    ) and captions_dir(r) == captions_dir(other)
    for split in ("train", "test"):
        t = loading.load_split(r, split)
        write_atomic(
            captions_dir(r) / split / "metadata.csv",
            pd.DataFrame(dict(file_name=t.files, text=t.texts)).to_csv(index=False),
        )
    assert [n for n, _ in remaining_work.left(r)] == ["train", "generate", "evaluate"]
    write_record(run_dir(r) / "done.json", {IMAGES: "others"})
    assert [n for n, _ in remaining_work.left(r)] == [
        "train",
        "generate",
        "evaluate",
    ], "what was trained on other images is trained anew"
    write_record(
        run_dir(r) / "done.json", {IMAGES: captions_key(captions_for(r, "train"))}
    )
    assert [n for n, _ in remaining_work.left(r)] == ["generate", "evaluate"]
    write_atomic(samples_dir(r) / "metadata.csv", "file_name\na.png\n")
    write_atomic(samples_dir(r) / "a.png", "an image")
    generated = write_record(
        samples_dir(r) / "key.json",
        generated_from(r, sampling_plan(r)),
        ["a.png", "metadata.csv"],
    )["key"]
    write_record(
        results.results_path(r, "metrics.json"),
        {"the images": generated},
        spaces={"vit-skin": ""},
    )
    assert remaining_work.left(r) == [] and remaining_work.left(
        r, spaces="facebook/dinov2-base"
    ) == [("evaluate", r)]
    seen = dict(zip(("vit-skin", "dino"), map(stable_hash, (r.extractor, "a/dino"))))
    write_record(
        results.results_path(r, "metrics.json"),
        {"the images": generated},
        spaces=dict.fromkeys(seen, ""),
        extractors=seen,
    )
    assert remaining_work.left(r, spaces="a/dino") == [] and remaining_work.left(
        r, spaces="b/dino, a/dino"
    ) == [("evaluate", r)], "another of that name"
    (samples_dir(r) / "a.png").unlink()
    assert remaining_work.left(r) == [("generate", r)], (
        "an image that is gone is generated again"
    )


def test_two_never_work_on_the_same_stage(folders, tmp_path):
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import time; time.sleep(600)")],
        metadata=dict(
            kernelspec=dict(name="python3", display_name="python3", language="python")
        ),
    )
    nbformat.write(nb, tmp_path / "sleeps.ipynb")
    w = ["papermill", str(tmp_path / "sleeps.ipynb"), str(tmp_path / "out.ipynb")]
    p = processes.start(w)
    try:
        with pytest.raises(BlockingIOError, match="another process is at work"):
            processes.start(w)
    finally:
        processes.stop([p])
    assert p.returncode
    again = processes.start(w)
    processes.stop([again])


def test_a_row_that_no_classifier_can_end_is_refused_before_it_is_trained(
    folders, tmp_path, monkeypatch
):
    from PIL import Image

    for i in range(10):
        path = folders[0] / "one" / "melanoma" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((80, 70), 20 + 10 * i).convert("RGB").save(path)
    r = row("medart", data="one")
    assert remaining_work.left(r)[0][0] == "train"
    t = reproduce_room.reproduce([r], ("classify",))
    assert (
        t.state.tolist() == ["failed"]
        and "one class only (melanoma)" in t.message[0]
        and not run_dir(r).exists()
    )
    monkeypatch.chdir(tmp_path)
    rows = [reproduce_room.Row(r, ("classify",))]
    sweep = Sweep(dict(rows=reproduce_room.save_rows(rows, tmp_path / "rows.json")))
    (mark,) = sweep.marks("rows")
    assert mark.split("/")[2] == "look"
    with pytest.raises(RuntimeError, match="one class only"):
        sweep.run("look/" + Path(mark).stem)


@pytest.mark.parametrize("wrong", [5, "two"])
def test_a_table_that_is_not_there(wrong):
    with pytest.raises(ValueError, match="2, 3 or 4"):
        reproduce_room.rows_of(wrong)
