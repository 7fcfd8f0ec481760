# SPDX-License-Identifier: Apache-2.0
"""Deep models of which a few layers are traced: the same training, or all layers are traced."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_runner import llama, mixtral, tokens
from torch import nn

import deepcompile
from deepcompile import UserError

DEPTH = 6


def start(model: nn.Module, equal_layers: str = "auto", bf16: bool = False, **more):
    config = {
        "bf16": {"enabled": bf16},
        "train_batch_size": 2,
        "gradient_clipping": 0.5,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 1000},
        "compile": {"equal_layers": equal_layers, "region_bytes": 40_000, **more},
    }
    engine = deepcompile.initialize(model=model, config=config)[0]
    engine.compile(backend="eager")
    return engine


def train(engine, steps: int = 5) -> list[float]:
    torch._dynamo.reset()  # which sizes vary it remembers from another engine
    losses = []
    for step in range(steps):
        loss = engine(**tokens(seq=16, seed=step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def evaluate(engine, seq: int) -> float:
    engine.eval()
    with torch.no_grad():
        loss = engine(**tokens(seq=seq, seed=9)).loss.item()
    engine.train()
    return loss


def both(make, **config) -> tuple[list, list]:
    """Engines of one model, few layers traced and all, trained alike; their losses."""
    torch.manual_seed(0)
    model, bf16 = make(DEPTH, **config), make is mixtral  # in fp32 its backward does not repeat
    if bf16:
        model.set_experts_implementation("grouped_mm")
    engines = [start(copy.deepcopy(model), wanted, bf16) for wanted in ("auto", "off")]
    return engines, [train(engine) for engine in engines]


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {}),
        (llama, {"tie_word_embeddings": True}),
        (mixtral, {}),
    ],
    ids=["llama", "tied", "mixtral"],
)
def test_few_layers_train_as_all_do(make, config):
    (few, whole), losses = both(make, **config)
    assert few.compile_report()["equal_layers"]["used"]
    assert few.compile_report()["equal_layers"]["why"] == f"4 of {DEPTH} equal layers are traced"
    assert not whole.compile_report()["equal_layers"]["used"]
    assert losses[0] == losses[1]
    if make is llama and not config:
        for seq in (16, 24):
            assert evaluate(few, seq) == evaluate(whole, seq)
    pairs = zip(few.state_dict().items(), whole.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert len(few.module.model.layers) == DEPTH


def test_checkpointed_layers():
    def checkpointed(layers, **config):
        model = llama(layers, **config)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    (few, _), losses = both(checkpointed)
    assert few.compile_report()["equal_layers"]["used"]
    assert losses[0] == losses[1]


def states_of_layers(model) -> torch.Tensor:
    """A loss of which every layer's output is a part."""
    found = model(**tokens(seq=16), output_hidden_states=True)
    return found.loss + sum(h.pow(2).mean() for h in found.hidden_states)


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (llama, states_of_layers),
        (mixtral, lambda e: e(**tokens(seq=16), output_router_logits=True).loss),
    ],
    ids=["hidden states", "router logits"],
)
def test_calls_that_ask_for_single_layers_trace_all(make, call):
    torch.manual_seed(0)
    model = make(DEPTH)
    plain = copy.deepcopy(model)
    engine = start(model, differentiable_outputs="all")
    loss, expected = call(engine), call(plain)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    engine.backward(loss)
    expected.backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    engine.step()
    assert engine.get_global_grad_norm() == pytest.approx(norm.item(), rel=1e-4)


class Breaks(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return nn.functional.silu(x)


def broken(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = Breaks()


def outside(model):
    model.model.forward = torch.compiler.disable(model.model.forward)


@pytest.mark.parametrize("change", [broken, outside])
def test_graph_breaks_trace_all(change):
    torch.manual_seed(0)
    model = llama(DEPTH)
    change(model)
    plain = copy.deepcopy(model)
    engine = start(model)
    assert engine.compile_report()["equal_layers"]["used"]
    loss, expected = (e(**tokens(seq=16)).loss for e in (engine, plain))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    report = engine.compile_report()["equal_layers"]
    assert report == {"used": False, "why": "a layer runs uncompiled"}
    assert len(model.model.layers) == DEPTH
    assert len(train(engine, 2)) == 2


def frozen(model):
    model.model.layers[2].mlp.requires_grad_(False)


def hooked(model):
    model.model.layers[5].register_forward_hook(lambda module, args, output: None)


def other_kind(model):
    model.model.layers[DEPTH - 1].mlp.act_fn = nn.ReLU()


def patched(model):
    layer = model.model.layers[1]
    layer.forward = layer.forward


@pytest.mark.parametrize("change", [frozen, hooked, other_kind, patched])
def test_layers_that_differ_are_all_traced(change):
    torch.manual_seed(0)
    model = llama(DEPTH)
    change(model)
    engine = start(model)
    assert not engine.compile_report()["equal_layers"]["used"]
    if change is not patched:
        assert len(train(engine, 2)) == 2


class Stack(nn.Module):
    def __init__(self, sums: bool = False, width: int = 32):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(DEPTH)])
        self.sums = sums

    def forward(self, x):
        total = 0.0
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
            total = total + x.pow(2).mean()
        return total if self.sums else x.pow(2).mean()


def test_other_models_ask_for_it():
    torch.manual_seed(0)
    model = Stack()
    engines = [start(copy.deepcopy(model), wanted) for wanted in ("auto", "on")]
    reports = [engine.compile_report()["equal_layers"] for engine in engines]
    assert [report["used"] for report in reports] == [False, True]
    assert "layers of Stack depend on their number is not known" in reports[0]["why"]
    losses = []
    for engine in engines:
        loss = engine(torch.ones(2, 32))
        engine.backward(loss)
        engine.step()
        losses.append((loss.item(), engine(torch.ones(2, 32)).item()))
    assert losses[0] == losses[1]


def test_on_is_an_error_where_it_cannot_be():
    with pytest.raises(UserError, match="equal_layers 'on'.*the model has 3 layers"):
        start(llama(3), "on")
    engine = start(Stack(sums=True), "on")
    with pytest.raises(UserError, match="equal_layers 'on': Stack: .*Set it to auto"):
        engine(torch.ones(2, 32))
