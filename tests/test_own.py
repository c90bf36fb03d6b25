"From a folder to a report by one command: what is proposed, what is said before training, and what the report holds."

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from medart.workflows import own_images as own_images_room
from medart.workflows import own_report
from medart.workflows import report_pages
from medart.workflows.own_images import (
    captions_note,
    cropping,
    cropping_note,
    describe_folder,
    found_labels,
    own_name,
    proposal,
)
from medart.workflows.own_report import run_limits, own_command
from medart.workflows.report_pages import ReportPart, write_html, write_pdf
from medart.data.phantoms import draw_phantom
from medart.recipes.datasets import DATASETS, read_dataset
from medart.recipes.recipe import recipe

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("kernels")  # imported already


def draw(
    folder,
    n=12,
    wide="",
    names=("melanoma", "common_nevus"),
    cls=("melanoma", "common_nevus"),
    first=7,
):
    "Drawn images in class folders; those of one class twice as wide as high."
    for name, c in zip(names, cls):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            im = Image.fromarray(draw_phantom("skin", c, first, i)[0])
            im = im.resize((128, 64)) if c == wide else im
            im.save(folder / name / f"doe_jane_{i}.png")
    return folder


# One command

SMALL = dict(
    epochs=".5",
    interval="0",
    gen_steps="2",
    classifier_epochs="1",
    seeds="0",
    caption_retries="0",
)


def run(home, *told):
    words = [w for k, v in SMALL.items() for w in ("-p", k, v)]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "nbs" / "own.ipynb"),
            str(home / "own.ipynb"),
            *words,
            *told,
        ],
        cwd=home,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "The command on 24 drawn images in a folder that is called as one of the paper's data sets."
    home = tmp_path_factory.mktemp("home")
    for split in ("train", "test"):
        draw(
            home / "skin" / split,
            6,
            wide="melanoma",
            first=7 if split == "train" else 8,
        )
    for name in ("data", "outputs"):
        (home / name).mkdir()
    (home / "data" / "tiny").symlink_to(ROOT / "data" / "tiny")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MEDART_DATA", str(home / "data"))
        m.setenv("MEDART_OUTPUTS", str(home / "outputs"))
        m.setenv(
            "PYTHONPATH",
            os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(
                os.pathsep
            ),
        )
        ran = run(
            home,
            "-p",
            "images",
            "skin",
            "-p",
            "modality",
            "dermoscopic",
            "-p",
            "scale",
            "tiny",
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        yield home


def the_run(home):
    "What single stages ask for with `-p dataset my-skin -p data FOLDER`."
    small = {k: v for k, v in SMALL.items() if k != "seeds"}
    return recipe(
        "my-skin",
        scale="tiny",
        data=str(home / "skin"),
        gen_split="train",
        gen_count=0,
        **small,
    )


def report(home, ending):
    found = list((home / "outputs").glob(f"my-skin-tiny/*/report*.{ending}"))
    assert len(found) == 1
    return found[0]


def test_one_command_ends_in_a_report(done):
    page = report(done, "html").read_text(encoding="utf-8")
    for heading in (
        "The images",
        "What cropping throws away",
        "Captions",
        "Training",
        "Generated images",
        "Color",
        "Distances",
        "Class by class",
        "By skin tone",
        "Copies of training images",
        "A classifier",
        "Limits",
        "Licenses",
    ):
        assert f"<h2>{heading}</h2>" in page, heading
    assert page.count("data:image/png;base64") >= 9
    assert (
        "A square from the middle throws away 25% of the pixels on average, and 50%"
        in page
    )
    assert "-p images skin -p modality dermoscopic" in page


def test_the_report_names_no_folder_and_no_file_of_the_user(done):
    page = re.sub(
        r"base64,[^\"]*", "", report(done, "html").read_text(encoding="utf-8")
    )
    for secret in (
        str(done),
        done.name,
        str(ROOT),
        "doe_jane",
        "src=" + '"http',
        "href=",
    ):
        assert secret not in page, secret


def test_the_report_is_a_pdf_too_where_that_can_be_made(done):
    if importlib.util.find_spec("fpdf") is None:
        assert "No PDF was written" in (done / "own.ipynb").read_text(encoding="utf-8")
    else:
        assert report(done, "pdf").read_bytes().startswith(b"%PDF-")


def test_too_few_images_for_a_number_still_end_in_a_report(done, monkeypatch):
    r = the_run(done)
    monkeypatch.setattr(own_images_room, "MIN_IMAGES", 13)
    assert "12 images, and 13 are needed" in own_images_room.evaluate_own(r).measured[0]
    kinds = [
        p.what for p in own_report.report_parts(r, "the command") if p.kind == "heading"
    ]
    assert (
        "A classifier" in kinds
        and "Distances" not in kinds
        and "Copies of training images" not in kinds
    )


def test_what_was_proposed_lets_single_stages_go_on(done):
    from medart.evaluation.classification import classifier_fault
    from medart.evaluation.results import results_fault

    assert "melanoma: melanoma  # 12 images" in (
        done / "skin" / "dataset.yaml"
    ).read_text(encoding="utf-8")
    r = the_run(done)
    assert results_fault(r) == "" and classifier_fault(r) == ""


def test_the_project_of_the_course_reads_the_run(done, run_notebook, tmp_path):
    "Its results are there, so that the notebook runs nothing again."
    project = json.loads((ROOT / "nbs/course/project.ipynb").read_text("utf-8"))
    told = {k: v for k, v in SMALL.items() if k != "seeds"}
    (parameters,) = [
        c for c in project["cells"] if c["metadata"].get("tags") == ["parameters"]
    ]
    parameters["source"] = (
        f"images, scale, settings = {str(done / 'skin')!r}, 'tiny', {told!r}\n"
        "modality = 'dermoscopic'"
    )
    copy = tmp_path / "project.ipynb"
    copy.write_text(json.dumps(project), encoding="utf-8")
    homes = {f"MEDART_{k.upper()}": str(done / k) for k in ("data", "outputs")}
    run_notebook(copy, **homes)
    assert not (done / "outputs" / "own.ipynb").exists()


# What is proposed


def test_a_proposal_is_read_back_as_it_was_found(tmp_path):
    draw(tmp_path / "x", 2, names=("no", "Grade 3: severe"))
    labels = found_labels(tmp_path / "x", "x")
    (tmp_path / "x" / "dataset.yaml").write_text(
        proposal(labels, "fundus"), encoding="utf-8"
    )
    d = read_dataset("x", tmp_path / "x" / "dataset.yaml")
    assert set(d.labels) == {"no", "Grade 3: severe"} == set(labels.label)
    assert d.modality == "fundus" and "color" in d.features
    assert proposal(labels, "dermoscopic").count(DATASETS["skin"].features) == 1


def test_labels_of_a_table_are_proposed(tmp_path):
    draw(tmp_path / "x", 3, names=("a", "b"))
    table = pd.DataFrame(
        [(f"{c}/doe_jane_{i}.png", dict(a=0, b=1)[c]) for c in "ab" for i in range(3)],
        columns=["file_name", "label"],
    )
    table.to_csv(tmp_path / "x" / "labels.csv", index=False)
    assert list(describe_folder(tmp_path / "x", "fundus").labels) == ["0", "1"]


def test_a_file_of_the_user_is_never_written_over(tmp_path):
    folder = draw(tmp_path / "x", 2)
    own = "modality: fundus\nfeatures: vessels\n"
    (folder / "dataset.yaml").write_text(own)
    assert describe_folder(folder).features == "vessels"
    assert describe_folder(folder, " fundus ").modality == "fundus"
    with pytest.raises(ValueError, match="Change that file"):
        describe_folder(folder, "dermoscopic")
    with pytest.raises(ValueError, match="Change that file"):
        describe_folder(folder, features="color")
    assert (folder / "dataset.yaml").read_text() == own


def test_paths_are_those_of_a_shell(tmp_path, monkeypatch):
    draw(tmp_path / "home" / "mine", 2)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    first = describe_folder("~/mine", "fundus")
    monkeypatch.chdir(tmp_path / "home")
    assert (
        describe_folder("mine")
        == describe_folder("./mine/")
        == describe_folder(tmp_path / "home" / "mine")
        == first
    )


@pytest.mark.parametrize(
    "images, modality, said",
    [
        ("", "fundus", "images is empty"),
        ("nowhere", "fundus", "is no folder"),
        ("empty", "fundus", "No images with a class"),
        ("x", "", "What kind of images"),
        ("x/melanoma", "fundus", "No images with a class"),
    ],
)
def test_what_is_missing_is_named_and_nothing_written(
    tmp_path, monkeypatch, images, modality, said
):
    draw(tmp_path / "x", 2)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        describe_folder(images, modality)
    assert not list(tmp_path.rglob("dataset.yaml"))


def test_names_of_the_papers_data_sets_stay_theirs():
    assert [
        own_name(Path("a") / n) for n in ("skin", "Kvasir", "My images", "...")
    ] == ["my-skin", "my-kvasir", "my_images", "own"]
    with pytest.raises(ValueError, match="another name"):
        own_name("x", "SKIN")


# What is said before training


def prepared(folder, *rows):
    folder.mkdir()
    pd.DataFrame(rows, columns=["class", "width", "height"]).to_csv(
        folder / "manifest.csv", index=False
    )
    return cropping(folder)


def test_cropping_is_measured_by_class(tmp_path):
    t = prepared(tmp_path / "x", ("a", 100, 100), ("a", 100, 400), ("b", 300, 200))
    assert t["class"].tolist() == ["a", "b", "all classes"] and t.images.tolist() == [
        2,
        1,
        3,
    ]
    assert t["thrown away, mean"].tolist() == pytest.approx(
        [0.375, 1 / 3, (0.75 + 1 / 3) / 3]
    )
    assert "36%" in cropping_note(t) and "75%" in cropping_note(t)
    assert "All images are square" in cropping_note(
        prepared(tmp_path / "y", ("all classes", 64, 64))
    )


def test_simple_captions_are_explained(tmp_path):
    d = draw(tmp_path / "x", 2, names=("wart", "melanoma"))
    describe_folder(d, "dermoscopic")
    r = recipe("x", scale="tiny", data=str(d))
    t = pd.DataFrame(
        {
            "class": ["wart"] * 3 + ["melanoma"],
            "source": ["simple"] * 2 + ["vsg"] * 2,
            "faults": ["opening opening", "short", "", ""],
            "tries": [2, 1, 1, 1],
        }
    )
    said = captions_note(r, t)
    assert (
        "2 of 4 captions (50%)" in said
        and "has never seen wart;" in said
        and "(2)" in said
    )
    assert "none had to be replaced" in captions_note(r, t[t.source == "vsg"])
    elsewhere = captions_note(
        recipe("x", scale="tiny", data=str(d), vlm="some/model"), t
    )
    assert "never seen" not in elsewhere and "50%" in elsewhere


# The report


def test_a_report_escapes_and_hides(tmp_path):
    parts = [
        ReportPart("title", "a <b>"),
        ReportPart(
            "table",
            pd.DataFrame(
                dict(x=["<script>", f"{tmp_path}/secret/a.png"], y=[0.5, None])
            ),
        ),
    ]
    page = write_html(parts, tmp_path / "a.html").read_text(encoding="utf-8")
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "secret" not in page
        and "<td>-</td>" in page
    )


def test_without_the_library_that_sets_pdf_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fpdf", None)
    assert write_pdf([ReportPart("title", "x")], tmp_path / "a.pdf") is None
    assert "fpdf2" in capsys.readouterr().out and not (tmp_path / "a.pdf").exists()


def a_font(path, signs):
    "A font that has these signs alone, each a square."
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    for move, at in zip(("moveTo", "lineTo", "lineTo"), ((0, 0), (0, 700), (700, 700))):
        getattr(pen, move)(at)
    pen.closePath()
    names = [".notdef", *(f"u{ord(c):X}" for c in signs)]
    font = FontBuilder(1000)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): f"u{ord(c):X}" for c in signs})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable(dict(familyName="Signs", styleName="Regular"))
    font.setupOS2()
    font.setupPost()
    font.save(path)
    return str(path)


SKIN_CANCER = "皮膚癌"


def chart():
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    ax.barh([SKIN_CANCER, "nevus"], [1, 2])
    ax.set_title(SKIN_CANCER)
    return fig


def test_signs_that_no_font_has_are_spelled_out_and_it_is_said(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(report_pages, "findSystemFonts", lambda **_: [])
    fig = chart()
    picture = report_pages.png_bytes(fig)
    labels = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert labels == ["[U+76AE][U+819A][U+764C]", "nevus"]
    assert fig.axes[0].get_title() == labels[0]
    parts = [
        ReportPart("title", SKIN_CANCER),
        ReportPart("table", pd.DataFrame({SKIN_CANCER: ["x"]})),
        ReportPart("figure", picture, SKIN_CANCER),
    ]
    with warnings.catch_warnings(record=True) as warned:
        assert write_pdf(parts, tmp_path / "a.pdf").is_file()
    assert not [w for w in warned if "glyph" in str(w.message).lower()]
    assert "Noto Sans CJK" in capsys.readouterr().out
    assert SKIN_CANCER in write_html(parts, tmp_path / "a.html").read_text("utf-8")


def test_a_font_that_has_the_signs_is_used(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "a.ttf"
    broken.write_bytes(b"no font")
    fonts = [str(broken), a_font(tmp_path / "b.ttf", SKIN_CANCER)]
    monkeypatch.setattr(report_pages, "findSystemFonts", lambda **_: fonts)
    assert report_pages.find_font(set(SKIN_CANCER)) == fonts[1]
    assert report_pages.find_font(set(SKIN_CANCER + "肺")) == ""
    fig = chart()
    with warnings.catch_warnings(record=True) as warned:
        report_pages.png_bytes(fig)
    assert not [w for w in warned if "missing from font" in str(w.message)]
    assert fig.axes[0].get_title() == SKIN_CANCER
    write_pdf([ReportPart("text", SKIN_CANCER)], tmp_path / "a.pdf")
    assert capsys.readouterr().out == ""


def test_the_command_holds_no_folder_of_this_machine(folders, tmp_path):
    r = recipe("skin", scale="tiny")
    assert str(tmp_path) not in own_command(
        r, dict(images=f"{tmp_path}/secret place/mine", modality="", scale="auto")
    )
    assert own_command(r, dict(images="~/x y", scale="auto")).endswith(
        "-p images '~/x y' -p scale tiny"
    )


def test_limits_speak_of_this_run():
    said = " ".join(run_limits(recipe("skin", scale="tiny"), dict(a=3, b=300)))
    assert (
        "coarse" in said
        and "drawn phantoms" in said
        and "images of a:" in said
        and "in all" not in said
    )
