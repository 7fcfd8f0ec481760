# SPDX-License-Identifier: Apache-2.0
"""Gathers and reductions by rows on several ranks: exact values, whatever the rows' and the
shards' bounds, the ranks' lengths and their repeats."""

import pytest
import torch
from ranks import RankError, run_ranks
from rows_step import RowsStep, batch, everything, expected_gradient, shard_of

# (rows, elements of a row). On 2 and 4 ranks: rows inside of shards; rows that lie on two;
# shards inside of one row, and ranks that own nothing.
TABLES = [(64, 32), (64, 21), (50, 20), (3, 1000), (1, 300), (2, 65), (200, 1)]


def lengths(rank, step):
    """Different on each rank and in each step; some have nothing."""
    return [7, 0, 12, 1][(rank + step) % 4]


def exact(rank, world, tables):
    for count, row in tables:
        step = RowsStep(rank, world, count, row)
        for number in range(4):
            batches = [batch(10 * number + r, count, row, lengths(r, number)) for r in range(world)]
            step.micro_batch(*batches[rank])
            expected = expected_gradient(batches, count, row, world)
            assert torch.equal(step.gradient(), shard_of(expected, rank, world)), (count, row)
            step.runtime.zero_grad()
        assert torch.equal(everything(step), step.values)
    return True


@pytest.mark.parametrize("world", [2, 4])
def test_rows_are_gathered_and_summed_exactly(world):
    assert run_ranks(exact, world, TABLES) == [True] * world


def accumulated(rank, world, dtype, reduce):
    count, row, micro_batches = 64, 21, 4
    step = RowsStep(rank, world, count, row, accumulation=4, dtype=dtype, reduce=reduce)
    batches = []
    for number in range(micro_batches):
        mine = [batch(50 + 10 * number + r, count, row, lengths(r, number)) for r in range(world)]
        step.micro_batch(*mine[rank])
        batches += mine
    expected = expected_gradient(batches, count, row, world)
    assert torch.equal(step.gradient(), shard_of(expected, rank, world))
    return True


@pytest.mark.parametrize("dtype, reduce", [(torch.float32, "f32"), (torch.bfloat16, "bf16")])
def test_micro_batches_with_other_rows_accumulate(dtype, reduce):
    assert run_ranks(accumulated, 2, dtype, reduce) == [True] * 2


def nested(rank, world):
    """Two calls open at once: each backward has its own forward's rows."""
    count, row = 64, 21
    step = RowsStep(rank, world, count, row, accumulation=2)
    batches = [[batch(10 * i + r, count, row, 5 + i) for r in range(world)] for i in range(2)]
    calls = []
    for mine in batches:
        call, token = step.runtime.new_call(step.plan)
        (loss,) = step.runtime.run(step.plan, 0, call, list(mine[rank]))
        calls.append((call, token, loss))
    for call, _, loss in reversed(calls):
        step.runtime.run(step.plan, 1, call, [torch.ones_like(loss)])
    expected = expected_gradient(sum(batches, []), count, row, world)
    return torch.equal(step.gradient(), shard_of(expected, rank, world))


def test_open_calls_keep_their_rows_apart():
    assert run_ranks(nested, 2) == [True, True]


def gathered_again(rank, world):
    """A backward that runs the forward's region again, with the same rows."""
    again = "  gather table\n  wait table\n  run fwd\n  release table\n  run bwd\n"
    step = RowsStep(rank, world, 64, 21, edit=("  run bwd\n", again))
    batches = [batch(r, 64, 21, 5 + r) for r in range(world)]
    step.micro_batch(*batches[rank])
    assert torch.equal(step.seen, step.values[batches[rank][0].flatten()])
    expected = expected_gradient(batches, 64, 21, world)
    return torch.equal(step.gradient(), shard_of(expected, rank, world))


def test_a_backward_gathers_its_forwards_rows_again():
    assert run_ranks(gathered_again, 2) == [True, True]


def equal_to_whole(rank, world):
    """Training by rows and whole, with gradients that round: on two ranks the same bits."""
    results = []
    for by_rows in (True, False):
        step = RowsStep(rank, world, 64, 21, by_rows=by_rows)
        for number in range(4):
            ids, g = batch(10 * number + rank, 64, 21, 9 + 3 * rank)
            step.micro_batch(ids, torch.sin(g + 0.1 * rank))
            step.runtime.step(step.update)
            step.values = everything(step)
        results.append(step.values)
    worst = (results[0] - results[1]).abs().max().item()
    moved = (results[0] - torch.arange(64.0 * 21).view(64, 21)).abs().max().item()
    return worst, moved


@pytest.mark.parametrize("world, tolerance", [(2, 0.0), (4, 1e-3)])
def test_training_by_rows_is_training_whole(world, tolerance):
    for worst, moved in run_ranks(equal_to_whole, world):
        assert worst <= tolerance and moved > 1.0


def guarded(rank, world):
    """Rows are not the parameter: nobody takes them for it."""
    step = RowsStep(rank, world, 64, 21)
    ids, g = batch(rank, 64, 21, 6)
    found = {}

    def fwd(args):
        found["whole"] = step.runtime.is_whole("table")
        for name, act in (("store", step.runtime.store), ("gather", step.runtime.gather)):
            with pytest.raises(Exception) as caught:
                act(["table"])
            found[name] = str(caught.value)
        return RowsStep._fwd(step, args)

    step._fwd = fwd
    step.plan = step._load(step.text)
    step.micro_batch(ids, g)
    return found, step.runtime.is_whole("table"), torch.equal(everything(step), step.values)


def test_rows_are_not_taken_for_the_whole():
    for found, whole, values in run_ranks(guarded, 2):
        assert found["whole"] is False and whole is False and values
        assert "is not whole, there is nothing to store" in found["store"]
        assert "gathered whole while rows of it are there" in found["gather"]


def out_of_range(rank, world):
    step = RowsStep(rank, world, 64, 21)
    ids, g = batch(rank, 64, 21, 6)
    with pytest.raises(Exception, match="out of"):
        step.micro_batch(ids + 64, g)
    step.micro_batch(ids, g)  # the runtime still works
    return True


def test_numbers_outside_the_table_are_an_error():
    assert run_ranks(out_of_range, 2) == [True, True]


def absent(rank, world):
    step = RowsStep(rank, world, 64, 21)
    if rank == 1:
        return None
    step.micro_batch(*batch(rank, 64, 21, 6))
    return None


def test_an_absent_rank_is_an_error_that_names_the_gather():
    with pytest.raises(RankError, match=r"forward 0, instruction 0 \(gather table\) failed"):
        run_ranks(absent, 2, timeout=90)
