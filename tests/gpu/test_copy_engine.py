# SPDX-License-Identifier: Apache-2.0
"""Gathers by the copy engines of real GPUs: the same bits as NCCL's, under every plan, and the
order of reads and writes between ranks that drift. Skipped where there are fewer than two GPUs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from toy_step import PLANS, Toy

from deepcompile import _runtime

GPUS = torch.cuda.device_count()
WORLDS = sorted({2, GPUS}) if GPUS >= 2 else [2]
SMALL = {"least_bytes": 1}

pytestmark = [
    pytest.mark.skipif(GPUS < 2, reason=f"needs 2 GPUs, this machine has {GPUS}"),
    pytest.mark.timeout(900),
]

JOBS = [
    dict(stage=3),
    dict(stage=3, accumulation=2, clip=0.5, dtype=torch.bfloat16, reduce="bf16"),
    dict(stage=1, accumulation=2, boundary=True),
]


def toy_run(rank, world, plan, job, **gather):
    device = f"cuda:{rank}"
    toy = Toy(rank, world, device=device, group=dist.group.WORLD, plan=plan, **job, **gather)
    kind = {"dtype": job["dtype"]} if "dtype" in job else {}
    losses = [x.cpu() for x in toy.train(4, rank, world, device=device, **kind)]
    return losses + list(toy.everything().values()), toy.runtime.gathers


def toy_plans(rank, world):
    wrong = []
    for index, job in enumerate(JOBS):
        for plan in ("", *PLANS):
            if plan == "early" and "clip" in job:
                continue
            expected, _ = toy_run(rank, world, plan, job)
            found, gathers = toy_run(
                rank, world, plan, job, gather="copy_engine", gather_options=SMALL
            )
            assert gathers["transport"] == "copy_engine"
            if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
                wrong.append((index, plan))
    return wrong


@pytest.mark.parametrize("world", WORLDS)
def test_plans_give_the_same_bits_as_over_nccl(world):
    assert run_ranks(toy_plans, world, backend="nccl", timeout=240) == [[]] * world


NUMEL, ROUNDS = (1 << 24) + 12345, 40


def racing(rank, world, overlap):
    """Every rank writes its shards and gathers them, round after round, while others still read:
    nothing but the transport orders them, and ranks drift by matmuls of their own."""
    device = torch.device("cuda", rank)
    options = SMALL | {"overlap": overlap}
    runtime = _runtime.Runtime(
        dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 60.0, "copy_engine", options
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


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_writers_and_readers_keep_apart(world, overlap):
    assert run_ranks(racing, world, overlap, backend="nccl", timeout=120) == [0] * world


def absent(rank, world):
    device = torch.device("cuda", rank)
    runtime = _runtime.Runtime(
        dist.group.WORLD, rank, world, device, "bf16", 0.0, 1, 5.0, "copy_engine", SMALL
    )
    param = torch.nn.Parameter(torch.zeros(1 << 20, device=device).bfloat16())
    runtime.add_param("p", [("p", param, 0)], 1 << 20, "sharded", False)
    for _ in range(2):  # the first maps the peers' memory
        runtime.gather(["p"])
        runtime.wait(["p"])
        runtime.release(["p"])
        if rank == 1:
            time.sleep(15)  # it is late, but its memory is still there
            return None
    torch.cuda.synchronize(device)  # ends, though nobody wrote the word that the stream waits for
    with pytest.raises(Exception, match="the gather of p waited 5 s for rank 1"):
        runtime.gather(["p"])
    return True


def test_a_peer_that_stays_away_is_named():
    results = run_ranks(absent, 2, backend="nccl", timeout=90)
    assert results[0] is True


SCHEDULES = {
    "stage": [[0, ["zero3_compile"]]],
    "prefetch": [[0, ["zero3_compile"]], [3, ["zero3_compile", "prefetch"]]],
    "kept whole": [[0, ["zero3_compile"]], [3, ["zero3_compile", "selective_gather"]]],
    "late updates": [[0, ["zero3_compile"]], [3, ["zero3_compile", "place_optimizer"]]],
    "auto": "auto",
}


def llama(rank, world, gather, schedule):
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
        "compile": {"gather": gather, "schedule": schedule, "differentiable_outputs": "loss"},
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
    gathers = engine.compile_report()["gathers"]
    del engine, model
    torch._dynamo.reset()
    return torch.stack(losses), gathers["transport"]


def llamas(rank, world):
    wrong = {}
    reference, _ = llama(rank, world, "nccl", SCHEDULES["stage"])
    for name, schedule in SCHEDULES.items():
        losses, transport = llama(rank, world, "copy_engine", schedule)
        assert transport == "copy_engine"
        if not torch.equal(losses, reference):
            wrong[name] = (losses - reference).abs().max().item()
    assert reference[-1] < reference[0]
    return wrong


@pytest.mark.parametrize("world", WORLDS)
def test_losses_are_those_of_nccl_bit_for_bit_under_every_plan(world):
    assert run_ranks(llamas, world, backend="nccl", timeout=800) == [{}] * world
