# SPDX-License-Identifier: Apache-2.0
"""Recomputation (docs/passes/rematerialize.md)."""

from .named import NamedPass

rematerialize = NamedPass(
    "rematerialize",
    "rematerialize.rematerialize",
    "Drop saved activations that are cheap to make again, and run their regions again.",
)
