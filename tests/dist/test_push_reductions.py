# SPDX-License-Identifier: Apache-2.0
"""Reductions by copy engine, on CPUs: the real transport over a driver that does its work at once.

As in test_copy_engine.py, hooks of the driver delay a rank's pushes, and switch waits off to show
that what they prevent would be seen.
"""

from __future__ import annotations

import gc
import re
import time

import pytest
import torch
import torch.distributed as dist
from fake_driver import Fake
from ranks import run_ranks
from test_copy_engine import JOBS, life
from toy_step import PLANS, Toy

from deepcompile import _runtime
from deepcompile.errors import UserError


def pushing(rank, world, library, stage=3, engine=(), gather="nccl", least_bytes=1, **options):
    """A toy whose reductions are pushes, the smallest too."""
    more = {"library": library, "least_bytes": least_bytes, **dict(engine)}
    return Toy(
        rank, world, stage, group=dist.group.WORLD, gather=gather, reduce_over="copy_engine",
        copy_engine_options=more, **options,
    )  # fmt: skip


# ---- bits


def compare(rank, world, library):
    """(job, plan) whose bits differ from the process group's; pushes of all."""
    fake = Fake(library)
    fake.set(push_ms=int(rank == 1))  # it drifts behind
    wrong = []
    for number, (job, plans) in enumerate(JOBS):
        plain = {key: value for key, value in job.items() if key != "engine"}
        gather = "copy_engine" if number % 2 else "nccl"
        for plan in plans:
            one = Toy(rank, world, group=dist.group.WORLD, plan=plan, **plain)
            two = pushing(rank, world, library, plan=plan, gather=gather, **job)
            expected, found = (life(toy, rank, world, job, plan) for toy in (one, two))
            pairs = zip(expected, found, strict=True)
            if not all(torch.equal(a, b) for a, b in pairs):
                wrong.append((job, plan))
            assert two.runtime.reductions["transport"] == "copy_engine"
            assert two.runtime.gathers["transport"] == gather
    return wrong, fake.count("pushes")


def test_two_ranks_get_the_bits_of_the_process_group(driver):
    for wrong, pushes in run_ranks(compare, 2, driver):
        assert wrong == [] and pushes > 100


def summed(rank, world, library, dtype, sizes):
    """Reductions of these sizes, several under way; this rank's parts, and what they should be."""
    runtime, names = reducer(rank, world, library, sizes, dtype)
    whole = [gradients(size, world, dtype) for size in sizes]
    pairs = []
    for at in range(0, len(names), 3):
        together = range(at, min(at + 3, len(names)))
        for i in together:
            runtime.reduce(names[i], {names[i]: whole[i][rank]})
        for i in reversed(together):
            runtime.accumulate(names[i])
    for i, name in enumerate(names):
        total = whole[i][0].to(torch.float32)
        for one in whole[i][1:]:
            total = total + one.to(torch.float32)
        part = runtime.gradient(name)  # shards are padded
        mine = total.to(dtype).float()[rank * len(part) :][: len(part)] / world
        pairs.append((part[: len(mine)], mine))
    return [torch.equal(a, b) for a, b in pairs]


def reducer(rank, world, library, sizes, dtype=torch.float32, timeout=20.0, engine=()):
    options = {"library": library, "least_bytes": 1, **dict(engine)}
    word = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    runtime = _runtime.Runtime(
        dist.group.WORLD, rank, world, torch.device("cpu"), word, timeout_s=timeout,
        reduce="copy_engine", copy_engine_options=options,
    )  # fmt: skip
    names = [f"p{i}" for i in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        param = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        runtime.add_param(name, [(name, param, 0)], size, "sharded", True)
    return runtime, names


def gradients(size, world, dtype, seed=0):
    """One for each rank."""
    draw = torch.Generator().manual_seed(size + seed)
    return [torch.randn(size, generator=draw).to(dtype) for _ in range(world)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_summed_in_the_order_of_ranks_and_rounded_once(driver, dtype):
    sizes = [1000, 1, 37, 4096, 4095, 4096, 640, 4096, 5, 2048, 3000, 4096]
    for right in run_ranks(summed, 4, driver, dtype, sizes):
        assert all(right), right


IN_STEP = {"in_step_bytes": 600}  # w1's transfers, and no other


def plans_of(rank, world, library):
    """Whether every plan has the bits of the first, all but that with ranks kept in step and rank 1
    traced: it starts each transfer by itself, and others start what stands together."""
    fake, found = Fake(library), []
    for engine, plan in [({}, ""), *((IN_STEP, plan) for plan in ("", *PLANS))]:
        fake.set(push_ms=int(rank == 1), pull_ms=int(rank == 2))
        toy = pushing(
            rank, world, library, plan=plan, engine=engine, gather="copy_engine", coalesce=True
        )
        toy.runtime.trace(rank == 1)
        losses = toy.train(4, rank, world)
        found.append(losses + list(toy.everything().values()))
    return [all(map(torch.equal, one, found[0])) for one in found]


def together(rank, world, library):
    """Of every plan, with `coalesce` and without, and with it traced: whether it has the bits of
    the first, and how often its streams were made to wait or to signal."""
    fake = Fake(library)
    fake.set(push_ms=int(rank == 1), pull_ms=int(rank == 0))
    found = []
    for plan in ("", *PLANS):
        for coalesce, traced in ((False, False), (True, False), (True, True)):
            toy = pushing(rank, world, library, plan=plan, coalesce=coalesce, gather="copy_engine")
            toy.runtime.trace(traced)
            before = fake.count("batches")
            losses = toy.train(4, rank, world)
            found.append((losses + list(toy.everything().values()), fake.count("batches") - before))
    same = [all(map(torch.equal, one, found[0][0])) for one, _ in found]
    batches = [count for _, count in found]
    return same, batches[0::3], batches[1::3], batches[2::3]


@pytest.mark.parametrize("world", [2, 4])
def test_what_starts_together_has_the_same_bits_in_fewer_steps_of_streams(driver, world):
    for same, apart, joined, traced in run_ranks(together, world, driver):
        assert all(same), same
        assert all(a >= b for a, b in zip(apart, joined, strict=True)), (apart, joined)
        assert sum(apart) > sum(joined)
        # Each instruction by itself, in the same order: it has its own time.
        assert all(a > b for a, b in zip(traced, joined, strict=True)), (traced, joined)


def test_every_plan_gives_the_same_bits_on_four_ranks(driver):
    for same in run_ranks(plans_of, 4, driver):
        assert all(same), dict(zip(("drifting", "", *PLANS), same, strict=True))


# ---- ranks in step


def meetings(rank, world, library):
    """How often copies of w1 met others on a link, with ranks kept in step and without."""
    fake, found = Fake(library), []
    for engine in (IN_STEP, {}):
        for plan in ("", "deferred, updated in the forward", "early"):
            toy = pushing(rank, world, library, plan=plan, engine=engine, gather="copy_engine")
            dist.barrier()
            before = fake.count("meetings")
            fake.set(watched_bytes=600, push_ms=1 + rank % 2 * 3, pull_ms=1 + (rank + 1) % 3 * 2)
            toy.train(3, rank, world)
            fake.set(watched_bytes=0, push_ms=0, pull_ms=0)
            found.append(fake.count("meetings") - before)
    return found[:3], found[3:]


@pytest.mark.parametrize("world", [3, 4])
def test_ranks_in_step_never_meet_on_a_link(driver, world):
    in_step, drifting = zip(*run_ranks(meetings, world, driver), strict=True)
    assert all(count == 0 for of in in_step for count in of), in_step
    assert sum(map(sum, drifting)) > 10, drifting


def late(rank, world, library, who, engine=()):
    """What a rank says of a reduction that `who` does not come to, and after how long."""
    runtime, (name,) = reducer(rank, world, library, [64], timeout=1.5, engine=engine)
    whole = gradients(64, world, torch.float32)

    def reduction():
        runtime.reduce(name, {name: whole[rank]})
        runtime.accumulate(name)
        runtime.zero_grad()

    reduction()
    dist.barrier()
    if rank == who:
        time.sleep(5)
        return None
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        for _ in range(2):
            reduction()
    return str(caught.value), time.monotonic() - begin


def test_who_keeps_the_others_out_of_step_is_named(driver):
    found = run_ranks(late, 4, driver, 2, {"in_step_bytes": 1}, timeout=60)
    messages = {rank: found[rank][0] for rank in (0, 1, 3)}
    assert re.search(r"a large parameter \(ranks in step.*\) waited 1.5 s for rank 2", messages[1])
    assert all(" waited 1.5 s for rank " in message for message in messages.values())


# ---- what the waits prevent


def rounds(rank, world, library, count, size=1024, before_reduce=0.0, before_sum=0.0):
    """Reductions of one size after another, each summed at the end of its turn: what is wrong."""
    runtime, (name,) = reducer(rank, world, library, [size])
    dist.barrier()
    wrong = []
    for turn in range(count):
        whole = gradients(size, world, torch.float32, turn)
        time.sleep(before_reduce)
        runtime.reduce(name, {name: whole[rank]})
        time.sleep(before_sum)
        runtime.accumulate(name)
        part = runtime.gradient(name)
        mine = (sum(whole) / world)[rank * len(part) :][: len(part)]
        if not torch.allclose(part, mine, atol=1e-6):
            wrong.append(turn)
        runtime.zero_grad()
    return wrong


def without_waits(rank, world, library):
    """(a late pusher, with waits and without; a late reader, the same)."""
    fake, found = Fake(library), []
    for late, slow in (({"before_reduce": 0.2}, 1), ({"before_sum": 0.2}, 0)):
        for ignored in (0, 1):
            reducer(rank, world, library, [1])  # all are here
            if rank != slow:
                fake.set(ignore_waits=ignored)
            found.append(rounds(rank, world, library, 4, **(late if rank == slow else {})))
            fake.set(ignore_waits=0)
            dist.barrier()
    return found


def test_nobody_sums_what_has_not_arrived_or_overwrites_what_is_not_summed(driver):
    one, other = run_ranks(without_waits, 2, driver)
    assert one[:1] == other[:1] == [[]] and one[2] == other[2] == []
    assert one[1], "rank 0 sums before rank 1 has pushed"
    assert one[3], "rank 1 pushes into what rank 0 has not summed"


def counted(rank, world, library):
    """(what is wrong, writes and waits given to a stream together, writes) of 20 reductions."""
    fake = Fake(library)
    runtime, names = reducer(rank, world, library, [1024] * 2)
    whole = gradients(1024, world, torch.float32)
    wrong, before = [], None
    for turn in range(12):
        if turn == 2:  # the inbox is there, and was gone round once
            before = fake.count("batches"), fake.count("writes")
        for name in names:
            runtime.reduce(name, {name: whole[rank]})
        for name in names:
            runtime.accumulate(name)
            part = runtime.gradient(name)
            mine = (sum(whole) / world)[rank * len(part) :][: len(part)]
            wrong += [] if torch.allclose(part, mine, atol=1e-6) else [turn]
        runtime.zero_grad()
    return wrong, fake.count("batches") - before[0], fake.count("writes") - before[1]


def test_few_steps_of_a_stream_are_given_for_a_reduction(driver):
    reductions, world = 20, 4
    for wrong, batches, writes in run_ranks(counted, world, driver):
        assert wrong == []
        # "freed" is waited for, "arrived" written, and waited for with the write to "freed" of the
        # reduction before; one more where the place of the first of two was just summed.
        assert batches <= 3.5 * reductions and writes <= 2 * world * reductions


def test_an_absent_peer_is_named_in_time(driver):
    message, seconds = run_ranks(late, 2, driver, 1)[0]
    assert "rank 0: accumulate p0 (outside a plan) failed" in message
    assert "the pieces of a reduction waited 1.5 s for rank 1" in message
    assert seconds < 3


# ---- memory, and where it is taken


def memory(rank, world, library):
    fake, seen = Fake(library), []
    small = pushing(rank, world, library, least_bytes=1 << 20)
    small.train(1, rank, world)
    seen.append((fake.count("pushes"), small.runtime.outside_bytes()))
    toy = pushing(rank, world, library)
    seen.append(toy.runtime.outside_bytes())
    toy.train(1, rank, world)
    seen.append(toy.runtime.outside_bytes())
    seen.append((fake.count("mappings"), fake.count("allocations")))
    measured = toy.runtime.measure_links([64, 4096, 1 << 20], 1)
    del toy, small
    gc.collect()
    seen.append((fake.count("mappings"), fake.count("allocations")))
    return seen, [size for size, _ in measured["reduce"]]


def test_an_inbox_is_made_when_it_is_needed_and_goes_with_the_engine(driver):
    for seen, sizes in run_ranks(memory, 2, driver):
        assert seen == [(0, 0), 0, 64 << 20, (1, 1), (0, 0)]
        assert sizes == [64, 4096, 1 << 20]  # the last over the process group


def crowded(rank, world, library):
    runtime, (name,) = reducer(rank, world, library, [64])
    Fake(library).set(no_memory=int(rank == 1))
    with pytest.raises(UserError) as caught:
        runtime.reduce(name, {name: torch.ones(64)})
    return str(caught.value)


def test_no_memory_for_an_inbox_is_an_error_on_every_rank(driver):
    for message in run_ranks(crowded, 2, driver):
        assert re.search(r"rank 1: no memory for \d+ bytes of an inbox for reductions", message)
        assert 'compile.reduce "nccl"' in message


def chosen(rank, world, library):
    def ask(reduce, gather="nccl", **options):
        try:
            runtime = _runtime.Runtime(
                dist.group.WORLD, rank, world, torch.device("cpu"), timeout_s=20.0, gather=gather,
                reduce=reduce, copy_engine_options=options,
            )  # fmt: skip
        except UserError as error:
            return str(error)
        return runtime.gathers["transport"], runtime.reductions["transport"]

    return {
        "both": ask("auto", "auto", library=library),
        "reductions": ask("copy_engine", library=library),
        "gathers": ask("nccl", "auto", library=library),
        "auto on a cpu": ask("auto", "auto"),
        "cpu": ask("copy_engine", "auto"),
        "nonsense": ask("ring"),
    }


def test_reductions_are_asked_for_by_themselves(driver):
    for said in run_ranks(chosen, 2, driver):
        assert said["both"] == ("copy_engine", "copy_engine")
        assert said["reductions"] == ("nccl", "copy_engine")
        assert said["gathers"] == ("copy_engine", "nccl")
        assert said["auto on a cpu"] == ("nccl", "nccl")
        assert 'compile.reduce is "copy_engine", which is not possible here' in said["cpu"]
        assert 'transport of reductions is "ring". Use nccl, copy_engine' in said["nonsense"]
