# SPDX-License-Identifier: Apache-2.0
"""``deepcompile timeline``: a traced step as a picture, and its idle time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import UserError
from .arguments import add_command

EXAMPLES = """\
Reads step.json of `deepcompile bench --profile`, or what Engine.write_trace or
`deepcompile sim --trace` wrote; the same file opens in ui.perfetto.dev.

examples:
  deepcompile timeline profiles/NAME/step.json
  deepcompile timeline step.json --process predicted --out step.svg"""


def add_to(commands: Any) -> None:
    text = "draw a traced step, and say where compute stands idle"
    command = add_command(commands, "timeline", run, text, EXAMPLES)
    command.add_argument("trace", metavar="TRACE", help="a trace in Perfetto's JSON")
    command.add_argument(
        "--process",
        metavar="NAME",
        help="which of its steps: measured, predicted, or 'predicted with measured regions'; "
        "default: measured, or the only one",
    )
    command.add_argument("--title", help="above the picture; default: the process")
    command.add_argument(
        "--out",
        metavar="FILE",
        help=".png, .svg or .pdf; default: the trace's name with the process's, if one is asked "
        "for, and .png",
    )


def run(options: argparse.Namespace) -> None:
    from ..bench.plot import matplotlib
    from ..report import timeline

    matplotlib()  # its absence is an error before anything else
    asked = f".{options.process.replace(' ', '-')}" if options.process else ""
    out = Path(options.out or Path(options.trace).with_suffix(f"{asked}.png"))
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"[timeline] {out}: is no .png, .svg or .pdf. Name the picture so.")
    process, items = timeline.read_step(options.trace, options.process)
    timeline.draw(items, out, options.title or process)
    found = timeline.times(items)
    width = max(map(len, found))
    for name, ms in sorted(found.items(), key=lambda each: -each[1]):
        print(f"{name:{width}}  {ms:9.2f} ms")
    print(out)
