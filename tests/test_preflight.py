"What a run's later stages need is looked at first: everything that is wrong is said at once, and nothing is said where all is well."

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from everywhere import replace_everywhere
from medart.workflows import model_files
from medart.workflows import preflight_checks
from medart.bundled.random_pipelines import random_pipeline
from medart.method.parameter_counts import PIXART_512, T5_XXL
from medart.workflows.model_files import NotReady
from medart.workflows.preflight import preflight, STAGES
from medart.core.locations import locate
from medart.recipes.methods import METHODS
from medart.recipes.recipe import recipe

LATER = ("train", "generate", "evaluate", "classify")
MODELS = dict(
    model="pixart",
    vlm="vlm",
    simplifier="simplifier",
    extractor="vit-skin",
    classifier="vit-shapes",
)


@pytest.fixture
def models(folders, tmp_path):
    "Copies of all small models of a recipe, to do harm to, and the recipe that names them."
    there = {
        k: str(shutil.copytree(locate(f"data/tiny/{v}"), tmp_path / v))
        for k, v in MODELS.items()
    }
    return recipe("skin", scale="tiny", **there)


def wrong(r, *stages, **how):
    "The sentences of a preflight that fails."
    with pytest.raises(NotReady) as e:
        preflight(r, *stages, **how)
    lines = str(e.value).splitlines()
    said = [line for line in lines[1:] if line[:1].isdigit()]
    assert lines[0].startswith(f"{len(said)} thing")
    return said


def test_where_all_is_well_it_says_what_it_found(models):
    table = preflight(models, *STAGES)
    assert (
        list(table.columns) == ["part", "found", "terms"]
        and table.found.str.len().min() > 0
    )
    about = dict(zip(table.part, table.found))
    assert "M weights" in about[f"model of family pixart: {models.model}"]
    assert about["its other parts"] == "DPMSolverMultistepScheduler, T5Tokenizer"
    assert preflight(models).empty


@pytest.mark.parametrize("method", ["medart", "sd15", "fast_dit", "ovis", "base"])
def test_the_methods_that_run_small_are_ready(folders, method):
    preflight(recipe("kvasir", method, scale="tiny"), *LATER)


def test_every_method_says_what_it_lacks(folders):
    for method, row in METHODS.items():
        r = recipe("skin", method, scale="tiny")
        if not r.model:
            assert "has no small bundled model" in wrong(r, "train")[0]
    assert "vlm=FOLDER" in wrong(recipe("skin", "ovis", scale="tiny"), "caption")[0]


@pytest.mark.parametrize("family", ["sdxl", "hunyuan"])
def test_pipelines_with_two_encoders(folders, tmp_path, family):
    folder = random_pipeline(family, tmp_path / family)
    r = recipe("skin", family, scale="tiny", model=str(folder))
    preflight(r, "train", "generate")
    (folder / "tokenizer_2/tokenizer.json").unlink()
    (folder / "text_encoder_2/model.safetensors").unlink()
    assert "text_encoder_2 holds no weights" in wrong(r, "train")[0]


NEEDED = [
    ("model", f)
    for f in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    )
]
NEEDED += [
    (s, f)
    for s in ("extractor", "classifier")
    for f in ("config.json", "model.safetensors", "preprocessor_config.json")
]
NEEDED += [
    ("vlm", f)
    for f in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "processor_config.json",
    )
]
NEEDED += [
    ("simplifier", f) for f in ("config.json", "model.safetensors", "tokenizer.json")
]


@pytest.mark.parametrize("setting,file", NEEDED)
def test_each_file_that_is_missing_is_missed(models, setting, file):
    "By the stage that needs it, under the setting that names it."
    path = Path(getattr(models, setting), file)
    path.unlink()
    stages = {"model": "train", "extractor": "evaluate", "classifier": "classify"}.get(
        setting, "caption"
    )
    said = wrong(models, stages)
    assert any(getattr(models, setting) in s for s in said) and any(
        f"{setting}=FOLDER" in s for s in said
    )


def test_what_a_stage_does_not_need_may_be_missing(models):
    for setting in ("vlm", "simplifier"):
        shutil.rmtree(getattr(models, setting))
    preflight(models, *LATER)
    shutil.rmtree(models.extractor)
    preflight(models, "train", "classify")


@pytest.mark.parametrize(
    "setting,file",
    [(s, f) for s, f in NEEDED if f.endswith(("json", "safetensors"))][::4],
)
def test_each_file_that_is_cut_short_is_noticed(models, setting, file):
    path = Path(getattr(models, setting), file)
    path.write_bytes(path.read_bytes()[:-9])
    said = " ".join(wrong(models, *STAGES))
    assert getattr(models, setting) in said


def test_all_that_is_wrong_is_said_at_once(models, monkeypatch):
    Path(models.extractor, "preprocessor_config.json").unlink()
    Path(models.vlm, "model.safetensors").unlink()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=0)
    )
    said = wrong(models, *STAGES)
    assert len(said) == 3
    for i, words in enumerate(
        (
            "holds no weights",
            "preprocessor_config.json",
            "0.0 GB are free where outputs go",
        )
    ):
        assert words in said[i] and said[i].startswith(f"{i + 1}. ")


def test_what_the_published_kvasir_classifier_is_believed_to_look_like_is_ready(models):
    "With an old class name; with one that nobody knows, a run stops before it trains."
    path = Path(models.extractor, "preprocessor_config.json")
    old = json.loads(path.read_text())
    path.write_text(json.dumps(old | dict(image_processor_type="ViTFeatureExtractor")))
    preflight(models, *LATER)
    path.write_text(json.dumps(old | dict(image_processor_type="MyOwnProcessor")))
    assert "cannot be used as it is" in wrong(models, *LATER)[0]


def test_a_network_that_lacks_weights_is_noticed_before_training(models):
    path = Path(models.extractor, "model.safetensors")
    weights = load_file(path)
    weights.pop(sorted(weights)[5])
    save_file(weights, path, dict(format="pt"))
    assert "drawn at random" in wrong(models, "evaluate")[0]


def test_a_configuration_of_another_day_is_noticed(models):
    path = Path(models.vlm, "config.json")
    path.write_text(
        json.dumps(json.loads(path.read_text()) | dict(model_type="llava_next_9"))
    )
    assert "llava_next_9" in wrong(models, "caption")[0]


# The machine


def card(gb, bf16=True):
    return dict(name="a card", bytes=int(gb * 1e9), bf16=bf16)


@pytest.mark.parametrize(
    "cards,changes,says",
    [
        ([], dict(scale="paper"), "scale=paper needs a GPU.*scale=tiny"),
        (
            [card(16, bf16=False)],
            dict(dtype="bfloat16"),
            "dtype=bfloat16 needs.*dtype=float32",
        ),
        (
            [card(80)],
            dict(num_processes=2, batch_size=2),
            "there are 1 GPUs: pass num_processes=1",
        ),
        (
            [card(0.001)],
            dict(),
            "weights alone take 0.0 GB.*text_bits=4 or offload=True",
        ),
    ],
)
def test_devices(folders, monkeypatch, cards, changes, says):
    replace_everywhere(monkeypatch, preflight_checks.gpus, lambda: cards)
    r = recipe("skin", **(dict(scale="tiny") | changes))
    nets = model_files.check_model(recipe("skin", scale="tiny"))[1]
    import re

    said = [f.fault for f in preflight_checks.check_devices(r, nets) if f.fault]
    assert len(said) == 1 and re.search(says, said[0])


def test_main_memory(folders, monkeypatch):
    monkeypatch.setattr(
        preflight_checks.psutil,
        "virtual_memory",
        lambda: SimpleNamespace(available=1000),
    )
    assert "of main memory" in wrong(recipe("skin", scale="tiny"), "train")[0]


def test_outputs_that_cannot_be_written(folders, monkeypatch):
    monkeypatch.setenv("MEDART_OUTPUTS", "/proc/medart")
    assert "cannot be written to" in wrong(recipe("skin", scale="tiny"), "train")[0]


def test_packages(folders, monkeypatch):
    monkeypatch.setattr(preflight_checks.importlib.util, "find_spec", lambda name: None)
    r = recipe(
        "skin", scale="tiny", text_bits=4, tracker="tensorboard", caption_backend="vllm"
    )
    said = wrong(r, "train", "evaluate", spaces=("inception",))
    for package in ("bitsandbytes", "tensorboard", "vllm", "torch_fidelity"):
        assert sum(package in s for s in said) == 1


def test_images(folders):
    said = wrong(recipe("skin", scale="tiny", data="nowhere"), "train")
    assert "No images at data='nowhere'" in said[0]
    (folders[0] / "kvasir").mkdir()
    assert (
        "research and education only"
        in preflight_checks.check_images(recipe("kvasir", scale="paper"))[0].terms
    )


def test_full_size_networks_are_counted_in_seconds(folders, tmp_path, monkeypatch):
    "The published PixArt-alpha from configurations alone: 5.4 billion weights, 11 GB in bfloat16."
    from diffusers import PixArtTransformer2DModel
    from transformers import T5Config

    small = shutil.copytree(locate("data/tiny/pixart"), tmp_path / "pixart")
    with torch.device("meta"):
        PixArtTransformer2DModel(**PIXART_512).save_config(small / "transformer")
    T5Config(**T5_XXL, architectures=["T5EncoderModel"]).save_pretrained(
        small / "text_encoder"
    )
    r = recipe("skin", scale="paper", model=str(small))
    findings, nets = model_files.check_model(r)
    assert (
        not findings[0].fault
        and 5.3e9 < sum(map(model_files.count_weights, nets.values())) < 5.5e9
    )
    replace_everywhere(monkeypatch, preflight_checks.gpus, lambda: [card(8)])
    assert any(
        "text_bits=4" in f.fault for f in preflight_checks.check_devices(r, nets)
    )
    assert 1e9 < preflight_checks.run_bytes(r, nets) < 2e10


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "An empty cache, and a hub that lists files and sends none."
    import httpx

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    listed = {}

    def model_info(name, **how):
        answer = listed.get(name, RepositoryNotFoundError)
        if isinstance(answer, dict):
            return SimpleNamespace(
                siblings=[
                    SimpleNamespace(rfilename=f, size=n) for f, n in answer.items()
                ]
            )
        if issubclass(answer, OSError) and not issubclass(
            answer, (GatedRepoError, RepositoryNotFoundError)
        ):
            raise answer("no route to host")
        raise answer(
            "refused",
            response=httpx.Response(
                403, request=httpx.Request("GET", "https://huggingface.co")
            ),
        )

    monkeypatch.setattr(model_files, "model_info", model_info)
    return listed


PART = {"": torch.nn.Module}


def test_a_repository_that_is_whole_on_the_hub_is_measured(hub, monkeypatch):
    replace_everywhere(
        monkeypatch,
        model_files.skeleton,
        lambda *a: torch.nn.Linear(2, 2, device="meta"),
    )
    hub["some/vlm"] = {
        "config.json": 9,
        "model-00001-of-00002.safetensors": 8 * 10**9,
        "model-00002-of-00002.safetensors": 9 * 10**9,
        "model.fp16.safetensors": 10**12,
        "pytorch_model.bin": 10**12,
    }
    [finding], nets = model_files.check_files("VLM", "some/vlm", "vlm", PART)
    assert (
        finding.fetch == 17 * 10**9
        and "17.0 GB of them to fetch" in finding.found
        and not finding.fault
    )
    r = recipe("skin", scale="tiny")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 10**9)
    )
    assert (
        "HF_HOME"
        in [f.fault for f in preflight_checks.check_disk(r, {}, finding.fetch)][1]
    )


@pytest.mark.parametrize(
    "answer,says",
    [
        (GatedRepoError, "accepted: open https://huggingface.co/some/vlm"),
        (RepositoryNotFoundError, "no such repository"),
        (ConnectionError, "the Hugging Face hub does not answer.*hf download some/vlm"),
        (
            {"config.json": 9, "model-00001-of-00002.safetensors": 9},
            "model-00002-of-00002.safetensors is missing",
        ),
        (
            {"model.onnx": 9, "config.json": 9},
            "holds no weights.*model.onnx is not read",
        ),
        ({"model.safetensors": 9}, "holds no config.json"),
    ],
)
def test_what_the_hub_says_is_passed_on(hub, answer, says):
    import re

    hub["some/vlm"] = answer
    [finding], nets = model_files.check_files("VLM", "some/vlm", "vlm", PART)
    assert re.search(says, finding.fault) and not nets


def test_a_hub_that_does_not_answer_is_no_harm_where_all_is_here(hub, folders):
    where = Path(constants.HF_HUB_CACHE, "models--some--pixart")
    (where / "refs").mkdir(parents=True)
    (where / "refs/main").write_text("0" * 40)
    shutil.copytree(locate("data/tiny/pixart"), where / "snapshots" / ("0" * 40))
    hub["some/pixart"] = ConnectionError
    repo = model_files.find_repository("some/pixart")
    assert not repo.waiting and "model_index.json" in repo.sizes
    hub["some/pixart"] = {f: 1 for f in repo.sizes} | {"vae/later.bin": 7}
    assert model_files.find_repository("some/pixart").waiting == ["vae/later.bin"]
