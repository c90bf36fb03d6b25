"Recipes: what is laid over what, how values are read, and what exercises answer."

from dataclasses import fields

import pytest

from medart.recipes.datasets import DATASETS, dataset_of
from medart.recipes.describe import _FIRST, describe
from medart.recipes.labels import class_folder, label_key
from medart.recipes.parameters import method_recipe_from, recipe_from
from medart.recipes.recipe import recipe
from medart.recipes.settings import Recipe, settings
from medart.recipes.values import count_of, typed_value

KNOWN = {f.name: f for f in fields(Recipe)}


@pytest.mark.parametrize(
    "setting, told, value",
    [
        ("rank", "8", 8),
        ("rank", 8.0, 8),
        ("epochs", 2, 2.0),
        ("epochs", -0.0, 0.0),
        ("compile", "true", True),
        ("lr_text", "None", None),
        ("text_targets", "q, k", ("q", "k")),
    ],
)
def test_a_value_is_read_as_its_settings_type(setting, told, value):
    read = typed_value(KNOWN[setting], told)
    assert repr(read) == repr(value)


@pytest.mark.parametrize(
    "setting, told",
    [
        ("rank", True),
        ("rank", "1_0"),
        ("seed", 1.5),
        ("lr", "fast"),
        ("lr", "1_0"),
        ("lr_text", float("nan")),
        ("lr", float("inf")),
        ("compile", 1),
        ("text_targets", [1, 2]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(setting, told):
    with pytest.raises(ValueError, match=f"setting {setting}="):
        typed_value(KNOWN[setting], told)


def test_more_steps_back_than_there_are_is_refused():
    with pytest.raises(ValueError, match="solver_steps=20"):
        recipe("skin", scale="tiny", backprop_last_k=21)


def test_counts_come_from_text_and_whole_floats():
    assert count_of("workers", "2") == count_of("workers", 2.0) == 2


def test_the_papers_classes_are_folders_already():
    names = [name for d in DATASETS.values() for name in d.counts]
    assert [class_folder(name) for name in names] == names
    assert len(set(map(label_key, names))) == len(names)


def test_a_data_set_of_ones_own_outranks_the_scale(tmp_path):
    (tmp_path / "dataset.yaml").write_text(
        "modality: fundus\nfeatures: specific color and vessels\n"
        "categories: {0: healthy retina, 3: severe retinopathy}\ninterval: 20\n"
    )
    own = recipe("fundus", scale="tiny", data=str(tmp_path))
    labels = {"0": "healthy_retina", "3": "severe_retinopathy"}
    assert dataset_of(own).labels == labels
    assert (own.interval, own.epochs) == (20, 6)
    assert own.extractor == own.classifier == "efficientnet-lite0"
    (tmp_path / "dataset.yaml").write_text("modality: fundus\nfeature: color\n")
    with pytest.raises(ValueError, match="Did you mean 'features'"):
        recipe("fundus", scale="tiny", data=str(tmp_path))


def test_a_caller_outranks_a_notebook():
    asked = dict(dataset="skin", scale="tiny")
    assert recipe_from(asked, method="dora") == recipe("skin", "dora", scale="tiny")


def test_what_makes_a_method_stays_at_each_scale():
    asked = dict(dataset="skin", scale="tiny", epochs=2.0)
    made = [
        method_recipe_from(asked, method="fast_dit", scale=s).epochs
        for s in ("tiny", "paper")
    ]
    assert made == [60.0, 2.0]


def test_every_setting_belongs_to_one_stage():
    r = recipe("skin", scale="tiny")
    stages = ("train", "caption", "generate", "evaluate", "classify", "runtime")
    parts = [set(settings(r, stage)) for stage in stages]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(fields(Recipe))


def test_a_description_begins_with_what_decides_most():
    top = describe(recipe("skin", scale="tiny", seed=1)).top.index
    assert {*_FIRST, "seed", "interval"} <= set(top)
