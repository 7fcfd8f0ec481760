# SPDX-License-Identifier: Apache-2.0
"""The ranks of a job: who this one is, and how they agree.

join() finds or starts the process group. World 1 needs no launcher and no
group. Objects travel through torch.distributed's object collectives, so none
of this belongs on the path of a step.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .errors import UserError

STEP = "a step"
"""The call of what is gathered without a name."""


class _Said(NamedTuple):
    """What a rank gives, and the call that it is in."""

    call: str
    value: Any


@dataclass(frozen=True)
class Ranks:
    """One rank's view of the job."""

    rank: int
    """0 .. world - 1."""
    world: int
    """Number of ranks that share the parameters."""
    device: torch.device
    """Where this rank computes."""
    group: Any = None
    """torch.distributed group, or None when there is one rank and no launcher."""

    def barrier(self) -> None:
        """Return when every rank has called this."""
        if self.group is not None:
            dist.barrier(
                self.group,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
            )

    def gather(self, value: Any, call: str = STEP) -> list[Any]:
        """Every rank's value, in rank order, on every rank. `call`: where this rank is, which has
        to be where the others are; with or without the brackets of a stage."""
        call = call.replace("[", "").replace("]", "")
        if self.group is None:
            return [value]
        said: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(said, _Said(call, value), group=self.group)
        except Exception as error:  # a peer that is elsewhere or gone: Gloo and pickle raise these
            cause = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"[distributed] {call}: the other ranks are not in it ({cause}). Call it on all "
                "ranks, not on one alone; a rank that failed says why itself"
            ) from error
        calls = [each.call if isinstance(each, _Said) else STEP for each in said]
        if len(set(calls)) > 1:
            other = next(rank for rank in range(self.world) if calls[rank] != call)
            raise UserError(
                f"[distributed] rank {self.rank} is in {call}, rank {other} in {calls[other]}: "
                "call each of them on all ranks, not on one alone"
            )
        return [each.value for each in said]

    def meet(self, call: str) -> None:
        """Return when every rank is in `call`; an error on all if one is in another."""
        self.gather(None, call)

    def agree(self, number: int) -> bool:
        """Whether all ranks gave the same `number`."""
        if self.group is None:
            return True
        ends = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.group)
        largest, smallest = ends.tolist()
        return largest == -smallest

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def together(self, stage: str, work: Callable[[], Any]) -> Any:
        """Run `work` on this rank; raise on every rank if it failed on any."""
        error, result = None, None
        try:
            result = work()
        except Exception as caught:  # the other ranks must hear of anything
            error = caught
        text = None if error is None else f"{type(error).__name__}: {error}"
        said = self.gather(text, stage)
        for rank, text in enumerate(said):
            if text is not None:
                if error is not None and rank == self.rank:
                    raise error
                raise UserError(f"{stage} rank {rank}: {text}")
        return result

    def broadcast_tensor(self, tensor: torch.Tensor, source: int = 0) -> None:
        """Overwrite `tensor` (contiguous, on any device) with rank `source`'s."""
        if self.group is None or tensor.numel() == 0:
            return
        on_device = tensor.detach().to(self.device)
        dist.broadcast(on_device, dist.get_global_rank(self.group, source), group=self.group)
        if on_device.data_ptr() != tensor.data_ptr():
            tensor.copy_(on_device)


def device_of_rank() -> torch.device:
    """This rank's GPU, now the current one, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if count == 1 and os.environ.get("CUDA_VISIBLE_DEVICES"):
        local = 0  # the launcher shows each rank its own (Slurm's --gpus-per-task)
    if local >= count:
        raise UserError(
            f"[distributed] LOCAL_RANK={local}: this process sees {count} GPU(s); start fewer "
            "ranks on the host, or show each more in CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join(
    dist_init_required: bool | None = None,
    timeout_s: float = 1800.0,
    device: torch.device | None = None,
) -> Ranks:
    """This rank, after starting torch.distributed if a launcher's variables are set.

    `dist_init_required`: None starts it when RANK and WORLD_SIZE are set, False
    never starts it, True insists. Gloo on CPU, NCCL on CUDA.
    """
    device = device or device_of_rank()
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not dist.is_initialized() and dist_init_required is not False and launched:
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
                device_id=device if device.type == "cuda" else None,
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"[distributed] init_process_group: {error}; check MASTER_ADDR, MASTER_PORT, "
                "RANK and WORLD_SIZE, or start with torchrun"
            ) from None
    if dist.is_initialized():
        group = dist.group.WORLD
        return Ranks(dist.get_rank(group), dist.get_world_size(group), device, group)
    if dist_init_required:
        raise UserError(
            "[distributed] dist_init_required=True: RANK and WORLD_SIZE are not set; start with "
            "torchrun, or call torch.distributed.init_process_group first"
        )
    return Ranks(0, 1, device)
