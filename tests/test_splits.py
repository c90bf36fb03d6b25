"Copies, lesions and patients stay on one side, and every class has its fifth."

import json
import shutil
from collections import Counter
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from drawn import picture, put
from medart.data.duplicates import fingerprint, near_pairs
from medart.data.preparation import prepare
from medart.data.reports import with_names
from medart.data.splits import lot, split_groups
from medart.recipes.datasets import DATASETS
from drawn import opened, report, saved

SKIN = DATASETS["skin"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


# Copies and the split


def test_copies_are_found_and_never_straddle(tmp_path):
    raw = tmp_path / "raw"
    for i in range(40):
        put(raw, f"melanoma/{i}.png", i, compress_level=1)
    changes = dict(
        resaved=lambda im: opened(saved(im, "JPEG", quality=40)),
        half=lambda im: im.resize((40, 32)),
        bright=lambda im: im.point(lambda v: min(255, int(v * 1.15))),
        mirrored=lambda im: im.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        turned=lambda im: im.transpose(Image.Transpose.ROTATE_90),
    )
    for n, (k, f) in enumerate(changes.items()):
        put(raw, f"melanoma/{k}.png", f(picture(n)))
    shutil.copy(raw / "melanoma/7.png", raw / "melanoma/same file.png")
    for seed in range(6):
        out = prepare(raw, SKIN, tmp_path / "out", seed=seed)
        c, m = with_names(out, "duplicates"), with_names(out)
        assert {(Path(a).stem, Path(b).stem) for a, b in zip(c.a, c.b)} == {
            (str(n), k) for n, k in enumerate(changes)
        } | {("7", "same file")}
        assert (
            set(c.kind[c.b == "melanoma/same file.png"]) == {"exact"}
            and (c.kind == "exact").sum() == 1
        )
        side = dict(zip(m.source, m.split))
        assert all(side[a] == side[b] for a, b in zip(c.a, c.b))
        assert Counter(m.split) == dict(train=36, test=10)


@pytest.mark.parametrize("name", ["skin", "kvasir"])
def test_the_papers_counts_give_the_papers_split(name):
    classes = [c for c, n in DATASETS[name].counts.items() for _ in range(n)]
    lots = [lot(3, str(i)) for i in range(len(classes))]
    split = split_groups(classes, list(range(len(classes))), lots)
    assert (split.count("train"), split.count("test")) == dict(
        skin=(6652, 1665), kvasir=(6400, 1600)
    )[name]
    for c, n in DATASETS[name].counts.items():
        assert sum(s == "test" for s, k in zip(split, classes) if k == c) == -(-n // 5)
    assert split != split_groups(
        classes,
        list(range(len(classes))),
        [lot(4, str(i)) for i in range(len(classes))],
    )


def test_patients_with_several_classes_stay_whole_at_the_papers_counts():
    g = np.random.default_rng(0)
    classes = [c for c, n in SKIN.counts.items() for _ in range(n)]
    patients = g.integers(0, 3000, len(classes)).tolist()
    split = split_groups(
        classes, patients, [lot(0, str(i)) for i in range(len(classes))]
    )
    assert len(set(zip(patients, split))) == len(set(patients))
    assert (
        abs(split.count("test") - 1665) <= 8
    )  # patients of a single class fill the gaps
    for c in SKIN.counts:
        assert (
            abs(
                sum(s == "test" for s, k in zip(split, classes) if k == c)
                - -(-SKIN.counts[c] // 5)
            )
            <= 3
        )


def test_groups_that_cannot_fit_come_as_near_as_they_can_and_it_is_said(tmp_path):
    rows = [
        (f"{c}{i}.png", c, f"{c}{i // 6}")
        for c in ("melanoma", "common_nevus")
        for i in range(12)
    ]
    for n, (f, _, _) in enumerate(rows):
        put(tmp_path / "raw", f, n)
    pd.DataFrame(rows, columns=["file", "diagnosis", "lesion_id"]).to_csv(
        tmp_path / "raw/labels.csv", index=False
    )
    out = prepare(tmp_path / "raw", SKIN, tmp_path / "out")
    m = report(out, "manifest.csv")
    assert Counter(zip(m["class"], m.split)) == {
        (c, s): 6 for c in ("melanoma", "common_nevus") for s in ("train", "test")
    }
    told = json.loads((out / "prepared.json").read_text())["remarks"]
    assert "melanoma: 6 test images instead of 3, since groups are not divided" in told


def test_the_split_follows_content_not_names_or_order(tree, tmp_path):
    again = tmp_path / "elsewhere"
    for f in tree.rglob("*.jpg"):
        (again / f.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(f, again / f.parent.name / f"{9 - int(f.stem)} renamed.jpg")
    a, b = (
        report(prepare(x, SKIN, tmp_path / f"{x.name} out"), "manifest.csv")
        for x in (tree, again)
    )
    assert a.file.tolist() == b.file.tolist()


# Real images, where they are


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images here")
def test_two_photographs_of_one_real_lesion_are_seen():
    lesion = [
        np.stack(
            [
                fingerprint(Image.open(REAL / "skin/dermatofibroma" / f"ISIC_{n}.jpg"))
                for n in pair
            ]
        )
        for pair in (("0026473", "0026789"), ("0028346", "0031344"))
    ]
    assert [len(near_pairs(x)) for x in lesion] == [1, 1]
