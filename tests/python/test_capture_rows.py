# SPDX-License-Identifier: Apache-2.0
"""Which parameters a capture finds that are read by rows, and why others are not."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deepcompile
from deepcompile import _core
from deepcompile.capture import CaptureOptions, make_backend, surface_errors
from deepcompile.capture.meta import _DrySink
from deepcompile.params import ParamTable
from deepcompile.predict import StepOptions, capture_step


class Reads(nn.Module):
    """`how`: (first table, second table, head weight, ids, hidden) -> hidden."""

    def __init__(self, how, trainable=True):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(40, 8)), nn.Parameter(torch.randn(40, 8))
        self.first.requires_grad_(trainable)
        self.head = nn.Parameter(torch.randn(8, 8))
        self.how = how

    def forward(self, ids, more):
        return (self.how(self.first, self.second, ids, more) @ self.head).sum()


def found(how, stage=3, ids=None, **options):
    """{member: (the input that numbers its rows, why there is none)} and the captured graph."""
    torch._dynamo.reset()
    model = Reads(how, **options)
    table = ParamTable.build(model, stage=stage, persistence_threshold=10)
    sink = _DrySink()
    backend = make_backend(table, CaptureOptions(backend="none"), sink, world=2)
    ids = torch.zeros(2, 6, dtype=torch.int64) if ids is None else ids
    with surface_errors():
        torch.compile(model, backend=backend, dynamic=False)(ids, torch.ones_like(ids))
    (graph,) = backend.graphs
    return {table.member(r.member).name: (r.value, r.why) for r in graph.ir.rows}, graph


def plain(first, second, ids, more):
    return F.embedding(ids, first)


CASES = {
    "a cast": (
        lambda a, b, ids, more: F.embedding(ids, a.double()).float() + a[0].sum() * 0,
        {},
    ),
    "the head too": (
        lambda a, b, ids, more: F.embedding(ids, a) @ a.t()[:, :8],
        {"first": "tied: "},
    ),
    "computed numbers": (
        lambda a, b, ids, more: F.embedding(ids + 1, a),
        {"first": "its row numbers are computed in the graph, by add"},
    ),
    "two inputs": (
        lambda a, b, ids, more: F.embedding(ids, a) + F.embedding(more, a),
        {"first": "several inputs number its rows"},
    ),
    "one graph, two tables and inputs": (
        lambda a, b, ids, more: F.embedding(ids, a) + F.embedding(more, b),
        {"first": "", "second": ""},
    ),
    "views, and twice": (
        lambda a, b, ids, more: (
            F.embedding(ids.view(-1)[2:], a).sum() + F.embedding(ids[None, :, 1:], a)
        ),
        {"first": ""},
    ),
    "a padding row, scaled gradients": (
        lambda a, b, ids, more: F.embedding(ids, a, padding_idx=3, scale_grad_by_freq=True),
        {"first": ""},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_embeddings_alone_read_by_inputs_is_found(case):
    how, expected = CASES[case]
    reads, graph = found(how)
    assert {name: why.startswith(expected.get(name, "")) for name, (_, why) in reads.items()} == {
        name: True for name in expected
    }
    forward = next(s for s in graph.ir.sections if s.kind == "forward")
    for name, (value, why) in reads.items():
        assert (value is not None) == (expected[name] == "") == (why == "")
        assert value is None or value in forward.inputs


def test_an_input_numbers_one_embeddings_rows():
    reads, graph = found(lambda a, b, ids, more: F.embedding(ids, a) + F.embedding(ids, b))
    assert reads["first"][1] == "" and reads["second"] == (
        None, "its numbers are another embedding's too",
    )  # fmt: skip
    program = graph.program.copy()
    program.read_rows(reads["first"][0], "first", 8)
    _core.run_passes(program, ["zero3_compile"])
    order = _core.collective_order(program)
    assert "forward 0: gather first by rows" in order and "forward 0: gather second" in order
    (first,) = [p for p in program.params if p.name == "first"]
    assert (first.rows_read, first.gather_bytes, first.full_bytes) == (12, 2 * 12 * 8 * 4, 1536)


def test_frozen_embeddings_are_gathered_by_rows():
    reads, _ = found(plain, trainable=False)
    assert reads["first"][1] == ""


def test_other_numbers_and_stages_are_refused():
    assert found(plain, ids=torch.zeros(2, 6, dtype=torch.int32))[0]["first"] == (
        None, "its row numbers are torch.int32, not int64",
    )  # fmt: skip
    for stage in (0, 1, 2):
        assert found(plain, stage=stage)[0]["first"] == (None, "kept whole on every rank")


@pytest.mark.parametrize("layers", [2, 8])
def test_predictions_exchange_rows_where_that_pays(layers):
    """8 layers are made of fewer captured ones."""
    text = (Path(deepcompile.__file__).parent / "machines/4xh200.json").read_text()
    described = json.loads(text)
    described["links"]["intra"]["latency_ns"] = 10**7  # a transfer more costs more than rows save
    far = _core.Machine.parse(json.dumps(described), "far")
    options = StepOptions("llama-3-8b", layers=layers)
    found = []
    for machine in (_core.Machine.builtin("4xh200"), far):
        params = capture_step(options, 128, 4, machine)[0].params
        found += [p for p in params if p.name == "model.embed_tokens.weight"]
    rows, whole = found
    assert rows.rows_read == 128 and rows.gather_bytes < rows.full_bytes / 100
    assert whole.rows_read == 0 and whole.gather_bytes == whole.full_bytes
