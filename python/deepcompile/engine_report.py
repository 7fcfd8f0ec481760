# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what was planned, what the simulator says, what was measured.

One step is traced (see TRACED_STEP in engine.py). The prediction is for the
machine that the configuration names, or a built-in one that resembles this.
"""

from __future__ import annotations

import dataclasses
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _core
from . import engine_report_plan as plan
from .errors import UserError, writing
from .links import machine_for
from .trace_costs import TIMED, WAITS

if TYPE_CHECKING:
    from .engine import Engine
    from .planning import Planner


RESOURCES = {
    "run": "compute", "update": "compute", "norm": "compute", "accumulate": "compute",
    "gather": "link", "reduce": "link", "offload": "to_host", "offload_states": "to_host",
    "reload": "to_device", "reload_states": "to_device",
}  # fmt: skip
"""Where an instruction works; others take no time."""


@dataclasses.dataclass
class StepView:
    """One step of all traced graphs, and what is known of its times."""

    program: Any
    """Merged step program, for one micro-batch after another as in the engine."""
    plans: list[tuple[int, Any]]
    """(runtime's plan id, program) in the order of the merge; the update's last."""
    records: list[tuple[int, int, int, int, int]]
    """(plan id, section, instruction, start ns, end ns) of the traced step."""


def machine_of(engine: Engine) -> Any:
    """The configuration's machine, or the built-in that resembles this one most."""
    return machine_for(engine.config, engine.ranks)


def step_view(engine: Engine) -> StepView | None:
    """The traced step's program and records; None if no compiled step was traced yet."""
    trace = engine.trace
    if trace is None or not trace.records:
        return None
    *graphs, (_, update) = trace.plans
    merged = _core.merge_steps(type(engine.module).__name__, [p for _, p in graphs], update)
    known = {plan_id for plan_id, _ in trace.plans}
    kept = [tuple(r[:5]) for r in trace.records if r[0] in known]
    return StepView(merged, trace.plans, kept)


def _facts(engine: Engine) -> dict[str, str]:
    device = engine.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    count = sum(member.numel for spec in engine.table.params for member in spec.members)
    kernels = engine.runtime.kernels()
    return {
        "Model": type(engine.module).__name__,
        "Parameters": f"{count:,}",
        "Ranks": str(engine.ranks.world),
        "Stage": str(engine.config.stage),
        "Batch": f"{engine.train_batch_size()} = {engine.train_micro_batch_size_per_gpu()} x "
        f"{engine.gradient_accumulation_steps()} accumulation x {engine.ranks.world} ranks",
        "Gathers": "{transport}: {why}".format(**engine.runtime.gathers),
        "Reductions": "{transport}: {why}".format(**engine.runtime.reductions),
        **{
            f"Embedding {name}": f"{'rows in use' if of['rows'] else 'whole'}: {of['why']}"
            for name, of in engine.planner.rows.report().items()
        },
        "Compute type": engine.config.compute_dtype or "as the model's",
        "Device": f"{device.type} {name or platform.machine()}",
        "Optimizer kernels": f"{kernels['adamw']} ({kernels['library']})",
        "CUDA graphs": _graphs(engine.runtime.replays()),
        "PyTorch": torch.__version__,
    }


def _graphs(found: dict[str, Any]) -> str:
    if not found["runs"]:
        return f"none: {found['why_not'] or 'no step has repeated'}"
    text = f"{found['runs']} runs of a step, launched {found['replayed']:,} times"
    return text + (f", and {found['missed']:,} not: {found['moved']}" if found["missed"] else "")


def _measured_items(view: StepView) -> list[dict[str, Any]]:
    """Records as timeline items, named by the merged program's sections."""
    items = []
    programs = dict(view.plans)
    order = {plan_id: number for number, (plan_id, _) in enumerate(view.plans)}
    for plan_id, section_index, index, start, end in view.records:
        section = programs[plan_id].sections[section_index]
        instr = section.instrs[index]
        if instr.op not in RESOURCES:
            continue
        update = section.kind == "update"
        items.append(
            {
                "section": "update" if update else f"{section.kind} {order[plan_id]}",
                "index": index,
                "label": f"{instr.op} {instr.operand}" if instr.operand else instr.op,
                "resource": RESOURCES[instr.op],
                "start_ns": start,
                "end_ns": end,
            }
        )
    return items


def _with_measured_regions(view: StepView) -> Any:
    """The merged program with each region's time as it was measured (the mean of its runs)."""
    program = view.program.copy()
    names = iter(region.name for region in program.regions)
    total: dict[tuple[int, str], list[int]] = {}
    programs = dict(view.plans)
    for plan_id, section, index, start, end in view.records:
        instr = programs[plan_id].sections[section].instrs[index]
        if instr.op == "run":
            total.setdefault((plan_id, instr.region), []).append(end - start)
    for plan_id, graph in view.plans:  # merging keeps the order of regions
        for region in graph.regions:
            merged = next(names)
            times = total.get((plan_id, region.name))
            if times:
                program.set_region_time(merged, sum(times) // len(times))
    return program


def _with_planned_regions(view: StepView, planner: Planner) -> Any:
    """The merged program with the region times that the newest plan was made from."""
    program = view.program.copy()
    times = {r.code: r.time for graph in planner.step_programs for r in graph.regions}
    for region in view.program.regions:
        if times.get(region.code) is not None:
            program.set_region_time(region.name, times[region.code])
    return program


def _on_compute(view: StepView) -> int:
    """ns that compute worked or waited."""
    ops = {
        (plan_id, s): [instr.op for instr in section.instrs]
        for plan_id, program in view.plans
        for s, section in enumerate(program.sections)
    }
    return sum(r[4] - r[3] for r in view.records if ops[r[0], r[1]][r[2]] in (*TIMED, *WAITS))


def _compare(engine: Engine, view: StepView, sims: Predictions) -> list[dict[str, Any]]:
    """Step time and peak: predicted and measured."""
    measured = max(r[4] for r in view.records)  # from the step's start
    first, steps = "Step, before anything was measured", []
    if sims.planned is not None:
        steps.append(
            ("Step", sims.planned, "What the plan was chosen by: regions, transfers and updates "
             "as measured in the steps before it.")
        )  # fmt: skip
    steps += [
        (first if steps else "Step", sims.by_machine,
         f"By the numbers of the machine {sims.machine.name} alone."),
        ("Step, with its own region times", sims.informed, "Each region as long as it took in the "
         "traced step: what still differs is transfers, and what is between instructions."),
    ]  # fmt: skip
    rows = [
        {"what": what, "predicted": sim.time_ns, "measured": measured, "unit": "ns", "note": note}
        for what, sim, note in steps
    ]
    rows[0]["headline"] = True
    rows += [
        {"what": "Peak memory of a rank", "predicted": sims.best.peak_bytes,
         "measured": engine.trace.peak_bytes, "unit": "B", "headline": True},
        {"what": "Waiting for transfers", "predicted": sims.best.stall_ns, "unit": "ns"},
    ]  # fmt: skip
    return rows + _kinds(view, sims.best, measured)


OVERLAPPING = "A sum: they run beside compute and each other, and wait for other ranks."
WAITING = "Compute stands still here: what a late rank or transfer takes is in it."


def _kinds(view: StepView, sim: Any, measured: int) -> list[dict[str, Any]]:
    """Each kind of instruction, and what is between them: which part of a prediction is wrong.
    No ratio for sums that hold waiting: they are no times of work."""
    kinds = _core.compare_kinds(_core.compare(sim, view.plans, view.records))
    on_compute = sum(each.predicted_ns for each in kinds if each.kind in (*TIMED, *WAITS))
    rows = []
    for each in kinds:
        row = {"what": f"All {each.kind} instructions", "predicted": each.predicted_ns,
               "measured": each.measured_ns, "unit": "ns"}  # fmt: skip
        if each.kind in RESOURCES and RESOURCES[each.kind] != "compute":
            row |= {"note": OVERLAPPING, "ratio": False}
        elif each.kind in WAITS or each.kind == "accumulate":
            row |= {"note": WAITING, "ratio": False}
        rows.append(row)
    between = max(0, sim.time_ns - on_compute), max(0, measured - _on_compute(view))
    rows.append({"what": "Compute between instructions", "predicted": between[0],
                 "measured": between[1], "unit": "ns"})  # fmt: skip
    return rows


def plan_text_of(engine: Engine, view: StepView | None) -> Any:
    """The newest plan as a program with its reasons; None before a step was traced or planned."""
    program = plan.agreed_program(engine.planner)
    if program is not None or view is None:
        return program
    measured, agreed = _with_measured_regions(view), engine.trace.agreed
    if agreed is None:
        return measured
    return plan.with_reasons(measured, agreed.reasons)  # a plan of an earlier run


def _reasons(program: Any) -> list[dict[str, str]]:
    return [{"pass": r.pass_name, "object": r.object, "text": r.text} for r in program.reasons]


@dataclasses.dataclass
class Predictions:
    """One step, simulated from more and more that was measured."""

    machine: Any
    by_machine: Any
    """By the machine's numbers alone."""
    planned: Any
    """By what the newest plan was made from; None before measured costs."""
    informed: Any
    """By measured costs, and the region times of the traced step itself."""

    @property
    def best(self) -> Any:
        """The one that was known before the step ran."""
        return self.by_machine if self.planned is None else self.planned


def predict(engine: Engine, view: StepView) -> Predictions:
    machine, planner = machine_of(engine), engine.planner
    costs = planner.costs
    by_machine = _core.simulate(view.program, machine)
    planned = None
    if costs is not None and planner.step_programs:
        planned = _core.simulate(_with_planned_regions(view, planner), machine, costs)
    informed = _core.simulate(_with_measured_regions(view), machine, costs)
    return Predictions(machine, by_machine, planned, informed)


def report_data(engine: Engine) -> dict[str, Any]:
    """What deepcompile.report.write_report takes."""
    counts = engine.compile_report()
    breaks = counts["graph_breaks"].items()
    data: dict[str, Any] = {
        "title": f"{type(engine.module).__name__} on {engine.ranks.world} "
        f"rank{'s' * (engine.ranks.world != 1)}",
        "facts": _facts(engine) | (plan.plan_facts(engine) if counts["graphs"] else {}),
        "loss": [{"step": s, "loss": float(v), "tokens_per_s": None} for s, v in engine.losses],
        "notes": [
            *engine.config.warnings,
            *(f"Planning failed: {why}" for why in counts["plan_failures"]),
            *(f"Graph break ({times} times): {why}" for why, times in breaks),
        ],
    }
    if counts["graphs"]:
        regions = {
            k.replace("_", " "): counts[k] for k in ("graphs", "regions", "distinct_regions")
        }
        data["compile"] = {"stages": counts["stages"], "regions": {**regions, **counts["cache"]}}
    view = step_view(engine)
    if view is None:
        data["notes"].append("No compiled step was traced, so there is no timeline.")
        return data
    try:
        sims = predict(engine, view)
    except UserError as error:
        data["notes"].append(f"The step was not simulated: {error}")
        return data
    if engine.trace.agreed is not engine.planner.agreed:
        data["notes"].append("The step shown ran before the newest plan: the reasons are of that.")
    data["facts"]["Simulated machine"] = sims.machine.name
    program = plan_text_of(engine, view)
    return data | {
        "timeline": {
            "predicted": [i.as_dict() for i in sims.best.items if i.resource != "none"],
            "measured": _measured_items(view),
        },
        "memory": {"predicted": [list(point) for point in sims.best.memory], "measured": []},
        "compare": _compare(engine, view, sims),
        "reasons": _reasons(program),
        "others": plan.next_best(engine, program, sims.machine),
        "plan": str(program),
    }


def _nothing_to_write(engine: Engine, path: Path) -> None:
    if engine.ranks.rank == 0:
        warnings.warn(
            f"[report] {path}: is not written, as no compiled step was traced yet. Train some more "
            "steps first.",
            stacklevel=5,
        )


def write(engine: Engine, path: Path, more: dict[str, Any]) -> Path | None:
    """Engine.report."""
    from .report import write_report

    def work() -> Path | None:
        if engine.ranks.rank:
            return None
        data = report_data(engine)
        notes = [*data["notes"], *more.get("notes", [])]
        with writing("report", path):
            return write_report({**data, **more, "notes": notes}, path)

    return engine.ranks.together("[report]", work)


def write_trace(engine: Engine, path: Path) -> Path | None:
    """Engine.write_trace."""

    def work() -> Path | None:
        view = None if engine.ranks.rank else step_view(engine)
        if view is None:
            return _nothing_to_write(engine, path)
        sims = predict(engine, view)
        both = [("predicted", sims.best), ("predicted with measured regions", sims.informed)]
        with writing("report", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_core.perfetto_trace(both, view.plans, view.records), encoding="utf-8")
        return path

    return engine.ranks.together("[report]", work)


def write_plan(engine: Engine, path: Path) -> Path | None:
    """Engine.write_plan."""

    def work() -> Path | None:
        if engine.ranks.rank:
            return None
        program = plan_text_of(engine, step_view(engine))
        if program is None:
            return _nothing_to_write(engine, path)
        with writing("report", path):
            return plan.write_plan(engine, path, program)

    return engine.ranks.together("[report]", work)
