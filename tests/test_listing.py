"Layouts of folders and tables, public ones too: the list that each becomes, and what stops."

import json
from collections import Counter
import pandas as pd
import pytest
from drawn import picture, put
from medart.data.images import read_pixels
from medart.data.listing import list_images
from medart.data.loading import load_split
from medart.data.preparation import prepare
from medart.data.reports import with_names
from medart.recipes.datasets import DATASETS
from medart.recipes.recipe import recipe
from medart.data.tables import placeholders
from drawn import report
from layouts import (
    COMMA,
    FLAT,
    HALVES,
    KVASIR,
    N,
    SKIN,
    ab,
    classes,
    lay,
    listed,
    own,
    table,
)


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
    text = report(out / "test", "metadata.csv").text
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
