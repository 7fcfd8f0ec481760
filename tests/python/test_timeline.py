# SPDX-License-Identifier: Apache-2.0
"""A step's picture, and the idle time in it."""

from __future__ import annotations

import json

import pytest

from deepcompile.cli import main
from deepcompile.errors import UserError
from deepcompile.report import timeline

LANES = {1: "compute", 2: "link", 3: "waits"}


def trace(folder, spans, process="measured"):
    """`spans`: (lane, category, start, end) in microseconds."""
    names = [{"name": "process_name", "ph": "M", "pid": 7, "args": {"name": process}}]
    names += [
        {"name": "thread_name", "ph": "M", "pid": 7, "tid": t, "args": {"name": lane}}
        for t, lane in LANES.items()
    ]
    events = [
        {"name": f"{op} p", "cat": op, "ph": "X", "pid": 7, "tid": lane, "ts": start,
         "dur": end - start, "args": {}}
        for lane, op, start, end in spans
    ]  # fmt: skip
    path = folder / "step.json"
    path.write_text(json.dumps({"traceEvents": names + events}), encoding="utf-8")
    return path


STEP = [
    (1, "update", 0, 1000),
    (2, "gather", 500, 3000),
    (3, "wait", 1000, 3000),
    (1, "run", 3000, 6000),
    (2, "reduce", 6000, 9000),
    (1, "accumulate", 6500, 9500),  # half a millisecond after the run; its sum takes another
    (3, "release", 9500, 9500),
]


def test_compute_and_idle_times_make_up_the_step(tmp_path):
    found = timeline.times(timeline.read(trace(tmp_path, STEP)))
    assert found == pytest.approx(
        {
            "update": 1.0,
            "run": 3.0,
            "idle: waits for gathers": 2.0,
            "idle: waits for reductions": 2.5,
            "sum": 0.5,
            "between instructions": 0.5,
        }
    )
    assert sum(found.values()) == pytest.approx(9.5)


def test_waits_are_drawn_where_compute_is(tmp_path):
    lanes = timeline.lanes_of(timeline.read(trace(tmp_path, STEP)))
    assert {lane: [i.op for i in items] for lane, items in lanes.items()} == {
        "compute": ["update", "wait", "run", "accumulate", "sum"],
        "link": ["gather", "reduce"],
    }


def test_overlapping_spans_count_once():
    assert timeline.covered([(5, 7), (0, 3), (1, 2), (2, 4)]) == 6


def test_the_command_draws_and_says_the_times(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = trace(tmp_path, STEP)
    assert main(["timeline", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["run", "3.00", "ms"] and said[-1] == str(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


def test_the_only_step_needs_no_name_and_a_predicted_one_no_machine(tmp_path):
    path = trace(tmp_path, STEP, "predicted on 4xh200")
    assert timeline.read_step(path)[0] == "predicted on 4xh200"
    assert timeline.read(path, "predicted") == timeline.read(path)


def test_what_is_no_step_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="has no step 'predicted', only 'measured'.*--process"):
        timeline.read(trace(tmp_path, STEP), "predicted")
    with pytest.raises(UserError, match="cannot be read .No such file.*Check the path"):
        timeline.read(tmp_path / "none.json")
    with pytest.raises(UserError, match="nothing ran in 'measured'"):
        timeline.read(trace(tmp_path, []))
    (tmp_path / "other.json").write_text("[1]")
    assert main(["timeline", str(tmp_path / "other.json")]) == 2
    assert "is no trace of a step" in capsys.readouterr().err
