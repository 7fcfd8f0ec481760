# SPDX-License-Identifier: Apache-2.0
"""Clocks, memory, and what a row says of where it comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..distributed import Ranks
from .conditions import Condition


class Meter:
    """Times and memory of steps on one rank. On a CPU memory is the process's, all of it.
    `outside`: bytes on the device that a framework holds outside of torch's allocator; `recorded`:
    the most it allocated in a step that it launches anew without allocating."""

    def __init__(self, ranks: Ranks, outside: Callable[[], int], recorded: Callable[[], int]):
        self._ranks, self._device = ranks, ranks.device
        self._outside, self._recorded = outside, recorded
        self._start = 0.0
        self.peak_is_of_process = False
        """Whether the system could not begin to count anew (CPU)."""

    @property
    def on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self._device)

    def begin(self) -> None:
        """All ranks begin a step together, with nothing left to do."""
        self._synchronise()
        self._ranks.barrier()
        self._synchronise()
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since begin(), whatever the device still has to do."""
        return time.perf_counter() - self._start

    def end(self) -> float:
        """Seconds since begin(), when this rank's device has done all."""
        self._synchronise()
        return self.elapsed()

    def reset_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.peak_is_of_process = True

    def allocated(self) -> int:
        if self.on_gpu:
            return torch.cuda.memory_allocated(self._device) + self._outside()
        return _status("VmRSS") or _largest()

    def peak(self) -> int:
        if self.on_gpu:
            allocated = torch.cuda.max_memory_allocated(self._device)
            return max(allocated, self._recorded()) + self._outside()
        return _status("VmHWM") or _largest()

    def in_use(self) -> int:
        """Of the whole device, so with what is outside of torch's allocator, NCCL's too."""
        if not self.on_gpu:
            return self.allocated()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def retries(self) -> int:
        """How often so far the allocator had to give what it held back to the device, to find room:
        each waits for the device."""
        if not self.on_gpu:
            return 0
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))


def allocator() -> str:
    """What the user set of torch's allocator for GPUs."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return next((os.environ[name] for name in names if os.environ.get(name)), "default")


def host_peak() -> int:
    """This process's largest so far, on the host."""
    return _status("VmHWM") or _largest()


def _status(key: str) -> int:
    """Bytes that Linux says of this process; 0 elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith(key + ":")]
    return int(found[0]) * 1024 if found else 0


def _largest() -> int:
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    from .. import __version__

    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["deepcompile"] = __version__
    for package in ("transformers", "deepspeed"):
        version = _version(package)
        if version:
            found[package] = version
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(str(n) for n in torch.cuda.nccl.version())
    return found


def machine(condition: Condition) -> dict[str, Any]:
    """Where a condition runs."""
    gpus = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpus else _processor()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", condition.world))
    return {
        "name": f"{condition.nodes}x{local} {device}" if condition.nodes > 1 else
        f"{local} x {device}",
        "device": device,
        "kind": "cuda" if gpus else "cpu",
        "ranks_per_node": local,
        "nodes": condition.nodes,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of the sources that this package is in; empty where there is no repository."""
    given = os.environ.get("DEEPCOMPILE_COMMIT")
    if given:
        return given
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
               "--abbrev=12", "--exclude=*"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
