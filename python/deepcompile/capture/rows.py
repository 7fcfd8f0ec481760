# SPDX-License-Identifier: Apache-2.0
"""Which parameters a graph reads as embeddings, by row numbers that its caller gives it.

Their gathers and reductions need the rows of those numbers alone: nothing else of the parameter
is read, and its gradient, which only the embedding's backward makes, is zero elsewhere.
"""

from __future__ import annotations

import torch
from torch import fx

from deepcompile.capture.graph import RowRead
from deepcompile.capture.joint import is_view, op_name
from deepcompile.params import MemberRef, ParamTable

_EMBEDDING = torch.ops.aten.embedding.default


def row_reads(
    forward: fx.Graph,
    params: dict[fx.Node, MemberRef],
    backward_params: dict[fx.Node, MemberRef],
    table: ParamTable,
) -> list[tuple[RowRead, fx.Node | None]]:
    """The parameters that embeddings read in a forward, each with the input that numbers the rows;
    without one if it must be exchanged whole, for which ``RowRead.why`` then gives the reason."""
    again = {ref for node, ref in backward_params.items() if node.users}
    found: list[tuple[RowRead, fx.Node | None]] = []
    taken: set[fx.Node] = set()
    for node, ref in params.items():
        if not any(user.target is _EMBEDDING for user in node.users):
            continue
        numbers, why = _numbers(node)
        spec = table.spec(ref)
        if spec.placement != "sharded":
            why = "kept whole on every rank"
        elif not why and ref in again:
            why = "the backward reads it too"
        elif not why and numbers in taken:
            why = "its numbers are another embedding's too"
        if why:
            numbers = None
        else:
            taken.add(numbers)
        found.append((RowRead(ref, why=why), numbers))
    return found


def _numbers(param: fx.Node) -> tuple[fx.Node | None, str]:
    """(the graph's input that numbers the rows, "") or (None, why there is none)."""
    inputs = set()
    for user in param.users:
        if user.target is not _EMBEDDING or user.args[0] is not param or param in user.args[1:]:
            return None, f"tied: {op_name(user)} reads it too"
        numbers = user.args[1]
        while isinstance(numbers, fx.Node) and is_view(numbers):
            numbers = numbers.args[0]
        inputs.add(numbers)
    if len(inputs) != 1:
        return None, "several inputs number its rows"
    numbers = inputs.pop()
    if numbers.op != "placeholder":
        return None, "its row numbers are computed in the graph, by " + op_name(numbers)
    if numbers.meta["val"].dtype != torch.int64:
        return None, f"its row numbers are {numbers.meta['val'].dtype}, not int64"
    return numbers, ""
