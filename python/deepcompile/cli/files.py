# SPDX-License-Identifier: Apache-2.0
"""Files that commands read and write, and running passes by name."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import _core
from ..errors import UserError, meant, writing
from ..predict import run_passes

PROGRAM_TEXT = "Give the program's text, as `plan --out` and an engine's write_plan() write it."


def read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"[cli] {path}: cannot be read ({reason(error)}). Check the path."
        ) from None


def read_program(path: str) -> _core.StepProgram:
    """The program in a file, or on standard input if ``path`` is ``-``."""
    name = "stdin" if path == "-" else path
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"[cli] {path}: cannot be read ({reason(error)}). Check the path."
        ) from None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    begins = text.lstrip()[:1]
    is_other = {"{": "is JSON", "<": "is a page"}.get(begins) or ("\0" in text and "is not text")
    if is_other:
        raise UserError(f"[cli] {name}: {is_other}. {PROGRAM_TEXT}")
    return _core.StepProgram.parse(text, name)


def read_machine(name: str) -> _core.Machine:
    """A built-in machine, or one from a file."""
    if name in _core.Machine.builtin_names():
        return _core.Machine.builtin(name)
    is_path = name.endswith(".json") or os.sep in name or Path(name).is_file()
    return _core.Machine.load(name) if is_path else _core.Machine.builtin(name)


def read_costs(path: str | None) -> _core.CostTable | None:
    """A table of measured costs: by itself, or in what an engine's write_plan() wrote."""
    if path is None:
        return None
    text = read_text(path)
    try:
        found = json.loads(text)["costs"]
        text = json.dumps(found) if found is not None else "{}"
    except (ValueError, KeyError, TypeError):
        pass  # the table itself, or what its own reader complains about
    return _core.CostTable.parse(text, path)


class Conditions(NamedTuple):
    """What a program is simulated and planned with."""

    machine: _core.Machine
    costs: _core.CostTable | None
    budget: int | None
    early_updates: bool
    source: str | None
    """The file that a run wrote beside its plan, where that gave them."""


def conditions_of(options: argparse.Namespace) -> Conditions:
    """As the options say; without --machine as the run had them that wrote the plan."""
    given = options.memory_budget, options.early_updates
    if options.machine is not None:
        machine = read_machine(options.machine)
        return Conditions(machine, read_costs(options.costs), *given, None)
    beside = run_file(options.file)
    if not beside.is_file():
        raise UserError(
            f"[cli] {options.file}: needs --machine, as there is no {beside.name} of a run beside "
            "it. Name a built-in machine or a JSON file."
        )
    try:
        run = json.loads(read_text(str(beside)))
        machine = _core.Machine.parse(json.dumps(run["machine"]), str(beside))
        budget, early = run["memory_budget"], bool(run["early_updates"])
        wrong = not isinstance(budget, int | None)
    except (ValueError, KeyError, TypeError):
        wrong = True
    if wrong:
        raise UserError(
            f"[cli] {beside}: is not what an engine's write_plan() wrote. Write it again, or give "
            "--machine."
        )
    has_costs = options.costs is not None or run.get("costs") is not None
    costs = read_costs(options.costs or str(beside)) if has_costs else None
    return Conditions(machine, costs, given[0] or budget, given[1] or early, str(beside))


def run_file(path: str) -> Path:
    """What Engine.write_plan(path) writes beside it."""
    return Path(path).with_suffix(".run.json")


def write(path: str, text: str) -> None:
    with writing("cli", path):
        Path(path).write_text(text, encoding="utf-8")


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
                f"[cli] --passes {name}: there is no such pass{meant(name, known) or '.'} Known "
                f"passes: {', '.join(known)}."
            )
    return [loaded.get(name, name) for name in names]


def run_named(
    program: _core.StepProgram,
    machine: _core.Machine | None,
    options: argparse.Namespace,
    costs: _core.CostTable | None,
) -> list[_core.PassRecord]:
    """The passes that a command's options name."""
    passes = resolve_passes(options.passes or [], options.pass_library)
    if not passes:
        return []
    budget, early = options.memory_budget, options.early_updates
    try:
        return run_passes(program, passes, machine, budget, costs, early)
    except UserError as error:
        said = str(error)
        if machine is not None or "has no machine" not in said:
            raise
        raise UserError(said.replace("Give it one.", "Give it one with --machine.")) from None
