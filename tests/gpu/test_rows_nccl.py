# SPDX-License-Identifier: Apache-2.0
"""Embeddings by rows on GPUs: exact rows and sums, training as with whole embeddings, and a host
that does not wait for its device."""

import pytest
import rows_cases
import torch
from ranks import run_ranks
from rows_step import RowsStep, batch, everything, expected_gradient, shard_of
from worlds import TWO_GPUS, WORLDS

pytestmark = TWO_GPUS
TABLES = [(64, 32), (64, 21), (50, 20), (3, 1000), (1, 300), (200, 1)]


def lengths(rank, step):
    return [7, 0, 12, 1][(rank + step) % 4]


def exact(rank, world):
    device = f"cuda:{rank}"
    for count, row in TABLES:
        step = RowsStep(rank, world, count, row, device=device)
        for number in range(4):
            batches = [batch(10 * number + r, count, row, lengths(r, number)) for r in range(world)]
            step.micro_batch(*(x.to(device) for x in batches[rank]))
            expected = expected_gradient(batches, count, row, world)
            assert torch.equal(step.gradient().cpu(), shard_of(expected, rank, world)), (count, row)
            step.runtime.zero_grad()
        assert torch.equal(everything(step), step.values)
    return True


@pytest.mark.parametrize("world", WORLDS)
def test_rows_are_gathered_and_summed_exactly(world):
    assert run_ranks(exact, world, backend="nccl") == [True] * world


def unsynchronised(rank, world):
    device = f"cuda:{rank}"
    step = RowsStep(rank, world, 64, 21, device=device)
    mine = [x.to(device) for x in batch(rank, 64, 21, 5 + rank)]
    step.micro_batch(*mine)
    step.runtime.zero_grad()
    step._fwd = step._fwd_unchecked
    step.plan = step._load(step.text)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    call, token = step.runtime.new_call(step.plan)
    (loss,) = step.runtime.run(step.plan, 0, call, mine)
    step.runtime.run(step.plan, 1, call, [torch.ones_like(loss)])
    torch.cuda.set_sync_debug_mode("default")
    return True


def test_the_host_waits_for_no_device():
    assert run_ranks(unsynchronised, 2, backend="nccl") == [True, True]


@pytest.mark.parametrize("world", WORLDS)
def test_training_by_rows_is_training_with_whole_embeddings(world):
    runs = [{"ragged": True, "embedding_rows": rows} for rows in ("on", "off")]
    for rows, whole in run_ranks(rows_cases.train, world, runs, backend="nccl", timeout=400):
        assert any("by rows" in line for line in rows["order"])
        for name, value in rows["state"].items():
            torch.testing.assert_close(value, whole["state"][name], rtol=0, atol=2e-6)
