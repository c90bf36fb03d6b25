"""The course: students' notebooks in step with the solved ones, exercises that can be solved and are not solved yet.

A solved lesson and the students' lesson are executed side by side, the latter as nbgrader does it, where a blank is an
error. What both share runs once.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from nbgrader.api import Gradebook
from nbgrader.apps import NbGraderAPI
from nbgrader.nbgraderformat import MetadataValidator
from small_lesson import write_small_lesson
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("kernels")  # imported already
sys.path.insert(0, str(ROOT / "tools"))

import build_course  # noqa: E402

LESSONS = build_course.lessons(ROOT)
YOUR_TURN = "WrongAnswer('Your turn.')"
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def cells_of(path, part=None):
    "Cells of a notebook: all of them, or those of one role."
    cells = build_course.mark(build_course.read(path)).cells
    return [cell for cell in cells if part in (None, build_course.role(cell))]


@pytest.fixture
def small(tmp_path):
    "A repository with one small lesson; its solved version."
    return write_small_lesson(tmp_path / "repository")


@pytest.fixture
def build(small):
    "Calls the tool in that repository."
    root = small.parent.parent.parent
    return lambda *arguments: build_course.main([*arguments, "--root", str(root)])


# The tool, on a small lesson


def test_gaps_are_emptied_and_checks_stay(small, build):
    build("mark")
    build()
    student = small.parent.parent / "course" / small.name
    before = {cell.id: cell for cell in build_course.read(small).cells}
    after = {cell.id: cell for cell in build_course.read(student).cells}
    assert list(before) == list(after)
    assert "SOLUTION" not in student.read_text("utf-8")
    assert after["gap1"].source.endswith("# your turn")
    assert after["gap2"].source == "answer = ...\n# your turn"
    assert before["open"].source.startswith("Variances")  # the marker is gone
    assert after["open"].source == "YOUR ANSWER HERE"
    assert after["figure"].outputs and not after["check1"].outputs
    changed = {name for name in before if before[name].source != after[name].source}
    assert changed == {"opening", "gap1", "gap2", "gap3", "open"}


def test_points_add_up_to_ten(small, build):
    build("mark")
    notebook = build_course.read(small)
    MetadataValidator().validate_nb(notebook)
    marks = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
    assert sum(mark.get("points", 0) for mark in marks) == 10


def test_what_is_not_in_step_is_named(small, build):
    with pytest.raises(SystemExit, match="nbs/solutions/1_roots.ipynb"):
        build("mark", "--check")
    build("mark")
    build("mark", "--check")
    with pytest.raises(SystemExit, match="nbs/course/1_roots.ipynb"):
        build("--check")
    build()
    build("--check")
    small.write_text(small.read_text("utf-8").replace("the root", "the square root"))
    with pytest.raises(SystemExit, match="nbs/course/1_roots.ipynb"):
        build("--check")


def test_places_on_slides(small, build):
    build("mark")
    notebook = build_course.without_solutions(build_course.read(small))
    slides = build_course.for_slides(notebook)
    kinds = {cell.id: cell.metadata["slideshow"]["slide_type"] for cell in slides.cells}
    starts = "opening heading task1 task2 task3 question".split()
    assert [name for name in kinds if kinds[name] == "slide"] == starts
    on_slide = [name for name in kinds if kinds[name] == "-"]
    assert on_slide == ["figure", "gap1", "gap2", "gap3"]
    assert kinds["notes"] == "notes"


@pytest.mark.filterwarnings("ignore:Object of type <Submitted")
def test_nbgrader_grades_solved_and_blank(small, build, tmp_path, monkeypatch):
    build("mark")
    build()
    monkeypatch.chdir(tmp_path)
    for version, student in (("solutions", "ada"), ("course", "blank")):
        target = tmp_path / "submitted" / student / "roots"
        target.mkdir(parents=True)
        (target / small.name).write_bytes(
            (small.parent.parent / version / small.name).read_bytes()
        )
    source = tmp_path / "source" / "roots"
    source.mkdir(parents=True)
    (source / small.name).write_bytes(small.read_bytes())
    config = Config(build_course.nbgrader_config())
    config.CourseDirectory.root = str(tmp_path)
    api = NbGraderAPI(config=config)
    done = api.generate_assignment("roots")
    assert done["success"], done
    for student in ("ada", "blank"):
        done = api.autograde("roots", student)
        assert done["success"], done
    with Gradebook(f"sqlite:///{tmp_path}/gradebook.db") as grades:
        found = {
            student: {
                grade.name: grade.auto_score
                for grade in grades.find_submission_notebook(
                    small.stem, "roots", student
                ).grades
            }
            for student in ("ada", "blank")
        }
    checks = dict.fromkeys(("check1", "check2", "check3"), 2)
    assert found["ada"] == {**checks, "open": None}  # a person reads that one
    assert found["blank"] == {**dict.fromkeys(checks, 0), "open": 0}


# The lessons


def test_there_are_five_lessons():
    assert [path.stem[0] for path in LESSONS] == list("12345")


def test_the_course_is_in_step():
    build_course.main(["mark", "--check"])
    build_course.main(["--check"])


@every_lesson
def test_each_lesson_has_its_parts(path):
    cells = cells_of(path)
    opening = " ".join(cell.source for cell in cells[:3]).lower()
    assert "you can" in opening and "minutes" in opening
    assert any(map(build_course.shows_figure, cells[:6])), "a figure comes first"
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for heading in ("To discuss", "Where this stands in the paper", "Further reading"):
        assert heading in text


@every_lesson
def test_exercises(path):
    cells = cells_of(path)
    parts = [build_course.role(cell) for cell in cells]
    assert parts.count("check") >= 3 and parts.count("open") == 1
    for part, after in zip(parts, parts[1:]):
        assert part != "gap" or after == "check", "a check follows its gap"
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "TODO" not in code
    assert max(map(len, code.splitlines())) <= 88


@every_lesson
def test_solutions_pass_and_blanks_fail_their_checks(path, run_notebook, tmp_path):
    "Solved, every check is right; blank, every check says so; nothing else is an error in either."
    report = tmp_path / "report.json"
    run_notebook(path, report=report, blank=ROOT / build_course.COURSE / path.name)
    solved, blank = json.loads(report.read_text("utf-8"))
    checks = {cell.id for cell in cells_of(path, "check")}
    assert {name: solved[name] for name in checks} == dict.fromkeys(checks, "'Right.'")
    assert {name: blank[name] for name in checks} == dict.fromkeys(checks, YOUR_TURN)
    others = [*solved.values(), *(blank[name] for name in blank if name not in checks)]
    assert not [each for each in others if re.match(r"\w+(Error|Answer|Exit)\(", each)]


def test_slides_need_no_network(tmp_path):
    build_course.build_slides(ROOT, tmp_path)
    for path in LESSONS:
        html = (tmp_path / f"{path.stem}.html").read_text("utf-8")
        loaded = re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)="([^"]+)""", html)
        files = [url for url in loaded if not url.startswith("data:")]
        assert files and all((tmp_path / url).is_file() for url in files), files
        assert html.count("<section") > 10
        assert "BEGIN SOLUTION" not in html and "image/png;base64" in html
    assert len(list(tmp_path.glob("*.html"))) == len(LESSONS)
