# SPDX-License-Identifier: Apache-2.0
"""torch's FSDP2 (fully_shard), a group a layer.

``default`` is what its documentation starts with: parameters are resharded after
the forward. ``best`` keeps them whole until the backward and, while gradients
accumulate, until the last one. Variants: ``prefetch`` names the next layers to
gather, ``copy_engine`` gathers through NCCL's symmetric memory (torch 2.13 and
newer), ``overlap`` is overlap.py: sharding inside the compiled graph, for
Inductor's own overlap passes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from ...errors import UserError
from .. import weights
from ..conditions import Condition
from ..results import CANNOT_RUN
from . import Batch, Peer, Setup
from .local import adamw, adamw_settings, compile_layers

ZERO_CTA = "2"
"""NCCL_CTA_POLICY for gathers by copy engines; it must be set before the process group starts."""


def why_not(condition: Condition) -> str | None:
    if condition.variant == "copy_engine":
        if not hasattr(FSDPModule, "set_symm_mem_for_comm"):
            return f"copy_engine needs torch 2.13, which is not installed, but {torch.__version__}"
        if not torch.cuda.is_available():
            return f"{CANNOT_RUN}: copy_engine needs GPUs"
    return None


def environment(condition: Condition) -> dict[str, str]:
    """What must be set before the process group starts."""
    return {"NCCL_CTA_POLICY": ZERO_CTA} if condition.variant == "copy_engine" else {}


def backend(condition: Condition) -> str | None:
    """The process group's, if not the device's own: what is on the host is reduced there."""
    if torch.cuda.is_available() and (condition.offload_adam or condition.offload_params):
        return "cpu:gloo,cuda:nccl"
    return None


class Sharded(Peer):
    """What overlap.py has in common: the step. Gradients of `model` appear sharded in the last
    micro-batch's backward."""

    def __init__(self, setup: Setup, model: nn.Module, parameters: Sequence[nn.Parameter]):
        self._setup, self.model, self._parameters = setup, model, list(parameters)
        self._optimizer = adamw(self._parameters, setup.options, setup.ranks.device)
        self.loss_scale = 1.0

    def before(self, is_last: bool) -> None:
        """Called before each micro-batch."""

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.model(**batch, use_cache=False).loss

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        losses = []
        for number, batch in enumerate(batches):
            self.before(number == len(batches) - 1)
            loss = self.forward(batch)
            scale = self.loss_scale / len(batches)
            (loss * scale if scale != 1 else loss).backward()
            losses.append(loss.detach())
        if self._setup.options.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._parameters, self._setup.options.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor:
        self.model.eval()
        loss = self.forward(batch)
        self.model.train()
        return loss

    def settings(self) -> dict[str, Any]:
        return {
            "recompute": self._setup.condition.activation_checkpointing,
            "parameters": str(self._setup.dtype).removeprefix("torch."),
            "masters": str(self._parameters[0].dtype).removeprefix("torch."),
            "clip": self._setup.options.max_grad_norm,
            **adamw_settings(self._optimizer),
        }

    def go_on(self, condition: Condition) -> bool:
        return True

    def restart(self) -> bool:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the root whole
        self._optimizer.state.clear()
        weights.refill(self.model)
        return True


class Fsdp2(Sharded):
    def __init__(self, setup: Setup):
        condition = setup.condition
        self._best = condition.settings == "best"
        model = setup.build(torch.float32)
        self._policy = _policy(setup)
        self._offload = condition.offload_adam or condition.offload_params
        self._shard(model, setup)
        super().__init__(setup, model, list(model.parameters()))
        if condition.variant == "prefetch":
            _prefetch(weights.layers(model))
        if condition.variant == "copy_engine":
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_symm_mem_for_comm()
        if condition.compile:
            compile_layers(model, condition.backend)

    def _shard(self, model: nn.Module, setup: Setup) -> None:
        device = setup.ranks.device
        tied = weights.has_ties(model)
        if tied:  # sharded without memory, they would be untied when they get it
            weights.fill(model, device)
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (setup.ranks.world,)),
            "mp_policy": self._policy,
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if self._offload
            else OffloadPolicy(),
        }
        if self._best:
            options["reshard_after_forward"] = False
        for layer in weights.layers(model):
            fully_shard(layer, **options)
        fully_shard(model, **options)
        if not tied:
            weights.fill(model, device, torch.device("cpu") if self._offload else device)

    def before(self, is_last: bool) -> None:
        if self._setup.condition.accumulation == 1:
            return
        self.model.set_requires_gradient_sync(is_last)
        self.model.set_is_last_backward(is_last)
        if self._best:
            self.model.set_reshard_after_backward(is_last)

    def settings(self) -> dict[str, Any]:
        condition = self._setup.condition
        policy = self._policy
        return {
            "sharding": "FSDP2, a group a layer and one for the rest",
            "reshard_after_forward": _reshards(weights.layers(self.model)[0]),
            "reshard_between_micro_batches": not self._best,
            "gradient_sync": "last micro-batch only",
            "param_dtype": str(policy.param_dtype),
            "reduce_dtype": str(policy.reduce_dtype),
            "offload": "parameters, gradients and states on the host" if self._offload else "none",
            "compiled": f"each layer, {condition.backend}" if condition.compile else "no",
            "variant": condition.variant or "none",
            "NCCL_CTA_POLICY": os.environ.get("NCCL_CTA_POLICY", "default"),
            **super().settings(),
        }

    def after(self) -> dict[str, Any]:
        # FSDP2 settles its root's default in the first forward.
        return {
            "reshard_after_forward": _reshards(weights.layers(self.model)[0]),
            "reshard_after_forward_root": _reshards(self.model),
        }


def _policy(setup: Setup) -> MixedPrecisionPolicy:
    if setup.dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=setup.dtype, reduce_dtype=setup.dtype)


def _reshards(module: Any) -> bool | str:
    """Whether a group reshards after the forward, as FSDP2 itself has it; its state is private."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    try:
        return any(g is not None and bool(g._reshard_after_forward) for g in groups)
    except AttributeError:
        return f"not to be read in torch {torch.__version__}"


def _prefetch(layers: list[nn.Module], ahead: int = 2) -> None:
    """Gather the next layers of the forward and of the backward while one computes."""
    for number, layer in enumerate(layers):
        layer.set_modules_to_forward_prefetch(layers[number + 1 : number + 1 + ahead])
        before = layers[max(0, number - ahead) : number]
        layer.set_modules_to_backward_prefetch(before[::-1])


def setup(given: Setup) -> Peer:
    if given.ranks.group is None:
        raise UserError("[bench] FSDP: needs a process group. Start it with torchrun.")
    if given.condition.variant == "overlap":
        from .overlap import Overlap

        return Overlap(given)
    return Fsdp2(given)
