# SPDX-License-Identifier: Apache-2.0
"""Passes: what edits a step's instruction list, for schedules.

    from deepcompile.passes import WARMUP, prefetch, selective_gather, zero3_compile

    engine.compile(schedule=[
        (0, [zero3_compile.add_z3_gather_release]),
        (WARMUP, [zero3_compile.add_z3_gather_release,
                  prefetch.schedule_prefetch, selective_gather.selective_gather]),
    ])

An entry may also be a pass's name ("prefetch"), a function of (program, context) or a class of
such objects, a pass of a shared library (load_library), or a pass written for DeepSpeed
(from_deepspeed). See docs/passes/custom.md.
"""

from __future__ import annotations

from .._core import PassContext, PassContract
from ..schedule import WARMUP
from . import (
    auto,
    coalesce,
    offload_activation,
    offload_adam_states,
    order_link,
    place_optimizer,
    prefetch,
    rematerialize,
    selective_gather,
    zero1_compile,
    zero3_compile,
)
from .deepspeed import from_deepspeed
from .library import load_library
from .named import NamedPass

__all__ = [
    "WARMUP",
    "NamedPass",
    "PassContext",
    "PassContract",
    "auto",
    "coalesce",
    "from_deepspeed",
    "load_library",
    "offload_activation",
    "offload_adam_states",
    "order_link",
    "place_optimizer",
    "prefetch",
    "rematerialize",
    "selective_gather",
    "zero1_compile",
    "zero3_compile",
]
