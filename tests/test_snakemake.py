"Sweeps by Snakemake: from the notebook, from the command line and as jobs of a cluster, over rows that all tests share."

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from small_rows import FEW, row_of

from medart.core.records import write_record
from medart.data.phantoms import write_phantoms
from medart.evaluation import paper_tables
from medart.evaluation.evaluator import evaluate
from medart.evaluation.measures import find_measure
from medart.evaluation.results import results_path
from medart.recipes.runs import run_dir, samples_dir
from medart.training.runs import IMAGES
from medart.training.sampling_runs import generate
from medart.training.trainer import train
from medart.workflows import remaining_work
from medart.workflows import reproduce as reproduce_room
from medart.workflows.sweeps import Sweep

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("kernels", "ready_python")  # imported already
ASKED = dict(
    scale="tiny",
    data="few",
    epochs=0.25,
    batch_size=2,
    interval=2,
    solver_steps=2,
    gen_steps=2,
    gen_block=8,
    captions="simple",
)


def row(method, **changes):
    return row_of(ASKED, method, changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Two rows, trained and generated, which all tests of this file share."
    place = tmp_path_factory.mktemp("sweep")
    data, outputs = place / "data", place / "outputs"
    data.mkdir()
    (data / "tiny").symlink_to(ROOT / "data" / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDART_DATA", str(data))
        patch.setenv("MEDART_OUTPUTS", str(outputs))
        write_phantoms("skin", data / "few", counts=FEW)
        for r in map(row, ("base", "no_hldf")):
            train(r)
            generate(r)
        yield data, outputs


def papermill(out, notebook="reproduce", **parameters):
    yaml = "\n".join(f"{k}: {json.dumps(v)}" for k, v in parameters.items())
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / f"nbs/{notebook}.ipynb"),
            str(out),
            "-y",
            yaml,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_a_failing_row_holds_up_no_other_and_is_tried_again(folders, tmp_path):
    "Both rows are trained and generated, but one image is damaged."
    rows = good, bad, _ = [row(m) for m in ("base", "no_hldf", "sdxl")]
    image = sorted(samples_dir(bad).rglob("*.png"))[0]
    whole = image.read_bytes()
    image.write_bytes(whole[:20])
    t = reproduce_room.reproduce(rows, workers=2).set_index("method")
    assert t.state.to_dict() == dict(
        base="done", no_hldf="failed", sdxl=paper_tables.PAPER_ONLY
    )
    assert (
        t.stage["no_hldf"] == "evaluate"
        and image.name in t.message["no_hldf"]
        and "run generate again" in t.message["no_hldf"]
        and (t.seconds[:2] > 0).all()
    )
    with pytest.raises(RuntimeError, match="1 of 3 rows failed"):
        reproduce_room.all_done(t.reset_index())
    kept = folders[1] / paper_tables.executed(bad, "evaluate")
    assert any(
        o.output_type == "error"
        for c in nbformat.read(kept, 4).cells
        for o in c.get("outputs", [])
    )
    assert [f.name for f in folders[1].glob("*.log")] == [kept.with_suffix(".log").name]

    image.write_bytes(whole)
    before = {
        f: f.stat().st_mtime_ns
        for f in [*run_dir(good).rglob("*"), *folders[1].glob("*base*.ipynb")]
        if f.is_file()
    }
    done = papermill(
        tmp_path / "done.ipynb",
        **ASKED,
        datasets="skin",
        methods="base no_hldf sdxl",
        workers=2,
        prompts=2,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert {f: f.stat().st_mtime_ns for f in before} == before, (
        "what was done is not done again"
    )
    times = remaining_work.read_times()
    assert sorted(map(tuple, times[["method", "stage", "end"]].values)) == [
        ("base", "evaluate", "done"),
        ("no_hldf", "evaluate", "done"),
        ("no_hldf", "evaluate", "failed"),
    ]
    said = "".join(
        o.get("text", "")
        or o.get("data", {}).get(
            "text/plain", ""
        )  # the bar is a line that is shown anew
        for c in nbformat.read(tmp_path / "done.ipynb", 4).cells
        for o in c.get("outputs", [])
    )
    assert (
        f"{paper_tables.PAPER_ONLY}: skin sdxl" in said
        and "done    evaluate skin no_hldf" in said
        and "1 of 1 stages" in said
        and re.search(
            r"\d left, expected \d+ (s|min); now evaluate skin no_hldf 0", said
        )
    )
    assert pd.read_csv(
        folders[1] / "tables/rows-base-no_hldf-sdxl-tiny.csv"
    ).state.tolist() == ["done", "done", paper_tables.PAPER_ONLY]
    tables = sorted((folders[1] / "tables").glob("table?-tiny-skin-????????.md"))
    assert [f.name[:6] for f in tables] == ["table2", "table3", "table4"], (
        "settings were changed, so the tables have names of their own"
    )
    assert (folders[1] / "figures/figure2-skin-base-no_hldf-sdxl-tiny.png").exists()
    assert f"`{paper_tables.PAPER_ONLY}`" in tables[0].read_text()


def snakemake(target, place, *options, profile="default", path=None):
    "What a shell would call, in a folder of its own."
    line = [sys.executable, "-m", "snakemake", target, "-c2", "--directory", place]
    line += ["--snakefile", ROOT / "Snakefile"]
    line += ["--workflow-profile", ROOT / "profiles" / profile, *options]
    path = os.pathsep.join(map(str, filter(None, [path, os.environ["PATH"]])))
    return subprocess.run(
        [*map(str, line)],
        cwd=ROOT,
        env=os.environ | dict(PATH=path),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def finished(folders):
    "Both rows evaluated: done by the tests before, or now."
    rows = [row("base"), row("no_hldf")]
    assert set(reproduce_room.reproduce(rows, workers=2).state) == {"done"}
    return rows


def made_files(rows):
    "When each file of these rows was written."
    files = [f for r in rows for f in run_dir(r).rglob("*") if f.is_file()]
    return {f: f.stat().st_mtime_ns for f in files if not f.name.startswith(".")}


def test_from_a_shell_what_is_done_is_not_done_again(finished, folders, tmp_path):
    before = made_files(finished)
    asked = [f"{k}={v}" for k, v in ASKED.items()]
    words = [*asked, "datasets=skin", "methods=base no_hldf"]
    done = snakemake("table3", tmp_path, "--config", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 stages are left" in done.stdout and "2 of 2 rows are done" in done.stdout
    assert re.search(r"done    tables of table3, \d+ (s|min)", done.stdout)
    ran = re.findall(r"^(?:local)?rule (\w+):", done.stderr, re.M)
    assert [*dict.fromkeys(ran)] == ["tables", "table3"]
    assert made_files(finished) == before
    assert list((folders[1] / "tables").glob("table3-tiny-skin-*.md"))
    wrong = snakemake("table3", tmp_path, "--config", "epoch=2")
    assert wrong.returncode and "Did you mean 'epochs'" in wrong.stderr + wrong.stdout


STAND_IN = dict(
    sbatch="""
import json, os, subprocess, sys
place = os.environ["STAND_IN"]
number = str(100 + len(os.listdir(place)))
wrapped = next(x for x in sys.argv if x.startswith("--wrap="))
env = os.environ | dict(SLURM_JOB_ID=number)
with open(f"{place}/{number}.log", "w") as log:
    end = subprocess.run(wrapped[7:], shell=True, env=env, stdout=log, stderr=log)
state = "FAILED" if end.returncode else "COMPLETED"
with open(f"{place}/{number}.json", "w") as f:
    json.dump(dict(line=sys.argv[1:], state=state, number=number), f)
print(number)
""",
    sacct="""
import glob, json, os
for file in glob.glob(os.environ["STAND_IN"] + "/*.json"):
    job = json.load(open(file))
    print(job["number"] + "|" + job["state"])
""",
    srun="""
import os, sys
first = next(i for i, x in enumerate(sys.argv[1:], 1) if not x.startswith("-"))
os.execvp("sh", ["sh", "-c", " ".join(sys.argv[first:])])
""",
    sinfo="print('PARTITION short gpu*')",
    squeue="",
    scontrol="print('MinJobAge = 300 sec')",
)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "Stand-ins for SLURM's commands: a job is noted and run at once."
    jobs, commands = tmp_path / "jobs", tmp_path / "bin"
    jobs.mkdir()
    commands.mkdir()
    for name, program in STAND_IN.items():
        (commands / name).write_text(f"#!{sys.executable}\n{program}")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("STAND_IN", str(jobs))
    return jobs, commands


def test_on_a_cluster_each_stage_is_a_job(finished, slurm, tmp_path):
    jobs, commands = slurm
    base = finished[0]
    results_path(base, "metrics.json").unlink()
    assert [n for n, _ in remaining_work.left(base)] == ["evaluate"]
    rows = reproduce_room.save_rows([reproduce_room.Row(base)], tmp_path / "rows.json")
    done = snakemake(
        "rows",
        tmp_path / "work",
        *("--config", f"rows={rows}", "--slurm-no-account"),
        *("--slurm-init-seconds-before-status-checks", "1"),
        profile="slurm",
        path=commands,
    )
    said = "".join(f.read_text() for f in jobs.glob("*.log"))
    assert done.returncode == 0, done.stderr[-3000:] + said[-3000:]
    (job,) = [json.loads(f.read_text()) for f in jobs.glob("*.json")]
    line = shlex.join(job["line"])
    for option in ("--gpus=1", "-t 240", "--mem 32000", "--cpus-per-task=8"):
        assert option in line, line
    assert "rule_evaluate" in line and "-p gpu" in line
    assert "done    evaluate skin base" in said
    assert remaining_work.left(base) == []
    assert remaining_work.read_times().iloc[-1].tolist()[-3::2] == ["evaluate", "done"]


def test_records_decide_and_not_the_marks(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = ASKED | dict(datasets="skin", methods="base no_hldf")
    assert Sweep(config).marks("table3") == []
    done = run_dir(finished[1]) / "done.json"
    whole = done.read_bytes()
    try:
        write_record(done, {IMAGES: "others"})
        sweep = Sweep(config)
        marks = sweep.marks("table3")
        assert [m.split("/")[2] for m in marks] == ["train", "generate", "evaluate"]
        for mark in map(Path, marks):
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        again = Sweep(config)
        assert again.marks("table3") == marks
        assert not any(Path(mark).exists() for mark in marks), "old marks are gone"
        assert again.before(f"evaluate/{Path(marks[2]).stem}") == [marks[1]]
        for mark in map(Path, marks):
            mark.touch()
        with monkeypatch.context() as patch:  # as if written while records were read
            patch.setattr("medart.workflows.sweeps._age", lambda f: f.stat().st_mtime)
            real = Sweep._look

            def look(self, rows):
                keys = real(self, rows)
                os.utime(marks[0], (1, 1))
                return keys

            patch.setattr(Sweep, "_look", look)
            Sweep(config).marks("table3")
        assert [Path(m).exists() for m in marks] == [True, False, False]
        stage = Sweep(config)._find("train/" + Path(marks[0]).stem)
        assert (stage.notebook, stage.r) == ("train", finished[1])
    finally:
        done.write_bytes(whole)


def test_rows_share_what_they_can(folders):
    rows = [
        reproduce_room.Row(row("no_hldf", captions="vsg", gen_steps=n), ends=e)
        for n, e in ((2, ("evaluate",)), (3, ("evaluate", "classify")))
    ]
    for x in rows:
        x.look()
    stages = reproduce_room.plan(rows)
    kinds = [k.partition("/")[0] for k in stages]
    assert sorted(kinds) == sorted(
        ["caption", "train"]
        + 2 * ["generate", "evaluate"]
        + ["generate_for_classifiers", "classify"]
    )
    waits = {
        k.partition("/")[0]: {b.partition("/")[0] for b in s.before}
        for k, s in stages.items()
    }
    assert waits["train"] == {"caption"} and waits["generate"] == {"train"}
    assert waits["classify"] == {"generate_for_classifiers"}


def test_a_stage_that_makes_nothing_fails_and_names_its_notebook(
    folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medart.workflows.sweeps.run_stage", lambda *a: 1.0)
    r = row("no_hldf", seed=3)
    rows = reproduce_room.save_rows([reproduce_room.Row(r)], tmp_path / "rows.json")
    sweep = Sweep(dict(rows=str(rows)))
    key = (
        sweep.marks("rows")[0].removeprefix(".snakemake/stages/").removesuffix(".done")
    )
    with pytest.raises(RuntimeError, match="what it should have made is not there"):
        sweep.run(key)
    assert "failed  train" in capsys.readouterr().out
    seen = [reproduce_room.Row(r)]
    reproduce_room.see_failures(seen, tmp_path)
    assert seen[0].failed == "train"
    assert paper_tables.executed(r, "train") in seen[0].message


def test_the_color_loss_is_judged_beside_the_same_model_without_it(folders, tmp_path):
    methods = ["base", "no_hldf", "medart", "sd15", "sd15_hldf"]
    for r in map(row, methods):  # what is done is not done again
        train(r)
        generate(r)
        evaluate(r)
    done = papermill(
        tmp_path / "effect.ipynb",
        "effect",
        **ASKED,
        datasets="skin",
        methods=" ".join(methods),
        seeds="0",
        name="judged",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = lambda name: pd.read_csv(
        folders[1] / f"tables/judged-tiny{name}.csv"
    ).set_index(["method", "measure"])
    value, paired = read("").value, read("-paired")["0"]
    for method, without in dict(medart="no_hldf", sd15_hldf="sd15").items():
        assert set(paired[method].index) == set(value[method].index)
        gap = lambda row: pd.Series(
            {m: find_measure(m).gap(v) for m, v in value[row].items()}
        )
        assert paired[method].values == pytest.approx(
            (gap(method) - gap(without))[paired[method].index].values,
            abs=1e-4,
            nan_ok=True,
        )
        assert paired[method, "color_gap"] != 0
    assert {f.name for f in (folders[1] / "figures").glob("judged*")} == {
        "judged-tiny-paths.png",
        "judged-tiny-skin.png",
    }
