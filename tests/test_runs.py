"The run notebooks, as papermill runs them: from the repository's root and from their own folder, small, and with wrong parameters."

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.usefixtures("kernels", "ready_python")  # imported already
SMALL = dict(scale="tiny", epochs=0.05, interval=2, solver_steps=2, gen_steps=2)


ORDINARY = {
    "JUPYTER_PATH": str(Path(sys.prefix, "share", "jupyter")),
    "READY_PYTHON": "",
}


def papermill(name, out, cwd=ROOT, kernels=(), **parameters):
    "Run a notebook; `ORDINARY`, just as a user's shell would."
    yaml = "\n".join(f"{k}: {json.dumps(v)}" for k, v in parameters.items())
    env = {
        k: v for k, v in os.environ.items() if k != "MPLBACKEND"
    }  # the kernel shows figures by its own backend
    env.update(kernels)
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "papermill",
            str(ROOT / "nbs" / f"{name}.ipynb"),
            str(out),
            "-y",
            yaml,
            "--no-progress-bar",
        ],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "dataset,cwd,images",
    [("skin", ROOT, 96), ("kvasir", ROOT / "nbs", 48)],
    ids=["skin from the root", "kvasir from nbs"],
)
def test_train_generate_evaluate(folders, tmp_path, dataset, cwd, images):
    asked = SMALL | dict(dataset=dataset, gen_count=images)
    for name in ("train", "generate", "evaluate"):
        kernels = ORDINARY if (dataset, name) == ("skin", "train") else {}
        out = tmp_path / f"{name}.ipynb"
        done = papermill(name, out, cwd, kernels, **asked)
        assert done.returncode == 0, done.stderr[-3000:]
        nb = nbformat.read(tmp_path / f"{name}.ipynb", 4)
        assert any(
            "image/png" in o.get("data", {})
            for c in nb.cells
            for o in c.get("outputs", [])
        ), f"{name} shows no figure"
    run = next((folders[1] / f"{dataset}-tiny").iterdir())
    made = {f.name for f in run.rglob("*") if f.is_file()}
    assert {
        "config.json",
        "losses.csv",
        "timing.csv",
        "losses.png",
        "colors.png",
        "before-after.png",
        "metadata.csv",
        "adapter_model.safetensors",
    } <= made
    for start, end in (("real-beside-generated", ".png"), ("metrics", ".json")):
        assert any(n.startswith(start) and n.endswith(end) for n in made)
    assert len(list(run.rglob("samples*/*/*.png"))) == images


@pytest.mark.parametrize(
    "wrong,says",
    [
        (dict(datset="skin"), "dataset"),
        (dict(dataset="xray"), "kvasir, skin"),
        (dict(method="medart9"), "medart_k5"),
        (dict(rank="eight"), "takes int"),
    ],
)
def test_wrong_parameters_stop_the_run(folders, tmp_path, wrong, says):
    done = papermill("train", tmp_path / "train.ipynb", **(dict(scale="tiny") | wrong))
    assert (
        done.returncode != 0
        and says in done.stderr
        and next(iter(wrong)) in done.stderr
    )
    assert not any(folders[1].iterdir())


def test_own_images_need_no_more_than_a_modality_and_features(folders, tmp_path):
    "The documented minimum: class folders and two lines of dataset.yaml, from captions to training."
    own = folders[0] / "own"
    for k, cls in enumerate(("mild", "severe")):
        (own / cls).mkdir(parents=True)
        for i in range(8):
            g = np.random.default_rng(10 * k + i)
            Image.fromarray(g.integers(0, 255, (64, 72, 3), dtype=np.uint8)).save(
                own / cls / f"{i}.png"
            )
    (own / "dataset.yaml").write_text("modality: fundus\nfeatures: color and shape\n")
    asked = dict(dataset="own", data="own", scale="tiny")
    for name, more in (
        ("caption", {}),
        ("train", dict(epochs=0.5, interval=2, solver_steps=2, check="train")),
    ):
        done = papermill(name, tmp_path / f"{name}.ipynb", **asked, **more)
        assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "caption.ipynb").read_text()
    assert "A fundus image of mild" in text and "StopIteration" not in text
    assert list(folders[1].glob("own-tiny/*/done.json"))
