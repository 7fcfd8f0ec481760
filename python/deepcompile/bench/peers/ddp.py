# SPDX-License-Identifier: Apache-2.0
"""torch's DistributedDataParallel: the whole model on every rank, gradients all-reduced."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ...errors import UserError
from . import Setup
from .local import Local


class Ddp(Local):
    def __init__(self, setup: Setup):
        if setup.ranks.group is None:
            raise UserError("[bench] DDP: needs a process group. Start it with torchrun.")
        # Dynamo would cut compiled layers at DDP's buckets, which hold several of them.
        torch._dynamo.config.optimize_ddp = False
        super().__init__(setup)
        best = setup.condition.settings == "best"
        # The gradients' memory is the buckets', so that no copy is needed.
        self._best, self._static = best, best and setup.condition.accumulation == 1
        self._wrapped = DistributedDataParallel(
            self.model, gradient_as_bucket_view=best, static_graph=self._static
        )

    @property
    def module(self) -> Any:
        return self._wrapped

    def last(self, is_last: bool) -> Any:
        return contextlib.nullcontext() if is_last else self._wrapped.no_sync()

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "bucket_mb": self._wrapped.bucket_bytes_cap / 2**20,
            "gradient_as_bucket_view": self._best,
            "static_graph": self._static,
            "between_micro_batches": "no_sync",
        }


def setup(given: Setup) -> Ddp:
    return Ddp(given)
