# SPDX-License-Identifier: Apache-2.0
"""The end of a process that trained."""

from __future__ import annotations

import subprocess
import sys

AT_EXIT = """
import atexit, gc, weakref
refs = []
atexit.register(lambda: print("alive" if refs[0]() else "gone"))  # the last to be called
import torch
import deepcompile

def train():
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
    engine, *_ = deepcompile.initialize(model=torch.nn.Linear(4, 4), config=config)
    loss = engine(torch.randn(2, 4)).sum()
    engine.backward(loss)
    engine.step()
    refs.append(weakref.ref(engine))

gc.disable()
train()
"""


def test_a_dropped_engine_goes_before_the_interpreter():
    """Its process group's threads would meet an interpreter that ends."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1:] == ["gone"], done.stdout + done.stderr
