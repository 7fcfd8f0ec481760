# SPDX-License-Identifier: Apache-2.0
"""What a region costs, from its graph alone: FLOPs, bytes moved, workspace.

Compiled code fuses pointwise work, so only some intermediates reach memory: the
results of matmuls, attention and other kernels of their own, and what those
read. ``moved`` counts the region's inputs and outputs once and such an
intermediate twice (written, read); ``workspace`` is the largest sum of
intermediates alive at one time: those that reach memory when fused, all of
them (an upper bound) when each operator runs by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from deepcompile.capture.joint import is_factory, is_getitem, is_overload, is_view, op_name

_ATTENTION = {
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "var_mean", "max", "min", "any", "argmax", "_softmax",
               "_log_softmax", "logsumexp", "embedding", "index", "gather", "cumsum", "sort",
               "_to_copy", "convert_element_type", "clone", "where", "full_like", "copy_", "cat",
               "slice_scatter", "native_layer_norm", "_fused_rms_norm"}  # fmt: skip


def hint(x: Any) -> int:
    """A size as a number, without pinning a symbolic one to it."""
    return int(x.node.hint) if isinstance(x, torch.SymInt) else int(x)


def extent_bytes(value: Any) -> int:
    """Bytes from a tensor's first to its last element (an expanded tensor counts once); 8 for a
    number."""
    if not isinstance(value, torch.Tensor):
        return 8 if isinstance(value, int | float | torch.SymInt | torch.SymFloat) else 0
    sizes = [hint(s) for s in value.shape]
    if 0 in sizes:
        return 0
    last = sum((n - 1) * hint(s) for n, s in zip(sizes, value.stride(), strict=True))
    return (last + 1) * value.element_size()


@dataclass(frozen=True)
class Costs:
    flops: int
    moved: int
    workspace: int


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(hint(s) for s in value.shape)


def _attention_flops(node: fx.Node) -> int:
    """Two (backward: five) matmuls of queries x keys x head size a head; half if causal."""
    backward = op_name(node).endswith("_backward")
    args = [a.meta.get("val") for a in node.args if isinstance(a, fx.Node)]
    query, key = args[1:3] if backward else args[:2]
    batch, heads, n_query, size = _shape(query)
    flops = (5 if backward else 2) * 2 * batch * heads * n_query * _shape(key)[2] * size
    causal = any(
        a.name == "is_causal" and (node.args[i] if i < len(node.args) else node.kwargs.get(a.name))
        for i, a in enumerate(node.target._schema.arguments)
    )
    return flops // 2 if causal else flops


def _grouped_flops(node: fx.Node) -> int:
    """Each row of a grouped matmul meets one group's matrix; a 2D x 2D one splits the sum."""
    a, b = (_shape(node.args[i].meta["val"]) for i in (0, 1))
    return 2 * math.prod(a) * b[-1]


def node_flops(node: fx.Node) -> int:
    if not is_overload(node):
        return 0
    name = op_name(node)
    if name in _ATTENTION or name.removesuffix("_backward") in _ATTENTION:
        return _attention_flops(node)
    if name in ("_grouped_mm", "_scaled_grouped_mm"):
        return _grouped_flops(node)
    formula = flop_registry.get(node.target._overloadpacket)
    if formula is None:
        return 0

    def stand_in(x: Any) -> Any:
        if isinstance(x, fx.Node):
            x = x.meta.get("val")
        if isinstance(x, torch.SymInt):
            return hint(x)
        return torch.empty(_shape(x), device="meta") if isinstance(x, torch.Tensor) else x

    with torch.utils._python_dispatch._disable_current_modes():
        args = torch.fx.node.map_aggregate(node.args, stand_in)
        kwargs = torch.fx.node.map_aggregate(dict(node.kwargs), stand_in)
        out = torch.fx.node.map_aggregate(node.meta.get("val"), stand_in)
        return int(formula(*args, **kwargs, out_val=out))


def _fusible(node: fx.Node) -> bool:
    """Whether Inductor would make it part of a larger kernel."""
    if is_getitem(node) or is_view(node):
        return True
    if not is_overload(node):
        return not isinstance(node.target, torch._ops.HigherOrderOperator)
    if op_name(node) in _REDUCTIONS or node.target.namespace == "prims":
        return True
    return torch.Tag.pointwise in node.target.tags


def _bases(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node whose memory each node's result lies in."""
    base: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.all_input_nodes[0] if node.all_input_nodes and is_view(node) else node
        base[node] = base.get(source, source)
    return base


def _reaches_memory(nodes: list[fx.Node], base: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """Results written out when pointwise work and reductions are fused."""
    found = set()
    for node in nodes:
        alone = not _fusible(node) and not is_factory(node)
        if is_getitem(node) or alone:
            found.add(base[node])
        if alone:
            # A constant read by a kernel is that kernel's result, filled first.
            found.update(base[a] for a in node.all_input_nodes if a in base and not is_factory(a))
    return found


def region_costs(
    nodes: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node], *, fused: bool
) -> Costs:
    """Costs of one region at the shapes of the capture."""
    base = _bases(nodes)
    size = {n: extent_bytes(n.meta.get("val")) for n in nodes if base[n] is n}
    kept = {base[o] for o in outputs if o in base}
    held = _reaches_memory(nodes, base) if fused else set(size)
    scratch = [n for n in size if n in held and n not in kept]
    moved = sum(extent_bytes(n.meta.get("val")) for n in [*inputs, *outputs])
    moved += 2 * sum(size[n] for n in scratch)
    return Costs(
        sum(node_flops(n) for n in nodes), moved, _peak(nodes, base, {n: size[n] for n in scratch})
    )


def _peak(nodes: list[fx.Node], base: dict[fx.Node, fx.Node], size: dict[fx.Node, int]) -> int:
    """Largest sum of ``size`` over the values alive at one time."""
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        last[base[node]] = i
        for arg in node.all_input_nodes:
            if arg in base:
                last[base[arg]] = i
    dying: dict[int, int] = {}
    for node, nbytes in size.items():
        dying[last[node]] = dying.get(last[node], 0) + nbytes
    alive = peak = 0
    for i, node in enumerate(nodes):
        alive += size.get(node, 0)
        peak = max(peak, alive)
        alive -= dying.get(i, 0)
    return peak
