# Tables of the paper, stage by stage: snakemake -c2 table3 --config datasets=skin
# How to run it on a laptop, one GPU or a cluster: nbs/reproduce.ipynb.
# Which stages are left is known from records (nbs/workflows/19_sweeps.ipynb).
# Rules read no data: each leaves a mark when its stage has ended well.
import sys

sys.path.insert(0, str(workflow.basedir))
MAIN = workflow.is_main_process  # else one stage, on a cluster's machine
MARKS = ".snakemake/stages"
asked, sweeps = [], []  # signals; the sweep, made when it is first needed


def sweep():
    if not sweeps:
        from medart.workflows.sweeps import Sweep

        sweeps.append(Sweep(config, asked))
    return sweeps[0]


def before(rule):
    return lambda name: sweep().before(f"{rule}/{name.name}") if MAIN else []


def target(name):
    return lambda _: sweep().marks(name) if MAIN else []


GPU = sweep().gpus if MAIN else 0


onstart:
    sweep().begin()


onsuccess:
    sweep().report()


onerror:
    sweep().report()


localrules:
    all,
    rows,


rule all:
    input:
        f"{MARKS}/tables/all.done",


rule rows:
    input:
        target("rows"),


rule table2:
    input:
        f"{MARKS}/tables/table2.done",


rule table3:
    input:
        f"{MARKS}/tables/table3.done",


rule table4:
    input:
        f"{MARKS}/tables/table4.done",


rule caption:
    input:
        before("caption"),
    output:
        touch(MARKS + "/caption/{name}.done"),
    resources:
        gpu=GPU,
    run:
        sweep().run(f"caption/{wildcards.name}")


rule train:
    input:
        before("train"),
    output:
        touch(MARKS + "/train/{name}.done"),
    priority: 1
    resources:
        gpu=GPU,
    run:
        sweep().run(f"train/{wildcards.name}")


rule generate:
    input:
        before("generate"),
    output:
        touch(MARKS + "/generate/{name}.done"),
    priority: 2
    resources:
        gpu=GPU,
    run:
        sweep().run(f"generate/{wildcards.name}")


rule evaluate:
    input:
        before("evaluate"),
    output:
        touch(MARKS + "/evaluate/{name}.done"),
    priority: 3
    resources:
        gpu=GPU,
    run:
        sweep().run(f"evaluate/{wildcards.name}")


rule generate_for_classifiers:
    input:
        before("generate_for_classifiers"),
    output:
        touch(MARKS + "/generate_for_classifiers/{name}.done"),
    priority: 2
    resources:
        gpu=GPU,
    run:
        sweep().run(f"generate_for_classifiers/{wildcards.name}")


rule classify:
    input:
        before("classify"),
    output:
        touch(MARKS + "/classify/{name}.done"),
    priority: 3
    resources:
        gpu=GPU,
    run:
        sweep().run(f"classify/{wildcards.name}")


rule look:  # a row that cannot even be looked at fails by this
    output:
        touch(MARKS + "/look/{name}.done"),
    run:
        sweep().run(f"look/{wildcards.name}")


rule tables:
    input:
        lambda what: target(what.what)(what),
    output:
        touch(MARKS + "/tables/{what}.done"),
    run:
        sweep().write_tables(wildcards.what)
