# SPDX-License-Identifier: Apache-2.0
"""Run a function on N ranks, with an end.

Every rank is a process with a default process group. A rank's exception comes back in full; a
rank that does not end in time is named, with its stack, and killed. Nothing outlives a call.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any

PRELOADED = [
    "torch", "torch.distributed", "deepcompile.api", "deepcompile.capture",
    "transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.gpt2.modeling_gpt2", "torch.distributed.tensor.experimental",
    "torch._dynamo.backends.inductor", "torch._dynamo.repro.after_dynamo",
    "torch.utils.cpp_extension",
]  # fmt: skip
"""What ranks are forked with: importing it takes each of them 5 s otherwise."""
GRACE_S = 20.0
"""How long the other ranks may go on after one has failed, in seconds."""


class RankError(AssertionError):
    """What went wrong on which ranks."""


def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120,
    backend: str = "gloo",
    dying: Collection[int] = (),
    threads: int = 1,
) -> list[Any]:
    """Results of ``fn(rank, world, *args)`` on each rank, in rank order.

    ``fn`` is a function of a module's top level; arguments and results are pickled. ``timeout``
    is in seconds and covers start-up. Ranks in ``dying`` may end without a result (theirs is
    None). ``threads``: torch's intra-op threads in each rank. With nccl, rank r uses GPU r.
    """
    context = multiprocessing.get_context("forkserver")
    # Where there are GPUs no import may have asked for them before the fork.
    on_gpus = os.path.exists("/dev/nvidiactl")
    context.set_forkserver_preload(PRELOADED[:2] if on_gpus else PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        home = Path(folder)
        job = (fn, world, args, timeout, backend, threads)
        processes = [
            context.Process(target=_rank_main, args=(home, rank, job), name=f"rank-{rank}")
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            hung = _join(processes, home, timeout, dying)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return _collect(processes, home, hung, timeout, dying)


def _rank_main(home: Path, rank: int, job: tuple) -> None:
    fn, world, args, timeout, backend, threads = job
    gc.freeze()  # collections need not look through what the server imported
    stack = open(home / f"{rank}.stack", "w")  # noqa: SIM115 - open until the process ends
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(max(1.0, timeout - 3.0), file=stack)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    status, payload = "error", None
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(threads)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend,
            init_method=f"file://{home}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout),
        )
        payload = fn(rank, world, *args)
        status = "result"
    except BaseException:
        payload = traceback.format_exc()
    written = home / f"{rank}.{status}.part"
    written.write_bytes(pickle.dumps(payload))
    written.rename(home / f"{rank}.{status}")
    # Without the destructors: they would wait for peers that may have failed.
    os._exit(0 if status == "result" else 1)


def _join(processes: list, home: Path, timeout: float, dying: Collection[int]) -> list[int]:
    """Wait for all ranks; returns those still running at the end of their time."""
    deadline = time.monotonic() + timeout
    while True:
        running = [rank for rank, process in enumerate(processes) if process.is_alive()]
        if not running or time.monotonic() > deadline:
            return running
        failed = any(
            process.exitcode not in (None, 0) and rank not in dying
            for rank, process in enumerate(processes)
        )
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)


def _collect(
    processes: list, home: Path, hung: list[int], timeout: float, dying: Collection[int]
) -> list[Any]:
    results, problems = [], []
    for rank, process in enumerate(processes):
        result, error = home / f"{rank}.result", home / f"{rank}.error"
        value = None
        if result.exists():
            value = pickle.loads(result.read_bytes())
        elif error.exists():
            problems.append(f"rank {rank} failed:\n{pickle.loads(error.read_bytes())}")
        elif rank in hung:
            stack = (home / f"{rank}.stack").read_text()
            problems.append(f"rank {rank} hung (limit {timeout:g} s) and was killed:\n{stack}")
        elif rank not in dying:
            stack = (home / f"{rank}.stack").read_text()
            problems.append(f"rank {rank} ended with code {process.exitcode}:\n{stack}")
        results.append(value)
    if problems:
        raise RankError("\n".join(problems))
    return results
