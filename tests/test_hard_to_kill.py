"Whatever ends a run, at whatever moment, the next one continues from a whole checkpoint to the same end, bit for bit."

import ast
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from everywhere import replace_everywhere
from safetensors.torch import load_file
from medart.training import checkpoints as checkpoints_room
from medart.training.adapters import save_adapters
from medart.method import caption_files
from medart.training import batches
from medart.training import logs
from medart.training import step as step_room
from medart.training import trainer
from medart.training.checkpoints import (
    checkpoint_fault,
    load_checkpoint,
    save_checkpoint,
)
from medart.training.launch import launch
from medart.training.logs import Log
from medart.training.step import make_optimizer
from medart.training.trainer import train
from medart.training.models import load_model
from medart.recipes.recipe import recipe
from medart.recipes.runs import run_dir

# Functions of the loop at which a run is ended.
FUNCTIONS = dict(
    draw_batch=batches.draw_batch, update=step_room.update, save_adapters=save_adapters
)
ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
    scale="tiny",
    epochs=2.0,
    batch_size=2,
    interval=3,
    solver_steps=2,
    checkpoint_every=3,
    log_every=2,
    t5_dropout=True,
    caption_dropout=0.2,
    ema=0.9,
)


@pytest.fixture
def small(made):
    "Eight steps over two epochs, a color loss at the third and the sixth."
    return lambda **k: recipe("skin", data="made", **(SMALL | k))


def checkpoints(r):
    return sorted((run_dir(r) / "checkpoints").glob("step-*"))


def result(r):
    "What must not depend on interruptions: adapters, log, and the last checkpoint's weights, moments and average."
    out = run_dir(r)
    return {
        str(f.relative_to(out)): f.read_bytes()
        for f in [*out.glob("*_lora/*"), out / "losses.csv", out / "config.json"]
    } | {
        f.name: f.read_bytes()
        for f in (
            *checkpoints(r)[-1].glob("*.safetensors"),
            checkpoints(r)[-1] / "log.json",
        )
    }


def in_child(run):
    "Run in a fork of this warmed process: exit status, or minus the signal that ended it."
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            run()
            status = 0  # no thread of the parent's lives on in a fork
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def end_in_child(r):
    "The result of a run in a child: as many threads as the other children have."
    assert in_child(lambda: train(r)) == 0
    return result(r)


def raising(name, when, sig=signal.SIGKILL, after=False, rank=None, of=None):
    "A run in which a function of the training loop, at one of its calls, sends its process a signal."
    true = getattr(of, name) if of else FUNCTIONS[name]
    calls = iter(range(10**6))

    def call(*a, **k):
        now = next(calls) == when and (
            rank is None or torch.distributed.get_rank() == rank
        )
        if now and not after:
            os.kill(os.getpid(), sig)
        out = true(*a, **k)
        if now and after:
            os.kill(os.getpid(), sig)
        return out

    return call


@pytest.mark.parametrize(
    "where,after",
    [("draw_batch", False), ("update", True)],
    ids=["before the step", "after its update"],
)
def test_killed_at_every_step(small, monkeypatch, where, after):
    r = small()
    want = end_in_child(r)
    shutil.rmtree(run_dir(r))
    assert len(want) >= 9 and b'"skipped": 0' in want["log.json"]
    done = 0
    for k in range(8):

        def run():
            replace_everywhere(
                monkeypatch, FUNCTIONS[where], raising(where, k - done, after=after)
            )
            train(r)

        assert (
            in_child(run) == -signal.SIGKILL and not (run_dir(r) / "done.json").exists()
        ), f"not killed in step {k + 1}"
        done = int(checkpoints(r)[-1].name[5:]) if checkpoints(r) else 0
        assert done == k // 3 * 3
    got = end_in_child(r)
    assert [n for n in want if got.get(n) != want[n]] == []


@pytest.mark.parametrize(
    "after",
    [False, True],
    ids=["before the adapters are written", "after them, before the log is"],
)
def test_killed_while_it_finishes(small, monkeypatch, after):
    r = small(epochs=0.5)
    want = end_in_child(r)
    shutil.rmtree(run_dir(r))

    def run():
        replace_everywhere(
            monkeypatch,
            FUNCTIONS["save_adapters"],
            raising("save_adapters", 0, after=after),
        )
        train(r)

    assert in_child(run) == -signal.SIGKILL and not (run_dir(r) / "done.json").exists()
    assert end_in_child(r) == want


@pytest.fixture
def trained(small):
    "A model and an optimizer with moments, and a folder of checkpoints that holds step 3."
    r = small(keep_checkpoints=1)
    train(r, stop_after=3)
    model = load_model(r)
    opt = make_optimizer(model, r)
    key = json.loads((checkpoints(r)[-1] / "manifest.json").read_text())["captions"]
    step, log = load_checkpoint(run_dir(r) / "checkpoints", model, opt, r, key)
    assert step == 3
    return r, model, opt, log, key


class Faulty:
    "Counts every call that writes, and lets one of them fail: a write by half, the others before they begin."

    def __init__(self, at, fault):
        self.at, self.fault, self.n = at, fault, 0

    def strike(self, partly=lambda: None):
        self.n += 1
        if self.n - 1 != self.at:
            return
        partly()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.fault, os.strerror(self.fault))

    def install(self, monkeypatch):
        true = {n: getattr(os, n) for n in ("fsync", "replace")}
        mkdir = Path.mkdir
        for n, f in true.items():
            monkeypatch.setattr(os, n, lambda *a, f=f: (self.strike(), f(*a))[1])
        monkeypatch.setattr(
            Path, "mkdir", lambda *a, **k: (self.strike(), mkdir(*a, **k))[1]
        )

        def faulty_open(path, mode):
            self.strike()
            f = open(path, mode)
            write = f.write

            class File:
                def __enter__(s):
                    return s

                def __exit__(s, *e):
                    f.close()

                def write(s, d):
                    self.strike(lambda: (write(d[: len(d) // 2]), f.flush()))
                    return write(d)

                flush, fileno = f.flush, f.fileno

            return File()

        monkeypatch.setattr(checkpoints_room, "open", faulty_open, raising=False)
        return self


def test_fault_at_each_write_leaves_a_whole_checkpoint(trained, monkeypatch):
    r, model, opt, log, key = trained
    folder = run_dir(r) / "checkpoints"
    backup = folder.with_name("backup")
    shutil.copytree(folder, backup)

    def save():
        save_checkpoint(
            folder,
            model,
            opt,
            4,
            Log(log.rows + [dict(step=4, loss=1.0, skipped=0)], log.clock),
            r,
            key,
        )

    with monkeypatch.context() as m:
        counter = Faulty(-1, None).install(m)
        save()
    assert counter.n >= 6 * 3 + 4 and [f.name for f in folder.iterdir()] == [
        "step-0000004"
    ]
    for fault in (errno.ENOSPC, errno.EIO, "kill"):
        seen = set()
        for at in range(counter.n):
            shutil.rmtree(folder)
            shutil.copytree(backup, folder)
            with monkeypatch.context() as m:

                def run():
                    Faulty(at, fault).install(m)
                    save()

                if fault == "kill":
                    assert in_child(run) == -signal.SIGKILL
                else:
                    with pytest.raises(
                        OSError, match="step-0000004 could not be written"
                    ) as e:
                        run()
                    assert e.value.errno == fault and not list(folder.glob(".step-*"))
            step, _ = load_checkpoint(folder, model, opt, r, key)
            seen.add(step)
            assert step in (3, 4) and all(
                not checkpoint_fault(f) for f in folder.glob("step-*")
            )
            if fault == "kill":
                trainer._sweep(folder)
                save()
                assert load_checkpoint(folder, model, opt, r, key)[0] == 4
        assert 3 in seen


def test_a_full_disk_stops_the_run_with_advice(small, capfd):
    "The kernel itself refuses to write more than 100 kB to a file."
    r = small()
    want = end_in_child(r)
    shutil.rmtree(run_dir(r))
    assert in_child(lambda: train(r, stop_after=3)) == 0

    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        train(r)

    assert in_child(run) == 1
    assert re.search(
        r"step-000000\d could not be written, those before it are kept. Make room",
        capfd.readouterr().err,
    )
    assert [f.name for f in (run_dir(r) / "checkpoints").iterdir()] == ["step-0000003"]
    assert end_in_child(r) == want


def test_damaged_checkpoint_is_passed_over_by_name(trained, capsys):
    r, model, opt, log, key = trained
    folder = run_dir(r) / "checkpoints"
    newest = save_checkpoint(
        folder, model, opt, 4, log, recipe("skin", data="made", **SMALL), key
    )
    capsys.readouterr()
    assert load_checkpoint(folder, model, opt, r, key)[0] == 4
    for f in sorted(newest.iterdir()):
        b = f.read_bytes()
        k = len(b) // 3
        flip = lambda j: b[:j] + bytes([b[j] ^ 1]) + b[j + 1 :]
        digit = [
            flip(m.start()) for m in re.finditer(rb"(?<=\"step\": )\d", b)
        ]  # still valid JSON, of another step
        for harmed in (b[:k], flip(k), b"", None, *digit):
            f.unlink() if harmed is None else f.write_bytes(harmed)
            step, _ = load_checkpoint(folder, model, opt, r, key)
            said = capsys.readouterr().out
            assert (
                step == 3
                and f"Passing over checkpoint step-0000004: {f.name} is" in said
            )
        f.write_bytes(b)
    assert load_checkpoint(folder, model, opt, r, key)[0] == 4


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_within_the_step(small, monkeypatch, sig):
    r = small(checkpoint_every=100)
    train(r)
    want = result(r)
    shutil.rmtree(run_dir(r))
    with monkeypatch.context() as m:
        replace_everywhere(m, FUNCTIONS["update"], raising("update", 4, sig))
        with pytest.raises(
            KeyboardInterrupt,
            match=f"{sig.name}: stopped after step 5 of 8, checkpoint saved. "
            "Run the same command again",
        ):
            train(r)
    assert [f.name for f in checkpoints(r)] == ["step-0000005"] and checkpoint_fault(
        checkpoints(r)[0]
    ) == ""
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(r)
    assert result(r) == want


def test_checkpoints_are_also_taken_by_time(small, monkeypatch):
    r = small(checkpoint_every=1000, checkpoint_minutes=0.0)

    def run():
        replace_everywhere(
            monkeypatch, FUNCTIONS["draw_batch"], raising("draw_batch", 5)
        )
        train(r)

    assert (
        in_child(run) == -signal.SIGKILL and checkpoints(r)[-1].name == "step-0000005"
    )


def test_updates_that_are_not_finite_are_skipped_logged_and_end_the_run(small):
    "An infinite weight makes every color gradient infinite: the third and the sixth step change nothing."
    endless = dict(
        lambda_color=float("inf")
    )  # no recipe takes it; here it stands for a gradient that overflows
    r = replace(small(checkpoint_every=1, keep_checkpoints=9, ema=0.0), **endless)
    train(r)
    d = logs.read_losses(r)
    ts = caption_files.captions_for(r, "train").files
    assert (
        d.step[d.skipped == 1].tolist() == [3, 6]
        and d.images[2].split() == [ts[i] for i in batches.batch_indices(r, 8, 2)]
        and d.images.notna().sum() == 2
    )
    a = [
        {f.name: f.read_bytes() for f in c.glob("*.safetensors")}
        for c in checkpoints(r)
    ]
    assert [k + 1 for k in range(1, 8) if a[k] == a[k - 1]] == [3, 6]
    r = replace(small(interval=1, max_bad_steps=3, checkpoint_every=1), **endless)
    for _ in range(2):
        with pytest.raises(
            FloatingPointError,
            match=r"steps 1 to 3: 3 updates in a row .*png.* Try a smaller lr",
        ):
            train(r)


def float64(**k):
    return dict(dtype="float64", t5_dropout=False, num_processes=1) | k


def weights(r):
    "What the last checkpoint of a run holds, a file a name."
    files = checkpoints(r)[-1].glob("*.safetensors")
    return {f.name: load_file(f) for f in files}


def on_two_machines(r):
    "Two launchers, each with one process, as two machines of a cluster have them."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    line += "--num_machines 2 --num_processes 2 --mixed_precision no".split()
    line += "--dynamo_backend no --main_process_ip 127.0.0.1".split()
    line += ["--main_process_port", port]
    told = ["-m", "medart.training.launch", "--dataset", "skin", "--data", "made"]
    for k, v in (SMALL | float64()).items():
        told += [f"--{k}", str(v)]
    env = os.environ | dict(ACCELERATE_USE_CPU="yes", OMP_NUM_THREADS="1")
    machines = [
        subprocess.Popen(
            [*line, "--machine_rank", str(rank), *told],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [p.communicate(timeout=600)[0] for p in machines]
    assert [p.returncode for p in machines] == [0, 0], "\n".join(said)[-4000:]


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_equal_one(small, machines, ready_python):
    one, two = small(**float64()), small(**float64(num_processes=2))
    assert run_dir(one) == run_dir(two)
    train(one)
    want, log = weights(one), logs.read_losses(one)
    shutil.rmtree(run_dir(one))
    launch(two) if machines == 1 else on_two_machines(two)
    got = weights(two)
    gap = {
        n: max((a - got[n][k]).abs().max().item() for k, a in t.items())
        for n, t in want.items()
    }
    # Adam divides each gradient by its own size, so what is rounding in the smallest of them is more in the weights they move
    assert (
        set(gap) == {"adapters.safetensors", "ema.safetensors", "optimizer.safetensors"}
        and gap["optimizer.safetensors"] < 1e-10
        and max(gap.values()) < 1e-8
    ), gap
    assert (
        logs.read_losses(two).drop(columns="images") - log.drop(columns="images")
    ).abs().max().max() < 1e-8
    moved = max(
        t.abs().max().item()
        for n, t in got["adapters.safetensors"].items()
        if "lora_B" in n
    )
    assert moved > 1e-4


def test_one_of_two_processes_is_asked_and_both_stop(small, monkeypatch):
    r = small(num_processes=2, epochs=4.0, checkpoint_every=100)
    stop = raising("update", 4, signal.SIGTERM, rank=1)
    replace_everywhere(monkeypatch, FUNCTIONS["update"], stop)
    with pytest.raises(Exception, match="stopped after step 6 of 16, checkpoint saved"):
        launch(r)
    assert [f.name for f in checkpoints(r)] == ["step-0000006"] and checkpoint_fault(
        checkpoints(r)[0]
    ) == ""


def test_a_batch_that_cannot_be_shared_is_refused(small):
    with pytest.raises(ValueError, match="Pass batch_size=2: another recipe"):
        small(batch_size=1, num_processes=2)


def test_no_pickle_is_loaded_unless_it_can_hold_only_weights():
    found = []
    for path in [
        *ROOT.glob("medart/*.py"),
        *ROOT.glob("tools/*.py"),
        *ROOT.glob("nbs/*.ipynb"),
    ]:
        text = path.read_text(encoding="utf-8")
        cells = (
            [text]
            if path.suffix == ".py"
            else [
                "".join(c["source"])
                for c in json.loads(text)["cells"]
                if c["cell_type"] == "code"
            ]
        )
        for node in (
            n
            for c in cells
            for n in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", c, flags=re.M)))
        ):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [
                    getattr(node, "module", "") or ""
                ]
                if names[-1] == "torch" and "load" in names:
                    found.append(
                        (path.name, ast.unparse(node))
                    )  # must be called as torch.load
                if {n.split(".")[0] for n in names} & {
                    "pickle",
                    "cPickle",
                    "dill",
                    "cloudpickle",
                    "joblib",
                    "shelve",
                    "marshal",
                }:
                    found.append((path.name, ast.unparse(node)))
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if call == "torch.load" and safe.get("weights_only") != "True":
                    found.append((path.name, ast.unparse(node)))
                if call.endswith("read_pickle") or safe.get("allow_pickle") == "True":
                    found.append((path.name, ast.unparse(node)))
    assert not found


def test_the_search_for_pickles_can_fail(tmp_path, monkeypatch):
    (tmp_path / "medart").mkdir()
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for bad in (
        "import torch\nx = torch.load('a.pt')\n",
        "from torch import load\n",
        "import pickle\n",
    ):
        (tmp_path / "medart/bad.py").write_text(bad)
        with pytest.raises(AssertionError):
            test_no_pickle_is_loaded_unless_it_can_hold_only_weights()
