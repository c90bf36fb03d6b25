"Tables and figures from made-up results: the paper's numbers in their places, ours under their own name, missing ones with a command."

import csv
import io
import re


import pandas as pd
import pytest
import torch

from medart.evaluation import classification
from medart.evaluation import classifier as classifier_room
from medart.evaluation import image_sets
from medart.evaluation import measures
from medart.evaluation import paper_tables
from medart.evaluation import prompt_figures
from medart.evaluation import results as results_room
from medart.evaluation import seed_statistics
from medart.evaluation import table_files
from medart.workflows import reproduce as reproduce_room


from medart.core.files import write_atomic
from medart.core.records import read_record, write_record
from medart.data.phantoms import write_phantoms
from medart.recipes.datasets import DATASETS
from medart.recipes.paper import PAPER_TABLES
from medart.recipes.recipe import recipe
from medart.recipes.runs import classifier_dir, run_dir, samples_dir

CLASSES = list(DATASETS["skin"].counts)
FEW = dict(train=dict.fromkeys(CLASSES, 2), test=dict.fromkeys(CLASSES, 2))


def tiny(dataset, method, seed):
    return recipe(dataset, method, scale="tiny", seed=seed)


def paper(dataset, method, seed):
    return recipe(dataset, method, scale="paper", seed=seed)


def finish(r, fid=None, distance=None, kid=None, f1=None):
    "Leave behind what a finished run would."
    own = r.extractor.split("/")[-1]
    write_record(run_dir(r) / "done.json", {})
    write_atomic(samples_dir(r) / "metadata.csv", "")
    write_record(samples_dir(r) / "key.json", {}, ["metadata.csv"])
    rows = [
        dict(space=own, measure="frechet", value=distance, floor=1.25),
        dict(space=own, measure="kid", value=0.5, floor=0.0),
    ]
    if fid is not None:
        rows += [
            dict(space="inception", measure="frechet", value=fid, floor=20.0),
            dict(space="inception", measure="kid", value=kid, floor=0.001),
        ]
    write_record(results_room.results_path(r, "metrics.json"), {}, rows=rows)
    if f1 is not None:
        write_atomic(
            samples_dir(classification.synthetic_recipe(r)) / "metadata.csv", ""
        )
        write_record(
            samples_dir(classification.synthetic_recipe(r)) / "key.json",
            {},
            ["metadata.csv"],
        )
        rows = [
            dict(training=k, seed=s, measure=m, value=f1 + 0.1 * i + 0.01 * s)
            for i, k in enumerate(classification.TRAINING_SETS)
            for s in (0, 1)
            for m in classifier_room.SCORES
        ]
        write_record(classifier_dir(r) / "classifier.json", {}, rows=rows)


def test_the_papers_rows_are_all_there():
    "Counts and a few cells, straight from the paper's text."
    assert {
        k: (len(t["rows"]), len(t["columns"])) for k, t in PAPER_TABLES.items()
    } == {2: (6, 6), 3: (8, 3), 4: (7, 6)}
    assert all(
        len(v) == len(t["columns"])
        for t in PAPER_TABLES.values()
        for v in t["rows"].values()
    )
    assert (
        paper_tables.paper_value(2, "kvasir", "medart", "FID") == 51.99
        and paper_tables.paper_value(2, "skin", "fast_dit", "HFD") == 3.95
    )
    assert (
        paper_tables.paper_value(3, "kvasir", "ovis", "KID") == 0.013
        and paper_tables.paper_value(4, "skin", "real", "BACC") == 0.508
    )
    assert paper_tables.paper_value(3, "skin", "medart", "FID") is None


def test_a_tiny_number_never_stands_under_the_papers_name(folders):
    finish(tiny("skin", "medart", 0), distance=21.5, f1=0.5)
    for k in (2, 3, 4):
        t, notes, text = table_files.write_table(k, tiny, ["skin"])
        for top, name in t.columns:
            assert (top == "the paper") != (top == "ours, tiny scale, drawn phantoms")
            if top != "the paper":
                assert not re.search(r"\b(KFD|HFD)\b", name), (
                    "distances of the small networks have names of their own"
                )
        assert (
            "TINY SCALE" in text
            and "drawn phantoms" in text
            and "cannot be compared with the paper's" in text
        )
    made = {f.name for f in (folders[1] / "tables").iterdir()}
    assert made == {
        f"table{k}-tiny-skin.{e}" for k in (2, 3, 4) for e in ("csv", "md", "tex")
    }
    for f in (folders[1] / "tables").iterdir():
        said = f.read_text()
        assert ("tiny,phantom/skin" if f.suffix == ".csv" else "TINY SCALE") in said
    t, _, _ = table_files.write_table(2, tiny, ["skin"])
    assert (
        t.loc["Med-Art", ("ours, tiny scale, drawn phantoms", "skin FD (vit-skin)")]
        == "21.50"
    )
    assert t.loc["Med-Art", ("the paper", "skin HFD")] == "4.47"
    assert (
        t.loc[
            "Real against real",
            ("ours, tiny scale, drawn phantoms", "skin FD (vit-skin)"),
        ]
        == "1.25"
    )


def test_full_size_numbers_stand_beside_the_papers(folders):
    for s, fid in ((0, 50.0), (1, 54.0)):
        finish(paper("kvasir", "medart", s), fid, 1.5, 0.01, f1=0.8)
    finish(paper("kvasir", "no_hldf", 0), 70.0, 1.8, 0.03)
    t, notes, text = table_files.write_table(2, paper, ["kvasir"], (0, 1))
    ours = "ours, paper scale"
    assert (
        t.loc["Med-Art", (ours, "kvasir FID")] == "52.00 ± 2.83"
        and t.loc["Med-Art", (ours, "kvasir KFD")] == "1.50 ± 0.00"
    )
    assert t.loc["PixArt-alpha", (ours, "kvasir FID")].startswith(
        "70.00 (1 of 2 seeds) ["
    )
    assert (
        t.loc["Med-Art", ("the paper", "kvasir FID")] == "51.99"
        and t.loc["Med-Art", ("the paper", "kvasir KID")] == "0.012"
    )
    assert t.loc["Real against real", (ours, "kvasir FID")] == "20.00"
    assert (
        "PAPER SCALE" not in text
        and "a sample of the training set, as in the paper" in text
    )
    cells = pd.read_csv(folders[1] / "tables" / "table2-paper-kvasir.csv")
    got = cells[(cells.method == "medart") & (cells.measure == "FID")].iloc[0]
    assert (got.ours, got.paper, got.seeds) == (
        52.0,
        51.99,
        2,
    ) and got.sd == pytest.approx(2.8284, abs=1e-3)
    t, _, _ = table_files.write_table(4, paper, ["kvasir"], (0, 1))
    assert t.loc["Med-Art", (ours, "kvasir F1")].startswith("0.8050") and t.loc[
        "Real images", (ours, "kvasir F1")
    ].startswith("0.9050")
    assert (
        t.loc["Real and Med-Art's images", (ours, "kvasir AUC")].startswith("1.0050")
        and t.loc["Real images", ("the paper", "kvasir AUC")] == "0.9962"
    )


def test_missing_cells_say_what_to_run(folders):
    "One command makes all that is missing, however many cells it is, and what no command makes says why."
    r = tiny("skin", "medart", 0)
    assert paper_tables.to_run(r) == [
        "train",
        "generate",
        "evaluate",
    ] and paper_tables.to_run(r, 4) == ["train", "generate", "classify"]
    t, notes, _ = table_files.write_table(2, tiny, ["skin"], (0, 1))
    ours = "ours, tiny scale, drawn phantoms"
    run, none = (
        t.loc["Med-Art", (ours, "skin FD (vit-skin)")],
        t.loc["SDXL", (ours, "skin FID")],
    )
    assert (
        run.startswith("run [")
        and none.startswith("none [")
        and f"{none.split()[1]} needs paper scale" in notes
    )
    commands = [n for n in notes if "papermill" in n]
    assert commands == [
        f"{run.split()[1]} To make what is missing: papermill nbs/reproduce.ipynb outputs/reproduce.ipynb "
        "-p table 2 -p datasets skin -p scale tiny -p seeds '0 1' -p spaces inception"
    ]
    assert set(t.loc["Real against real"].dropna()) == {"-", run} and notes[
        -1
    ].startswith("A dash")
    assert [name for top, name in t.columns if top == "the paper"] == [
        "skin FID",
        "skin HFD",
        "skin KID",
    ], "the paper's columns in the paper's order"
    write_record(run_dir(r) / "done.json", {})
    assert paper_tables.to_run(r) == ["generate", "evaluate"] and paper_tables.to_run(
        r, 4
    ) == ["generate", "classify"]
    assert "-p gen_split train -p gen_count 0" in paper_tables.commands(r, 4).split(
        " && "
    )[0] and "gen_split" not in paper_tables.commands(r, 2)
    finish(r, distance=20.0)
    t, notes, _ = table_files.write_table(2, tiny, ["skin"])
    assert t.loc["Med-Art", (ours, "skin FD (vit-skin)")] == "20.00" and t.loc[
        "Med-Art", (ours, "skin FID")
    ].startswith("run [")
    cells = (
        pd.read_csv(folders[1] / "tables" / "table2-tiny-skin.csv")
        .set_index(["method", "measure"])
        .to_run
    )
    assert (
        cells["medart", "FID"] == paper_tables.OTHER_SPACE
        and cells["no_hldf", "FID"] == "train generate evaluate"
    )


def test_the_command_names_rows_beyond_the_papers_and_changed_settings(folders):
    def few(d, m, s):
        return recipe(
            d,
            m,
            scale="tiny",
            seed=s,
            **(dict(gen_steps=4) if m == "base" else dict(gen_steps=4, epochs=2.0)),
        )

    write_atomic(run_dir(few("skin", "medart_k5", 1)) / "config.json", "{}")
    t, notes, text = table_files.write_table(2, few, ["skin"], (0, 1))
    command = next(n for n in notes if "papermill" in n)
    assert "Med-Art, last 5 solver steps" in t.index, (
        "a run of any of the seeds is a row"
    )
    assert (
        "-p epochs 2.0" in command
        and "-p gen_steps 4" in command
        and "medart_k5" in command
    )
    assert "Changed settings: epochs=2.0, gen_steps=4." in text
    table_files.write_table(2, tiny, ["skin"])
    assert len(list((folders[1] / "tables").glob("table2-tiny-skin*.md"))) == 2, (
        "tables of other settings stand beside each other"
    )


def test_what_is_shared_names_no_folder_of_this_machine(folders, tmp_path):
    "Neither where outputs go nor where the images lie: captions, notes, CSV and messages are for other people."
    here = tmp_path / "Jane Doe" / "nevi"
    write_phantoms("skin", here, counts=FEW)

    def own(d, m, s):
        return recipe(d, m, scale="tiny", seed=s, data=str(here))

    finish(own("skin", "medart", 0), distance=20.0, f1=0.5)
    for k in (2, 3, 4):
        table_files.write_table(k, own, ["skin"])
    for f in (folders[1] / "tables").iterdir():
        said = f.read_text()
        assert "Doe" not in said and str(tmp_path) not in said and "nevi" in said, (
            f.name
        )
    row = reproduce_room.Row(own("skin", "medart", 0))
    row.fail(
        "evaluate", f"{here}/test/a.png cannot be read; see {folders[1]}/evaluate.log"
    )
    assert (
        row.message
        == "path/to/nevi/test/a.png cannot be read; see outputs/evaluate.log"
    )


def test_tables_of_a_data_set_of_ones_own(folders):
    (folders[0] / "fund").mkdir()
    (folders[0] / "fund" / "dataset.yaml").write_text(
        "modality: fundus\nfeatures: color, shape\n"
    )

    def own(d, m, s):
        return recipe(d, m, scale="tiny", seed=s, data="fund")

    finish(own("fund", "medart", 0), distance=20.0, f1=0.5)
    for k, name, cell in (
        (2, "fund FD (efficientnet-lite0)", "20.00"),
        (4, "fund BACC", "0.5050 ± 0.0071"),
    ):
        t, notes, text = table_files.write_table(k, own, ["fund"])
        assert t.loc["Med-Art", ("ours, tiny scale", name)] == cell
        assert {top for top, _ in t.columns} == {"ours, tiny scale"} and not any(
            n.startswith("A dash") for n in notes
        )
        assert any("-p datasets fund" in n and "-p data fund" in n for n in notes)
    assert (folders[1] / "tables" / "table4-tiny-fund.md").exists()


def test_a_number_comes_with_its_spread_and_its_images(folders):
    "Over seeds a standard deviation, of one run its interval or its classifiers' deviation; a measure without value says so."

    def leave(r, **rows):
        finish(r, distance=20.0, f1=0.5)
        rows = [
            dict(
                space="vit-skin",
                measure=m,
                value=v,
                low=v and v - 1,
                high=v and v + 2,
                floor=1.0,
                floor_low=0.5,
                floor_high=1.5,
            )
            for m, v in rows.items()
        ]
        gone = [
            dict(measure=x["measure"], space=x["space"], why="too few images")
            for x in rows
            if x["value"] is None
        ]
        rows = [x for x in rows if x["value"] is not None]
        write_record(
            results_room.results_path(r, "metrics.json"),
            {},
            n=64,
            n_real=80,
            n_floor=32,
            rows=rows,
            missing=gone,
        )
        path = classifier_dir(r) / "classifier.json"
        rows = read_record(path)["rows"]
        write_record(
            path,
            {},
            rows=rows,
            n=dict.fromkeys(classification.TRAINING_SETS, 64),
            n_test=80,
            updates=16,
        )

    leave(tiny("skin", "medart", 0), frechet=20.0, kid=None)
    ours = "ours, tiny scale, drawn phantoms"
    t, notes, text = table_files.write_table(2, tiny, ["skin"])
    assert t.loc["Med-Art", (ours, "skin FD (vit-skin)")] == "20.00 (19.00 to 22.00)"
    assert (
        t.loc["Real against real", (ours, "skin FD (vit-skin)")]
        == "1.00 (0.50 to 1.50)"
    )
    none = t.loc["Med-Art", (ours, "skin KID (vit-skin)")]
    assert (
        none.startswith("none [")
        and f"{none.split()[1]} {paper_tables.NO_VALUE}: too few images" in notes
    )
    assert seed_statistics.row_measures(tiny("skin", "medart", 0)).set_index(
        "measure"
    ).value.isna().to_dict() == dict(frechet=False, kid=True)
    assert (
        "Images: skin: 64 generated and 80 test images. In brackets: 95% interval"
        in text
    )
    t, _, text = table_files.write_table(4, tiny, ["skin"])
    assert t.loc["Med-Art", (ours, "skin F1")] == "0.5050 ± 0.0071"
    assert (
        "64 training and 80 test images. ±: standard deviation over 2 classifiers. Each classifier has had 16 updates."
        in text
    )
    leave(tiny("skin", "medart", 1), frechet=24.0, kid=0.1)
    t, _, text = table_files.write_table(2, tiny, ["skin"], (0, 1))
    assert t.loc["Med-Art", (ours, "skin FD (vit-skin)")] == "22.00 ± 2.83"
    assert t.loc["Med-Art", (ours, "skin KID (vit-skin)")].startswith(
        "0.1000 (-0.9000 to 2.1000) (1 of 2 seeds) ["
    )


def test_directions_of_the_tables_are_those_of_the_measures():
    for k in (2, 3, 4):
        keys = (
            classifier_room.SCORES
            if k == 4
            else [
                m
                for _, m in paper_tables.distance_columns(
                    tiny("skin", "medart", 0)
                ).values()
            ]
        )
        assert {measures.find_measure(m).better for m in keys} == {
            "higher" if k == 4 else "lower"
        }
        assert f"{'higher' if k == 4 else 'lower'} is better" in table_files.CAPTIONS[k]


# Differences and places on a scale


def toy(**values):
    "Rows of two methods and the untouched model: measure -> (base, without, with, real)."
    return pd.DataFrame(
        [
            dict(
                dataset="skin",
                scale="tiny",
                seed=0,
                measure=m,
                method=method,
                value=v,
                floor=vs[3],
            )
            for m, vs in values.items()
            for method, v in zip(("base", "no_hldf", "medart"), vs)
        ]
    )


def test_closed_knows_signs_and_directions():
    rows = seed_statistics.add_closed(
        toy(
            saturation_shift=(0.022, -0.01, 0.044, -0.004),
            coverage=(0.1, 0.5, 0.9, 0.9),
            frechet=(9.0, 3.0, 12.0, 3.0),
        )
    )
    got = rows.set_index(["measure", "method"]).closed
    assert got["saturation_shift", "no_hldf"] == pytest.approx(
        (0.022 - 0.01) / (0.022 - 0.004)
    )
    assert got["saturation_shift", "medart"] == pytest.approx(
        (0.022 - 0.044) / (0.022 - 0.004)
    )
    assert got["coverage", "medart"] == pytest.approx(1) and got[
        "coverage", "no_hldf"
    ] == pytest.approx(0.5)
    assert got["frechet", "medart"] == pytest.approx(-0.5)
    assert pd.isna(
        seed_statistics.add_closed(
            toy(saturation_shift=(0.01, 0.02, 0.03, 0.02))
        ).closed
    ).all(), "there is no way to close"


def test_real_images_have_closed_the_whole_gap_and_borrow_no_interval():
    measures = [("frechet", 20.0, 1.0), ("color_gap", 0.3, 0.1)]
    rows = pd.DataFrame(
        [
            dict(
                dataset="skin",
                scale="tiny",
                measure=m,
                seed=0,
                method=method,
                value=value * share,
                low=value * share - 0.01,
                high=value * share + 0.01,
                floor=floor,
            )
            for m, value, floor in measures
            for method, share in (("base", 1.0), ("medart", 0.5))
        ]
    )
    both = seed_statistics.with_real(seed_statistics.add_closed(rows))
    real = both[both.method == "real"]
    assert list(real.value) == [1.0, 0.1]
    assert list(real.closed) == [1.0, 1.0]
    assert real[["low", "high"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="tiny and paper scale"):
        seed_statistics.seed_summary(pd.concat([rows, rows.assign(scale="paper")]))


def test_below_zero_is_better_whatever_the_measure():
    better = dict(
        frechet=(0, 5, 4, 0),
        named=(0, 0.4, 0.6, 1),
        saturation_shift=(0, -0.2, 0.1, 0),
        density=(0, 1.2, 1.4, 1),
        kid=(0, 0.01, -0.02, 0),
    )
    pairs = seed_statistics.paired_differences(
        toy(**better), dict(medart="no_hldf")
    ).set_index("measure")
    assert (
        (pairs[0] < 0).all()
        and (pairs.better == "1 of 1").all()
        and (pairs.against == "no_hldf").all()
    )
    assert pairs.loc["saturation_shift", 0] == pytest.approx(-0.1)
    worse = {m: (b, w, v, f) for m, (b, v, w, f) in better.items()}
    assert (
        seed_statistics.paired_differences(toy(**worse), dict(medart="no_hldf"))[0] > 0
    ).all()


def test_a_measure_without_a_value_stays_in_the_tables():
    rows = toy(frechet=(9.0, 5.0, 4.0, 1.0), frechet_infinity=(None, None, None, None))
    pairs = seed_statistics.paired_differences(rows, dict(medart="no_hldf"))
    assert pairs.measure.tolist() == [
        "frechet",
        "frechet_infinity",
    ] and pairs.better.tolist() == ["1 of 1", "0 of 0"]
    shown = seed_statistics.over_seeds(
        seed_statistics.add_closed(rows), ["frechet", "frechet_infinity"]
    )
    assert (shown.iloc[:, 2] == "not defined").all() and (shown.seeds == 1).all()


def test_a_mean_over_pairs_has_students_interval():
    from scipy import stats

    rows = pd.concat(
        [
            toy(frechet=(0, 10, v, 0)).assign(seed=s)
            for s, v in enumerate((9.0, 7.5, 10.5))
        ]
    )
    pairs = seed_statistics.paired_differences(rows, dict(medart="no_hldf")).iloc[0]
    want = stats.ttest_1samp([-1, -2.5, 0.5], 0).confidence_interval()
    assert (pairs["low"], pairs["high"]) == pytest.approx(
        (want.low, want.high)
    ) and pairs.better == "2 of 3"


def test_tests_of_pairs_are_those_of_scipy_corrected_by_holm():
    from scipy import stats

    gains = dict(frechet=(1.0, 1.4, 0.7, 1.2), kid=(0.2, -0.3, 0.1, 0.05))
    rows = pd.concat(
        toy(
            frechet=(0, 10, 10 - gains["frechet"][s], 0),
            kid=(0, 1, 1 - gains["kid"][s], 0),
            coverage=(0, 0.5, 0.6, 1),
        ).assign(seed=s)
        for s in range(4)
    )
    pairs = seed_statistics.paired_differences(rows, dict(medart="no_hldf"))
    family = ["frechet", "kid", "coverage"]
    tested = seed_statistics.tested_differences(pairs, family).set_index("measure")
    for measure, gain in gains.items():
        found = tested.loc[measure]
        t, p = stats.ttest_1samp([-x for x in gain], 0)
        assert found.p == pytest.approx(p)
        assert found.effect == pytest.approx(t / 2)
        for end, share in ((found.effect_low, 0.975), (found.effect_high, 0.025)):
            assert stats.nct.cdf(t, 3, end * 2) == pytest.approx(share, abs=1e-6)
    assert tested.loc["frechet", "p_holm"] == pytest.approx(
        2 * tested.loc["frechet", "p"]
    ), "two tests could be made: a difference that never varies has none"
    assert tested.loc["kid", "p_holm"] == tested.loc["kid", "p"]
    assert pd.isna(tested.loc["coverage", "p_holm"])
    assert seed_statistics.tested_differences(pairs, ["kid"]).shape[0] == 1


@pytest.mark.parametrize(
    "p,want",
    [
        ([0.01, 0.02, 0.03], [0.03, 0.04, 0.04]),
        ([0.03, 0.01, 0.02], [0.04, 0.03, 0.04]),
        ([0.6, 0.7], [1, 1]),
        ([float("nan"), 0.01], [float("nan"), 0.01]),
        ([], []),
    ],
)
def test_holm_never_lets_a_larger_p_come_out_smaller(p, want):
    assert seed_statistics.holm(p) == pytest.approx(want, nan_ok=True)


def test_the_distance_among_photographs_features_has_a_name_of_its_own():
    rows = pd.DataFrame(
        [
            dict(measure="frechet", space="vit-skin", value=2.0),
            dict(measure="frechet", space="efficientnet-lite0", value=90.0),
            dict(measure="kid", space="efficientnet-lite0", value=0.3),
            dict(measure="frechet", space="inception", value=50.0),
        ]
    )
    own = seed_statistics._own_space(rows, "vit-skin")
    assert own.measure.tolist() == ["frechet", "photo_frechet"]
    assert own.value.tolist() == [2.0, 90.0]
    own = seed_statistics._own_space(rows, "efficientnet-lite0")
    assert own.measure.tolist() == ["frechet", "kid"]


def test_tables_of_data_sets_with_points_in_their_names_are_apart(folders):
    for name in ("eyes.v1", "eyes.v2"):
        (folders[0] / name).mkdir()
        (folders[0] / name / "dataset.yaml").write_text(
            "modality: fundus\nfeatures: color\n"
        )
        table_files.write_table(
            2, lambda d, m, s: recipe(d, m, scale="tiny", data=d, seed=s), [name]
        )
    made = {f.name for f in (folders[1] / "tables").iterdir()}
    assert made == {
        f"table2-tiny-eyes.v{i}.{e}" for i in (1, 2) for e in ("csv", "md", "tex")
    }


def test_a_command_for_a_table_keeps_names_like_numbers(folders):
    (folders[0] / "1e5").mkdir()
    cells = paper_tables.table_cells(
        2, lambda d, m, s: recipe(d, m, scale="tiny", data="1e5", seed=s), ["skin"]
    )
    told = table_files.missing_command(
        2, recipe("skin", scale="tiny", data="1e5"), (0,), cells
    )
    assert "-r data 1e5" in told and "-p scale tiny" in told


def test_measures_of_other_spaces_do_not_mix(folders):
    r = tiny("skin", "medart", 0)
    finish(r, fid=100.0, distance=20.0, kid=0.1)
    assert seed_statistics.row_measures(r).value.tolist() == [20.0, 0.5]


def test_a_signed_measure_does_not_cancel_over_seeds():
    rows = pd.concat(
        [
            toy(saturation_shift=(s, s, s, 0)).assign(seed=i)
            for i, s in enumerate((0.1, -0.1))
        ]
    )
    shown = seed_statistics.over_seeds(rows, ["saturation_shift"])
    assert list(shown) == ["seeds", "|saturation shift|, lower is better"] and set(
        shown.iloc[:, 1]
    ) == {"0.100 ± 0.000"}


def test_markdown_and_latex_hold_every_cell(folders):
    finish(paper("skin", "medart", 0), 66.6, 4.4, 0.033)
    t, notes, text = table_files.write_table(2, paper, ["kvasir", "skin"])
    md = (folders[1] / "tables" / "table2-paper.md").read_text()
    lines = [line for line in md.splitlines() if line.startswith("|")]
    assert len(lines) == len(t) + 2 and len({line.count("|") for line in lines}) == 1
    tex = (folders[1] / "tables" / "table2-paper.tex").read_text()
    body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == len(t) and {row.count("&") for row in body} == {len(t.columns)}
    for cell in ("66.60", "67.45", "51.99", "PixArt-alpha"):
        assert cell in md and cell in tex
    assert not re.search(r"(?<!\\)[_%#]", tex), (
        "characters that LaTeX reads as commands are escaped"
    )
    assert (
        tex.count("{") == tex.count("}")
        and r"\begin{table}" in tex
        and r"\end{table}" in tex
    )


def test_csv_reads_back(folders):
    finish(tiny("skin", "medart", 0), distance=20.0)
    table_files.write_table(2, tiny, ["skin"])
    rows = list(
        csv.DictReader(
            io.StringIO((folders[1] / "tables" / "table2-tiny-skin.csv").read_text())
        )
    )
    assert {row["scale"] for row in rows} == {"tiny"} and {
        row["data"] for row in rows
    } == {"phantom/skin"}
    for row in rows:
        assert not (row["ours"] and row["paper"]), (
            "at tiny scale no cell has both, since no measure is the same"
        )
        assert row["ours"] or row["paper"] or row["to_run"]


@pytest.mark.parametrize("split", ["test", "train", "sample"])
def test_figure_two(folders, split):
    write_phantoms("skin", folders[0] / "few", counts=FEW)
    rs = [
        recipe("skin", m, scale="tiny", data="few", gen_split=split, gen_count=0)
        for m in ("no_hldf", "dora", "medart")
    ]
    with pytest.raises(FileNotFoundError, match="has generated images"):
        prompt_figures.prompts_figure(rs)
    from medart.training.sampling_plan import sampling_plan

    plan = sampling_plan(rs[0])
    for r, shade, texts in ((rs[0], 40, ("",) * len(plan)), (rs[2], 200, plan.texts)):
        write_record(run_dir(r) / "done.json", {})
        files = tuple(f"{c}/{i:05d}.png" for c, i in zip(plan.classes, plan.index))
        image_sets.write_samples(
            samples_dir(r),
            image_sets.ImageSet(
                torch.full((len(plan), 3, 64, 64), shade).byte(),
                plan.classes,
                texts,
                files,
                plan.index,
            ),
        )
    fig = prompt_figures.prompts_figure(rs, 3)
    rows = [fig.axes[5 * i : 5 * i + 5] for i in range(3)]
    assert [ax.get_title() for ax in rows[0][1:]] == [
        "Real",
        "PixArt-alpha",
        "with DoRA",
        "Med-Art",
    ]
    for i, row in enumerate(rows):
        at = plan.classes.index(CLASSES[i])
        assert (
            "".join(row[0].texts[0].get_text().split())[:30]
            == "".join(plan.texts[at].split())[:30]
        )
        assert row[3].texts[0].get_text().startswith("to run:") and not row[3].images
        assert (
            row[2].images[0].get_array().max()
            < 0.2
            < 0.7
            < row[4].images[0].get_array().min()
        )
        real = image_sets.real_images(rs[0], "test" if split == "test" else "train")
        same = [
            j
            for j, t in enumerate(real.texts)
            if t == plan.texts[at] and real.classes[j] == plan.classes[at]
        ]
        shown = torch.from_numpy(
            row[1].images[0].get_array().filled()
            if hasattr(row[1].images[0].get_array(), "filled")
            else row[1].images[0].get_array()
        )
        assert any(
            (shown.permute(2, 0, 1) * 255 - real.x[j].float()).abs().max() < 1
            for j in same
        ), "the real image is the one the caption describes"
    assert (
        "drawn phantoms" not in fig.get_suptitle()
        and "tiny scale" in fig.get_suptitle()
    )


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="medart2"):
        table_files.write_table(
            2, lambda d, m, s: recipe(d, "medart2", scale="tiny"), ["skin"]
        )


@pytest.mark.parametrize(
    "old", ["{}", "[]", "{", '{"rows": null}', '{"n": 256, "n_real": 512, "rows": []}']
)
def test_results_of_another_version_are_refused_with_the_command(folders, old):
    r = tiny("skin", "medart", 1)
    write_atomic(results_room.results_path(r, "metrics.json"), old)
    for read in (
        results_room.read_results,
        seed_statistics.row_measures,
        paper_tables.distances,
    ):
        with pytest.raises(
            ValueError, match="earlier version.*nbs/evaluate.ipynb.*-p seed 1"
        ):
            read(r)
    assert "of a version that noted less" in results_room.results_fault(r)


def test_what_cannot_be_shown_is_named():
    with pytest.raises(ValueError, match="no measure 'coverage' here.*named"):
        seed_statistics.over_seeds(toy(named=(0.1, 0.2, 0.3, 0.9)), ["coverage"])
    with pytest.raises(ValueError, match="sdxl.*Pass scale=paper"):
        reproduce_room.all_done(
            pd.DataFrame(dict(method=["sdxl"] * 2, state=paper_tables.PAPER_ONLY))
        )
