# SPDX-License-Identifier: Apache-2.0
"""Stages 1 and 2: parameters whole, states sharded (docs/passes/zero1_compile.md)."""

from .named import NamedPass

add_z1_reduce = NamedPass(
    "zero1_compile",
    "zero1_compile.add_z1_reduce",
    "Reduce gradients into shards, update those, and make parameters whole again.",
)
add_z2_reduce = NamedPass(
    "zero1_compile",
    "zero1_compile.add_z2_reduce",
    "The same pass: stage 1 or 2 is said by the program, which reduces once or each time.",
)
