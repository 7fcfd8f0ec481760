# SPDX-License-Identifier: Apache-2.0
"""One plan for all ranks: made by rank 0 for the whole step, run graph by graph.

Ranks may have captured the model for different shapes. What they must share is
the order of their transfers, and that depends on a graph's skeleton alone, so
an agreed plan is a text for each skeleton; a rank takes over what fits its own
graph. Graphs outside the profiled step (evaluation, other paths) are planned
each with the update, and must fit the step's.
"""

from __future__ import annotations

import hashlib
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import _core
from .distributed import Ranks
from .errors import UserError
from .schedule import pass_name


@dataclass(frozen=True)
class Request:
    """What a plan is asked for."""

    passes: tuple[Any, ...]
    """Names and functions."""
    stage_pass: str
    """Of graphs that the passes cannot plan beside the step."""
    machine: Any = None
    """_core.Machine: for what was not measured."""
    costs: Any = None
    """_core.CostTable: what was."""
    budget: int | None = None
    """Bytes of one rank; None: no limit."""
    early_updates: bool = False
    held: Agreed | None = None
    """The plan that holds: `auto` does no worse than it where it is allowed by this request."""


@dataclass
class Agreed:
    """A plan as it travels: texts and numbers."""

    programs: dict[str, str]
    """Skeleton to the planned program of one graph."""
    update: str
    """The planned update program."""
    entry: list[str]
    """The passes, in words."""
    reasons: list[tuple[str, str, str]] = field(default_factory=list)
    """(pass, parameter or region of the whole step, text)."""
    log: list[str] = field(default_factory=list)
    """A line a pass."""
    budget: int | None = None
    predicted_ns: int | None = None
    """Simulated step; None if the planner had no machine."""
    predicted_peak: int | None = None
    seconds: float = 0.0
    """Planning on rank 0."""

    def instrs(self) -> dict[str, list[list[str]]]:
        """Skeleton to the instructions of each section; the update's under its name."""
        texts = self.programs | {"update": self.update}
        return {
            key: [
                [f"{i.op} {i.operand} {i.values}" for i in section.instrs]
                for section in _core.StepProgram.parse(t).sections
            ]
            for key, t in texts.items()
        }

    def orders(self) -> dict[str, list[str]]:
        """Skeleton to transfers."""
        return {key: order_of(_core.StepProgram.parse(t)) for key, t in self.programs.items()}


def order_of(program: Any) -> list[str]:
    """Its transfers in order, without the numbers that graphs have on one rank."""
    return [re.sub(r"^(\w+) \d+:", r"\1:", call) for call in _core.collective_order(program)]


def deferred(update: Any) -> list[str]:
    """Parameters whose update is left to the next step."""
    return [i.operand for i in update.sections[0].instrs if i.op == "defer"]


def run_passes(program: Any, request: Request, held: Any = None) -> list[Any]:
    """Run a request's passes on a program in place; their log. `held`: see held_program."""
    log = _core.run_passes(
        program,
        list(request.passes),
        machine=request.machine,
        costs=request.costs,
        memory_budget=request.budget,
        early_updates=request.early_updates,
        held=held,
    )
    check_complete(program, request.passes)
    return log


def check_complete(program: Any, passes: Sequence[Any]) -> None:
    """UserError that names the passes if what all of them left cannot run."""
    try:
        program.verify_plan()
    except UserError as error:
        names = ", ".join(pass_name(each) for each in passes)
        raise UserError(
            f"[passes] {names}: together they leave a plan that is not complete: {error} Begin "
            "with the stage's pass."
        ) from None


def held_program(name: str, graphs: list[Any], request: Request) -> Any:
    """The plan that holds as one program of the step of `graphs`, with its reasons. None if it is
    of other graphs, or if not `auto` alone made it: what other passes did is not done twice."""
    held = request.held
    if held is None or held.entry != ["auto"] or request.passes != ("auto",):
        return None
    texts = [held.programs.get(_core.skeleton(graph)) for graph in graphs]
    if None in texts:
        return None
    parse = _core.StepProgram.parse
    try:
        program = _core.merge_steps(name, [parse(text) for text in texts], parse(held.update))
    except UserError:  # a parameter has changed: its placement, say
        return None
    for reason in held.reasons:
        program.because(*reason)
    return program


def classical(plain: Any, stage_pass: str, late: Sequence[str]) -> Any:
    """The stage's plan of one graph; `late`: parameters whose update a step leaves to the next,
    gathered here before they are used."""
    program = plain.copy()
    _core.run_passes(program, [stage_pass])
    return with_gathers(program, late)


def with_gathers(program: Any, late: Sequence[str]) -> Any:
    """Gather and await, at the start of each section that uses them, parameters that may be
    behind. Sharded ones are gathered there in any case."""
    kept = {p.name for p in program.params if p.placement != "sharded"} & set(late)
    reads = {
        region.name: {x.split("[")[0] for x in region.inputs} & kept for region in program.regions
    }
    for section in program.sections:
        used: set[str] = set().union(
            *(reads[i.region] for i in section.instrs if i.op == "run"), set()
        )
        extra = [
            _core.Instr(op, p.name) for p in program.params if p.name in used
            for op in ("gather", "wait")
        ]  # fmt: skip
        if extra and section.kind != "update":
            section.set_instrs([*extra, *section.instrs])
    return program


def _plan_beside(plain: Any, update: Any, planned_update: Any, request: Request) -> Any:
    """The plan of a graph outside the step that `planned_update` ends."""
    try:
        merged = _core.merge_steps("beside", [plain], update)
        run_passes(merged, request)
        program = _core.split_step(merged, [plain], update)[0]
        program = with_gathers(program, deferred(planned_update))
        _core.merge_steps("beside", [program], planned_update).verify()
        return program
    except UserError:  # not beside this update, or not within the budget
        return classical(plain, request.stage_pass, deferred(planned_update))


def _trains_the_same(graphs: list[Any], others: Sequence[Any]) -> bool:
    """Whether a graph beside the step trains what the step does: a step that runs both may come,
    and an update of one's backward would then be too early for the other's."""
    used = set().union(*(_reads(graph) for graph in graphs))
    return any(
        used & _reads(other)
        for other in others
        if any(section.kind == "backward" for section in other.sections)
    )


def _reads(program: Any) -> set[str]:
    """Parameters of a graph that its regions read or make gradients of."""
    read = {x.split("[")[0] for region in program.regions for x in region.inputs}
    trained = {v.grad_of.split("[")[0] for v in program.values if v.grad_of}
    return (read | trained) & {p.name for p in program.params}


def plan_step(
    name: str, graphs: list[Any], others: dict[str, Any], update: Any, request: Request
) -> Agreed:
    """The plan of a step of `graphs` in order, and of `others`, by skeleton, beside it. All are
    compute only."""
    start = time.perf_counter()
    if request.early_updates and _trains_the_same(graphs, list(others.values())):
        request = replace(request, early_updates=False)
    merged = _core.merge_steps(name, graphs, update)
    log = run_passes(merged, request, held_program(name, graphs, request))
    *parts, planned_update = _core.split_step(merged, graphs, update)
    programs = {_core.skeleton(g): str(p) for g, p in zip(graphs, parts, strict=True)}
    for key, plain in others.items():
        if key not in programs:
            programs[key] = str(_plan_beside(plain, update, planned_update, request))
    agreed = Agreed(
        programs,
        str(planned_update),
        [pass_name(each) for each in request.passes],
        reasons=[(r.pass_name, r.object, r.text) for r in merged.reasons],
        log=[str(line) for line in log],
        budget=request.budget,
    )  # fmt: skip
    if request.machine is not None:
        simulated = _core.simulate(merged, request.machine, request.costs)
        agreed.predicted_ns, agreed.predicted_peak = simulated.time_ns, simulated.peak_bytes
    agreed.seconds = time.perf_counter() - start
    return agreed


def check_new_graph(
    program: Any, agreed: Agreed, rank: int, graph: int, where: str, stage_pass: str
) -> None:
    """UserError unless a graph that is not in the agreed plan, planned classically, transfers what
    one that is does, in the same order."""
    mine = order_of(program)
    known = list(agreed.orders().values())
    if mine in known:
        return
    kinds = {section.kind for section in program.sections}
    same = [order for order in known if order and order[0].split(":")[0] in kinds] or known
    difference = _core.order_difference(same[0], mine) if same else "nothing was agreed on"
    raise UserError(
        f"[planning] rank {rank}, graph {graph} ({where}): came up after the ranks had agreed on "
        f"a plan, and its transfers are not the plan's: {difference} (plan, then this graph). If "
        "one rank alone takes this path, or has a batch of no or one element, which is captured "
        "for itself, the others would wait for ever: give all ranks batches alike. Else let the "
        "model take all its paths before the schedule's first planned step, or set "
        f"compile.schedule to [[0, [{stage_pass!r}]]]."
    )


def _reductions(order: list[str]) -> list[str]:
    return sorted(transfer for transfer in order if ": reduce " in transfer)


def warn_of_other_transfers(program: Any, known: Sequence[Any], where: str) -> None:
    """Before there is an agreed plan: say that a graph of the same code and the same gradients as
    a `known` one transfers in another order, which all ranks have to do in the same step."""
    mine = order_of(program)
    reduced = _reductions(mine)
    for other in known:
        theirs = order_of(other)
        if theirs != mine and _reductions(theirs) == reduced:
            warnings.warn(
                f"[planning] {where}: is captured anew, for a batch of no or one element or "
                "another path, and transfers in another order: "
                f"{_core.order_difference(theirs, mine)} (before, now). If other ranks do not "
                "do so in the same step, all wait until compile.timeout_s: give all ranks "
                "batches alike.",
                stacklevel=2,
            )
            return


def check_orders(orders: dict[str, list[str]], ranks: Ranks) -> None:
    """UserError unless ranks that have the same graphs transfer the same in the same order;
    collective. `orders`: skeleton to order."""
    digests = {
        key: hashlib.sha256("\n".join(order).encode()).hexdigest() for key, order in orders.items()
    }
    for rank, theirs in enumerate(ranks.gather(digests)):
        for key in theirs.keys() & digests.keys():
            if theirs[key] != digests[key]:
                raise UserError(
                    f"[planning] rank {rank}'s plan of graph {key} transfers something else than "
                    f"rank {ranks.rank}'s, whose first transfers are {orders[key][:3]}. This is a "
                    "defect of deepcompile: please report it with both ranks' compile.debug_log."
                )
