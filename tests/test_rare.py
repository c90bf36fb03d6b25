"Rare classes: seen as often as the others, generated as often as asked for, and counted in whole images."

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from everywhere import replace_everywhere
from medart.core import randomness
from medart.evaluation import sample_figures
from medart.method import caption_files
from medart.evaluation.classification import synthetic_recipe
from medart.core.randomness import np_rng
from medart.training.samples import samples_fault
from medart.training.sampling_plan import sampling_plan
from medart.training.sampling_runs import generate
from medart.training.batches import batch_indices, epoch_permutation
from medart.training.trainer import train
from medart.recipes.recipe import recipe
from medart.recipes.runs import classifier_dir, run_dir, samples_dir

SMALL = dict(
    scale="tiny",
    data="made",
    epochs=1.0,
    batch_size=2,
    interval=3,
    solver_steps=2,
    checkpoint_every=1,
    log_every=1,
    sample_every=0,
    gen_steps=2,
    gen_block=4,
    gen_count=0,
)
MEMBERS = dict(rare=[3, 11], common=[0, 1, 2, 4, 5, 6, 7, 8, 9, 10], other=[12, 13, 14])


@pytest.fixture
def small(made):
    return lambda **k: recipe("skin", **(SMALL | k))


def test_by_default_every_image_is_drawn_as_it_always_was():
    r = recipe("skin", scale="tiny", batch_size=3, seed=5)
    for step in range(40):
        places = range(step * 3, step * 3 + 3)
        assert batch_indices(r, 7, step) == [
            int(np_rng(5, "order", p // 7).permutation(7)[p % 7]) for p in places
        ]


def test_a_permutation_is_drawn_once_a_pass(monkeypatch):
    drawn = []
    replace_everywhere(
        monkeypatch, randomness.np_rng, lambda *a: drawn.append(a) or np_rng(*a)
    )
    r = recipe("skin", scale="tiny", batch_size=4, seed=71)
    for step in range(50):
        batch_indices(r, 100, step)
    assert len(drawn) == 2
    assert (
        epoch_permutation(71, "order", 100, 1).tolist()
        == np_rng(71, "order", 1).permutation(100).tolist()
    )


def test_balanced_classes_take_turns_and_so_do_their_images():
    r = recipe("skin", scale="tiny", batch_size=5, sampling="balanced")
    seen = [i for step in range(36) for i in batch_indices(r, 15, step, MEMBERS)]
    name = {i: c for c, ids in MEMBERS.items() for i in ids}
    for k in range(0, 180, 3):
        assert {name[i] for i in seen[k : k + 3]} == set(MEMBERS)
    times = Counter(seen)
    assert {i: times[i] for i in range(15)} == {
        i: 60 // len(MEMBERS[name[i]]) for i in range(15)
    }
    assert [name[i] for i in seen[:30]] != [name[i] for i in seen[30:60]]


def test_a_balanced_step_depends_on_its_number_alone():
    r = recipe("skin", scale="tiny", batch_size=4, sampling="balanced")
    forth = [batch_indices(r, 15, s, MEMBERS) for s in range(30)]
    assert [batch_indices(r, 15, s, MEMBERS) for s in reversed(range(30))] == forth[
        ::-1
    ]


def test_balanced_training_that_was_stopped_ends_the_same(small, folders, monkeypatch):
    r = small(sampling="balanced")
    assert "sampling=balanced" in run_dir(r).name
    adapters = lambda: {
        f.parent.name: f.read_bytes() for f in run_dir(r).glob("*_lora/*.safetensors")
    }
    train(r)
    want = adapters()
    monkeypatch.setenv("MEDART_OUTPUTS", str(folders[1] / "again"))
    train(r, stop_after=1)
    train(r, stop_after=3)
    train(r)
    assert len(want) == 2 and adapters() == want


def test_an_unknown_sampling_is_refused():
    with pytest.raises(
        ValueError, match="sampling 'balance' is unknown.*Did you mean 'balanced'"
    ):
        recipe("skin", scale="tiny", sampling="balance")


@pytest.mark.parametrize("split", ["test", "train", "sample"])
@pytest.mark.parametrize("many", [1, 3, 11])
def test_as_many_images_of_each_class_as_asked_for(small, split, many):
    plan = sampling_plan(small(gen_split=split, per_class=many))
    assert (
        set(Counter(plan.classes).values()) == {many}
        and len(Counter(plan.classes)) == 2
    )
    assert len(set(plan.index)) == len(plan)
    whole = sampling_plan(small(gen_split=split))
    first = set(zip(whole.index, whole.classes, whole.texts))
    mine = set(zip(plan.index, plan.classes, plan.texts))
    assert len(first & mine) == sum(
        min(many, n) for n in Counter(whole.classes).values()
    )
    more = sampling_plan(small(gen_split=split, per_class=many + 4))
    assert mine < set(zip(more.index, more.classes, more.texts))


def test_captions_are_used_again_only_when_all_were_used(small, monkeypatch):

    captions = caption_files.captions_for
    distinct = lambda s: replace(
        s, texts=tuple(f"{c} {i}" for i, c in enumerate(s.classes))
    )
    replace_everywhere(
        monkeypatch, sample_figures.captions_for, lambda *a: distinct(captions(*a))
    )
    for split, own in (("train", 4), ("test", 2), ("sample", 4)):
        plan = sampling_plan(small(gen_split=split, per_class=3 * own))
        assert set(Counter(plan.texts).values()) == {3}
        longer = sampling_plan(small(gen_split=split, per_class=3 * own + 1))
        assert sorted(Counter(longer.texts).values())[-3:] == [3, 4, 4]


def test_images_of_each_class_are_generated_kept_and_extended(small, capsys):
    r = small(per_class=3)
    train(r)
    out = generate(r)
    m = pd.read_csv(out / "metadata.csv")
    assert m["class"].value_counts().tolist() == [3, 3] and m.file_name.is_unique
    assert samples_fault(r) == ""
    bytes_of = lambda folder, names: [(folder / n).read_bytes() for n in names]
    generated = bytes_of(out, m.file_name)
    assert len(set(generated)) == 6
    (out / m.file_name[4]).unlink()
    generate(r)
    assert bytes_of(out, m.file_name) == generated
    assert samples_dir(r) != samples_dir(small()) and classifier_dir(
        r
    ) == classifier_dir(small())
    assert synthetic_recipe(r) == synthetic_recipe(small())


def test_negative_numbers_of_images_are_refused():
    with pytest.raises(ValueError, match="per_class=-1"):
        recipe("skin", scale="tiny", per_class=-1)


def test_a_class_of_few_images_says_what_cannot_be_said_of_it():
    from medart.evaluation.classes import class_table
    from medart.evaluation.features import Features
    from medart.evaluation.image_stats import ImageStats
    from medart.evaluation.uncertainty import plan_real_baseline

    classes = ("a",) * 12 + ("b",) * 3 + ("c",)

    def seen(seed):
        f = np.random.default_rng(seed).normal(size=(16, 4))
        return ImageStats(Features(f, None), None, None, f[:, 0], classes)

    test, train, gen = map(seen, range(3))
    t = class_table(
        gen, test, train, plan_real_baseline(classes, classes, classes), ()
    ).set_index("class")
    assert t.n_floor.tolist() == [12, 3, 1]
    assert t.frechet_floor.notna().tolist() == [True, False, False]
    assert t.kid_floor.notna().tolist() == [True, True, False]
    assert (
        t.note["a"] == ""
        and "3 of 5 images" in t.note["b"]
        and "no floor" in t.note["c"]
        and "no KID" in t.note["c"]
    )


def test_generated_and_repeated_images_are_added_in_equal_numbers(small):
    from medart.workflows.rare_classes import (
        class_recalls,
        rare_counts,
        rare_gains,
        rare_recalls,
        rare_sets,
    )

    r = small(gen_split="train", per_class=3, classifier_epochs=1, classifier_batch=8)
    train(r)
    generate(r)
    arms, test, classes = rare_sets(r, ("melanoma",))
    assert {k: len(s) for k, s in arms.items()} == dict(
        real=8, repeated=11, generated=11
    )
    added = arms["repeated"].x[8:]
    own = arms["real"].x[arms["real"].y == classes.index("melanoma")]
    assert (added == own[:3]).all() and (
        arms["generated"].y[8:] == classes.index("melanoma")
    ).all()
    t = rare_recalls(r, ("melanoma",), (0, 1))
    assert len(t) == 3 * 2 * 2 and set(t.updates) == {2}
    gains = rare_gains(t)
    assert set(zip(gains.arm, gains.against)) == {
        ("generated", "real"),
        ("generated", "repeated"),
        ("repeated", "real"),
    }
    assert ((gains.low <= gains["mean"]) & (gains["mean"] <= gains.high)).all()
    perfect = [[float(c == i) for i in range(len(classes))] for c in test.y.tolist()]
    assert set(class_recalls(test, np.array(perfect), classes).values()) == {1.0}
    with pytest.raises(ValueError, match="must name classes of skin"):
        rare_counts("skin", ("mole",))
