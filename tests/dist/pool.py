# SPDX-License-Identifier: Apache-2.0
"""Real ranks that outlive a test: one process a rank, one Gloo group, many cases.

Starting Python, torch and a process group costs seconds on a small machine, so
the ranks of one world size are started once and given one function after
another. A case that fails on any rank fails the test with that rank's
traceback; ranks that do not answer in time are killed and started anew.
"""

from __future__ import annotations

import atexit
import importlib
import os
import socket
import time
import traceback
from typing import Any

import torch.multiprocessing as mp

_POOLS: dict[int, RankPool] = {}


class RankFailure(AssertionError):
    """What the ranks said when a case failed."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, world: int, port: int, pipe: Any) -> None:
    """Body of a rank: run what the pipe names until it closes."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    while True:
        try:
            module, function, arguments = pipe.recv()
        except EOFError:
            break
        torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            result = getattr(importlib.import_module(module), function)(**arguments)
            pipe.send((True, result))
        except BaseException as error:
            pipe.send((False, f"{error!r}\n{traceback.format_exc()}"))
            if not isinstance(error, Exception):
                raise


class RankPool:
    """`world` ranks waiting for work."""

    def __init__(self, world: int):
        context = mp.get_context("spawn")
        port = _free_port()
        self.world = world
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Any, timeout_s: float, arguments: dict[str, Any]) -> list[Any]:
        """Every rank's result of a module-level function, in rank order."""
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        results, failures = [], []
        deadline = time.monotonic() + timeout_s
        for rank, pipe in enumerate(self.pipes):
            # After a failure the others may wait for the failed rank for ever.
            left = 5.0 if failures else max(0.0, deadline - time.monotonic())
            try:
                answered = pipe.poll(left)
                done, value = pipe.recv() if answered else (False, f"no answer in {timeout_s} s")
            except (EOFError, ConnectionResetError):
                done, value = False, f"died with exit code {self.processes[rank].exitcode}"
            if done:
                results.append(value)
            else:
                failures.append((rank, value))
        if failures:
            self.close()
            raise RankFailure("\n".join(f"rank {rank}: {text}" for rank, text in failures))
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        if _POOLS.get(self.world) is self:
            del _POOLS[self.world]


def on_ranks(world: int, function: Any, timeout_s: float = 240.0, **arguments: Any) -> list[Any]:
    """Run `function(**arguments)` on `world` ranks. The function lives at module level."""
    pool = _POOLS.get(world)
    if pool is None:
        pool = _POOLS[world] = RankPool(world)
    return pool.run(function, timeout_s, arguments)


def close_all() -> None:
    """End all ranks."""
    for pool in list(_POOLS.values()):
        pool.close()


atexit.register(close_all)
