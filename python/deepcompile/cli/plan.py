# SPDX-License-Identifier: Apache-2.0
"""``deepcompile plan``: a model's training step on a machine, under several plans."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from .. import _core, models
from ..config import CompileConfig
from ..errors import UserError, check_writable, writing
from ..predict import StepOptions, capture_step, default_budget, named_plans, predict
from ..schedule import STAGE_PASS
from . import arguments as types
from .arguments import add_command, add_machine, add_passes
from .files import read_machine, resolve_passes, write
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
    dtypes = {"metavar": "bf16|fp16|fp32", "type": types.dtype("bf16", "fp16", "fp32")}
    add("--dtype", **dtypes, default="bf16", help="(%(default)s)")
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
        **dtypes,
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
        return [("+".join(options.passes), options.passes)]
    return named_plans(options.stage)


def run(options: argparse.Namespace) -> None:
    machine = read_machine(options.machine)
    wants_files = any((options.out, options.captured, options.save_plan, options.trace))
    if wants_files and len(options.seq) > 1:
        raise UserError(
            "[cli] plan: --out, --captured, --save-plan and --trace are about one plan. Give one "
            "--seq with them."
        )
    if options.ranks is not None and options.ranks > machine.ranks:
        raise UserError(
            f"[cli] --ranks {options.ranks}: {machine.name} has {machine.ranks} ranks. Choose "
            "fewer ranks or a larger machine."
        )
    ranks = _core.StepProgram.parse(f"step ranks world={options.ranks or machine.ranks}\n")
    _core.analytic_costs(ranks, machine)  # an error if they do not fill whole nodes
    if options.early_updates and options.dtype == "fp16":
        raise UserError(
            "[cli] plan --early-updates: a step in fp16 may be left out, which is known after its "
            "backward. Remove it, or choose another --dtype."
        )
    # What is wrong is said before the capture.
    resolve_passes(options.passes or [], options.pass_library)
    models.config_path(options.model)
    for path in (options.chart, options.out, options.captured, options.save_plan, options.trace):
        if path:
            check_writable("cli", path)
    budget = options.memory_budget or default_budget(machine)
    lengths = ", ".join(map(str, options.seq))
    say(f"capturing {options.model}, sequence {lengths}: this takes some seconds ...")
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
        "layers": options.layers,
        **planned[0]["facts"],
        "plans": [plan for each in planned for plan in each["plans"]],
    }
    write_files(options, machine, planned[0])
    if options.chart:
        from ..report.sweep import write_sweep

        with writing("cli", options.chart):
            write_sweep(facts, options.chart)
    print(json.dumps(facts, indent=2) if options.json else plans_table(facts))


def say(message: str) -> None:
    """Progress, beside the results."""
    print(message, file=sys.stderr, flush=True)


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
    step = step_options(options)
    captured, facts = capture_step(step, seq, options.ranks or machine.ranks, machine)
    say(f"planning sequence {seq}: {facts['regions']} regions")
    plans, program = [], captured
    for name, words in variants(options):
        program = captured.copy()
        passes = resolve_passes(words, options.pass_library)
        tokens = step.batch * seq * step.accumulation
        found = predict(program, passes, machine, tokens, budget, options.early_updates)
        if found["note"] and options.passes is not None:
            raise UserError(found["note"])
        plans.append({"seq": seq, "plan": name, "passes": words} | found)
    return {"facts": facts, "plans": plans, "captured": str(captured), "program": str(program)}


def step_options(options: argparse.Namespace) -> StepOptions:
    return StepOptions(
        model=options.model,
        batch=options.batch,
        dtype=options.dtype,
        stage=options.stage,
        accumulation=options.accumulation,
        clip=options.clip,
        reduce_dtype=options.reduce_dtype,
        persistence_threshold=options.persistence_threshold,
        layers=options.layers,
        checkpointing=options.checkpointing,
        capture_all_layers=options.capture_all_layers,
    )


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
