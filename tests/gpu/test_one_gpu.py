# SPDX-License-Identifier: Apache-2.0
"""One rank alone on a GPU."""

from __future__ import annotations

import pytest
import torch

from deepcompile import _runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_flag_is_read_after_it_was_written():
    """The flag's copy to the host runs on a stream of its own: it may not be ahead of compute."""
    device = torch.device("cuda", 0)
    runtime = _runtime.Runtime(None, 0, 1, device)
    busy = torch.ones(8192, 8192, device=device)
    found = []
    for number in range(9):
        for _ in range(3):
            busy @ busy
        runtime.share(100 + number)
        found.append(runtime.shared())
    assert found == [0, *(100 + number for number in range(8))]
