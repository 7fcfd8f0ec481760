# SPDX-License-Identifier: Apache-2.0
"""What commands take: shared options and the types of their values."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

from .. import _core, config_values
from ..errors import UserError
from .files import read_machine

LEAST_BUDGET = 1 << 20
"""Bytes; no plan fits less, so a unit was forgotten."""


class Parser(argparse.ArgumentParser):
    """Errors in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (a value that begins with - is given as --option=-1)"
        self.exit(2, f"deepcompile: error: [cli] {message}. See {self.prog} --help\n")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    return command


def add_program(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="program text; - reads standard input")


def add_machine(command: argparse.ArgumentParser, required: bool = True, budget: str = "") -> None:
    names = ", ".join(_core.Machine.builtin_names())
    command.add_argument(
        "--machine", required=required, help=f"a JSON file, or a built-in machine: {names}"
    )
    command.add_argument(
        "--memory-budget",
        metavar="SIZE",
        type=memory_budget,
        help="most memory of one rank that passes may plan with: 40GiB, or a fraction of the "
        "machine's, 0.5; default: " + (budget or "all of the machine's"),
    )


def add_costs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--costs",
        metavar="FILE",
        help="measurements to use before the machine's numbers: the NAME.run.json that an "
        "engine's write_plan(NAME.txt) writes",
    )


def add_passes(command: argparse.ArgumentParser, help: str, required: bool = False) -> None:
    command.add_argument(
        "--passes",
        metavar="P,Q",
        type=names,
        required=required,
        help=f"{help}, in order: {', '.join(_core.pass_names())}",
    )
    command.add_argument(
        "--pass-library",
        metavar="FILE",
        action="append",
        default=[],
        help="a shared library whose passes --passes may name; may be given again",
    )
    command.add_argument(
        "--early-updates",
        action="store_true",
        help="updates may run inside the last backward, as with compile.early_updates",
    )


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def positives(text: str) -> list[int]:
    """'512,1024' -> [512, 1024], each once."""
    values = [positive(word) for word in comma_separated(text)]
    if not values:
        raise argparse.ArgumentTypeError("give at least one number")
    return list(dict.fromkeys(values))


def not_negative(text: str) -> int:
    value = whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def _number(text: str, fits: Callable[[float], bool], what: str) -> float:
    with contextlib.suppress(ValueError):
        if fits(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")


def positive_number(text: str) -> float:
    return _number(text, lambda value: 0 < value < 1e9, "a number above 0")


def part(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1, "a part of one, such as 0.05")


def memory_budget(text: str) -> int | float:
    """As compile.memory_budget has it: bytes, or a fraction that settle_budget() resolves."""
    try:
        value = config_values.memory("", text)
    except UserError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a size: write it as 40GiB, or as a fraction of the machine's, 0.5"
        ) from None
    if value < LEAST_BUDGET and isinstance(value, int):
        raise argparse.ArgumentTypeError(f"{text} is {value} bytes: write {value}GiB, or 0.5")
    return value


def settle_budget(options: argparse.Namespace) -> None:
    """Bytes in place of a fraction of the machine's memory."""
    budget = getattr(options, "memory_budget", None)
    if not isinstance(budget, float):
        return
    if options.machine is None:
        raise UserError(
            f"[cli] --memory-budget {budget:g}: is a fraction of the machine's memory. Give "
            "--machine too, or a size such as 40GiB."
        )
    options.memory_budget = max(1, int(budget * read_machine(options.machine).memory_bytes))


def comma_separated(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def names(text: str) -> list[str]:
    """As comma_separated, but an empty text, such as a variable that is not set, is no list."""
    words = comma_separated(text)
    if not words:
        raise argparse.ArgumentTypeError("give at least one name")
    return words


def dtype(*names: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")
        return text

    return check


def chart_file(text: str) -> str:
    if not text.endswith((".svg", ".html")):
        raise argparse.ArgumentTypeError(f"{text} must end in .svg or .html")
    return text
