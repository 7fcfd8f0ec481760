# SPDX-License-Identifier: Apache-2.0
"""Plans that move, remake, delay or hasten, on Gloo ranks; sums kept on each rank; flags."""

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toy_step import CODES, GRAPH, PACK, PLANS, Reference, Toy, batch, before, plan_text

from deepcompile import _runtime
from deepcompile.errors import UserError

STEPS = 3
JOBS = [
    dict(),
    dict(accumulation=4, dtype=torch.bfloat16, reduce="bf16"),
    dict(clip=0.5),
    dict(accumulation=4, clip=0.5),
]


def run(rank, world, **options):
    toy = Toy(rank, world, group=dist.group.WORLD, **options)
    kind = {"dtype": options["dtype"]} if "dtype" in options else {}
    losses = toy.train(STEPS, rank, world, **kind)
    return losses, toy.everything()


def same(result, expected):
    pairs = list(zip(result[0], expected[0], strict=True))
    pairs += [(result[1][name], tensor) for name, tensor in expected[1].items()]
    return all(torch.equal(a, b) for a, b in pairs)


def all_plans(rank, world):
    """(job, stage, plan) of every plan whose bits differ from the plain plan's."""
    wrong = []
    for index, job in enumerate(JOBS):
        for stage in (0, 1, 3):
            expected = run(rank, world, stage=stage, **job)
            for plan in PLANS:
                if plan == "early" and "clip" in job:
                    continue
                if not same(run(rank, world, stage=stage, plan=plan, **job), expected):
                    wrong.append((index, stage, plan))
    return wrong


def test_plans_give_the_same_bits_on_two_ranks():
    assert run_ranks(all_plans, 2, timeout=300) == [[], []]


def relief(rank, world):
    """One rank alone is out of memory: the others must not notice."""
    expected = run(rank, world, stage=3, accumulation=2)
    found = []
    for percent in (300, 260, 230, 215, 205):
        toy = Toy(rank, world, 3, group=dist.group.WORLD, accumulation=2, timeout_s=20)
        toy.train(1, rank, world)
        held = sum(v for k, v in toy.runtime.buffer_report().items() if "host" not in k)
        toy = Toy(rank, world, 3, group=dist.group.WORLD, accumulation=2, timeout_s=20)
        if rank == 1:
            toy.runtime.limit_bytes(held * percent // 100)
        losses = toy.train(STEPS, rank, world)
        toy.runtime.limit_bytes(0)
        assert same((losses, toy.everything()), expected), percent
        found.append(toy.runtime.relieved()["times"])
    return found


def test_one_rank_may_run_short():
    quiet, short = run_ranks(relief, 2, timeout=200)
    assert not any(quiet) and sum(count > 0 for count in short) >= 2, short


def fails_when_relieved(rank):
    """A region's code that fails, on rank 1 only after relief has made room for it once."""
    calls = []

    def broken(args):
        calls.append(len(args))
        if rank == 1 and len(calls) == 1:
            raise torch.OutOfMemoryError("full")
        raise ValueError("a broken batch")

    return broken


def fails_while_short(rank, world):
    """A section fails on all ranks, when rank 1 has sent a parameter that is whole to the host."""
    toy = Toy(rank, world, 3, group=dist.group.WORLD, timeout_s=10)
    graph = plan_text(world, 3, GRAPH, (before("run fwd.1", "gather w1", "wait w1"),))
    toy.graph = toy.runtime.load_plan(graph, [CODES[0], fails_when_relieved(rank), *CODES[2:]])
    expected = {name: value.detach() for name, value in Reference().named_parameters()}
    toy.runtime.limit_bytes(1 << 40 if rank == 1 else 0)  # ready to try again
    with pytest.raises(ValueError, match="a broken batch"):
        toy.micro_step(*batch(rank))
    sent = toy.runtime.relieved()["params_bytes"]
    toy.runtime.limit_bytes(0)
    found = toy.full_values()
    return sent > 0, all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_a_failed_section_sent_away_is_gathered_anew():
    assert run_ranks(fails_while_short, 2) == [(False, True), (True, True)]


def stored_while_away(rank, world):
    """What the user wrote into a whole parameter is kept, though relief sent it to the host."""
    codes = [fails_when_relieved(rank), *CODES[1:]]
    toy = Toy(rank, world, 3, group=dist.group.WORLD, codes=codes)
    toy.runtime.gather(["w2"])
    toy.runtime.wait(["w2"])
    toy.model.w2.data.mul_(0.5)
    toy.runtime.limit_bytes(1 << 40 if rank == 1 else 0)  # ready to try again
    with pytest.raises(ValueError, match="a broken batch"):
        toy.micro_step(*batch(rank))
    sent = toy.runtime.relieved()["params_bytes"]
    toy.runtime.limit_bytes(0)
    toy.runtime.store(["w2"])
    toy.runtime.release(["w2"])
    return sent > 0, torch.equal(toy.full_values()["w2"], Reference().w2.detach() * 0.5)


def test_a_parameter_that_was_sent_away_is_stored():
    assert run_ranks(stored_while_away, 2) == [(False, True), (True, True)]


def boundary(rank, world):
    options = dict(group=dist.group.WORLD, boundary=True)
    same_bits = []
    for stage in (0, 1, 3):
        one = run(rank, world, stage=stage)
        toy = Toy(rank, world, stage, **options)
        same_bits.append(same((toy.train(STEPS, rank, world), toy.everything()), one))
    four = dict(accumulation=4, stage=1, boundary=True)
    expected = run(rank, world, **four)
    same_bits += [same(run(rank, world, plan=plan, **four), expected) for plan in PLANS]
    toy = Toy(rank, world, 1, accumulation=2, **options)
    toy.runtime.set_last_micro_batch(False)
    toy.micro_step(*batch(rank), factor=0.5)
    local = toy.runtime.buffer_report()
    assert toy.runtime.gradient("w1") is None
    toy.runtime.set_last_micro_batch(True)
    toy.micro_step(*batch(world + rank), factor=0.5)
    reduced = toy.runtime.buffer_report()
    return same_bits, local["gradients"], reduced["gradients"], expected[1]


def test_sums_on_each_rank_are_reduced_once():
    results = run_ranks(boundary, 2, timeout=200)
    model = Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(8):
            (model(*batch(step * 8 + index)) / 8).backward()
        optimizer.step()
    for same_bits, local, reduced, values in results:
        assert all(same_bits)
        assert local == 2 * reduced  # whole on its rank, then a piece
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(values[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def left_over(rank, world):
    """The last micro batch has no gradient of a parameter: the step reduces what there is."""
    options = dict(group=dist.group.WORLD, boundary=True, accumulation=2)
    toy = Toy(rank, world, 1, **options)
    before = toy.full_values()
    toy.runtime.set_last_micro_batch(False)
    toy.micro_step(*batch(rank))
    toy.runtime.set_last_micro_batch(True)
    toy.step()
    after = toy.full_values()
    return all(not torch.equal(before[name], after[name]) for name in after)


def test_a_sum_that_no_reduction_took_is_reduced_by_the_step():
    assert run_ranks(left_over, 2) == [True, True]


def settled(rank, world):
    twin = Toy(rank, world, 1, group=dist.group.WORLD)
    twin.train(2, rank, world)
    toy = Toy(rank, world, 1, group=dist.group.WORLD, plan="deferred")
    toy.train(2, rank, world)
    assert not toy.runtime.is_whole("w1") and not toy.runtime.is_whole(PACK)
    pieces = toy.runtime.pieces()
    expected = twin.runtime.pieces()
    for ours, theirs in zip(pieces, expected, strict=True):
        assert torch.equal(ours["master"], theirs["master"]) and ours["step"] == theirs["step"]
    toy.runtime.settle()
    return all(
        torch.equal(ours.detach(), theirs.detach()) and toy.runtime.is_whole(PACK)
        for ours, theirs in zip(toy.model.parameters(), twin.model.parameters(), strict=True)
    )


def test_settle_makes_whole_parameters_whole():
    assert run_ranks(settled, 2) == [True, True]


def flags(rank, world):
    runtime = _runtime.Runtime(dist.group.WORLD, rank, world, torch.device("cpu"))
    seen = []
    for step in range(6):
        runtime.share(10 * step + rank if step != 3 else -rank)
        seen.append(runtime.shared())
    times = runtime.measure_links([1 << 14, 1 << 18], 3)
    return seen, times


def test_flags_and_links():
    (seen, times), (seen1, times1) = run_ranks(flags, 2)
    assert seen == seen1 == [0, 1, 11, 21, 0, 41]
    assert times == times1
    for direction in ("gather", "reduce", "to_host", "to_device"):
        assert [size for size, _ in times[direction]] == [1 << 14, 1 << 18]
        assert all(ns > 0 for _, ns in times[direction])


def absent_in_deferred(rank, world):
    toy = Toy(rank, world, 3, group=dist.group.WORLD, plan="deferred", timeout_s=2.0)
    toy.train(1, rank, world)
    if rank == 1:
        time.sleep(6)
        return None
    try:
        toy.micro_step(*batch(rank))
    except UserError as error:
        return str(error)
    return ""


def test_a_gather_that_applies_an_update_still_names_its_instruction():
    message = run_ranks(absent_in_deferred, 2, timeout=60)[0]
    assert "[runtime] rank 0: forward 0, instruction" in message and "w1) failed" in message
