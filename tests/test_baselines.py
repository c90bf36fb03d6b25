"Every baseline trains, stops, goes on, generates and saves as PixArt-alpha does, and says what its stock pipeline says."

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from everywhere import replace_everywhere
from medart.training import cuda_graphs as cuda_graphs_room
from medart.bundled.random_pipelines import random_pipeline
from medart.method.baselines import SDXL, StableDiffusion
from medart.method.dit_baselines import HunyuanDiT
from medart.bundled.benchmark_models import known_times
from medart.core.randomness import rng
from medart.training.sampling_runs import generate
from medart.training.batches import draw_batch, training_set
from medart.training.step import color_gradients, diffusion_gradients
from medart.training.trainer import train
from medart.method.embeddings import Moments
from medart.method.lora import perturb_loras
from medart.training.adapters import save_adapters
from medart.training.models import load_base, load_model
from medart.core.locations import locate
from medart.recipes.methods import METHODS
from medart.recipes.recipe import recipe
from medart.recipes.runs import run_dir
from medart.recipes.scales import FAMILIES
from medart.method.caption_files import captions_for

CAPTIONS = ["a red circle on a blue background", "a dermoscopic image of melanoma"]
SMALL = dict(
    scale="tiny",
    epochs=2.0,
    batch_size=2,
    interval=3,
    solver_steps=2,
    checkpoint_every=1,
    log_every=1,
    sample_every=0,
    gen_steps=2,
    gen_block=2,
    gen_count=0,
)
BASELINES = [m for m in METHODS if METHODS[m].get("family", "pixart") != "pixart"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "For a method, where its weights are: random ones where there are no trained ones."
    where = tmp_path_factory.mktemp("random")

    def of(method):
        family = METHODS[method]["family"]
        if FAMILIES[family]["tiny"]:
            return {}
        if family == "sd14":
            return dict(model="data/tiny/sd")
        return dict(
            model=str(
                where / family
                if (where / family).exists()
                else random_pipeline(family, where / family)
            )
        )

    return of


@pytest.mark.parametrize("method", ["sd15", "sdxl", "hunyuan", "fast_dit"])
def test_stopped_and_continued_it_ends_the_same_and_generates(made, weights, method):
    r = recipe("skin", method, data="made", **(SMALL | weights(method)))

    def result():
        return {
            str(f.relative_to(run_dir(r))): f.read_bytes()
            for f in [*run_dir(r).rglob("*.safetensors"), run_dir(r) / "losses.csv"]
        }

    train(r)
    want = result()
    shutil.rmtree(run_dir(r))
    for k in (2, 3, 6):
        train(r, stop_after=k)
    train(r)
    assert len(want) >= 4 and result() == want
    assert pd.read_csv(run_dir(r) / "losses.csv").color.notna().sum() == 2, (
        "two color losses"
    )
    base, trained = load_base(r), load_model(r, adapters=run_dir(r))
    text = ["melanoma"] if method == "fast_dit" else CAPTIONS[:1]
    z, t = torch.randn(1, *base.latent_shape, generator=rng(0, "z")), torch.tensor(500)
    with torch.no_grad():
        assert (
            base.predict(z, t, base.encode_text(text))
            - trained.predict(z, t, trained.encode_text(text))
        ).abs().max() > 1e-5, "training changed nothing"
    out = generate(r)
    assert len(list(out.rglob("*.png"))) == 4
    assert json.loads((out / "key.json").read_text())["key"]


def adapted(r, folder):
    "A model whose LoRAs change something, saved to a folder."
    model = perturb_loras(load_model(r), 0.05)
    return model, save_adapters(model, folder)


def seen(net, run):
    "What a network returned in the first of its passes within a run, and what it was given."
    got = []
    hook = net.register_forward_hook(
        lambda m, a, k, out: got.append((a, k, out)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return got[0]


@pytest.mark.parametrize(
    "method,kind", [("sd15", StableDiffusion), ("sdxl", SDXL), ("hunyuan", HunyuanDiT)]
)
def test_the_stock_pipeline_sees_the_same_noise(weights, tmp_path, method, kind):
    "Diffusers' own pipeline with our adapters calls its network with the same captions."
    r = recipe("skin", method, scale="tiny", **weights(method))
    model, folder = adapted(r, tmp_path)
    plain = (
        {}
        if method == "sdxl"
        else dict(safety_checker=None, requires_safety_checker=False)
    )
    pipe = kind.pipeline.from_pretrained(locate(r.model), dtype=torch.float32, **plain)
    name = next(iter(kind.parts))
    if method == "hunyuan":
        pipe.transformer = PeftModel.from_pretrained(
            pipe.transformer, str(folder / "transformer_lora")
        )
    else:
        pipe.load_lora_weights(str(folder))
    z = torch.randn(1, *model.latent_shape, generator=rng(0, "start"))
    more = dict(use_resolution_binning=False) if method == "hunyuan" else {}
    args, kw, out = seen(
        getattr(pipe, name),
        lambda: pipe(
            CAPTIONS[0],
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=4.5,
            latents=z,
            output_type="latent",
            **more,
        ),
    )
    zt, t = (
        args[0] if args else kw["sample"],
        args[1] if len(args) > 1 else kw["timestep"],
    )
    t = t.flatten()[:1].long()[0]
    with torch.no_grad():
        c = model.encode_text(["", CAPTIONS[0]])
        ours = model.predict(zt, t, c)
    given = kw["encoder_hidden_states"]
    assert (given - c.emb).abs().max() < 1e-5, "captions differ"
    theirs = (out[0] if isinstance(out, tuple) else out.sample)[:, :4]
    assert (theirs - ours).abs().max() < 1e-4 * ours.abs().max(), "predictions differ"
    unadapted = load_base(r)
    with torch.no_grad():
        assert (
            unadapted.predict(zt, t, unadapted.encode_text(["", CAPTIONS[0]])) - ours
        ).abs().max() > 1e-2 * ours.abs().max(), (
            "the adapters should change the prediction, or this test shows nothing"
        )


def test_rows_of_the_tables_name_models_that_exist():
    "Every baseline is a row, at both scales, and differs from PixArt-alpha in its weights or its start."
    assert set(BASELINES) == {
        "sd14",
        "sd15",
        "sdxl",
        "hunyuan",
        "fast_dit",
        "sd15_hldf",
    }
    for m in METHODS:
        r = recipe("kvasir", m, scale="paper")
        assert r.model and r.model == FAMILIES[r.family]["paper"]
    for f in FAMILIES.values():
        assert not f["tiny"] or Path(locate(f["tiny"])).is_dir(), (
            f"{f['tiny']} is missing"
        )


def test_wrong_uses_are_named(made, weights):
    with pytest.raises(ValueError, match="lora_text=False"):
        load_model(
            recipe(
                "skin", "hunyuan", scale="tiny", lora_text=True, **weights("hunyuan")
            )
        )
    with pytest.raises(ValueError, match="none of common nevus.*captions=class"):
        train(recipe("skin", "fast_dit", data="made", captions="simple", **SMALL))
    with pytest.raises(ValueError, match="text_bits=4: only PixArt-alpha"):
        recipe("skin", "sd15", scale="tiny", text_bits=4)
    with pytest.raises(ValueError, match="Choose one of: pixart, sd14"):
        recipe("skin", family="sd3")
    with pytest.raises(ValueError, match="sdxl.*has no small bundled model"):
        load_base(recipe("skin", "sdxl", scale="tiny"))


class Moves(TorchDispatchMode):
    "Counts operations between main memory and a device, which a recording must not hold."

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (
            len(
                {
                    t.device.type
                    for t in tree_leaves((args, kwargs, out))
                    if isinstance(t, torch.Tensor) and t.dim()
                }
            )
            > 1
        ):
            self.names.append(str(func))
        return out


@pytest.mark.parametrize("method", ["no_hldf", "sd15", "sdxl", "hunyuan"])
def test_what_is_recorded_stays_on_the_device(method, made, weights, monkeypatch):
    "On the meta device, which has no numbers; (Fast-DiT's autocast does not know it.)"
    r = recipe(
        "skin",
        method,
        scale="tiny",
        data="made",
        captions="simple",
        batch_size=2,
        solver_steps=2,
        cuda_graphs=True,
        lean_lora=True,
        **({} if method == "no_hldf" else weights(method)),
    )
    model = load_model(r)
    ts = training_set(model, r, captions_for(r, "train"))
    model.to("meta")
    ts.moments = Moments(ts.moments.mean.to("meta"), ts.moments.std.to("meta"))
    b = draw_batch(model, r, ts, 0)
    seen, moved = [], []

    def capture(f, ins):
        with Moves() as m:
            outs = f(*ins)
        seen.append(len(outs))
        moved.extend(m.names)
        return outs, lambda: None

    # transformers asks whether a stream is being recorded, and looks into masks only where none is
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *a: True)
    replace_everywhere(monkeypatch, cuda_graphs_room.capture, capture)
    monkeypatch.setattr(cuda_graphs_room.Graphed, "devices", ("meta",))
    params = list(model.trainable().values())
    diffusion_gradients(model, r, b, params)
    with known_times(model):
        color_gradients(model, r, b, params)
    assert len(seen) >= 3 and moved == []
    with Moves() as m:
        torch.ones(2).to("meta")
    assert m.names, "a move that is not seen"
