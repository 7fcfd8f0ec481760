# SPDX-License-Identifier: Apache-2.0
"""What can start together does (docs/passes/coalesce.md)."""

from .named import NamedPass

coalesce = NamedPass(
    "coalesce",
    "coalesce.coalesce",
    "Updates and transfers that stand between the same runs start together.",
)
