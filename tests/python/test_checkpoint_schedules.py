# SPDX-License-Identifier: Apache-2.0
"""Schedules whose state is of many types, and the order of training data, over a checkpoint."""

from __future__ import annotations

import collections
import functools

import numpy as np
import pytest
import torch
from test_engine import config, error_of, small, start, step

import deepcompile
from deepcompile.checkpoint_values import plain, restored, without_program

Lr = torch.optim.lr_scheduler


class Windowed(Lr.LRScheduler):
    """Its rates depend on a deque, an array and a set; it has functions and a model of its own."""

    def __init__(self, optimizer, **others):
        self.table = np.linspace(1e-3, 2e-3, 7)
        self.window = collections.deque([0.0], maxlen=3)
        self.seen, self.fixed = set(), frozenset([2])
        self.scale = np.float32(0.5)
        self.rule, self.rules, self.model = (lambda x: x), [len], small()
        self.nested = {"keep": 1, "drop": max}
        self.__dict__.update(others)
        super().__init__(optimizer)

    def get_lr(self):
        self.window.append(float(self.last_epoch))
        self.seen.add(self.last_epoch)
        rate = float(self.table[len(self.seen) % 7] * self.scale) + sum(self.window) * 1e-5
        return [self.rule(rate) for _ in self.base_lrs]


SCHEDULES = {
    "windowed": Windowed,
    "lambda": lambda o: Lr.LambdaLR(o, lambda k: 1 / (k + 1)),
    "sequential": lambda o: Lr.SequentialLR(o, [Lr.LinearLR(o), Lr.CosineAnnealingLR(o, 20)], [3]),
    "ours in a sequence": lambda o: Lr.SequentialLR(o, [Windowed(o), Lr.ConstantLR(o)], [9]),
    "cyclic": lambda o: Lr.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False, step_size_up=3),
    "one cycle": lambda o: Lr.OneCycleLR(o, 1e-2, total_steps=30),
    "multi step": lambda o: Lr.MultiStepLR(o, [2, 6]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_go_on(tmp_path, name):
    first = start(lr_scheduler=SCHEDULES[name])
    for number in range(4):
        step(first, number)
    first.save_checkpoint(tmp_path)
    second = start(lr_scheduler=SCHEDULES[name])
    second.load_checkpoint(tmp_path)
    for number in range(4, 8):
        assert step(second, number) == step(first, number)
        assert second.get_lr() == first.get_lr()


def test_what_a_schedule_keeps_comes_back_as_it_was(tmp_path):
    first = start(lr_scheduler=Windowed)
    step(first)
    first.save_checkpoint(tmp_path)
    second = start(lr_scheduler=Windowed)
    own = second.lr_scheduler.rules
    second.load_checkpoint(tmp_path)
    mine, theirs = first.lr_scheduler, second.lr_scheduler
    assert theirs.window == mine.window and theirs.window.maxlen == 3
    assert theirs.seen == mine.seen and theirs.fixed == mine.fixed
    assert theirs.table.dtype == mine.table.dtype and np.array_equal(theirs.table, mine.table)
    theirs.table[0] = 1.0  # and can be written to
    assert theirs.rules is own and theirs.nested == {"keep": 1}


def test_a_schedules_state_that_cannot_be_kept_is_named_before_training():
    for value in (object(), range(3), np.array([None])):
        schedule = functools.partial(Windowed, odd={"x": value})
        said = error_of(lambda given=schedule: start(lr_scheduler=given))
        assert "[checkpoint] lr_scheduler.state_dict()['odd']['x']: an object of " in said


def test_values_come_back_from_what_is_kept():
    table = np.array([[1, 2]], dtype=">i4")
    value = {"a": [collections.deque([np.int8(1)]), (table,)], "b": {frozenset([1])}}
    again = restored(plain(value))
    assert again["a"][0] == collections.deque([1]) and again["a"][0].maxlen is None
    assert again["a"][1][0].dtype == table.dtype and np.array_equal(again["a"][1][0], table)
    assert again["b"] == {frozenset([1])}
    state = {"f": len, "n": {"g": [1, max], "k": 2}, "of each": [{"h": len, "k": 3}]}
    assert without_program(state) == {"n": {"k": 2}, "of each": [{"k": 3}]}


def test_training_data_goes_on_with_the_next_order(tmp_path):
    def begin():
        return deepcompile.initialize(model=small(), config=config(), training_data=list(range(16)))

    def order(loader) -> list[int]:
        return torch.cat(list(loader)).tolist()

    engine, _, loader, _ = begin()
    first, at = order(loader), iter(loader)
    second = [next(at)]
    step(engine)
    engine.save_checkpoint(tmp_path)  # amid the second
    second, third = torch.cat([*second, *at]).tolist(), order(loader)
    assert len({tuple(each) for each in (first, second, third)}) == 3
    engine, _, loader, _ = begin()
    engine.load_checkpoint(tmp_path)
    assert order(loader) == third
