# SPDX-License-Identifier: Apache-2.0
"""On how many GPUs the tests run: on 2 and on all there are, or as many as $WORLDS says ("4")."""

from __future__ import annotations

import os

import pytest
import torch

GPUS = torch.cuda.device_count()
_ASKED = os.environ.get("WORLDS", "").split(",")
WORLDS = sorted({int(n) for n in _ASKED if n} or {2, max(GPUS, 2)})
"""Ranks, one a GPU. Where there are fewer GPUs than 2, tests of several are skipped."""
if max(WORLDS) > max(GPUS, 2) or min(WORLDS) < 2:
    raise ValueError(f"WORLDS={os.environ['WORLDS']}: name numbers from 2 to {max(GPUS, 2)}")

TWO_GPUS = pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, this machine has {GPUS}")
