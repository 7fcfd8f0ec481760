# SPDX-License-Identifier: Apache-2.0
"""Which rows a sweep takes as they are: those of its own options; what failed, what never ran, and
what hangs."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from deepcompile.bench import lines, peers, process, results, suites, sweep, worker
from deepcompile.bench.conditions import Condition
from deepcompile.bench.options import MEASURED, Options
from deepcompile.bench.process import Outcome, Place
from deepcompile.bench.results import Results, Row
from deepcompile.errors import UserError

ENGINE = {"compile": {"region_bytes": 5}}
OTHERS = {
    "learning_rate": 1e-3, "max_grad_norm": 0.0, "dataset_name": "ag_news", "num_epochs": 2,
    "bench_step": 40, "warmup_step": 20, "in_a_row": 5, "attn_impl": "eager", "deterministic": True,
    "load_weights": True, "eval": True, "profile": True, "engine": ENGINE,
}  # fmt: skip


def tiny(framework: str = "fsdp", **changes) -> Condition:
    values = {"model": "llama-tiny", "num_layers": 1, "seq_length": 16, "world": 2}
    return Condition(framework=framework, **(values | {"dtype": "fp32"} | changes))


OURS = tiny("deepcompile", compile=True)


class Fake:
    """Stands for process.run: rows as a worker writes them, or an outcome without any."""

    def __init__(self, outcome: Outcome | None = None, effective: dict | None = None):
        self.ran: list[Condition] = []
        self.options: list[Options] = []
        self._outcome, self._effective = outcome, effective or {}

    def __call__(self, place, arguments, log, timeout, on_line, watch) -> Outcome:
        conditions, options = worker.parse(arguments)
        self.options.append(options)
        self.ran += conditions
        if self._outcome is not None:
            return self._outcome
        for c in conditions:
            on_line(lines.BEGIN + json.dumps(c.as_dict()))
            row = Row.measured(c, [[0.1]] * c.world, options=options.recorded(c),
                               effective=self._effective)  # fmt: skip
            results.append(options.results, row)
        return Outcome(0, 0.1)


def make(tmp_path, found, runner, options: dict | None = None, **changes) -> sweep.Sweep:
    made = Options(result_dir=str(tmp_path / "results"), **(options or {}))
    return sweep.Sweep(list(found), made, Place(1, 2), tmp_path / "logs", runner=runner, **changes)


def rows_of(tmp_path) -> list[Row]:
    folder = tmp_path / "results"
    return Results.load(folder).rows if folder.is_dir() else []


# ---- other options


@pytest.mark.parametrize("name", MEASURED)
def test_a_row_of_other_options_is_not_taken(name, tmp_path, capsys):
    make(tmp_path, [OURS], Fake()).run()
    changed, again = Fake(), Fake()
    other = {name: OTHERS[name]}
    make(tmp_path, [OURS], changed, other).run()
    assert changed.ran == [OURS]
    said = capsys.readouterr().out
    was, now = json.dumps(rows_of(tmp_path)[0].options[name]), json.dumps(OTHERS[name])
    assert f"measured anew, as its row has {name} {was}, now {now}" in said
    for options in (other, {}):  # both rows are there now
        make(tmp_path, [OURS], again, options).run(quiet=True)
    assert again.ran == []


def test_options_that_change_no_measurement_do_not_count(tmp_path):
    make(tmp_path, [tiny()], Fake(), {"eval": True, "profile": True}).run(quiet=True)
    again = Fake()
    for options in ({"engine": ENGINE}, {"print_interval": 5}, {"timeout": 9.0},
                    {"profile_dir": "x"}, {"save_weights": True}, {"eval": True}):  # fmt: skip
        # An engine's configuration is none of FSDP's; what was traced and evaluated too is as good.
        make(tmp_path, [tiny(), OURS] if "engine" in options else [tiny()], again, options).run(
            quiet=True
        )
    assert again.ran == [OURS]


def test_rows_of_older_versions_are_taken_as_before(tmp_path):
    row = json.loads(Row.measured(tiny(), [[0.1]] * 2).to_json())
    for field in ("options", "compile_reused"):
        del row[field]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / results.ROWS).write_text(json.dumps(row) + "\n")
    (read,) = rows_of(tmp_path)
    assert read.options is None and read.compile_reused is None
    runner = Fake()
    make(tmp_path, [tiny()], runner, {"max_grad_norm": 0.0}).run(quiet=True)
    assert runner.ran == []


def test_a_folder_with_lines_of_deepspeeds_runner(tmp_path):
    """Its result.txt beside our rows takes none of them for another's."""
    line = (
        "20250301120102 org/Model ds=True np=32 batch_size=1 seq=512 zero_stage=3 acc=1 ac=True "
        "compile=False backend=inductor deepcompile=False passes=None compile_time=0.0 "
        "iteration time: 2.0480 alloc_mem: 1 peak_mem: 2\n"
    )
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / results.LINES).write_text(line)
    found, runner = [tiny(), tiny(seq_length=32)], Fake()
    assert make(tmp_path, found, runner).run(quiet=True) == 0
    assert [(r.condition.world, r.ok) for r in rows_of(tmp_path)] == [(32, True), *[(2, True)] * 2]
    assert runner.ran == found


def test_rows_of_another_device_are_named(tmp_path, capsys):
    make(tmp_path, [tiny()], Fake()).run(quiet=True)
    elsewhere = {"device": "NVIDIA H100 80GB HBM3"}
    results.append(tmp_path / "results", Row.measured(OURS, [[0.1]] * 2, machine=elsewhere))
    again = Fake()
    make(tmp_path, [tiny(), OURS], again).run()
    out = " ".join(capsys.readouterr().out.split())
    assert again.ran == [] and "2 conditions are measured already" in out
    assert "1 of them on another device (NVIDIA H100 80GB HBM3): --force measures" in out


def test_rows_of_another_sweep_in_the_same_folder_are_not_counted(tmp_path):
    runner = Fake()

    def beside(place, arguments, log, timeout, on_line, watch) -> Outcome:
        other = Row.measured(tiny(seq_length=999), [[0.1]] * 2)
        results.append(str(tmp_path / "results"), other)
        return runner(place, arguments, log, timeout, on_line, watch)

    swept = make(tmp_path, [tiny()], beside)
    assert swept.run(quiet=True) == 0 and swept.counts["measured"] == 1


def test_options_that_cannot_be_are_errors_before_anything_is_written(tmp_path):
    runner = Fake()
    for found, options, said in (
        ([tiny(), OURS], {"warmup_step": 3}, "Give --warmup_step 4 or more"),
        ([tiny()], {"engine": ENGINE}, "--engine_config: none of these frameworks"),
    ):
        with pytest.raises(UserError, match=said):
            make(tmp_path, found, runner, options).run(quiet=True)
    assert runner.ran == [] and rows_of(tmp_path) == []


# ---- what failed, and what never ran


def test_what_failed_before_is_not_called_measured(tmp_path, capsys):
    said = {"rank": 0, "type": "RuntimeError", "error": "boom"}
    found = [tiny(), tiny(seq_length=32)]
    make(tmp_path, found[:1], Fake(Outcome(1, 0.1, errors=[said]))).run(quiet=True)
    make(tmp_path, found, Fake()).run(quiet=True)
    make(tmp_path, found, Fake()).run()
    out = " ".join(capsys.readouterr().out.split())
    assert "1 conditions are measured already" in out
    name = "llama-tiny-1L FSDP np2 bs1 seq16 acc1"
    assert f"{name}: failed before (failed), and not tried again without --retry" in out


def test_a_hostfile_that_is_wrong_ends_the_sweep_without_rows(tmp_path, monkeypatch, capsys):
    hosts = tmp_path / "hosts"
    hosts.write_text("node-0 slots=2\nnode-1 slots=two\n")
    for name in ("MODEL", "SLURM", "LAUNCH_ARGS", "PROFILE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("NUM_NODES", "2"), ("NGPUS_PER_NODE", "2"), ("HOSTFILE", str(hosts))):
        monkeypatch.setenv(name, value)
    assert sweep.main(["tiny", "--result_dir", str(tmp_path / "results")]) == 2
    assert f"{hosts}:2: slots=two is not a positive number" in capsys.readouterr().err
    assert rows_of(tmp_path) == []


def test_a_launcher_that_starts_nothing_ends_the_sweep_without_rows(tmp_path):
    tail = ["deepcompile: error: [launch] node-1: ssh cannot reach it. Try ssh node-1.\n"]
    runner = Fake(Outcome(2, 0.1, tail=tail))
    with pytest.raises(UserError, match=r"^\[launch\] node-1: ssh cannot reach it"):
        make(tmp_path, [tiny(), OURS], runner).run(quiet=True)
    assert runner.ran == [tiny()] and rows_of(tmp_path) == []
    assert make(tmp_path, [tiny()], Fake()).run(quiet=True) == 0


def test_ranks_that_never_came_up_are_tried_again(tmp_path):
    failing = Fake(Outcome(1, 0.1, tail=["ImportError: libx.so\n"]))
    assert make(tmp_path, [tiny()], failing).run(quiet=True) == 1
    (row,) = rows_of(tmp_path)
    assert row.failure == "did not start" and "exit code 1: ImportError: libx.so" in row.error
    again = Fake()
    assert make(tmp_path, [tiny()], again).run(quiet=True) == 0 and again.ran == [tiny()]


def test_what_cannot_run_here_is_recorded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda *_: None)
    for force in (False, False, True):
        make(tmp_path, [tiny("zero3")], Fake(), force=force).run(quiet=True)
    assert [row.failure for row in rows_of(tmp_path)] == ["not installed"]


# ---- what hangs

DEAF = """
import json, sys, time
conditions, rows, folder = json.loads(sys.argv[1])
for condition, row in zip(conditions, rows):
    print("[node-0] [bench] begin " + json.dumps(condition), flush=True)
    with open(folder + "/rows.jsonl", "a") as file:
        file.write(row + "\\n")
    time.sleep(600 if condition["seq_length"] == 16 else 0)
"""
"""Hangs behind its row."""
HANGS = """
import json, sys, time
conditions, rows, folder = json.loads(sys.argv[1])
for condition, row in zip(conditions, rows):
    print("[bench] begin " + json.dumps(condition), flush=True)
    time.sleep(600 if condition["seq_length"] == 32 else 0)
    with open(folder + "/rows.jsonl", "a") as file:
        file.write(row + "\\n")
"""


def script(tmp_path, monkeypatch, text: str) -> None:
    """Instead of torchrun."""
    monkeypatch.setattr(process, "WATCH_S", 0.1)
    (tmp_path / "results").mkdir()

    def command(place, given):
        conditions, options = worker.parse(given)
        rows = [Row.measured(c, [[0.1]] * c.world).to_json() for c in conditions]
        job = [[c.as_dict() for c in conditions], rows, options.results]
        return [sys.executable, "-c", text, json.dumps(job)]

    monkeypatch.setattr(process, "command", command)


def test_one_condition_that_hangs_is_ended_alone(tmp_path, monkeypatch):
    """In a process group of three the limit is still that of one."""
    script(tmp_path, monkeypatch, HANGS)
    found = [tiny(seq_length=n) for n in (16, 32, 64)]
    swept = make(tmp_path, found, process.run, timeout=2.0, share_process=True)
    assert suites.groups(found, True) == [found]
    assert swept.run(quiet=True) == 1
    rows = rows_of(tmp_path)
    lengths = {row.condition.seq_length: row for row in rows}
    assert len(rows) == 3 and lengths[16].ok and lengths[64].ok
    assert lengths[32].failure == "timeout" and "--condition-limit 2" in lengths[32].error


def test_one_that_hangs_behind_its_row_takes_no_other_with_it(tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, DEAF)
    found = [tiny(seq_length=n) for n in (16, 32)]
    swept = make(tmp_path, found, process.run, timeout=2.0, share_process=True)
    assert swept.run(quiet=True) == 0
    assert [(r.condition, r.ok) for r in rows_of(tmp_path)] == [(c, True) for c in found]


# ---- a data set out of reach


def test_the_next_process_groups_know_that_a_data_set_is_out_of_reach(tmp_path):
    runner = Fake(effective={"data_problem": "ConnectionError: no network"})
    found = [tiny(), tiny(seq_length=32)]
    make(tmp_path, found, runner, {"dataset_name": "a/b"}).run(quiet=True)
    problems = [options.dataset_problem for options in runner.options]
    assert problems == ["", "ConnectionError: no network"]
    again = Fake()
    make(tmp_path, found, again, {"dataset_name": "a/b"}).run(quiet=True)
    assert again.ran == []  # it is no other option


def test_a_condition_whose_offload_would_do_nothing_is_skipped_by_name(tmp_path, capsys):
    found = [
        tiny("ddp", offload_adam=True, zero_stage=0),
        dataclasses.replace(OURS, offload_adam=True),
    ]
    runner = Fake()
    make(tmp_path, found, runner).run()
    out = " ".join(capsys.readouterr().out.split())
    assert runner.ran == [] and "ddp keeps all on the device" in out
    assert "what its memory budget asks" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_what_needs_gpus_is_tried_again_where_there_are_some(tmp_path, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda *_: object())
    found = [tiny("ds_deepcompile", compile=True)]
    make(tmp_path, found, Fake()).run(quiet=True)
    (row,) = rows_of(tmp_path)
    assert row.failure == "cannot run here" and "needs GPUs" in row.error
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    runner = Fake()
    monkeypatch.setattr(peers, "why_not", lambda c: None)
    make(tmp_path, found, runner).run(quiet=True)
    assert runner.ran == found
