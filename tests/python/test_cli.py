# SPDX-License-Identifier: Apache-2.0
"""The command line, as a user runs it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from deepcompile import cli
from deepcompile.cli.explain import Choice
from deepcompile.report.other_choices import cost_text

PROGRAM = """\
step train world=2
param a f32 128
param w f32 64 whole
value x 64B
value loss 4B
value t.loss 4B
value ga 512B grad=a
value gw 256B grad=w
region f time=100us (x, a, w) -> (loss)
region b flops=100000 moved=2KiB (t.loss, x, a, w) -> (ga, gw)
forward 0 (x) -> (loss)
  run f
end
backward 0 (t.loss) -> ()
  run b
end
update
end
"""


def deepcompile(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deepcompile.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )


def deepcompile_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process: torch is here already. Not for several lengths of ``plan``,
    which fork: autograd, once used in a process, does not survive that."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = cli.main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def expect_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line on stderr, nothing on stdout, exit code 2."""
    assert result.returncode == 2, result
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("deepcompile: error: "), result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "captured.txt"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def plan(tmp_path: Path, program: Path) -> Path:
    path = tmp_path / "plan.txt"
    result = deepcompile("opt", str(program), "--passes", "zero3_compile", "-o", str(path))
    assert result.returncode == 0, result.stderr
    return path


def test_opt_prints_the_program_and_logs_the_passes(program: Path, plan: Path):
    result = deepcompile("opt", str(program), "--passes", "zero3_compile")
    assert result.returncode == 0
    assert result.stdout == plan.read_text()
    assert "  gather a\n  wait a\n  run f\n  release a\n" in result.stdout
    assert "zero3_compile" in result.stderr and "instructions" in result.stderr
    assert (
        deepcompile("opt", "-", "--passes", "zero3_compile", stdin=PROGRAM).stdout == result.stdout
    )


def test_sim_prints_a_table_or_json_and_writes_a_trace(plan: Path, tmp_path: Path):
    trace = tmp_path / "trace.json"
    table = deepcompile("sim", str(plan), "--machine", "2x-cpu", "--trace", str(trace))
    assert table.returncode == 0, table.stderr
    assert "step time" in table.stdout and "peak memory" in table.stdout
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"run f", "gather a"} <= {event["name"] for event in events}
    facts = json.loads(deepcompile("sim", str(plan), "--machine", "2x-cpu", "--json").stdout)
    assert facts["ranks"] == 2 and facts["fits"] is True
    assert facts["memory_budget"] == facts["memory_bytes"]
    assert facts["step_ns"] > facts["compute_busy_ns"] > 100_000


def test_a_simulated_step_has_to_fit_its_budget():
    from deepcompile import _core
    from deepcompile.cli.output import as_table, summary

    program, machine = _core.StepProgram.parse(PROGRAM), _core.Machine.builtin("2x-cpu")
    sim = _core.simulate(program, machine)
    assert summary(program, machine, sim, sim.peak_bytes)["fits"]
    facts = summary(program, machine, sim, sim.peak_bytes - 1)
    assert not facts["fits"] and facts["memory_bytes"] == machine.memory_bytes
    assert f"of {_core.pretty_bytes(sim.peak_bytes - 1)}: DOES NOT FIT" in as_table(facts)


def test_passes_can_run_before_a_simulation(program: Path, plan: Path):
    machine = ("--machine", "4xh200", "--json")
    planned = deepcompile("sim", str(plan), *machine)
    passes = deepcompile("sim", str(program), *machine, "--passes", "zero3_compile")
    assert passes.stdout == planned.stdout != ""


TWO_LAYERS = """\
step two world=2
param a f32 131072
param b f32 131072
value x 64B
value h 64B
value loss 4B
value t.loss 4B
value d 64B
value ga 512KiB grad=a
value gb 512KiB grad=b
region f.a time=10ms (x, a) -> (h)
region f.b time=10ms (h, b) -> (loss)
region b.b time=20ms (t.loss, h, b) -> (d, gb)
region b.a time=20ms (d, x, a) -> (ga)
forward 0 (x) -> (loss)
  run f.a
  run f.b
end
backward 0 (t.loss) -> ()
  run b.b
  run b.a
end
update
end
"""
PLANNED = ("--passes", "zero3_compile,prefetch,selective_gather", "--machine", "2x-cpu")


def test_opt_prefetches_for_a_machine_and_a_budget():
    result = deepcompile(
        *("opt", "-", "--passes", "zero3_compile,prefetch", "--machine", "2x-cpu"),
        *("--memory-budget", "1GiB"),
        stdin=TWO_LAYERS,
    )
    assert result.returncode == 0, result.stderr
    assert "forward 0 (x) -> (loss)\n  gather a\n  gather b\n  wait a\n  run f.a\n" in result.stdout
    assert 'because prefetch b "forward 0: gathered ahead of 1 run: 512 KiB' in result.stdout
    assert "2 prefetch:" in result.stderr


def test_a_budget_may_be_a_fraction_of_the_machines_memory():
    from deepcompile import _core

    half = str(_core.Machine.builtin("2x-cpu").memory_bytes // 2)
    by = [
        deepcompile("opt", "-", *PLANNED, "--memory-budget", budget, stdin=TWO_LAYERS).stdout
        for budget in ("0.5", half)
    ]
    assert by[0] == by[1] != ""


def test_updates_in_the_backward_have_to_be_asked_for():
    words = ("opt", "-", "--passes", "zero3_compile,place_optimizer", "--machine", "2x-cpu")
    for more in ((), ("--early-updates",)):
        result = deepcompile(*words, *more, stdin=TWO_LAYERS)
        assert result.returncode == 0, result.stderr
        (tried,) = re.findall(r'because place_optimizer "updates: (.*)"', result.stdout)
        assert "next_forward 1 run ahead" in tried
        assert (", backward " in tried) == bool(more)


def test_opt_keeps_parameters_whole_up_to_the_budget():
    roomy = deepcompile("opt", "-", *PLANNED, "--memory-budget", "1GiB", stdin=TWO_LAYERS)
    assert roomy.returncode == 0, roomy.stderr
    assert "release" not in roomy.stdout[: roomy.stdout.index("backward 0")].split("forward 0")[1]
    assert 'because selective_gather a "kept whole from forward 0 to backward 0' in roomy.stdout
    # Without a budget, the machine's memory is the budget.
    assert "of 1.00 GiB" in roomy.stdout
    assert "of 1.00 GiB" not in deepcompile("opt", "-", *PLANNED, stdin=TWO_LAYERS).stdout
    expect_error(
        deepcompile("opt", "-", *PLANNED, "--memory-budget", "1MiB", stdin=TWO_LAYERS),
        *("prefetch: the program needs", "the memory budget is 1.00 MiB"),
    )


def test_passes_for_a_machine_make_a_simulated_step_faster():
    def step(passes: str) -> int:
        result = deepcompile(
            *("sim", "-", "--machine", "2x-cpu", "--json", "--passes", passes), stdin=TWO_LAYERS
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["step_ns"]

    plain, early = step("zero3_compile"), step("zero3_compile,prefetch")
    assert step("zero3_compile,prefetch,selective_gather") < early < plain


def test_explain_gives_reasons(plan: Path):
    result = deepcompile("explain", str(plan), "--machine", "4xh200")
    assert result.returncode == 0, result.stderr
    assert "param a: f32, 512 B, sharded" in result.stdout
    assert "why: kept sharded" in result.stdout
    assert "region f: code 0, makes 4 B, 100 us" in result.stdout
    assert "kept whole instead: " in result.stdout
    assert "  why: as captured: a plan has no other choice for it" in result.stdout
    every = deepcompile("explain", str(plan), "--machine", "4xh200", "--all")
    assert "param a: f32, 128 elements" in every.stdout and "gather #0" in every.stdout
    assert "region f: code 0, makes 4 B, 100 us" in every.stdout


def test_explain_begins_with_the_whole_step():
    passes = ("--passes", "auto", "--machine", "2x-cpu")
    lines = deepcompile("explain", "-", *passes, stdin=TWO_LAYERS).stdout.splitlines()
    assert lines[0].startswith("step two") and lines[1].startswith("predicted: ")
    assert lines[2:4] == ["", "the step as a whole"]
    assert lines[4].startswith("  why: step ") and lines[4].endswith("[auto]")
    assert any(line.startswith("  else: updates in ") for line in lines[4:14])
    every = deepcompile("explain", "-", *passes, "--all", stdin=TWO_LAYERS).stdout
    assert every.splitlines()[:5] == lines[:5]


def test_differences_that_mean_nothing_have_no_number():
    assert cost_text(-1, -12 << 20) == "no change in time, -12.0 MiB"
    assert cost_text(0, 0) == cost_text(999, 0) == "no change"
    assert cost_text(1000, 0, fits=False) == "+1.00 us, above the budget"
    assert cost_text(-1_800_000, 96 << 20) == "-1.80 ms, +96.0 MiB"
    passes = ("--passes", "auto", "--machine", "2x-cpu")
    for more in ((), ("--all",)):
        text = deepcompile("explain", "-", *passes, *more, stdin=TWO_LAYERS).stdout
        assert "instead: " in text and not re.search(r"instead: [+-]\d+ ns|[+-]0 B", text)


def test_parameters_gathered_ahead_of_more_runs_share_a_line():
    form, reason = "f32, 64 B, sharded", "forward 0: gathered ahead of {}: 64 B [prefetch]"
    one = Choice("param", "l.0.w", form, [reason.format("1 run")])
    two = Choice("param", "l.1.w", form, [reason.format("2 runs")])
    assert one.key() == two.key()


def test_a_program_without_a_plan_says_so(program: Path, plan: Path, tmp_path: Path):
    note = "no plan: no gathers or updates yet; give --passes zero3_compile or auto"
    machine = ("--machine", "2x-cpu")
    for command in ("sim", "explain"):
        assert note in deepcompile(command, str(program), *machine).stdout.splitlines()[0]
        assert note not in deepcompile(command, str(plan), *machine).stdout
        planned = deepcompile(command, str(program), *machine, "--passes", "auto")
        assert planned.returncode == 0 and note not in planned.stdout
    facts = json.loads(deepcompile("sim", str(program), *machine, "--json").stdout)
    assert facts["note"] == note
    assert " instead: " not in deepcompile("explain", str(program), *machine).stdout
    page = tmp_path / "report.html"
    deepcompile("report", str(program), *machine, "--out", str(page))
    assert note in page.read_text()


@pytest.mark.parametrize("data", [b"<!DOCTYPE html>", b"\x89PNG\r\n\xff", b"step\0", b"{}"])
def test_what_is_no_program_is_one_clear_error(data: bytes, tmp_path: Path):
    path = tmp_path / "report.html"
    path.write_bytes(data)
    for command in ("explain", "sim"):
        result = deepcompile(command, str(path), "--machine", "2x-cpu")
        expect_error(result, str(path), "Give the program's text, as `plan --out`")


def test_report_writes_a_page(plan: Path, tmp_path: Path):
    page = tmp_path / "report.html"
    result = deepcompile("report", str(plan), "--machine", "2x-cpu", "--out", str(page))
    assert result.returncode == 0, result.stderr
    assert "train on 2x-cpu" in page.read_text()
    assert "What the next best would have cost" in page.read_text()


def test_a_truncated_program_is_one_clear_error(tmp_path: Path):
    path = tmp_path / "cut.txt"
    path.write_text(PROGRAM[: PROGRAM.index("  run b")])
    result = deepcompile("opt", str(path), "--passes", "zero3_compile")
    expect_error(result, f"{path}:14:")


def test_a_negative_bandwidth_is_one_clear_error(plan: Path, tmp_path: Path):
    import deepcompile as package

    text = (Path(package.__file__).parent / "machines" / "2x-cpu.json").read_text()
    machine = json.loads(text)
    machine["links"]["intra"]["gather_bandwidth"] = -1e9
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine))
    result = deepcompile("sim", str(plan), "--machine", str(path))
    expect_error(result, str(path), "links.intra.gather_bandwidth", "-1000000000.0")
    machine["links"]["intra"]["gather_bandwidth"] = 1e-300
    path.write_text(json.dumps(machine))
    result = deepcompile("sim", str(plan), "--machine", str(path))
    expect_error(result, "2x-cpu: links.intra.gather_bandwidth: something takes more than a day")
    for cut in (text[:200], ""):
        path.write_text(cut)
        expect_error(deepcompile("sim", str(plan), "--machine", str(path)), "ends too early")


TINY = ["plan", "--model", "llama-tiny", "--machine", "2x-cpu", "--seq", "8"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["sim", "/no/such/file", "--machine", "2x-cpu"], ["/no/such/file", "cannot be read"]),
        (["sim", "-", "--machine", "9xtpu"], ["9xtpu", "2x-cpu"]),
        (["sim", "-", "--machine", "/no/such.json"], ["/no/such.json", "cannot be read"]),
        (["sim", "-"], ["--machine"]),
        (["opt", "-", "--passes", "zero9_compile"], ["zero9_compile", "zero3_compile"]),
        (["sim", "-", "--machine", "2x-cpu", "--costs", "/no/costs"], ["/no/costs", "cannot be"]),
        (["opt", "-", "--passes", "zero3_compile", "--costs", "x"], ["needs a machine"]),
        (["opt", "-", "--passes", "a", "--pass-library", "/no.so"], ["/no.so: cannot be loaded"]),
        (["opt", "-", "--passes", "zero3_compile", "-o", "/no/such/dir/x"], ["cannot be written"]),
        (["opt", "-", "--passes", "prefetch"], ["prefetch: needs gathers_placed"]),
        (["opt", "-", "--passes", "zero3_compile,selective_gather"], ["has no machine"]),
        (["opt", "-", *PLANNED, "--memory-budget", "40 apples"], ["is not a size", "a fraction"]),
        (["opt", "-", *PLANNED, "--memory-budget", "40"], ["40 is 40 bytes: write 40GiB"]),
        (["opt", "-", "--passes", "auto", "--memory-budget", "0.5"], ["Give --machine too"]),
        (["opt", "-", "--passes", "auto"], ["has no machine", "Give it one with --machine."]),
        (["opt", "-", "--passes", "zero3_compile,prefech"], ['did you mean "prefetch"?']),
        (["fly"], ["fly"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--ranks", "x"], ["whole number"]),
        (["sim", __file__, "--machine", __file__], ["test_cli.py"]),
        (["launch"], ["nothing to run"]),
        (["launch", "--nproc-per-node", "2", "no.py"], ["no.py: there is no such script"]),
        (["launch", "--nproc-per-node", "2"], ["[launch] script: is missing"]),
        (["launch", "--standalone", "--nproc-per-node=2"], ["[launch] script: is missing"]),
        (["launch", "--nproc-per-node", "two", __file__], ["[launch] --nproc-per-node two: give"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--ranks", "3"], ["2x-cpu has 2 ranks"]),
        (["plan", "--model", "m", "--machine", "4x8-a100", "--ranks", "12"], ["a multiple of 8"]),
        ([*TINY, "--passes", ""], ["give at least one name"]),
        (["sim", "-", "--machine", "2x-cpu", "--memory-budget", "-1GiB"], ["--option=-1"]),
        (["bench", "nope"], ["invalid choice: 'nope'", "See deepcompile bench --help"]),
        (["bench", "--simulate"], ["required: --machine", "deepcompile bench --simulate --help"]),
        (
            ["bench", "--machine", "4x8-a100"],
            ["--machine: belongs to --simulate", "bench --simulate --machine 4x8-a100`"],
        ),
        (
            ["plan", "--model", "llama-3-7b", "--machine", "2x-cpu"],
            ["llama-3-7b: neither a file nor a built-in", 'did you mean "llama-3-70b"?'],
        ),
        ([*TINY, "--out", "/no/such/x"], ["/no/such/x: cannot be written (No such file"]),
        ([*TINY, "--chart", "/no/such/x.svg"], ["x.svg: cannot be written"]),
        ([*TINY, "--trace", "/tmp"], ["/tmp: cannot be written (Is a directory"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--seq", "0"], ["--seq"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--seq", "8,"], ["neither a file"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--seq", ","], ["at least one"]),
        ([*TINY, "--dtype", "fp16", "--early-updates"], ["--early-updates: a step in fp16"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--dtype", "int8"], ["bf16, fp16, fp32"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--chart", "x.pdf"], ["in .svg or .html"]),
        (["plan", "--model", "m", "--machine", "2x-cpu", "--passes", "x"], ["no such pass"]),
        (
            ["plan", "--model", "m", "--machine", "2x-cpu", "--seq", "8,16", "--out", "x"],
            ["about one plan"],
        ),
    ],
)
def test_errors_are_one_line(arguments: list[str], parts: list[str]):
    result = deepcompile(*arguments, stdin=PROGRAM)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith("deepcompile: error: ")
    for part in parts:
        assert part in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["plan", "explain", "opt", "sim", "report", "launch"])
def test_help_has_examples(command: str):
    result = deepcompile(command, "--help")
    assert result.returncode == 0
    assert f"deepcompile {command} " in result.stdout and "examples:" in result.stdout


HELP = """
import sys
from deepcompile.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("with torch" if "torch" in sys.modules else "without torch", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "words",
    ["--help", "bench --help", "bench --simulate --help", "bench depth --help", "bench nope",
     "plot --help", "plan --help", "launch --help", "sim --help", "timeline --help"],
)  # fmt: skip
def test_help_does_not_wait_for_torch(words: str):
    result = subprocess.run(
        [sys.executable, "-c", HELP, *words.split()], capture_output=True, text=True, timeout=100
    )
    assert result.stderr.endswith("without torch\n"), result.stderr
    assert "usage: deepcompile" in result.stdout or "nope" in words


def test_launch_is_torchrun(tmp_path: Path):
    script = tmp_path / "hello.py"
    script.write_text(
        "import os, sys, pathlib\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])\n"
    )
    result = deepcompile("launch", "--nproc-per-node", "2", str(script), str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
