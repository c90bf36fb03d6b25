"A run that is stopped, killed or damaged ends where an undisturbed one ends, bit for bit; wrong input is named."

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from everywhere import replace_everywhere
from medart.training import cuda_graphs as cuda_graphs_room
from medart.training import memory as memory_room
from medart.data.images import unit
from medart.data.loading import load_split
from medart.data.reports import with_names
from medart.training.sampling_runs import generate
from medart.method.hldf import diffusion_loss
from medart.training.batches import draw_batch, training_set
from medart.training.checkpoints import checkpoint_fault
from medart.training.cuda_graphs import uses_cuda_graphs
from medart.training.device import compile_blocks, deterministic
from medart.training.runs import check_steps, missing_color_note
from medart.training.step import (
    color_gradients,
    diffusion_gradients,
    make_optimizer,
    training_step,
)
from medart.training.trainer import train
from medart.method.losses import color_loss
from medart.method.lora import perturb_loras
from medart.training.models import load_model
from medart.recipes.recipe import recipe
from medart.recipes.runs import run_dir
from medart.method.sampler import dpmpp_step
from medart.method.schedule import schedule
from medart.training.cuda_graphs import Graphed, recordings, Recomputed
from medart.training.memory import count_calls, KeptPasses
from medart.method.caption_files import captions_for

SMALL = dict(
    scale="tiny",
    epochs=2.0,
    batch_size=2,
    interval=3,
    solver_steps=2,
    checkpoint_every=1,
    log_every=1,
    gen_steps=2,
    gen_block=2,
)


@pytest.fixture
def small(made):
    "Eight steps over two epochs with two color losses."
    return lambda **k: recipe("skin", data="made", **(SMALL | k))


def result(r):
    "Everything a run leaves that must not depend on how it was interrupted."
    out = run_dir(r)
    return {
        str(f.relative_to(out)): f.read_bytes()
        for f in [*out.glob("*_lora/*"), out / "losses.csv", out / "config.json"]
    } | {
        f.name: f.read_bytes()
        for f in sorted((out / "checkpoints").glob("step-*"))[-1].glob("*.safetensors")
    }


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(t5_dropout=True, caption_dropout=0.3, crop="random"),
        dict(cuda_graphs=True, lean_lora=True, dtype="bfloat16"),
    ],
    ids=["plain", "dropout and random crops", "as at full size"],
)
def test_stopped_after_any_step_it_ends_the_same(small, change):
    r = small(**change)
    train(r)
    want = result(r)
    shutil.rmtree(run_dir(r))
    for k in range(1, 8):
        train(r, stop_after=k)
    assert not (run_dir(r) / "done.json").exists()
    train(r)
    got = result(r)
    assert len(want) >= 7 and got.keys() == want.keys()
    assert [n for n in want if got[n] != want[n]] == []


def wait_for_checkpoint(r, step):
    for _ in range(4800):
        if list((run_dir(r) / "checkpoints").glob(f"step-{step:07d}")):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no checkpoint of step {step} in four minutes")


def test_accelerate_launches_and_passes_on_sigterm(small, folders, ready_python):
    "Two CPU processes from the shell, told to stop; one process then takes the run up."
    r = small(epochs=50.0)
    line = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        *"--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split(),
        *"-m medart.training.launch --dataset skin --data made".split(),
    ]
    options = [
        x for k, v in (SMALL | dict(epochs=50.0)).items() for x in (f"--{k}", str(v))
    ]
    env = os.environ | dict(
        ACCELERATE_USE_CPU="yes",
        OMP_NUM_THREADS="1",
        MASTER_PORT="29517",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="240",
    )
    p = subprocess.Popen(
        line + options,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_checkpoint(r, 2)
    p.send_signal(signal.SIGTERM)
    text = p.communicate()[0]
    newest = sorted((run_dir(r) / "checkpoints").glob("step-*"))[-1]
    step = int(newest.name[5:])
    assert checkpoint_fault(newest) == ""
    assert (
        f"SIGTERM: stopped after step {step} of 200, checkpoint saved. Run the same command again"
        in text
    )
    train(r, stop_after=step + 1)
    assert (run_dir(r) / "checkpoints" / f"step-{step + 1:07d}").exists()


def test_past_a_damaged_checkpoint_the_run_ends_the_same(small, capsys):
    r = small()
    train(r)
    want = result(r)
    shutil.rmtree(run_dir(r))
    train(r, stop_after=5)
    newest = sorted((run_dir(r) / "checkpoints").glob("step-*"))[-1]
    f = newest / "adapters.safetensors"
    b = f.read_bytes()
    f.write_bytes(b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :])
    train(r)
    said = capsys.readouterr().out
    assert newest.name in said and "Passing over" in said
    assert result(r) == want


def test_checkpoint_of_another_recipe_is_refused_and_kept(small):
    r, other = small(), small(lr=5e-4)
    train(r, stop_after=3)
    run_dir(other).parent.mkdir(exist_ok=True)
    shutil.copytree(run_dir(r), run_dir(other))
    with pytest.raises(ValueError, match="another recipe"):
        train(other)
    assert len(list((run_dir(other) / "checkpoints").glob("step-*"))) == 2


def test_finished_work_is_not_done_again(small):
    r = small()
    train(r)
    before = {f: f.stat().st_mtime_ns for f in run_dir(r).rglob("*")}
    train(r)
    assert {f: f.stat().st_mtime_ns for f in run_dir(r).rglob("*")} == before


def test_unreadable_image_is_set_aside_and_named(small, folders, capsys):
    r = small()
    bad = folders[0] / "made/melanoma/1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    train(r)
    assert (
        "1 quarantined" in capsys.readouterr().out
        and (run_dir(r) / "done.json").exists()
    )
    out = load_split(r, "train").folder.parent
    assert with_names(out, "quarantine")[["source", "reason"]].values.tolist() == [
        ["melanoma/1.png", "truncated"]
    ]
    assert not any("melanoma/1.png" in f.read_text() for f in out.rglob("*.csv"))


def test_wrong_input_is_named(small, folders, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(recipe("skin", scale="tiny", data="nowhere"))
    r = small()
    (folders[0] / "a file").write_text("")
    monkeypatch.setenv("MEDART_OUTPUTS", str(folders[0] / "a file" / "outputs"))
    with pytest.raises(NotADirectoryError, match="MEDART_OUTPUTS.*is a file"):
        train(r)
    monkeypatch.setenv(
        "MEDART_OUTPUTS", str(folders[0] / "made/melanoma" / ("x" * 300))
    )
    with pytest.raises(ValueError, match="MEDART_OUTPUTS.*too long"):
        train(r)


@pytest.mark.skipif(
    not Path("/proc/self").exists(),
    reason="needs a folder that nobody can write to, as Linux has",
)
def test_outputs_that_cannot_be_written_are_named(small, monkeypatch):
    r = small()
    monkeypatch.setenv("MEDART_OUTPUTS", "/proc/self/outputs")
    with pytest.raises(
        PermissionError, match="Set MEDART_OUTPUTS to a folder you may write to"
    ):
        train(r)


def test_a_run_that_ends_before_its_first_color_loss_says_so(small, capsys):
    train(small(epochs=1, interval=50), stop_after=1)
    assert "no color loss" in capsys.readouterr().out
    train(small(epochs=1, interval=2, seed=1), stop_after=1)
    assert "no color loss" not in capsys.readouterr().out
    assert not missing_color_note(small(interval=0), 4) and not missing_color_note(
        small(interval=50, color_at_start=True), 4
    )
    with pytest.raises(ValueError, match="lr=0"):
        train(small(lr=0))
    assert check_steps(small(lr=0, lr_text=1e-4), 8) and not check_steps(
        small(lr=0, epochs=0), 8
    )


def test_images_are_the_same_bytes_after_an_interruption(small):
    r = small()
    with pytest.raises(FileNotFoundError, match="Train first"):
        generate(r)
    train(r)
    folder = generate(r)
    want = {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.png")}
    assert len(want) == 4
    for f in list(folder.rglob("*.png"))[:2]:
        f.unlink()
    (folder / "metadata.csv").unlink()
    generate(r)
    assert {
        f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.png")
    } == want
    about = Image.open(next(folder.rglob("*.png"))).text
    assert (
        "not for diagnosis" in about["note"]
        and about["caption"]
        and about["seed"] == "0"
    )
    assert (
        json.loads((folder / "key.json").read_text())["gen_steps"] == 2
        and Path(folder / "metadata.csv").exists()
    )


@pytest.mark.parametrize(
    "few",
    [
        dict(text_bits=8),
        dict(text_bits=4),
        dict(text_bits=8, text_quantizer="fp8"),
        dict(text_bits=8, text_quantizer="fp8", offload=True, lean_lora=True),
    ],
    ids=lambda few: " ".join(map(str, few.values())),
)
def test_beside_a_t5_of_few_bits_the_adapters_learn_resume_and_generate(
    small, few, caplog
):
    r = small(**few)
    train(r)
    want = result(r)
    shutil.rmtree(run_dir(r))
    for k in (3, 8):
        train(r, stop_after=k)
    assert result(r) == want
    up = {
        k: v
        for k, v in load_file(
            run_dir(r) / "text_encoder_lora/adapter_model.safetensors"
        ).items()
        if "lora_B" in k
    }
    assert up and all(v.abs().max() > 0 for v in up.values())
    assert len(list(generate(r).rglob("*.png"))) == 4
    assert not [m for m in caplog.messages if "will be cast" in m], (
        "each layer of T5 says at each step that it multiplies in half precision"
    )


def test_few_bits_want_a_package(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"\.\[small\].*text_bits=16"):
        load_model(small(text_bits=4))


# What makes a step fast changes nothing but rounding.
# (Padding: method/model; recomputing: training/memory; offload, no waiting for the device: training/step.)


@pytest.fixture
def ready(small):
    r = small(solver_steps=3, dtype="float64", t5_dropout=False)
    model = perturb_loras(load_model(r))
    s = captions_for(r, "train")
    return r, model, training_set(model, r, s)


def test_latents_from_disk_are_those_of_the_images(ready, folders):
    r, model, ts = ready
    stored = list((folders[1] / "latents").glob("*.safetensors"))
    again = training_set(model, r, captions_for(r, "train"))
    assert (
        len(stored) == 1
        and list((folders[1] / "latents").glob("*.safetensors")) == stored
    )
    assert torch.equal(again.moments.mean, ts.moments.mean)
    with torch.no_grad():
        m = model.encode_image(unit(ts.pixels[3][None]))
    assert (m.mean[0] - ts.moments.mean[3]).abs().max() < 1e-12 and (
        m.std[0] - ts.moments.std[3]
    ).abs().max() < 1e-12
    next(model.vae.parameters()).data.mul_(1.01)
    training_set(model, r, captions_for(r, "train"))
    assert len(list((folders[1] / "latents").glob("*.safetensors"))) == 2


def test_t5_runs_once_in_a_color_loss(ready):
    r, model, ts = ready
    t5 = model.text_encoder.base_model.model
    b, params = draw_batch(model, r, ts, 2), list(model.trainable().values())
    assert count_calls(
        t5, [model.transformer], lambda: color_gradients(model, r, b, params)
    ) == (1, 3)
    assert count_calls(
        t5,
        [model.transformer],
        lambda: color_gradients(model, replace(r, offload=True), b, params),
    ) == (2, 3)
    each = torch.autograd.grad(
        color_loss_encoding_at_each_step(model, r, b) / 3, params
    )
    # T5's layer norm and softmax round to single precision
    assert (
        max(
            (x - y).abs().max().item()
            for x, y in zip(each, color_gradients(model, r, b, params)[1])
        )
        < 1e-8
    )


def color_loss_encoding_at_each_step(model, r, b):
    "The same chain with T5 run anew, captions padded to the end and guidance in two passes at every step."
    sch, z, prev, pad = (
        schedule(model.abar, r.solver_steps),
        b.noise,
        None,
        model.pad_to,
    )
    model.pad_to = model.max_tokens
    for i in range(r.solver_steps):
        t = torch.tensor(sch.t[i])
        null, eps = (
            model.predict(z, t, model.encode_text(texts))
            for texts in ([""] * len(z), b.texts)
        )
        z0 = (z - sch.sigma[i] * (null + r.guidance * (eps - null))) / sch.alpha[i]
        z, prev = dpmpp_step(z, z0, prev, sch, i), z0
    model.pad_to = pad
    return color_loss(model.decode(z), b.x())


def test_larger_batches_are_averages_of_small_ones(ready):
    r, model, ts = ready
    b, params = draw_batch(model, r, ts, 2), list(model.trainable().values())
    halves = [draw_batch(model, r, ts, 2, rank, 2) for rank in range(2)]
    assert halves[0].texts + halves[1].texts == b.texts and torch.equal(
        torch.cat([h.noise for h in halves]), b.noise
    )
    for grads in (
        lambda b: torch.autograd.grad(diffusion_loss(model, r, b), params),
        lambda b: color_gradients(model, r, b, params)[1],
    ):
        assert (
            max(
                (w - (x + y) / 2).abs().max().item()
                for w, x, y in zip(grads(b), *map(grads, halves))
            )
            < 1e-8
        )  # as above


def test_compiled_blocks_give_the_same_gradients(ready):
    r, model, ts = ready
    b, params = draw_batch(model, r, ts, 0), []
    dit, t5 = (n.base_model.model for n in (model.transformer, model.text_encoder))
    for net, name in ((dit, "transformer_blocks"), (t5.encoder, "block")):
        setattr(net, name, getattr(net, name)[:1])  # one of each kind is enough
    params = list(model.trainable().values())
    grads = lambda: torch.autograd.grad(diffusion_loss(model, r, b), params)
    programs = lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    plain = grads()
    torch._dynamo.reset()
    compile_blocks(model, "aot_eager")
    before = programs()
    same = grads()
    assert programs() > before
    assert max((x - y).abs().max().item() for x, y in zip(plain, same)) < 1e-10


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(color_batch=1),
        dict(color_loss="energy", color_batch=1),
        dict(backprop_last_k=2),
        dict(guidance=1.0),
        dict(lora_text=False),
        dict(lora_transformer=False),
        dict(min_snr=5.0),
        dict(lean_lora=True, alpha=16),
    ],
    ids=lambda c: " ".join(c) or "as it is",
)
def test_recorded_steps_have_the_same_gradients(small, change):
    "On a GPU they are recorded; on a CPU the same functions run as they are."
    r = small(solver_steps=3, dtype="float64", captions="simple", **change)
    model = perturb_loras(load_model(r))
    b = draw_batch(model, r, training_set(model, r, captions_for(r, "train")), 2)
    params = list(model.trainable().values())
    for grads in (diffusion_gradients, color_gradients):
        (x, plain), (y, same) = (
            grads(model, replace(r, cuda_graphs=on), b, params) for on in (False, True)
        )
        assert (
            abs((x - y).item()) < 1e-12
            and max((p - q).abs().max().item() for p, q in zip(plain, same)) < 1e-10
        )
    assert recordings(model) and not {"predict", "read"} & set(vars(model))
    assert not recordings(copy.deepcopy(model)), (
        "a copy would replay what was recorded of the original"
    )
    assert not recordings(model.to("cpu")), (
        "what was recorded in one place is replayed in another"
    )


def test_a_recording_reads_its_inputs_anew_and_gives_copies(monkeypatch):
    "How recordings are kept and used, with a function called again in place of a GPU's replay."
    calls = []

    def again(f, ins):
        outs = f(*ins)

        def replay():
            for o, y in zip(outs, f(*ins)):
                o.copy_(y)

        calls.append([x.shape for x in ins])
        return outs, replay

    replace_everywhere(monkeypatch, cuda_graphs_room.capture, again)
    monkeypatch.setattr(Graphed, "devices", ("cpu",))
    double = Graphed(lambda x, i: [2 * x, i + 1])
    x = torch.ones(3)
    one, two = double(x, torch.tensor([1])), double(3 * x, torch.tensor([2]))
    assert one[0].tolist() == [2.0] * 3 and two[0].tolist() == [6.0] * 3, (
        "a result is overwritten by the next"
    )
    assert one[1].item() == 2 and two[1].item() == 3 and len(calls) == 1
    assert double(torch.ones(4), torch.tensor([1]))[0].shape == (4,)
    assert (
        double(x.double(), torch.tensor([1]))[0].dtype == torch.float64
        and len(calls) == 3
    )
    w, x = (
        torch.nn.Parameter(torch.tensor([2.0, 3.0])),
        torch.tensor([5.0, 7.0], requires_grad=True),
    )
    f = Recomputed(lambda x, i: [w * x, i], [w])
    for _ in range(2):
        y, i = f(x, torch.tensor([4]))
        z, _ = f(y, i)  # w*w*x, through the same recording twice
        gx, gw = torch.autograd.grad(z.sum(), [x, w])
        assert (
            gx.tolist() == [4.0, 9.0]
            and gw.tolist() == [20.0, 42.0]
            and i.item() == 4
            and not i.requires_grad
        )
        f.weights = None
    assert len(calls) == 5, "once forwards, once backwards"
    with torch.no_grad():
        assert f(x, torch.tensor([4]))[0].tolist() == [10.0, 21.0]


@pytest.mark.parametrize(
    "change",
    [
        dict(offload=True),
        dict(checkpoint_all=True),
        dict(t5_dropout=True),
        dict(text_bits=8),
    ],
    ids=lambda c: " ".join(c),
)
def test_what_must_not_be_recorded_is_not(small, change):
    "T5's dropout is off in a color loss, which may be recorded all the same."
    r = small(cuda_graphs=True, captions="simple", color_at_start=True, **change)
    model = load_model(r)
    ts = training_set(model, r, captions_for(r, "train"))
    assert not uses_cuda_graphs(r) and uses_cuda_graphs(r, event=True) == (
        "t5_dropout" in change
    )
    assert uses_cuda_graphs(small(cuda_graphs=True)) and uses_cuda_graphs(
        small(cuda_graphs=True, offload=True, lora_text=False)
    )
    training_step(
        model,
        r,
        draw_batch(model, r, ts, 0),
        make_optimizer(model, r),
        0,
        Accelerator(),
    )
    assert {k[0] for k in recordings(model)} == (
        {"predict", "read"} if "t5_dropout" in change else set()
    )


def test_torch_is_left_as_it_was_found(small):
    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = state()
    with pytest.raises(KeyError), deterministic(small(), "cuda"):
        assert state() == (True, False, False) and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        raise KeyError
    assert state() == before
    said = "some_cuda_kernel does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'."
    with (
        pytest.raises(RuntimeError, match="deterministic=False"),
        deterministic(small(), "cuda"),
    ):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="^another$"), deterministic(small(), "cuda"):
        raise RuntimeError("another")
    assert state() == before
    for r, device in ((small(), "cpu"), (small(deterministic=False), "cuda")):
        with deterministic(r, device):
            assert state() == before


@pytest.mark.parametrize("recorded", [False, True], ids=["checkpoints", "recorded"])
def test_kept_activations_change_no_bit_of_a_gradient(
    small, recorded, monkeypatch, capsys
):
    "From no pass to all of them; (t5 is read as ever)."
    r = small(solver_steps=4, captions="simple", checkpointing=True)
    r = replace(r, cuda_graphs=recorded, keep_activations=0.5)
    model = perturb_loras(load_model(r))
    b = draw_batch(model, r, training_set(model, r, captions_for(r, "train")), 2)
    params = list(model.trainable().values())
    free, made = [0], []

    class Watched(KeptPasses):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    replace_everywhere(monkeypatch, memory_room.free_memory, lambda device: free[0])
    replace_everywhere(monkeypatch, memory_room.KeptPasses, Watched)
    capsys.readouterr()
    want = color_gradients(model, r, b, params)[1]
    assert made[-1].passes == 0 and capsys.readouterr().out == ""
    model.forget()
    free[0] = 1
    assert all(map(torch.equal, want, color_gradients(model, r, b, params)[1]))
    kept = max(made, key=lambda k: k.passes)
    assert kept.passes == 1 and kept.size > 1e6, "the first pass tells how large one is"
    assert f"keeps what 1 of {r.solver_steps}" in capsys.readouterr().out
    for fitting in (0, 2, 4):
        made.clear()
        free[0] = 2 * (fitting + 0.5) * kept.size
        assert all(map(torch.equal, want, color_gradients(model, r, b, params)[1]))
        assert max(k.passes for k in made) == fitting
    assert capsys.readouterr().out == "", "it is said once"


@pytest.mark.parametrize("share", [1.0, 20.0, -0.1])
def test_a_share_of_free_memory_lies_below_one(share):
    with pytest.raises(ValueError, match=f"keep_activations={share} must"):
        recipe("skin", scale="tiny", keep_activations=share)
