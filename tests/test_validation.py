"Looking on while a model trains changes nothing of it; batches that make one update together are one batch."

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from medart.training.batches import draw_batch, images_per_update, training_set
from medart.training.logs import loss_figure
from medart.training.runs import total_steps
from medart.training.step import color_gradients, noise_gradients
from medart.training.trainer import train
from medart.training.validation import validation_batches, round_robin, validation_loss
from medart.method.lora import perturb_loras
from medart.training.models import load_model
from medart.recipes.parameters import command
from medart.recipes.recipe import recipe
from medart.recipes.runs import load_recipe, recipe_hash, run_dir, save_recipe
from medart.method.caption_files import captions_for

SMALL = dict(
    scale="tiny",
    data="made",
    epochs=1.0,
    batch_size=2,
    interval=3,
    solver_steps=2,
    checkpoint_every=1,
    log_every=2,
    sample_every=2,
)


@pytest.fixture
def small(made):
    return lambda **k: recipe("skin", **(SMALL | k))


def test_what_is_looked_at_does_not_change_what_is_learned(small, folders, monkeypatch):
    adapters = lambda r: {
        f.parent.name: f.read_bytes() for f in run_dir(r).glob("*_lora/*.safetensors")
    }
    train(small())
    want, plain = adapters(small()), pd.read_csv(run_dir(small()) / "losses.csv")
    monkeypatch.setenv("MEDART_OUTPUTS", str(folders[1] / "looked"))
    (folders[1] / "mine.txt").write_text("a red circle\na blue star\na green patch\n")
    r = small(
        validation_images=3,
        validation_prompts=str(folders[1] / "mine.txt"),
        tracker="tensorboard",
    )
    assert (
        recipe_hash(r) == recipe_hash(small())
        and run_dir(r).name == run_dir(small()).name
    )
    train(r, stop_after=3)
    train(r)
    assert len(want) == 2 and adapters(r) == want
    d = pd.read_csv(run_dir(r) / "losses.csv")
    assert "validation" not in plain and d[plain.columns].equals(plain)
    assert d.validation.notna().tolist() == [False, True, False, True]
    assert "held-out images" in str(
        [t.get_text() for a in loss_figure(r).axes for t in a.texts]
        + [
            t.get_text()
            for a in loss_figure(r).axes
            if a.get_legend()
            for t in a.get_legend().get_texts()
        ]
    )
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(run_dir(r).rglob("events.out*")).parent))
    events.Reload()
    assert (
        "samples" in events.Tags()["images"]
        and "validation" in events.Tags()["scalars"]
    )
    grids = [
        Image.open(out / "grids" / "step-0000004.png").size
        for out in (run_dir(r), folders[1] / "skin-tiny" / run_dir(r).name)
    ]
    assert grids[0][0] == grids[1][0] and grids[0][1] > 2 * grids[1][1]


def test_the_validation_loss_is_the_same_for_the_same_weights(small):
    r = small(validation_images=4, dtype="float64")
    model = perturb_loras(load_model(r))
    batches = validation_batches(model, r)
    assert [len(b.texts) for b in batches] == [2, 2]
    first = validation_loss(model, r, batches)
    torch.manual_seed(5)
    assert (
        validation_loss(model, r, validation_batches(model, r)) == first
        and first.isfinite()
    )
    other = recipe(
        "skin", **(SMALL | dict(validation_images=4, dtype="float64", batch_size=3))
    )
    assert (
        abs(validation_loss(model, other, validation_batches(model, other)) / first - 1)
        < 1e-9
    )
    t = torch.cat([b.t for b in batches])
    assert sorted(t.tolist()) == [125, 375, 625, 875]


def test_held_out_images_are_of_all_classes():
    assert round_robin(["a"] * 5 + ["b"] * 5 + ["c"], 5) == [0, 5, 10, 1, 6]


def test_own_prompts_are_checked_before_training(small, folders):
    with pytest.raises(
        FileNotFoundError,
        match="validation_prompts='nowhere.txt' names a file that does not exist",
    ):
        train(small(validation_prompts="nowhere.txt"))
    with pytest.raises(ValueError, match="sample_every=0 is never"):
        small(sample_every=0, validation_images=2)


def test_the_path_of_prompts_stays_on_this_machine(small, folders):
    path = folders[1] / "secret place" / "mine.txt"
    path.parent.mkdir()
    path.write_text("a red circle\n")
    r = small(validation_prompts=str(path))
    save_recipe(r, folders[1] / "kept")
    assert "secret place" not in (folders[1] / "kept" / "config.json").read_text()
    assert load_recipe(folders[1] / "kept") == r
    assert "mine.txt" in command(r, "train")
    words = small(validation_prompts="a red circle")
    save_recipe(words, folders[1] / "words")
    assert (
        json.loads((folders[1] / "words" / "config.json").read_text())[
            "validation_prompts"
        ]
        == "a red circle"
    )


@pytest.mark.parametrize(
    "change",
    [dict(), dict(crop="random", caption_dropout=0.3, min_snr=5.0)],
    ids=["plain", "changed"],
)
def test_accumulated_gradients_are_those_of_the_large_batch(small, change):
    large = small(batch_size=4, dtype="float64", **change)
    parts = small(batch_size=1, accumulate=4, dtype="float64", **change)
    assert (
        images_per_update(large) == images_per_update(parts) == 4
        and total_steps(large, 8) == total_steps(parts, 8) == 2
    )
    model = perturb_loras(load_model(large))
    params = list(model.trainable().values())
    got = []
    for r in (large, parts):
        b = draw_batch(model, r, training_set(model, r, captions_for(r, "train")), 1)
        loss, noise = noise_gradients(model, r, b, params)
        color, more = color_gradients(model, r, b, params)
        got.append((loss, color, noise, more))
    (l0, c0, n0, m0), (l1, c1, n1, m1) = got
    assert abs(l1 / l0 - 1) < 1e-10 and abs(c1 / c0 - 1) < 1e-10
    for a, b in zip([*n0, *m0], [*n1, *m1]):
        assert (a - b).norm() <= 1e-8 * a.norm() + 1e-12
    assert sum(float(a.norm()) for a in n0) > 0 and sum(float(a.norm()) for a in m0) > 0


def test_accumulated_training_counts_updates_and_continues(small, folders, monkeypatch):
    r = small(batch_size=1, accumulate=2, interval=2)
    assert "accumulate=2" in run_dir(r).name
    adapters = lambda: {
        f.parent.name: f.read_bytes() for f in run_dir(r).glob("*_lora/*.safetensors")
    }
    train(r)
    want = adapters()
    d = pd.read_csv(run_dir(r) / "losses.csv")
    assert d.step.tolist() == [1, 2, 3, 4] and d.color.notna().tolist() == [
        False,
        True,
        False,
        True,
    ]
    monkeypatch.setenv("MEDART_OUTPUTS", str(folders[1] / "again"))
    train(r, stop_after=3)
    train(r)
    assert adapters() == want
    assert Path(run_dir(r) / "grids" / "step-0000004.png").exists()


def test_no_batches_at_all_are_refused():
    with pytest.raises(ValueError, match="accumulate=0 must be 1 or more"):
        recipe("skin", scale="tiny", accumulate=0)
