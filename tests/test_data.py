"Bad files, hostile archives, broken downloads, planted metadata, copies and lesions: what the data stage must withstand."

import hashlib
import io
import json
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from everywhere import replace_everywhere
from medart.data import images as images_room
from medart.data import scan as scan_room
from medart.data import sources
from medart.data import storage
from drawn import picture, put
from medart.core.files import file_hash
from medart.data.duplicates import fingerprint, near_pairs
from medart.data.images import clean_image, read_pixels
from medart.data.listing import list_images
from medart.data.loading import load_split
from medart.data.preparation import prepare
from medart.data.reports import with_names
from medart.data.scan import scan
from medart.data.sources import fetch, unpack
from medart.data.splits import lot, split_groups
from medart.recipes.datasets import DATASETS
from medart.recipes.recipe import recipe

SKIN = DATASETS["skin"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


def saved(im, kind, **k):
    b = io.BytesIO()
    im.save(b, kind, **k)
    return b.getvalue()


def opened(b):
    return Image.open(io.BytesIO(b))


def table(out, name):
    return pd.read_csv(out / name, keep_default_na=False)


@pytest.fixture
def tree(tmp_path):
    "Two classes of ten images."
    for c, first in (("melanoma", 0), ("common_nevus", 10)):
        for i in range(10):
            put(tmp_path / "tree", f"{c}/{i}.jpg", first + i, quality=95)
    return tmp_path / "tree"


# Bad files


def deep(top):
    return Image.fromarray(
        (np.asarray(picture(99).convert("L")).astype(np.float64) / 255 * top).astype(
            np.uint16
        )
    )


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def says_it_is(side):
    "A small PNG file that claims to be large."
    file = saved(picture(50), "PNG")
    return (
        file[:8]
        + chunk(b"IHDR", struct.pack(">II", side, side) + file[24:29])
        + file[33:]
    )


def see_through():
    im = picture(98)
    im.putalpha(Image.linear_gradient("L").resize(im.size))
    return im


QUARANTINED = {
    "cut.jpg": (lambda: saved(picture(50), "JPEG")[:700], "truncated"),
    "cut.png": (lambda: saved(picture(50), "PNG")[:900], "truncated"),
    "cut and filled.jpg": (
        lambda: saved(picture(50), "JPEG")[:700] + bytes(2000),
        "truncated",
    ),
    "empty.jpg": (lambda: b"", "empty"),
    "error page.jpg": (lambda: b"<!DOCTYPE html><html>404</html>", "not an image"),
    "pointer.png": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "not an image",
    ),
    "noise.jpg": (lambda: np.random.default_rng(0).bytes(3000), "not an image"),
    "phone.heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(500), "not an image"),
    "scan.jpg": (lambda: bytes(128) + b"DICM" + bytes(500), "DICOM"),
    "huge.png": (lambda: says_it_is(70000), "huge"),
    "large.png": (lambda: says_it_is(10000), "huge"),
    "dot.png": (lambda: saved(picture(50, (20, 20)), "PNG"), "tiny"),
    "black.png": (lambda: saved(Image.new("RGB", (64, 64)), "PNG"), "blank"),
    "cmyk.jpg": (lambda: saved(picture(50).convert("CMYK"), "JPEG"), "unclear colours"),
    "float.tif": (
        lambda: saved(
            Image.fromarray(
                np.random.default_rng(0).random((64, 64)).astype(np.float32)
            ),
            "TIFF",
        ),
        "unclear values",
    ),
    "12 bits.png": (lambda: saved(deep(4095), "PNG"), "16-bit"),
    "glass.png": (lambda: saved(see_through(), "PNG"), "transparent"),
    "moves.gif": (
        lambda: saved(picture(50), "GIF", save_all=True, append_images=[picture(51)]),
        "animated",
    ),
    "moves.webp": (
        lambda: saved(picture(50), "WEBP", save_all=True, append_images=[picture(51)]),
        "animated",
    ),
    "pages.tif": (
        lambda: saved(picture(50), "TIFF", save_all=True, append_images=[picture(51)]),
        "animated",
    ),
}


def test_what_has_no_one_meaning_is_quarantined_with_its_reason(tree, tmp_path):
    for name, (make, _) in QUARANTINED.items():
        (tree / "melanoma" / name).write_bytes(make())
    (tree / "melanoma/Thumbs.db").write_bytes(b"\0" * 99)
    (tree / "melanoma/.hidden.jpg").write_bytes(b"x")
    (tree / "melanoma/notes.txt").write_text("x")
    put(tree, "loose.png", 77)
    out = prepare(tree, SKIN, tmp_path / "out")
    q = with_names(out, "quarantine")
    got = {Path(f).name: r for f, r in zip(q.source, q.reason)}
    assert got == {name: reason for name, (_, reason) in QUARANTINED.items()} | {
        "loose.png": "left out"
    }
    assert all(q.detail)
    assert len(table(out, "manifest.csv")) == 20
    assert json.loads((out / "prepared.json").read_text())["quarantined"] == len(q)


def lab():
    return ImageCms.profileToProfile(
        picture(60),
        ImageCms.createProfile("sRGB"),
        ImageCms.createProfile("LAB"),
        outputMode="LAB",
    )


PALETTE = picture(61).quantize(64)
OPAQUE = picture(62).convert("RGBA")
CONVERTED = {  # file: bytes, what must come out, what is said of it
    "gray.jpg": (
        lambda: saved(picture(63).convert("L"), "JPEG", quality=95),
        lambda b: opened(b).convert("RGB"),
        "",
    ),
    "palette.png": (
        lambda: saved(PALETTE, "PNG"),
        lambda b: PALETTE.convert("RGB"),
        "palette to RGB",
    ),
    "still.gif": (
        lambda: saved(PALETTE, "GIF"),
        lambda b: PALETTE.convert("RGB"),
        "palette to RGB",
    ),
    "opaque.png": (
        lambda: saved(OPAQUE, "PNG"),
        lambda b: OPAQUE.convert("RGB"),
        "opaque alpha dropped",
    ),
    "16 bits.png": (
        lambda: saved(deep(65535), "PNG"),
        lambda b: Image.fromarray(
            np.uint8(np.asarray(deep(65535)) / 257 + 0.5)
        ).convert("RGB"),
        "16 bits to 8",
    ),
    "is a png.jpg": (
        lambda: saved(picture(64), "PNG"),
        lambda b: picture(64),
        "named .jpg, is .png",
    ),
    "without ending": (
        lambda: saved(picture(65), "PNG"),
        lambda b: picture(65),
        "named without ending, is .png",
    ),
    "plain.bmp": (
        lambda: saved(picture(66), "BMP"),
        lambda b: picture(66),
        "named .bmp, is .png",
    ),
    "plain.tif": (
        lambda: saved(picture(67), "TIFF"),
        lambda b: picture(67),
        "named .tif, is .png",
    ),
    "plain.webp": (
        lambda: saved(picture(68), "WEBP", lossless=True),
        lambda b: picture(68),
        "named .webp, is .png",
    ),
    "lab.tif": (
        lambda: saved(
            lab(),
            "TIFF",
            icc_profile=ImageCms.ImageCmsProfile(
                ImageCms.createProfile("LAB")
            ).tobytes(),
        ),
        lambda b: picture(60),
        "to sRGB",
    ),
    "two pictures.jpg": (
        lambda: saved(picture(69), "MPO", save_all=True, append_images=[picture(70)]),
        lambda b: opened(b).convert("RGB"),
        "",
    ),
}


def test_what_has_one_meaning_is_converted_faithfully(tree, tmp_path):
    for name, (make, _, _) in CONVERTED.items():
        (tree / "melanoma" / name).write_bytes(make())
    out = prepare(tree, SKIN, tmp_path / "out")
    assert not len(table(out, "quarantine.csv"))
    m = with_names(out).set_index("source")
    for name, (make, want, note) in CONVERTED.items():
        row = m.loc[f"melanoma/{name}"]
        with Image.open(out / row.file) as im:
            assert (
                im.mode in ("RGB", "L")
                and im.format == {".jpg": "JPEG", ".png": "PNG"}[Path(row.file).suffix]
            )
            gap = np.abs(
                np.asarray(im.convert("RGB")).astype(int) - np.asarray(want(make()))
            )
        assert gap.max() <= (30 if name == "lab.tif" else 0) and gap.mean() < 2, name
        assert note in row.changes and (note or not row.changes), name


def test_sixteen_bit_colour_keeps_its_upper_bits():
    g = np.random.default_rng(0).integers(0, 65536, (64, 64, 3), dtype=np.uint16)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in g)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    _, kept, _, notes = clean_image(file)
    assert notes == ["16 bits to 8"]
    assert (np.abs(np.asarray(opened(kept)).astype(int) - g / 257) <= 1).all()


def swapped_profile():
    "An RGB space whose red is sRGB's green, and the other way round."
    p = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    p = p.replace(b"rXYZ", b"xxxx").replace(b"gXYZ", b"rXYZ").replace(b"xxxx", b"gXYZ")
    return p.replace("sRGB".encode("utf-16-be"), "Swap".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_colours_of_another_space_are_converted(kind):
    im = picture(5)
    _, kept, _, notes = clean_image(saved(im, kind, icc_profile=swapped_profile()))
    assert notes == ["another colour space to sRGB"]
    assert (
        np.abs(
            np.asarray(opened(kept)).astype(int) - np.asarray(im)[..., [1, 0, 2]]
        ).max()
        <= 6
    )


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_comes_out_upright(turn):
    back = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # orientation -> the Transpose that undoes showing it
    im, exif = picture(3), Image.Exif()
    exif[0x0112] = turn
    stored = im if turn == 1 else im.transpose(Image.Transpose(back[turn]))
    upright, kept, _, notes = clean_image(saved(stored, "PNG", exif=exif))
    assert (
        np.asarray(opened(kept)) == np.asarray(im)
    ).all() and upright.size == im.size
    assert notes == ([] if turn == 1 else ["turned upright"])
    assert not opened(kept).getexif()


# Metadata

SECRET = b"GPS 50.1109 N 8.6821 E of Jane Doe"


def spoiled(kind, i):
    "A picture with a place on earth wherever the format has room for one."
    exif = Image.Exif()
    exif[0x010E], exif[0x9286] = SECRET.decode(), SECRET
    exif.get_ifd(0x8825).update({1: "N", 2: (50.0, 6.0, 39.2), 29: SECRET.decode()})
    profile = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + SECRET
    )
    k = dict(exif=exif, icc_profile=profile)
    if kind == "JPEG":
        k |= dict(comment=SECRET, xmp=SECRET, quality=90)
    if kind == "PNG":
        info = PngInfo()
        info.add_text("a", SECRET.decode())
        info.add_text("b", SECRET.decode(), zip=False)
        info.add_itxt("c", SECRET.decode())
        k |= dict(pnginfo=info)
    if kind == "WEBP":
        k |= dict(xmp=SECRET, lossless=True)
    if kind == "TIFF":
        k |= dict(description=SECRET.decode())
    return saved(picture(i), kind, **k) + SECRET


def test_no_planted_place_survives_anywhere(tree, tmp_path):
    for n, (kind, ending) in enumerate(
        dict(JPEG=".jpg", PNG=".png", WEBP=".webp", TIFF=".tif", MPO=".jpg").items()
    ):
        data_ = spoiled("JPEG" if kind == "MPO" else kind, 200 + n)
        assert SECRET in data_
        (tree / "melanoma" / f"{kind}{ending}").write_bytes(data_)
    out = prepare(tree, SKIN, tmp_path / "out")
    assert not len(table(out, "quarantine.csv"))
    files = [f for f in out.rglob("*") if f.is_file()]
    assert sum(f.suffix in (".jpg", ".png") for f in files) >= 25
    assert not [
        f.name
        for f in files
        if b"Jane" in f.read_bytes() or b"50.1109" in f.read_bytes()
    ]
    for f in files:
        if f.suffix in (".jpg", ".png"):
            with Image.open(f) as im:
                assert not im.getexif() and not {
                    "exif",
                    "icc_profile",
                    "comment",
                    "xmp",
                    "photoshop",
                } & {k.lower() for k in im.info}


JPEGS = [
    dict(),
    dict(progressive=True),
    dict(subsampling=2),
    dict(subsampling=0),
    dict(restart_marker_blocks=2),
    dict(optimize=True, quality=30),
]


@pytest.mark.parametrize(
    "mode,k",
    [*[(m, k) for m in ("RGB", "L") for k in JPEGS], ("RGB", dict(keep_rgb=True))],
    ids=str,
)
def test_stripping_a_jpeg_keeps_its_pixels_bit_for_bit(mode, k):
    file = saved(
        picture(1, (333, 217)).convert(mode),
        "JPEG",
        **({"quality": 90} | k),
        comment=b"x" * 500,
    )
    _, kept, ending, notes = clean_image(file + b"\xff\xd8 behind the end")
    assert (ending, notes) == (".jpg", []) and len(kept) < len(file) - 500
    assert (np.asarray(opened(kept)) == np.asarray(opened(file))).all()


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
    m = table(out, "manifest.csv")
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
        table(prepare(x, SKIN, tmp_path / f"{x.name} out"), "manifest.csv")
        for x in (tree, again)
    )
    assert a.file.tolist() == b.file.tolist()


# Layouts


def rows_of(folder, d=SKIN):
    _, t, how = list_images(folder, d)
    return {r.file: r for r in t.itertuples()}, how


def test_ham10000_is_split_by_lesion(tmp_path):
    raw, rows = tmp_path / "ham", []
    for n in range(60):
        dx = ("nv", "nv", "mel", "bkl", "akiec", "bcc")[n % 6]
        rows.append(
            (
                f"HAM_{n % 6}_{n // 18}" if n % 6 < 3 else f"HAM_single_{n}",
                f"ISIC_{n:07}",
                dx,
                "histo",
                "50.0",
                "male",
                "back",
            )
        )
        put(raw, f"HAM10000_images_part_{1 + n % 2}/ISIC_{n:07}.jpg", n, quality=95)
    pd.DataFrame(
        rows,
        columns=[
            "lesion_id",
            "image_id",
            "dx",
            "dx_type",
            "age",
            "sex",
            "localization",
        ],
    ).to_csv(raw / "HAM10000_metadata.csv", index=False)
    pd.DataFrame(dict(pixel0000=[1], label=[2])).to_csv(
        raw / "hmnist_28_28_RGB.csv", index=False
    )
    out = prepare(raw, SKIN, tmp_path / "out")
    m = with_names(out).assign(
        lesion=lambda m: (
            m.source.str.extract(r"ISIC_(\d+)")[0].astype(int).map(lambda n: rows[n][0])
        )
    )
    assert len(m) == 60 and (m.groupby("lesion").split.nunique() == 1).all()
    assert set(m["class"]) == {
        "common_nevus",
        "melanoma",
        "benign_keratosis",
        "actinic_keratosis",
        "carcinoma",
    }
    told = " ".join(json.loads((out / "prepared.json").read_text())["remarks"])
    assert (
        "a stand-in" in told
        and "Bowen" in told
        and "benign_keratosis is not a class of the paper" in told
    )


def test_what_isic_image_download_leaves_is_understood(tmp_path):
    raw = tmp_path / "isic"
    rows = [
        (
            "Benign",
            "Benign melanocytic proliferations",
            "Nevus",
            "Nevus, NOS, Compound",
            "dermoscopic",
            "common_nevus",
        ),
        (
            "Malignant",
            "Malignant melanocytic proliferations (Melanoma)",
            "Melanoma, NOS",
            "",
            "dermoscopic",
            "melanoma",
        ),
        (
            "Malignant",
            "Malignant epidermal proliferations",
            "Squamous cell carcinoma in situ",
            "Squamous cell carcinoma in situ, Bowens disease",
            "dermoscopic",
            "carcinoma",
        ),
        (
            "Benign",
            "Benign soft tissue proliferations - Vascular",
            "",
            "",
            "dermoscopic",
            "vascular_lesion",
        ),
        (
            "Benign",
            "Flat melanotic pigmentations - not melanocytic nevus",
            "Solar lentigo",
            "",
            "dermoscopic",
            "lentigo_solaris",
        ),
        (
            "Indeterminate",
            "Indeterminate epidermal proliferations",
            "Solar or actinic keratosis",
            "",
            "dermoscopic",
            "actinic_keratosis",
        ),
        (
            "Benign",
            "Benign soft tissue proliferations - Fibro-histiocytic",
            "Scar",
            "",
            "dermoscopic",
            "",
        ),
        (
            "Benign",
            "Benign melanocytic proliferations",
            "Nevus",
            "",
            "clinical: close-up",
            "common_nevus",
        ),
    ]
    for n in range(len(rows)):
        put(raw, f"ISIC_{n:07}.{'JPG' if n % 2 else 'jpg'}", n, format="JPEG")
    t = pd.DataFrame(
        [
            (
                f"ISIC_{n:07}",
                "Somebody",
                "CC-BY-NC",
                *r[:4],
                r[4],
                f"IL_{n}",
                "IP_1" if n < 2 else "",
            )
            for n, r in enumerate(rows)
        ],
        columns=[
            "isic_id",
            "attribution",
            "copyright_license",
            "diagnosis_1",
            "diagnosis_2",
            "diagnosis_3",
            "diagnosis_4",
            "image_type",
            "lesion_id",
            "patient_id",
        ],
    )
    t.to_csv(raw / "metadata.csv", index=False)
    (raw / "attribution.txt").write_text("Somebody")
    (raw / "licenses").mkdir()
    (raw / "licenses/CC-BY-NC.txt").write_text("...")
    got, how = rows_of(raw)
    assert how == "table metadata.csv" and len(got) == len(rows)
    for (f, r), want in zip(sorted(got.items()), rows):
        assert r.cls == want[-1]
        assert bool(r.why) == (not want[-1] or want[-2] != "dermoscopic")
    assert got["ISIC_0000001.JPG"].group == "lesion_id=IL_1\npatient_id=IP_1"
    assert (
        "Scar" in got["ISIC_0000006.jpg"].why
        and "clinical" in got["ISIC_0000007.JPG"].why
    )


@pytest.mark.parametrize("metadata", ["csv", "jsonl", None])
def test_an_imagefolder_keeps_its_split_and_captions(tmp_path, metadata):
    raw = tmp_path / "raw"
    for s, first in (("train", 0), ("test", 100)):
        rows = [
            dict(file_name=f"{c}/{i}.png", text=f"\n a {c} number {i}")
            for c in ("polyps", "esophagitis")
            for i in range(6)
        ]
        for n, row in enumerate(rows):
            put(raw / s, row["file_name"], first + n)
        if metadata == "csv":
            pd.DataFrame(rows).to_csv(raw / s / "metadata.csv", index=False)
        if metadata == "jsonl":
            (raw / s / "metadata.jsonl").write_text(
                "".join(json.dumps(r) + "\n" for r in rows)
            )
    put(
        raw, "train/polyps/0.png", picture(100)
    )  # what the test set has as polyps/0.png
    out = prepare(raw, DATASETS["kvasir"], tmp_path / "out")
    m, q = with_names(out), with_names(out, "quarantine")
    assert (
        Counter(m.split) == dict(train=11, test=12)
        and (m.source.str.split("/").str[0] == m.split).all()
    )
    assert q[["source", "class", "reason"]].values.tolist() == [
        ["train/polyps/0.png", "polyps", "in test too"]
    ]
    text = table(out / "test", "metadata.csv").text
    assert text.str.fullmatch(
        r"a \w+ number \d" if metadata else r"An endoscopic image of \w+"
    ).all()


def test_links_to_folders_are_followed_but_not_in_circles(tree, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/melanoma").symlink_to(tree / "melanoma")
    (tree / "melanoma/back").symlink_to(tree / "melanoma")
    assert len(list_images(tmp_path / "linked", SKIN)[1]) == 10


def test_folders_called_val_become_what_is_missing(tmp_path):
    for names, want in (
        (("train", "val"), dict(train=4, test=4)),
        (("train", "val", "test"), dict(train=8, test=4)),
        (("train",), {"": 4}),
    ):
        raw = tmp_path / "-".join(names)
        for k, s in enumerate(names):
            for i in range(4):
                put(raw, f"{s}/polyps/{i}.png", 10 * k + i)
        assert Counter(list_images(raw, DATASETS["kvasir"])[1].split) == want


def test_any_table_of_file_and_diagnosis(tmp_path):
    raw = tmp_path / "raw"
    for f in ("a.jpg", "deep/b.jpg", "one/same.jpg", "two/same.jpg"):
        put(raw, f, len(f))
    put(tmp_path, "outside.jpg", 9)
    rows = [
        ("a", "nevus"),
        ("deep\\b.jpg", "Melanoma"),
        ("same.jpg", "nevus"),
        ("../outside.jpg", "nevus"),
        (str(tmp_path / "outside.jpg"), "nevus"),
        ("gone.jpg", "nevus"),
        ("one/same.jpg", "wart"),
        ("two/same.jpg", ""),
    ]
    (raw / "labels.csv").write_text(
        "\ufeffImage;x\n".replace(";x", "\tDiagnosis")
        + "".join(f"{a}\t{b}\n" for a, b in rows)
    )
    got, how = rows_of(raw)
    assert how == "table labels.csv"
    assert {f: r.cls for f, r in got.items() if not r.why} == {
        "a.jpg": "common_nevus",
        "deep/b.jpg": "melanoma",
    }
    assert "wart" in got["one/same.jpg"].why and got["two/same.jpg"].why == "no label"
    assert all(
        "not found" in got[k].why
        for k in (
            "same.jpg",
            "../outside.jpg",
            str(tmp_path / "outside.jpg"),
            "gone.jpg",
        )
    )
    (raw / "other.csv").write_text("file,label\na.jpg,nevus\n")
    with pytest.raises(ValueError, match="several tables.*labels.csv, other.csv"):
        list_images(raw, SKIN)


def test_a_new_modality_needs_no_code(folders):
    raw = folders[0] / "fundus"
    for i in range(20):
        put(raw, f"{('G0', 'G3', 'unsure')[i % 3]}/{i}.png", i)
    (raw / "dataset.yaml").write_text(
        "modality: OCT\nfeatures: layers and fluid\n"
        "categories:\n  G0: normal retina\n  G3: Macular edema (cystoid)\nepochs: 2\n"
    )
    r = recipe("fundus", scale="tiny", data="fundus", captions="simple")
    assert r.epochs == 2
    s = load_split(r, "train")
    assert set(zip(s.classes, s.texts)) == {
        ("normal_retina", "An OCT image of normal retina"),
        ("macular_edema_cystoid", "An OCT image of macular edema cystoid"),
    }
    assert all(min(x.shape[1:]) == 64 for x in read_pixels(s, 64))
    q = with_names(folders[0] / "prepared/fundus", "quarantine")
    assert (
        len(q) == 6
        and q.detail.str.contains("its folder is not among the categories").all()
    )
    assert q.source.str.startswith("unsure/").all()
    with pytest.raises(ValueError, match="Did you mean 'modality'"):
        (raw / "dataset.yaml").write_text("modaliti: OCT\n")
        recipe("fundus", scale="tiny", data="fundus")


# Downloads

BODY = np.random.default_rng(0).bytes(3_000_000)


class Server(BaseHTTPRequestHandler):
    "Serves BODY, and breaks off as told."

    body, ranges, tag, drops, requests, stall = BODY, True, '"v1"', [], [], False

    def do_GET(self):
        cls, start = type(self), 0
        asked = self.headers.get("Range")
        cls.requests.append(asked)
        if self.path == "/gone":
            return self.send_error(404)
        if asked and cls.ranges and self.headers.get("If-Range", cls.tag) == cls.tag:
            start = int(asked[6:-1])
            if start >= len(cls.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(cls.body)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start}-{len(cls.body) - 1}/{len(cls.body)}"
            )
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(cls.body) - start))
        self.send_header("ETag", cls.tag)
        self.end_headers()
        end = start + cls.drops.pop(0) if cls.drops else len(cls.body)
        self.wfile.write(cls.body[start:end])
        self.wfile.flush()
        if end < len(cls.body):
            time.sleep(30 if cls.stall else 0)
            self.close_connection = True

    def log_message(self, *a):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), dict(drops=[], requests=[]))
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.handle_error = lambda *a: None  # a client that was killed is no news
    threading.Thread(target=http.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{http.server_port}/set.zip"
    yield handler
    http.shutdown()
    http.server_close()


def test_a_download_that_breaks_off_goes_on_where_it_was(server, tmp_path):
    server.drops[:] = [1_000_000, 500_000, 700_000]
    got = fetch(server.url, tmp_path / "set.zip", wait=0)
    assert got.read_bytes() == BODY
    assert server.requests == [
        None,
        "bytes=1000000-",
        "bytes=1500000-",
        "bytes=2200000-",
    ]
    assert json.loads((tmp_path / "set.zip.json").read_text()) == dict(
        url=server.url, bytes=len(BODY), sha256=file_hash(got)
    )
    fetch(server.url, got)
    assert len(server.requests) == 4
    assert {f.name for f in tmp_path.iterdir()} <= {
        "set.zip",
        "set.zip.json",
        ".set.zip.lock",
    }


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
    server.drops[:], server.stall = [1_500_000], True
    code = f"import sys; from medart.data.sources import fetch; fetch({server.url!r},{str(tmp_path / 'set.zip')!r})"
    p = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part = tmp_path / "set.zip.part"
    for _ in range(3000):
        if part.exists() and part.stat().st_size >= 1_000_000:
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGKILL)
    p.wait()
    have = part.stat().st_size
    assert 0 < have < len(BODY) and not (tmp_path / "set.zip").exists()
    assert fetch(server.url, tmp_path / "set.zip", wait=0).read_bytes() == BODY
    assert server.requests == [None, f"bytes={have}-"]


@pytest.mark.parametrize(
    "change",
    [dict(ranges=False), dict(tag='"v2"', body=BODY[::-1])],
    ids=["no ranges", "the file changed"],
)
def test_what_cannot_be_continued_begins_anew(server, tmp_path, change):
    server.drops[:] = [1_000_000, 0]  # the second try brings nothing
    with pytest.raises(
        ConnectionError, match="1,000,000 bytes that came are kept: run again"
    ):
        fetch(server.url, tmp_path / "set.zip", tries=1, wait=0)
    for k, v in change.items():
        setattr(server, k, v)
    assert fetch(server.url, tmp_path / "set.zip", wait=0).read_bytes() == server.body


def test_a_download_that_is_not_what_it_should_be_is_removed(server, tmp_path):
    with pytest.raises(ValueError, match="not the file it should be"):
        fetch(server.url, tmp_path / "set.zip", sha256="0" * 64)
    with pytest.raises(ConnectionError, match="HTTP 404"):
        fetch(server.url.replace("set.zip", "gone"), tmp_path / "gone", wait=60)
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".zip", ".part")]


def test_a_file_that_is_there_but_not_what_it_should_be_is_fetched_anew(
    server, tmp_path
):
    got = fetch(server.url, tmp_path / "set.zip")
    server.body, server.tag = BODY[::-1], '"v2"'
    fetch(server.url, got)
    assert got.read_bytes() == BODY and len(server.requests) == 1
    fetch(server.url, got, sha256=hashlib.sha256(server.body).hexdigest())
    assert got.read_bytes() == server.body and len(server.requests) == 2


def test_a_full_disk_is_named_before_anything_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: type("usage", (), dict(free=1000))
    )
    with pytest.raises(MemoryError, match="Set MEDART_DATA"):
        fetch(server.url, tmp_path / "set.zip")


def test_kvasir_is_downloaded_unpacked_and_prepared(server, folders, monkeypatch):
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w") as z:
        for n, c in enumerate(DATASETS["kvasir"].counts):
            for i in range(5):
                z.writestr(
                    f"kvasir-dataset-v2/{c}/{i}.jpg", saved(picture(10 * n + i), "JPEG")
                )
    server.body, server.drops[:] = b.getvalue(), [20_000]
    monkeypatch.setitem(
        sources.SOURCES["kvasir"],
        "url",
        server.url.replace("set.zip", "kvasir-dataset-v2.zip"),
    )
    s = load_split(recipe("kvasir", scale="paper", captions="simple"), "test")
    assert len(s) == 8 and set(s.classes) == set(DATASETS["kvasir"].counts)
    assert len(server.requests) == 2
    assert json.loads((folders[0] / "kvasir/kvasir-dataset-v2.zip.json").read_text())[
        "bytes"
    ] == len(server.body)


def test_without_network_one_message_says_everything(folders, monkeypatch):
    monkeypatch.setitem(
        sources.SOURCES["kvasir"], "url", "http://127.0.0.1:9/kvasir-dataset-v2.zip"
    )
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with pytest.raises(ConnectionError) as e:
        load_split(recipe("kvasir", scale="paper"), "train")
    for part in (
        "8,000 endoscopic images",
        "kvasir-dataset-v2.zip",
        "research and education only",
        str(folders[0] / "kvasir"),
        "scale=tiny",
    ):
        assert part in str(e.value)
    shutil.rmtree(folders[0] / "kvasir")
    with pytest.raises(FileNotFoundError) as e:
        load_split(recipe("skin", scale="paper"), "train")
    for part in (
        "isic image download",
        "HAM10000",
        "CC BY-NC",
        str(folders[0] / "skin"),
        "class folders",
    ):
        assert part in str(e.value)


# Archives


def zipped(path, *entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as z:
        for name, content, *mode in entries:
            i = zipfile.ZipInfo(name)
            i.compress_type = method
            i.external_attr = (mode[0] if mode else 0o100644) << 16
            z.writestr(i, content)
    return path


ATTACKS = {
    "climbs": ([("../evil.jpg", b"x")], "outside the folder"),
    "climbs from inside": ([("a/../../evil.jpg", b"x")], "outside the folder"),
    "absolute": ([("/tmp/evil.jpg", b"x")], "outside the folder"),
    "absolute on Windows": ([("C:/evil.jpg", b"x")], "outside the folder"),
    "climbs with backslashes": ([("..\\evil.jpg", b"x")], "outside the folder"),
    "link": ([("way", "/etc", 0o120777), ("way/passwd", b"x")], "link or a device"),
    "device": ([("null", b"", 0o020666)], "link or a device"),
    "twice": ([("a.jpg", b"x"), ("a.jpg", b"y")], "appears twice"),
    "twice but for case": ([("a/B.jpg", b"x"), ("A/b.jpg", b"y")], "appears twice"),
    "twice but for dots": ([("a.jpg", b"x"), ("./a.jpg", b"y")], "appears twice"),
    "file and folder": ([("a", b"x"), ("a/b.jpg", b"y")], "both a file and a folder"),
    "bomb": ([("zeros.png", bytes(70 << 20))], "bomb"),
    "many small bombs": ([(f"{i}.png", bytes(4 << 20)) for i in range(20)], "bomb"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("entries,why", ATTACKS.values(), ids=ATTACKS)
def test_a_hostile_archive_is_refused_before_anything_is_written(
    tmp_path, entries, why
):
    (tmp_path / "in").mkdir()
    z = zipped(tmp_path / "in/a.zip", ("good/1.jpg", b"x"), *entries)
    with pytest.raises(ValueError, match=why):
        unpack(z, tmp_path / "in/out")
    assert {
        f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file()
    } - {"in/.out.lock"} == {"in/a.zip"}


def test_a_damaged_or_lying_archive_leaves_nothing(tmp_path):
    z = zipped(
        tmp_path / "a.zip",
        ("a.jpg", b"x" * 5000),
        ("b.jpg", bytes(range(256)) * 20),
        method=zipfile.ZIP_STORED,
    )
    good = z.read_bytes()
    lies = good.replace(
        struct.pack("<II", 5000, 5000), struct.pack("<II", 5000, 50)
    )  # says 50 bytes, holds 5000
    for bad in (good[:-30], good.replace(b"x" * 50, b"y" * 50, 1), lies, b"no zip"):
        z.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged"):
            unpack(z, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(
            tmp_path.glob(".out.unpacking")
        )
    z.write_bytes(good)
    assert len(list(unpack(z, tmp_path / "out").iterdir())) == 2


# Again, and at the same time


def snapshot(out):
    return {
        str(f.relative_to(out)): f.stat().st_mtime_ns
        for f in out.rglob("*")
        if f.is_file() and f.name != ".prepare.lock"
    }


def looked_at(monkeypatch):
    "The files that check_image is called for from now on."
    seen, real = [], scan_room.check_image
    replace_everywhere(
        monkeypatch,
        scan_room.check_image,
        lambda file, root, pool: (seen.append(file), real(file, root, pool))[1],
    )
    return seen


def test_finished_work_is_not_done_again_and_changes_are(tree, tmp_path, monkeypatch):
    out = prepare(tree, SKIN, tmp_path / "out")
    before, seen = snapshot(out), looked_at(monkeypatch)
    assert (
        prepare(tree, SKIN, tmp_path / "out") == out
        and snapshot(out) == before
        and not seen
    )
    first, was = (
        table(out, "manifest.csv"),
        dict(with_names(out)[["source", "split"]].values),
    )
    gone = first.file[3]
    (out / gone).unlink()
    prepare(tree, SKIN, out)
    assert (out / gone).exists() and not seen
    put(tree, "melanoma/new.jpg", 70)
    put(tree, "melanoma/3.jpg", 71)
    (tree / "melanoma/4.jpg").unlink()
    prepare(tree, SKIN, out)
    assert sorted(seen) == ["melanoma/3.jpg", "melanoma/new.jpg"]
    m = with_names(out)
    assert "melanoma/4.jpg" not in set(m.source) and len(m) == 20
    assert (
        {
            f"{s}/{f}"
            for s in ("train", "test")
            for f in table(out / s, "metadata.csv").file_name
        }
        == set(m.file)
        == {
            str(f.relative_to(out))
            for s in ("train", "test")
            for f in (out / s).rglob("*.jpg")
        }
    )
    assert all(
        file_hash(out / r.file) == r.sha256
        and file_hash(tree / r.source) == r.source_sha256
        for r in m.itertuples()
    )
    assert all(
        r.split == was[r.source]
        for r in m.itertuples()
        if r.source not in ("melanoma/new.jpg", "melanoma/3.jpg")
    )
    shutil.rmtree(out)
    prepare(tree, SKIN, out)
    assert sorted(m.source_sha256) == sorted(table(out, "manifest.csv").source_sha256)


def test_a_stopped_scan_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    want = table(prepare(tree, SKIN, tmp_path / "want"), "manifest.csv")
    files = sorted(str(f.relative_to(tree)) for f in tree.rglob("*.jpg"))
    scan(tree, files[:12], tmp_path / "out")
    with open(tmp_path / "out" / storage.LOCAL_NAMES, "a") as f:
        f.write('{"file": "melanoma/9.j')  # killed in the middle of a line
    (tmp_path / "out/pool/.half.jpg.1").write_bytes(b"x")
    seen = looked_at(monkeypatch)
    out = prepare(tree, SKIN, tmp_path / "out")
    assert sorted(seen) == files[12:]
    pd.testing.assert_frame_equal(want, table(out, "manifest.csv"))
    assert not (out / "pool/.half.jpg.1").exists()


def test_two_at_once_do_the_work_once(tree, tmp_path, monkeypatch):
    seen = looked_at(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        assert (
            list(pool.map(lambda _: prepare(tree, SKIN, tmp_path / "out"), range(4)))
            == [tmp_path / "out"] * 4
        )
    assert len(seen) == 20 and len(table(tmp_path / "out", "manifest.csv")) == 20


def test_processes_find_what_threads_find(tree, tmp_path):
    files = sorted(str(f.relative_to(tree)) for f in tree.rglob("*.jpg"))
    assert scan(tree, files, tmp_path / "a", processes=True) == scan(
        tree, files, tmp_path / "b", processes=False
    )


def test_one_file_that_breaks_everything_does_not_stop_the_run(
    tree, tmp_path, monkeypatch
):
    real = images_room.clean_image
    replace_everywhere(
        monkeypatch,
        images_room.clean_image,
        lambda b: (
            (_ for _ in ()).throw(MemoryError("no room"))
            if b == (tree / "melanoma/5.jpg").read_bytes()
            else real(b)
        ),
    )
    out = prepare(tree, SKIN, tmp_path / "out")
    q = with_names(out, "quarantine")[["source", "class", "reason", "detail"]]
    assert q.values.tolist() == [
        ["melanoma/5.jpg", "melanoma", "unreadable", "MemoryError: no room"]
    ]


def test_a_full_disk_is_no_fault_of_the_images(tree, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(tree, SKIN, tmp_path / "out")
    monkeypatch.undo()
    assert not len(table(prepare(tree, SKIN, tmp_path / "out"), "quarantine.csv"))


def test_folders_without_images_and_without_leave_are_named(tmp_path):
    (tmp_path / "none/melanoma").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match="class folders, for example polyps/1.jpg"
    ):
        prepare(tmp_path / "none", SKIN, tmp_path / "out")
    (tmp_path / "none/melanoma/1.jpg").touch()
    with pytest.raises(FileNotFoundError, match="1 files: empty"):
        prepare(tmp_path / "none", SKIN, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="MEDART_DATA"):
        prepare(tmp_path / "none", SKIN, tmp_path / "file/out")


# Real images, where they are


@pytest.mark.skipif(not REAL.is_dir(), reason="no real images here")
def test_real_images_through_a_folder(folders):
    some = folders[0] / "some"
    for c in ("melanoma", "dermatofibroma"):
        (some / c).mkdir(parents=True)
        for f in sorted((REAL / "skin" / c).iterdir())[:20]:
            shutil.copy(f, some / c)
    r = recipe("skin", scale="tiny", data=str(some))
    train, test = load_split(r, "train"), load_split(r, "test")
    assert (len(train), len(test)) == (32, 8)
    m = with_names(train.folder.parent)
    for row in m.itertuples():
        with (
            Image.open(some / row.source) as a,
            Image.open(train.folder.parent / row.file) as b,
        ):
            assert (np.asarray(a) == np.asarray(b)).all()
    assert all(x.shape == (3, 64, 64) for x in read_pixels(test, 64))


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
