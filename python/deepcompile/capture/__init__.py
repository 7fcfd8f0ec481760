# SPDX-License-Identifier: Apache-2.0
"""From a model's forward to step programs: capture, cut, compile once."""

from deepcompile.capture import cache_folder  # noqa: F401 - before anything of torch._dynamo
from deepcompile.capture.backend import (
    CaptureBackend,
    make_backend,
    raise_from_backend,
    surface_errors,
)
from deepcompile.capture.entry import make_entry, output_of
from deepcompile.capture.graph import CapturedGraph, CaptureOptions, Runner, Sink
from deepcompile.capture.layers import EqualLayers

__all__ = [
    "CaptureBackend",
    "CaptureOptions",
    "CapturedGraph",
    "EqualLayers",
    "Runner",
    "Sink",
    "make_backend",
    "make_entry",
    "output_of",
    "raise_from_backend",
    "surface_errors",
]
