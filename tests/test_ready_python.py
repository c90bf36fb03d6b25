"Programs that begin as copies of a process with libraries behave as those that begin in the ordinary way."

import os
import select
import signal
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.usefixtures("ready_python"),
    pytest.mark.skipif(sys.platform != "linux", reason="copies are made on Linux"),
]
MARK = "# medart.\n"  # what such a program is known by


def run(code, *told, **options):
    command = [sys.executable, "-c", MARK + code, *told]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_libraries_are_there_and_this_project_is_not():
    done = run(
        "import sys; print(*(n in sys.modules for n in ('peft', 'medart.core')))"
    )
    assert done.stdout == "True False\n", done.stderr


def test_words_folder_environment_and_streams_are_those_of_the_command(tmp_path):
    code = "import os, sys; print(sys.argv, os.getcwd(), os.environ['A'], input())"
    env = os.environ | dict(A="b")
    done = run(code, "x", "y", cwd=tmp_path, env=env, input="read")
    assert done.stdout == f"['-c', 'x', 'y'] {tmp_path} b read\n", done.stderr


@pytest.mark.parametrize(
    "code,status,said",
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KeyboardInterrupt"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'end')", 0, "end"),
    ],
)
def test_they_end_alike(code, status, said):
    done = run(code)
    assert done.returncode == status
    assert said in done.stderr + done.stdout


def test_signals_reach_the_copy_and_it_does_not_outlive_what_was_started():
    code = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: print("told", flush=True))
print(os.getpid(), flush=True)
time.sleep(600)
"""
    command = [sys.executable, "-c", MARK + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        copy = os.pidfd_open(int(program.stdout.readline()))
        program.terminate()
        assert program.stdout.readline() == "told\n"
        program.kill()
        assert program.stdout.read() == "", "its end of the stream is closed"
    assert select.select([copy], [], [], 60)[0], "it has ended"
