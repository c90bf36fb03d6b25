"Many rows by one command: what fails holds up nothing, what is done is not done again, and a stop loses nothing."
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from medart import report as R
from medart.core import write_atomic
from medart.recipes import METHODS, captions_dir, recipe, run_dir, samples_dir, save_recipe

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(scale="tiny", data="made", epochs=1.0, batch_size=2, interval=2, solver_steps=2, gen_steps=2, captions="simple")


def row(method, **changes):
    "A row as the run notebook makes it: what makes it this row stays."
    return recipe("skin", method, **({k: v for k, v in SMALL.items() if k not in METHODS[method]} | changes))


def papermill(out, **parameters):
    yaml = "\n".join(f"{k}: {json.dumps(v)}" for k, v in parameters.items())
    return subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs/reproduce.ipynb"), str(out), "-y", yaml], cwd=ROOT, capture_output=True, text=True)


def test_a_failing_row_holds_up_no_other_and_is_tried_again(made, folders, tmp_path):
    asked = SMALL | dict(datasets="skin", methods="base no_hldf sdxl", workers=2, prompts=2)
    good, bad = row("base"), row("no_hldf")
    write_atomic(run_dir(bad), "in the way of a folder")
    first = papermill(tmp_path / "first.ipynb", **asked)
    assert first.returncode and "1 of 3 rows failed" in first.stderr and "Cannot write to" in first.stderr
    rows = pd.read_csv(folders[1] / "tables/rows-tiny.csv", keep_default_na=False).set_index("method")
    assert rows.state.to_dict() == dict(base="done", no_hldf="failed", sdxl=R.PAPER_ONLY)
    assert rows.stage["no_hldf"] == "train" and str(run_dir(bad)) in rows.message["no_hldf"] and rows.seconds["base"] > 0
    assert (folders[1] / R.executed(bad, "train")).with_suffix(".log").exists() and not list(folders[1].glob("*base*.log"))
    assert any(o.output_type == "error" for c in nbformat.read(folders[1] / R.executed(bad, "train"), 4).cells for o in c.get("outputs", []))
    assert {"table2-tiny.md", "table3-tiny.md", "table4-tiny.md"} <= {f.name for f in (folders[1] / "tables").iterdir()} and (folders[1] / "figures/figure2-skin-tiny.png").exists()
    assert f"`{R.PAPER_ONLY}`" in (folders[1] / "tables/table2-tiny.md").read_text()

    run_dir(bad).unlink()
    before = {f: f.stat().st_mtime_ns for f in [*run_dir(good).rglob("*"), *folders[1].glob("*base*.ipynb")] if f.is_file()}
    second = papermill(tmp_path / "second.ipynb", **asked)
    assert second.returncode == 0, second.stderr[-2000:]
    assert {f: f.stat().st_mtime_ns for f in before} == before, "what was done is not done again"
    times = R.read_times()
    assert times[times.method == "base"].stage.tolist() == ["train", "generate", "evaluate"]
    assert times[times.method == "no_hldf"][["stage", "end"]].values.tolist() == [["train", "failed"], ["train", "done"], ["generate", "done"], ["evaluate", "done"]]
    said = "".join(o.get("text", "") for c in nbformat.read(tmp_path / "second.ipynb", 4).cells for o in c.get("outputs", []))
    assert "3 of 3 stages" in said and "expected" in said and said.count("done    ") == 3


def test_a_stop_lets_training_save_and_goes_on_from_there(made, folders, tmp_path):
    r = row("no_hldf", epochs=500.0, checkpoint_every=3, keep_checkpoints=1)
    save_recipe(r, tmp_path)
    code = "import sys; from medart.recipes import load_recipe; from medart.report import reproduce; reproduce([load_recipe(sys.argv[1])])"
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list(run_dir(r).glob("checkpoints/step-*")) and p.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(p.pid, signal.SIGTERM)
    said = p.communicate(timeout=300)[1]
    assert p.returncode and "SIGTERM: stopped" in said and "3 stages are left" in said
    step = re.search(r"stopped after step (\d+) of 2000, checkpoint saved. Run the same command again", (folders[1] / R.executed(r, "train")).read_text())
    assert step and [f.name for f in run_dir(r).glob("checkpoints/step-*")] == [f"step-{int(step[1]):07d}"]
    assert R.read_times().end.tolist() == ["stopped"] and [n for n, _ in R.left(r)] == ["train", "generate", "evaluate"]


def test_names_of_executed_notebooks_do_not_collide(folders):
    rs = [row("medart"), row("medart", seed=1), row("medart", epochs=2.0), row("dora"), replace(row("medart"), gen_steps=3), recipe("kvasir", scale="tiny")]
    for stage, many in (("train", 5), ("generate", 6), ("evaluate", 6), ("classify", 6)):
        assert len({R.executed(r, stage) for r in rs}) == many
    long = row("medart", weight_decay=0.123456, min_snr=3.25, clip=0.75, caption_dropout=0.125, lr=0.00031, rank=12, alpha=13, guidance=3.75, max_tokens=48, checkpoint_every=7, dora_text=True, backprop_last_k=1)
    assert len(R.executed(long, "train")) < 200 and R.executed(long, "train") != R.executed(replace(long, seed=1), "train")
    w = R.words(rs[1], "train")
    assert w[:3] == ["papermill", "nbs/train.ipynb", str(folders[1] / R.executed(rs[1], "train"))] and w[w.index("seed") + 1] == "1"
    assert shlex.join(w) in R.commands(rs[1], 2), "what is printed is what is run"


def test_what_is_left_of_a_row(made, folders):
    r = row("medart", captions="vsg")
    assert [n for n, _ in R.left(r, ("evaluate", "classify"))] == ["caption", "train", "generate", "evaluate", "generate", "classify"]
    other = row("medart", captions="vsg", seed=1)
    assert R.executed(r, "caption") == R.executed(other, "caption") and captions_dir(r) == captions_dir(other)
    for split in ("train", "test"):
        t = R.load_split(r, split)
        write_atomic(captions_dir(r) / split / "metadata.csv", pd.DataFrame(dict(file_name=t.files, text=t.texts)).to_csv(index=False))
    assert [n for n, _ in R.left(r)] == ["train", "generate", "evaluate"]
    write_atomic(run_dir(r) / "done.json", "{}")
    with pytest.raises(ValueError, match="Move it away to train anew"):
        R.left(r)
    assert not samples_dir(r).exists()


def test_two_never_work_on_the_same_stage(folders, tmp_path):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time; time.sleep(60)")], metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nbformat.write(nb, tmp_path / "sleeps.ipynb")
    w = ["papermill", str(tmp_path / "sleeps.ipynb"), str(tmp_path / "out.ipynb")]
    p = R.start(w)
    try:
        with pytest.raises(BlockingIOError, match="another process is at work"):
            R.start(w)
    finally:
        R.stop([p])
    assert p.returncode
    again = R.start(w)
    R.stop([again])


@pytest.mark.parametrize("wrong", [5, "two"])
def test_a_table_that_is_not_there(wrong):
    with pytest.raises(ValueError, match="2, 3 or 4"):
        R.rows_of(wrong)
