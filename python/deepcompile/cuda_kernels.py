# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of libdeepcompile_cuda.so from Python, on torch tensors.

The runtime calls the library itself; this is for tests, benchmarks, and whoever
wants its optimizer alone. Work goes to torch's current stream of the tensors'
device; nothing waits for it. core/runtime/cuda/kernels.h describes the calls.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from .errors import UserError

ABI = 4
NAME = "libdeepcompile_cuda.so"
MAX_PIECES = 16
_TYPES = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}


@dataclasses.dataclass
class Segment:
    """One stretch of elements with one set of settings. All tensors are contiguous, on one
    device, of one number of elements."""

    master: torch.Tensor
    """f32; updated, as both moments are."""
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    gradient: torch.Tensor
    """f32, bf16 or f16; read only."""
    weight: torch.Tensor | None = None
    """bf16 or f16: gets the new master, rounded. None: the master is the weight."""
    grad_scale: float = 1.0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    step: int = 1
    """This update's number, from 1."""
    decoupled: bool = True
    """AdamW; False: Adam, whose decay is added to the gradient."""


class _Segment(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("master", "exp_avg", "exp_avg_sq")),
        ("gradient", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("grad_scale", "lr", "beta1", "beta2", "eps")),
        ("weight_decay", ctypes.c_double),
        ("step", ctypes.c_int64),
        ("decoupled", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class _Gradient(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("type", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class _Sum(ctypes.Structure):
    _fields_ = [
        ("pieces", ctypes.c_void_p * MAX_PIECES),
        ("out", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("first", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


def library_path() -> Path:
    """Where the library is, if it was built."""
    return Path(__file__).parent / NAME


def _type(tensor: torch.Tensor | None) -> int:
    dtype = None if tensor is None else tensor.dtype
    if dtype not in _TYPES:
        raise UserError(f"[kernels] {dtype}: the kernels take f32, bf16, f16 and f64")
    return _TYPES[dtype]


def _pointer(tensor: torch.Tensor | None, like: torch.Tensor) -> int | None:
    if tensor is None:
        return None
    if tensor.device != like.device or tensor.numel() != like.numel():
        raise UserError(
            f"[kernels] a tensor of {tensor.numel()} elements on {tensor.device} beside one of "
            f"{like.numel()} on {like.device}: give tensors of one size on one GPU"
        )
    if tensor.device.type != "cuda" or not tensor.is_contiguous():
        raise UserError("[kernels] a tensor is not contiguous, or not on a GPU: copy it first")
    return tensor.data_ptr()


class Kernels:
    """The library, loaded."""

    def __init__(self, path: Path | None = None):
        self.path = library_path() if path is None else path
        try:
            self._library = ctypes.CDLL(str(self.path))
        except OSError as error:
            raise UserError(
                f"[kernels] {self.path} could not be loaded ({error}): build deepcompile where "
                "there is a CUDA toolkit"
            ) from None
        found = self._library.deepcompile_cuda_abi()
        if found != ABI:
            raise UserError(f"[kernels] {self.path} has ABI {found}, not {ABI}: build it again")
        self._library.deepcompile_cuda_error.restype = ctypes.c_char_p
        self._library.deepcompile_cuda_squared_sum_partials.restype = ctypes.c_int64

    def check(self, status: int) -> None:
        """UserError for any other status than 0."""
        if status:
            text = self._library.deepcompile_cuda_error(ctypes.c_int(status)).decode()
            raise UserError(f"[kernels] {self.path.name}: {text} ({status})")

    def usable(self, device: int) -> None:
        """UserError if the kernels do not run on the GPU of this number."""
        self.check(self._library.deepcompile_cuda_usable(ctypes.c_int(device)))

    def adamw(self, segments: Sequence[Segment], factor: torch.Tensor | None = None) -> None:
        """Update all segments, which have one type of gradients and one of weights. factor: one
        f32 on the GPU, that all gradients are multiplied by; None for 1."""
        if not segments:
            return
        first = segments[0]
        gradient_type, weight_type = _type(first.gradient), _type(first.weight)
        table = (_Segment * len(segments))()
        for row, s in zip(table, segments, strict=True):
            if (_type(s.gradient), _type(s.weight)) != (gradient_type, weight_type):
                raise UserError("[kernels] segments of several types: make a call for each")
            states = (s.master, s.exp_avg, s.exp_avg_sq)
            if any(t.dtype != torch.float32 for t in states):
                raise UserError("[kernels] masters and moments are f32: convert them")
            pointers = [_pointer(t, s.master) for t in (*states, s.gradient, s.weight)]
            numbers = (s.grad_scale, s.lr, *s.betas, s.eps, s.weight_decay)
            row.__init__(*pointers, s.master.numel(), *numbers, s.step, int(s.decoupled), 0)
        device = first.master.device
        self.check(
            self._library.deepcompile_cuda_adamw(
                ctypes.c_int(device.index),
                ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
                table,
                ctypes.c_int64(len(segments)),
                ctypes.c_int(gradient_type),
                ctypes.c_int(weight_type),
                ctypes.c_void_p(None if factor is None else factor.data_ptr()),
            )
        )

    def squared_sum(
        self,
        gradients: Sequence[torch.Tensor],
        scales: Sequence[float],
        out: torch.Tensor,
        partials: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """out (0-dim f64 or f32 on the GPU) = sum of all (scale * element)^2. partials: f64 on the
        GPU for the partial sums; None to allocate them."""
        table = (_Gradient * max(1, len(gradients)))()
        for row, gradient, scale in zip(table, gradients, scales, strict=len(gradients) > 0):
            data = _pointer(gradient, gradient)
            row.__init__(data, gradient.numel(), scale, _type(gradient), 0)
        count = ctypes.c_int64(len(gradients))
        if partials is None:
            needed = self._library.deepcompile_cuda_squared_sum_partials(table, count)
            partials = torch.empty(needed, dtype=torch.float64, device=out.device)
        self.check(
            self._library.deepcompile_cuda_squared_sum(
                ctypes.c_int(out.device.index),
                ctypes.c_void_p(torch.cuda.current_stream(out.device).cuda_stream),
                table,
                count,
                ctypes.c_void_p(partials.data_ptr()),
                ctypes.c_int64(partials.numel()),
                ctypes.c_void_p(_pointer(out, out)),
                ctypes.c_int(_type(out)),
            )
        )
        return out

    def piece_sums(
        self, pieces: Sequence[Sequence[torch.Tensor]], outs: Sequence[torch.Tensor]
    ) -> None:
        """Each out = the sum of its pieces in their order, in f32 (f64 for f64), rounded once. A
        sum's tensors are of one size and out is none of its pieces; all are of one type, and all
        sums of as many pieces, 1 to 16."""
        if any(out.dtype != pieces[0][0].dtype for out in outs):
            raise UserError("[kernels] sums of another type than their pieces: convert them")
        self._sums(self._library.deepcompile_cuda_piece_sums, pieces, outs, [False] * len(outs))

    def piece_totals(
        self,
        pieces: Sequence[Sequence[torch.Tensor]],
        totals: Sequence[torch.Tensor],
        first: Sequence[bool],
        scale: float,
    ) -> None:
        """As piece_sums, but each total, in f32 (f64 for f64), = itself + scale * the rounded sum;
        without itself where it is the first."""
        kinds = {
            torch.promote_types(part.dtype, torch.float32) for parts in pieces for part in parts
        }
        if any({total.dtype} != kinds for total in totals):
            raise UserError("[kernels] totals are f32, or f64 for f64: convert them")
        call = self._library.deepcompile_cuda_piece_totals
        self._sums(call, pieces, totals, first, ctypes.c_double(scale))

    def _sums(self, call, pieces, outs, first, *more) -> None:
        if not outs:
            return
        table = (_Sum * len(outs))()
        for row, parts, out, is_first in zip(table, pieces, outs, first, strict=True):
            if any(part.dtype != pieces[0][0].dtype for part in parts):
                raise UserError("[kernels] pieces of several types: convert them")
            if not 1 <= len(parts) <= MAX_PIECES or len(parts) != len(pieces[0]):
                raise UserError(f"[kernels] {len(parts)} pieces: give 1 to {MAX_PIECES}, of all")
            pointers = [_pointer(part, out) for part in parts]
            row.pieces[: len(parts)] = pointers
            row.out, row.numel, row.first = _pointer(out, out), out.numel(), int(is_first)
        device = outs[0].device
        self.check(
            call(
                ctypes.c_int(device.index),
                ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
                table,
                ctypes.c_int64(len(outs)),
                ctypes.c_int64(len(pieces[0])),
                ctypes.c_int(_type(pieces[0][0])),
                *more,
            )
        )
