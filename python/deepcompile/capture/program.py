# SPDX-License-Identifier: Apache-2.0
"""From captured graphs to step programs."""

from __future__ import annotations

from deepcompile import _core
from deepcompile.capture.graph import GraphIR
from deepcompile.params import MemberRef, ParamTable, dtype_name, ir_name


def _add_params(program: _core.StepProgram, table: ParamTable, params: list[int]) -> None:
    for i in params:
        spec = table.params[i]
        program.add_param(
            spec.name,
            dtype_name(spec.dtype),
            spec.numel,
            placement=spec.placement,
            trainable=spec.trainable,
            members=[ir_name(m.name) for m in spec.members] if spec.packed else [spec.name],
        )


def to_program(
    ir: GraphIR, table: ParamTable, *, world: int = 1, name: str = "step"
) -> _core.StepProgram:
    """The compute-only step program of one graph: its sections run its regions in order."""
    program = _core.StepProgram()
    program.name, program.world = name, world
    _add_params(program, table, ir.params_used())
    for value in ir.values:
        grad = None if value.grad_of is None else table.operand(value.grad_of)
        program.add_value(value.name, value.nbytes, grad_of=grad)
    for region in ir.regions:
        inputs = [table.operand(x) if isinstance(x, MemberRef) else x for x in region.inputs]
        program.add_region(
            region.name,
            region.code,
            inputs,
            region.outputs,
            workspace=region.workspace,
            moved=region.moved,
            flops=region.flops,
            once=region.once,
            checkpoint=region.checkpoint,
        )
    for part in ir.sections:
        section = program.add_section(part.kind, ir.graph, part.inputs, part.outputs)
        for region in part.regions:
            section.run(region)
    return program


def update_program(
    table: ParamTable, *, world: int = 1, clip: bool = False, name: str = "step"
) -> _core.StepProgram:
    """A program with an empty update section over all trainable params, for a pass to fill."""
    program = _core.StepProgram()
    program.name, program.world, program.clip = name, world, clip
    _add_params(program, table, [i for i, p in enumerate(table.params) if p.trainable])
    program.add_section("update", 0, [], [])
    return program
