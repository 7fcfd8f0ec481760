# SPDX-License-Identifier: Apache-2.0
"""``deepcompile bench``: the benchmark's sweeps, measured here or simulated for any machine.

A measured sweep is deepcompile.bench.sweep, the search for the largest depth
deepcompile.bench.depth; this module has the simulated sweep.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..errors import UserError
from . import arguments as types
from .arguments import add_command, add_machine
from .plot import ALL, METRICS, draw

EXAMPLES = """\
Without --simulate a sweep runs on this machine's devices; it has options of its
own: deepcompile bench --help. With it everything is simulated, with kernel
times estimated from the machine's numbers: ZeRO3 and FSDP (C) as schedules of
our compiled regions, DeepCompile (P), (S), (P+S) and (auto) as planned. Where
activation checkpointing is on, auto chooses what is recomputed; "auto best" is
the faster of that and of recomputing everything.

examples:
  deepcompile bench --simulate --machine 4x8-a100
  deepcompile bench acc --simulate --machine 4x8-a100
  deepcompile bench --simulate --machine 4x8-h100 --models llama-3-70b --batch 1 \\
      --seq 512,1024,2048 --result-dir results/h100
  deepcompile bench --simulate --machine 4xh200 --models llama-3-70b --layers 16 \\
      --batch 1 --seq 1024 --accumulation 1,2,4,8,16"""


SUITES: dict[str, dict[str, tuple[int, ...]]] = {
    "bench": {"batch": (1, 2, 4), "seq": (512, 1024, 2048), "accumulation": (1,)},
    "acc": {"batch": (1,), "seq": (1024,), "accumulation": (2, 4, 8, 16)},
}
"""The seed's run_bench.sh and run_bench_acc.sh."""


ONLY_SIMULATED = ("--machine", "--memory-budget")
"""Options that a measured sweep, which runs on this machine, does not have."""


def _shown(numbers: Sequence[int]) -> str:
    return ",".join(str(number) for number in numbers)


def add_to(commands: Any) -> None:
    text = "run the benchmark's sweeps, or simulate them"
    bench = add_command(commands, "bench", run, text, EXAMPLES)
    bench.prog += " --simulate"  # as errors and the usage line name it
    add = bench.add_argument
    text = "bench: batch sizes and lengths; acc: gradients accumulated; default: bench"
    add("suite", nargs="?", choices=sorted(SUITES), default="bench", help=text)
    add("--simulate", action="store_true", required=True, help=argparse.SUPPRESS)
    add_machine(bench, budget="the machine's less its reserve")
    add(
        "--models",
        metavar="M,N",
        type=types.comma_separated,
        default=["llama-3-70b", "mixtral-8x7b"],
        help="built-in names, the Hugging Face names of the same models, folders, config.json "
        "files; default: llama-3-70b, mixtral-8x7b",
    )
    lists = {"batch": ("batch-sizes", "sequences a rank"), "seq": ("seq-lengths", "lengths"),
             "accumulation": ("accumulations", "micro-steps a step")}  # fmt: skip
    for name, (measured, what) in lists.items():
        shown = "; ".join(f"{suite} {_shown(sizes[name])}" for suite, sizes in SUITES.items())
        add(f"--{name}", f"--{measured}", dest=name, metavar="N,M", type=types.positives,
            help=f"{what}; default: {shown}")  # fmt: skip
    add("--layers", "--num-layers", metavar="N", type=types.positive, default=0,
        help="cut models to N layers")  # fmt: skip
    add("--dtype", metavar="bf16|fp32", type=types.dtype, default="bf16", help="(%(default)s)")
    add(
        "--persistence-threshold",
        metavar="N",
        type=types.not_negative,
        help="parameters of fewer elements are packed and stay whole",
    )
    add("--no-checkpointing", action="store_true", help="no activation checkpointing anywhere")
    add("--no-clip", action="store_true", help="gradients are not clipped")
    add(
        "--result-dir",
        "--result_dir",
        metavar="DIR",
        help="where rows and charts go; default: results/MACHINE-simulated, -acc behind it for acc",
    )
    add(
        "--metrics",
        metavar="M,N",
        type=metric_names,
        default=["throughput", "mfu", "peak_mem"],
        help="charts to draw, all or none; default: throughput,mfu,peak_mem",
    )


def metric_names(text: str) -> list[str]:
    names = types.comma_separated(text)
    if names in (["none"], [ALL]):
        return [] if names == ["none"] else list(METRICS)
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METRICS)}")
    return names


def measured(arguments: Sequence[str]) -> int:
    """A sweep on this machine, or a search for the largest depth; each reads its own arguments."""
    from ..bench import depth, sweep

    if list(arguments[:1]) == ["depth"]:
        return depth.main(list(arguments[1:]))
    for word in arguments:
        if word.partition("=")[0] in ONLY_SIMULATED:
            raise UserError(
                f"[cli] {word}: belongs to --simulate. Write `deepcompile bench --simulate "
                f"{' '.join(arguments)}`, or leave it out to measure here."
            )
    if {"-h", "--help"} & set(arguments):
        print(
            "Sweeps on this machine. Simulated ones: deepcompile bench --simulate --help\n"
            "The largest depth that trains: deepcompile bench depth --help\n"
        )
    return sweep.main(list(arguments))


def run(options: argparse.Namespace) -> None:
    from ..bench.display import Display
    from ..bench.plot import matplotlib
    from ..bench.results import append
    from ..bench.simulate import Job, SimulatedSweep, Stopwatch, read_machine
    from ..bench.simulate import run as simulate

    if options.metrics:
        matplotlib()  # its absence is an error before the work
    sizes = SUITES[options.suite]
    sweep = SimulatedSweep(
        machine=options.machine,
        models=tuple(options.models),
        batch_sizes=tuple(options.batch or sizes["batch"]),
        seq_lengths=tuple(options.seq or sizes["seq"]),
        accumulations=tuple(options.accumulation or sizes["accumulation"]),
        num_layers=options.layers,
        dtype=options.dtype,
        checkpointing=not options.no_checkpointing,
        clip=not options.no_clip,
        persistence_threshold=options.persistence_threshold,
        memory_budget=options.memory_budget,
    )
    folder = options.result_dir
    if not folder:
        folder = f"results/{read_machine(options.machine).name}-simulated"
        folder += "" if options.suite == "bench" else f"-{options.suite}"
    clock = Stopwatch()
    with Display(len(sweep.jobs()), 0) as display:

        def finished(job: Job, rows: list) -> None:
            for row in rows:
                append(folder, row)
            display.begin(job.name)
            display.end(said(rows), clock.lap())

        seconds = simulate(sweep, finished)
    print(f"{len(sweep.jobs())} captures simulated in {seconds:.1f} s; rows are in {folder}")
    if options.metrics:
        draw(folder, folder, options.metrics, len(sweep.accumulations) > 1, skip=True)


def said(rows: list) -> str:
    """One line for a capture: tokens/s/GPU of each plan."""
    cells = []
    for row in rows:
        rate = row.tokens_per_second_per_gpu
        cells.append(f"{row.condition.label} {rate:,.0f}" if rate else
                     f"{row.condition.label} {row.failure}")  # fmt: skip
    return "tokens/s/GPU: " + ", ".join(cells)
