"Planted copies are found, strangers are not."

import numpy as np
import pandas as pd
import pytest
import torch
from medart.evaluation import corruptions
from medart.evaluation import extractors as extractors_room
from medart.evaluation import image_sets
from medart.evaluation import memorization
from medart.evaluation import uncertainty
from medart.data.phantoms import draw_phantom
from medart.recipes.datasets import DATASETS


CLASSES = list(DATASETS["skin"].counts)


def images(r, split):
    return image_sets.real_images(r, split)


def _drawn(seed, n, first=0):
    return torch.stack(
        [
            torch.from_numpy(draw_phantom("skin", c, seed, first + i)[0]).permute(
                2, 0, 1
            )
            for c in CLASSES
            for i in range(n)
        ]
    )


@pytest.fixture(scope="module")
def many(few_phantoms):
    "Training and test phantoms, where copies are looked for, and the thresholds that the test images set."
    ex, train, test = (
        extractors_room.load_extractor(str(few_phantoms / "vit")),
        _drawn(0, 12),
        _drawn(0, 20, 100_000),
    )
    spaces = memorization._copy_spaces(ex, train, cache=few_phantoms / "features")
    limits = memorization._copy_thresholds(
        memorization._copy_scores(test, train, test, spaces, own=len(test)), rate=0.02
    )
    return ex, train, test, spaces, limits


def test_copies_are_found_in_every_disguise_and_strangers_are_not(
    few_run, few_phantoms
):
    "With the whole set of phantoms: each planted copy is flagged, fresh ones no oftener than promised."
    ex = extractors_room.load_extractor(str(few_phantoms / "vit"))
    train, test, fresh = _drawn(0, 12), _drawn(0, 40, 100_000), _drawn(7, 25)
    spaces = memorization._copy_spaces(ex, train)
    planted = corruptions.disguises(train[::3], seed=1)
    s = memorization._copy_scores(
        torch.cat([test, fresh, *planted.values()]), train, test, spaces, own=len(test)
    )
    limits = memorization._copy_thresholds(s[: len(test)], rate=0.02)
    flagged = memorization._flagged(s, limits)[len(test) :]
    assert (
        uncertainty.wilson_interval(flagged[: len(fresh)].sum(), len(fresh))[0] < 0.02
    )
    assert dict(
        zip(planted, flagged[len(fresh) :].reshape(5, -1).mean(1))
    ) == dict.fromkeys(planted, 1.0)


def test_orientations_are_the_eight_of_a_square():
    x = torch.arange(3 * 4 * 4).reshape(1, 3, 4, 4)
    seen = memorization._orientations(x)
    assert len({tuple(y.flatten().tolist()) for y in seen}) == 8 and torch.equal(
        seen[0], x
    )
    for y in (
        x.flip(2),
        x.flip(3),
        x.transpose(2, 3),
        x.rot90(2, (2, 3)),
        x.rot90(3, (2, 3)),
    ):
        assert sum(torch.equal(y, z) for z in seen) == 1
        assert {tuple(z.flatten().tolist()) for z in memorization._orientations(y)} == {
            tuple(z.flatten().tolist()) for z in seen
        }


@pytest.mark.parametrize("at", range(8))
def test_copies_are_found_however_they_are_turned(many, at):
    "Each planted copy, plain, cropped, compressed, brighter, in each orientation; the search names the image it came from."
    ex, train, test, spaces, limits = many
    sources = list(range(at % 3, len(train), 12))
    planted = corruptions.disguises(
        memorization._orientations(train[sources])[at], seed=at
    )
    s = memorization._copy_scores(torch.cat([*planted.values()]), train, test, spaces)
    flagged = memorization._flagged(s, limits).reshape(5, -1)
    assert dict(zip(planted, flagged.mean(1))) == dict.fromkeys(planted, 1.0)
    assert list(s["thumbnails train"]) == sources * 5


def test_turned_strangers_are_flagged_no_oftener_than_promised(many):
    "Both distances are taken over the same orientations, so turning an image changes nothing: not its score, nor its nearest."
    ex, train, test, spaces, limits = many
    fresh = _drawn(7, 10)
    plain = memorization._copy_scores(fresh, train, test, spaces)
    assert (
        uncertainty.wilson_interval(
            memorization._flagged(plain, limits).sum(), len(fresh)
        )[0]
        < 0.02
    )
    for at in (1, 6):
        turned = memorization._copy_scores(
            memorization._orientations(fresh[:16])[at], train, test, spaces
        )
        for space in ("thumbnails", "features"):
            assert np.allclose(turned[space], plain[space][:16], atol=1e-3)


def test_a_turned_test_image_is_known_for_one(many):
    "The distance to test images is taken over the same eight orientations."
    ex, train, test, spaces, limits = many
    s = memorization._copy_scores(
        memorization._orientations(test[:40])[3], train, test, spaces
    )
    assert (s.thumbnails > 10).all() and list(s["thumbnails test"]) == list(range(40))


def test_a_threshold_of_zero_divides_nothing(few_phantoms, few_run):
    "Test images that lie in the training set set a threshold of zero; images equal to them are ranked all the same."
    test = images(few_run, "test")
    sets = dict(gen=test, test=test, train=test)
    with np.errstate(all="raise"):
        found = memorization.find_copies(
            sets, extractors_room.load_extractor(few_run.extractor), 0.01
        )
    assert set(found["limits"].values()) == {0.0}
    assert found["flagged"] == 0 and len(found["closest"]) == 10
    assert all(np.isfinite(c["score"]) for c in found["closest"])


def test_too_few_test_images_set_no_threshold():
    with pytest.raises(ValueError, match="cannot set a threshold"):
        memorization._copy_thresholds(
            pd.DataFrame(dict(thumbnails=np.ones(20), features=np.ones(20)))
        )
