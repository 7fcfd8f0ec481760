# SPDX-License-Identifier: Apache-2.0
"""What a capture is made of, as plain data: regions, values, sections.

``GraphIR`` is the Python side's own form. ``program.to_program`` turns it into
a step program; ``Sink.install`` gets it as part of a ``CapturedGraph`` and
answers with the ``Runner`` that the compiled function calls from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deepcompile.params import MemberRef, ParamTable

BoxedCode = Callable[[list], Sequence[Any]]
"""A region's compiled function: takes a list of inputs, empties it, returns the outputs."""


@dataclass(frozen=True)
class CaptureOptions:
    backend: str = "inductor"
    """What compiles the regions: ``inductor``, ``eager`` (runs them as ATen calls), or ``none``
    (no code at all: a capture for planning)."""
    region_bytes: int = 1 << 30
    """Most bytes of parameters in a region; a single parameter may exceed it."""
    region_host: str = "python"
    """With Inductor, the language of the code around a region's kernels: ``python`` or ``cpp``."""
    checkpoint_marks: str = "obey"
    """The user's activation-checkpoint marks: ``obey`` recomputes what they cover inside the
    backward's regions; ``hint`` marks the forward's regions and leaves it to the plan."""
    inductor_options: dict[str, Any] = field(default_factory=dict)
    """Inductor settings for the regions, as in torch.compile(options=...)."""
    cache_dir: str | None = None
    """Inductor's disk cache and the locks around it; None: torch's own choice."""
    compile_threads: int | None = None
    """Inductor's worker processes; None: torch's own choice."""
    deep: Callable[[GraphIR, ParamTable], GraphIR] | None = None
    """What a graph stands for of which some equal layers were traced (layers.py)."""


@dataclass(frozen=True)
class ValueIR:
    name: str
    nbytes: int
    """Of the shapes seen at capture; 8 for a number."""
    grad_of: MemberRef | None = None


@dataclass
class RegionIR:
    name: str
    code: int
    """Index into ``CapturedGraph.codes``."""
    inputs: list[str | MemberRef]
    """Value names and parameter members, in call order."""
    outputs: list[str]
    key: str
    """Hash of the region's computation and shapes: equal keys share ``code``."""
    workspace: int = 0
    """Bytes alive only while it runs (see costs.py)."""
    moved: int = 0
    """Bytes of device memory traffic."""
    flops: int = 0
    once: bool = False
    """Must never run again (see effects.py)."""
    checkpoint: bool = False
    """The user marked it for recomputation."""


@dataclass
class SectionIR:
    kind: str
    """``forward``, ``backward`` or ``inference``."""
    inputs: list[str]
    outputs: list[str]
    regions: list[str]


@dataclass
class RowRead:
    """A parameter that embeddings read."""

    member: MemberRef
    value: str | None = None
    """The forward's input that numbers its rows, nothing else of it being read; None: there is
    none."""
    why: str = ""
    """Why there is none."""


@dataclass
class GraphIR:
    graph: int
    values: list[ValueIR]
    regions: list[RegionIR]
    sections: list[SectionIR]
    rows: list[RowRead] = field(default_factory=list)

    def region(self, name: str) -> RegionIR:
        return next(r for r in self.regions if r.name == name)

    def members_used(self) -> set[MemberRef]:
        """Members that a region reads or whose gradient it makes."""
        read = {x for r in self.regions for x in r.inputs if isinstance(x, MemberRef)}
        return read | {v.grad_of for v in self.values if v.grad_of is not None}

    def params_used(self) -> list[int]:
        """The params of these, by index in the table."""
        return sorted({ref.param for ref in self.members_used()})


@dataclass(frozen=True)
class OutputSlot:
    """Where one output of the AOT graph comes from: a section output or a constant."""

    index: int | None
    constant: Any = None


@dataclass
class CallMap:
    """How an AOT graph's argument and output lists map to a section's."""

    inputs: list[int]
    """Argument position of each section input."""
    outputs: list[OutputSlot]
    """One per AOT output; parameter gradients are the constant None."""


@dataclass
class CapturedGraph:
    graph_id: int
    ir: GraphIR
    program: Any
    """Compute-only ``_core.StepProgram`` of this graph: runs and nothing else."""
    codes: list[BoxedCode]
    """All compiled functions of this backend so far; regions' ``code`` indexes it."""
    inference: bool
    times: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: dynamo, aot, partition, cut, compile."""
    section_outputs: dict[str, list[Any]] = field(default_factory=dict)
    """Fake tensors (or numbers) of the outputs of each section, by kind."""
    distinct_regions: int = 0
    """Different computations among this graph's regions."""
    cache: dict[str, int] = field(default_factory=dict)
    """Region compilations of this graph: disk_hits, disk_misses, disk_bypassed, reused."""
    user_stack: str = ""
    """Where in the user's code the graph starts: ``file:line in function``."""


class Runner(Protocol):
    """Runs the sections of one captured graph. Parameters are the runner's own affair."""

    def forward(self, inputs: list) -> tuple[torch.Tensor, Sequence[Any]]:
        """(token, section outputs). The token is an int64 CPU tensor of one element whose
        value names this call; when it dies, so may the call's saved values."""

    def backward(self, call_id: int, inputs: list) -> Sequence[Any]:
        """Section outputs. Ends the call ``call_id``; reduces parameter gradients itself."""

    def inference(self, inputs: list) -> Sequence[Any]: ...


class Sink(Protocol):
    def install(self, captured: CapturedGraph) -> Runner:
        """Called once a graph, before it first runs, when its tracing is over: tensors are real and
        the GIL is free, so that it may talk to other ranks."""
