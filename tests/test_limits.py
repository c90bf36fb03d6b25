"What a model reads of its captions, prompts from files, and the profile that follows the authors' program."
import pytest
import torch
from accelerate import Accelerator

from medart import hldf
from medart.core import rng
from medart.hldf import Batch, diffusion_loss, hldf_cond
from medart.losses import channel_stats, color_due, color_loss
from medart.model import load_model, shaken
from medart.recipes import DATASETS, NOT_REPRODUCED, OFFICIAL, PROFILES, captions_dir, recipe
from medart.vsg import NO_LIMIT, SYSTEM_PROMPT, chat, load_vlm, question


# The profile that follows the authors' program

def official(**changes):
    return recipe("kvasir", scale="tiny", profile="official", **changes)


def test_the_official_profile_is_its_table():
    "No setting is changed that no fact speaks of, and every fact holds in a recipe."
    told = {k: v for _, settings in OFFICIAL for k, v in settings.items()}
    assert told == PROFILES["official"] and told.keys() == PROFILES["paper"].keys()
    r = recipe("kvasir", scale="paper", profile="official")
    assert all(getattr(r, k) == v for k, v in told.items())
    assert all(fact and why for fact, why in NOT_REPRODUCED)
    plain = recipe("kvasir", scale="paper")
    assert all(getattr(plain, k) == v for k, v in PROFILES["paper"].items())


def test_official_color_losses_begin_at_step_0_and_number_192():
    due = [step for step in range(96000) if color_due(step, 500, official().color_at_start)]
    assert due[:3] == [0, 500, 1000] and len(due) == 192
    assert [step for step in range(12) if color_due(step, 5)] == [4, 9]
    assert not any(color_due(step, 0, True) for step in range(3))


TEXT = "An Endoscopic Image of Dyed Lifted Polyps"


def batch(model, text=TEXT):
    z = torch.zeros(1, *model.latent_shape)
    return Batch([text], [torch.zeros(3, 64, 64, dtype=torch.uint8)], z, z, torch.tensor([500]), z)


def same(a, b):
    return a.emb.shape == b.emb.shape and torch.equal(a.emb, b.emb)


@pytest.mark.parametrize("profile", PROFILES)
def test_case_of_captions_in_both_losses(profile):
    "The noise loss reads captions as the profile says, the color loss and generation always in lower case."
    r = recipe("kvasir", scale="tiny", profile=profile)
    model = load_model(r)
    seen = []
    encode = type(model).encode_text
    model.encode_text = lambda texts, raw=False: seen.append(raw) or encode(model, texts, raw)
    with torch.no_grad():
        diffusion_loss(model, r, batch(model))
        color = hldf_cond(model, r, batch(model))
    assert seen == [profile == "official", False]
    assert torch.allclose(color.emb, encode(model, [TEXT.lower(), ""]).emb, atol=1e-6)
    assert not torch.allclose(color.emb[:1], encode(model, [TEXT, ""], raw=True).emb[:1, :color.emb.shape[1]], atol=1e-3)


@pytest.mark.parametrize("profile", PROFILES)
def test_dropout_of_t5_in_the_color_loss(profile, monkeypatch):
    r = recipe("kvasir", scale="tiny", profile=profile, batch_size=1, interval=1, solver_steps=2, gen_steps=2)
    model, modes, clips = load_model(r), [], []
    monkeypatch.setattr(hldf, "diffusion_gradients", lambda m, r, b, params: (
        modes.append(m.text_encoder.training), (torch.zeros(()), [torch.zeros_like(p) for p in params]))[1])
    monkeypatch.setattr(hldf, "color_gradients", lambda m, r, b, params: (
        modes.append(m.text_encoder.training), (torch.zeros(()), [torch.full_like(p, 9.) for p in params]))[1])
    monkeypatch.setattr(hldf, "update", lambda m, r, opt, params, grads, log: clips.append(grads[0].flatten()[0].item()) or 0)
    hldf.training_step(model, r, batch(model), hldf.make_optimizer(model, r), 0, Accelerator())
    live = profile == "official"
    assert modes == [live, live]
    assert (clips[0] == 9.) == live, "the color gradient is not clipped by itself"


def test_offloading_draws_the_same_dropout_twice():
    "The chain's captions and those that carry the gradient back must be one and the same."
    r = official(batch_size=1, solver_steps=2, interval=1, dtype="float64")
    grads = []
    for offload in (False, True):
        model = shaken(load_model(r))
        b, params = batch(model), list(model.trainable().values())
        b.noise = torch.randn(1, *model.latent_shape, generator=rng(0, "z"), dtype=torch.float64)
        model.text_encoder.train(True)
        torch.manual_seed(0)
        grads.append(hldf.color_gradients(model, official(**{k: getattr(r, k) for k in (
            "batch_size", "solver_steps", "interval", "dtype")}, offload=offload), b, params)[1])
    worst = max((x - y).norm() / y.norm().clamp(min=1e-9) for x, y in zip(grads[1], grads[0]))
    assert worst < 1e-6


def test_official_targets_crop_steps_and_question():
    r = official()
    model = load_model(r)
    names = "".join(model.trainable())
    assert "wi_0" not in names and ".wo." in names and ".q." in names
    assert "wi_0" in "".join(load_model(recipe("kvasir", scale="tiny")).trainable())
    assert r.crop == "random" and r.gen_steps == 50 and r.clip == 1
    x = torch.rand(2, 3, 8, 8)
    assert torch.isclose(color_loss(x + .1, x, r.color_reduction) * 3, color_loss(x + .1, x))
    assert torch.isclose(channel_stats(x)[1], x.flatten(2).std(2, unbiased=True)).all()
    d = DATASETS["kvasir"]
    assert "words" in question(d, "polyps") and "words" not in question(d, "polyps", NO_LIMIT)
    vlm = load_vlm(r)
    assert vlm.system == SYSTEM_PROMPT and load_vlm(recipe("kvasir", scale="tiny")).system == ""
    roles = [m["role"] for m in chat("What?", system=vlm.system)]
    assert roles == ["system", "user"] and [m["role"] for m in chat("What?")] == ["user"]
    prompt = vlm.processor.apply_chat_template([chat("What?", system=SYSTEM_PROMPT)], add_generation_prompt=True)[0]
    assert prompt.index("helpful") < prompt.index("What?")
    assert captions_dir(r) != captions_dir(recipe("kvasir", scale="tiny"))


def test_the_official_optimizer():
    model = load_model(official())
    groups = hldf.make_optimizer(model, official()).param_groups
    assert all(g["weight_decay"] == 1e-2 for g in groups)
