# SPDX-License-Identifier: Apache-2.0
"""The newest plan of a run, for its report and for Engine.write_plan: the whole step as one
program with the reasons, what the budget took, what the next best would have cost."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _core, agreement
from .errors import UserError
from .links import builtin_text, machine_for
from .report.other_choices import by_kind, others_of, without_reasons

if TYPE_CHECKING:
    from .engine import Engine
    from .planning import Planner

UNLIMITED = 1 << 50
"""Bytes."""
NAMED = 2
"""Parameters or regions that a fact names before it only counts."""


def agreed_program(planner: Planner) -> Any:
    """The step that was planned last, with its reasons and the region times it was planned by.
    None without a plan of this run's, on other ranks than the first too."""
    agreed = planner.agreed
    if agreed is None or not planner.step_programs:
        return None
    texts = [agreed.programs.get(_core.skeleton(graph)) for graph in planner.step_programs]
    if None in texts:  # the newest planning failed, and an earlier plan holds
        return None
    parse = _core.StepProgram.parse
    program = _core.merge_steps("step", [parse(text) for text in texts], parse(agreed.update))
    return with_reasons(program, agreed.reasons)


def with_reasons(program: Any, reasons: list[tuple[str, str, str]]) -> Any:
    """A copy whose reasons are these, as far as they are about something in it."""
    found = without_reasons(program)
    known = {"", *(p.name for p in found.params), *(r.name for r in found.regions)}
    for reason in reasons:
        if reason[1] in known:
            found.because(*reason)
    return found


def unlimited_plan(planner: Planner) -> tuple[Any, Any] | None:
    """The newest plan's step planned again without a budget, and its simulation; None if there is
    no agreed plan of this run's, or no plan."""
    if planner.request is None or planner.agreed is None:
        return None
    # Not None: a pass that fills a budget asks for one.
    request = dataclasses.replace(planner.request, budget=UNLIMITED, held=None)
    try:
        merged = _core.merge_steps("step", planner.step_programs, planner.plain_update())
        agreement.run_passes(merged, request)
        return merged, _core.simulate(merged, request.machine, request.costs)
    except UserError:
        return None


GIVEN_UP = {
    "releases": "{} gathered again that would stay whole",
    "runs": "{} run again in the backward",
    "values": "{} kept on the host until the backward",
    "states": "optimizer states of {} on the host",
}
OBJECTS = {"releases": "parameter", "runs": "region", "values": "activation", "states": "parameter"}
KINDS = {"release": "releases", "run": "runs", "offload": "values", "offload_states": "states"}
"""Instruction to what it is counted as; what is not released is gathered again for nothing."""


def _objects(program: Any) -> dict[str, list[str]]:
    """What a plan pays time for, to need less memory: kind of choice to what it does that with."""
    found: dict[str, list[str]] = {kind: [] for kind in GIVEN_UP}
    for section in program.sections:
        for instr in section.instrs:
            if instr.op in KINDS:
                found[KINDS[instr.op]].append(instr.operand)
    return found


def given_up(program: Any, free: Any) -> list[str]:
    """What a plan does for its budget that the plan without one does not, in words."""
    mine, theirs = _objects(program), _objects(free)
    lines = []
    for kind, text in GIVEN_UP.items():
        names = list(Counter(mine[kind]) - Counter(theirs[kind]))
        if names:
            listed = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
            count = f"{len(names)} {OBJECTS[kind]}{'s' * (len(names) != 1)}"
            lines.append(f"{text.format(count)} ({listed})")
    return lines


def _ms(nanos: int) -> str:
    return f"{nanos / 1e6:,.2f} ms"


def _budget_fact(planner: Planner) -> str | None:
    """What the budget took, and what that costs."""
    free, program = unlimited_plan(planner), agreed_program(planner)
    if free is None or program is None or planner.agreed.predicted_ns is None:
        return None
    other, simulated = free
    lost = planner.agreed.predicted_ns - simulated.time_ns
    what = "; ".join(given_up(program, other))
    if lost <= 0:
        return "no time" + (f": {what}" if what else "")
    against = f"{_ms(simulated.time_ns)} with a peak of {_core.pretty_bytes(simulated.peak_bytes)}"
    return f"{_ms(lost)} a step, against {against}: {what or 'transfers run later'}"


def plan_facts(engine: Engine) -> dict[str, str]:
    """What the newest plan is, what its budget was, and what that cost."""
    planner, counts, size = engine.planner, engine.compile_report(), _core.pretty_bytes
    agreed = planner.agreed
    if agreed is None:
        return {"Plan": f"each graph by itself: {planner.stage_pass}"}
    facts = {
        "Plan": f"{', '.join(agreed.entry)} for the whole step",
        "Planning": f"{agreed.seconds:.3f} s on rank 0; {counts['plans']} plans, "
        f"{counts['plan_seconds']:.3f} s, {counts['recompilations']} recompilations",
    }
    chosen = [t for _, what, t in agreed.reasons if not what and t.startswith("chosen: ")]
    if chosen:
        facts["Chosen"] = chosen[0].removeprefix("chosen: ")
    if agreed.predicted_ns is not None:
        facts["Planned step"] = f"{_ms(agreed.predicted_ns)}, peak {size(agreed.predicted_peak)}"
    if agreed.budget is not None:
        facts["Memory budget"] = size(agreed.budget)
        lost = _budget_fact(planner)
        if lost is not None:
            facts["Given up for the budget"] = lost
    if counts["budgets_lowered"] or counts["memory_relieved"]:
        facts["Memory ran out"] = (
            f"{counts['memory_relieved']} evictions on this rank, budget lowered "
            f"{counts['budgets_lowered']} times"
        )
    return facts


def next_best(engine: Engine, program: Any, machine: Any) -> list[dict[str, str]]:
    """Rows of the page: what other choices would have cost; none for a step that cannot be planned
    as a whole."""
    planner = engine.planner
    budget = None if planner.agreed is None else planner.agreed.budget
    early = engine.config.compile.early_updates
    try:
        return by_kind(others_of(program, machine, budget, planner.costs, early))
    except UserError:
        return []


def _machine_json(engine: Engine) -> dict[str, Any]:
    """machine_for's machine, as JSON that describes it whole."""
    machine, named = machine_for(engine.config, engine.ranks), engine.config.compile.machine
    if named is None or named in _core.Machine.builtin_names():
        text = builtin_text(named or machine.name)
    else:
        text = Path(named).read_text(encoding="utf-8")
    size = {"nodes": machine.nodes, "ranks_per_node": machine.ranks_per_node}
    return json.loads(text) | size


def write_plan(engine: Engine, path: Path, program: Any) -> Path:
    """The program's text, and beside it what `deepcompile explain` needs to price it."""
    planner = engine.planner
    run = {
        "machine": _machine_json(engine),
        "costs": None if planner.costs is None else json.loads(planner.costs.serialize()),
        "memory_budget": None if planner.agreed is None else planner.agreed.budget,
        "early_updates": engine.config.compile.early_updates,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(program), encoding="utf-8")
    path.with_suffix(".run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    return path
