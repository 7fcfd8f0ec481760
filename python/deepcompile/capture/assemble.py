# SPDX-License-Identifier: Apache-2.0
"""From the AOT graphs of one capture to regions, values and sections (GraphIR)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from deepcompile.capture.canonical import MetaKeys, region_key, region_module
from deepcompile.capture.compile import RegionCompiler
from deepcompile.capture.costs import Costs, extent_bytes, region_costs
from deepcompile.capture.effects import is_checkpointed, runs_once
from deepcompile.capture.graph import (
    CallMap,
    GraphIR,
    OutputSlot,
    RegionIR,
    SectionIR,
    ValueIR,
)
from deepcompile.capture.joint import OWN_MEMORY, derived, is_factory
from deepcompile.capture.rows import row_reads
from deepcompile.capture.saved import TOKEN, is_number
from deepcompile.capture.sources import (
    Source,
    gradient_outputs,
    output_node,
    outputs,
    param_inputs,
    set_outputs,
)
from deepcompile.capture.split import cut
from deepcompile.capture.versions import Reached
from deepcompile.errors import UserError
from deepcompile.params import MemberRef, ParamTable

WRITE = torch.ops.aten.copy_.default
"""What a graph ends with for each input that it writes to."""

_PREFIX = {"forward": "fwd", "backward": "bwd", "inference": "inf"}


def _supported(node: fx.Node) -> None:
    value = node.meta.get("val")
    if value is not None and not isinstance(value, torch.Tensor) and not is_number(value):
        raise UserError(
            f"[capture] input {node.name}: is a {type(value).__name__}, neither a tensor nor a "
            "number. Keep it out of the compiled forward, or exclude the module that uses it."
        )


@dataclass
class _Part:
    """One AOT graph on its way to a section."""

    kind: str
    gm: fx.GraphModule
    params: dict[fx.Node, MemberRef]
    gradients: dict[int, MemberRef] = field(default_factory=dict)
    """By output position."""

    def own_outputs(self, fake_mode: Any) -> None:
        """Give each output memory of its own where it would be a parameter's or another
        gradient's, and make gradients contiguous."""
        graph = self.gm.graph
        repeated = derived(graph, self.params)
        taken: set[fx.Node] = set()
        values = outputs(graph)
        for i, node in enumerate(values):
            if not isinstance(node, fx.Node):
                continue
            is_grad = i in self.gradients
            shared = node in repeated or is_factory(node) or node.op == "get_attr"
            if is_grad:
                value = node.meta["val"]
                shared = shared or node in taken or node.op == "placeholder"
                shared = shared or not value.is_contiguous()
                taken.add(node)
            if shared:
                values[i] = self._clone(node, is_grad, fake_mode)
        set_outputs(graph, values)

    def keep_before_writes(self, first: int, fake_mode: Any) -> None:
        """Let outputs from `first` on, which are saved, be what inputs held before the graph
        writes to them (buffers): the backward is of that."""
        values = outputs(self.gm.graph)
        for i, node in list(enumerate(values))[first:]:
            if not isinstance(node, fx.Node) or node.op != "placeholder":
                continue
            writes = {u for u in node.users if u.target is WRITE and u.args[0] is node}
            if writes:
                first_write = next(n for n in self.gm.graph.nodes if n in writes)
                values[i] = self._clone(node, False, fake_mode, first_write)
        set_outputs(self.gm.graph, values)

    def _clone(
        self, node: fx.Node, contiguous: bool, fake_mode: Any, before: fx.Node | None = None
    ) -> fx.Node:
        form = torch.contiguous_format if contiguous else torch.preserve_format
        graph = self.gm.graph
        with graph.inserting_before(before or output_node(graph)):
            copy = graph.call_function(
                torch.ops.aten.clone.default, (node,), {"memory_format": form}
            )
        copy.meta[OWN_MEMORY] = True
        with fake_mode:
            copy.meta["val"] = node.meta["val"].clone(memory_format=form)
        return copy


class Assembler:
    """Builds one captured graph's IR. Codes are registered with ``compiler``, not compiled."""

    def __init__(
        self,
        graph_id: int,
        table: ParamTable,
        sources: dict[Source, MemberRef],
        compiler: RegionCompiler,
        fake_mode: Any,
    ):
        self.ir = GraphIR(graph_id, [], [], [])
        self.calls: dict[str, CallMap] = {}
        self.section_outputs: dict[str, list[Any]] = {}
        self.saved: list[bool] = []
        self.token = 0
        self.reached = Reached()
        self.reused = 0
        self._table, self._sources = table, sources
        self._compiler, self._fake_mode = compiler, fake_mode
        self._taken = {p.name for p in table.params}
        self._names: dict[fx.Node, str] = {}
        self._costs: dict[str, Costs] = {}

    def inference(self, gm: fx.GraphModule) -> None:
        part = self._part("inference", gm)
        part.own_outputs(self._fake_mode)
        self._section(part, outputs(gm.graph))

    def training(self, forward: fx.GraphModule, backward: fx.GraphModule) -> None:
        fwd, bwd = self._part("forward", forward), self._part("backward", backward)
        values = outputs(forward.graph)
        num_outputs = next(i for i, v in enumerate(values) if getattr(v, "name", "") == TOKEN)
        returned, saved = values[:num_outputs], values[num_outputs + 1 :]
        self.saved = [not is_number(n.meta.get("val")) for n in saved]
        holders = self._saved_values(bwd, {n.name: n for n in saved if n not in fwd.params})
        kept = list(dict.fromkeys(holders.values()))
        set_outputs(forward.graph, [*returned, *kept])
        bwd.gradients = gradient_outputs(backward.graph, self._sources)
        fwd.keep_before_writes(num_outputs, self._fake_mode)
        fwd.own_outputs(self._fake_mode)
        bwd.own_outputs(self._fake_mode)
        values = outputs(forward.graph)
        inputs = forward.graph.find_nodes(op="placeholder")
        self.reached = Reached.of(inputs, values[:num_outputs], values[num_outputs:])
        made = dict(zip(kept, values[num_outputs:], strict=True))
        self._section(fwd, values[:num_outputs])
        for read, numbers in row_reads(fwd.gm.graph, fwd.params, bwd.params, self._table):
            read.value = None if numbers is None else self._names[numbers]
            self.ir.rows.append(read)
        for placeholder, value in holders.items():
            self._names[placeholder] = self._names[made[value]]
        self._section(bwd, outputs(backward.graph), skip=set(holders))

    def _part(self, kind: str, gm: fx.GraphModule) -> _Part:
        for node in gm.graph.find_nodes(op="placeholder"):
            _supported(node)
        return _Part(kind, gm, param_inputs(gm.graph, self._sources))

    def _saved_values(self, bwd: _Part, made: dict[str, fx.Node]) -> dict[fx.Node, fx.Node]:
        """Backward placeholder to the forward node it holds, for those that are used."""
        found = {}
        for i, node in enumerate(bwd.gm.graph.find_nodes(op="placeholder")):
            if node.name == TOKEN:
                self.token = i
            elif node not in bwd.params and node.name in made and node.users:
                found[node] = made[node.name]
        return found

    def _name(self, node: fx.Node, kind: str) -> str:
        if node not in self._names:
            part = ".b" if kind == "backward" else ""
            name = f"g{self.ir.graph}{part}.{node.name}"
            while name in self._taken:
                name += "_"
            self._taken.add(name)
            self._names[node] = name
        return self._names[node]

    def _section(self, part: _Part, returned: list[Any], skip: frozenset | set = frozenset()):
        """Cut ``part`` and add its values, regions and section."""
        graph = part.gm.graph
        grads = {returned[i]: ref for i, ref in part.gradients.items()}
        seams = {n for n, ref in part.params.items() if self._table.is_seam(ref)}
        regions = cut(
            part.gm, set(part.params), seams, set(grads), self._compiler.options.region_bytes
        )
        read = {n for r in regions for n in r.inputs} | {
            n for n in outputs(graph) if isinstance(n, fx.Node)
        }
        arguments = [
            (i, n)
            for i, n in enumerate(graph.find_nodes(op="placeholder"))
            if n in read and n not in part.params and n not in skip
        ]
        for node in [n for _, n in arguments] + [n for r in regions for n in r.outputs]:
            name = self._name(node, part.kind)
            size = extent_bytes(node.meta.get("val"))
            self.ir.values.append(ValueIR(name, size, grads.get(node)))
        keys = MetaKeys()
        names = [self._region(part, i, r, keys) for i, r in enumerate(regions)]
        slots, values = self._output_slots(part, returned, grads)
        self.calls[part.kind] = CallMap([i for i, _ in arguments], slots)
        self.section_outputs[part.kind] = [n.meta.get("val") for n in values]
        self.ir.sections.append(
            SectionIR(
                part.kind,
                [self._name(n, part.kind) for _, n in arguments],
                [self._name(n, part.kind) for n in values],
                names,
            )
        )

    def _output_slots(
        self, part: _Part, returned: list[Any], grads: dict[fx.Node, MemberRef]
    ) -> tuple[list[OutputSlot], list[fx.Node]]:
        position: dict[fx.Node, int] = {}
        slots = []
        for i, node in enumerate(returned):
            if i in part.gradients:
                slots.append(OutputSlot(None))
            elif isinstance(node, fx.Node):
                slots.append(OutputSlot(position.setdefault(node, len(position))))
            else:
                slots.append(OutputSlot(None, node))
        return slots, list(position)

    def _region(self, part: _Part, index: int, region: Any, keys: MetaKeys) -> str:
        params = set(part.params)
        nodes, ins, outs = region.nodes, region.inputs, region.outputs
        key = region_key(part.gm, nodes, ins, outs, params, keys)
        if region.symbolic:
            key += f"-g{self.ir.graph}"
        name = f"{_PREFIX[part.kind]}{self.ir.graph}.{index}"
        static = tuple(i for i, n in enumerate(ins) if n in params)
        code, is_new = self._compiler.add(
            key,
            name,
            lambda: region_module(part.gm, nodes, ins, outs),
            part.kind == "backward",
            static,
        )
        self.reused += not is_new
        fused = self._compiler.options.backend != "eager"
        if key not in self._costs:
            self._costs[key] = region_costs(nodes, ins, outs, fused=fused)
        costs = self._costs[key]
        self.ir.regions.append(
            RegionIR(
                name,
                code,
                [part.params[n] if n in params else self._name(n, part.kind) for n in ins],
                [self._name(n, part.kind) for n in outs],
                key,
                workspace=costs.workspace,
                moved=costs.moved,
                flops=costs.flops,
                once=runs_once(nodes, fused),
                checkpoint=part.kind == "forward" and is_checkpointed(nodes),
            )
        )
        return name
