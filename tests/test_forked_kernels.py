"Kernels that are copies of one process: to Jupyter and to the shell they are like any other."

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import KernelManager

if sys.platform != "linux":
    pytest.skip("kernels are forked on Linux alone", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("kernels")


@contextmanager
def started(**options):
    "A kernel, its client, and a function that runs code and returns what it printed."
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(**options)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code):
        printed = []

        def hear(message):
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        client.execute_interactive(code, output_hook=hear, timeout=60)
        return "".join(printed).strip()

    yield manager, client, run
    client.stop_channels()
    if manager.is_alive():
        manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel():
    with started() as all_of_it:
        yield all_of_it


def soon(condition, within=20.0):
    "Does it come true within so many seconds?"
    until = time.monotonic() + within
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def gone(pid):
    "Has a process ended, or does it soon?"
    return soon(lambda: not psutil.pid_exists(pid))


def test_libraries_are_there_and_this_project_is_not(kernel):
    code = "import sys; print('peft' in sys.modules, *sorted(filter(lambda m: m.startswith('medart'), sys.modules)))"
    ours = "medart medart.workflows medart.workflows.forked_kernels"
    assert kernel[2](code) == f"True {ours}"


def test_environment_folder_and_threads_are_the_asker_s(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDART_OUTPUTS", "here")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    code = (
        "import os, torch; print(os.environ['MEDART_OUTPUTS'], os.getcwd(), "
        "torch.get_num_threads(), 'PYTEST_CURRENT_TEST' in os.environ)"
    )
    with started(cwd=str(tmp_path)) as (_, _, run):
        assert run(code).split() == ["here", str(tmp_path), "3", "False"]


def test_a_crash_stays_in_its_kernel(kernel):
    manager, client, run = kernel
    pid = int(run("import os; print(os.getpid())"))
    client.execute("os._exit(7)")
    assert gone(pid)
    assert soon(lambda: not manager.is_alive())
    other = KernelManager(kernel_name="python3")
    other.start_kernel()
    assert other.is_alive()
    other.shutdown_kernel(now=True)


def test_an_interrupt_reaches_the_cell(kernel, tmp_path):
    manager, client, run = kernel
    run("import signal, time")
    begun = tmp_path / "begun"
    # after an error Jupyter drops, unless told, what is asked within a tenth of a second
    code = f"open({str(begun)!r}, 'w').close(); time.sleep(60)"
    number = client.execute(code, stop_on_error=False)
    assert soon(begun.exists, within=60)
    manager.interrupt_kernel()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        reply = client.get_shell_msg(timeout=30)
        if reply["parent_header"].get("msg_id") == number:
            break
    assert reply["content"]["ename"] == "KeyboardInterrupt"
    assert run("print('alive')") == "alive"


def test_a_kernel_does_not_outlive_who_asked(kernel):
    pid = int(kernel[2]("import os; print(os.getpid())"))
    asker = kernel[0].provisioner.pid
    assert asker != pid
    os.kill(asker, signal.SIGKILL)
    assert gone(pid)


OUTLIVED = """
import os, signal
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="python3")
manager.start_kernel()
client = manager.client()
client.start_channels()
client.wait_for_ready(timeout=60)
hook = lambda m: print(m["content"].get("text", ""), end="", flush=True)
client.execute_interactive("import os; print(os.getpid())", output_hook=hook)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nor_a_chain_that_was_killed():
    done = subprocess.run([sys.executable, "-c", OUTLIVED], stdout=-1, text=True)
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))


def test_afterwards_nothing_is_left(tmp_path):
    program = (
        "import os, psutil\n"
        "from medart.workflows.forked_kernels import forked_kernels\n"
        "with forked_kernels([]):\n"
        "    folder = os.environ['JUPYTER_PATH'].split(os.pathsep)[0]\n"
        "    (server,) = psutil.Process().children()\n"
        "print(folder, server.is_running(), os.environ['JUPYTER_PATH'])\n"
    )
    env = {**os.environ, "JUPYTER_PATH": "before"}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=-1, text=True, env=env
    )
    folder, running, path = done.stdout.split()
    assert running == "False" and path == "before" and not Path(folder).exists()


def test_a_server_that_does_not_start_is_said(monkeypatch):
    from medart.workflows import forked_kernels as module

    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        with module.forked_kernels():
            raise AssertionError("it began all the same")
