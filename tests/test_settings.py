"Folders, file modes and names: settings and paths mean one thing wherever they are written."

import ast
import importlib
import os
import shlex
import signal
import stat
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from papermill.cli import _resolve_type
from PIL import Image

from medart.core import progress
from medart.recipes import scales
from medart.core.files import save_pretrained
from medart.core.paths import data_dir, file_word, outputs_dir, root, short_name
from medart.training.sampling_plan import class_shares
from medart.training.sampling_runs import generate_in
from medart.training.trainer import train
from medart.method.model import check_size_and_steps
from medart.training.models import load_model
from medart.core.locations import locate
from medart.recipes.describe import describe
from medart.recipes.methods import PROFILES
from medart.recipes.parameters import (
    command,
    recipe_from,
    recipe_from_line,
    method_recipe_from,
)
from medart.recipes.recipe import recipe
from medart.recipes.runs import (
    captions_dir,
    load_recipe,
    recipe_hash,
    run_dir,
    samples_dir,
    save_recipe,
)
from medart.recipes.scales import detect_scale
from medart.recipes.settings import Recipe
from medart.recipes.values import seeds_of
from medart.evaluation.prompt_figures import prompts_figure
from medart.workflows.reproduce import reproduce
from medart.core.weight_files import weights_key

ROOT = Path(__file__).resolve().parent.parent


# Where things live


def project(folder, text):
    "A folder with a settings.ini and notebooks, as nbdev lays them out."
    (folder / "nbs").mkdir(parents=True)
    (folder / "settings.ini").write_text(text)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "[DEFAULT]\n",
        "[DEFAULT]\nlib_name = course\n",
        "lib_name = medart2\n",
        "# lib_name = medart\n",
        "[DEFAULT]\nlib_name = %(lib)s\nlib_name = twice\n",
        "\x00\xff",
    ],
)
def test_another_projects_settings_do_not_count(tmp_path, monkeypatch, text):
    other = project(tmp_path / "other", text)
    monkeypatch.chdir(other / "nbs")
    assert root() == ROOT


def test_the_nearest_clone_counts(tmp_path, monkeypatch):
    outer = project(tmp_path / "outer", "[DEFAULT]\nlib_name = medart\n")
    inner = project(outer / "copies" / "inner", "[DEFAULT]\nlib_name=medart\n")
    monkeypatch.chdir(inner / "nbs")
    assert root() == inner
    monkeypatch.chdir(outer / "copies")
    assert root() == outer


def test_a_folder_named_settings_ini_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").mkdir()
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert root() == ROOT


@pytest.mark.parametrize(
    "variable, folder", [("MEDART_DATA", data_dir), ("MEDART_OUTPUTS", outputs_dir)]
)
def test_folders_from_the_environment(tmp_path, monkeypatch, variable, folder):
    plain = folder is data_dir and ROOT / "data" or ROOT / "outputs"
    monkeypatch.setenv("HOME", str(tmp_path))
    cases = {
        "": plain,
        "  ": plain,
        "~": tmp_path,
        "~/deep/er": tmp_path / "deep/er",
        "rel/a": ROOT / "rel/a",
        str(tmp_path / "x"): tmp_path / "x",
    }
    for text, wanted in cases.items():
        monkeypatch.setenv(variable, text)
        assert folder() == wanted
        monkeypatch.chdir(ROOT / "nbs")  # as JupyterLab does: the folder stays the same
        assert folder() == wanted
        monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("tail", ["", "/below", "/below/deeper"])
def test_a_file_in_place_of_a_folder_is_refused(tmp_path, monkeypatch, tail):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDART_OUTPUTS", f"{tmp_path}/file{tail}")
    with pytest.raises(NotADirectoryError, match="MEDART_OUTPUTS.*is a file"):
        outputs_dir()


def test_an_unknown_home_is_refused(monkeypatch):
    monkeypatch.setenv("MEDART_DATA", "~nobody-of-this-name/images")
    with pytest.raises(ValueError, match="MEDART_DATA"):
        data_dir()


# Names

WORDS = [
    "a",
    "A",
    "a-b",
    "a/b",
    "a:b",
    "a<b",
    "a b",
    "a\\b",
    "ä",
    "a\u0308",
    "",
    ".",
    "..",
    "a.",
    "x" * 300,
    "x" * 301,
    "con/",
    "None",
    "1",
    "True",
    "a~b",
    "a+b=c",
]


def test_words_for_file_names_tell_all_texts_apart():
    made = [file_word(text) for text in WORDS]
    assert len({word.casefold() for word in made}) == len(WORDS)
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._,-~")
    assert all(word and set(word) <= allowed and len(word) < 60 for word in made)


def test_long_names_are_cut_and_stay_apart():
    long = "+lr=0.1" * 40
    assert len(short_name(long)) == 120
    assert short_name(long + "a") != short_name(long + "b") != short_name(long)
    assert short_name("+lr=0.1") == "+lr=0.1"


# File modes


@pytest.mark.parametrize(
    "umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)]
)
def test_saved_weights_have_the_umasks_mode(tmp_path, umask, mode):
    from transformers import T5Config, T5EncoderModel

    small = T5EncoderModel(
        T5Config(vocab_size=8, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    )
    before = os.umask(umask)
    try:
        save_pretrained(small, tmp_path / "t5")
    finally:
        os.umask(before)
    modes = {
        f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "t5").iterdir()
    }
    assert set(modes.values()) == {mode}, modes


def test_nothing_is_saved_but_through_the_helper():
    "The libraries' own save_file and save_pretrained write for the owner alone."
    for module in sorted((ROOT / "medart").glob("*.py")):
        text = module.read_text(encoding="utf-8")
        own = 1 if module.stem == "core" else 0
        assert text.count(".save_pretrained(") == own, module.name
        assert "save_file(" not in text, module.name


# Paths that are settings


@pytest.fixture
def fund(folders, monkeypatch):
    "A data set of one's own in data/fund, and a working directory beside data/."
    (folders[0] / "fund" / "a").mkdir(parents=True)
    (folders[0] / "fund" / "dataset.yaml").write_text(
        "modality: fundus\nfeatures: color, shape\ncategories: [a, b]\n"
    )
    monkeypatch.chdir(folders[0].parent)
    return folders[0] / "fund"


def own(data, **changes):
    return recipe("fund", scale="tiny", data=data, **changes)


def test_a_folder_of_images_is_one_run_however_it_is_written(
    fund, tmp_path, monkeypatch
):
    (tmp_path / "link").symlink_to(fund)
    (fund.parent / "alias").symlink_to(fund)
    monkeypatch.setenv("HOME", str(tmp_path))
    ways = [
        "fund",
        "./fund",
        "fund/",
        "fund//",
        "x/../fund",
        str(fund),
        f"{fund}/.",
        "data/fund",
        "./data/fund/",
        str(tmp_path / "link"),
        "link",
        "alias",
        "~/link",
        "~/data/fund",
        fund,
        " fund ",
    ]
    recipes = [own(way) for way in ways]
    assert {r.data for r in recipes} == {"fund"}
    assert (
        len({run_dir(r) for r in recipes})
        == len({recipe_hash(r) for r in recipes})
        == 1
    )


def test_a_folder_elsewhere_is_one_run_however_it_is_written(
    fund, tmp_path, monkeypatch
):
    far = tmp_path / "far" / "images"
    far.parent.mkdir()
    fund.rename(far)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(far.parent)
    ways = ["images", "./images/", str(far), "~/far/images", "../far/images"]
    assert {own(way).data for way in ways} == {str(far)}
    monkeypatch.chdir(far)
    with pytest.raises(ValueError, match="two folders"):  # data/ itself, or this one?
        own(".")


def test_data_linked_into_the_data_folder_is_named_from_there(fund, tmp_path):
    big = tmp_path / "big disk"
    big.mkdir()
    fund.rename(big / "fund")
    fund.symlink_to(big / "fund")
    assert own("fund").data == own(str(big / "fund")).data == "fund"


def test_a_folder_of_two_meanings_is_refused(fund, tmp_path):
    (tmp_path / "fund").mkdir()
    with pytest.raises(ValueError) as e:
        own("fund")
    assert str(fund) in str(e.value) and str(tmp_path / "fund") in str(e.value)
    assert own(str(fund)).data == "fund"
    run_dir(own(str(fund)))  # what has been settled is not asked again


def test_a_file_is_no_folder_of_images(fund):
    with pytest.raises(NotADirectoryError, match="dataset.yaml"):
        own("fund/dataset.yaml")


@pytest.mark.parametrize(
    "setting", ["model", "vlm", "simplifier", "extractor", "classifier"]
)
def test_a_models_folder_is_written_in_one_way(tmp_path, monkeypatch, setting):
    here = tmp_path / "models" / "mine"
    here.mkdir(parents=True)
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    made = lambda v: getattr(recipe("skin", scale="tiny", **{setting: v}), setting)  # noqa: E731
    assert {
        made(v) for v in ("models/mine", "./models/mine/", str(here), "~/models/mine")
    } == {str(here)}
    assert {
        made(v)
        for v in ("data/tiny/vlm", "./data/tiny/vlm", str(ROOT / "data/tiny/vlm"))
    } == {"data/tiny/vlm"}
    assert made("other/name") == "other/name"  # an id of the hub
    assert made("org/name") == str(tmp_path / "org" / "name")  # here it is a folder
    assert Path(locate(made("org/name"))) == tmp_path / "org" / "name"
    assert made("") == made("  ") == getattr(recipe("skin", scale="tiny"), setting)


def test_a_folder_in_the_repository_is_not_taken_for_an_id(tmp_path, monkeypatch):
    repository = project(tmp_path / "clone", "lib_name = medart\n")
    (repository / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(repository)
    monkeypatch.setenv("MEDART_DATA", str(ROOT / "data"))
    r = recipe("skin", scale="tiny", vlm="org/name")
    assert r.vlm == "./org/name" and Path(locate(r.vlm)) == repository / "org" / "name"
    monkeypatch.chdir(repository / "nbs")
    assert recipe("skin", scale="tiny", vlm="../org/name") == r


def test_recorded_files_hold_no_absolute_path(fund, tmp_path, monkeypatch):
    far = tmp_path / "Jane Doe" / "images"
    far.parent.mkdir()
    fund.rename(far)
    r = own(str(far), vlm=str(far))
    save_recipe(r, tmp_path / "run")
    assert "Jane" not in (tmp_path / "run" / "config.json").read_text()
    assert "Jane" in (tmp_path / "run" / "config.local.json").read_text()
    assert load_recipe(tmp_path / "run") == r
    assert "Jane" not in run_dir(r).name and "Jane" not in captions_dir(r).name
    monkeypatch.setenv("HOME", str(far.parent))
    line = command(r, "train")
    assert "Jane" not in line and "-p data '~/images'" in line


def test_a_command_makes_the_recipe_that_it_is_for(fund, tmp_path, monkeypatch):
    far = tmp_path / "it's far"
    fund.rename(far)
    r = own(
        str(far),
        text_targets=("q", "wo"),
        lr_text=1e-5,
        lambda_color=0.5,
        compile=True,
        tracker="tensorboard",
        rank=4,
    )
    words = shlex.split(command(r, "train"))
    given = dict(zip(words[4::3], words[5::3]))
    assert recipe(**given) == r


def test_a_command_keeps_names_that_look_like_numbers(fund):
    for told in ("007", "1e5", "True", "none", "-inf", ".5", "1_0"):
        (fund.parent / told).mkdir(exist_ok=True)
        r = recipe("skin", scale="tiny", data=told, vlm=told)
        words = shlex.split(command(r, "train"))
        read = {"-p": _resolve_type, "-r": str}
        assert (
            recipe(
                **{
                    k: read[o](v)
                    for o, k, v in zip(words[3::3], words[4::3], words[5::3])
                }
            )
            == r
        )
    with pytest.raises(ValueError, match="data=100000.0.*-r data"):
        recipe("skin", scale="tiny", data=_resolve_type("1e5"))


@pytest.mark.parametrize(
    "line, says",
    [
        (["--epoch", "2"], "Did you mean 'epochs'"),
        (["--lr=-1"], "lr=-1"),
        (["--LR", "1"], "LR"),
    ],
)
def test_a_wrong_option_of_a_command_line_is_named(line, says):
    with pytest.raises(ValueError, match=says):
        recipe_from_line(
            "medart.training.launch",
            "",
            ["--dataset", "skin", "--scale", "tiny", *line],
        )


@pytest.mark.parametrize("line", [["--lr", "1", "2"], ["extra"], ["--lr"], ["-x"]])
def test_a_word_without_a_setting_ends_a_command_in_two_lines(line, capsys):
    with pytest.raises(SystemExit):
        recipe_from_line(
            "medart.training.launch",
            "",
            ["--dataset", "skin", "--scale", "tiny", *line],
        )
    said = capsys.readouterr().err
    assert line[-1] in said and len(said.strip().splitlines()) == 2


# Names of runs


def name(**changes):
    return run_dir(recipe("skin", scale="tiny", **changes)).name


def test_close_numbers_have_names_of_their_own():
    assert len({name(lr=v) for v in (1e-4, 1.0000001e-4, 0.1 + 0.2, 0.3, 1e-300)}) == 5
    assert name(epochs=2) == name(epochs=2.0) == name(epochs="2") == "medart+epochs=2"
    assert name(lr=1e-4) == "medart+lr=0.0001"
    assert name(min_snr=1e10) == "medart+min_snr=1e10"


@pytest.mark.parametrize("profile", PROFILES)
def test_no_setting_of_either_profile_is_lost_in_a_name(profile):
    changes = [{k: v} for told in PROFILES.values() for k, v in told.items()]
    recipes = {
        recipe("skin", scale="tiny", profile=profile, **c) for c in [{}, *changes]
    }
    trained = {recipe_hash(r): run_dir(r) for r in recipes}
    made = {
        recipe_hash(r, "train", "caption", "generate"): samples_dir(r) for r in recipes
    }
    assert len(trained) > 8 and len(set(trained.values())) == len(trained)
    assert len(set(made.values())) == len(made)


def test_equal_recipes_have_one_hash():
    two = [
        recipe("skin", scale="tiny", epochs=v, alpha=a)
        for v, a in ((2, 8), (2.0, 8.0), ("2", "8"))
    ]
    assert len({recipe_hash(r) for r in two}) == len({run_dir(r) for r in two}) == 1


def test_many_changes_make_a_name_that_a_disk_takes(folders):
    many = dict(
        lr=3e-4,
        lr_text=2e-4,
        weight_decay=0.02,
        clip=2.0,
        rank=4,
        alpha=16,
        dora_text=True,
        t5_dropout=True,
        caption_dropout=0.1,
        min_snr=5.0,
        ema=0.99,
        solver_steps=10,
        guidance=3.0,
        lambda_color=0.1,
        color_reduction="mean",
        backprop_last_k=5,
        clip_color=0.5,
        seed=3,
        crop="random",
    )
    a, b = (recipe("skin", scale="tiny", **many, interval=n) for n in (20, 21))
    assert run_dir(a) != run_dir(b) and run_dir(a) == run_dir(a)
    assert run_dir(a).name.startswith("medart+alpha=16+backprop_last_k=5")
    longest = max(
        (
            f"real-beside-generated{samples_dir(a).name}.png",
            run_dir(a).name,
            captions_dir(a).name,
        ),
        key=len,
    )
    assert len(longest) < 200
    save_recipe(a, run_dir(a))
    assert load_recipe(run_dir(a)) == a


@pytest.mark.parametrize(
    "value", ["/ckpt/a:b/m<o>del", "C:\\models\\vit", "org/Vit", "a" * 300]
)
def test_names_have_no_characters_that_some_system_refuses(value):
    for folder in (
        name(model=value),
        captions_dir(recipe("skin", scale="tiny", vlm=value)).name,
    ):
        assert not set(folder) & set('<>:"/\\|?*') and len(folder) < 150


def test_models_of_one_name_have_folders_of_their_own():
    vlms = [
        "/ckpt/run1/model",
        "/ckpt/run2/model",
        "org-a/llava",
        "org-b/llava",
        "org-a/Llava",
        "data/tiny/vlm",
        "./vlm",
    ]
    folders = [
        captions_dir(recipe("skin", scale="tiny", vlm=v)).name.casefold() for v in vlms
    ]
    assert len(set(folders)) == len(vlms) and folders[5] == "vlm"
    assert len({name(model=v).casefold() for v in vlms}) == len(vlms)


def test_weights_are_known_by_their_contents(tmp_path):
    def key(**files):
        for old in tmp_path.rglob("*.*"):
            old.unlink()
        for file, data in files.items():
            (tmp_path / file.replace("__", ".")).write_bytes(data)
        return weights_key(str(tmp_path))

    large = 65 << 20
    kinds = [
        dict(model__safetensors=b"a" * large),
        dict(model__safetensors=b"a" * (large - 1) + b"b"),
        dict(pytorch_model__bin=b"a"),
        dict(pytorch_model__bin=b"b"),
        dict(model__pt=b"a"),
        dict(config__json=b"{}"),
        dict(vocab__txt=b"a"),
        dict(model__safetensors=b"a"),
        {},
    ]
    keys = [key(**files) for files in kinds]
    assert len(set(keys)) == len(kinds)
    assert key(**kinds[2]) == keys[2]
    (tmp_path / "README.md").write_text("A note.")
    assert weights_key(str(tmp_path)) == keys[2]
    for k in (
        1,
        2,
    ):  # the same size, written over within a moment, and with the old times put back
        (tmp_path / "pytorch_model.bin").write_bytes(b"%d" % k)
        os.utime(tmp_path / "pytorch_model.bin", (1, 1))
        keys.append(weights_key(str(tmp_path)))
    assert keys[-1] != keys[-2]


# Values


@pytest.mark.parametrize(
    "setting", [f.name for f in fields(Recipe) if f.type in (float, float | None)]
)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), "nan", "inf", 10**400]
)
def test_numbers_are_finite(setting, value):
    with pytest.raises(ValueError, match=setting):
        recipe("skin", scale="tiny", **{setting: value})


@pytest.mark.parametrize(
    "setting, value",
    [
        ("rank", True),
        ("rank", 1.5),
        ("rank", "8.5"),
        ("rank", None),
        ("rank", [8]),
        ("seed", -1),
        ("seed", 2**70),
        ("gen_count", -5),
        ("guidance", -1),
        ("gen_guidance", -2.0),
        ("lambda_color", -0.1),
        ("lr_text", -1e-4),
        ("checkpoint_minutes", -1),
        ("batch_size", 2**40),
        ("compile", 1),
        ("compile", "yes"),
        ("crop", None),
        ("tracker", "wandbb"),
        ("captions", "VSG"),
        ("text_targets", []),
        ("text_targets", "q+k"),
        ("text_targets", [1]),
        ("data", None),
        ("data", 1.5),
        ("model", ["a"]),
        ("top_p", 0),
        ("temperature", 0),
        ("ema", 1),
        ("text_bits", 5),
        ("gen_steps", 1001),
        ("solver_steps", 2000),
        ("data", b"fund"),
        ("vlm", b"x"),
        ("lr", "1_000"),
        ("lr", b"1"),
        ("data", "a" * 300),
        ("data", "x/" * 3000),
        ("data", "a\0b"),
        ("model", "a\nb"),
        ("classifier", "a\x1bb"),
        ("classifier_lr", 0),
        ("method", ["medart"]),
        ("scale", {}),
        ("profile", set()),
        ("dataset", b"skin"),
        ("lambda_color", np.ones(2)),
        ("scale", np.array(["tiny"])),
        ("dtype", torch.float32),
    ],
)
def test_values_that_mean_nothing_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        recipe(**dict(dataset="skin", scale="tiny") | {setting: value})


def test_what_papermill_passes_is_read():
    told = dict(
        rank="4",
        epochs="1",
        seed=3.0,
        lr="1e-4",
        compile="true",
        offload="False",
        lr_text="None",
        text_targets="q, k",
        caption_dropout=0,
        lambda_color=None,
    )
    r = recipe("skin", scale="tiny", **told)
    assert (r.rank, r.epochs, r.seed, r.lr, r.compile, r.offload, r.lr_text) == (
        4,
        1.0,
        3,
        1e-4,
        True,
        False,
        None,
    )
    assert r.text_targets == ("q", "k") and isinstance(r.caption_dropout, float)


def test_names_of_data_sets(fund):
    fund.rename(fund.parent / "2024")
    r = recipe(2024, scale="tiny", data=2024)
    assert (r.dataset, r.data) == ("2024", "2024") and r == recipe(
        "2024", scale="tiny", data="2024"
    )
    for wrong in (
        "Skin",
        "KVASIR",
        "a/b",
        "..",
        "",
        None,
        1.5,
        "x" * 100,
        "a\u0308",
        True,
    ):
        with pytest.raises(ValueError, match="dataset"):
            recipe(wrong, scale="tiny", data="2024")


@pytest.mark.parametrize(
    "method, changes, says",
    [
        ("medart", dict(size=128), "Pass size=64"),
        ("medart", dict(size=60), "Pass size=64"),
        ("sd15", dict(size=60), "multiples of 16"),
        ("fast_dit", dict(size=66), "multiples of 8"),
        ("sd15", dict(size=1), "Pass size=16"),
    ],
)
def test_the_model_says_what_it_cannot_do(method, changes, says):
    with pytest.raises(ValueError, match=says):
        check_size_and_steps(recipe("skin", method, scale="tiny", **changes))


def test_a_size_is_refused_before_images_are_read(folders):
    with pytest.raises(ValueError, match="Pass size=64"):
        train(recipe("skin", scale="tiny", size=128))
    assert not (folders[0] / "phantom").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(text_targets="nothing"), "has no nothing"),
        (dict(text_targets="q,kk"), "has no kk"),
        (dict(text_targets="q,wi", profile="official"), "has no wi"),
        (dict(rank=1000), "rank=1000"),
    ],
)
def test_adapters_that_hit_nothing_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        load_model(recipe("skin", scale="tiny", **changes))


@pytest.mark.parametrize(
    "sizes, count, made",
    [
        ((64,) * 8, 256, 256),
        ((3,) * 8, 12, 16),
        ((5, 5, 5), 7, 6),
        ((1000, 1, 1), 3, 5),
    ],
)
def test_an_even_share_that_is_not_what_was_asked_for_is_said(
    sizes, count, made, capsys
):
    many = class_shares(dict(enumerate(sizes)), count)
    said = capsys.readouterr().out
    assert sum(many.values()) == made and (f"{made} images are made" in said) == (
        made != count
    )
    assert all(
        many[i] == many[j]
        for i, a in enumerate(sizes)
        for j, b in enumerate(sizes)
        if a == b
    )


def test_fewer_images_than_classes_are_refused():
    assert (
        class_shares(dict(a=3, b=2), 0)
        == class_shares(dict(a=3, b=2), 99)
        == dict(a=3, b=2)
    )
    with pytest.raises(ValueError, match="gen_count=1.*2 classes"):
        class_shares(dict(a=3, b=2), 1)


@pytest.mark.parametrize(
    "told, seeds",
    [
        ("0,1,2", [0, 1, 2]),
        ("0 1 2", [0, 1, 2]),
        (" 0, 1 ", [0, 1]),
        (3, [3]),
        ([1, 2], [1, 2]),
        ((0,), [0]),
        ("7", [7]),
    ],
)
def test_seeds_are_read(told, seeds):
    assert seeds_of(told) == seeds


@pytest.mark.parametrize(
    "told",
    [
        "one two",
        "0-3",
        "",
        " ",
        [],
        "1.0",
        1.0,
        "-1",
        "0 00",
        "1 1",
        None,
        True,
        "9" * 30,
        "0;1",
    ],
)
def test_seeds_that_are_none_are_refused(told):
    with pytest.raises(ValueError, match="seeds"):
        seeds_of(told)


# Parameters of a notebook

PARAMETERS = (
    'dataset = "skin"  # which\nscale = "tiny"\nseed = 3\ndata = ""\nrank = 8\n'
)


def asked(*cells, extra=(), **ns):
    "The recipe of a notebook whose cells were executed in this order."
    space = dict(ns)
    for cell in cells:
        try:
            exec(cell, space)
        except Exception:  # noqa: BLE001, as in a kernel: a cell that fails does not end the session
            continue
    return recipe_from(
        space | {"In": ["", *cells, "r = recipe_from(globals())"]}, *extra
    )


def test_other_cells_have_no_influence():
    plain = asked(PARAMETERS)
    others = [
        "size = (4, 4)[0]\nrank = 3\nclip = 0",
        "seed = 5",
        "data = [1]\nscale = 2",
        "lr: float = .5",
        "# a note",
        "for epochs in range(3): pass",
        "def model(): pass",
        "import pandas as vlm",
        "1 +",
    ]
    for other in others:
        assert asked(PARAMETERS, other) == asked(other, PARAMETERS) == plain


def test_the_parameters_cell_counts_as_it_was_last_run():
    edited = PARAMETERS.replace("seed = 3", "seed = 4").replace("rank = 8\n", "")
    assert asked(PARAMETERS, "rank = 3", PARAMETERS) == asked(PARAMETERS)
    assert asked(PARAMETERS, edited).seed == 4
    assert (
        asked(PARAMETERS + "rank = 16\n", edited).rank == 8
    )  # a line that was deleted is gone
    assert asked(edited, PARAMETERS).seed == 3
    assert asked(PARAMETERS + "epochs = 2*2\nlr = epochs/1000").lr == 0.004


def test_papermills_cell_lies_over_the_parameters():
    injected = "# Parameters\nseed = 9\nlr = 0.01\n"
    assert (asked(PARAMETERS, injected).seed, asked(PARAMETERS, injected).lr) == (
        9,
        0.01,
    )
    assert asked(PARAMETERS, injected, "seed = 1").seed == 9
    assert asked(PARAMETERS, injected, PARAMETERS).seed == 3  # run by hand afterwards
    assert asked(PARAMETERS, "# Parameters of my plot\nrank = 3").rank == 8


@pytest.mark.parametrize(
    "cells",
    [
        [PARAMETERS + "intervall = 10"],
        [PARAMETERS, "# Parameters\nintervall = 10"],
        [PARAMETERS, "", PARAMETERS + "intervall = 2*5"],
    ],
)
def test_a_misspelt_parameter_is_refused(cells):
    with pytest.raises(
        ValueError, match="'intervall' is unknown.*Did you mean 'interval'"
    ):
        asked(*cells)


def test_without_a_parameters_cell_nothing_is_guessed():
    with pytest.raises(ValueError, match="first cell"):
        asked("seed = 3", dataset="skin", scale="tiny")


def test_rows_take_the_cells_alone():
    space = dict(
        In=["", 'datasets = "skin"\nscale = "tiny"\nepochs = 2', "interval = 7"],
        interval=7,
    )
    made = [
        method_recipe_from(space, "datasets", dataset="skin", method=m)
        for m in ("medart", "base")
    ]
    assert [(r.epochs, r.interval) for r in made] == [(2.0, 50), (0.0, 0)]


KERNEL = 'print({k: getattr(r, k) for k in ("interval", "size", "seed", "rank", "clip", "scale")})'


def test_parameters_in_a_kernel(tmp_path):
    "As JupyterLab runs them: one kernel, cells of the reader's own, a cell run twice."
    cells = nbformat.read(ROOT / "nbs" / "train.ipynb", 4).cells
    first = next(c for c in cells if "parameters" in c.metadata.get("tags", []))
    first.source = first.source.replace('scale = "auto"', 'scale = "tiny"')
    again = nbformat.v4.new_code_cell(first.source.replace("seed = 0", "seed = 5"))
    look = (
        'from medart.recipes.parameters import recipe_from\nr = recipe_from(globals(), "check")\n'
        + KERNEL
    )
    mine = nbformat.v4.new_code_cell("size = (4, 4)[0]\nrank = 3\nclip = 0\nseed = 8")
    shown = [nbformat.v4.new_code_cell(look), nbformat.v4.new_code_cell(look)]
    nb = nbformat.v4.new_notebook(
        cells=[mine, first, mine.copy(), shown[0], again, mine.copy(), shown[1]]
    )
    for i, cell in enumerate(nb.cells):
        cell.id = f"cell-{i}"
    NotebookClient(
        nb,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    seeds = [
        ast.literal_eval(c.outputs[0].text)["seed"] for c in (nb.cells[3], nb.cells[6])
    ]
    assert seeds == [0, 5]
    assert ast.literal_eval(nb.cells[6].outputs[0].text) == dict(
        interval=50, size=64, seed=5, rank=8, clip=1.0, scale="tiny"
    )


# scale="auto"


def nvml(monkeypatch, *gigabytes):
    "NVIDIA's driver, seeing these cards."
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(gigabytes))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    monkeypatch.setattr(
        pynvml,
        "nvmlDeviceGetMemoryInfo",
        lambda i: SimpleNamespace(total=gigabytes[i] * 1e9),
    )


def test_a_torch_without_cuda_takes_the_small_scale_at_once(monkeypatch):
    nvml(monkeypatch, 80)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(scales.subprocess, "run", None)  # nobody is asked
    assert detect_scale() == "tiny"


def test_torch_is_asked_what_it_can_use(monkeypatch):
    said = []
    monkeypatch.setattr(scales, "_ASK_TORCH", "import os; print(os.environ['TOLD'])")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for hidden, told in (
        ("", "[]"),
        ("0", "[80000000000]"),
        ("1", "[16000000000]"),
        ("GPU-8f", "[23800000000]"),
        ("-1", "[]"),
    ):
        scales._torch_devices.cache_clear()
        nvml(monkeypatch, 80, 16)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        monkeypatch.setenv("TOLD", told)
        said.append(detect_scale())
    assert said == ["tiny", "paper", "tiny", "paper", "tiny"]
    nvml(monkeypatch, 16)
    assert detect_scale() == "tiny"
    scales._torch_devices.cache_clear()


def test_the_question_to_torch_is_answered():
    "Asked for real: without a GPU the answer is an empty list."
    scales._torch_devices.cache_clear()
    before = torch.cuda.is_initialized()
    assert (scales._torch_devices(("now",)) == []) == (not torch.cuda.is_available())
    assert torch.cuda.is_initialized() == before


# describe


def test_a_description_shows_what_matters_and_folds_the_rest():
    d = describe(recipe("skin", scale="tiny", rank=4, weight_decay=0.5))
    assert {"lr", "epochs", "interval", "rank", "weight_decay", "data"} <= set(
        d.top.index
    )
    assert not set(d.top.index) & set(d.rest.index)
    assert set(d.top.index) | set(d.rest.index) == {f.name for f in fields(Recipe)}
    assert d.top.loc["rank"].to_list()[1:] == ["4", "8"]
    page, text = d._repr_html_(), repr(d)
    folded = page[page.index("<details>") :]
    assert "weight_decay" not in folded and "top_k" in folded and "..." not in text
    assert all(f.name in text for f in fields(Recipe))


# Other systems

LACKING = {
    os: (
        "killpg",
        "sched_getaffinity",
        "fork",
        "getuid",
        "geteuid",
        "setsid",
        "getpgid",
        "O_DIRECTORY",
        "mkfifo",
    ),
    signal: ("SIGKILL", "SIGHUP", "SIGALRM", "SIGUSR1", "alarm", "pthread_sigmask"),
}


def elsewhere(run, done):
    "Run in a fork that lacks what other systems lack, its modules imported anew; it writes to `done` what it made."
    child, exit = os.fork(), os._exit
    if not child:
        try:
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            for module in [m for m in sys.modules if m.split(".")[0] == "medart"]:
                del sys.modules[module]
            sys.modules |= dict.fromkeys(("resource", "fcntl", "pwd", "grp", "termios"))
            for module, names in LACKING.items():
                for name in names:
                    delattr(module, name)
            done.write_text(str(run()))
        except BaseException:  # noqa: BLE001, the parent is told
            done.write_text(traceback.format_exc())
        exit(0)
    os.waitpid(child, 0)
    return done.read_text()


def small_chain():
    for path in sorted((ROOT / "medart").glob("*/[a-z]*.py")):
        importlib.import_module(f"medart.{path.parent.name}.{path.stem}")
    from medart.training.sampling_runs import generate
    from medart.evaluation.evaluator import evaluate

    r = sys.modules["medart.recipes.recipe"].recipe(
        "skin",
        scale="tiny",
        data="few",
        captions="simple",
        epochs=0.2,
        interval=1,
        solver_steps=2,
        gen_steps=2,
        gen_block=4,
        gen_count=0,
        sample_every=0,
    )
    sys.modules["medart.training.trainer"].train(r)
    assert sys.modules["medart.core.progress"].peak_rss() > 1e8
    return len(list(generate(r).rglob("*.png"))), len(evaluate(r)) > 5


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="hides what this system lacks already"
)
def test_modules_import_and_the_small_chain_runs_on_other_systems(folders, tmp_path):
    g = np.random.default_rng(0)
    for cls in ("melanoma", "common_nevus"):
        (folders[0] / "few" / cls).mkdir(parents=True)
        for i in range(26):
            Image.fromarray(g.integers(0, 255, (64, 66, 3), dtype=np.uint8)).save(
                folders[0] / "few" / cls / f"{i}.png"
            )
    assert elsewhere(small_chain, tmp_path / "done") == "(12, True)"


def test_peak_memory_is_counted_in_bytes(monkeypatch):
    import resource

    mine = progress.peak_rss()
    assert 5e7 < mine < 1e12
    monkeypatch.setattr(sys, "platform", "darwin")
    assert progress.peak_rss() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("told", ["two", 1.5, -1, True, None, "", [2], b"2"])
def test_counts_are_whole_numbers(told):
    for what, ask in (
        ("workers", lambda: reproduce([], workers=told)),
        ("processes", lambda: generate_in(told, None)),
        ("prompts", lambda: prompts_figure([], told)),
    ):
        with pytest.raises(ValueError, match=f"{what}="):
            ask()
