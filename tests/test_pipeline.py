"Other people's tools must be able to use what we save: stock diffusers and stock peft, nothing of ours."

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from peft import PeftModel

from medart.core.randomness import rng
from medart.method.generation import sample_images
from medart.method.lora import perturb_loras
from medart.training.adapters import save_adapters
from medart.training.merging import merge_and_save
from medart.training.models import load_model
from medart.core.locations import locate
from medart.recipes.recipe import recipe

R = recipe("skin", scale="tiny", gen_steps=8)
CAPTIONS = [
    "A dermoscopic image of melanoma shows a dark brown irregular patch.",
    "a red circle on a blue background",
]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    "A model whose LoRAs change something, and the folder they were saved to."
    model = perturb_loras(load_model(R), 0.03)
    return model, save_adapters(model, tmp_path_factory.mktemp("run"))


def stock(pipe, z):
    return (
        pipe(
            CAPTIONS,
            num_inference_steps=R.gen_steps,
            guidance_scale=R.gen_guidance,
            latents=z.clone(),
            use_resolution_binning=False,
            clean_caption=False,
            max_sequence_length=R.max_tokens,
            output_type="pt",
        ).images
        * 2
        - 1
    )


def noise(model):
    return torch.stack(
        [
            torch.randn(model.latent_shape, generator=rng(R.seed, "image", i))
            for i in range(2)
        ]
    )


def close(a, b):
    "Equal to rounding: the stock pipeline pads captions and keeps the schedule single."
    gap = (a - b.clamp(-1, 1)).abs()
    assert gap.max() < 2e-3 and gap.mean() < 5e-5, (
        f"largest gap {gap.max():.1e}, mean {gap.mean():.1e}"
    )


def test_stock_pipeline_with_stock_peft_generates_the_same(adapted):
    model, folder = adapted
    pipe = PixArtAlphaPipeline.from_pretrained(locate(R.model), dtype=torch.float32)
    plain = stock(pipe, noise(model))
    pipe.transformer = PeftModel.from_pretrained(
        pipe.transformer, str(folder / "transformer_lora")
    )
    pipe.text_encoder = PeftModel.from_pretrained(
        pipe.text_encoder, str(folder / "text_encoder_lora")
    )
    adapted = stock(pipe, noise(model))
    close(adapted, sample_images(model, R, CAPTIONS))
    assert (adapted - plain).abs().mean() > 0.01, (
        "the adapters should change the picture, or this test shows nothing"
    )


def test_merged_pipeline_generates_the_same(adapted, tmp_path):
    model, _ = adapted
    from diffusers import DPMSolverMultistepScheduler

    merge_and_save(
        model,
        tmp_path / "merged",
        DPMSolverMultistepScheduler.from_pretrained(
            locate(R.model), subfolder="scheduler"
        ),
    )
    close(
        stock(
            PixArtAlphaPipeline.from_pretrained(
                tmp_path / "merged", dtype=torch.float32
            ),
            noise(model),
        ),
        sample_images(model, R, CAPTIONS),
    )
    assert type(model.transformer).__name__ == "PeftModel", (
        "merging must leave the model in memory as it was"
    )


def test_saved_adapters_are_the_same_bytes_and_name_no_folder(adapted, tmp_path):
    model, folder = adapted
    again = save_adapters(load_model(R, adapters=folder), tmp_path)
    for f in ("transformer_lora", "text_encoder_lora"):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (again / f / name).read_bytes() == (folder / f / name).read_bytes()
        assert "/" not in (folder / f / "adapter_config.json").read_text()
