"""A copy of the process of `notebook_runner.py` for each program that asks: see `sitecustomize.py`.

A copy has the asker's command, folder, environment, search path and streams. Of this package nothing else is imported
before a program asks for it.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import wait
from types import ModuleType

PR_SET_PDEATHSIG = 1


def run_program(words):
    "What Python does with a command's words."
    words = [word for word in words if word != "-u"]
    how, what, *told = words
    if how == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = [what, *told]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    sys.path.insert(0, "")
    sys.argv = ["-c", *told]
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(what, "<string>", "exec"), vars(main))


def status_of(work, *told):
    "Exit status of some work, as Python's own."
    try:
        work(*told)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    return 0


def become(job, files):
    "Turn this copy into the program, and end as Python ends."
    import torch

    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.path[:] = job["path"]
    sys.orig_argv = job["argv"]
    sys.stdout.reconfigure(write_through="-u" in job["argv"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    status = status_of(run_program, job["argv"][1:])
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def keep(asker):
    "Make a copy, tell who asked its number and how it ended; kill it when nobody waits."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(asker, 4, 3)
    (length,) = struct.unpack("i", head)
    with asker.makefile("rb") as stream:
        job = json.loads(stream.read(length))
    copy = os.fork()
    if not copy:
        become(job, files)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for file in [*files, 0, 1, 2]:
        os.close(file)  # so that who reads a stream sees its end
    asker.sendall(struct.pack("i", copy))
    ended = os.pidfd_open(copy)
    if ended not in wait([asker, ended]):
        os.kill(copy, signal.SIGKILL)
    _, status = os.waitpid(copy, 0)
    with suppress(OSError):
        asker.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))


def serve(listening):
    "In a copy of a process that has imported libraries: a copy of this copy for each that asks; it ends with its parent."
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    import_module("snakemake.cli")
    gc.freeze()  # copies need not look through what the libraries hold
    while True:
        asker, _ = listening.accept()
        if not os.fork():
            listening.close()
            keep(asker)
            os._exit(0)
        asker.close()
