# SPDX-License-Identifier: Apache-2.0
"""Sharding inside the compiled graph, ordered by Inductor's own overlap passes.

FSDP2's hooks stay outside of what torch.compile sees, so Inductor cannot move
their collectives. Here each parameter is a DTensor that is gathered where the
model reads it, as torchtitan's SimpleFSDP does: gathers and reductions are nodes
of one graph, which Inductor buckets and schedules. A layer that is recomputed
gathers again; one that is not keeps its parameters whole for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.fx_passes.bucketing  # its operators, which a graph from the cache calls
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from transformers.integrations import sdpa_attention

from ...capture.entry import make_entry
from ...errors import UserError
from .. import weights
from . import Batch, Setup
from .fsdp2 import Sharded
from .local import limit_dynamo

PASSES = {
    "aten_distributed_optimizations.enable_overlap_scheduling": True,
    "aten_distributed_optimizations.collective_bucketing": True,
    "aten_distributed_optimizations.insert_overlap_deps": True,
}
"""Options of Inductor (torch 2.11)."""


def gather_on_read(model: nn.Module, dtype: torch.dtype) -> None:
    """Reading a parameter of a module gives it whole, in `dtype`; its gradient is summed over
    ranks and sharded."""
    classes: dict[Any, type] = {}

    def whole(parameter: Any) -> torch.Tensor:
        gathered = parameter.redistribute(
            placements=[Replicate()], forward_dtype=dtype, backward_dtype=dtype
        )
        return gathered.to_local(grad_placements=[Partial("sum")])

    for module in model.modules():
        names = tuple(name for name, p in module._parameters.items() if p is not None)
        if not names:
            continue
        key = (type(module), names)
        if key not in classes:
            read = {n: property(lambda self, n=n: whole(self._parameters[n])) for n in names}
            classes[key] = type(type(module).__name__, (type(module),), read)
        module.__class__ = classes[key]


def shard(model: nn.Module, mesh: Any) -> None:
    """Replace parameters by DTensors, each cut in its first dimension."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                cut = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
                module._parameters[name] = nn.Parameter(cut)


class Overlap(Sharded):
    def __init__(self, setup: Setup):
        model = setup.build(torch.float32)
        if weights.has_ties(model):
            raise UserError(
                "[bench] FSDP overlap: tied weights are not supported. Use another variant."
            )
        shard(model, init_device_mesh(setup.ranks.device.type, (setup.ranks.world,)))
        weights.fill(model, setup.ranks.device)
        super().__init__(setup, model, list(model.parameters()))
        self.loss_scale = 1 / setup.ranks.world  # gradients are sums over ranks
        gather_on_read(model, setup.dtype)
        limit_dynamo()
        # Inductor's scheduling counts attention's operations, and knows no groups of query heads.
        self._grouped = sdpa_attention.use_gqa_in_sdpa
        sdpa_attention.use_gqa_in_sdpa = lambda *_: False
        # Inductor's scheduling asks Triton's driver, which only GPUs have.
        self._inductor = setup.condition.backend == "inductor" and torch.cuda.is_available()
        self._compiled = torch.compile(
            make_entry(model), backend=setup.condition.backend, dynamic=False, fullgraph=True,
            **({"options": PASSES} if self._inductor else {}),
        )  # fmt: skip

    def close(self) -> None:
        sdpa_attention.use_gqa_in_sdpa = self._grouped
        super().close()

    def forward(self, batch: Batch) -> torch.Tensor:
        return self._compiled(**batch, use_cache=False).loss

    def settings(self) -> dict[str, Any]:
        dtype = str(self._setup.dtype)
        return {
            "sharding": "DTensor, gathered in the graph where it is read",
            "param_dtype": dtype,
            "reduce_dtype": dtype,
            "gradient_sync": "each micro-batch",
            "attention_heads": "keys and values repeated for their groups",
            "compiled": f"the whole model, {self._setup.condition.backend}",
            "inductor": PASSES if self._inductor else "without overlap passes (no GPU, or eager)",
            **super().settings(),
        }
