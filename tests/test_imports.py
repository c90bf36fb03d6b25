"""Importing a module of this package takes at most about as long again as importing torch.

The large libraries take several times that, so they are imported by the functions that need them.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what none may import when it is imported itself: slow each, or the sign of something slow
LATER = (
    "diffusers transformers peft seaborn matplotlib.pyplot scipy.stats scipy.ndimage scipy.sparse "
    "torchmetrics bitsandbytes torch._dynamo torch._inductor"
)
SEE = """
import importlib, json, sys
import torch
found = {}
for name in json.loads(sys.argv[1]):
    before = set(sys.modules)
    importlib.import_module(name)
    found[name] = sorted(set(json.loads(sys.argv[2])) & set(sys.modules) - before)
print(json.dumps(found))
"""


def test_no_module_imports_a_large_library():
    files = sorted((ROOT / "medart").glob("[a-z]*/[a-z]*.py"))
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    assert len(names) > 100
    told = [json.dumps(names), json.dumps(LATER.split())]
    command = [sys.executable, "-c", SEE, *told]
    done = subprocess.run(command, cwd=ROOT, stdout=-1, text=True, check=True)
    found = json.loads(done.stdout)
    assert {name: libraries for name, libraries in found.items() if libraries} == {}


def test_the_classes_are_there_when_they_are_asked_for():
    from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline

    from medart.method.baselines import StableDiffusion
    from medart.method.model import Model

    assert Model.pipeline is PixArtAlphaPipeline
    assert StableDiffusion.pipeline is StableDiffusionPipeline
