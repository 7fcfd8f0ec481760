# SPDX-License-Identifier: Apache-2.0
"""A collective call that one rank makes alone says so, by its name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

PAIRS = [
    ("report", "save_checkpoint"),
    ("save_16bit_model", "report"),
    ("load_checkpoint", "state_dict"),
]
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def call(engine: Any, what: str, folder: Path) -> str:
    from deepcompile import UserError

    arguments = [] if what == "state_dict" else [folder / "r.html" if what == "report" else folder]
    try:
        getattr(engine, what)(*arguments)
    except UserError as error:
        return str(error)
    return ""


def said(rank: int, world: int) -> list[str]:
    """What a rank is told in each pair of calls, and at last when rank 0 is left alone."""
    import torch

    import deepcompile

    engine, *_ = deepcompile.initialize(model=torch.nn.Linear(4, 4), config=CONFIG)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [call(engine, pair[rank], folder) for pair in PAIRS]
        return texts + ([call(engine, "report", folder)] if rank == 0 else [])


@pytest.mark.timeout(200)
def test_ranks_in_different_calls_are_told_which():
    first, second = run_ranks(said, 2)
    for pair, *texts in zip(PAIRS, first, second, strict=False):
        for rank, text in enumerate(texts):
            here, there = pair[rank], pair[1 - rank]
            assert f"rank {rank} is in {here}, rank {1 - rank} in {there}: call each" in text
            assert "on all ranks" in text and "\n" not in text
    assert first[-1].startswith("[distributed] report: the other ranks are not in it")
    assert "Call it on all ranks" in first[-1] and "\n" not in first[-1]
