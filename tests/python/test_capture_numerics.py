# SPDX-License-Identifier: Apache-2.0
"""Captured sections against eager PyTorch: loss, every gradient, buffers."""

import pytest
import torch
from reference_runner import (
    Compiled,
    Sequential,
    compare,
    hf_loss,
    llama,
    mixtral,
    pair,
    tokens,
)
from torch import nn
from torch.nn import functional as F

X = torch.linspace(-1, 1, 8 * 16).reshape(8, 16)


def square(model):
    return model(X).pow(2).sum()


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gpt2(dropout=0.0, layers=2):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_embd=32, n_layer=layers, n_head=4, n_positions=64, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def frozen():
    model = llama(3)
    for name, p in model.named_parameters():
        p.requires_grad_("layers.0" not in name and "embed" not in name)
    return model


HF = {
    "llama": llama,
    "llama checkpointed": lambda: checkpointed(llama(3)),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama frozen": frozen,
    "mixtral": mixtral,
    "mixtral checkpointed": lambda: checkpointed(mixtral()),
}


@pytest.mark.parametrize("name", HF)
def test_hugging_face(name):
    compiled = compare(HF[name], hf_loss, tol=2e-6)
    assert len(compiled.graphs) == 1 and not compiled.backend.graph_breaks


def test_gpt2_tied():
    compare(gpt2, hf_loss, entry=True, tol=2e-6)


def test_cut_inside_layers():
    compiled = compare(lambda: llama(3), hf_loss, region_bytes=40_000, tol=2e-6)
    assert len(compiled.graphs[0].ir.regions) > 25


def test_plain_sequential():
    compare(Sequential, square)


@pytest.mark.parametrize(
    "make", [lambda: gpt2(0.1, 3), lambda: checkpointed(llama(3, attention_dropout=0.1))]
)
def test_dropout_follows_the_seed(make):
    compiled = Compiled(pair(make)[1], entry=True)
    runs = []
    for seed in (5, 5, 6):
        compiled.grads.clear()
        torch.manual_seed(seed)
        loss = hf_loss(compiled)
        loss.backward()
        runs.append((loss.item(), dict(compiled.grads)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    for name, grad in runs[0][1].items():
        assert torch.equal(grad, runs[1][1][name]), name


def test_dropout_gradient_uses_the_masks_of_its_own_forward():
    """loss = sum(dropout(x * w)): the gradient is the output over w, whatever the mask."""

    class Drop(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(16))

        def forward(self, x):
            return F.dropout(x * self.w, 0.5)

    compiled = Compiled(Drop(), threshold=1)
    outs = [compiled(X), compiled(X)]
    assert not torch.equal(*outs)
    for out in outs[::-1]:
        compiled.grads.clear()
        out.sum().backward()
        torch.testing.assert_close(compiled.grads["w"], out.detach().sum(0))


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        # A bias in front of the norm, through linear layers alone, would have the gradient 0.
        tanh = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh())]
        self.layers = nn.Sequential(*tanh, nn.Linear(16, 16, bias=False))
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.count.add_(1)
        return self.norm(self.layers(x)).sin() * 0.1  # sin: a plain square's gradient is 0


@pytest.mark.parametrize("region_bytes", [1 << 30, 1])
def test_buffers_written_in_forward(region_bytes):
    # In f64: the norm's backward subtracts nearly equal sums, which in f32 costs digits.
    def run(model):
        return model(X.double()).pow(2).sum()

    compare(lambda: BatchNorm().double(), run, steps=3, region_bytes=region_bytes)


def test_buffers_written_without_gradients():
    reference, model = pair(BatchNorm)
    compiled = Compiled(model)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(X), reference(X))
    for a, b in zip(reference.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_eval_and_no_grad():
    reference, model = pair(lambda: gpt2(0.5))
    compiled = Compiled(model, entry=True)
    model.eval(), reference.eval()
    with torch.no_grad():
        torch.testing.assert_close(hf_loss(compiled), hf_loss(reference))
    assert [g.inference for g in compiled.graphs] == [True]
    assert [s.kind for s in compiled.graphs[0].ir.sections] == ["inference"]


class Broken(nn.Module):
    """A graph break in the middle; the tied embedding is used on both sides."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(4)])
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers[:2]:
            x = layer(x).relu()
        torch._dynamo.graph_break()
        for layer in self.layers[2:]:
            x = layer(x).relu()
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def test_graph_break_with_a_tied_parameter_on_both_sides():
    ids = torch.arange(18).reshape(2, 9)
    compiled = compare(Broken, lambda m: m(ids), fullgraph=False)
    assert len(compiled.graphs) == 2
    assert sum(compiled.backend.graph_breaks.values()) == 1
    assert "graph_break" in next(iter(compiled.backend.graph_breaks))


def test_interleaved_calls():
    reference, model = pair(llama)
    compiled = Compiled(model)
    losses = [compiled(**tokens(seed=s)).loss for s in (1, 7)]
    assert len(compiled.sink.calls) == 2
    for loss in losses[::-1]:
        loss.backward()
    sum(reference(**tokens(seed=s)).loss for s in (1, 7)).backward()
    for name, p in reference.named_parameters():
        torch.testing.assert_close(compiled.grads[name], p.grad, atol=1e-6, rtol=1e-4)


def test_values_go_with_a_forward_that_is_dropped():
    compiled = Compiled(pair(Sequential)[1])
    out = compiled(X)
    assert len(compiled.sink.calls) == 1
    del out
    assert not compiled.sink.calls


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))
        self.v = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return (x @ self.w).sum(), self.w.t(), self.v.to(torch.bfloat16), self.v[2:4], self.v


def test_views_and_casts_of_parameters_as_outputs():
    def run(model):
        total, view, cast, part, _ = model(X)
        return total + view.pow(2).sum() + cast.float().sum() * 2 + (part**2).sum()

    compiled = compare(Views, run)
    assert sorted(compiled.backend.cloned_views) == ["v", "w"]
    assert compiled(X)[4] is compiled.model.v


class SharedNode(nn.Module):
    """One node is the gradient of both biases."""

    def __init__(self):
        super().__init__()
        self.w = nn.Linear(16, 16, bias=False)
        self.b1 = nn.Parameter(torch.randn(16))
        self.b2 = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return self.w(x) + self.b1 + self.b2


@pytest.mark.parametrize("threshold", [1, 100])
def test_one_node_is_the_gradient_of_two_parameters(threshold):
    compiled = compare(SharedNode, square, threshold=threshold)
    grads = [v.grad_of for v in compiled.graphs[0].ir.values if v.grad_of is not None]
    assert len(grads) == len(set(grads)) == 3


class OddGradients(nn.Module):
    """Gradients that are constants, the tangent itself, or transposed."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.shift = nn.Parameter(torch.ones(()))
        self.t = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        return (x @ self.t).sum() + self.scale.sum() + self.shift


def test_gradients_own_their_memory():
    compare(OddGradients, lambda m: m(X), threshold=1)


@pytest.mark.parametrize("dynamic", [None, True])
def test_sequence_lengths(dynamic):
    reference, model = pair(lambda: llama(2, hidden=32))
    compiled = Compiled(model, dynamic=dynamic)
    for seq in (32, 24, 17):
        reference.zero_grad()
        compiled.grads.clear()
        loss, expected = hf_loss(compiled, seq=seq), hf_loss(reference, seq=seq)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, p in reference.named_parameters():
            torch.testing.assert_close(compiled.grads[name], p.grad, atol=2e-6, rtol=1e-4)
    assert len(compiled.graphs) == (2 if dynamic is None else 1)
    numbers = [v for v in compiled.graphs[-1].section_outputs["forward"] if isinstance(v, int)]
    assert not numbers  # sizes stay with the runner


def test_parameters_that_no_graph_uses_have_no_gradient():
    class Unused(Sequential):
        def forward(self, x):
            return self[0](x)

    compiled = compare(Unused, square)
    assert set(compiled.grads) == {"0.weight", "0.bias"}
