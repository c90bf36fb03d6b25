"Notebook cells, papermill and command lines: what they say, and what they must not."

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from medart.evaluation.prompt_figures import prompts_figure
from medart.recipes.parameters import method_recipe_from, recipe_from, recipe_from_line
from medart.recipes.values import seeds_of
from medart.training.sampling_runs import generate_in
from medart.workflows.reproduce import reproduce

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "line, says",
    [
        (["--epoch", "2"], "Did you mean 'epochs'"),
        (["--lr=-1"], "lr=-1"),
        (["--LR", "1"], "LR"),
    ],
)
def test_a_wrong_option_of_a_command_line_is_named(line, says):
    with pytest.raises(ValueError, match=says):
        recipe_from_line(
            "medart.training.launch",
            "",
            ["--dataset", "skin", "--scale", "tiny", *line],
        )


@pytest.mark.parametrize("line", [["--lr", "1", "2"], ["extra"], ["--lr"], ["-x"]])
def test_a_word_without_a_setting_ends_a_command_in_two_lines(line, capsys):
    with pytest.raises(SystemExit):
        recipe_from_line(
            "medart.training.launch",
            "",
            ["--dataset", "skin", "--scale", "tiny", *line],
        )
    said = capsys.readouterr().err
    assert line[-1] in said and len(said.strip().splitlines()) == 2


@pytest.mark.parametrize(
    "told, seeds",
    [
        ("0,1,2", [0, 1, 2]),
        ("0 1 2", [0, 1, 2]),
        (" 0, 1 ", [0, 1]),
        (3, [3]),
        ([1, 2], [1, 2]),
        ((0,), [0]),
        ("7", [7]),
    ],
)
def test_seeds_are_read(told, seeds):
    assert seeds_of(told) == seeds


@pytest.mark.parametrize(
    "told",
    [
        "one two",
        "0-3",
        "",
        " ",
        [],
        "1.0",
        1.0,
        "-1",
        "0 00",
        "1 1",
        None,
        True,
        "9" * 30,
        "0;1",
    ],
)
def test_seeds_that_are_none_are_refused(told):
    with pytest.raises(ValueError, match="seeds"):
        seeds_of(told)


PARAMETERS = (
    'dataset = "skin"  # which\nscale = "tiny"\nseed = 3\ndata = ""\nrank = 8\n'
)


def asked(*cells, extra=(), **ns):
    "The recipe of a notebook whose cells were executed in this order."
    space = dict(ns)
    for cell in cells:
        try:
            exec(cell, space)
        except Exception:  # noqa: BLE001, as in a kernel: a cell that fails does not end the session
            continue
    return recipe_from(
        space | {"In": ["", *cells, "r = recipe_from(globals())"]}, *extra
    )


def test_other_cells_have_no_influence():
    plain = asked(PARAMETERS)
    others = [
        "size = (4, 4)[0]\nrank = 3\nclip = 0",
        "seed = 5",
        "data = [1]\nscale = 2",
        "lr: float = .5",
        "# a note",
        "for epochs in range(3): pass",
        "def model(): pass",
        "import pandas as vlm",
        "1 +",
    ]
    for other in others:
        assert asked(PARAMETERS, other) == asked(other, PARAMETERS) == plain


def test_the_parameters_cell_counts_as_it_was_last_run():
    edited = PARAMETERS.replace("seed = 3", "seed = 4").replace("rank = 8\n", "")
    assert asked(PARAMETERS, "rank = 3", PARAMETERS) == asked(PARAMETERS)
    assert asked(PARAMETERS, edited).seed == 4
    assert (
        asked(PARAMETERS + "rank = 16\n", edited).rank == 8
    )  # a line that was deleted is gone
    assert asked(edited, PARAMETERS).seed == 3
    assert asked(PARAMETERS + "epochs = 2*2\nlr = epochs/1000").lr == 0.004


def test_papermills_cell_lies_over_the_parameters():
    injected = "# Parameters\nseed = 9\nlr = 0.01\n"
    assert (asked(PARAMETERS, injected).seed, asked(PARAMETERS, injected).lr) == (
        9,
        0.01,
    )
    assert asked(PARAMETERS, injected, "seed = 1").seed == 9
    assert asked(PARAMETERS, injected, PARAMETERS).seed == 3  # run by hand afterwards
    assert asked(PARAMETERS, "# Parameters of my plot\nrank = 3").rank == 8


@pytest.mark.parametrize(
    "cells",
    [
        [PARAMETERS + "intervall = 10"],
        [PARAMETERS, "# Parameters\nintervall = 10"],
        [PARAMETERS, "", PARAMETERS + "intervall = 2*5"],
    ],
)
def test_a_misspelt_parameter_is_refused(cells):
    with pytest.raises(
        ValueError, match="'intervall' is unknown.*Did you mean 'interval'"
    ):
        asked(*cells)


def test_without_a_parameters_cell_nothing_is_guessed():
    with pytest.raises(ValueError, match="first cell"):
        asked("seed = 3", dataset="skin", scale="tiny")


def test_rows_take_the_cells_alone():
    space = dict(
        In=["", 'datasets = "skin"\nscale = "tiny"\nepochs = 2', "interval = 7"],
        interval=7,
    )
    made = [
        method_recipe_from(space, "datasets", dataset="skin", method=m)
        for m in ("medart", "base")
    ]
    assert [(r.epochs, r.interval) for r in made] == [(2.0, 50), (0.0, 0)]


KERNEL = 'print({k: getattr(r, k) for k in ("interval", "size", "seed", "rank", "clip", "scale")})'


def test_parameters_in_a_kernel(tmp_path):
    "As JupyterLab runs them: one kernel, cells of the reader's own, a cell run twice."
    cells = nbformat.read(ROOT / "nbs" / "train.ipynb", 4).cells
    first = next(c for c in cells if "parameters" in c.metadata.get("tags", []))
    first.source = first.source.replace('scale = "auto"', 'scale = "tiny"')
    again = nbformat.v4.new_code_cell(first.source.replace("seed = 0", "seed = 5"))
    look = (
        'from medart.recipes.parameters import recipe_from\nr = recipe_from(globals(), "check")\n'
        + KERNEL
    )
    mine = nbformat.v4.new_code_cell("size = (4, 4)[0]\nrank = 3\nclip = 0\nseed = 8")
    shown = [nbformat.v4.new_code_cell(look), nbformat.v4.new_code_cell(look)]
    nb = nbformat.v4.new_notebook(
        cells=[mine, first, mine.copy(), shown[0], again, mine.copy(), shown[1]]
    )
    for i, cell in enumerate(nb.cells):
        cell.id = f"cell-{i}"
    NotebookClient(
        nb,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    seeds = [
        ast.literal_eval(c.outputs[0].text)["seed"] for c in (nb.cells[3], nb.cells[6])
    ]
    assert seeds == [0, 5]
    assert ast.literal_eval(nb.cells[6].outputs[0].text) == dict(
        interval=50, size=64, seed=5, rank=8, clip=1.0, scale="tiny"
    )


@pytest.mark.parametrize("told", ["two", 1.5, -1, True, None, "", [2], b"2"])
def test_counts_are_whole_numbers(told):
    for what, ask in (
        ("workers", lambda: reproduce([], workers=told)),
        ("processes", lambda: generate_in(told, None)),
        ("prompts", lambda: prompts_figure([], told)),
    ):
        with pytest.raises(ValueError, match=f"{what}="):
            ask()
