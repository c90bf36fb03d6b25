"Folders, names of files, file modes and memory: one meaning on every system."

import os
import stat
import sys
from pathlib import Path

import pytest

from medart.core import progress
from medart.core.files import save_pretrained
from medart.core.locations import locate
from medart.core.paths import data_dir, file_word, outputs_dir, root, short_name
from medart.core.weight_files import weights_key
from medart.recipes.recipe import recipe

ROOT = Path(__file__).resolve().parent.parent


def project(folder, text):
    "A folder with a settings.ini and notebooks, as nbdev lays them out."
    (folder / "nbs").mkdir(parents=True)
    (folder / "settings.ini").write_text(text)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "[DEFAULT]\n",
        "[DEFAULT]\nlib_name = course\n",
        "lib_name = medart2\n",
        "# lib_name = medart\n",
        "[DEFAULT]\nlib_name = %(lib)s\nlib_name = twice\n",
        "\x00\xff",
    ],
)
def test_another_projects_settings_do_not_count(tmp_path, monkeypatch, text):
    other = project(tmp_path / "other", text)
    monkeypatch.chdir(other / "nbs")
    assert root() == ROOT


def test_the_nearest_clone_counts(tmp_path, monkeypatch):
    outer = project(tmp_path / "outer", "[DEFAULT]\nlib_name = medart\n")
    inner = project(outer / "copies" / "inner", "[DEFAULT]\nlib_name=medart\n")
    monkeypatch.chdir(inner / "nbs")
    assert root() == inner
    monkeypatch.chdir(outer / "copies")
    assert root() == outer


def test_a_folder_named_settings_ini_does_not_count(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").mkdir()
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert root() == ROOT


@pytest.mark.parametrize(
    "variable, folder", [("MEDART_DATA", data_dir), ("MEDART_OUTPUTS", outputs_dir)]
)
def test_folders_from_the_environment(tmp_path, monkeypatch, variable, folder):
    plain = folder is data_dir and ROOT / "data" or ROOT / "outputs"
    monkeypatch.setenv("HOME", str(tmp_path))
    cases = {
        "": plain,
        "  ": plain,
        "~": tmp_path,
        "~/deep/er": tmp_path / "deep/er",
        "rel/a": ROOT / "rel/a",
        str(tmp_path / "x"): tmp_path / "x",
    }
    for text, wanted in cases.items():
        monkeypatch.setenv(variable, text)
        assert folder() == wanted
        monkeypatch.chdir(ROOT / "nbs")  # as JupyterLab does: the folder stays the same
        assert folder() == wanted
        monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("tail", ["", "/below", "/below/deeper"])
def test_a_file_in_place_of_a_folder_is_refused(tmp_path, monkeypatch, tail):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MEDART_OUTPUTS", f"{tmp_path}/file{tail}")
    with pytest.raises(NotADirectoryError, match="MEDART_OUTPUTS.*is a file"):
        outputs_dir()


def test_an_unknown_home_is_refused(monkeypatch):
    monkeypatch.setenv("MEDART_DATA", "~nobody-of-this-name/images")
    with pytest.raises(ValueError, match="MEDART_DATA"):
        data_dir()


WORDS = [
    "a",
    "A",
    "a-b",
    "a/b",
    "a:b",
    "a<b",
    "a b",
    "a\\b",
    "ä",
    "a\u0308",
    "",
    ".",
    "..",
    "a.",
    "x" * 300,
    "x" * 301,
    "con/",
    "None",
    "1",
    "True",
    "a~b",
    "a+b=c",
]


def test_words_for_file_names_tell_all_texts_apart():
    made = [file_word(text) for text in WORDS]
    assert len({word.casefold() for word in made}) == len(WORDS)
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._,-~")
    assert all(word and set(word) <= allowed and len(word) < 60 for word in made)


def test_long_names_are_cut_and_stay_apart():
    long = "+lr=0.1" * 40
    assert len(short_name(long)) == 120
    assert short_name(long + "a") != short_name(long + "b") != short_name(long)
    assert short_name("+lr=0.1") == "+lr=0.1"


@pytest.mark.parametrize(
    "umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)]
)
def test_saved_weights_have_the_umasks_mode(tmp_path, umask, mode):
    from transformers import T5Config, T5EncoderModel

    small = T5EncoderModel(
        T5Config(vocab_size=8, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    )
    before = os.umask(umask)
    try:
        save_pretrained(small, tmp_path / "t5")
    finally:
        os.umask(before)
    modes = {
        f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "t5").iterdir()
    }
    assert set(modes.values()) == {mode}, modes


def test_nothing_is_saved_but_through_the_helper():
    "The libraries' own save_file and save_pretrained write for the owner alone."
    for module in sorted((ROOT / "medart").glob("*.py")):
        text = module.read_text(encoding="utf-8")
        own = 1 if module.stem == "core" else 0
        assert text.count(".save_pretrained(") == own, module.name
        assert "save_file(" not in text, module.name


def test_a_folder_in_the_repository_is_not_taken_for_an_id(tmp_path, monkeypatch):
    repository = project(tmp_path / "clone", "lib_name = medart\n")
    (repository / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(repository)
    monkeypatch.setenv("MEDART_DATA", str(ROOT / "data"))
    r = recipe("skin", scale="tiny", vlm="org/name")
    assert r.vlm == "./org/name" and Path(locate(r.vlm)) == repository / "org" / "name"
    monkeypatch.chdir(repository / "nbs")
    assert recipe("skin", scale="tiny", vlm="../org/name") == r


def test_weights_are_known_by_their_contents(tmp_path):
    def key(**files):
        for old in tmp_path.rglob("*.*"):
            old.unlink()
        for file, data in files.items():
            (tmp_path / file.replace("__", ".")).write_bytes(data)
        return weights_key(str(tmp_path))

    large = 65 << 20
    kinds = [
        dict(model__safetensors=b"a" * large),
        dict(model__safetensors=b"a" * (large - 1) + b"b"),
        dict(pytorch_model__bin=b"a"),
        dict(pytorch_model__bin=b"b"),
        dict(model__pt=b"a"),
        dict(config__json=b"{}"),
        dict(vocab__txt=b"a"),
        dict(model__safetensors=b"a"),
        {},
    ]
    keys = [key(**files) for files in kinds]
    assert len(set(keys)) == len(kinds)
    assert key(**kinds[2]) == keys[2]
    (tmp_path / "README.md").write_text("A note.")
    assert weights_key(str(tmp_path)) == keys[2]
    for k in (
        1,
        2,
    ):  # the same size, written over within a moment, and with the old times put back
        (tmp_path / "pytorch_model.bin").write_bytes(b"%d" % k)
        os.utime(tmp_path / "pytorch_model.bin", (1, 1))
        keys.append(weights_key(str(tmp_path)))
    assert keys[-1] != keys[-2]


def test_peak_memory_is_counted_in_bytes(monkeypatch):
    import resource

    mine = progress.peak_rss()
    assert 5e7 < mine < 1e12
    monkeypatch.setattr(sys, "platform", "darwin")
    assert progress.peak_rss() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
