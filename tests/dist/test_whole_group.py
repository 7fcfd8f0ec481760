# SPDX-License-Identifier: Apache-2.0
"""An engine spans all ranks of the default group."""

from __future__ import annotations

from ranks import run_ranks


def _beside_a_group_of_one(rank: int, world: int) -> tuple[int, bool]:
    import torch
    import torch.distributed as dist

    import deepcompile

    groups = [dist.new_group([each]) for each in range(world)]
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}}
    engine = deepcompile.initialize(model=torch.nn.Linear(2, 2), config=config)[0]
    return engine.ranks.world, engine.ranks.group is dist.group.WORLD and groups[rank] is not None


def test_other_groups_are_not_taken():
    assert run_ranks(_beside_a_group_of_one, 2, timeout=60) == [(2, True)] * 2
