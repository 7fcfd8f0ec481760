# SPDX-License-Identifier: Apache-2.0
"""Whether what a backward reads has been written to since its forward.

Saved values belong to the runner, so autograd's check of versions does not see
them. Those that the caller can reach, inputs and outputs of a graph and what
shares their memory, are looked after here: their version counters are read when
the forward is over and compared in the backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from deepcompile.errors import UserError


def _memory(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


@dataclass(frozen=True)
class Seen:
    """One tensor as the forward left it."""

    counter: torch.Tensor
    """Shares its version counter and none of its memory."""
    version: int
    name: str


@dataclass(frozen=True)
class Reached:
    """Which inputs and outputs of a forward share memory with what it saves."""

    inputs: tuple[tuple[int, str], ...] = ()
    """(argument's position, name)."""
    outputs: tuple[tuple[int, str], ...] = ()

    @staticmethod
    def of(inputs: Sequence[fx.Node], returned: Sequence[Any], saved: Iterable[fx.Node]) -> Reached:
        memory = {_memory(node) for node in saved} - {None}
        return Reached(
            tuple((i, f"input {n.name}") for i, n in enumerate(inputs) if _memory(n) in memory),
            tuple((i, f"output {i}") for i, n in enumerate(returned) if _memory(n) in memory),
        )

    def of_arguments(self, args: Sequence[Any]) -> list[tuple[Any, str]]:
        return [(args[i], name) for i, name in self.inputs]

    def see(self, arguments: list[tuple[Any, str]], made: Sequence[Any]) -> list[Seen]:
        """When the forward is over. `made`: its outputs, by their positions."""
        tensors = [*arguments, *((made[i], name) for i, name in self.outputs)]
        return [_seen(tensor, name) for tensor, name in tensors if _has_version(tensor)]


def _has_version(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not tensor.is_inference()


def _seen(tensor: torch.Tensor, name: str) -> Seen:
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return Seen(counter, tensor._version, name)


def check(seen: Iterable[Seen]) -> None:
    """UserError if one was written to since."""
    for each in seen:
        if each.counter._version == each.version:
            continue
        raise UserError(
            f"[capture] {each.name} of the compiled graph: was written to in place between the "
            "forward and its backward, which reads it. Write to a clone of it, or after backward()"
        )
