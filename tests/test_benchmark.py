"The benchmark runs at tiny scale, writes as it goes, and measures what it says it measures."

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import nbformat
import pandas as pd
import pytest
import torch
from test_runs import papermill

from medart.bundled.benchmark_cases import cases
from medart.bundled.benchmark_models import (
    bench_model,
    bench_set,
    one_event,
    one_step,
    timed,
)
from medart.bundled.benchmarks import agreement, quoted, time_case
from medart.bundled.full_size_costs import (
    _as_libraries_compute,
    continued,
    count_costs,
    full_captions,
    shapes,
)
from medart.bundled.memory_benchmarks import alive_peak, allocated_peak, memory_table
from medart.training.batches import draw_batch
from medart.method.lora import perturb_loras
from medart.recipes.recipe import recipe

pytestmark = pytest.mark.usefixtures("kernels", "ready_python")  # imported already
R = recipe("skin", scale="tiny", batch_size=1, interval=0, solver_steps=2)


def test_the_run_notebook_times_every_case(folders, tmp_path):
    done = papermill(
        "benchmark",
        tmp_path / "benchmark.ipynb",
        scale="tiny",
        solver_steps=2,
        gen_steps=2,
        repeats=2,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    nb = nbformat.read(tmp_path / "benchmark.ipynb", 4)
    assert any(
        "image/png" in o.get("data", {}) for c in nb.cells for o in c.get("outputs", [])
    )
    here = folders[1] / "benchmark"
    out = json.loads((here / "tiny-cpu.json").read_text())
    assert {f.name for f in here.iterdir()} == {
        "tiny-cpu.json",
        "tiny-cpu.csv",
        "tiny-cpu.png",
    }
    assert (
        {"device", "torch", "date"} <= set(out)
        and "random" in out["weights"]
        and "say nothing about a GPU" in out["note"]
    )
    assert out["complete"] and not out["left_out"]
    assert [(x["what"], x["variant"]) for x in out["rows"]] == [
        (c.what, c.variant) for c in cases(R, "aot_eager")
    ]
    assert [
        (x["what"], x["same_bytes"])
        for x in out["agreement"]
        if x["compared"] == "again"
    ] == [("step", True), ("color loss", True)]
    assert max(x["difference"] for x in out["agreement"]) < 1e-4
    assert all(x["fits"] and x["seconds"] >= x["fastest"] > 0 for x in out["rows"])
    assert min(out["flops"].values()) > 0 and out["matmul_flops_per_second"] > 1e8
    t = pd.DataFrame(out["rows"])
    t = t[t.what == "step"]
    best = (
        t[t.whose == "plain loop"].seconds.min() / t[t.whose == "ours"].seconds.iloc[0]
    )
    assert quoted(out)["smallest ratio"]["step"] == pytest.approx(best, abs=0.006)


def test_what_was_measured_before_a_kill_is_on_disk(folders):
    program = (
        "from medart.bundled.benchmarks import benchmark; from medart.recipes.recipe import recipe; "
        'benchmark(recipe("skin",scale="tiny",batch_size=1,solver_steps=2,gen_steps=2),repeats=2)'
    )
    path = folders[1] / "benchmark/tiny-cpu.json"
    run = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 240
    while not path.exists() and run.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    out = json.loads(path.read_text())
    names = [f"{c.what}: {c.variant}" for c in cases(R, "aot_eager")]
    assert (
        not out["complete"]
        and len(out["rows"]) >= 1
        and out["left_out"] == names[len(out["rows"]) :] + ["color loss: agreement"]
    )
    assert set(quoted(out).index) <= {"step", "color loss"}  # what there is can be read


def test_a_case_leaves_the_model_as_it_was():
    model = bench_model(R)
    before = model.predict.__func__
    for c in cases(R, "aot_eager"):
        if (
            "compiled" in c.variant
            or "T5 at each" in c.variant
            or "two passes" in c.variant
        ):
            with c.ready(model, c.r):
                pass
            assert model.predict.__func__ is before and not any(
                m._compiled_call_impl for m in model.transformer.modules()
            ), c.variant


def test_cases_in_two_processes_are_there_when_they_are_asked_for():
    two = [c for c in cases(replace(R, num_processes=2, batch_size=2), "aot_eager")]
    one = [c.variant for c in cases(replace(R, batch_size=2), "aot_eager")]
    more = [c for c in two if c.variant not in one]
    assert [c.what for c in more] == ["step", "step", "color loss", "color loss"]
    assert [c.whose for c in more] == ["ours, but", "plain loop"] * 2
    threads = torch.get_num_threads()
    for case in more[:2]:
        assert time_case(case, bench_model(case.r, "cpu"), 1)["seconds"] > 0
    assert torch.get_num_threads() == threads


def test_a_case_that_does_not_fit_is_written_down():
    def too_much(k):
        raise torch.OutOfMemoryError("no room")

    model = bench_model(R)
    case = replace(
        cases(R, "aot_eager")[0], ready=lambda model, r: nullcontext(too_much)
    )
    row = time_case(case, model, 2)
    assert row["fits"] is False and row["seconds"] is None
    assert (
        row["fault"] == "does not fit into memory"
        and json.loads(json.dumps(row)) == row
    )


def test_another_gradient_does_not_agree():
    model = perturb_loras(bench_model(R))
    whole = model.predict
    calls = []

    def drifting(zt, t, cond):
        calls.append(0)
        return whole(zt, t, cond) * (1 + 1e-3 * len(calls))

    model.predict = drifting
    assert (
        not any(x["same_bytes"] for x in agreement(model, R))
        and min(x["difference"] for x in agreement(model, R)) > 1e-4
    )


def test_a_case_that_fails_is_written_down_too():
    def broken(k):
        raise RuntimeError("no such kernel\nmore about it")

    model = bench_model(R)
    case = replace(cases(R, "aot_eager")[0], ready=lambda model, r: nullcontext(broken))
    row = time_case(case, model, 2)
    assert row["fits"] is False and row["fault"] == "RuntimeError: no such kernel"


def test_warm_up_does_not_count():
    seen = []
    t = timed(seen.append, repeats=3, warmup=2)
    assert seen == [0, 1, 2, 3, 4] and len(t["seconds"]) == 3 and t["memory"] is None


@pytest.mark.parametrize(
    "change", [dict(), dict(checkpoint_all=True)], ids=["as it is", "checkpoint_all"]
)
def test_memory_counted_on_shapes_is_what_the_allocator_gives(change):
    r = replace(R, **change)
    peaks = []
    for device, peak in (("meta", alive_peak), ("cpu", allocated_peak)):
        model = bench_model(r, device)
        b = draw_batch(model, r, bench_set(model, r), 0)
        peaks.append(peak(lambda: one_step(model, r, b)))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


@pytest.mark.parametrize(
    "change",
    [dict(checkpointing=True), dict(checkpointing=False)],
    ids=["checkpointing", "none"],
)
def test_counts_of_few_blocks_continue_to_all(change):
    "Six and three blocks and four solver steps, from two and three blocks and one and two steps."
    r = replace(R, solver_steps=4, **change)
    whole, models = bench_model(r, "meta"), shapes(r)
    b = draw_batch(whole, r, full_captions(bench_set(whole, r)), 0)
    assert continued(alive_peak, one_event, r, models, event=True)(4) == pytest.approx(
        alive_peak(lambda: one_event(whole, r, b)), rel=0.02
    )
    assert continued(alive_peak, one_step, r, models)() == pytest.approx(
        alive_peak(lambda: one_step(whole, r, b)), rel=0.02
    )


def test_memory_measured_on_a_gpu_stands_beside_what_was_computed():
    rows = [
        dict(what="step", whose="ours", variant="ours", settings="", reserved_gb=7.5),
        dict(
            what="step",
            whose="plain loop",
            variant="as documented",
            settings=None,
            reserved_gb=99.0,
        ),
    ]
    t = memory_table(R, dict(rows=rows)).set_index(["what", "settings"])
    assert (
        t.measured["step", ""] == 7.5 and t.measured["color loss", ""] == "not measured"
    )
    both = t[
        ["weights, computed", "optimizer, computed", "made on the way, computed"]
    ].sum(axis=1)
    assert (t["total, computed"] - both).abs().max() < 0.02


def test_a_full_size_step_takes_at_most_4200_kernels():
    "Counted on shapes. It was 7,040; what is fused has to stay fused, on every path of a step."
    r = recipe("skin", scale="paper", batch_size=1, interval=0, cuda_graphs=False)
    models = shapes(r)
    before, fused = (
        continued(count_costs, run, r, models)()
        for run in (_as_libraries_compute, one_step)
    )
    kinds = ["frozen products", "LoRA products", "attention", "others"]
    assert before[kinds].tolist() == pytest.approx([906, 2723, 160, 3251], abs=4)
    assert fused[kinds].sum() <= 4200
    assert fused["LoRA products"] <= 1800 and fused["frozen products"] <= 600
    assert fused.TFLOP == pytest.approx(before.TFLOP, rel=0.01), "the same arithmetic"
    assert fused.GB < 0.9 * before.GB
