# SPDX-License-Identifier: Apache-2.0
"""How fast are gathers and reductions, and what do they cost the matmuls beside them?  A table and
JSON.

Every size is a sharded bf16 parameter of its own, gathered or reduced through the runtime as a plan
would. "alone": nothing else runs. "beside": matmuls that last about 0.7 of the transfers start with
them; their slowdown is against the same matmuls alone. Rates count what arrives from other ranks;
the time of a reduction by copy engine has its sum in it.

    torchrun --standalone --nproc-per-node 4 benchmarks/micro/transfers.py --mb 32,128,512,1712

`out_of_step` is copy_engine with nothing that keeps more than two ranks in step over the copies of
a transfer. The more transfers are under way at once (--at-once), the further they drift apart then.
`nccl_zero_cta`, gathers only, is what NCCL has of the kind: an all-gather into symmetric memory on
a communicator whose policy is to use no SM (NCCL >= 2.28). NCCL may still choose a kernel:
NCCL_DEBUG=INFO says "[Copy Engine]" where it did not. NCCL_NVLS_ENABLE=0 keeps it off NVLink's
multicast.
Without GPUs, `--library` names a library in libcuda's place; times then say nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from deepcompile import _runtime

WAYS = {
    "nccl": ("nccl", {}),
    "copy_engine": ("copy_engine", {}),
    "out_of_step": ("copy_engine", {"in_step_bytes": 1 << 60}),
}
ZERO_CTA = "nccl_zero_cta"
MATMUL = {"cuda": (1024, 8192, 28672), "cpu": (64, 128, 128)}
"""Rows, inner and columns of the matmuls beside."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mb", default="32,128,512,1712", help="whole sizes in MB")
    parser.add_argument("--kinds", default="gather,reduce", help="gather, reduce")
    ways = ", ".join([*WAYS, ZERO_CTA])
    parser.add_argument("--ways", default="nccl,copy_engine", help=ways)
    parser.add_argument("--at-once", type=int, default=2, help="transfers under way (2)")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--library", help="in libcuda's place")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


class Clock:
    """Milliseconds of work on the current stream, the slowest rank's; the host's on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device

    def settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        dist.barrier()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if self._device.type != "cuda":
            return (end - start) * 1e3
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end)

    def slowest(self, times: list[float]) -> float:
        """The median over repeats, then the most of the ranks."""
        worst = torch.tensor([statistics.median(times)], device=self._device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst.item()


class Transfers:
    """Some transfers of one size, under way at once, and compute beside them."""

    def start(self) -> None:
        """Issue all of them."""
        raise NotImplementedError

    def wait(self) -> None:
        """Let the current stream wait for all of them."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make ready for the next round."""

    def run(self, beside: Callable[[], None], clock: Clock) -> tuple[float, float]:
        """ms until `beside` is over, and until all transfers are."""
        begin = clock.mark()
        self.start()
        beside()
        computed = clock.mark()
        self.wait()
        over = clock.mark()
        self.finish()
        return clock.between(begin, computed), clock.between(begin, over)


class ThroughRuntime(Transfers):
    """Sharded parameters, gathered or reduced as a plan would."""

    def __init__(
        self, kind: str, way: str, numel: int, device: torch.device, library: str | None, count: int
    ):
        transport, options = WAYS[way]
        ways = (transport, "nccl") if kind == "gather" else ("nccl", transport)
        options = dict(options, least_bytes=1) | ({"library": library} if library else {})
        rank, world = dist.get_rank(), dist.get_world_size()
        self.runtime = _runtime.Runtime(
            dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 120.0, *ways, options
        )
        self.names = [f"p{i}" for i in range(count)]
        for name in self.names:
            values = torch.nn.Parameter(torch.randn(numel, device=device).bfloat16())
            self.runtime.add_param(name, [(name, values, 0)], numel, "sharded", kind == "reduce")
            del values
        self.gradients = {}
        if kind == "reduce":
            make = functools.partial(torch.randn, numel, device=device)
            self.gradients = {name: make().bfloat16() for name in self.names}

    def start(self) -> None:
        for name, gradient in self.gradients.items():
            self.runtime.reduce(name, {name: gradient})
        if not self.gradients:
            self.runtime.gather(self.names)

    def wait(self) -> None:
        for name in self.gradients:
            self.runtime.accumulate(name)
        if not self.gradients:
            self.runtime.wait(self.names)

    def finish(self) -> None:
        if self.gradients:
            self.runtime.zero_grad()
        else:
            self.runtime.release(self.names)


class ZeroCtaGathers(Transfers):
    """torch's all-gather, on a communicator that is to leave the SMs alone."""

    def __init__(self, numel: int, device: torch.device, count: int):
        rank, world = dist.get_rank(), dist.get_world_size()
        self.group, pool = zero_cta_group(device)
        with torch.cuda.use_mem_pool(pool):
            self.whole = [
                torch.empty(numel // world * world, device=device, dtype=torch.bfloat16)
                for _ in range(count)
            ]
        for each in self.whole:
            symmetric_memory.rendezvous(each, self.group)
        self.shards = [each.chunk(world)[rank].clone() for each in self.whole]
        self.works: list[dist.Work] = []

    def start(self) -> None:
        pairs = zip(self.whole, self.shards, strict=True)
        self.works = [
            dist.all_gather_into_tensor(whole, shard, group=self.group, async_op=True)
            for whole, shard in pairs
        ]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


@functools.cache
def zero_cta_group(device: torch.device) -> tuple[dist.ProcessGroup, Any]:
    """A communicator without SMs, and the pool of its symmetric memory."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
    symmetric_memory.set_backend("NCCL")
    group = dist.new_group(pg_options=options, device_id=device)
    dist.all_reduce(torch.ones(1, device=device), group=group)  # rendezvous finds it, makes none
    return group, symmetric_memory.get_mem_pool(device)


def transfers_of(
    kind: str, way: str, numel: int, device: torch.device, a: argparse.Namespace
) -> Transfers:
    if way == ZERO_CTA:
        return ZeroCtaGathers(numel, device, a.at_once)
    return ThroughRuntime(kind, way, numel, device, a.library, a.at_once)


def measure(
    kind: str, way: str, numel: int, device: torch.device, a: argparse.Namespace, clock: Clock
) -> dict[str, Any]:
    transfers = transfers_of(kind, way, numel, device, a)
    rows, inner, columns = MATMUL[device.type]
    left = torch.randn(rows, inner, device=device).bfloat16()
    right = torch.randn(inner, columns, device=device).bfloat16()

    def matmuls(count: int) -> None:
        for _ in range(count):
            torch.mm(left, right)

    def repeated(beside: Callable[[], None]) -> tuple[float, float]:
        rounds = []
        for _ in range(a.repeats + 2):
            clock.settle()
            rounds.append(transfers.run(beside, clock))
        computed, over = zip(*rounds[2:], strict=True)
        return clock.slowest(list(computed)), clock.slowest(list(over))

    def timed(count: int) -> float:
        clock.settle()
        start = clock.mark()
        matmuls(count)
        return clock.between(start, clock.mark())

    _, alone = repeated(lambda: None)
    timed(20)
    one = clock.slowest([timed(20) / 20 for _ in range(3)])
    count = max(1, round(0.7 * alone / one))
    base = clock.slowest([timed(count) for _ in range(3)])
    computed, beside = repeated(lambda: matmuls(count))
    world = dist.get_world_size()
    arrived = a.at_once * numel * 2 * (world - 1) / world
    return {
        "kind": kind,
        "way": way,
        "mb": numel * 2 / 1e6,
        "alone_ms": alone / a.at_once,
        "alone_gb_s": arrived / alone / 1e6,
        "beside_ms": beside / a.at_once,
        "beside_gb_s": arrived / beside / 1e6,
        "matmul_slowdown": computed / base,
    }


def main() -> int:
    a = parse()
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not (cuda or a.library):
        print("[transfers] start this with torchrun on 2 or more GPUs", file=sys.stderr)
        return 2
    ways = (*WAYS, ZERO_CTA) if cuda else tuple(WAYS)
    for option, words, known in (("ways", a.ways, ways), ("kinds", a.kinds, ("gather", "reduce"))):
        unknown = [word for word in words.split(",") if word not in known]
        if unknown:
            message = f"[transfers] --{option}: {unknown[0]} is none of {', '.join(known)}"
            print(message, file=sys.stderr)
            return 2
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    clock, rows = Clock(device), []
    say = print if dist.get_rank() == 0 else lambda *_, **__: None
    say(f"{'kind':<7} {'way':<12} {'MB':>8} {'alone ms':>9} {'GB/s':>6} ", end="")
    say(f"{'beside ms':>10} {'GB/s':>6} {'matmuls':>8}", flush=True)
    for mb in map(float, a.mb.split(",")):
        for kind, way in itertools.product(a.kinds.split(","), a.ways.split(",")):
            if (kind, way) == ("reduce", ZERO_CTA):
                continue
            row = measure(kind, way, int(mb * 1e6 / 2), device, a, clock)
            rows.append(row)
            say(
                f"{kind:<7} {way:<12} {row['mb']:8.1f} "
                f"{row['alone_ms']:9.3f} {row['alone_gb_s']:6.0f} "
                f"{row['beside_ms']:10.3f} {row['beside_gb_s']:6.0f} "
                f"{row['matmul_slowdown']:7.2f}x",
                flush=True,
            )
    if a.json and dist.get_rank() == 0:
        name = torch.cuda.get_device_name(device) if cuda else "cpu"
        facts = {"device": name, "ranks": dist.get_world_size(), "torch": torch.__version__}
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
        facts |= {"nccl": nccl, "repeats": a.repeats, "at_once": a.at_once}
        a.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
