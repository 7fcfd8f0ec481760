# SPDX-License-Identifier: Apache-2.0
"""Recorded runs on real ranks, over a recorder that behaves as CUDA graphs do: the same bits as
without, and steps that repeat are replayed. Random plans are recorded too, in test_plans.py."""

from __future__ import annotations

from typing import Any

import cases
import numpy as np
import pytest
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


KEPT = (
    (("  run fwd.1\n  release w2\n", "  run fwd.1\n"), LASTING[0][0]),
    (),
)


def look_between(rank: int, world: int, when: int) -> dict[str, Any]:
    """In one step w1, whole from forward to backward, is released between them, as
    GatheredParameters does."""
    import torch.distributed as dist

    toy_step.PLANS["w1 stays"] = ((("  run fwd.0\n  release w1\n", "  run fwd.0\n"),), ())
    options = dict(group=dist.group.WORLD, plan="w1 stays")
    toys = [toy_step.Toy(rank, world, recorder=r, **options) for r in (None, FakeRecorder())]
    losses: list[list[torch.Tensor]] = []
    for toy in toys:
        losses.append([])
        for step in range(9):
            inputs = list(toy_step.batch(step * world + rank))
            call, toy.token = toy.runtime.new_call(toy.graph)
            (loss,) = toy.runtime.run(toy.graph, 0, call, inputs)
            if step == when:
                assert toy.runtime.is_whole("w1")
                toy.runtime.release(["w1"])
            toy.runtime.run(toy.graph, 1, call, [torch.ones_like(loss)])
            toy.step()
            losses[-1].append(loss)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    theirs, ours = (toy.everything() for toy in toys)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    return toys[1].runtime.replays()


@pytest.mark.parametrize("when", [2, 4])
def test_what_is_released_amid_a_step_is_not_written_over(when):
    """Step 2 is recorded, step 4 replayed."""
    for found in run_ranks(look_between, 2, when):
        assert found["recordings"] >= 1 and found["replayed"] > 0, found


def evaluate_between(rank: int, world: int) -> tuple[dict[str, Any], list[int]]:
    """w2's buffer stays from micro batch to micro batch, as selective_gather lets it; evaluations
    between steps release it, and what is allocated then takes its memory."""
    import torch.distributed as dist

    toy_step.PLANS["kept"] = KEPT
    options = dict(group=dist.group.WORLD, plan="kept", accumulation=2)
    toys = [toy_step.Toy(rank, world, recorder=r, **options) for r in (None, FakeRecorder())]
    inference = toy_step.plan_text(world, 3, toy_step.INFERENCE, accumulation=2)
    losses, taken = [], []
    for toy in toys:
        evaluation = toy.runtime.load_plan(inference, toy_step.CODES)
        losses.append(toy.train(4, rank, world))
        for seed in (90, 91):
            losses[-1] += toy.runtime.run(evaluation, 0, -1, list(toy_step.batch(seed)))
            taken += [torch.ones(toy.model.w2.numel() + rank) for _ in range(50)]
            losses[-1] += toy.train(4, rank, world)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    theirs, ours = (toy.everything() for toy in toys)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found = toys[1].runtime.replays()
    held = [toy.runtime.buffer_report()["full"] for toy in toys]
    toys[1].runtime.unload_plan(toys[1].graph)  # the recording goes, and with it what it keeps
    return found, [*held, toys[1].runtime.buffer_report()["full"]]


def test_a_buffer_that_an_evaluation_released_lies_where_it_lay():
    for found, (plain, kept, after) in run_ranks(evaluate_between, 2):
        assert found["recordings"] == 1 and found["replayed"] == 9 * 3 * 2, found
        assert found["missed"] == 0 and found["moved"] == "", found
        assert kept > plain == after


def move_between(rank: int, world: int) -> dict[str, Any]:
    """Before each step after the recorded one the caller gathers w1, in other memory each time."""
    import torch.distributed as dist

    options = dict(group=dist.group.WORLD)
    toys = [toy_step.Toy(rank, world, recorder=r, **options) for r in (None, FakeRecorder())]
    losses, taken = [], []
    for toy in toys:
        losses.append(toy.train(3, rank, world))
        for _ in range(3):
            taken.append([torch.ones(toy.model.w1.numel() + world) for _ in range(50)])
            toy.runtime.gather(["w1"])
            losses[-1] += toy.train(1, rank, world)
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    return toys[1].runtime.replays()


def test_the_report_names_what_moves_from_step_to_step():
    for found in run_ranks(move_between, 2):
        moved = "run fwd.0 of forward 0 reads parameter w1, which lay at 3 places in 3 steps"
        assert found["moved"] == moved, found
        assert found["why_not"] == f"what runs read moves from step to step: {moved}"
