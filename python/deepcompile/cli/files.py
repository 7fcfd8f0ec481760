# SPDX-License-Identifier: Apache-2.0
"""Files that commands read and write, and running passes by name."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import _core
from ..errors import UserError
from ..predict import run_passes


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"[cli] {path}: cannot be read ({reason(error)}). Check the path."
        ) from None


def read_program(path: str) -> _core.StepProgram:
    """The program in a file, or on standard input if ``path`` is ``-``."""
    if path == "-":
        return _core.StepProgram.parse(sys.stdin.read(), "stdin")
    text = read_text(path)
    if text.lstrip().startswith("{"):
        raise UserError(
            f"[cli] {path}: is JSON. Give the program's text, as `plan --out` writes it."
        )
    return _core.StepProgram.parse(text, path)


def read_machine(name: str) -> _core.Machine:
    """A built-in machine, or one from a file."""
    if name in _core.Machine.builtin_names():
        return _core.Machine.builtin(name)
    is_path = name.endswith(".json") or os.sep in name or Path(name).is_file()
    return _core.Machine.load(name) if is_path else _core.Machine.builtin(name)


def read_costs(path: str | None) -> _core.CostTable | None:
    return None if path is None else _core.CostTable.parse(read_text(path), path)


def write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"[cli] {path}: cannot be written ({reason(error)}). Choose another place."
        ) from None


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def resolve_passes(names: Sequence[str], libraries: Sequence[str]) -> list[Any]:
    """Passes by name: built-in ones, and those of the libraries."""
    from ..passes.library import load_library

    loaded = {p.pass_name: p for path in libraries for p in load_library(path)}
    known = [*_core.pass_names(), *loaded]
    for name in names:
        if name not in known:
            raise UserError(
                f"[cli] --passes {name}: there is no such pass. Known passes: {', '.join(known)}."
            )
    return [loaded.get(name, name) for name in names]


def run_named(
    program: _core.StepProgram, machine: _core.Machine | None, options: argparse.Namespace
) -> list[_core.PassRecord]:
    """The passes that a command's options name."""
    passes = resolve_passes(options.passes or [], options.pass_library)
    if not passes:
        return []
    costs = read_costs(options.costs)
    return run_passes(program, passes, machine, options.memory_budget, costs, options.early_updates)
