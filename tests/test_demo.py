"The demo's order: what begins when, and what a failure stops. Stages are functions here."

import importlib.util
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def demo(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path))
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "run_ahead", lambda: None)
    return module


def adapters(tmp_path):
    note = tmp_path / "skin-tiny" / "medart" / "done.json"
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()
    return note


def test_images_are_generated_while_training_still_draws_figures(
    demo, tmp_path, monkeypatch
):
    order, begun = [], Event()

    def run(name):
        order.append(name)
        if name == "train-skin":
            adapters(tmp_path)
            assert begun.wait(30), "generation waits for the end of the notebook"
        if name == "generate-train-skin":
            begun.set()
        return 0.0

    monkeypatch.setattr(demo, "run", run)
    with ThreadPoolExecutor(2) as pool:
        demo.run_all(pool)
    assert sorted(order) == sorted(demo.STAGES)
    assert order[:3] == ["caption-skin", "train-skin", "generate-train-skin"]
    assert order[-1] == "tables"


def test_adapters_of_an_earlier_run_start_nothing(demo, tmp_path, monkeypatch):
    note, order = adapters(tmp_path), []
    earlier = note.stat().st_mtime_ns

    def run(name):
        if name == "train-skin":
            time.sleep(0.7)  # a look at the note of the earlier run
            os.utime(note, ns=(earlier, earlier + 10**9))
            time.sleep(0.7)
        order.append((name, note.stat().st_mtime_ns == earlier))
        return 0.0

    monkeypatch.setattr(demo, "run", run)
    with ThreadPoolExecutor(2) as pool:
        demo.run_all(pool)
    assert order[:2] == [("caption-skin", True), ("generate-train-skin", False)]


def test_after_a_failure_nothing_is_begun(demo, monkeypatch):
    order = []

    def run(name):
        order.append(name)
        raise ValueError("no captions")

    monkeypatch.setattr(demo, "run", run)
    with ThreadPoolExecutor(2) as pool, pytest.raises(SystemExit, match="no captions"):
        demo.run_all(pool)
    assert order == ["caption-skin"]


def test_two_processes_train_unless_there_are_gpus(demo, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    demo.share_training()
    assert "num_processes" not in demo.command("train-skin")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    demo.share_training()
    assert demo.command("train-skin").endswith("-p num_processes 2")
    assert "num_processes" not in demo.command("generate-skin")
