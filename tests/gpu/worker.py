# SPDX-License-Identifier: Apache-2.0
"""One rank of a GPU test: trains a Llama and writes what came out.

    torchrun --nproc-per-node N tests/gpu/worker.py --kind engine --stage 3 --result r.json

``reference`` is plain PyTorch on one GPU over the same global batch: bf16 parameters with fp32
master weights, gradients averaged over the micro-batches that the ranks would see. ``fsdp2``
is torch's fully_shard, for its peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
RATE, BETAS, EPS, DECAY = 5e-4, (0.9, 0.95), 1e-8, 0.1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=["engine", "reference", "fsdp2"], required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=WORLD, help="ranks the reference stands for")
    parser.add_argument("--compiled", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory-budget", type=int, help="the engine's, in bytes")
    return parser.parse_args()


def make_model(a: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=a.vocabulary,
            hidden_size=a.hidden,
            intermediate_size=a.hidden * 3,
            num_hidden_layers=a.layers,
            num_attention_heads=max(4, a.hidden // 128),
            num_key_value_heads=max(2, a.hidden // 256),
            max_position_embeddings=a.sequence,
            use_cache=False,
        )
    )


def make_batch(a: argparse.Namespace, step: int, micro: int, rank: int) -> dict[str, torch.Tensor]:
    """The micro-batch of one rank: text with a pattern, so that there is something to learn."""
    draw = torch.Generator().manual_seed(step * 1000 + micro * 100 + rank)
    start = torch.randint(0, a.vocabulary, (a.batch, 1), generator=draw)
    ids = (start + torch.arange(a.sequence)) % a.vocabulary
    return {"input_ids": ids.to(DEVICE), "labels": ids.to(DEVICE)}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of all values, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def run_engine(a: argparse.Namespace) -> dict:
    import deepcompile

    config = {
        "train_micro_batch_size_per_gpu": a.batch,
        "gradient_accumulation_steps": a.accumulation,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": RATE, "betas": list(BETAS), "eps": EPS, "weight_decay": DECAY},
        },
        "zero_optimization": {"stage": a.stage, "stage3_param_persistence_threshold": 10_000},
        "compile": {"differentiable_outputs": "loss"},
    }
    if a.memory_budget:
        config["compile"]["memory_budget"] = a.memory_budget
    engine, _, _, _ = deepcompile.initialize(model=make_model(a), config=config)
    if a.compiled:
        engine.compile()
    losses = []
    peak = 0
    for step in range(a.steps):
        torch.cuda.reset_peak_memory_stats()
        for micro in range(a.accumulation):
            loss = engine(**make_batch(a, step, micro, RANK)).loss
            engine.backward(loss)
            engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        losses.append(total.item() / WORLD)
        peak = torch.cuda.max_memory_allocated()
    agreed, report = engine.planner.agreed, engine.compile_report() if a.compiled else {}
    state = engine.state_dict(fp32=True)
    return {
        "losses": losses,
        "digest": digest(state),
        "peak": peak,
        "predicted": agreed.predicted_peak if agreed else 0,
        "failures": report.get("plan_failures", []),
        "state": state,
    }


def run_reference(a: argparse.Namespace) -> dict:
    model = make_model(a).to(DEVICE, torch.bfloat16)
    masters = [p.detach().float() for p in make_model(a).to(DEVICE).parameters()]
    optimizer = torch.optim.AdamW(masters, lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    forward = torch.compile(model) if a.compiled else model
    losses = []
    for step in range(a.steps):
        sums = [torch.zeros_like(m) for m in masters]
        shown = []
        for micro in range(a.accumulation):
            for rank in range(a.ranks):
                loss = forward(**make_batch(a, step, micro, rank)).loss
                loss.backward()
                for total, p in zip(sums, model.parameters(), strict=True):
                    total += p.grad.float() / (a.ranks * a.accumulation)
                    p.grad = None
                if micro == a.accumulation - 1:
                    shown.append(loss.item())
        for master, total in zip(masters, sums, strict=True):
            master.grad = total
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(model.parameters(), masters, strict=True):
                p.copy_(master)
        losses.append(sum(shown) / len(shown))
    names = [name for name, _ in model.named_parameters()]
    return {"losses": losses, "state": dict(zip(names, masters, strict=True))}


def run_fsdp2(a: argparse.Namespace) -> dict:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.cuda.set_device(DEVICE)
    dist.init_process_group("nccl", device_id=DEVICE)
    model = make_model(a).to(DEVICE)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
        layer.compile()
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
    )
    peak = 0
    for step in range(a.steps):
        torch.cuda.reset_peak_memory_stats()
        loss = model(**make_batch(a, step, 0, RANK)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        peak = torch.cuda.max_memory_allocated()
    return {"losses": [loss.item()], "peak": peak}


def main() -> None:
    a = parse()
    torch.cuda.set_device(DEVICE)
    run = {"engine": run_engine, "reference": run_reference, "fsdp2": run_fsdp2}[a.kind]
    result = run(a)
    state = result.pop("state", None)
    if RANK == 0:
        a.result.write_text(json.dumps(result))
        if state is not None:
            torch.save({k: v.float().cpu() for k, v in state.items()}, a.result.with_suffix(".pt"))
    if dist.is_initialized():
        dist.barrier(device_ids=[DEVICE.index])
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
