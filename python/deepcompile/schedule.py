# SPDX-License-Identifier: Apache-2.0
"""Which passes plan the step from which step on.

A schedule is [(first step, passes)]; an entry holds from the first step that is
not before its number. A pass is a built-in's name, a name that the engine
registered, an object of deepcompile.passes, or a function of (program,
context). An entry with passes that weigh costs is *measured*: it plans the
whole step at once, from a profile of one, and all ranks agree on the result.
So is one with a function, unless it begins at step 0, before there is a profile.
Any other is applied to each graph by itself as it is captured.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from . import _core
from .errors import UserError, meant

STAGE_PASS = {
    0: "zero0_compile",
    1: "zero1_compile",
    2: "zero1_compile",
    3: "zero3_compile",
}
WARMUP = 3
"""The step from which the default schedule plans by measured times."""
PLACED = ("reductions_placed", "updates_placed")
"""What an entry's passes must provide together."""


@dataclass(frozen=True)
class Entry:
    step: int
    passes: tuple[Any, ...]
    """Names and functions."""
    measured: bool

    def names(self) -> list[str]:
        """Its passes in words."""
        return [pass_name(each) for each in self.passes]


def pass_name(given: Any) -> str:
    return given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)


def default_schedule(stage: int) -> list[tuple[int, list[Any]]]:
    """[(first step, passes)] of a stage."""
    return [(0, [STAGE_PASS[stage]]), (WARMUP, ["auto"])]


def _resolve(given: Any, registered: Mapping[str, Callable[..., Any]]) -> Any:
    """A pass as run_passes takes it: a built-in's name, a loaded pass, or a function."""
    native = getattr(given, "native", given)  # objects of deepcompile.passes stand for one
    if not isinstance(native, str):
        if native is not given or callable(given):
            _check_signature(given, pass_name(given))
            return given
        if isinstance(given, ModuleType):
            raise UserError(f"[passes] schedule: {_of_module(given)}")
        raise UserError(
            f"[passes] schedule: {given!r} is neither a pass's name nor a function of "
            "(program, context)"
        )
    if native in registered:
        _check_signature(registered[native], native)
        return registered[native]
    if native in _core.pass_names():
        return native
    known = [*_core.pass_names(), *registered]
    near = meant(native, known)
    raise UserError(
        f"[passes] schedule: no pass named {native!r}{near or ';'} known are {', '.join(known)}"
    )


def _check_signature(given: Callable[..., Any], name: str) -> None:
    """UserError for what cannot be called with (program, context), as far as its signature says."""
    called = given
    if inspect.isclass(given):  # a pass by its objects
        called = next((vars(c)["__call__"] for c in given.__mro__ if "__call__" in vars(c)), None)
        if called is None:
            raise UserError(
                f"[passes] {name}: its objects cannot be called; give the class a "
                "__call__(self, program, context)"
            )
    try:
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):  # of an extension
        return
    if inspect.isclass(given):
        signature = signature.replace(parameters=list(signature.parameters.values())[1:])
        if not _takes(inspect.signature(given), 0):
            raise UserError(
                f"[passes] schedule: {name}: its objects are made with arguments; give one, "
                f"{name}(...)"
            )
    takes_two = _takes(signature, 2)
    if list(signature.parameters)[:2] == ["gm", "graph_id"] or (
        not takes_two and _takes(signature, 8)
    ):
        raise UserError(
            f"[passes] {name}: has the signature of DeepSpeed's passes; wrap it in "
            "deepcompile.passes.from_deepspeed (DeepSpeed's own have namesakes in "
            "deepcompile.passes)"
        )
    if not takes_two:
        raise UserError(
            f"[passes] {name}: takes {signature}; a pass is a function of (program, context)"
        )


def _takes(signature: inspect.Signature, count: int) -> bool:
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _of_module(module: ModuleType) -> str:
    """What to write in place of a module of passes."""
    short = module.__name__.rpartition(".")[2]
    passes = [name for name, value in vars(module).items() if hasattr(value, "native")]
    remedy = f"write {short}.{passes[0]}" if passes else "give a pass of it"
    return f"{short} is a module, not a pass; {remedy}"


def _weighs_costs(resolved: Any, step: int) -> bool:
    """Whether it is one of the core's or a library's that is no stage's pass, or a function where
    there is a profile."""
    if isinstance(resolved, str):
        return resolved not in STAGE_PASS.values()
    return hasattr(resolved, "native") or step > 0


def _entry(given: Any, registered: Mapping[str, Callable[..., Any]]) -> Entry:
    try:
        step, passes = given
        alone = isinstance(passes, str | ModuleType)
        step, passes = operator.index(step), [passes] if alone else list(passes)
    except (TypeError, ValueError):
        raise UserError(f"[passes] schedule: {given!r} is not (step, [passes])") from None
    resolved = tuple(_resolve(each, registered) for each in passes)
    measured = any(_weighs_costs(each, step) for each in resolved)
    return Entry(step, resolved, measured)


def _check_stage(entry: Entry, stage: int) -> None:
    for name in entry.passes:
        if isinstance(name, str) and name in STAGE_PASS.values() and name != STAGE_PASS[stage]:
            raise UserError(
                f"[passes] {name}: the engine is at ZeRO stage {stage}, whose pass is "
                f"{STAGE_PASS[stage]}, and the entry at step {entry.step} plans for another. Use "
                "that, or another zero_optimization.stage."
            )


def _check_contracts(entry: Entry) -> None:
    """What the pipeline checks before it runs, known before anything is captured."""
    facts = {"regions_timed"}
    for name, given in zip(entry.names(), entry.passes, strict=True):
        if isinstance(given, str):
            contract = _core.pass_info(given).contract
        else:
            contract = getattr(given, "contract", None)
            contract = _core.PassContract() if contract is None else contract
            if not isinstance(contract, _core.PassContract):
                raise UserError(
                    f"[passes] schedule: {name}: its contract is a {type(contract).__name__}; "
                    "give a deepcompile.passes.PassContract"
                )
        missing = [fact for fact in contract.needs if fact not in facts]
        present = [fact for fact in contract.conflicts if fact in facts]
        if missing:
            raise UserError(
                f"[passes] {name}: needs {missing[0]}, which no earlier pass of the entry at step "
                f"{entry.step} provides. Put a pass that does before it."
            )
        if present:
            raise UserError(
                f"[passes] {name}: conflicts with {present[0]}, which an earlier pass of the entry "
                f"at step {entry.step} provides. Remove one of the two."
            )
        facts.update(contract.provides)
    needed = [fact for fact in PLACED if fact not in facts]
    if needed and all(isinstance(p, str) for p in entry.passes):
        raise UserError(
            f"[passes] schedule: the entry at step {entry.step} has no pass that provides "
            f"{needed[0]}. Begin it with the stage's pass, or use auto."
        )


def check_schedule(
    given: Sequence[Any] | str | None,
    stage: int,
    registered: Mapping[str, Callable[..., Any]],
) -> list[Entry]:
    """The entries of a schedule; None and "auto" mean the stage's default. Raises UserError for
    what could not be applied."""
    if given is None or given == "auto":
        given = default_schedule(stage)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UserError(
            f"[passes] schedule: {given!r} is not a list of (step, [passes]); write "
            f"[(0, [{STAGE_PASS[stage]!r}, ...])], or leave it out"
        )
    given = list(given)
    if given == ["auto"]:
        given = default_schedule(stage)
    entries = [_entry(each, registered) for each in given]
    steps = [entry.step for entry in entries]
    if not steps or steps != sorted(set(steps)) or steps[0] != 0:
        raise UserError(f"[passes] schedule: steps are {steps}; they must begin at 0 and increase")
    for entry in entries:
        _check_stage(entry, stage)
        _check_contracts(entry)
    return entries


def entry_at(schedule: Sequence[Entry], step: int) -> Entry:
    """The entry that holds at a step."""
    return [entry for entry in schedule if entry.step <= step][-1]
