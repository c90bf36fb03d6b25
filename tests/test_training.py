"A run that is stopped, killed or damaged ends where an undisturbed one ends, bit for bit; wrong input is named."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medart.generation import generate
from medart.hldf import checkpoint_fault,train
from medart.recipes import recipe,run_dir

SMALL = dict(scale="tiny",epochs=2.,batch_size=2,interval=3,solver_steps=2,checkpoint_every=1,log_every=1,gen_steps=2,gen_block=2)

@pytest.fixture
def small(folders):
    "Twelve made images of two classes: eight to train on, so eight steps over two epochs with two colour losses."
    g = np.random.default_rng(0)
    for c in ("melanoma","common_nevus"):
        (folders[0]/"made"/c).mkdir(parents=True)
        for i in range(6): Image.fromarray(g.integers(0,255,(70,80,3),dtype=np.uint8)).save(folders[0]/"made"/c/f"{i}.png")
    return lambda **k: recipe("skin",data="made",**(SMALL|k))

def result(r):
    "Everything a run leaves that must not depend on how it was interrupted."
    out = run_dir(r)
    return {str(f.relative_to(out)):f.read_bytes() for f in [*out.glob("*_lora/*"),out/"losses.csv",out/"config.json"]}|{
        f.name:f.read_bytes() for f in sorted((out/"checkpoints").glob("step-*"))[-1].glob("*.safetensors")}

@pytest.mark.parametrize("change",[dict(),dict(t5_dropout=True,caption_dropout=.3,crop="random")],ids=["plain","dropout and random crops"])
def test_stopped_after_any_step_it_ends_the_same(small,change):
    r = small(**change); train(r); want = result(r); shutil.rmtree(run_dir(r))
    for k in range(1,8): train(r,stop_after=k)
    assert not (run_dir(r)/"done.json").exists()
    train(r); got = result(r)
    assert len(want)>=7 and got.keys()==want.keys()
    assert [n for n in want if got[n]!=want[n]]==[]

def start(r,outputs,data):
    code = f"from medart.recipes import *; from medart.hldf import train; train(recipe('skin',data='made',**{ {k:getattr(r,k) for k in SMALL} }))"
    return subprocess.Popen([sys.executable,"-c",code],env=os.environ|dict(MEDART_OUTPUTS=str(outputs),MEDART_DATA=str(data)),stdout=subprocess.PIPE,stderr=subprocess.STDOUT,text=True)

def wait_for_checkpoint(process,r,step):
    for _ in range(1200):
        if list((run_dir(r)/"checkpoints").glob(f"step-{step:07d}")) or process.poll() is not None: return
        time.sleep(.05)

def test_killed_it_continues_to_the_same_end(small,folders):
    r = small(); train(r); want = result(r); shutil.rmtree(run_dir(r))
    p = start(r,folders[1],folders[0]); wait_for_checkpoint(p,r,2); p.send_signal(signal.SIGKILL); p.communicate()
    assert p.returncode==-signal.SIGKILL and not (run_dir(r)/"done.json").exists()
    train(r); assert result(r)==want

def test_interrupt_saves_and_says_how_to_go_on(small,folders):
    r = small(epochs=50.)
    p = start(r,folders[1],folders[0]); wait_for_checkpoint(p,r,2); p.send_signal(signal.SIGINT); text = p.communicate()[0]
    assert "checkpoint saved. Run the same command again to continue" in text
    newest = sorted((run_dir(r)/"checkpoints").glob("step-*"))[-1]
    assert checkpoint_fault(newest)=="" and f"stopped after step {int(newest.name[5:])} of 200" in text

@pytest.mark.parametrize("harm",["truncated","flipped","missing","manifest"])
def test_damaged_checkpoint_is_passed_over_by_name(small,harm,capsys):
    r = small(); train(r); want = result(r); shutil.rmtree(run_dir(r)); train(r,stop_after=5)
    newest = sorted((run_dir(r)/"checkpoints").glob("step-*"))[-1]; f = newest/("manifest.json" if harm=="manifest" else "adapters.safetensors"); b = f.read_bytes()
    if harm=="missing": f.unlink()
    elif harm=="flipped": f.write_bytes(b[:len(b)//2]+bytes([b[len(b)//2]^1])+b[len(b)//2+1:])
    else: f.write_bytes(b[:len(b)//2])
    train(r); said = capsys.readouterr().out
    assert newest.name in said and "Passing over" in said
    assert result(r)==want

def test_checkpoint_of_another_recipe_is_refused_and_kept(small):
    r,other = small(),small(lr=5e-4); train(r,stop_after=3)
    run_dir(other).parent.mkdir(exist_ok=True); shutil.copytree(run_dir(r),run_dir(other))
    with pytest.raises(ValueError,match="another recipe"): train(other)
    assert len(list((run_dir(other)/"checkpoints").glob("step-*")))==2

def test_finished_work_is_not_done_again(small):
    r = small(); train(r); before = {f:f.stat().st_mtime_ns for f in run_dir(r).rglob("*")}
    train(r); assert {f:f.stat().st_mtime_ns for f in run_dir(r).rglob("*")}==before

def test_unreadable_image_is_set_aside_and_named(small,folders,capsys):
    r = small(); bad = folders[0]/"made/melanoma/1.png"; bad.write_bytes(bad.read_bytes()[:200]); train(r)
    assert "1 quarantined" in capsys.readouterr().out and (run_dir(r)/"done.json").exists()
    assert any("melanoma/1.png" in f.read_text() for f in folders[0].rglob("*.csv"))

def test_wrong_input_is_named(small,folders,monkeypatch):
    with pytest.raises(FileNotFoundError,match="nowhere"): train(recipe("skin",scale="tiny",data="nowhere"))
    r = small()
    (folders[0]/"a file").write_text(""); monkeypatch.setenv("MEDART_OUTPUTS",str(folders[0]/"a file"/"outputs"))
    with pytest.raises(PermissionError,match="MEDART_OUTPUTS"): train(r)

def test_images_are_the_same_bytes_after_an_interruption(small):
    r = small()
    with pytest.raises(FileNotFoundError,match="Train first"): generate(r)
    train(r); folder = generate(r); want = {f.relative_to(folder):f.read_bytes() for f in folder.rglob("*.png")}
    assert len(want)==4
    for f in list(folder.rglob("*.png"))[:2]: f.unlink()
    (folder/"metadata.csv").unlink(); generate(r)
    assert {f.relative_to(folder):f.read_bytes() for f in folder.rglob("*.png")}==want
    about = Image.open(next(folder.rglob("*.png"))).text
    assert "not for diagnosis" in about["note"] and about["caption"] and about["seed"]=="0"
    assert json.loads((folder/"key.json").read_text())["gen_steps"]==2 and Path(folder/"metadata.csv").exists()
