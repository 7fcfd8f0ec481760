# SPDX-License-Identifier: Apache-2.0
"""What the peers share that train through an engine of DeepSpeed's form: ours and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import Batch, Peer


class EnginePeer(Peer):
    engine: Any

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        losses = []
        for batch in batches:
            loss = self.engine(**batch, use_cache=False).loss
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.engine.eval()
        loss = self.engine(**batch, use_cache=False).loss
        self.engine.train()
        return loss
