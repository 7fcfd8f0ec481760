# SPDX-License-Identifier: Apache-2.0
"""``deepcompile plan`` and ``explain`` of models, as a user runs them."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path

import pytest
from test_cli import deepcompile, deepcompile_here

pytest.importorskip("transformers")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def plan(model: Path, *arguments: str, start=deepcompile_here):
    return start(
        *("plan", "--model", str(model), "--machine", "2x-cpu", "--dtype", "fp32"),
        *("--persistence-threshold", "1000", *arguments),
    )


def plans_of(result) -> dict[tuple[int, str], dict]:
    assert result.returncode == 0, result.stderr
    return {(p["seq"], p["plan"]): p for p in json.loads(result.stdout)["plans"]}


def test_plans_are_compared_by_length(model: Path, tmp_path: Path):
    chart = tmp_path / "plans.svg"
    result = plan(model, "--seq", "32,64", "--json", "--chart", str(chart), start=deepcompile)
    plans = plans_of(result)
    names = ["ZeRO3", "P", "S", "P+S", "auto"]
    assert list(plans) == [(seq, name) for seq in (32, 64) for name in names]
    for seq in (32, 64):
        best = min(plans[seq, name]["step_ns"] for name in names)
        assert plans[seq, "auto"]["step_ns"] <= best * 1.01
        assert plans[seq, "P"]["step_ns"] < plans[seq, "ZeRO3"]["step_ns"]
    for each in plans.values():
        assert each["fits"] and each["peak_bytes"] > each["resident_bytes"] > 0
        tokens = each["tokens_per_second_per_gpu"]
        assert tokens == pytest.approx(each["seq"] * 1e9 / each["step_ns"], rel=1e-3)
    facts = json.loads(result.stdout)
    assert facts["ranks"] == 2 and facts["parameters"] > 100_000
    assert facts["memory_budget"] < facts["plans"][0]["peak_bytes"] * 1e6
    picture = xml.dom.minidom.parse(str(chart))
    texts = [t.firstChild.data for t in picture.getElementsByTagName("text")]
    assert texts.count("auto") == 2 and "sequence 64" in texts


def test_the_table_has_bars(model: Path, tmp_path: Path):
    page = tmp_path / "plans.html"
    result = plan(model, "--seq", "32", "--chart", str(page))
    assert result.returncode == 0, result.stderr
    assert "seq 32" in result.stdout and "tokens/s/GPU" in result.stdout
    assert "AdamW with fp32 master weights" in result.stdout and " M parameters" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "█" in line]
    assert [row.split()[0] for row in rows] == ["ZeRO3", "P", "S", "P+S", "auto"]
    assert "<svg" in page.read_text() and page.read_text().startswith("<!doctype html>")


def test_another_depth_is_said(model: Path, tmp_path: Path):
    page = tmp_path / "plans.svg"
    passes = ["--passes", "zero3_compile"]
    result = plan(model, "--seq", "32", "--layers", "1", *passes, "--chart", str(page))
    assert f"{model} with 1 layer on 2x-cpu" in result.stdout
    assert f"{model} with 1 layer on 2x-cpu" in page.read_text()


@pytest.mark.parametrize(("stage", "names"), [(0, ["replicated"]), (1, ["ZeRO1"]), (2, ["ZeRO2"])])
def test_other_stages(model: Path, stage: int, names: list[str]):
    plans = plans_of(
        plan(model, "--seq", "32", "--stage", str(stage), "--accumulation", "2", "--json")
    )
    assert [name for _, name in plans] == [*names, "auto"]


def test_a_budget_too_small_is_said_of_each_plan(model: Path):
    roomy = plans_of(plan(model, "--seq", "32", "--json"))
    tight = round(roomy[32, "ZeRO3"]["peak_bytes"] * 0.97)
    plans = plans_of(plan(model, "--seq", "32", "--json", "--memory-budget", f"{tight}B"))
    assert not plans[32, "ZeRO3"]["fits"] and plans[32, "ZeRO3"]["step_ns"]
    assert plans[32, "P"]["step_ns"] is None and "memory budget" in plans[32, "P"]["note"]
    table = plan(model, "--seq", "32", "--memory-budget", f"{tight}B")
    assert "does not fit" in table.stdout
    result = plan(
        model, "--seq", "32", "--memory-budget", "1MiB", "--passes", "zero3_compile,prefetch"
    )
    assert result.returncode == 2 and result.stdout == ""
    *progress, error = result.stderr.splitlines()
    assert error.startswith("deepcompile: error: ") and "the memory budget is 1.00 MiB" in error
    # What takes seconds is said before, beside the results.
    assert progress[0].startswith("capturing ") and str(model) in progress[0]
    assert progress[1].startswith("planning sequence 32")


def test_files_about_one_plan(model: Path, tmp_path: Path):
    out, saved, trace = tmp_path / "plan.txt", tmp_path / "plan.json", tmp_path / "trace.json"
    captured = tmp_path / "captured.txt"
    result = plan(
        model,
        *("--seq", "32", "--accumulation", "2", "--clip", "--json", "--out", str(out)),
        *("--save-plan", str(saved), "--trace", str(trace), "--captured", str(captured)),
        *("--passes", "zero3_compile,selective_gather,prefetch", "--memory-budget", "64MiB"),
    )
    (only,) = plans_of(result).values()
    assert only["plan"] == "zero3_compile+selective_gather+prefetch"
    assert only["peak_bytes"] <= 64 << 20
    assert json.loads(saved.read_text())["hash"] == only["hash"]
    assert json.loads(trace.read_text())["traceEvents"]
    # The written program is the one that was simulated.
    again = json.loads(deepcompile_here("sim", str(out), "--machine", "2x-cpu", "--json").stdout)
    assert again["step_ns"] == only["step_ns"]
    assert "because selective_gather" in out.read_text()
    # The captured program gives the same plan.
    passes = ("--passes", "zero3_compile,selective_gather,prefetch", "--memory-budget", "64MiB")
    planned = deepcompile_here("opt", str(captured), "--machine", "2x-cpu", *passes)
    assert planned.stdout == out.read_text()


def test_few_layers_stand_for_all(model: Path):
    few = plans_of(plan(model, "--seq", "32", "--json"))
    every = plans_of(plan(model, "--seq", "32", "--json", "--capture-all-layers"))
    for key, each in few.items():
        assert (each["step_ns"], each["peak_bytes"]) == (
            every[key]["step_ns"],
            every[key]["peak_bytes"],
        )


def test_explain_groups_equal_layers(model: Path, tmp_path: Path):
    out = tmp_path / "plan.txt"
    assert plan(model, "--seq", "32", "--out", str(out)).returncode == 0
    result = deepcompile_here("explain", str(out), "--machine", "2x-cpu")
    assert result.returncode == 0, result.stderr
    assert " alike): f32" in result.stdout and "why: " in result.stdout
    assert "param model.embed_tokens.weight: f32, 64.0 KiB" in result.stdout
    assert "region fwd0.1" in result.stdout
    every = deepcompile_here("explain", str(out), "--machine", "2x-cpu", "--all")
    assert len(every.stdout) > 2 * len(result.stdout)
    for layer in range(6):
        assert f"param model.layers.{layer}.mlp.up_proj.weight: " in every.stdout
    regions = every.stdout.split("\nregion ")[1:]
    assert len(regions) > 6 and all("\n  why: " in region for region in regions)
    for text in (result.stdout, every.stdout):
        assert "else" in text and " instead: " in text
