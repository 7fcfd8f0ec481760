# SPDX-License-Identifier: Apache-2.0
"""What the planner keeps: of each captured graph, and of each plan that held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .agreement import Agreed


@dataclass
class Installed:
    """One captured graph and the newest plan made from it."""

    captured: Any
    plain: Any
    """The compute-only program."""
    skeleton: str = ""
    """What ranks must share of it (_core.skeleton)."""
    program: Any = None
    """With instructions, as the newest plan has them."""
    plan_id: int = -1
    plan_hash: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    """Passes, and freezing and loading."""


@dataclass
class Planned:
    """One line of the planner's history."""

    step: int
    """Steps taken when it began to hold."""
    agreed: Agreed | None
    """None: each graph by itself, by the passes in `why`."""
    why: str
    seconds: float
    """On this rank, waiting for the others included."""


def same_code(a: Any, b: Any) -> bool:
    """Whether two captures are of one computation on the same parameters."""

    def key(captured: Any) -> tuple:
        regions = captured.ir.regions
        return tuple((r.key, *(x for x in r.inputs if not isinstance(x, str))) for r in regions)

    return a.inference == b.inference and key(a) == key(b)
