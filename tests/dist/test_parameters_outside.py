# SPDX-License-Identifier: Apache-2.0
"""What may be done with a model and its sharded parameters outside of steps, on two ranks."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import cases
import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.timeout(300)


def _read_outside(rank: int, world: int, backend: str | None) -> dict[str, str]:
    """What reading and writing a sharded parameter says, and that training goes on after it."""
    engine = cases.start("sequential", cases.config_for(world, 3), backend)
    cases.train_steps(engine, 0, 2)
    weight = engine.module.body[1].weight
    said = {
        "read": cases.said(weight.sum),
        "written": cases.said(weight.data.zero_),
        "address": cases.said(weight.data_ptr),
        "copied": cases.said(lambda: copy.deepcopy(engine.module)),
    }
    losses, norms = cases.train_steps(engine, 2, 4)
    expected = cases.reference("sequential", steps=4)
    assert losses == pytest.approx(expected["losses"][2:], abs=1e-5)
    return said


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_sharded_parameter_without_memory_is_an_error_that_names_it(backend):
    for said in run_ranks(_read_outside, 2, backend):
        for text in said.values():
            assert text.startswith("RuntimeError: [runtime] parameter body."), text
            assert "GatheredParameters" in text


def _copied(rank: int, world: int) -> bool:
    """A deep copy of a model in training is a plain module: it runs on one rank alone, stays as it
    was, and keeps nothing of the engine. Whether the runtime was gone in the end."""
    import deepcompile

    engine = cases.start("sequential", cases.config_for(world, 3), "eager")
    cases.train_steps(engine, 0, 2)
    with deepcompile.GatheredParameters(engine, list(engine.module.parameters())):
        plain = copy.deepcopy(engine.module)
    expected = {k: v.clone() for k, v in engine.state_dict().items()}
    if rank == 0:
        cases.loss_of(plain, cases.samples(2)).backward()
        assert all(p.grad is not None for p in plain.parameters())
    cases.train_steps(engine, 2, 4)
    state = plain.state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[k], expected[k]) for k in state)
    plain.load_state_dict(state)
    runtime = weakref.ref(engine.runtime)
    del engine
    gc.collect()
    return runtime() is None


def test_a_deep_copy_is_a_plain_module():
    assert all(run_ranks(_copied, 2))


class Held:
    """An output of a kind of its own, which refers to itself."""

    def __init__(self, value: torch.Tensor):
        self.parts, self.me = [value], self


class Scales(nn.Module):
    """Owns its parameter, and returns it in an object."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 32)

    def forward(self, x: torch.Tensor) -> Held:
        return Held(x @ self.weight)


class Unpacks(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.scales = nn.Embedding(cases.VOCABULARY, 32), Scales()
        self.head = nn.Linear(32, cases.VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.scales(self.embed(ids)).parts[0])


def _trained(rank: int, world: int) -> dict[str, Any]:
    cases.MODELS["unpacks"] = lambda: cases.TakesLabels(Unpacks())
    result = cases.train("unpacks", backend=None, steps=3)
    expected = cases.reference("unpacks", steps=3)
    assert cases.worst(result, expected) < 1e-5


def test_a_module_that_returns_an_object_trains_uncompiled():
    run_ranks(_trained, 2)
