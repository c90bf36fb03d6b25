"The documentation site: built from the stored notebooks, complete, searchable, without a server."

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site():
    "The site's folder, and what its builder said."
    done = subprocess.run(
        [sys.executable, "tools/build_docs.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build/docs/_build/html", done.stdout + done.stderr


def test_every_notebook_has_a_page(site):
    notebooks = (ROOT / "nbs").rglob("*.ipynb")
    names = [
        path.relative_to(ROOT).with_suffix(".html")
        for path in notebooks
        if path.stem != "index" and ".ipynb_checkpoints" not in path.parts
    ]
    assert not [name for name in names if not (site[0] / name).is_file()]


def test_the_builder_has_nothing_to_say_of_a_page(site):
    assert "WARNING" not in site[1], site[1]


def test_it_can_be_searched_and_needs_no_server(site):
    index = (site[0] / "searchindex.js").read_text(encoding="utf-8")
    assert "hldf" in index
    elsewhere = re.compile(r"""<(?:script|link)[^>]+(?:src|href)="(https?:[^"]+)""")
    found = {
        (path.name, url)
        for path in site[0].rglob("*.html")
        for url in elsewhere.findall(path.read_text(encoding="utf-8"))
    }
    assert not found
