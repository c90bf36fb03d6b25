"""Runs notebooks, each in a process of its own that is forked from one which has imported the large libraries already.

A line of JSON on standard input names a notebook and its environment; a line of JSON on standard output says how it ended.
Where the first names a file for a report, errors stop nothing, and what each cell led to is written to that file.
Where it names an address instead, a server for programs begins there.
Where it brings solutions, each cell with a blank runs once more with its solution.
Where it names a blank version too, both run side by side, the blank one as nbgrader does it, and both are reported.
Of this package nothing else is imported before a notebook asks for it.
"""

import json
import os
import re
import socket
import sys
import traceback

from medart.workflows.forked_kernels import import_libraries
from ready_python.server import serve

BLANK = re.compile(r"^answers? = \.\.\..*", re.MULTILINE)  # a line to be filled in


def run_solved(shell, source, line):
    "A cell with a line in place of its blank; there, a check that finds a blank is an error."
    os.environ["NBGRADER_EXECUTION"] = "validate"
    shell.run_cell(BLANK.sub(lambda blank: line, source)).raise_error()
    del os.environ["NBGRADER_EXECUTION"]


def run(path, env, report=None, solutions=()):
    "Its cells one after the other, in the main thread as in a kernel; errors are raised, or reported."
    from IPython.core.interactiveshell import InteractiveShell

    os.environ.clear()
    os.environ.update(env)
    os.chdir(os.path.dirname(path))
    shell = InteractiveShell.instance()
    with open(path, encoding="utf-8") as file:
        cells = json.load(file)["cells"]
    led_to, lines = {}, iter(solutions)
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        result = shell.run_cell(source)
        if not report:
            result.raise_error()
        error = result.error_before_exec or result.error_in_exec
        led_to[cell["id"]] = repr(error or result.result)
        if solutions and BLANK.search(source):
            run_solved(shell, source, next(lines))
    if report:
        with open(report, "w", encoding="utf-8") as file:
            json.dump(led_to, file)


def cells_of(path):
    "Ids and sources of a notebook's cells of code."
    with open(path, encoding="utf-8") as file:
        cells = json.load(file)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    return [(cell["id"], "".join(cell["source"])) for cell in code]


def run_versions(path, blank, env, report):
    "A solved notebook and its blank version; what each of their cells led to is written down."
    from IPython.core.interactiveshell import InteractiveShell
    from two_versions import run_both

    os.environ.clear()
    os.environ.update(env)
    os.chdir(os.path.dirname(path))
    shell = InteractiveShell.instance()

    def led_to(source):
        result = shell.run_cell(source)
        return repr(result.error_before_exec or result.error_in_exec or result.result)

    ids, solved = zip(*cells_of(path))
    same_ids, emptied = zip(*cells_of(blank))
    assert ids == same_ids
    graded = dict(NBGRADER_EXECUTION="autograde")
    found = run_both(shell, list(zip(solved, emptied)), ({}, graded), led_to)
    with open(report, "w", encoding="utf-8") as file:
        json.dump([dict(zip(ids, each)) for each in found], file)


def in_child(job, log):
    "Exit status of a forked process that runs the job and writes what it prints to a file."
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
        os.dup2(1, 2)
        if job["blank"]:
            run_versions(job["path"], job["blank"], job["env"], job["report"])
        else:
            run(job["path"], job["env"], job["report"], job["solutions"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def begin_server(address):
    "A copy of this process, of which programs can begin as copies; who asks before it is there waits."
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    if not os.fork():
        serve(listening)
    listening.close()
    return 0


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print does not come between the answers
    import_libraries()
    for line in sys.stdin:
        job = json.loads(line)
        if "serve" in job:
            status = begin_server(job["serve"])
        else:
            status = in_child(job, job["log"])
        print(json.dumps(status), file=answers, flush=True)


if __name__ == "__main__":
    main()
