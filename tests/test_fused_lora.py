"Fused LoRAs are PEFT's, computed otherwise."

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from medart.core.randomness import rng
from medart.method.caption_files import captions_for
from medart.method.lora import perturb_loras
from medart.recipes.recipe import recipe
from medart.training.batches import draw_batch, training_set
from medart.training.models import load_model
from medart.training.step import diffusion_gradients
from medart.training.trainer import train

SMALL = dict(scale="tiny", epochs=2.0, batch_size=2, interval=3, solver_steps=2)
SMALL |= dict(checkpoint_every=1, log_every=1, gen_steps=2, gen_block=2)


@pytest.fixture
def small(made):
    "Eight steps over two epochs with two color losses."
    return lambda **k: recipe("skin", data="made", **(SMALL | k))


def test_fused_loras_learn_what_peft_s_do(small):
    "One step of either moves the adapters alike, and each reads what the other has written."
    made = {}
    for lean in (False, True):
        out = train(small(lean_lora=lean, captions="simple", alpha=16))
        made[lean] = {
            k: v
            for f in sorted(out.glob("*_lora/adapter_model.safetensors"))
            for k, v in load_file(f).items()
        }
    assert len(made[True]) == 176 and made[True].keys() == made[False].keys()
    assert all(
        (made[True][k] - made[False][k]).norm() < 1e-3 * made[False][k].norm()
        for k in made[True]
    )
    models = [
        load_model(small(lean_lora=lean, captions="simple", alpha=16), adapters=out)
        for lean in (False, True)
    ]
    z, t = (
        torch.randn(1, *models[0].latent_shape, generator=rng(0, "z")),
        torch.tensor(500),
    )
    seen = [m.predict(z, t, m.encode_text(["a star"])) for m in models]
    assert (seen[0] - seen[1]).abs().max() < 1e-5
    made = []
    for lean in (
        False,
        True,
    ):  # the gradients themselves, which AdamW would hide a factor of
        r = small(lean_lora=lean, captions="simple", alpha=16, dtype="float64")
        model = perturb_loras(load_model(r))
        ts = training_set(model, r, captions_for(r, "train"))
        made.append(
            diffusion_gradients(
                model, r, draw_batch(model, r, ts, 0), list(model.trainable().values())
            )[1]
        )
    assert max(((x - y).norm() / x.norm()).item() for x, y in zip(*made)) < 1e-8


def test_fused_loras_leave_to_peft_what_they_do_not_know(small):
    "Another adapter, two of them, or none switched on."
    m = perturb_loras(load_model(small(lean_lora=True)))
    net = m.transformer
    x = (
        torch.randn(1, *m.latent_shape, generator=rng(0, "x")),
        torch.tensor(500),
        m.encode_text(["a star"]),
    )
    with torch.no_grad():
        lean = m.predict(*x)
        with net.disable_adapter():
            off = m.predict(*x)
        net.add_adapter(
            "other", LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=True)
        )
        net.set_adapter("other")
        other = m.predict(*x)
        net.base_model.set_adapter(["default", "other"])
        both = m.predict(*x)
        merged = copy.deepcopy(net).merge_and_unload()
        assert (
            torch.equal(other, off)
            and (both - lean).abs().max() < 1e-5
            and (lean - off).abs().max() > 1e-3
        )
        m.transformer = merged
        assert (m.predict(*x) - lean).abs().max() < 1e-4


def test_fused_loras_keep_away_from_dora_and_quantized_weights(small):
    def kinds(net):
        return {
            type(m).__name__
            for m in net.modules()
            if type(m).__module__.startswith(("peft.tuners.lora", "medart"))
        }

    m = load_model(small(lean_lora=True, dora_text=True))
    assert "FusedLoRALinear" in kinds(m.transformer) and "FusedLoRALinear" not in kinds(
        m.text_encoder
    )
    m = load_model(small(lean_lora=True, text_bits=8))
    assert (
        "FusedLoRALinear" in kinds(m.transformer)
        and "FusedLoRALinear" not in kinds(m.text_encoder)
        and "Linear8bitLt" in kinds(m.text_encoder)
    )
