# SPDX-License-Identifier: Apache-2.0
"""fp16: how the factor on the loss follows the gradients, and what an engine says of it."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import deepcompile
from deepcompile.config import Fp16Config, load_config
from deepcompile.errors import UserError
from deepcompile.loss_scale import LossScale

FP16 = {"enabled": True, "initial_scale_power": 4, "hysteresis": 1, "loss_scale_window": 2}


def scales(skipped: str, **numbers) -> list[float]:
    """The factor after each step; x is one without finite gradients."""
    scale = LossScale(Fp16Config(enabled=True, **numbers))
    found = []
    for step, what in enumerate(skipped):
        scale.follow(what == "x", step, 1)
        found.append(scale.value)
    return found


@pytest.mark.parametrize(
    ("steps", "numbers", "expected"),
    [
        # DeepSpeed's rule: doubled after a window of finite steps, which begins at each skip.
        ("....x..x", {"loss_scale_window": 2, "hysteresis": 1}, [4, 8, 8, 16, 8, 8, 16, 8]),
        # Halved at the second skip, then at each, until it was doubled.
        ("x.x.x..x.x", {"loss_scale_window": 2, "hysteresis": 2},
         [4, 4, 2, 2, 1, 1, 2, 2, 2, 1]),
        # Two in a row.
        ("x.x.xx..", {"loss_scale_window": 3, "hysteresis": 2, "consecutive_hysteresis": True},
         [4, 4, 4, 4, 4, 2, 2, 2]),
        ("x.x..", {"loss_scale": 3.0}, [3, 3, 3, 3, 3]),
    ],
)  # fmt: skip
def test_the_factor_follows_the_gradients(steps, numbers, expected):
    assert scales(steps, initial_scale_power=2, **numbers) == expected


def test_gradients_that_are_never_finite_are_an_error():
    with pytest.raises(UserError, match="step 2: .* smallest loss scale, 0.5: .* diverged"):
        scales("xxx", initial_scale_power=1, hysteresis=1, min_loss_scale=0.5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"bf16": {"enabled": True}}, "fp16: is enabled beside bf16"),
        ({"compile": {"early_updates": True}}, "compile.early_updates: a step in fp16"),
        ({"fp16": {**FP16, "auto_cast": True}}, "fp16.auto_cast: True is not supported"),
        ({"fp16": {**FP16, "hysteresis": 0}}, "fp16.hysteresis: must be at least 1"),
        ({"fp16": {**FP16, "loss_scal": 8}}, 'did you mean "loss_scale"'),
    ],
)
def test_what_does_not_go_together_is_refused(more, words):
    with pytest.raises(UserError, match=words):
        load_config({"fp16": FP16, **more})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 1)

    def forward(self, x):
        return {"loss": self.two(self.one(x).relu()).float().square().mean()}


def made(stage: int = 3, compiled: bool = True, **fp16):
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "fp16": {**FP16, **fp16},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}},
    }
    engine, *_ = deepcompile.initialize(model=Net(), config=config)
    if compiled:
        engine.compile(backend="eager")
    return engine


def batch(step: int) -> torch.Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).half()
    return x * float("inf") if step == 2 else x


def train(engine, first: int, last: int) -> None:
    for step in range(first, last):
        engine.backward(engine(batch(step))["loss"])
        engine.step()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_is_left_out_changes_nothing_and_says_so(compiled, caplog):
    engine = made(compiled=compiled)
    assert engine.fp16_enabled() and not engine.bfloat16_enabled() and engine.loss_scale() == 16
    assert engine.state_dict()["one.weight"].dtype == torch.float16
    train(engine, 0, 2)
    assert engine.was_step_applied() and engine.loss_scale() == 32
    before, rate = copy.deepcopy(engine.state_dict(fp32=True)), engine.get_lr()
    with caplog.at_level(logging.WARNING, "deepcompile"):
        train(engine, 2, 3)
    assert "step 3 is left out on all ranks" in caplog.text and "32; the next is 16" in caplog.text
    assert not engine.was_step_applied() and engine.skipped_steps == 1
    assert engine.global_steps == 3 and engine.get_lr() == rate
    after = engine.state_dict(fp32=True)
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(engine, 3, 6)
    assert engine.was_step_applied() and engine.loss_scale() == 32
    assert not torch.equal(engine.state_dict(fp32=True)["one.weight"], before["one.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_each_stage_trains_the_same_bits(stage):
    one, other = made(stage), made(3)
    for engine in (one, other):
        train(engine, 0, 6)
    theirs = other.state_dict(fp32=True)
    assert all(torch.equal(v, theirs[k]) for k, v in one.state_dict(fp32=True).items())


def test_a_checkpoint_keeps_the_factor(tmp_path):
    whole, first, second = made(), made(), made(initial_scale_power=9)
    train(whole, 0, 7)
    train(first, 0, 4)
    first.save_checkpoint(tmp_path)
    second.load_checkpoint(tmp_path)
    assert second.loss_scale() == first.loss_scale() and second.skipped_steps == 1
    train(second, 4, 7)
    assert second.loss_scale() == whole.loss_scale()
    expected = whole.state_dict(fp32=True)
    assert all(torch.equal(v, expected[k]) for k, v in second.state_dict(fp32=True).items())
    fixed = made(loss_scale=8.0)
    fixed.load_checkpoint(tmp_path)
    assert fixed.loss_scale() == 8


def test_gradients_of_another_scale_are_not_taken():
    one, other = made(compiled=False), made(compiled=False, initial_scale_power=6)
    one.backward(one(batch(0))["loss"] + other(batch(0))["loss"])
    one.step()
    with pytest.raises(UserError, match="another engine's backward, whose loss scale is 16"):
        other.step()
    other.zero_grad()
    train(other, 1, 2)
    assert other.was_step_applied()
