# SPDX-License-Identifier: Apache-2.0
"""A recorder for CPUs that behaves as CUDA graphs do.

A recording's memory comes from one arena, where what dies is used again at once. A launch reads
its inputs and writes its outputs at the addresses of the recording, whoever owns them by then.
Outputs hold NaN when they have died; but what dies while its last reader is recorded keeps its
values, as nothing runs at that time, until memory is asked for again.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import torch

ALIGNED = 64


class Arena:
    """First fit from below, so that memory is used again as soon as it can be."""

    def __init__(self, size: int):
        self.memory = (ctypes.c_char * size).from_buffer(mmap.mmap(-1, size))
        self.base = ctypes.addressof(self.memory)
        self.free = [(0, size)]
        self.held = 0
        self.recording = False

    def allocate(self, size: int) -> torch.Tensor:
        room = max(ALIGNED, -(-size // ALIGNED) * ALIGNED)
        place = next(i for i, (_, length) in enumerate(self.free) if length >= room)
        start, length = self.free[place]
        self.free[place : place + 1] = [(start + room, length - room)] if length > room else []
        self.held += room
        owner = (ctypes.c_char * max(size, 1)).from_address(self.base + start)
        weakref.finalize(owner, self.give_back, start, room).atexit = False
        return torch.frombuffer(owner, dtype=torch.uint8)[:size]

    def give_back(self, start: int, room: int) -> None:
        if not self.recording:
            ctypes.memset(self.base + start, 0xFF, room)  # NaN in any type
        self.held -= room
        merged: list[tuple[int, int]] = []
        for begin, length in sorted([*self.free, (start, room)]):
            if merged and sum(merged[-1]) == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((begin, length))
        self.free = merged


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def storage_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def without_owner(value: Any) -> Any:
    """The same place, whoever owns it."""
    if not isinstance(value, torch.Tensor) or value.numel() == 0:
        return value
    size = value.untyped_storage().nbytes()
    memory = (ctypes.c_char * size).from_address(address(value))
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


class FakeGraph:
    def __init__(self, inputs: list, outputs: list, again: Callable[..., Any]):
        self.inputs, self.outputs, self.again = inputs, outputs, again

    def first(self) -> int:
        self.replay()
        return 0

    def replay(self) -> None:
        made = self.again(list(self.inputs))
        for place, value in zip(self.outputs, made, strict=True):
            if place is not None:
                place.copy_(storage_bytes(value))


class FakeRecorder:
    def __init__(self, size: int = 1 << 24):
        self.size = size
        self.arena: Arena | None = None
        self.fails: Exception | None = None
        """Raised once, by the next recording of a run."""
        self.inputs: list = []

    def begin(self) -> Arena:
        self.arena = Arena(self.size)
        return self.arena

    def allocate(self, size: int) -> torch.Tensor:
        self.arena.recording = False
        return self.arena.allocate(size)

    def prepare(self) -> None:
        pass

    def start(self, inputs: list) -> None:
        self.arena.recording = True
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        self.inputs = [without_owner(value) for value in inputs]

    def finish(self, outputs: list, again: Callable[..., Any]) -> tuple[list, FakeGraph]:
        known = {address(v) for v in self.inputs if isinstance(v, torch.Tensor)}
        moved, places = [], []
        for value in outputs:
            place = None
            ours = isinstance(value, torch.Tensor) and not value.is_meta
            if ours and address(value) not in known:
                memory = self.allocate(value.untyped_storage().nbytes()).view(value.dtype)
                value = memory.as_strided(value.shape, value.stride(), value.storage_offset())
                place = without_owner(storage_bytes(value))
            moved.append(value)
            places.append(place)
        inputs, self.inputs = self.inputs, []
        return moved, FakeGraph(inputs, places, again)

    def abort(self) -> None:
        self.inputs = []

    def end(self) -> int:
        return self.size - self.arena.held
