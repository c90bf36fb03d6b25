"The rules of CONTRIBUTING.md, checked: generated files in step, run notebooks thin, imports in order, sizes small."

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from papermill import inspect_notebook

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up: a package imports from those before it and from itself.
PACKAGES = "core recipes data method training evaluation bundled workflows".split()
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
NUMBERED = [path for path in NOTEBOOKS if path.parent.name in PACKAGES]
RUNS = [
    path for path in NOTEBOOKS if path.parent.name == "nbs" and path.stem != "index"
]
MODULES = sorted(
    path for path in (ROOT / "medart").glob("*/*.py") if not path.stem.startswith("_")
)
LINES, NAMES = 400, 15  # of a module, and public names in it
MB = 2**20


def room_of(path):
    "`method.hldf` of a module or of the notebook that defines it."
    name = re.sub(r"^\d\d_", "", path.stem)
    return f"{path.parent.name}.{name}"


LIBRARY = {
    room_of(path): (PACKAGES.index(path.parent.name), int(path.stem[:2]))
    for path in NUMBERED
}


def code_cells(notebook):
    "Source and tags of each code cell, magics and shell lines blanked out so that the rest parses."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            source = (
                ""
                if source.startswith("%%")
                else re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
            )
            yield source, cell["metadata"].get("tags", [])


def sources(path):
    "Python source of a module, or of each code cell of a notebook."
    if path.suffix == ".ipynb":
        return [source for source, _ in code_cells(path)]
    return [path.read_text(encoding="utf-8")]


def imported(path):
    "Dotted names that a file imports, those of `from .x import y` as medart.x.y."
    for node in (
        node for source in sources(path) for node in ast.walk(ast.parse(source))
    ):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(
                filter(None, ["medart" if node.level else "", node.module])
            )
            yield from (f"{module}.{alias.name}" for alias in node.names)


def stem(path):
    return path.stem


def test_there_are_notebooks_to_check():
    assert NUMBERED, "no numbered notebook in nbs/"
    assert RUNS, "no run notebook in nbs/"


# Generated files


@pytest.fixture(scope="module")
def copy(files, tmp_path_factory):
    "A copy of the repository's files, to run generators in."
    folder = tmp_path_factory.mktemp("copy")
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    return folder


def snapshot(folder):
    "The bytes of every file that git would not ignore."
    kept = (
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc" and path.name != "_modidx.py"
    )
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.parametrize(
    "command", ["nbdev-export", "nbdev-clean", "python tools/build_readme.py"]
)
def test_generated_files_are_in_step(command, copy):
    before = snapshot(copy)
    done = subprocess.run(command.split(), cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = snapshot(copy)
    changed = sorted(
        name for name in before | after if before.get(name) != after.get(name)
    )
    assert not changed, f"`{command}` changes these files: run it and commit them"


def test_each_module_has_its_notebook():
    assert {room_of(path) for path in MODULES} == set(LIBRARY)


def test_packages_hold_numbered_notebooks_alone():
    assert not [path for path in NUMBERED if not re.match(r"\d\d_", path.stem)]
    numbers = [LIBRARY[room_of(path)] for path in NUMBERED]
    assert len(numbers) == len(set(numbers)), "two notebooks have one number"


@pytest.mark.parametrize("path", MODULES, ids=room_of)
def test_modules_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES, "one job a module: find another room"
    listed = next(
        ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    )
    assert len(listed) <= NAMES, "names that nobody imports are private"


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"""(?:\]\(|(?:src|href)=")(?![a-z]+:|#)([^\s")#]+)""", text)
    assert not [target for target in targets if not (ROOT / target).exists()]


@pytest.mark.parametrize("path", NUMBERED, ids=room_of)
def test_no_line_of_code_is_wider_than_a_page(path):
    lines = [line for source in sources(path) for line in source.splitlines()]
    assert not [line for line in lines if len(line) > 88]


# Run notebooks


@pytest.mark.parametrize("run", RUNS, ids=stem)
def test_run_notebook_has_plain_parameters(run):
    cells = [source for source, tags in code_cells(run) if "parameters" in tags]
    assert len(cells) == 1, "a run notebook has exactly one cell tagged `parameters`"
    tokens = tokenize.generate_tokens(io.StringIO(cells[0]).readline)
    commented = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    for statement in ast.parse(cells[0]).body:
        assert isinstance(statement, ast.Assign) and isinstance(
            statement.targets[0], ast.Name
        ), ast.unparse(statement)
        ast.literal_eval(statement.value)  # raises where the value is not a literal
        assert statement.end_lineno in commented, (
            f"no comment beside: {ast.unparse(statement)}"
        )
    names = {statement.targets[0].id for statement in ast.parse(cells[0]).body}
    assert set(inspect_notebook(str(run))) == names, (
        "papermill does not see every parameter"
    )


@pytest.mark.parametrize("run", RUNS, ids=stem)
def test_run_notebook_defines_nothing(run):
    for source, _ in code_cells(run):
        defined = [
            node.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ]
        assert not defined, "definitions belong in a numbered notebook"


# Imports


def rooms_of(path):
    "Rooms of the package that a file imports from."
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "medart" and len(parts) > 2:
            yield ".".join(parts[1:3])


@pytest.mark.parametrize("path", NUMBERED, ids=room_of)
def test_arrows_point_down(path):
    own = room_of(path)
    used = set(rooms_of(path)) - {own}
    assert not used - set(LIBRARY), "there are no such modules"
    assert not [room for room in used if LIBRARY[room] >= LIBRARY[own]]


@pytest.mark.parametrize("path", MODULES + NOTEBOOKS, ids=room_of)
def test_nothing_imports_a_run_notebook(path):
    runs = set(map(stem, RUNS))
    first = {name.split(".")[0] for name in imported(path)}
    assert not first & (runs | {"nbs"})
    assert not any(
        "%run" in line for line in path.read_text(encoding="utf-8").splitlines()
    )


def test_no_module_leans_on_a_notebook_global():
    done = subprocess.run(
        ["ruff", "check", "--output-format=concise", "medart"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


IN_ORDER = """
import importlib, sys
there = {"medart"} | {f"medart.{name.split('.')[0]}" for name in sys.argv[1:]}
for name in sys.argv[1:]:
    importlib.import_module(f"medart.{name}")
    there.add(f"medart.{name}")
    found = {module for module in sys.modules if module.split(".")[0] == "medart"}
    print(name, *sorted(found - there), flush=True)
    there |= found
"""


def test_each_module_imports_with_no_other_than_those_it_names(tmp_path):
    "From the bottom up each adds itself alone: all it needs was there, so nothing that comes later is needed."
    names = sorted(map(room_of, MODULES), key=LIBRARY.get)
    done = subprocess.run(
        [sys.executable, "-c", IN_ORDER, *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == names, done.stderr


# What is committed


def test_sizes(files):
    size = {path: (ROOT / path).stat().st_size for path in files}
    tiny = sum(n for path, n in size.items() if path.parts[:2] == ("data", "tiny"))
    notebooks = {
        path: n
        for path, n in size.items()
        if path.parts[0] == "nbs" and path.suffix == ".ipynb"
    }
    course = sum(
        n for path, n in notebooks.items() if path.parts[1] in ("course", "solutions")
    )
    assert sum(size.values()) < 48 * MB
    assert tiny < 32 * MB
    runs = sum(n for path, n in notebooks.items() if len(path.parts) == 2)
    assert course < 8 * MB
    assert runs < 4 * MB
    assert sum(notebooks.values()) - course - runs < 12 * MB


def test_no_local_paths(files):
    "Absolute paths of somebody's machine, in code or in a cell's output."
    local = re.compile(
        r"(?<![\w.~}$+-])/(?:work|root|home/\w+|Users/\w+|tmp/ipykernel_\d+)/"
    )
    found = {}
    for path in files:
        data = (ROOT / path).read_bytes()
        if b"\0" not in data[:8192]:
            found[str(path)] = local.findall(data.decode("utf-8", errors="replace"))
    assert not {path: hits for path, hits in found.items() if hits}


# How tests run


def test_beside_other_workers_a_test_has_one_thread():
    import torch

    assert "PYTEST_XDIST_WORKER" not in os.environ or torch.get_num_threads() == 1
