# SPDX-License-Identifier: Apache-2.0
"""The runtime on GPUs: parity, equal bits between placements, stream order under pressure."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toy_step import Reference, Toy, batch

from deepcompile import _runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STEPS = 4
WORLDS = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()]
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
    return len(records), all(0 <= start <= stop < 60e9 for *_, start, stop in records)


def test_records_on_a_device():
    for count, ordered in run_ranks(traced, WORLDS[-1], backend="nccl", timeout=120):
        assert count > 20 and ordered
