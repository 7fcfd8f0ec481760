# SPDX-License-Identifier: Apache-2.0
"""What charts and tables show of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UserError
from .flops import row_flops, row_peak
from .results import Row


@dataclass(frozen=True)
class Metric:
    axis: str
    """The label of the axis, with its unit."""
    of: Callable[[Row], float | None]
    """Its value; None where the row does not say."""
    digits: int = 0
    more_is_better: bool = True
    by_time: bool = True
    """Whether it follows from the step's time, so that the spread of times is its spread."""
    left_out: Callable[[Row], str] = lambda row: ""
    """A word for a row that has times, but whose value would say something else."""
    why_left_out: str = ""
    """What the word means."""
    caution: str = ""
    """What to know before values are compared."""


def metrics(peak_tflops: float | None = None) -> dict[str, Metric]:
    """All, by name. ``peak_tflops``: of a device whose peak is not known."""

    def flops(row: Row) -> float | None:
        return None if row.median is None else row_flops(row) / row.median / 1e12

    def mfu(row: Row) -> float | None:
        done = flops(row)
        return None if done is None else 100 * done * 1e12 / row_peak(row, peak_tflops)

    def gib(row: Row) -> float | None:
        return row.peak_bytes / 2**30 if row.peak_bytes else None

    def throughput(row: Row) -> float | None:
        return None if row.median is None else row.condition.tokens / row.median

    return {
        "throughput": Metric("Throughput (tokens/s/GPU)", throughput),
        "iteration_time": Metric("Iteration time (s)", lambda r: r.median, 3, False),
        "flops": Metric("TFLOP/s a GPU, recomputation not counted", flops),
        "mfu": Metric("MFU (%), recomputation not counted", mfu, 1),
        "peak_mem": Metric("Peak memory (GiB)", gib, 1, False, False),
        "compile_time": Metric(
            "Compile time (s)",
            lambda r: None if r.compile_reused else r.compile_seconds,
            1,
            False,
            False,
            lambda r: "reused" if r.compile_reused else "",
            "reused: served by what was compiled before in the same process",
            "the compilers' caches on disk serve whoever runs later",
        ),  # fmt: skip
    }


def metric(name: str, peak_tflops: float | None = None) -> Metric:
    known = metrics(peak_tflops)
    if name not in known:
        raise UserError(f"[bench] metric {name!r}: unknown. Use one of {', '.join(known)}.")
    return known[name]


def absent(rows: Sequence[Row], name: str, peak_tflops: float | None = None) -> str | None:
    """Why there is nothing to show of a metric, in words; None: there is."""
    what = metric(name, peak_tflops)
    try:
        there = any(what.of(row) for row in rows if row.ok)
    except UserError as error:  # a device without a known peak, a model of unknown operations
        return str(error)
    return None if there else f"[bench] {name}: no result says it."


def spread(what: Metric, row: Row) -> tuple[float, float]:
    """How far below and above the value the fastest and the slowest step are; 0 if not known."""
    value = what.of(row)
    if value is None or not what.by_time or row.median is None:
        return 0.0, 0.0
    ends = [row.fastest or row.median, row.slowest or row.median]
    if what.more_is_better:  # the value is something over the time
        ends = [value * row.median / end for end in reversed(ends)]
    return max(0.0, value - ends[0]), max(0.0, ends[1] - value)


def other_device(a: Row, b: Row) -> bool:
    """Whether two rows are of different devices, as far as they say: lines of result.txt do not."""
    return len({row.machine.get("device") for row in (a, b)} - {None, ""}) > 1


def gains(rows: Sequence[Row], what: Metric) -> list[tuple[Row, Row, float]]:
    """(ours, peer, how many times better ours is) for rows of one group on one kind of device; more
    than 1 is better. Among results without ours, DeepSpeed's DeepCompile takes its place, as in the
    seed."""
    own = any(row.condition.ours for row in rows)

    def is_mine(row: Row) -> bool:
        return row.condition.ours if own else row.condition.deepcompile

    found = []
    for mine in filter(is_mine, rows):
        for peer in rows:
            if is_mine(peer) or mine.predicted != peer.predicted or other_device(mine, peer):
                continue
            a, b = what.of(mine), what.of(peer)
            if a and b:
                found.append((mine, peer, a / b if what.more_is_better else b / a))
    return found
