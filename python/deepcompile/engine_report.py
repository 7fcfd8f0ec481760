# SPDX-License-Identifier: Apache-2.0
"""The report of a run: what was planned, what the simulator says, what was measured.

One step is traced (see TRACED_STEP in engine.py). The prediction is for the
machine that the configuration names, or a built-in one that resembles this.
"""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import _core, agreement
from .errors import UserError
from .links import machine_for
from .trace_costs import TIMED, WAITS

if TYPE_CHECKING:
    from .engine import Engine
    from .planning import Planner
    from .profile import Profile


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
        "Compute type": "bf16" if engine.config.bf16.enabled else "as the model's",
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
    resources = {"run": "compute", "update": "compute", "norm": "compute", "accumulate": "compute",
                 "gather": "link", "reduce": "link", "offload": "to_host",
                 "offload_states": "to_host", "reload": "to_device",
                 "reload_states": "to_device"}  # fmt: skip
    items = []
    programs = dict(view.plans)
    order = {plan_id: number for number, (plan_id, _) in enumerate(view.plans)}
    for plan_id, section_index, index, start, end in view.records:
        section = programs[plan_id].sections[section_index]
        instr = section.instrs[index]
        if instr.op not in resources:
            continue
        update = section.kind == "update"
        items.append(
            {
                "section": "update" if update else f"{section.kind} {order[plan_id]}",
                "index": index,
                "label": f"{instr.op} {instr.operand}" if instr.operand else instr.op,
                "resource": resources[instr.op],
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


def _on_compute(view: StepView) -> int:
    """ns that compute worked or waited."""
    ops = {
        (plan_id, s): [instr.op for instr in section.instrs]
        for plan_id, program in view.plans
        for s, section in enumerate(program.sections)
    }
    return sum(r[4] - r[3] for r in view.records if ops[r[0], r[1]][r[2]] in (*TIMED, *WAITS))


def _compare(engine: Engine, view: StepView, plain: Any, informed: Any) -> list[dict[str, Any]]:
    """Step time and peak: predicted and measured."""
    measured = max(r[4] for r in view.records)  # from the step's start
    rows = [
        {"what": "Step", "predicted": plain.time_ns, "measured": measured, "unit": "ns",
         "headline": True},
        {"what": "Step, simulated with the measured region times",
         "predicted": informed.time_ns, "measured": measured, "unit": "ns"},
        {"what": "Peak memory of a rank", "predicted": plain.peak_bytes,
         "measured": engine.trace.peak_bytes, "unit": "B", "headline": True},
        {"what": "Waiting for transfers", "predicted": informed.stall_ns, "unit": "ns"},
    ]  # fmt: skip
    rows += _kinds(view, plain, measured)
    costs = engine.planner.costs
    if costs is not None:  # what the plan was chosen by
        planned = _core.simulate(view.program, machine_of(engine), costs)
        rows.append(
            {"what": "Step, by measured costs", "predicted": planned.time_ns,
             "measured": measured, "unit": "ns"}
        )  # fmt: skip
        rows += _kinds(view, planned, measured, ", by measured costs")
    return rows


def _kinds(view: StepView, sim: Any, measured: int, by: str = "") -> list[dict[str, Any]]:
    """Each kind of instruction, and what is between them: which part of a prediction is wrong."""
    kinds = _core.compare_kinds(_core.compare(sim, view.plans, view.records))
    on_compute = sum(each.predicted_ns for each in kinds if each.kind in (*TIMED, *WAITS))
    pairs = [(f"All {k.kind} instructions", k.predicted_ns, k.measured_ns) for k in kinds]
    between = max(0, sim.time_ns - on_compute), max(0, measured - _on_compute(view))
    pairs.append(("Compute between instructions", *between))
    return [
        {"what": what + by, "predicted": predicted, "measured": found, "unit": "ns"}
        for what, predicted, found in pairs
    ]


def _seconds(nanos: int) -> str:
    return f"{nanos / 1e6:,.2f} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"


def unlimited_plan(planner: Planner) -> Any:
    """The simulation of the newest plan's step, planned again without a budget; None if there is
    no agreed plan of this run's, or no plan."""
    if planner.request is None or planner.agreed is None:
        return None
    request = dataclasses.replace(planner.request, budget=None)
    try:
        merged = _core.merge_steps("step", planner.step_programs, planner.plain_update())
        agreement.run_passes(merged, request)
        return _core.simulate(merged, request.machine, request.costs)
    except UserError:
        return None


def plan_facts(engine: Engine) -> dict[str, str]:
    """What the newest plan is, what its budget was, and what that cost."""
    planner, counts = engine.planner, engine.compile_report()
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
        facts["Planned step"] = (
            f"{_seconds(agreed.predicted_ns)}, peak {_bytes(agreed.predicted_peak)}"
        )
    if agreed.budget is not None:
        facts["Memory budget"] = _bytes(agreed.budget)
        free = unlimited_plan(planner)
        if free is not None and agreed.predicted_ns is not None:
            facts["Given up for the budget"] = (
                f"{_seconds(agreed.predicted_ns - free.time_ns)} a step, against "
                f"{_seconds(free.time_ns)} with a peak of {_bytes(free.peak_bytes)}"
                if free.time_ns < agreed.predicted_ns
                else "no time"
            )
    if counts["budgets_lowered"] or counts["memory_relieved"]:
        facts["Memory ran out"] = (
            f"{counts['memory_relieved']} evictions on this rank, budget lowered "
            f"{counts['budgets_lowered']} times"
        )
    return facts


def _reasons(view: StepView, trace: Profile) -> list[dict[str, str]]:
    if trace.agreed is not None:
        found = trace.agreed.reasons
    else:
        found = [(r.pass_name, r.object, r.text) for r in view.program.reasons]
    return [{"pass": name, "object": what, "text": text} for name, what, text in found]


def _simulated(engine: Engine, view: StepView) -> tuple[Any, Any, Any]:
    """(machine, simulation by the machine's numbers, and by what was measured here)."""
    machine, costs = machine_of(engine), engine.planner.costs
    plain = _core.simulate(view.program, machine)
    return machine, plain, _core.simulate(_with_measured_regions(view), machine, costs)


def report_data(engine: Engine) -> dict[str, Any]:
    """What deepcompile.report.write_report takes."""
    counts = engine.compile_report()
    breaks = counts["graph_breaks"].items()
    data: dict[str, Any] = {
        "title": f"{type(engine.module).__name__} on {engine.ranks.world} "
        f"rank{'s' * (engine.ranks.world != 1)}",
        "facts": _facts(engine) | (plan_facts(engine) if counts["graphs"] else {}),
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
        machine, plain, informed = _simulated(engine, view)
    except UserError as error:
        data["notes"].append(f"The step was not simulated: {error}")
        return data
    data["facts"]["Simulated machine"] = machine.name
    return data | {
        "timeline": {
            "predicted": [i.as_dict() for i in plain.items if i.resource != "none"],
            "measured": _measured_items(view),
        },
        "memory": {"predicted": [list(point) for point in plain.memory], "measured": []},
        "compare": _compare(engine, view, plain, informed),
        "reasons": _reasons(view, engine.trace),
        "plan": str(view.program),
    }


def write(engine: Engine, path: Path, more: dict[str, Any]) -> Path | None:
    """Engine.report."""
    from .report import write_report

    def work() -> Path | None:
        if engine.ranks.rank:
            return None
        data = report_data(engine)
        notes = [*data["notes"], *more.get("notes", [])]
        return write_report({**data, **more, "notes": notes}, path)

    return engine.ranks.together("[report]", work)


def write_trace(engine: Engine, path: Path) -> Path | None:
    """Engine.write_trace."""

    def work() -> Path | None:
        view = None if engine.ranks.rank else step_view(engine)
        if view is None:
            return None
        _, plain, informed = _simulated(engine, view)
        both = [("predicted", plain), ("predicted with measured regions", informed)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_core.perfetto_trace(both, view.plans, view.records), encoding="utf-8")
        return path

    return engine.ranks.together("[report]", work)
