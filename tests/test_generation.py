"Painting: the same bytes in one process or two, after a kill or not; captions, prompts, and what is written into each file."

import gc
import subprocess
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from everywhere import replace_everywhere
from medart.evaluation import sample_figures
from medart.method import generation
from medart.training import models
from medart.training import samples as samples_room
from medart.training import sampling_plan
from medart.training import sampling_runs
from medart.core.files import file_hash
from medart.core.randomness import rng
from medart.core.records import read_record, write_record
from medart.data.loading import load_split
from medart.training.trainer import train
from medart.training.adapters import save_adapters
from medart.training.models import load_model
from medart.data.phantoms import write_phantoms
from medart.recipes.datasets import DATASETS
from medart.recipes.methods import METHODS
from medart.recipes.recipe import recipe
from medart.recipes.runs import run_dir, samples_dir
from medart.method.caption_files import captions_for

FEW = dict(
    train=dict.fromkeys(DATASETS["skin"].counts, 3),
    test=dict.fromkeys(DATASETS["skin"].counts, 2),
)


def adapted(r):
    "A run of no steps whose adapters do something all the same."
    train(r)
    model = load_model(r, adapters=run_dir(r))
    for name, p in model.trainable().items():
        p.data.normal_(0, 0.05, generator=rng(0, name))
    save_adapters(model, run_dir(r))
    done = read_record(run_dir(r) / "done.json")
    about = {k: v for k, v in done.items() if k not in ("read", "files", "key", "seal")}
    write_record(run_dir(r) / "done.json", done["read"], done["files"], **about)


@pytest.fixture
def run(folders):
    "A run with adapters, and settings that generate 16 small images in blocks of four."
    write_phantoms("skin", folders[0] / "few", counts=FEW)
    r = recipe(
        "skin", "base", scale="tiny", data="few", gen_count=0, gen_block=4, gen_steps=2
    )
    adapted(r)
    return r


def images_of(r):
    "What lies in the samples folder: name -> hash."
    return {
        str(f.relative_to(samples_dir(r))): file_hash(f)
        for f in samples_dir(r).rglob("*")
        if f.is_file()
    }


def test_three_processes_and_a_kill_make_the_same_bytes(
    run, tmp_path, monkeypatch, ready_python
):
    "One process with three threads and without a break; then two that are killed while they generate, and three that finish their work."
    run, threads = replace(run, gen_block=2), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        sampling_runs.generate(run)
    finally:
        torch.set_num_threads(threads)
    want = images_of(run)
    assert len(want) == 16 + 2

    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path / "two"))
    adapted(run)
    others = set(psutil.Process().children())  # such as a server of kernels
    with ThreadPoolExecutor(1) as pool:
        job, end = (
            pool.submit(sampling_runs.generate_in, 2, run),
            time.monotonic() + 300,
        )
        while len(list(samples_dir(run).rglob("*.png"))) < 3:
            assert not job.done() and time.monotonic() < end, (
                "the run should be killed while it generates"
            )
            time.sleep(0.02)
        family = [
            process
            for child in set(psutil.Process().children()) - others
            for process in [child, *child.children(recursive=True)]
        ]
        for process in family:
            process.kill()
        with pytest.raises(subprocess.CalledProcessError):
            job.result()
    psutil.wait_procs(family)
    left = {
        f: f.stat().st_mtime_ns
        for f in samples_dir(run).rglob("*.png")
        if not f.name.startswith(".")
    }
    assert 3 <= len(left) < 16 and not (samples_dir(run) / "metadata.csv").exists()
    for f in left:
        Image.open(f).load()
    sampling_runs.generate_in(3, run)
    got = {k: v for k, v in images_of(run).items() if not Path(k).name.startswith(".")}
    assert got == want
    full = {f for f in left if sum(g in left for g in block_of(run, f)) == 2}
    assert {f: f.stat().st_mtime_ns for f in full} == {f: left[f] for f in full}, (
        "a block that was generated is not generated again"
    )


def block_of(r, file):
    "Files of the block of two that a file belongs to."
    m = pd.read_csv(samples_dir(r) / "metadata.csv").file_name.tolist()
    k = m.index(str(file.relative_to(samples_dir(r)))) // 2 * 2
    return [samples_dir(r) / f for f in m[k : k + 2]]


def test_only_what_is_missing_is_generated(run, monkeypatch):
    sampling_runs.generate(run)
    want, sample, blocks = images_of(run), generation.sample_images, []
    replace_everywhere(
        monkeypatch,
        sample_figures.sample_images,
        lambda m, r, c, i: blocks.append(list(i)) or sample(m, r, c, i),
    )
    sampling_runs.generate(run)
    assert not blocks
    gone = (
        samples_dir(run) / pd.read_csv(samples_dir(run) / "metadata.csv").file_name[5]
    )
    gone.unlink()
    sampling_runs.generate(run)
    assert blocks == [[4, 5, 6, 7]] and images_of(run) == want


def test_text_is_encoded_once_and_t5_is_let_go_before_generating(run, monkeypatch):
    load, sample, seen = models.load_model, generation.sample_images, {}

    def loading(*a, **k):
        model = load(*a, **k)
        encode = model.text_encoder.forward
        seen["t5"], seen["calls"] = weakref.ref(model.text_encoder), 0

        def counted(*a, **k):
            seen["calls"] += 1
            return encode(*a, **k)

        model.text_encoder.forward = counted
        return model

    def sampling(model, *a):
        del model.text_encoder
        gc.collect()
        seen.setdefault("alive", seen["t5"]() is not None)
        model.text_encoder = None
        return sample(model, *a)

    replace_everywhere(monkeypatch, sample_figures.load_model, loading)
    replace_everywhere(
        monkeypatch, sample_figures.merge_loras, lambda m: m
    )  # merging frees the wrapped network: here only letting go counts
    replace_everywhere(monkeypatch, sample_figures.sample_images, sampling)
    sampling_runs.generate(run)
    assert seen["alive"] is False and seen["calls"] > 0


def test_a_file_says_what_it_is(run):
    sampling_runs.generate(run)
    m = pd.read_csv(samples_dir(run) / "metadata.csv")
    test = load_split(run, "test")
    assert m.text.tolist() == list(captions_for(run, "test").texts) and m[
        "class"
    ].tolist() == list(test.classes)
    with Image.open(samples_dir(run) / m.file_name[3]) as im:
        assert im.size == (64, 64)
        said = im.text
    assert (
        said["caption"] == m.text[3]
        and said["seed"] == "0"
        and said["index"] == "3"
        and said["model"] == run.model
        and said["method"] == "base"
    )
    assert len(said["recipe"]) == 16 and "not for diagnosis" in said["note"]


@pytest.mark.parametrize("split,n", [("test", 16), ("train", 24), ("sample", 16)])
def test_whose_captions(run, split, n):
    r = replace(run, gen_split=split)
    plan, train_, test = (
        sampling_plan.sampling_plan(r),
        captions_for(r, "train"),
        captions_for(r, "test"),
    )
    assert len(plan) == n and len(set(plan.index)) == n
    if split == "sample":
        assert plan.classes == test.classes and plan.texts != test.texts
        assert len(set(plan.texts)) > len(set(plan.classes)), (
            "captions are drawn without repetition"
        )
        own = {
            c: [t for t, d in zip(train_.texts, train_.classes) if d == c]
            for c in set(plan.classes)
        }
        assert all(t in own[c] for t, c in zip(plan.texts, plan.classes))
        assert sampling_plan.sampling_plan(replace(r, seed=1)).texts != plan.texts
    else:
        assert plan.texts == (train_ if split == "train" else test).texts
    some = sampling_plan.sampling_plan(replace(r, gen_count=n // 2))
    assert len(some) == 8 * round(n / 16) and set(some.classes) == set(plan.classes)


def test_prompts_of_ones_own(run, tmp_path, monkeypatch):
    folder = sampling_runs.generate(run, "a red circle on a blue background")
    x, m = samples_room.load_samples(folder)
    assert (
        len(x) == 1
        and folder != samples_dir(run)
        and m.text[0] == "a red circle on a blue background"
    )
    (tmp_path / "five.txt").write_text(
        "a red circle on a blue background\n\na green star\na blue patch\na white square\na red oval\n"
    )
    five = sampling_runs.generate(run, str(tmp_path / "five.txt"))
    y, m = samples_room.load_samples(five)
    assert len(y) == 5 and (y[0] == x[0]).all(), (
        "an image depends on its caption, seed and place alone"
    )
    assert len(sample_figures.samples_sheet(five).axes) == 5
    pd.DataFrame(dict(text=["a green star"])).to_csv(tmp_path / "one.csv", index=False)
    assert sampling_plan.prompt_plan(str(tmp_path / "one.csv")).texts == (
        "a green star",
    )
    (tmp_path / "none.txt").write_text("\n \n")
    for prompts, says in (
        (str(tmp_path / "none.txt"), "holds no prompt"),
        ("missing.csv", "does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            sampling_runs.generate(run, prompts)


def test_changed_adapters_change_the_images(run):
    "Those that training has not written are refused; those of another training are generated with, and the images before are kept."
    sampling_runs.generate(run)
    before = images_of(run)
    file = run_dir(run) / "transformer_lora" / "adapter_model.safetensors"
    save_file(
        {
            k: v
            + 0.05
            * torch.randn(v.shape, generator=torch.Generator().manual_seed(len(k)))
            for k, v in load_file(file).items()
        },
        file,
        metadata=dict(format="pt"),
    )
    with pytest.raises(
        ValueError,
        match="transformer_lora/adapter_model.safetensors is not the file that was written.*train.ipynb",
    ):
        sampling_runs.generate(run)
    assert images_of(run) == before
    done = read_record(run_dir(run) / "done.json")
    write_record(run_dir(run) / "done.json", done["read"], done["files"])
    sampling_runs.generate(run)
    after = images_of(run)
    assert before.keys() == after.keys() and all(
        before[k] != after[k] for k in before if k.endswith(".png")
    )
    kept = run_dir(run) / "set-aside" / samples_dir(run).name
    assert {
        str(f.relative_to(kept)): file_hash(f) for f in kept.rglob("*") if f.is_file()
    } == before


def test_nothing_trained_nothing_generated(folders):
    write_phantoms("skin", folders[0] / "few", counts=FEW)
    r = recipe("skin", "dora", scale="tiny", data="few", seed=2)
    with pytest.raises(
        FileNotFoundError,
        match=r"Train first: papermill nbs/train.ipynb .* -p method dora -p scale tiny .*-p seed 2",
    ):
        sampling_runs.generate(r)
    assert "base" in METHODS
    with pytest.raises(ValueError, match="it takes 1 to"):
        sampling_runs.generate_in(0, r)


def test_images_that_are_not_there_are_named(tmp_path):
    from medart.evaluation.image_sets import generated_images

    table = "file_name,text,class,seed,index\na/00000.png,x,a,0,0\n"
    cases = {
        None: "no metadata.csv",
        "": "empty or damaged",
        "file_name,text\n": "empty or damaged",
        "\x00\xff": "empty or damaged",
        table.splitlines()[0] + "\n": "empty or damaged",
        table: "1 images named in .* are missing, a/00000.png first",
    }
    for text, says in cases.items():
        if text is not None:
            (tmp_path / "metadata.csv").write_text(text)
        for read in (
            samples_room.load_samples,
            sample_figures.samples_sheet,
            lambda folder: generated_images(folder, 64),
        ):
            with pytest.raises(
                (FileNotFoundError, ValueError), match=says + "(?s:.*)run generate"
            ):
                read(tmp_path)
