# SPDX-License-Identifier: Apache-2.0
"""Every plan gives the same bits, and a new plan compiles nothing.

Each model runs 200 random plans: 160 on 2 ranks (with and without clipping, 120 with accumulation
1 and 40 with 4) and 40 on 4 ranks (30 and 10). Every run is of 10 steps and starts from the same
state; its losses, norms, weights, masters, moments and random numbers are compared bit by bit with
the stage's plan. One plan in ten has a run of its own. The others share one, five to a run and two
steps each, which also shows that a plan takes over what another has left gathered, deferred or
on the host; if such a run differs, its plans run alone to find the one to blame. With
RANDOM_PLANS=alone in the environment, every plan runs its 10 steps alone (11 minutes on 2 cores).
"""

from __future__ import annotations

import os

import plan_cases
import pytest
from plan_cases import MODELS, Job
from ranks import run_ranks

ALONE = os.environ.get("RANDOM_PLANS") == "alone"
CLIP = 0.5

pytestmark = pytest.mark.timeout(3600 * 4 if ALONE else 900)


def compared(world: int, jobs: list[Job], folder, timeout: float = 800) -> list[dict]:
    """Run the jobs; fail with each plan that went wrong on any rank."""
    if ALONE:
        timeout *= 12
    try:
        results = run_ranks(plan_cases.compare, world, jobs, str(folder), timeout=timeout)
    except AssertionError as error:
        running = [path.read_text() for path in sorted(folder.glob("running-*"))]
        raise AssertionError(f"{error}\nwhile each rank ran\n" + "\n".join(running)) from None
    for result in results[0]:
        print(
            f"{result['job']} on {world} ranks: {result['plans']} random plans and "
            f"{result['combinations']} combinations, {result['early']} of which update in a "
            f"backward; seconds to capture, to plan, to run: {result['seconds']}"
        )
    problems = [p for result in results[0] for p in result["problems"]]
    assert not problems, "\n".join(problems)
    for rank in results:
        for result in rank:
            before, after = result["compilations"]
            assert before == after, f"{result['job']}: a change of plan compiled something"
    assert any(result["replayed"] for result in results[0]) or not any(job.alone for job in jobs)
    return results[0]


def shared(plans: int) -> dict[str, int]:
    """How many of a job's plans run alone, and how many in turns."""
    return {"alone": plans} if ALONE else {"alone": plans // 10, "chained": plans - plans // 10}


@pytest.mark.parametrize("model", MODELS)
def test_random_plans_on_2_ranks(model, tmp_path):
    settings = [(1, 0.0, 60), (1, CLIP, 60), (4, 0.0, 20), (4, CLIP, 20)]
    jobs = [
        Job(model, accumulation, clip, seed=1000 * at, **shared(plans))
        for at, (accumulation, clip, plans) in enumerate(settings)
    ]
    results = compared(2, jobs, tmp_path)
    if model == "gpt2_dropout":
        assert min(result["once"] for result in results) >= 6, "regions that draw random numbers"


@pytest.mark.parametrize("model", MODELS)
def test_random_plans_on_4_ranks(model, tmp_path):
    jobs = [
        Job(model, 1, CLIP, seed=5000, **shared(30)),
        Job(model, 4, 0.0, seed=6000, **shared(10)),
    ]
    compared(4, jobs, tmp_path)


def test_all_combinations_of_passes(tmp_path):
    """Every subset of the optional passes and `auto` under several budgets; every third of them
    where steps take longest."""
    jobs = [
        Job("llama", 1, CLIP, combinations=1),
        Job("gpt2_dropout", 4, 0.0, combinations=1 if ALONE else 3),
    ]
    results = compared(2, jobs, tmp_path)
    assert results[0]["combinations"] == 191 + plan_cases.AUTO_BUDGETS
    assert results[1]["combinations"] >= results[0]["combinations"] // 3


def test_combinations_on_4_ranks(tmp_path):
    """Of the same ones, every third."""
    (result,) = compared(4, [Job("mixtral", 1, 0.0, combinations=1 if ALONE else 3)], tmp_path)
    assert result["early"] > 0, "no combination updated in a backward"


def test_auto_on_a_step_of_many_regions(tmp_path):
    """It searches such steps by how much is freed in which way, and then by exchanges."""
    jobs = [
        Job("llama_deep", 1, 0.0, budgets=20),
        Job("llama_deep", 2, CLIP, budgets=10),
    ]
    results = compared(2, jobs, tmp_path)
    assert [result["combinations"] for result in results] == [20, 10]


def test_stages_give_the_same_bits(tmp_path):
    """Each stage's random plans equal its own plan, and the stages each other; but with
    accumulation, stage 1 sums a step's gradients in another order than they do."""
    settings = [(1, 0.0, 3), (1, 0.0, 1), (1, 0.0, 0), (4, CLIP, 3), (4, CLIP, 2), (4, CLIP, 1)]
    jobs = [
        Job("llama", accumulation, clip, stage, seed=7000, **shared(10))
        for accumulation, clip, stage in settings
    ]
    results = [result["losses"] for result in compared(2, jobs, tmp_path)]
    assert results[0] == results[1] == results[2]
    assert results[3] == results[4]
    worst = max(abs(a - b) for a, b in zip(results[3], results[5], strict=True))
    print(f"stage 1 sums in another order: its losses are within {worst:.1e} of stage 3's")
    assert worst < 1e-5
