# SPDX-License-Identifier: Apache-2.0
"""When to update (docs/passes/place_optimizer.md)."""

from .named import NamedPass

place_optimizer = NamedPass(
    "place_optimizer",
    "place_optimizer.place_optimizer",
    "Update in step(), through the next forward, or beside the backward.",
)
