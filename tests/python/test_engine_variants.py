# SPDX-License-Identifier: Apache-2.0
"""Graph breaks and recompilations of an engine's model are reported, never passed over."""

import warnings

import torch
from test_engine import error_of, start
from torch import nn


class Modes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, mode):
        if mode == "break":
            torch._dynamo.graph_break()
        return self.layer(x).sum() * len(mode)


@torch._dynamo.config.patch(recompile_limit=3)
def test_graph_breaks_and_too_many_variants_are_not_silent(monkeypatch):
    monkeypatch.setattr("deepcompile.capture.backend.RECOMPILE_LIMIT", 3)
    engine = start(Modes())
    engine.compile(backend="eager")
    engine.backward(engine(torch.ones(2, 4), "break"))
    assert "graph_break()" in next(iter(engine.compile_report()["graph_breaks"]))
    for mode in ("a", "bb"):
        engine.backward(engine(torch.ones(2, 4), mode))
    message = error_of(lambda: engine(torch.ones(2, 4), "ccc"))
    assert message.startswith("[capture] more than 3 variants") and "dynamic=True" in message


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x).sum() * self.calls


def test_what_is_captured_at_every_step_is_said_with_dynamos_reason():
    engine = start(Counting())
    engine.compile(backend="eager")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(17):
            engine.backward(engine(torch.ones(2, 4)))
            engine.step()
    said = [str(w.message) for w in found if "captured and compiled" in str(w.message)]
    assert all(f"compiled {n} times" in text for n, text in zip((8, 16), said, strict=True)), said
    assert all("test_engine_variants.py" in text and ".calls == " in text for text in said), said
