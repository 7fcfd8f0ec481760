# SPDX-License-Identifier: Apache-2.0
"""``deepcompile plan``: a model's training step on a machine, under several plans."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from .. import _core
from ..config import CompileConfig
from ..errors import UserError
from ..schedule import STAGE_PASS
from . import arguments as types
from .arguments import add_command, add_machine, add_passes
from .files import read_machine, reason, resolve_passes, run_passes, write
from .output import plans_table

EXAMPLES = """\
Without --passes, the classical plan of the stage, prefetch (P), selective
gathering (S), both, and the planner's own (auto) are compared. Kernel times
are estimated from the machine's numbers; optimizer states are AdamW's.

examples:
  deepcompile plan --model llama-3-70b --machine 4x8-h100 --seq 512,1024,2048 --batch 1
  deepcompile plan --model llama-3-8b --machine 4xh200 --memory-budget 60GiB \\
      --chart plans.svg --json
  deepcompile plan --model config.json --machine 2x-cpu --dtype fp32 --seq 128 \\
      --passes zero3_compile,prefetch --out plan.txt --trace plan.perfetto.json"""

NAMES = {0: "replicated", 1: "ZeRO1", 2: "ZeRO2", 3: "ZeRO3"}


def add_to(commands: Any) -> None:
    text = "plan a model's training step for a machine"
    plan = add_command(commands, "plan", run, text, EXAMPLES)
    add = plan.add_argument
    add(
        "--model",
        required=True,
        help="a config.json, a folder with one, or a built-in name such as llama-3-8b",
    )
    reserve = 100 * CompileConfig.memory_reserve
    add_machine(plan, budget=f"the machine's less {reserve:.0f}%%")
    add("--ranks", type=types.positive, help="how many; default: all of the machine's")
    add("--batch", type=types.positive, default=1, help="sequences a rank (%(default)s)")
    add(
        "--seq",
        metavar="N,M",
        type=types.positives,
        default=[2048],
        help="tokens a sequence, one or more lengths (2048)",
    )
    add("--dtype", metavar="bf16|fp32", type=types.dtype, default="bf16", help="(%(default)s)")
    add("--stage", type=int, choices=sorted(STAGE_PASS), default=3, help="of ZeRO (%(default)s)")
    add(
        "--accumulation",
        type=types.positive,
        default=1,
        help="micro-steps a step (%(default)s)",
    )
    add("--clip", action="store_true", help="clip gradients by their global norm")
    add(
        "--reduce-dtype",
        metavar="bf16|fp32",
        type=types.dtype,
        help="element type of gradients on the wire; default: --dtype",
    )
    add(
        "--persistence-threshold",
        metavar="N",
        type=types.not_negative,
        help="parameters of fewer elements are packed and stay whole",
    )
    add("--layers", metavar="N", type=types.positive, help="another depth than the model's")
    add(
        "--capture-all-layers",
        action="store_true",
        help="capture each layer, instead of a few of the equal ones (slow)",
    )
    add("--checkpointing", action="store_true", help="activation checkpointing on")
    add_passes(plan, "one plan, of these passes, instead of the comparison")
    add("--chart", metavar="FILE", type=types.chart_file, help="write a chart (.svg or .html)")
    add("--json", action="store_true", help="print JSON instead of tables")
    one = plan.add_argument_group("files about one plan (of --passes, else auto's; one --seq)")
    one.add_argument("--out", metavar="FILE", help="write the planned program's text")
    one.add_argument("--captured", metavar="FILE", help="write the program before the passes")
    one.add_argument("--save-plan", metavar="FILE", help="write the frozen plan (JSON)")
    one.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev")


def variants(options: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, passes) of the plans to compare."""
    if options.passes is not None:
        return [("+".join(options.passes) or "none", options.passes)]
    base = STAGE_PASS[options.stage]
    plans = [(NAMES[options.stage], [base])]
    if options.stage == 3:
        plans += [
            ("P", [base, "prefetch"]),
            ("S", [base, "selective_gather"]),
            ("P+S", [base, "selective_gather", "prefetch"]),
        ]
    return [*plans, ("auto", ["auto"])]


def run(options: argparse.Namespace) -> None:
    machine = read_machine(options.machine)
    wants_files = any((options.out, options.captured, options.save_plan, options.trace))
    if wants_files and len(options.seq) > 1:
        raise UserError(
            "[cli] plan: --out, --captured, --save-plan and --trace are about one plan. Give one "
            "--seq with them."
        )
    resolve_passes(options.passes or [], options.pass_library)  # errors before the capture
    budget = options.memory_budget or round(
        machine.memory_bytes * (1 - CompileConfig.memory_reserve)
    )
    planned = plan_all(options, budget)
    facts = {
        "model": options.model,
        "machine": machine.name,
        "ranks": options.ranks or machine.ranks,
        "batch": options.batch,
        "accumulation": options.accumulation,
        "dtype": options.dtype,
        "stage": options.stage,
        "memory_budget": budget,
        "seqs": options.seq,
        **planned[0]["facts"],
        "plans": [plan for each in planned for plan in each["plans"]],
    }
    write_files(options, machine, planned[0])
    if options.chart:
        from ..report.sweep import write_sweep

        try:
            write_sweep(facts, options.chart)
        except OSError as error:
            raise UserError(
                f"[cli] {options.chart}: cannot be written ({reason(error)}). Choose another place."
            ) from None
    print(json.dumps(facts, indent=2) if options.json else plans_table(facts))


def plan_all(options: argparse.Namespace, budget: int) -> list[dict[str, Any]]:
    """Each sequence length's plans; side by side where the system can fork."""
    from ..capture import meta  # noqa: F401  starts torch, once for all

    workers = min(len(options.seq), os.cpu_count() or 1)
    if workers < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return [plan_sequence(options, seq, budget) for seq in options.seq]
    # Now: autograd, which a capture uses, does not survive a later fork.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(in_worker, options, seq, budget) for seq in options.seq]
        results = [job.result() for job in jobs]
    for result in results:
        if isinstance(result, UserError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(result)
    return results


def in_worker(options: argparse.Namespace, seq: int, budget: int) -> dict | UserError | str:
    """plan_sequence, with errors in a form that another process can take: torch's have none."""
    try:
        return plan_sequence(options, seq, budget)
    except UserError as error:
        return error
    except Exception:
        return traceback.format_exc()


def plan_sequence(options: argparse.Namespace, seq: int, budget: int) -> dict[str, Any]:
    """Plans for one sequence length, as plain data: programs are text."""
    machine = read_machine(options.machine)
    captured, facts = capture_step(options, seq, options.ranks or machine.ranks)
    plans, program = [], captured
    for name, words in variants(options):
        program = captured.copy()
        plans.append(
            {"seq": seq, "plan": name, "passes": words}
            | measured(program, words, machine, options, seq, budget)
        )
    return {"facts": facts, "plans": plans, "captured": str(captured), "program": str(program)}


def measured(
    program: _core.StepProgram,
    words: list[str],
    machine: _core.Machine,
    options: argparse.Namespace,
    seq: int,
    budget: int,
) -> dict[str, Any]:
    """Runs the passes and simulates the step. A plan that does not fit is an answer, too."""
    try:
        passes = resolve_passes(words, options.pass_library)
        run_passes(program, passes, machine, budget, early_updates=options.early_updates)
    except UserError as error:
        if options.passes is not None:
            raise
        note = str(error)
        return {
            "step_ns": None,
            "tokens_per_second_per_gpu": None,
            "peak_bytes": None,
            "fits": False,
            "hash": None,
            "note": note,
        }
    sim = _core.simulate(program, machine)
    tokens = options.batch * seq * options.accumulation
    return {
        "step_ns": sim.time_ns,
        "tokens_per_second_per_gpu": round(tokens * 1e9 / max(sim.time_ns, 1), 1),
        "peak_bytes": sim.peak_bytes,
        "resident_bytes": sim.resident_bytes,
        "fits": sim.peak_bytes <= budget,
        "hash": _core.freeze(program).hash,
        "note": "",
    }


def write_files(
    options: argparse.Namespace, machine: _core.Machine, planned: dict[str, Any]
) -> None:
    """What is asked for about the last plan."""
    if options.captured:
        write(options.captured, planned["captured"])
    if not (options.out or options.save_plan or options.trace):
        return
    if planned["plans"][-1]["step_ns"] is None:
        raise UserError(planned["plans"][-1]["note"])
    program = _core.StepProgram.parse(planned["program"])
    if options.out:
        write(options.out, planned["program"])
    if options.save_plan:
        write(options.save_plan, _core.freeze(program).serialize())
    if options.trace:
        sim = _core.simulate(program, machine)
        write(options.trace, _core.perfetto_trace([(f"predicted on {machine.name}", sim)]))


def capture_step(
    options: argparse.Namespace, seq: int, world: int
) -> tuple[_core.StepProgram, dict[str, Any]]:
    """The model's whole step, compute alone, and what the capture says of it."""
    from ..capture.meta import capture_model, capture_repeated
    from ..capture.program import update_program

    wanted = {}
    if options.persistence_threshold is not None:
        wanted["persistence_threshold"] = options.persistence_threshold
    capture = capture_model if options.capture_all_layers else capture_repeated
    graphs, table = capture(
        options.model,
        batch=options.batch,
        seq=seq,
        dtype=options.dtype,
        stage=options.stage,
        world=world,
        checkpointing=options.checkpointing,
        num_layers=options.layers,
        **wanted,
    )
    short = {"bf16": "bf16", "fp32": "f32"}
    programs = [graph.program for graph in graphs]
    update = update_program(table)
    for program in [*programs, update]:
        program.world = world
        program.accumulation = options.accumulation
        program.clip = options.clip
        program.boundary = options.stage == 1
        program.reduce_dtype = short[options.reduce_dtype or options.dtype]
    name = Path(options.model).stem if options.model.endswith(".json") else options.model
    facts = {
        "parameters": sum(m.numel for spec in table.params for m in spec.members),
        "regions": sum(len(program.regions) for program in programs),
        "distinct_regions": len({r.code for p in programs for r in p.regions}),
    }
    return _core.merge_steps(name, programs, update), facts
