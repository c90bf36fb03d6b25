"""What Python runs when it starts: some programs become copies of a process that has imported their libraries.

Only where READY_PYTHON names the server of `server.py`. The program that was started stays: it lends its copy the standard
streams, hands on signals, and ends as the copy ends; where it is killed, the copy is killed as well.
"""

import os
import sys

PROGRAMS = ("snakemake", "papermill", "accelerate.", "medart.")
PR_SET_PDEATHSIG = 1


def is_ready(words):
    "Whether such a command runs a program that the server is ready for."
    words = [word for word in words if word != "-u"]
    if len(words) > 2 and words[0] == "-c" and "run_module" in words[1]:
        words = ["-m", *words[2:]]  # `python_module` of `workflows.processes`
    if len(words) < 2:
        return False
    if words[0] == "-c":
        return "medart." in words[1]
    return words[0] == "-m" and words[1].startswith(PROGRAMS)


def follow_copy(address):
    "Ask for a copy, and end as it ends."
    import ctypes
    import json
    import signal
    import socket
    import struct

    handed_on = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)  # until the copy is known
    asker = socket.socket(socket.AF_UNIX)
    asker.connect(address)
    job = dict(argv=sys.orig_argv, cwd=os.getcwd(), env=dict(os.environ), path=sys.path)
    job = json.dumps(job).encode()
    socket.send_fds(asker, [struct.pack("i", len(job))], [0, 1, 2])
    asker.sendall(job)
    if "prctl" in sys.orig_argv[2]:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    (copy,) = struct.unpack("i", asker.recv(4))

    def hand_on(number, frame):
        try:
            os.kill(copy, number)
        except ProcessLookupError:  # it has just ended
            pass

    for number in handed_on:
        signal.signal(number, hand_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handed_on)
    (status,) = struct.unpack("i", asker.recv(4))
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if os.environ.get("READY_PYTHON") and is_ready(sys.orig_argv[1:]):
    follow_copy(os.environ["READY_PYTHON"])
