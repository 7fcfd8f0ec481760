# SPDX-License-Identifier: Apache-2.0
"""The command line: plan, explain, opt, sim, report, bench, plot, timeline, launch.

Everything but ``launch`` and a measured ``bench`` runs without a GPU; everything but
``plan``, ``bench`` and ``launch`` without torch. Errors are one line on stderr, with exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__, cmake_dir
from ..errors import UserError, fail
from ..launch import launch
from ..launch import options as launch_options
from . import bench, plan, plot, programs, timeline
from .arguments import Parser, add_command, settle_budget

DESCRIPTION = """\
A compiler and runtime for sharded PyTorch training. These commands plan, explain
and simulate a training step for machines that are not there, and launch real ones."""

EXAMPLES = """\
examples:
  deepcompile plan --model llama-3-70b --machine 4x8-h100 --seq 512,1024,2048 --batch 1
  deepcompile plan --model llama-3-8b --machine 4xh200 --seq 4096 --out plan.txt
  deepcompile explain plan.txt --machine 4xh200
  deepcompile bench --simulate --machine 4x8-a100
  deepcompile plot --result_dir results/4x8-a100-simulated --metric throughput
  deepcompile launch --nproc-per-node 2 train.py"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["launch"] and arguments[1:] and arguments[1] not in ("-h", "--help"):
            return launch(arguments[1:])
        if arguments[:1] == ["bench"] and "--simulate" not in arguments:
            return bench.measured(arguments[1:])
        options = build_parser().parse_args(arguments)
        settle_budget(options)
        options.command(options)
        sys.stdout.flush()
    except UserError as error:
        return fail(error)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def run_launch(_: argparse.Namespace) -> None:
    raise UserError("[cli] launch: nothing to run. Give torchrun's arguments and a script.")


class PrintCmakeDir(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        print(cmake_dir())
        parser.exit()


def build_parser() -> Parser:
    parser = Parser(
        prog="deepcompile",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"deepcompile {__version__}")
    parser.add_argument(
        "--cmake-dir",
        action=PrintCmakeDir,
        nargs=0,
        help="print the folder of the CMake package for passes in C++",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    plan.add_to(commands)
    programs.add_to(commands)
    bench.add_to(commands)
    plot.add_to(commands)
    timeline.add_to(commands)
    command = add_command(
        commands,
        "launch",
        run_launch,
        "start ranks, on this machine or several",
        launch_options.EXAMPLES,
    )
    launch_options.add_to(command)
    return parser
