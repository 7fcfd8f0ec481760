# SPDX-License-Identifier: Apache-2.0
"""Optimizer states on the host (docs/passes/offload_adam_states.md)."""

from .named import NamedPass

move_opt_states = NamedPass(
    "offload_adam_states",
    "offload_adam_states.move_opt_states",
    "Move as many optimizer states to the host as the budget asks, beside compute.",
)
move_opt_states_sync = NamedPass(
    "offload_adam_states_sync",
    "offload_adam_states.move_opt_states_sync",
    "The same, with copies that compute waits for.",
)
