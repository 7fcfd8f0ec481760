# SPDX-License-Identifier: Apache-2.0
"""What the commands print of a simulated step."""

from __future__ import annotations

from typing import Any

from . import _core


def summary(
    program: _core.StepProgram, machine: _core.Machine, sim: _core.SimResult
) -> dict[str, Any]:
    """What a simulation says, as JSON can hold it."""
    return {
        "program": program.name,
        "machine": machine.name,
        "ranks": program.world,
        "step_ns": sim.time_ns,
        "compute_busy_ns": sim.busy["compute"],
        "link_busy_ns": sim.busy["link"],
        "compute_stalled_ns": sim.stall_ns,
        "peak_bytes": sim.peak_bytes,
        "resident_bytes": sim.resident_bytes,
        "memory_bytes": machine.memory_bytes,
        "fits": sim.peak_bytes <= machine.memory_bytes,
    }


def as_table(facts: dict[str, Any]) -> str:
    """The summary for people."""
    step = max(facts["step_ns"], 1)

    def share(key: str) -> str:
        return f"{_core.pretty_nanos(facts[key])} ({100 * facts[key] / step:.0f}%)"

    size = _core.pretty_bytes
    peak = f"{size(facts['peak_bytes'])} of {size(facts['memory_bytes'])}"
    rows = [
        ("program", facts["program"]),
        ("machine", f"{facts['machine']}, {facts['ranks']} ranks"),
        ("step time", _core.pretty_nanos(facts["step_ns"])),
        ("compute busy", share("compute_busy_ns")),
        ("link busy", share("link_busy_ns")),
        ("compute stalled", share("compute_stalled_ns")),
        ("peak memory a rank", peak if facts["fits"] else peak + ": DOES NOT FIT"),
        ("between steps", size(facts["resident_bytes"])),
    ]
    if "parameters" in facts:
        rows[2:2] = [("parameters", f"{facts['parameters'] / 1e6:,.1f} M")]
        rows[3:3] = [("regions", f"{facts['regions']}, {facts['distinct_regions']} distinct")]
        rate = f"{facts['tokens_per_second_per_rank']:,.0f}"
        rows[5:5] = [("tokens/s a rank", rate)]
        rows.append(("plan", facts["plan"]))
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{value}" for label, value in rows)
