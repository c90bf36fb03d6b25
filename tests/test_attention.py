"Attention is computed by the way that is fastest where it runs, and a run stays with it."

import json
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from operations import CountedOperations
from medart.bundled.benchmark_models import bench_model, bench_set, one_step
from medart.recipes.recipe import recipe
from medart.training import device as device_room
from medart.training.batches import draw_batch
from medart.training.device import (
    attention_by,
    attention_calls,
    attention_order,
    fastest_order,
    measure_attention,
)

CANNOT = "cannot do this here"
WAYS = ("flash", "efficient", "cudnn", "math")


def small(**changes):
    return recipe("skin", **dict(scale="tiny", batch_size=2, interval=0) | changes)


@pytest.fixture(scope="module")
def model():
    return bench_model(small())


@pytest.fixture
def on_a_gpu(monkeypatch, tmp_path):
    "What is chosen as on a GPU, from times that a test gives."
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path))
    given, asked = {}, []

    def measured(model, r, repeats=10):
        asked.append(r.attention)
        return given

    class Cuda:
        "A model that says it is on a GPU."

        device = torch.device("cuda")
        dtype = torch.bfloat16

    monkeypatch.setattr(device_room, "measure_attention", measured)
    monkeypatch.setattr(
        device_room,
        "attention_calls",
        lambda model, r: Counter({("q", r.batch_size): 1}),
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    return Cuda(), given, asked


def times(**ways):
    return dict.fromkeys(WAYS, CANNOT) | ways


def test_all_shapes_of_a_step_are_seen(model):
    calls = attention_calls(model, small())
    blocks = len(model.transformer.base_model.model.transformer_blocks)
    layers = len(model.text_encoder.base_model.model.encoder.block)
    assert sum(calls.values()) == 2 * blocks + layers
    masks = {mask for _, _, mask in calls}
    longest = model.max_tokens
    assert masks >= {None, (2, 1, 1, longest)}
    assert all(q[0] == 2 for q, _, _ in calls)


def test_what_this_processor_can_do_is_timed(model):
    measured = measure_attention(model, small(), repeats=2)
    assert measured.keys() == attention_calls(model, small()).keys()
    for _, ways in measured.values():
        assert ways["flash"] > 0 and ways["math"] > 0
        assert ways["cudnn"] == ways["efficient"] == CANNOT
    order = fastest_order(measured)
    assert set(order) == {"flash", "math"}


def test_the_order_is_the_best_of_all():
    measured = {
        "plain": (10, times(flash=1.0, cudnn=0.9, efficient=3.0, math=9.0)),
        "masked": (10, times(cudnn=5.0, efficient=2.0, math=9.0)),
    }
    # cudnn is the fastest where nothing is masked, but would do the masked ones too
    assert fastest_order(measured)[:2] == ["flash", "efficient"]
    measured["masked"][1]["cudnn"] = 2.05
    assert fastest_order(measured)[0] == "cudnn"
    assert fastest_order(measured, "math")[0] == "math"


def test_a_way_that_can_do_nothing_is_refused():
    measured = {"plain": (1, times(math=1.0, flash="does not fit into memory"))}
    assert fastest_order(measured) == ["math"]
    with pytest.raises(ValueError, match="'flash': it does not fit.*torch, math"):
        fastest_order(measured, "flash")


def test_sums_in_any_order_are_refused_where_bytes_must_be_equal(model, monkeypatch):
    whole = F.scaled_dot_product_attention
    calls = []

    def drifting(q, k, v, attn_mask=None):
        calls.append(0)
        return whole(q * (1 + 1e-3 * len(calls)), k, v, attn_mask=attn_mask)

    shapes = attention_calls(model, small())
    monkeypatch.setattr(device_room, "attention_calls", lambda model, r: shapes)
    monkeypatch.setattr(device_room.F, "scaled_dot_product_attention", drifting)
    strict = measure_attention(model, small(), repeats=1)
    assert {t["math"] for _, t in strict.values()} == {"its sums come in any order"}
    loose = measure_attention(model, small(deterministic=False), repeats=1)
    assert all(t["math"] > 0 for _, t in loose.values())


def test_on_a_gpu_what_is_timed_is_a_recording(model, monkeypatch):
    recorded = []

    def capture(f, ins):
        recorded.append(len(f(*ins)))
        return None, lambda: f(*ins)

    monkeypatch.setattr(device_room.Graphed, "devices", ("cpu",))
    monkeypatch.setattr(device_room, "capture", capture)
    measured = measure_attention(model, small(), repeats=1)
    assert recorded == [3] * (2 * len(measured))  # gradients of q, k and v, both ways


def test_on_a_cpu_torch_chooses(model, monkeypatch):
    monkeypatch.setattr(device_room, "measure_attention", None)
    for name in ("auto", "torch"):
        assert attention_order(model, small(attention=name)) == []


def test_a_named_way_is_used_and_gives_the_same_gradients(model, capsys):
    made, fused = {}, {}
    for name in ("torch", "flash", "math"):
        r = small(attention=name)
        b = draw_batch(model, r, bench_set(model, r), 0)
        with attention_by(attention_order(model, r)), CountedOperations() as seen:
            made[name] = one_step(model, r, b)[1]
        fused[name] = sum(
            n for what, n in seen.counts.items() if "scaled_dot_product_flash" in what
        )
    assert fused["math"] == 0 < fused["torch"] == fused["flash"]
    for name in ("torch", "flash"):
        gap = get_total_norm([x - y for x, y in zip(made[name], made["math"])])
        assert gap < 1e-5 * get_total_norm(made["math"])
    assert "flash before math" in capsys.readouterr().out


def test_a_way_that_is_not_here_is_named_with_those_that_are(model):
    with pytest.raises(ValueError, match="attention='cudnn': it cannot.*flash, math"):
        attention_order(model, small(attention="cudnn"))
    with pytest.raises(ValueError, match="attention 'flush'.*mean 'flash'"):
        small(attention="flush")


def test_a_run_goes_on_with_what_it_began_with(on_a_gpu, tmp_path, capsys):
    model, given, asked = on_a_gpu
    given["plain"] = 3, times(flash=1.0, math=2.0)
    r = small(dtype="bfloat16")
    assert attention_order(model, r) == ["flash", "math"]
    said = capsys.readouterr().out
    assert "flash before math, 3e+03 ms" in said and "math 6e+03 ms" in said
    given["plain"] = 3, times(flash=2.0, math=1.0)
    assert attention_order(model, r) == ["flash", "math"] and asked == ["auto"]
    assert not capsys.readouterr().out
    # other shapes, and other rules for sums, are measured by themselves
    assert attention_order(model, small(batch_size=4))[0] == "math"
    assert attention_order(model, small(deterministic=False))[0] == "math"
    assert asked == ["auto"] * 3
    assert len(list((tmp_path / "attention").iterdir())) == 3


def test_a_damaged_file_is_measured_anew(on_a_gpu, tmp_path):
    model, given, asked = on_a_gpu
    given["plain"] = 1, times(flash=1.0, math=2.0)
    attention_order(model, small())
    (path,) = (tmp_path / "attention").iterdir()
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    assert attention_order(model, small()) == ["flash", "math"] and len(asked) == 2
    assert json.loads(path.read_bytes()[16:]) == ["flash", "math"]


def test_a_named_way_changes_nothing_that_is_kept(on_a_gpu, tmp_path):
    model, given, asked = on_a_gpu
    given["plain"] = 1, times(flash=1.0, math=2.0)
    assert attention_order(model, small(attention="math")) == ["math", "flash"]
    assert not (tmp_path / "attention").exists()
