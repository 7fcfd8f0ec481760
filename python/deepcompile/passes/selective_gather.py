# SPDX-License-Identifier: Apache-2.0
"""Keep parameters whole (docs/passes/selective_gather.md)."""

from .named import NamedPass

selective_gather = NamedPass(
    "selective_gather",
    "selective_gather.selective_gather",
    "Keep parameters whole between uses where memory allows, those that save most first.",
)
