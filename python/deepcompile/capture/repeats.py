# SPDX-License-Identifier: Apache-2.0
"""Tandem repeats in a sequence of hashes: how the layers of a model are found.

No module names are involved: a layer is a run of micro-segments that equals
the run right after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Repeat:
    """``sequence[start : start + period]`` occurs ``count`` times in a row; ``slack`` more
    elements continue the pattern."""

    start: int
    period: int
    count: int
    slack: int

    @property
    def coverage(self) -> int:
        return self.count * self.period

    @property
    def end(self) -> int:
        return self.start + self.coverage + self.slack


def _longest_run(equal: np.ndarray) -> tuple[int, int]:
    """(start, length) of the first longest run of True."""
    edges = np.concatenate(([-1], np.flatnonzero(~equal), [len(equal)]))
    gaps = np.diff(edges) - 1
    best = int(np.argmax(gaps))
    return int(edges[best]) + 1, int(gaps[best])


def find_repeat(sequence: np.ndarray, low: int, high: int) -> Repeat | None:
    """The repeat that covers most of ``sequence[low:high]``; the shortest period among equals.

    Quadratic in the length, but in vector compares: 10 ms for 1300 elements (80 layers).
    """
    best = None
    part = sequence[low:high]
    for period in range(1, len(part) // 2 + 1):
        if best is not None and best.coverage + best.slack >= len(part):
            break
        start, run = _longest_run(part[:-period] == part[period:])
        count = run // period + 1
        if count >= 2 and (best is None or count * period > best.coverage):
            best = Repeat(low + start, period, count, run % period)
    return best
