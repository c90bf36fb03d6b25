"Parameters in one vector learn what parameters in a list learn, and are stored as these are."

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm

from medart.bundled.benchmark_models import bench_model, bench_set
from medart.recipes.recipe import recipe
from medart.training.batches import draw_batch
from medart.training.checkpoints import load_checkpoint, save_checkpoint
from medart.training.cuda_graphs import recordings
from medart.training.device import SyncCounter
from medart.training.logs import Log
from medart.training.step import FlatAdamW, make_optimizer, training_step


def small(**changes):
    usual = dict(scale="tiny", dtype="float64", batch_size=1, interval=3)
    return recipe("skin", **usual | dict(solver_steps=2) | changes)


class Run:
    "A few steps of training on noise."

    def __init__(self, r, flat):
        self.r, self.model, self.acc = r, bench_model(r), Accelerator()
        for p in self.model.trainable().values():
            p.data = p.data.double()
        self.opt = make_optimizer(self.model, r, flat)
        self.ts = bench_set(self.model, r)

    def steps(self, *which):
        logs = []
        for k in which:
            b = draw_batch(self.model, self.r, self.ts, k)
            logs.append(training_step(self.model, self.r, b, self.opt, k, self.acc))
        return logs

    def state(self):
        own = self.model.trainable().values()
        names = "step", "exp_avg", "exp_avg_sq"
        moments = [self.opt.state[p][k] for p in own for k in names]
        return [x.detach().clone() for x in (*own, *moments, *self.model.ema.values())]


def gap(a, b):
    return get_total_norm([x - y for x, y in zip(a, b)]) / get_total_norm(a)


@pytest.mark.parametrize(
    "change",
    [
        dict(),
        dict(clip=1e-3, ema=0.9),
        dict(clip=0.0, lr_text=1e-3),
        dict(batch_size=2, accumulate=2, color_batch=1),
        dict(cuda_graphs=True, lean_lora=True),
        dict(lora_text=False, color_at_start=True),
        dict(offload=True, interval=1),
    ],
    ids=lambda c: " ".join(c),
)
def test_a_vector_learns_what_a_list_learns(change):
    r = small(**change)
    made = {}
    for flat in (False, True):
        run = Run(r, flat)
        assert isinstance(run.opt, FlatAdamW) == flat
        logs = run.steps(0, 1, 2, 3)
        assert not any(log["skipped"] for log in logs)
        made[flat] = run.state(), [log["grad_norm"] for log in logs]
    assert gap(made[False][0], made[True][0]) < 1e-12
    assert gap(made[False][1], made[True][1]) < 1e-12


def test_a_list_is_what_a_cpu_gets_and_a_step_waits_for_nothing():
    run = Run(small(), None)
    assert type(run.opt) is torch.optim.AdamW
    run = Run(small(), True)
    run.steps(0)
    b = draw_batch(run.model, run.r, run.ts, 1)
    with SyncCounter() as waits:
        training_step(run.model, run.r, b, run.opt, 1, run.acc)
    assert waits.names == []


def test_parameters_and_moments_are_views_of_one_vector():
    run = Run(small(), True)
    run.steps(0)
    for group, P in zip(run.opt.param_groups, run.opt.pieces):
        ps, home = group["params"], P.untyped_storage().data_ptr()
        assert {p.untyped_storage().data_ptr() for p in ps} == {home}
        assert torch.equal(P, torch.cat([p.detach().flatten() for p in ps]))
        assert len({id(run.opt.state[p]["step"]) for p in ps}) == 1
    assert len(run.opt.pieces) == 2  # the transformer's and T5's


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("then", [False, True])
def test_checkpoints_are_the_same_files_and_either_reads_the_other_s(
    tmp_path, first, then
):
    r = small()
    whole = Run(r, first)
    whole.steps(0, 1, 2, 3)
    begun = Run(r, first)
    begun.steps(0, 1)
    path = save_checkpoint(tmp_path, begun.model, begun.opt, 2, Log([], []), r)
    files = {
        name: {k: v.shape for k, v in load_file(path / name).items()}
        for name in ("adapters.safetensors", "optimizer.safetensors")
    }
    own = begun.model.trainable()
    assert files["adapters.safetensors"] == {k: p.shape for k, p in own.items()}
    assert files["optimizer.safetensors"].keys() == {
        f"{k}|{m}" for k in own for m in ("step", "exp_avg", "exp_avg_sq")
    }
    again = Run(r, then)
    assert load_checkpoint(tmp_path, again.model, again.opt, r)[0] == 2
    again.steps(2, 3)
    if first == then:
        assert all(map(torch.equal, whole.state(), again.state()))
    assert gap(whole.state(), again.state()) < 1e-12


def test_what_is_not_finite_changes_nothing():
    run = Run(small(ema=0.5), True)
    run.steps(0, 1)
    before, b = run.state(), draw_batch(run.model, run.r, run.ts, 2)
    b.z0[0, 0, 0, 0] = float("nan")
    assert training_step(run.model, run.r, b, run.opt, 2, run.acc)["skipped"]
    assert all(map(torch.equal, before, run.state()))
    assert not run.steps(3)[0]["skipped"]


def test_matrices_that_were_moved_are_joined_again_and_recordings_forgotten():
    runs = [Run(small(cuda_graphs=True), True) for _ in range(2)]
    for run in runs:
        run.steps(0)
    moved = runs[1]
    for p in moved.model.trainable().values():
        p.data = p.data.clone()
    assert recordings(moved.model) and not moved.opt.lies_in_pieces()
    known = dict(recordings(moved.model))
    for run in runs:
        run.steps(1)
    assert moved.opt.lies_in_pieces()
    new = recordings(moved.model)
    assert all(new[k] is not known[k] for k in known if k in new)
    assert all(map(torch.equal, runs[0].state(), moved.state()))


def test_moments_of_different_runs_are_refused():
    run = Run(small(), True)
    run.steps(0)
    p = next(iter(run.model.trainable().values()))
    run.opt.state[p] = dict(run.opt.state[p], step=torch.tensor(7.0))
    with pytest.raises(ValueError, match="1 steps and some 7"):
        run.steps(1)
