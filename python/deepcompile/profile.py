# SPDX-License-Identifier: Apache-2.0
"""What the planner knows of a step that ran: times, scratch memory, the order of graphs.

The runtime's trace of one ordinary step is all it takes: nothing is replayed,
and no rank waits for another.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RegionCost:
    """Measured of one compiled region, over all its runs in a step."""

    time_ns: int
    workspace: int | None = None
    """Most bytes of scratch; None where the allocator does not say."""


@dataclass
class Profile:
    """One traced step of this rank."""

    step: int
    records: list[tuple[int, ...]]
    """(plan, section, instruction, start ns, end ns, workspace bytes or -1); times from the
    step's start."""
    plans: list[tuple[int, Any]]
    """(the runtime's plan id, program) of what ran, in order; the update's last."""
    order: list[int]
    """Graphs with a forward in it, by number, in the order of their first forward."""
    costs: dict[int, RegionCost] = field(default_factory=dict)
    """By code."""
    peak_bytes: int | None = None
    """Most bytes of tensors on the device; None where nobody counts."""
    seconds: float = 0.0
    """The step as the user's clock sees it."""
    agreed: Any = None
    """The agreed plan that it ran by, or None."""


def region_costs(
    records: Iterable[Sequence[int]], plans: Iterable[tuple[int, Any]]
) -> dict[int, RegionCost]:
    """Median time and largest workspace by code, from a trace's records. Equal regions share
    one: they run the same code on tensors of the same shapes."""
    programs = dict(plans)
    codes: dict[tuple[int, int, int], int] = {}
    for plan_id, program in programs.items():
        code_of = {region.name: region.code for region in program.regions}
        for s, section in enumerate(program.sections):
            for i, instr in enumerate(section.instrs):
                if instr.op == "run":
                    codes[plan_id, s, i] = code_of[instr.region]
    times: dict[int, list[int]] = {}
    scratch: dict[int, int] = {}
    for plan_id, section, instr, start, end, *more in records:
        code = codes.get((plan_id, section, instr))
        if code is None:
            continue
        times.setdefault(code, []).append(end - start)
        if more and more[0] >= 0:
            scratch[code] = max(scratch.get(code, 0), more[0])
    return {
        code: RegionCost(round(statistics.median(each)), scratch.get(code))
        for code, each in times.items()
    }


def take_times(costs: dict[int, RegionCost], times: dict[int, int]) -> None:
    """Put better times, by code, in the place of what was measured."""
    for code, time_ns in times.items():
        if code in costs:
            costs[code].time_ns = time_ns


def apply_costs(program: Any, costs: dict[int, RegionCost]) -> Any:
    """A copy of a compute-only program with what was measured of its regions."""
    timed = program.copy()
    for region in timed.regions:
        cost = costs.get(region.code)
        if cost is None:
            continue
        timed.set_region_time(region.name, max(1, cost.time_ns))
        if cost.workspace is not None:
            timed.set_region_workspace(region.name, cost.workspace)
    return timed
