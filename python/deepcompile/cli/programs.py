# SPDX-License-Identifier: Apache-2.0
"""Commands on a program's text: explain, opt, sim, report."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .. import _core
from ..errors import UserError, writing
from ..report.other_choices import NOT_PLANNED, by_kind, is_planned, others_of
from .arguments import add_command, add_costs, add_machine, add_passes, add_program
from .explain import explain
from .files import (
    Conditions,
    conditions_of,
    read_costs,
    read_machine,
    read_program,
    run_named,
    write,
)
from .output import as_table, summary

EXPLAIN_EXAMPLES = """\
An engine's write_plan("plan.txt") also writes plan.run.json: the machine, the budget
and the costs that the run measured. They are used where --machine is left out.

examples:
  deepcompile explain demo-output/plan.txt
  deepcompile explain plan.txt --machine 4xh200 --all
  deepcompile explain captured.txt --machine my-cluster.json --passes auto \\
      --memory-budget 40GiB --costs plan.run.json"""
OPT_EXAMPLES = """\
examples:
  deepcompile opt captured.txt --passes zero3_compile -o plan.txt
  cat captured.txt | deepcompile opt - --passes zero3_compile
  deepcompile opt captured.txt --passes zero3_compile,selective_gather,prefetch \\
      --machine 4xh200 --memory-budget 40GiB
  deepcompile opt captured.txt --machine 4xh200 --pass-library build/custom_pass.so \\
      --passes zero3_compile,keep_last_gathered"""
SIM_EXAMPLES = """\
examples:
  deepcompile sim plan.txt --machine 4xh200
  deepcompile sim demo-output/plan.txt
  deepcompile sim plan.txt --machine my-cluster.json --costs plan.run.json
  deepcompile sim plan.txt --machine 4xh200 --trace plan.perfetto.json --json"""
REPORT_EXAMPLES = """\
examples:
  deepcompile report plan.txt --machine 4xh200 --out report.html"""


def add_to(commands: Any) -> None:
    text = "say what a plan does with each parameter and region, and why"
    command = add_command(commands, "explain", run_explain, text, EXPLAIN_EXAMPLES)
    add_simulated(command)
    command.add_argument(
        "--all", action="store_true", help="each parameter and region, not one line for equal ones"
    )
    text = "run passes: program text in, program text out"
    command = add_command(commands, "opt", run_opt, text, OPT_EXAMPLES)
    add_program(command)
    add_passes(command, "passes to run", required=True)
    add_machine(command, required=False)
    add_costs(command)
    command.add_argument(
        "-o", "--out", metavar="FILE", help="where to write; default standard output"
    )
    text = "simulate a program on a machine"
    command = add_command(commands, "sim", run_sim, text, SIM_EXAMPLES)
    add_simulated(command)
    command.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    text = "write a page about a simulated program"
    command = add_command(commands, "report", run_report, text, REPORT_EXAMPLES)
    add_simulated(command)
    command.add_argument("--out", metavar="FILE", default="report.html", help="%(default)s")


def add_simulated(command: argparse.ArgumentParser) -> None:
    add_program(command)
    add_machine(command, required=False)
    add_passes(command, "passes to run first")
    add_costs(command)


def run_opt(options: argparse.Namespace) -> None:
    program = read_program(options.file)
    machine = read_machine(options.machine) if options.machine else None
    if machine is None and options.costs:
        raise UserError("[cli] --costs: needs a machine for what it has not measured. Add it.")
    for record in run_named(program, machine, options, read_costs(options.costs)):
        print(record, file=sys.stderr)
    if options.out:
        write(options.out, str(program))
    else:
        print(program, end="")


def simulate_file(
    options: argparse.Namespace,
) -> tuple[_core.StepProgram, _core.SimResult, Conditions]:
    program, by = read_program(options.file), conditions_of(options)
    options.memory_budget, options.early_updates = by.budget, by.early_updates
    run_named(program, by.machine, options, by.costs)
    return program, _core.simulate(program, by.machine, costs=by.costs), by


def run_sim(options: argparse.Namespace) -> None:
    program, sim, by = simulate_file(options)
    if options.trace:
        write(options.trace, _core.perfetto_trace([(f"predicted on {by.machine.name}", sim)]))
    facts = summary(program, by.machine, sim, by.budget)
    if not is_planned(program):
        facts["note"] = NOT_PLANNED
    print(json.dumps(facts, indent=2) if options.json else as_table(facts))


def run_explain(options: argparse.Namespace) -> None:
    program, sim, by = simulate_file(options)
    budget = by.budget or by.machine.memory_bytes
    early = by.early_updates
    text = explain(program, by.machine, sim, budget, by.costs, options.all, early)
    if by.source:
        print(f"by what the run measured, in {by.source}")
    print(text, end="")


def run_report(options: argparse.Namespace) -> None:
    from ..report import write_report

    program, sim, by = simulate_file(options)
    machine = by.machine
    others = others_of(program, machine, by.budget, by.costs, by.early_updates)
    data = {
        "notes": [] if is_planned(program) else [NOT_PLANNED],
        "others": by_kind(others),
        "title": f"{program.name} on {machine.name}",
        "facts": {
            "Machine": machine.device_name,
            "World": f"{program.world} ranks",
            "Accumulation": f"{program.accumulation} micro-steps",
            **({"Plan": _core.freeze(program).hash} if is_planned(program) else {}),
        },
        "timeline": {
            "predicted": [item.as_dict() for item in sim.items if item.resource != "none"],
            "measured": [],
        },
        "memory": {"predicted": sim.memory, "measured": []},
        "compare": [
            {"what": "Step", "predicted": sim.time_ns, "unit": "ns", "headline": True},
            {"what": "Peak memory", "predicted": sim.peak_bytes, "unit": "B", "headline": True},
            {"what": "Compute stalled", "predicted": sim.stall_ns, "unit": "ns"},
        ],
        "reasons": [
            {"pass": r.pass_name, "object": r.object, "text": r.text} for r in program.reasons
        ],
        "plan": str(program),
    }
    with writing("cli", options.out):
        print(write_report(data, options.out))
