# SPDX-License-Identifier: Apache-2.0
"""The HTML report of a training run: one self-contained file.

``write_report(data, path)`` renders a plain dictionary, so whatever knows the
facts (an engine after training, the command line after a simulation) can write
the same page. Every key but ``title`` may be left out: its part of the page is
then left out too. Times are integer nanoseconds, sizes are bytes.

    title       str
    facts       {label: text} for the header (model, world, commit, versions, machine)
    loss        [{"step", "loss", "tokens_per_s" or None}]      training loss
    validation  [{"step", "loss"}]                              validation loss
    timeline    {"predicted": [item], "measured": [item]} of one step, where an item is
                {"section", "index", "label", "resource", "start_ns", "end_ns"};
                resource is "compute", "link" (between ranks), "to_host", "to_device" or
                "wait" (compute stands still);
                (section, index) pairs a predicted item with its measured one
    memory      {"predicted": [[ns, bytes]], "measured": [[ns, bytes]]}
    compare     [{"what", "predicted", "measured", "unit"}]     unit "ns", "B" or ""; also "note":
                a sentence below, "ratio": False where one would say nothing
    compile     {"stages": {stage: seconds}, "regions": {label: number}}
    reasons     [{"pass", "object", "text"}]
    others      [{"chosen", "of", "instead", "cost"}]           texts: what the next best would
                have cost, by kind of choice
    plan        str, the step program's text
    samples     [{"when", "text"}]                              generated text
    notes       [str]
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from deepcompile.report.units import format_bytes, format_nanos, format_seconds, format_value

__all__ = ["check_report_data", "write_report"]

RESOURCES = ("compute", "link", "to_host", "to_device", "wait")
_KEYS = frozenset(
    "title facts loss validation timeline memory compare compile reasons others plan samples "
    "notes".split()
)


def write_report(data: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Render ``data`` (see the module's text) to one HTML file and return its path.

    The file is written beside its place and then moved there, so a report that
    exists is a complete one.
    """
    check_report_data(data)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    page = render_report(data)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def render_report(data: Mapping[str, Any]) -> str:
    """The page as text."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters.update(
        ns=format_nanos, size=format_bytes, seconds=format_seconds, value=format_value
    )
    files = resources.files("deepcompile.report")
    template = environment.from_string((files / "page.html.j2").read_text(encoding="utf-8"))
    stages = dict((data.get("compile") or {}).get("stages") or {})
    timeline = data.get("timeline") or {}
    memory = data.get("memory") or {}
    return template.render(
        data={key: data.get(key) for key in _KEYS} | {"compare": _rows(data.get("compare"))},
        title=data["title"],
        style=(files / "style.css").read_text(encoding="utf-8"),
        script="\n".join(
            (files / name).read_text(encoding="utf-8")
            for name in ("charts.js", "timeline.js", "page.js")
        ),
        charts=_embed(
            {
                "loss": data.get("loss") or [],
                "validation": data.get("validation") or [],
                "timeline": {
                    side: _rebase(timeline.get(side)) for side in ("predicted", "measured")
                },
                "memory": {side: memory.get(side) or [] for side in ("predicted", "measured")},
            }
        ),
        stages=[(name, seconds, _share(seconds, stages)) for name, seconds in stages.items()],
        headline=_headline(data),
    )


def check_report_data(data: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` naming the key whose content the page cannot show."""
    if not data.get("title"):
        raise ValueError("[report] title is missing: give the run a name")
    unknown = sorted(set(data) - _KEYS)
    if unknown:
        raise ValueError(f"[report] unknown keys {unknown}: known are {sorted(_KEYS)}")
    for side, items in (data.get("timeline") or {}).items():
        for item in items or []:
            if item["resource"] not in RESOURCES:
                raise ValueError(
                    f"[report] timeline.{side}: {item['label']!r} uses resource "
                    f"{item['resource']!r}: use one of {', '.join(RESOURCES)}"
                )
            if item["end_ns"] < item["start_ns"]:
                raise ValueError(
                    f"[report] timeline.{side}: {item['label']!r} ends before it starts"
                )
    for row in data.get("compare") or []:
        if row.get("unit", "") not in ("ns", "B", ""):
            raise ValueError(f"[report] compare: {row['what']!r} has unit {row['unit']!r}")


def _rebase(items: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The items with the earliest start as time zero, zero-length ones dropped."""
    shown = [dict(item) for item in items or [] if item["end_ns"] > item["start_ns"]]
    if shown:
        origin = min(item["start_ns"] for item in shown)
        for item in shown:
            item["start_ns"] -= origin
            item["end_ns"] -= origin
    return shown


def _rows(rows: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Comparison rows with every key present."""
    default = {"predicted": None, "measured": None, "unit": "", "note": "", "ratio": True}
    return [default | dict(row) for row in rows or []]


def _embed(value: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, default=float)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _share(seconds: float, stages: Mapping[str, float]) -> float:
    """Percent of the longest stage, for the bar's width."""
    longest = max(stages.values(), default=0.0)
    return 100.0 * seconds / longest if longest > 0 else 0.0


def _headline(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The few numbers on top: (label, value, note)."""
    tiles: list[tuple[str, str, str]] = []
    loss = data.get("loss") or []
    if loss:
        first, last = loss[0], loss[-1]
        tiles.append(
            ("Loss", f"{last['loss']:.3f}", f"from {first['loss']:.3f}, step {last['step']}")
        )
        rates = sorted(row["tokens_per_s"] for row in loss if row.get("tokens_per_s"))
        if rates:
            tiles.append(("Tokens per second", f"{rates[len(rates) // 2]:,.0f}", "median step"))
    for row in data.get("compare") or []:
        if row.get("headline"):
            unit = row.get("unit", "")
            measured, predicted = row.get("measured"), row.get("predicted")
            main = measured if measured is not None else predicted
            note = "predicted"
            if measured is not None and predicted is not None:
                note = f"predicted {format_value(predicted, unit)}"
            elif measured is not None:
                note = "measured"
            tiles.append((row["what"], format_value(main, unit), note))
    stages = (data.get("compile") or {}).get("stages") or {}
    if stages:
        tiles.append(("Compilation", format_seconds(sum(stages.values())), f"{len(stages)} stages"))
    return tiles
