# SPDX-License-Identifier: Apache-2.0
"""Which regions must not run again, and which the user marked for it."""

import pytest
import torch
import torch.utils.checkpoint
from reference_runner import Compiled, hf_loss, llama, pair
from torch import nn

from deepcompile.capture.program import to_program


class Net(nn.Module):
    """A weight each side of what is tested, so that it gets a region of its own."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(16, 16), middle, nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.middle(self.first(x))).pow(2).mean()


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(x.detach().mean())
        return x * 2


def regions(model, backend, direction="fwd", **options):
    compiled = Compiled(model, threshold=100, backend=backend, region_bytes=1, **options)
    compiled(torch.ones(4, 16)).backward()
    graph = compiled.graphs[0]
    program = to_program(graph.ir, compiled.table)
    assert [r.once for r in program.regions] == [r.once for r in graph.ir.regions]
    return [r for r in graph.ir.regions if r.name.startswith(direction)]


def test_pure_regions_may_run_again():
    assert not any(r.once for r in regions(Net(nn.GELU()), "eager"))


class Attention(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout

    def forward(self, x):
        heads = x.view(1, 2, 4, 8)
        done = nn.functional.scaled_dot_product_attention(
            heads, heads, heads, dropout_p=self.dropout, is_causal=True
        )
        return done.reshape(4, 16)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_attention_without_dropout_may_run_again(backend):
    assert not any(r.once for r in regions(Net(Attention(0.0)), backend))


def test_attention_with_dropout_runs_once():
    assert any(r.once for r in regions(Net(Attention(0.5)), "eager"))


def test_dropout_run_by_operators_draws_anew():
    assert any(r.once for r in regions(Net(nn.Dropout(0.5)), "eager"))


def test_compiled_dropout_reads_a_seed_that_is_drawn_once():
    found = regions(Net(nn.Dropout(0.5)), "inductor")
    assert any(r.once for r in found) and not all(r.once for r in found)
    drawing = [r for r in found if r.once]
    seeds = {name for r in drawing for name in r.outputs}
    assert any(seeds & set(r.inputs) for r in found if not r.once), "no pure region reads a seed"


def test_writing_to_a_buffer_is_an_effect():
    assert any(r.once for r in regions(Net(Counts()), "eager"))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        def inner(x):
            return self.down(torch.tanh(self.up(x)).sin())

        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)


@pytest.mark.parametrize("marks", ["hint", "obey"])
def test_checkpoint_marks_are_carried_to_regions(marks):
    kept = regions(Net(Checkpointed()), "eager", checkpoint_marks=marks)
    assert [r.checkpoint for r in kept].count(True) in range(1, len(kept))
    again = regions(Net(Checkpointed()), "eager", "bwd", checkpoint_marks=marks)
    assert not any(r.checkpoint for r in again)


def test_a_hint_leaves_the_recomputation_to_the_plan():
    saved = {}
    for marks in ("hint", "obey"):
        found = regions(Net(Checkpointed()), "eager", "bwd", checkpoint_marks=marks)
        saved[marks] = sum(r.flops for r in found)
    assert saved["hint"] < saved["obey"], "obeying recomputes a matmul in the backward"


def test_equal_regions_agree():
    compiled = Compiled(pair(lambda: llama(4))[1], threshold=1000)
    hf_loss(compiled)
    by_code = {}
    for region in compiled.graphs[0].ir.regions:
        by_code.setdefault(region.code, set()).add(region.once)
    assert all(len(flags) == 1 for flags in by_code.values())
