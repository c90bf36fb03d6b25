"""Executes the run notebooks once, at tiny scale, and stores their outputs in nbs/: `make examples`.

So a visitor sees what a run shows without running anything. Runs read what others wrote, so they come in the order of
the stages, with an outputs folder of their own. Names of runs to execute may be given: `python tools/execute_runs.py own`.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import papermill

from medart.workflows.forked_kernels import forked_kernels

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTE = "*The outputs below are those of a tiny run: "
OWN_CLASSES = ("melanoma", "common_nevus", "vascular_lesion")


def own_images(folder):
    "Two dozen drawn lesions of each of three classes, as a folder of somebody's own."
    from PIL import Image

    from medart.data.phantoms import draw_phantom

    for cls in OWN_CLASSES:
        (folder / cls).mkdir(parents=True)
        for i in range(24):
            Image.fromarray(draw_phantom("skin", cls, 7, i)[0]).save(
                folder / cls / f"{i}.png"
            )


def runs(images):
    "Each run: notebook, parameters, whether its outputs are stored."
    skin = dict(dataset="skin", scale="tiny")
    every = dict(gen_split="train", gen_count=0)
    few = dict(datasets="skin", scale="tiny", seeds="0")
    return [
        ("caption", skin, True),
        ("train", skin, True),
        ("generate", skin | dict(processes=2), True),
        ("evaluate", skin, True),
        ("generate", skin | every | dict(processes=2), False),
        ("classify", skin, True),
        ("share", skin, True),
        ("effect", few | dict(methods="base no_hldf medart", epochs=2), True),
        ("reproduce", few | dict(methods="no_hldf medart", epochs=2), True),
        ("tables", few, True),
        ("rare", dict(seeds="0 1", epochs=2), True),
        ("own", dict(images=images, modality="dermoscopic", epochs=2), True),
        ("benchmark", dict(scale="tiny", minutes=2, repeats=3), True),
        ("tiny", {}, True),
    ]


def told(name, given):
    "The command that made the outputs."
    options = [
        f"-p {k} {json.dumps(v) if ' ' in str(v) else v}" for k, v in given.items()
    ]
    return " ".join([f"papermill nbs/{name}.ipynb outputs/{name}.ipynb", *options])


def without_paths(value, folders):
    "Texts of outputs, with names of this machine's folders cut short."
    if isinstance(value, str):
        for path, short in folders.items():
            value = value.replace(path, short)
        return value
    if isinstance(value, list):
        return [without_paths(v, folders) for v in value]
    if isinstance(value, dict):
        return {k: without_paths(v, folders) for k, v in value.items()}
    return value


def store(name, given, executed, folders):
    "Copy outputs into the notebook, cell by cell, and say which command made them."
    path = NBS / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = {cell["id"]: cell.get("outputs", []) for cell in executed["cells"]}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = without_paths(outputs[cell["id"]], folders)
    head = notebook["cells"][0]
    text = re.sub(
        r"\n*\*The outputs below are.*\Z", "", "".join(head["source"]), flags=re.S
    )
    given = {k: "~/my-images" if k == "images" else v for k, v in given.items()}
    text += f"\n\n{NOTE}`{told(name, given)}`. Drawn phantoms and small models: they show that it runs.*"
    head["source"] = text.splitlines(keepends=True)
    text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def main(names):
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        own_images(work / "my-images")
        os.environ["MEDART_OUTPUTS"] = str(work / "outputs")
        (work / "outputs").mkdir()
        folders = {
            str(work / "my-images"): "~/my-images",
            str(work / "outputs"): "outputs",
            str(ROOT) + "/": "",
        }
        for name, given, stored in runs(str(work / "my-images")):
            if names and name not in names:
                continue
            out = work / "outputs" / f"{name}-{len(given)}.ipynb"
            os.chdir(ROOT)
            papermill.execute_notebook(
                NBS / f"{name}.ipynb", out, given, progress_bar=False, log_output=False
            )
            print(told(name, given), flush=True)
            if stored:
                store(name, given, json.loads(out.read_text(encoding="utf-8")), folders)


if __name__ == "__main__":
    with forked_kernels():
        main(sys.argv[1:])
