# SPDX-License-Identifier: Apache-2.0
"""A section's instructions as a torch.fx graph in DeepSpeed's terms, and back."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import _core
from ..errors import UserError
from ..params import DTYPES

_SCHEMAS = {
    "allgather_param": "(Tensor a, int graph_id, int id, ScalarType? dtype = None) -> Tensor",
    "prefetch_params_fused": (
        "(int graph_id, Tensor[] params, int[] ids, ScalarType[]? dtypes = None) -> ()"
    ),
    "wait_allgather": "(Tensor(a) a, int graph_id, int id) -> Tensor(a)",
    "release_param": "(Tensor(a) a, int graph_id, int id, int n_users) -> Tensor(a)",
    "reduce_grad": "(Tensor a, int graph_id, int id) -> Tensor",
    "free_tensors": "(Tensor[] a) -> ()",
    "offload_tensor": "(Tensor a, int graph_id, int id) -> Tensor",
    "reload_tensor": "(Tensor a, int graph_id, int id) -> Tensor",
    "wait_offload": "(Tensor a, int graph_id, int id) -> Tensor",
    "wait_reload": "(Tensor a, int graph_id, int id) -> Tensor",
    "offload_parameter": "(Tensor a, int graph_id, int id) -> ()",
    "reload_parameter": "(Tensor a, int graph_id, int id) -> ()",
    "end_backward": "(Any deps, int graph_id, bool release_reduce_buckets) -> ()",
}
"""DeepSpeed's operators: passes look for nodes of any. The first five have a meaning here."""
_OPS = {
    "gather": "allgather_param",
    "wait": "wait_allgather",
    "release": "release_param",
    "reduce": "reduce_grad",
}
_defined: list[Any] = []


def dc_ops() -> Any:
    """``torch.ops.dc``, with DeepSpeed's schemas where DeepSpeed has not defined them itself.
    The operators only name nodes: nothing calls them."""
    missing = [n for n in _SCHEMAS if not hasattr(torch.ops.dc, n)]
    if missing:
        library = torch.library.Library("dc", "FRAGMENT")
        for name in missing:
            library.define(name + _SCHEMAS[name])
        _defined.append(library)  # definitions end with their library
    return torch.ops.dc


def run_region(region: str, *inputs: Any) -> Any:
    """The target of a node that runs a region."""
    raise UserError(f"[passes] run_region {region}: nothing runs while a plan is made.")


def instruction(op: str, operand: str | None, values: tuple[str, ...], *after: Any) -> Any:
    """The target of a node for an instruction that DeepSpeed has no operator for."""
    raise UserError(f"[passes] {op} {operand}: nothing runs while a plan is made.")


@dataclass
class ShownGraph:
    module: fx.GraphModule
    param_nodes: dict[str, fx.Node]
    """Placeholder of each parameter that the section names."""


@dataclass
class ProfilingResult:
    """DeepSpeed's, of one graph: [(node, ...)] lists. Times are in ms, sizes in bytes."""

    fwd_graph: fx.Graph | None = None
    bwd_graph: fx.Graph | None = None
    needs_backward: bool = False
    num_fwd_outputs: int | None = None
    fwd_mem: list[tuple[str, int, int, int]] = field(default_factory=list)
    bwd_mem: list[tuple[str, int, int, int]] = field(default_factory=list)
    fwd_mem_complete: bool = True
    bwd_mem_complete: bool = True
    fwd_time: list[tuple[str, float, float]] = field(default_factory=list)
    bwd_time: list[tuple[str, float, float]] = field(default_factory=list)
    fwd_tensor_sizes: list[tuple[str, int]] = field(default_factory=list)
    bwd_tensor_sizes: list[tuple[str, int]] = field(default_factory=list)
    param_indices: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)


def _clean(name: str) -> str:
    return re.sub(r"\W", "_", name)


class _Writer:
    """Makes the graph of one section."""

    def __init__(self, program: _core.StepProgram, section: Any, context: _core.PassContext):
        self._section, self._context = section, context
        self._params = {p.name: p for p in program.params}
        self._ids = {p.name: i for i, p in enumerate(program.params)}
        self._values = {v.name: v for v in program.values}
        self._regions = {r.name: r for r in program.regions}
        self.graph = fx.Graph()
        self.param_nodes: dict[str, fx.Node] = {}
        self._made: dict[str, fx.Node] = {}  # value to node
        self._whole: dict[str, fx.Node] = {}  # param to the node to read it from
        self._last: fx.Node | None = None

    def write(self) -> None:
        instrs = self._section.instrs
        used = dict.fromkeys(i.param for i in instrs if i.param is not None)
        runs = [self._regions[i.region] for i in instrs if i.region is not None]
        operands = dict.fromkeys(x for r in runs for x in r.inputs)
        used |= dict.fromkeys(p for x in operands if (p := _param_of(x)) in self._params)
        for name in used:
            node = self._placeholder(name, self._params[name].full_bytes)
            node.meta.update(param_name=node.name, ds_id=self._ids[name])
            self.param_nodes[name] = self._whole[name] = node
        made = {v for r in runs for v in r.outputs}
        read = [x for x in operands if x in self._values and x not in made]
        for name in dict.fromkeys([*self._section.inputs, *read]):
            self._made[name] = self._placeholder(name, self._values[name].bytes)
        for instr in instrs:
            self._last = self._node(instr)
        outputs = dict.fromkeys(self._made[v] for v in self._section.outputs if v in self._made)
        self.graph.output(tuple(outputs))

    def _placeholder(self, name: str, size: int) -> fx.Node:
        node = self.graph.placeholder(_clean(name))
        node.meta["tensor_size"] = size
        return node

    def _node(self, instr: Any) -> fx.Node:
        duration = self._context.duration_ns(instr)
        if instr.op == "run":
            node = self._run(self._regions[instr.region])
        elif instr.op in _OPS:
            node = self._operator(instr)
        else:
            values = tuple(instr.values)
            after = () if self._last is None else (self._last,)
            node = self.graph.call_function(instruction, (instr.op, instr.operand, values, *after))
            node.meta["tensor_size"] = 0
        node.meta["device_time"] = node.meta["wall_time"] = (duration or 0) / 1e6
        return node

    def _run(self, region: Any) -> fx.Node:
        reads = [self._whole.get(_param_of(x), self._made.get(x)) for x in region.inputs]
        reads = list(dict.fromkeys(n for n in reads if n is not None))
        node = self._named(f"run_{region.name}", run_region, (region.name, *reads), {})
        node.meta["region"] = region.name
        node.meta["tensor_size"] = sum(self._values[v].bytes for v in region.outputs)
        self._made |= dict.fromkeys(region.outputs, node)
        return node

    def _named(self, name: str, target: Any, args: tuple, kwargs: dict) -> fx.Node:
        return self.graph.create_node("call_function", target, args, kwargs, _clean(name))

    def _operator(self, instr: Any) -> fx.Node:
        param, ds_id = self._params[instr.param], self._ids[instr.param]
        target = getattr(dc_ops(), _OPS[instr.op]).default
        graph = self._section.graph
        place = self.param_nodes[param.name]
        if instr.op == "gather":
            name, args = f"allgather_ds_param_{param.name}_{ds_id}", (place, graph, ds_id)
        elif instr.op == "wait":
            name = f"wait_allgather_ds_param_{param.name}_{ds_id}"
            args = (self._whole[param.name], graph, ds_id)
        elif instr.op == "release":
            name = f"release_ds_param_{param.name}_{ds_id}"
            args = (self._last or place, graph, ds_id, 1)
        else:
            name = f"reduce_ds_param_{param.name}"
            args = (self._made[instr.values[-1]], graph, ds_id)
        kwargs = {"dtype": DTYPES[param.dtype]} if instr.op == "gather" else {}
        node = self._named(name, target, args, kwargs)
        comm = instr.op in ("gather", "reduce")
        size = param.full_bytes if instr.op != "wait" else 0
        node.meta.update(param_name=place.name, ds_id=ds_id, comm=comm, tensor_size=size)
        if instr.op in ("gather", "wait"):
            self._whole[param.name] = node
        return node


def _param_of(operand: str) -> str:
    return operand.split("[", 1)[0]


def write_graph(program: _core.StepProgram, section: Any, context: _core.PassContext) -> ShownGraph:
    """``section`` as a GraphModule that can be edited but not run."""
    writer = _Writer(program, section, context)
    writer.write()
    return ShownGraph(fx.GraphModule(torch.nn.Module(), writer.graph), writer.param_nodes)


def profile_of(
    program: _core.StepProgram, graph: int, context: _core.PassContext
) -> ProfilingResult:
    """Both directions of one graph. Memory is what the program needs in its order."""
    result = ProfilingResult()
    timeline = _core.memory_timeline(program)["points"]
    base = _core.memory_timeline(program)["base"]
    for index, section in enumerate(program.sections):
        if section.graph != graph or section.kind == "update":
            continue
        side = "bwd" if section.kind == "backward" else "fwd"
        nodes = write_graph(program, section, context).module.graph
        calls = [n for n in nodes.nodes if n.op == "call_function"]
        before, memory = base, []
        points = [p for p in timeline if p[0] == index]
        for node, (_, _, during, after) in zip(calls, points, strict=True):
            memory.append((node.name, after, after - before, max(during, after)))
            before = after
        first = memory[0][1] - memory[0][2] if memory else base
        inputs = [(n.name, first, 0, first) for n in nodes.nodes if n.op == "placeholder"]
        setattr(result, f"{side}_graph", nodes)
        setattr(result, f"{side}_mem", inputs + memory)
        setattr(
            result,
            f"{side}_time",
            [(n.name, n.meta["device_time"], n.meta["wall_time"]) for n in calls],
        )
        setattr(
            result,
            f"{side}_tensor_sizes",
            [(n.name, n.meta["tensor_size"]) for n in nodes.nodes if "tensor_size" in n.meta],
        )
        if side == "bwd":
            result.needs_backward = True
        else:
            result.num_fwd_outputs = len(section.outputs)
            result.param_indices = [
                (i, n.meta["ds_id"], (program.params[n.meta["ds_id"]].numel,))
                for i, n in enumerate(nodes.find_nodes(op="placeholder"))
                if "ds_id" in n.meta
            ]
    return result


def read_graph(
    graph: fx.Graph, program: _core.StepProgram, section: Any, name: str
) -> list[_core.Instr]:
    """The instructions that a pass left in ``graph``."""
    reader = _Reader(program, section, name)
    result = [i for node in graph.nodes for i in reader.instrs(node)]
    was = [i.region for i in section.instrs if i.op == "run"]
    now = [i.region for i in result if i.op == "run"]
    if sorted(was) != sorted(now):
        lost = sorted(set(was) - set(now)) or sorted(r for r in now if now.count(r) > 1)
        raise UserError(
            f"[passes] {name}: {section.name}: region {lost[0]} no longer runs once. Compute is "
            "compiled once and stays; move and add transfers alone."
        )
    return result


class _Reader:
    def __init__(self, program: _core.StepProgram, section: Any, name: str):
        self._params = program.params
        self._where = f"[passes] {name}: {section.name}"
        self._gradients = {i.param: i.values for i in section.instrs if i.op == "reduce"}
        self._by_target = {getattr(dc_ops(), v).default: k for k, v in _OPS.items()}
        self._prefetch = dc_ops().prefetch_params_fused.default

    def instrs(self, node: fx.Node) -> list[_core.Instr]:
        if node.op in ("placeholder", "output"):
            return []
        if node.target is run_region:
            return [_core.Instr("run", node.args[0])]
        if node.target is instruction:
            op, operand, values = node.args[:3]
            return [_core.Instr(op, operand, list(values))]
        if node.target is self._prefetch:
            names = [self._param(i) for i in node.args[2]]
            return [_core.Instr("gather", n) for n in names]
        op = self._by_target.get(node.target)
        if op is None:
            raise UserError(
                f"{self._where}: node {node.name} calls {node.target}, which has no counterpart. "
                "A pass may place allgather_param, prefetch_params_fused, wait_allgather, "
                "release_param and reduce_grad; for offload and recomputation put our own passes "
                "in the schedule."
            )
        param = self._param(node.args[2])
        if op != "reduce":
            return [_core.Instr(op, param)]
        if param not in self._gradients:
            raise UserError(
                f"{self._where}: node {node.name} reduces {param}, whose gradient is not made "
                "here. Reductions may move; which there are is the stage's affair."
            )
        return [_core.Instr(op, param, self._gradients[param])]

    def _param(self, ds_id: Any) -> str:
        if not isinstance(ds_id, int) or not 0 <= ds_id < len(self._params):
            raise UserError(
                f"{self._where}: there is no parameter of id {ds_id!r}. Ids are those of "
                "param_manager[graph_id].ds_ids."
            )
        return self._params[ds_id].name
