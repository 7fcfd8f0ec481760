# SPDX-License-Identifier: Apache-2.0
"""Recorded runs on real ranks, over a recorder that behaves as CUDA graphs do: the same bits under
every kind of plan, and steps that repeat are replayed."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
import torch
from fake_recorder import FakeRecorder
from ranks import run_ranks

REGIONS = 12_000
SCHEDULE = [
    [0, ["zero3_compile"]],
    [5, ["zero3_compile", "prefetch", "selective_gather"]],
    [10, ["zero3_compile", "prefetch", "offload_activation", "offload_adam_states"]],
]
STEPS = 15
RUNS: dict[str, dict[str, Any]] = {
    "accumulated and evaluated": dict(name="llama", accumulation=2, evaluate_every=6),
    "three plans": dict(
        name="llama",
        gradient_clipping=0.5,
        compile={"region_bytes": REGIONS, "schedule": SCHEDULE, "memory_budget": "1GiB"},
    ),
    "rows": dict(
        name="llama_checkpointing",
        compile={"region_bytes": REGIONS, "embedding_rows": "on"},
        bf16={"enabled": True},
    ),
    "mixtral": dict(name="mixtral", stage=1),
    "graph breaks": dict(name="skipping"),
}


def compare(rank: int, world: int, runs: list[str]) -> dict[str, dict[str, Any]]:
    """What was replayed in each run; it must give what comes without recording."""
    from deepcompile import cuda_graphs

    found = {}
    for name in runs:
        results = []
        for recorder in (None, FakeRecorder(1 << 25)):
            torch._dynamo.reset()
            cuda_graphs.recorder = lambda setting, device, given=recorder: given
            results.append(cases.train(**RUNS[name], steps=STEPS))
        plain, replayed = results
        assert plain["losses"] == replayed["losses"], name
        assert plain["norms"] == replayed["norms"], name
        differ = [
            k for k, v in plain["state"].items() if not np.array_equal(v, replayed["state"][k])
        ]
        assert not differ, (name, differ)
        found[name] = replayed["report"]["cuda_graphs"]
    return found


@pytest.mark.parametrize("world, runs", [(2, list(RUNS)), (4, ["three plans"])])
def test_replayed_steps_have_the_same_bits(world, runs):
    for found in run_ranks(compare, world, runs, timeout=500):
        for name, report in found.items():
            print(name, report)
            assert report["recordings"] >= 1 and report["replayed"] > report["runs"], (name, report)
            assert report["missed"] == 0, (name, report)
