# SPDX-License-Identifier: Apache-2.0
"""One autograd node for a captured graph, in place of AOTAutograd's.

AOTAutograd takes every parameter through autograd and every saved tensor
through its node: hundreds of edges, stand-ins and gradients that are None, all
handled one by one in Python and in the engine. The runner needs none of them.
Where a graph is *plain* (no input is written to, no output is an alias, nothing
but tensors comes out), a node that knows only the inputs whose gradients are
asked for does the same. All other graphs keep AOTAutograd's wrapper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepcompile.capture.graph import CallMap, Runner
from deepcompile.capture.versions import Reached, check
from deepcompile.errors import UserError


class DirectCall:
    """Calls one plain training graph: ``calls`` as the assembler made them, ``grads`` which
    outputs have gradients, ``first_tangent`` the position of the first one's in the backward's
    arguments."""

    def __init__(
        self,
        runner: Runner,
        calls: dict[str, CallMap],
        grads: Sequence[bool],
        first_tangent: int,
        reached: Reached,
    ):
        self.reached = reached
        forward, backward = calls["forward"], calls["backward"]
        self.runner = runner
        self.inputs = forward.inputs
        self.results = [slot.index for slot in forward.outputs]
        self.constant = [i for i, grad in enumerate(grads) if not grad]
        with_grad = [i for i, grad in enumerate(grads) if grad]
        self.tangents = [with_grad[i - first_tangent] for i in backward.inputs]
        """Output of each gradient that the backward takes."""
        wanted = [(i, s.index) for i, s in enumerate(backward.outputs) if s.index is not None]
        self.wanted = [i for i, _ in wanted]
        """Arguments whose gradients the backward hands out, and where it has them."""
        self.input_grads = [index for _, index in wanted]
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        # Makes the outputs require gradients, whatever the inputs do. It never gets one.
        self.anchor = torch.empty(0, requires_grad=True)

    def __call__(self, args: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        inputs, given = [args[i] for i in self.inputs], self.reached.of_arguments(args)
        return _Node.apply(self, inputs, given, self.anchor, *[args[i] for i in self.wanted])


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: DirectCall, inputs: list, given: list, *_edges: Any) -> tuple:
        ctx.call = call
        token, results = call.runner.forward(inputs)
        ctx.save_for_backward(token)  # so that a checkpoint around the call can run it again
        ctx.set_materialize_grads(False)
        # Autograd hangs this node, and so the token, on what is returned. The runner may keep the
        # same tensors for the backward: without an alias they would keep each other alive.
        outputs = tuple(results[i].detach() for i in call.results)
        ctx.seen = call.reached.see(given, outputs)
        ctx.like = [(outputs[i].shape, outputs[i].dtype, outputs[i].device) for i in call.tangents]
        ctx.mark_non_differentiable(*[outputs[i] for i in call.constant])
        return outputs

    @staticmethod
    @torch.compiler.disable
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        call = ctx.call
        (token,) = ctx.saved_tensors  # its death would drop what the runner has yet to read
        check(ctx.seen)
        if torch.are_deterministic_algorithms_enabled() and not call.deterministic:
            raise UserError(
                "[capture] deterministic algorithms: were switched on between a forward and its "
                "backward, which was compiled without them. Switch them on before the forward."
            )
        tangents = []
        for i, (shape, dtype, device) in zip(call.tangents, ctx.like, strict=True):
            grad = grads[i]
            if grad is None:
                grad = torch.zeros(shape, dtype=dtype, device=device)
            tangents.append(grad.contiguous())
        results = call.runner.backward(int(token.item()), tangents)
        return (None, None, None, None, *[results[i] for i in call.input_grads])


def is_plain(metadata: Any, gm: fx.GraphModule, forward: fx.Graph) -> bool:
    """Whether a DirectCall may stand in for AOTAutograd's wrapper. ``metadata``: AOTAutograd's of
    the graph; ``gm``: what Dynamo captured; ``forward``: AOTAutograd's forward."""
    inputs, outputs = metadata.input_info, metadata.output_info
    given = gm.graph.find_nodes(op="placeholder")
    return (
        len(inputs) == len(given)
        and len(inputs) == len(forward.find_nodes(op="placeholder"))
        and not any(is_traceable_wrapper_subclass(n.meta.get("example_value")) for n in given)
        and not any(info.mutates_data or info.mutates_metadata for info in inputs)
        and all(info.output_type.name == "non_alias" for info in outputs)
        and all(issubclass(info.raw_type, torch.Tensor) for info in outputs)
        and not metadata.num_intermediate_bases
        and not metadata.tokens
        and not metadata.is_rng_op_functionalized
        and not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    )


def _is_contiguous(value: Any) -> bool:
    """Whether a fake tensor's memory is contiguous, whatever its symbolic sizes turn out as."""
    known = all(isinstance(n, int) for n in (*value.shape, *value.stride()))
    return value.dim() == 0 or (known and value.is_contiguous())


def direct_call(
    runner: Runner,
    calls: dict[str, CallMap],
    metadata: Any,
    saved: int,
    outputs: Sequence[Any],
    reached: Reached,
) -> DirectCall | None:
    """The call of a plain graph; None if a gradient has another layout than contiguous, or
    something else than gradients comes into the backward. ``saved``: what follows the token;
    ``outputs``: fake tensors of the forward section; ``reached``: of the forward."""
    grads = [info.requires_grad for info in metadata.output_info]
    first = 1 + saved
    slots = calls["forward"].outputs
    if any(slot.index is None for slot in slots) or any(
        i < first for i in calls["backward"].inputs
    ):
        return None
    if not all(_is_contiguous(outputs[s.index]) for s, g in zip(slots, grads, strict=True) if g):
        return None
    return DirectCall(runner, calls, grads, first, reached)


def wrap(direct: DirectCall, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo calls: ``direct`` where gradients are recorded, else AOTAutograd's wrapper."""

    def call(*args: Any) -> Any:
        return direct(args) if torch.is_grad_enabled() else compiled(*args)

    return call
