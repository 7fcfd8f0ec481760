# SPDX-License-Identifier: Apache-2.0
"""Rows of the benchmark: statistics, JSON lines, result.txt in the seed's format."""

from __future__ import annotations

import dataclasses
import json
import random
import re

import pytest

from deepcompile.bench.conditions import FRAMEWORKS, Condition, order_of
from deepcompile.bench.result_line import from_line, to_line
from deepcompile.bench.results import LINES, ROWS, Results, Row, append, save
from deepcompile.errors import UserError

SEED_LINE = (
    "20250301120102 meta-llama/Meta-Llama-3-70B-Instruct ds=True np=32 batch_size=1 seq=512 "
    "zero_stage=3 acc=1 ac=True compile=True backend=inductor deepcompile=True "
    "passes=prefetch,selective_gather compile_time=91.25 iteration time: 2.0480 "
    "alloc_mem: 5368709120 peak_mem: 64424509440"
)
SEED_FIELDS = re.compile(  # of the seed's chart script, with the backend= that its runner writes
    r"(\d+) ([\w./-]+) ds=(\w+) np=(\d+) batch_size=(\d+) seq=(\d+) zero_stage=(\d+) acc=(\d+) "
    r"ac=(\w+) compile=(\w+) backend=\w+ deepcompile=(\w+) passes=([\w,_]+) compile_time=([\d.]+) "
    r"iteration time: ([\d.]+) alloc_mem: (\d+) peak_mem: (\d+)"
)


def condition(**values) -> Condition:
    return Condition(**({"model": "org/Model-7B", "framework": "fsdp_c", "world": 2} | values))


def row(**values) -> Row:
    more = {"peak_bytes": 2 << 30, "alloc_bytes": 1 << 30, "compile_seconds": 3.5, "commit": "abc"}
    times = [[0.5, 0.7, 0.6], [0.4, 0.8, 0.5]]
    return Row.measured(condition(**values), times, losses=[2.5, 2.25], **more)


def test_statistics_are_of_the_slowest_rank_in_each_step():
    made = row(batch_size=2, seq_length=100, accumulation=3)
    assert (made.median, made.fastest, made.slowest) == (0.6, 0.5, 0.8)
    assert made.mean == pytest.approx(1.9 / 3)
    assert made.slowest_rank == 0
    assert made.tokens_per_second_per_gpu == pytest.approx(600 / 0.6)
    with pytest.raises(UserError, match=r"do not match \(2, 1\)"):
        Row.measured(condition(), [[1.0, 1.0], [1.0]])
    with pytest.raises(UserError, match="not above 0"):
        Row.measured(condition(), [[1.0, 0.0]])


def test_labels_are_the_seeds():
    labels = {
        ("zero3", ()): "ZeRO3",
        ("zero3_c", ()): "ZeRO3 (C)",
        ("fsdp", ()): "FSDP",
        ("fsdp_c", ()): "FSDP (C)",
        ("deepcompile", ("prefetch",)): "DeepCompile (P)",
        ("deepcompile", ("selective_gather",)): "DeepCompile (S)",
        ("deepcompile", ("prefetch", "selective_gather")): "DeepCompile (P+S)",
        ("deepcompile", ("zero3_compile", "selective_gather", "prefetch")): "DeepCompile (P+S)",
        ("deepcompile", ("auto",)): "DeepCompile (auto)",
        ("deepcompile", ()): "DeepCompile (auto)",
        ("deepcompile", ("zero3_compile",)): "DeepCompile (Z3)",
        ("ds_deepcompile", ()): "DS DeepCompile (P+S)",
    }
    for (framework, passes), label in labels.items():
        assert condition(framework=framework, passes=passes).label == label
    assert condition(framework="ds_deepcompile", zero_stage=1).label == "DS DeepCompile (Z1)"
    assert condition(settings="best", variant="overlap").label == "FSDP (C) overlap best"
    assert condition(model="meta-llama/Meta-Llama-3-8B-Instruct").model_label == "Llama-3-8B"
    assert condition(model="llama-3-70b", num_layers=16).model_label == "Llama-3-70B-16L"
    ours = [condition(framework="deepcompile", passes=(p,)) for p in ("auto", "prefetch")]
    ordered = sorted([*ours, condition(framework="zero3")], key=order_of)
    assert [c.label for c in ordered] == ["ZeRO3", "DeepCompile (P)", "DeepCompile (auto)"]


def random_condition(draw: random.Random) -> Condition:
    framework = draw.choice(list(FRAMEWORKS))
    return Condition(
        model=draw.choice(["org/Model-7B", "llama-3-8b", "/a folder/with # and %"]),
        framework=framework,
        passes=draw.choice([(), ("prefetch",), ("auto",), ("a", "b")]),
        variant=draw.choice(["", "overlap"]),
        settings=draw.choice(["default", "best"]),
        num_layers=draw.choice([0, 10]),
        batch_size=draw.choice([1, 4]),
        seq_length=draw.choice([512, 2048]),
        accumulation=draw.choice([1, 16]),
        zero_stage=draw.choice([0, 1, 2, 3]),
        activation_checkpointing=draw.random() < 0.5,
        compile=draw.random() < 0.5,
        backend=draw.choice(["inductor", "eager"]),
        offload_adam=draw.random() < 0.3,
        offload_params=draw.random() < 0.3,
        world=draw.choice([1, 4, 32]),
        nodes=draw.choice([1, 4]),
        dtype=draw.choice(["bf16", "fp32"]),
        seed=draw.choice([0, 7]),
    )


def test_any_condition_survives_both_files():
    draw = random.Random(1)
    for number in range(300):
        made = Row.measured(
            random_condition(draw), [[draw.uniform(0.001, 9)] for _ in range(2)], peak_bytes=number
        )
        made.predicted = number % 5 == 0
        assert Row.from_json(made.to_json()) == made
        read = from_line(to_line(made))
        assert read.condition == made.condition
        assert (read.predicted, read.timestamp) == (made.predicted, made.timestamp)
        assert read.median == pytest.approx(made.mean, abs=1e-4)
        assert read.peak_bytes == number


def test_a_line_of_deepspeeds_runner_is_read_and_written_back():
    read = from_line(SEED_LINE)
    assert read.condition.label == "DS DeepCompile (P+S)"
    assert read.condition.model_label == "Llama-3-70B"
    assert (read.median, read.peak_bytes, read.compile_seconds) == (2.048, 64424509440, 91.25)
    assert read.tokens_per_second_per_gpu == 250
    assert to_line(read) == SEED_LINE
    # As its chart script wants it, which knows no backend=.
    old = from_line(SEED_LINE.replace("backend=inductor ", ""))
    assert old == read
    plain = SEED_LINE.replace("compile=True backend", "compile=False backend")
    plain = plain.replace(
        "deepcompile=True passes=prefetch,selective_gather", "deepcompile=False passes=None"
    )
    assert from_line(plain).condition.label == "ZeRO3"
    fsdp = plain.replace("ds=True", "ds=False").replace("zero_stage=3", "zero_stage=0")
    assert from_line(fsdp).condition.label == "FSDP"
    assert to_line(from_line(fsdp)) == fsdp


def test_our_lines_fit_the_seeds_own_pattern():
    ours = condition(framework="deepcompile", passes=("prefetch",), compile=True, num_layers=16)
    found = SEED_FIELDS.match(to_line(Row.measured(ours, [[0.25]])))
    assert found is not None
    assert found[3] == "True" and found[11] == "True" and found[12] == "prefetch"
    assert found[14] == "0.2500"


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(2.67e-05, "0.000027"), (0.0, "0"), (91.25, "91.25"), (1e16, "1" + 16 * "0"), (3, "3")],
)
def test_compile_times_fit_the_seeds_pattern(seconds, written):
    ours = condition(framework="deepcompile", passes=("prefetch",), compile=True)
    line = to_line(Row.measured(ours, [[0.25]], compile_seconds=seconds))
    assert SEED_FIELDS.match(line)[13] == written
    assert from_line(line).compile_seconds == pytest.approx(seconds, abs=1e-6)


SEED_BARS = {"prefetch": "P", "selective_gather": "S", "prefetch,selective_gather": "P+S"}
"""What the seed's chart script has bars for."""


@pytest.mark.parametrize("framework", ["deepcompile", "ds_deepcompile"])
def test_passes_are_in_the_seeds_order(framework):
    for passes in (("prefetch",), ("selective_gather",), ("prefetch", "selective_gather"),
                   ("selective_gather", "prefetch")):  # fmt: skip
        given = condition(framework=framework, passes=passes, compile=True)
        line = to_line(Row.measured(given, [[0.25]]))
        bar = SEED_BARS[SEED_FIELDS.match(line)[12]]
        assert given.label.endswith(f"({bar})") and from_line(line).condition == given
    # For the automatic plan the seed has no bar; its pattern reads the line all the same.
    auto = condition(framework="deepcompile", compile=True)
    assert SEED_FIELDS.match(to_line(Row.measured(auto, [[0.25]])))[12] == "None"


def test_append_survives_a_torn_line(tmp_path):
    append(tmp_path, row())
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"schema": 1, "condi')  # killed here
    append(tmp_path, row(framework="zero3"))
    results = Results.load(tmp_path)
    assert [r.condition.framework for r in results] == ["fsdp_c", "zero3"]
    assert len(results.problems) == 1 and f"{ROWS}:2:" in results.problems[0]


def test_a_folder_with_rows_and_other_lines(tmp_path):
    first, failed = row(), Row.failed(condition(seq_length=99), "CUDA out of memory")
    save(tmp_path, [first, failed])
    with (tmp_path / LINES).open("a") as file:
        file.write(SEED_LINE + "\n")
    results = Results.load(tmp_path)
    assert [r.condition.framework for r in results] == ["ds_deepcompile", "fsdp_c", "fsdp_c"]
    assert results.rows[1] == first and results.rows[2].failure == "OOM"
    assert Results.load(tmp_path / LINES).rows[0].condition == first.condition
    save(tmp_path / "more", [row(framework="ddp")])  # a copy of other rows, whose name sorts behind
    (tmp_path / "more" / ROWS).rename(tmp_path / "z.jsonl")
    append(tmp_path, row(framework="zero3"))
    assert Results.load(tmp_path).rows[-1].condition.framework == "zero3"  # the new one is last


def test_latest_keeps_success_and_tells_predictions_apart():
    good, bad = row(), Row.failed(condition(), "timed out")
    predicted = dataclasses.replace(row(), predicted=True)
    newer = dataclasses.replace(row(), median=0.1)
    results = Results([good, bad, predicted])
    assert results.latest().rows == [good, predicted]
    assert Results([bad, good, newer]).latest().rows == [newer]
    assert results.find(condition()) is good
    assert results.find(condition(), predicted=True) is predicted
    assert results.find(condition(seed=5)) is None
    assert len(results.where(framework="zero3")) == 0


HOSTILE = {
    "not json": "is not JSON",
    "[" * 100000: "is not JSON",
    "[1, 2]": "no object with a schema",
    '{"schema": 99}': "has schema 99",
    '{"schema": 1}': "condition: is not an object",
    '{"schema": 1, "condition": {"model": "m"}}': "has no 'framework'",
    '{"schema": 1, "condition": {"model": 1, "framework": "fsdp"}}': "model is 1",
    '{"schema": 1, "condition": {"model": "m", "framework": "rm -rf"}}': "framework 'rm -rf'",
}


def test_a_hostile_file_is_named_line_by_line(tmp_path):
    good = json.loads(row().to_json())
    wrong = {
        "median": -1,
        "mean": 0,
        "peak_bytes": "much",
        "predicted": 1,
        "timestamp": "now",
        "times": [["a"]],
        "losses": [10**400],
        "slowest": 10**400,
        "extra": 1,
    }
    lines = [*HOSTILE, *(json.dumps(good | {key: value}) for key, value in wrong.items())]
    lines += [json.dumps(good | {"median": 1}).replace('"median": 1', '"median": NaN')]
    (tmp_path / ROWS).write_text("\n".join([*lines, "", json.dumps(good)]))
    (tmp_path / LINES).write_bytes(b"\xff\xfe\x00 binary\n" + SEED_LINE.encode()[:-40] + b"\n")
    results = Results.load(tmp_path)
    assert len(results) == 1
    assert len(results.problems) == len(lines) + 2
    for problem, cause in zip(results.problems, HOSTILE.values(), strict=False):
        assert cause in problem
    for problem, key in zip(results.problems[len(HOSTILE) :], wrong, strict=False):
        assert key in problem
    assert f"{LINES}:2: [bench] line: is not one of result.txt" in results.problems[-1]


def test_lines_with_wrong_numbers(tmp_path):
    for old, new in {"2.0480": "0.0000", "2.0480 ": "1.2.3 ", "20250301": "20259999"}.items():
        with pytest.raises(UserError, match=r"\[bench\] line"):
            from_line(SEED_LINE.replace(old, new))
    with pytest.raises(UserError, match="settings 'worst'"):
        from_line(SEED_LINE + " # settings=worst")
    with pytest.raises(UserError, match="num_layers=x is no int"):
        from_line(SEED_LINE + " # num_layers=x")


def test_places_that_cannot_be_used(tmp_path):
    assert len(Results.load(tmp_path)) == 0
    with pytest.raises(UserError, match="does not exist"):
        Results.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        append(tmp_path / "file", row())
    assert json.loads(Row.failed(condition(), "x", losses=[float("nan")]).to_json())["losses"] == [
        None
    ]
