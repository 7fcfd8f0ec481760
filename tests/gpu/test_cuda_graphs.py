# SPDX-License-Identifier: Apache-2.0
"""What regions launch, recorded as CUDA graphs: the same bits, and most runs are replayed."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from toy_step import CODES, Toy

GPUS = torch.cuda.device_count()
STEPS = 14

pytestmark = [
    pytest.mark.skipif(not GPUS, reason="needs a GPU"),
    pytest.mark.timeout(900),
]


def llama(dropout: float):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=512, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
            attention_dropout=dropout, use_cache=False,
        )
    )  # fmt: skip


def mixtral(dropout: float):
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=128,
            num_local_experts=4, num_experts_per_tok=2, attention_dropout=dropout, use_cache=False,
        )
    )  # fmt: skip


BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 21, "hysteresis": 1}}
"""The first steps are left out."""


def train(rank, make, setting, accumulation, dropout, kind):
    """(loss of each step, weights, what was replayed)."""
    import deepcompile

    torch._dynamo.reset()
    torch.manual_seed(0)
    engine, _, _, _ = deepcompile.initialize(
        model=make(dropout),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            **kind,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000},
            "compile": {"cuda_graphs": setting, "region_bytes": 1 << 20},
        },
    )
    engine.compile()
    losses = []
    torch.manual_seed(100 + rank)
    for step in range(STEPS):
        for micro in range(accumulation):
            draw = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
            ids = (torch.randint(0, 512, (2, 1), generator=draw) + torch.arange(128)) % 512
            loss = engine(input_ids=ids.to(engine.device), labels=ids.to(engine.device)).loss
            engine.backward(loss)
            engine.step()
        losses.append(loss.detach())
        if step == STEPS // 2:
            engine.eval()
            with torch.no_grad():
                losses.append(engine(input_ids=ids.to(engine.device)).logits.float().sum())
            engine.train()
    state = engine.state_dict(fp32=True)
    assert (0 < engine.skipped_steps < STEPS) == ("fp16" in kind), engine.skipped_steps
    assert losses[-1] < losses[0], "it learns"
    return [x.item() for x in losses], state, engine.compile_report()["cuda_graphs"]


def compare(rank, world, *job):
    """What was replayed with graphs, which must give what comes without them."""
    plain, graphs = (train(rank, job[0], setting, *job[1:]) for setting in ("off", "auto"))
    assert plain[2]["replayed"] == 0
    assert graphs[0] == plain[0], f"other losses: {graphs[0]} and {plain[0]}"
    differ = [k for k in plain[1] if not torch.equal(plain[1][k], graphs[1][k])]
    assert not differ, differ
    return graphs[2]


@pytest.mark.parametrize(
    "make, accumulation, dropout, kind",
    [(llama, 1, 0.0, BF16), (llama, 2, 0.1, BF16), (mixtral, 1, 0.0, BF16), (llama, 1, 0.0, FP16)],
)
def test_graphs_train_with_the_same_bits(make, accumulation, dropout, kind):
    job = (make, accumulation, dropout, kind)
    for found in run_ranks(compare, min(GPUS, 4), *job, timeout=280, backend="nccl"):
        print(found)
        assert found["recordings"] >= 1 and found["replayed"] > 0, found
        assert found["missed"] == 0, found


@pytest.mark.parametrize("plan", ["", "remade", "early"])
def test_a_step_made_by_hand(plan):
    from deepcompile.cuda_graphs import recorder

    device = torch.device("cuda", 0)
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    options = {"dtype": torch.bfloat16, "device": "cuda:0", "reduce": "bf16", "plan": plan}
    twin, toy = Toy(**options), Toy(recorder=recorder("on", device), **options)
    losses = [each.train(10, **kind) for each in (twin, toy)]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    ours, theirs = toy.everything(), twin.everything()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    print(toy.runtime.replays())


@pytest.mark.parametrize("index, name", [(0, "fwd.0"), (3, "bwd.0")])
def test_a_region_that_waits_for_the_device_runs_as_ever(index, name):
    from deepcompile.cuda_graphs import recorder

    def waits(args):
        assert args[0].abs().sum().item() >= 0
        return CODES[index](args)

    device = torch.device("cuda", 0)
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    options = {"dtype": torch.bfloat16, "device": "cuda:0", "reduce": "bf16"}
    options["codes"] = [*CODES[:index], waits, *CODES[index + 1 :]]
    twin, toy = Toy(**options), Toy(recorder=recorder("on", device), **options)
    losses = [each.train(10, **kind) for each in (twin, toy)]
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))
    found = toy.runtime.replays()
    assert found["runs"] == 2 and found["replayed"] == 12 and name in found["refused"], found
    assert torch.rand(3, device=device).isfinite().all(), "random numbers are drawn as before"
    assert torch.empty(3, pin_memory=True).is_pinned()
