# SPDX-License-Identifier: Apache-2.0
"""What the peers of plain PyTorch share: AdamW on fp32 masters, clipping, compiling layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .. import weights
from ..options import BETAS, DECAY, EPS, Options
from . import Batch, Peer, Setup

DYNAMO_LIMIT = 128
"""Variants of one function, as run_bench_lm.py sets it: layers share their code."""


def adamw(parameters: Iterable[torch.Tensor], options: Options, device: torch.device) -> Any:
    """torch's AdamW with its fused kernel, which every device here has."""
    return torch.optim.AdamW(
        parameters, lr=options.learning_rate, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )


def adamw_settings(optimizer: Any) -> dict[str, Any]:
    group = optimizer.param_groups[0]
    kept = ("lr", "betas", "eps", "weight_decay", "fused")
    return {"optimizer": type(optimizer).__name__, **{k: group[k] for k in kept}}


class Masters:
    """AdamW on fp32 copies of parameters that compute in a shorter type."""

    def __init__(self, model: nn.Module, options: Options, device: torch.device):
        self.parameters = list(model.parameters())
        short = any(p.dtype != torch.float32 for p in self.parameters)
        self.masters = [p.detach().float() for p in self.parameters] if short else self.parameters
        self.short = short
        self.optimizer = adamw(self.masters, options, device)
        self._clip = options.max_grad_norm

    def step(self) -> None:
        """Clip, update, write the parameters anew, drop the gradients."""
        if self.short:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        if self._clip > 0:
            nn.utils.clip_grad_norm_(self.masters, self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.short:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)

    def restart(self) -> None:
        """Take the parameters' values, and forget all states."""
        self.optimizer.state.clear()
        if self.short:
            with torch.no_grad():
                torch._foreach_copy_(self.masters, self.parameters)


def limit_dynamo() -> None:
    torch._dynamo.config.cache_size_limit = DYNAMO_LIMIT
    torch._dynamo.config.accumulated_cache_size_limit = 2 * DYNAMO_LIMIT


def compile_layers(model: nn.Module, backend: str, **kwargs: Any) -> None:
    """Each layer by itself, for static shapes: layers are alike, so one is compiled."""
    limit_dynamo()
    for layer in weights.layers(model):
        layer.compile(backend=backend, dynamic=False, **kwargs)


class Local(Peer):
    """A whole model on this rank's device; DDP puts its wrapper around `module`."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self.model = setup.build()
        weights.fill(self.model, setup.ranks.device)
        if setup.condition.compile:
            compile_layers(self.model, setup.condition.backend)
        self._masters = Masters(self.model, setup.options, setup.ranks.device)

    @property
    def module(self) -> nn.Module:
        return self.model

    def last(self, is_last: bool) -> Any:
        """A context for one micro-batch's forward and backward."""
        return contextlib.nullcontext()

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        losses = []
        for number, batch in enumerate(batches):
            with self.last(number == len(batches) - 1):
                loss = self.module(**batch, use_cache=False).loss
                (loss / len(batches) if len(batches) > 1 else loss).backward()
            losses.append(loss.detach())
        self._masters.step()
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.model.eval()
        loss = self.model(**batch, use_cache=False).loss
        self.model.train()
        return loss

    def settings(self) -> dict[str, Any]:
        condition = self._setup.condition
        return {
            "compiled": f"each layer, {condition.backend}" if condition.compile else "no",
            "recompute": condition.activation_checkpointing,
            "parameters": str(self._setup.dtype).removeprefix("torch."),
            "masters": "float32",
            "clip": self._setup.options.max_grad_norm,
            **adamw_settings(self._masters.optimizer),
        }

    def go_on(self, condition: Any) -> bool:
        return True

    def restart(self) -> bool:
        weights.refill(self.model)
        self._masters.restart()
        return True
