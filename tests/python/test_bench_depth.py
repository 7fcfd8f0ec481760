# SPDX-License-Identifier: Apache-2.0
"""The largest depth: which depths are tried, what failures mean, going on, and a real search."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from deepcompile import budget, cli
from deepcompile.bench import depth, depth_table, process, results, suites, sweep, worker
from deepcompile.bench.conditions import Condition
from deepcompile.bench.options import Options
from deepcompile.bench.process import Outcome, Place
from deepcompile.bench.results import Results, Row
from deepcompile.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB"
OTHER = "region r3: kernel is not known"
BASE = Condition("llama-tiny", "fsdp", num_layers=1, seq_length=16, world=2, dtype="fp32")
OURS = dataclasses.replace(BASE, framework="deepcompile", compile=True)
HOST = {"host_peak_bytes_of_ranks": [1 << 30, 2 << 30], "host_bytes_in_use": 5 << 30}


class Fake:
    """Stands for process.run: `room` layers train, more do not."""

    def __init__(self, room: int, errors: dict[int, str] | None = None, seconds: float = 0.0):
        self.ran: list[int] = []
        self._room, self._errors, self._seconds = room, errors or {}, seconds

    def __call__(self, place, arguments, log, timeout, on_line, watch=None) -> Outcome:
        (condition,), options = worker.parse(arguments)
        layers = condition.num_layers
        self.ran.append(layers)
        if self._seconds > timeout:
            time.sleep(timeout)
            return Outcome(-15, timeout, timed_out=True)
        time.sleep(self._seconds)
        error = self._errors.get(layers, OOM if layers > self._room else None)
        if error is not None:
            return Outcome(1, 0.1, errors=[{"rank": 0, "type": "Error", "error": error}])
        row = Row.measured(
            condition, [[0.1 * layers]] * 2, peak_bytes=layers << 30, effective=dict(HOST)
        )
        results.append(options.results, row)
        return Outcome(0, 0.1)


def make(folder, runner, bases=(BASE,), start=1, most=1 << 16, limit=1e9, **changes) -> depth.Depth:
    swept = sweep.Sweep(
        [], Options(result_dir=str(folder)), Place(1, 2), folder / "logs",
        deadline=time.monotonic() + limit, runner=runner,
    )  # fmt: skip
    return depth.Depth([depth.Search(b, start, most, **changes) for b in bases], swept)


def rows_of(folder) -> Results:
    return Results.load(folder)


# ---- which depths are tried


def trials(room: int, start: int, most: int = 1 << 16, resolution: int = 1) -> list[int]:
    tried: dict[int, bool] = {}
    while (layers := depth.next_depth(tried, start, most, resolution)) is not None:
        assert 1 <= layers <= most and layers not in tried
        tried[layers] = layers <= room
    return list(tried)


def test_steps_double_then_gaps_are_halved():
    assert trials(21, 1) == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21]
    assert trials(21, 18) == [18, 20, 24, 22, 21]
    assert trials(11, 18) == [18, 16, 12, 4, 8, 10, 11]
    assert trials(0, 4) == [4, 3, 1]
    assert trials(9, 1, most=3) == [1, 2, 3]
    assert trials(9, 40, most=3) == [3]
    assert trials(21, 16, resolution=4) == [16, 18, 22]


def test_the_largest_is_found():
    for room, start in itertools.product(range(40), (1, 7, 30)):
        tried = trials(room, start)
        fits, too_deep = [n for n in tried if n <= room], [n for n in tried if n > room]
        assert max(fits, default=0) == room and min(too_deep) == room + 1
        assert len(tried) <= 12


def test_depths_that_do_not_agree():
    """14 trains though 12 did not: what is above the largest decides."""
    assert depth.bracket({12: False, 14: True, 20: False}) == (14, 20)
    assert depth.next_depth({12: False, 14: True, 16: False}, 1, 99) == 15


def test_how_many_are_left():
    assert depth.trials_left({}, 1, 3) == 2
    assert depth.trials_left({16: True}, 16, 99) == 3
    assert depth.trials_left({16: True, 32: False}, 16, 99) == 4
    assert depth.trials_left({16: True, 17: False}, 16, 99) == 0


def test_the_first_depth_is_where_memory_ends(monkeypatch):
    """2 x 140 GiB beside 256 GiB: 16 bytes a parameter, of 0.86 billion a layer and 2.1 beside."""
    device = types.SimpleNamespace(total_memory=140 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setattr(budget, "host_memory", lambda: (256 << 30, 200 << 30))
    big = dataclasses.replace(BASE, model="llama-3-70b")
    kinds = [big, dataclasses.replace(big, offload_params=True),
             dataclasses.replace(big, framework="deepcompile"),
             dataclasses.replace(big, framework="deepcompile", passes=("prefetch",))]  # fmt: skip
    assert [depth.start_depth(c, Place(1, 2)) for c in kinds] == [16, 12, 31, 16]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert depth.start_depth(big, Place(1, 2)) == 1


# ---- a search


def test_a_search_and_its_table(tmp_path, capsys):
    assert make(tmp_path, Fake(5)).run() == 0
    out = capsys.readouterr().out
    assert "FSDP: 5 layers train, 6 have no room" in out
    rows = rows_of(tmp_path)
    assert [r.condition.num_layers for r in rows] == [1, 2, 4, 8, 6, 5]
    assert [r.failure for r in rows] == ["", "", "", "OOM", "OOM", ""]
    line = depth_table.markdown(rows).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["llama-tiny", "16", "FSDP", "5"] and cells[4].endswith(" M")
    assert cells[5:] == ["500.0 (500-500)", "32", "5.0", "3.0", "5.0", "no room"]
    assert not (tmp_path / depth.UNDER_WAY).exists()


def test_trials_that_have_rows_are_not_run_again(tmp_path, capsys):
    first = Fake(21)
    make(tmp_path, first).run(quiet=True)
    again = Fake(21)
    assert make(tmp_path, again).run() == 0
    assert again.ran == [] and "21 layers train, 22 have no room" in capsys.readouterr().out
    other = Fake(3)
    make(tmp_path, other, [dataclasses.replace(BASE, batch_size=2)]).run(quiet=True)
    assert other.ran == [1, 2, 4, 3]


@pytest.mark.parametrize(
    "error",
    [OOM, "killed by signal 9: perhaps the host was out of memory", "std::bad_alloc",
     "[passes] auto: no plan fits the memory budget of 3 GiB",
     "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
     "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"],
)  # fmt: skip
def test_what_says_that_a_depth_is_too_large(error, tmp_path):
    runner = Fake(9, {3: error, 4: error})
    assert make(tmp_path, runner).run(quiet=True) == 0
    assert runner.ran == [1, 2, 4, 3]


def test_any_other_failure_ends_the_search_of_its_framework(tmp_path, capsys):
    runner = Fake(9, {4: OTHER})
    assert make(tmp_path, runner, [BASE, OURS], most=4).run() == 1
    assert runner.ran == [1, 2, 4, 1, 2, 4]
    out = capsys.readouterr().out
    assert "FSDP: stopped at 4 layers: " + OTHER in out and "DeepCompile (auto): stopped" in out
    table = depth_table.markdown(rows_of(tmp_path))
    assert table.count("| 2 | ") == 2 and table.count("at least this many; failed") == 2
    again = Fake(9)
    assert make(tmp_path, again).run() == 1 and again.ran == []
    assert "--retry tries it again" in capsys.readouterr().out
    retried = Fake(9)
    assert make(tmp_path, retried, most=5, retry=True).run() == 0
    assert retried.ran == [4, 5]


def test_an_argument_named_timeout_is_no_timeout(tmp_path):
    row = Row.failed(BASE, "__init__(timeout_s: float = 600.0): wrong arguments")
    assert row.failure == "failed"
    assert Row.failed(BASE, "timeout: stopped after 9 s").failure == "timeout"
    assert Row.failed(BASE, "Watchdog: it timed out").failure == "timeout"


def test_no_layer_and_no_rows(tmp_path, capsys):
    assert make(tmp_path, Fake(0), start=3).run() == 0
    assert "not even 1 layer has room" in capsys.readouterr().out
    assert "| 0 | - |" in depth_table.markdown(rows_of(tmp_path), [BASE])
    with pytest.raises(UserError, match="there are no rows"):
        depth_table.markdown(Results())
    assert "not known" in depth_table.markdown(Results(), [BASE])


def test_the_first_framework_also_at_the_others_depths(tmp_path, capsys):
    make(tmp_path, Fake(5)).run(quiet=True)
    runner = Fake(20)
    assert make(tmp_path, runner, [OURS, BASE]).run(quiet=True) == 0
    assert runner.ran == [1, 2, 4, 8, 16, 32, 24, 20, 22, 21, 5]
    lines = depth_table.markdown(rows_of(tmp_path), [OURS, BASE]).splitlines()[-3:]
    assert [line.split("|")[4].strip() for line in lines] == ["20", "5", "5"]
    assert "DeepCompile" in lines[1] and lines[1].endswith("|  |")


# ---- time and interruptions


def test_the_time_limit_gives_a_lower_bound(tmp_path, capsys):
    runner = Fake(50, seconds=1.0)
    assert make(tmp_path, runner, limit=1.5).run() == sweep.OUT_OF_TIME
    assert "time limit reached" in capsys.readouterr().out
    rows = rows_of(tmp_path)
    assert all(row.ok for row in rows)  # the trial that was cut off is no failure
    assert len(rows.rows) < len(runner.ran)
    assert "at least this many" in depth_table.markdown(rows, [BASE])
    assert not (tmp_path / depth.UNDER_WAY).exists()
    late = Fake(50)
    assert make(tmp_path, late, limit=0).run() == sweep.OUT_OF_TIME and late.ran == []


def test_a_sweep_ends_at_its_time_limit_and_goes_on(tmp_path, capsys):
    found = [dataclasses.replace(BASE, seq_length=n) for n in (16, 32, 64, 128)]
    options = Options(result_dir=str(tmp_path))
    runner = Fake(9, seconds=1.0)
    swept = sweep.Sweep(found, options, Place(1, 2), tmp_path / "logs",
                        deadline=time.monotonic() + 2.5, runner=runner)  # fmt: skip
    assert swept.run() == sweep.OUT_OF_TIME
    assert "time limit reached: 2 conditions left" in capsys.readouterr().out
    assert len(rows_of(tmp_path).rows) == 2 and len(runner.ran) == 3
    again = sweep.Sweep(found, options, Place(1, 2), tmp_path / "logs", runner=Fake(9))
    assert again.run(quiet=True) == 0 and again.counts["kept"] == 2


def test_a_trial_that_took_the_search_down_twice_counts_as_too_deep(tmp_path):
    class Killed(BaseException):
        pass

    def kill(*_, **__):
        raise Killed

    found = make(tmp_path, kill)
    for times in (1, 2):
        said = {"condition": found.searches[0].at(2).as_dict(), "times": times}
        (tmp_path / depth.UNDER_WAY).write_text(json.dumps(said))
        runner = Fake(9)
        make(tmp_path, runner, most=2).run(quiet=True)
        assert runner.ran == ([1, 2] if times == 1 else [1])
        for written in (results.ROWS, results.LINES):
            (tmp_path / written).unlink()
    (tmp_path / depth.UNDER_WAY).write_text("torn")
    assert make(tmp_path, Fake(9), most=1).run(quiet=True) == 0
    with pytest.raises(KeyboardInterrupt):
        found.interrupt()


def test_the_host_is_watched(tmp_path, monkeypatch):
    assert depth.Host(0.0)() is None
    said = depth.Host(1.1)()
    assert said.startswith("out of memory on the host: stopped with ")
    command = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
    monkeypatch.setattr(process, "command", lambda place, given: command)
    monkeypatch.setattr(process, "WATCH_S", 0.1)
    outcome = process.run(Place(), [], tmp_path / "x.log", 60, watch=depth.Host(1.1))
    assert Row.failed(BASE, outcome.error).failure == "OOM" and outcome.seconds < 20


# ---- command lines


def test_command_lines(tmp_path, monkeypatch, capsys):
    found = depth.plan(["--model", "llama-tiny", "--max-layers", "7", "--batch-size", "2",
                        "--result_dir", str(tmp_path)], Place(1, 2))  # fmt: skip
    assert [s.label for s in found.searches] == ["DeepCompile (auto)", "FSDP (C) offload",
                                                 "FSDP (C)"]  # fmt: skip
    assert {(s.start, s.most, s.base.batch_size) for s in found.searches} == {(1, 7, 2)}
    marks = [s.base.activation_checkpointing for s in found.searches]
    assert marks == [False, True, True]  # ours plans what is run again
    options = found.sweep.options
    assert (options.bench_step, options.warmup_step, options.max_grad_norm) == (10, 6, 0)
    with pytest.raises(UserError, match=r"deepcompile\+offload.*memory budget"):
        suites.parse_spec("deepcompile+offload")
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    assert depth.main(["--frameworks", "fsdp9"]) == 2
    assert "framework 'fsdp9': unknown" in capsys.readouterr().err
    assert depth.main(["--table", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_it_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "depth", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for word in ("--time-limit", "--max-layers", "--table", "default: llama-3-70b", "+offload"):
        assert word in said


def test_a_real_search(tmp_path, monkeypatch, capsys):
    """Two ranks over Gloo, to --max-layers; then from its rows alone."""
    script = [sys.executable, str(ROOT / "benchmarks" / "train" / "largest_depth.py")]
    words = "--model llama-tiny --frameworks fsdp --seq-length 16 --max-layers 3 --start 3"
    words = [*words.split(), *"--bench_step 2 --warmup_step 1 --result_dir found".split()]
    package = str(Path(depth.__file__).parents[2])
    for name in ("PROFILE_DIR", "MODEL", "LOG_BASE", "NUM_NODES", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NGPUS_PER_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", package)
    monkeypatch.chdir(tmp_path)
    done = subprocess.run([*script, *words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FSDP: 3 layers train, and --max-layers allows no more" in done.stdout
    assert "| llama-tiny | 16 | FSDP | 3 | 0.6" in done.stdout
    (row,) = Results.load(tmp_path / "found").rows
    assert len(row.effective["host_peak_bytes_of_ranks"]) == 2
    assert row.effective["host_bytes_in_use"] > 0
    assert depth.main(words) == 0 and "[1/" not in capsys.readouterr().out
    assert depth.main(["--table", "found"]) == 0
    assert "at least this many" in capsys.readouterr().out
