# SPDX-License-Identifier: Apache-2.0
"""What commands print of simulated steps."""

from __future__ import annotations

from typing import Any

from .. import _core
from ..report.units import model_text

BAR = 40
"""Columns of the longest bar in the terminal's chart."""


def summary(
    program: _core.StepProgram, machine: _core.Machine, sim: _core.SimResult, budget: int | None
) -> dict[str, Any]:
    """What a simulation says, as JSON can hold it. Without a budget the machine's memory is it."""
    return {
        "program": program.name,
        "machine": machine.name,
        "ranks": program.world,
        "step_ns": sim.time_ns,
        "compute_busy_ns": sim.busy["compute"],
        "link_busy_ns": sim.busy["link"],
        "to_host_busy_ns": sim.busy["to_host"],
        "to_device_busy_ns": sim.busy["to_device"],
        "compute_stalled_ns": sim.stall_ns,
        "peak_bytes": sim.peak_bytes,
        "resident_bytes": sim.resident_bytes,
        "memory_bytes": machine.memory_bytes,
        "memory_budget": budget or machine.memory_bytes,
        "fits": sim.peak_bytes <= (budget or machine.memory_bytes),
    }


def as_table(facts: dict[str, Any]) -> str:
    """The summary for people."""
    step = max(facts["step_ns"], 1)

    def share(key: str) -> str:
        return f"{_core.pretty_nanos(facts[key])} ({100 * facts[key] / step:.0f}%)"

    size = _core.pretty_bytes
    peak = f"{size(facts['peak_bytes'])} of {size(facts['memory_budget'])}"
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
    copies = facts["to_host_busy_ns"] + facts["to_device_busy_ns"]
    if copies:
        text = f"{share('to_host_busy_ns')} out, {share('to_device_busy_ns')} in"
        rows[5:5] = [("host link busy", text)]
    if "note" in facts:
        rows[:0] = [("note", facts["note"])]
    return columns([[label, value] for label, value in rows])


def columns(rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """Rows with their columns aligned; those in ``right`` to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def count_text(count: int) -> str:
    """70.55 B, 0.80 M"""
    return f"{count / 1e9:,.2f} B" if count >= 1e8 else f"{count / 1e6:,.2f} M"


def plans_table(facts: dict[str, Any]) -> str:
    """All plans of `deepcompile plan`, by sequence length, with bars for tokens a second."""
    size = _core.pretty_bytes
    lines = [
        f"{model_text(facts['model'], facts['layers'])} on {facts['machine']}: "
        f"{count_text(facts['parameters'])} parameters, "
        f"{facts['ranks']} ranks, batch {facts['batch']} a rank, {facts['dtype']}, AdamW with fp32 "
        f"master weights, memory budget {size(facts['memory_budget'])} a rank"
    ]
    most = max((p["tokens_per_second_per_gpu"] or 0 for p in facts["plans"]), default=0) or 1
    for seq in facts["seqs"]:
        rows = [["plan", "step", "tokens/s/GPU", "peak memory", ""]]
        notes = []
        for plan in (p for p in facts["plans"] if p["seq"] == seq):
            rate = plan["tokens_per_second_per_gpu"]
            bar = "█" * max(1, round(BAR * rate / most)) if plan["fits"] else "does not fit"
            rows.append(
                [
                    plan["plan"],
                    _core.pretty_nanos(plan["step_ns"]) if plan["step_ns"] else "–",
                    f"{rate:,.0f}" if rate else "–",
                    size(plan["peak_bytes"]) if plan["peak_bytes"] else "–",
                    bar,
                ]
            )
            if plan["note"]:
                notes.append(f"  {plan['plan']}: {plan['note']}")
        lines += ["", f"seq {seq}", columns(rows, right=(1, 2, 3)), *notes]
    return "\n".join(lines)
