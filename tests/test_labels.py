"Labels, classes and their names: what collides stops, and what was written survives."

import hashlib
import json
import pandas as pd
import pytest
from PIL import Image
from medart.core.figures import read_names
from medart.data.labels import class_of, refuse_collisions
from medart.data.listing import describe_classes
from medart.data.loading import contact_sheet, load_split, split_bars
from medart.data.preparation import prepare
from medart.data.phrases import article, simple_caption
from medart.recipes.datasets import dataset_named, DATASETS, read_dataset
from medart.recipes.labels import (
    as_folder,
    category,
    class_folder,
    label_key,
    visible_text,
)
from medart.recipes.recipe import recipe
from medart.evaluation.caption_quality import validity
from layouts import FLAT, N, SKIN, classes, lay, listed, own, table


# Labels

APART = [
    "ER+",
    "ER-",
    "ER",
    "Hp+",
    "Hp-",
    "<50",
    ">=50",
    ">50",
    "<=50",
    "T1",
    "T1+",
    "T1-",
    "-1",
    "1",
    "+",
    "-",
    "1.5",
    "15",
    "0",
    "1+",
    "2+",
    "50%",
    "A&B",
    "A B",
    "\u0915\u093f",
    "\u0915\u093e",
    "K\u00e4se",
    "Kase",
]


def test_labels_that_differ_in_a_sign_have_classes_and_captions_of_their_own():
    folders = [class_folder(s) for s in APART]
    assert len(set(map(label_key, APART))) == len(set(folders)) == len(APART)
    assert (
        len({category(f).casefold() for f in folders})
        == len({category(as_folder(s)).casefold() for s in APART})
        == len(APART)
    )
    assert all(
        not set(f) & set('<>:"/\\|?*') and not f.startswith(".")
        for f in map(class_folder, [*APART, ".5mm", "a/b", "CON."])
    )


@pytest.mark.parametrize(
    "a,b",
    [
        ("≥50", ">=50"),
        ("Polyp", "polyp"),
        ("grade-1", "grade 1"),
        ("grade_1", "Grade 1?"),
        ("1", "1.0"),
        ("K\u00e4se", "Ka\u0308se"),
        (".5mm", "0.5mm"),
        ("\u22121", "-1"),
        ("ER +", "ER+"),
        ("\uff0b", "+"),
        ("po\u200blyp", "polyp"),
        ("\u200fpolyp", "polyp"),
        ("mela\u00adnoma", "melanoma"),
        ("T\u00b9", "T1"),
    ],
)
def test_labels_that_come_out_alike_stop_preparation_and_both_are_named(tmp_path, a, b):
    assert label_key(a) == label_key(b)
    lay(
        tmp_path,
        FLAT,
        m_DOT_csv=table("file,label", lambda i: f'{i}.png,"{(a, b)[i % 2]}"'),
    )
    with pytest.raises(ValueError, match="mean the same, say so in dataset.yaml") as e:
        listed(tmp_path)
    said = [
        json.dumps(x, ensure_ascii=visible_text(a) == visible_text(b)) for x in (a, b)
    ]
    assert all(x in str(e.value) for x in said)
    t, _ = listed(tmp_path, own(**{a: "one", b: "one"}))  # which is the user's decision
    assert classes(t) == dict(one=12)
    t, _ = listed(tmp_path, own(**{a: "first", b: "second"}))
    assert classes(t) == dict(first=6, second=6)


@pytest.mark.parametrize(
    "folders", [("Polyp", "polyp"), ("grade-1", "grade 1"), ("K\u00e4se", "Ka\u0308se")]
)
def test_class_folders_that_come_out_alike_stop_too(tmp_path, folders):
    lay(tmp_path, [f"{folders[i % 2]}/{i}.png" for i in N])
    for d in (own(), own(folders[0])):
        with pytest.raises(ValueError, match="would both be called"):
            listed(tmp_path, d)


def test_the_paper_names_are_untouched():
    for d in DATASETS.values():
        for c in d.counts:
            assert (
                class_folder(c)
                == as_folder(c)
                == class_of(c, d)
                == class_of(c, d, folder=True)
                == c
            )
            assert category(c) == c.replace("-", " ").replace("_", " ")


def test_exact_labels_come_before_alike_ones():
    d = own(**{"a-b": "first", "a b": "second", "NV": "nevus", "0": "1", "1": "0"})
    assert [
        class_of(x, d)
        for x in ("a-b", "a b", "a_b", "nv", "nevus", "0", "1", "1.0", "c")
    ] == ["first", "second", "", "nevus", "nevus", "1", "0", "0", ""]


def test_two_labels_of_an_archive_may_mean_one_class_and_it_is_said(tmp_path):
    lay(
        tmp_path,
        FLAT,
        m_DOT_csv=table("file,label", lambda i: f"{i}.png,{('nv', 'Nevus')[i % 2]}"),
    )
    t, _ = listed(tmp_path, SKIN)
    assert classes(t) == dict(common_nevus=12)
    assert describe_classes(t, SKIN) == "1 classes: common_nevus 12 (labels Nevus, nv)"


def test_a_label_too_long_for_a_folder_is_refused_before_the_work(tmp_path):
    lay(
        tmp_path,
        FLAT,
        m_DOT_csv=table(
            "file,label", lambda i: f"{i}.png,{(chr(0x448) * 130 + 'x', 'b')[i % 2]}"
        ),
    )
    with pytest.raises(
        ValueError, match="has 261 bytes, and a class is called by 200 at most"
    ):
        listed(tmp_path)
    assert classes(
        listed(tmp_path, own(**{chr(0x448) * 130 + "x": "short", "b": "b"}))[0]
    ) == dict(short=6, b=6)


def test_collisions_of_left_out_images_do_not_matter():
    t = pd.DataFrame(
        [("a", "A", "")] + [("a", "a", "not found")], columns=["cls", "label", "why"]
    )
    refuse_collisions(t, own())


# dataset.yaml


def described(tmp_path, categories, **more):
    text = "modality: fundus\nfeatures: color, shape\n" + (
        f"categories: {categories}\n" if categories else ""
    )
    (tmp_path / "dataset.yaml").write_text(
        text + "".join(f"{k}: {v}\n" for k, v in more.items())
    )
    return read_dataset("own", tmp_path / "dataset.yaml")


def test_yaml_names_are_read_as_they_are_written(tmp_path):
    assert [
        *described(
            tmp_path, "[no, yes, on, 01, 1.0, null, None, NA, nan, True, all]"
        ).counts
    ] == ("no yes on 01 1.0 null None NA nan True all".split())
    assert described(tmp_path, "{no: healthy, 01: polyp, 1.5: x, null: y}").labels == {
        "no": "healthy",
        "01": "polyp",
        "1.5": "x",
        "null": "y",
    }
    d = described(tmp_path, "", epochs="2", interval="1_000")
    assert (d.counts, d.epochs, d.interval) == ({}, 2, 1000) and isinstance(
        d.epochs, int
    )


@pytest.mark.parametrize(
    "categories,why",
    [
        ("['ER+', 'er +']", "'ER\\+' and 'er \\+' cannot be told apart"),
        ("{a: grade-1, b: grade 1}", "'grade-1' and 'grade 1'"),
        ("{a: T1, b: t1}", "'a' and 'b' mean the same"),
        ("{0: x, 0: y}", "'0' comes twice"),
        ("{0: }", "needs a name"),
        ("{0: [x]}", "needs a name"),
        ("['???']", "letters"),
        ("7", "wrong type"),
        ("[a, a]", "cannot be told apart"),
        ("{[a]: b}", "YAML"),
    ],
)
def test_categories_that_say_too_little_are_refused(tmp_path, categories, why):
    with pytest.raises(ValueError, match=why):
        described(tmp_path, categories)


@pytest.mark.parametrize(
    "more",
    [
        dict(epochs="yes"),
        dict(epochs=".nan"),
        dict(interval="1.5"),
        dict(epochs="-1"),
        dict(epochs=""),
    ],
)
def test_numbers_of_a_dataset_are_numbers(tmp_path, more):
    with pytest.raises(ValueError, match=next(iter(more))):
        described(tmp_path, "", **more)


def test_dataset_yaml_beside_a_data_set_of_the_paper_is_not_passed_over(folders):
    (folders[0] / "mine").mkdir()
    described(folders[0] / "mine", "[a, b]")
    with pytest.raises(ValueError, match="pass another name"):
        dataset_named("skin", "mine")
    (folders[0] / "mine/dataset.yaml").write_bytes(
        "modality: K\u00e4se\nfeatures: x\n".encode("cp1252")
    )
    with pytest.raises(ValueError, match="not UTF-8"):
        dataset_named("own", "mine")


# Articles


@pytest.mark.parametrize(
    "word",
    "MRI OCT H&E X-ray x-ray SEM EUS-guided hour-glass endoscopic ultrasound 8-bit 18F ECG NBI mpMRI mri HRCT "
    "S-shaped unidentified uninvolved umbilical ulcer urgent honest".split(),
)
def test_an_before_a_vowel_sound(word):
    assert article(word) == "an" and simple_caption(word, "x").startswith(f"An {word} ")


@pytest.mark.parametrize(
    "word",
    "US us UV PET CT SPECT FLAIR unilateral uniform uterine urinary European one-sided fundus dermoscopic "
    "T1-weighted 3D WSI usual U-shaped unimodal ureteral McCune STIR gastroscopic 110-degree white-light".split(),
)
def test_a_before_a_consonant_sound(word):
    assert article(word) == "a" and simple_caption(word, "x").startswith(f"A {word} ")


# Names that survive


def test_classes_called_like_nothing_or_like_numbers_survive(folders):
    names = ["NA", "None", "nan", "all", "null", "True", "01", "1", "ER+", "ER-"]
    raw = folders[0] / "odd"
    for c in names:
        (raw / c).mkdir(parents=True)
        for i in range(2):
            noise = hashlib.sha512(f"{c}{i}".encode()).digest()
            Image.frombytes("L", (8, 8), noise).resize((48, 48), Image.BICUBIC).save(
                raw / c / f"{i}.png"
            )
    (raw / "dataset.yaml").write_text("modality: MRI\nfeatures: color\n")
    r = recipe("odd", scale="tiny", data="odd", captions="simple")
    for split in ("train", "test"):
        s = load_split(r, split)
        assert sorted(s.classes) == sorted(names)
        assert set(s.texts) == {f"An MRI image of {category(c)}" for c in names}
    out = prepare(raw, dataset_named("odd", "odd"))
    assert set(read_names(out / "manifest.csv")["class"]) == set(names)
    contact_sheet(out)
    split_bars(out)


def test_a_class_called_all_is_not_taken_for_the_total():
    t = pd.DataFrame(
        {
            "class": ["all"] * 3 + ["hem"] * 5,
            "source": ["vsg"] * 7 + ["simple"],
            "tries": 1,
            "text": "x",
        }
    )
    v = validity(t).set_index("class")
    assert (
        v.images.to_dict() == {"all": 3, "hem": 5, "all classes": 8}
        and v.replaced.to_dict()["hem"] == 0.2
    )
