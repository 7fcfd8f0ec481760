# SPDX-License-Identifier: Apache-2.0
"""Operations of a step, peaks, metrics, and the charts."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepcompile import cli
from deepcompile.bench.conditions import Condition
from deepcompile.bench.flops import (
    Geometry,
    attention_pairs,
    condition_flops,
    forward_flops,
    peak_flops,
    step_flops,
)
from deepcompile.bench.metrics import gains, metric, metrics, spread
from deepcompile.bench.plot import charts, gain_rows, gains_text, left_out_note, looks, plot
from deepcompile.bench.results import Results, Row, save
from deepcompile.cli.plot import METRICS
from deepcompile.errors import UserError

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 199,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 112, "tie_word_embeddings": True},
    "mixtral": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
        "sliding_window": None,
    },
    "gpt2": {"n_inner": 160},
    "qwen3": {"num_key_value_heads": 1, "intermediate_size": 112, "head_dim": 32},
}


@pytest.mark.parametrize("kind", MODELS)
def test_operations_are_those_that_torch_counts(kind):
    config = transformers.AutoConfig.for_model(
        kind, **SMALL, **MODELS[kind], attn_implementation="eager"
    )
    config.use_cache = False
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokens = torch.randint(0, 199, (2, 24))
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=tokens, labels=tokens).loss
        forward = counter.get_total_flops()
        loss.backward()
    shape = Geometry.of(config)
    # Eager attention computes all pairs; its backward is twice the forward, as counted.
    rotary = 2 * 2 * 24 * shape.head_dim // 2 if kind != "gpt2" else 0
    assert forward - rotary == pytest.approx(forward_flops(shape, 2, 24, causal=False), rel=2e-3)
    total = counter.get_total_flops()
    assert total - rotary == pytest.approx(step_flops(shape, 2, 24, causal=False), rel=4e-3)


def test_causal_pairs_accumulation_and_cut_depth():
    assert attention_pairs(4) == 10 and attention_pairs(4, causal=False) == 16
    assert attention_pairs(10, window=3) == 1 + 2 + 3 * 8
    whole = Condition("meta-llama/Meta-Llama-3-70B-Instruct", "fsdp", seq_length=1024)
    # 6 x parameters x tokens, without the embedding's lookup, and attention.
    parameters = 70.55e9 - 128256 * 8192
    attention = 3 * 4 * 80 * 8192 * 1024 * 1025 / 2
    assert condition_flops(whole) == pytest.approx(6 * parameters * 1024 + attention, rel=1e-3)
    cut = Condition("llama-3-70b", "fsdp", seq_length=1024, num_layers=40, accumulation=2)
    head = 6 * 1024 * 128256 * 8192
    assert condition_flops(cut) == pytest.approx(condition_flops(whole) + head, rel=1e-9)
    mixtral = Condition("mistralai/Mixtral-8x7B-v0.1", "fsdp", seq_length=512)
    assert condition_flops(mixtral) == pytest.approx(6 * 12.75e9 * 512, rel=0.02)
    same = dataclasses.replace(mixtral, model="mistralai/Mixtral-8x7B-Instruct-v0.1")
    assert condition_flops(same) == condition_flops(mixtral)
    with pytest.raises(UserError, match="config is not on this machine"):
        condition_flops(Condition("nobody/nothing", "fsdp"))
    with pytest.raises(UserError, match="'t5'"):
        Geometry.of(transformers.T5Config())


def test_windows_of_some_layers():
    """Gemma-2's slide in every other layer; of the others all pairs count."""
    config = transformers.Gemma2Config(num_hidden_layers=4, sliding_window=4)
    shape = Geometry.of(config)
    assert shape.slides == (True, False, True, False)
    wide = shape.heads * shape.head_dim
    plain = dataclasses.replace(shape, window=0)
    # Of 10 tokens 4 * 5 / 2 + 6 * 4 = 34 pairs instead of 55, in two layers of four.
    assert forward_flops(plain, 1, 10) - forward_flops(shape, 1, 10) == 2 * 2 * wide * 2 * (55 - 34)
    cut = dataclasses.replace(plain, layers=3), dataclasses.replace(shape, layers=3)
    assert forward_flops(cut[0], 1, 10) - forward_flops(cut[1], 1, 10) == 2 * 2 * wide * 2 * 21
    assert Geometry.of(transformers.Qwen2Config()).window == 0


def test_peaks():
    assert peak_flops("NVIDIA H200 NVL", "bf16") == peak_flops("NVIDIA H100 NVL", "bf16") == 835e12
    assert peak_flops("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA H200", "bf16") == peak_flops("NVIDIA H200 SXM", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("Some CPU", "bf16") is None and peak_flops("NVIDIA A100X", "bf16") is None


def made(framework="fsdp_c", median=0.5, predicted=False, device="NVIDIA H200", **values) -> Row:
    base = {"model": "llama-3-8b", "framework": framework, "world": 4, "seq_length": 512}
    times = [[median, median * 0.9, median * 1.3]] * 4
    row = Row.measured(Condition(**(base | values)), times, peak_bytes=40 << 30)
    row.predicted, row.machine = predicted, {"name": "4xh200", "device": device}
    return row


def test_metrics_and_their_spread():
    assert tuple(metrics()) == METRICS
    row = made()
    assert metric("throughput").of(row) == 1024
    assert metric("iteration_time").of(row) == 0.5
    assert metric("peak_mem").of(row) == 40
    assert metric("compile_time").of(row) is None
    flops = condition_flops(row.condition) / 0.5
    assert metric("flops").of(row) == pytest.approx(flops / 1e12)
    assert metric("mfu").of(row) == pytest.approx(100 * flops / 989e12)
    assert metric("mfu", 100).of(row) == pytest.approx(flops / 1e12)
    below, above = spread(metric("throughput"), row)
    assert 1024 - below == pytest.approx(512 / 0.65) and 1024 + above == pytest.approx(512 / 0.45)
    assert spread(metric("iteration_time"), row) == (pytest.approx(0.05), pytest.approx(0.15))
    assert spread(metric("peak_mem"), row) == (0, 0)
    with pytest.raises(UserError, match="peak of Pentium for bf16 is not known"):
        metric("mfu").of(made(device="Pentium"))
    ours = made("deepcompile", 0.25)
    assert [gain for _, _, gain in gains([row, ours], metric("throughput"))] == [2]
    assert [gain for _, _, gain in gains([row, ours], metric("iteration_time"))] == [2]
    theirs = made("ds_deepcompile", 0.4)
    assert [gain for _, _, gain in gains([row, theirs], metric("throughput"))] == [1.25]
    assert len(gains([row, theirs, ours], metric("throughput"))) == 2
    assert gains([row, made("deepcompile", 0.25, True)], metric("throughput")) == []
    elsewhere, line = made(device="NVIDIA A100-SXM4-80GB"), made(device="")
    assert gains([elsewhere, ours], metric("throughput")) == []  # it is the device that is faster
    assert len(gains([line, ours], metric("throughput"))) == 1


def deepcompile(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = cli.main(["plot", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return (code, *capsys.readouterr())


def sweep() -> list[Row]:
    rows = [made(seq_length=s, median=s / 2000) for s in (512, 1024, 2048)]
    rows += [made("deepcompile", s / 3000, seq_length=s) for s in (512, 1024)]
    rows += [Row.failed(made("deepcompile", seq_length=2048).condition, "CUDA out of memory")]
    rows += [made("deepcompile", 0.2, True), made("fsdp_c", 0.3, True)]
    return rows


def png_size(path) -> tuple[int, int]:
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_charts_have_the_seeds_names_and_the_gains_are_printed(tmp_path, capsys):
    save(tmp_path, [*sweep(), made(batch_size=2, model="mixtral-8x7b", num_layers=10)])
    code, out, _ = deepcompile(capsys, "--result_dir", str(tmp_path), "--metric", "throughput")
    assert code == 0
    first = tmp_path / "throughput" / "chart_throughput_Llama-3-8B_np4_bs1.png"
    second = tmp_path / "throughput" / "chart_throughput_Mixtral-8x7B-10L_np4_bs2.png"
    assert {str(first), str(second)} <= set(out.splitlines())
    for path in (first, second):
        width, height = png_size(path)
        assert width > 600 and height > 400 and path.stat().st_size < 200_000
    assert (
        "DeepCompile (auto)            over FSDP (C)              1.50x     1.50x         –" in out
    )
    assert (
        "DeepCompile (auto) simulated  over FSDP (C) simulated    1.50x         –         –" in out
    )


def test_what_a_chart_holds(tmp_path):
    (chart,) = charts(Results(sweep()), by_accumulation=False)
    assert chart.mixed and chart.places == [512, 1024, 2048]
    assert chart.bars == [
        "FSDP (C)",
        "DeepCompile (auto)",
        "FSDP (C) simulated",
        "DeepCompile (auto) simulated",
    ]
    assert chart.find(2048, "DeepCompile (auto)").failure == "OOM"
    assert chart.find(1024, "FSDP (C) simulated") is None
    assert len(gain_rows([chart], metric("throughput"))) == 2


def test_conditions_of_one_name_are_told_apart():
    rows = [made(seed=1), made(seed=2, median=0.4), made("zero3"), made(seq_length=9, seed=1)]
    (chart,) = charts(Results(rows), by_accumulation=False)
    assert chart.bars == ["ZeRO3", "FSDP (C) seed=1", "FSDP (C) seed=2"]
    assert chart.find(512, "FSDP (C) seed=2").median == 0.4


def test_models_of_one_name_have_a_chart_each(tmp_path):
    """Folders may end alike; the same model by two names is one chart."""
    names = {"/a/small/config.json": 0.5, "/b/small": 0.25}
    rows = [made(model=name, median=m, num_layers=2) for name, m in names.items()]
    found = charts(Results(rows), by_accumulation=False)
    assert sorted(chart.rows[0].median for chart in found) == [0.25, 0.5]
    assert len({chart.name for chart in found}) == 2
    assert all(chart.title.startswith("small-") and chart.title.endswith("-2L") for chart in found)
    same = [made(), made("fsdp", model="meta-llama/Meta-Llama-3-8B-Instruct")]
    (chart,) = charts(Results(same), by_accumulation=False)
    assert chart.name == "Llama-3-8B_np4_bs1" and len(chart.bars) == 2


def test_gaps_hatches_and_error_bars_are_drawn(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    from deepcompile.bench.plot import plot

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot(Results(sweep()), tmp_path, "throughput")
    (axes,) = figures[0].axes
    words = [text.get_text() for text in axes.texts]
    assert words.count("OOM") == 1 and words.count("3,000") == 2
    assert sum(bool(patch.get_hatch()) for patch in axes.patches) == 2
    assert not any(p.get_height() == 0 and p.get_width() < 0.1 for p in axes.patches)
    assert len(axes.containers) >= 7  # bars, and error bars of what was measured
    assert "hatched: simulated" in figures[0].get_suptitle()


def test_accumulation(tmp_path, capsys):
    save(tmp_path, [made(accumulation=a, median=0.3 * a) for a in (1, 2, 4)])
    arguments = ("--result_dir", str(tmp_path), "--metric", "iteration_time")
    assert deepcompile(capsys, *arguments, "--acc_step_eval")[0] == 0
    assert (tmp_path / "iteration_time/chart_iteration_time_Llama-3-8B_np4_bs1.png").exists()
    code, out, _ = deepcompile(capsys, *arguments)  # by length: a picture for each
    assert code == 0 and "Llama-3-8B_acc4_np4_bs1.png" in out


def test_the_seeds_acc_and_bench_have_the_seeds_names(tmp_path, capsys):
    """Each in the folder that its script gives it."""
    save(tmp_path / "profiles", [made(seq_length=length) for length in (512, 1024)])
    save(tmp_path / "profile_acc", [made(accumulation=a, seq_length=1024) for a in (2, 4)])
    for name, more in (("profiles", ()), ("profile_acc", ("--acc_step_eval",))):
        folder = ("--result_dir", str(tmp_path / name), "--metric", "throughput")
        assert deepcompile(capsys, *folder, *more)[0] == 0
        drawn = [path.name for path in (tmp_path / name / "throughput").iterdir()]
        assert drawn == ["chart_throughput_Llama-3-8B_np4_bs1.png"]


def test_all_metrics_that_the_results_say(tmp_path, capsys):
    save(tmp_path, [made(), made("deepcompile", 0.25)])
    code, out, error = deepcompile(capsys, "--result_dir", str(tmp_path))
    assert code == 0 and error == (
        "deepcompile: no chart: [bench] compile_time: no result says it.\n"
    )
    drawn = {path.parent.name for path in tmp_path.glob("*/chart_*.png")}
    assert drawn == {*METRICS} - {"compile_time"}
    assert out.count("over FSDP (C)") == 2  # throughput's gains and memory's
    save(tmp_path / "cpu", [made(device="Pentium")])
    code, _, error = deepcompile(capsys, "--result_dir", str(tmp_path / "cpu"))
    assert code == 0 and "no chart: [bench] mfu: the peak of Pentium" in error
    assert deepcompile(capsys, "--result_dir", str(tmp_path / "none"))[0] == 2


def test_mistakes_are_named(tmp_path, capsys, monkeypatch):
    folder = ("--result_dir", str(tmp_path))
    code, _, error = deepcompile(capsys, *folder, "--metric", "accuracy")
    assert code == 2 and "invalid choice: 'accuracy'" in error
    code, _, error = deepcompile(capsys, *folder, "--metric", "throughput")
    assert code == 2 and "holds no results" in error
    code, _, error = deepcompile(capsys, *folder, "--metric", "mfu", "--peak-tflops", "-3")
    assert code == 2 and "is not a number above 0" in error
    save(tmp_path, [made(device="Pentium"), Row.failed(made(seq_length=9).condition, "boom")])
    code, _, error = deepcompile(capsys, *folder, "--metric", "mfu")
    assert code == 2 and "Give it with --peak-tflops" in error
    code, _, error = deepcompile(capsys, *folder, "--metric", "compile_time")
    assert code == 2 and "no result says it" in error
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"schema": 1}) + "\n\x00\x01garbage\n")
    code, out, error = deepcompile(capsys, *folder, "--metric", "peak_mem")
    assert code == 0 and "peak_mem" in out
    assert error.count("skipped: ") == 2 and "rows.jsonl:3:" in error
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, error = deepcompile(capsys, *folder, "--metric", "throughput")
    assert code == 2 and "pip install 'deepcompile[bench]'" in error


def test_compile_times_of_reused_code_are_left_out_and_said(tmp_path):
    """~0 s of an engine that goes on is no compile time, and a ratio to it says nothing."""
    peer = Condition("llama-3-8b", "fsdp_c", compile=True)
    ours = Condition("llama-3-8b", "deepcompile", compile=True)
    longer = {"seq_length": 1024}
    rows = [
        Row.measured(c, [[0.5]], compile_seconds=seconds, compile_reused=reused)
        for c, seconds, reused in (
            (peer, 8.0, False),
            (ours, 20.0, False),
            (dataclasses.replace(peer, **longer), 8.0, None),  # an older version's
            (dataclasses.replace(ours, **longer), 1e-5, True),
        )
    ]
    what = metric("compile_time")
    assert [what.of(row) for row in rows] == [8.0, 20.0, 8.0, None]
    (chart,) = charts(Results(rows), by_accumulation=False)
    assert "compiled before in the same process" in left_out_note(chart, what)
    text = gains_text([chart], what)
    assert "0.40x" in text and "00x" not in text and "without a bar: reused" in text
    assert "caches on disk serve whoever runs later" in text
    drawn = plot(Results(rows), tmp_path, "compile_time")
    assert drawn[0][1].is_file()
    assert left_out_note(chart, metric("throughput")) == ""


def test_bars_of_one_framework_are_told_apart(tmp_path, monkeypatch):
    """In the picture and its legend: by tone, variants by their hatch."""
    from matplotlib.figure import Figure

    variants = ({}, {"settings": "best"}, {"variant": "overlap"}, {"variant": "copy_engine"},
                {"seed": 2})  # fmt: skip
    rows = [made(**given) for given in variants]
    budgets = ({}, {"variant": "budget=1GiB"}, {"variant": "budget=2GiB"}, {"settings": "best"})
    rows += [made("deepcompile", **given) for given in budgets]
    rows += [made("ds_deepcompile", **given) for given in ({}, {"settings": "best"})]
    rows += [made(predicted=True), made("deepcompile", predicted=True)]
    (chart,) = charts(Results(rows), by_accumulation=False)
    found = looks(chart)
    assert list(found) == chart.bars and len(set(found.values())) == len(rows)
    assert found["DeepCompile (auto)"][0] == found["DeepCompile (auto) simulated"][0]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    plot(Results(rows), tmp_path, "throughput")
    (legend,) = figures[0].legends
    shown = {(p.get_facecolor(), p.get_hatch() or "") for p in legend.get_patches()}
    bars = {(p.get_facecolor(), p.get_hatch() or "") for p in figures[0].axes[0].patches}
    assert len(shown) == len(rows) and shown == bars
    # FSDP's default and best alone keep their colours.
    (pair,) = charts(Results(rows[:2]), by_accumulation=False)
    assert looks(pair)["FSDP (C)"] == ("#d9772b", "") == found["FSDP (C) seed=0"]


def test_one_file_of_results(tmp_path, capsys):
    save(tmp_path, [made(), made("deepcompile", 0.25)])
    file = str(tmp_path / "result.txt")
    code, out, _ = deepcompile(capsys, "--result_dir", file, "--metric", "throughput")
    assert code == 0 and str(tmp_path / "throughput" / "chart_throughput_") in out


def test_long_names_stay_in_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    row = made("deepcompile", model="/x/" + "long-name-" * 12, variant="name=" + "x" * 150)
    row.model_flops, row.machine["name"] = 1e12, "8 x a processor of many words " * 3
    plot(Results([row]), tmp_path, "throughput")
    (figure,) = figures
    figure.draw_without_rendering()
    for artist in (figure._suptitle, *figure.legends):
        box = artist.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width, artist
    (bar,) = figure.axes[0].patches
    assert bar.get_width() < 0.35


def test_ranks_on_a_cpu_are_not_called_gpus():
    ours = Condition("llama-3-8b", "deepcompile", compile=True)
    peer = Condition("llama-3-8b", "fsdp_c", compile=True)
    for kind, unit in (("cpu", "tokens/s/rank"), ("cuda", "tokens/s/GPU")):
        rows = [Row.measured(c, [[0.5]], machine={"kind": kind}) for c in (ours, peer)]
        (chart,) = charts(Results(rows), by_accumulation=False)
        text = gains_text([chart], metric("throughput"))
        assert f"({unit}): above 1 ours is the better one" in text
