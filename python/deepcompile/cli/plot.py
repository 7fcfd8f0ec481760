# SPDX-License-Identifier: Apache-2.0
"""``deepcompile plot``: charts of a sweep's results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arguments import Parser, add_command, positive_number

EXAMPLES = """\
Reads rows.jsonl and result.txt of a folder, DeepSpeed's too. Charts go to
{result_dir}/{metric}/chart_{metric}_{model}_np{N}_bs{B}.png; simulated bars are
hatched, and a condition that failed is a gap with its reason. Without --metric
all are drawn that the results say.

examples:
  deepcompile plot --result_dir profiles
  deepcompile plot --result_dir profiles --metric throughput
  deepcompile plot --result_dir profiles --metric throughput --acc_step_eval
  deepcompile plot --result_dir profiles --metric mfu --peak-tflops 125"""
METRICS = ("throughput", "iteration_time", "flops", "mfu", "peak_mem", "compile_time")
ALL = "all"


def add_to(commands: Any) -> None:
    text = "draw charts of a sweep's results"
    add_arguments(add_command(commands, "plot", run, text, EXAMPLES))


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--result_dir",
        "--result-dir",
        metavar="DIR",
        required=True,
        help="where the results are, or a file of them; charts go beside it",
    )
    add(
        "--result_file",
        "--result-file",
        metavar="FILE",
        help="only this file of it; default: rows.jsonl and result.txt",
    )
    add("--metric", default=ALL, choices=(*METRICS, ALL), help="what the bars show (%(default)s)")
    add(
        "--acc_step_eval",
        "--acc-step-eval",
        action="store_true",
        help="bars over gradient accumulation steps instead of sequence lengths",
    )
    add(
        "--peak-tflops",
        metavar="N",
        type=positive_number,
        help="the device's peak for mfu, where it is not known",
    )


def run(options: argparse.Namespace) -> None:
    from ..bench.plot import matplotlib

    matplotlib()  # its absence is an error before anything else
    folder = Path(options.result_dir)
    file = folder / options.result_file if options.result_file else folder
    if folder.is_file():
        folder = folder.parent
    names = METRICS if options.metric == ALL else [options.metric]
    draw(file, folder, names, options.acc_step_eval, options.peak_tflops, options.metric == ALL)


def draw(
    source: str | Path,
    folder: str | Path,
    names: Sequence[str],
    by_accumulation: bool,
    peak_tflops: float | None = None,
    skip: bool = False,
) -> None:
    """Draws charts of results into ``folder`` and prints their names and the gains. ``skip``: what
    the results do not say is a note, not an error, unless they say nothing at all."""
    from ..bench.metrics import absent, metric
    from ..bench.plot import gains_text, plot
    from ..bench.results import Results

    results = Results.load(source)
    for problem in results.problems:
        print(f"deepcompile: skipped: {problem}", file=sys.stderr)
    rows = results.latest().rows
    why = {name: absent(rows, name, peak_tflops) for name in names} if skip else {}
    if not any(reason is None for reason in why.values()):
        why = {}  # the first of them is an error
    for name in names:
        if why.get(name):
            print(f"deepcompile: no chart: {why[name]}", file=sys.stderr)
            continue
        drawn = plot(results, folder, name, by_accumulation, peak_tflops)
        for _, path in drawn:
            print(path)
        what = metric(name, peak_tflops)
        text = gains_text([chart for chart, _ in drawn], what)
        if text and (len(names) == 1 or name == "throughput" or not what.by_time):
            print(f"\n{text}\n")  # other times' gains are throughput's


def main() -> int:
    """As a script: the seed's plot.py."""
    from ..errors import UserError, fail

    parser = Parser(description="Draw charts of a sweep's results.", epilog=EXAMPLES,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except UserError as error:
        return fail(error)
    return 0
