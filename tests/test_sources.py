"Downloads that break off, and archives that mean harm."

import hashlib
import io
import json
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import numpy as np
import pytest
from medart.data import sources
from drawn import picture
from medart.core.files import file_hash
from medart.data.loading import load_split
from medart.data.sources import fetch, unpack
from medart.recipes.datasets import DATASETS
from medart.recipes.recipe import recipe
from drawn import saved

SKIN = DATASETS["skin"]


# Downloads

BODY = np.random.default_rng(0).bytes(3_000_000)


class Server(BaseHTTPRequestHandler):
    "Serves BODY, and breaks off as told."

    body, ranges, tag, drops, requests, stall = BODY, True, '"v1"', [], [], False

    def do_GET(self):
        cls, start = type(self), 0
        asked = self.headers.get("Range")
        cls.requests.append(asked)
        if self.path == "/gone":
            return self.send_error(404)
        if asked and cls.ranges and self.headers.get("If-Range", cls.tag) == cls.tag:
            start = int(asked[6:-1])
            if start >= len(cls.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(cls.body)}")
                return self.end_headers()
            self.send_response(206)
            self.send_header(
                "Content-Range", f"bytes {start}-{len(cls.body) - 1}/{len(cls.body)}"
            )
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(cls.body) - start))
        self.send_header("ETag", cls.tag)
        self.end_headers()
        end = start + cls.drops.pop(0) if cls.drops else len(cls.body)
        self.wfile.write(cls.body[start:end])
        self.wfile.flush()
        if end < len(cls.body):
            time.sleep(30 if cls.stall else 0)
            self.close_connection = True

    def log_message(self, *a):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), dict(drops=[], requests=[]))
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.handle_error = lambda *a: None  # a client that was killed is no news
    threading.Thread(target=http.serve_forever, daemon=True).start()
    handler.url = f"http://127.0.0.1:{http.server_port}/set.zip"
    yield handler
    http.shutdown()
    http.server_close()


def test_a_download_that_breaks_off_goes_on_where_it_was(server, tmp_path):
    server.drops[:] = [1_000_000, 500_000, 700_000]
    got = fetch(server.url, tmp_path / "set.zip", wait=0)
    assert got.read_bytes() == BODY
    assert server.requests == [
        None,
        "bytes=1000000-",
        "bytes=1500000-",
        "bytes=2200000-",
    ]
    assert json.loads((tmp_path / "set.zip.json").read_text()) == dict(
        url=server.url, bytes=len(BODY), sha256=file_hash(got)
    )
    fetch(server.url, got)
    assert len(server.requests) == 4
    assert {f.name for f in tmp_path.iterdir()} <= {
        "set.zip",
        "set.zip.json",
        ".set.zip.lock",
    }


def test_a_killed_download_goes_on_where_it_was(server, tmp_path):
    server.drops[:], server.stall = [1_500_000], True
    code = f"import sys; from medart.data.sources import fetch; fetch({server.url!r},{str(tmp_path / 'set.zip')!r})"
    p = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part = tmp_path / "set.zip.part"
    for _ in range(3000):
        if part.exists() and part.stat().st_size >= 1_000_000:
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGKILL)
    p.wait()
    have = part.stat().st_size
    assert 0 < have < len(BODY) and not (tmp_path / "set.zip").exists()
    assert fetch(server.url, tmp_path / "set.zip", wait=0).read_bytes() == BODY
    assert server.requests == [None, f"bytes={have}-"]


@pytest.mark.parametrize(
    "change",
    [dict(ranges=False), dict(tag='"v2"', body=BODY[::-1])],
    ids=["no ranges", "the file changed"],
)
def test_what_cannot_be_continued_begins_anew(server, tmp_path, change):
    server.drops[:] = [1_000_000, 0]  # the second try brings nothing
    with pytest.raises(
        ConnectionError, match="1,000,000 bytes that came are kept: run again"
    ):
        fetch(server.url, tmp_path / "set.zip", tries=1, wait=0)
    for k, v in change.items():
        setattr(server, k, v)
    assert fetch(server.url, tmp_path / "set.zip", wait=0).read_bytes() == server.body


def test_a_download_that_is_not_what_it_should_be_is_removed(server, tmp_path):
    with pytest.raises(ValueError, match="not the file it should be"):
        fetch(server.url, tmp_path / "set.zip", sha256="0" * 64)
    with pytest.raises(ConnectionError, match="HTTP 404"):
        fetch(server.url.replace("set.zip", "gone"), tmp_path / "gone", wait=60)
    assert not [f for f in tmp_path.iterdir() if f.suffix in (".zip", ".part")]


def test_a_file_that_is_there_but_not_what_it_should_be_is_fetched_anew(
    server, tmp_path
):
    got = fetch(server.url, tmp_path / "set.zip")
    server.body, server.tag = BODY[::-1], '"v2"'
    fetch(server.url, got)
    assert got.read_bytes() == BODY and len(server.requests) == 1
    fetch(server.url, got, sha256=hashlib.sha256(server.body).hexdigest())
    assert got.read_bytes() == server.body and len(server.requests) == 2


def test_a_full_disk_is_named_before_anything_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: type("usage", (), dict(free=1000))
    )
    with pytest.raises(MemoryError, match="Set MEDART_DATA"):
        fetch(server.url, tmp_path / "set.zip")


def test_kvasir_is_downloaded_unpacked_and_prepared(server, folders, monkeypatch):
    b = io.BytesIO()
    with zipfile.ZipFile(b, "w") as z:
        for n, c in enumerate(DATASETS["kvasir"].counts):
            for i in range(5):
                z.writestr(
                    f"kvasir-dataset-v2/{c}/{i}.jpg", saved(picture(10 * n + i), "JPEG")
                )
    server.body, server.drops[:] = b.getvalue(), [20_000]
    monkeypatch.setitem(
        sources.SOURCES["kvasir"],
        "url",
        server.url.replace("set.zip", "kvasir-dataset-v2.zip"),
    )
    s = load_split(recipe("kvasir", scale="paper", captions="simple"), "test")
    assert len(s) == 8 and set(s.classes) == set(DATASETS["kvasir"].counts)
    assert len(server.requests) == 2
    assert json.loads((folders[0] / "kvasir/kvasir-dataset-v2.zip.json").read_text())[
        "bytes"
    ] == len(server.body)


def test_without_network_one_message_says_everything(folders, monkeypatch):
    monkeypatch.setitem(
        sources.SOURCES["kvasir"], "url", "http://127.0.0.1:9/kvasir-dataset-v2.zip"
    )
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with pytest.raises(ConnectionError) as e:
        load_split(recipe("kvasir", scale="paper"), "train")
    for part in (
        "8,000 endoscopic images",
        "kvasir-dataset-v2.zip",
        "research and education only",
        str(folders[0] / "kvasir"),
        "scale=tiny",
    ):
        assert part in str(e.value)
    shutil.rmtree(folders[0] / "kvasir")
    with pytest.raises(FileNotFoundError) as e:
        load_split(recipe("skin", scale="paper"), "train")
    for part in (
        "isic image download",
        "HAM10000",
        "CC BY-NC",
        str(folders[0] / "skin"),
        "class folders",
    ):
        assert part in str(e.value)


# Archives


def zipped(path, *entries, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as z:
        for name, content, *mode in entries:
            i = zipfile.ZipInfo(name)
            i.compress_type = method
            i.external_attr = (mode[0] if mode else 0o100644) << 16
            z.writestr(i, content)
    return path


ATTACKS = {
    "climbs": ([("../evil.jpg", b"x")], "outside the folder"),
    "climbs from inside": ([("a/../../evil.jpg", b"x")], "outside the folder"),
    "absolute": ([("/tmp/evil.jpg", b"x")], "outside the folder"),
    "absolute on Windows": ([("C:/evil.jpg", b"x")], "outside the folder"),
    "climbs with backslashes": ([("..\\evil.jpg", b"x")], "outside the folder"),
    "link": ([("way", "/etc", 0o120777), ("way/passwd", b"x")], "link or a device"),
    "device": ([("null", b"", 0o020666)], "link or a device"),
    "twice": ([("a.jpg", b"x"), ("a.jpg", b"y")], "appears twice"),
    "twice but for case": ([("a/B.jpg", b"x"), ("A/b.jpg", b"y")], "appears twice"),
    "twice but for dots": ([("a.jpg", b"x"), ("./a.jpg", b"y")], "appears twice"),
    "file and folder": ([("a", b"x"), ("a/b.jpg", b"y")], "both a file and a folder"),
    "bomb": ([("zeros.png", bytes(70 << 20))], "bomb"),
    "many small bombs": ([(f"{i}.png", bytes(4 << 20)) for i in range(20)], "bomb"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("entries,why", ATTACKS.values(), ids=ATTACKS)
def test_a_hostile_archive_is_refused_before_anything_is_written(
    tmp_path, entries, why
):
    (tmp_path / "in").mkdir()
    z = zipped(tmp_path / "in/a.zip", ("good/1.jpg", b"x"), *entries)
    with pytest.raises(ValueError, match=why):
        unpack(z, tmp_path / "in/out")
    assert {
        f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*") if f.is_file()
    } - {"in/.out.lock"} == {"in/a.zip"}


def test_a_damaged_or_lying_archive_leaves_nothing(tmp_path):
    z = zipped(
        tmp_path / "a.zip",
        ("a.jpg", b"x" * 5000),
        ("b.jpg", bytes(range(256)) * 20),
        method=zipfile.ZIP_STORED,
    )
    good = z.read_bytes()
    lies = good.replace(
        struct.pack("<II", 5000, 5000), struct.pack("<II", 5000, 50)
    )  # says 50 bytes, holds 5000
    for bad in (good[:-30], good.replace(b"x" * 50, b"y" * 50, 1), lies, b"no zip"):
        z.write_bytes(bad)
        with pytest.raises(ValueError, match="damaged"):
            unpack(z, tmp_path / "out")
        assert not (tmp_path / "out").exists() and not list(
            tmp_path.glob(".out.unpacking")
        )
    z.write_bytes(good)
    assert len(list(unpack(z, tmp_path / "out").iterdir())) == 2
