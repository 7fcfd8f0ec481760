# SPDX-License-Identifier: Apache-2.0
"""On one GPU in bf16: a Mixtral's attention and experts run in their fast forms, with plain
PyTorch's loss. Skipped where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch

import deepcompile

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]


def mixtral() -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
            num_local_experts=4, num_experts_per_tok=2, use_cache=False,
        )
    ).cuda()  # fmt: skip


def train_step(engine, batch) -> torch.Tensor:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    return loss.detach()


@pytest.mark.parametrize("padded", [False, True])
def test_attention_and_experts_run_in_their_fast_forms(padded):
    model = mixtral()
    reference = copy.deepcopy(model).bfloat16()
    settings = {
        "train_batch_size": 2,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "zero_optimization": {"stage": 3},
        "compile": {"loss_only": True},
    }
    engine, *_ = deepcompile.initialize(model=model, config=settings, device="cuda:0")
    engine.compile()
    ids = torch.randint(0, 512, (2, 128), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    if padded:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :30] = 0
    wanted = reference(**batch).loss
    torch.testing.assert_close(train_step(engine, batch), wanted, atol=2e-2, rtol=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        train_step(engine, batch)
    ran = {event.key for event in trace.key_averages()}
    if not padded:  # a kernel of cuDNN's takes masks too
        assert any("flash_attention" in k or "cudnn_attention" in k for k in ran), sorted(ran)
    assert any("grouped_mm" in key for key in ran), sorted(ran)
    forms = engine.compile_report()["fast_forms"]
    assert forms["experts"]["implementation"] == "grouped_mm"
    assert forms["causal_attention"]["with_own_mask"] == ({"attention_mask": 2} if padded else {})
    assert not engine.compile_report()["graph_breaks"]
