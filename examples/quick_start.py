# SPDX-License-Identifier: Apache-2.0
"""The smallest training script.

torchrun --nproc-per-node 2 examples/quick_start.py
"""

import torch

import deepcompile

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 1024), torch.nn.GELU(),
    torch.nn.Linear(1024, 1),
)  # fmt: skip
config = {
    "train_micro_batch_size_per_gpu": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "zero_optimization": {"stage": 3},
}
engine, optimizer, _, _ = deepcompile.initialize(model=model, config=config)
engine.compile()

draw = torch.Generator().manual_seed(engine.global_rank)
for step in range(50):
    x = torch.randn(32, 64, generator=draw).to(engine.device)
    loss = torch.nn.functional.mse_loss(engine(x), x.sum(dim=1, keepdim=True))
    engine.backward(loss)
    engine.step()
    if step % 10 == 9 and engine.global_rank == 0:
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
