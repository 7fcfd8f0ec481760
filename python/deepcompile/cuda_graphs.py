# SPDX-License-Identifier: Apache-2.0
"""Records what regions launch as CUDA graphs, for core/runtime/exec/replays.h.

All allocations of a recording, the buffers of gathers too, are made on one stream of its own,
which never runs anything: each graph is launched on the compute stream, in the order of the
recording, so that memory is used again in the order in which it was while recording.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import _runtime
from .errors import UserError


def why_not(setting: str, device: torch.device) -> str:
    """Why nothing is recorded where compile.cuda_graphs says `setting`; empty: something is."""
    if setting == "off":
        return "it is switched off"
    if device.type != "cuda":
        return "a CPU has none"
    allocator = torch.cuda.get_allocator_backend()
    if allocator != "native":
        return f"the allocator {allocator} has no pools for them"
    return ""


def recorder(setting: str, device: torch.device) -> GraphRecorder | None:
    """Of a device, as compile.cuda_graphs says; None: nothing is recorded."""
    why = why_not(setting, device)
    if why and setting == "on":
        raise UserError(f"[initialize] compile.cuda_graphs: {why}; use auto or off")
    return None if why else GraphRecorder(device)


def segments_of(pool: tuple[int, int]) -> list[dict[str, Any]]:
    """What torch's allocator holds of the device for a pool."""
    # torch 2.11 drops a reference of each number it is given here, and the numbers of later pools
    # would be freed while they are in use.
    for number in pool:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(number))
    return torch.cuda.memory_snapshot(pool, include_traces=False)


class GraphPool:
    """Device memory of one recording: it stays while this object lives, graphs or not."""

    def __init__(self, device: int):
        self.device = device
        self.handle = torch.cuda.graph_pool_handle()
        # Makes the pool, and counts once for this object.
        torch._C._cuda_beginAllocateCurrentThreadToPool(device, self.handle)
        torch._C._cuda_endAllocateToPool(device, self.handle)
        _runtime.hold_pinned_pool(self.handle)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter ends
            torch._C._cuda_releasePool(self.device, self.handle)
            _runtime.release_pinned_pool(self.handle)

    def idle_bytes(self) -> int:
        """What it holds of the device that no tensor does."""
        segments = segments_of(self.handle)
        return sum(s["total_size"] - s["allocated_size"] for s in segments)


class RecordedGraph:
    """A region's graph. It may run once each time its inputs were written, as what dies in it is
    written over."""

    def __init__(self, graph: torch.cuda.CUDAGraph, device: int):
        self.graph, self.device = graph, device
        self.replay = graph.replay

    def first(self) -> int:
        """Launches it. A CUgraphExec's address, by which it can be launched from then on; 0 if its
        kernels look for the state of random numbers in memory that only replay() sets."""
        generator = torch.cuda.default_generators[self.device]
        before = generator.get_offset()
        self.graph.replay()
        return 0 if generator.get_offset() != before else self.graph.raw_cuda_graph_exec()


class GraphRecorder:
    """See bindings/runtime/python_recorder.h. Called by any thread, one at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        self._something: torch.Tensor | None = None
        self._pool: GraphPool | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._entered: Any = None
        self._collects = False
        self._warm: set[int] = set()
        self._prepared: set[int] = set()

    def begin(self) -> GraphPool:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what the steps before used is the recording's to use
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
            self._something = torch.zeros(1, device=self.device)
        self._pool = GraphPool(self.device.index)
        return self._pool

    @contextlib.contextmanager
    def _allocating(self) -> Iterator[None]:
        index, handle = self.device.index, self._pool.handle
        with torch.cuda.stream(self._stream):
            torch._C._cuda_beginAllocateCurrentThreadToPool(index, handle)
            try:
                yield
            finally:
                torch._C._cuda_endAllocateToPool(index, handle)
                torch._C._cuda_releasePool(index, handle)

    def allocate(self, size: int) -> torch.Tensor:
        flat = torch.empty(0, dtype=torch.uint8, device=self.device)
        with self._allocating():
            # Not torch.empty: with deterministic algorithms it fills what it makes, on a stream
            # that waits for nobody.
            memory = torch.UntypedStorage(size, device=self.device)
        return flat.set_(memory, 0, (size,), (1,))

    def prepare(self) -> None:
        """Gives a thread's cuBLAS its workspace in the pool. Others are given back by whoever
        records graphs in this process too, and launches write to them."""
        thread = threading.get_ident()
        if thread in self._prepared:
            return
        self._prepared.add(thread)
        self._warm_up()
        with self._short_capture():
            self._multiply()

    def start(self, inputs: list[Any]) -> None:
        self._collects = gc.isenabled()
        gc.disable()  # a tensor of others that goes now would be a call in the middle
        self._graph = torch.cuda.CUDAGraph()
        self._entered = torch.cuda.stream(self._stream)
        self._entered.__enter__()
        try:
            self._graph.capture_begin(pool=self._pool.handle, capture_error_mode="thread_local")
        except BaseException:
            self.abort()
            raise

    def _warm_up(self) -> None:
        """A thread's first use of cuBLAS makes what no capture may."""
        if threading.get_ident() in self._warm:
            return
        self._warm.add(threading.get_ident())
        with torch.cuda.stream(self._stream):
            self._multiply()
        self._stream.synchronize()
        torch._C._cuda_clearCublasWorkspaces()

    def _multiply(self) -> None:
        with torch.no_grad():
            square = torch.zeros(16, 16, dtype=torch.bfloat16, device=self.device)
            torch.mm(square, square)
            torch.addmm(square[0], square, square)

    @contextlib.contextmanager
    def _short_capture(self) -> Iterator[None]:
        """Of a graph that nobody launches."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool.handle, capture_error_mode="thread_local")
            yield
            graph.capture_end()

    def _leave(self) -> torch.cuda.CUDAGraph:
        graph, self._graph = self._graph, None
        try:
            graph.capture_end()
        finally:
            self._entered.__exit__(None, None, None)
            if self._collects:
                gc.enable()
        return graph

    def finish(
        self, outputs: list[Any], again: Callable[..., Any]
    ) -> tuple[list[Any], RecordedGraph]:
        try:
            graph = self._leave()
        except RuntimeError:  # invalid, though the code did not fail
            self._repair()
            raise
        return outputs, RecordedGraph(graph, self.device.index)

    def abort(self) -> None:
        """The capture is invalid: ending it is an error that says nothing new, and leaves the
        allocators and the generator of random numbers where they were."""
        try:
            self._leave()
        except RuntimeError:
            self._repair()

    def _repair(self) -> None:
        """What torch leaves undone at the end of an invalid capture."""
        index, handle = self.device.index, self._pool.handle
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(index, handle)
            torch._C._cuda_releasePool(index, handle)
        with contextlib.suppress(RuntimeError):
            _runtime.end_pinned_pool(handle)
            _runtime.release_pinned_pool(handle)
        self._end_capture_of_random_numbers()

    def _end_capture_of_random_numbers(self) -> None:
        """Only a valid capture's end tells the generator, which draws nothing until then."""
        with self._short_capture():
            self._something.zero_()

    def end(self) -> int:
        torch._C._cuda_clearCublasWorkspaces()  # else they would keep the pool
        self._prepared.clear()
        pool, self._pool = self._pool, None
        return pool.idle_bytes()
