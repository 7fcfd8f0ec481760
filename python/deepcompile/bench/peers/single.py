# SPDX-License-Identifier: Apache-2.0
"""One process, one device, no communication."""

from __future__ import annotations

from .local import Local


def setup(given) -> Local:
    return Local(given)
