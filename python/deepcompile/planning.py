# SPDX-License-Identifier: Apache-2.0
"""From captured graphs to plans that run.

The Planner is the capture's sink. It keeps each graph's compute-only program;
plans are made from these by the schedule's passes, frozen and loaded into the
runtime, and a new plan compiles nothing. An entry of the schedule that weighs
costs is planned by rank 0 for the whole step, from a profile, and taken over by
all ranks at the same step (agreement.py). Until then, and for entries that do
not, every graph is planned by itself as it is captured.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from . import _core, agreement, budget, links, plan_cache
from .agreement import Agreed
from .capture.program import update_program
from .config import Config
from .distributed import Ranks
from .embedding_rows import EmbeddingRows, simulator
from .errors import UserError
from .installed import Installed, Planned, same_code
from .params import ParamTable
from .profile import Profile, RegionCost, apply_costs, take_times
from .runner import PlanRunner, StepWatch, section_kinds
from .schedule import STAGE_PASS, Entry, check_schedule, default_schedule, entry_at
from .trace_costs import trace_costs

log = logging.getLogger("deepcompile")


def show_log() -> None:
    """compile.debug_log is seen, on stderr, also where the program sets up no logging."""
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
    if not log.isEnabledFor(logging.INFO):
        log.setLevel(logging.INFO)


class Planner:
    """Plans of one engine. `runtime` is that engine's."""

    def __init__(self, table: ParamTable, config: Config, ranks: Ranks, runtime: Any):
        self._table, self._config, self._ranks, self._runtime = table, config, ranks, runtime
        self._passes: dict[str, Any] = {}
        self._runners: list[PlanRunner] = []
        if config.compile.debug_log:
            show_log()
        self.watch = StepWatch()
        self.rows = EmbeddingRows(table, config, ranks, runtime)
        self.graphs: list[Installed] = []
        self.stage_pass = STAGE_PASS[config.stage]
        self.schedule = check_schedule([(0, [self.stage_pass])], config.stage, {})
        self._entry = self.schedule[0]
        self._graph_passes: tuple[Any, ...] = self._entry.passes
        self.pending = False
        """Whether the entry that holds waits for a profile of a step."""
        self.agreed: Agreed | None = None
        self._agreed_programs: dict[str, Any] = {}
        self._look_again = False
        """Whether auto's plan is to be made once more, from a step that ran by it."""
        self._from_cache = False
        self._unknown: list[str] = []
        self.history: list[Planned] = []
        self.failures: list[str] = []
        self.recompilations = 0
        self.budget_limit: int | None = None
        """Most bytes for a plan, since memory ran out; None: it never did."""
        self.budget: int | None = None
        self.profile: Profile | None = None
        self.last_order: list[int] = []
        """Graphs of the step before, as StepWatch gives them."""
        self.request: agreement.Request | None = None
        """Of the newest plan, on rank 0; with `step_programs` it can be planned again."""
        self.step_programs: list[Any] = []
        self.costs: Any = None
        """_core.CostTable of what was measured, from the first planning on."""
        self._kept_regions: dict[str, list[int | None]] = {}
        self._job: dict[str, Any] | None = None
        self.update_program = self._build_update(self._entry.passes)
        self.update_plan_id = self._load(self.update_program, [])[0]

    # ---- the schedule

    def register(self, name: str, function: Callable[..., Any], contract: Any = None) -> None:
        """Make a pass known to schedules. `function(program, context)` edits the program."""
        if name in self._passes or name in _core.pass_names():
            raise UserError(f"[passes] {name}: a pass of that name exists; choose another name")
        if not callable(function):
            raise UserError(f"[passes] {name}: is not callable; give a function of the program")
        if contract is not None:
            try:
                function.contract = contract
            except AttributeError:
                raise UserError(
                    f"[passes] {name}: a {type(function).__name__} cannot hold a contract; give "
                    "a function"
                ) from None
        self._passes[name] = function

    def set_schedule(self, schedule: Sequence[Any] | str | None, now: int) -> None:
        """Check and adopt a schedule; None: the configuration's. `now`: steps taken."""
        given = self._config.compile.schedule if schedule is None else schedule
        checked = check_schedule(given, self._config.stage, self._passes)
        for entry in checked:
            if not entry.measured:
                self._build_update(entry.passes)  # fails here rather than at its step
        self.schedule = checked
        self.at_step(now)

    @property
    def _is_default(self) -> bool:
        default = default_schedule(self._config.stage)
        return [(e.step, list(e.passes)) for e in self.schedule] == default

    def at_step(self, step: int) -> bool:
        """Begin with the schedule's entry for `step`. True if that changed the plans."""
        entry = entry_at(self.schedule, step)
        if entry == self._entry or entry.step < self._entry.step:
            return False
        self._entry = entry
        self.pending = entry.measured
        if entry.measured:
            return False
        self.by_itself(step, ", ".join(entry.names()), entry.passes)
        return True

    def wants_profile(self, step: int) -> bool:
        """Whether the step that begins after `step` steps should be traced for a plan."""
        following = entry_at(self.schedule, step + 1)
        return self.pending or (following is not self._entry and following.measured)

    def end_step(self, step: int, profile: Profile | None) -> None:
        """After `step` steps: plan what the schedule asks for. Collective if it plans the whole
        step, which all ranks do after the same one."""
        self.rows.close()
        order = self.last_order = self.watch.end()
        if self._from_cache:
            self._confirm_cached(step)
        if profile is not None:
            profile.order = order
            if order:
                self.profile = profile
        self.at_step(step)
        if profile is None or not profile.order:
            return
        if self.pending:
            self._look_again = self.plan_whole(step) and "auto" in self._entry.names()
        elif self._look_again and profile.agreed is self.agreed is not None:
            # Transfers and kernels disturb each other more than the stage's plan showed.
            self._look_again = False
            self.plan_whole(step, f"profile of step {step}, by the plan itself")

    # ---- programs

    def _header(self, program: Any) -> Any:
        program.world = self._ranks.world
        program.accumulation = self._config.gradient_accumulation_steps
        program.clip = self._config.gradient_clipping > 0
        program.boundary = self._config.stage == 1 and program.accumulation > 1
        program.reduce_dtype = self._config.reduce_dtype
        return program

    def plain_update(self) -> Any:
        """The update program without instructions."""
        program = self._header(update_program(self._table))
        program.name = "update"
        return program

    def _build_update(self, passes: Sequence[Any]) -> Any:
        """The update section of all trainable params, with the passes applied."""
        program = self.plain_update()
        _core.run_passes(program, list(passes))
        agreement.check_complete(program, passes)
        return program

    def _load(self, program: Any, codes: list[Any]) -> tuple[int, str]:
        plan = _core.freeze(program)
        return self._runtime.load_plan(plan.serialize(), codes), plan.hash

    def install(self, captured: Any) -> PlanRunner:
        """The capture's sink: plan a graph and return what runs it."""
        plain = self._header(captured.program.copy())
        self._mark_rows(plain, captured)
        installed = Installed(captured, plain, _core.skeleton(plain))
        runner = PlanRunner(self._runtime, len(self.graphs), self.watch)
        self._plan(installed, runner)
        self.recompilations += any(same_code(captured, g.captured) for g in self.graphs)
        self.graphs.append(installed)
        self._runners.append(runner)
        return runner

    def _mark_rows(self, plain: Any, captured: Any) -> None:
        machine = links.machine_for(self._config, self._ranks)
        simulate = simulator(machine, self.plain_update(), self.stage_pass)
        self.rows.mark(plain, captured, simulate)

    def _program_for(self, installed: Installed) -> Any:
        """The graph with instructions, by the plan that holds."""
        if self.agreed is None:
            program = installed.plain.copy()
            _core.run_passes(program, list(self._graph_passes))
            agreement.check_complete(program, self._graph_passes)
            if self._ranks.world > 1 and installed.plan_id < 0 and not installed.captured.inference:
                where = installed.captured.user_stack
                alike = [g.program for g in self.graphs if g.captured.user_stack == where]
                agreement.warn_of_other_transfers(program, alike, where)
            return program
        agreed = self._agreed_programs.get(installed.skeleton)
        if agreed is not None:
            return _core.transplant(agreed, installed.plain)
        late = agreement.deferred(self.update_program)
        program = agreement.classical(installed.plain, self.stage_pass, late)
        captured = installed.captured
        if self._from_cache:
            self._unknown.append(f"graph {captured.graph_id} ({captured.user_stack})")
        elif self._ranks.world > 1 and not captured.inference:
            agreement.check_new_graph(
                program, self.agreed, self._ranks.rank, captured.graph_id, captured.user_stack,
                self.stage_pass,
            )  # fmt: skip
        return program

    def _plan(self, installed: Installed, runner: PlanRunner) -> None:
        start = time.perf_counter()
        program = self._program_for(installed)
        passed = time.perf_counter()
        plan_id, installed.plan_hash = self._load(program, installed.captured.codes)
        installed.plan_id, installed.program = plan_id, program
        installed.seconds = {"passes": passed - start, "load": time.perf_counter() - passed}
        runner.use(plan_id, section_kinds(program))
        if self._config.compile.debug_log:
            log.info("[planning] graph %s\n%s", installed.captured.graph_id, program)

    def _load_all(self, update: Any) -> None:
        """New plans for the update and for all graphs; the old ones go."""
        codes = len(self.graphs[0].captured.codes) if self.graphs else 0
        old = [self.update_plan_id, *(g.plan_id for g in self.graphs)]
        self.update_program = update
        self.watch.late = bool(agreement.deferred(update))
        self.update_plan_id = self._load(update, [])[0]
        for installed, runner in zip(self.graphs, self._runners, strict=True):
            self._plan(installed, runner)
        for plan_id in old:
            self._runtime.unload_plan(plan_id)
        if self.graphs:
            self.recompilations += len(self.graphs[0].captured.codes) - codes

    def by_itself(self, step: int, why: str, passes: Sequence[Any] | None = None) -> None:
        """Plan each graph by itself, by `passes` or the stage's; no agreement is needed."""
        self._graph_passes = tuple(passes or (self.stage_pass,))
        start = time.perf_counter()
        self.settle()
        self.agreed = None
        self._agreed_programs = {}
        self._load_all(self._build_update(self._graph_passes))
        self.history.append(Planned(step, None, why, time.perf_counter() - start))

    def settle(self) -> None:
        """Bring all parameters up to date; collective if a plan left updates to the next step."""
        if self.watch.late:
            self._runtime.settle()

    # ---- the whole step

    def plan_whole(self, step: int, why: str = "", may_stay: bool = True) -> bool:
        """Plan the step of the newest profile by the entry that holds; collective. False, with a
        warning, if there is no plan and the user asked neither for a schedule nor for a budget, or
        if `why` says that it is not the user's doing. `may_stay`: the plan that holds will do."""
        start = time.perf_counter()
        self._entry, self.pending = self.measured_entry() or self._entry, False
        try:
            agreed = self._make_agreed(self.agreed if may_stay else None)
        except UserError as error:
            asked = not self._is_default or self._config.compile.memory_budget is not None
            if asked and not why:
                raise
            self.failures.append(str(error))
            if self._ranks.rank == 0:
                warnings.warn(f"{error} The plan stays as it is.", stacklevel=2)
            return False
        if self.agreed is not None and agreed.instrs() == self.agreed.instrs():
            if self.profile.agreed is self.agreed:
                self.profile.agreed = agreed
            self.agreed = agreed  # what it is to cost may be known better
        else:
            self.adopt(agreed, step, why or f"profile of step {self.profile.step}", start)
        folder = self._config.compile.plan_cache
        if folder is not None and self._job is not None and self._ranks.rank == 0:
            plan_cache.write(folder, self._job, self._kept(agreed))
        return True

    def plan_now(self, step: int, why: str) -> bool:
        """Another plan, before a step was profiled too: by estimates, and again once one was."""
        guessed = self.profile is None
        if guessed:
            self.profile = self.profile_without_trace(step)
        done = self.plan_whole(step, why, may_stay=False)
        self._look_again = self._look_again or (guessed and done and "auto" in self._entry.names())
        return done

    def measured_entry(self) -> Entry | None:
        """The first entry, from the one that holds on, that plans by costs."""
        later = [e for e in self.schedule if e.measured and e.step >= self._entry.step]
        return later[0] if later else None

    def _make_agreed(self, held: Agreed | None) -> Agreed:
        """Rank 0's plan, on every rank, no worse than `held`; collective."""
        limit, costs = self.agree_budget(), self._measured_costs()
        timed = self._timed_programs()
        known = self._ranks.gather(sorted(timed))
        missing = set().union(*known) - set(known[0])
        if missing:  # graphs that rank 0 never met: their ranks know their times
            mine = {key: str(program) for key, program in timed.items() if key in missing}
            for texts in self._ranks.gather(mine)[::-1]:
                timed |= {key: _core.StepProgram.parse(text) for key, text in texts.items()}

        def work() -> Agreed | None:
            return self._plan_here(timed, costs, limit, held) if self._ranks.rank == 0 else None

        return self._ranks.from_first(self._ranks.together("[planning]", work))

    def _timed_programs(self) -> dict[str, Any]:
        """A compute-only program for each skeleton, with measured costs; of the profiled step if
        that has one."""
        found: dict[str, Any] = {}
        for installed in [*(self.graphs[k] for k in self.profile.order), *self.graphs]:
            if installed.skeleton not in found:
                found[installed.skeleton] = apply_costs(installed.plain, self.profile.costs)
        return found

    def _plan_here(self, timed: dict[str, Any], costs: Any, limit: int, held: Any) -> Agreed:
        """Rank 0's part: the whole step of its profile, then the graphs beside it."""
        machine = links.machine_for(self._config, self._ranks)
        for program in timed.values():
            _core.analytic_costs(program, machine)  # of regions that the step did not run
        order = dict.fromkeys(self.graphs[k].skeleton for k in self.profile.order)
        graphs = [timed.pop(key) for key in order]
        early = self._config.compile.early_updates
        self.request = agreement.Request(
            self._entry.passes, self.stage_pass, machine, costs, limit, early, held
        )
        self.step_programs = graphs
        return agreement.plan_step("step", graphs, timed, self.plain_update(), self.request)

    def _memory(self) -> budget.Memory:
        held = budget.held_bytes(self._runtime.buffer_report())
        return budget.measure(self._ranks, held, self._runtime.outside_bytes())

    def room(self) -> int | None:
        """Bytes that a plan can have now, less the reserve, on the rank that has least; collective.
        None on a CPU, whose memory may be limited by what does not show in it."""
        if self._ranks.device.type == "cpu":
            return None
        return min(self._ranks.gather(budget.room(self._config.compile, self._memory())))

    def agree_budget(self) -> int:
        """Bytes for a plan on the rank that has least; collective."""
        mine = budget.plan_budget(self._config.compile, self._memory(), self._ranks.device.type)
        least = min(self._ranks.gather(mine))
        if self.budget_limit is not None:
            least = min(least, self.budget_limit)
        self.budget = least
        return least

    def _measured_costs(self) -> Any:
        """What transfers, updates and the time between instructions take here; collective the
        first time."""
        if self.costs is None:
            self.costs = links.measure(self._runtime, self._ranks, self._memory().free)
        profile = self.profile
        if profile.records:
            machine = links.machine_for(self._config, self._ranks)
            slowdown = _core.compute_slowdown(profile.plans[-1][1], machine, self.costs)
            ends = self._ranks.device.type != "cpu"
            traced = trace_costs(profile.records, profile.plans, slowdown, ends)
            traced.put_into(self.costs)
            take_times(profile.costs, traced.runs)
        return self.costs

    def adopt(self, agreed: Agreed, step: int, why: str, start: float) -> None:
        """Let an agreed plan hold from here on; collective."""
        self.settle()
        self.agreed = agreed
        self._agreed_programs = {
            key: _core.StepProgram.parse(text) for key, text in agreed.programs.items()
        }
        update = _core.transplant(_core.StepProgram.parse(agreed.update), self.plain_update())
        self._ranks.together("[planning]", lambda: self._load_all(update))
        orders = {g.skeleton: agreement.order_of(g.program) for g in self.graphs}
        agreement.check_orders(orders | {"update": agreement.order_of(update)}, self._ranks)
        self.history.append(Planned(step, agreed, why, time.perf_counter() - start))
        if self._ranks.rank == 0:
            log.info("[planning] step %d: %s\n%s", step, why, "\n".join(agreed.log))

    def adopt_again(self, agreed: Agreed, step: int) -> None:
        """Go back to a plan that held before; collective."""
        self.adopt(agreed, step, "an earlier plan", time.perf_counter())

    # ---- plans of an earlier run

    def load_cached(self, backend: str) -> bool:
        """Take over what an earlier run of this job left in the plan cache; collective."""
        folder = self._config.compile.plan_cache
        if folder is None or self.measured_entry() is None:
            return False
        start = time.perf_counter()
        job = (self._table, self._config, self._ranks, self.schedule, backend)
        self._job, kept, entry = plan_cache.fetch(folder, self.agree_budget(), *job)
        if kept is None:
            return False
        self.costs = _core.CostTable.parse(kept.costs)
        self._kept_regions = kept.regions
        self.adopt(kept.agreed, 0, "plan cache", start)
        self._entry, self.pending, self._from_cache = entry, False, True
        return True

    def _kept(self, agreed: Agreed) -> plan_cache.Kept:
        keys = {r.code: r.key for g in self.graphs for r in g.captured.ir.regions}
        known = ((c, cost) for c, cost in self.profile.costs.items() if c in keys)
        regions = {keys[c]: [cost.time_ns, cost.workspace] for c, cost in known}
        return plan_cache.Kept(agreed, self.costs.serialize(), regions)

    def _confirm_cached(self, step: int) -> None:
        """After the first step by a cached plan: whether it fits what was captured; collective."""
        self._from_cache = False
        ran = (r for k in self.last_order for r in self.graphs[k].captured.ir.regions)
        other_shapes = any(r.key not in self._kept_regions for r in ran)
        found = self._ranks.gather((self._unknown, other_shapes))
        unknown = [name for names, _ in found for name in names]
        if not unknown:
            # Rank 0's, by which plans are made. The kept one is right for others too, but what it
            # takes and what it costs is not known: it holds until the next step was profiled.
            self.pending = found[0][1]
            return
        if self._ranks.rank == 0:
            warnings.warn(
                f"[plan_cache] the kept plan does not know {unknown[0]}: the model has changed. "
                "This run plans anew.",
                stacklevel=2,
            )
        self.begin_anew(step, "the kept plan did not fit")

    def begin_anew(self, step: int, why: str) -> None:
        """Back to the schedule's beginning, and to the stage's plan until a step was profiled."""
        self._entry = self.schedule[0]
        self.pending = self._entry.measured
        self.by_itself(step, why)

    def profile_without_trace(self, step: int) -> Profile:
        """What is known of the last step if none was traced."""
        codes = {r.key: r.code for g in self.graphs for r in g.captured.ir.regions}
        kept = self._kept_regions.items()
        costs = {codes[key]: RegionCost(*each) for key, each in kept if key in codes}
        return Profile(step, [], [], self.last_order, costs)

    def check_ranks(self) -> None:
        """Compare the collectives of all plans between ranks; collective.

        Ranks whose collectives differ would hang sooner or later. Called once,
        before the first compiled step's update, where all ranks meet anyway.
        """
        orders = {"\n".join(_core.collective_order(i.program)) for i in self.graphs}
        mine = sorted(orders)
        schedule = [(entry.step, entry.names()) for entry in self.schedule]
        for rank, (theirs, other) in enumerate(self._ranks.gather((mine, schedule))):
            if other != schedule:
                raise UserError(
                    f"[planning] rank {rank}'s schedule is {other}, rank {self._ranks.rank}'s "
                    f"{schedule}: give engine.compile() the same on all ranks."
                )
            if theirs != mine:
                raise UserError(
                    f"[planning] rank {rank}'s transfers differ from rank {self._ranks.rank}'s: "
                    "the model takes different paths on different ranks, or a pass of the schedule "
                    "edits by more than the program. Make both depend on what all ranks share."
                )
