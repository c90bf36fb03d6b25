"Captioning when things go wrong: kills, torn files, changed inputs, several processes, other models and backends."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from medart.core.randomness import rng, stable_hash
from medart.data.loading import load_split
from medart.data.reports import with_names
from medart.training.trainer import train
from medart.data.phantoms import draw_phantom
from medart.data.phrases import simple_caption
from medart.recipes.datasets import DATASETS
from medart.recipes.recipe import recipe
from medart.recipes.runs import captions_dir, run_dir
from medart.method.caption_files import (
    captions_for,
    captions_key,
    captions_used,
    read_captions,
)
from medart.method.simplify import limits
from medart.method.tokens import count_tokens, load_tokenizer
from medart.training.captioning import write_captions
from medart.method.captioner import (
    Captioner,
    SeededSampler,
    gumbel_noise,
    load_vlm,
    stop_tokens,
)
from medart.method.captions import caption_fault, question, tidy, unfinished
from medart.training.caption_engines import load_captioner
from medart.training.caption_store import append_line, read_lines
from medart.training.captioning import caption_images

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("kernels", "ready_python")  # imported already
CLASSES = ("melanoma", "common_nevus", "carcinoma")
REAL = ROOT.parent / "shared" / "real"


@pytest.fixture
def images(folders):
    "A folder of 15 drawn images in class folders: 12 to train on, 3 to test on."
    data, _ = folders
    for cls in CLASSES:
        (data / "few" / cls).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(draw_phantom("skin", cls, 0, i)[0]).save(
                data / "few" / cls / f"{i}.png"
            )
    return data / "few"


def few(**changes):
    return recipe("skin", scale="tiny", data="few", **{"caption_block": 4, **changes})


# One process, two processes, none

SCRIPT = """
import sys, time
from medart.training import caption_store
from medart.recipes.recipe import recipe
from medart.training.captioning import write_captions
slow = float(sys.argv[1])
append = caption_store.append_line
caption_store.append_line = lambda *a: (append(*a), time.sleep(slow))
write_captions(recipe("skin", scale="tiny", data="few", caption_block=4), "train")
"""


def start(tmp_path, *command):
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "yes",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def script(tmp_path, slow=0.0):
    return start(tmp_path, "-c", SCRIPT, slow)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]


def drafts():
    "All lines of the store of training captions, in the order of their names."
    folder = captions_dir(few()) / "train" / "drafts"
    lines = [
        json.loads(line)
        for file in folder.glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    return sorted(lines, key=lambda line: line["name"])


def written():
    return (captions_dir(few()) / "train" / "metadata.csv").read_bytes()


@pytest.fixture
def one_process(images):
    "All captions, written by this very process, with one thread as the scripts have."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_captions(few(), "train")
    torch.set_num_threads(threads)
    return written(), drafts()


def test_three_processes_write_the_bytes_of_one(one_process, tmp_path, monkeypatch):
    one, lines = one_process
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path / "three"))
    launch = (
        "-m accelerate.commands.launch --multi_gpu --num_processes 3 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no --main_process_port 0"
    )
    finish(
        start(
            tmp_path,
            *launch.split(),
            *"-m medart.training.captioning --dataset skin --scale tiny --data few --caption_block 4".split(),
        )
    )
    assert written() == one and drafts() == lines
    files = list((captions_dir(few()) / "train" / "drafts").glob("*.jsonl"))
    assert len(files) == 3, "all processes had work"


def test_killed_in_mid_captioning_only_the_missing_is_written(
    one_process, tmp_path, monkeypatch
):
    whole, lines = one_process
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path / "killed"))
    store = captions_dir(few()) / "train" / "drafts" / "0.jsonl"
    process = script(tmp_path, slow=0.3)
    while not (store.exists() and store.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = store.read_bytes()
    os.truncate(store, len(before) - 20)  # a kill within a write
    assert not (store.parent.parent / "metadata.csv").exists()
    kept = before[: before[:-20].rfind(b"\n") + 1]
    finish(script(tmp_path))
    assert store.read_bytes().startswith(kept), "what was there has been left alone"
    found = [
        json.loads(line)["name"]
        for line in store.read_text().splitlines()
        if line.endswith("}")
    ]
    assert sorted(found) == [line["name"] for line in lines], "each image once"
    assert written() == whole


def test_changed_inputs_and_only_those_are_captioned_again(images, monkeypatch):
    r = few()
    first = caption_images(r, "train").set_index("file_name")
    calls = []
    write = Captioner.write
    monkeypatch.setattr(
        Captioner, "write", lambda self, *a: calls.append(1) or write(self, *a)
    )
    caption_images(r, "train")
    assert not calls, "nothing to do"
    Image.fromarray(draw_phantom("skin", "melanoma", 0, 77)[0]).save(
        images / "melanoma" / "1.png"
    )
    Image.fromarray(draw_phantom("skin", "melanoma", 0, 78)[0]).save(
        images / "melanoma" / "2.png"
    )
    second = caption_images(r, "train").set_index("file_name")
    same = first.index.intersection(second.index)
    assert (
        calls and 8 <= len(same) < 12 and (second.text[same] == first.text[same]).all()
    )
    other = caption_images(few(caption_seed=1), "train").set_index("file_name")
    assert captions_dir(few(caption_seed=1)) != captions_dir(r)
    assert (other.text != second.text).any()


# Whose captions training reads


def test_captions_of_two_models_do_not_meet(images, monkeypatch):
    a, b = few(), few(vlm=str(ovis_folder(images.parent / "ovis")))
    monkeypatch.setattr(Captioner, "write", says("brown"))
    write_captions(a, "train")
    monkeypatch.setattr(Captioner, "write", says("purple"))
    write_captions(b, "train")
    assert all("brown" in t for t in captions_for(a, "train").texts)
    assert all("purple" in t for t in captions_for(b, "train").texts)
    table = pd.read_csv(captions_dir(a) / "train" / "metadata.csv")
    assert list(table.columns[:1]) == ["file_name"] and "text" in table


def test_without_captions_those_of_the_data_set_are_read(images):
    r = few()
    out = load_split(r, "test").folder.parent
    rows = with_names(out).query("split == 'test'").source
    (images / "captions.csv").write_text(
        "file_name,text\n"
        + "".join(
            f"{f.relative_to(images).as_posix()},{f'The owner says: {f.stem}' if f.relative_to(images).as_posix() in set(rows) else ''}\n"
            for f in images.rglob("*.png")
        )
    )
    assert sorted(captions_for(r, "test").texts) == sorted(
        f"The owner says: {Path(f).stem}" for f in rows
    )
    assert captions_used(r).whose.str.contains("the data set's own").tolist() == [
        False,
        True,
    ]
    assert set(captions_for(few(captions="empty"), "test").texts) == {""}
    assert set(captions_for(few(captions="simple"), "test").texts) == {
        simple_caption("dermoscopic", c.replace("_", " ")) for c in CLASSES
    }


def test_an_image_added_later_is_named(images, monkeypatch):
    r = few()
    monkeypatch.setattr(
        Captioner,
        "write",
        lambda self, shown, asked, seeds: [
            q.split(". Please")[0] + " shows a brown patch with a border."
            for q in asked
        ],
    )
    for split in ("train", "test"):
        write_captions(r, split)
    for i in range(10, 40):
        Image.fromarray(draw_phantom("skin", "melanoma", 0, i)[0]).save(
            images / "melanoma" / f"{i}.png"
        )
    with pytest.raises(ValueError, match="caption.ipynb"):
        captions_for(r, "train")


def says(word):
    "A model that always says the same, after the opening it was asked for."
    return lambda self, shown, asked, seeds: [
        q.split(". Please")[0] + f" shows a {word} patch with a smooth border."
        for q in asked
    ]


def test_a_run_reads_new_captions_and_starts_anew(images, monkeypatch, capsys):
    r = few(epochs=0.5, interval=0, checkpoint_every=1, gen_steps=2, sample_every=0)
    monkeypatch.setattr(Captioner, "write", says("brown"))
    write_captions(r, "train")
    train(r)
    first = (run_dir(r) / "transformer_lora" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    train(r)
    assert "is complete" in capsys.readouterr().out
    monkeypatch.setattr(Captioner, "write", says("purple"))
    shutil.rmtree(captions_dir(r))
    write_captions(r, "train")
    train(r)
    out = capsys.readouterr().out
    assert "is complete" not in out and "their captions have changed since" in out
    assert (
        run_dir(r) / "transformer_lora" / "adapter_model.safetensors"
    ).read_bytes() != first


def test_whose_captions_are_read_is_shown(images, monkeypatch):
    r = few()
    before, key = captions_used(r), captions_key(captions_for(r, "train"))
    assert (
        list(before.split) == ["train", "test"]
        and before.whose.str.contains("simple").all()
    )
    monkeypatch.setattr(Captioner, "write", says("brown"))
    for split in ("train", "test"):
        write_captions(r, split)
    assert captions_used(r).whose.str.contains("written by data/tiny/vlm").all()
    assert captions_key(captions_for(r, "train")) != key
    assert captions_used(few(captions="empty")).whose.tolist() == ["empty"] * 2


# What models say


def test_bad_answers_are_asked_again_and_in_the_end_replaced(images, monkeypatch):
    "An answer that depends on the seed: some images pass at once, some later, some never."

    def write(self, shown, asked, seeds):
        return [
            q.split(". Please")[0] + " shows a dark brown patch with a border."
            if s % 3 == 0
            else "I'm sorry, I can't help."
            for q, s in zip(asked, seeds)
        ]

    monkeypatch.setattr(Captioner, "write", write)
    r = few(caption_retries=2)
    table = write_captions(r, "train")
    assert table.tries.max() == 3 and table.tries.min() == 1
    replaced = table[table.source == "simple"]
    assert (
        len(replaced)
        and (replaced.text == replaced.simple).all()
        and (replaced.faults == "refusal refusal refusal").all()
    )
    assert (
        table[table.source == "vsg"].faults.str.split().str.len()
        == table[table.source == "vsg"].tries - 1
    ).all()


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "opening"),
        ("A dermoscopic image of Melanoma shows a dark brown, wavy patch.", ""),
        ("\n\nA dermoscopic image of melanoma shows a dark brown wavy patch with", ""),
        ("A dermoscopic image of melanoma", "short"),
        ("As an AI, I can't see images.", "refusal"),
        (
            "A dermoscopic image of melanoma. Please describe the image using the following visual features.",
            "echo",
        ),
        (
            "A dermoscopic image of common nevus shows a dark brown, wavy patch.",
            "opening",
        ),
        ("A dermoscopic image of melanoma " + "so very dark " * 40, ""),
        ("**A dermoscopic image of melanoma** shows a dark brown, wavy patch.", ""),
        (
            'Caption: "A dermoscopic image of melanoma" shows a dark brown, wavy patch.',
            "",
        ),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch 5 µm wide, α-like.",
            "",
        ),
        (
            "A dermoscopic image of melanoma shows human skin. System and model are not seen. The user sees it.",
            "",
        ),
        ("A dermoscopic image of melanomas shows a dark brown, wavy patch.", "opening"),
        (
            "A dermoscopic image of melanoma-like nevi shows a dark, wavy patch.",
            "opening",
        ),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch.assistant\n\nA dermoscopic image of melanoma shows",
            "debris",
        ),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch.<|eot_id|><|start_header_id|>user<|end_header_id|>",
            "debris",
        ),
        ("A dermoscopic image of melanoma shows a dark wavy patch.</s>", "debris"),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch. [/INST] It is round.",
            "debris",
        ),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch.\nASSISTANT: It is round.",
            "debris",
        ),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch. user\n\nWhat else?",
            "debris",
        ),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch.\nmodel\nThe image shows more.",
            "debris",
        ),
        (
            "### Assistant: A dermoscopic image of melanoma shows a dark wavy patch.",
            "opening",
        ),
        (
            "A dermoscopic image of melanoma shows a dark wavy patch.\n\n### Human: and now?",
            "debris",
        ),
        (
            "A dermoscopic image of melanoma shows a wavy patch. A dermoscopic image of melanoma shows a round one.",
            "debris",
        ),
        (
            "A dermoscopic image of melanoma. Please describe the dermoscopic image of it.",
            "echo",
        ),
        (
            "A dermoscopic image of melanoma muestra una mancha oscura con el borde irregular.",
            "language",
        ),
        (
            "A dermoscopic image of melanoma zeigt einen dunklen Fleck mit einem Rand und der Mitte das ist.",
            "language",
        ),
        (
            "A dermoscopic image of melanoma 显示一个不规则的深褐色斑块，边界不清 in a b c d e f.",
            "language",
        ),
        (
            "A dermoscopic image of melanoma shows a dark patch."
            + " The border is wavy." * 6,
            "loop",
        ),
    ],
)
def test_faults(text, fault):
    assert (
        caption_fault(
            tidy(text), "A dermoscopic image of melanoma", DATASETS["skin"].features
        )
        == fault
    )


def test_length_is_no_fault_and_what_was_cut_off_is_known():
    "Long captions go to T5; of one that the token budget cut off, the whole sentences stay."
    simple = "A dermoscopic image of melanoma"
    long = (
        simple
        + " shows "
        + "a raised dark fold with a smooth wet surface and a pale rim, " * 9
        + "and no more."
    )
    assert len(long.split()) > 100 and not caption_fault(
        tidy(long), simple, DATASETS["skin"].features
    )
    for raw, kept, cut in (
        (long, long, False),
        (long + " The bor", long, True),
        (long[:-6], long[:-6], True),
        (simple + ' is "dark."', None, False),
        ("1. " + simple + " is dark.", simple + " is dark.", False),
        (simple + " is dark. It is approx. 5", simple + " is dark.", True),
        ('"' + simple + ' is dark."', simple + " is dark.", False),
        (simple + " is dark (left.)", None, False),
    ):
        assert unfinished(raw) == cut and tidy(raw) == (raw if kept is None else kept)


def test_an_unfinished_sentence_is_dropped_and_recorded(images, monkeypatch):
    monkeypatch.setattr(
        Captioner,
        "write",
        lambda self, shown, asked, seeds: [
            "\nAn"
            + q.split(". Please")[0][1:]
            + " shows a small dark brown patch. It has a wavy bor"
            for q in asked
        ],
    )
    table = caption_images(few(), "test")
    assert (
        table.unfinished.all()
        and (table.tries == 1).all()
        and table.text.str.endswith("patch.").all()
    )
    assert all(t.startswith(s) for t, s in zip(table.text, table.simple)), (
        "the article is put right"
    )


@pytest.fixture
def llama(tmp_path):
    "The small VLM in a folder whose generation settings do not know how a turn ends, as first exports of Llama-3."
    folder = tmp_path / "llama"
    shutil.copytree(ROOT / "data" / "tiny" / "vlm", folder)
    file = folder / "tokenizer_config.json"
    told = json.loads(file.read_text())
    told["extra_special_tokens"] = [*told["extra_special_tokens"], "<|eot_id|>"]
    file.write_text(json.dumps(told))
    return folder


def test_an_answer_ends_with_the_turn(images, llama, monkeypatch):
    r = few(vlm=str(llama))
    vlm = load_vlm(r)
    eot = vlm.processor.tokenizer.get_vocab()["<|eot_id|>"]
    assert (
        eot in vlm.stops
        and eot != vlm.model.generation_config.eos_token_id in vlm.stops
    )
    red = vlm.processor.tokenizer("red", add_special_tokens=False).input_ids
    asked_for = {}

    def generate(**how):
        asked_for.update(how)
        rows = [[*red, eot, *red], [*red, *red, *red][: len(red) * 2 + 1] + [eot]]
        width = max(map(len, rows))
        new = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return torch.cat([how["input_ids"], new], 1)

    monkeypatch.setattr(vlm.model, "generate", generate)
    shown = [Image.new("RGB", (64, 64))] * 2
    texts = vlm.write(shown, [question(DATASETS["skin"], "melanoma")] * 2, [0, 1])
    assert eot in asked_for["eos_token_id"] and "red" in texts[0]
    assert len(texts[0].split()) < len(texts[1].split()) and "eot" not in "".join(texts)


@pytest.mark.parametrize(
    "end", ["<|eot_id|>", "<|im_end|>", "</s>", "<end_of_turn>", "<|endoftext|>"]
)
def test_every_known_end_of_a_turn_is_a_stop(end):
    tok = types.SimpleNamespace(get_vocab=lambda: {"a": 0, end: 7}, eos_token_id=3)
    assert stop_tokens(tok, types.SimpleNamespace(eos_token_id=[2, 3])) == [2, 3, 7]
    assert stop_tokens(tok, types.SimpleNamespace(eos_token_id=2)) == [2, 3, 7]
    assert stop_tokens(tok) == [3, 7]


def test_sampler_keeps_the_words_that_transformers_would_keep():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.randn(64, 200, generator=rng(0, "scores")) * 2
    kept = scores
    for warper in (
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(50),
        TopPLogitsWarper(0.9),
    ):
        kept = warper(None, kept)
    kept = kept > -torch.inf
    seen = torch.zeros_like(kept)
    for i in range(300):
        noise = torch.stack([gumbel_noise(1000 * i + j, 1, 50) for j in range(64)])
        seen |= SeededSampler(noise, 0.8, 0.9)(None, scores) == 0
    assert not (seen & ~kept).any()
    assert (seen.sum() / kept.sum()) > 0.5


def test_a_caption_does_not_depend_on_its_company(images):
    vlm = load_vlm(few())
    shown = [Image.open(f) for f in sorted(images.rglob("*.png"))[:6]]
    asked = [question(DATASETS["skin"], "melanoma")] * 6
    together = vlm.write(shown, asked, range(6))
    assert vlm.write(shown[::-1], asked, range(5, -1, -1)) == together[::-1]
    assert vlm.write([shown[3]], asked[:1], [3]) == together[3:4]


def test_images_of_any_shape_and_size(images):
    vlm = load_vlm(few())
    shown = [
        Image.new("RGB", size, "pink")
        for size in ((720, 576), (64, 64), (33, 200), (1920, 1072))
    ]
    assert (
        len(vlm.write(shown, [question(DATASETS["kvasir"], "polyps")] * 4, range(4)))
        == 4
    )


# The store


def test_torn_and_strange_lines_are_passed_over(tmp_path):
    file = tmp_path / "0.jsonl"
    for name in "ab":
        append_line(file, dict(name=name, key="k", text="é"))
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole[:-cut])
        found = read_lines(tmp_path, dict(a="k", b="k"))
        append_line(file, dict(name="c", key="k"))
        after = read_lines(tmp_path, dict(a="k", b="k", c="k"))
        assert set(after) == set(found) | {"c"}


# Long captions


def test_every_caption_fits_and_says_how(images, monkeypatch):
    long = " It has black spots and a blue veil and a white center." * 5
    monkeypatch.setattr(
        Captioner,
        "write",
        lambda self, shown, asked, seeds: [
            q.split(". Please")[0]
            + " shows a brown patch with a jagged border."
            + long * (s % 2)
            for q, s in zip(asked, seeds)
        ],
    )
    r = few()
    table = write_captions(r, "train")
    assert (
        set(table.path) <= {"kept", "t5", "cut"}
        and (table.path != "kept").any()
        and (table.path == "kept").any()
    )
    assert (
        count_tokens(load_tokenizer(r), table.text) == table.tokens
    ).all() and table.tokens.max() <= r.max_tokens
    least, most = limits(r)
    assert table[table.path == "t5"].tokens.between(least, most).all()
    assert all(
        a.lower().startswith(b.lower()) for a, b in zip(table.text, table.simple)
    )
    assert (table[table.path == "cut"].fault != "").all() and table[
        table.path == "cut"
    ].text.str.endswith(".").all()


# The run notebook


def test_caption_notebook(images, folders, tmp_path):
    yaml = "\n".join(
        f"{k}: {v}" for k, v in dict(dataset="skin", scale="tiny", data="few").items()
    )
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "nbs" / "caption.ipynb"),
            str(tmp_path / "caption.ipynb"),
            "-y",
            yaml,
            "--no-progress-bar",
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    r = recipe("skin", scale="tiny", data="few")
    made = {
        str(f.relative_to(captions_dir(r)))
        for f in captions_dir(r).rglob("*")
        if f.is_file()
    }
    assert {
        "train/metadata.csv",
        "test/metadata.csv",
        "samples.png",
        "lengths.png",
        "words.png",
        "validity.csv",
        "paths.csv",
        "words.csv",
    } <= made
    assert (
        sum(
            "image/png" in o.get("data", {})
            for c in json.loads((tmp_path / "caption.ipynb").read_text())["cells"]
            for o in c.get("outputs", [])
        )
        == 3
    )
    assert captions_for(r, "train").texts == tuple(read_captions(r, "train").text)


# Other models, other engines


def ovis_folder(folder):
    "A tiny Ovis2 with random weights, in the layout of the published ones."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        Ovis2Config,
        Ovis2ForConditionalGeneration,
        Ovis2Processor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
    from transformers.models.ovis2.image_processing_pil_ovis2 import (
        Ovis2ImageProcessorPil,
    )
    from transformers.models.qwen2 import Qwen2Config

    marks = [
        "<image>",
        "<IMG_ATOM>",
        "<IMG_START>",
        "<IMG_GRID>",
        "<IMG_COL>",
        "<IMG_ROW>",
        "<IMG_END>",
    ]
    core = Tokenizer(
        models.BPE(
            vocab={
                c: i
                for i, c in enumerate(
                    ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
                )
            },
            merges=[],
        )
    )
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        additional_special_tokens=marks,
    )
    ids = tok.convert_tokens_to_ids(marks)
    talk = "{% for m in messages %}{% for c in m.content %}{{ '<image>\n' if c.type == 'image' else c.text }}{% endfor %}{% endfor %}"
    look = Ovis2ImageProcessorPil(size=dict(height=28, width=28), crop_to_patches=False)
    Ovis2Processor(look, tok, chat_template=talk, image_seq_length=4).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    vision = Ovis2VisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_stride=1,
        vocab_size=32,
    )
    text = Qwen2Config(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    config = Ovis2Config(
        vision_config=vision,
        text_config=text,
        vocab_size=len(tok),
        hidden_size=32,
        image_token_id=ids[1],
        visual_indicator_token_ids=ids[2:],
        eos_token_id=1,
        pad_token_id=0,
    )
    Ovis2ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_ovis2_takes_the_same_path(images, tmp_path):
    r = few(
        vlm=str(ovis_folder(tmp_path / "ovis")), caption_tokens=12, caption_retries=1
    )
    vlm = load_vlm(r)
    assert (
        type(vlm.model).__name__ == "Ovis2ForConditionalGeneration"
        and vlm.processor.tokenizer.padding_side == "left"
    )
    shown = [Image.open(f) for f in sorted(images.rglob("*.png"))[:3]]
    asked = [question(DATASETS["skin"], c) for c in CLASSES]
    texts = vlm.write(shown, asked, range(3))
    assert len(set(texts)) == 3 and all(texts)
    assert vlm.write(shown[::-1], asked[::-1], [2, 1, 0]) == texts[::-1]
    table = write_captions(r, "test")
    assert (table.source == "simple").all() and (table.tries == 2).all(), (
        "random weights say nothing that passes"
    )
    assert table.text[0] == simple_caption("dermoscopic", "carcinoma") or table.text[
        0
    ] in set(table.simple)


def test_vllm_gets_prompts_images_and_one_seed_each(images, llama, monkeypatch):
    asked_for = {}

    class LLM:
        def __init__(self, **how):
            asked_for.update(how)

        def generate(self, prompts, params, use_tqdm):
            asked_for.update(prompts=prompts, params=params)
            return [
                types.SimpleNamespace(
                    outputs=[types.SimpleNamespace(text=stable_hash(p.seed))]
                )
                for p in params
            ]

    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, lambda **how: types.SimpleNamespace(**how)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    vlm = load_captioner(few(caption_backend="vllm"))
    image = Image.new("RGB", (64, 64))
    assert (
        len(
            vlm.write([image] * 2, [question(DATASETS["skin"], "melanoma")] * 2, [5, 6])
        )
        == 2
    )
    assert (
        asked_for["model"].endswith("vlm")
        and asked_for["prompts"][0]["prompt"].count("<image>") == 1
    )
    assert asked_for["prompts"][1]["multi_modal_data"]["image"] is image
    r = few()
    assert vars(asked_for["params"][1]) == dict(
        max_tokens=r.caption_tokens,
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        seed=6,
    )
    other = load_captioner(few(caption_backend="vllm", vlm=str(llama)))
    other.write([image], [question(DATASETS["skin"], "melanoma")], [5])
    assert asked_for["params"][0].stop_token_ids == [
        other.processor.tokenizer.get_vocab()["<|eot_id|>"]
    ]


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images here")
def test_real_photographs_get_captions_that_fit(folders):
    for cls in ("melanoma", "vascular_lesion", "dermatofibroma"):
        (folders[0] / "few" / cls).mkdir(parents=True)
        for file in sorted((REAL / "skin" / cls).iterdir())[:10]:
            shutil.copy(file, folders[0] / "few" / cls)
    r = few()
    table = write_captions(r, "train")
    assert len(table) == 24 and table.tokens.max() <= r.max_tokens
    assert all(
        text.startswith(simple) for text, simple in zip(table.text, table.simple)
    )
    assert table.text.nunique() > 6, "it looks at them"
    assert (read_captions(r, "train").text == table.text).all() and captions_for(
        r, "train"
    ).texts == tuple(table.text)


def test_a_missing_model_is_explained(folders):
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing"):
        load_vlm(few(vlm="nobody/nothing"))
