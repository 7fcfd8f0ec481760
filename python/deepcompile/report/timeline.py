# SPDX-License-Identifier: Apache-2.0
"""A step as a still picture, and where compute stands idle in it.

Reads the Perfetto trace that ``Engine.write_trace`` and ``deepcompile bench --profile`` write.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError, writing

LANES = ("compute", "link", "to host", "to device")
COLORS = {
    "run": "#4e86d4", "update": "#7a5bb5", "norm": "#3f9c9c", "gather": "#d9772b",
    "reduce": "#c2a02b", "sum": "#2f8f5b", "offload": "#8d8d8d", "reload": "#5f6b76",
    "waits": "#e9c8c4",
}  # fmt: skip
WAITS = {
    "wait": "gathers", "accumulate": "reductions", "evict": "copies to the host",
    "evict_states": "copies to the host", "await": "copies to the device",
    "await_states": "copies to the device",
}  # fmt: skip
"""What compute waits for, by instruction."""
BETWEEN = "between instructions"


@dataclass(frozen=True)
class Item:
    """One instruction; times in microseconds from the step's start."""

    lane: str
    op: str
    start: float
    duration: float
    operand: str = ""

    @property
    def end(self) -> float:
        return self.start + self.duration


def read(path: str | Path, process: str | None = None) -> list[Item]:
    """A trace's items of one of its processes, in order of their starts."""
    return read_step(path, process)[1]


def read_step(path: str | Path, process: str | None = None) -> tuple[str, list[Item]]:
    """The process's name, and its items. Default: the measured step, or the only one there is."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        names = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
        lanes = {
            (e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"
        }
        spans = [e for e in events if e["ph"] == "X"]
    except OSError as error:
        raise UserError(
            f"[report] {path}: cannot be read ({error.strerror or error}). Check the path."
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"[report] {path}: is no trace of a step. Give what `deepcompile sim --trace`, "
            "`deepcompile bench --profile` or Engine.write_trace wrote."
        ) from None
    process = _chosen(names, process, path)
    items = [
        Item(lanes[e["pid"], e["tid"]], e["cat"], e["ts"], e["dur"], e["name"].partition(" ")[2])
        for e in spans
        if e["pid"] == names[process]
    ]
    if not items:
        raise UserError(f"[report] {path}: nothing ran in {process!r}.")
    return process, _with_sums(sorted(items, key=lambda item: item.start))


def _chosen(names: Iterable[str], process: str | None, path: str | Path) -> str:
    """The process's full name: `predicted` also means "predicted on 4xh200"."""
    names = list(names)
    if process is None:
        process = "measured" if "measured" in names or len(names) != 1 else names[0]
    found = sorted(n for n in names if n == process or n.split(" on ")[0] == process)
    if not found:
        has = ", ".join(repr(name) for name in names) or "nothing"
        raise UserError(
            f"[report] {path}: has no step {process!r}, only {has}. Name one with --process."
        )
    return found[0]


def _with_sums(items: Sequence[Item]) -> list[Item]:
    """An accumulate waits until its reduction has arrived. What follows is its own work: a sum."""
    found: list[Item] = []
    arrived: dict[str, float] = {}
    for item in items:
        if item.op == "reduce":
            arrived[item.operand] = item.end
        until = max(item.start, arrived.get(item.operand, item.end))
        if item.op != "accumulate" or until >= item.end:
            found.append(item)
            continue
        found.append(replace(item, duration=until - item.start))
        found.append(Item("compute", "sum", until, item.end - until, item.operand))
    return sorted(found, key=lambda item: item.start)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def times(items: Sequence[Item]) -> dict[str, float]:
    """Milliseconds of compute by instruction, of its idle time by cause, and of what is between
    instructions (launches, copies of gradients into a reduction's buffer): together the step."""
    found: dict[str, float] = {}
    for item in items:
        if item.op in WAITS:
            name = f"idle: waits for {WAITS[item.op]}"
        elif item.lane == "compute":
            name = item.op
        else:
            continue
        found[name] = found.get(name, 0.0) + item.duration / 1e3
    here = [i for i in items if i.op in WAITS or i.lane == "compute"]
    length = max(i.end for i in items) - min(0.0, items[0].start)
    rest = (length - covered((i.start, i.end) for i in here)) / 1e3
    return found | {BETWEEN: rest}


def lanes_of(items: Sequence[Item]) -> dict[str, list[Item]]:
    """Items as they are drawn: waits stand where compute does, and what moves nothing nowhere."""
    lanes: dict[str, list[Item]] = {lane: [] for lane in LANES}
    for item in items:
        lane = "compute" if item.op in WAITS else item.lane
        if lane in lanes and item.duration > 0:
            lanes[lane].append(item)
    return {lane: each for lane, each in lanes.items() if each}


def draw(items: Sequence[Item], path: str | Path, title: str) -> Path:
    """Write the picture, in the format of the path's ending; needs matplotlib."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    lanes = lanes_of(items)
    figure, axes = pyplot.subplots(figsize=(13, 1.2 + 0.55 * len(lanes)), layout="constrained")
    shown: dict[str, str] = {}
    for row, (_, each) in enumerate(lanes.items()):
        for item in each:
            kind = "waits" if item.op in WAITS else item.op.split("_")[0]
            color = COLORS.get(kind, "#b0b0b0")
            shown[kind] = color
            axes.broken_barh([(item.start / 1e3, item.duration / 1e3)], (row - 0.4, 0.8),
                             facecolors=color, linewidth=0)  # fmt: skip
    axes.set_yticks(range(len(lanes)), list(lanes))
    axes.invert_yaxis()
    axes.set_xlim(0, max(i.end for i in items) / 1e3)
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10, loc="left")
    names = {"waits": "compute waits"}
    patches = [Patch(color=color, label=names.get(k, k)) for k, color in shown.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    target = Path(path)
    try:
        with writing("report", target, (ValueError,)):
            figure.savefig(target, dpi=130)
    finally:
        pyplot.close(figure)
    return target
