"Tables in any dialect, what is not understood, and the files that names in them mean."

import codecs
import io
import json
import unicodedata
import zipfile
from collections import Counter
import pandas as pd
import pytest
from medart.data.folders import FileIndex
from medart.data.labels import one_hot_labels
from medart.data.tables import read_table
from layouts import COMMA, FLAT, HALVES, N, SKIN, ab, classes, lay, listed, own, table


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
