# SPDX-License-Identifier: Apache-2.0
"""What an engine says of itself in numbers, under DeepSpeed's names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .config import Config
    from .distributed import Ranks
    from .loss_scale import LossScale
    from .optimizer import ShardedOptimizer


class EngineNumbers:
    """The part of Engine that only reads."""

    config: Config
    ranks: Ranks
    optimizer: ShardedOptimizer
    global_steps: int
    _grad_norm: Any
    _loss_scale: LossScale
    _applied: bool

    def get_global_grad_norm(self) -> float | None:
        """Norm of the last step's gradients before clipping; None without gradient_clipping, as it
        is then not computed: a large one, such as 1e9, measures and does not clip."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def get_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def train_batch_size(self) -> int:
        return self.config.train_batch_size

    def train_micro_batch_size_per_gpu(self) -> int:
        return self.config.train_micro_batch_size_per_gpu

    def gradient_accumulation_steps(self) -> int:
        return self.config.gradient_accumulation_steps

    def gradient_clipping(self) -> float:
        return self.config.gradient_clipping

    def zero_optimization_stage(self) -> int:
        return self.config.stage

    def bfloat16_enabled(self) -> bool:
        return self.config.bf16.enabled

    def fp16_enabled(self) -> bool:
        return self.config.fp16.enabled

    def loss_scale(self) -> float:
        """What the next backward(loss) multiplies the loss by; 1 but in fp16."""
        return self._loss_scale.value

    def was_step_applied(self) -> bool:
        """Whether the last step() updated the parameters: it was an accumulation boundary, and its
        gradients were finite or are not checked."""
        return self._applied

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    @property
    def global_samples(self) -> int:
        """Samples of all ranks that the steps so far have seen."""
        return self.global_steps * self.train_batch_size()

    @property
    def local_rank(self) -> int:
        """Number on this host, as the launcher says it."""
        return int(os.environ.get("LOCAL_RANK", self.ranks.device.index or 0))

    @property
    def global_rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world
