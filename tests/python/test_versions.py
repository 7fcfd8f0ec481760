# SPDX-License-Identifier: Apache-2.0
"""What a backward reads, written to in place between the forward and it: an error, and never
another gradient; but what the model itself writes to its buffers is as in PyTorch."""

from __future__ import annotations

import pytest
import torch
from test_engine import LR, batch, config
from torch import nn

import deepcompile
from deepcompile import UserError


class Capped(nn.Module):
    """Gives its logits beside the loss, which reads them."""

    def __init__(self, counts: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.counts = nn.Linear(8, 16), nn.Linear(16, 4), counts
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.counts:  # such a graph keeps AOTAutograd's wrapper
            self.count.add_(1)
        logits = torch.sin(self.b(torch.tanh(self.a(x))))
        loss = (torch.tanh(logits / 30) * 30).square().mean()
        return {"loss": loss, "logits": logits}


def compiled(model: nn.Module, **settings):
    torch._dynamo.reset()
    engine = deepcompile.initialize(model=model, config=config(**settings))[0]
    engine.compile(backend="eager", schedule=[(0, ["zero3_compile"])])
    return engine


def gradient_norm(engine, loss) -> float:
    engine.backward(loss)
    engine.step()
    return engine.get_global_grad_norm()


@pytest.mark.parametrize("counts", [False, True], ids=["plain graph", "AOTAutograd's"])
@pytest.mark.parametrize("what", ["output", "view of an output", "input", "nothing", "clone"])
def test_writes_before_the_backward(what, counts):
    engine = compiled(Capped(counts), gradient_clipping=1e9)
    x = batch()
    out = engine(x)
    write = {
        "output": lambda: out["logits"].detach().zero_(),
        "view of an output": lambda: out["logits"].detach().view(-1)[3:].fill_(1),
        "input": lambda: x.copy_(batch(1)),
        "nothing": lambda: None,
        "clone": lambda: out["logits"].detach().clone().zero_(),
    }[what]
    write()
    if what in ("nothing", "clone"):
        assert gradient_norm(engine, out["loss"]) > 0
        return
    named = "input" if what == "input" else "output 1"
    with pytest.raises(UserError, match=rf"{named}.* of the compiled graph: was written to"):
        engine.backward(out["loss"])


def test_writes_after_the_backward_and_before_the_forward_are_free():
    engine = compiled(Capped(), gradient_clipping=1e9)
    x = batch()
    for number in range(3):
        x.copy_(batch(number))
        out = engine(x)
        engine.backward(out["loss"])
        out["logits"].detach().zero_()
        x.zero_()
        engine.step()


class Counts(nn.Module):
    """Reads a buffer, as it was or as it is, and writes to it."""

    def __init__(self, first: bool):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.first = nn.Linear(8, 4), first
        self.register_buffer("scale", torch.full((), 2.0))

    def forward(self, x):
        if self.first:
            self.scale += 1
            return self.inner(x) * self.scale
        made = self.inner(x) * self.scale.clone()
        self.scale.mul_(0.5)
        return made


@pytest.mark.parametrize("first", [True, False])
def test_buffers_that_the_forward_writes_to(first):
    """torch.compile alone gets these gradients wrong."""
    plain = Counts(first)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=0.1)
    engine = compiled(Counts(first))
    for number in range(4):
        loss = plain(batch(number)).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ours = engine(batch(number)).pow(2).mean()
        engine.backward(ours)
        engine.step()
        torch.testing.assert_close(ours, loss)
    for name, value in engine.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-5, atol=1e-6)
