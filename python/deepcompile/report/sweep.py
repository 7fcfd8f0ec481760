# SPDX-License-Identifier: Apache-2.0
"""The chart of ``deepcompile plan``: tokens a second a GPU of each plan at each length."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from deepcompile.report.units import format_bytes, format_nanos, model_text

COLORS = ("#a3abb5", "#2f6fd0", "#d9772b", "#2b9a72", "#b0428f")
BAR, GAP, GROUP_GAP = 64, 8, 36
LEFT, TOP, PLOT = 70, 84, 280


def write_sweep(facts: Mapping[str, Any], path: str) -> None:
    """Write the facts of `deepcompile plan --json` as a picture (.svg) or a page (.html)."""
    svg = sweep_svg(facts)
    if path.endswith(".html"):
        title = html.escape(_subject(facts))
        svg = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<body style="margin:24px;max-width:1240px">{svg}</body></html>\n'
        )
    Path(path).write_text(svg, encoding="utf-8")


def _subject(facts: Mapping[str, Any]) -> str:
    return f"{model_text(facts['model'], facts.get('layers'))} on {facts['machine']}"


def sweep_svg(facts: Mapping[str, Any]) -> str:
    plans = facts["plans"]
    most = max((p["tokens_per_second_per_gpu"] or 0 for p in plans), default=0)
    step = _round_step(most)
    top = step * max(1, math.ceil(most / step))
    bottom = TOP + PLOT
    x, bars, groups = LEFT + GROUP_GAP // 2, [], []
    names = list(dict.fromkeys(p["plan"] for p in plans))
    for seq in facts["seqs"]:
        start = x
        for plan in (p for p in plans if p["seq"] == seq):
            color = COLORS[names.index(plan["plan"]) % len(COLORS)]
            bars.append(_bar(plan, x, bottom, top, color))
            x += BAR + GAP
        groups.append({"middle": (start + x - GAP) / 2, "text": f"sequence {seq}"})
        x += GROUP_GAP
    ticks = [
        {"y": bottom - PLOT * i * step / top, "text": f"{i * step:,.10g}"}
        for i in range(round(top / step) + 1)
    ]
    template = resources.files("deepcompile.report") / "sweep.svg.j2"
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=f"{_subject(facts)}: simulated tokens/s/GPU",
        subtitle=(
            f"{facts['ranks']} ranks, batch {facts['batch']}, {facts['dtype']}; peak memory "
            f"below each plan, budget {format_bytes(facts['memory_budget'])}; dashed: does not fit"
        ),
        width=max(x, 640),
        height=bottom + 74,
        left=LEFT,
        bottom=bottom,
        ticks=ticks,
        bars=bars,
        groups=groups,
    )


def _round_step(most: float) -> float:
    """A round distance for about five lines."""
    if most <= 0:
        return 1
    power = 10 ** math.floor(math.log10(most / 5))
    return next(power * f for f in (1, 2, 5, 10) if most / (power * f) <= 6)


def _bar(plan: Mapping[str, Any], x: int, bottom: int, top: float, color: str) -> dict[str, Any]:
    rate = plan["tokens_per_second_per_gpu"] or 0
    height = PLOT * rate / top
    label = f"{rate:,.0f}" if rate else "does not fit"
    memory = format_bytes(plan["peak_bytes"]) if plan["peak_bytes"] else ""
    step = format_nanos(plan["step_ns"]) + " a step" if plan["step_ns"] else plan["note"]
    return {
        "x": x,
        "y": round(bottom - height, 1),
        "width": BAR,
        "height": round(height, 1),
        "middle": x + BAR / 2,
        "color": color,
        "fits": plan["fits"],
        "label": label,
        "plan": plan["plan"],
        "memory": memory,
        "title": f"{plan['plan']}, sequence {plan['seq']}: {step}",
    }
