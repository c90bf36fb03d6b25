"""Repositories as others published them, imitated file by file with tiny weights and read by the loaders that a run uses.

File lists and configurations follow copies of the published ones where such copies could be read (Stable Diffusion 1.4 and 1.5,
the ViTs' preprocessors); of the others every variant that libraries of their time wrote is tried.
"""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from medart.bundled.random_pipelines import random_pipeline
from medart.evaluation.classifier import load_classifier, normalize_pixels
from medart.core.randomness import rng
from medart.method.generation import sample_images
from medart.evaluation.extractors import load_extractor
from medart.method.lora import perturb_loras
from medart.training.merging import merge_and_save
from medart.training.models import load_base, load_model
from medart.core.locations import locate
from medart.recipes.recipe import recipe
from medart.method.simplify import load_simplifier
from medart.method.tokens import load_tokenizer
from medart.method.captioner import load_vlm
from medart.core.load_errors import load_error, explain_load_errors
from medart.core.pretrained import load_image_processor, load_network
from medart.core.weight_files import (
    damaged_files,
    files_below,
    missing_files,
    weight_fault,
    weight_files,
)

CAPTION = "a red circle on a blue background"
IMAGENET = dict(
    do_normalize=True,
    do_resize=True,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
    resample=2,
)
SAVED_2023 = IMAGENET | dict(
    do_rescale=True, rescale_factor=1 / 255, size=dict(height=224, width=224)
)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


def edit(path, **changes):
    write(path, json.loads(path.read_text()) | changes)


def rename(folder, change, extra=None):
    "Write a network's weights under the names they had when they were published."
    path = next(folder.glob("*.safetensors"))
    old = {change(k): v for k, v in load_file(path).items()} | (extra or {})
    save_file(old, path, dict(format="pt"))


def store(folder, form):
    "Put a network's one safetensors file into another form: a .bin, shards of either kind, or beside half-precision copies."
    if form == "safetensors":
        return
    path = next(folder.glob("*.safetensors"))
    stem = path.stem
    weights = load_file(path)
    if form == "fp16 beside":
        half = {k: v.half() for k, v in weights.items()}
        save_file(half, folder / f"{stem}.fp16.safetensors", dict(format="pt"))
        torch.save(half, folder / f"{stem}.fp16.bin")
        return
    path.unlink()
    binary = form.endswith("bin")
    stem, end = (
        ("pytorch_model" if binary and stem == "model" else stem),
        "bin" if binary else "safetensors",
    )

    def put(part, name):
        torch.save(part, folder / name) if binary else save_file(
            part, folder / name, dict(format="pt")
        )

    if form == "bin":
        return put(weights, f"{stem}.bin")
    names = sorted(weights)
    shards = {f"{stem}-{i + 1:05d}-of-00002.{end}": names[i::2] for i in (0, 1)}
    for name, keys in shards.items():
        put({k: weights[k] for k in keys}, name)
    total = sum(v.numel() * v.element_size() for v in weights.values())
    write(
        folder / f"{stem}.{end}.index.json",
        dict(
            metadata=dict(total_size=total),
            weight_map={k: n for n, keys in shards.items() for k in keys},
        ),
    )


FORMS = ["safetensors", "sharded safetensors", "bin", "sharded bin", "fp16 beside"]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    "A sentencepiece model, the only vocabulary file that T5's published tokenizers have."
    folder = tmp_path_factory.mktemp("spiece")
    words = "a red blue green circle square star on background image of dermoscopic endoscopic skin".split()
    lines = [
        " ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(200)
    ]
    (folder / "lines.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        minloglevel=2,
    )
    return folder / "spiece.model"


def t5_tokenizer(folder, spiece, called="T5Tokenizer"):
    "A T5 tokenizer as published: no tokenizer.json."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(spiece, folder / "spiece.model")
    extra = [f"<extra_id_{i}>" for i in range(100)]
    special = dict(
        additional_special_tokens=extra,
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    write(folder / "special_tokens_map.json", special)
    write(
        folder / "tokenizer_config.json",
        special
        | dict(
            clean_up_tokenization_spaces=True,
            extra_ids=100,
            legacy=True,
            model_max_length=512,
            sp_model_kwargs={},
            tokenizer_class=called,
        ),
    )
    write(
        folder / "added_tokens.json", {token: 159 - i for i, token in enumerate(extra)}
    )


# PixArt-alpha/PixArt-XL-2-512x512


def pixart(folder, spiece=None, form="safetensors"):
    shutil.copytree(locate("data/tiny/pixart"), folder)
    edit(
        folder / "model_index.json",
        transformer=["diffusers", "Transformer2DModel"],
        tokenizer=["transformers", "T5Tokenizer"],
        _diffusers_version="0.22.0.dev0",
    )
    edit(
        folder / "transformer/config.json",
        _class_name="Transformer2DModel",
        _diffusers_version="0.22.0.dev0",
        attention_type="default",
        double_self_attention=False,
        num_vector_embeds=None,
        only_cross_attention=False,
        upcast_attention=False,
        use_linear_projection=False,
        dropout=0.0,
        a_later_key=1,
    )
    edit(
        folder / "text_encoder/config.json",
        _name_or_path="a/folder",
        torch_dtype="float32",
        transformers_version="4.27.4",
        n_positions=512,
        output_past=True,
        task_specific_params={},
    )
    for part in ("transformer", "vae", "text_encoder"):
        store(
            folder / part,
            form if part == "text_encoder" else form.replace("sharded bin", "bin"),
        )
    if spiece:
        t5_tokenizer(folder / "tokenizer", spiece)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_pixart(tmp_path, form):
    r = recipe("skin", scale="tiny")
    new, old = (
        load_base(r),
        load_base(
            recipe(
                "skin", scale="tiny", model=str(pixart(tmp_path / "pixart", form=form))
            )
        ),
    )
    z, t = torch.randn(1, *new.latent_shape, generator=rng(0, "z")), torch.tensor(500)
    with torch.no_grad():
        a, b = (m.predict(z, t, m.encode_text([CAPTION])) for m in (new, old))
        assert torch.equal(a, b) and torch.equal(new.decode(z), old.decode(z))


def test_pixarts_tokenizer_is_a_bare_sentencepiece_model(tmp_path, spiece):
    r = recipe("skin", scale="tiny", model=str(pixart(tmp_path / "pixart", spiece)))
    want = [
        *sentencepiece.SentencePieceProcessor(model_file=str(spiece)).encode(CAPTION),
        1,
    ]
    model = load_base(r)
    ids, mask = model.tokens([CAPTION])
    assert ids[0][mask[0] == 1].tolist() == want == load_tokenizer(r)(CAPTION).input_ids


# Stable Diffusion 1.4, 1.5 and XL


def clip_tokenizer(folder):
    "Vocabulary and merges apart, and tokens spelt out as objects, as CLIP's tokenizer was saved in 2022."
    whole = json.loads((folder / "tokenizer.json").read_text())
    write(folder / "vocab.json", whole["model"]["vocab"])
    merges = [
        m if isinstance(m, str) else " ".join(m) for m in whole["model"]["merges"]
    ]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer.json").unlink()

    def token(text):
        return dict(
            __type="AddedToken",
            content=text,
            lstrip=False,
            normalized=True,
            rstrip=False,
            single_word=False,
        )

    start, end = "<|startoftext|>", "<|endoftext|>"
    write(
        folder / "special_tokens_map.json",
        dict(bos_token=start, eos_token=end, pad_token=end, unk_token=end),
    )
    write(
        folder / "tokenizer_config.json",
        dict(
            add_prefix_space=False,
            bos_token=token(start),
            do_lower_case=True,
            eos_token=token(end),
            errors="replace",
            model_max_length=77,
            name_or_path="openai/clip-vit-large-patch14",
            pad_token=end,
            special_tokens_map_file="a/file",
            tokenizer_class="CLIPTokenizer",
            unk_token=token(end),
        ),
    )


def old_attention(key):
    "Names of an autoencoder's attention before diffusers 0.18."
    for new, old in (
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ):
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def stable_diffusion(folder, form, extractor):
    shutil.copytree(locate("data/tiny/sd"), folder)
    edit(
        folder / "model_index.json",
        feature_extractor=["transformers", extractor],
        _diffusers_version="0.2.2",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        requires_safety_checker=True,
        scheduler=["diffusers", "PNDMScheduler"],
    )
    old = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    write(
        folder / "scheduler/scheduler_config.json",
        dict(
            _class_name="PNDMScheduler",
            _diffusers_version="0.7.0.dev0",
            beta_end=old["beta_end"],
            beta_start=old["beta_start"],
            beta_schedule=old["beta_schedule"],
            num_train_timesteps=1000,
            set_alpha_to_one=False,
            skip_prk_steps=True,
            steps_offset=1,
            trained_betas=None,
            clip_sample=False,
        ),
    )
    write(
        folder / "safety_checker/config.json",
        dict(architectures=["StableDiffusionSafetyChecker"], model_type="clip"),
    )
    write(
        folder / "feature_extractor/preprocessor_config.json",
        IMAGENET
        | dict(
            crop_size=224,
            do_center_crop=True,
            feature_extractor_type=extractor,
            size=224,
        ),
    )
    n = torch.arange(77)[None]
    rename(
        folder / "text_encoder",
        lambda k: f"text_model.{k}",
        {"text_model.embeddings.position_ids": n},
    )
    clip_tokenizer(folder / "tokenizer")
    for part in ("unet", "vae", "text_encoder"):
        store(folder / part, form)
    return folder


@pytest.mark.parametrize(
    "form,extractor",
    [
        ("bin", "CLIPFeatureExtractor"),
        ("fp16 beside", "CLIPImageProcessor"),
        ("safetensors", "CLIPFeatureExtractor"),
    ],
)
def test_stable_diffusion(tmp_path, form, extractor):
    "With a safety checker of which there are no weights here: it is not asked for."
    folder = stable_diffusion(tmp_path / "sd", form, extractor)
    new = load_base(recipe("skin", "sd15", scale="tiny"))
    old = load_base(recipe("skin", "sd15", scale="tiny", model=str(folder)))
    z, t = torch.randn(1, *new.latent_shape, generator=rng(0, "z")), torch.tensor(500)
    with torch.no_grad():
        a, b = (m.predict(z, t, m.encode_text([CAPTION])) for m in (new, old))
    assert torch.equal(a, b) and torch.allclose(new.abar, old.abar)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "Pipelines of the families that have no trained small weights."
    where = tmp_path_factory.mktemp("drawn")
    return {
        family: random_pipeline(family, where / family)
        for family in ("sdxl", "hunyuan")
    }


def test_sdxl(drawn, tmp_path):
    folder = shutil.copytree(drawn["sdxl"], tmp_path / "sdxl")
    edit(
        folder / "model_index.json",
        _diffusers_version="0.19.0.dev0",
        force_zeros_for_empty_prompt=True,
    )
    rename(folder / "vae", old_attention)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        store(folder / part, "fp16 beside")
        (folder / part / "model.onnx").write_bytes(b"not read")
    for part in ("tokenizer", "tokenizer_2"):
        clip_tokenizer(folder / part)
    new, old = (
        load_base(recipe("skin", "sdxl", scale="tiny", model=str(f)))
        for f in (drawn["sdxl"], folder)
    )
    z = torch.randn(1, *new.latent_shape, generator=rng(0, "z"))
    with torch.no_grad():
        a, b = (
            m.predict(z, torch.tensor(500), m.encode_text([CAPTION]))
            for m in (new, old)
        )
        assert torch.equal(a, b) and torch.equal(new.decode(z), old.decode(z))


@pytest.mark.parametrize("called", ["MT5Tokenizer", "T5Tokenizer"])
@pytest.mark.parametrize("pooler", [True, False])
def test_hunyuan(drawn, spiece, tmp_path, called, pooler):
    "Its BERT's pooler is read by nobody, so a file may lack it."
    folder = shutil.copytree(drawn["hunyuan"], tmp_path / "hunyuan")
    edit(
        folder / "model_index.json",
        tokenizer_2=["transformers", called],
        feature_extractor=[None, None],
        safety_checker=[None, None],
        requires_safety_checker=True,
    )
    edit(
        folder / "text_encoder_2/config.json",
        model_type="mt5",
        architectures=["MT5EncoderModel"],
    )
    if not pooler:
        path = folder / "text_encoder/model.safetensors"
        save_file(
            {k: v for k, v in load_file(path).items() if "pooler" not in k},
            path,
            dict(format="pt"),
        )
    store(folder / "text_encoder_2", "sharded safetensors")
    t5_tokenizer(folder / "tokenizer_2", spiece, called)
    vocab = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"][
        "vocab"
    ]
    (folder / "tokenizer/tokenizer.json").unlink()
    (folder / "tokenizer/vocab.txt").write_text(
        "\n".join(sorted(vocab, key=vocab.get)) + "\n"
    )
    old = load_base(recipe("skin", "hunyuan", scale="tiny", model=str(folder)))
    new = load_base(
        recipe("skin", "hunyuan", scale="tiny", model=str(drawn["hunyuan"]))
    )
    assert [type(t).__name__ for t in old.tokenizers] == [
        "BertTokenizer",
        "T5Tokenizer",
    ]
    assert old.tokenizers[0](CAPTION).input_ids == new.tokenizers[0](CAPTION).input_ids
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        for a, b in zip(new.text_encoders, old.text_encoders):
            assert torch.equal(a(input_ids=ids)[0], b(input_ids=ids)[0])


# mmuratarat/kvasir-v2-classifier, Anwarkh1/Skin_Cancer-Image_Classification, google/vit-base-patch16-224-in21k

PREPROCESSORS = {
    "saved by transformers 4.34": SAVED_2023
    | dict(image_processor_type="ViTFeatureExtractor"),
    "saved by transformers 4.36": SAVED_2023
    | dict(image_processor_type="ViTImageProcessor"),
    "saved by transformers 4.48": SAVED_2023
    | dict(image_processor_type="ViTImageProcessorFast"),
    "both keys": SAVED_2023
    | dict(
        image_processor_type="ViTFeatureExtractor",
        feature_extractor_type="ViTFeatureExtractor",
    ),
    "saved in 2022": IMAGENET
    | dict(feature_extractor_type="ViTFeatureExtractor", size=224),
    "saved in 2021": IMAGENET | dict(size=224),
    "with keys of another day": SAVED_2023
    | dict(
        image_processor_type="ViTFeatureExtractor",
        do_convert_rgb=None,
        _valid_processor_keys=["images"],
        a_later_key=1,
    ),
}


def vit(folder, head=True, form="safetensors"):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        id2label={
            i: c for i, c in enumerate(("polyps", "esophagitis", "normal-cecum"))
        },
    )
    torch.manual_seed(0)
    (ViTForImageClassification if head else ViTModel)(config).save_pretrained(folder)
    write(
        folder / "preprocessor_config.json", PREPROCESSORS["saved by transformers 4.36"]
    )
    store(folder, form)
    return folder


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    "A classifier and a backbone."
    where = tmp_path_factory.mktemp("vits")
    return dict(
        classifier=vit(where / "classifier"),
        backbone=vit(where / "backbone", head=False),
    )


@pytest.mark.parametrize("network", ["classifier", "backbone"])
@pytest.mark.parametrize("saved", PREPROCESSORS)
def test_vit_preprocessors(vits, tmp_path, saved, network):
    "The same pixels reach the network whatever its processor's class was called."
    folder = shutil.copytree(vits[network], tmp_path / "vit")
    write(folder / "preprocessor_config.json", PREPROCESSORS[saved])
    x = torch.randint(
        0, 256, (2, 3, 300, 300), dtype=torch.uint8, generator=rng(0, "x")
    )
    a, b = (load_extractor(str(f)) for f in (vits[network], folder))
    assert torch.equal(a.run(x)[0], b.run(x)[0]) and a.key == b.key
    assert load_classifier(str(folder), ("a", "b")).side == 224


@pytest.mark.parametrize(
    "values",
    [
        dict(do_normalize=False),
        dict(rescale_factor=1 / 127.5),
        dict(do_rescale=False),
        dict(image_mean=[0.1, 0.2, 0.3]),
        dict(),
    ],
    ids=str,
)
def test_a_classifier_sees_what_the_processor_says(vits, tmp_path, values):
    "The classifier's pixels are normalised on the device, batch by batch: by every value of the file, as the processor would."
    folder = shutil.copytree(vits["backbone"], tmp_path / "vit")
    edit(folder / "preprocessor_config.json", **values)
    net = load_classifier(str(folder), ("a", "b"))
    x = torch.randint(
        0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=rng(0, "x")
    )
    want = net.pre(list(x), do_resize=False, return_tensors="pt").pixel_values
    assert torch.allclose(normalize_pixels(x, net.pre, "cpu"), want, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_vit_weights(vits, tmp_path, form):
    folder = vit(tmp_path / "vit", form=form)
    assert (
        load_extractor(str(folder)).key == load_extractor(str(vits["classifier"])).key
    )


@pytest.mark.parametrize(
    "called,kind",
    [
        ("DeiTFeatureExtractor", "DeiTImageProcessorPil"),
        ("ConvNextFeatureExtractor", "ConvNextImageProcessorPil"),
        ("BeitFeatureExtractor", "BeitImageProcessorPil"),
        ("CLIPFeatureExtractor", "CLIPImageProcessorPil"),
        ("BitImageProcessor", "BitImageProcessorPil"),
        ("ViTImageProcessorPil", "ViTImageProcessorPil"),
    ],
)
def test_other_processors_are_read_as_their_own(vits, tmp_path, called, kind):
    "Not as a ViT's: they crop, or resize by the shorter side."
    folder = shutil.copytree(vits["backbone"], tmp_path / "net")
    values = IMAGENET | dict(
        image_mean=[0.1, 0.2, 0.3], size=200, image_processor_type=called
    )
    write(folder / "preprocessor_config.json", values)
    pre = load_image_processor(str(folder))
    assert type(pre).__name__ == kind and list(pre.image_mean) == [0.1, 0.2, 0.3]
    assert 200 in dict(pre.size).values()


def test_a_processor_that_nobody_knows_is_refused(vits, tmp_path):
    folder = shutil.copytree(vits["backbone"], tmp_path / "net")
    write(
        folder / "preprocessor_config.json",
        SAVED_2023 | dict(image_processor_type="MyOwnProcessor"),
    )
    with pytest.raises(
        ValueError, match="is there, but cannot be used as it is.*image processor"
    ):
        load_extractor(str(folder))
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        load_classifier(str(folder), ("a", "b"))


# t5-large


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded bin"])
@pytest.mark.parametrize("embeddings", ["once", "three times"])
def test_t5(tmp_path, spiece, form, embeddings):
    "Old files repeat the shared embeddings for encoder and decoder."
    folder = shutil.copytree(locate("data/tiny/simplifier"), tmp_path / "t5")
    if embeddings == "three times":
        shared = load_file(folder / "model.safetensors")["shared.weight"]
        rename(
            folder,
            str,
            {
                f"{k}.embed_tokens.weight": shared.clone()
                for k in ("encoder", "decoder")
            },
        )
    store(folder, form)
    old, new = (
        load_simplifier(recipe("skin", scale="tiny", simplifier=str(f)))
        for f in (folder, "data/tiny/simplifier")
    )
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(
            old.model(input_ids=ids, decoder_input_ids=ids).logits,
            new.model(input_ids=ids, decoder_input_ids=ids).logits,
        )
    t5_tokenizer(tmp_path / "tokenizer", spiece)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    shutil.copy(spiece, folder / "spiece.model")  # t5-large has little more
    tok = load_simplifier(
        recipe("skin", scale="tiny", simplifier=str(folder))
    ).tokenizer
    assert tok(CAPTION).input_ids == [
        *sentencepiece.SentencePieceProcessor(model_file=str(spiece)).encode(CAPTION),
        1,
    ]


# llava-hf/llama3-llava-next-8b-hf, thisisiron/Ovis2-8B-hf


def legacy_vlm(folder, template):
    "Image processor, processor and chat template each in a file of its own, as before transformers 5."
    shutil.copytree(locate("data/tiny/vlm"), folder)
    processor = json.loads((folder / "processor_config.json").read_text())
    image = processor.pop("image_processor")
    image.pop("data_format", None)
    write(
        folder / "preprocessor_config.json",
        image
        | dict(
            image_processor_type="LlavaNextImageProcessor",
            processor_class="LlavaNextProcessor",
            do_pad=True,
        ),
    )
    write(folder / "processor_config.json", processor)
    words = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    if template == "chat_template.json":
        write(folder / template, dict(chat_template=words))
    else:
        edit(folder / "tokenizer_config.json", chat_template=words)
    return folder


@pytest.mark.parametrize(
    "template,form",
    [
        ("chat_template.json", "sharded safetensors"),
        ("tokenizer_config.json", "safetensors"),
    ],
)
def test_llava(tmp_path, template, form):
    from PIL import Image

    folder = legacy_vlm(tmp_path / "vlm", template)
    store(folder, form)
    picture = Image.effect_noise((64, 64), 60).convert("RGB")
    said = [
        load_vlm(recipe("skin", scale="tiny", caption_tokens=8, vlm=v)).write(
            [picture], ["What is seen?"], [3]
        )
        for v in ("data/tiny/vlm", str(folder))
    ]
    assert said[0] == said[1]


def test_a_template_without_a_place_for_an_image_is_refused(tmp_path):
    folder = legacy_vlm(tmp_path / "vlm", "tokenizer_config.json")
    r = recipe("skin", scale="tiny", vlm=str(folder))
    for template, says in (
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no place for an image"),
        (
            "{% for m in messages %}{{ m.content[-1].text }}{% endfor %}",
            "no place for an image",
        ),
        (None, "has no chat template"),
    ):
        edit(folder / "tokenizer_config.json", chat_template=template)
        with pytest.raises(ValueError, match=says):
            load_vlm(r)


def test_ovis(tmp_path):
    "Native in transformers, with files that its conversion writes: two tokens more than its tokenizer was trained with."
    from PIL import Image
    from transformers import (
        Ovis2Config,
        Ovis2ForConditionalGeneration,
        Ovis2Processor,
        PreTrainedTokenizerFast,
    )
    from transformers.models.ovis2.image_processing_pil_ovis2 import (
        Ovis2ImageProcessorPil,
    )

    marks = [
        "<IMG_ATOM>",
        "<IMG_START>",
        "<IMG_GRID>",
        "<IMG_COL>",
        "<IMG_ROW>",
        "<IMG_END>",
        "<image>",
    ]
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(locate("data/tiny/vlm")) / "tokenizer.json"),
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=marks,
    )
    ids = tok.convert_tokens_to_ids(marks)
    text = dict(
        model_type="qwen2",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(tok),
    )
    vision = dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_stride=1,
        vocab_size=64,
    )
    config = Ovis2Config(
        vision_config=vision,
        text_config=text,
        image_token_id=ids[0],
        hidden_size=32,
        vocab_size=len(tok),
        visual_indicator_token_ids=ids[1:6],
    )
    folder = tmp_path / "ovis"
    Ovis2ForConditionalGeneration(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    Ovis2ImageProcessorPil(
        size=dict(height=28, width=28), max_patches=2
    ).save_pretrained(folder)
    edit(
        folder / "preprocessor_config.json",
        image_processor_type="Ovis2ImageProcessor",
        processor_class="Ovis2Processor",
    )
    write(
        folder / "processor_config.json",
        dict(
            image_seq_length=4, image_token="<image>", processor_class="Ovis2Processor"
        ),
    )
    talk = (
        "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}"
        "{% endfor %}{% endfor %}"
    )
    write(folder / "chat_template.json", dict(chat_template=talk))
    store(folder, "sharded safetensors")
    vlm = load_vlm(recipe("skin", scale="tiny", caption_tokens=4, vlm=str(folder)))
    assert isinstance(vlm.processor, Ovis2Processor)
    assert (
        len(
            vlm.write(
                [Image.effect_noise((40, 30), 60).convert("RGB")],
                ["What is seen?"],
                [3],
            )
        )
        == 1
    )


# Pickles


class Deed:
    "What a pickle does when it is read as one."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_weights_is_not_run(vits, tmp_path):
    "Neither a modern file (a zip of pickles) nor one from before torch 1.6."
    for modern in (True, False):
        folder = shutil.copytree(vits["classifier"], tmp_path / f"vit {modern}")
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        done = tmp_path / f"done {modern}"
        torch.save(
            weights | dict(deed=Deed(done)),
            folder / "pytorch_model.bin",
            _use_new_zipfile_serialization=modern,
        )
        for load in (load_extractor, lambda f: load_classifier(f, ("a", "b"))):
            with pytest.raises(
                ValueError,
                match="is not read: a .bin file of it holds more than numbers",
            ):
                load(str(folder))
        assert not done.exists()
    folder = pixart(tmp_path / "pixart")
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    (folder / "transformer/diffusion_pytorch_model.bin").write_bytes(
        pickle.dumps(dict(deed=Deed(tmp_path / "done")))
    )
    with pytest.raises(
        ValueError, match="is not read: a .bin file of it holds more than numbers"
    ):
        load_base(recipe("skin", scale="tiny", model=str(folder)))
    assert not (tmp_path / "done").exists()


# What is wrong is said


def no_file(folder):
    (folder / "model.safetensors").unlink()


def only_half(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")


def only_flax(folder):
    (folder / "model.safetensors").rename(folder / "flax_model.msgpack")


def no_config(folder):
    (folder / "config.json").unlink()


def cut(folder):
    (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1]
    )


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def pointer(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def page(folder):
    (folder / "config.json").write_text("<html>Sign in</html>")


def stranger(folder):
    edit(folder / "config.json", model_type="vit9", architectures=["ViT9Model"])


def no_shard(folder):
    store(folder, "sharded safetensors")
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_bin(folder):
    store(folder, "bin")
    (folder / "pytorch_model.bin").write_bytes(
        (folder / "pytorch_model.bin").read_bytes()[:999]
    )


def lacking(folder):
    w = load_file(folder / "model.safetensors")
    w.pop(next(k for k in w if "layer.0" in k and k.endswith("weight")))
    save_file(w, folder / "model.safetensors", dict(format="pt"))


def reshaped(folder):
    edit(folder / "config.json", intermediate_size=96)


@pytest.mark.parametrize(
    "harm,kind,says",
    [
        (
            no_file,
            FileNotFoundError,
            "No .* that is complete: the folder holds no weights",
        ),
        (only_half, FileNotFoundError, "model.fp16.safetensors is not read"),
        (only_flax, FileNotFoundError, "flax_model.msgpack is not read"),
        (no_shard, FileNotFoundError, "model-00002-of-00002.safetensors is missing"),
        (no_config, FileNotFoundError, "holds no config.json"),
        (cut, ValueError, "model.safetensors is damaged or cut short"),
        (empty, ValueError, "model.safetensors is damaged or cut short"),
        (cut_bin, ValueError, "pytorch_model.bin is damaged or cut short"),
        (pointer, ValueError, "is a Git LFS pointer.*git lfs pull"),
        (page, ValueError, "config.json is not valid JSON"),
        (stranger, ValueError, "is there, but cannot be used as it is.*vit9"),
        (lacking, ValueError, "1 of the weights of .*drawn at random"),
        (reshaped, ValueError, "another shape|size mismatch|mismatch"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_each_harm_has_its_own_sentence(vits, tmp_path, harm, kind, says):
    folder = shutil.copytree(vits["classifier"], tmp_path / "vit")
    harm(folder)
    for load, setting in (
        (load_extractor, "extractor"),
        (lambda f: load_classifier(f, ("a", "b")), "classifier"),
    ):
        with pytest.raises(kind, match=says) as e:
            load(str(folder))
        text = str(e.value)
        assert (text.startswith("No ")) == (kind is FileNotFoundError), (
            "weights are called missing where they are"
        )
        assert kind is not FileNotFoundError or f"{setting}=FOLDER" in text
        assert "hf download" not in text, "a folder is not on the hub"


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_part_of_a_pipeline_that_is_not_whole_is_named(tmp_path, part):
    folder = pixart(tmp_path / "pixart")
    path = next((folder / part).glob("*.safetensors"))
    whole = path.read_bytes()
    r = recipe("skin", scale="tiny", model=str(folder))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{part}/{path.name} is damaged or cut short"):
        load_base(r)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"No .*{part} holds no weights"):
        load_base(r)
    path.write_bytes(whole)
    rename(folder / part, lambda k: k.replace("0", "9", 1))
    with pytest.raises(ValueError, match=f"in {part} stand in no file"):
        load_base(r)


@pytest.mark.parametrize("method", ["medart", "sd15", "hunyuan"])
def test_a_tokenizer_without_its_vocabulary_is_refused(drawn, tmp_path, method):
    "Transformers loads it as an empty one: every caption would be a row of unknown words."
    source = dict(
        medart=locate("data/tiny/pixart"),
        sd15=locate("data/tiny/sd"),
        hunyuan=drawn["hunyuan"],
    )[method]
    folder = shutil.copytree(source, tmp_path / "model")
    (folder / "tokenizer/tokenizer.json").unlink()
    r = recipe("skin", method, scale="tiny", model=str(folder))
    for load in (load_base, load_tokenizer):
        with pytest.raises(
            FileNotFoundError,
            match="No .* that is complete: its tokenizer knows no words.*model=FOLDER",
        ):
            load(r)


def test_captioners_without_a_vocabulary_are_refused(tmp_path):
    for setting, load in (("vlm", load_vlm), ("simplifier", load_simplifier)):
        folder = shutil.copytree(locate(f"data/tiny/{setting}"), tmp_path / setting)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(
            (FileNotFoundError, ValueError), match=f"tokenizer.*{setting}=FOLDER"
        ):
            load(recipe("skin", scale="tiny", **{setting: str(folder)}))


def test_a_folder_that_is_no_pipeline(tmp_path, vits):
    with pytest.raises(
        FileNotFoundError, match="no model_index.json, so it is no diffusers pipeline"
    ):
        load_base(recipe("skin", scale="tiny", model=str(vits["backbone"])))


def hub(kind, status):
    "An answer of the hub, as its library raises it."
    import httpx

    return kind(
        "refused",
        response=httpx.Response(
            status, request=httpx.Request("GET", "https://huggingface.co")
        ),
    )


@pytest.mark.parametrize(
    "error,kind,says",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            OSError,
            "disk is full.*HF_HOME",
        ),
        (PermissionError(errno.EACCES, "denied"), PermissionError, "may not be read"),
        (
            ImportError("T5Tokenizer requires the SentencePiece library"),
            ImportError,
            "package that is not installed.*SentencePiece",
        ),
        (ModuleNotFoundError("No module named 'timm'"), ImportError, "timm"),
        (
            hub(GatedRepoError, 403),
            PermissionError,
            "accepted: open https://huggingface.co/some/model",
        ),
        (
            hub(RepositoryNotFoundError, 404),
            FileNotFoundError,
            "no such repository, or it is private",
        ),
        (ConnectionError("no route"), FileNotFoundError, "hf download some/model"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_hub_and_the_machine_say(error, kind, says, wrapped):
    "However deep the libraries wrap it."
    if wrapped:
        outer = OSError("Can't load the model for 'some/model'")
        outer.__cause__ = error
        error = outer
    with pytest.raises(kind, match=says):
        with explain_load_errors("ViT", "some/model", "extractor"):
            raise error


def test_memory_is_not_the_files_fault():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        with pytest.raises(type(error)):
            with explain_load_errors("ViT", "data/tiny/vit-skin", "extractor"):
                raise error


def cached(cache, name, folder):
    "Put a folder into the hub's cache, as downloaded."
    where = cache / f"models--{name.replace('/', '--')}"
    (where / "refs").mkdir(parents=True)
    (where / "refs/main").write_text("0" * 40)
    return shutil.copytree(folder, where / "snapshots" / ("0" * 40))


def test_a_cached_repository_is_read_and_its_damage_named(vits, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = cached(tmp_path, "some/vit", vits["classifier"])
    if constants.HF_HUB_OFFLINE:
        from medart.core.weight_files import local_folder

        assert local_folder("some/vit") == folder and local_folder("some/other") is None
        assert not missing_files(files_below(folder)) and not damaged_files(folder)
        (folder / "model.safetensors").write_bytes(b"cut")
        error = load_error(
            "ViT", "some/vit", "extractor", ValueError("header too small")
        )
        assert "model.safetensors is damaged" in str(error)


def test_weight_files_follow_the_libraries_order():
    assert weight_files({"pytorch_model.bin", "model.safetensors"}) == [
        "model.safetensors"
    ]
    assert weight_files({"model.safetensors.index.json"}) == [
        "model-00001-of-?.safetensors"
    ]
    assert weight_files({"model-00003-of-00003.safetensors"}) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    assert (
        weight_files(
            {
                "model.fp16-00001-of-00002.safetensors",
                "diffusion_pytorch_model.non_ema.bin",
            }
        )
        == []
    )


# Merging


@pytest.mark.parametrize(
    "method,dtype",
    [
        ("medart", "bfloat16"),
        ("sd15", "float32"),
        ("sdxl", "float32"),
        ("hunyuan", "float32"),
        ("dora", "float32"),
    ],
)
def test_a_merged_pipeline_is_a_stock_one_and_generates_the_same(
    drawn, tmp_path, method, dtype
):
    family = method if method in drawn else None
    r = recipe(
        "skin",
        method,
        scale="tiny",
        gen_steps=2,
        dtype=dtype,
        **({"model": str(drawn[family])} if family else {}),
    )
    model = perturb_loras(load_model(r), 0.05)
    folder = merge_and_save(model, tmp_path / "merged")
    configurations = [p.read_text() for p in folder.rglob("*.json")]
    assert configurations and not any("name_or_path" in c for c in configurations), (
        "what could be shared names no folder of this machine"
    )
    plain = load_base(
        recipe(
            "skin", method, scale="tiny", gen_steps=2, dtype=dtype, model=str(folder)
        )
    )
    a, b, c = (sample_images(m, r, [CAPTION]) for m in (model, plain, load_base(r)))
    far = (a - c).abs().mean()  # half precision rounds the merged weights once more
    assert far > 0.01 and (a - b).abs().mean() < far * (
        1e-3 if dtype == "float32" else 0.2
    )
    stock = type(model).pipeline.from_pretrained(folder, dtype=torch.float32)
    more = {} if method in ("sd15", "sdxl") else dict(use_resolution_binning=False)
    image = stock(
        CAPTION, num_inference_steps=2, height=64, width=64, output_type="np", **more
    ).images
    assert image.shape == (1, 64, 64, 3) and stock.scheduler is not None


def test_what_cannot_be_merged_says_so(tmp_path):
    with pytest.raises(
        ValueError, match="FastDiT has no adapters to merge.*transformer/"
    ):
        merge_and_save(
            load_model(recipe("skin", "fast_dit", scale="tiny")), tmp_path / "merged"
        )
    model = load_model(recipe("skin", scale="tiny"))
    model.text_encoder = None
    with pytest.raises(ValueError, match="text_encoder was put away"):
        merge_and_save(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_new_last_layer_is_all_that_may_be_drawn(vits, tmp_path):
    from transformers import ViTForImageClassification

    with pytest.raises(ValueError, match="classifier"):
        load_network(ViTForImageClassification, str(vits["backbone"]))
    assert load_network(
        ViTForImageClassification, str(vits["backbone"]), new=("classifier.",)
    )
    assert weight_fault(vits["backbone"] / "model.safetensors") == ""
