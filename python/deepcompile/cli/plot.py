# SPDX-License-Identifier: Apache-2.0
"""``deepcompile plot``: charts of a sweep's results."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .arguments import Parser, add_command

EXAMPLES = """\
Reads rows.jsonl and result.txt of a folder, DeepSpeed's too. Charts go to
{result_dir}/{metric}/chart_{metric}_{model}_np{N}_bs{B}.png; simulated bars are
hatched, and a condition that failed is a gap with its reason.

examples:
  deepcompile plot --result_dir profiles --metric throughput
  deepcompile plot --result_dir profiles --metric throughput --acc_step_eval
  deepcompile plot --result_dir profiles --metric mfu --peak-tflops 125"""
METRICS = ("throughput", "iteration_time", "flops", "mfu", "peak_mem", "compile_time")


def add_to(commands: Any) -> None:
    text = "draw charts of a sweep's results"
    add_arguments(add_command(commands, "plot", run, text, EXAMPLES))


def add_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--result_dir", "--result-dir", metavar="DIR", required=True, help="where the results are")
    add(
        "--result_file",
        "--result-file",
        metavar="FILE",
        help="only this file of it; default: rows.jsonl and result.txt",
    )
    add("--metric", required=True, choices=METRICS, help="what the bars show")
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


def positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def run(options: argparse.Namespace) -> None:
    from pathlib import Path

    from ..bench.metrics import metric
    from ..bench.plot import gains_text, matplotlib, plot
    from ..bench.results import Results

    matplotlib()  # its absence is an error before anything else
    folder = Path(options.result_dir)
    results = Results.load(folder / options.result_file if options.result_file else folder)
    for problem in results.problems:
        print(f"deepcompile: skipped: {problem}", file=sys.stderr)
    drawn = plot(
        results, folder, options.metric, options.acc_step_eval, options.peak_tflops
    )  # fmt: skip
    for _, path in drawn:
        print(path)
    text = gains_text([c for c, _ in drawn], metric(options.metric, options.peak_tflops))
    if text:
        print("\n" + text)


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
