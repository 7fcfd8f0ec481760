# SPDX-License-Identifier: Apache-2.0
"""ZeRO stages 1 and 2 against plain PyTorch, on real ranks."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from ranks import run_ranks

TOLERANCE = 1e-5
CLIP = {"gradient_clipping": 0.5}

pytestmark = pytest.mark.timeout(900)


def trained(world: int, runs: list[dict]) -> list[dict]:
    return run_ranks(cases.train_all, world, runs, timeout=800)[0]


def same(a: dict, b: dict) -> bool:
    values = all(np.array_equal(v, b["state"][k]) for k, v in a["state"].items())
    return values and a["losses"] == b["losses"] and a["norms"] == b["norms"]


def test_stages_one_and_two_equal_pytorch_and_each_other():
    runs = [{"name": "llama", "stage": stage, **CLIP} for stage in (0, 1, 2)]
    runs += [{"name": "llama", "stage": stage, "accumulation": 2, **CLIP} for stage in (1, 2)]
    runs += [
        {"name": "gpt2", "stage": stage, "backend": None, "accumulation": 2} for stage in (1, 2)
    ]
    whole, one, two, *more = trained(2, runs)
    expected = cases.reference("llama", clip=0.5)
    for result in (one, two, *more[:2]):
        assert cases.worst(result, expected) < TOLERANCE
        assert result["hook_reductions"] == 0 and result["report"]["plans"] >= 1
    for result in more[2:]:
        assert cases.worst(result, cases.reference("gpt2")) < TOLERANCE
    assert same(whole, one) and same(whole, two), "with one micro-batch a step the sums are equal"


def test_four_ranks():
    runs = [{"name": "sequential", "stage": stage} for stage in (1, 2)]
    for result in trained(4, runs):
        assert cases.worst(result, cases.reference("sequential")) < TOLERANCE


def _transfers(rank: int, world: int, stage: int) -> dict[str, int]:
    """Gradients that this rank sent in a step of two micro-batches, and sums that it kept."""
    engine = cases.start("sequential", cases.config_for(world, stage, 2), None)
    engine.compile(backend="eager", schedule=[(0, ["zero1_compile"])])
    cases.train_steps(engine, 0, 3)
    program = engine.planner.graphs[0].program
    ops = [i.op for section in program.sections for i in section.instrs]
    engine.runtime.trace(True)
    kept = []
    for micro, ids in enumerate(cases.micro_batches(3, rank, world, 2)):
        engine.backward(cases.loss_of(engine, ids))
        if micro == 0:
            kept.append(engine.runtime.buffer_report()["gradients"])
        engine.step()
    return {"gathers": ops.count("gather"), "boundary": program.boundary, "kept": kept[0]}


def test_stage_one_keeps_whole_sums_and_gathers_nothing():
    one = run_ranks(_transfers, 2, 1, timeout=300)[0]
    two = run_ranks(_transfers, 2, 2, timeout=300)[0]
    assert one["gathers"] == two["gathers"] == 0
    assert one["boundary"] and not two["boundary"]
    assert one["kept"] > 1.5 * two["kept"], "stage 1 sums whole gradients, stage 2 shards"
