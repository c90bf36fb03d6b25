"Labels, tables, layouts: what is read with certainty, what stops, and what is said. Most files are empty: listing opens no image."

import codecs
import hashlib
import io
import json
import unicodedata
import zipfile
from collections import Counter

import pandas as pd
import pytest
from PIL import Image

from medart.core.figures import read_names
from medart.data.folders import FileIndex
from medart.data.labels import class_of, one_hot_labels, refuse_collisions
from medart.data.listing import describe_classes, list_images
from medart.data.loading import contact_sheet, load_split, split_bars
from medart.data.preparation import prepare
from medart.data.tables import read_table, placeholders
from medart.data.phrases import article, simple_caption
from medart.recipes.datasets import Dataset, dataset_named, DATASETS, read_dataset
from medart.recipes.labels import (
    as_folder,
    category,
    class_folder,
    label_key,
    visible_text,
)
from medart.recipes.recipe import recipe
from medart.evaluation.caption_quality import validity

SKIN, KVASIR = DATASETS["skin"], DATASETS["kvasir"]
N = range(12)


def own(*classes, **labels):
    "A data set of one's own, with what its dataset.yaml says of labels."
    labels = dict.fromkeys(classes) | labels
    labels = {k: v or k for k, v in labels.items()}
    return Dataset(
        "own",
        "fundus",
        "color",
        dict.fromkeys(labels.values(), 0),
        None,
        None,
        "",
        "FD",
        labels,
    )


def lay(folder, files, **tables):
    "Empty images, and tables beside them; a name's __ is a slash, its _DOT_ a dot."
    for f in files:
        (folder / f).parent.mkdir(parents=True, exist_ok=True)
        (folder / f).touch()
    for name, content in tables.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def listed(folder, d=own()):
    _, t, how = list_images(folder, d)
    return t, how


def classes(t):
    return dict(Counter(t.cls[t.why == ""]))


def table(head, row, n=N):
    return head + "\n" + "".join(row(i) + "\n" for i in n)


def ab(i):
    return "ab"[i % 2]


FLAT = [f"img/{i}.png" for i in N]
COMMA = table("file,label", lambda i: f"{i}.png,{ab(i)}")
HALVES = dict(a=6, b=6)


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


# Tables

WRITTEN = {
    "semicolon.csv": "\ufeff" + COMMA.replace(",", ";").replace("\n", "\r\n"),
    "excel.csv": "sep=;\r\n" + COMMA.replace(",", ";").replace("\n", "\r\n"),
    "tab.csv": COMMA.replace(",", "\t"),
    "tab.txt": COMMA.replace(",", "\t"),
    "bar.psv": COMMA.replace(",", "|"),
    "utf16.csv": COMMA.replace(",", "\t").encode("utf-16"),
    "big.csv": codecs.BOM_UTF16_BE + COMMA.encode("utf-16-be"),
    "no bom.csv": COMMA.encode("utf-16-le"),
    "blanks.csv": COMMA.replace(",", " , ").replace("\n", " \n"),
    "upper.csv": COMMA.replace("file,label", "FILE NAME,Class"),
    "UPPER.CSV": COMMA,
    "quotes.csv": table(
        "text, file, label", lambda i: f'"one,\n ""two""", "{i}.png", "{ab(i)}"'
    ),
    "lines.jsonl": "\ufeff"
    + "".join(
        json.dumps(dict(file_name=f"img/{i}.png", label=[ab(i)])) + "\n" for i in N
    ),
    "list.json": json.dumps(
        [dict(file_name=f"img/{i}.png", label=ab(i)) for i in N], indent=1
    ),
    "lists.csv": table("file,label", lambda i: f"{i}.png,\"['{ab(i)}']\""),
    "index.csv": table(",file,label", lambda i: f"{i},{i}.png,{ab(i)}"),
    "bits.csv": table("image,a,b", lambda i: f"{i}.png,{1 - i % 2}.0,{i % 2}.0"),
    "sub/labels.csv": COMMA,
    "old mac.csv": COMMA.replace("\n", "\r"),
    "wide.txt": COMMA.replace(",", "\t").replace("\n", "\r\n").encode("utf-16"),
    "kept as text.csv": table("file,label", lambda i: f'"=""{i}.png""",{ab(i)}'),
    "plain formula.csv": table("file,label", lambda i: f'="{i}.png",{ab(i)}'),
    "decimal commas.csv": table("file;label;size", lambda i: f"{i}.png;{ab(i)};1,5"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_table_in_any_dialect_is_read(tmp_path, name):
    lay(
        tmp_path, FLAT, **{name.replace("/", "__").replace(".", "_DOT_"): WRITTEN[name]}
    )
    t, how = listed(tmp_path)
    assert (
        classes(t) == HALVES and len(t) == 12 and how == f"table {name.split('/')[-1]}"
    )


UNCLEAR = {
    "cp1252": (
        COMMA.replace("b\n", "K\u00e4se\n").encode("cp1252"),
        "m.csv, line 3: not UTF-8",
    ),
    "letters lost": (COMMA.replace("b\n", "K\ufffdse\n"), "stand for lost ones"),
    "no header": (
        COMMA.split("\n", 1)[1],
        "no line with names of columns.*0.png, a.*file_name, label",
    ),
    "unknown file column": (
        COMMA.replace("file,", "photo,"),
        "'photo', 'label'.*file_name",
    ),
    "unknown label column": (
        COMMA.replace(",label", ",grade"),
        "'file', 'grade'.*label",
    ),
    "unknown both": (COMMA.replace("file,label", "x,y"), "'x', 'y'"),
    "two columns of one name": (
        COMMA.replace("file,", "file,File,").replace("png,", "png,,"),
        "two columns called file",
    ),
    "two columns of labels": (
        table("file,label,class", lambda i: f"{i}.png,{ab(i)},x"),
        "label, class could all hold",
    ),
    "several ones": (
        table("file,a,b", lambda i: f"{i}.png,1,{i % 2}"),
        "only if each image has one",
    ),
    "a comma too many": (
        COMMA.replace("b\n", "b, c\n"),
        "line 3: 3 fields instead of 2",
    ),
    "an open quote": (COMMA + '"12.png,a\n', "double quotes"),
    "none of these": (
        COMMA.replace(".png", "x.png"),
        "names no image that lies here .0x.png, 1x.png",
    ),
    "no rows": ("file,label\n", "it has no rows"),
    "few of these": (
        table("file,label", lambda i: f"{i}.png,a", range(3)),
        "names 3 of the 12 images",
    ),
    "split words": (
        table("file,label,split", lambda i: f"{i}.png,a,{('train', 'holdout')[i % 2]}"),
        "holdout.*train, test or val",
    ),
    "what Excel made of a sign": (
        COMMA.replace(",b", ",#NAME?"),
        "'#NAME\\?' is no label",
    ),
    "what Excel made of a number": (
        COMMA.replace(",b", ",########"),
        "'########' is no label",
    ),
    "an object": (
        table("file;label", lambda i: f'{i}.png;{{"name": "{ab(i)}"}}')
        .replace(";{", ';"{')
        .replace('"name": ', '""name"": ')
        .replace('"a"}', '""a""}"')
        .replace('"b"}', '""b""}"'),
        "is no label",
    ),
    "decoded twice": (COMMA.replace("b\n", "K\u00c3\u00a4se\n"), "wrong encoding"),
    "decoded twice, a sign": (
        COMMA.replace("b\n", "10 \u00c2\u00b5m\n"),
        "wrong encoding",
    ),
    "lists of captions": (
        table("file,label,text", lambda i: f"{i}.png,{ab(i)},\"['one', 'two']\""),
        "text holds lists",
    ),
    "names without their zeros": (
        COMMA.replace(".png", "00"),
        "Write names as the files have them, such as img/0.png",
    ),
    "split numbers": (
        table("file,label,split", lambda i: f"{i}.png,a,{i % 2}"),
        "says 0, 1",
    ),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_table_that_is_not_understood_stops_preparation(tmp_path, name):
    lay(tmp_path, FLAT, m_DOT_csv=UNCLEAR[name][0])
    with pytest.raises(ValueError, match="(?s)" + UNCLEAR[name][1]):
        listed(tmp_path)


def sheet(names):
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w") as z:
        z.writestr("xl/sharedStrings.xml", "".join(f"<t>{x}</t>" for x in names))
    return b.getvalue()


@pytest.mark.parametrize(
    "name,content,why",
    [
        ("list.txt", "\n".join(f"x{i}.png 1" for i in N), "list.txt names images"),
        ("train.txt", "\n".join(f"x{i}" for i in N), "train.txt names images"),
        (
            "boxes.json",
            json.dumps({f"x{i}": {} for i in N}),
            "must be a list of objects",
        ),
        (
            "coco.json",
            json.dumps(dict(images=[dict(file_name=f"x{i}.png") for i in N]), indent=1),
            "must be a list of objects",
        ),
        ("a.xlsx", sheet(f"x{i}.png" for i in N), "save it as CSV"),
        (
            "a.xls",
            b"\xd0\xcf\x11\xe0"
            + b"".join(b"\x07\0\0" + f"x{i}.png".encode() for i in N),
            "save it as CSV",
        ),
        ("age.csv", table("file,age", lambda i: f"x{i},50"), "'file', 'age'"),
        ("a/age.csv", table("id,age", lambda i: f"x{i},50"), "'id', 'age'"),
    ],
)
def test_whatever_names_images_beside_class_folders_and_is_not_used_stops(
    tmp_path, name, content, why
):
    lay(
        tmp_path,
        [f"{ab(i)}/x{i}.png" for i in N],
        **{name.replace("/", "__").replace(".", "_DOT_"): content},
    )
    with pytest.raises(ValueError, match=why):
        listed(tmp_path)


def test_what_speaks_of_other_things_does_not_stop(tmp_path):
    lay(
        tmp_path,
        [f"{ab(i)}/x{i}.png" for i in N],
        README_DOT_txt="Such as a/x0.png,\nfrom 2019.\nWith care.\n",
        LICENSE="x",
        latin_DOT_txt="K\u00e4se".encode("cp1252"),
        log_DOT_csv="epoch,loss\n1,2\n",
        empty_DOT_csv="",
        x_DOT_json="{}",
        a_DOT_xlsx=sheet(["budget"]),
        pixels_DOT_csv="pixel0000,label\n1,2\n",
        data_DOT_npz="x",
    )
    t, how = listed(tmp_path)
    assert classes(t) == HALVES and how == "class folders"
    assert dict(zip(t.file, t.why))["data.npz"] == "in no class folder"


def test_several_tables_are_one_a_split_or_joined_or_refused(tmp_path):
    half = [
        COMMA.split("\n")[:1]
        + [x for x in COMMA.split("\n")[1:] if x and (int(x.split(".")[0]) < 8) == k]
        for k in (True, False)
    ]
    t, how = listed(
        lay(
            tmp_path / "a",
            FLAT,
            train_DOT_csv="\n".join(half[0]),
            test_DOT_csv="\n".join(half[1]),
        )
    )
    assert (
        Counter(t.split) == dict(train=8, test=4) and how == "table test.csv, train.csv"
    )
    t, _ = listed(
        lay(
            tmp_path / "b",
            FLAT,
            truth_DOT_csv=COMMA,
            who_DOT_csv=table("image,patient", lambda i: f"{i},P{i // 2}"),
        )
    )
    assert (
        t.group.tolist() == [f"patient=P{i // 2}" for i in N] and classes(t) == HALVES
    )
    for name, more in (
        ("two", COMMA),
        ("twice", table("image,patient", lambda i: f"{i // 2},P{i // 2}")),
    ):
        with pytest.raises(ValueError, match="several tables|twice"):
            listed(lay(tmp_path / name, FLAT, truth_DOT_csv=COMMA, who_DOT_csv=more))


def test_labels_keep_the_text_that_was_written(tmp_path):
    rows = [
        dict(file_name=f"{i}.png") | ({} if i == 3 else dict(label=i % 2)) for i in N
    ]
    lay(tmp_path, FLAT, m_DOT_jsonl="".join(json.dumps(row) + "\n" for row in rows))
    t, _ = listed(tmp_path, own(**{"0": "healthy", "1": "polyp"}))
    assert classes(t) == dict(healthy=6, polyp=5) and t.why[t.why != ""].tolist() == [
        "no label"
    ]
    assert read_table(tmp_path / "m.jsonl").label.tolist()[:4] == ["0", "1", "0", ""]
    (tmp_path / "m.jsonl").unlink()
    lay(
        tmp_path,
        [],
        m_DOT_csv=table(
            "file,label", lambda i: f"{i}.png,{('NA', 'None', 'nan', '')[i % 4]}"
        ),
    )
    assert classes(listed(tmp_path)[0]) == dict(na=3, none=3, nan=3)


def test_a_file_with_two_labels_or_a_list_of_them_is_left_out(tmp_path):
    lay(tmp_path, FLAT, m_DOT_csv=COMMA + "3.png,a\n4.png,a\nimg/5.png,a\n")
    t, _ = listed(tmp_path)
    assert classes(t) == dict(a=6, b=4) and len(t) == 12
    assert set(t.why[t.file.isin(["img/3.png", "img/5.png"])]) == {
        "the table gives it several labels: a and b"
    }
    lay(
        tmp_path,
        [],
        m_DOT_csv=table(
            "file,label",
            lambda i: f"{i}.png,\"['a', 'b']\"" if i < 2 else f"{i}.png,{ab(i)}",
        ),
    )
    t, _ = listed(tmp_path)
    assert t.why.tolist()[:2] == ["several labels: a, b"] * 2 and classes(t) == dict(
        a=5, b=5
    )


def test_one_hot_needs_one_each():
    t = pd.DataFrame(
        dict(
            image=["x", "y", "z"],
            MEL=["1.0", "0.0", "0.0"],
            NV=["0.0", "1.0", "0.0"],
            UNK=["0.0", "0.0", "1.0"],
        )
    )
    assert one_hot_labels(t, SKIN) == ["MEL", "NV", "UNK"] == one_hot_labels(t, own())
    assert (
        one_hot_labels(t.drop(columns="UNK"), SKIN) == ["MEL", "NV", ""]
        and one_hot_labels(t.drop(columns="UNK"), own()) is None
    )
    assert one_hot_labels(t.assign(NV="1"), SKIN)[0] == '["MEL", "NV"]'


@pytest.mark.parametrize("both", ["a|b", "a; b", "a, b"])
def test_a_cell_of_labels_that_stand_alone_elsewhere_is_a_list(tmp_path, both):
    lay(
        tmp_path,
        FLAT,
        m_DOT_csv=table(
            "file,label", lambda i: f'{i}.png,"{both if i < 2 else ab(i)}"'
        ),
    )
    t, _ = listed(tmp_path)
    assert t.why.tolist()[:2] == ["several labels: a, b"] * 2 and classes(t) == dict(
        a=5, b=5
    )
    assert classes(
        listed(tmp_path, own(**{both: "mixed", "a": "a", "b": "b"}))[0]
    ) == dict(mixed=2, a=5, b=5)
    lay(
        tmp_path,
        [],
        m_DOT_csv=table("file,label", lambda i: f'{i}.png,"{both if i < 6 else "c"}"'),
    )
    assert classes(listed(tmp_path)[0]) == dict(a_b=6, c=6)


def test_columns_that_are_not_used_are_said(tmp_path):
    lay(
        tmp_path,
        FLAT,
        m_DOT_csv=table(
            ",file,label,fold,pid,caption",
            lambda i: f"{i},{i}.png,{ab(i)},{i % 5},P{i // 2},words",
        ),
    )
    t, _ = listed(tmp_path)
    assert t.attrs["told"] == ["columns of the table that are not used: fold"]
    assert t.group[0] == "pid=P0" and set(t.text) == {"words"}
    lay(
        tmp_path,
        [],
        m_DOT_csv=table(
            "file,a,b,age,text,caption",
            lambda i: f"{i}.png,{1 - i % 2},{i % 2},3{i},x,y",
        ),
    )
    assert listed(tmp_path)[0].attrs["told"] == [
        "columns of the table that are not used: age, caption"
    ]


# File names


@pytest.mark.parametrize(
    "written",
    [
        "img/{}.png",
        "{}.png",
        "{}",
        "./img/{}.png",
        " {}.PNG ",
        "{}.dcm",
        "img\\{}.png",
        "C:\\d\\img\\{}.JPG",
        "/archive/d/img/{}.png",
        "https://x.org/img/{}.png",
        "NFD {}.png",
        "%4Bäse%20{}.png",
    ],
)
def test_files_are_found_however_they_are_written(tmp_path, written):
    written = (
        unicodedata.normalize("NFD", "Käse {}.png")
        if written.startswith("NFD")
        else written
        if written.startswith("%")
        else written.replace("{}", "Käse {}")
    )
    lay(
        tmp_path,
        [f"img/Käse {i}.png" for i in N],
        m_DOT_csv=table("path,label", lambda i: f"{written.format(i)},{ab(i)}"),
    )
    assert classes(listed(tmp_path)[0]) == HALVES


def test_a_name_that_fits_several_files_fits_none():
    index = FileIndex(["a/1.png", "b/1.png", "b/1.jpg", "c/X.png", "c/x.png", "1.gif"])
    names = (
        "1.png a/1.png z/b/1 b/1.png X.png x.PNG 1.gif ../a/1.png 2.png C/x.png".split()
    )
    found = {x: index.find(x) for x in names}
    assert {k for k, v in found.items() if len(v) > 1} == {
        "1.png",
        "z/b/1",
        "x.PNG",
        "C/x.png",
    }
    assert {k: v[0] for k, v in found.items() if len(v) == 1} == {
        "a/1.png": "a/1.png",
        "b/1.png": "b/1.png",
        "X.png": "c/X.png",
        "1.gif": "1.gif",
    }


# Groups and splits


@pytest.mark.parametrize(
    "word", ["unknown", "NaN", "n/a", "-", "?", "0", "None", "-1", "XX", "9999"]
)
def test_stand_ins_for_patients_tie_nothing_and_it_is_said(tmp_path, word):
    lay(
        tmp_path,
        FLAT,
        m_DOT_csv=table(
            "file,label,patient_id", lambda i: f"{i}.png,{ab(i)},{word if i < 8 else i}"
        ),
    )
    t, _ = listed(tmp_path)
    assert t.group.tolist() == [""] * 8 + [f"patient_id={i}" for i in range(8, 12)]
    said = "of most rows" if word == "XX" else repr(word)  # it could be a name
    assert t.attrs["told"] == [
        f"patient_id {said} (8 rows) names nobody: these images form no group"
    ]


def test_true_patients_are_no_stand_ins():
    assert not placeholders(["0", "0", "1", "1", "2", "2"]) and not placeholders(
        ["P1"] * 6 + ["P2"] * 4
    )
    assert not placeholders(["P1", "", "", ""]) and not placeholders(
        ["1"] * 3 + ["2", "3", "4"]
    )


def test_a_split_is_one_or_is_drawn_and_it_is_said(tmp_path):
    t, _ = listed(
        lay(
            tmp_path / "a",
            FLAT,
            m_DOT_csv=table("file,label,split", lambda i: f"{i}.png,{ab(i)},Train "),
        )
    )
    assert not t.split.any() and "all images are called train" in t.attrs["told"][0]
    t, _ = listed(
        lay(
            tmp_path / "b",
            FLAT,
            m_DOT_csv=table(
                "file,label,split",
                lambda i: f"{i}.png,a,{('train', 'TEST', '')[i % 3]}",
            ),
        )
    )
    assert (
        t.why[t.why != ""].tolist() == ["no split is given for it, but for others"] * 4
    )
    lay(
        tmp_path / "c",
        [f"{'train' if i < 8 else 'test'}/{i}.png" for i in N],
        m_DOT_csv=table(
            "file,label,split", lambda i: f"{i}.png,a,{'train' if i < 9 else 'test'}"
        ),
    )
    t, _ = listed(tmp_path / "c")
    assert Counter(t.split) == dict(train=8, test=4)
    assert t.why[t.file == "test/8.png"].tolist() == [
        "the table puts it into train, its folder into test"
    ]


@pytest.mark.parametrize("column", ["set", "Usage", "phase"])
def test_a_column_of_split_words_is_a_split_whatever_it_is_called(tmp_path, column):
    lay(
        tmp_path,
        FLAT,
        m_DOT_csv=table(
            f"file,label,{column}",
            lambda i: f"{i}.png,{ab(i)},{'Training' if i < 8 else 'test'}",
        ),
    )
    assert Counter(listed(tmp_path)[0].split) == dict(train=8, test=4)


@pytest.mark.parametrize(
    "path",
    [
        "{c}/{s}/{i}.png",
        "deep/{c}/x/{s}/{i}.png",
        "{s}/{c}/{i}.png",
        "data/{S}/{c}/{i}.png",
    ],
)
def test_folders_of_a_split_are_no_classes_at_any_depth(tmp_path, path):
    parts = ["train" if i < 8 else "test" for i in N]
    lay(
        tmp_path,
        [path.format(c=ab(i), s=s, S=s.title(), i=i) for i, s in enumerate(parts)],
    )
    t, _ = listed(tmp_path)
    assert classes(t) == HALVES and Counter(t.split) == dict(train=8, test=4)


@pytest.mark.parametrize("part", ["valid", "test", "Train"])
def test_a_lone_part_is_no_split_and_it_is_said(tmp_path, part):
    t, _ = listed(lay(tmp_path, [f"{part}/{ab(i)}/{i}.png" for i in N]))
    assert (
        classes(t) == HALVES
        and not t.split.any()
        and "that is no split, so a new one is drawn" in t.attrs["told"][0]
    )


def test_what_only_looks_like_a_split_is_said(tmp_path):
    t, _ = listed(
        lay(
            tmp_path / "a",
            [f"{'train' if i < 8 else 'test'}_images/{i}.png" for i in N],
            m_DOT_csv=COMMA,
        )
    )
    assert not t.split.any() and t.attrs["told"][0].startswith(
        "test_images, train_images: not taken for parts of a split"
    )
    t, _ = listed(
        lay(
            tmp_path / "b",
            [f"{ab(i)}/{('train/', 'test/', '')[i // 4]}{i}.png" for i in N],
        )
    )
    assert Counter(t.split[t.why == ""]) == dict(train=4, test=4)
    assert set(t.why[8:].tolist() + t.why[t.split == ""].tolist()) == {
        "no split is given for it, but for others",
        "",
    }


def test_a_class_may_be_called_test_if_it_is_said(tmp_path):
    lay(tmp_path, [f"{('test', 'control')[i % 2]}/{i}.png" for i in N])
    with pytest.raises(
        ValueError, match="where test is a class, list it in dataset.yaml"
    ):
        listed(tmp_path)
    assert classes(listed(tmp_path, own("test", "control"))[0]) == dict(
        test=6, control=6
    )


@pytest.mark.parametrize("target", ["a", "c/deep"])
def test_a_folder_that_is_reached_twice_stops(tmp_path, target):
    lay(tmp_path, [f"a/{i}.png" for i in N] + [f"c/deep/{i}.png" for i in N])
    (tmp_path / "b").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="are one folder, by a link"):
        listed(tmp_path)


# Layouts of public collections

NM = ("nevus", "melanoma")
CP = ("cecum", "pylorus")
BITS = "MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK".split(",")
ISIC = [f"Input/ISIC_{i:07}.jpg" for i in N]
PUBLIC = {
    "ISIC 2016": (
        ISIC,
        {"truth.csv": "".join(f"ISIC_{i:07},benign\n" for i in N)},
        own(),
        "no line with names",
    ),
    "ISIC 2017": (
        ISIC,
        {
            "truth.csv": table(
                "image_id,melanoma,seborrheic_keratosis",
                lambda i: f"ISIC_{i:07},{i % 2}.0,{1 - i % 2}.0",
            )
        },
        SKIN,
        dict(melanoma=6, seborrheic_keratosis=6),
    ),
    "ISIC 2019": (
        ISIC,
        {
            "truth.csv": table(
                "image," + ",".join(BITS),
                lambda i: (
                    f"ISIC_{i:07}," + ",".join(f"{int(k == i % 9)}.0" for k in range(9))
                ),
            ),
            "meta.csv": table(
                "image,age,lesion_id", lambda i: f"ISIC_{i:07},9,L{i // 2}"
            ),
        },
        SKIN,
        dict(
            melanoma=2,
            common_nevus=2,
            carcinoma=3,
            actinic_keratosis=1,
            benign_keratosis=1,
            dermatofibroma=1,
            vascular_lesion=1,
        ),
    ),
    "ISIC 2020": (
        [f"train/ISIC_{i:07}.jpg" for i in N] + ["test/ISIC_1.jpg"],
        {
            "train.csv": table(
                "image_name,patient_id,diagnosis,benign_malignant,target",
                lambda i: f"ISIC_{i:07},IP_{i},{NM[i % 2]},x,{i % 2}",
            )
        },
        SKIN,
        dict(common_nevus=6, melanoma=6),
    ),
    "HAM10000": (
        [f"HAM10000_images_part_{1 + i % 2}/ISIC_{i:07}.jpg" for i in N]
        + [f"masks/ISIC_{i:07}_segmentation.png" for i in N],
        {
            "HAM10000_metadata": table(
                "lesion_id,image_id,dx",
                lambda i: f"H{i},ISIC_{i:07},{('nv', 'bkl')[i % 2]}",
            ),
            "ISIC2018_Task3_Test_GroundTruth.csv": "image,MEL,NV\nISIC_9999999,1.0,0.0\n",
        },
        SKIN,
        dict(common_nevus=6, benign_keratosis=6),
    ),
    "HAM10000 without its table": (
        [f"HAM10000_images_part_{1 + i % 2}/{i}.jpg" for i in N],
        {},
        SKIN,
        "HAM10000_images_part_1/, .*no images",
    ),
    "HyperKvasir": (
        [f"labeled-images/{'lu'[i % 2]}-gi/marks/{CP[i % 2]}/{i}f.jpg" for i in N],
        {
            "labeled-images/image-labels.csv": table(
                "Video file,Organ,Finding,Classification",
                lambda i: f"{i}f,x,{CP[i % 2]},marks",
            )
        },
        own(),
        dict(cecum=6, pylorus=6),
    ),
    "HyperKvasir's folders": (
        [f"x/{'lu'[i % 2]}-gi/marks/{CP[i % 2]}/{i}.jpg" for i in N],
        {},
        own(),
        "folders within folders",
    ),
    "HyperKvasir's folders, named": (
        [f"x/{'lu'[i % 2]}-gi/marks/{CP[i % 2]}/{i}.jpg" for i in N],
        {},
        own("cecum", "pylorus"),
        dict(cecum=6, pylorus=6),
    ),
    "Kvasir-SEG": (
        [f"Kvasir-SEG/{k}/{i}.jpg" for i in N for k in ("images", "masks")],
        {},
        KVASIR,
        "images/, masks/",
    ),
    "BUSI": (
        [f"{ab(i)}/{ab(i)} ({i}){m}.png" for i in N for m in ("", "_mask", "_mask_1")],
        {},
        own(),
        HALVES,
    ),
    "PAD-UFES-20": (
        [f"images/imgs_part_{1 + i % 3}/PAT_{i}.png" for i in N],
        {
            "metadata.csv": table(
                "patient_id,lesion_id,smoke,diagnostic,img_id",
                lambda i: f"P{i},{i},True,{('NEV', 'BCC')[i % 2]},PAT_{i}.png",
            )
        },
        own(),
        dict(nev=6, bcc=6),
    ),
    "APTOS": (
        [f"train_images/x{i}.png" for i in N],
        {"train.csv": table("id_code,diagnosis", lambda i: f"x{i},{i % 2}")},
        own(**{"0": "healthy", "1": "mild"}),
        dict(healthy=6, mild=6),
    ),
    "APTOS with its test set": (
        [f"train_images/x{i}.png" for i in N] + ["test_images/y.png"],
        {
            "train.csv": table("id_code,diagnosis", lambda i: f"x{i},{i % 2}"),
            "test.csv": "id_code\ny\n",
        },
        own(),
        "test.csv names images",
    ),
    "MESSIDOR": (
        [f"Base{11 + i % 2}/2005_{i}_PP.tif" for i in N],
        {
            "m.csv": table(
                "Image name,Ophthalmologic department,Retinopathy grade,Risk of macular edema ",
                lambda i: f"2005_{i}_PP.tif,x,{i % 2},0",
            )
        },
        own(),
        {"0": 6, "1": 6},
    ),
    "BreakHis": (
        [
            f"v1/breast/{('benign', 'malignant')[i % 2]}/SOB/x/{40 + i}X/{i}.png"
            for i in N
        ],
        {},
        own(),
        "folders within folders",
    ),
    "BreakHis, named": (
        [
            f"v1/breast/{('benign', 'malignant')[i % 2]}/SOB/x/{40 + i}X/{i}.png"
            for i in N
        ],
        {},
        own("benign", "malignant"),
        dict(benign=6, malignant=6),
    ),
    "MedMNIST": (
        [f"pathmnist/train{i}_{i % 2}.png" for i in N],
        {"pathmnist.csv": "".join(f"TRAIN,train{i}_{i % 2}.png,{i % 2}\n" for i in N)},
        own(),
        "no line with names",
    ),
    "ImageFolder, table at the root": (
        [f"{'train' if i < 8 else 'test'}/{i}.png" for i in N],
        {
            "metadata.csv": table(
                "file_name,label,text",
                lambda i: f"{'train' if i < 8 else 'test'}/{i}.png,{ab(i)},caption",
            )
        },
        own(),
        HALVES,
    ),
    "ImageFolder, one table": (
        [f"{s}/{ab(i)}/{i}.png" for i in N for s in ("train", "test")],
        {
            "train/metadata.csv": table(
                "file_name,text", lambda i: f"{ab(i)}/{i}.png,caption"
            )
        },
        own(),
        dict(a=12, b=12),
    ),
    "patients within classes": (
        [f"{ab(i)}/p{i}/{i}.png" for i in N],
        {},
        own(),
        "folders within folders",
    ),
    "patients within named classes": (
        [f"{ab(i)}/p{i}/{i}.png" for i in N],
        {},
        own("a", "b"),
        HALVES,
    ),
    "images within classes": (
        [f"{ab(i)}/images/{i}.png" for i in N],
        {},
        own(),
        HALVES,
    ),
    "images within splits": (
        [f"{s}/images/{i}.png" for i in N for s in ("train", "test")],
        {},
        own(),
        "images/",
    ),
    "an unknown split": (
        [f"{s}/{ab(i)}/{i}.png" for i in N for s in ("train", "holdout")],
        {},
        own(),
        "holdout/ .12 images",
    ),
    "a hidden class": (
        [f"{('.5mm', 'b')[i % 2]}/{i}.png" for i in N],
        {},
        own(),
        "'.5mm' is hidden",
    ),
    "what editors leave": (
        [f"{ab(i)}/{i}.png" for i in N] + ["a/.ipynb_checkpoints/1.png"],
        {},
        own(),
        HALVES,
    ),
    "patients in a table": (
        [f"{ab(i)}/{i}.png" for i in N],
        {"p.csv": table("file,patient_id", lambda i: f"{i}.png,P{i}")},
        own(),
        HALVES,
    ),
    "YOLO": (
        [f"images/{s}/{i}.png" for i in N for s in ("train", "val")],
        {f"labels/train/{i}.txt": "0 .5 .5 .1 .1" for i in N},
        own(),
        "images/: such a name",
    ),
    "COCO": (
        [f"{s}/x{s}{i}.png" for i in N for s in ("train", "val")],
        {
            "annotations/instances.json": json.dumps(
                dict(images=[dict(file_name=f"xtrain{i}.png") for i in N]), indent=1
            )
        },
        own(),
        "must be a list of objects",
    ),
    "patients beside the splits": (
        [f"{s}/{ab(i)}/{s}{i}.png" for i in N for s in ("train", "test")],
        {
            "about/p.csv": table(
                "file,patient_id", lambda i: f"train{i}.png,P{i}\ntest{i}.png,Q{i}"
            )
        },
        own(),
        dict(a=12, b=12),
    ),
    "a table above": (
        [f"deep/{ab(i)}/x{i}.png" for i in N],
        {"list.txt": "\n".join(f"x{i}.png" for i in N)},
        own(),
        "names images",
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_layouts_are_understood_or_stop(tmp_path, name):
    files, tables, d, want = PUBLIC[name]
    lay(
        tmp_path,
        files,
        **{k.replace("/", "__").replace(".", "_DOT_"): v for k, v in tables.items()},
    )
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            listed(tmp_path, d)
    else:
        t, _ = listed(tmp_path, d)
        assert classes(t) == want
        assert (
            len(set(t.file)) == len(t) == len([f for f in files if "/." not in f])
        )  # every file is used or said to be left out
        if name.startswith("ISIC 2019"):
            assert t.group.tolist()[:2] == ["lesion_id=L0"] * 2


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
