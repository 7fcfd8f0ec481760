# SPDX-License-Identifier: Apache-2.0
"""The runtime on several Gloo ranks: parity, equal bits between placements, failures."""

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from toy_step import PACK, Reference, Toy, batch

from deepcompile.errors import UserError

STEPS = 4


def make_toy(rank, world, stage, **options):
    return Toy(rank, world, stage, group=dist.group.WORLD, **options)


def train(rank, world, stage, accumulation=1, clip=0.0, dtype=torch.float32, reduce="f32"):
    """Full values and norms after some steps, each rank on its own rows."""
    toy = make_toy(
        rank, world, stage, accumulation=accumulation, clip=clip, dtype=dtype, reduce=reduce
    )
    norms = []
    for step in range(STEPS):
        for micro in range(accumulation):
            seed = (step * accumulation + micro) * world + rank
            toy.micro_step(*batch(seed, dtype=dtype), factor=1.0 / accumulation)
        norms.append(toy.step()["grad_norm"])
    report = toy.runtime.buffer_report()
    return {n: v.float() for n, v in toy.full_values().items()}, norms, report


def train_all(rank, world, jobs):
    return [train(rank, world, **job) for job in jobs]


def reference(world, accumulation=1, clip=0.0):
    """One process over all ranks' rows."""
    model = Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(accumulation):
            for rank in range(world):
                seed = (step * accumulation + micro) * world + rank
                (model(*batch(seed)) / (world * accumulation)).backward()
        if clip:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}, norms


JOBS = [
    dict(),
    dict(accumulation=4),
    dict(clip=0.5),
    dict(accumulation=2, clip=0.5),
    dict(dtype=torch.bfloat16, reduce="bf16"),
    dict(dtype=torch.bfloat16, reduce="f32", clip=0.5),
    dict(dtype=torch.bfloat16, reduce="bf16", accumulation=2),
]


@pytest.mark.parametrize("world", [2, 3])
def test_stages_agree_bit_by_bit_and_with_one_process(world):
    jobs = [dict(stage=stage, **job) for job in JOBS for stage in (0, 3)]
    per_rank = run_ranks(train_all, world, jobs)
    for index, job in enumerate(JOBS):
        results = [rank[2 * index + i] for rank in per_rank for i in (0, 1)]
        first_values, first_norms, _ = results[0]
        for values, norms, _ in results[1:]:
            assert norms == first_norms, job
            for name, tensor in first_values.items():
                assert torch.equal(values[name], tensor), (job, name)
        if "dtype" in job:
            continue
        expected, norms = reference(world, **job)
        for name, tensor in expected.items():
            torch.testing.assert_close(first_values[name], tensor, rtol=1e-5, atol=1e-6)
        if "clip" in job:
            assert first_norms == pytest.approx(norms, rel=1e-5)


def test_sharded_bytes_shrink_with_the_ranks():
    jobs = [dict(stage=0), dict(stage=3)]
    (replicated, sharded) = (result[2] for result in run_ranks(train_all, 2, jobs)[0])
    assert sharded["full"] == 256 * 2  # the pack alone: 59 elements, two shards of 64
    assert replicated["full"] > sharded["full"] + 2 * sharded["shards"] - 1
    assert sharded["states"] * 2 == replicated["states"]
    assert sharded["masters"] == 0  # f32 weights are their own


def identity(rank, world):
    toy = make_toy(rank, world, 3)
    expected = Reference()
    weight = toy.model.w1
    empty = weight.untyped_storage().nbytes() == 0
    for _ in range(3):
        for name, value in toy.full_values().items():
            assert torch.equal(value, getattr(expected, name).detach()), name
    pieces = [(p["member"], p["start"], p["stop"]) for p in toy.runtime.pieces()]
    return empty and toy.model.w1 is weight, pieces


@pytest.mark.parametrize("world", [2, 3])
def test_gather_and_release_keep_identity_and_values(world):
    results = run_ranks(identity, world)
    assert all(kept for kept, _ in results)
    expected = Reference()
    for name, parameter in expected.named_parameters():
        ranges = sorted((a, b) for _, pieces in results for m, a, b in pieces if m == name)
        assert ranges[0][0] == 0 and ranges[-1][1] == parameter.numel()
        assert all(left[1] == right[0] for left, right in zip(ranges, ranges[1:], strict=False))


def differing_members(rank, world):
    """Rank 0 alone has a gradient for the bias; neither has one for the scale."""
    toy = make_toy(rank, world, 3)
    before = toy.full_values()
    grads = {"bias": torch.ones_like(toy.model.bias)} if rank == 0 else {}
    toy.runtime.reduce(PACK, grads)
    toy.runtime.accumulate(PACK)
    toy.step()
    after = toy.full_values()
    steps = {p["member"]: p["step"] for p in toy.runtime.pieces()}
    return after["bias"], before["bias"], torch.equal(after["scale"], before["scale"]), steps


def test_ranks_agree_on_members_with_gradients():
    results = run_ranks(differing_members, 2)
    (after, before, same_scale, _), (after1, _, same_scale1, _) = results
    assert torch.equal(after, after1) and same_scale and same_scale1
    model = Reference()
    optimizer = torch.optim.AdamW([model.bias], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    model.bias.grad = torch.full_like(model.bias, 0.5)
    optimizer.step()
    torch.testing.assert_close(after, model.bias.detach(), rtol=1e-6, atol=1e-7)
    assert not torch.equal(after, before)


def skip_together(rank, world):
    toy = make_toy(rank, world, 3, dtype=torch.float16, reduce="f16")
    factor = float("nan") if rank == 1 else 1.0
    toy.micro_step(*batch(rank, dtype=torch.float16), factor=factor)
    return toy.step(check_finite=True)["skipped"], toy.runtime.optimizer_steps()


def test_all_ranks_skip_when_one_has_no_finite_gradient():
    assert run_ranks(skip_together, 2) == [(True, 0), (True, 0)]


def broadcast(rank, world):
    toy = make_toy(rank, world, 3)
    tensor = torch.nn.Parameter(torch.full((5,), float(rank)))
    toy.runtime.broadcast(tensor)
    toy.runtime.barrier()
    return tensor.tolist()


def test_broadcast_is_rank_0s():
    assert run_ranks(broadcast, 2) == [[0.0] * 5, [0.0] * 5]


def collective_with_absent_peer(rank, world, mode):
    """Rank 1 dies, stalls or fails in its backward; the others' error and when it came."""
    toy = make_toy(rank, world, 3, timeout_s=3.0)
    toy.micro_step(*batch(rank))
    toy.step()
    dist.barrier()
    if rank == 1 and mode == "dies":
        os._exit(0)
    if rank == 1 and mode == "stalls":
        time.sleep(12)
        return None
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        toy.micro_step(*batch(rank))
    # The runtime still answers, and fails again instead of hanging.
    saved = toy.runtime.buffer_report()["saved"]
    with pytest.raises(UserError):
        toy.micro_step(*batch(rank))
    return str(caught.value), time.monotonic() - begin, saved


@pytest.mark.parametrize("mode", ["dies", "stalls"])
def test_an_absent_peer_is_an_error_that_names_the_instruction(mode):
    result = run_ranks(collective_with_absent_peer, 2, mode, timeout=60, dying={1})[0]
    message, seconds, saved = result
    assert "[runtime] rank 0: forward 0, instruction" in message
    assert "(wait w1)" in message or "(gather w1)" in message, message
    assert "no word of it from rank 1: it ended, is somewhere else, or still waits" in message
    assert seconds < 12 and saved == 0


def one_of_four_stays_away(rank, world):
    toy = make_toy(rank, world, 3, timeout_s=3.0)
    toy.micro_step(*batch(rank))
    toy.step()
    dist.barrier()
    if rank == 2:
        time.sleep(8)
        return None
    with pytest.raises(UserError) as caught:
        toy.micro_step(*batch(rank))
    return str(caught.value)


def test_who_is_absent_is_named_on_every_rank_that_waits():
    for rank, message in enumerate(run_ranks(one_of_four_stays_away, 4, timeout=60)):
        assert rank == 2 or f"[runtime] rank {rank}: forward 0, instruction" in message, message
        assert rank == 2 or "no word of it from rank 2: it" in message, message


def eager_with_absent_peer(rank, world):
    toy = make_toy(rank, world, 3, timeout_s=2.0)
    if rank == 1:
        time.sleep(6)
        return None
    ticks, ended = [], threading.Event()

    def tick():
        while not ended.wait(0.05):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    with pytest.raises(UserError) as caught:
        toy.full_values()
    ended.set()
    thread.join()
    return str(caught.value), len(ticks)


def test_an_absent_peer_outside_a_plan_is_named_and_others_threads_go_on():
    message, ticks = run_ranks(eager_with_absent_peer, 2, timeout=60)[0]
    assert "rank 0: wait w1 (outside a plan) failed" in message
    assert ticks > 10  # the wait of two seconds leaves the GIL to other threads


def reduction_with_absent_peer(rank, world):
    toy = make_toy(rank, world, 3, timeout_s=2.0)
    if rank == 1:
        time.sleep(6)
        return None
    toy.runtime.reduce("w1", {"w1": torch.ones_like(toy.model.w1)})
    with pytest.raises(UserError) as caught:
        toy.runtime.accumulate("w1")
    return str(caught.value)


def test_a_reduction_ends_in_time_too():
    """Not within the group's own timeout, which is the test's here."""
    message = run_ranks(reduction_with_absent_peer, 2, timeout=60)[0]
    assert "rank 0: accumulate w1 (outside a plan) failed" in message


def traced(rank, world):
    toy = make_toy(rank, world, 3)
    toy.runtime.trace(True)
    toy.micro_step(*batch(rank))
    toy.step()
    return toy.runtime.records()


def test_records_time_transfers_on_the_link():
    for records in run_ranks(traced, 2):
        # forward, backward and update of toy_step: every instruction once
        assert len({r[:3] for r in records}) == len(records) > 20
        assert all(0 <= start <= stop for *_, start, stop, _ in records)


def wrong_group(rank, world):
    with pytest.raises(UserError, match="was given rank 0 of 3"):
        make_toy(0, 3, 3)
    with pytest.raises(UserError, match="cannot serve device"):
        Toy(rank, world, 3, group=dist.group.WORLD, device="meta")
    return True


def test_a_group_that_does_not_fit_is_refused():
    assert run_ranks(wrong_group, 2) == [True, True]


def misbehave(rank, world, mode):
    if rank == 1 and mode == "hangs":
        time.sleep(60)
    if rank == 1 and mode == "fails":
        raise ValueError("rank 1's own words")
    if rank == 1 and mode == "dies":
        os._exit(7)
    return rank


def test_run_ranks_reports_every_rank():
    with pytest.raises(RankError, match="rank 1's own words"):
        run_ranks(misbehave, 2, "fails")
    with pytest.raises(RankError, match="rank 1 ended with code 7"):
        run_ranks(misbehave, 2, "dies")
    with pytest.raises(RankError, match=r"rank 1 hung \(limit 15 s\)[\s\S]*in misbehave"):
        run_ranks(misbehave, 2, "hangs", timeout=15)
