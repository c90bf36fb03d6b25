"A lesson of a dozen cells, with all that a lesson has: what the tests of the course's tools work on."

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from medart.core.exercises import answer_key

OPENING = """# 1. Roots

> Why a variance needs a root

**Goals.** You can scale noise. **Time.** 20 minutes to read, 25 to do, 10 to discuss.
"""
IMPORTS = """import matplotlib.pyplot as plt
import torch

from medart.core.exercises import check_answer, check_function, check_key"""
FIGURE = "plt.plot([0, 1]);"
GAP_FUNCTION = """def scale(z, var):  # (n,), scalar
    "z with a variance that is var times as large."
    ### BEGIN SOLUTION
    return z * var**0.5
    ### END SOLUTION"""
CHECK_FUNCTION = """cases = [(torch.ones(3), 4.0), (torch.arange(3.0), 0.25)]
check_function(scale, lambda z, var: z * var**0.5, cases, "mind the root")"""
GAP = """answer = ...
### BEGIN SOLUTION
answer = {}
### END SOLUTION"""
CHECK = 'check_answer(answer, 2, "the square of 2 is 4")'
CHECK_KEY = 'check_key(answer, "{}", "a, b or c")'
OPEN = """### BEGIN SOLUTION
Variances of independent noise add up, roots of them do not."""
DOT = (  # a PNG of one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAA"
    "AABJRU5ErkJggg=="
)


def small_lesson():
    "The lesson, solved, with the output of its figure."
    picture = new_output("display_data", {"image/png": DOT})
    word = new_output("execute_result", {"text/plain": "'Right.'"})
    cells = [
        new_markdown_cell(OPENING, id="opening"),
        new_code_cell(IMPORTS, id="imports"),
        new_code_cell(FIGURE, id="figure", outputs=[picture]),
        new_markdown_cell("## Scaled noise\n\n$z\\sqrt{v}$", id="heading"),
        new_markdown_cell("More to read, not for a slide.", id="prose"),
        new_markdown_cell("**Exercise 1.** Scale.", id="task1"),
        new_code_cell(GAP_FUNCTION, id="gap1"),
        new_code_cell(CHECK_FUNCTION, id="check1", outputs=[word]),
        new_markdown_cell("**Exercise 2.** The root of 4?", id="task2"),
        new_code_cell(GAP.format(2), id="gap2"),
        new_code_cell(CHECK, id="check2", outputs=[word]),
        new_markdown_cell("**Exercise 3.** Which one?", id="task3"),
        new_code_cell(GAP.format('"b"'), id="gap3"),
        new_code_cell(
            CHECK_KEY.format(answer_key("b", salt="5a17")), id="check3", outputs=[word]
        ),
        new_markdown_cell("**Open question.** What adds up?", id="question"),
        new_markdown_cell(OPEN, id="open"),
        new_markdown_cell("Ask who squared first.", id="notes"),
    ]
    cells[-1].metadata["slideshow"] = dict(slide_type="notes")
    kernel = dict(name="python3", display_name="python3", language="python")
    return new_notebook(cells=cells, metadata=dict(kernelspec=kernel))


def write_small_lesson(root):
    "Put it where lessons lie below a root folder."
    path = root / "nbs/solutions/1_roots.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(small_lesson(), path)
    return path
