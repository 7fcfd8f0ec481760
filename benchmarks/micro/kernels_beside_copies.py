# SPDX-License-Identifier: Apache-2.0
"""At what rate do the library's kernels move memory, alone and beside copies between GPUs?

All GPUs at once: the AdamW update, the gradients' norm, sums of bf16 pieces, and sums into f32
totals, each over and over on its stream; beside it copies from (pull) or to (push) each peer in
turn, in step: no two GPUs copy from or to the same one. TB/s are of the bytes that a kernel reads
and writes, GB/s of what each GPU copies. One GPU measures the kernels alone.

    python benchmarks/micro/kernels_beside_copies.py --elements 256 --pieces 2,4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from peer_copies import Copies

from deepcompile.cuda_kernels import Kernels, Segment

CYCLES = 8_000_000
"""The GPUs' pause before each measurement: some milliseconds, in which the host gets ahead."""
ROUNDS = 8


class Work:
    """What one GPU's kernels work on."""

    def __init__(self, gpu: int, numel: int, most: int):
        def array(dtype: torch.dtype, value: float = 0) -> torch.Tensor:
            return torch.full((numel,), value, dtype=dtype, device=f"cuda:{gpu}")

        f32, bf16 = torch.float32, torch.bfloat16
        self.segment = Segment(array(f32), array(f32), array(f32, 1), array(bf16), array(bf16))
        self.pieces = [array(bf16, 1) for _ in range(most)]
        self.sum, self.total = array(bf16), array(f32)
        self.norm = torch.zeros((), dtype=f32, device=f"cuda:{gpu}")


def kernels(library: Kernels, counts: list[int]) -> list[tuple[str, int, Callable[[Work], None]]]:
    """Name, bytes an element, call."""

    def norm(work: Work) -> None:
        library.squared_sum([work.segment.gradient], [1.0], work.norm)

    out = [("adamw", 28, lambda work: library.adamw([work.segment])), ("norm", 2, norm)]
    for n in counts:

        def sums(work: Work, n: int = n) -> None:
            library.piece_sums([work.pieces[:n]], [work.sum])

        def totals(work: Work, n: int = n) -> None:
            library.piece_totals([work.pieces[:n]], [work.total], [False], 1.0)

        out += [(f"sum of {n}", 2 * n + 2, sums), (f"total of {n}", 2 * n + 8, totals)]
    return out


class Bench:
    def __init__(self, numel: int, most: int, copied: int):
        self.world = torch.cuda.device_count()
        self.work = [Work(gpu, numel, most) for gpu in range(self.world)]
        self.copies = Copies(copied) if self.world > 1 else None
        self.streams = [torch.cuda.Stream(gpu) for gpu in range(self.world)]
        self.copying = self.streams
        if self.copies:
            self.copying = [self.copies.streams[gpu][gpu] for gpu in range(self.world)]

    def enqueue_copies(self, push: bool) -> None:
        """Rounds of copies; a GPU begins each when the one that had that peer before is done."""
        before: list[torch.cuda.Event] = []
        for turn in range(ROUNDS * (self.world - 1)):
            away = turn % (self.world - 1) + 1
            done = []
            for gpu in range(self.world):
                torch.cuda.set_device(gpu)
                stream = self.copying[gpu]
                if before:
                    stream.wait_event(before[(gpu + (1 if away > 1 else 2)) % self.world])
                self.copies.copy(gpu, (gpu + away) % self.world, stream, push)
                done.append(stream.record_event())
            before = done

    def timed(self, call: Callable | None, times: int, push: bool | None) -> tuple[float, float]:
        """Milliseconds of one kernel, and of all copies, of the slowest GPU."""
        spans = []
        for gpu in range(self.world):
            torch.cuda.synchronize(gpu)
        for gpu in range(self.world):
            torch.cuda.set_device(gpu)
            copying = self.copying[gpu]
            for stream in (self.streams[gpu], copying):
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(CYCLES)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
            with torch.cuda.stream(self.streams[gpu]):
                events[0].record()
                for _ in range(times if call else 0):
                    call(self.work[gpu])
                events[1].record()
            events[2].record(copying)
            spans.append(events)
        if push is not None:
            self.enqueue_copies(push)
        for gpu in range(self.world):
            torch.cuda.set_device(gpu)
            copying = self.copying[gpu]
            spans[gpu][3].record(copying)
        for gpu in range(self.world):
            torch.cuda.synchronize(gpu)
        kernel = max(e[0].elapsed_time(e[1]) for e in spans) / max(times, 1)
        return kernel, max(e[2].elapsed_time(e[3]) for e in spans)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=256, help="Mi of each array (256)")
    parser.add_argument("--pieces", default="2,4", help="pieces of a sum (2,4)")
    parser.add_argument("--mib", type=int, default=112, help="of each copy (112)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    counts = [int(n) for n in args.pieces.split(",")]
    numel, copied = args.elements << 20, args.mib << 20
    bench = Bench(numel, max(counts), copied)
    print(f"{bench.world} x {torch.cuda.get_device_name()}, {args.elements} Mi elements")
    print("kernel       alone TB/s   beside pull: TB/s, GB/s   beside push: TB/s, GB/s")
    for name, nbytes, call in kernels(Kernels(), counts):
        bench.timed(call, 2, None)
        alone, _ = bench.timed(call, 8, None)
        words = f"{name:<12} {numel * nbytes / alone / 1e9:10.2f}"
        for push in (False, True) if bench.copies else ():
            moved = ROUNDS * (bench.world - 1) * copied
            times = max(1, round(moved / 300e6 / alone))  # about as long as the copies
            beside, all_copies = bench.timed(call, times, push)
            words += f"{numel * nbytes / beside / 1e9:18.2f}, {moved / all_copies / 1e6:4.0f}"
        print(words, flush=True)


if __name__ == "__main__":
    main()
