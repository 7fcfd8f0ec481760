# SPDX-License-Identifier: Apache-2.0
"""At which share of the memory's bandwidth does the AdamW kernel run, beside torch's?

For each size: bf16 gradients and weights, f32 masters and moments (28 bytes an element), in
one job and in turns: a device copy (the bandwidth to reach), the library's
kernel with a clip factor, and torch's fused AdamW as the runtime uses it without the library
(gradient to f32, factor, update, weight to bf16). The buffers rotate, so that nothing is
found in a cache. Shares are of the copy's rate, in bytes that the library's kernel moves.

    python benchmarks/micro/adamw_bandwidth.py --elements 100M,1B,4B --json adamw.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable

BYTES = 28
"""Read and written per element: gradient 2, master 4 + 4, moments 8 + 8, weight 2."""
COPY_BYTES = 8 << 30
"""What the copy moves at most."""
HOST_CYCLES = 8_000_000
"""The GPU's pause before each measurement: some milliseconds, in which the host gets ahead."""


def elements(text: str) -> int:
    """100M, 4B or a plain number."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9}.get(text[-1:].upper())
    return int(float(text[:-1]) * scale) if scale else int(text)


class Buffers:
    """Copies of one parameter's arrays; each use takes the next."""

    def __init__(self, numel: int, sets: int):
        import torch

        def fill(dtype, make):
            return [make(numel, dtype=dtype, device="cuda") for _ in range(sets)]

        self.sets, self.turn = sets, 0
        self.master = fill(torch.float32, torch.zeros)
        self.exp_avg = fill(torch.float32, torch.zeros)
        self.exp_avg_sq = fill(torch.float32, torch.ones)
        self.gradient = fill(torch.bfloat16, torch.ones)
        self.weight = fill(torch.bfloat16, torch.zeros)

    def next(self) -> int:
        self.turn = (self.turn + 1) % self.sets
        return self.turn


def ours(buffers: Buffers, segments: int) -> Callable[[], None]:
    """The library's kernel on one array, or on as many segments of it."""
    import torch

    from deepcompile.cuda_kernels import Kernels, Segment

    kernels, factor = Kernels(), torch.full((), 0.5, device="cuda")

    def rows(i: int) -> list[Segment]:
        names = ("master", "exp_avg", "exp_avg_sq", "gradient", "weight")
        parts = [getattr(buffers, name)[i].chunk(segments) for name in names]
        return [Segment(*part, grad_scale=0.25) for part in zip(*parts, strict=True)]

    tables = [rows(i) for i in range(buffers.sets)]
    return lambda: kernels.adamw(tables[buffers.next()], factor)


def torchs(buffers: Buffers) -> Callable[[], None]:
    """What the runtime does without the library."""
    import torch

    factor, step = torch.full((), 0.5, device="cuda"), torch.ones((), device="cuda")

    def run() -> None:
        i = buffers.next()
        gradient = buffers.gradient[i].float().mul(0.25).mul(factor)
        torch._fused_adamw_(
            [buffers.master[i]], [gradient], [buffers.exp_avg[i]], [buffers.exp_avg_sq[i]], [],
            [step], lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        buffers.weight[i].copy_(buffers.master[i])

    return run


def copy(size: int) -> Callable[[], None]:
    """A device copy that reads and writes `size` bytes together."""
    import torch

    source = torch.zeros(size // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def times(actions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """ms of each action, in turns."""
    import torch

    found: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(-2, repeats):  # two rounds to warm up
        for name, action in actions.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HOST_CYCLES)  # while the host enqueues what is measured
            start.record()
            action()
            stop.record()
            stop.synchronize()
            if turn >= 0:
                found[name].append(start.elapsed_time(stop))
    return found


def measure(numel: int, repeats: int, segments: int) -> list[dict]:
    """One row for each of copy, ours, ours in segments, torch's."""
    import torch

    torch.cuda.empty_cache()
    free, copied = torch.cuda.mem_get_info()[0], min(BYTES * numel, COPY_BYTES)
    # A set of buffers has 16 bytes an element, torch's gradients in f32 8.
    sets = min(4, int((0.95 * free - copied - 8 * numel) // (16 * numel)))
    if sets < 1:
        print(f"{numel:>14,}  needs {(24 * numel + copied) / 2**30:.0f} GiB: left out")
        return []
    buffers = Buffers(numel, sets)
    actions = {
        "copy": copy(copied),
        "deepcompile_cuda": ours(buffers, 1),
        f"deepcompile_cuda, {segments} segments": ours(buffers, segments),
        "torch": torchs(buffers),
    }
    rows = []
    for name, ms in times(actions, repeats).items():
        median = statistics.median(ms)
        rate = (copied if name == "copy" else BYTES * numel) / median / 1e6
        rows.append({
            "kernel": name, "elements": numel, "buffer_sets": sets, "ms": median,
            "ms_min": min(ms), "ms_max": max(ms), "gb_per_s": rate,
            "share_of_copy": rate / rows[0]["gb_per_s"] if rows else 1.0,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", default="100M,500M,1B,2B,4B", help="sizes, comma separated")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--segments", type=int, default=100, help="for the many-segments row")
    parser.add_argument("--json", help="write every row to this file")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("[adamw_bandwidth] no GPU: run this on a machine with one")
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, python {platform.python_version()}")
    print("ms: median (min-max); GB/s: 28 bytes an element")
    print(f"{'elements':>14}  {'kernel':<34} {'ms':>26} {'GB/s':>8} {'of copy':>8}")
    rows = []
    for numel in (elements(text) for text in args.elements.split(",")):
        for row in measure(numel, args.repeats, args.segments):
            spread = f"{row['ms']:.3f} ({row['ms_min']:.3f}-{row['ms_max']:.3f})"
            print(
                f"{numel:>14,}  {row['kernel']:<34} {spread:>26} {row['gb_per_s']:>8.0f} "
                f"{row['share_of_copy']:>8.1%}",
                flush=True,
            )
            rows.append({"device": device, "torch": torch.__version__, **row})
    if args.json:
        with open(args.json, "w") as out:
            json.dump(rows, out, indent=1)


if __name__ == "__main__":
    main()
