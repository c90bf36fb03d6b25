"Color and skin tone: known values, and what is no skin."

import numpy as np
import pytest
import torch
from medart.core import randomness
from medart.evaluation import color
from medart.evaluation import corruptions
from medart.evaluation import distances as distances_room
from medart.evaluation import extractors as extractors_room
from medart.evaluation import image_sets
from medart.evaluation import image_stats
from medart.evaluation import skin_tone
from medart.method import losses


def images(r, split):
    return image_sets.real_images(r, split)


def test_lab_of_known_colors():
    "Values of the CIE formulas for sRGB and D65."
    known = {
        (255, 255, 255): (100, 0, 0),
        (0, 0, 0): (0, 0, 0),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (128, 128, 128): (53.59, 0, 0),
    }
    for rgb, want in known.items():
        assert color.rgb_to_lab(rgb) == pytest.approx(want, abs=0.03)


def test_color_measures_grow_with_saturation(few_run):
    x = images(few_run, "test").x
    stats, sat, p = (
        color.color_stats(x),
        color.mean_saturation(x),
        color.lab_pixels(x).reshape(-1, 3),
    )
    spoiled = [corruptions.saturate(x, s) for s in (1.2, 1.5, 2.0)]
    for numbers in (
        [color.color_gap(color.color_stats(y), stats) for y in spoiled],
        [color.mean_saturation(y).mean() - sat.mean() for y in spoiled],
        [
            distances_room.sliced_wasserstein(color.lab_pixels(y).reshape(-1, 3), p)
            for y in spoiled
        ],
    ):
        assert 0 < numbers[0] < numbers[1] < numbers[2]
    assert color.mean_saturation(corruptions.saturate(x, 0)).max() < 0.01


def test_skin_tones_are_ordered(few_run):
    "A patch of skin that is darkened moves down the scale."
    skin = (
        torch.tensor([220.0, 180.0, 160.0])[None, :, None, None].expand(5, 3, 64, 64)
        * torch.tensor([1, 0.85, 0.7, 0.5, 0.3])[:, None, None, None]
    )
    angle = skin_tone.skin_angle(skin.byte())
    assert (np.diff(angle) < 0).all()
    assert (
        skin_tone.tone_of(angle)[0] in ("very light", "light")
        and skin_tone.tone_of(angle)[-1] == "dark"
    )


def test_only_yellowish_colors_have_a_tone():
    "Chardon 1991: the arctangent of (L-50)/b, of skin alone. b below zero, zero; L below 50, at 50."
    L, b = (
        np.array([70, 30, 50, 70, 70, 30, 30]),
        np.array([10, 10, 10, 0, -10, 0, -10]),
    )
    angle = skin_tone._typology_angle(L, b)
    assert (
        angle[:3] == pytest.approx([63.43, -63.43, 0], abs=0.01)
        and np.isnan(angle[3:]).all()
    )
    assert (
        list(skin_tone.tone_of(angle))
        == ["very light", "dark", "brown"] + [skin_tone._NO_SKIN] * 4
    )
    assert list(skin_tone.tone_of(np.array([55, 41, 28, 10, -30, -90.0]))) == [
        "light",
        "intermediate",
        "tan",
        "brown",
        "dark",
        "dark",
    ]


@pytest.mark.parametrize(
    "rgb",
    [
        (255, 255, 255),
        (0, 0, 0),
        (128, 128, 128),
        (150, 170, 220),
        (200, 200, 199),
        (40, 40, 90),
    ],
)
def test_white_gray_and_bluish_images_are_no_skin(rgb, few_run, few_phantoms):
    x = (
        torch.tensor(rgb, dtype=torch.uint8)[None, :, None, None]
        .expand(2, 3, 64, 64)
        .contiguous()
    )
    assert list(skin_tone.tone_of(skin_tone.skin_angle(x))) == [skin_tone._NO_SKIN] * 2
    test = images(few_run, "test")
    seen = image_stats.compute_stats(
        extractors_room.load_extractor(str(few_phantoms / "vit")), test
    )
    rows = skin_tone.tone_table(
        seen,
        np.array([skin_tone._NO_SKIN] * 112),
        seen,
        skin_tone.tone_of(skin_tone.skin_angle(test.x)),
    ).set_index("tone")
    assert rows.share[skin_tone._NO_SKIN] == 1 and rows.share.sum() == 1


def test_images_of_one_color_have_a_line_in_place_of_a_curve(recwarn):
    flat = torch.full((12, 3, 32, 32), 200, dtype=torch.uint8)
    fig = color.color_figure(
        dict(
            flat=flat,
            other=torch.from_numpy(
                randomness.np_rng(0, "x").integers(
                    0, 255, (12, 3, 32, 32), dtype=np.uint8
                )
            ),
        )
    )
    assert [len(ax.lines) for ax in fig.axes[:2]] == [2, 2] and not [
        w for w in recwarn if "variance" in str(w.message)
    ]


def test_lab_of_tensors_has_its_slope_beyond_the_range_of_pictures_too():
    values = [[-0.3, 1.4, 0.02], [0.0, 0.5, 1.0]]
    rgb = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses.to_lab, rgb)


def test_ten_numbers_of_an_image_are_its_mean_its_covariance_and_its_chroma():
    g = randomness.rng(0, "pixels")
    x = torch.rand(3, 3, 16, 16, generator=g, dtype=torch.float64) * 2 - 1
    found = losses.lab_stats(x)
    pixels = color.rgb_to_lab(((x + 1) * 127.5).permute(0, 2, 3, 1).flatten(1, 2)) / 100
    for row, lab in zip(found, pixels):
        factor = torch.zeros(3, 3, dtype=torch.float64)
        factor[tuple(torch.tril_indices(3, 3))] = row[3:9]
        assert row[:3].numpy() == pytest.approx(lab.mean(0))
        cov = np.cov(lab.T, bias=True)
        assert (factor @ factor.T).numpy() == pytest.approx(cov, abs=2e-6)
        chroma = np.hypot(lab[:, 1], lab[:, 2]).mean()
        assert row[9].item() == pytest.approx(chroma, abs=1e-4)
    gray = torch.zeros(1, 3, 8, 8, requires_grad=True)
    losses.lab_stats(gray).sum().backward()
    assert gray.grad.isfinite().all(), "an even picture has no direction, and no NaN"


@pytest.mark.parametrize("spread,shift", [(1.0, 0.0), (0.5, 0.3), (2.0, -0.4)])
def test_the_energy_score_is_least_for_the_true_spread_and_squares_for_none(
    spread, shift
):
    g = randomness.rng(0, "scores")
    y = spread * torch.randn(40000, 1, generator=g) + shift
    a, b = torch.randn(2, 40000, 1, generator=g)
    tried = [0.1, 0.5, 1.0, 2.0, 4.0]
    energy = [losses.energy_score(u * a + shift, u * b + shift, y) for u in tried]
    squared = [(u * a + shift - y).pow(2).mean() for u in tried]
    assert tried[int(torch.stack(energy).argmin())] == spread
    assert tried[int(torch.stack(squared).argmin())] == 0.1
    moved = losses.energy_score(spread * a + 2, spread * b + 2, y)
    assert moved > min(energy)


def test_the_energy_score_of_equal_statistics_is_nothing_and_has_a_gradient():
    s = torch.ones(2, 10, requires_grad=True)
    score = losses.energy_score(s, s, torch.ones(2, 10))
    (slope,) = torch.autograd.grad(score, s)
    assert score.item() < 1e-3 and slope.isfinite().all()
