# SPDX-License-Identifier: Apache-2.0
"""A model's training step on a machine that is not there: captured without weights, planned by
passes, simulated. What `deepcompile plan` and `deepcompile bench --simulate` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import _core
from .config import CompileConfig
from .errors import UserError
from .schedule import STAGE_PASS

STAGE_NAMES = {0: "replicated", 1: "ZeRO1", 2: "ZeRO2", 3: "ZeRO3"}
SHORT_DTYPES = {"bf16": "bf16", "fp16": "f16", "fp32": "f32"}


@dataclass(frozen=True)
class StepOptions:
    """A training step of a Hugging Face causal language model."""

    model: str
    """A config.json, a folder with one, or a built-in name."""
    batch: int = 1
    """Sequences of one rank."""
    dtype: str = "bf16"
    stage: int = 3
    accumulation: int = 1
    clip: bool = False
    reduce_dtype: str | None = None
    """Default: dtype."""
    persistence_threshold: int | None = None
    """Default: the engine's."""
    layers: int | None = None
    """Another depth than the model's."""
    checkpointing: bool = False
    """Activation checkpointing in the model."""
    checkpoint_marks: str = "obey"
    """What it means: ``obey``: all that is marked is computed again, inside the backward's
    compiled code; ``hint``: plans may choose to."""
    capture_all_layers: bool = False
    """Not only a few of the equal ones."""

    @property
    def name(self) -> str:
        return Path(self.model).stem if self.model.endswith(".json") else self.model


def named_plans(stage: int) -> list[tuple[str, list[str]]]:
    """(name, passes) of the plans that are compared at a stage of ZeRO."""
    base = STAGE_PASS[stage]
    plans = [(STAGE_NAMES[stage], [base])]
    if stage == 3:
        plans += [
            ("P", [base, "prefetch"]),
            ("S", [base, "selective_gather"]),
            ("P+S", [base, "selective_gather", "prefetch"]),
        ]
    return [*plans, ("auto", ["auto"])]


def default_budget(machine: _core.Machine) -> int:
    """Bytes of one rank that plans may use: the machine's less the engine's reserve."""
    return round(machine.memory_bytes * (1 - CompileConfig.memory_reserve))


def capture_step(
    options: StepOptions, seq: int, world: int, machine: _core.Machine
) -> tuple[_core.StepProgram, dict[str, Any]]:
    """The model's whole step, compute alone, and what the capture says of it. Embeddings are
    exchanged by rows where that pays on the machine, as an engine would."""
    from .capture.graph import CaptureOptions
    from .capture.meta import capture_model, capture_repeated
    from .capture.program import update_program
    from .embedding_rows import pays, read_rows, simulator

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
        options=CaptureOptions(backend="none", checkpoint_marks=options.checkpoint_marks),
        **wanted,
    )
    programs = [graph.program for graph in graphs]
    update = update_program(table)
    for program in [*programs, update]:
        program.world = world
        program.accumulation = options.accumulation
        program.clip = options.clip
        program.boundary = options.stage == 1
        program.reduce_dtype = SHORT_DTYPES[options.reduce_dtype or options.dtype]
    simulate = simulator(machine, update, STAGE_PASS[options.stage])
    for graph, program in zip(graphs, programs, strict=True):
        for read in graph.ir.rows if world > 1 else ():
            if read.value is not None and pays(program, read, table, simulate)[0]:
                read_rows(program, read, table)
    facts = {
        "parameters": sum(m.numel for spec in table.params for m in spec.members),
        "regions": sum(len(program.regions) for program in programs),
        "distinct_regions": len({r.code for p in programs for r in p.regions}),
    }
    return _core.merge_steps(options.name, programs, update), facts


def run_passes(
    program: _core.StepProgram,
    passes: Sequence[Any],
    machine: _core.Machine | None,
    budget: int | None,
    costs: _core.CostTable | None = None,
    early_updates: bool = False,
) -> list[_core.PassRecord]:
    """Runs passes for a machine; without a budget they may use all of its memory."""
    if machine is not None:
        budget = budget or machine.memory_bytes
        if costs is None:
            _core.analytic_costs(program, machine)
    return _core.run_passes(
        program,
        passes,
        machine=machine,
        memory_budget=budget,
        costs=costs,
        early_updates=early_updates,
    )


def predict(
    program: _core.StepProgram,
    passes: Sequence[Any],
    machine: _core.Machine,
    tokens: int,
    budget: int,
    early_updates: bool = False,
) -> dict[str, Any]:
    """Runs the passes and simulates the step, of ``tokens`` on each rank. A plan that the passes
    refuse is an answer, too: its ``note`` says why. JSON can hold what is returned."""
    try:
        run_passes(program, passes, machine, budget, early_updates=early_updates)
    except UserError as error:
        return {
            "step_ns": None,
            "tokens_per_second_per_gpu": None,
            "peak_bytes": None,
            "fits": False,
            "hash": None,
            "note": str(error),
        }
    sim = _core.simulate(program, machine)
    return {
        "step_ns": sim.time_ns,
        "tokens_per_second_per_gpu": round(tokens * 1e9 / max(sim.time_ns, 1), 1),
        "peak_bytes": sim.peak_bytes,
        "resident_bytes": sim.resident_bytes,
        "fits": sim.peak_bytes <= budget,
        "hash": _core.freeze(program).hash,
        "note": "",
    }
