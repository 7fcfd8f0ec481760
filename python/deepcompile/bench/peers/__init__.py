# SPDX-License-Identifier: Apache-2.0
"""The frameworks that are compared, behind one interface: one file each.

Every peer trains the same model from the same weights on the same batches with
the same AdamW and clipping. How it does so is its own; `Peer.settings` says
what is in force.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...distributed import Ranks
from ...errors import UserError
from .. import variants, weights
from ..conditions import Condition
from ..options import Options
from ..results import CANNOT_RUN

INSTALL_DEEPSPEED = "DS_BUILD_OPS=0 pip install --no-build-isolation '.[deepspeed]'"
"""In the folder of deepcompile's sources."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setup:
    """What a peer is made from."""

    condition: Condition
    options: Options
    ranks: Ranks

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters as they compute, activations and gradients."""
        if self.condition.dtype not in DTYPES:
            raise UserError(
                f"[bench] dtype {self.condition.dtype!r}: unknown. Use {' or '.join(DTYPES)}."
            )
        return DTYPES[self.condition.dtype]

    def build(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The model on the meta device, in `dtype` (default: the compute type)."""
        model = weights.build(
            self.condition.model,
            num_layers=self.condition.num_layers,
            attention=self.options.attn_impl,
            dtype=self.dtype,
            checkpointing=self.condition.activation_checkpointing,
            seed=self.condition.seed,
        )
        if self.options.load_weights:
            model._init_weights.load(weights.folder_of(self.condition))
        if dtype is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        return model


class Peer(ABC):
    """One framework with one model, ready to train."""

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step over this rank's micro-batches, which are on the device. Returns
        the mean of their losses, detached and on the device."""

    @abstractmethod
    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The loss without gradients."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What is in force, as the framework itself states it; JSON's types."""

    def after(self) -> dict[str, Any]:
        """What is known only when the steps are done."""
        return {}

    def outside_bytes(self) -> int:
        """On the device, held outside of torch's allocator."""
        return 0

    def recorded_peak(self) -> int:
        """Most bytes that were allocated in a step which is launched anew without allocating."""
        return 0

    def compile_times(self) -> list[tuple[str, float]] | None:
        """(what, seconds), where the framework counts them."""
        return None

    def go_on(self, condition: Condition) -> bool:
        """Begin with another sequence length (ours: or other passes), with the same model. False:
        make a new peer."""
        return False

    def restart(self) -> bool:
        """After go_on: the first weights again, and no optimizer states. False: it cannot, and
        trains on."""
        return False

    def close(self) -> None:  # noqa: B027 - most peers have nothing to do
        """Give back what the garbage collector cannot."""


_MODULES = {
    "deepcompile": "deepcompile",
    "fsdp": "fsdp2",
    "ddp": "ddp",
    "single": "single",
    "ds_deepcompile": "deepspeed",
    "zero3": "deepspeed",
    "zero1": "deepspeed",
}


def module_of(condition: Condition) -> str:
    """The name of the file here that trains a condition."""
    return _MODULES[condition.framework.removesuffix("_c")]


def why_not(condition: Condition) -> str | None:
    """Why a condition cannot run here at all, in words; None: it can be tried."""
    from . import fsdp2

    name = module_of(condition)
    if name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        return f"deepspeed is not installed: {INSTALL_DEEPSPEED}, in deepcompile's sources"
    if condition.framework == "ds_deepcompile" and not torch.cuda.is_available():
        return f"{CANNOT_RUN}: DeepSpeed's DeepCompile needs GPUs"
    if (reason := condition.why_no_offload()) is not None:
        return reason
    if (reason := variants.wrong(condition.framework, condition.variant)) is not None:
        return reason
    if name == "fsdp2":
        return fsdp2.why_not(condition)
    if name == "single" and condition.world != 1:
        return f"a single GPU takes one rank, not {condition.world}: set NGPUS_PER_NODE=1"
    return None


def check_warmup(condition: Condition, options: Options) -> None:
    """Raises UserError if steps would be measured in which the framework still plans."""
    if condition.ours:
        from . import deepcompile as engine

        last = engine.schedule(condition)[-1][0]
    elif condition.framework == "ds_deepcompile" and condition.zero_stage == 3:
        from . import deepspeed as engine

        last = engine.WARMUP
    else:
        return
    if last and options.warmup_step <= last:
        raise UserError(
            f"[bench] warmup_step {options.warmup_step}: {condition.label} plans once more after "
            f"{last} steps, which would be measured. Give --warmup_step {last + 1} or more."
        )


def setup(condition: Condition, options: Options, ranks: Ranks) -> Peer:
    """The peer of a condition, with weights on the device. Collective."""
    reason = why_not(condition)
    if reason is not None:
        raise UserError(f"[bench] {condition.label}: {reason}.")
    module = importlib.import_module(f"{__name__}.{module_of(condition)}")
    return module.setup(Setup(condition, options, ranks))
