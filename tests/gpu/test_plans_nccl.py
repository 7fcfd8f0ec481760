# SPDX-License-Identifier: Apache-2.0
"""On GPUs, too, every plan gives the same bits: small models in bf16, compiled by Inductor.

Every combination of the optional passes, auto under several budgets and some random plans run 10
steps each from one state. Random plans move transfers and copies about more than any pass does,
so they also show hand-overs between streams that are missing.
"""

from __future__ import annotations

import plan_cases
import pytest
from plan_cases import Job
from ranks import run_ranks
from worlds import TWO_GPUS, WORLDS

pytestmark = [
    TWO_GPUS,
    pytest.mark.timeout(900),
]


JOBS = {
    "llama": [
        Job("llama", 1, 1.0, alone=10, chained=40, combinations=1, gpu=True),
        Job("llama", 2, 0.0, alone=10, chained=40, seed=1000, gpu=True),
    ],
    # Nothing clipped, so that plans may update in the backward.
    "mixtral": [Job("mixtral", 2, 0.0, combinations=2, gpu=True)],
    "gpt2_dropout": [Job("gpt2_dropout", 1, 0.0, combinations=2, gpu=True)],
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("model", JOBS)
def test_plans_give_the_same_bits_on_gpus(model, world, tmp_path):
    folder = str(tmp_path)
    found = run_ranks(plan_cases.compare, world, JOBS[model], folder, timeout=800, backend="nccl")
    for job, result in zip(JOBS[model], found[0], strict=True):
        print(
            f"{result['job']} on {world} GPUs: {result['plans']} random plans, "
            f"{result['combinations']} combinations, {result['early']} of them update in the "
            f"backward, {result['replayed']} runs from CUDA graphs; seconds to capture, to plan, "
            f"to run: {result['seconds']}"
        )
        before, after = result["compilations"]
        assert before == after, "a change of plan compiled something"
        assert result["replayed"] > 0, "no plan ran from CUDA graphs"
        assert result["early"] > 0 or job.clip or not job.combinations
    problems = [p for result in found[0] for p in result["problems"]]
    assert not problems, "\n".join(problems)
