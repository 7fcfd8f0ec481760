# SPDX-License-Identifier: Apache-2.0
"""Stage 3: parameters sharded (docs/passes/zero3_compile.md)."""

from .named import NamedPass

add_z3_gather_release = NamedPass(
    "zero3_compile",
    "zero3_compile.add_z3_gather_release",
    "Gather parameters before use, release them after, reduce gradients as they appear.",
)
