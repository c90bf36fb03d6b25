"The plain loop of the method and the trainer that people run are the same mathematics."

import pytest
import torch

from medart.method.caption_files import captions_for
from medart.method.hldf import fine_tune
from medart.recipes.recipe import recipe
from medart.training.adapters import load_adapters
from medart.training.batches import draw_batch, training_set
from medart.training.models import load_base, load_model
from medart.training.trainer import train


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(min_snr=5.0, backprop_last_k=1, lambda_color=0.7, clip_color=1e-3),
        dict(checkpointing=False, checkpoint_all=True, sampling="balanced"),
        dict(color_loss="energy", backprop_last_k=1, lambda_color=0.5),
    ],
    ids=["paper", "options", "memory", "energy"],
)
def test_five_steps_of_the_trainer_and_of_the_plain_loop_have_equal_weights(
    made, change
):
    "Bit for bit, with color losses at steps 2 and 4."
    r = recipe(
        "skin",
        scale="tiny",
        data="made",
        captions="simple",
        batch_size=2,
        epochs=1.25,
        interval=2,
        solver_steps=2,
        **change,
    )
    model = load_model(r)
    start = [p.detach().clone() for p in model.trainable().values()]
    images = training_set(model, r, captions_for(r, "train"))
    log = fine_tune(model, r, lambda step: draw_batch(model, r, images, step), 5)
    assert [k + 1 for k, row in enumerate(log) if "color" in row] == [2, 4]
    trained = load_adapters(load_base(r), train(r), trainable=True).trainable()
    plain = model.trainable()
    assert plain.keys() == trained.keys()
    assert all(torch.equal(p, trained[n]) for n, p in plain.items())
    assert not any(map(torch.equal, start, plain.values()))
