"""The whole chain at tiny scale, on two processors: `make demo`.

Each stage is a notebook run by papermill, as from a shell. Stages that do not wait for one another run at the same time,
each with one thread, and all kernels are copies of one process that has imported the libraries. Training, which everything
waits for, shares each batch between two processes, and images are generated as soon as its adapters are written, while
its notebook still draws figures.
"""

import os
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import nbformat
import papermill
from nbclient import NotebookClient

from medart.core.paths import outputs_dir
from medart.workflows.forked_kernels import forked_kernels

ROOT = Path(__file__).resolve().parent.parent
AT_ROOT = dict(metadata=dict(path=str(ROOT)))
SKIN = dict(dataset="skin", scale="tiny")
EVERY = dict(gen_split="train", gen_count=0)  # an image for each training caption
ADAPTERS = "adapters"  # training leaves them before its notebook ends
# Executed notebook: what is run, with which parameters, and what it waits for.
STAGES = {
    "caption-skin": ("caption", SKIN, ()),
    "train-skin": ("train", SKIN, ("caption-skin",)),
    "generate-train-skin": ("generate", SKIN | EVERY, (ADAPTERS,)),
    "generate-skin": ("generate", SKIN, (ADAPTERS,)),
    "evaluate-skin": ("evaluate", SKIN, ("generate-skin",)),
    "classify-skin": ("classify", SKIN, ("generate-train-skin",)),
    "tables": (
        "tables",
        dict(datasets="skin", scale="tiny"),
        ("evaluate-skin", "classify-skin"),
    ),
}


# What waits for nothing and is found by a later stage: it runs beside the captions.
AHEAD = """\
from medart.evaluation.classification import train_on_real
from medart.recipes.recipe import recipe

train_on_real(recipe("skin", scale="tiny"))
"""


def command(name):
    "What one would type to run a stage alone."
    notebook, given, _ = STAGES[name]
    options = " ".join(f"-p {key} {value}" for key, value in given.items())
    return f"papermill nbs/{notebook}.ipynb outputs/{name}.ipynb {options}"


def run(name):
    "Run a stage; how long it took, in seconds."
    notebook, given, _ = STAGES[name]
    began = time.monotonic()
    source, target = f"nbs/{notebook}.ipynb", f"outputs/{name}.ipynb"
    papermill.execute_notebook(source, target, given, progress_bar=False)
    return time.monotonic() - began


def run_ahead():
    "Train the classifiers of real images, in a kernel of their own."
    cell = nbformat.v4.new_code_cell(AHEAD)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, kernel_name="python3", resources=AT_ROOT).execute()


def share_training():
    "Two processes train together, unless there are GPUs."
    from torch.cuda import device_count  # a second that no worker needs to spend

    if not device_count():
        notebook, given, needs = STAGES["train-skin"]
        STAGES["train-skin"] = notebook, given | dict(num_processes=2), needs


def adapters_noted():
    "When training's end was noted, if it was. Its notebook may still be at work."
    note = outputs_dir() / "skin-tiny/medart/done.json"
    return note.stat().st_mtime_ns if note.exists() else None


def begin_what_can(pool, running, done):
    "Start each stage that waits for nothing any more."
    begun = done.union(running.values())
    for name, (_, _, needs) in STAGES.items():
        if name not in begun and done.issuperset(needs):
            print(command(name), flush=True)
            running[pool.submit(run, name)] = name


def finish(future, name):
    "Say how long a stage took, or stop with its error."
    if error := future.exception():
        raise SystemExit(
            f"{error}\n{name} failed; outputs/{name}.ipynb shows where. "
            "`make demo` goes on from here when that is mended."
        )
    print(f"  {name}: {future.result():.0f} s", flush=True)


def run_all(pool):
    "Run all stages; after one that fails, none is begun any more."
    running, done, earlier = {}, set(), adapters_noted()
    begin_what_can(pool, running, done)
    pool.submit(run_ahead)  # if it fails, `classify` says why
    while not done.issuperset(STAGES):
        for future in wait(running, 0.5, FIRST_COMPLETED).done:
            name = running.pop(future)
            finish(future, name)
            done.add(name)
        if "train-skin" in done or adapters_noted() not in (None, earlier):
            done.add(ADAPTERS)
        begin_what_can(pool, running, done)


def main():
    "One process imports the libraries; two others run stages in copies of it."
    os.chdir(ROOT)
    Path("outputs").mkdir(exist_ok=True)
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    with forked_kernels(), ProcessPoolExecutor(2, get_context("spawn")) as pool:
        share_training()
        run_all(pool)


if __name__ == "__main__":
    main()
