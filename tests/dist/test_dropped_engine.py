# SPDX-License-Identifier: Apache-2.0
"""What is left of an engine that is dropped: nothing, whatever Dynamo, autograd and
torch.distributed keep. On two ranks, where the latter keeps every frame that called a
collective."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import cases
import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.timeout(600)


class Counts(nn.Module):
    """Writes to a buffer, so that AOTAutograd's own wrapper runs its graph."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(cases.VOCABULARY, 32), nn.Linear(32, cases.VOCABULARY)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.head(self.embed(ids)) * self.calls


def counting() -> nn.Module:
    return cases.TakesLabels(Counts())


def _started(name: str, world: int) -> Any:
    cases.MODELS["counting"] = counting
    return cases.start(name, cases.config_for(world, 3), "eager")


def _dropped(rank: int, world: int, names: list[str]) -> dict[str, tuple[list[str], str]]:
    """By model: what outlived its engine, and what a backward says afterwards."""
    other = _started("sequential", world)
    cases.train_steps(other, 0, 2)
    found = {}
    for name in names:
        engine = _started(name, world)
        cases.train_steps(engine, 0, 5)
        (ids,) = cases.micro_batches(5, rank, world, 1)
        kept, late = cases.loss_of(engine, ids), cases.loss_of(engine, ids)
        engine.backward(kept)
        engine.step()
        owned = {
            "engine": engine,
            "planner": engine.planner,
            "runtime": engine.runtime,
            "hooks": engine.hooks,
            "model": engine.module,
            "table": engine.table,
            "graph": engine.planner.graphs[0].captured,
            "parameter": next(engine.module.parameters()),
        }
        alive = {what: weakref.ref(value) for what, value in owned.items()}
        del engine, owned
        gc.collect()
        left = [what for what, value in alive.items() if value() is not None]
        found[name] = left, cases.said(late.backward)
        del kept, late
        cases.train_steps(other, len(found) + 1, len(found) + 2)
    return found


def test_nothing_outlives_a_dropped_engine():
    for found in run_ranks(_dropped, 2, ["llama", "counting", "skipping"], timeout=300):
        for name, (left, said) in found.items():
            # The outputs that were kept hold their autograd nodes, and these the parameters.
            assert set(left) <= {"parameter"}, name
            assert "engine is gone" in said and said.startswith("UserError"), name


def _called_late(rank: int, world: int) -> tuple[str, str]:
    from deepcompile.capture import surface_errors

    engine = _started("sequential", world)
    cases.train_steps(engine, 0, 1)
    compiled = engine._compiled
    (ids,) = cases.micro_batches(0, rank, world, 1)
    del engine
    gc.collect()

    def call(tokens: torch.Tensor) -> None:
        with surface_errors():
            compiled(input_ids=tokens, labels=tokens)

    return cases.said(lambda: call(ids)), cases.said(lambda: call(ids[:, :5]))


def test_what_an_engine_compiled_does_not_run_without_it():
    for again, anew in run_ranks(_called_late, 2):
        assert again.startswith("UserError") and "engine is gone" in again
        assert anew.startswith("UserError") and "engine is gone" in anew
