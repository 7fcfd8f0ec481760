# SPDX-License-Identifier: Apache-2.0
"""Budgets after memory ran out, with a planner and a runtime that are told what happens."""

from __future__ import annotations

import pytest
import torch

from deepcompile.distributed import Ranks
from deepcompile.relief import CLEAN_STEPS, Relief

RANKS = Ranks(0, 1, torch.device("cpu"))


class FakeRuntime:
    """As the runtime on one rank: shared() is the last share but one."""

    def __init__(self):
        self.flags, self.next_bytes = [0, 0], 0

    def relieved(self):
        moved, self.next_bytes = self.next_bytes, 0
        return {"times": int(moved > 0), "states_bytes": moved, "values_bytes": 0}

    def share(self, flag):
        self.flags.append(flag)

    def shared(self):
        return self.flags[-2]


class FakePlan(str):
    predicted_peak = 0
    """Unknown, so a lower budget starts from the one there was."""


class FakePlanner:
    budget_limit, profile, agreed, now = None, None, None, None

    def room(self):
        return self.now

    def __init__(self, budget=1000, least=0, measured=True):
        self.budget, self.least, self.measured = budget, least, measured
        self.calls = []

    def agree_budget(self):
        return self.budget

    def measured_entry(self):
        return self.measured or None

    def profile_without_trace(self, step):
        return "guess"

    def plan_now(self, step, why):
        if self.profile is None:
            self.profile = self.profile_without_trace(step)
        return self.plan_whole(step, why)

    def plan_whole(self, step, why):
        fits = self.budget_limit >= self.least
        self.calls.append(("plan", step, self.budget_limit, fits))
        if fits:
            self.budget, self.agreed = self.budget_limit, FakePlan("planned")
        return fits

    def adopt_again(self, agreed, step):
        self.calls.append(("again", step, agreed))

    def by_itself(self, step, why):
        self.calls.append(("stage", step))


def run(planner, moved: dict[int, int], steps: int) -> Relief:
    """`moved`: step to the bytes moved in it."""
    runtime = FakeRuntime()
    relief = Relief(planner, runtime, RANKS)
    for step in range(1, steps + 1):
        runtime.next_bytes = moved.get(step, 0)
        relief.end_step(step)
    return relief


def test_nothing_happens_while_nothing_is_moved():
    planner = FakePlanner()
    assert run(planner, {}, 10).lowered == 0 and planner.calls == []


@pytest.mark.parametrize(
    ("moved", "expected"),
    [(300, 700), (10, 900), (5000, 900)],  # what was moved; a tenth at least; never below zero
)
def test_the_budget_is_lowered_one_step_later_and_planned_again(moved, expected):
    planner = FakePlanner()
    with pytest.warns(UserWarning, match=f"{moved:,} bytes were moved.*from 1,000 to {expected:,}"):
        relief = run(planner, {4: moved}, 8)
    assert planner.calls == [("plan", 5, expected, True)]
    assert planner.profile == "guess" and relief.lowered == relief.times == 1


@pytest.mark.parametrize(
    ("now", "agreed", "expected"),
    [(640, "made for the budget", 640), (3000, "made for the budget", 900), (640, None, 640),
     (3000, None, 1000)],
)  # fmt: skip
def test_where_the_device_says_what_is_left_that_is_the_budget(now, agreed, expected):
    planner = FakePlanner()
    planner.now, planner.agreed = now, agreed and FakePlan(agreed)
    said = f"from 1,000 to {expected:,}" if expected < 1000 else "stays at 1,000"
    with pytest.warns(UserWarning, match=said):
        assert run(planner, {4: 990}, 8).lowered == (expected < 1000)
    assert planner.calls == [("plan", 5, expected, True)]


def test_flags_of_steps_by_the_old_plan_do_not_count_twice():
    planner = FakePlanner()
    with pytest.warns(UserWarning):
        run(planner, {4: 100, 5: 100}, 9)
    assert [call[1] for call in planner.calls] == [5]
    planner = FakePlanner()
    with pytest.warns(UserWarning):
        run(planner, {4: 100, 7: 100}, 9)
    assert [call[1] for call in planner.calls] == [5, 8]


def test_flags_of_steps_before_a_new_plan_say_nothing_of_it():
    planner, runtime = FakePlanner(), FakeRuntime()
    relief = Relief(planner, runtime, RANKS)
    for step in range(1, 8):
        runtime.next_bytes = 100 if step in (3, 4) else 0
        if step == 4:
            planner.agreed = FakePlan("made from a profile, at the end of step 4")
        relief.end_step(step)
    assert planner.calls == [] and relief.times == 2


def test_without_a_plan_that_fits_the_last_good_one_is_used():
    planner = FakePlanner(least=2000)
    planner.agreed = FakePlan("good")
    runtime = FakeRuntime()
    relief = Relief(planner, runtime, RANKS)
    for step in range(1, CLEAN_STEPS + 2):
        relief.end_step(step)
    planner.agreed = FakePlan("newer")
    relief.end_step(9)  # at whose end it was made
    runtime.next_bytes = 100
    relief.end_step(10)
    with pytest.warns(UserWarning, match="the last plan that ran without help is used"):
        relief.end_step(11)
    assert planner.calls[-1] == ("again", 11, "good")


def test_without_any_the_stages_plan_is_used_and_no_more_is_tried():
    planner = FakePlanner(least=2000)
    planner.agreed = FakePlan("first")
    with pytest.warns(UserWarning, match="the stage's plan is used"):
        run(planner, {1: 100, 5: 100}, 8)
    assert planner.calls == [("plan", 2, 900, False), ("stage", 2)]


def test_a_schedule_that_heeds_no_budget_keeps_its_plan():
    planner = FakePlanner(measured=False)
    with pytest.warns(UserWarning, match="no pass that heeds a budget"):
        run(planner, {1: 100}, 4)
    assert planner.calls == []
