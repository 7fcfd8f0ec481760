# SPDX-License-Identifier: Apache-2.0
"""What an engine tells its report."""

from test_engine import config, start, step

from deepcompile import _core
from deepcompile.engine_report import machine_of, report_data, step_view


def test_totals_count_every_micro_batch():
    micro_batches = 3
    engine = start(
        config={
            **config(),
            "train_batch_size": 4 * micro_batches,
            "gradient_accumulation_steps": micro_batches,
        }
    )
    engine.compile(backend="eager")
    for number in range(4 * micro_batches):
        step(engine, number)
    view = step_view(engine)
    items = _core.simulate(view.program, machine_of(engine)).items
    runs = [item for item in items if item.label.startswith("run ")]
    assert len(runs) % micro_batches == 0 and runs
    rows = {row["what"]: row for row in report_data(engine)["compare"]}
    predicted = sum(item.end_ns - item.start_ns for item in runs)
    assert abs(rows["All run instructions"]["predicted"] - predicted) <= len(runs)
    assert 0 < rows["All run instructions"]["measured"] <= rows["Step"]["measured"]
