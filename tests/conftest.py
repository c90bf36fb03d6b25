"Settings every test runs under: no network, few threads, no windows, this environment's kernel, and folders of its own."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READY = Path(__file__).with_name("ready_python")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["JUPYTER_PATH"] = str(Path(sys.prefix, "share", "jupyter"))
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two threads a process, on as many cores as processes, wait for one another in busy loops: everything then takes two to
# fifteen times as long. Workers inherit what the process that starts them has set, so theirs is set whatever it was.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ[name] = "1"
    else:
        os.environ.setdefault(name, "1")

# The C library gives the memory of each large tensor back to the system, which clears it before it lends it again: a tenth
# of what the tests cost. Processes that start from here, workers among them, keep up to half a gigabyte instead.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(256 * 2**20))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(512 * 2**20))


def pytest_xdist_auto_num_workers(config):
    "One worker more than there are cores: a sixth of the time tests wait for processes that they started."
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def phantoms(pytestconfig):
    "Both sets of phantoms, drawn once for all tests and kept in pytest's cache; drawn anew when they would look otherwise."
    from filelock import FileLock

    from medart.data.phantoms import write_phantoms

    folder = pytestconfig.cache.mkdir("phantoms")

    def when_drawn(dataset):
        with FileLock(folder / f"{dataset}.lock"):
            write_phantoms(dataset, folder / dataset)
        return (folder / dataset / "phantom.json").stat().st_mtime_ns

    datasets = ["skin", "kvasir"]
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:] != "0":
        datasets.reverse()  # one worker draws the first set while another draws the second
    drawn = {dataset: when_drawn(dataset) for dataset in datasets}
    yield folder
    for dataset, when in drawn.items():
        now = when_drawn(dataset)
        assert now == when, f"a test has changed the shared phantoms of {dataset}"


def link_tree(source, target):
    "The same files under another folder; copies where the file system cannot link."

    def link(a, b):
        try:
            os.link(a, b)
        except OSError:
            shutil.copy2(a, b)

    shutil.copytree(source, target, copy_function=link)


@pytest.fixture
def folders(tmp_path, monkeypatch, phantoms):
    "Data and outputs folders under tmp_path: bundled models and phantoms linked into the first, the second empty."
    data, outputs = tmp_path / "data", tmp_path / "outputs"
    data.mkdir()
    outputs.mkdir()
    if (ROOT / "data" / "tiny").exists():
        (data / "tiny").symlink_to(ROOT / "data" / "tiny")
    for dataset in ("skin", "kvasir"):
        link_tree(phantoms / dataset, data / "phantom" / dataset)
    monkeypatch.setenv("MEDART_DATA", str(data))
    monkeypatch.setenv("MEDART_OUTPUTS", str(outputs))
    return data, outputs


@pytest.fixture
def made(folders):
    "Twelve made images of two classes in the data folder `made`: eight to train on, four to test on."
    import numpy as np
    from PIL import Image

    g = np.random.default_rng(0)
    for cls in ("melanoma", "common_nevus"):
        (folders[0] / "made" / cls).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(g.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(
                folders[0] / "made" / cls / f"{i}.png"
            )
    return folders[0] / "made"


@pytest.fixture(scope="session")
def files():
    "The repository's files, relative to its root: what git tracks and what it would track."
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = sorted({Path(name) for name in listed.stdout.split("\0") if name})
    return [path for path in paths if (ROOT / path).is_file()]


@pytest.fixture(scope="session")
def kernels():
    "Inside, kernels have the large libraries imported when they start."
    from medart.workflows.forked_kernels import forked_kernels

    with forked_kernels():
        yield


@pytest.fixture(scope="session")
def runner():
    "A process that has imported the large libraries and forks one for each notebook."
    program = Path(__file__).with_name("notebook_runner.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="session")
def ready_server(runner, tmp_path_factory):
    "The address of a process of which programs in Python can begin as copies; None where the system lacks that."
    if sys.platform != "linux":
        return None
    address = str(tmp_path_factory.mktemp("ready") / "server")
    runner.stdin.write(json.dumps(dict(serve=address)) + "\n")
    runner.stdin.flush()
    assert json.loads(runner.stdout.readline()) == 0
    return address


@pytest.fixture
def ready_python(ready_server, monkeypatch):
    "Programs in Python that a test starts have the large libraries imported: see `ready_python/sitecustomize.py`."
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(READY), str(ROOT)]))
    if ready_server:
        monkeypatch.setenv("READY_PYTHON", ready_server)


@pytest.fixture
def run_notebook(folders, runner, tmp_path):
    "Runs a notebook from top to bottom; the file on disk is left alone."

    def run(path, report=None, solutions=(), blank=None, **env):
        log = tmp_path / "log.txt"
        backend = "module://matplotlib_inline.backend_inline"
        env = {**os.environ, "MPLBACKEND": backend, **env}
        job = dict(path=str(path), env=env, log=str(log), report=report and str(report))
        job |= dict(solutions=solutions, blank=blank and str(blank))
        runner.stdin.write(json.dumps(job) + "\n")
        runner.stdin.flush()
        status = json.loads(runner.stdout.readline())
        assert status == 0, log.read_text(encoding="utf-8")[-6000:]

    return run


@pytest.fixture(scope="session")
def few_phantoms(tmp_path_factory):
    "A small set of phantoms and a random ViT, made once and only read."
    import torch
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from medart.data.phantoms import write_phantoms
    from medart.recipes.datasets import DATASETS

    data = tmp_path_factory.mktemp("few_phantoms")
    classes = list(DATASETS["skin"].counts)
    few = dict(train=dict.fromkeys(classes, 12), test=dict.fromkeys(classes, 14))
    write_phantoms("skin", data / "few", counts=few)
    torch.manual_seed(0)
    names = dict(enumerate(classes))
    vit = ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            image_size=64,
            patch_size=8,
            id2label=names,
            label2id={c: i for i, c in names.items()},
        )
    )
    vit.save_pretrained(data / "vit")
    ViTImageProcessorPil(size=dict(height=64, width=64)).save_pretrained(data / "vit")
    return data


@pytest.fixture
def few_run(few_phantoms, tmp_path, monkeypatch):
    "A recipe on these few phantoms, its outputs in a folder of their own."
    from medart.recipes.recipe import recipe

    monkeypatch.setenv("MEDART_DATA", str(few_phantoms))
    monkeypatch.setenv("MEDART_OUTPUTS", str(tmp_path))
    return recipe("skin", scale="tiny", data="few", extractor=str(few_phantoms / "vit"))


@pytest.fixture
def tree(tmp_path):
    "Two classes of ten images."
    from drawn import put

    for c, first in (("melanoma", 0), ("common_nevus", 10)):
        for i in range(10):
            put(tmp_path / "tree", f"{c}/{i}.jpg", first + i, quality=95)
    return tmp_path / "tree"


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    "A random DINOv2, which a backbone without a classifier goes by."
    from transformers import Dinov2Config, Dinov2Model
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    folder = tmp_path_factory.mktemp("backbones") / "dino"
    Dinov2Model(
        Dinov2Config(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).save_pretrained(folder)
    BitImageProcessorPil(
        size=dict(shortest_edge=32), crop_size=dict(height=28, width=28)
    ).save_pretrained(folder)
    return folder
