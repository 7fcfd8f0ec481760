# SPDX-License-Identifier: Apache-2.0
"""The sweep: what it runs, in which process groups, and that it goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import sys

import pytest

from deepcompile.bench import lines, one, peers, process, results, suites, sweep, table, worker
from deepcompile.bench.conditions import Condition
from deepcompile.bench.display import Display
from deepcompile.bench.options import Options
from deepcompile.bench.process import Outcome, Place
from deepcompile.bench.results import Results, Row
from deepcompile.errors import UserError

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"


def tiny(framework: str = "fsdp", **changes) -> Condition:
    values = {"model": "llama-tiny", "num_layers": 1, "seq_length": 16, "world": 2}
    return Condition(framework=framework, **(values | {"dtype": "fp32"} | changes))


class Fake:
    """Stands for process.run: writes the rows that a worker would, and remembers its jobs."""

    def __init__(self, fail: dict[Condition, str] | None = None, interrupt: int = 0):
        self.jobs: list[list[Condition]] = []
        self.places: list[Place] = []
        self._fail, self._interrupt = fail or {}, interrupt

    def __call__(self, place, arguments, log, timeout, on_line, watch=None) -> Outcome:
        conditions, options = worker.parse(arguments)
        self.jobs.append(conditions)
        self.places.append(place)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("all of it")
        for condition in conditions:
            on_line(lines.BEGIN + json.dumps(condition.as_dict()))
            if self._interrupt and len(self.jobs) >= self._interrupt:
                raise KeyboardInterrupt
            if condition in self._fail:
                said = {"rank": 1, "type": "OutOfMemoryError", "error": self._fail[condition]}
                return Outcome(1, 0.1, errors=[said])
            row = Row.measured(condition, [[0.1, 0.2]] * condition.world, peak_bytes=1 << 30)
            results.append(options.results, row)
        return Outcome(0, 0.1)

    @property
    def ran(self) -> list[Condition]:
        return [condition for job in self.jobs for condition in job]


def make(tmp_path, found, runner, **changes) -> sweep.Sweep:
    options = Options(result_dir=str(tmp_path / "results"))
    return sweep.Sweep(
        list(found), options, Place(1, 2), tmp_path / "logs", runner=runner, **changes
    )


# ---- going on


def test_a_sweep_that_was_interrupted_goes_on_where_it_was(tmp_path, capsys):
    found = [tiny(), tiny("ddp", zero_stage=0), tiny(seq_length=32), tiny(seq_length=64)]
    first = Fake(interrupt=3)
    assert make(tmp_path, found, first).run() == 130
    assert first.ran == found[:3]  # the third was cut off
    assert "interrupted: 2 conditions left; the same command goes on" in capsys.readouterr().out
    second = Fake()
    assert make(tmp_path, found, second).run() == 0
    assert second.ran == found[2:]
    third = Fake()
    assert make(tmp_path, found, third).run() == 0
    assert third.ran == []
    forced = Fake()
    make(tmp_path, found, forced, force=True).run()
    assert forced.ran == found
    assert len(Results.load(tmp_path / "results").rows) == 8


def test_a_failure_is_recorded_and_the_sweep_goes_on(tmp_path, capsys):
    found = [tiny(), tiny(seq_length=32), tiny(seq_length=64)]
    runner = Fake(fail={found[1]: OOM})
    assert make(tmp_path, found, runner).run() == 1
    assert runner.ran == found
    row = Results.load(tmp_path / "results").find(found[1])
    assert row.failure == "OOM" and "(rank 1, OutOfMemoryError)" in row.error
    assert row.versions["torch"] and row.machine["device"]
    out = capsys.readouterr().out
    assert "failed llama-tiny-1L FSDP np2 bs1 seq32 acc1: CUDA out of memory" in out
    assert "2 measured, 1 failed" in out
    again = Fake()
    assert make(tmp_path, found, again).run() == 0 and again.ran == []
    retried = Fake()
    make(tmp_path, found, retried, retry=True).run()
    assert retried.ran == [found[1]]


def test_timeouts_are_tried_again_without_being_asked(tmp_path):
    runner = Fake()
    swept = make(tmp_path, [tiny()], lambda *a, **k: Outcome(-15, 9.0, timed_out=True))
    assert swept.run(quiet=True) == 1
    assert Results.load(tmp_path / "results").rows[0].failure == "timeout"
    assert make(tmp_path, [tiny()], runner).run(quiet=True) == 0 and len(runner.jobs) == 1


def without_deepspeed(monkeypatch) -> None:
    find = peers.importlib.util.find_spec
    there = lambda name, *more: None if name == "deepspeed" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(peers.importlib.util, "find_spec", there)


def test_a_peer_that_is_not_installed_is_skipped_by_name(tmp_path, capsys, monkeypatch):
    without_deepspeed(monkeypatch)
    found = [tiny("zero3"), tiny("ds_deepcompile", compile=True), tiny()]
    runner = Fake()
    assert make(tmp_path, found, runner).run() == 0
    assert runner.ran == [found[2]]
    out = capsys.readouterr().out
    assert "skipped llama-tiny-1L ZeRO3 np2 bs1 seq16 acc1: deepspeed is not installed" in out
    assert "1 measured, 2 skipped" in out
    assert Results.load(tmp_path / "results").find(found[0]).failure == "not installed"


# ---- process groups


def ours(**changes) -> Condition:
    return tiny("deepcompile", compile=True, **changes)


def test_shared_process_groups():
    peers = [tiny(), tiny(seq_length=32), tiny("fsdp_c", compile=True, settings="best")]
    engine = [ours(passes=("prefetch",)), ours(), ours(seq_length=32)]
    alone = [ours(variant="budget=1GiB"), tiny("fsdp_c", compile=True, variant="overlap"),
             tiny("zero3_c", compile=True)]  # fmt: skip
    other = [dataclasses.replace(peers[0], num_layers=2)]
    found = [*engine, *peers, *alone, *other]
    assert suites.groups(found, False) == [[c] for c in found]
    assert suites.groups(found, True) == [[*peers, *engine], other, *([c] for c in alone)]


def test_a_budget_of_another_comes_behind_it():
    bound, peer = ours(variant="budget=fsdp_c"), tiny("fsdp_c", compile=True)
    assert suites.groups([bound, peer, ours()], False) == [[peer], [ours()], [bound]]
    assert suites.groups([bound, peer, ours()], True) == [[peer, ours()], [bound]]


def test_after_a_failure_the_rest_of_its_group_runs(tmp_path):
    found = [tiny(), tiny(seq_length=32), tiny(seq_length=64)]
    runner = Fake(fail={found[1]: OOM})
    assert make(tmp_path, found, runner, share_process=True).run(quiet=True) == 1
    assert runner.jobs == [found, found[2:]]
    logs = [tmp_path / "logs" / sweep.log_name(c) for c in found]
    assert [log.read_text()[:9] for log in logs] == ["all of it", "[bench] b", "all of it"]
    assert [r.ok for r in Results.load(tmp_path / "results").rows] == [True, False, True]


def test_the_time_left_knows_what_is_first_in_a_process():
    """It compiles for the others."""
    shown = Display(6, 0, quiet=True)
    assert shown.left == "time left unknown"
    shown.start_processes(2)
    shown.end("", 100.0)
    assert shown.left == "about 8 min 20 s left"  # nothing is known of the others
    shown.end("", 10.0, first=False)
    assert shown.left == "about 2 min 10 s left"  # 100 + 3 * 10
    shown.start_processes(1)
    assert shown.left == "about 3 min 40 s left"
    alone = Display(3, 0, quiet=True)
    alone.end("", 20.0)
    assert alone.left == "about 40 s left"


def test_one_rank_for_a_single_gpu(tmp_path):
    runner = Fake()
    make(tmp_path, [tiny("single", world=1, zero_stage=0)], runner).run(quiet=True)
    assert runner.places == [Place(1, 1)]


def shell(monkeypatch, script: str) -> None:
    """Instead of torchrun."""
    monkeypatch.setattr(process, "command", lambda place, given: [sys.executable, "-c", script])


def test_output_goes_to_the_log_and_errors_are_read_from_it(tmp_path, monkeypatch):
    said = json.dumps({"rank": 0, "type": "RuntimeError", "error": "connection closed", "time": 1})
    oom = json.dumps({"rank": 1, "type": "OutOfMemoryError", "error": OOM, "time": 2})
    mark = lines.ERROR_MARK
    script = f"print('hello'); print('''{mark}{said}'''); print('[node-1] {mark}{oom}'); exit(3)"
    shell(monkeypatch, script)
    seen: list[str] = []
    outcome = process.run(Place(1, 2), [], tmp_path / "a" / "x.log", 60, seen.append)
    assert outcome.code == 3 and seen[0] == "hello"
    assert (tmp_path / "a" / "x.log").read_text().startswith("hello\n")
    # Out of memory on one rank is why the others lost it.
    assert outcome.error == f"{OOM} (rank 1, OutOfMemoryError)"
    shell(monkeypatch, "print('boom'); exit(7)")
    assert process.run(Place(), [], tmp_path / "y.log").error == "exit code 7: boom"
    shell(monkeypatch, "")
    assert process.run(Place(), [], tmp_path / "y.log").error is None


def test_the_time_limit_ends_a_process_group(tmp_path, monkeypatch):
    shell(monkeypatch, "import time; print('begun', flush=True); time.sleep(600)")
    outcome = process.run(Place(), [], tmp_path / "x.log", 0.5)
    assert outcome.timed_out and outcome.error.startswith("timeout") and outcome.seconds < 20


def test_an_interrupt_leaves_no_process(tmp_path, monkeypatch):
    shell(monkeypatch, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run(Place(), [], tmp_path / "x.log", 60, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


# ---- which conditions


def test_the_seeds_experiments():
    bench = suites.conditions(suites.SUITES["bench"], 32, 4, "bf16")
    specs = [suites.parse_spec(text) for text in suites.SUITES["bench"].frameworks]
    once = sum(spec.length > 0 for spec in specs)
    sizes = 2 * 3 * 3 - 1  # 70B skips batch 4 at 2048
    assert len(bench) == (len(specs) - once) * sizes + once * 2 * 3
    labels = {c.label for c in bench}
    seeds = {"ZeRO3", "ZeRO3 (C)", "FSDP", "FSDP (C)"}
    seeds |= {f"DeepCompile ({passes})" for passes in ("P", "S", "P+S", "auto")}
    assert seeds | {"DS DeepCompile (P+S)"} <= labels
    acc = suites.conditions(suites.SUITES["acc"], 8, 1, "bf16")
    assert {c.accumulation for c in acc} == {2, 4, 8, 16} and {c.seq_length for c in acc} == {1024}
    theirs = [c.label for c in acc if c.framework == "ds_deepcompile" and c.accumulation == 2]
    named = [f"DS DeepCompile ({passes})" for passes in ("P", "S", "P+S")]
    assert theirs == 2 * [*named, "DS DeepCompile (P+S) best"]
    for name, keys in (("bench", ("fsdp_c", "zero3_c", "ds_deepcompile")),
                       ("acc", ("fsdp_c", "zero3_c", "ds_deepcompile")),
                       ("cut", ("fsdp_c", "ds_deepcompile")),
                       ("z1", ("ddp_c", "zero1_c"))):  # fmt: skip
        found = suites.conditions(suites.SUITES[name], 4, 1, "bf16")
        best = {c.framework for c in found if c.settings == "best"}
        assert best == {*keys}, name
    for name in ("bench", "cut"):
        found = suites.conditions(suites.SUITES[name], 4, 1, "bf16")
        variants = {(c.framework, c.variant, c.seq_length) for c in found if c.variant}
        assert variants == {("fsdp_c", name, 1024) for name in ("overlap", "copy_engine")}
    cut = {c.label for c in found}
    assert {*named, "DS DeepCompile (P+S) best"} <= cut
    offload = suites.conditions(suites.SUITES["offload"], 8, 1, "bf16")
    eager = [c for c in offload if c.backend == "eager"]
    assert [(c.framework, c.passes) for c in eager] == [
        ("ds_deepcompile", ("offload_adam_states_sync",))
    ]
    for condition in suites.conditions(suites.SUITES["z1"], 8, 1, "bf16"):
        assert condition.zero_stage == (0 if condition.framework.startswith("ddp") else 1)
    table = suites.conditions(suites.SUITES["w3"], 4, 1, "bf16")
    marks = {c.label: c.activation_checkpointing for c in table}
    assert marks == {"FSDP (C)": True, "FSDP (C) best": False, "DeepCompile (auto)": False}
    for name, suite in suites.SUITES.items():
        found = suites.conditions(suite, 4, 1, "bf16")
        assert found and len({sweep.log_name(c) for c in found}) == len(found), name


def test_frameworks_as_they_are_written():
    spec = suites.parse_spec("deepcompile:prefetch+selective_gather/budget=20GiB")
    assert spec == suites.Spec(
        "deepcompile", ("prefetch", "selective_gather"), "default", "budget=20GiB"
    )
    assert suites.parse_spec("fsdp+offload").offload
    spec = suites.parse_spec("fsdp_c@best/overlap~1024")
    assert spec == suites.Spec("fsdp_c", (), "best", "overlap", length=1024)
    wrong = "fsdp~ fsdp~long fsdp~0 fsdp3 fsdp@worst fsdp+x fsdp:prefetch deepcompile:prefech"
    for text in wrong.split():
        with pytest.raises(UserError, match="bench"):
            suites.parse_spec(text)


def test_depth_by_memory():
    gib = 1 << 30
    assert suites.fitted_depth("llama-3-70b", 16, 4, 140 * gib) == 16
    assert 4 < suites.fitted_depth("llama-3-70b", 16, 2, 140 * gib) < 16
    with pytest.raises(UserError, match="not even one layer"):
        suites.fitted_depth("llama-3-70b", 16, 1, 8 * gib)


PLACE = Place(1, 2)


def test_command_lines(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("MODEL", raising=False)
    (swept,) = sweep.plan(["tiny", "--seq-lengths", "32", "--frameworks", "fsdp,ddp",
                           "--bench_step", "9", "--backend", "inductor",
                           "--result_dir", str(tmp_path)], PLACE)  # fmt: skip
    assert [c.label for c in swept.conditions] == ["FSDP", "DDP"] and swept.share_process
    assert (swept.options.bench_step, swept.options.warmup_step) == (9, 5)
    assert {c.backend for c in swept.conditions} == {"inductor"}
    (swept,) = sweep.plan(["bench", "--num-layers", "2", "--model", "m/x", "--force"], PLACE)
    assert {(c.model, c.num_layers) for c in swept.conditions} == {("m/x", 2)} and swept.force
    monkeypatch.setenv("MODEL", "llama-tiny")
    (swept,) = sweep.plan(["z1"], PLACE)
    assert {c.model for c in swept.conditions} == {"llama-tiny"}
    assert sweep.plan(["tiny", "--list"], PLACE) == []
    assert "llama-tiny-2L FSDP np2 bs2 seq64 acc1" in capsys.readouterr().out
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    assert sweep.main(["tiny", "--frameworks", "fsdp9"]) == 2
    assert "framework 'fsdp9': unknown" in capsys.readouterr().err


def test_once():
    (swept,) = sweep.plan(["w1", "tiny", "--once", "llama-tiny-2L FSDP seq64"], PLACE)
    assert [suites.name(c) for c in swept.conditions] == ["llama-tiny-2L FSDP np2 bs2 seq64 acc1"]
    (swept,) = sweep.plan(["w3", "--once", "FSDP (C) seq512"], PLACE)
    assert swept.conditions[0].settings == "default"
    for words, count in (("FSDP", "2"), ("FSDP seq9", "no")):
        with pytest.raises(UserError, match=f"names {count} conditions"):
            sweep.plan(["tiny", "--once", words], PLACE)


def test_the_table_of_one_condition_has_its_workloads_name(tmp_path, monkeypatch, capsys):
    """And rows of suites that were measured with other options are all there."""
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    monkeypatch.delenv("MODEL", raising=False)
    monkeypatch.setattr(sweep.beforehand, "host_memory", lambda *_: None)
    words = ["--model", "llama-tiny", "--frameworks", "fsdp_c,deepcompile", "--dtype", "bf16",
             "--result_dir", str(tmp_path / "rows"), "--logs", str(tmp_path / "logs")]  # fmt: skip
    runner = Fake()
    plan = sweep.plan

    def planned(argv, place=None):
        sweeps = plan(argv, place)
        for each in sweeps:
            each.runner = runner
        return sweeps

    monkeypatch.setattr(sweep, "plan", planned)
    once = ["--num-layers", "2", "--once", "llama-tiny-2L FSDP (C) seq512"]
    monkeypatch.setitem(suites.SUITES, "w1", dataclasses.replace(
        suites.SUITES["w1"], seq_lengths=(1024,)))  # fmt: skip
    assert table.main(["w1", "w2", *words, *once]) == 0
    assert [suites.name(c) for c in runner.ran] == ["llama-tiny-2L FSDP (C) np2 bs1 seq512 acc1"]
    out = capsys.readouterr().out
    assert "| W2 | 512 |" in out and "| W1 |" not in out


def test_the_table():
    found = suites.conditions(suites.SUITES["w3"], 2, 1, "bf16")
    times = {"FSDP (C)": 0.3, "FSDP (C) best": 0.2, "DeepCompile (auto)": 0.1}
    rows = Results([Row.measured(c, [[times[c.label]]]) for c in found if c.seq_length == 512])
    first, second, _ = table.table("w3", found, rows)
    assert first[:3] == ["W3", "512", "1"] and first[6:] == ["3.00", "2.00"]
    assert first[5].startswith("100.0 (100-100)")
    assert second[3:7] == ["-", "-", "-", "-"]
    assert table.markdown([first]).count("\n") == 2
    for row in rows:  # another device is no peer's fault
        row.machine = {"device": "A" if row.condition.ours else "B"}
    assert table.table("w3", found, rows)[0][6:] == ["-", "-"]


def test_the_table_of_a_folder(tmp_path, capsys):
    """From rows alone: memory-bound and accumulated ones beside FSDP2 at the same sizes."""
    suite = dataclasses.replace(
        suites.SUITES["w1"], models=(("llama-tiny", 2),), seq_lengths=(1024,), accumulations=(4, 1),
        frameworks=("fsdp_c", "deepcompile/budget=fsdp_c", "deepcompile", "fsdp_c+offload"),
    )  # fmt: skip
    found = suites.conditions(suite, 2, 1, "bf16")
    times = {"FSDP (C)": 0.3, "DeepCompile (auto)": 0.1, "FSDP (C) offload": 0.6}
    facts = {"effective": {"device_bytes_of_ranks": [2 << 30, 3 << 30], "bench_step": 30,
                           "warmup_step": 10}, "machine": {"name": "2 x Chip"}, "commit": "abc",
             "versions": {"torch": "2.11"}, "peak_bytes": 1 << 30}  # fmt: skip
    for c in found:
        seconds = c.accumulation * times.get(c.label, 0.05)
        in_a_row = 0.9 * seconds if c.ours else None
        steps = [[seconds, 1.1 * seconds, seconds]]
        results.append(tmp_path, Row.measured(c, steps, in_a_row=in_a_row, **facts))
    results.append(tmp_path, Row.failed(dataclasses.replace(found[0], seq_length=2048), OOM))
    assert table.main(["--table", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("| llama-tiny-2L")]
    assert len(lines) == 9
    cells = "| 1 | 1024 | 1 | FSDP (C) | 300.0 (300-330) | - | 3,413 | 1.0 | 3.0 | 1.00 | - |"
    assert lines[0] == "| llama-tiny-2L " + cells
    assert lines[1].split("|")[5:7] == [" FSDP (C) offload ", " 600.0 (600-660) "]
    assert "| 1 | DeepCompile (auto) budget=fsdp_c | 50.00 (50.0-55.0) | 45.0 |" in lines[3]
    assert lines[3].endswith("| 6.00 | - |") and "| 4 | DeepCompile (auto) | 400" in lines[6]
    assert lines[8].endswith("| FSDP (C) | OOM | - | - | - | - | - | - |")
    assert "9 conditions; 2 x Chip; torch 2.11; commit abc; 20 steps after 10." in said
    results.append(tmp_path / "lines", Row.measured(found[0], [[0.3, 0.4]]))
    (tmp_path / "lines" / results.ROWS).unlink()  # a line has a mean, and no spread
    assert table.main(["--table", str(tmp_path / "lines")]) == 0
    assert "| FSDP (C) | 350.0 | 11,703 |" in capsys.readouterr().out
    assert table.main(["--table"]) == 2 and "needs a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert table.main(["--table", str(tmp_path / "empty")]) == 2


def test_the_sweep_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        sweep.main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in (*suites.SUITES, "fsdp_c@best", "--share-process", "--max_grad_norm", "HOSTFILE"):
        assert word in said


def test_one_condition_refuses_what_it_cannot_run(monkeypatch, capsys):
    without_deepspeed(monkeypatch)
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    assert one.main(["--backend", "deepspeed"]) == 2
    assert "deepspeed is not installed" in capsys.readouterr().err
    assert one.main(["--backend", "singlegpu"]) == 2
    assert "takes one rank, not 2" in capsys.readouterr().err


def test_one_condition_says_what_the_launcher_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    tail = ["deepcompile: error: [launch] node-1: cannot be reached over ssh: no route.\n"]
    monkeypatch.setattr(process, "run", lambda *_, **__: Outcome(2, 0.1, tail=tail))
    assert one.main(["--backend", "fsdp", "--model", "llama-tiny"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("deepcompile: error: [launch] node-1: cannot be reached over ssh: no")
    assert "(log: logs/debug_n0_llama-tiny_fsdp" in said
