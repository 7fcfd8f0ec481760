# SPDX-License-Identifier: Apache-2.0
"""Canonical form of a region: equal regions have equal keys and share one compilation.

The key covers operators, arguments, shapes, strides, dtypes, devices and the
symbols in them; names of nodes and parameters do not matter.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import fx

_META = ("val", "tensor_meta", "eager_input_vals")
_SMALL_CONSTANT = 4096
"""Elements; constants up to this size are compared by content, larger ones by identity."""


def _number(x: Any) -> Any:
    return x if isinstance(x, int) else str(x)


def meta_key(value: Any) -> tuple:
    """What must be equal for two values to be interchangeable as a region's input."""
    if isinstance(value, torch.Tensor):
        aligned = _number(value.storage_offset() * value.element_size() % 16)
        sizes = tuple(map(_number, value.shape)), tuple(map(_number, value.stride()))
        return ("tensor", *sizes, str(value.dtype), str(value.device), aligned)
    if isinstance(value, tuple | list):
        return tuple(meta_key(v) for v in value)
    return (type(value).__name__, str(value))


class MetaKeys:
    """meta_key of nodes, each computed once."""

    def __init__(self) -> None:
        self._keys: dict[fx.Node, tuple] = {}

    def __getitem__(self, node: fx.Node) -> tuple:
        if node not in self._keys:
            self._keys[node] = meta_key(node.meta.get("val"))
        return self._keys[node]


_PLAIN = {int, bool, float, str, type(None)}


def _literal(arg: Any, ref) -> Any:
    kind = type(arg)
    if kind in _PLAIN:
        return (kind.__name__, arg)  # with its type: 1, 1.0 and True are equal
    if isinstance(arg, fx.Node):
        return ref(arg)
    if isinstance(arg, list | tuple):
        return ("L", *(_literal(x, ref) for x in arg))
    if isinstance(arg, dict):
        return ("D", *((k, _literal(v, ref)) for k, v in sorted(arg.items())))
    if isinstance(arg, slice):
        return ("S", *(_literal(x, ref) for x in (arg.start, arg.stop, arg.step)))
    return (kind.__name__, str(arg))


def node_items(nodes: list[fx.Node], keys: MetaKeys) -> tuple:
    """Hashable form of a run of nodes; what comes from outside counts by its metadata."""
    local = {n: i for i, n in enumerate(nodes)}

    def ref(node: fx.Node) -> tuple:
        return ("n", local[node]) if node in local else ("x", keys[node])

    return tuple((str(n.target), _literal(n.args, ref), _literal(n.kwargs, ref)) for n in nodes)


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _attribute_key(value: Any) -> tuple:
    if isinstance(value, fx.GraphModule):
        parts = [m.code for m in value.modules() if isinstance(m, fx.GraphModule)]
        return ("graph", *parts)
    if isinstance(value, torch.Tensor):
        real = not torch._subclasses.fake_tensor.is_fake(value) and value.device.type == "cpu"
        if real and value.numel() <= _SMALL_CONSTANT:
            content: Any = str(value.tolist())
        else:
            content = id(value)
        return ("constant", meta_key(value), content)
    return ("object", type(value).__name__, id(value))


def region_key(
    gm: fx.GraphModule,
    nodes: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
    params: set[fx.Node],
    keys: MetaKeys,
) -> str:
    """Hash of a region, stable between processes unless it holds a large constant."""
    ids: dict[fx.Node, tuple] = {}
    items: list[Any] = []
    for i, node in enumerate(inputs):
        ids[node] = ("i", i)
        items.append(("in", keys[node], node in params))
    for j, node in enumerate(nodes):
        ids[node] = ("n", j)
        if node.op == "get_attr":
            items.append(_attribute_key(_attribute(gm, str(node.target))))
        else:
            args = _literal(node.args, ids.__getitem__), _literal(node.kwargs, ids.__getitem__)
            items.append((str(node.target), *args))
    items.append(("out", tuple(ids[o] for o in outputs), tuple(keys[o] for o in outputs)))
    return hashlib.sha256(repr(items).encode()).hexdigest()[:24]


def region_module(
    gm: fx.GraphModule, nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]
) -> fx.GraphModule:
    """The region as a graph of its own, with canonical names."""
    graph, env, root = fx.Graph(), {}, torch.nn.Module()
    for i, node in enumerate(inputs):
        env[node] = graph.placeholder(f"a{i}")
        env[node].meta = {k: node.meta[k] for k in _META if k in node.meta}
    for j, node in enumerate(nodes):
        if node.op == "get_attr":
            setattr(root, f"attr{j}", _attribute(gm, str(node.target)))
            copy = graph.get_attr(f"attr{j}")
        else:
            copy = graph.node_copy(node, env.__getitem__)
            copy.name = f"n{j}"
        copy.meta = {k: node.meta[k] for k in _META if k in node.meta}
        env[node] = copy
    out = graph.output(tuple(env[o] for o in outputs))
    # Inductor then keeps their strides, which the next region was compiled for.
    out.meta["user_visible_output_idxs"] = list(range(len(outputs)))
    return fx.GraphModule(root, graph)
