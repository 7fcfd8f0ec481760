# SPDX-License-Identifier: Apache-2.0
"""How many bytes of a rank's memory a plan may use.

A plan's peak counts what the runtime holds and what the regions make. Bytes on
the device that are no part of it (inputs, buffers, the user's own tensors) are
taken off whatever the limit is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .config import CompileConfig
from .distributed import Ranks


@dataclass(frozen=True)
class Memory:
    """One rank's memory at one time, in bytes."""

    total: int
    """Of the device, or this rank's part of the host's."""
    free: int
    """Not taken by anyone, this process's cached blocks included."""
    held: int
    """By the runtime."""
    foreign: int
    """By this process, outside the runtime."""


def _read_number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or "max"
        return None


def host_memory() -> tuple[int, int]:
    """(total, available) bytes of this host, or of the control group that limits the process; what
    the system only keeps of files is available."""
    table = {}
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        key, value = line.split(":")
        table[key] = int(value.split()[0]) * 1024
    total, available = table["MemTotal"], table["MemAvailable"]
    limit = _read_number("/sys/fs/cgroup/memory.max")
    used = _read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        used -= _files()
        total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def _files() -> int:
    """Bytes of files that the system only keeps for the control group, until it wants the room."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))


def local_ranks(world: int) -> int:
    """Ranks on this host."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", world)))


def measure(ranks: Ranks, held: int, outside: int = 0) -> Memory:
    """Memory as it is now, between steps; `held`: bytes of the runtime's buffers, `outside`: those
    that torch's allocator does not count."""
    if ranks.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(ranks.device)
        used = torch.cuda.memory_allocated(ranks.device)
        reserved = torch.cuda.memory_reserved(ranks.device)
        fraction = torch.cuda.get_per_process_memory_fraction(ranks.device)
        free = min(free, max(0, int(fraction * total) - reserved))
        return Memory(total, free + reserved - used, held, max(0, used + outside - held))
    share = local_ranks(ranks.world)
    total, available = host_memory()
    return Memory(total // share, available // share, held, 0)


ALLOCATOR_MARGIN = 0.03
"""Part of a device's memory budget that is left to its allocator: a block may be up to 1 MiB larger
than what was asked for, and a region's scratch differs a little from step to step."""


def room(config: CompileConfig, memory: Memory) -> int:
    """Bytes that a plan can have: what is free and what we hold, less the reserve."""
    return int((memory.free + memory.held) * (1 - config.memory_reserve))


def plan_budget(config: CompileConfig, memory: Memory, device: str = "cpu") -> int:
    """Bytes that a plan's peak may reach. With a limit from the configuration, that limit less
    what is foreign and, on a device with an allocator of its own, less its margin; without one,
    what is free and what we hold, less the reserve."""
    limit = config.memory_budget
    if limit is None:
        return room(config, memory)
    if isinstance(limit, float):
        limit = int(limit * memory.total)
    margin = 0.0 if device == "cpu" else ALLOCATOR_MARGIN
    return max(1, int(limit * (1 - margin)) - memory.foreign)


def held_bytes(report: dict[str, Any]) -> int:
    """The runtime's bytes on the device, from its buffer report."""
    return sum(v for k, v in report.items() if not k.startswith("host"))
