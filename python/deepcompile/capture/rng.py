# SPDX-License-Identifier: Apache-2.0
"""Random-number operators that activation checkpointing wraps around attention.

Every SDPA in a checkpointed block is wrapped so that its recomputation draws
the same numbers, even where its dropout is 0. Unwrapped, the block's regions
are plain code again; where dropout is real, the wrapper stays and its state is
a saved value like any other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from deepcompile.capture.joint import is_getitem
from deepcompile.capture.sources import output_node, outputs

_HOP = torch.ops.higher_order


def dropout_of(op: Any, args: tuple, kwargs: dict[str, Any]) -> float | None:
    """The dropout probability of a call; None if the operator has no such argument."""
    for i, arg in enumerate(op._schema.arguments):
        if arg.name == "dropout_p":
            return kwargs.get("dropout_p", args[i] if i < len(args) else arg.default_value)
    return None


def _parse(node: fx.Node) -> tuple[Any, Any, tuple, dict[str, Any]] | None:
    """(saved state or None, operator, args, kwargs) of a wrapped call."""
    kwargs = dict(node.kwargs)
    if node.target is _HOP.run_with_rng_state:
        return node.args[0], node.args[1], node.args[2:], kwargs
    if node.target is _HOP.run_and_save_rng_state:
        return None, node.args[0], node.args[1:], kwargs
    if node.target is _HOP.graphsafe_run_with_rng_state:
        return kwargs.pop("rng_state", None), node.args[0], node.args[1:], kwargs
    return None


def _unwrap(node: fx.Node) -> list[fx.Node]:
    """Replace one wrapped call by the call itself. Returns the state nodes left without use."""
    state, op, args, kwargs = _parse(node)
    graph = node.graph
    with graph.inserting_before(node):
        call = graph.call_function(op, tuple(args), kwargs)
    call.meta = dict(node.meta)
    if node.target is not _HOP.run_and_save_rng_state:
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        return [state] if isinstance(state, fx.Node) and not state.users else []
    value = node.meta.get("val")
    if isinstance(value, tuple | list) and len(value) == 2:
        call.meta["val"] = value[1]
    states = []
    for user in list(node.users):
        assert is_getitem(user), f"{user.target} reads a wrapped call whole"
        if user.args[1] == 1:
            user.replace_all_uses_with(call)
            graph.erase_node(user)
        else:
            states.append(user)
    if not node.users:
        graph.erase_node(node)
    return states


def _drop_output(graph: fx.Graph, dead: fx.Node) -> None:
    node = output_node(graph)
    kept = [i for i, value in enumerate(outputs(graph)) if value is not dead]
    desc = node.meta.get("desc")
    if desc is not None and len(desc) == len(node.args[0]):
        node.meta["desc"] = [desc[i] for i in kept]
    node.args = (tuple(node.args[0][i] for i in kept),)


def unwrap_rng(forward: fx.GraphModule, backward: fx.GraphModule) -> int:
    """Unwrap the calls without dropout in both graphs, and drop the random states that were
    saved for them alone. Returns the number of calls."""
    count, states = 0, []
    for gm in (forward, backward):
        for node in list(gm.graph.nodes):
            wrapped = _parse(node) if node.op == "call_function" else None
            if wrapped is not None and dropout_of(*wrapped[1:]) == 0:
                states += _unwrap(node)
                count += 1
    for state in states:
        if state.op == "placeholder":
            state.graph.erase_node(state)
        elif state.graph is forward.graph:
            hop = state.args[0]
            _drop_output(forward.graph, state)
            forward.graph.erase_node(state)
            if not hop.users:
                forward.graph.erase_node(hop)
    if count:
        for gm in (forward, backward):
            gm.graph.lint()
            gm.recompile()
    return count
