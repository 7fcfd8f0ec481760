# SPDX-License-Identifier: Apache-2.0
"""Saved activations on the host (docs/passes/offload_activation.md)."""

from .named import NamedPass

offload_activation = NamedPass(
    "offload_activation",
    "offload_activation.offload_activation",
    "Move saved activations to the host in the forward and back before the backward.",
)
