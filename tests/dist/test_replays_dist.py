# SPDX-License-Identifier: Apache-2.0
"""Recorded runs on real ranks, over a recorder that behaves as CUDA graphs do: the same bits as
without, and steps that repeat are replayed. Random plans are recorded too, in test_plans.py."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import torch
import toy_step
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


def test_replayed_steps_have_the_same_bits():
    for found in run_ranks(compare, 2, list(RUNS), timeout=500):
        for name, report in found.items():
            print(name, report)
            assert report["recordings"] >= 1 and report["replayed"] > report["runs"], (name, report)
            assert report["missed"] == 0, (name, report)


LASTING = (
    (("  run bwd.1\n  release w2\n", "  run bwd.1\n"),),
    (("  update w2\n", "  update w2\n  gather w2\n"),),
)


def keep_whole(rank: int, world: int) -> dict[str, Any]:
    """w2 is gathered in the update for the next forward, into the buffer that the backward had."""
    import torch.distributed as dist

    toy_step.PLANS["lasting"] = LASTING
    options = dict(group=dist.group.WORLD, plan="lasting")
    toys = [toy_step.Toy(rank, world, recorder=r, **options) for r in (None, FakeRecorder())]
    losses = [toy.train(12, rank, world) for toy in toys]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    theirs, ours = (toy.everything() for toy in toys)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return toys[1].runtime.replays()


def test_a_buffer_that_outlives_its_step_is_not_written_over():
    for found in run_ranks(keep_whole, 2):
        assert found["recordings"] >= 1 and found["replayed"] > 0, found
