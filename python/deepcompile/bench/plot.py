# SPDX-License-Identifier: Apache-2.0
"""Charts of results: bars over sequence length, or over accumulation steps.

One chart for each model, number of GPUs and batch size, under the file names of
the seed benchmark: ``{result_dir}/{metric}/chart_{metric}_{model}_np{N}_bs{B}.png``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, writing
from .conditions import Condition, local_model, model_file_word, model_label, order_of
from .metrics import Metric, gains, metric, spread
from .results import Results, Row

COLORS = {
    "zero3": "#9aa4b2", "zero3_c": "#6b7787", "zero1": "#9aa4b2", "zero1_c": "#6b7787",
    "fsdp": "#f0b26b", "fsdp_c": "#d9772b", "ddp": "#d7c46a", "ddp_c": "#a8922a",
    "single": "#c9c9c9", "single_c": "#8d8d8d",
}  # fmt: skip
"""Peers in muted colours by family; greens are DeepSpeed's DeepCompile, blues are ours."""
DS_SHADES = ("#b7dcc0", "#84c496", "#4f9f68", "#2f7a49")
OUR_SHADES = ("#b9d2f2", "#86b0e8", "#4e86d4", "#1f5fb8", "#123f80", "#5b3fa6")
SIMULATED = "///"
HATCHES = {"": "", "overlap": "..", "copy_engine": "xx", "prefetch": "\\\\"}
"""Of variants; others are told apart by tone."""
TONES = ((0, 0.0), (0, 0.35), (255, 0.45), (0, 0.6), (255, 0.7))
"""(black or white, how much of it) mixed into a framework's colour: its default settings, its best,
and more."""
WIDEST = 0.3
"""Of a bar, where a group takes 1."""
LETTER = 0.075
"""Inches that a letter of the legend takes."""
Look = tuple[str, str]
"""A bar's colour and hatch."""


@dataclass
class Chart:
    """The rows of one picture."""

    model: str
    world: int
    batch_size: int
    by_accumulation: bool
    rows: list[Row] = field(default_factory=list)
    mixed: bool = False
    """Holds measured and predicted rows."""
    title: str = ""
    """The model in its title, if not as conditions call it."""
    differences: dict[str, set[str]] = field(default_factory=dict)
    """Of a label that several conditions share: the fields in which they differ."""

    @property
    def name(self) -> str:
        return f"{self.model}_np{self.world}_bs{self.batch_size}"

    @property
    def places(self) -> list[int]:
        """Groups of bars: lengths, or accumulation steps."""
        return sorted({self.place(row.condition) for row in self.rows})

    @property
    def device(self) -> str:
        """What a rank has, in a word."""
        kinds = {row.machine.get("kind") for row in self.rows}
        return "rank" if kinds == {"cpu"} else "GPU"

    def axis(self, what: Metric) -> str:
        return what.axis.replace("GPU", self.device)

    def place(self, condition: Condition) -> int:
        return condition.accumulation if self.by_accumulation else condition.seq_length

    def label(self, row: Row) -> str:
        label = row.condition.label
        for name in sorted(self.differences.get(label, ())):
            label += f" {name}={getattr(row.condition, name)}"
        return label + (" simulated" if row.predicted and self.mixed else "")

    def tell_apart(self) -> None:
        """Sets ``mixed`` and ``differences`` by the rows."""
        self.mixed = len({row.predicted for row in self.rows}) == 2
        named: dict[tuple[str, bool], list[dict[str, Any]]] = {}
        for row in self.rows:
            values = row.condition.as_dict()
            named.setdefault((row.condition.label, row.predicted), []).append(values)
        for (label, _), same in named.items():
            fields = {n for n in same[0] if len({str(values[n]) for values in same}) > 1}
            found = fields - {"model", "seq_length", "accumulation"}
            if found:
                self.differences.setdefault(label, set()).update(found)

    @property
    def bars(self) -> list[str]:
        """The bars of a group, in order: measured ones first."""
        ordered = sorted(self.rows, key=lambda r: (r.predicted, order_of(r.condition)))
        return list(dict.fromkeys(self.label(row) for row in ordered))

    def find(self, place: int, label: str) -> Row | None:
        """The latest; one with times before one without."""
        same = [r for r in self.rows if self.place(r.condition) == place and self.label(r) == label]
        return next((r for r in reversed(same) if r.ok), same[-1] if same else None)

    def group(self, place: int) -> list[Row]:
        found = (self.find(place, label) for label in self.bars)
        return [row for row in found if row is not None]


def charts(results: Results, by_accumulation: bool) -> list[Chart]:
    """Pictures for all rows. Without ``by_accumulation`` each number of accumulation steps is a
    picture of its own, and with it each length."""
    found: dict[tuple, Chart] = {}
    models: dict[str, set[str]] = {}
    for row in results.latest():
        models.setdefault(row.condition.model_label, set()).add(local_model(row.condition.model))
    for row in results.latest():
        c = row.condition
        name = c.model_label
        if len(models[name]) > 1:  # other folders of the same name
            name = f"{model_file_word(c.model)}{name.removeprefix(model_label(c.model))}"
        if by_accumulation:
            key: tuple = (name, c.world, c.batch_size, c.seq_length)
        else:
            key = (name, c.world, c.batch_size, c.accumulation)
        chart = found.setdefault(key, Chart(name, c.world, c.batch_size, by_accumulation))
        chart.rows.append(row)
    fixed: dict[tuple, set[int]] = {}
    for key in found:
        fixed.setdefault(key[:3], set()).add(key[3])
    for key, chart in found.items():
        chart.tell_apart()
        chart.title = chart.model
        if len(fixed[key[:3]]) > 1:  # or one picture would overwrite the other
            chart.model += f"_seq{key[3]}" if by_accumulation else f"_acc{key[3]}"
    return [found[key] for key in sorted(found)]


def matplotlib() -> Any:
    """The library, drawing into files."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "[bench] matplotlib: is not installed, and charts need it. "
            "pip install 'deepcompile[bench]'."
        ) from None
    matplotlib.use("Agg")
    return matplotlib


def plot(
    results: Results,
    folder: str | Path,
    name: str,
    by_accumulation: bool = False,
    peak_tflops: float | None = None,
) -> list[tuple[Chart, Path]]:
    """Draws all charts of one metric below ``folder``; returns what went where."""
    matplotlib()
    what = metric(name, peak_tflops)
    if not results.rows:
        raise UserError(
            f"[bench] {folder}: holds no results (rows.jsonl, result.txt). Run a sweep first, or "
            "give its folder."
        )
    place = Path(folder) / name
    drawn = []
    for chart in charts(results, by_accumulation):
        if not any(what.of(row) for row in chart.rows if row.ok):
            continue
        safe = re.sub(r"[^\w.+-]", "_", chart.name)
        path = place / f"chart_{name}_{safe}.png"
        with writing("bench", path):
            place.mkdir(parents=True, exist_ok=True)
            draw(chart, what, path)
        drawn.append((chart, path))
    if not drawn:
        raise UserError(
            f"[bench] {name}: no result says it. Choose another metric, or see the errors in "
            f"{Path(folder) / 'rows.jsonl'}."
        )
    return drawn


def draw(chart: Chart, what: Metric, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    places, bars = chart.places, chart.bars
    width = min(0.84 / len(bars), WIDEST)
    figure = Figure(figsize=(max(7.5, 1.2 + 0.42 * len(bars) * len(places)), 5), dpi=110,
                    layout="constrained")  # fmt: skip
    axes = figure.add_subplot()
    top = _top(chart, what)
    shades = looks(chart)
    for at, label in enumerate(bars):
        xs = [i + (at - (len(bars) - 1) / 2) * width for i in range(len(places))]
        for x, place in zip(xs, places, strict=True):
            _bar(axes, what, chart.find(place, label), x, width, shades[label], top)
    axes.set_xticks(range(len(places)), [str(place) for place in places], fontsize=11)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_ylim(0, top * 1.12)
    axes.set_xlabel("Accumulation steps" if chart.by_accumulation else "Sequence length")
    axes.set_ylabel(chart.axis(what))
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    notes = [text for text in (left_out_note(chart, what), what.caution) if text]
    inches = figure.get_figwidth()
    title = "\n".join(textwrap.fill(text, int(inches / 0.11)) for text in [_title(chart), *notes])
    figure.suptitle(title, fontsize=12, x=0.02, ha="left")
    widest = 0.6 + LETTER * max(map(len, bars))  # the patch with it
    columns = min(len(bars), max(1, int(inches / widest)))
    handles = [
        Patch(facecolor=color, hatch=hatch, edgecolor="white", linewidth=0,
              label=textwrap.fill(label, int((inches - 0.6) / LETTER)))
        for label, (color, hatch) in ((label, shades[label]) for label in bars)
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False
    )
    figure.savefig(path, metadata={"Software": "deepcompile plot"})


def _bar(
    axes: Any, what: Metric, row: Row | None, x: float, width: float, look: Look, top: float
) -> None:
    """One bar with its spread and its number; a gap with the reason where there is none."""
    value = what.of(row) if row is not None and row.ok else None
    if not value:
        text = "" if row is None else row.failure or what.left_out(row) or "no value"
        axes.text(x, 0.01 * top, text, rotation=90, ha="center", va="bottom", fontsize=8,
                  color="#b3261e")  # fmt: skip
        return
    color, hatch = look
    axes.bar(x, value, width * 0.92, color=color, hatch=hatch, edgecolor="white", linewidth=0)
    below, above = spread(what, row)
    if below or above:
        axes.errorbar(x, value, yerr=[[below], [above]], fmt="none", ecolor="#30343a",
                      elinewidth=1, capsize=2)  # fmt: skip
    axes.text(x, value + above + 0.008 * top, f"{value:,.{what.digits}f}", ha="center",
              va="bottom", fontsize=7, rotation=90 if width < 0.14 else 0)  # fmt: skip


def _top(chart: Chart, what: Metric) -> float:
    found = [(what.of(row) or 0) + spread(what, row)[1] for row in chart.rows if row.ok]
    return max(found, default=0) or 1


def left_out_note(chart: Chart, what: Metric) -> str:
    """Why some rows have no bar; empty where all have."""
    return what.why_left_out if any(r.ok and what.left_out(r) for r in chart.rows) else ""


def _title(chart: Chart) -> str:
    one = chart.rows[0].condition
    fixed = f"sequence {one.seq_length}" if chart.by_accumulation else ""
    if not chart.by_accumulation and one.accumulation > 1:
        fixed = f"{one.accumulation} accumulation steps"
    machines = sorted({str(r.machine.get("name", "")) for r in chart.rows} - {""})
    predicted = [row.predicted for row in chart.rows]
    how = "hatched: simulated" if chart.mixed else "simulated" if all(predicted) else ""
    ranks = f"{chart.world} {chart.device}" + ("s" if chart.world > 1 else "")
    parts = [chart.title or one.model_label, ranks, f"batch {chart.batch_size}", fixed,
             ", ".join(machines[:2]), how]  # fmt: skip
    return " · ".join(part for part in parts if part)


def looks(chart: Chart) -> dict[str, Look]:
    """Of each bar, no two alike as far as there are tones; the same for a label in all charts, as
    far as others leave it that."""
    found: dict[str, Look] = {}
    for row in sorted(chart.rows, key=lambda r: (r.predicted, order_of(r.condition))):
        label = chart.label(row)
        if label not in found:
            tones = _looks_of(row)
            found[label] = next((t for t in tones if t not in found.values()), tones[-1])
    return found


def _looks_of(row: Row) -> list[Look]:
    """The ones that a row may have, the first that is free to be taken."""
    condition, best = row.condition, row.condition.settings == "best"
    color = COLORS.get(condition.framework, "#888888")
    if condition.deepcompile:
        shades = OUR_SHADES if condition.ours else DS_SHADES
        known = ["P", "S", "P+S", "auto"]
        word = condition.label.split("(")[-1].split(")")[0]
        named = word in known and not (best and condition.ours)
        color = shades[min(known.index(word), len(shades) - 1) if named else -1]
        best = best and not condition.ours  # which has a colour of its own
    hatch = SIMULATED if row.predicted else HATCHES.get(condition.variant, "")
    tones = [TONES[1], *TONES[2:], TONES[0]] if best else TONES
    hatches = list(dict.fromkeys([hatch, *([] if row.predicted else HATCHES.values())]))
    return [(_mixed(color, *tone), mark) for mark in hatches for tone in tones]


def _mixed(color: str, end: int, part: float) -> str:
    channels = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(c + (end - c) * part):02x}" for c in channels)


def gain_rows(drawn: Iterable[Chart], what: Metric) -> list[list[str]]:
    """The table of ours over each peer: a head, then a row for each of them and chart."""
    table = []
    for chart in drawn:
        places = chart.places
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for place in places:
            for mine, peer, gain in gains(chart.group(place), what):
                lines.setdefault((chart.label(mine), chart.label(peer)), {})[place] = gain
        for (mine, peer), found in lines.items():
            cells = [f"{found[place]:.2f}x" if place in found else "–" for place in places]
            table.append([chart.name, mine, "over " + peer, *cells])
    return table


def gains_text(drawn: Sequence[Chart], what: Metric) -> str:
    """The gain tables of charts, for a terminal."""
    from ..cli.output import columns

    parts = []
    for chart in drawn:
        rows = gain_rows([chart], what)
        if rows:
            by = "acc" if chart.by_accumulation else "seq"
            head = ["ours", "peer", *(f"{by} {place}" for place in chart.places)]
            body = [head, *(row[1:] for row in rows)]
            right = tuple(range(2, len(head)))
            head_line = f"{chart.name}, {chart.axis(what)}: above 1 ours is the better one"
            head_line += f"; {what.caution}" if what.caution else ""
            parts.append(f"{head_line}\n{columns(body, right=right)}")
        if note := left_out_note(chart, what):
            parts.append(f"{chart.name}, without a bar: {note}")
    return "\n\n".join(parts)
