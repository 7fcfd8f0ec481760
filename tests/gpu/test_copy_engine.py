# SPDX-License-Identifier: Apache-2.0
"""Gathers and reductions by the copy engines of real GPUs: the same bits as NCCL's, under every
plan, and the order of reads and writes between ranks that drift. Sums over more than two ranks are
rounded once where NCCL's are rounded at each rank, so there plans are compared with each other.
Skipped where there are fewer than two GPUs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toy_step import PLANS, Toy
from worlds import TWO_GPUS, WORLDS

from deepcompile import _runtime

SMALL = {"least_bytes": 1}

pytestmark = [
    TWO_GPUS,
    pytest.mark.timeout(900),
]

JOBS = [
    dict(stage=3),
    dict(stage=3, accumulation=2, clip=0.5, dtype=torch.bfloat16, reduce="bf16"),
    dict(stage=1, accumulation=2, boundary=True),
]


WAYS = {
    "gathers": dict(gather="copy_engine"),
    "reductions": dict(reduce_over="copy_engine"),
    "both": dict(gather="copy_engine", reduce_over="copy_engine"),
}


def toy_run(rank, world, plan, job, **way):
    device = f"cuda:{rank}"
    toy = Toy(
        rank, world, device=device, group=dist.group.WORLD, plan=plan, **job, **way,
        copy_engine_options=SMALL,
    )  # fmt: skip
    kind = {"dtype": job["dtype"]} if "dtype" in job else {}
    losses = [x.cpu() for x in toy.train(4, rank, world, device=device, **kind)]
    used = toy.runtime.gathers["transport"], toy.runtime.reductions["transport"]
    return losses + list(toy.everything().values()), used


def toy_plans(rank, world, way):
    wrong, like_nccl = [], way == "gathers" or world == 2
    used = tuple(WAYS[way].get(key, "nccl") for key in ("gather", "reduce_over"))
    for index, job in enumerate(JOBS):
        first, _ = toy_run(rank, world, "", job, **({} if like_nccl else WAYS[way]))
        for plan in ("", *PLANS):
            if plan == "early" and "clip" in job:
                continue
            expected = toy_run(rank, world, plan, job)[0] if like_nccl else first
            found, transports = toy_run(rank, world, plan, job, **WAYS[way])
            assert transports == used
            if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
                wrong.append((index, plan))
    return wrong


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", WORLDS)
def test_plans_give_the_same_bits_as_over_nccl(world, way):
    assert run_ranks(toy_plans, world, way, backend="nccl", timeout=240) == [[]] * world


NEVER = 1 << 60
HOW = [
    {"in_step_bytes": NEVER},
    {"in_step_bytes": 1},
    {"in_step_bytes": NEVER, "signals": "copies"},
    {"in_step_bytes": 1, "signals": "copies"},
]


CASES = [(w, how) for w in WORLDS for how in HOW if w > 2 or how["in_step_bytes"] == NEVER]
"""With two ranks there is nothing to keep in step."""


def how_id(how):
    if not isinstance(how, dict):
        return None
    step = "out of step" if how["in_step_bytes"] == NEVER else "in step"
    return step + (" by copied signals" if "signals" in how else "")


NUMEL, ROUNDS = (1 << 24) + 12345, 40


def racing(rank, world, how):
    """Every rank writes its shards and gathers them, round after round, while others still read:
    nothing but the transport orders them, and ranks drift by matmuls of their own."""
    device = torch.device("cuda", rank)
    options = SMALL | how
    runtime = _runtime.Runtime(
        dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 60.0, "copy_engine", "nccl", options
    )
    names, params = ["p0", "p1", "p2"], {}
    for name in names:
        params[name] = torch.nn.Parameter(torch.zeros(NUMEL, device=device).bfloat16())
        runtime.add_param(name, [(name, params[name], 0)], NUMEL, "sharded", False)
    busy = torch.randn(4096, 4096, device=device).bfloat16()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    draw = torch.Generator().manual_seed(rank)
    for step in range(ROUNDS):
        for piece in runtime.pieces():
            piece["weight"].fill_(step % 100)
        for _ in range(int(torch.randint(0, 12, (), generator=draw))):
            busy = (busy @ busy) * 1e-2
        runtime.gather(names)
        for name in names:
            runtime.wait([name])
            wrong += (params[name].detach() != step % 100).sum()
            runtime.release([name])
    torch.cuda.synchronize(device)
    return wrong.item()


@pytest.mark.parametrize(("world", "how"), CASES, ids=how_id)
def test_writers_and_readers_keep_apart(world, how):
    assert run_ranks(racing, world, how, backend="nccl", timeout=120) == [0] * world


SIZES = [(1 << 24) + 12345, 1 << 24, 3_000_001, 777]


def racing_sums(rank, world, how):
    """Reductions of several sizes, two and more under way, while ranks drift: each element has a
    sum that bf16 holds exactly."""
    device = torch.device("cuda", rank)
    options = SMALL | how
    runtime = _runtime.Runtime(
        dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 60.0, "nccl", "copy_engine", options
    )
    names = [f"p{i}" for i in range(len(SIZES))]
    for name, size in zip(names, SIZES, strict=True):
        param = torch.nn.Parameter(torch.zeros(size, device=device).bfloat16())
        runtime.add_param(name, [(name, param, 0)], size, "sharded", True)
    busy = torch.randn(4096, 4096, device=device).bfloat16()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    draw = torch.Generator().manual_seed(rank)

    def pause():
        nonlocal busy
        for _ in range(int(torch.randint(0, 8, (), generator=draw))):
            busy = (busy @ busy) * 1e-2

    for step in range(ROUNDS):
        for under_way in (names, names[::-1]):
            for name, size in zip(names, SIZES, strict=True):
                values = torch.arange(size, device=device) % 13 + step % 11 + rank
                runtime.reduce(name, {name: values.bfloat16()})
                del values  # its memory is the next one's, if nothing keeps it
                pause()
            for name in under_way:
                runtime.accumulate(name)
                pause()
            for name, size in zip(names, SIZES, strict=True):
                part = runtime.gradient(name)
                index = torch.arange(len(part), device=device) + rank * len(part)
                total = world * (index % 13 + step % 11) + sum(range(world))
                wrong += ((part * world).round() != total)[index < size].sum()
            runtime.zero_grad()
    torch.cuda.synchronize(device)
    return wrong.item(), runtime.outside_bytes() > 0


@pytest.mark.parametrize(("world", "how"), CASES, ids=how_id)
def test_sums_are_of_what_was_pushed(world, how):
    found = run_ranks(racing_sums, world, how, backend="nccl", timeout=120)
    assert found == [(0, True)] * world


def absent(rank, world, what):
    device = torch.device("cuda", rank)
    both = ("copy_engine", "copy_engine")
    runtime = _runtime.Runtime(
        dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 5.0, *both, SMALL
    )
    param = torch.nn.Parameter(torch.zeros(1 << 20, device=device).bfloat16())
    runtime.add_param("p", [("p", param, 0)], 1 << 20, "sharded", True)

    def transfer():
        if what == "the gather of p":
            runtime.gather(["p"])
            runtime.wait(["p"])
            runtime.release(["p"])
        else:
            runtime.reduce("p", {"p": torch.ones(1 << 20, device=device).bfloat16()})
            runtime.accumulate("p")
            runtime.zero_grad()

    for _ in range(2):  # the first maps the peers' memory
        transfer()
        if rank == 1:
            time.sleep(15)  # it is late, but its memory is still there
            return None
    torch.cuda.synchronize(device)  # ends, though nobody wrote the word that the stream waits for
    with pytest.raises(Exception, match=f"{what} waited 5 s for rank 1"):
        transfer()
    return True


@pytest.mark.parametrize("what", ["the gather of p", "the pieces of a reduction"])
def test_a_peer_that_stays_away_is_named(what):
    results = run_ranks(absent, 2, what, backend="nccl", timeout=90)
    assert results[0] is True


SCHEDULES = {
    "stage": [[0, ["zero3_compile"]]],
    "prefetch": [[0, ["zero3_compile"]], [3, ["zero3_compile", "prefetch"]]],
    "kept whole": [[0, ["zero3_compile"]], [3, ["zero3_compile", "selective_gather"]]],
    "late updates": [[0, ["zero3_compile"]], [3, ["zero3_compile", "place_optimizer"]]],
    "auto": "auto",
}


def llama(rank, world, gather, reduce, schedule):
    from transformers import LlamaConfig, LlamaForCausalLM

    import deepcompile

    torch.manual_seed(0)
    size = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, use_cache=False, **size, **heads))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-4}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000},
        "compile": {
            "gather": gather,
            "reduce": reduce,
            "schedule": schedule,
            "differentiable_outputs": "loss",
        },
    }
    engine, _, _, _ = deepcompile.initialize(model=model, config=config)
    engine.compile()
    losses = []
    for step in range(20):
        draw = torch.Generator().manual_seed(step * 100 + rank)
        ids = (torch.randint(0, 512, (8, 1), generator=draw) + torch.arange(128)) % 512
        ids = ids.to(engine.device)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().float().cpu())
    report = engine.compile_report()
    del engine, model
    torch._dynamo.reset()
    return torch.stack(losses), [report[key]["transport"] for key in ("gathers", "reductions")]


def llamas(rank, world):
    wrong = {}
    reference, _ = llama(rank, world, "nccl", "nccl", SCHEDULES["stage"])
    pushed = reference
    if world > 2:
        pushed, _ = llama(rank, world, "copy_engine", "copy_engine", SCHEDULES["stage"])
    for name, schedule in SCHEDULES.items():
        for reduce, expected in (("nccl", reference), ("copy_engine", pushed)):
            losses, transports = llama(rank, world, "copy_engine", reduce, schedule)
            assert transports == ["copy_engine", reduce]
            if not torch.equal(losses, expected):
                wrong[name, reduce] = (losses - expected).abs().max().item()
    assert reference[-1] < reference[0]
    return wrong


@pytest.mark.parametrize("world", WORLDS)
def test_losses_are_those_of_nccl_bit_for_bit_under_every_plan(world):
    assert run_ranks(llamas, world, backend="nccl", timeout=800) == [{}] * world
