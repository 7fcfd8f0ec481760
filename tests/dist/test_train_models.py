# SPDX-License-Identifier: Apache-2.0
"""Whole training runs on real ranks against single-process PyTorch, model by model."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from ranks import run_ranks

TOLERANCE = 1e-5
COMPILED = (
    "llama", "mixtral", "gpt2", "sequential", "frozen", "llama_tied", "llama_checkpointing",
    "llama_deep",
)  # fmt: skip
EAGER = (
    "llama", "gpt2", "sequential", "attention", "frozen", "llama_checkpointing", "llama_reentrant",
)  # fmt: skip

pytestmark = pytest.mark.timeout(600)


def trained(world: int, runs: list[dict]) -> list[dict]:
    return run_ranks(cases.train_all, world, runs, timeout=500)[0]


@pytest.mark.parametrize(
    ("world", "names"),
    [(1, ("llama", "gpt2", "sequential")), (2, COMPILED), (4, ("mixtral", "sequential"))],
)
def test_compiled_training_equals_pytorch(world, names):
    results = trained(world, [{"name": name} for name in names])
    worst = {
        name: cases.worst(result, cases.reference(name))
        for name, result in zip(names, results, strict=True)
    }
    print(f"largest difference after {cases.STEPS} steps on {world} ranks:", worst)
    assert max(worst.values()) < TOLERANCE, worst
    for name, result in zip(names, results, strict=True):
        assert result["graphs"] == 1, name
        assert result["report"]["regions"] >= 6, name
        assert result["hook_reductions"] == 0, f"{name}: gradients were reduced by hooks"
        assert result["report"]["equal_layers"]["used"] == (name == "llama_deep"), name


@pytest.mark.parametrize("world", [1, 2])
def test_uncompiled_training_equals_pytorch(world):
    results = trained(world, [{"name": name, "backend": None} for name in EAGER])
    worst = {
        name: cases.worst(result, cases.reference(name))
        for name, result in zip(EAGER, results, strict=True)
    }
    print(f"largest difference after {cases.STEPS} steps on {world} ranks:", worst)
    assert max(worst.values()) < TOLERANCE, worst


def test_frames_that_dynamo_skips_find_their_parameters():
    names = ("skipping", "read_twice")
    results = trained(2, [{"name": name} for name in names])
    for name, result in zip(names, results, strict=True):
        assert result["graphs"] > 1 and result["hook_reductions"] > 0, name
        assert cases.worst(result, cases.reference(name)) < TOLERANCE, name


def test_stages_give_the_same_bits():
    names = ("mixtral", "gpt2")  # test_plans.py has Llama at all stages
    runs = [
        {"name": n, "stage": stage, "gradient_clipping": 0.5} for n in names for stage in (0, 3)
    ]
    results = trained(2, runs)
    for name, whole, sharded in zip(names, results[::2], results[1::2], strict=True):
        assert whole["losses"] == sharded["losses"], name
        assert whole["norms"] == sharded["norms"], name
        for key, value in whole["state"].items():
            assert np.array_equal(value, sharded["state"][key]), (name, key)
