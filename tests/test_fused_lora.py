"Fused LoRAs are PEFT's, computed otherwise."

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from medart.core.randomness import rng
from medart.method.caption_files import captions_for
from medart.method.lora import add_loras, perturb_loras
from medart.method.model import load_pretrained
from medart.recipes.recipe import recipe
from medart.training import models as models_room
from medart.training.adapters import save_adapters
from medart.training.batches import draw_batch, training_set
from medart.training.fused_lora import cast_lora_weights
from medart.training.merging import merge_and_save, merge_loras
from medart.training.models import load_base, load_model, plain_blocks
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


def plain_and_fused(r):
    "The method's own model with PEFT's LoRAs, and the trainer's; both moved alike."
    return [perturb_loras(m) for m in (add_loras(load_pretrained(r), r), load_model(r))]


def values_and_gradients(model, n, cast=False, of="predict"):
    zt, t = (
        torch.randn(
            n, *model.latent_shape, generator=rng(0, "zt"), dtype=torch.float64
        ),
        torch.tensor([500, 20, 900])[:n],
    )
    nets = model.networks if cast else []
    with cast_lora_weights(nets, model.dtype):
        cond = model.encode_text(["a red star on a blue field", "a", "two"][:n])
        out = model.predict(zt.to(model.dtype), t, cond)
        grads = torch.autograd.grad(
            out.double().pow(2).mean(), list(model.trainable().values())
        )
    return [out, *grads]


def largest_gap(theirs, ours):
    return max(
        ((x.double() - y.double()).norm() / x.double().norm()).item()
        for x, y in zip(theirs, ours, strict=True)
    )


@pytest.mark.parametrize("n", [1, 3])
def test_fused_modules_are_the_plain_ones_in_double_precision(n):
    "One image at a time uses a layer norm with weights, several do not; copies or none."
    r = recipe("skin", scale="tiny", dtype="float64", alpha=16)
    plain, fused = plain_and_fused(r)
    want = values_and_gradients(plain, n)
    for cast in (False, True):
        assert largest_gap(want, values_and_gradients(fused, n, cast)) < 1e-12
    with plain_blocks(fused):
        assert largest_gap(want, values_and_gradients(fused, n)) < 1e-12


def test_in_sixteen_bits_they_are_no_further_from_double_precision():
    "Errors of all gradients together, against the same weights in double precision."
    error = {}
    for n in (1, 3):
        models = {
            name: perturb_loras(
                load_model(recipe("skin", scale="tiny", lean_lora=True, dtype=dtype))
            )
            for name, dtype in (("exact", "float64"), ("fused", "bfloat16"))
        }
        for part in ("transformer", "text_encoder"):
            weights = getattr(models["fused"], part).state_dict()
            getattr(models["exact"], part).load_state_dict(weights)
        want = values_and_gradients(models["exact"], n)
        for name, inside in (
            ("before", plain_blocks(models["fused"])),
            ("fused", nullcontext()),
        ):
            with inside:
                got = values_and_gradients(models["fused"], n, cast=True)
            gaps = [x.double() - y for x, y in zip(got[1:], want[1:])]
            error[n, name] = (get_total_norm(gaps) / get_total_norm(want[1:])).item()
        assert 0 < error[n, "fused"] < 1.05 * error[n, "before"], error


def test_t5_s_norm_rounds_once():
    "Against double precision, where T5 itself computes the mean square in single."
    torch.manual_seed(0)
    x, w = 3 * torch.randn(50, 64), torch.rand(64) + 0.5
    norm = T5LayerNorm(64)
    norm.weight.data = w
    fused = models_room._fused_classes()[T5LayerNorm]
    norm.__class__ = fused
    exact = x.double() * w * (x.double().pow(2).mean(-1, True) + 1e-6).rsqrt()
    assert (norm(x) - exact).norm() < 1e-6 * exact.norm()
    errors = []
    for kind in (T5LayerNorm, fused):
        norm.bfloat16().__class__ = kind
        seen = x.bfloat16().double()
        exact = seen * norm.weight * (seen.pow(2).mean(-1, True) + 1e-6).rsqrt()
        errors.append((norm(x.bfloat16()) - exact).norm())
    assert errors[1] <= errors[0]


def test_names_files_and_weights_stay_as_they_are(tmp_path):
    "A model that was fused writes what one writes that was not."
    r = recipe("skin", scale="tiny")
    plain, fused = plain_and_fused(r)
    for one, other in zip(plain.networks, fused.networks):
        a, b = one.state_dict(), other.state_dict()
        assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
        assert list(dict(one.named_modules())) == list(dict(other.named_modules()))
    files = []
    for k, model in enumerate((plain, fused)):
        save_adapters(model, tmp_path / f"adapters{k}")
        merge_and_save(model, tmp_path / f"merged{k}")
        folders = tmp_path / f"adapters{k}", tmp_path / f"merged{k}"
        files.append(
            {
                str(f.relative_to(top)): f.read_bytes()
                for top in folders
                for f in sorted(top.rglob("*"))
                if f.is_file()
            }
        )
    assert len(files[0]) > 8 and files[0].keys() == files[1].keys()
    assert [k for k in files[0] if files[0][k] != files[1][k]] == []


def attention(model):
    return model.transformer.base_model.model.transformer_blocks[0].attn1


def test_frozen_weights_are_one_matrix_and_become_one_again():
    "Each layer's weight is a view of it; a moved or copied model makes its own."
    model = perturb_loras(load_model(recipe("skin", scale="tiny")))
    want = values_and_gradients(model, 1)

    def homes(m):
        layers = attention(m).members()
        return {x.get_base_layer().weight.untyped_storage().data_ptr() for x in layers}

    assert len(homes(model)) == 1
    double = copy.deepcopy(model)
    assert len(homes(double)) == 3, "a copy keeps each weight by itself at first"
    assert all(map(torch.equal, want, values_and_gradients(double, 1)))
    assert len(homes(double)) == 1 and homes(double) != homes(model)
    double.to(torch.float64)
    assert len(homes(double)) == 3
    assert largest_gap(want, values_and_gradients(double, 1)) < 1e-4
    assert len(homes(double)) == 1
    with torch.no_grad():  # a change of one weight is seen by the whole
        layer = attention(model).to_k.get_base_layer()
        layer.weight.data = layer.weight * 2
    assert largest_gap(want, values_and_gradients(model, 1)) > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        "hook",
        "dropout",
        "disabled",
        "merged",
        "one merged",
        "second",
        "trained",
        "rank",
    ],
)
def test_layers_that_are_not_plain_and_alike_are_called_one_by_one(change):
    "The result is that of the plain modules, and of nothing else."
    r = recipe("skin", scale="tiny", dtype="float64")
    model = perturb_loras(load_model(r))
    attn, net, called = attention(model), model.transformer, []
    assert attn.joined(torch.float64) is not None
    if change == "hook":
        attn.to_v.register_forward_hook(lambda *a: called.append(1))
    if change == "dropout":
        attn.to_v.lora_dropout["default"] = torch.nn.Dropout(0.5).eval()
    if change == "disabled":
        net.base_model.disable_adapter_layers()
    if change == "merged":
        net.merge_adapter()
    if change == "one merged":
        attn.to_k.merge()
    if change == "second":
        more = dict(r=2, target_modules=["to_q"], init_lora_weights=False)
        net.add_adapter("other", LoraConfig(**more))
        net.base_model.set_adapter(["default", "other"])
    if change == "trained":
        attn.to_q.get_base_layer().weight.requires_grad_(True)
    if change == "rank":
        attn.to_q.scaling["default"] = 0.5
    assert attn.joined(torch.float64) is None
    x = torch.randn(2, 9, attn.query_dim, generator=rng(0, "x"), dtype=torch.float64)
    with torch.no_grad(), cast_lora_weights(model.networks, torch.float64):
        ours = attn(x)
        with plain_blocks(model):
            theirs = attn(x)
    assert (ours - theirs).abs().max() < 1e-12
    assert (len(called) == 2) == (change == "hook")


def test_sampling_without_loras_and_after_merging_is_fused_too():
    r = recipe("skin", scale="tiny", dtype="float64")
    models = dict(base=load_base(r), merged=merge_loras(perturb_loras(load_model(r))))
    for model in models.values():
        attn = next(m for m in model.transformer.modules() if hasattr(m, "to_q"))
        with torch.no_grad():
            assert attn.joined(torch.float64)[-1] == ()
            x = torch.randn(
                2, *model.latent_shape, generator=rng(0, "z"), dtype=torch.float64
            )
            cond = model.encode_text(["a star", ""])
            ours = model.predict(x, torch.tensor(300), cond)
            with plain_blocks(model):
                theirs = model.predict(
                    x, torch.tensor(300), model.encode_text(["a star", ""])
                )
        assert 0 < (ours - theirs).abs().max() < 1e-12


def test_sixteen_bits_without_lean_lora_stay_the_libraries_own():
    model = load_model(recipe("skin", scale="tiny", dtype="bfloat16"))
    kinds = {type(m).__module__ for net in model.networks for m in net.modules()}
    assert not [kind for kind in kinds if kind.startswith("medart")]
