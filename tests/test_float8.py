"T5 in FP8: how far it rounds, what it keeps for a gradient, and what it does not go with."

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from operations import CountedOperations
from medart.bundled.benchmark_cases import other_loras
from medart.bundled.benchmark_models import bench_set
from medart.core.randomness import rng
from medart.method.lora import perturb_loras
from medart.recipes.recipe import recipe
from medart.training.batches import draw_batch
from medart.training.cuda_graphs import uses_cuda_graphs
from medart.training.merging import merge_and_save, merge_loras
from medart.training.models import Float8Linear, is_float8, load_base, load_model
from medart.training.step import color_gradients, diffusion_gradients
from medart.workflows.preflight_checks import check_packages

FEW = dict(text_bits=8, text_quantizer="fp8")


def small(**changes):
    usual = dict(scale="tiny", batch_size=1, interval=0, solver_steps=2)
    return recipe("skin", **usual | FEW | changes)


def layer(dtype=torch.float32, bias=False, size=1.0):
    net = nn.Linear(40, 24, bias=bias)
    net.weight.data = size * torch.randn(24, 40, generator=rng(0, "w"))
    return net.to(dtype).requires_grad_(False)


def kept(net):
    "The weights that a layer in FP8 stands for."
    return net.weight.view(torch.float8_e4m3fn).double() * net.scale.double()[:, None]


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_rounded_by_a_sixteenth_of_themselves_at_most(size, dtype):
    net = layer(dtype, size=size)
    W, few = net.weight.double(), Float8Linear(net)
    large = W.abs() > W.abs().amax(1, keepdim=True) / 2**10
    moved = (kept(few) - W).abs()
    assert (moved[large] <= W.abs()[large] / 16).all()
    assert 0.01 < moved.norm() / W.norm() < 0.04
    assert (few.scale.log2() % 1 == 0).all() and few.weight.element_size() == 1


def test_a_row_of_zeros_and_a_bias_stay():
    net = layer(bias=True)
    net.weight.data[3] = 0
    x = torch.randn(5, 40, generator=rng(0, "x"))
    y = Float8Linear(net)(x)
    assert y.isfinite().all() and (y[:, 3] == net.bias[3]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_product_and_its_gradient_are_those_of_the_kept_weights(dtype):
    few = Float8Linear(layer())
    x, dy = (torch.randn(2, 3, n, generator=rng(n, "x")).to(dtype) for n in (40, 24))
    x.requires_grad_()
    (slope,) = torch.autograd.grad(few(x), x, dy)
    W, near = kept(few), 1e-12 if dtype == torch.float64 else 1e-2
    want = x.detach().double() @ W.T
    assert (few(x) - want).norm() < near * want.norm()
    assert (slope - dy.double() @ W).norm() < near * slope.norm()


def test_between_the_passes_only_bytes_are_kept():
    few, saved = Float8Linear(layer(torch.bfloat16)), []
    x = torch.randn(2, 40, dtype=torch.bfloat16, requires_grad=True)

    def pack(t):
        saved.append((t.dtype, tuple(t.shape)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        few(x)
    assert (torch.int8, (24, 40)) in saved
    assert not any(len(s) > 1 and d != torch.int8 for d, s in saved)


def test_gradients_are_near_those_of_whole_weights():
    made = {}
    for bits in (16, 8):
        quantizer = "fp8" if bits == 8 else "bitsandbytes"
        r = small(text_bits=bits, text_quantizer=quantizer)
        model = perturb_loras(load_model(r))
        b = draw_batch(model, r, bench_set(model, r), 0)
        params = list(model.trainable().values())
        for run in (diffusion_gradients, color_gradients):
            made[bits, run] = run(model, r, b, params)[1]
    for run in (diffusion_gradients, color_gradients):
        few, whole = made[8, run], made[16, run]
        gap = get_total_norm([a - b for a, b in zip(few, whole)])
        assert 0 < gap < 0.2 * get_total_norm(whole)


@pytest.mark.parametrize("alpha", [8, 16])
def test_loras_beside_it_are_fused_and_learn_what_peft_s_do(alpha):
    r = small(alpha=alpha)
    model = perturb_loras(load_model(r))
    b = draw_batch(model, r, bench_set(model, r), 0)
    params = list(model.trainable().values())
    fused, calls = {}, {}
    for name, way in dict(ours=nullcontext(), theirs=other_loras(model)).items():
        with way, CountedOperations() as seen:
            fused[name] = diffusion_gradients(model, r, b, params)[1]
        calls[name] = seen.counts.total()
    gap = get_total_norm([x - y for x, y in zip(*fused.values())])
    assert gap < 1e-5 * get_total_norm(fused["ours"])
    assert calls["ours"] < calls["theirs"]


def test_the_network_survives_what_is_done_to_networks():
    r = small()
    model = load_base(r)
    codes = [m for m in model.text_encoder.modules() if isinstance(m, Float8Linear)]
    before = [kept(m) for m in codes]
    model.to(torch.bfloat16).to("cpu")
    assert all(m.weight.dtype == torch.int8 for m in codes)
    assert all(torch.equal(a, kept(m)) for a, m in zip(before, codes))
    emb = model.encode_text(["a red star"]).emb
    assert emb.dtype == torch.bfloat16 and emb.isfinite().all()


def test_loras_are_not_merged_into_coarse_weights(tmp_path):
    model = perturb_loras(load_model(small()))
    before = model.encode_text(["a red star"]).emb
    with pytest.raises(ValueError, match="text_bits=16"):
        merge_and_save(model, tmp_path / "pipeline")
    merge_loras(model)
    assert is_float8(model.text_encoder)
    assert torch.equal(model.encode_text(["a red star"]).emb, before)


def test_it_may_be_recorded_and_offloaded():
    assert uses_cuda_graphs(small(cuda_graphs=True))
    assert not uses_cuda_graphs(small(cuda_graphs=True, text_quantizer="bitsandbytes"))
    assert small(offload=True).offload


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(text_bits=16), "text_bits=8 too"),
        (dict(text_bits=4), "text_bits=8 too"),
        (dict(dora_text=True), "DoRA reads whole weights"),
        (dict(text_quantizer="fp4"), "bitsandbytes, fp8"),
        (dict(text_quantizer=8), "bitsandbytes, fp8"),
        (dict(method="sd15"), "only PixArt-alpha"),
    ],
)
def test_what_does_not_go_together_is_refused(change, why):
    with pytest.raises(ValueError, match=why):
        small(**change)


def test_no_package_is_asked_for():
    names = [f.part for f in check_packages(small())]
    assert not any("bitsandbytes" in n for n in names)
