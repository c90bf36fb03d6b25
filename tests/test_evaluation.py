"Evaluations of made-up runs: measured once, bad input named, nothing passed over in silence."

import json
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from everywhere import replace_everywhere
from medart.evaluation import classes as classes_room
from medart.evaluation import comparison
from medart.evaluation import corruptions
from medart.evaluation import distances as distances_room
from medart.evaluation import evaluator
from medart.evaluation import extractors as extractors_room
from medart.evaluation import image_sets
from medart.evaluation import image_stats
from medart.evaluation import measures
from medart.evaluation import results as results_room
from medart.evaluation import uncertainty
from medart.core.randomness import np_rng
from medart.recipes.datasets import DATASETS
from medart.recipes.runs import samples_dir


CLASSES = list(DATASETS["skin"].counts)


def images(r, split):
    return image_sets.real_images(r, split)


@pytest.fixture
def no_sheet(monkeypatch):
    "An evaluation without its sheet for clinicians, which takes as long as all measures."

    def sheet(gen, real, folder, **settings):
        folder.mkdir(exist_ok=True)
        for name in ("review.pdf", "review-key.csv"):
            (folder / name).write_text("")

    replace_everywhere(monkeypatch, evaluator.review_sheet, sheet)


@pytest.fixture
def generated_run(few_run):
    "A run whose images are the test images, a little too saturated; the base's are much too saturated."
    test = images(few_run, "test")
    image_sets.write_samples(
        samples_dir(few_run), replace(test, x=corruptions.saturate(test.x, 1.2))
    )
    image_sets.write_samples(
        samples_dir(results_room.base_recipe(few_run)),
        replace(test, x=corruptions.saturate(test.x, 2.0)),
    )
    return few_run


def test_evaluate_once_and_again(generated_run, monkeypatch):
    rows = evaluator.evaluate(generated_run).set_index("measure")
    out = results_room.results_path(generated_run, "metrics.json")
    first, when = out.read_bytes(), out.stat().st_mtime_ns
    assert (
        evaluator.evaluate(generated_run).set_index("measure").value.equals(rows.value)
        and out.stat().st_mtime_ns == when
    )
    assert {
        "frechet",
        "frechet_infinity",
        "kid",
        "precision",
        "recall",
        "density",
        "coverage",
        "color_gap",
        "paired_color_gap",
        "lab_distance",
        "saturation_shift",
        "named",
    } == set(rows.index)
    assert (
        0 < rows.closed["color_gap"] < 1.2
        and (rows.low <= rows.value).all()
        and (rows.value <= rows.high).all()
    )
    found = json.loads(first)
    assert (
        found["about"].startswith("skin, medart, tiny scale")
        and len(found["copies"]["closest"]) == 10
        and found["copies"]["rate"] == 2 / 112
    )
    review = out.parent / out.stem.replace("metrics", "review")
    key = pd.read_csv(review / "review-key.csv")
    assert (
        key.kind.value_counts().to_dict() == dict(generated=25, real=25)
        and (review / "review.pdf").exists()
    )

    replace_everywhere(monkeypatch, evaluator.review_sheet, lambda *a, **k: None)
    file = next(samples_dir(generated_run).rglob("*.png"))
    good, a = file.read_bytes(), np.array(Image.open(file))
    a[0, 0, 0] ^= 1
    Image.fromarray(a).save(file)
    evaluator.evaluate(generated_run)
    assert results_room.read_results(generated_run)["hash"] != found["hash"], (
        "one changed pixel is measured anew"
    )
    file.write_bytes(good)
    evaluator.evaluate(generated_run)
    assert out.read_bytes() == first, "the same images give the same bytes"


def test_further_spaces_are_measured_beside_the_first(generated_run, dino, no_sheet):
    "DINOv2 goes through the same call: a random one of its class stands in, and a wrong name is refused before anything is computed."
    with pytest.raises(FileNotFoundError, match="facebook/none"):
        evaluator.evaluate(generated_run, ("facebook/none",))
    rows = evaluator.evaluate(generated_run, (str(dino),))
    both = rows[rows.space == "dino"].set_index("measure")
    assert (
        set(both.index) == {"frechet", "kid", "frechet_infinity", "told_apart"}
        and (both.low <= both.value).all()
        and both.value["frechet"] > 0
    )
    assert (
        "28 px" in results_room.read_results(generated_run)["spaces"]["dino"]
        or "32 px" in results_room.read_results(generated_run)["spaces"]["dino"]
    )


def test_whose_captions_decide_the_pairs(few_run, no_sheet):
    "An image stands beside the one its caption describes: a training image where captions are those of the training set."
    r = replace(few_run, gen_split="train", gen_count=0)
    image_sets.write_samples(samples_dir(r), images(r, "train"))
    rows = evaluator.evaluate(r).set_index("measure")
    assert (
        rows.value["paired_color_gap"] == pytest.approx(0, abs=1e-12)
        and rows.value["color_gap"] > 0
    )
    assert results_room.read_results(r)["copies"]["flagged"] == 96, "these are copies"
    s = replace(few_run, gen_split="sample")
    image_sets.write_samples(
        samples_dir(s), replace(images(s, "test"), texts=("another caption",) * 112)
    )
    assert "paired_color_gap" not in set(evaluator.evaluate(s).measure)


def test_bad_input_is_named(generated_run):
    folder = samples_dir(generated_run)
    m = pd.read_csv(folder / "metadata.csv")
    odd = folder / m.file_name[3]
    good = odd.read_bytes()
    Image.new("RGB", (32, 32)).save(odd)
    with pytest.raises(
        ValueError, match=r"64x64 pixels, and are 64x64 \(111\), 32x32 \(1\)"
    ):
        evaluator.evaluate(generated_run)
    odd.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        evaluator.evaluate(generated_run)
    odd.write_bytes(good)
    m[m["class"] != "melanoma"].to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="no generated image of melanoma"):
        evaluator.evaluate(generated_run)
    m[:5].to_csv(folder / "metadata.csv", index=False)
    with pytest.raises(ValueError, match="holds 5 images; at least 10"):
        evaluator.evaluate(generated_run)
    (folder / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match="Generate them first"):
        evaluator.evaluate(generated_run)


def test_results_before_an_evaluation(few_run):
    with pytest.raises(FileNotFoundError, match="Evaluate first"):
        results_room.read_results(few_run)


@pytest.mark.parametrize("n_gen,n_test", [(96, 112), (112, 112), (112, 40)])
def test_every_value_lies_in_its_interval(few_run, few_phantoms, n_gen, n_test):
    "Whether as many images are compared with real ones as real ones with each other, or fewer, or more."
    ex, test = (
        extractors_room.load_extractor(str(few_phantoms / "vit")),
        images(few_run, "test"),
    )
    pick = lambda n: test[
        [i for i in uncertainty.stratified_order(test.classes, np_rng(0, "pick"))[:n]]
    ]
    gen, real = (
        image_stats.compute_stats(ex, s)
        for s in (
            replace(pick(n_gen), x=corruptions.saturate(pick(n_gen).x, 1.1)),
            pick(n_test),
        )
    )
    plan = uncertainty.plan_real_baseline(real.classes, real.classes, gen.classes)
    rows = comparison.compare_sets(gen, real, real, plan, reps=10)
    assert (
        (rows.low <= rows.value) & (rows.value <= rows.high)
        | rows.note.str.contains("no interval")
    ).all()
    for r in rows.itertuples():
        m = measures.find_measure(r.measure)
        assert (m.low is None or not r.low < m.low) and (
            m.high is None or not r.high > m.high
        ), r.measure
    res = dict(
        rows=[dict(x, space="vit") for x in rows.to_dict("records")],
        n=n_gen,
        n_real=n_test,
        n_floor=plan.n,
    )
    table = results_room.metrics_table(res)
    shown = table.iloc[:, 1].astype(float)
    for value, span in zip(shown, table["95% interval"]):
        assert span == "-" or float(span.split(" to ")[0]) <= value <= float(
            span.split(" to ")[1]
        )
    assert len(set(table.columns)) == len(table.columns)


def test_small_sets_get_no_number_and_a_reason(few_run, few_phantoms):
    ex, test = (
        extractors_room.load_extractor(str(few_phantoms / "vit")),
        images(few_run, "test"),
    )
    seen = image_stats.compute_stats(ex, test[list(range(0, 112, 10))])
    few = image_stats.measure_all(seen[list(range(8))], seen, subsets=0)
    assert (
        all(np.isnan(few[k]) for k in ("precision", "recall", "density", "coverage"))
        and few["frechet"] > 0
    )
    assert (
        "10 images on each side, there are 8" in measures.too_few("precision", 8, 8)[0]
    )
    assert (
        "20 images on each side, there are 12"
        in measures.too_few("coverage", 12, 12)[0]
    )
    plan = uncertainty.plan_real_baseline(seen.classes, seen.classes, seen.classes)
    notes = (
        comparison.compare_sets(seen, seen, seen, plan, reps=4)
        .set_index("measure")
        .note
    )
    assert "no interval" in notes["coverage"] and "no interval" not in notes["frechet"]
    with pytest.raises(
        ValueError, match="needs 6 images on each side, and there are 5"
    ):
        distances_room.prdc(seen.F.f[:5], seen.F.f)


def test_too_few_images_are_refused_before_any_is_read(few_run, monkeypatch):
    test = images(few_run, "test")
    image_sets.write_samples(samples_dir(few_run), test)
    monkeypatch.setattr(image_sets, "MIN_IMAGES", 200)
    for work in (image_sets.read_pixels, evaluator.load_extractor):
        replace_everywhere(
            monkeypatch, work, lambda *a, **k: pytest.fail("work was done")
        )
    with pytest.raises(ValueError, match="112 images; at least 200 are needed"):
        evaluator.evaluate(few_run)
    m = pd.read_csv(samples_dir(few_run) / "metadata.csv")
    pd.concat([m, m]).to_csv(samples_dir(few_run) / "metadata.csv", index=False)
    with pytest.raises(
        ValueError,
        match="the test set of few holds 112 images; at least 200 are needed",
    ):
        evaluator.evaluate(few_run)


def test_what_was_not_measured_stands_in_table_and_file(
    generated_run, few_phantoms, no_sheet, monkeypatch
):
    "Labels that stand for no class, captions of no image, features in plenty: each keeps its place and says why."
    replace_everywhere(
        monkeypatch,
        comparison.too_few_for_infinity,
        lambda n, d: f"needs {2 * n} images" if n else "",
    )
    ex = extractors_room.load_extractor(str(few_phantoms / "vit"))
    labels = ("melanoma", *(f"LABEL_{i}" for i in range(7)))
    replace_everywhere(
        monkeypatch, evaluator.load_extractor, lambda *a: replace(ex, labels=labels)
    )
    image_sets.write_samples(
        samples_dir(generated_run),
        replace(images(generated_run, "test"), texts=("another",) * 112),
    )
    rows = evaluator.evaluate(generated_run)
    res = results_room.read_results(generated_run)
    why = {x["measure"]: x["why"] for x in res["missing"]}
    assert set(why) == {"named", "paired_color_gap", "frechet_infinity"} and not set(
        why
    ) & set(rows.measure)
    assert (
        "no label for" in why["named"]
        and "common nevus" in why["named"]
        and "LABEL_0" in why["named"]
    )
    table = results_room.metrics_table(res)
    assert set(why.values()) <= set(table.note) and len(table) == len(rows) + 3
    assert table.loc["intended class named"].iloc[1] == "-"
    assert "other captions" in results_room.metrics_note(res), (
        "the base had other captions"
    )


def test_labels_of_published_classifiers_stand_for_ham_and_for_the_paper():
    labels = (
        "benign_keratosis-like_lesions",
        "basal_cell_carcinoma",
        "actinic_keratoses",
        "vascular_lesions",
        "melanocytic_Nevi",
        "melanoma",
        "dermatofibroma",
    )
    ham = (
        "common_nevus",
        "melanoma",
        "benign_keratosis",
        "carcinoma",
        "actinic_keratosis",
        "vascular_lesion",
        "dermatofibroma",
    )
    assert (
        classes_room._unlabeled_classes(labels, ham) == []
        and classes_room._unlabeled_classes(labels, CLASSES) == []
        and classes_room._unlabeled_classes(labels, labels) == []
    )
    assert classes_room._unlabeled_classes(labels, ("squamous_cell_carcinoma",)) == [
        "squamous cell carcinoma"
    ]


def test_captions_of_a_sample_find_the_image_they_describe(few_run):
    train = images(few_run, "train")
    train = replace(train, texts=tuple(f"{t} {i}" for i, t in enumerate(train.texts)))
    order = [5, 3, 90, 41]
    drawn = replace(train[order], index=(0, 1, 2, 3))
    assert comparison._caption_partners(
        drawn, train
    ) == order and comparison._caption_partners(train, train) == list(range(96))
    assert (
        comparison._caption_partners(replace(drawn, texts=("none",) * 4), train) is None
    )


def test_damaged_results_are_measured_again(generated_run, no_sheet):
    evaluator.evaluate(generated_run)
    out = results_room.results_path(generated_run, "metrics.json")
    good = out.read_bytes()
    for bad in (
        good[: len(good) // 2],
        good[:200] + bytes([good[200] ^ 1]) + good[201:],
        b"",
    ):
        out.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged"):
            results_room.read_results(generated_run)
    evaluator.evaluate(generated_run)
    assert out.read_bytes() == good


def test_numbers_of_a_network_that_knows_no_such_images_stand_below_a_warning(
    few_run, tmp_path, few_phantoms, no_sheet, monkeypatch
):
    "A data set of one's own is no phantom; measured by the bundled network it is measured with a warning."
    import shutil
    import warnings

    for split in ("train", "test"):
        shutil.copytree(few_phantoms / "few" / split, tmp_path / "real" / split)
    r = replace(few_run, data=str(tmp_path / "real"), extractor="data/tiny/vit-skin")
    ex = extractors_room.load_extractor(r.extractor)
    assert (
        results_room.extractor_warning(replace(r, data="few"), ex)
        == results_room.extractor_warning(replace(r, data="phantom/skin"), ex)
        == ""
    )
    assert (
        results_room.extractor_warning(
            r, extractors_room.load_extractor(str(few_phantoms / "vit"))
        )
        == ""
    ), "nobody knows"
    said = results_room.extractor_warning(r, ex)
    assert (
        said.startswith("WARNING: vit-skin has seen drawn phantoms alone")
        and "extractor=efficientnet-lite0" in said
    )
    res = dict(
        about="x",
        floor="y",
        spaces={"vit-skin": "FD, 64 px, trained on drawn phantoms"},
    )
    assert results_room.metrics_note(res | dict(warnings=[said])).startswith(said)
    assert results_room.metrics_note(res).startswith("x. Real against real")
    test = images(few_run, "test")
    test = test[uncertainty.stratified_order(test.classes, np_rng(0, "few"))[:24]]
    image_sets.write_samples(samples_dir(r), test)
    for name in ("generated_images", "real_images"):
        replace_everywhere(monkeypatch, getattr(image_sets, name), lambda *a: test)
    replace_everywhere(monkeypatch, evaluator.check_enough, lambda r: None)
    replace_everywhere(monkeypatch, evaluator.check_generated, lambda r: None)
    replace_everywhere(
        monkeypatch, evaluator.evaluation_inputs, lambda r, data=True: {}
    )
    for _ in range(2):  # measured, and read again
        with pytest.warns(UserWarning, match="vit-skin has seen drawn phantoms alone"):
            evaluator.evaluate(r)
    assert (
        results_room.read_results(r)["warnings"] == [said]
        and "trained on drawn phantoms"
        in results_room.read_results(r)["spaces"]["vit-skin"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert (
            results_room.extractor_warning(
                r, replace(ex, trained_on="ImageNet photographs")
            )
            == ""
        )
