# SPDX-License-Identifier: Apache-2.0
"""Saved activations belong to the runner; autograd holds a token instead.

The partitioned graphs get one more saved tensor, the token. At run time the
forward hands autograd that token and, for all other saved tensors, one shared
tensor without storage; the backward reads the call's number from its token. So
nested, interleaved and repeated calls stay apart, and a plan may recompute or
move what was saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import DummyAOTOutput

from deepcompile.capture.graph import CallMap, Runner
from deepcompile.capture.sources import output_node
from deepcompile.capture.versions import Reached, Seen, check

TOKEN = "deepcompile_token"


def is_number(value: Any) -> bool:
    kinds = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, kinds)


def add_token(
    forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int, fake_mode: Any
) -> None:
    """Make the token the first saved tensor of both graphs.

    AOTAutograd's order: the forward returns outputs, saved tensors, saved
    numbers; the backward takes saved numbers, saved tensors, tangents.
    """
    with fake_mode:
        value = torch.empty(1, dtype=torch.int64)
    out = output_node(forward.graph)
    with forward.graph.inserting_before(out):
        token = forward.graph.create_node(
            "call_function",
            torch.ops.aten.empty.memory_format,
            ([1],),
            {"dtype": torch.int64, "device": torch.device("cpu")},
            name=TOKEN,
        )
    token.meta["val"] = value
    desc = list(out.meta.get("desc") or ())
    if desc:
        desc.insert(num_outputs, DummyAOTOutput(0))
        out.meta["desc"] = desc
    values = list(out.args[0])
    out.args = ((*values[:num_outputs], token, *values[num_outputs:]),)
    inputs = backward.graph.find_nodes(op="placeholder")
    first = next((n for n in inputs if not is_number(n.meta.get("val"))), None)
    place = first if first is not None else output_node(backward.graph)
    with backward.graph.inserting_before(place):
        copy = backward.graph.create_node("placeholder", TOKEN, name=TOKEN)
    copy.meta["val"] = value
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()


def _assemble(call: CallMap, results: Any) -> list[Any]:
    return [results[s.index] if s.index is not None else s.constant for s in call.outputs]


def forward_function(
    runner: Runner, call: CallMap, saved: list[bool], reached: Reached, seen: dict[int, list[Seen]]
) -> Callable[[list], list[Any]]:
    """The boxed function that AOTAutograd calls as the compiled forward.

    ``saved`` describes what follows the token: True for a tensor, False for a number. ``seen``: by
    token, what it left of what is ``reached``, as long as the token lives.
    """
    empty = torch.empty(0)
    rest = [empty if is_tensor else 0 for is_tensor in saved]

    def run(args: list) -> list[Any]:
        inputs, given = [args[i] for i in call.inputs], reached.of_arguments(args)
        args.clear()
        token, results = runner.forward(inputs)
        # Autograd hangs its node, and so the token, on what it is given. The runner may keep the
        # same tensors for the backward: without an alias they would keep each other alive.
        results = [r.detach() if isinstance(r, torch.Tensor) else r for r in results]
        made = _assemble(call, results)
        left = reached.see(given, made)
        if left:
            number = int(token.item())
            seen[number] = left
            weakref.finalize(token, seen.pop, number, None).atexit = False
        return [*made, token, *rest]

    run._boxed_call = True
    return run


def backward_function(
    runner: Runner, call: CallMap, token: int, seen: dict[int, list[Seen]]
) -> Callable[[list], list[Any]]:
    """The boxed compiled backward; ``token`` is the token's argument position."""

    def run(args: list) -> list[Any]:
        held = args[token]  # its death would drop the saved values before the runner reads them
        inputs = [args[i] for i in call.inputs]
        args.clear()
        number = int(held.item())
        check(seen.get(number, ()))
        return _assemble(call, runner.backward(number, inputs))

    run._boxed_call = True
    return run


def inference_function(runner: Runner, call: CallMap) -> Callable[[list], list[Any]]:
    def run(args: list) -> list[Any]:
        inputs = [args[i] for i in call.inputs]
        args.clear()
        return _assemble(call, runner.inference(inputs))

    run._boxed_call = True
    return run
