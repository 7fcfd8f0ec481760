# SPDX-License-Identifier: Apache-2.0
"""When memory runs out: a smaller budget and a new plan, on all ranks at the same step.

A rank whose device is full moves states, values and parameters to the host by itself,
in the middle of a step, and goes on (the runtime's part). That is slow, so each
step's end tells the others, without waiting for them; two steps later all ranks
know, and plan again with less. If there is no such plan, they take the last one
that ran without help, or the stage's.
"""

from __future__ import annotations

import warnings
from typing import Any

from .agreement import Agreed
from .distributed import Ranks
from .planning import Planner

SMALLEST_CUT = 0.1
"""Least part of the budget that is taken off."""
CLEAN_STEPS = 3
"""Steps without help after which a plan is known to fit."""


class Relief:
    """Watches one engine's runtime for emergency evictions."""

    def __init__(self, planner: Planner, runtime: Any, ranks: Ranks):
        self._planner, self._runtime, self._ranks = planner, runtime, ranks
        self._bytes = 0
        self._clean = 0
        self._skip = 0
        self._watched: Agreed | None = None
        self._good: Agreed | None = None
        self._gave_up = False
        self._begun = False
        self.times = 0
        """Evictions on this rank."""
        self.lowered = 0
        """Budgets lowered, on all ranks."""

    def end_step(self, step: int) -> None:
        """Exchange this step's flag, and act on the last but one's; collective, but waits for no
        rank unless there is something to do."""
        said = self._runtime.relieved()
        self.times += said["times"]
        self._bytes += sum(moved for kind, moved in said.items() if kind != "times")
        self._runtime.share(1 if said["times"] else 0)
        relieved = self._runtime.shared()
        if self._planner.agreed is not self._watched:
            # The flags of two steps are the old plan's; the first step has none before it.
            self._skip = 2 if self._begun else 0
            self._watched, self._clean = self._planner.agreed, 0
        self._begun = True
        if self._skip:  # of a step that ran by the plan before
            self._skip -= 1
        elif relieved:
            self._clean = 0
            self._lower(step)
        else:
            self._clean += 1
            if self._clean >= CLEAN_STEPS:
                self._good = self._planner.agreed

    def _lower(self, step: int) -> None:
        planner = self._planner
        moved = max(self._ranks.gather(self._bytes))
        self._bytes, self._skip = 0, 1
        if self._gave_up:
            return
        before = planner.budget or planner.agree_budget()
        if planner.agreed is not None and planner.agreed.predicted_peak:
            before = min(before, planner.agreed.predicted_peak)  # what was too much
        least, room = int(before * (1 - SMALLEST_CUT)), planner.room()
        if room is None:
            room = before - moved if moved < before else least
        elif planner.agreed is None:
            least = before  # no plan has tried it: the stage's heeds no budget
        limit = planner.budget_limit = min(least, room)
        self.lowered += limit < before
        if self._ranks.rank == 0:
            now = (
                f"is lowered from {before:,} to {limit:,}"
                if limit < before
                else f"stays at {limit:,}"
            )
            warnings.warn(
                f"[planning] step {step}: a rank's memory ran out, and {moved:,} bytes were moved "
                f"to the host to go on. The budget for plans {now} bytes.",
                stacklevel=2,
            )
        if planner.measured_entry() is None:
            self._gave_up = True
            self._say("the schedule has no pass that heeds a budget, so the plan stays")
            return
        if not planner.plan_now(step, "memory ran out"):
            self._gave_up = True
            self._fall_back(step)
        self._watched = planner.agreed

    def _fall_back(self, step: int) -> None:
        planner = self._planner
        if self._good is not None and self._good is not planner.agreed:
            planner.adopt_again(self._good, step)
            self._say("no plan fits it; the last plan that ran without help is used")
        elif planner.agreed is not None:
            planner.by_itself(step, "memory ran out")
            self._say("no plan fits it; the stage's plan is used")
        else:
            self._say("no plan fits it; the stage's plan stays")

    def _say(self, what: str) -> None:
        if self._ranks.rank == 0:
            warnings.warn(f"[planning] after memory ran out: {what}.", stacklevel=3)
