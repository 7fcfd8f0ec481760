# SPDX-License-Identifier: Apache-2.0
"""What an engine tells its report, and writes for `deepcompile explain`."""

from __future__ import annotations

import json

from test_cli import deepcompile_here
from test_engine import config, start, step

from deepcompile import _core
from deepcompile.engine_report import predict, report_data, step_view
from deepcompile.report import write_report


def trained(steps: int = 8, **more):
    engine = start(config={**config(), **more})
    engine.compile(backend="eager")
    for number in range(steps):
        step(engine, number)
    return engine


def test_totals_count_every_micro_batch():
    micro_batches = 3
    engine = trained(
        4 * micro_batches,
        train_batch_size=4 * micro_batches,
        gradient_accumulation_steps=micro_batches,
    )
    view = step_view(engine)
    items = predict(engine, view).best.items
    runs = [item for item in items if item.label.startswith("run ")]
    assert len(runs) % micro_batches == 0 and runs
    rows = {row["what"]: row for row in report_data(engine)["compare"]}
    predicted = sum(item.end_ns - item.start_ns for item in runs)
    assert abs(rows["All run instructions"]["predicted"] - predicted) <= len(runs)
    assert 0 < rows["All run instructions"]["measured"] <= rows["Step"]["measured"]


def test_each_prediction_says_what_it_is_made_from():
    engine = trained()
    data = report_data(engine)
    steps = [row for row in data["compare"] if row["what"].startswith("Step")]
    assert len({row["note"] for row in steps}) == len(steps) == 3
    # One number for the planned step, wherever the page gives it.
    (headline,) = (row for row in steps if row.get("headline"))
    assert headline["predicted"] == engine.planner.agreed.predicted_ns
    assert f"{headline['predicted'] / 1e6:,.2f} ms" in data["facts"]["Planned step"]
    assert not any("by measured costs" in row["what"] for row in data["compare"])


def test_sums_that_overlap_or_wait_have_no_ratio(tmp_path):
    data = report_data(trained())
    rows = {row["what"]: row for row in data["compare"]}
    for kind in ("gather", "reduce", "wait", "accumulate"):
        row = rows[f"All {kind} instructions"]
        assert row["ratio"] is False and row["note"]
    assert rows["All run instructions"].get("ratio", True)
    page = write_report(data, tmp_path / "report.html").read_text(encoding="utf-8")
    (cells,) = (x for x in page.split("<tr>") if "All reduce instructions" in x)
    assert rows["All reduce instructions"]["note"] in cells
    assert cells.rstrip().removesuffix("</tr>").endswith('<td class="n">–</td>')


def test_a_written_plan_has_its_reasons_and_its_costs(tmp_path):
    engine = trained()
    agreed = engine.planner.agreed
    path = engine.write_plan(tmp_path / "plan.txt")
    program = _core.StepProgram.parse(path.read_text(encoding="utf-8"))
    assert [(r.pass_name, r.object, r.text) for r in program.reasons] == agreed.reasons
    run = json.loads((tmp_path / "plan.run.json").read_text(encoding="utf-8"))
    assert run["costs"] == json.loads(engine.planner.costs.serialize())
    assert run["memory_budget"] == agreed.budget

    # Alone, it is simulated as it was planned; with a machine that has nothing of the run.
    alone = json.loads(deepcompile_here("sim", str(path), "--json").stdout)
    assert alone["step_ns"] == agreed.predicted_ns and alone["memory_budget"] == agreed.budget
    told = deepcompile_here("explain", str(path)).stdout
    assert "plan.run.json" in told and "chosen: zero3_compile" in told
    other = deepcompile_here("explain", str(path), "--machine", "4xh200")
    assert other.returncode == 0 and "plan.run.json" not in other.stdout
    costs = ("--machine", "2x-cpu", "--costs", str(tmp_path / "plan.run.json"), "--json")
    named = json.loads(deepcompile_here("sim", str(path), *costs).stdout)
    assert named == alone | {"memory_budget": alone["memory_bytes"]}

    # The page's program is the same.
    assert report_data(engine)["plan"] == path.read_text(encoding="utf-8")


def test_a_plan_of_an_earlier_run_keeps_its_reasons(tmp_path):
    kept = {"compile": {"plan_cache": str(tmp_path / "plans")}}
    first = trained(**kept).planner.agreed
    engine = trained(4, **kept)
    assert engine.planner.history[0].why == "plan cache"
    path = engine.write_plan(tmp_path / "plan.txt")
    told = deepcompile_here("explain", str(path)).stdout
    (chosen,) = (text for _, _, text in first.reasons if text.startswith("chosen: "))
    assert chosen in told and " instead: " in told
    data = report_data(engine)
    assert chosen in [row["text"] for row in data["reasons"]] and data["others"]


def test_a_run_file_that_is_none_is_one_clear_error(tmp_path):
    path = trained().write_plan(tmp_path / "plan.txt")
    (tmp_path / "plan.run.json").write_text('{"machine": 3}')
    result = deepcompile_here("explain", str(path))
    assert result.returncode == 2 and "plan.run.json" in result.stderr
    (tmp_path / "plan.run.json").unlink()
    result = deepcompile_here("explain", str(path))
    assert result.returncode == 2 and "--machine" in result.stderr


def test_a_plan_of_the_stage_is_written_too(tmp_path):
    engine = start()
    engine.compile(backend="eager", schedule=[(0, ["zero3_compile"])])
    assert engine.write_plan(tmp_path / "plan.txt") is None, "nothing was captured yet"
    for number in range(4):
        step(engine, number)
    path = engine.write_plan(tmp_path / "plan.txt")
    told = deepcompile_here("explain", str(path)).stdout
    assert "[zero3_compile]" in told
