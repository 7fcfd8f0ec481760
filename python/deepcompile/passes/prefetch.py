# SPDX-License-Identifier: Apache-2.0
"""Gather earlier (docs/passes/prefetch.md)."""

from .named import NamedPass

schedule_prefetch = NamedPass(
    "prefetch",
    "prefetch.schedule_prefetch",
    "Gather parameters before compute needs them, as far as memory allows.",
)
