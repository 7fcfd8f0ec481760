# SPDX-License-Identifier: Apache-2.0
"""One transfer on a link at a time (docs/passes/order_link.md)."""

from .named import NamedPass

order_link = NamedPass(
    "order_link",
    "order_link.order_link",
    "Order gathers and reductions so that none stands in another's way.",
)
