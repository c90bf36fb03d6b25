"Each speed-up is measured with it and without it, and what does not fit into the time is said."

import runpy
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from medart.bundled import benchmarks
from medart.bundled.benchmark_models import bench_model, bench_set, one_step
from medart.bundled.speedups import PROMISED, comparisons, measure_speedups
from medart.recipes.recipe import recipe
from medart.training.batches import draw_batch
from medart.training.models import is_float8

R = recipe("skin", scale="tiny", batch_size=1, solver_steps=2, gen_steps=2, gen_block=2)
TOOL = str(Path(__file__).parent.parent / "tools/gpu_ranks.py")


def run_tool(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [TOOL, "--scale", "tiny", *options])
    runpy.run_path(TOOL, run_name="__main__")


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    "A folder for outputs; no images are needed."
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path))
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    "One run of each case: what is measured, not how well."

    def once(run, device, repeats, warmup):
        return whole(run, device, 1, 0)

    whole = benchmarks.timed
    monkeypatch.setattr(benchmarks, "timed", once)


def test_the_tool_measures_every_comparison(outputs, quick, monkeypatch, capsys):
    run_tool(monkeypatch)
    here = outputs / "benchmark"
    assert "comparisons" in capsys.readouterr().out
    t = pd.read_csv(here / "speedups-tiny-cpu.csv", keep_default_na=False)
    todo = comparisons(R, "eager")
    assert list(zip(t.change, t.of)) == [(c.change, c.on.what) for c in todo]
    assert set(t.note) == {""}
    on, off = t.with_ms.astype(float), t.without_ms.astype(float)
    assert (on > 0).all() and (off > 0).all()
    assert (t.ratio.astype(float) - off / on).abs().max() < 1e-9
    assert set(t.torch) == {torch.__version__} and t.device[0].startswith("CPU")
    text = (here / "speedups-tiny-cpu.md").read_text()
    assert text.count("\n| ") == len(todo) + 2 and torch.__version__ in text
    assert "say nothing about a GPU" in text


def test_every_promise_is_measured():
    there = {(c.change, c.on.what) for c in comparisons(R, "eager")}
    assert set(PROMISED) <= there


def test_without_time_nothing_is_measured_and_that_is_written(outputs, monkeypatch):
    run_tool(monkeypatch, "--minutes", "0")
    t = pd.read_csv(outputs / "benchmark/speedups-tiny-cpu.csv")
    assert set(t.note) == {"not measured: the minutes were over"}
    assert t.with_ms.isna().all() and t.ratio.isna().all()


def test_a_case_that_is_slow_or_fails_costs_the_others_nothing():
    model = bench_model(R)

    def sleep(k):
        time.sleep(30)

    def fail(k):
        raise ValueError("no such kernel")

    def case(variant, run):
        return replace(
            todo[0].on, variant=variant, ready=lambda model, r: nullcontext(run)
        )

    todo = comparisons(R, "eager")
    fine = case("fine", lambda k: sum(range(1000)))
    pairs = [
        replace(todo[0], on=case("slow", sleep), off=fine),
        replace(todo[0], on=case("broken", fail), off=fine),
        replace(todo[0], on=fine, off=fine),
    ]
    t = measure_speedups(R, model, pairs, seconds=0.2)
    assert t.note[0] == "not measured: took longer than its 0.2 seconds"
    assert t.note[1] == "not measured: no such kernel" and t.note[2] == ""
    assert t.ratio.isna().tolist() == [True, True, False] and t.ratio[2] == 1


def test_channels_last_is_taken_back():
    model = bench_model(R)
    conv = model.vae.decoder.conv_in.weight
    was = conv.stride()
    todo = [c for c in comparisons(R, "eager") if "channels" in c.change]
    for c in todo:
        with c.on.ready(model, c.on.r):
            assert conv.stride() != was and conv.stride(1) == 1
        assert conv.stride() == was
    assert len(todo) == 2


def test_float8_is_taken_back():
    model = bench_model(R)
    c = next(c for c in comparisons(R, "eager") if "FP8" in c.change)
    b = draw_batch(model, R, bench_set(model, R), 0)
    before, want = one_step(model, R, b)
    with c.on.ready(model, c.on.r):
        assert is_float8(model.text_encoder)
        few, _ = one_step(model, R, b)
    after, grads = one_step(model, R, b)
    assert not is_float8(model.text_encoder)
    assert few != before == after and all(map(torch.equal, want, grads))
