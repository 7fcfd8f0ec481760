# SPDX-License-Identifier: Apache-2.0
"""Ranks that do not do the same: what the tests that nothing hangs run on each rank.

All of it is trained under the default schedule, whose planner makes a new plan after the first
steps, unless a case says otherwise.
"""

from __future__ import annotations

import hashlib
import random
import time
from typing import Any

import cases
import torch

STEPS = 200
LENGTHS = (5, 12)
"""Fewest and most tokens of a batch."""
TIMEOUT_S = 60.0
"""After which the runtime gives a transfer up."""


def start(name: str, world: int, schedule: Any = None, dynamic: bool | None = None,
          **settings: Any) -> Any:  # fmt: skip
    """A compiled engine. `settings`: more of the `compile` section."""
    import warnings

    import deepcompile

    config = cases.config_for(world, 3, gradient_clipping=0.5)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 1100
    config["compile"] |= {"timeout_s": TIMEOUT_S, **settings}
    config["train_batch_size"], config["train_micro_batch_size_per_gpu"] = world, 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepcompile.initialize(model=cases.make(name), config=config)
    engine.compile(backend="eager", schedule=schedule, compile_kwargs={"dynamic": dynamic})
    return engine


def batch(step: int, rank: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * 100 + rank)
    return torch.randint(0, cases.VOCABULARY, (1, length), generator=generator)


def train_step(engine: Any, ids: torch.Tensor) -> float:
    loss = cases.loss_of(engine, ids)
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def result(engine: Any, losses: list[float]) -> dict[str, Any]:
    found = hashlib.sha256()
    for name, tensor in sorted(engine.state_dict(fp32=True).items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    report = engine.compile_report()
    return {
        "digest": found.hexdigest(),
        "losses": losses,
        "steps": engine.global_steps,
        "replans": len(engine.planner.history),
        "recompilations": engine.planner.recompilations,
        "graphs": len(engine.planner.graphs),
        "breaks": len(report["graph_breaks"]),
        "relieved": report["memory_relieved"],
        "lowered": report["budgets_lowered"],
        "budget": report["budget"],
        "plans": sorted({i.plan_hash for i in engine.planner.graphs}),
    }


def all_sorts(
    rank: int, world: int, steps: int, schedule: Any, look: int | None = None
) -> dict[str, Any]:
    """A length of its own for each rank and step; at times a batch that no rank takes, one whose
    gradients all ranks drop, an evaluation, and a forward without a backward. `early`: the result
    of the first `look` steps."""
    engine = start("llama", world, schedule)
    draw, losses, early = random.Random(rank), [], None
    for step in range(steps):
        if step == look:
            early = result(engine, list(losses))
        ids = batch(step, rank, draw.randint(*LENGTHS))
        if step % 17 == 5:
            continue
        if step % 23 == 7:
            engine.eval()
            with torch.no_grad():
                losses.append(float(cases.loss_of(engine, ids)))
            engine.train()
        if step % 29 == 9:
            cases.loss_of(engine, ids)
        if step % 41 == 11:
            engine.backward(cases.loss_of(engine, ids))
            engine.zero_grad()
            continue
        losses.append(train_step(engine, ids))
    return {**result(engine, losses), "early": early}


def new_length(rank: int, world: int) -> dict[str, Any]:
    """Shapes are static, so that each new length compiles: on the last rank alone."""
    engine, losses = start("llama", world, dynamic=False), []
    for step in range(14):
        longer = {4: 1, 7: 2, 11: 3}.get(step, 0) if rank == world - 1 else 0
        losses.append(train_step(engine, batch(step, rank, 6 + longer)))
    return result(engine, losses)


def graph_breaks(rank: int, world: int) -> dict[str, Any]:
    """A model in several graphs with modules between that are not compiled."""
    engine, losses = start("skipping", world), []
    draw = random.Random(rank)
    for step in range(16):
        losses.append(train_step(engine, batch(step, rank, draw.randint(*LENGTHS))))
    return result(engine, losses)


def several(rank: int, world: int, runs: list[tuple[str, tuple]]) -> list[dict[str, Any]]:
    """Cases one after another on one set of ranks."""
    results = []
    for name, arguments in runs:
        torch._dynamo.reset()
        began = time.monotonic()
        results.append(globals()[name](rank, world, *arguments))
        results[-1]["seconds"] = time.monotonic() - began
    return results


def stopping(rank: int, world: int, at: int) -> None:
    """The last rank stops for good before a step; the others' runtimes give up in time."""
    engine = start("llama", world, timeout_s=4.0)
    for step in range(at + 1):
        if step == at and rank == world - 1:
            while True:
                time.sleep(1.0)
        train_step(engine, batch(step, rank, 8))


WITHIN_BUDGET = ["zero3_compile", "offload_adam_states", "selective_gather", "place_optimizer",
                 "prefetch"]  # fmt: skip
"""Passes that keep what the budget allows: the same peak whatever the times were."""


def short_of_memory(rank: int, world: int, limited: bool) -> dict[str, Any]:
    """From step 6 on, the last rank's device shrinks until it is too small for the plan."""
    schedule = [(0, ["zero3_compile"]), (3, WITHIN_BUDGET)]
    engine, losses = start("llama", world, schedule), []
    for step in range(24):
        if step == 6:
            limit = engine.planner.agreed.predicted_peak
        if step >= 6 and limited and rank == world - 1 and not engine.relief.times:
            limit = int(limit * 0.95)
            engine.runtime.limit_bytes(limit)
        losses.append(train_step(engine, batch(step, rank, 8)))
    return result(engine, losses)
