"What is shared can be used without this project, says what it is, and names nobody; what cannot be shared is refused."

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
from peft import get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from everywhere import replace_everywhere
from medart.workflows import sharing
from medart.recipes import scales
from medart.training import merging
from medart.training import runs
from medart.workflows import licenses
from medart.workflows import model_card
from medart.core.randomness import rng
from medart.core.records import read_record, write_record
from medart.workflows.comfyui import (
    comfyui_fault,
    comfyui_layers,
    comfyui_state,
    unknown_to_comfyui,
)
from medart.workflows.data_card import data_card
from medart.workflows.sharing import export, export_fault, push_to_hub
from medart.method.generation import sample_images
from medart.training.sampling_runs import generate
from medart.training.trainer import train
from medart.evaluation.evaluator import evaluate
from medart.evaluation.results import results_path
from medart.method.lora import lora_config, perturb_loras
from medart.method.parameter_counts import PIXART_512, T5_XXL
from medart.training.adapters import save_adapters
from medart.training.models import load_base, load_model
from medart.core.locations import locate
from medart.recipes.methods import DIT_TARGETS, METHODS
from medart.recipes.recipe import recipe
from medart.recipes.runs import run_dir
from medart.method.caption_files import captions_for, captions_key
from medart.core.weight_files import files_below

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    scale="tiny",
    data="made",
    epochs=0.5,
    batch_size=4,
    interval=0,
    gen_steps=4,
    gen_count=0,
    gen_block=8,
)
PIXART = SMALL | dict(
    rank=4, alpha=6
)  # a scale that is not 1, so that one that is forgotten shows


def trained(r):
    "A run with adapters that change something, noted as training notes them, without the minutes of training."
    train(r)
    key = captions_key(captions_for(r, "train"))
    model = perturb_loras(load_model(r), 0.03)
    save_adapters(model, run_dir(r))
    old = read_record(run_dir(r) / "done.json")
    write_record(
        run_dir(r) / "done.json", old["read"], sorted(old["files"]), steps=old["steps"]
    )
    assert runs.check_trained(r, key) is None
    return model


def draw(folder, n):
    for k, cls in enumerate(("melanoma", "common_nevus")):
        (folder / cls).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = np.random.default_rng([k, i]).integers(
                0, 255, (64, 64, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(folder / cls / f"{i}.png")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A run, its model in memory, and its export with a merged pipeline, once for all tests."
    at = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MEDART_DATA", str(at / "data"))
        m.setenv("MEDART_OUTPUTS", str(at / "outputs"))
        draw(at / "data" / "made", 6)
        (at / "data" / "tiny").symlink_to(ROOT / "data" / "tiny")
        r = recipe("skin", **PIXART)
        model = trained(r)
        export(r, at / "shared", merged=True, licence="CC BY 4.0")
    return at, r, model


@pytest.fixture
def shared(first, tmp_path, monkeypatch):
    "A copy of it."
    at, r, model = first
    for name in ("data", "outputs", "shared"):
        shutil.copytree(at / name, tmp_path / name, symlinks=True)
    monkeypatch.setenv("MEDART_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path / "outputs"))
    return r, model, tmp_path / "shared"


def snapshot(folder):
    return {f: (folder / f).read_bytes() for f in files_below(folder)}


# Others load it


def code_of(folder):
    "The lines of the card that load and generate, as somebody would copy them."
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[
        1
    ]


def test_the_lines_on_the_card_generate_the_same_image(shared, monkeypatch):
    r, model, folder = shared
    monkeypatch.chdir(
        ROOT
    )  # the bundled base model is named from the repository's root
    lines = code_of(folder).replace('folder = "."', f"folder = {str(folder)!r}")
    load, call_line = lines.strip().rsplit("\n", 1)
    assert (
        sum(not x.startswith(("import", "from", "caption")) for x in load.splitlines())
        <= 5
    )
    assert call_line.startswith("image = pipe(caption, ")
    told = {}
    exec(load, told)
    z = torch.randn(1, *model.latent_shape, generator=rng(r.seed, "image", 0))
    told["noise"] = z.clone()
    exec(
        call_line.replace(
            "pipe(caption, ", "pipe(caption, latents=noise.clone(), output_type='pt', "
        ),
        told,
    )
    ours = sample_images(model, r, [told["caption"]]).clamp(-1, 1)
    gap = (told["image"][None] * 2 - 1 - ours[0]).abs()
    assert gap.max() < 2e-3 and gap.mean() < 5e-5
    base = sample_images(load_base(r), r, [told["caption"]]).clamp(-1, 1)
    assert (base - ours).abs().mean() > 0.01, (
        "the adapters should change the picture, or this test shows nothing"
    )


def test_the_merged_folder_generates_the_same_image(shared):
    r, model, folder = shared
    pipe = PixArtAlphaPipeline.from_pretrained(folder / "merged", dtype=torch.float32)
    z = torch.randn(1, *model.latent_shape, generator=rng(r.seed, "image", 0))
    image = (
        pipe(
            "a red circle",
            latents=z,
            num_inference_steps=r.gen_steps,
            guidance_scale=r.gen_guidance,
            output_type="pt",
            use_resolution_binning=False,
            clean_caption=False,
            max_sequence_length=r.max_tokens,
        ).images
        * 2
        - 1
    )
    assert (
        image - sample_images(model, r, ["a red circle"]).clamp(-1, 1)
    ).abs().max() < 2e-3


# ComfyUI's file


def apply_lora(state, net, prefix):
    "An independent loader: W + alpha/rank * up @ down, layer by layer, for matrices and convolutions alike."
    layers = {
        k.removesuffix(".lora_B.weight")
        for k in state
        if k.startswith(prefix) and k.endswith(".lora_B.weight")
    }
    weights = dict(net.named_parameters())
    for layer in layers:
        up, down = state[f"{layer}.lora_B.weight"], state[f"{layer}.lora_A.weight"]
        alpha = (
            state[f"{layer}.alpha"].item()
            if f"{layer}.alpha" in state
            else float(len(down))
        )
        w = weights[f"{layer.removeprefix(prefix)}.weight"]
        change = up.flatten(1) @ down.flatten(1)
        w.data += alpha / down.shape[0] * change.reshape(w.shape)
    return layers


def comfy_file(folder):
    return load_file(folder / "medart-skin-comfyui.safetensors")


def outputs(model):
    z = torch.randn(2, *model.latent_shape, generator=rng(0, "comfyui"))
    with torch.no_grad():
        c = model.encode_text(["a red circle", "melanoma"])
        return c.emb, model.predict(z, torch.tensor(500), c)


def test_a_loader_of_twenty_lines_gives_the_same_outputs(shared):
    r, model, folder = shared
    state, plain = comfy_file(folder), load_base(r)
    before = outputs(plain)
    layers = apply_lora(state, plain.transformer, "base_model.model.")
    layers |= apply_lora(state, plain.text_encoder, "text_encoders.t5xxl.transformer.")
    assert 3 * len(layers) == len(state) and "base_model.model.pos_embed.proj" in layers
    assert state["base_model.model.pos_embed.proj.lora_A.weight"].dim() == 4, (
        "the patch embedding is a convolution"
    )
    for a, b, old in zip(outputs(plain), outputs(model), before):
        assert (a - b).abs().max() < 1e-3 * (old - b).abs().max()


def test_without_alpha_the_outputs_would_differ(shared):
    r, model, folder = shared
    state, plain = (
        {k: v for k, v in comfy_file(folder).items() if not k.endswith(".alpha")},
        load_base(r),
    )
    apply_lora(state, plain.transformer, "base_model.model.")
    assert (outputs(plain)[1] - outputs(model)[1]).abs().max() > 1e-3


def loader_keys(depth, t5):
    """The names for which ComfyUI's loader has a place, written out independently of the module, from its table for PixArt
    (`pixart_to_diffusers`) and from the weights of its T5 (`text_encoders.` + name without `.weight`)."""
    names = {
        "pos_embed.proj",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
        "adaln_single.linear",
        "proj_out",
    }
    for kind in "timestep", "resolution", "aspect_ratio":
        names |= {
            f"adaln_single.emb.{kind}_embedder.linear_1",
            f"adaln_single.emb.{kind}_embedder.linear_2",
        }
    for i in range(depth):
        b = f"transformer_blocks.{i}"
        for attention in "attn1", "attn2":
            names |= {
                f"{b}.{attention}.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")
            }
        names |= {f"{b}.ff.net.0.proj", f"{b}.ff.net.2"}
    found = {f"base_model.model.{n}" for n in names}
    for k in t5.state_dict():
        if k.endswith(".weight"):
            found.add(f"text_encoders.t5xxl.transformer.{k.removesuffix('.weight')}")
    return found


def test_every_name_at_full_size_is_one_that_the_loader_has(tmp_path):
    r = recipe("skin", scale="paper")
    with torch.device("meta"):
        nets = (
            PixArtTransformer2DModel(**PIXART_512),
            T5EncoderModel(T5Config(**T5_XXL)),
        )
        known = loader_keys(28, nets[1])
        full = [
            get_peft_model_state_dict(
                get_peft_model(n, lora_config(r, t)), save_embedding_layers=False
            )
            for n, t in zip(nets, (DIT_TARGETS, r.text_targets))
        ]
    for part, s in zip(("transformer_lora", "text_encoder_lora"), full):
        (tmp_path / part).mkdir()
        save_file(
            {k: torch.zeros(8, 1) if ".lora_A" in k else torch.zeros(1, 8) for k in s},
            tmp_path / part / "adapter_model.safetensors",
        )
    state = comfyui_state(tmp_path, 8)
    endings = {".lora_A.weight", ".lora_B.weight", ".alpha"}
    layers = {
        k: next((k.removesuffix(e) for e in endings if k.endswith(e)), None)
        for k in state
    }
    assert set(layers.values()) <= known and not unknown_to_comfyui(state)
    assert all({x + e for e in endings} <= state.keys() for x in set(layers.values()))
    assert len(set(layers.values())) == sum(len(s) for s in full) // 2
    assert comfyui_layers(28, 24) <= known


def test_a_name_that_the_loader_lacks_is_found():
    state = {
        "base_model.model.transformer_blocks.0.norm9.alpha": torch.tensor(1.0),
        "base_model.model.proj_out.alpha": torch.tensor(1.0),
    }
    assert unknown_to_comfyui(state) == [
        "base_model.model.transformer_blocks.0.norm9.alpha"
    ]


def test_dora_and_baselines_have_no_file_for_comfyui():
    assert "DoRA" in comfyui_fault(recipe("skin", "dora", scale="tiny"))
    assert "sd15" in comfyui_fault(recipe("skin", "sd15", scale="tiny"))
    assert not comfyui_fault(recipe("skin", scale="tiny"))


# What the folder says


def test_the_card_says_what_others_must_know(shared):
    r, _, folder = shared
    card = (folder / "README.md").read_text()
    for words in (
        "data/tiny/pixart",
        "rank 4, alpha 6",
        "alpha/rank = 1.5",
        "| melanoma |",
        "CC BY 4.0",
        "Apache-2.0",
        "not for diagnosis",
        "PeftModel.from_pretrained",
        "models/loras",
        "| rank | 4 | 8 |",
        "it was not measured",
        'license: "other"',
    ):
        assert words in card, words
    paper = model_card.license_section(recipe("kvasir", scale="paper"), "")
    assert (
        "Open RAIL++-M" in paper
        and "use restrictions" in paper
        and "research and education only" in paper
    )


def test_adapters_name_their_base_model(shared):
    _, _, folder = shared
    for part in "transformer_lora", "text_encoder_lora":
        assert (
            json.loads((folder / part / "adapter_config.json").read_text())[
                "base_model_name_or_path"
            ]
            == "data/tiny/pixart"
        )


def test_numbers_stand_there_while_they_hold(folders):
    draw(folders[0] / "made", 40)
    r = recipe("skin", **SMALL | dict(epochs=0.1))
    train(r)
    generate(r)
    evaluate(r)
    card = (export(r) / "README.md").read_text()
    row = next(x for x in card.splitlines() if x.startswith("| color gap of averages"))
    assert (
        "real against real" in card
        and len(row.split("|")) == 9
        and "16 generated images against 16 real" in card
    )
    path = results_path(r, "metrics.csv")
    path.write_text(path.read_text() + "\n")
    card = (export(r) / "README.md").read_text()
    assert (
        "is not the file that was written." in card
        and "There are no numbers that hold" in card
    )
    assert "color gap" not in card


def test_no_path_and_no_name_of_a_folder_is_shared(made, tmp_path):
    private, home = tmp_path / "dr-smith-patients", tmp_path / "mary-miller"
    shutil.copytree(made, private)
    shutil.copytree(Path(locate("data/tiny/pixart")), home / "mary-pixart")
    pd.DataFrame(
        dict(
            file_name=[
                f"{c}/{i}.png" for c in ("melanoma", "common_nevus") for i in range(6)
            ],
            text=["John Doe, born 1950, melanoma"] * 12,
        )
    ).to_csv(private / "metadata.csv", index=False)
    (private / "dataset.yaml").write_text(
        "modality: dermoscopic\nfeatures: color and border\n"
    )
    r = recipe(
        "mine",
        **SMALL
        | dict(data=str(private), model=str(home / "mary-pixart"), dtype="bfloat16"),
    )
    train(r)
    folder = export(r, tmp_path / "out" / "shared", merged=True)
    text = b"\n".join(snapshot(folder).values())
    for word in (
        b"smith",
        b"mary",
        b"John",
        str(tmp_path).encode(),
        str(ROOT).encode(),
    ):
        assert word.lower() not in text.lower(), word
    assert b"a folder of one's own" in text and b"not stated" in text
    assert (
        "PATH" not in (folder / "README.md").read_text()
        and 'license: "other"' in (folder / "README.md").read_text()
    )
    with pytest.raises(ValueError, match="Nobody has stated under which terms"):
        push_to_hub(folder, "me/mine")


def test_everyone_may_read_it(shared):
    _, _, folder = shared
    umask = os.umask(0)
    os.umask(umask)
    modes = {f.stat().st_mode & 0o777 for f in folder.rglob("*") if f.is_file()}
    assert modes == {0o666 & ~umask}


# Whole or not at all


def test_the_same_run_gives_the_same_bytes(shared):
    r, _, folder = shared
    before = snapshot(folder)
    assert snapshot(export(r, folder, merged=True, licence="CC BY 4.0")) == before
    assert "merged/model_index.json" in before
    assert "merged/model_index.json" not in files_below(export(r, folder))
    assert [f.name for f in folder.parent.iterdir() if "shared" in f.name] == ["shared"]


@pytest.mark.parametrize(
    "what", ["foreign", "file", "added", "changed", "missing", "record"]
)
def test_what_export_did_not_write_is_left_alone(shared, tmp_path, what):
    r, _, folder = shared
    if what == "foreign":
        folder = tmp_path / "thesis"
        folder.mkdir()
        (folder / "chapter.tex").write_text("mine")
    elif what == "file":
        folder = tmp_path / "notes"
        folder.write_text("mine")
    elif what == "added":
        (folder / "notes.txt").write_text("mine")
    elif what == "changed":
        (folder / "README.md").write_text("better")
    elif what == "missing":
        (folder / "transformer_lora" / "adapter_config.json").unlink()
    else:
        (folder / "export.json").write_text("{}")
    before = snapshot(folder) if folder.is_dir() else folder.read_bytes()
    assert export_fault(folder)
    with pytest.raises(FileExistsError, match="Nothing was written"):
        export(r, folder)
    assert (snapshot(folder) if folder.is_dir() else folder.read_bytes()) == before


def test_a_failure_halfway_leaves_what_was_there(shared, tmp_path, monkeypatch):
    r, _, folder = shared
    before = snapshot(folder)

    def full(*args):
        raise OSError(28, "No space left on device")

    replace_everywhere(monkeypatch, merging.merge_and_save, full)
    for to in folder, tmp_path / "new":
        with pytest.raises(OSError, match="No space left"):
            export(r, to, merged=True)
    assert snapshot(folder) == before and not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob(".*.part")) and not list(tmp_path.rglob(".*.old"))


# What is not shared


def test_adapters_that_do_not_hold_are_refused(shared):
    r, _, folder = shared
    weights = run_dir(r) / "transformer_lora" / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:1000])
    with pytest.raises(ValueError, match="is not the file that was written"):
        export(r)
    weights.write_bytes(good)
    done = json.loads((run_dir(r) / "done.json").read_text())
    write_record(
        run_dir(r) / "done.json",
        done["read"],
        sorted(done["files"]),
        diverged="the loss is nan",
    )
    with pytest.raises(ValueError, match="training diverged"):
        export(r)
    write_record(run_dir(r) / "done.json", done["read"], sorted(done["files"]))
    made = Path(os.environ["MEDART_DATA"]) / "made" / "melanoma"
    shutil.copy(made / "0.png", made / "more.png")
    (made / "more.png").write_bytes(
        (made.parent / "common_nevus" / "1.png").read_bytes()
    )
    (made / "5.png").unlink()
    with pytest.raises(ValueError, match="changed since"):
        export(r)
    assert not (run_dir(r) / "share").exists()


def test_nothing_trained_is_nothing_to_share(made):
    with pytest.raises(FileNotFoundError, match="Train first"):
        export(recipe("skin", **SMALL))
    with pytest.raises(ValueError, match="untouched model"):
        export(recipe("skin", "base", scale="tiny", data="made"))


# Other families


def test_stable_diffusion_is_shared_as_diffusers_own_file(made, tmp_path, monkeypatch):
    r = recipe("skin", "sd15", **SMALL)
    model = trained(r)
    folder = export(r, tmp_path / "sd")
    files = files_below(folder)
    assert "pytorch_lora_weights.safetensors" in files and not [
        f for f in files if "comfyui" in f
    ]
    monkeypatch.chdir(ROOT)
    told = {}
    exec(
        code_of(folder)
        .rsplit("caption =", 1)[0]
        .replace('folder = "."', f"folder = {str(folder)!r}"),
        told,
    )
    ids = told["pipe"].tokenizer(["a red circle"], return_tensors="pt").input_ids
    with torch.no_grad():
        a = told["pipe"].text_encoder(ids)[0]
        b = model.text_encoder(ids)[0]
        c = load_base(r).text_encoder(ids)[0]
    assert (a - b).abs().max() < 1e-5 < (b - c).abs().max()


def test_fast_dit_is_shared_as_the_network_it_is(made, tmp_path):
    from diffusers import DiTTransformer2DModel

    r = recipe("skin", "fast_dit", **SMALL | dict(epochs=1))
    train(r)
    folder = export(r, tmp_path / "dit")
    net = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    ours = load_model(r, adapters=run_dir(r)).transformer
    assert all(
        torch.equal(a, b)
        for a, b in zip(net.state_dict().values(), ours.state_dict().values())
    )
    assert (
        "all weights of the transformer were trained"
        in (folder / "README.md").read_text()
    )
    with pytest.raises(ValueError, match="has no adapters to merge"):
        export(r, tmp_path / "merged", merged=True)
    assert not (tmp_path / "merged").exists()


def test_every_method_has_a_card(made):
    for method in METHODS:
        for scale in ("tiny", "paper"):
            r = recipe("skin", method, scale=scale)
            lines = model_card.load_lines(
                r,
                [
                    f"{n}/adapter_config.json"
                    for n in scales.model_class(r).parts.values()
                ],
            )
            compile("\n".join(lines), "card", "exec")
            assert licenses.model_terms(r) and licenses.hub_license(r)


# Generated images


def test_a_set_of_images_gets_its_card(made):
    r = recipe("skin", **SMALL)
    train(r)
    folder = generate(r)
    before = snapshot(folder)
    card = data_card(folder)
    text = card.read_text()
    for words in (
        "not for diagnosis",
        read_record(run_dir(r) / "done.json")["key"],
        "| melanoma | 2 |",
        "gen_split=",
        "| seeds | 0 |",
        "synthetic image, not for diagnosis",
        "not stated",
        "| sampling steps | 4 |",
    ):
        assert words in text, words
    assert {k: v for k, v in snapshot(folder).items() if k != "README.md"} == before
    assert (
        data_card(folder).read_text() == text
        and generate(r) == folder
        and card.exists()
    )
    card.write_text("mine")
    data_card(folder, licence="CC BY 4.0")
    assert (
        "CC BY 4.0" in card.read_text()
        and (folder / "set-aside" / "README.md").read_text() == "mine"
    )


def test_a_set_that_was_changed_is_not_described(made):
    r = recipe("skin", **SMALL)
    train(r)
    folder = generate(r)
    image = next(folder.rglob("*.png"))
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match="is not the file that was written. Run generate again"
    ):
        data_card(folder)
    with pytest.raises(ValueError, match="there is no key.json"):
        data_card(run_dir(r))


# The hub


def test_a_folder_that_was_changed_is_not_uploaded(shared):
    _, _, folder = shared
    (folder / "README.md").write_text("better")
    with pytest.raises(ValueError, match="README.md is not the file that was written"):
        push_to_hub(folder, "me/skin")


def test_without_a_network_the_upload_says_so(shared, monkeypatch):
    _, _, folder = shared
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE forbids"):
        push_to_hub(folder, "me/skin")
    monkeypatch.setattr(sharing.constants, "HF_HUB_OFFLINE", False)
    nobody = partial(sharing.HfApi, endpoint="http://127.0.0.1:9", token=False)
    monkeypatch.setattr(sharing, "HfApi", nobody)
    with pytest.raises(
        ConnectionError, match="was not uploaded. The folder itself is complete"
    ):
        push_to_hub(folder, "me/skin")
    with pytest.raises(ValueError, match="write account/repository"):
        push_to_hub(folder, "bad name!!")
