# SPDX-License-Identifier: Apache-2.0
"""The node that stands in for AOTAutograd's wrapper: where it does, and that nothing changes."""

import pytest
import torch
import torch.utils.checkpoint
from reference_runner import Compiled, Sequential, compare, pair
from torch import nn

from deepcompile.capture import backend
from deepcompile.errors import UserError

X = torch.linspace(-1, 1, 4 * 16).reshape(4, 16)
DIRECT = "_NodeBackward"


class Several(nn.Module):
    """Outputs with and without gradients, of which one may go unused."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        hidden = torch.tanh(self.a(x))
        return self.b(hidden), hidden.argmax(-1), hidden.sum() * 2, hidden.detach() + 1


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x):
        self.seen.add_(x.sum(0))
        return self.linear(x)


class ReturnsInput(nn.Linear):
    def forward(self, x):
        return super().forward(x), x.view(-1)


class ReturnsViews(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        return out, out[0]


def test_the_node_has_one_edge_whatever_the_number_of_parameters():
    loss = Compiled(Sequential())(X).sum()
    node = loss.grad_fn.next_functions[0][0]
    assert node.name() == DIRECT
    assert len([edge for edge, _ in node.next_functions if edge is not None]) == 1


@pytest.mark.parametrize(
    "make", [Writes, lambda: ReturnsInput(16, 16), lambda: ReturnsViews(16, 16)]
)
def test_other_graphs_keep_the_wrapper(make):
    reference, model = pair(make)
    compiled, x = Compiled(model), X.clone().requires_grad_()
    found, expected = compiled(x), reference(X)
    found, expected = [r if isinstance(r, tuple) else (r,) for r in (found, expected)]
    assert all(DIRECT not in r.grad_fn.name() for r in found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def losses_and_gradients(compiled, used):
    x = X.clone().requires_grad_()
    outputs = compiled(x)
    sum(outputs[i].square().sum() for i in used).backward()
    return [*(o.detach() for o in outputs), x.grad, *compiled.grads.values()]


@pytest.mark.parametrize("used", [(0, 2), (2,), (0,)])
def test_the_bits_are_the_wrappers(used, monkeypatch):
    with_node = losses_and_gradients(Compiled(pair(Several)[1]), used)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "wrap", lambda direct, compiled: compiled)
        without = losses_and_gradients(Compiled(pair(Several)[1]), used)
    assert len(with_node) == len(without)
    assert all(torch.equal(a, b) for a, b in zip(with_node, without, strict=True))


def test_what_has_no_gradient_requires_none():
    outputs = Compiled(Several())(X)
    assert [o.requires_grad for o in outputs] == [True, False, True, False]


def test_gradients_pass_from_graph_to_graph():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Sequential(), nn.Linear(16, 16)

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    compiled = compare(Broken, lambda model: model(X).square().sum(), fullgraph=False)
    assert len(compiled.graphs) == 2


def test_a_checkpoint_around_the_call_runs_it_again():
    reference, model = pair(Sequential)
    compiled, x = Compiled(model), X.clone().requires_grad_()
    run = torch.utils.checkpoint.checkpoint
    run(compiled, x, use_reentrant=False).sum().backward()
    reference(X).sum().backward()
    assert compiled.sink.last_call == 2 and not compiled.sink.calls
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(compiled.grads[name], parameter.grad)


def test_other_layouts_of_the_gradient():
    reference, model = pair(Several)
    compiled = Compiled(model)
    compiled(X)[0].t().backward(torch.arange(32.0).reshape(8, 4))  # comes transposed
    reference(X)[0].t().backward(torch.arange(32.0).reshape(8, 4))
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(compiled.grads[name], parameter.grad)


def test_a_backward_of_the_backward_is_an_error():
    x, factor = X.clone().requires_grad_(), torch.ones((), requires_grad=True)
    compiled = Compiled(Sequential())
    (grad,) = torch.autograd.grad(compiled(x).sum() * factor, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_deterministic_algorithms_switched_on_in_between():
    loss = Compiled(Sequential())(X).sum()
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UserError, match="between a forward and its backward"):
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
