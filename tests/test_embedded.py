"The small models can be built from nothing: every lesson, the card, and a pipeline that loads."

from functools import partial

from medart import embedded as E
from medart.model import load_base
from medart.recipes import recipe


def test_small_models_are_built_from_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(E, "learn_to_read", partial(E.learn_to_read, steps=3))
    pixart = E.build_pixart(
        tmp_path / "pixart", pictures=64, vae_steps=3, steps=(2, 2, 2)
    )
    sd = E.build_sd(tmp_path / "sd", pixart, pictures=64, steps=2)
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
        E.build_pixart(tmp_path / "pixart", pictures=64, vae_steps=3, steps=(2, 2, 2))
        == pixart
    )
    assert {
        f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file()
    } == before
