# SPDX-License-Identifier: Apache-2.0
"""Which graph input is which parameter, by identity and descriptors, never by name.

Dynamo's placeholders hold the real object; the AOT graphs' placeholders and
outputs hold descriptors that point back at Dynamo's inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.guards import GuardBuilder
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    SubclassGetAttrAOTInput,
    SyntheticBaseAOTInput,
    ViewBaseAOTInput,
)
from torch._guards import Guard, TracingContext

from deepcompile.errors import UserError
from deepcompile.params import MemberRef, ParamTable

Source = int | str
"""Index of a Dynamo graph input, or the name of a parameter inside its module."""


def param_sources(gm: fx.GraphModule, table: ParamTable) -> dict[Source, MemberRef]:
    """The inputs of a Dynamo graph that are parameters of ``table``."""
    sources: dict[Source, MemberRef] = {}
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        arg = node.meta.get("grapharg")
        ref = table.lookup(arg.example) if arg is not None else None
        if ref is not None:
            sources[i] = ref
    for name, tensor in gm.named_parameters(remove_duplicate=False):
        ref = table.lookup(tensor)
        if ref is not None:
            sources[name] = ref
    return sources


def _same_object(builder: GuardBuilder, guard: Guard) -> None:
    """As GuardBuilder.ID_MATCH, which would also print the tensor: an empty one has no values."""
    number = id(builder.get(guard))
    code = f"___check_obj_id({builder.arg_ref(guard)}, {number})  # the captured parameter"
    builder.get_guard_manager(guard).add_id_match_guard(number, [code], guard.user_stack)


def guard_identity(gm: fx.GraphModule, table: ParamTable) -> None:
    """Have Dynamo guard on which parameters the graph was captured with.

    Dynamo itself guards on their shapes, and so runs the code of one module for another of the
    same class, with that one's parameters as inputs. A plan reads the captured ones.
    """
    context = TracingContext.try_get()
    if context is None:
        return
    for node in gm.graph.find_nodes(op="placeholder"):
        arg = node.meta.get("grapharg")
        if arg is not None and arg.source is not None and table.lookup(arg.example) is not None:
            context.guards_context.dynamo_guards.add(arg.source.make_guard(_same_object))


def _source(desc: Any) -> Source | None:
    if isinstance(desc, PlainAOTInput):
        return desc.idx
    if isinstance(desc, ParamAOTInput):
        return desc.target
    return None


def param_inputs(graph: fx.Graph, sources: dict[Source, MemberRef]) -> dict[fx.Node, MemberRef]:
    """The placeholders of an AOT graph (joint, forward or backward) that are parameters."""
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        if isinstance(desc, SubclassGetAttrAOTInput):
            raise UserError(
                f"[capture] input {node.name}: is part of a tensor subclass. Pass plain tensors "
                "to the model."
            )
        if isinstance(desc, ViewBaseAOTInput | SyntheticBaseAOTInput):
            ref = sources.get(_source(desc.base_of))
            if ref is not None:
                raise UserError(
                    f"[capture] input {node.name}: is the base of several views of one parameter "
                    "that cross a graph break. Clone the views, or remove the graph break."
                )
        ref = sources.get(_source(desc))
        if ref is not None:
            found[node] = ref
    return found


def output_node(graph: fx.Graph) -> fx.Node:
    return graph.find_nodes(op="output")[0]


def outputs(graph: fx.Graph) -> list[Any]:
    return list(output_node(graph).args[0])


def set_outputs(graph: fx.Graph, values: list[Any]) -> None:
    output_node(graph).args = (tuple(values),)


def gradient_outputs(graph: fx.Graph, sources: dict[Source, MemberRef]) -> dict[int, MemberRef]:
    """Output position to the member whose gradient it is, for a backward graph."""
    node = output_node(graph)
    found = {}
    for i, (value, desc) in enumerate(zip(node.args[0], node.meta.get("desc") or (), strict=False)):
        if isinstance(desc, GradAOTOutput) and isinstance(value, fx.Node):
            ref = sources.get(_source(desc.grad_of))
            if ref is not None:
                found[i] = ref
    return found


def clone_returned_views(gm: fx.GraphModule, sources: dict[Source, MemberRef]) -> list[str]:
    """Clone the outputs of a Dynamo graph that share memory with a parameter.

    AOTAutograd rebuilds such outputs from the parameter itself, whose memory is
    empty outside the regions. Returns the names of the parameters concerned.
    """
    storages: dict[int, Source] = {}
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("example_value")
        if i in sources and isinstance(value, torch.Tensor):
            storages[value.untyped_storage()._cdata] = i
    cloned, replaced = [], []
    for out in outputs(gm.graph):
        value = out.meta.get("example_value") if isinstance(out, fx.Node) else None
        is_param = isinstance(out, fx.Node) and out.op == "placeholder"
        key = value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None
        if key in storages and not is_param:
            with gm.graph.inserting_before(output_node(gm.graph)):
                copy = gm.graph.call_function(torch.clone, (out,))
            copy.meta = {"example_value": value.clone()}
            cloned.append(storages[key])
            out = copy
        replaced.append(out)
    if cloned:
        set_outputs(gm.graph, replaced)
        gm.recompile()
    return cloned
