"""Two versions of a notebook in one process, solved and blank: a cell that sees the same in both runs once.

Which cells these are is read off their bytecode. A name differs from the statement on that binds it in one way in one
version and otherwise in the other; it is equal again once a statement that sees no difference binds it anew.
"""

import ast
import dis
import os
import pickle
from types import CodeType, SimpleNamespace

from IPython.core.inputtransformer2 import TransformerManager


def inner(code):
    "Code of the functions and classes in a piece of code, at any depth."
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from inner(constant)


def flow(statement):
    "What a statement binds, what it reads before it binds it, and what its functions read whenever they are called."
    code = compile(ast.Module([statement], []), "cell", "exec")
    bound, reads, later = set(), set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("STORE_NAME", "DELETE_NAME"):
            bound.add(step.argval)
        elif step.opname == "LOAD_NAME" and step.argval not in bound:
            reads.add(step.argval)
    for part in inner(code):
        for step in dis.get_instructions(part):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                later.add(step.argval)
    return bound, reads, later - bound


def flows(source):
    "Of each statement of a cell: its flow, and whether it only defines something."
    for node in ast.parse(TransformerManager().transform_cell(source)).body:
        defines = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        yield *flow(node), defines


def plan(pairs):
    "For each pair of sources: whether it runs twice, what it binds, and what differs afterwards."
    differ, seen_later = set(), {}
    for pair in pairs:
        twice = stops = pair[0] != pair[1]
        everything = set()
        for source in pair[: 1 + twice]:
            for bound, reads, later, defines in flows(source):
                other = stops or bool((reads | later) & differ)
                twice = twice or other
                stops = stops or other and not defines  # what follows may not be run
                differ = differ | bound if other else differ - bound
                everything |= bound
                seen_later.update(dict.fromkeys(bound, later))
                differ |= readers(seen_later, differ)
        yield SimpleNamespace(twice=twice, bound=everything, differ=set(differ))


def readers(later, differ):
    "Functions that read what differs, or call one that does: they differ as well."
    found = set()
    while more := {n for n in later if later[n] & (differ | found)} - differ - found:
        found |= more
    return found


def state(value, depth=4):
    "Something that changes when data or a network is changed in place."
    import numpy as np
    import pandas as pd
    import torch

    if isinstance(value, torch.Tensor):
        return value._version
    if isinstance(value, torch.nn.Module):
        return [x._version for x in (*value.parameters(), *value.buffers())]
    if isinstance(value, np.ndarray) and value.dtype == object:
        return None
    if isinstance(value, (np.ndarray, pd.DataFrame, pd.Series)):
        return hash(pickle.dumps(value))
    if isinstance(value, dict):
        return state([*value.items()], depth)
    if isinstance(value, (list, tuple)) and depth:
        return [state(each, depth - 1) for each in value]
    if type(value).__module__.startswith("medart.") and hasattr(value, "__dict__"):
        return state(vars(value), depth)
    return value if isinstance(value, (str, int, float)) else None


def run_both(shell, pairs, environments, run_cell):
    "What the cells of either version lead to, in two lists."
    ns, steps = shell.user_ns, list(plan(pairs))
    names = set.union(*(step.differ for step in steps))
    kept, led_to = ({}, {}), ([], [])
    for pair, step in zip(pairs, steps):
        if not step.twice:
            result = run_cell(pair[1])
            for mine, results in zip(kept, led_to):
                mine.update({n: ns[n] for n in step.bound & names if n in ns})
                results.append(result)
            continue
        hidden = names | set(shell.user_ns_hidden)
        shared = {n: v for n, v in ns.items() if n not in hidden and n[0] != "_"}
        before = {n: repr(state(value)) for n, value in shared.items()}
        for k, source in enumerate(pair):
            for name in names:
                ns.pop(name, None)
            ns.update(kept[k])
            os.environ.update(environments[k])
            led_to[k].append(run_cell(source))
            for name in environments[k]:
                del os.environ[name]
            kept[k].clear()
            kept[k].update({n: ns[n] for n in names if n in ns})
        changed = [n for n, value in shared.items() if repr(state(value)) != before[n]]
        assert not changed, f"changed in one version, seen by the other: {changed}"
    return led_to
