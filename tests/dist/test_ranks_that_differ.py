# SPDX-License-Identifier: Apache-2.0
"""Ranks that are not alike: what may differ gives PyTorch's values, what may not is an error on
every rank at once."""

from __future__ import annotations

import warnings
from typing import Any

import cases
import pytest
import torch
from ranks import run_ranks
from torch import nn

pytestmark = pytest.mark.timeout(300)

SAMPLES = 2


class Some(nn.Module):
    """Uses a scale only if it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.big, self.big2 = nn.Linear(32, 32), nn.Linear(32, 32)
        self.scale, self.shift = nn.Parameter(torch.ones(32)), nn.Parameter(torch.zeros(32))

    def forward(self, x, told: bool, none: bool):
        x = self.big2(self.big(x).tanh())
        if none:  # of the small ones
            return x.pow(2).mean()
        return ((x * self.scale if told else x) + self.shift).pow(2).mean()


def _beside_pytorch(rank: int, world: int, config: dict, compiled: bool, loss_of: Any) -> float:
    """How far weights are from plain PyTorch's after 4 steps. `loss_of(model, inputs, r)`: rank r's
    loss."""
    import deepcompile

    dtype = torch.get_default_dtype()
    config = config | {"train_micro_batch_size_per_gpu": SAMPLES}
    config["train_batch_size"] = world * SAMPLES
    engine, *_ = deepcompile.initialize(model=Some(), config=config)
    if compiled:
        engine.compile(backend="eager")
    plain = Some()
    optimizer = cases.adamw(plain.parameters())
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        inputs = torch.randn(world, SAMPLES, 32, generator=draw, dtype=dtype)
        engine.backward(loss_of(engine, inputs[rank], rank))
        engine.step()
        optimizer.zero_grad()
        (sum(loss_of(plain, x, r) for r, x in enumerate(inputs)) / world).backward()
        optimizer.step()
    state = plain.state_dict()
    return max(float((v - state[k]).abs().max()) for k, v in engine.state_dict(fp32=True).items())


def _small_ones(rank: int, world: int, stage: int, none: bool) -> float:
    config = cases.config_for(2, stage)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return _beside_pytorch(
        rank, world, config, False, lambda model, x, r: model(x, r == 1, none and r == 0)
    )


@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_may_use_other_small_parameters_where_nothing_is_compiled(stage, none):
    for furthest in run_ranks(_small_ones, 2, stage, none, timeout=60):
        assert furthest < 1e-5


def _in_f64(rank: int, world: int, compiled: bool) -> float:
    torch.set_default_dtype(torch.float64)
    return _beside_pytorch(
        rank, world, cases.config_for(2, 3), compiled, lambda model, x, _: model(x, True, False)
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_in_f64_stay_so(compiled):
    for furthest in run_ranks(_in_f64, 2, compiled, timeout=60):
        assert furthest < 1e-14


def _configured(rank: int, world: int, key: str) -> str:
    import deepcompile

    config = cases.config_for(2, 3)
    if rank == 1:
        if key == "lr":
            config["optimizer"]["params"]["lr"] = 0.5
        elif key == "stage":
            config["zero_optimization"]["stage"] = 1
        else:
            config["gradient_clipping"] = 1.0
    config["steps_per_print"] = 10 * rank  # may differ
    with pytest.raises(deepcompile.UserError) as caught:
        deepcompile.initialize(model=cases.make("llama"), config=config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lr", "on rank 1"),
        ("stage", "zero_optimization.stage: is 1 on rank 1 and 3 on rank 0"),
        ("clip", "gradient_clipping: is 1.0 on rank 1 and 0.0 on rank 0"),
    ],
)
def test_other_settings_on_a_rank_are_an_error_on_all(key, words):
    first, second = run_ranks(_configured, 2, key, timeout=60)
    assert words in first and "on rank 0" in second


def _modes(rank: int, world: int) -> list[bool]:
    import deepcompile

    model = cases.make("llama").train(rank == 1)
    engine, *_ = deepcompile.initialize(model=model, config=cases.config_for(2, 3))
    return [module.training for module in engine.module.modules()]


def test_all_ranks_take_rank_0s_mode():
    first, second = run_ranks(_modes, 2, timeout=60)
    assert first == second and not any(first)


class Typed(nn.Sequential):
    def forward(self, x):
        return super().forward(x.to(self[0].weight.dtype))


def _clipped(rank: int, world: int, kind: dict, gathered: bool) -> tuple[str, float]:
    """What a loop that clips small weights meets under the default schedule: an error once the plan
    leaves their update to the next forward, unless it asks for them; the largest at the end."""
    import deepcompile

    config = cases.config_for(2, 3) | {"train_micro_batch_size_per_gpu": SAMPLES} | kind
    config["train_batch_size"] = world * SAMPLES
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    torch.manual_seed(1)
    model = Typed(nn.Linear(6, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 9))
    engine, *_ = deepcompile.initialize(model=model, config=config)
    engine.compile(backend="eager")
    small = [p for p in engine.parameters() if p.numel() < 100]
    said = ""
    for step in range(10):
        torch.manual_seed(10 * step + rank)
        try:
            engine.backward(engine(torch.randn(4, 6)).float().square().sum())
        except deepcompile.UserError as error:
            said = str(error)
            break
        engine.step()
        hold = deepcompile.GatheredParameters(engine, small, modifier_rank=0, enabled=gathered)
        with hold, torch.no_grad():
            for parameter in small:
                parameter.clamp_(-0.001, 0.001)
    deferred = [i.operand for i in engine.planner.update_program.sections[0].instrs
                if i.op == "defer"]  # fmt: skip
    if not said and not gathered:
        assert not any("pack" in name for name in deferred), "an error was due"
    state = {} if said else engine.state_dict(fp32=True)
    return said, max((float(v.abs().max()) for v in state.values() if v.numel() < 100), default=0)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kind", [{}, {"bf16": {"enabled": True}}])
def test_writes_between_steps_hold_or_are_an_error(kind, gathered):
    said = run_ranks(_clipped, 2, kind, gathered, timeout=90)
    for error, largest in said:
        assert ("modifier_rank" in error) if error else largest < 0.0011
        assert not (error and gathered), error


def _scheduled(rank: int, world: int) -> str:
    import deepcompile

    engine, *_ = deepcompile.initialize(model=cases.make("llama"), config=cases.config_for(2, 3))
    engine.compile(backend="eager", schedule=[(0, ["zero3_compile"]), (5 + rank, ["auto"])])
    with pytest.raises(deepcompile.UserError) as caught:
        cases.train_steps(engine, 0, 1)
    return str(caught.value)


def test_another_schedule_on_a_rank_is_an_error_after_the_first_step():
    for said in run_ranks(_scheduled, 2, timeout=60):
        assert "give engine.compile() the same on all ranks" in said and "(6, " in said


def _gathers_in_its_order(rank: int, world: int) -> tuple[str, bool]:
    def swap(program, context):
        for section in program.sections if rank == 1 else []:
            gathers = [i for i in section.instrs if i.op == "gather"]
            if section.kind == "forward":
                others = [i for i in section.instrs if i != gathers[1]]
                section.set_instrs([gathers[1], *others])

    engine = cases.start("sequential", cases.config_for(2, 3), None)
    before = engine.state_dict()
    engine.compile(backend="eager", schedule=[(0, ["zero3_compile", swap])])
    engine.backward(cases.loss_of(engine, cases.samples(0)[:2]))
    said = cases.said(engine.step)
    engine.zero_grad()
    return said, all(torch.equal(v, before[k]) for k, v in engine.state_dict().items())


def test_a_pass_that_edits_otherwise_on_a_rank_is_an_error_before_the_update():
    for said, same in run_ranks(_gathers_in_its_order, 2, timeout=60):
        assert "or a pass of the schedule edits by more than the program" in said and same


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 9)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh()).square().sum()


def _empty_batch(rank: int, world: int, at: int) -> tuple[str, list[str]]:
    import deepcompile

    config = cases.config_for(2, 3) | {"train_micro_batch_size_per_gpu": SAMPLES}
    config["train_batch_size"] = world * SAMPLES
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    config["compile"]["timeout_s"] = 4.0
    engine, *_ = deepcompile.initialize(model=Normed(), config=config)
    engine.compile(backend="eager", compile_kwargs={"dynamic": True})
    said = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for step in range(at + 1):
                rows = 0 if step == at and rank == 0 else 4
                engine.backward(engine(torch.randn(rows, 6)))
                engine.step()
        except deepcompile.UserError as error:
            said = str(error)
    return said, [str(w.message) for w in caught if "[planning]" in str(w.message)]


@pytest.mark.parametrize("at", [1, 6])
def test_an_empty_batch_of_one_rank_is_said_where_it_cannot_be(at):
    """Before there is an agreed plan and after it."""
    (first, warned), (second, _) = run_ranks(_empty_batch, 2, at, timeout=90)
    if at == 1:
        assert any("transfers in another order" in w and "batches alike" in w for w in warned)
        assert "transfers something else" in first and "transfers something else" in second
    else:
        assert "a batch of no or one element" in first and not warned
