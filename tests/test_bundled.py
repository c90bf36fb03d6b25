"The small models can be built from nothing: every lesson, the card, and a pipeline that loads."

import hashlib
from functools import partial

import numpy as np

from everywhere import replace_everywhere
from medart.bundled import pixart as pixart_room
from medart.bundled import stable_diffusion
from medart.bundled import text_encoders
from medart.training.models import load_base
from medart.data.photographs import draw_photograph, photograph
from medart.data.shapes import draw_web_picture
from medart.core.randomness import np_rng
from medart.method.model import load_pretrained
from medart.recipes.recipe import recipe


def test_small_models_are_built_from_nothing(tmp_path, monkeypatch):
    replace_everywhere(
        monkeypatch,
        pixart_room.learn_to_read,
        partial(text_encoders.learn_to_read, steps=3),
    )
    pixart = pixart_room.build_pixart(
        tmp_path / "pixart", pictures=64, vae_steps=3, steps=(2, 2, 2)
    )
    sd = stable_diffusion.build_stable_diffusion(
        tmp_path / "sd", pixart, pictures=64, steps=2
    )
    for folder, family in ((pixart, "pixart"), (sd, "sd15")):
        assert (
            "seed" in (folder / "README.md").read_text()
            and (folder / "losses.csv").exists()
        )
        model = load_base(
            recipe("skin", scale="tiny", family=family, model=str(folder), interval=0)
        )
        assert model.encode_text(["a red circle"]).emb.isfinite().all()
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    assert (
        pixart_room.build_pixart(
            tmp_path / "pixart", pictures=64, vae_steps=3, steps=(2, 2, 2)
        )
        == pixart
    )
    assert {
        f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()
    } == before


def test_photographs_are_the_same_bytes_for_the_same_number():
    captions, means = [], []
    for i in range(8):
        picture, caption = draw_photograph(0, i)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        captions.append(caption)
        means.append(picture.mean())
    said = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    assert said.startswith("705fec829adf636a")
    want = [187.1, 85.1, 139.9, 197.4, 119.2, 134.6, 62.1, 142.6]
    assert np.abs(np.subtract(means, want)).max() < 0.2
    again = draw_photograph(0, 7)
    assert np.array_equal(again[0], picture) and again[1] == caption
    other = draw_photograph(1, 7)
    assert not np.array_equal(other[0], picture)
    assert draw_photograph(0, 7, 32)[1].startswith(caption[:10])


def test_what_captions_of_photographs_say_is_there_to_be_seen():
    "Black edges are black, holes darken, lines across change a picture; and no word is unknown to the small T5."
    corners, others = [], []
    tokenizer = load_pretrained(recipe("skin", scale="tiny")).tokenizer
    for i in range(120):
        picture, caption = draw_photograph(3, i)
        edge = picture[[0, 0, -1, -1], [0, -1, 0, -1]].max(1)
        (corners if "the edges are black" in caption else others).append(edge)
        ids = tokenizer(caption.lower()).input_ids
        letters = [
            x for x in tokenizer.convert_ids_to_tokens(ids) if len(x.strip("▁")) == 1
        ]
        assert set(letters) <= {".", ",", "▁a"}, caption
        assert tokenizer.unk_token_id not in ids
    assert len(corners) > 15 and np.median(corners) < 20 < np.median(others)


def test_a_photograph_keeps_the_shape_and_says_only_what_it_added():
    flat, _ = draw_web_picture(0, 0)
    kept = 0
    for k in range(40):
        picture, words = photograph(np_rng(0, "kept", k), flat)
        assert len(words) == len(set(words)) <= 5
        a, b = (x[..., 2].ravel().astype(float) for x in (flat, picture))
        kept += np.corrcoef(a, b)[0, 1] > 0.3
    assert kept >= 32
