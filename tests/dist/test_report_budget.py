# SPDX-License-Identifier: Apache-2.0
"""What a run's report says of a budget: what was given up for it, and what that costs."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import cases
import pytest
from ranks import run_ranks

from deepcompile import _core, cli
from deepcompile.engine_report import report_data

KEEPS = ["zero3_compile", "selective_gather"]
MOVES = ["zero3_compile", "offload_adam_states"]
RERUNS = ["zero3_compile", "rematerialize"]
PARTS = {2: None, 5: 1.0, 8: 0.97, 11: 0.97}
"""Step of an entry to its budget, in parts of what the classical plan needs."""
SCHEDULE = [(0, KEEPS[:1]), *zip(PARTS, (KEEPS, KEEPS, MOVES, RERUNS), strict=True)]

pytestmark = pytest.mark.timeout(600)


def _classical_peak(planner: Any) -> int:
    merged = _core.merge_steps("step", planner.step_programs, planner.plain_update())
    _core.run_passes(merged, ["zero3_compile"])
    return _core.simulate(merged, planner.request.machine, planner.request.costs).peak_bytes


def _reports(rank: int, world: int) -> dict[int, dict]:
    """One training whose budget gets smaller: the report under each of its plans."""
    engine = cases.start("llama", cases.config_for(world, 3), None)
    engine.compile(backend="eager", schedule=SCHEDULE)
    planner, found, classical = engine.planner, {}, 0
    for step, part in PARTS.items():
        if part is not None:
            planner.budget_limit = int(part * classical)
        cases.train_steps(engine, engine.global_steps, step + 2)  # the second is traced
        if not classical:
            peak = _classical_peak(planner) if rank == 0 else None
            classical = engine.ranks.from_first(peak)
        found[step] = report_data(engine) if rank == 0 else {}
    return found


def test_the_report_names_what_a_budget_took_and_what_it_cost():
    reports = run_ranks(_reports, 2, timeout=500)[0]
    said = {step: data["facts"]["Given up for the budget"] for step, data in reports.items()}
    assert said[2] == "no time", "there is room for everything"

    cost = r"(\d+\.\d\d) ms a step, against \d[\d.,]* ms with a peak of [\d.,]+ [KM]iB: "
    gathered = r"\d+ parameters gathered again that would stay whole \(model\.\S+, .*\)"
    found = re.fullmatch(cost + gathered, said[5])
    assert found and float(found[1]) > 0, said[5]

    # Copies hide behind compute, and what runs again may hide a gather: "no time" is an answer.
    moved = r"optimizer states of \d+ parameters? on the host \(\S+.*\)"
    assert re.fullmatch(f"({cost}|no time: ){moved}", said[8]), said[8]
    rerun = r"\d+ regions? run again in the backward \(\S+.*\)"
    assert re.fullmatch(f"({cost}|no time: ){rerun}", said[11]), said[11]

    # What the next best would have cost is told of each kind of choice.
    others = {row["chosen"]: row for row in reports[11]["others"]}
    assert others["run again in the backward"]["instead"] == "outputs kept"
    assert all(row["cost"] for row in others.values())
    assert any(text.startswith("released and gathered again") for text in others)
    assert "because rematerialize" in reports[11]["plan"]
    assert not any("before the newest plan" in note for note in reports[11]["notes"])


def test_the_plan_that_a_run_writes_explains_itself(tmp_path):
    """`deepcompile explain PATH` alone gives the planned step, its reasons and measured costs."""
    planned, told = run_ranks(_written, 2, str(tmp_path), timeout=500)[0]
    assert (tmp_path / "plan.run.json").exists()
    first, head, predicted, *lines = told.splitlines()
    assert first == f"by what the run measured, in {tmp_path / 'plan.run.json'}"
    assert head.startswith("step ") and f"predicted: {planned} a step" in predicted
    assert lines[:2] == ["", "the step as a whole"]
    assert any("chosen: zero3_compile" in line and "[auto]" in line for line in lines)
    assert any(line.startswith("  why: kept ") for line in lines)
    assert any(line.startswith("  else: ") and " instead: " in line for line in lines)


def _written(rank: int, world: int, folder: str) -> tuple[str, str] | None:
    engine = cases.start("llama", cases.config_for(world, 3), "eager")
    cases.train_steps(engine, 0, 6)
    path = engine.write_plan(Path(folder) / "plan.txt")
    if rank:
        assert path is None
        return None
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(["explain", str(path)]) == 0
    return _core.pretty_nanos(engine.planner.agreed.predicted_ns), out.getvalue()
