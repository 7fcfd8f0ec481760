# SPDX-License-Identifier: Apache-2.0
"""The runtime on GPUs: parity, equal bits between placements, stream order under pressure."""

import pytest
import torch
import torch.distributed as dist
import toy_step
import worlds
from ranks import run_ranks
from toy_step import PLANS, Reference, Toy, batch

from deepcompile import _runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 4
WORLDS = [1, *worlds.WORLDS] if worlds.GPUS > 1 else [1]
JOBS = [
    dict(),
    dict(accumulation=2, clip=0.5),
    dict(dtype=torch.bfloat16, reduce="bf16", clip=0.5),
    dict(dtype=torch.bfloat16, reduce="f32"),
]


def train(rank, world, stage, accumulation=1, dtype=torch.float32, **options):
    device = f"cuda:{rank}"
    toy = Toy(
        rank, world, stage, device=device, group=dist.group.WORLD, dtype=dtype,
        accumulation=accumulation, **options,
    )  # fmt: skip
    norms = []
    for step in range(STEPS):
        for micro in range(accumulation):
            seed = (step * accumulation + micro) * world + rank
            inputs = batch(seed, dtype=dtype, device=device)
            toy.micro_step(*inputs, factor=1.0 / accumulation)
        norm = toy.step()["grad_norm"]
        norms.append(None if norm is None else norm.item())
    return {n: v.float().cpu() for n, v in toy.full_values().items()}, norms


def train_all(rank, world):
    return [train(rank, world, stage, **job) for job in JOBS for stage in (0, 3)]


def reference(world, accumulation=1, clip=0.0):
    model = Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(accumulation * world):
            seed = step * accumulation * world + index
            (model(*batch(seed)) / (world * accumulation)).backward()
        if clip:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}, norms


@pytest.mark.parametrize("world", WORLDS)
def test_stages_agree_bit_by_bit_and_with_one_process(world):
    per_rank = run_ranks(train_all, world, backend="nccl", timeout=180)
    for index, job in enumerate(JOBS):
        results = [rank[2 * index + i] for rank in per_rank for i in (0, 1)]
        values, norms = results[0]
        for other, other_norms in results[1:]:
            assert other_norms == norms, job
            assert all(torch.equal(other[name], values[name]) for name in values), job
        if "dtype" in job:
            continue
        expected, expected_norms = reference(world, **job)
        for name, tensor in expected.items():
            torch.testing.assert_close(values[name], tensor, rtol=1e-4, atol=1e-5)
        if "clip" in job:
            assert norms == pytest.approx(expected_norms, rel=1e-4)


LAYERS, NUMEL, ROUNDS = 6, (1 << 23) + 12345, 8


def clobber(device):
    """Take memory that was just given back and overwrite it, on the compute stream."""
    torch.full((NUMEL + (1 << 16),), -7.0, dtype=torch.bfloat16, device=device)


def pressure(rank, world):
    """Gathers ahead and reductions behind, while freed memory is overwritten at once."""
    device = torch.device("cuda", rank)
    runtime = _runtime.Runtime(dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 60.0)
    names = [f"p{i}" for i in range(LAYERS)]
    params, expected = {}, {}
    for i, name in enumerate(names):
        generator = torch.Generator(device).manual_seed(i)
        values = torch.randn(NUMEL, generator=generator, device=device).bfloat16()
        expected[name] = values.clone()
        params[name] = torch.nn.Parameter(values)
        runtime.add_param(name, [(name, params[name], 0)], NUMEL, "sharded", True)
    busy = torch.randn(4096, 4096, device=device).bfloat16()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    runtime.trace(True)
    for _ in range(ROUNDS):
        runtime.gather(names[:2])
        pending = None
        for i, name in enumerate(names):
            runtime.gather(names[i + 2 : i + 3])
            runtime.wait([name])
            wrong += (params[name].detach() != expected[name]).sum()
            busy = (busy @ busy) * 1e-2
            gradient = params[name].detach() * (rank + 1)
            runtime.release([name])
            clobber(device)
            runtime.reduce(name, {name: gradient})
            del gradient
            clobber(device)
            if pending:
                runtime.accumulate(pending)
            pending = name
        runtime.accumulate(pending)
        for name in names:
            shard = runtime.gradient(name)
            piece = next(p for p in runtime.pieces() if p["param_name"] == name)
            span = slice(piece["start"], piece["stop"])
            # The mean of (1 .. world) times the weight, rounded to bf16 before the mean.
            mean = expected[name][span].float() * ((world + 1) / 2)
            wrong += ((shard[: mean.numel()] - mean).abs() > 0.02 * mean.abs() + 1e-6).sum()
        runtime.zero_grad()
    return wrong.item(), runtime.buffer_report()["full"], len(runtime.records())


@pytest.mark.parametrize("world", WORLDS)
def test_streams_are_ordered_under_pressure(world):
    results = run_ranks(pressure, world, backend="nccl", timeout=180)
    assert [(wrong, full) for wrong, full, _ in results] == [(0, 0)] * world


def compute_streams(rank, world):
    """A caller that changes its stream sees what was gathered on another."""
    device = torch.device("cuda", rank)
    toy = Toy(rank, world, 3, device=str(device), group=dist.group.WORLD)
    side = torch.cuda.Stream(device)
    toy.runtime.gather(["w1"])
    toy.runtime.wait(["w1"])
    with torch.cuda.stream(side):
        toy.runtime.gather(["w1"])
        toy.runtime.wait(["w1"])
        copy = toy.model.w1.detach().clone()
    side.synchronize()
    return torch.equal(copy.cpu(), Reference().w1.detach())


@pytest.mark.parametrize("world", WORLDS)
def test_compute_may_change_its_stream(world):
    assert all(run_ranks(compute_streams, world, backend="nccl", timeout=120))


def traced(rank, world):
    toy = Toy(rank, world, 3, device=f"cuda:{rank}", group=dist.group.WORLD)
    for _ in range(2):
        toy.runtime.trace(True)
        toy.micro_step(*batch(rank, device=f"cuda:{rank}"))
        toy.step()
    records = toy.runtime.records()
    return len(records), all(0 <= start <= stop < 60e9 for *_, start, stop, _ in records)


def test_records_on_a_device():
    for count, ordered in run_ranks(traced, WORLDS[-1], backend="nccl", timeout=120):
        assert count > 20 and ordered


PLAN_JOBS = [
    dict(stage=3),
    dict(stage=3, accumulation=2, clip=0.5, dtype=torch.bfloat16, reduce="bf16"),
    dict(stage=1, accumulation=2, boundary=True),
]


def run_plan(rank, world, plan, job):
    device = f"cuda:{rank}"
    toy = Toy(rank, world, device=device, group=dist.group.WORLD, plan=plan, **job)
    kind = {"dtype": job["dtype"]} if "dtype" in job else {}
    losses = toy.train(STEPS, rank, world, device=device, **kind)
    return [loss.cpu() for loss in losses], toy.everything()


def run_plans(rank, world):
    wrong = []
    for index, job in enumerate(PLAN_JOBS):
        losses, values = run_plan(rank, world, "", job)
        for plan in PLANS:
            if plan == "early" and "clip" in job:
                continue
            other_losses, other = run_plan(rank, world, plan, job)
            same = all(torch.equal(a, b) for a, b in zip(losses, other_losses, strict=True))
            if not same or not all(torch.equal(other[name], values[name]) for name in values):
                wrong.append((index, plan))
    return wrong


@pytest.mark.parametrize("world", WORLDS[-2:])
def test_plans_that_move_and_delay_give_the_same_bits(world):
    assert run_ranks(run_plans, world, backend="nccl", timeout=240) == [[]] * world


BIG = 4096  # the values that move are 64 MiB, so that copies last longer than their launch


def big_codes():
    """The toy's step around a large activation: made, moved beside matmuls, read again."""

    def first(args):
        x, w1, bias = args
        args.clear()
        h = toy_step.first(x, w1, bias)
        return [h.repeat(BIG * BIG // h.numel() + 1, 1)]

    def second(args):
        h, t, w2, scale = args
        args.clear()
        busy = torch.ones(BIG, BIG, device=h.device, dtype=torch.bfloat16)
        for _ in range(8):
            busy = (busy @ busy) * 1e-4
        return [toy_step.second(h[: t.shape[0]], t, w2, scale) + 0 * busy.sum().float()]

    def second_backward(args):
        cotangent, h, t, w2, scale = args
        args.clear()
        rows = t.shape[0]
        spread = h.view(-1, rows, h.shape[1])
        assert torch.equal(spread, spread[:1].expand_as(spread))
        return toy_step.grads_of(
            toy_step.second, [h[:rows].clone(), t, w2, scale], [0, 2, 3], cotangent
        )

    return [first, second, second_backward, toy_step.CODES[3]]


def big(rank, world, limit):
    """Losses, states, and what was relieved while `limit` bytes of the GPU are free (0: all)."""
    device = torch.device("cuda", rank)
    results = []
    for plan in ("", "values"):
        toy = Toy(
            rank, world, 3, device=str(device), group=dist.group.WORLD, plan=plan,
            codes=big_codes(), accumulation=4,
        )  # fmt: skip
        toy.train(1, rank, world, device=str(device))
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        filler = None
        if limit and plan == "":
            free, _ = torch.cuda.mem_get_info(device)
            filler = torch.empty(free - limit, dtype=torch.uint8, device=device)
        losses, calls = [], []
        for micro in range(4):  # four calls are open at once: 64 MiB each
            calls.append(toy.runtime.new_call(toy.graph))
            inputs = list(batch(micro * world + rank, device=str(device)))
            losses += toy.runtime.run(toy.graph, 0, calls[-1][0], inputs)
        for call, _ in reversed(calls):
            toy.runtime.run(toy.graph, 1, call, [torch.ones((), device=device)])
        toy.step()
        relieved = toy.runtime.relieved()
        del filler
        torch.cuda.empty_cache()
        results.append(([loss.cpu() for loss in losses], toy.everything(), relieved))
        assert toy.runtime.peak_bytes() > 64 << 20
    return results


@pytest.mark.alone
@pytest.mark.parametrize("limit", [0, 320 << 20])
def test_large_values_move_and_come_back_beside_compute(limit):
    world = WORLDS[min(1, len(WORLDS) - 1)]
    for plain, moved in run_ranks(big, world, limit, backend="nccl", timeout=180):
        assert all(torch.equal(a, b) for a, b in zip(plain[0], moved[0], strict=True))
        assert all(torch.equal(plain[1][name], tensor) for name, tensor in moved[1].items())
        assert (plain[2]["times"] > 0) == (limit > 0), plain[2]


def links(rank, world):
    device = torch.device("cuda", rank)
    runtime = _runtime.Runtime(dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 60.0)
    seen = []
    for step in range(4):
        runtime.share(10 * step + rank)
        seen.append(runtime.shared())
    return seen, runtime.measure_links([1 << 20, 1 << 26], 3)


def test_flags_and_links_on_a_device():
    world = WORLDS[-1]
    results = run_ranks(links, world, backend="nccl", timeout=120)
    for seen, times in results:
        assert seen == [0, world - 1, 10 + world - 1, 20 + world - 1]
        assert times == results[0][1]
        for direction in ("to_host", "to_device") + (("gather", "reduce") if world > 1 else ()):
            assert all(ns > 0 for _, ns in times[direction])
        beside = {d: times[f"{d}_beside"] for d in ("to_host", "to_device")}
        print(f"speed kept while the other direction copies: {beside}")
        assert all(0.1 < kept <= 1 for kept in beside.values())
