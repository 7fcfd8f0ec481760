# SPDX-License-Identifier: Apache-2.0
"""What the training tests run: tiny models, their data, plain PyTorch as the reference, and
the same through the engine on every rank.

A step sees SAMPLES samples, cut into ranks x accumulation micro-batches of
equal size, so that the reference is the same for any number of ranks.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

SAMPLES, TOKENS, VOCABULARY = 4, 12, 64
STEPS = 20
ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}
"""eps: gradients that are zero but for rounding (a key's bias) must not become steps."""


def llama(
    layers: int = 2, tied: bool = False, checkpointing: bool = False, reentrant: bool = False
) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
            tie_word_embeddings=tied, use_cache=False,
        )
    )  # fmt: skip
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant, "preserve_rng_state": False}
        )
    return model


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        num_local_experts=4, num_experts_per_tok=2, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = "batched_mm"
    return MixtralForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip


class TakesLabels(nn.Module):
    """Gives a plain module the interface of the language models."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(input_ids)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def sequential() -> nn.Module:
    return TakesLabels(
        nn.Sequential(
            nn.Embedding(VOCABULARY, 32), nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64),
            nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, VOCABULARY, bias=False),
        )
    )  # fmt: skip


class Skipped(nn.Module):
    """A module that Dynamo must not enter, with sharded parameters inside."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    @torch._dynamo.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Broken(nn.Module):
    """Captured in parts: a module that is skipped between two that are not, and a loop around
    one, for which Dynamo gives up the whole frame."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32))
        self.skipped = Skipped()
        self.loop = nn.Sequential(nn.Linear(32, 32), Skipped(), nn.LayerNorm(32))
        self.last = nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.skipped(torch.relu(self.first(ids)))
        return self.last(self.loop(x))


def skipping() -> nn.Module:
    return TakesLabels(Broken())


class ReadTwice(nn.Module):
    """Reads one weight in a captured part, and again in one that is skipped."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32))
        self.skipped, self.last = Skipped(), nn.Linear(32, VOCABULARY)
        self.up = nn.Linear(32, 64)
        self.up.weight = self.skipped.up.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.up(torch.relu(self.first(ids))).unflatten(-1, (2, 32)).sum(-2)
        return self.last(self.skipped(x))


def read_twice() -> nn.Module:
    return TakesLabels(ReadTwice())


class Attends(nn.Module):
    """nn.MultiheadAttention reads its out_proj's weights without calling it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


def attention() -> nn.Module:
    return TakesLabels(Attends())


def frozen_llama() -> nn.Module:
    """Llama with its embedding and first layer frozen."""
    model = llama(3)
    for name, parameter in model.named_parameters():
        if "embed" in name or "layers.0" in name:
            parameter.requires_grad_(False)
    return model


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """Plain PyTorch's, with the numbers of config_for()."""
    return torch.optim.AdamW(parameters, **{**ADAMW, "betas": tuple(ADAMW["betas"])})


def said(work: Callable[[], Any]) -> str:
    """The error of `work`, as text; "nothing" if there is none."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


MODELS = {
    "llama": llama,
    "llama_deep": functools.partial(llama, 6),
    "llama_tied": functools.partial(llama, tied=True),
    "llama_checkpointing": functools.partial(llama, checkpointing=True),
    "llama_reentrant": functools.partial(llama, checkpointing=True, reentrant=True),
    "mixtral": mixtral,
    "gpt2": gpt2,
    "sequential": sequential,
    "skipping": skipping,
    "read_twice": read_twice,
    "attention": attention,
    "frozen": frozen_llama,
}


def make(name: str) -> nn.Module:
    torch.manual_seed(7)
    return MODELS[name]().train()


def samples(step: int) -> torch.Tensor:
    """The token ids of all ranks' micro-batches of a step: SAMPLES x TOKENS."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=generator)


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=ids, labels=ids)
    return output["loss"]


def named(model: nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().float().numpy().copy() for k, v in model.state_dict().items()}


@functools.cache
def reference(
    name: str,
    clip: float = 0.0,
    steps: int = STEPS,
    schedule: bool = False,
    dtype: torch.dtype | None = None,
    scale: float = 1.0,
    left_out: frozenset[int] = frozenset(),
) -> dict[str, Any]:
    """Single-process PyTorch: losses, norms before clipping, and all values at the end.

    `dtype`: fp32 masters, computing with a copy in this type. `scale`: of the loss, taken off the
    gradients. `left_out`: steps that do not update.
    """
    torch.set_num_threads(1)  # as the ranks
    model = make(name)
    if dtype is not None:
        model.to(dtype)
    masters = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        masters[n].requires_grad_(p.requires_grad)
    trained = [m for m in masters.values() if m.requires_grad]
    optimizer = adamw(trained)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5) if schedule else None
    losses, norms = [], []
    for step in range(steps):
        model.zero_grad()
        loss = loss_of(model, samples(step))
        (loss * scale).backward()
        for n, p in model.named_parameters():
            masters[n].grad = None if p.grad is None else p.grad.float() / scale
        if clip:
            norms.append(float(nn.utils.clip_grad_norm_(trained, clip)))
        if step not in left_out:
            optimizer.step()
        if scheduler is not None:
            scheduler.step()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(masters[n])
        losses.append(float(loss.detach()))
    state = named(model)
    state.update({n: m.detach().numpy() for n, m in masters.items()})
    return {"losses": losses, "norms": norms, "state": state}


def config_for(world: int, stage: int, accumulation: int = 1, **extra: Any) -> dict[str, Any]:
    base = {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": SAMPLES // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": ADAMW},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 300},
        "compile": {"region_bytes": 12_000},  # so small that layers are cut
    }
    base.update(copy.deepcopy(extra))
    return base


def micro_batches(step: int, rank: int, world: int, accumulation: int) -> list[torch.Tensor]:
    parts = samples(step).chunk(world * accumulation)
    return [parts[rank * accumulation + i] for i in range(accumulation)]


def train_steps(
    engine: Any, first: int, last: int, evaluate_every: int = 0
) -> tuple[list[float], list[float]]:
    """(mean loss over ranks and micro-batches, norm) of steps first .. last - 1."""
    losses, norms, engine.scales = [], [], []
    world, rank = engine.ranks.world, engine.ranks.rank
    for step in range(first, last):
        total = 0.0
        for ids in micro_batches(step, rank, world, engine.gradient_accumulation_steps()):
            loss = loss_of(engine, ids)
            engine.backward(loss)
            engine.step()
            total += float(loss.detach()) / engine.gradient_accumulation_steps()
        losses.append(float(np.mean(engine.ranks.gather(total))))
        norms.append(engine.get_global_grad_norm())
        engine.scales.append(engine.loss_scale())
        if evaluate_every and step % evaluate_every == 0:
            evaluate(engine, step)
    return losses, norms


def evaluate(engine: Any, step: int) -> float:
    engine.eval()
    with torch.no_grad():
        loss = float(loss_of(engine, samples(step)))
    engine.train()
    return loss


def start(name: str, config: dict[str, Any], backend: str | None, **kwargs: Any) -> Any:
    """An engine for a named model, compiled unless `backend` is None."""
    import deepcompile

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepcompile.initialize(model=make(name), config=config, **kwargs)
    if backend is not None:
        engine.compile(backend=backend)
    return engine


def result_of(engine: Any, losses: list[float], norms: list[float]) -> dict[str, Any]:
    state = engine.state_dict(fp32=True)
    return {
        "losses": losses,
        "norms": norms,
        "scales": vars(engine).get("scales", []),
        "skipped": engine.skipped_steps,
        "state": {k: v.float().numpy().copy() for k, v in state.items()},
        "hook_reductions": engine.hooks.reduced,
        "graphs": len(engine.planner.graphs),
        "report": engine.compile_report(),
    }


def train(
    name: str,
    stage: int = 3,
    backend: str | None = "eager",
    accumulation: int = 1,
    steps: int = STEPS,
    evaluate_every: int = 0,
    **extra: Any,
) -> dict[str, Any]:
    """One rank's part of a whole training run. `extra`: more of the configuration."""
    import torch.distributed as dist

    engine = start(name, config_for(dist.get_world_size(), stage, accumulation, **extra), backend)
    losses, norms = train_steps(engine, 0, steps, evaluate_every)
    return result_of(engine, losses, norms)


def train_all(rank: int, world: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several runs on one set of ranks; only rank 0 sends the values back."""
    results = []
    for run in runs:
        torch._dynamo.reset()
        result = train(**run)
        if rank:
            result.pop("state")
        results.append(result)
    return results


def worst(result: dict[str, Any], expected: dict[str, Any]) -> float:
    """Largest difference of any loss or value; names must agree."""
    assert set(result["state"]) == set(expected["state"])
    differences = [abs(a - b) for a, b in zip(result["losses"], expected["losses"], strict=True)]
    differences += [
        np.abs(result["state"][k] - v).max() for k, v in expected["state"].items() if v.size
    ]
    return float(max(differences))
