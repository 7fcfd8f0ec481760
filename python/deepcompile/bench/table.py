# SPDX-License-Identifier: Apache-2.0
"""Our step beside FSDP2's on three workloads, in one job, as a table.

    python benchmarks/train/speed_table.py w1 w2 w3
    python benchmarks/train/speed_table.py w1 --seq-lengths 512 --bench_step 20 --num-layers 8
    python benchmarks/train/speed_table.py w1 --seq-lengths 1024 --accumulations 1,2,4,8,16
    python benchmarks/train/speed_table.py w1 --frameworks fsdp_c,deepcompile/budget=fsdp_c
    python benchmarks/train/speed_table.py --table DIR    # only print what the rows there say

W1 is Llama-3-70B's geometry cut to 16 layers, W2 Mixtral-8x7B's to 10, W3 Llama-3-8B whole;
less where this machine's memory asks. Each workload is one process group: FSDP2 by its
defaults, FSDP2 at its best, ours, each at all lengths. Options are the sweep's, and what is
measured already is not measured again.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import UserError, fail
from . import sweep
from .conditions import Condition, local_model, order_of
from .metrics import other_device
from .results import Results, Row

WORKLOADS = ("w1", "w2", "w3")
HEAD = ("workload", "seq", "acc", "FSDP2 default", "FSDP2 best", "ours", "default / ours",
        "best / ours")  # fmt: skip
IN_A_ROW = "in a row"
LONG_HEAD = ("model", "batch", "seq", "acc", "framework", "ms a step", IN_A_ROW, "tokens/s/GPU",
             "peak GiB", "device GiB", "x default", "x best")  # fmt: skip
LONG_TEXT = (0, 4)
LONG_NOTE = """\
Milliseconds a step: median (fastest-slowest); in a row: with no waiting for the device between
steps. Memory of the fullest rank: the allocator's peak, and what is in use on the device. The last
columns: how many times as fast as FSDP2 + compile by its defaults, and at its best, at the same
sizes."""


# ---- what tables share


def milliseconds(row: Row) -> str:
    """The median and the spread, where the row has one: a line of result.txt has none."""
    longest = row.median if row.slowest is None else row.slowest
    digits = 1 if longest >= 0.1 else 2
    median = f"{row.median * 1e3:.{digits}f}"
    if row.fastest is None or row.slowest is None:
        return median
    low, high = (f"{t * 1e3:.{digits - 1}f}" for t in (row.fastest, row.slowest))
    return f"{median} ({low}-{high})"


def aligned(
    head: Sequence[str], lines: Sequence[Sequence[str]], text: Sequence[int] = ()
) -> list[str]:
    """Markdown; columns that are not `text` are right-aligned."""
    rule = ["---" if n in text else "---:" for n in range(len(head))]
    return ["| " + " | ".join(line) + " |" for line in (head, rule, *lines)]


# ---- ours beside FSDP2, a line for each size


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if not row.ok:
        return row.failure
    return f"{milliseconds(row)}, {(row.peak_bytes or 0) / 2**30:.0f} GiB"


def _ratio(peer: Row | None, ours: Row | None) -> float | None:
    if peer is None or ours is None or not (peer.ok and ours.ok) or other_device(peer, ours):
        return None
    return peer.median / ours.median


def _line(workload: str, length: int, times: int, found: dict[str, Row | None]) -> list[str]:
    default, best, ours = (found.get(k) for k in ("default", "best", "ours"))
    ratios = [_ratio(default, ours), _ratio(best, ours)]
    shown = [f"{ratio:.2f}" if ratio else "-" for ratio in ratios]
    cells = [_cell(row) for row in (default, best, ours)]
    return [workload.upper(), str(length), str(times), *cells, *shown]


def _kind(condition: Condition) -> str | None:
    if condition.variant or condition.offload_adam or condition.offload_params:
        return None
    if condition.ours and not condition.passes:
        return "ours"
    return condition.settings if condition.framework == "fsdp_c" else None


def table(workload: str, conditions: Sequence[Condition], rows: Results) -> list[list[str]]:
    """The lines of one workload."""
    found: dict[tuple[int, int], dict[str, Row | None]] = {}
    for condition in conditions:
        kind = _kind(condition)
        if kind is not None:
            sizes = (condition.seq_length, condition.accumulation)
            found.setdefault(sizes, {})[kind] = rows.find(condition)
    return [_line(workload, *sizes, found[sizes]) for sizes in sorted(found)]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(aligned(HEAD, lines, text=range(len(HEAD))))


# ---- any rows, a line for each condition


def _sizes(condition: Condition) -> tuple:
    return (condition.model_label, condition.num_layers, condition.batch_size,
            condition.seq_length, condition.accumulation)  # fmt: skip


def _place(row: Row) -> tuple:
    """Only rows that agree in it are compared."""
    c = row.condition
    model = local_model(c.model)
    return (*_sizes(c), model, c.world, c.nodes, c.dtype, c.backend, row.predicted)


def _times(peer: Row | None, row: Row) -> str:
    ratio = _ratio(peer, row)
    return f"{ratio:.2f}" if ratio else "-"


def _long_line(row: Row, peers: dict[str, Row]) -> list[str]:
    c = row.condition
    head = [c.model_label, str(c.batch_size), str(c.seq_length), str(c.accumulation), c.label]
    if not row.ok:
        return [*head, row.failure, *["-"] * 6]
    used = max(row.effective.get("device_bytes_of_ranks") or [0])
    gib = [f"{b / 2**30:.1f}" if b else "-" for b in (row.peak_bytes, used)]
    in_a_row = f"{row.in_a_row * 1e3:.1f}" if row.in_a_row else "-"
    rate = f"{row.tokens_per_second_per_gpu:,.0f}"
    ratios = [_times(peers.get(kind), row) for kind in ("default", "best")]
    return [*head, milliseconds(row), in_a_row, rate, *gib, *ratios]


def long_table(results: Results) -> str:
    """Every condition's last row, beside FSDP2's at the same sizes."""
    rows = results.latest().rows
    if not rows:
        raise UserError("[bench] table: there are no rows. Give the folder of a sweep.")
    peers: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        kind = _kind(row.condition)
        if kind in ("default", "best"):
            peers.setdefault(_place(row), {})[kind] = row
    rows.sort(key=lambda r: (_sizes(r.condition), order_of(r.condition)))
    lines = [_long_line(row, peers.get(_place(row), {})) for row in rows]
    shown = [
        at for at, name in enumerate(LONG_HEAD)
        if name != IN_A_ROW or any(row.in_a_row for row in rows)
    ]  # fmt: skip
    head, *lines = ([line[at] for at in shown] for line in (LONG_HEAD, *lines))
    return "\n".join(aligned(head, lines, LONG_TEXT))


def origin(results: Results) -> str:
    """Where rows come from, in a line: machine, versions, commit, steps."""
    rows = results.latest().rows

    def each(values: list) -> str:
        return ", ".join(dict.fromkeys(str(v) for v in values if v)) or "?"

    said = [
        each([r.machine.get("name") for r in rows]),
        "torch " + each([r.versions.get("torch") for r in rows]),
        "commit " + each([r.commit for r in rows]),
    ]
    nccl = [r.versions.get("nccl") for r in rows]
    said += ["NCCL " + each(nccl)] if any(nccl) else []
    counts = [(r.effective.get("bench_step", 0), r.effective.get("warmup_step", 0)) for r in rows]
    steps = [f"{all_ - warm} steps after {warm}" for all_, warm in counts if all_]
    said += [each(steps)] if steps else []
    return f"{len(rows)} conditions; " + "; ".join(said) + "."


def _print_folders(folders: Sequence[str]) -> int:
    if not folders:
        raise UserError("[bench] --table: needs a folder of results. Give one.")
    for folder in folders:
        found = Results.load(folder)
        for problem in found.problems:
            print(f"warning: {problem}", file=sys.stderr)
        print(f"{folder}: {origin(found)}\n\n{LONG_NOTE}\n\n{long_table(found)}")
    return 0


def _print_run(sweeps: Sequence[sweep.Sweep]) -> None:
    lines, mine = [], Results()
    for each in sweeps:
        rows = each.rows()
        lines += table(each.name, each.conditions, rows)
        mine.rows += [r for r in rows.latest() if r.condition in each.conditions]
    if lines:
        print("\nms a step: median (fastest-slowest), peak memory of a rank\n")
        print(markdown(lines))
    if mine.rows:
        print(f"\n{LONG_NOTE}\n{origin(mine)}\n\n{long_table(mine)}")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if "-h" in given or "--help" in given:
        print(__doc__)
    try:
        if given[:1] == ["--table"]:
            return _print_folders(given[1:])
        if not any(word in WORKLOADS for word in given):
            given = [*WORKLOADS, *given]
        sweeps = sweep.plan(given)
        codes = sweep.run_each(sweeps)
        if sweeps and codes[-1] != 130:
            _print_run(sweeps)
        return max(codes, default=0)
    except UserError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
