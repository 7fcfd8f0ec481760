# SPDX-License-Identifier: Apache-2.0
"""What a training loop does to parameters and optimizer behind the engine's back: it holds, as in
PyTorch, or is an error that says what to do."""

from __future__ import annotations

import pytest
import torch
from test_engine import LR, batch, config, error_of, seeded, small, start, step
from test_engine_failures import update_early
from torch import nn

from deepcompile import GatheredParameters, UserError
from deepcompile.config import ConfigWarning

BF16 = {"bf16": {"enabled": True}}


class Typed(nn.Sequential):
    """Takes inputs of any floating-point type."""

    def __init__(self, seed: int = 0):
        super().__init__(*seeded(small, seed))

    def forward(self, x):
        return super().forward(x.to(self[0].weight.dtype))


def at_stage(stage: int, **more) -> dict:
    return config(
        zero_optimization={"stage": stage, "stage3_param_persistence_threshold": 0}, **more
    )


def begun(compiled: bool, *model, **settings):
    engine = start(*model, **settings)
    if compiled:
        engine.compile(backend="eager")
    return engine


def same(one, other) -> bool:
    theirs = other.state_dict(fp32=True)
    return all(torch.equal(v, theirs[k]) for k, v in one.state_dict(fp32=True).items())


class Reader(nn.Module):
    """Takes a part of what its child has, without calling it."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(16, 16)

    def forward(self, x):
        return x @ self.child.weight[:4].T


def test_a_view_of_what_a_child_has_names_the_class_to_be_named():
    settings = {"stage": 3, "stage3_param_persistence_threshold": 0}
    x = torch.randn(2, 16)
    engine = start(nn.Sequential(Reader()), config=config(zero_optimization=settings))
    with pytest.raises(UserError, match=r'Reader reads a .*leaf_module.classes: \["Reader"\]'):
        engine(x)
    leaf = {"leaf_module": {"classes": ["Reader"]}}
    model = nn.Sequential(Reader())
    expected = model(x)
    engine = start(model, config=config(zero_optimization=settings | leaf))
    assert torch.equal(engine(x), expected)


def test_rates_change_between_steps_that_update_in_the_backward():
    halves = {"type": "StepLR", "params": {"step_size": 2, "gamma": 0.5}}
    early = config(compile={"early_updates": True, "region_bytes": 1}, scheduler=halves)
    engine, twin = start(config=early), start(config=config(scheduler=halves))
    whole_step = ["zero3_compile", update_early, "coalesce"]
    engine.compile(backend="eager", schedule=[(0, ["zero3_compile"]), (1, whole_step)])
    twin.compile(backend="eager")
    for number in range(7):
        for each in (engine, twin):
            step(each, number)
            each.optimizer.param_groups[0]["weight_decay"] = 0.01 * number
    assert engine.get_lr() == [LR / 8]
    assert same(engine, twin)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_backward_after_the_update_of_its_forward_is_an_error(stage, compiled):
    engine = begun(compiled, config=at_stage(stage))
    late = engine(batch(0)).pow(2).mean()
    step(engine, 1)
    if compiled:
        assert "Call backward before step()" in error_of(lambda: engine.backward(late))
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            engine.backward(late)
    assert "zero_grad() to drop them" in error_of(engine.step)
    engine.zero_grad()
    twin = begun(compiled, config=at_stage(stage))
    for each, numbers in ((engine, (2,)), (twin, (1, 2))):
        for number in numbers:
            step(each, number)
    assert same(engine, twin), "nothing of the late backward is left"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_other_storage_is_an_error_at_every_stage(stage, compiled):
    engine = begun(compiled, config=at_stage(stage))
    step(engine)
    weight = engine.module[0].weight
    with GatheredParameters(engine, weight):
        weight.data = weight.data.clone()
    assert "0.weight was given other storage" in error_of(lambda: step(engine, 1))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_what_is_written_without_a_modifier_is_named(stage):
    engine = start(config=at_stage(stage))
    weight = engine.module[0].weight

    def write():
        with GatheredParameters(engine, engine.parameters()), torch.no_grad():
            weight.fill_(0.5)

    assert "0.weight was written to without a modifier_rank" in error_of(write)
    with GatheredParameters(engine, [weight], modifier_rank=0), torch.no_grad():
        weight.fill_(0.25)
    assert (engine.state_dict(fp32=True)["0.weight"] == 0.25).all()


@pytest.mark.parametrize("kind", [{}, BF16])
@pytest.mark.parametrize("compiled", [False, True])
def test_clipped_weights_stay_clipped(compiled, kind):
    """Small parameters have their memory between steps; a master copy follows what is written."""
    engine = begun(compiled, Typed(), config=config(**kind))
    small_ones = [p for p in engine.parameters() if p.numel() < 100]
    assert len(small_ones) == 4
    for number in range(5):
        step(engine, number)
        with torch.no_grad():
            for parameter in small_ones:
                parameter.clamp_(-0.001, 0.001)
    step(engine, 5)
    state = engine.state_dict(fp32=True)
    assert max(v.abs().max() for v in state.values() if v.numel() < 100) < 0.001 + 1.2 * LR


def test_a_step_or_a_modifier_inside_is_no_write():
    engine, twin = start(config=at_stage(1)), start(config=at_stage(1))
    weight = engine.module[0].weight
    with GatheredParameters(engine, engine.parameters()):
        step(engine)
        with GatheredParameters(engine, weight, modifier_rank=0), torch.no_grad():
            weight.mul_(0.5)
    step(twin)
    assert torch.equal(
        engine.state_dict(fp32=True)["0.weight"], twin.state_dict(fp32=True)["0.weight"] * 0.5
    )


@pytest.mark.parametrize("kind", [{}, BF16])
def test_writes_hold_where_updates_come_in_the_backward(kind):
    early = config(compile={"early_updates": True, "region_bytes": 1}, **kind)
    engine, twin = start(Typed(), config=early), start(Typed(), config=config(**kind))
    whole_step = ["zero3_compile", update_early, "coalesce"]
    engine.compile(backend="eager", schedule=[(0, ["zero3_compile"]), (1, whole_step)])
    twin.compile(backend="eager")
    for number in range(6):
        for each in (engine, twin):
            step(each, number)
            with torch.no_grad():
                each.module[0].bias.clamp_(-0.001, 0.001)
    assert same(engine, twin)


def test_values_written_between_steps_are_saved(tmp_path):
    engine, other = (start(Typed(seed), config=config(**BF16)) for seed in (0, 5))
    step(engine)
    with torch.no_grad():
        engine.module[0].bias.fill_(0.5)
    engine.save_checkpoint(tmp_path)
    other.load_checkpoint(tmp_path)
    assert (other.state_dict(fp32=True)["0.bias"] == 0.5).all()


def test_a_group_added_to_the_optimizer_given_is_an_error():
    model = small()
    source = torch.optim.AdamW(model.parameters(), lr=LR)
    engine = start(model, config=config(optimizer=None), optimizer=source)
    step(engine)
    source.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert "parameter group 1: was added after initialize()" in error_of(lambda: step(engine))


def test_what_a_group_asks_for_later_is_refused_too():
    engine = start()
    engine.optimizer.param_groups[0]["maximize"] = True
    assert "maximize=True) is not supported" in error_of(lambda: step(engine)).replace(":", "")


def test_half_without_a_loss_scale_says_so():
    with pytest.warns(ConfigWarning, match="fp16: is not enabled, and parameters such as"):
        start(small().half())
