# SPDX-License-Identifier: Apache-2.0
"""The command line: plan, explain, opt, sim, report, launch.

Everything but ``launch`` runs without a GPU; everything but ``plan`` and
``launch`` without torch. Errors are one line on stderr, with exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import _core
from .cli_output import as_table, summary
from .errors import UserError

PASSES_OF_STAGE = {0: ["zero0_compile"], 3: ["zero3_compile"]}

DESCRIPTION = """\
A compiler and runtime for sharded PyTorch training. These commands plan, explain
and simulate a training step for machines that are not there, and launch real ones."""

EXAMPLES = {
    None: """\
examples:
  deepcompile plan --model llama-3-8b --machine 4xh200 --seq 4096 --out plan.txt
  deepcompile explain plan.txt --machine 4xh200
  deepcompile launch --nproc-per-node 2 train.py""",
    "plan": """\
examples:
  deepcompile plan --model llama-3-8b --machine 4x8-h100 --batch 1 --seq 4096
  deepcompile plan --model config.json --machine 2x-cpu --dtype fp32 --seq 128 \\
      --out plan.txt --trace plan.perfetto.json""",
    "explain": """\
examples:
  deepcompile explain plan.txt --machine 4xh200
  deepcompile explain captured.txt --machine my-cluster.json --passes zero3_compile""",
    "opt": """\
examples:
  deepcompile opt captured.txt --passes zero3_compile -o plan.txt
  cat captured.txt | deepcompile opt - --passes zero3_compile
  deepcompile opt captured.txt --passes zero3_compile,prefetch,selective_gather \\
      --machine 4xh200 --memory-budget 40GiB""",
    "sim": """\
examples:
  deepcompile sim plan.txt --machine 4xh200
  deepcompile sim plan.txt --machine my-cluster.json --trace plan.perfetto.json --json""",
    "report": """\
examples:
  deepcompile report plan.txt --machine 4xh200 --out report.html""",
    "launch": """\
Runs torchrun with the same arguments.

examples:
  deepcompile launch --nproc-per-node 4 train.py --config ds_config.json
  deepcompile launch --nnodes 2 --nproc-per-node 8 --rdzv-endpoint host:29500 train.py""",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"deepcompile: error: {message}. See {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["launch"] and arguments[1:] and arguments[1] not in ("-h", "--help"):
        launch(arguments[1:])
    options = build_parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except UserError as error:
        return fail(str(error))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def fail(message: str) -> int:
    print("deepcompile: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def launch(arguments: Sequence[str]) -> NoReturn:
    """Becomes torchrun of this Python."""
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    sys.stdout.flush()
    os.execv(sys.executable, command)


# The parser.


def build_parser() -> Parser:
    parser = Parser(
        prog="deepcompile",
        description=DESCRIPTION,
        epilog=EXAMPLES[None],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    add_plan(commands)
    explain = add_command(commands, "explain", run_explain, "say in words what a plan does and why")
    add_program(explain)
    add_machine(explain)
    add_passes(explain)
    add_opt(commands)
    sim = add_command(commands, "sim", run_sim, "simulate a program on a machine")
    add_program(sim)
    add_machine(sim)
    add_passes(sim)
    sim.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev")
    sim.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report = add_command(commands, "report", run_report, "write a page about a simulated program")
    add_program(report)
    add_machine(report)
    add_passes(report)
    report.add_argument("--out", metavar="FILE", default="report.html", help="%(default)s")
    add_command(commands, "launch", run_launch, "start ranks on this machine")
    return parser


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=run)
    return command


def add_program(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="program text; - reads standard input")


def add_machine(command: argparse.ArgumentParser, required: bool = True) -> None:
    names = ", ".join(_core.Machine.builtin_names())
    command.add_argument(
        "--machine", required=required, help=f"a JSON file, or a built-in machine: {names}"
    )
    command.add_argument(
        "--memory-budget",
        metavar="SIZE",
        type=byte_size,
        help="most memory of one rank that passes may plan with, e.g. 40GiB; default: all of "
        "the machine's",
    )


def add_passes(command: argparse.ArgumentParser, required: bool = False) -> None:
    names = ", ".join(_core.pass_names())
    command.add_argument(
        "--passes",
        metavar="P,Q",
        type=comma_separated,
        required=required,
        default=None if required else [],
        help=("passes to run" if required else "passes to run first") + f", in order: {names}",
    )


def add_opt(commands: Any) -> None:
    opt = add_command(commands, "opt", run_opt, "run passes: program text in, program text out")
    add_program(opt)
    add_passes(opt, required=True)
    add_machine(opt, required=False)
    opt.add_argument("-o", "--out", metavar="FILE", help="where to write; default standard output")


def add_plan(commands: Any) -> None:
    plan = add_command(commands, "plan", run_plan, "plan a model's training step for a machine")
    plan.add_argument(
        "--model", required=True, help="a config.json, or a built-in name such as llama-3-8b"
    )
    add_machine(plan)
    plan.add_argument("--ranks", type=positive, help="how many; default: all of the machine's")
    plan.add_argument("--batch", type=positive, default=1, help="sequences a rank (%(default)s)")
    plan.add_argument("--seq", type=positive, default=2048, help="tokens a sequence (%(default)s)")
    plan.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16")
    plan.add_argument("--stage", type=int, choices=sorted(PASSES_OF_STAGE), default=3)
    plan.add_argument(
        "--accumulation", type=positive, default=1, help="micro-steps a step (%(default)s)"
    )
    plan.add_argument("--clip", action="store_true", help="clip gradients by their global norm")
    plan.add_argument(
        "--reduce-dtype",
        choices=["bf16", "fp16", "fp32"],
        help="element type of gradients on the wire; default: --dtype",
    )
    plan.add_argument(
        "--persistence-threshold",
        metavar="N",
        type=not_negative,
        help="parameters of fewer elements are packed and stay whole",
    )
    plan.add_argument(
        "--layers", metavar="N", type=positive, help="fewer layers than the model has"
    )
    plan.add_argument("--checkpointing", action="store_true", help="activation checkpointing on")
    plan.add_argument(
        "--passes",
        metavar="P,Q",
        type=comma_separated,
        help="all passes to run, in order, instead of the stage's own",
    )
    plan.add_argument("--out", metavar="FILE", help="write the planned program's text")
    plan.add_argument("--captured", metavar="FILE", help="write the program before the passes")
    plan.add_argument("--save-plan", metavar="FILE", help="write the frozen plan (JSON)")
    plan.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def positive(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def not_negative(text: str) -> int:
    value = whole_number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def byte_size(text: str) -> int:
    try:
        value = _core.parse_bytes(text)
    except UserError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size: write it as 40GiB or 512MiB")
    return value


def comma_separated(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


# Files.


def read_program(path: str) -> _core.StepProgram:
    """The program in a file, or on standard input if ``path`` is ``-``."""
    if path == "-":
        return _core.StepProgram.parse(sys.stdin.read(), "stdin")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"[cli] {path}: cannot be read ({reason(error)}). Check the path."
        ) from None
    if text.lstrip().startswith("{"):
        raise UserError(
            f"[cli] {path}: is JSON. Give the program's text, as `plan --out` writes it."
        )
    return _core.StepProgram.parse(text, path)


def read_machine(name: str) -> _core.Machine:
    """A built-in machine, or one from a file."""
    if name in _core.Machine.builtin_names():
        return _core.Machine.builtin(name)
    is_path = name.endswith(".json") or os.sep in name or Path(name).is_file()
    return _core.Machine.load(name) if is_path else _core.Machine.builtin(name)


def write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"[cli] {path}: cannot be written ({reason(error)}). Choose another place."
        ) from None


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


# Commands.


def run_passes(
    program: _core.StepProgram,
    passes: Sequence[str],
    machine: _core.Machine | None,
    options: argparse.Namespace,
) -> list[_core.PassRecord]:
    """Runs passes for the machine and the memory that the options name."""
    budget = options.memory_budget
    if budget is None and machine is not None:
        budget = machine.memory_bytes
    return _core.run_passes(program, passes, machine=machine, memory_budget=budget)


def run_opt(options: argparse.Namespace) -> None:
    program = read_program(options.file)
    machine = read_machine(options.machine) if options.machine else None
    for record in run_passes(program, options.passes, machine, options):
        print(record, file=sys.stderr)
    if options.out:
        write(options.out, str(program))
    else:
        print(program, end="")


def simulate_file(options: argparse.Namespace) -> tuple[_core.StepProgram, _core.SimResult]:
    program, machine = read_program(options.file), read_machine(options.machine)
    run_passes(program, options.passes, machine, options)
    return program, _core.simulate(program, machine)


def run_sim(options: argparse.Namespace) -> None:
    program, sim = simulate_file(options)
    machine = read_machine(options.machine)
    if options.trace:
        write(options.trace, _core.perfetto_trace([(f"predicted on {machine.name}", sim)]))
    facts = summary(program, machine, sim)
    print(json.dumps(facts, indent=2) if options.json else as_table(facts))


def run_explain(options: argparse.Namespace) -> None:
    program, sim = simulate_file(options)
    print(_core.explain(program, sim), end="")


def run_report(options: argparse.Namespace) -> None:
    from .report import write_report

    program, sim = simulate_file(options)
    machine = read_machine(options.machine)
    data = {
        "title": f"{program.name} on {machine.name}",
        "facts": {
            "Machine": machine.device_name,
            "World": f"{program.world} ranks",
            "Accumulation": f"{program.accumulation} micro-steps",
            "Plan": _core.freeze(program).hash,
        },
        "timeline": {
            "predicted": [i.as_dict() for i in sim.items if i.resource != "none"],
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
    try:
        print(write_report(data, options.out))
    except OSError as error:
        raise UserError(
            f"[cli] {options.out}: cannot be written ({reason(error)}). Choose another place."
        ) from None


def run_launch(options: argparse.Namespace) -> None:
    raise UserError("[cli] launch: nothing to run. Give torchrun's arguments and a script.")


def run_plan(options: argparse.Namespace) -> None:
    machine = read_machine(options.machine)
    program, facts = capture_step(options, options.ranks or machine.ranks)
    if options.captured:
        write(options.captured, str(program))
    passes = PASSES_OF_STAGE[options.stage] if options.passes is None else options.passes
    run_passes(program, passes, machine, options)
    sim = _core.simulate(program, machine)
    plan = _core.freeze(program)
    if options.out:
        write(options.out, str(program))
    if options.save_plan:
        write(options.save_plan, plan.serialize())
    if options.trace:
        write(options.trace, _core.perfetto_trace([(f"predicted on {machine.name}", sim)]))
    tokens = options.batch * options.seq * options.accumulation
    facts |= summary(program, machine, sim)
    facts["tokens_per_second_per_rank"] = round(tokens * 1e9 / max(sim.time_ns, 1), 1)
    facts["plan"] = plan.hash
    print(json.dumps(facts, indent=2) if options.json else as_table(facts))


def capture_step(
    options: argparse.Namespace, world: int
) -> tuple[_core.StepProgram, dict[str, Any]]:
    """The model's whole step, compute alone, and what the capture says of it."""
    from .capture.meta import capture_model  # starts torch
    from .capture.program import update_program

    wanted = {}
    if options.persistence_threshold is not None:
        wanted["persistence_threshold"] = options.persistence_threshold
    graphs, table = capture_model(
        options.model,
        batch=options.batch,
        seq=options.seq,
        dtype=options.dtype,
        stage=options.stage,
        world=world,
        checkpointing=options.checkpointing,
        num_layers=options.layers,
        **wanted,
    )
    short = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}
    programs = [graph.program for graph in graphs]
    update = update_program(table)
    for program in [*programs, update]:
        program.world = world
        program.accumulation = options.accumulation
        program.clip = options.clip
        program.reduce_dtype = short[options.reduce_dtype or options.dtype]
    name = Path(options.model).stem if options.model.endswith(".json") else options.model
    facts = {
        "model": options.model,
        "parameters": sum(numel_of(spec) for spec in table.params),
        "regions": sum(len(program.regions) for program in programs),
        "distinct_regions": len({r.code for p in programs for r in p.regions}),
    }
    return _core.merge_steps(name, programs, update), facts


def numel_of(spec: Any) -> int:
    """Elements of a param's members, without the gaps between them."""
    return sum(member.numel for member in spec.members)


if __name__ == "__main__":
    sys.exit(main())
