# SPDX-License-Identifier: Apache-2.0
"""How fast do GPUs copy from and to each other's memory, all at once?

One process, plain cudaMemcpyAsync, no kernels. Every GPU, or one alone, copies from (pull) or to
(push) each other GPU over and over: on one stream, or on a stream for each peer; GPU r starts with
r+1 ("next"), so that no two begin at the same one, or all start with the same ("same"). Nothing
keeps them in step afterwards, which is what core/runtime/comm/link_rounds.h is for.

    python benchmarks/micro/peer_copies.py --mib 64
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import time

import torch

DEVICE_TO_DEVICE = 3
ROUNDS, REPEATS = 6, 4


class Copies:
    def __init__(self, nbytes: int):
        major = torch.version.cuda.split(".")[0]
        self.runtime = ctypes.CDLL(f"libcudart.so.{major}")
        self.world, self.nbytes = torch.cuda.device_count(), nbytes
        devices = range(self.world)
        for gpu, peer in itertools.permutations(devices, 2):
            torch.cuda.set_device(gpu)
            self.runtime.cudaDeviceEnablePeerAccess(peer, 0)

        def buffers():
            return [torch.zeros(self.world * nbytes, dtype=torch.uint8, device=d) for d in devices]

        self.sources, self.targets = buffers(), buffers()
        self.streams = [[torch.cuda.Stream(d, priority=-1) for _ in devices] for d in devices]

    def copy(self, gpu: int, peer: int, stream: torch.cuda.Stream, push: bool) -> None:
        owner, mine, theirs = (peer, gpu, peer) if push else (gpu, peer, gpu)
        source = self.sources[gpu if push else peer]
        to = self.targets[owner].data_ptr() + mine * self.nbytes
        of = source.data_ptr() + theirs * self.nbytes
        pointers = [ctypes.c_void_p(p) for p in (to, of)]
        size, on = ctypes.c_size_t(self.nbytes), ctypes.c_void_p(stream.cuda_stream)
        error = self.runtime.cudaMemcpyAsync(*pointers, size, DEVICE_TO_DEVICE, on)
        if error != 0:
            raise RuntimeError(f"cudaMemcpyAsync: error {error}")

    def finish(self) -> None:
        for device in range(self.world):
            torch.cuda.synchronize(device)

    def rate(self, gpus: range, next_first: bool, apart: bool, push: bool) -> float:
        """GB/s that each GPU copies."""
        self.finish()
        begin = time.perf_counter()
        for _, gpu in itertools.product(range(ROUNDS), gpus):
            torch.cuda.set_device(gpu)
            first = gpu + 1 if next_first else 0
            for peer in ((first + i) % self.world for i in range(self.world)):
                if peer != gpu:
                    self.copy(gpu, peer, self.streams[gpu][peer if apart else gpu], push)
        self.finish()
        moved = ROUNDS * (self.world - 1) * self.nbytes
        return moved / (time.perf_counter() - begin) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=64, help="of each copy (64)")
    mib = parser.parse_args().mib
    if torch.cuda.device_count() < 2:
        parser.error(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    copies = Copies(mib << 20)
    print(f"{copies.world} x {torch.cuda.get_device_name()}, copies of {mib} MiB, GB/s a GPU")
    print("kind  GPUs  first  streams   GB/s")
    ways = itertools.product((False, True), (copies.world, 1), (True, False), (False, True))
    for push, count, next_first, apart in ways:
        rates = [copies.rate(range(count), next_first, apart, push) for _ in range(REPEATS)]
        words = "push" if push else "pull", count, "next" if next_first else "same"
        streams = "apart" if apart else "one"
        print(f"{words[0]:<5} {words[1]:<5} {words[2]:<6} {streams:<7} {max(rates[1:]):6.0f}")


if __name__ == "__main__":
    main()
