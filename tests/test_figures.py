"Grids of images and drawings of boxes: text that can be read, and what is refused."

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from medart.core.figures import draw_boxes, image_grid

CAPTION = (
    "A dermoscopic image of melanoma shows an asymmetric dark brown irregular patch "
    "with a jagged border. It has a blue veil. The background is tan skin."
)


def captions_of(fig):
    return [text for ax in fig.axes for text in ax.texts if text.get_text()]


@pytest.mark.parametrize("cell", [0.8, 1.1, 1.4, 2.2])
def test_captions_are_legible_and_as_wide_as_their_images_cell(cell):
    fig = image_grid([np.zeros((4, 4, 3))] * 4, [CAPTION] * 4, ncol=4, cell=cell)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    shown = captions_of(fig)
    assert len(shown) == 4
    for text in shown:
        width = text.get_window_extent(canvas.get_renderer()).width / fig.dpi
        assert text.get_fontsize() >= 8 and width <= cell


def test_names_break_at_underscores_and_longer_words_where_they_must():
    names = ["seborrheic_keratosis", "squamous_cell_carcinoma in_situ", "x" * 40]
    fig = image_grid([np.zeros((4, 4, 3))] * 3, names, ncol=3, cell=1.0)
    first, second, third = [text.get_text() for text in captions_of(fig)]
    assert first == "seborrheic_\nkeratosis"
    assert second == "squamous_\ncell_\ncarcinoma in_\nsitu"
    assert third == "\n".join(["x" * 13] * 3 + ["x"])


def test_a_caption_beyond_its_lines_ends_in_an_ellipsis():
    fig = image_grid([np.zeros((4, 4, 3))] * 2, [CAPTION, "short"], ncol=2, lines=3)
    long, short = [text.get_text() for text in captions_of(fig)]
    assert long.count("\n") == 2 and long.endswith("…") and short == "short"


def test_lines_are_never_wider_than_asked():
    fig = image_grid([np.zeros((4, 4, 3))], [CAPTION], ncol=1, cell=4, width=12)
    (text,) = captions_of(fig)
    assert max(map(len, text.get_text().splitlines())) <= 12


def test_a_grid_is_drawn_into_a_given_part_of_a_figure():
    whole = plt.figure(figsize=(6, 2), layout="constrained")
    left, right = whole.subfigures(1, 2)
    images = [np.zeros((4, 4, 3))] * 3
    fig = image_grid(images, [CAPTION] * 3, ncol=3, rows=["drawn"], fig=left)
    assert fig is left and not right.axes and len(left.axes) == 3
    lines = captions_of(left)[0].get_text().splitlines()
    assert max(map(len, lines)) < 16  # a cell is an inch wide
    assert tuple(whole.get_size_inches()) == (6, 2)
    plt.close(whole)


@pytest.mark.parametrize(
    ("arrows", "colors"),
    [([("a", "c")], {}), ([("c", "a", "why")], {}), ([], {"c": "C0"})],
)
def test_a_box_that_is_not_there_is_refused_before_anything_is_drawn(arrows, colors):
    fig, ax = plt.subplots()
    with pytest.raises(ValueError, match="no box 'c'. Boxes: a, b"):
        draw_boxes(ax, {"a": (0, 0), "b": (1, 0)}, arrows, colors)
    assert not ax.texts
    draw_boxes(ax, {"a": (0, 0), "b": (1, 0)}, [("a", "b", "why")])
    assert [text.get_text() for text in ax.texts] == ["a", "b", "", "why"]
    plt.close(fig)
