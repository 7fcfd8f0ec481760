# SPDX-License-Identifier: Apache-2.0
"""The planner (docs/passes/auto.md)."""

from .named import NamedPass

auto = NamedPass(
    "auto",
    "auto.auto",
    "Choose all of it for the least time within the memory budget.",
)
