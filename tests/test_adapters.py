"Adapters are written together, read only when they are whole, and only for the recipe that they are of."

import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from damage import change, cut, empty, missing
from medart.method.model import Model
from medart.recipes.recipe import recipe
from medart.training.adapters import save_adapters
from medart.training.models import load_model


def nan(t, k):
    t[k][0] = float("nan")


def infinite(t, k):
    t[k][0] = float("inf")


def lacking(t, k):
    del t[k]


def extra(t, k):
    t["another"] = torch.ones(2)


def shorter(t, k):
    t[k] = t[k][:-1].clone()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    r = recipe("skin", scale="tiny", data="phantom/skin")
    return r, save_adapters(load_model(r), tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize(
    "harm,says",
    [
        (nan, "not finite"),
        (infinite, "not finite"),
        (lacking, "1 of its tensors are missing"),
        (extra, "1 of its tensors are too many, another"),
        (shorter, "does not fit"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_name(saved, tmp_path, harm, says):
    r, folder = saved
    shutil.copytree(folder, tmp_path / "a")
    change(tmp_path / "a" / "text_encoder_lora" / "adapter_model.safetensors", harm)
    with pytest.raises(
        ValueError, match=f"text_encoder_lora is refused.*{says}.*run train again"
    ):
        load_model(r, adapters=tmp_path / "a")


def test_files_that_are_no_adapters_are_refused_by_name(saved, tmp_path):
    r, folder = saved
    for k, (harm, says) in enumerate(
        [(empty, "cannot be read"), (cut, "cannot be read"), (missing, "is missing")]
    ):
        shutil.copytree(folder, tmp_path / str(k))
        harm(tmp_path / str(k) / "transformer_lora" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=f"transformer_lora is refused.*{says}"):
            load_model(r, adapters=tmp_path / str(k))
    weights = tmp_path / "2" / "transformer_lora" / "adapter_model.bin"
    torch.save(
        load_file(folder / "transformer_lora" / "adapter_model.safetensors"), weights
    )
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        load_model(r, adapters=tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "transformer_lora")
    with pytest.raises(ValueError, match="lacks transformer_lora"):
        load_model(r, adapters=tmp_path / "2")


@pytest.mark.parametrize(
    "changes,says",
    [
        (dict(rank=16), "r=8, and the recipe wants 16"),
        (dict(alpha=16), "lora_alpha=8"),
        (dict(dora_text=True), "use_dora=False"),
        (dict(lora_text=False), "holds text_encoder_lora"),
        (dict(text_targets=("q",)), "target_modules"),
    ],
)
def test_adapters_of_another_recipe(saved, changes, says):
    r, folder = saved
    with pytest.raises(ValueError, match=says):
        load_model(replace(r, **changes), adapters=folder)


def test_new_adapters_take_the_place_of_old_ones_together(saved, tmp_path, monkeypatch):
    "Whatever the moment at which it fails, there is never a new half beside an old one."
    r, folder = saved
    model = load_model(r)
    for p in model.trainable().values():
        p.data.add_(1)
    true, seen = os.replace, set()
    for at in range(5):
        out = tmp_path / str(at)
        shutil.copytree(folder, out)
        calls = iter(range(100))

        def replace_until(a, b):
            if not str(a).endswith(".part") and next(calls) == at:
                raise OSError(28, "No space left on device")
            true(a, b)

        with monkeypatch.context() as m:
            m.setattr(os, "replace", replace_until)
            try:
                save_adapters(model, out)
            except OSError:
                pass
        halves = {
            (out / d / "adapter_model.safetensors").read_bytes()
            == (folder / d / "adapter_model.safetensors").read_bytes()
            for d in ("transformer_lora", "text_encoder_lora")
            if (out / d).exists()
        }
        seen.add(frozenset(halves))
        assert len(halves) < 2 and not list(out.glob(".*"))
    assert frozenset({True}) in seen and frozenset({False}) in seen


def test_every_end_of_saving_is_a_model_s_own(saved):
    "No family has a way of saving of its own: all are written together."
    from medart.method import baselines, dit_baselines

    kinds = [
        k
        for room in (baselines, dit_baselines)
        for k in vars(room).values()
        if isinstance(k, type) and issubclass(k, Model)
    ]
    assert len(kinds) >= 5 and all(
        "save" not in vars(k) for k in kinds if k is not Model
    )
