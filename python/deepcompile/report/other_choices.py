# SPDX-License-Identifier: Apache-2.0
"""What else a plan could have done, and what that would have cost, for the report's page and
``deepcompile explain``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .. import _core

NOTHING_NS = 1000
"""Differences in time below this say nothing: the simulator's clock is finer than any machine's."""
NOT_PLANNED = "no plan: no gathers or updates yet; give --passes zero3_compile or auto"


def is_planned(program: Any) -> bool:
    """Whether any pass has placed an instruction: a captured program only runs its regions."""
    ops = {instr.op for section in program.sections for instr in section.instrs}
    return not program.params or ops != {"run"}


def without_reasons(program: Any) -> Any:
    """A copy that says nothing of why."""
    lines = [line for line in str(program).splitlines() if not line.startswith("because ")]
    return _core.StepProgram.parse("\n".join(lines) + "\n")


def plain_of(program: Any) -> Any:
    """The program before any pass: each region's first run alone."""
    plain = without_reasons(program)
    seen: set[str] = set()
    for section in plain.sections:
        runs = [i for i in section.instrs if i.op == "run" and i.operand not in seen]
        seen |= {i.operand for i in runs}
        section.set_instrs(runs)
    return plain


def others_of(
    program: Any, machine: Any, budget: int | None, costs: Any, early_updates: bool
) -> list[Any]:
    """_core.Alternative of each single other choice; none for a program without a plan."""
    if not is_planned(program):
        return []
    return _core.next_best(
        plain_of(program),
        program,
        machine=machine,
        memory_budget=budget,
        costs=costs,
        early_updates=early_updates,
    )


def cost_text(time_ns: int, peak_bytes: int, fits: bool = True) -> str:
    """ "+1.80 ms, -96.0 MiB"; what is no difference is not given a number."""
    found = []
    if abs(time_ns) >= NOTHING_NS:
        found.append(("-" if time_ns < 0 else "+") + _core.pretty_nanos(abs(time_ns)))
    if peak_bytes:
        found.append(("-" if peak_bytes < 0 else "+") + _core.pretty_bytes(abs(peak_bytes)))
        if len(found) == 1:
            found.insert(0, "no change in time")
    return (", ".join(found) or "no change") + ("" if fits else ", above the budget")


def other_text(other: Any) -> str:
    """One alternative in words."""
    cost = cost_text(other.time_ns, other.peak_bytes, other.fits)
    return f"{other.chosen}; {other.instead} instead: {cost}"


def by_kind(others: Iterable[Any]) -> list[dict[str, str]]:
    """A row for each kind of choice: what changing one of it costs, at least and at most."""
    kinds: dict[tuple[str, str], list[Any]] = {}
    for other in others:
        chosen = re.sub(r"^output of \S+ \S+ ", "activation ", other.chosen)
        kinds.setdefault((chosen, other.instead), []).append(other)
    rows = []
    for (chosen, instead), each in kinds.items():
        costs = sorted(each, key=lambda o: (not o.fits, o.time_ns, o.peak_bytes))
        ends = [cost_text(o.time_ns, o.peak_bytes, o.fits) for o in (costs[0], costs[-1])]
        objects = [name for other in each for name in other.objects]
        rows.append(
            {
                "chosen": chosen,
                "of": f"{len(objects)}: {objects[0]}, ..." if len(objects) > 1 else
                (objects[0] if objects else "the step"),
                "instead": instead,
                "cost": " to ".join(dict.fromkeys(ends)),
            }
        )  # fmt: skip
    return rows
