# SPDX-License-Identifier: Apache-2.0
"""How a model's values reach the runtime: one module after another, initialised as torch would."""

from __future__ import annotations

import pytest
import torch
from test_engine import LR, config, start
from torch import nn

import deepcompile

WIDTH, DEPTH = 64, 6


def step(engine) -> float:
    loss = engine(torch.ones(4, WIDTH)).pow(2).mean()
    engine.backward(loss)
    engine.step()
    return loss.item()


class Counted(nn.Linear):
    """Notes how many bytes the parameters of all its kind have while one is initialised."""

    made: list[nn.Linear] = []
    seen: list[int] = []

    def reset_parameters(self):
        super().reset_parameters()
        if self.weight.is_meta:
            Counted.made.append(self)
        else:
            held = [p.untyped_storage().nbytes() for m in Counted.made for p in m.parameters()
                    if not p.is_meta]  # fmt: skip
            Counted.seen.append(sum(held))


@pytest.fixture
def counted():
    Counted.made, Counted.seen = [], []
    return Counted


def deep(kind: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    layers = [kind(WIDTH, WIDTH) for _ in range(DEPTH)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 8))


def test_no_more_than_one_modules_parameters_have_memory(counted):
    with torch.device("meta"):
        model = deep(counted)
    engine = start(model)
    biases = DEPTH * WIDTH * 4
    assert len(counted.seen) == DEPTH
    assert WIDTH * WIDTH * 4 <= max(counted.seen) <= WIDTH * WIDTH * 4 + biases
    assert sum(p.untyped_storage().nbytes() for m in counted.made for p in m.parameters()) <= biases
    assert step(engine) > 0


@pytest.mark.parametrize("bf16", [False, True])
def test_meta_models_begin_with_torchs_own_values_rounded(bf16):
    torch.manual_seed(3)
    expected = deep().state_dict()
    with torch.device("meta"):
        model = deep()
    torch.manual_seed(3)
    state = start(model, config=config(bf16={"enabled": bf16})).state_dict()
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert all(torch.equal(state[name], value.to(dtype)) for name, value in expected.items())


class Recurrent(nn.Module):
    """nn.LSTM keeps its parameters in a list of its own."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTM(WIDTH, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x):
        return self.out(self.cell(x.unsqueeze(1))[0])


def test_modules_that_keep_their_parameters_twice():
    torch.manual_seed(3)
    plain = Recurrent()
    with torch.device("meta"):
        model = Recurrent()
    torch.manual_seed(3)
    engine = start(model, optimizer=torch.optim.AdamW(model.parameters(), lr=LR))
    update = torch.optim.AdamW(plain.parameters(), lr=LR)
    for _ in range(3):
        update.zero_grad()
        loss = plain(torch.ones(4, WIDTH)).pow(2).mean()
        loss.backward()
        update.step()
        assert step(engine) == pytest.approx(loss.item(), rel=1e-5)


def test_an_optimizer_made_on_meta_parameters_trains_their_successors():
    with torch.device("meta"):
        model = deep()
    groups = [{"params": [p], "lr": 0.0 if p.dim() == 1 else 1e-2} for p in model.parameters()]
    engine = start(model, optimizer=torch.optim.AdamW(groups, weight_decay=0.0))
    before = {name: value.clone() for name, value in engine.state_dict().items()}
    step(engine)
    moved = {name for name, value in engine.state_dict().items()
             if not torch.equal(value, before[name])}  # fmt: skip
    assert moved == {name for name in before if name.endswith("weight")}


def test_a_model_that_is_in_part_on_the_meta_device():
    model = deep()
    given = model[0].weight.detach().clone()
    model[1].to("meta")
    with deepcompile.GatheredParameters(engine := start(model), model[0].weight):
        assert torch.equal(model[0].weight, given)
    assert torch.isfinite(engine(torch.ones(4, WIDTH))).all()


class Parent(nn.Module):
    """Draws for its child after the child did, as some models of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("ones", torch.ones(2))

    def reset_parameters(self):
        self.ones = torch.ones(2, device=self.ones.device)
        self.child.weight.data.zero_()

    def forward(self, x):
        return self.child(x)


def test_what_a_parent_does_to_its_childrens_parameters_is_left_out():
    with torch.device("meta"):
        model = nn.Sequential(Parent())
    assert start(model).state_dict()["0.child.weight"].abs().max() > 0
