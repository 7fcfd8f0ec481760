# SPDX-License-Identifier: Apache-2.0
"""What a training loop may do to parameters and their gradients beside the engine: freeze them,
hang hooks on them, write to them in the forward, send one loss through two engines. On two ranks,
each against plain PyTorch, compiled and not."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import cases
import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.timeout(600)

WIDTH, ROWS, TOLERANCE = 16, 4, 1e-5


def net(outputs: int = WIDTH) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, outputs))


def started(model: nn.Module, compiled: bool, **more: Any) -> Any:
    import deepcompile

    config = cases.config_for(2, 3) | {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1}
    engine, *_ = deepcompile.initialize(model=model, config=config | more)
    if compiled:
        engine.compile(backend="eager")
    return engine


def batches(step: int, world: int) -> torch.Tensor:
    return torch.randn(world, ROWS, WIDTH, generator=torch.Generator().manual_seed(step))


def step_both(
    engine: Any, plain: nn.Module, optimizer: torch.optim.Optimizer, inputs: torch.Tensor, rank: int
) -> None:
    """A step of the engine on this rank's inputs, and of plain PyTorch on all ranks'."""
    engine.backward(engine(inputs[rank]).pow(2).mean())
    engine.step()
    optimizer.zero_grad()
    (sum(plain(x).pow(2).mean() for x in inputs) / len(inputs)).backward()
    optimizer.step()


def furthest(engine: Any, plain: nn.Module) -> float:
    state = plain.state_dict()
    return max(float((v - state[k]).abs().max()) for k, v in engine.state_dict(fp32=True).items())


def _frozen(rank: int, world: int, compiled: bool) -> tuple[list[float], int]:
    """Distances from PyTorch while layers are frozen and unfrozen again, before there is a plan
    for all ranks and after; what was compiled anew when they came back."""
    model, plain = net(), net()
    engine, optimizer = started(model, compiled), cases.adamw(plain.parameters())
    found = []
    for step in range(14):
        frozen = {2: "0.", 3: "", 7: "1.", 10: "", 12: "1."}.get(step)
        if frozen is not None:
            for each in (model, plain):
                for name, parameter in each.named_parameters():
                    parameter.requires_grad_(not (frozen and name.startswith(frozen)))
        inputs = batches(step, world)
        step_both(engine, plain, optimizer, inputs, rank)
        found.append(furthest(engine, plain))
    return found, len(engine.planner.graphs), [p.why for p in engine.planner.history]


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_are_frozen_and_unfrozen_between_steps(compiled):
    for found, graphs, history in run_ranks(_frozen, 2, compiled, timeout=300):
        assert max(found) < TOLERANCE, found
        if compiled:  # the last freezing knows its graph
            assert graphs == 3 and history.count("parameters were frozen or unfrozen") == 1
            assert "profile" in history[-1], history


def _frozen_on_one(rank: int, world: int) -> str:
    model = net()
    engine = started(model, compiled=True)
    for step in range(6):
        if step == 5:
            model[0].requires_grad_(rank == 1)
            model[1].requires_grad_(rank == 0)
        try:
            engine.backward(engine(batches(step, world)[rank]).pow(2).mean())
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        engine.step()
    return "nothing"


def test_freezing_that_differs_between_ranks_is_an_error():
    for said in run_ranks(_frozen_on_one, 2, timeout=200):
        assert said.startswith("UserError: [engine] forward: parameters were frozen"), said
        assert "do it on all ranks" in said


def _adversarial(rank: int, world: int, compiled: bool) -> tuple[float, float]:
    """A generator that trains through a discriminator that is not frozen: distances of both."""
    models = net(), net(outputs=1)
    plain = copy.deepcopy(models)
    engines = [started(model, compiled) for model in models]
    optimizers = [cases.adamw(model.parameters()) for model in plain]

    def losses(make, judge, real):
        fake = make(torch.ones_like(real))
        yield judge(fake.detach()).pow(2).mean() + (judge(real) - 1).pow(2).mean()
        yield (judge(fake) - 1).pow(2).mean()

    for step in range(6):
        inputs = batches(step, world)
        for number, loss in enumerate(losses(*engines, inputs[rank])):
            trained = engines[1 - number]
            trained.zero_grad()
            trained.backward(loss)
            trained.step()
        sides = [losses(*plain, x) for x in inputs]
        for number in range(2):
            optimizer = optimizers[1 - number]
            total = sum(next(side) for side in sides) / world
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
    return tuple(furthest(e, p) for e, p in zip(engines, plain, strict=True))


def _joint(rank: int, world: int, compiled: bool) -> tuple[float, float]:
    """One loss through two engines, which both step."""
    models = net(), net(outputs=1)
    plain = copy.deepcopy(models)
    engines = [started(model, compiled) for model in models]
    optimizers = [cases.adamw(model.parameters()) for model in plain]
    for step in range(4):
        inputs = batches(step, world)
        engines[0].backward(engines[1](engines[0](inputs[rank])).pow(2).mean())
        for engine in engines:
            engine.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        (sum(plain[1](plain[0](x)).pow(2).mean() for x in inputs) / world).backward()
        for optimizer in optimizers:
            optimizer.step()
    return tuple(furthest(e, p) for e, p in zip(engines, plain, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loss_runs_through_two_engines(compiled):
    for loop in (_adversarial, _joint):
        for distances in run_ranks(loop, 2, compiled, timeout=200):
            assert max(distances) < TOLERANCE, loop.__name__


class Breaks(nn.Module):
    """Captured in two parts."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        torch._dynamo.graph_break()
        return self.last(x)


def _frozen_at_a_break(rank: int, world: int) -> tuple[list[bool], int, str]:
    """Which parameters stayed as they were while the first layer was frozen."""
    model = Breaks()
    engine = started(model, compiled=True)
    for step in range(6):
        if step == 4:
            model.first.requires_grad_(False)
            before = engine.state_dict()
        engine.backward(engine(batches(step, world)[rank]).pow(2).mean())
        engine.step()
    after = engine.state_dict()
    kept = [name for name in after if torch.equal(before[name], after[name])]
    loss = engine(batches(6, world)[rank]).pow(2).mean()
    model.first.requires_grad_(True)
    try:
        engine.backward(loss)
        said = "nothing"
    except Exception as error:
        said = str(error)
    return kept, len(engine.planner.graphs), said


def test_layers_on_both_sides_of_a_graph_break_are_frozen():
    for kept, graphs, said in run_ranks(_frozen_at_a_break, 2, timeout=200):
        assert kept == ["first.weight", "first.bias"] and graphs >= 3
        assert "frozen or unfrozen since the forward" in said


def _fails_amid(rank: int, world: int) -> tuple[str, float]:
    """What the engine that joined says after a backward that failed, and its way on."""
    models = net(), net(outputs=1)
    engines = [started(model, compiled=False) for model in models]
    inputs = batches(0, world)

    def fail(gradient: torch.Tensor) -> None:
        raise RuntimeError("boom")

    middle = engines[0](inputs[rank])
    middle.register_hook(fail)
    with contextlib.suppress(RuntimeError):
        engines[0].backward(engines[1](middle).pow(2).mean())
    engines[0].zero_grad()
    try:
        engines[1].step()
        said = "nothing"
    except Exception as error:
        said = str(error)
    engines[1].zero_grad()
    plain = net(outputs=1)
    optimizer = cases.adamw(plain.parameters())
    engines[1].backward(engines[1](inputs[rank]).pow(2).mean())
    engines[1].step()
    (sum(plain(x).pow(2).mean() for x in inputs) / world).backward()
    optimizer.step()
    return said, furthest(engines[1], plain)


def test_an_engine_that_joined_a_backward_that_failed_says_so():
    for said, distance in run_ranks(_fails_amid, 2, timeout=100):
        assert "the last backward failed half-way" in said and distance < TOLERANCE


class Clamped(nn.Module):
    """Writes to its own weight, as nn.Embedding(max_norm=...) does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.5, 0.5)
        return x @ self.weight


class Listed(nn.Module):
    """Its parameters are in a list and in a dictionary, which are modules that nobody calls."""

    def __init__(self):
        super().__init__()
        self.many = nn.ParameterList([torch.randn(WIDTH, 32) / 4, torch.randn(32, WIDTH) / 4])
        self.named = nn.ParameterDict({"last": torch.randn(WIDTH, 32) / 4})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.many[0]) @ self.many[1] @ self.named["last"]


class InPlace(nn.Module):
    """Writes to what its last Linear returned, which for three dimensions is a view."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu_(self.last(torch.tanh(self.first(x[None]))))[0]


def _weight_norm() -> nn.Module:
    with contextlib.suppress(FutureWarning):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(WIDTH, 32)), nn.Linear(32, WIDTH))


def _uncompiled(rank: int, world: int) -> dict[str, Any]:
    """What uncompiled stage 3 makes of parameters that are not read by their module's forward."""
    found: dict[str, Any] = {}
    for make in (Listed, InPlace, _weight_norm):
        models = []
        for _ in range(2):
            torch.manual_seed(5)
            models.append(make())
        engine, plain = started(models[0], compiled=False), models[1]
        optimizer = cases.adamw(plain.parameters())
        for step in range(3):
            inputs = batches(step, world)
            step_both(engine, plain, optimizer, inputs, rank)
        found[make.__name__] = furthest(engine, plain)

    def said(work: Any) -> str:
        return cases.said(work).removeprefix("UserError: ")

    x = batches(0, world)[rank]
    clamped = started(Clamped(), compiled=False)
    found["written"] = said(lambda: clamped(x))
    theirs = started(torch.compile(net(), backend="eager"), compiled=False)
    found["compiled"] = said(lambda: theirs(x))
    hooked = started(net(), compiled=False)
    hooked.module[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0))
    found["hook"] = said(lambda: hooked(x))
    first = started(net(), compiled=False)
    found["twice"] = said(lambda: started(first.module, compiled=False))
    # A mistaken loss.backward() leaves nothing behind.
    plain, engine = net(), started(net(), compiled=False)
    found["bare"] = said(lambda: (engine(x).pow(2).mean() * 100).backward())
    engine.backward(engine(x).pow(2).mean())
    engine.step()
    optimizer = cases.adamw(plain.parameters())
    (sum(plain(each).pow(2).mean() for each in batches(0, world)) / world).backward()
    optimizer.step()
    found["after"] = furthest(engine, plain)
    return found


def test_uncompiled_stage_3_gathers_what_is_read_and_names_what_cannot_be():
    for found in run_ranks(_uncompiled, 2, timeout=200):
        like_pytorch = ("Listed", "InPlace", "_weight_norm", "after")
        assert max(found[each] for each in like_pytorch) < TOLERANCE, found
        assert found["written"].startswith("[engine] weight: was written to in the forward")
        assert "OptimizedModule is compiled" in found["compiled"]
        assert "registered after initialize()" in found["hook"]
        assert "as another engine shards it" in found["twice"]
        assert "made outside engine.backward(loss)" in found["bare"]
