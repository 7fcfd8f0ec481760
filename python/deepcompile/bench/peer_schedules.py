# SPDX-License-Identifier: Apache-2.0
"""The peers' schedules as step programs, so that they can be simulated.

What is modelled is when transfers start and what stays in memory; kernels are
our compiled regions, so a peer here has no cost of eager launches, hooks, or
copies into and out of flat buffers. It is a bound in the peer's favour.

*FSDP2*, as `fully_shard` of each layer and of the whole, with its defaults: a
layer's parameters are gathered together; while one layer computes the next is
gathered, in forward and backward (implicit and BACKWARD_PRE prefetch); layers
are resharded after forward, the rest (embedding, output) stays whole until its
last use in the backward; a layer's gradients are reduced together when the last
of them is there, and waited for when the next layer's are.

*ZeRO-3* of DeepSpeed: a parameter is gathered by itself; when one is waited for,
following ones are started until `stage3_prefetch_bucket_size` elements are under
way; released after its last use in forward and in backward. Reductions as
zero3_compile places them: each as soon as its gradient is there, at most two
outstanding (`overlap_comm`, on by default at stage 3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .. import _core
from .._core import Instr, Section, StepProgram

PREFETCH_BUCKET = 50_000_000
"""Elements: DeepSpeed's default of stage3_prefetch_bucket_size."""
_NUMBERED = re.compile(r"^(.*?\.\d+)\.")


class _Peer:
    """A pass: gathers, releases and, where the peer has its own order, reductions."""

    contract = _core.PassContract(
        provides=["gathers_placed", "reductions_placed", "updates_placed"],
        conflicts=["gathers_placed", "reductions_placed", "updates_placed"],
    )

    def __call__(self, program: StepProgram, context: _core.PassContext) -> None:
        context.run(program, "zero3_compile")
        params = {p.name: p for p in program.params}
        sharded = {name for name, p in params.items() if p.placement == "sharded"}
        users = {r.name: _params_of(r, sharded) for r in program.regions}
        numel = {name: params[name].numel for name in sharded}
        for section in program.sections:
            if section.kind != "update":
                self.schedule(section, users, numel)
        self.finish(program)
        context.because("", self.reason)

    reason = ""

    def schedule(
        self, section: Section, users: dict[str, list[str]], numel: dict[str, int]
    ) -> None:
        raise NotImplementedError

    def finish(self, program: StepProgram) -> None:
        """After the last section."""


class Zero3Schedule(_Peer):
    reason = "scheduled as DeepSpeed's ZeRO-3 does: parameter by parameter, one bucket ahead"

    def __init__(self, bucket: int = PREFETCH_BUCKET):
        self.bucket = bucket

    def schedule(
        self, section: Section, users: dict[str, list[str]], numel: dict[str, int]
    ) -> None:
        runs = _without_gathers(section)
        units = [[name] for name in _in_order(runs, users)]
        section.set_instrs(_gathered_ahead(runs, users, numel, units, self.bucket, set()))


class FsdpSchedule(_Peer):
    reason = "scheduled as FSDP2 does by default: layer by layer, one ahead, resharded"

    def schedule(
        self, section: Section, users: dict[str, list[str]], numel: dict[str, int]
    ) -> None:
        runs = _without_gathers(section)
        used = _in_order(runs, users)
        layers = list(dict.fromkeys(layer for layer in map(layer_of, used) if layer))
        units = [[name for name in used if layer_of(name) == layer] for layer in layers]
        root = [name for name in used if not layer_of(name)]
        kept = set(root) if section.kind == "forward" else set()
        if section.kind == "backward":
            runs = _reduced_by_layer(runs)
        order = [unit for unit in [root, *units] if unit]
        section.set_instrs(_gathered_ahead(runs, users, numel, order, 1, kept))

    def finish(self, program: StepProgram) -> None:
        """What a forward kept and its backward did not use is released at the backward's end."""
        for forward in program.sections:
            pair = [s for s in program.sections if s.graph == forward.graph]
            backward = next((s for s in pair if s.kind == "backward"), None)
            if forward.kind != "forward" or backward is None:
                continue
            released = {i.param for s in (forward, backward) for i in s.instrs if i.op == "release"}
            gathered = dict.fromkeys(i.param for i in forward.instrs if i.op == "gather")
            for name in gathered:
                if name not in released:
                    for op in (
                        "gather",
                        "wait",
                        "release",
                    ):  # it is whole: the first two do nothing
                        backward.add(op, name)


def layer_of(name: str) -> str:
    """``model.layers.7.mlp.up_proj.weight`` -> ``model.layers.7``; empty outside of layers."""
    match = _NUMBERED.match(name)
    return match.group(1) if match else ""


def _params_of(region: _core.Region, sharded: set[str]) -> list[str]:
    """Its sharded parameters, each once, in call order."""
    names = [operand.split("[")[0] for operand in region.inputs]
    return [name for name in dict.fromkeys(names) if name in sharded]


def _without_gathers(section: Section) -> list[Instr]:
    return [i for i in section.instrs if i.op not in ("gather", "wait", "release")]


def _in_order(instrs: Sequence[Instr], users: dict[str, list[str]]) -> list[str]:
    """Parameters by their first use."""
    return list(dict.fromkeys(name for i in instrs if i.op == "run" for name in users[i.region]))


def _gathered_ahead(
    instrs: Sequence[Instr],
    users: dict[str, list[str]],
    numel: dict[str, int],
    units: list[list[str]],
    ahead: int,
    kept: set[str],
) -> list[Instr]:
    """Instructions with each unit gathered as a whole. When a unit is waited for, the next are
    started until ``ahead`` elements are on their way; what is in ``kept`` is not released."""
    unit_of = {name: at for at, unit in enumerate(units) for name in unit}
    size = [sum(numel[name] for name in unit) for unit in units]
    last = {
        unit_of[name]: at
        for at, i in enumerate(instrs)
        if i.op == "run"
        for name in users[i.region]
    }
    started = waited = 0
    out: list[Instr] = []
    for at, instr in enumerate(instrs):
        names = users[instr.region] if instr.op == "run" else []
        for unit in range(waited, max((unit_of[n] for n in names), default=-1) + 1):
            if unit == started:
                out += [Instr("gather", name) for name in units[unit]]
                started += 1
            out += [Instr("wait", name) for name in units[unit]]
            waited = unit + 1
            while started < len(units) and sum(size[waited:started]) < ahead:
                out += [Instr("gather", name) for name in units[started]]
                started += 1
        out.append(instr)
        for unit in dict.fromkeys(unit_of[name] for name in names):
            if last[unit] == at:
                out += [Instr("release", name) for name in units[unit] if name not in kept]
    return out


def _reduced_by_layer(instrs: Sequence[Instr]) -> list[Instr]:
    """Reductions of a layer together, where its last one stood, behind the wait for the layer's
    before; those outside of layers at the end."""
    reduces = [i for i in instrs if i.op == "reduce"]
    groups: dict[str, list[Instr]] = {}
    for reduce in reduces:
        groups.setdefault(layer_of(reduce.param), []).append(reduce)
    final = {id(group[-1]): group for layer, group in groups.items() if layer}
    out: list[Instr] = []
    outstanding: list[Instr] = []

    def issue(group: list[Instr]) -> None:
        nonlocal outstanding
        out.extend(Instr("accumulate", i.param) for i in outstanding)
        out.extend(group)
        outstanding = group

    for instr in instrs:
        if instr.op not in ("reduce", "accumulate"):
            out.append(instr)
        elif id(instr) in final:
            issue(final[id(instr)])
    issue(groups.get("", []))
    issue([])
    return out
