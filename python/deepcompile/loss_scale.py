# SPDX-License-Identifier: Apache-2.0
"""The factor on the loss in fp16, so that small gradients are not lost to its range.

After Micikevicius et al., "Mixed Precision Training" (2018), with DeepSpeed's numbers: it is
doubled after a row of steps with finite gradients, and halved when they are not.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from .config import Fp16Config
from .errors import UserError

log = logging.getLogger("deepcompile")


class LossScale:
    """One engine's. All ranks have the same, as they leave out the same steps."""

    def __init__(self, config: Fp16Config):
        self.on = config.enabled
        self._config = config
        self.value = 1.0
        """What a loss is multiplied by."""
        if self.on:
            self.value = config.loss_scale or 2.0**config.initial_scale_power
        self._finite = 0
        """Steps with finite gradients since the last change."""
        self._left = config.hysteresis
        """Steps without, until the factor is halved."""

    def of(self, loss: torch.Tensor, accumulation: int) -> torch.Tensor:
        """What is differentiated for one of `accumulation` micro-batches."""
        if self.on:
            return loss.float() * (self.value / accumulation)
        return loss / accumulation if accumulation > 1 else loss

    def undone(self) -> dict[str, Any]:
        """Arguments of the runtime's step(): what takes the factor off the gradients again."""
        return {"loss_scale_inv": 1 / self.value, "check_finite": self.on}

    def follow(self, skipped: bool, step: int, rank: int) -> None:
        """After step number `step`. UserError if the factor cannot be smaller."""
        if not self.on:
            return
        if not skipped:
            self._follow_finite()
            return
        before = self.value
        if not self._config.loss_scale:
            self._follow_skipped(step)
        if rank == 0:
            log.warning(
                "[engine] step %d is left out on all ranks, as its gradients are not finite with "
                "a loss scale of %g; the next is %g", step, before, self.value,
            )  # fmt: skip

    def _follow_finite(self) -> None:
        config = self._config
        if config.consecutive_hysteresis:
            self._left = config.hysteresis
        self._finite += 1
        if config.loss_scale or self._finite < config.loss_scale_window:
            return
        self._finite, self._left = 0, config.hysteresis
        self.value *= 2

    def _follow_skipped(self, step: int) -> None:
        config = self._config
        self._finite = 0
        self._left -= 1
        if self._left > 0:
            return
        self._left = 1  # from here on each one counts, until the factor is doubled again
        if self.value <= config.min_loss_scale:
            raise UserError(
                f"[engine] step {step}: gradients are not finite at the smallest loss scale, "
                f"{self.value:g}: training has diverged. Lower the learning rate, or train in bf16"
            )
        self.value = max(self.value / 2, config.min_loss_scale)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"value": self.value, "finite": self._finite, "left": self._left}

    def load(self, state: dict[str, Any]) -> None:
        """Put it back. A factor that the configuration fixes stays."""
        if self.on and not self._config.loss_scale:
            self.value, self._finite, self._left = state["value"], state["finite"], state["left"]
