# SPDX-License-Identifier: Apache-2.0
"""From captured graphs to plans that run.

The Planner is the capture's sink. It keeps each graph's compute-only program,
runs the schedule's passes on a copy, freezes the result and loads it into the
runtime. A later entry of the schedule makes new plans from the same programs:
nothing is compiled again.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import _core
from .capture.program import update_program
from .config import Config
from .distributed import Ranks
from .errors import UserError
from .params import ParamTable

log = logging.getLogger("deepcompile")

STAGE_PASS = {0: "zero0_compile", 3: "zero3_compile"}
PLANNED_ONLY = ("prefetch", "selective_gather")
"""Passes that plan a step on paper, with a machine and a memory budget; the engine has neither."""


def default_schedule(stage: int) -> list[tuple[int, list[Any]]]:
    """[(first step, passes)] of a stage."""
    return [(0, [STAGE_PASS[stage]])]


@dataclass
class Installed:
    """One captured graph and the plans made from it so far."""

    captured: Any
    plain: Any
    """The compute-only program."""
    program: Any = None
    """With instructions, as the newest plan has them."""
    plan_id: int = -1
    plan_hash: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Passes, and freezing and loading."""


class PlanRunner:
    """Runs one captured graph's sections by its newest plan; a backward runs by the plan that
    its forward ran by."""

    def __init__(self, runtime: Any):
        self._runtime = runtime
        self._plan_id = -1
        self._sections: dict[str, int] = {}
        self._since = [0]
        self._plans: list[int] = []
        self.newest_call = 0

    def use(self, plan_id: int, sections: dict[str, int]) -> None:
        """From the next call on, run `plan_id`; `sections` maps kind to index in it."""
        self._plan_id, self._sections = plan_id, sections
        if self._plans:
            self._since.append(self.newest_call + 1)
        self._plans.append(plan_id)

    def forward(self, inputs: list) -> tuple[Any, Sequence[Any]]:
        call_id, token = self._runtime.new_call(self._plan_id)
        self.newest_call = call_id
        return token, self._runtime.run(self._plan_id, self._sections["forward"], call_id, inputs)

    def backward(self, call_id: int, inputs: list) -> Sequence[Any]:
        plan = self._plan_id
        if len(self._plans) > 1:
            plan = self._plans[bisect.bisect_right(self._since, call_id) - 1]
        return self._runtime.run(plan, self._sections["backward"], call_id, inputs)

    def inference(self, inputs: list) -> Sequence[Any]:
        return self._runtime.run(self._plan_id, self._sections["inference"], -1, inputs)


def section_kinds(program: Any) -> dict[str, int]:
    """Section kind to index in a program of one graph."""
    return {section.kind: index for index, section in enumerate(program.sections)}


class Planner:
    """Plans of one engine. `runtime` is that engine's."""

    def __init__(self, table: ParamTable, config: Config, ranks: Ranks, runtime: Any):
        self._table = table
        self._config = config
        self._ranks = ranks
        self._runtime = runtime
        self._passes: dict[str, Any] = {}
        self._runners: list[PlanRunner] = []
        self.graphs: list[Installed] = []
        self.schedule = default_schedule(config.stage)
        self._entry = self.schedule[0]
        self.update_program = self._build_update(self._entry[1])
        self.update_plan_id = self._load(self.update_program, [])[0]

    def register(self, name: str, function: Callable[..., Any], contract: Any = None) -> None:
        """Make a pass known to schedules. `function(program, context)` edits the program."""
        if name in self._passes or name in _core.pass_names():
            raise UserError(f"[passes] {name}: a pass of that name exists; choose another name")
        if not callable(function):
            raise UserError(f"[passes] {name}: is not callable; give a function of the program")
        if contract is not None:
            function.contract = contract
        self._passes[name] = function

    def set_schedule(self, schedule: Sequence[tuple[int, Sequence[Any]]] | None, now: int) -> None:
        """Check and adopt a schedule. `now` is the number of steps taken."""
        if schedule is None:
            schedule = default_schedule(self._config.stage)
        self.schedule = self._checked(schedule)
        for _, passes in self.schedule:
            self._build_update(passes)  # checks the passes' contracts before anything runs
        self.at_step(now)

    def _checked(self, schedule: Sequence[Any]) -> list[tuple[int, list[Any]]]:
        known = [n for n in [*_core.pass_names(), *self._passes] if n not in PLANNED_ONLY]
        checked: list[tuple[int, list[Any]]] = []
        for entry in schedule:
            try:
                step, names = entry
                step, names = int(step), list(names)
            except (TypeError, ValueError):
                raise UserError(f"[passes] schedule: {entry!r} is not (step, [passes])") from None
            for name in names:
                if name in PLANNED_ONLY:
                    raise UserError(
                        f"[passes] schedule: the engine cannot run {name!r} yet; remove it here, "
                        "and see what it would do with `deepcompile plan --passes`"
                    )
                if not callable(name) and name not in known:
                    raise UserError(
                        f"[passes] schedule: no pass named {name!r}; known are {', '.join(known)}"
                    )
            checked.append((step, names))
        steps = [step for step, _ in checked]
        if not steps or steps != sorted(set(steps)) or steps[0] != 0:
            raise UserError(
                f"[passes] schedule: steps are {steps}; they must begin at 0 and increase"
            )
        return checked

    def at_step(self, step: int) -> bool:
        """Adopt the newest schedule entry whose step is not after `step`. True if that
        changed the plans."""
        entry = [e for e in self.schedule if e[0] <= step][-1]
        if entry == self._entry:
            return False
        self._entry = entry
        self.update_program = self._build_update(entry[1])
        self.update_plan_id = self._load(self.update_program, [])[0]
        for installed, runner in zip(self.graphs, self._runners, strict=True):
            self._plan(installed, runner)
        return True

    def _header(self, program: Any) -> Any:
        program.world = self._ranks.world
        program.accumulation = self._config.gradient_accumulation_steps
        program.clip = self._config.gradient_clipping > 0
        program.reduce_dtype = self._config.reduce_dtype
        return program

    def _build_update(self, passes: Sequence[Any]) -> Any:
        """The update section of all trainable params, with the passes applied."""
        program = self._header(update_program(self._table))
        program.name = "update"
        self._run_passes(program, passes)
        return program

    def _run_passes(self, program: Any, passes: Sequence[Any]) -> None:
        _core.run_passes(program, [self._passes.get(p, p) if isinstance(p, str) else p
                                   for p in passes])  # fmt: skip
        program.verify()

    def _load(self, program: Any, codes: list[Any]) -> tuple[int, str]:
        plan = _core.freeze(program)
        return self._runtime.load_plan(plan.serialize(), codes), plan.hash

    def install(self, captured: Any) -> PlanRunner:
        """The capture's sink: plan a graph and return what runs it."""
        installed = Installed(captured, self._header(captured.program.copy()))
        runner = PlanRunner(self._runtime)
        self._plan(installed, runner)
        self.graphs.append(installed)
        self._runners.append(runner)
        return runner

    def _plan(self, installed: Installed, runner: PlanRunner) -> None:
        start = time.perf_counter()
        program = installed.plain.copy()
        self._run_passes(program, self._entry[1])
        passed = time.perf_counter()
        plan_id, installed.plan_hash = self._load(program, installed.captured.codes)
        installed.plan_id = plan_id
        installed.program = program
        installed.seconds = {"passes": passed - start, "load": time.perf_counter() - passed}
        runner.use(plan_id, section_kinds(program))
        if self._config.compile.debug_log:
            log.info("[planning] graph %s\n%s", installed.captured.graph_id, program)

    def check_ranks(self) -> None:
        """Compare the collectives of all plans between ranks; collective.

        Ranks whose collectives differ would hang sooner or later. Called once,
        at the end of the first compiled step, where all ranks meet anyway.
        """
        orders = {"\n".join(_core.collective_order(i.program)) for i in self.graphs}
        mine = sorted(orders)
        for rank, theirs in enumerate(self._ranks.gather(mine)):
            if theirs != mine:
                raise UserError(
                    f"[planning] rank {rank}'s transfers differ from rank {self._ranks.rank}'s: "
                    "the model takes different paths on different ranks. Make its control flow "
                    "depend on what all ranks share."
                )
