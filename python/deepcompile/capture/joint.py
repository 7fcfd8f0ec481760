# SPDX-License-Identifier: Apache-2.0
"""Facts about nodes of AOT graphs, and the tags the partitioner needs.

A view or cast of a parameter ("derived") must not become a saved activation:
it would keep the gathered parameter alive from forward to backward. So the
joint graph says that it must be recomputed; the cut repeats it in each region
that wants it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from deepcompile.errors import UserError
from deepcompile.params import MemberRef, ParamTable

OWN_MEMORY = "deepcompile_own_memory"
"""Mark (in a node's meta) of a copy that must stay one: never made again elsewhere."""
_COPIES = {"_to_copy", "convert_element_type", "clone", "contiguous"}
_FACTORIES = {"full", "scalar_tensor", "iota", "arange", "zeros", "ones", "empty"}


def op_name(node: fx.Node) -> str:
    """``mm`` for aten.mm.default."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def is_overload(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def is_view(node: fx.Node) -> bool:
    """Whether its result shares its input's memory and writes nothing."""
    if is_getitem(node):
        return is_view(node.args[0])
    if not is_overload(node):
        return False
    schema = node.target._schema
    if op_name(node) in ("_unsafe_view", "_reshape_alias"):
        return True
    aliases = [r.alias_info for r in schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def is_factory(node: fx.Node) -> bool:
    """A constant that is cheaper to make again than to hand over."""
    return is_overload(node) and not node.all_input_nodes and op_name(node) in _FACTORIES


def derived(graph: fx.Graph, params: Iterable[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """The parameters, and the nodes made from them by views and copies alone, each with the
    parameters it comes from."""
    found = {p: frozenset((p,)) for p in params}
    for node in graph.nodes:
        args = node.all_input_nodes
        if node in found or not args or not all(a in found for a in args):
            continue
        if OWN_MEMORY in node.meta:
            continue
        if is_view(node) or (is_overload(node) and op_name(node) in _COPIES):
            found[node] = frozenset().union(*(found[a] for a in args))
    return found


def tag_must_recompute(joint: fx.Graph, params: Iterable[fx.Node]) -> int:
    """Keep the partitioner from saving views and copies of parameters. Returns their number."""
    tagged = 0
    for node in derived(joint, params):
        if node.op == "call_function":
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta.setdefault("ac_graph_id", 0)
            tagged += 1
    return tagged


def refuse_param_mutation(
    graph: fx.Graph, params: dict[fx.Node, MemberRef], table: ParamTable
) -> None:
    """A parameter written to by the model's own forward would be lost with its gathered copy."""
    for node in graph.nodes:
        if not is_overload(node) or not node.target._schema.is_mutable:
            continue
        for i, arg in enumerate(node.target._schema.arguments):
            written = arg.alias_info is not None and arg.alias_info.is_write
            value = node.args[i] if i < len(node.args) else node.kwargs.get(arg.name)
            if written and isinstance(value, fx.Node) and value in params:
                name = table.member(params[value]).name
                raise UserError(
                    f"[capture] {name}: is written to in forward by {op_name(node)}. Make it a "
                    "buffer, or change it outside of the compiled model."
                )
