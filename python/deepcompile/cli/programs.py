# SPDX-License-Identifier: Apache-2.0
"""Commands on a program's text: explain, opt, sim, report."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from .. import _core
from ..errors import UserError
from .arguments import add_command, add_costs, add_machine, add_passes, add_program
from .explain import explain
from .files import read_costs, read_machine, read_program, reason, run_named, write
from .output import as_table, summary

EXPLAIN_EXAMPLES = """\
examples:
  deepcompile explain plan.txt --machine 4xh200
  deepcompile explain plan.txt --machine 4xh200 --all
  deepcompile explain captured.txt --machine my-cluster.json --passes auto \\
      --memory-budget 40GiB --costs measured.json"""
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
  deepcompile sim plan.txt --machine my-cluster.json --costs measured.json
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
    add_machine(command)
    add_passes(command, "passes to run first")
    add_costs(command)


def run_opt(options: argparse.Namespace) -> None:
    program = read_program(options.file)
    machine = read_machine(options.machine) if options.machine else None
    if machine is None and options.costs:
        raise UserError("[cli] --costs: needs a machine for what it has not measured. Add it.")
    for record in run_named(program, machine, options):
        print(record, file=sys.stderr)
    if options.out:
        write(options.out, str(program))
    else:
        print(program, end="")


def simulate_file(
    options: argparse.Namespace,
) -> tuple[_core.StepProgram, _core.Machine, _core.SimResult]:
    program, machine = read_program(options.file), read_machine(options.machine)
    run_named(program, machine, options)
    return program, machine, _core.simulate(program, machine, costs=read_costs(options.costs))


def run_sim(options: argparse.Namespace) -> None:
    program, machine, sim = simulate_file(options)
    if options.trace:
        write(options.trace, _core.perfetto_trace([(f"predicted on {machine.name}", sim)]))
    facts = summary(program, machine, sim)
    print(json.dumps(facts, indent=2) if options.json else as_table(facts))


def run_explain(options: argparse.Namespace) -> None:
    program, machine, sim = simulate_file(options)
    budget = options.memory_budget or machine.memory_bytes
    costs = read_costs(options.costs)
    text = explain(program, machine, sim, budget, costs, options.all, options.early_updates)
    print(text, end="")


def run_report(options: argparse.Namespace) -> None:
    from ..report import write_report

    program, machine, sim = simulate_file(options)
    data = {
        "title": f"{program.name} on {machine.name}",
        "facts": {
            "Machine": machine.device_name,
            "World": f"{program.world} ranks",
            "Accumulation": f"{program.accumulation} micro-steps",
            "Plan": _core.freeze(program).hash,
        },
        "timeline": {"predicted": [timeline_item(i) for i in sim.items], "measured": []},
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
    data["timeline"]["predicted"] = [i for i in data["timeline"]["predicted"] if i]
    try:
        print(write_report(data, options.out))
    except OSError as error:
        raise UserError(
            f"[cli] {options.out}: cannot be written ({reason(error)}). Choose another place."
        ) from None


def timeline_item(item: _core.SimItem) -> dict[str, Any] | None:
    """As the page wants it: it has one row for both directions of the host link."""
    if item.resource == "none":
        return None
    as_dict = item.as_dict()
    if as_dict["resource"] in ("to_host", "to_device"):
        as_dict["resource"] = "host"
    return as_dict
