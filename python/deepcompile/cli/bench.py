# SPDX-License-Identifier: Apache-2.0
"""``deepcompile bench``: the benchmark's sweeps, measured here or simulated for any machine.

A measured sweep is deepcompile.bench.sweep, the search for the largest depth
deepcompile.bench.depth; this module has the simulated sweep.
"""

from __future__ import annotations

import argparse
import itertools
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
BOTH = {
    "--machine": "--machine", "--memory-budget": "--memory-budget", "--models": "--models",
    "--model": "--models", "--num-layers": "--layers", "--batch-sizes": "--batch",
    "--seq-lengths": "--seq", "--accumulations": "--accumulation", "--dtype": "--dtype",
    "--result_dir": "--result-dir",
}  # fmt: skip
"""Options of a measured sweep, or meant for it -> what --simulate calls them."""


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
        type=types.names,
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
    kinds = types.dtype("bf16", "fp32")
    add("--dtype", metavar="bf16|fp32", type=kinds, default="bf16", help="(%(default)s)")
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
                f"[cli] {word}: belongs to --simulate. Write `{simulated(arguments)}`, or leave it "
                "out to measure here."
            )
    if {"-h", "--help"} & set(arguments):
        print(
            "Sweeps on this machine. Simulated ones: deepcompile bench --simulate --help\n"
            "The largest depth that trains: deepcompile bench depth --help\n"
        )
    return sweep.main(list(arguments))


def simulated(arguments: Sequence[str]) -> str:
    """The command that simulates what a measured sweep's command line asks for, as far as both
    have it."""
    from ..bench.suites import SUITES as MEASURED

    names = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    words = ["deepcompile", "bench", *[name for name in names[:1] if name in SUITES], "--simulate"]
    given: dict[str, str] = {}
    for name in names[:1]:
        if name in MEASURED and name not in SUITES:
            given = _sizes_of(MEASURED[name])
    for word, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name in BOTH:
            given[BOTH[name]] = value if equals else after
    return " ".join([*words, *(w for pair in given.items() for w in pair)])


def _sizes_of(suite: Any) -> dict[str, str]:
    """A measured suite's models and sizes as options of --simulate."""
    depths = {abs(layers) for _, layers in suite.models}
    found = {"--models": ",".join(model for model, _ in suite.models)}
    if len(depths) == 1 and (depth := depths.pop()):
        found["--layers"] = str(depth)
    return found | {"--batch": _shown(suite.batch_sizes), "--seq": _shown(suite.seq_lengths),
                    "--accumulation": _shown(suite.accumulations)}  # fmt: skip


def run(options: argparse.Namespace) -> None:
    from ..bench import beforehand
    from ..bench.display import Display
    from ..bench.plot import matplotlib
    from ..bench.results import ROWS, append
    from ..bench.simulate import Job, SimulatedSweep, at_a_time, check, read_machine
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
    check(sweep)
    beforehand.folder(folder, ROWS)
    jobs = sweep.jobs()
    side_by_side = at_a_time(jobs)
    with Display(len(jobs), 0, at_a_time=side_by_side) as display:

        def finished(job: Job, rows: list, seconds: float) -> None:
            for row in rows:
                append(folder, row)
            display.begin(job.name)
            display.end(said(rows), seconds)

        display.say(
            f"captures to simulate: {len(jobs)}, {side_by_side} at a time; first "
            + "; ".join(job.name for job in jobs[:side_by_side])
        )
        seconds = simulate(sweep, finished)
    print(f"{len(jobs)} captures simulated in {seconds:.1f} s; rows are in {folder}")
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
