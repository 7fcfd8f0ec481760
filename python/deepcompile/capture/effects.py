# SPDX-License-Identifier: Apache-2.0
"""Which regions may run again, and which the user marked for it.

Recomputation runs a region a second time and must make the same bits and
nothing else. A region may not if it draws random numbers, writes to what it
reads, talks to other ranks, or holds a call that says nothing of its effects.
Inductor's dropout reads a seed that was drawn elsewhere, so such a region is
as good as any; run operator by operator, the same call draws anew.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from deepcompile.capture.joint import is_factory, is_getitem, is_overload, is_view, op_name
from deepcompile.capture.rng import dropout_of

MARK = "deepcompile_checkpoint"
"""In a node's meta: it is inside a part that the user checkpoints."""
_SEEDED = {"inductor_random", "inductor_randint"}
"""Run operator by operator these draw anew, though their schema does not say so."""
_COLLECTIVE_NAMESPACES = {"_c10d_functional", "_c10d_functional_autograd", "c10d", "_dtensor"}
_PURE_CALLS = {"flex_attention", "flex_attention_backward", "run_with_rng_state"}


def _has_effect(node: fx.Node, compiled: bool) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.target.name() not in _PURE_CALLS
    if not is_overload(node):
        return False
    if node.target.namespace in _COLLECTIVE_NAMESPACES or node.target._schema.is_mutable:
        return True
    if op_name(node) in _SEEDED:
        return not compiled
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    # Attention is tagged for its dropout: without, it draws nothing.
    return dropout_of(node.target, node.args, node.kwargs) != 0


def runs_once(nodes: list[fx.Node], compiled: bool) -> bool:
    """Whether a region of these nodes must never run again. ``compiled``: by Inductor."""
    return any(node.op == "call_function" and _has_effect(node, compiled) for node in nodes)


def mark_checkpointed(joint: fx.Graph, as_hint: bool) -> int:
    """Note the user's activation-checkpoint marks where the partitioner does not look; ``as_hint``
    hides them from it. Returns their number."""
    count = 0
    for node in joint.nodes:
        policy = node.meta.get("recompute")
        if policy in (CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE):
            node.meta[MARK] = True
            count += 1
            if as_hint:
                del node.meta["recompute"]
    return count


def is_checkpointed(nodes: list[fx.Node]) -> bool:
    """Whether most of a region's own work is marked."""
    work = [
        n for n in nodes
        if n.op == "call_function" and not (is_view(n) or is_getitem(n) or is_factory(n))
    ]  # fmt: skip
    return 2 * sum(MARK in n.meta for n in work) > len(work)
