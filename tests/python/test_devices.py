# SPDX-License-Identifier: Apache-2.0
"""What the machine has for a rank: which GPU, how much of it, and the torch of the build."""

from __future__ import annotations

import pytest
import torch

from deepcompile import budget, built_for, distributed
from deepcompile.errors import UserError

GIB = 1 << 30


@pytest.fixture
def gpus(monkeypatch):
    """As if there were as many GPUs as are asked for; LOCAL_RANK is 1."""

    def appear(count: int, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return appear


def test_a_rank_takes_the_gpu_of_its_number_or_the_one_that_it_is_shown(gpus):
    gpus(2)
    assert distributed.device_of_rank() == torch.device("cuda", 1)
    gpus(1, visible="3")
    assert distributed.device_of_rank() == torch.device("cuda", 0)
    gpus(1)
    with pytest.raises(UserError, match=r"LOCAL_RANK=1: this process sees 1 GPU\(s\)"):
        distributed.device_of_rank()


def test_a_part_of_the_device_may_be_all_that_a_process_gets(monkeypatch):
    ranks = distributed.Ranks(0, 1, torch.device("cuda", 0))
    facts = {
        "mem_get_info": (60 * GIB, 80 * GIB), "memory_allocated": 6 * GIB,
        "memory_reserved": 10 * GIB, "get_per_process_memory_fraction": 1.0,
    }  # fmt: skip
    for name, value in facts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert budget.measure(ranks, held=0).free == 64 * GIB
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert budget.measure(ranks, held=0).free == 14 * GIB


def test_another_torch_than_the_extensions_is_named(tmp_path):
    record = tmp_path / "built_for_torch.txt"
    built_for.check()  # what is installed here
    assert built_for._release(built_for.RECORD.read_text()) == torch.__version__.split(".")[:2]
    built_for.check(record)  # built by hand: nothing is known
    for version, fits in ((torch.__version__, True), ("2.3.1+cpu", False)):
        record.write_text(version + "\n")
        if fits:
            built_for.check(record)
            continue
        with pytest.raises(UserError, match=r"was built for 2.3.1\+cpu. Build it again"):
            built_for.check(record)
