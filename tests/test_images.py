"Bad files, conversions and planted metadata: what comes out of a file of any kind."

import json
import shutil
import struct
import zlib
from pathlib import Path
import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from drawn import picture, put
from medart.data.images import clean_image, read_pixels
from medart.data.loading import load_split
from medart.data.preparation import prepare
from medart.data.reports import with_names
from medart.recipes.datasets import DATASETS
from medart.recipes.recipe import recipe
from drawn import opened, report, saved

SKIN = DATASETS["skin"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


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
    "cmyk.jpg": (lambda: saved(picture(50).convert("CMYK"), "JPEG"), "unclear colors"),
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
    assert len(report(out, "manifest.csv")) == 20
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
    assert not len(report(out, "quarantine.csv"))
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


def test_sixteen_bit_color_keeps_its_upper_bits():
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
def test_colors_of_another_space_are_converted(kind):
    im = picture(5)
    _, kept, _, notes = clean_image(saved(im, kind, icc_profile=swapped_profile()))
    assert notes == ["another color space to sRGB"]
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
    assert not len(report(out, "quarantine.csv"))
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
