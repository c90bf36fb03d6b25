"The small models can be built from nothing: every lesson, the card, and a pipeline that loads."

from functools import partial

from everywhere import replace_everywhere
from medart.bundled import pixart as pixart_room
from medart.bundled import stable_diffusion
from medart.bundled import text_encoders
from medart.training.models import load_base
from medart.recipes.recipe import recipe


def test_small_models_are_built_from_nothing(tmp_path, monkeypatch):
    replace_everywhere(
        monkeypatch,
        pixart_room.learn_to_read,
        partial(text_encoders.learn_to_read, steps=3),
    )
    pixart = pixart_room.build_pixart(
        tmp_path / "pixart", pictures=64, vae_steps=3, steps=(2, 2, 2)
    )
    sd = stable_diffusion.build_stable_diffusion(
        tmp_path / "sd", pixart, pictures=64, steps=2
    )
    for folder, family in ((pixart, "pixart"), (sd, "sd15")):
        assert (
            "seed" in (folder / "README.md").read_text()
            and (folder / "losses.csv").exists()
        )
        model = load_base(
            recipe("skin", scale="tiny", family=family, model=str(folder), interval=0)
        )
        assert model.encode_text(["a red circle"]).emb.isfinite().all()
    before = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()}
    assert (
        pixart_room.build_pixart(
            tmp_path / "pixart", pictures=64, vae_steps=3, steps=(2, 2, 2)
        )
        == pixart
    )
    assert {
        f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()
    } == before
