# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/benchmarks.md from the rows in benchmarks/results.

    python benchmarks/train/published_table.py            # write them anew
    python benchmarks/train/published_table.py --check    # fail if they are not the rows'

Simulated rows are those in benchmarks/results/MACHINE-simulated, made by
`deepcompile bench --simulate --machine MACHINE --result-dir ...`. Measured ones stand between
marks that name their folder:

    <!-- speed benchmarks/results/2xh200: begin -->   what speed_table.py --table prints
    <!-- speed benchmarks/results/2xh200: end -->
    <!-- depth benchmarks/results/2xh200-depth: begin -->   largest_depth.py --table
    <!-- depth benchmarks/results/2xh200-depth: end -->
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from deepcompile.bench import depth_table
from deepcompile.bench import table as speed_table
from deepcompile.bench.conditions import Condition, order_of
from deepcompile.bench.flops import condition_flops
from deepcompile.bench.results import Results, Row
from deepcompile.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
MACHINES = ("4x8-a100", "4x8-h100")
LENGTHS = (512, 1024, 2048)
PUBLISHED = {
    "Llama-3-70B": {
        "ZeRO3": (225, 395, 563),
        "FSDP (C)": (215, 372, 524),
        "DeepCompile (P+S)": (250, 465, 646),
    },
    "Mixtral-8x7B": {
        "ZeRO3": (242, 480, 922),
        "FSDP (C)": (303, 573, 983),
        "DeepCompile (P+S)": (328, 625, 1100),
    },
}
"""Tokens/s/GPU on 32 GPUs, batch 1, at LENGTHS: read from the charts in DeepSpeedExamples,
benchmarks/deepcompile/results/acc_step_1."""
OURS = "DeepCompile (auto)"


def rows_of(machine: str) -> Results:
    folder = ROOT / "benchmarks" / "results" / f"{machine}-simulated"
    results = Results.load(folder)
    if results.problems or not results.rows:
        raise UserError(
            f"[bench] {folder}: {'; '.join(results.problems) or 'holds no rows'}. Run deepcompile "
            f"bench --simulate --machine {machine} --result-dir {folder}."
        )
    return results.latest()


def find(rows: Results, model: str, label: str, batch: int, seq: int) -> Row | None:
    for row in rows:
        c = row.condition
        if (c.model_label, c.label, c.batch_size, c.seq_length) == (model, label, batch, seq):
            return row
    return None


def cell(row: Row | None) -> str:
    if row is None:
        return ""
    rate = row.tokens_per_second_per_gpu
    return f"{rate:,.0f}" if rate else row.failure


def table(head: Sequence[str], body: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return ["| " + " | ".join(line) + " |" for line in [list(head), rule, *map(list, body)]]


def beside_published(sweeps: dict[str, Results]) -> list[str]:
    """Tokens/s/GPU at batch 1: published, and simulated on each machine."""
    head = ["model", "", *(f"{who} {s}" for who in ("published", *sweeps) for s in LENGTHS)]
    body = []
    for model, published in PUBLISHED.items():
        for label in (*published, OURS, OURS + " best"):
            cells = [f"{n:,}" for n in published.get(label, ())] or ["–"] * len(LENGTHS)
            for rows in sweeps.values():
                cells += [cell(find(rows, model, label, 1, seq)) for seq in LENGTHS]
            body.append([model, label, *cells])
    return table(head, body, 2)


def ratios(sweeps: dict[str, Results]) -> list[str]:
    """How many times faster P+S and auto are than the peers."""
    head = ["model", "", *(f"{who} {s}" for who in ("published", *sweeps) for s in LENGTHS)]
    body = []
    for model, published in PUBLISHED.items():
        for mine in ("DeepCompile (P+S)", OURS):
            for peer in ("ZeRO3", "FSDP (C)"):
                cells = ["–"] * len(LENGTHS)
                if mine in published:
                    pairs = zip(published[mine], published[peer], strict=True)
                    cells = [f"{a / b:.2f}" for a, b in pairs]
                for rows in sweeps.values():
                    for seq in LENGTHS:
                        a, b = (find(rows, model, name, 1, seq) for name in (mine, peer))
                        rates = [r.tokens_per_second_per_gpu for r in (a, b) if r is not None]
                        cells.append(f"{rates[0] / rates[1]:.2f}" if all(rates) else "–")
                body.append([model, f"{mine} / {peer}", *cells])
    return table(head, body, 2)


def operations() -> list[str]:
    """What the published figures mean in operations, of which none is recomputed."""
    head = ["model", *(f"TFLOP/s a GPU at {seq}" for seq in LENGTHS)]
    body = []
    for model, published in PUBLISHED.items():
        cells = []
        for seq, rate in zip(LENGTHS, published["DeepCompile (P+S)"], strict=True):
            condition = Condition(model, "zero3", seq_length=seq)
            cells.append(f"{condition_flops(condition) / seq * rate / 1e12:.0f}")
        body.append([f"{model}, P+S as published", *cells])
    return table(head, body, 1)


def whole_sweep(rows: Results) -> list[str]:
    """Tokens/s/GPU of every condition on one machine."""
    conditions = sorted({row.condition for row in rows}, key=order_of)
    labels = list(dict.fromkeys(c.label for c in conditions))
    sizes = sorted({(c.model_label, c.batch_size, c.seq_length) for c in conditions})
    head = ["model", "batch", "sequence", *(label.replace("DeepCompile ", "") for label in labels)]
    body = [
        [model, str(batch), str(seq)] + [cell(find(rows, model, la, batch, seq)) for la in labels]
        for model, batch, seq in sizes
    ]
    return table(head, body, 1)


def made_by(sweeps: dict[str, Results]) -> list[str]:
    lines = []
    for machine, rows in sweeps.items():
        commits = sorted({row.commit for row in rows})
        torch = sorted({row.versions.get("torch", "?") for row in rows})
        lines.append(
            f"- `{machine}` (`python/deepcompile/machines/{machine}.json`): {len(rows.rows)} rows "
            f"in `benchmarks/results/{machine}-simulated`, commit {', '.join(commits)}, torch "
            f"{', '.join(torch)}."
        )
    return lines


def sections() -> dict[str, list[str]]:
    sweeps = {machine: rows_of(machine) for machine in MACHINES}
    return {
        "published": beside_published(sweeps),
        "ratios": ratios(sweeps),
        "operations": operations(),
        "sweep": whole_sweep(sweeps[MACHINES[0]]),
        "made-by": made_by(sweeps),
    }


MEASURED = re.compile(
    r"<!-- (?P<kind>speed|depth) (?P<folder>\S+): begin -->\n"
    r".*?<!-- (?P=kind) (?P=folder): end -->",
    re.DOTALL,
)


def measured(found: re.Match) -> str:
    """The table of a folder, between its marks."""
    kind, folder = found["kind"], found["folder"]
    results = Results.load(ROOT / folder)
    if results.problems:
        raise UserError(f"[bench] {folder}: {'; '.join(results.problems)}. Take the lines out.")
    text = depth_table.markdown(results) if kind == "depth" else speed_table.long_table(results)
    said = f"`{folder}`: {speed_table.origin(results)}"
    return f"<!-- {kind} {folder}: begin -->\n\n{said}\n\n{text}\n\n<!-- {kind} {folder}: end -->"


def filled(page: str) -> str:
    """The page with each section between its two marks replaced."""
    for name, lines in sections().items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise UserError(f"[bench] {PAGE}: lacks the marks of {name!r}. Put them back.")
        head, rest = page.split(begin)
        page = head + begin + "\n" + "\n".join(lines) + "\n\n" + end + rest.split(end)[1]
    return MEASURED.sub(measured, page)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it differs")
    options = parser.parse_args(argv)
    try:
        page = PAGE.read_text(encoding="utf-8")
        new = filled(page)
    except (UserError, OSError) as error:
        print(f"published_table.py: error: {error}", file=sys.stderr)
        return 2
    if options.check and new != page:
        print(f"{PAGE}: is not what the rows say; run benchmarks/train/published_table.py")
        return 1
    if not options.check:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
