"""Measures each speed-up on this machine, with it and without it, in less than ten minutes.

    python tools/gpu_ranks.py                # full size, on a GPU of 24 GB or more
    python tools/gpu_ranks.py --scale tiny   # small networks: does it run?

The weights are random, so nothing needs to be downloaded. The table lies in outputs/benchmark, as CSV and Markdown.
"""

from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from time import monotonic

from accelerate import Accelerator

from medart.bundled.benchmark_models import bench_model
from medart.bundled.benchmarks import header
from medart.bundled.speedups import comparisons, measure_speedups, write_speedups
from medart.core.paths import shareable
from medart.method.lora import perturb_loras
from medart.recipes.recipe import recipe
from medart.recipes.scales import scale_named


def parsed():
    "What was asked for."
    p = ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--scale", default="auto", help="paper, tiny or auto")
    p.add_argument("--minutes", type=float, default=9, help="that all may take")
    p.add_argument("--seconds", type=float, default=150, help="that one case may take")
    p.add_argument("--repeats", type=int, default=8, help="timed runs of a step")
    return p.parse_args()


def sizes(scale):
    "How much work a case is: enough to be timed, and no more."
    if scale == "tiny":
        return dict(solver_steps=2, gen_steps=2, gen_block=2)
    return dict(gen_block=4)


def main():
    "Build the model, measure, and write a row after each comparison."
    begin, asked = monotonic(), parsed()
    scale = scale_named(asked.scale)
    device = Accelerator().device
    r = recipe("skin", scale=scale, batch_size=1, **sizes(scale))
    model = perturb_loras(bench_model(r, device), 0.01)
    about = header(model, r)
    backend = "inductor" if device.type == "cuda" else "eager"

    def write(table):
        print(table.iloc[-1].dropna().to_string(), "\n", flush=True)
        write_speedups(table, about)

    table = measure_speedups(
        r,
        model,
        comparisons(r, backend),
        asked.repeats,
        asked.seconds,
        asked.minutes - (monotonic() - begin) / 60,
        write,
    )
    print(f"{len(table)} comparisons: {shareable(write_speedups(table, about))}")


if __name__ == "__main__":
    main()
