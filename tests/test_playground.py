"The playground answers every request: with images and their colors, or with a sentence."

import json

import pandas as pd
import pytest
import torch

from everywhere import replace_everywhere
from medart.core.paths import root
from medart.workflows import course, playground
from medart.workflows.playground import (
    EXAMPLE,
    Playground,
    caption_note,
    compare_models,
    load_playground,
    named_in,
    reference_images,
    request_fault,
)

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def models():
    return load_playground()


@pytest.fixture
def page(models):
    page = Playground(models, n=1)
    page.steps.value = 2
    return page


def press(page, **values):
    "Type values into fields, press the button, and read the line of words."
    for name, value in values.items():
        getattr(page, name).value = value
    page.button.click()
    return page.status.value


def test_the_models_of_the_course_are_three_and_differ(models):
    assert tuple(models) == course.COURSE_METHODS
    images, stats = compare_models(models, EXAMPLE, steps=2, n=2)
    assert list(images) == ["phantoms", *models] == list(stats.index)
    assert {tuple(x.shape) for x in images.values()} == {(2, 3, 64, 64)}
    assert not torch.equal(images["base"], images["medart"])
    assert not torch.equal(images["no_hldf"], images["medart"])
    assert stats.loc["phantoms", "color gap"] == 0
    assert (stats.loc[list(models), "color gap"] > 0).all()


def test_the_same_request_gives_the_same_images_and_another_seed_others(models):
    one = {"medart": models["medart"]}
    first, again, other = (
        compare_models(one, EXAMPLE, steps=2, seed=seed, n=1)[0]["medart"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_generate_shows_a_picture_and_says_what_was_read(page):
    said = press(page)
    assert page.picture.value[:4] == PNG
    assert page.picture.layout.display != "none"
    assert "tokens; the model reads 64" in said
    assert "phantoms of melanoma on tan skin" in said
    assert not page.button.disabled


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(caption=""), "The caption is empty."),
        (dict(caption=" \n "), "The caption is empty."),
        (dict(caption="皮膚の画像"), "unknown to the model"),
        (dict(steps=0), "steps must be a whole number from 1 to 100"),
        (dict(steps=-3), "steps must be"),
        (dict(steps=1000), "steps must be"),
        (dict(guidance=-1.0), "guidance must be a number from 0 to 20"),
        (dict(guidance=float("nan")), "guidance must be"),
        (dict(seed=-1), "seed must be"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_said_in_words(page, values, words):
    before = page.picture.value
    said = press(page, **values)
    assert words in said and "Traceback" not in said
    assert page.picture.value == before
    assert not page.button.disabled


def test_no_model_chosen_and_one_alone(page):
    for box in page.chosen.values():
        box.value = False
    assert "Choose at least one" in press(page)
    page.chosen["base"].value = True
    press(page)
    assert page.picture.value[:4] == PNG


def test_a_long_caption_is_answered_and_the_cut_is_said(page):
    said = press(page, caption=f"{EXAMPLE} " * 3 + "with a last word")
    assert page.picture.value[:4] == PNG
    assert "cut off" in said and "with a last word" in said


def test_what_is_cut_is_what_the_model_does_not_read(models):
    model, long = models["base"], f"{EXAMPLE} " * 3
    rest = caption_note(model, long).split('cut off: "')[1].rstrip('".')
    kept = model.tokenizer.decode(model.tokens([long])[0][0], skip_special_tokens=True)
    assert f"{kept} {rest}".split() == long.lower().rstrip(". ").split()


def test_words_of_the_page_are_text_and_never_markup(page):
    said = press(page, caption="<b>melanoma</b> <script>皮</script>")
    assert "<" not in said


def test_an_error_nobody_thought_of_is_one_sentence(page, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of ink")

    replace_everywhere(monkeypatch, playground.compare_models, fails)
    said = press(page)
    assert said == "That did not work (RuntimeError: out of ink)."
    assert not page.button.disabled


def test_what_is_compared_with_is_what_the_caption_names():
    assert named_in("Melanoma beside a common nevus") == ("melanoma", "")
    assert named_in("common  nevus, then melanoma")[0] == "common_nevus"
    assert named_in("a pink lesion on tan skin") == ("", "tan")
    assert named_in("a red circle") == ("", "")
    pale = reference_images("melanoma", "pale tan", 4).float().mean()
    dark = reference_images("melanoma", "dark brown", 4).float().mean()
    assert pale > dark + 20


def test_a_skin_that_is_never_drawn_is_no_reason_to_fail(models):
    images = reference_images("melanoma", "dark pink", 2, most=50)
    assert torch.equal(images, reference_images("melanoma", "", 2))


def test_other_kinds_are_faults_too(models):
    assert "caption is empty" in request_fault(models, None)
    assert "steps must be" in request_fault(models, "a", steps="20")
    assert "seed must be" in request_fault(models, "a", seed=True)
    with pytest.raises(ValueError, match="No model is chosen"):
        compare_models({}, EXAMPLE)


def test_names_of_the_course_are_told():
    with pytest.raises(ValueError, match="Choose one of: base, no_hldf, medart"):
        course.load_course_model("medart_k5")
    with pytest.raises(ValueError, match="Choose one of: no_hldf, medart"):
        course.course_adapters("base")


def test_lost_adapters_are_said_to_be_lost(monkeypatch, tmp_path):
    replace_everywhere(monkeypatch, course.locate, lambda name: str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="git checkout data/tiny/course"):
        course.load_course_model("medart")


def test_both_trainings_had_equal_updates():
    folder = root() / "data/tiny/course"
    losses = pd.read_csv(folder / "losses.csv")
    last = losses.groupby("part").step.max()
    assert last["no_hldf"] == last["medart"]
    assert losses[losses.part == "no_hldf"].color.isna().all()
    assert losses[losses.part == "medart"].color.notna().any()
    no_hldf, medart = (course.course_recipe(m) for m in ("no_hldf", "medart"))
    settings = json.loads((folder / "built.json").read_text())["settings"]
    assert settings == dict(epochs=medart.epochs, ema=medart.ema, seed=medart.seed)
    assert (no_hldf.seed, no_hldf.lr, no_hldf.epochs, no_hldf.ema) == (
        medart.seed,
        medart.lr,
        medart.epochs,
        medart.ema,
    )


def test_one_thread_answers_and_the_others_come_back(models, monkeypatch):
    threads, before = [], torch.get_num_threads()
    real = playground.sample_images

    def noted(*args):
        threads.append(torch.get_num_threads())
        return real(*args)

    monkeypatch.setattr(playground, "sample_images", noted)
    try:
        torch.set_num_threads(2)
        compare_models({"base": models["base"]}, EXAMPLE, steps=1, n=1)
        assert threads == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
