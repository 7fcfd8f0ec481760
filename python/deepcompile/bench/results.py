# SPDX-License-Identifier: Apache-2.0
"""Rows of results: in memory, as JSON lines, and as lines of the seed benchmark's result.txt.

``rows.jsonl`` is the record: one JSON object a line, appended whole, with all
there is. ``result.txt`` is a projection of it, in the line format of
DeepSpeedExamples/benchmarks/deepcompile (see result_line.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import UserError, writing
from .conditions import Condition

SCHEMA = 1
ROWS, LINES = "rows.jsonl", "result.txt"
SEED_LINES = "results.txt"
"""The name under which the seed's plot.py looks for what its runner wrote as result.txt."""
NO_ROOM = ("out of memory", "does not fit", "no plan fits", "can't allocate memory",
           "cannot allocate memory", "bad_alloc", "alloc_failed")  # fmt: skip
"""What a device, a host and our planner say when there is not enough memory."""


CANNOT_RUN = "cannot run here"
"""In the reason of a condition that this machine is not made for."""


def no_room(text: str) -> bool:
    """Whether an error is a lack of memory."""
    return any(words in text.lower() for words in NO_ROOM)


@dataclass
class Row:
    """What one condition gave. Times are seconds of an optimizer step, sizes bytes of a rank."""

    condition: Condition
    times: list[list[float]] = field(default_factory=list)
    """Each rank's steps after warm-up: [rank][step]."""
    median: float | None = None
    """Over steps; each step counts as long as its slowest rank took."""
    mean: float | None = None
    """As median; what the seed's result.txt holds."""
    fastest: float | None = None
    slowest: float | None = None
    """The spread: the shortest and the longest of those steps."""
    slowest_rank: int | None = None
    """The one whose own median is the largest."""
    in_a_row: float | None = None
    """As median, where nothing waits for the device between steps: from the start of the first to
    the end of the last, on the rank that took longest, by their number."""
    alloc_bytes: int | None = None
    """Allocated after the last step, on the rank that has most."""
    peak_bytes: int | None = None
    """As alloc_bytes, at any time."""
    compile_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    tokens_per_second_per_gpu: float | None = None
    model_flops: float | None = None
    """Of one rank's optimizer step (flops.step_flops); without it a chart works it out from the
    condition's model, which must then be one that flops.py finds."""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    """At least ``name`` and ``device``: the accelerator's own name, for its peak speed."""
    options: dict[str, Any] | None = None
    """Those that change what is measured (Options.recorded); None in rows of older versions."""
    compile_reused: bool | None = None
    """Whether what was compiled before in the same process served it, so that compile_seconds is
    not what the condition takes by itself; None in rows of older versions."""
    effective: dict[str, Any] = field(default_factory=dict)
    """The settings that were in force, as the framework itself states them."""
    error: str | None = None
    """Why there are no times."""
    predicted: bool = False
    """By the simulator, not measured."""
    timestamp: str = ""
    """UTC, ISO 8601 to the second; set when left empty."""

    def __post_init__(self) -> None:
        if not self.timestamp:
            self.timestamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    @staticmethod
    def measured(condition: Condition, times: Sequence[Sequence[float]], **rest: Any) -> Row:
        """A row from every rank's step times: the statistics follow from them."""
        times = [[float(t) for t in rank] for rank in times]
        if not times or not times[0] or len({len(rank) for rank in times}) != 1:
            counts = ", ".join(str(len(rank)) for rank in times)
            raise UserError(
                f"[bench] {condition.label}: step times of the ranks do not match ({counts or 0}). "
                "Give every rank's, for the same steps, at least one."
            )
        if not all(0 < t < math.inf for rank in times for t in rank):
            raise UserError(f"[bench] {condition.label}: a step time is not above 0 seconds.")
        steps = [max(step) for step in zip(*times, strict=True)]
        medians = [statistics.median(rank) for rank in times]
        median = statistics.median(steps)
        return Row(
            condition,
            times=times,
            median=median,
            mean=statistics.fmean(steps),
            fastest=min(steps),
            slowest=max(steps),
            slowest_rank=medians.index(max(medians)),
            tokens_per_second_per_gpu=condition.tokens / median,
            **rest,
        )

    @staticmethod
    def failed(condition: Condition, error: str, **rest: Any) -> Row:
        return Row(condition, error=error or "unknown error", **rest)

    @property
    def ok(self) -> bool:
        return self.error is None and self.median is not None

    @property
    def failure(self) -> str:
        """A word or two for a chart's gap; empty when there are times."""
        if self.ok:
            return ""
        text = (self.error or "").lower()
        if no_room(text):
            return "OOM"
        for words in ("not installed", CANNOT_RUN, "did not start"):
            if words in text:
                return words
        return "timeout" if re.search(r"\b(timeout|timed out)\b", text) else "failed"

    def as_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema": SCHEMA} | data | {"condition": self.condition.as_dict()}

    def to_json(self) -> str:
        """One line, without its end. NaN and infinities, which JSON lacks, become null."""
        return json.dumps(_finite(self.as_dict()), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> Row:
        """Raises UserError for what is no row; names the field, not the file."""
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise UserError(f"[bench] row: is not JSON ({error}). Take the line out.") from None
        if not isinstance(data, dict) or "schema" not in data:
            raise UserError("[bench] row: is no object with a schema. Take the line out.")
        schema = data.pop("schema")
        if schema != SCHEMA:
            raise UserError(
                f"[bench] row: has schema {schema!r}, and this version reads {SCHEMA}. Use the "
                "version of deepcompile that wrote it."
            )
        return _row(data)


_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    "median": _NUMBER,
    "mean": _NUMBER,
    "fastest": _NUMBER,
    "slowest": _NUMBER,
    "slowest_rank": int,
    "in_a_row": _NUMBER,
    "alloc_bytes": int,
    "peak_bytes": int,
    "compile_seconds": _NUMBER,
    "tokens_per_second_per_gpu": _NUMBER,
    "model_flops": _NUMBER,
    "versions": dict,
    "commit": str,
    "machine": dict,
    "options": dict,
    "compile_reused": bool,
    "effective": dict,
    "error": str,
    "predicted": bool,
    "timestamp": str,
}
_LARGEST = 1e30
_POSITIVE = ("median", "mean", "fastest", "slowest", "in_a_row", "tokens_per_second_per_gpu")
_MAY_BE_NULL = {f.name for f in dataclasses.fields(Row) if f.default is None}


def _row(data: dict[str, Any]) -> Row:
    """A row from JSON's objects, every field checked."""
    condition = Condition.from_dict(data.pop("condition", None))
    times, losses = data.pop("times", []), data.pop("losses", [])
    if not isinstance(times, list) or not all(_numbers(t) and t for t in times):
        raise UserError("[bench] row: times are not lists of seconds, one for each rank. Fix it.")
    if not _numbers(losses, none=True):
        raise UserError("[bench] row: losses are not a list of numbers. Fix it.")
    for name, value in data.items():
        if name not in _KINDS:
            raise UserError(f"[bench] row: unknown field {name!r}. Take it out.")
        if value is None and name in _MAY_BE_NULL:
            continue
        right = isinstance(value, _KINDS[name]) and isinstance(value, bool) == (
            _KINDS[name] is bool
        )
        if not right or (isinstance(value, _NUMBER) and not 0 <= value < _LARGEST):
            raise UserError(f"[bench] row: {name} is {value!r}. Give what the schema says.")
        if name in _POSITIVE and not value:
            raise UserError(f"[bench] row: {name} is 0. Nothing takes no time.")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", data.get("timestamp", "")):
        raise UserError("[bench] row: its timestamp is not like 2026-01-31T23:59:59Z. Fix it.")
    return Row(condition, times=times, losses=losses, **data)


def _numbers(values: Any, none: bool = False) -> bool:
    return isinstance(values, list) and all(
        (v is None and none)
        or (isinstance(v, _NUMBER) and not isinstance(v, bool) and abs(v) < _LARGEST)
        for v in values
    )


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def append(folder: str | os.PathLike, row: Row) -> None:
    """Adds a row to a folder's rows.jsonl and, if it has times, to its result.txt."""
    from .result_line import to_line

    place = Path(folder)
    with writing("bench", place):
        place.mkdir(parents=True, exist_ok=True)
        _append_line(place / ROWS, row.to_json())
        if row.ok:
            _append_line(place / LINES, to_line(row))


def _append_line(path: Path, line: str) -> None:
    """In one write; after a torn line, which a killed writer left, on a line of its own."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        data = (("\n" if torn else "") + line + "\n").encode()
        while data:
            data = data[os.write(file, data) :]
        os.fsync(file)
    finally:
        os.close(file)


@dataclass
class Results:
    """Rows in the order in which they were written."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Lines that could not be read, with file, line number and cause. Say them to the user."""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def load(path: str | os.PathLike) -> Results:
        """From one file, or a folder's ``*.jsonl`` and those lines of its result.txt that no row
        there says already: these first and rows.jsonl last, so that a new row is the last one. A
        folder without such files is empty results; a path that does not exist is an error."""
        place = Path(path)
        if not place.exists():
            raise UserError(f"[bench] {place}: does not exist. Give a folder of results, or a file")
        if not place.is_dir():
            return _load_file(place)
        others, rows = Results(), Results()
        for file in sorted(place.glob("*.jsonl"), key=lambda file: (file.name == ROWS, file)):
            rows._add(_load_file(file))
        known = {(row.timestamp, row.condition, row.predicted) for row in rows}
        for file in (place / LINES, place / SEED_LINES):
            if file.is_file():
                lines = _load_file(file)
                lines.rows = [
                    r for r in lines if (r.timestamp, r.condition, r.predicted) not in known
                ]
                others._add(lines)
        return Results(others.rows + rows.rows, rows.problems + others.problems)

    def _add(self, other: Results) -> None:
        self.rows += other.rows
        self.problems += other.problems

    def latest(self) -> Results:
        """Of each condition the last row; measured and predicted ones are told apart. A success
        is not hidden by a later failure."""
        last: dict[tuple[Condition, bool], Row] = {}
        for row in self.rows:
            key = (row.condition, row.predicted)
            if row.ok or key not in last or not last[key].ok:
                last.pop(key, None)
                last[key] = row
        return Results(list(last.values()), list(self.problems))

    def find(self, condition: Condition, predicted: bool = False) -> Row | None:
        """The last row of a condition; one with times before one without."""
        same = [r for r in self.rows if r.condition == condition and r.predicted == predicted]
        return next((r for r in reversed(same) if r.ok), same[-1] if same else None)

    def where(self, **wanted: Any) -> Results:
        """Rows whose condition has these values: ``where(model=..., batch_size=1)``."""

        def fits(row: Row) -> bool:
            return all(getattr(row.condition, k) == v for k, v in wanted.items())

        return Results([r for r in self.rows if fits(r)], list(self.problems))


def save(folder: str | os.PathLike, rows: Iterable[Row]) -> None:
    for row in rows:
        append(folder, row)


def _load_file(path: Path) -> Results:
    from .result_line import from_line

    reader = Row.from_json if path.suffix in (".jsonl", ".json") else from_line
    results = Results()
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    results.rows.append(reader(line.strip()))
                except UserError as error:
                    results.problems.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise UserError(
            f"[bench] {path}: cannot be read ({error.strerror}). Check the path."
        ) from None
    return results
