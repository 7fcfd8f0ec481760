# SPDX-License-Identifier: Apache-2.0
"""What the tests of embeddings by rows run on each rank: training through the engine with
micro batches whose lengths differ between ranks and steps."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import cases
import torch
from torch import nn

ROWS, ROW = 64, 21
"""Of the embedding: its shards begin and end inside of rows, on 2 and on 4 ranks."""
EMBEDDING = "body.0.weight"


def model() -> nn.Module:
    torch.manual_seed(3)
    return cases.TakesLabels(
        nn.Sequential(
            nn.Embedding(ROWS, ROW, padding_idx=5), nn.Linear(ROW, 40), nn.GELU(),
            nn.Linear(40, ROWS, bias=False),
        )
    )  # fmt: skip


def tied() -> nn.Module:
    wrapped = model()
    head = nn.Linear(ROW, ROWS, bias=False)
    head.weight = wrapped.body[0].weight
    wrapped.body = nn.Sequential(wrapped.body[0], nn.Linear(ROW, ROW), nn.Tanh(), head)
    return wrapped


class Positions(nn.Module):
    """An embedding of row numbers that are made in the graph."""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(ROWS, ROW), nn.Embedding(40, ROW)
        self.head = nn.Linear(ROW, ROWS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        where = torch.arange(ids.shape[1], device=ids.device)
        return self.head(torch.tanh(self.embed(ids) + self.place(where)))


def positions() -> nn.Module:
    torch.manual_seed(3)
    return cases.TakesLabels(Positions())


def frozen() -> nn.Module:
    wrapped = model()
    wrapped.body[0].weight.requires_grad_(False)
    return wrapped


def broken() -> nn.Module:
    torch.manual_seed(3)
    return cases.skipping()


MODELS = {
    "model": model, "tied": tied, "positions": positions, "frozen": frozen, "broken": broken,
}  # fmt: skip


def ids_of(rank: int, world: int, step: int, micro: int, ragged: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    length = 4 + (3 * rank + 5 * step + micro) % 11 if ragged else 9
    return torch.randint(0, ROWS, (1, length), generator=generator)


def start(
    world: int, *, name: str = "model", stage: int = 3, accumulation: int = 1, schedule: Any = None,
    backend: str = "eager", **settings: Any,
) -> Any:  # fmt: skip
    import deepcompile

    compile_keys = {"region_bytes": 4_000} | {
        key: settings.pop(key) for key in ("embedding_rows", "machine") if key in settings
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": world * accumulation,
        "optimizer": {"type": "AdamW", "params": cases.ADAMW},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 300},
        "compile": compile_keys,
        **settings,
    }
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepcompile.initialize(model=MODELS[name](), config=config)
    engine.compile(backend=backend, schedule=schedule)
    return engine


def steps(engine: Any, first: int, last: int, ragged: bool, evaluate: bool = False) -> list[float]:
    """This rank's losses of steps first .. last - 1."""
    losses = []
    rank, world = engine.ranks.rank, engine.ranks.world
    for step in range(first, last):
        for micro in range(engine.gradient_accumulation_steps()):
            ids = ids_of(rank, world, step, micro, ragged).to(engine.device)
            loss = cases.loss_of(engine, ids)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        if evaluate:
            losses.append(cases.evaluate(engine, step))
    return losses


def result(engine: Any, losses: list[float]) -> dict[str, Any]:
    state = {k: v.float().cpu().clone() for k, v in engine.state_dict(fp32=True).items()}
    orders = [line for g in engine.planner.graphs for line in _order(g.program)]
    bits = b"".join(v.numpy().tobytes() for v in state.values())
    return {
        "losses": losses,
        "state": state,
        "digest": hashlib.sha256(bits).hexdigest(),
        "rows": engine.compile_report()["embedding_rows"],
        "order": orders,
        "plans": len(engine.planner.history),
        "norm": engine.get_global_grad_norm(),
    }


def _order(program: Any) -> list[str]:
    from deepcompile import _core

    return _core.collective_order(program)


def train(rank: int, world: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    results = []
    for run in runs:
        run = dict(run)
        count, ragged = run.pop("steps", 6), run.pop("ragged", False)
        evaluate = run.pop("evaluate", False)
        engine = start(world, **run)
        results.append(result(engine, steps(engine, 0, count, ragged, evaluate)))
    return results


def resumed(rank: int, world: int, folder: str, kinds: list[str]) -> list[dict[str, Any]]:
    """Six steps, saved after three and gone on with by an engine of each kind."""
    engine = start(world, embedding_rows="on")
    losses = steps(engine, 0, 3, True)
    engine.save_checkpoint(folder, tag="half")
    results = [result(engine, losses + steps(engine, 3, 6, True))]
    for kind in kinds:
        other = start(world, embedding_rows=kind)
        other.load_checkpoint(folder, tag="half")
        results.append(result(other, losses + steps(other, 3, 6, True)))
    assert Path(folder).exists()
    return results


def refusals(rank: int, world: int, runs: list[dict[str, Any]]) -> list[str]:
    """What engines say that cannot exchange rows and were told to."""
    from deepcompile.errors import UserError

    messages = []
    for run in runs:
        engine = start(world, **run)
        try:
            steps(engine, 0, 1, False)
            messages.append("no error")
        except UserError as error:
            messages.append(str(error))
    return messages
