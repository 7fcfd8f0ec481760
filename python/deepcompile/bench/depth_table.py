# SPDX-License-Identifier: Apache-2.0
"""The largest depth of each framework as a table, from rows alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import UserError
from . import suites
from .conditions import Condition
from .results import Results, Row
from .table import aligned, milliseconds

HEAD = ("model", "tokens", "framework", "layers", "parameters", "ms a step", "tokens/s/GPU",
        "device GiB", "host GiB of ranks", "host GiB in use", "one more")  # fmt: skip
TEXT_COLUMNS = (0, 2, 10)
NOTE = """\
Largest number of layers that trains, and its speed: median (fastest-slowest) of the steps after
the warm-up; below it the same framework at depths where another one ends. Memory: the fullest
rank's on the device; all ranks' processes, and all that is in use, on the host."""


def base_of(condition: Condition) -> Condition:
    """The same at no particular depth."""
    return dataclasses.replace(condition, num_layers=0)


def parameters(model: str, layers: int) -> str:
    """In words; a dash where the model cannot be built here."""
    try:
        rest, layer = suites.elements(model)
    except (UserError, ImportError):
        return "-"
    count = rest + layers * layer
    return f"{count / 1e9:.1f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _gib(size: float | None) -> str:
    return "-" if not size else f"{size / 2**30:.1f}"


def _cells(row: Row, beyond: str) -> list[str]:
    condition, effective = row.condition, row.effective
    host = sum(effective.get("host_peak_bytes_of_ranks") or [])
    return [
        str(condition.num_layers), parameters(condition.model, condition.num_layers),
        milliseconds(row), f"{row.tokens_per_second_per_gpu:,.0f}", _gib(row.peak_bytes),
        _gib(host), _gib(effective.get("host_bytes_in_use")), beyond,
    ]  # fmt: skip


def _beyond(rows: dict[int, Row], low: int) -> str:
    """What is known of the depths above."""
    failed = [n for n, row in rows.items() if n > low and row.failure == "OOM"]
    other = {row.failure for n, row in rows.items() if n > low and row.failure != "OOM"}
    high = min(failed, default=None)
    if high == low + 1:
        return "no room"
    known = f"{low + 1} to {high - 1} not tried" if high else "not tried: at least this many"
    return "; ".join([known, *sorted(other)])


def _lines(group: dict[Condition, dict[int, Row]]) -> list[list[str]]:
    """Of frameworks at the same sizes."""
    largest = {base: max((n for n, r in rows.items() if r.ok), default=0)
               for base, rows in group.items()}  # fmt: skip
    lines = []
    for base, rows in group.items():
        head = [base.model_label, str(base.tokens), base.label]
        low = largest[base]
        if not low:
            said = "no room" if any(r.failure == "OOM" for r in rows.values()) else "not known"
            lines.append([*head, "0", *["-"] * 6, said])
            continue
        lines.append([*head, *_cells(rows[low], _beyond(rows, low))])
        beside = {n for n in largest.values() if 0 < n < low and n in rows and rows[n].ok}
        lines += [[*head, *_cells(rows[n], "")] for n in sorted(beside, reverse=True)]
    return lines


def markdown(found: Results, bases: Sequence[Condition] | None = None) -> str:
    """`bases`: only these, at any depth, in this order; default: all that are there."""
    by_base: dict[Condition, dict[int, Row]] = {base_of(b): {} for b in bases or ()}
    for row in found.latest():
        base = base_of(row.condition)
        if not row.predicted and (bases is None or base in by_base):
            by_base.setdefault(base, {})[row.condition.num_layers] = row
    same: dict[tuple, dict[Condition, dict[int, Row]]] = {}
    for base, rows in by_base.items():
        key = (base.model_label, base.tokens, base.batch_size, base.world, base.dtype)
        same.setdefault(key, {})[base] = rows
    lines = [line for group in same.values() for line in _lines(group)]
    if not lines:
        raise UserError("[bench] depth: there are no rows. Give the folder that a search wrote.")
    return NOTE + "\n\n" + "\n".join(aligned(HEAD, lines, TEXT_COLUMNS))
