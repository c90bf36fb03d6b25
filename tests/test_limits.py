"What a model reads of its captions, prompts from files, and the profile that follows the authors' program."

import json
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from everywhere import replace_everywhere
from medart.training import step as step_room
from medart.training import trainer
from medart.workflows import model_files
from medart.bundled.random_pipelines import random_pipeline
from medart.core.randomness import rng
from medart.training.sampling_plan import prompt_plan
from medart.training.sampling_runs import generate, generate_in
from medart.method.hldf import Batch, diffusion_loss, sampling_embeddings
from medart.method.losses import channel_stats, color_due, color_loss
from medart.method.lora import perturb_loras
from medart.training.models import load_base, load_model
from medart.data.phantoms import write_phantoms
from medart.recipes.datasets import DATASETS
from medart.recipes.methods import METHODS, NOT_REPRODUCED, OFFICIAL, PROFILES
from medart.recipes.recipe import recipe
from medart.recipes.runs import captions_dir, captions_recipe
from medart.recipes.scales import FAMILIES
from medart.method.caption_files import captions_for, captions_used
from medart.method.simplify import limits
from medart.method.tokens import (
    check_known,
    count_tokens,
    load_tokenizer,
    load_tokenizers,
    token_report,
    text_limits,
    unknown_words,
)
from medart.training.captioning import shorten_captions
from medart.method.captioner import chat, load_vlm
from medart.method.captions import NO_LIMIT, question, SYSTEM_PROMPT

ROOT = Path(__file__).resolve().parent.parent


# What a model reads of a caption

LONG = "a fundus image of a. " + " ".join(
    f"the {w} is red." for w in "spot ring disc center border line".split() * 5
)


@pytest.mark.parametrize(
    "method, limits",
    [
        ("medart", dict(tokenizer=64)),
        ("sd15", dict(tokenizer=77)),
        ("sdxl", dict(tokenizer=77, tokenizer_2=77)),
        ("hunyuan", dict(tokenizer=77, tokenizer_2=256)),
        ("fast_dit", {}),
    ],
)
def test_each_family_states_its_limit_from_files_alone(
    method, limits, tmp_path, monkeypatch
):
    family = METHODS[method].get("family", "pixart")
    more = (
        {}
        if FAMILIES[family]["tiny"]
        else dict(model=str(random_pipeline(family, tmp_path / family)))
    )
    r = recipe("skin", method, scale="tiny", **more)
    model = load_base(r)
    assert model.limits == text_limits(r) == limits
    for file in (*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("*.bin")):
        file.unlink()
    assert text_limits(r) == limits, "no weights are needed"
    if limits:
        assert all(
            x.shape[1] <= max(limits.values())
            for x in model.tokens([LONG])
            if x.dim() == 2
        )


@pytest.mark.parametrize(
    "method, asked, limit",
    [("medart", 65, 64), ("medart", 120, 64), ("sd15", 78, 77), ("sd15", 120, 77)],
)
def test_a_recipe_that_asks_for_more_is_refused(method, asked, limit):
    with pytest.raises(
        ValueError,
        match=rf"max_tokens={asked} .*{limit} tokens. Pass max_tokens={limit}",
    ):
        load_base(recipe("skin", method, scale="tiny", max_tokens=asked))
    assert (
        load_base(recipe("skin", method, scale="tiny", max_tokens=limit)).limits[
            "tokenizer"
        ]
        == limit
    )


@pytest.mark.parametrize(
    "method, most",
    [("medart", 120), ("sd14", 77), ("sd15", 77), ("sdxl", 77), ("hunyuan", 256)],
)
def test_published_limits(method, most):
    assert recipe("kvasir", method, scale="paper").max_tokens == most
    with pytest.raises(ValueError, match=f"{most} tokens"):
        recipe("kvasir", method, scale="paper", max_tokens=most + 1)


def pipeline_copy(tmp_path, part, **changes):
    "The small Stable Diffusion with other numbers in a config."
    folder = tmp_path / "sd"
    shutil.copytree(ROOT / "data" / "tiny" / "sd", folder)
    file = folder / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize(
    "part, changes, limit",
    [
        ("tokenizer/tokenizer_config.json", dict(model_max_length=32), 32),
        ("tokenizer/tokenizer_config.json", dict(model_max_length=10**30), 77),
        ("text_encoder/config.json", dict(max_position_embeddings=40), 40),
    ],
)
def test_the_least_of_what_the_files_say(tmp_path, part, changes, limit):
    r = recipe(
        "skin",
        "sd15",
        scale="tiny",
        model=pipeline_copy(tmp_path, part, **changes),
        max_tokens=30,
    )
    assert text_limits(r) == dict(tokenizer=limit)


def test_a_shorter_recipe_cuts_earlier():
    r = recipe("skin", "sd15", scale="tiny", max_tokens=20)
    ids, mask = load_base(r).tokens([LONG])
    whole, _ = load_base(recipe("skin", "sd15", scale="tiny")).tokens([LONG])
    assert (
        ids.shape[1] == 77
        and mask.sum() == 20
        and torch.equal(ids[0, :19], whole[0, :19])
    )
    assert token_report(r, [LONG]).cut[0] == token_report(r, [LONG]).tokens[0] - 20


@pytest.mark.parametrize("method", ["medart", "sd15"])
def test_what_is_cut_and_unknown_is_counted(method):
    r = recipe("skin", method, scale="tiny")
    texts = ["a round patch", LONG, "", "Two 糖尿病 patches"]
    got = token_report(r, texts)
    model = load_base(r)
    for text, tokens, cut in zip(texts, got.tokens, got.cut):
        _, mask = model.tokens([text])
        assert (
            mask.sum() == tokens - cut
            and tokens == count_tokens(load_tokenizer(r), [text])[0]
        )
    assert got.cut.tolist()[0] == 0 < got.cut[1] and got.cut[2] == 0
    assert got.unknown.tolist()[:3] == [0, 0, 0] and got.unknown[3] > 0
    assert unknown_words(r, texts) == ["糖尿病"]


def test_two_tokenizers_count_the_greater_loss(tmp_path):
    r = recipe(
        "skin",
        "hunyuan",
        scale="tiny",
        model=str(random_pipeline("hunyuan", tmp_path / "hunyuan")),
    )
    long = "spot " * 100
    first, second = (count_tokens(t, [long])[0] for t in load_tokenizers(r).values())
    assert first > 77 and second < 256
    assert token_report(r, [long]).cut[0] == first - 77


def test_simplification_keeps_to_the_limit_of_the_model(tmp_path):
    for method, most in (("medart", 64), ("sd15", 77)):
        r = recipe("skin", method, scale="tiny", caption_block=1)
        assert limits(r)[1] == most
        table = pd.DataFrame(
            dict(
                file_name=["a", "b"],
                simple=["a fundus image of a"] * 2,
                text=["a fundus image of a. it is red.", LONG],
            )
        ).assign(**{"class": "a"})
        done = shorten_captions(r, table, tmp_path / method)
        assert done.path[0] == "kept" and done.path[1] != "kept"
        assert (token_report(r, done.text).cut == 0).all() and done.tokens.max() <= most


def test_all_methods_share_the_captions_of_one():
    r = recipe("skin", scale="tiny")
    for method in METHODS:
        if METHODS[method].get("vlm") is None:
            assert captions_dir(recipe("skin", method, scale="tiny")) == captions_dir(
                r
            ), method
    assert captions_recipe(recipe("skin", "sd15", scale="tiny")) == r
    assert captions_dir(recipe("skin", family="sd15", scale="tiny")) == captions_dir(r)
    assert captions_dir(recipe("skin", scale="tiny", max_tokens=48)) != captions_dir(r)


@pytest.mark.parametrize("text", ["糖尿病", "黒色腫の画像", "🙂🙂", "糖尿病, 黒!"])
def test_a_prompt_of_unknown_words_is_refused(text):
    r = recipe("skin", scale="tiny")
    with pytest.raises(
        ValueError, match=f"{text}.* unknown to the model at data/tiny/pixart"
    ):
        check_known(r, ["a round patch", text])
    check_known(r, ["a round patch", "", f"a {text} patch", "..."])


def test_captions_used_says_what_is_lost(folders):
    data, _ = folders
    (data / "cap" / "img").mkdir(parents=True)
    (data / "cap" / "dataset.yaml").write_text(
        "modality: fundus\nfeatures: color, shape\n"
    )
    g = torch.Generator().manual_seed(0)
    rows = []
    for i in range(20):
        pixels = torch.randint(
            0, 256, (64, 64, 3), generator=g, dtype=torch.uint8
        ).numpy()
        Image.fromarray(pixels).save(data / "cap" / "img" / f"{i}.png")
        rows.append(f'img/{i}.png,{"ab"[i % 2]},"{LONG}{" 糖尿病" * (i == 0)}"')
    (data / "cap" / "metadata.csv").write_text(
        "file_name,label,text\n" + "\n".join(rows) + "\n", encoding="utf-8"
    )
    for method, limit in (("medart", 64), ("sd15", 77)):
        r = recipe("cap", method, scale="tiny", data="cap")
        used = captions_used(r)
        n = token_report(r, captions_for(r, "train").texts)
        assert used["limit, tokens"].tolist() == [str(limit)] * 2
        assert (
            used["beyond the limit"].tolist() == used.captions.tolist()
            and used["tokens cut off"][0] == n.cut.sum() > 0
        )
        assert used["unknown tokens"].sum() > 0


# Prompts


@pytest.mark.parametrize(
    "name, data, texts",
    [
        ("a.txt", b"one\ntwo\n", ("one", "two")),
        ("a.TXT", b"one\ntwo\n", ("one", "two")),
        ("noending", b"one\n", ("one",)),
        ("bom.txt", "\ufeffone\n\n  \ntwo\n".encode(), ("one", "two")),
        ("crlf.txt", b"one\r\ntwo", ("one", "two")),
        ("wide.txt", "one\ntwo\n".encode("utf-16"), ("one", "two")),
        ("twice.txt", b"one\none\n", ("one", "one")),
        ("umlaut.txt", "nævus\n".encode(), ("nævus",)),
        ("a.csv", b"text\none\n", ("one",)),
        ("a.CSV", b"Text\none\n", ("one",)),
        ("bom.csv", "\ufefftext\none\n".encode(), ("one",)),
        ("semi.csv", b"text;n\none;1\n", ("one",)),
        ("quoted.csv", b'n,prompt\n1,"one, two"\n', ("one, two",)),
        ("cap.csv", b"file_name,Caption\na.png,one\n", ("one",)),
        ("both.csv", b"caption,text\ntwo,one\n", ("one",)),
        ("numbers.csv", b"text\n5\nNA\nnone\n", ("5", "NA", "none")),
        ("a.tsv", b"text\tn\none\t1\n", ("one",)),
        ("wide.csv", "text,n\none,1\n".encode("utf-16"), ("one",)),
        ("a.jsonl", b'{"text":"one"}\n\n{"text":"two"}\n', ("one", "two")),
        ("bom.jsonl", '\ufeff{"prompt":"one"}\n'.encode(), ("one",)),
        ("a.json", b'[{"text":"one"}]', ("one",)),
    ],
)
def test_prompts_from_files(tmp_path, name, data, texts):
    (tmp_path / name).write_bytes(data)
    assert prompt_plan(str(tmp_path / name)).texts == texts
    assert prompt_plan(tmp_path / name).texts == texts


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("c.txt", "nævus ångström\n".encode("cp1252"), "c.txt, line 1.*UTF-8"),
        ("c.csv", "text\nnævus\n".encode("cp1252"), "c.csv.*UTF-8"),
        ("w.txt", "one\n".encode("utf-16-le"), "w.txt"),
        ("lost.txt", "n\ufffdvus\n".encode(), "lost.txt"),
        ("pic.txt", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "pic.txt"),
        ("none.txt", b"\n \n", "holds no prompt"),
        ("empty.csv", b"", "holds no prompt"),
        ("empty.jsonl", b"", "holds no prompt"),
        ("blank.csv", b"text\n \n", "holds no prompt"),
        (
            "other.csv",
            b"words,n\none,1\n",
            "no column 'text'; its columns are words, n",
        ),
        ("bad.jsonl", b"{text\n", "not JSON"),
        ("book.xlsx", b"PK", r"ends in .xlsx; files of prompts end in .txt"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says):
        prompt_plan(str(tmp_path / name))


@pytest.mark.parametrize(
    "prompts",
    [
        "prompts.txt",
        "my data/notes.txt",
        "missing.CSV",
        "a.jsonl",
        "./own",
        "../own prompts",
        "~/own",
        "/tmp/my own prompts",
        "folder/own",
        r"C:\prompts\own",
        r"folder\own.txt",
        "prompts.xlsx",
        "my notes.txt",
    ],
)
def test_a_path_to_nothing_is_no_prompt(prompts):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        prompt_plan(prompts)


@pytest.mark.parametrize(
    "prompt",
    [
        "a very long path",
        "True",
        "a red/white patch",
        "a fundus image of a page called notes.txt",
        "Is it 5 mm? It is.",
        "prompts.txt.",
        "a patch of 3/4 cm",
        "a melanoma, e.g. a dark one",
        "x " * 5000,
        "one\ntwo",
        "a.b",
        "nul\0byte",
    ],
)
def test_words_are_a_prompt(prompt):
    assert prompt_plan(prompt).texts == (prompt.strip(),)


@pytest.mark.parametrize("prompts", [5, 0, True, False, 1.5, ["a", "b"], {"text": "a"}])
def test_what_is_not_text_is_no_prompt(prompts):
    with pytest.raises(TypeError, match="not text"):
        prompt_plan(prompts)


def test_a_folder_is_no_file_of_prompts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        prompt_plan("prompts")
    (tmp_path / "own").write_text("one\n")
    assert prompt_plan("own").texts == ("one",)


def test_generated_images_say_what_was_read(folders, capsys):
    write_phantoms(
        "skin",
        folders[0] / "few",
        counts=dict(
            train=dict.fromkeys(DATASETS["skin"].counts, 3),
            test=dict.fromkeys(DATASETS["skin"].counts, 2),
        ),
    )
    r = recipe(
        "skin", "base", scale="tiny", data="few", gen_count=8, gen_block=4, gen_steps=1
    )
    trainer.train(r)
    capsys.readouterr()
    (folders[0] / "own.csv").write_text(
        f'text\na round 糖尿病 patch\n"{LONG}"\na round patch\n', encoding="utf-8"
    )
    out = generate(r, str(folders[0] / "own.csv"))
    said = capsys.readouterr().out
    table = pd.read_csv(out / "metadata.csv")
    assert (
        table.unknown.tolist()[0] > 0 < table.cut[1]
        and table.cut[0] == table.cut[2] == table.unknown[2] == 0
    )
    with Image.open(out / table.file_name[1]) as im:
        assert [im.text[k] for k in ("tokens", "cut", "unknown")] == [
            str(table[k][1]) for k in ("tokens", "cut", "unknown")
        ]
    assert "1 of 3 captions are longer" in said and "does not know: 糖尿病" in said
    with pytest.raises(ValueError, match="unknown to the model"):
        generate(r, "糖尿病")
    for nothing in (0, False, 5):
        for way in (generate, partial(generate_in, 2)):
            with pytest.raises(TypeError, match="not text"):
                way(r, nothing)
    assert "prompts" not in generate(r).name and "prompts" not in generate(r, None).name


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
    from_0 = official().color_at_start
    due = [step for step in range(96000) if color_due(step, 500, from_0)]
    assert due[:3] == [0, 500, 1000] and len(due) == 192
    assert [step for step in range(12) if color_due(step, 5)] == [4, 9]
    assert not any(color_due(step, 0, True) for step in range(3))


TEXT = "An Endoscopic Image of Dyed Lifted Polyps"


def batch(model, text=TEXT):
    z = torch.zeros(1, *model.latent_shape)
    return Batch(
        [text],
        [torch.zeros(3, 64, 64, dtype=torch.uint8)],
        z,
        z,
        torch.tensor([500]),
        z,
    )


def same(a, b):
    return a.emb.shape == b.emb.shape and torch.equal(a.emb, b.emb)


@pytest.mark.parametrize("profile", PROFILES)
def test_case_of_captions_in_both_losses(profile):
    "The noise loss reads captions as the profile says, the color loss and generation always in lower case."
    r = recipe("kvasir", scale="tiny", profile=profile)
    model = load_model(r)
    seen = []
    encode = type(model).encode_text
    model.encode_text = lambda texts, raw=False: (
        seen.append(raw) or encode(model, texts, raw)
    )
    with torch.no_grad():
        diffusion_loss(model, r, batch(model))
        color = sampling_embeddings(model, r, batch(model))
    assert seen == [profile == "official", False]
    assert torch.allclose(color.emb, encode(model, [TEXT.lower(), ""]).emb, atol=1e-6)
    assert not torch.allclose(
        color.emb[:1],
        encode(model, [TEXT, ""], raw=True).emb[:1, : color.emb.shape[1]],
        atol=1e-3,
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_dropout_of_t5_in_the_color_loss(profile, monkeypatch):
    r = recipe(
        "kvasir",
        scale="tiny",
        profile=profile,
        batch_size=1,
        interval=1,
        solver_steps=2,
        gen_steps=2,
    )
    model, modes, clips = load_model(r), [], []
    replace_everywhere(
        monkeypatch,
        step_room.diffusion_gradients,
        lambda m, r, b, params: (
            modes.append(m.text_encoder.training),
            (torch.zeros(()), [torch.zeros_like(p) for p in params]),
        )[1],
    )
    replace_everywhere(
        monkeypatch,
        step_room.color_gradients,
        lambda m, r, b, params: (
            modes.append(m.text_encoder.training),
            (torch.zeros(()), [torch.full_like(p, 9.0) for p in params]),
        )[1],
    )
    replace_everywhere(
        monkeypatch,
        step_room.update,
        lambda m, r, opt, params, grads, log: (
            clips.append(grads[0].flatten()[0].item()) or {}
        ),
    )
    step_room.training_step(
        model, r, batch(model), step_room.make_optimizer(model, r), 0, Accelerator()
    )
    live = profile == "official"
    assert modes == [live, live]
    assert (clips[0] == 9.0) == live, "the color gradient is not clipped by itself"


def test_offloading_draws_the_same_dropout_twice():
    "The chain's captions and those that carry the gradient back must be one and the same."
    r = official(batch_size=1, solver_steps=2, interval=1, dtype="float64")
    grads = []
    for offload in (False, True):
        model = perturb_loras(load_model(r))
        b, params = batch(model), list(model.trainable().values())
        b.noise = torch.randn(
            1, *model.latent_shape, generator=rng(0, "z"), dtype=torch.float64
        )
        model.text_encoder.train(True)
        torch.manual_seed(0)
        grads.append(
            step_room.color_gradients(
                model,
                official(
                    **{
                        k: getattr(r, k)
                        for k in ("batch_size", "solver_steps", "interval", "dtype")
                    },
                    offload=offload,
                ),
                b,
                params,
            )[1]
        )
    worst = max(
        (x - y).norm() / y.norm().clamp(min=1e-9) for x, y in zip(grads[1], grads[0])
    )
    assert worst < 1e-6


def test_official_targets_crop_steps_and_question():
    r = official()
    model = load_model(r)
    names = "".join(model.trainable())
    assert "wi_0" not in names and ".wo." in names and ".q." in names
    assert "wi_0" in "".join(load_model(recipe("kvasir", scale="tiny")).trainable())
    assert r.crop == "random" and r.gen_steps == 50 and r.clip == 1
    x = torch.rand(2, 3, 8, 8)
    assert torch.isclose(
        color_loss(x + 0.1, x, r.color_reduction) * 3, color_loss(x + 0.1, x)
    )
    assert torch.isclose(channel_stats(x)[1], x.flatten(2).std(2, unbiased=True)).all()
    d = DATASETS["kvasir"]
    assert "words" in question(d, "polyps") and "words" not in question(
        d, "polyps", NO_LIMIT
    )
    vlm = load_vlm(r)
    assert (
        vlm.system == SYSTEM_PROMPT
        and load_vlm(recipe("kvasir", scale="tiny")).system == ""
    )
    roles = [m["role"] for m in chat("What?", system=vlm.system)]
    assert roles == ["system", "user"] and [m["role"] for m in chat("What?")] == [
        "user"
    ]
    prompt = vlm.processor.apply_chat_template(
        [chat("What?", system=SYSTEM_PROMPT)], add_generation_prompt=True
    )[0]
    assert prompt.index("helpful") < prompt.index("What?")
    assert captions_dir(r) != captions_dir(recipe("kvasir", scale="tiny"))


def test_the_official_optimizer():
    model = load_model(official())
    groups = step_room.make_optimizer(model, official()).param_groups
    assert all(g["weight_decay"] == 1e-2 for g in groups)


def test_training_refuses_captions_of_which_nothing_is_known(made):
    rows = [
        f"{f.parent.name}/{f.name},{f.parent.name},黒色腫の画像"
        for f in sorted(made.rglob("*.png"))
    ]
    (made / "metadata.csv").write_text(
        "file_name,label,text\n" + "\n".join(rows) + "\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match="黒色腫の画像.* unknown to the model"):
        trainer.train(
            recipe(
                "skin", scale="tiny", data="made", epochs=1, interval=0, sample_every=0
            )
        )


def test_the_preflight_finds_a_limit_that_is_too_high():
    found, _ = model_files.check_model(recipe("skin", scale="tiny", max_tokens=100))
    assert any("max_tokens=100" in f.fault and "64 tokens" in f.fault for f in found)
    found, _ = model_files.check_model(recipe("skin", scale="tiny"))
    assert not any(f.fault for f in found)
