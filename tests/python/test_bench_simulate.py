# SPDX-License-Identifier: Apache-2.0
"""The sweep by simulation, the peers' schedules, and the published table."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from deepcompile import _core, cli
from deepcompile.bench import simulate
from deepcompile.bench.conditions import Condition
from deepcompile.bench.peer_schedules import FsdpSchedule, Zero3Schedule, layer_of
from deepcompile.bench.results import LINES, ROWS, Results, Row, append
from deepcompile.bench.simulate import SimulatedSweep
from deepcompile.predict import predict

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}
LABELS = [
    "ZeRO3",
    "FSDP (C)",
    "DeepCompile (P)",
    "DeepCompile (S)",
    "DeepCompile (P+S)",
    "DeepCompile (auto)",
    "DeepCompile (auto) best",
]


def step(layers: int = 3) -> _core.StepProgram:
    """Embedding, layers of two parameters, output: compute alone, a region each."""
    names = [f"m.layers.{i}.{w}" for i in range(layers) for w in ("a", "b")]
    names = ["m.embed", *names, "m.head"]
    lines = ["step toy world=2 reduce=f32", ""]
    lines += [f"param {n} f32 4096" for n in names]
    lines += ["value ids 512B", "value t.loss 4B", "value loss 4B"]
    lines += [f"value g.{n} 16KiB grad={n}" for n in names]
    regions: list[tuple[str, list[str]]] = [("embed", ["m.embed"])]
    regions += [(f"l{i}", [f"m.layers.{i}.a", f"m.layers.{i}.b"]) for i in range(layers)]
    regions += [("head", ["m.head"])]
    lines += [f"value h.{name} 4KiB" for name, _ in regions[:-1]]
    lines += [f"value d.{name} 4KiB" for name, _ in regions[1:]]
    previous = "ids"
    for code, (name, params) in enumerate(regions):
        out = "loss" if name == "head" else f"h.{name}"
        inputs = ", ".join([*params, previous])
        lines += [f"region f.{name} code={code} flops=1000000 ({inputs}) -> ({out})"]
        previous = out
    previous = "t.loss"
    for code, (name, params) in enumerate(reversed(regions)):
        grads = [f"g.{p}" for p in params]
        outs = grads if name == "embed" else [f"d.{name}", *grads]
        inputs = ", ".join([*([] if name == "embed" else params), previous])
        lines += [
            f"region b.{name} code={code + 9} flops=2000000 ({inputs}) -> ({', '.join(outs)})"
        ]
        previous = f"d.{name}"
    order = [name for name, _ in regions]
    lines += ["", "forward 0 (ids) -> (loss)", *(f"  run f.{n}" for n in order), "end"]
    lines += ["backward 0 (t.loss) -> ()", *(f"  run b.{n}" for n in reversed(order)), "end"]
    return _core.StepProgram.parse("\n".join([*lines, "update", "end", ""]), "toy")


def planned(schedule) -> list[list[str]]:
    """Forward and backward as 'op operand'."""
    program, machine = step(), _core.Machine.builtin("2x-cpu")
    found = predict(program, [schedule], machine, 1, 1 << 30)
    assert found["note"] == "" and found["fits"]
    return [[f"{i.op} {i.operand}" for i in s.instrs] for s in program.sections[:2]]


def test_layers_are_found_in_names():
    assert layer_of("model.layers.17.mlp.up_proj.weight") == "model.layers.17"
    assert layer_of("transformer.h.3.attn.c_attn.weight") == "transformer.h.3"
    assert layer_of("model.layers.0.experts.3.w1") == "model.layers.0"
    assert layer_of("lm_head.weight") == ""


def test_fsdp_gathers_a_layer_ahead_and_reduces_by_layer():
    forward, backward = planned(FsdpSchedule())
    assert forward[:2] == ["gather m.embed", "gather m.head"]  # the root, whole until the end
    assert "release m.head" not in forward and "release m.embed" not in forward
    at = forward.index("run f.l0")
    assert {"gather m.layers.1.a", "gather m.layers.1.b"} <= set(forward[:at])
    assert "gather m.layers.2.a" not in forward[:at]
    after = forward[at + 1 : forward.index("run f.l1")]
    assert after[:2] == ["release m.layers.0.a", "release m.layers.0.b"]
    at = backward.index("run b.l2")
    assert {"gather m.layers.1.a", "gather m.layers.1.b"} <= set(backward[:at])
    after = backward[at + 1 : backward.index("run b.l1")]
    assert {"reduce m.layers.2.a", "reduce m.layers.2.b"} <= set(after)
    assert not any(word.startswith("accumulate") for word in after)
    later = backward[backward.index("run b.l1") + 1 : backward.index("run b.l0")]
    assert later.index("accumulate m.layers.2.b") < later.index("reduce m.layers.1.a")
    tail = backward[backward.index("run b.embed") :]
    assert {"reduce m.embed", "reduce m.head", "accumulate m.head", "release m.embed"} <= set(tail)


def test_zero3_gathers_parameters_until_the_bucket_is_full():
    forward, _ = planned(Zero3Schedule(bucket=1))
    at = forward.index("wait m.layers.0.a")
    assert forward[at + 1] == "gather m.layers.0.b"
    assert forward[forward.index("wait m.layers.0.b") + 1] == "gather m.layers.1.a"
    assert forward[forward.index("run f.l0") + 1] == "release m.layers.0.a"
    wide, _ = planned(Zero3Schedule(bucket=10_000))  # three parameters of 4096 elements
    assert wide[:5] == ["gather m.embed", "wait m.embed", *(f"gather m.layers.{x}" for x in
                        ("0.a", "0.b", "1.a"))]  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("sweep")
    model = folder / "config.json"
    model.write_text(json.dumps(CONFIG))
    code = cli.main(
        ["bench", "--simulate", "--machine", "2x-cpu", "--models", str(model), "--batch", "2",
         "--seq", "32", "--accumulation", "1,2", "--dtype", "fp32", "--metrics",
         "throughput,mfu,compile_time", "--persistence-threshold", "1000", "--result-dir",
         str(folder)]
    )  # fmt: skip
    assert code == 0
    return folder


def test_a_simulated_sweep_writes_rows_lines_and_charts(swept):
    results = Results.load(swept)
    assert not results.problems and len(results) == 14
    assert [row.condition.label for row in results.rows[:7]] == LABELS
    for row in results:
        assert row.predicted and row.ok and row.commit
        assert row.machine["name"] == "2x-cpu" and row.condition.world == 2
        assert row.tokens_per_second_per_gpu == pytest.approx(row.condition.tokens / row.median)
        assert row.effective["plan"] and row.peak_bytes > row.alloc_bytes > 0
    by_label = {(r.condition.label, r.condition.accumulation): r for r in results}
    auto, best = (by_label[name, 1].median for name in LABELS[-2:])
    assert best <= auto <= by_label["ZeRO3", 1].median
    assert by_label["FSDP (C)", 2].median > 1.5 * by_label["FSDP (C)", 1].median
    assert by_label["DeepCompile (P)", 1].effective["passes"] == ["zero3_compile", "prefetch"]
    assert len((swept / LINES).read_text().splitlines()) == 14
    assert all("predicted=True" in line for line in (swept / LINES).read_text().splitlines())
    for name in ("throughput", "mfu"):  # by accumulation steps, as there are two
        assert list((swept / name).glob(f"chart_{name}_*_np2_bs2.png"))
    assert len((swept / ROWS).read_text().splitlines()) == 14


def test_the_seeds_accumulation(tmp_path, monkeypatch, capsys):
    """Under the measured sweep's names of options; a simulation says no compile time."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps(CONFIG))
    arguments = ["bench", "acc", "--simulate", "--machine", "2x-cpu", "--models", "config.json",
                 "--num-layers", "1", "--seq-lengths", "32", "--dtype", "fp32",
                 "--metrics", "all"]  # fmt: skip
    assert cli.main(arguments) == 0
    folder = tmp_path / "results" / "2x-cpu-simulated-acc"
    found = {(r.condition.accumulation, r.condition.num_layers) for r in Results.load(folder)}
    assert found == {(a, 1) for a in (2, 4, 8, 16)}
    drawn = {path.parent.name: path.name for path in folder.glob("*/*.png")}
    assert drawn["throughput"] == "chart_throughput_config-1L_np2_bs1.png"
    assert "compile_time" not in drawn and len(drawn) == 5
    assert "compile_time: no result says it" in capsys.readouterr().err


def test_what_does_not_fit_is_a_row_that_says_so(swept, tmp_path):
    from deepcompile.bench.simulate import Job, plans, read_machine, to_row

    sweep = SimulatedSweep("2x-cpu", models=("llama-tiny",), memory_budget=1000)
    job, machine = Job(sweep, "llama-tiny", 1, 32), read_machine("2x-cpu")
    for plan in plans():
        found = simulate.simulate(job, machine, step(), plan, 1)
        row = to_row(job, machine, plan, 1, "obey", found)
        assert row.failure == "OOM" and row.error.startswith("does not fit: ")


def test_only_ours_exchanges_an_embedding_by_rows():
    pytest.importorskip("transformers")
    from deepcompile.bench.simulate import AUTO, Job, capture, plans, read_machine

    sweep = SimulatedSweep("4xh200", models=("llama-3-8b",), num_layers=1)
    job, machine = Job(sweep, "llama-3-8b", 1, 64), read_machine("4xh200")
    rows = capture(job, machine, "obey")
    assert any(param.rows_read for param in rows.params)
    whole = rows.copy()
    whole.forget_rows()
    for plan in (*plans(), AUTO):
        ours = plan.framework == "deepcompile"
        times = [simulate.simulate(job, machine, program, plan, 1)["step_ns"]
                 for program in (rows, whole)]  # fmt: skip
        assert times[0] < times[1] if ours else times[0] == times[1]


def test_mistakes_are_named(tmp_path, capsys):
    base = ["bench", "--simulate", "--machine"]
    for arguments, cause in {
        ("nowhere",): "nowhere",
        ("2x-cpu", "--models", "no-such", "--batch", "1", "--seq", "32"): "no-such",
        ("2x-cpu", "--seq", "0"): "must be at least 1",
        ("2x-cpu", "--metrics", "accuracy"): "'accuracy' is none of throughput",
        ("2x-cpu", "--models", "llama-tiny,no-such"): "no-such",
        ("2x-cpu", "w1"): "'w1' (choose from",
    }.items():
        try:
            code = cli.main([*base, *arguments, "--result-dir", str(tmp_path)])
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
        assert code == 2 and cause in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_an_error_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(simulate, "run_job", lambda job: pytest.fail("it began"))
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/below/it"):
        code = cli.main(["bench", "--simulate", "--machine", "2x-cpu", "--metrics", "none",
                         "--result-dir", str(tmp_path / folder)])  # fmt: skip
        assert code == 2 and "is a file" in capsys.readouterr().err


def test_what_is_done_is_said_at_once_and_how_much_is_left(tmp_path, capsys, monkeypatch):
    """Two jobs of 40 s side by side: 20 s for each of those left, and its own time beside it."""
    monkeypatch.setattr(simulate, "at_a_time", lambda jobs: 2)
    row = Row.failed(Condition("llama-tiny", "fsdp_c"), "does not fit")

    def results(jobs):
        said = " ".join(capsys.readouterr().out.split())
        assert "6, 2 at a time; first llama-tiny batch 1 sequence 512; llama-tiny" in said
        return ((job, [row], 40.0) for job in jobs)

    monkeypatch.setattr(simulate, "_results", results)
    code = cli.main(["bench", "--simulate", "--machine", "2x-cpu", "--models", "llama-tiny",
                     "--batch", "1,2", "--metrics", "none",
                     "--result-dir", str(tmp_path)])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    left = ["1 min 40 s", "1 min 20 s", "1 min 00 s", "40 s", "40 s"]
    assert [line.partition("(40 s, about ")[2].partition(" left")[0]
            for line in out.splitlines() if "(40 s, about" in line] == left  # fmt: skip
    assert "(40 s, done)" in out


def test_the_documentation_has_the_rows_that_are_kept(capsys, monkeypatch):
    path = ROOT / "benchmarks" / "train" / "published_table.py"
    spec = importlib.util.spec_from_file_location("published_table", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--check"]) == 0, capsys.readouterr()
    monkeypatch.setattr(script, "MACHINES", ("2x-cpu",))
    assert script.main(["--check"]) == 2
    assert "2x-cpu-simulated: does not exist" in capsys.readouterr().err


def test_measured_tables_are_the_rows(tmp_path, monkeypatch):
    path = ROOT / "benchmarks" / "train" / "published_table.py"
    spec = importlib.util.spec_from_file_location("published_table", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    condition = Condition("llama-tiny", "fsdp_c", num_layers=3, compile=True)
    row = Row.measured(condition, [[0.5]], commit="abc", peak_bytes=1 << 30)
    append(tmp_path / "rows", row)
    marks = "<!-- {0} rows: begin -->\nold\n<!-- {0} rows: end -->\n"
    page = "before\n" + marks.format("speed") + marks.format("depth") + "after"
    written = script.MEASURED.sub(script.measured, page)
    assert "old" not in written and written.startswith("before") and written.endswith("after")
    assert "| llama-tiny-3L | 1 | 512 | 1 | FSDP (C) | 500.0 (500-500) |" in written
    assert "| llama-tiny | 512 | FSDP (C) | 3 |" in written and written.count("commit abc") == 2
    assert script.MEASURED.sub(script.measured, written) == written
    assert script.MEASURED.sub(script.measured, "<!-- speed: begin -->") == "<!-- speed: begin -->"
