"What README claims stands in files that the repository holds, and no run writes to those files."

import json
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from medart.evaluation.measures import find_measure, HEADLINE_MEASURES

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "outputs" / "reference"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHARES = ("named", "coverage")
DIGITS = dict(lab_distance=1, frechet=1)


def ignored(path):
    done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT)
    assert done.returncode in (0, 1)
    return done.returncode == 0


@pytest.mark.parametrize(
    "path",
    [
        "outputs/tables/table2-tiny-kvasir.md",
        "outputs/figures/figure2-kvasir-tiny.png",
        "outputs/benchmark/tiny-cpu.json",
        "outputs/train-skin.ipynb",
        "outputs/skin-tiny/medart/done.json",
        "outputs/durations.csv",
        "outputs/features/a.npz",
    ],
)
def test_git_ignores_what_runs_write(path):
    assert ignored(path)


def test_git_keeps_the_reference_results(files):
    assert not ignored("outputs/reference/tables/a-new-table.csv")
    kept = {path.parts[1] for path in files if path.parts[0] == "outputs"}
    assert kept == {"README.md", "reference"}


def test_no_module_and_no_run_writes_to_the_reference(files):
    "They read it at most: it is renewed by `make reference` alone."
    for path in files:
        if (
            path.parts[0] == "medart"
            or re.fullmatch(r"nbs/[a-z]+\.ipynb", path.as_posix())
            and path.stem != "index"
        ):
            assert "outputs/reference" not in (ROOT / path).read_text(
                encoding="utf-8"
            ), path


def test_make_reference_renews_what_is_there_and_adds_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("MEDART_OUTPUTS", raising=False)
    for name in ("tables/shown.csv", "tables/own.csv"):
        (tmp_path / "outputs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "outputs" / name).write_text("new")
    for name in ("tables/shown.csv", "figures/kept.csv"):
        path = tmp_path / "outputs/reference" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text(encoding="utf-8"))
    for command in ("git init -q", "git add outputs/reference", "make reference"):
        done = subprocess.run(
            command.split(), cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    found = {
        p.relative_to(tmp_path / "outputs/reference").as_posix(): p.read_text()
        for p in (tmp_path / "outputs/reference").rglob("*.csv")
    }
    assert found == {"tables/shown.csv": "new", "figures/kept.csv": "old"}


# The tables of README, made from the files


def read(name):
    return pd.read_csv(REFERENCE / "tables" / name)


def show(measure, mean, sd):
    "A mean and its standard deviation as README writes them."
    if measure in SHARES:
        return f"{mean:.0%} ± {100 * sd:.0f}"
    return f"{mean:.{DIGITS.get(measure, 3)}f} ± {sd:.{DIGITS.get(measure, 3)}f}"


def label(measure):
    m = find_measure(measure)
    return f"{'absolute ' if m.signed else ''}{m.title}, {'higher' if m.better == 'higher' else 'lower'} is better"


def effect_rows():
    t = read("effect-tiny-summary.csv").set_index(["dataset", "measure", "method"])
    for d in ("skin", "kvasir"):
        for m in (*HEADLINE_MEASURES, "color_gap", "coverage"):
            cells = [
                show(m, *t.loc[(d, m, k), ["mean", "sd"]])
                for k in ("base", "no_hldf", "medart", "medart_k5", "real")
            ]
            yield f"**{d}**: {label(m)}", cells


def pair(x):
    digits = 2 if x.measure in DIGITS else 3
    return f"{x['mean']:.{digits}f} ({x.low:.{digits}f} to {x.high:.{digits}f}), {x.better}"


def paired_rows():
    t = read("effect-tiny-paired.csv").set_index(
        ["dataset", "measure", "method"], drop=False
    )
    for d in ("skin", "kvasir"):
        for m in (*HEADLINE_MEASURES, "color_gap", "coverage"):
            yield (
                f"**{d}**: {find_measure(m).title}",
                [pair(t.loc[d, m, k]) for k in ("medart", "medart_k5")],
            )


PARTS = dict(
    medart="Med-Art",
    no_hldf="without the color loss (PixArt-alpha)",
    no_t5_lora="without LoRA on T5",
    dora="with DoRA",
    simple_caption="only simple captions",
    empty_caption="empty captions",
    sd15="SD1.5, without the color loss",
    fast_dit="Fast-DiT, trained from nothing",
)


def parts_rows():
    t = pd.concat(
        [read("table3-tiny-kvasir.csv"), read("table2-tiny-kvasir.csv")]
    ).drop_duplicates(["method", "measure"])
    t = t.set_index(["method", "measure"])
    for k, title in PARTS.items():
        yield (
            title,
            [
                f"{x.ours:.{n}f} ± {x.sd:.{n}f}"
                for x, n in (
                    (t.loc[k, "FD (vit-kvasir)"], 1),
                    (t.loc[k, "KID (vit-kvasir)"], 2),
                )
            ],
        )
    yield (
        "real against real",
        [
            f"{t.loc['floor', m].ours:.{n}f}"
            for m, n in (("FD (vit-kvasir)", 1), ("KID (vit-kvasir)", 2))
        ],
    )


SETTINGS = dict(
    no_hldf="PixArt-alpha without the color loss",
    medart="with it (Med-Art)",
    often="every 20 steps (`often`)",
    short_chain="through 10 solver steps (`short_chain`)",
    mean_color="the mean over channels (`mean_color`)",
    medart_k5="gradient through the last 5 of 20 (`medart_k5`)",
    sd15="SD1.5 without the color loss",
    sd15_hldf="with it (`sd15_hldf`)",
    real="real against real",
)


def settings_rows():
    t = read("settings-tiny-summary.csv").set_index(["method", "measure"])
    for k, title in SETTINGS.items():
        yield (
            title,
            [show(m, *t.loc[(k, m), ["mean", "sd"]]) for m in HEADLINE_MEASURES],
        )


CLASSIFIERS = dict(
    medart="{n} images that Med-Art generated",
    real="the {n} real ones",
    both="both, {n} images",
)


def classifier_rows():
    t = read("table4-tiny-skin.csv").set_index(["method", "measure"])
    for k, title in CLASSIFIERS.items():
        cells = [t.loc[k, m] for m in ("F1", "macro F1", "BACC", "AUC")]
        yield (
            title.format(n=f"{cells[0].n:.0f}"),
            [f"{x.ours:.3f} ± {x.sd:.3f}" for x in cells],
        )


def lines(rows):
    return ["| " + " | ".join([title, *cells]) + " |" for title, cells in rows]


RESULTS = dict(
    effect=effect_rows,
    paired=paired_rows,
    parts=parts_rows,
    settings=settings_rows,
    classifiers=classifier_rows,
)


@pytest.mark.parametrize("table", RESULTS)
def test_tables_of_results_are_those_of_the_files(table):
    missing = [
        line for line in lines(RESULTS[table]()) if line not in README.splitlines()
    ]
    assert not missing, "\n".join(["README should hold", *missing])


def test_no_table_of_results_holds_another_number():
    "Rows with a ± or an interval are results: each must come from a file."
    known = {line for rows in RESULTS.values() for line in lines(rows())}
    shown = [
        line
        for line in README.splitlines()
        if line.startswith("|") and re.search(r"±|\(-?\d.* to |\d%", line)
    ]
    assert len(shown) > 40 and not [line for line in shown if line not in known]


def test_the_headline_measures_are_shown_with_their_direction():
    "By name and direction, wherever methods are compared: as rows of the first table, as columns of the settings'."
    heads = [line for line in README.splitlines() if line.startswith("| on phantoms")]
    assert (
        len(
            [line for line in heads if all(label(m) in line for m in HEADLINE_MEASURES)]
        )
        == 1
    )
    for m in HEADLINE_MEASURES:
        assert f"**skin**: {label(m)}" in README and f"**kvasir**: {label(m)}" in README
    for line in heads:
        named = [
            cell
            for cell in line.split("|")[2:-1]
            if re.search("distance|KID|F1|accuracy|AUC|gap|shift", cell)
        ]
        assert all("is better" in cell for cell in named), line


# Sentences

# What is no result: names, settings, sizes and times of this repository, the paper's own numbers.
NO_RESULT = [
    r"Python 3\.11",
    r"about 2 GB",
    r"\(caption 41 s[^)]*\)",
    r"2\.3 GB of memory",
    r"24 GB or more",
    r"512 pixels",
    r"64-pixel",
    r"120 tokens",
    r"Eqs?\. \d( to \d)?",
    r"Tables? \d",
    r"Figure 2",
    r"SD1\.5",
    r"1\.4, 1\.5",
    r"v1\.1",
    r"Kvasir v2",
    r"Apache-2\.0",
    r"CC BY-NC 4\.0",
    r"MMSys 2017",
    r"et al\. 2018",
    r"2D Medical",
    r"H100",
    r"96,000 steps",
    r"20 solver steps",
    r"18 rows in 53 minutes on two cores",
    r"seeds? 0\b",
    r"seeds 1, 2 and 3",
    r"256 images",
    r"every 50 steps",
    r"95%",
    r"last 5( solver steps| of 20)?",
    r"every 20 steps",
    r"10 solver steps",
]


def sections():
    "Heading, prose without tables, code and links, and the reference files that the section links to."
    for part in re.split(r"^(?=## )", README, flags=re.MULTILINE):
        files = re.findall(r"\((outputs/reference/[^)]+)\)", part)
        text = re.sub(
            r"```.*?```|`[^`]*`|!\[[^\]]*\]\([^)]*\)|\]\([^)]*\)|https?://\S+|<!--.*?-->",
            " ",
            part,
            flags=re.DOTALL,
        )
        text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
        for phrase in NO_RESULT:
            text = re.sub(phrase, " ", text)
        yield part.splitlines()[0], text, files


def numbers(path):
    "Every number in a CSV, JSON or Markdown file, as text and as a number."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        path = path.with_suffix(".csv")
        text += path.read_text(encoding="utf-8")
    return [float(v) for v in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def derived():
    "Two numbers of the benchmark that are quotients: hours of the paper's Kvasir run, images a second."
    bench = json.loads(
        (REFERENCE / "benchmark/paper-cuda.json").read_text(encoding="utf-8")
    )
    ours = {
        x["what"]: x["seconds"]
        for x in bench["rows"]
        if x["whose"] == "ours" and x["variant"] == "ours"
    }
    return [96000 * ours["step"] / 3600, bench["gen_block"] / ours["generation"]]


@pytest.mark.parametrize(
    "heading,text,files", sections(), ids=lambda x: x[:30] if isinstance(x, str) else ""
)
def test_numbers_in_sentences_stand_in_the_files_that_the_section_links_to(
    heading, text, files
):
    files = [ROOT / f for f in files if not f.endswith(".png")]
    known = [v for f in files for v in numbers(f)] + (
        derived() if any("paper-cuda" in f.name for f in files) else []
    )
    known += [
        v
        for f in files
        if f.suffix == ".csv" and f.with_suffix(".json").exists()
        for v in numbers(f.with_suffix(".json"))
    ]
    said = re.findall(
        r"(?<![\w.])\d[\d,]*(?:\.\d+)?%?(?!\w)", text
    )  # "falls by 2" is -2
    lost = []
    for word in said:
        share = word.endswith("%")
        value = word.rstrip("%").replace(",", "")
        digits = len(value.partition(".")[2])
        if not any(
            round(abs(v) * (100 if share else 1), digits) == float(value) for v in known
        ):
            lost.append(word)
    assert not lost, (
        f"{heading}: no file that this section links to holds {', '.join(lost)}"
    )


def test_links_to_results_lead_to_tracked_files(files):
    linked = set(re.findall(r"\]\((outputs/[^)#]+)\)", README))
    assert linked and not linked - {path.as_posix() for path in files}


def test_the_commands_for_a_gpu_give_fid_and_kid():
    "They install the extra and ask for Inception's space, by parameters that the notebooks have."
    from papermill import inspect_notebook

    block = README.split("## On a GPU")[1].split("\n## ")[0]
    assert ".[paper]" in block and "paper_requirements" in (
        ROOT / "settings.ini"
    ).read_text(encoding="utf-8")
    for run in ("evaluate", "reproduce"):
        command = next(
            line
            for line in block.splitlines()
            if line.startswith(f"papermill nbs/{run}.ipynb")
        )
        assert "-p spaces inception" in command
        given = set(re.findall(r"-p (\w+) ", command))
        assert given <= set(inspect_notebook(str(ROOT / f"nbs/{run}.ipynb")))


def better(name, method, measure, dataset="skin kvasir"):
    "In how many pairs of runs a method is better than without the loss, and of how many."
    t = read(f"{name}-tiny-paired.csv")
    t = t[
        (t.method == method) & (t.measure == measure) & t.dataset.isin(dataset.split())
    ]
    return tuple(map(sum, zip(*(map(int, x.split(" of ")) for x in t.better))))


def explained(name, method, measure, dataset):
    "Whether the interval of the mean difference leaves out zero."
    t = (
        read(f"{name}-tiny-paired.csv")
        .set_index(["dataset", "method", "measure"])
        .loc[dataset, method, measure]
    )
    return t.high < 0 or t.low > 0


@pytest.mark.parametrize(
    "said,holds",
    [
        (
            "own measure falls in five of the six pairs",
            lambda: better("effect", "medart", "paired_color_gap") == (5, 6),
        ),
        (
            "taken over whole sets it falls in all six",
            lambda: better("effect", "medart", "color_gap") == (6, 6),
        ),
        (
            "covered in all six pairs",
            lambda: better("effect", "medart", "coverage") == (6, 6),
        ),
        (
            "Lab distance falls on both data sets by more than chance explains",
            lambda: all(
                explained("effect", "medart", "lab_distance", d)
                for d in ("skin", "kvasir")
            ),
        ),
        (
            "of both contain zero",
            lambda: (
                not any(
                    explained("effect", "medart", m, d)
                    for m in ("paired_color_gap", "color_gap")
                    for d in ("skin", "kvasir")
                )
            ),
        ),
        (
            "both intervals lie around zero",
            lambda: (
                not any(
                    explained("effect", "medart", "saturation_shift", d)
                    for d in ("skin", "kvasir")
                )
            ),
        ),
        (
            "Frechet distance falls in 3 of 3 pairs on skin and in 1 of 3 on kvasir",
            lambda: (
                [
                    better("effect", "medart", "frechet", d)[0]
                    for d in ("skin", "kvasir")
                ]
                == [3, 1]
            ),
        ),
        (
            "on skin by more than chance explains",
            lambda: explained("effect", "medart", "coverage", "skin"),
        ),
        (
            "own measure and the Lab distance fall on kvasir by more than chance explains",
            lambda: all(
                explained("effect", "medart_k5", m, "kvasir")
                for m in ("paired_color_gap", "lab_distance")
            ),
        ),
        (
            "on skin none of these measures is to be told",
            lambda: (
                not any(
                    explained("effect", "medart_k5", m, "skin")
                    for m in (*HEADLINE_MEASURES, "color_gap", "coverage")
                )
            ),
        ),
        (
            "every setting brings the Lab distance down",
            lambda: all(
                explained("settings", k, "lab_distance", "kvasir")
                for k in read("settings-tiny-paired.csv").method.unique()
            ),
        ),
        (
            "larger Frechet distance than no loss in all three",
            lambda: all(
                better("settings", k, "frechet")[0] == 0
                for k in ("often", "short_chain")
            ),
        ),
        (
            "not to be told from that of no loss",
            lambda: not explained("settings", "mean_color", "frechet", "kvasir"),
        ),
        (
            "gains in all three pairs by each of the five measures",
            lambda: all(
                better("settings", "sd15_hldf", m) == (3, 3) for m in HEADLINE_MEASURES
            ),
        ),
        (
            "None of these settings moves saturation",
            lambda: (
                not any(
                    explained("settings", k, "saturation_shift", "kvasir")
                    for k in read("settings-tiny-paired.csv").method.unique()
                )
            ),
        ),
    ],
    ids=lambda x: x[:40] if isinstance(x, str) else "",
)
def test_what_is_said_in_words_holds_in_the_files(said, holds):
    assert said in " ".join(README.split()) and holds()
