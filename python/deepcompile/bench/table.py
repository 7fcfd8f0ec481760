# SPDX-License-Identifier: Apache-2.0
"""Our step beside FSDP2's on three workloads, in one job, as a table.

    python benchmarks/train/speed_table.py w1 w2 w3
    python benchmarks/train/speed_table.py w1 --seq-lengths 512 --bench_step 20 --num-layers 8

W1 is Llama-3-70B's geometry cut to 16 layers, W2 Mixtral-8x7B's to 10, W3 Llama-3-8B whole;
less where this machine's memory asks. Each workload is one process group: FSDP2 by its
defaults, FSDP2 at its best, ours, each at all lengths. Options are the sweep's, and what is
measured already is not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError, fail
from . import sweep
from .conditions import Condition
from .results import Results, Row

WORKLOADS = ("w1", "w2", "w3")


@dataclass(frozen=True)
class Reference:
    """Milliseconds a step on 4 x H200, by sequence length; only their ratios carry over."""

    default: dict[int, float]
    target: dict[int, float]


REFERENCES = {
    "w1": Reference({512: 321, 1024: 402, 2048: 587}, {512: 172, 1024: 190, 2048: 340}),
    "w2": Reference({512: 291, 1024: 306, 2048: 383}, {512: 165, 1024: 170, 2048: 200}),
    "w3": Reference({512: 271, 1024: 278, 2048: 348}, {512: 95, 1024: 125, 2048: 190}),
}
HEAD = ("workload", "seq", "FSDP2 default", "FSDP2 best", "ours", "default / ours", "best / ours",
        "asked: default / ours", "")  # fmt: skip


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if not row.ok:
        return row.failure
    spread = f"{row.fastest * 1e3:.0f}-{row.slowest * 1e3:.0f}"
    return f"{row.median * 1e3:.1f} ({spread}), {(row.peak_bytes or 0) / 2**30:.0f} GiB"


def _ratio(peer: Row | None, ours: Row | None) -> float | None:
    if peer is None or ours is None or not (peer.ok and ours.ok):
        return None
    return peer.median / ours.median


def _line(workload: str, length: int, found: dict[str, Row | None]) -> list[str]:
    default, best, ours = (found.get(k) for k in ("default", "best", "ours"))
    ratios = [_ratio(default, ours), _ratio(best, ours)]
    reference = REFERENCES.get(workload)
    asked = None
    if reference and length in reference.target:
        asked = reference.default[length] / reference.target[length]
    said = ""
    if asked and ratios[0]:
        said = "reached" if ratios[0] >= asked else f"{asked / ratios[0] - 1:.0%} short"
    shown = [f"{r:.2f}" if r else "-" for r in (*ratios, asked)]
    return [workload.upper(), str(length), _cell(default), _cell(best), _cell(ours), *shown, said]


def _kind(condition: Condition) -> str | None:
    if condition.variant:
        return None
    if condition.ours and not condition.passes:
        return "ours"
    return condition.settings if condition.framework == "fsdp_c" else None


def table(workload: str, conditions: Sequence[Condition], rows: Results) -> list[list[str]]:
    """The lines of one workload."""
    found: dict[int, dict[str, Row | None]] = {}
    for condition in conditions:
        kind = _kind(condition)
        if kind is not None:
            found.setdefault(condition.seq_length, {})[kind] = rows.find(condition)
    return [_line(workload, length, found[length]) for length in sorted(found)]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(HEAD)
    return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, rule, *lines))


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if "-h" in given or "--help" in given:
        print(__doc__)
    if not any(word in WORKLOADS for word in given):
        given = [*WORKLOADS, *given]
    try:
        names = [word for word in given if word in WORKLOADS]
        sweeps = sweep.plan(given)
        codes = []
        for each in sweeps:
            codes.append(each.run())
            if codes[-1] == 130:
                return 130
        lines = []
        for name, each in zip(names, sweeps, strict=False):
            lines += table(name, each.conditions, each.rows())
        if lines:
            print("\nms a step: median (fastest-slowest), peak memory of a rank\n")
            print(markdown(lines))
        return max(codes, default=0)
    except UserError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
