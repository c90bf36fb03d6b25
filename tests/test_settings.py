"Settings and names of runs: a path, a number or a word means one thing everywhere."

import shutil
import importlib
import os
import shlex
import signal
import sys
import traceback
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from papermill.cli import _resolve_type
from PIL import Image

from medart.core.locations import locate
from medart.method.model import check_size_and_steps
from medart.recipes import scales
from medart.recipes.describe import describe
from medart.recipes.methods import PROFILES
from medart.recipes.parameters import command
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
from medart.training.models import load_model
from medart.training.sampling_plan import class_shares
from medart.training.trainer import train

ROOT = Path(__file__).resolve().parent.parent


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
    shutil.rmtree(folders[0] / "phantom")
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
    from medart.evaluation.evaluator import evaluate
    from medart.training.sampling_runs import generate

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
