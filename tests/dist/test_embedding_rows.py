# SPDX-License-Identifier: Apache-2.0
"""Embeddings by rows, through the engine: the same training as with whole embeddings, to a
rounding of each sum, whatever the batches; the same bits by all plans; when it is done, and why."""

import json
import re
from pathlib import Path

import pytest
import rows_cases
import torch
from ranks import run_ranks
from rows_cases import EMBEDDING

import deepcompile

pytestmark = pytest.mark.timeout(600)

JOBS = [
    {},
    {"ragged": True, "gradient_clipping": 0.05},
    {"accumulation": 4, "ragged": True, "steps": 4},
    {"evaluate": True},
]


def close(a, b, tolerance):
    """On two ranks both ways add two numbers: the bits are equal."""
    assert a["state"].keys() == b["state"].keys()
    for name, value in a["state"].items():
        torch.testing.assert_close(value, b["state"][name], rtol=0, atol=tolerance)
    torch.testing.assert_close(
        torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("world, tolerance", [(2, 0.0), (4, 2e-6)])
def test_training_by_rows_is_training_with_whole_embeddings(world, tolerance):
    runs = [job | {"embedding_rows": rows} for job in JOBS for rows in ("on", "off")]
    per_rank = run_ranks(rows_cases.train, world, runs, timeout=500)
    for index, job in enumerate(JOBS):
        for results in per_rank:
            rows, whole = results[2 * index : 2 * index + 2]
            assert rows["rows"][EMBEDDING] == {
                "rows": True, "why": "compile.embedding_rows is 'on'",
            }  # fmt: skip
            assert whole["rows"][EMBEDDING]["rows"] is False
            assert f"forward 0: gather {EMBEDDING} by rows" in rows["order"]
            assert f"backward 0: reduce {EMBEDDING} by rows" in rows["order"]
            assert not any("by rows" in line for line in whole["order"])
            close(rows, whole, tolerance)
            assert rows["digest"] == per_rank[0][2 * index]["digest"]
            if "gradient_clipping" in job:
                assert rows["norm"] > job["gradient_clipping"], "clipping must matter here"


OTHERS = [
    {"bf16": {"enabled": True}, "ragged": True, "steps": 3},
    {"backend": "inductor", "steps": 3},
    {"name": "frozen", "steps": 3},
    {"name": "broken", "steps": 3},
]


def test_other_models_types_and_backends_by_rows():
    runs = [job | {"embedding_rows": rows} for job in OTHERS for rows in ("on", "off")]
    for results in run_ranks(rows_cases.train, 2, runs, timeout=500):
        for rows, whole in zip(results[::2], results[1::2], strict=True):
            assert [each["rows"] for each in rows["rows"].values()] == [True]
            assert any("by rows" in line for line in rows["order"])
            close(rows, whole, 0.0)


def test_evaluation_gathers_the_whole():
    (result,) = run_ranks(
        rows_cases.train, 2, [{"embedding_rows": "on", "evaluate": True, "steps": 2}]
    )[0]
    assert [line for line in result["order"] if "inference" in line and EMBEDDING in line] == [
        f"inference 1: gather {EMBEDDING}"
    ]


def test_all_plans_give_the_same_bits():
    stage = "zero3_compile"
    schedules = [
        [(0, [stage])],
        [(0, [stage]), (2, [stage, "prefetch"])],
        [(0, [stage]), (2, [stage, "selective_gather", "prefetch"])],
        [(0, [stage]), (2, ["auto"])],
    ]
    runs = [{"embedding_rows": "on", "steps": 7, "ragged": True, "schedule": s} for s in schedules]
    for results in run_ranks(rows_cases.train, 2, runs, timeout=400):
        assert {r["digest"] for r in results} == {results[0]["digest"]}
        assert [r["losses"] for r in results] == [results[0]["losses"]] * len(runs)
        assert [r["plans"] > 0 for r in results] == [False, True, True, True]
        assert all(r["rows"][EMBEDDING]["rows"] for r in results)
        assert all(f"forward 0: gather {EMBEDDING} by rows" in r["order"] for r in results)


def test_a_checkpoint_goes_on_either_way(tmp_path):
    straight, rows, whole = run_ranks(rows_cases.resumed, 2, str(tmp_path), ["on", "off"])[0]
    assert rows["losses"] == straight["losses"] and rows["digest"] == straight["digest"]
    close(whole, straight, 0.0)


def machine(tmp_path, name, bandwidth, latency_ns):
    text = (Path(deepcompile.__file__).parent / "machines/2x-cpu.json").read_text()
    described = json.loads(text)
    described["links"]["intra"] |= {
        "gather_bandwidth": bandwidth, "reduce_bandwidth": bandwidth, "latency_ns": latency_ns,
    }  # fmt: skip
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(described))
    return str(path)


def test_auto_asks_the_simulator_and_says_what_it_said(tmp_path):
    """18 of 64 rows: fewer bytes, and a transfer more, for the row numbers."""
    machines = [machine(tmp_path, "slow", 1e6, 0), machine(tmp_path, "far", 1e12, 10**7)]
    runs = [{"steps": 1, "machine": each} for each in machines]
    for slow, far in run_ranks(rows_cases.train, 2, runs):
        assert [r["rows"][EMBEDDING]["rows"] for r in (slow, far)] == [True, False]
        assert f"forward 0: gather {EMBEDDING} by rows" in slow["order"]
        for result in (slow, far):
            why = re.fullmatch(
                r"simulated step ([\d.]+) ms by rows, ([\d.]+) ms whole",
                result["rows"][EMBEDDING]["why"],
            )
            assert (float(why[1]) < float(why[2])) == result["rows"][EMBEDDING]["rows"]


def test_what_cannot_be_exchanged_by_rows_is_named():
    tied, positions, whole = run_ranks(
        rows_cases.train, 2,
        [{"name": "tied", "steps": 1}, {"name": "positions", "steps": 1, "embedding_rows": "on"},
         {"stage": 2, "steps": 1}],
    )[0]  # fmt: skip
    assert tied["rows"][EMBEDDING]["why"].startswith("tied: ")
    assert positions["rows"]["body.embed.weight"]["rows"]
    assert positions["rows"]["body.place.weight"] == {
        "rows": False, "why": "its row numbers are computed in the graph, by iota",
    }  # fmt: skip
    assert whole["rows"][EMBEDDING] == {"rows": False, "why": "kept whole on every rank"}


def test_on_is_an_error_where_nothing_can():
    runs = [{"name": "tied", "embedding_rows": "on"}, {"stage": 1, "embedding_rows": "on"}]
    for tied, whole in run_ranks(rows_cases.refusals, 2, runs):
        assert 'compile.embedding_rows is "on", and no embedding can be exchanged' in tied
        assert f"{EMBEDDING}: tied" in tied
        assert f"{EMBEDDING}: kept whole on every rank" in whole
