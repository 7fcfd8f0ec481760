# SPDX-License-Identifier: Apache-2.0
"""The function that is compiled: the model's forward, with only the loss differentiable.

A model that returns its logits beside the loss would otherwise have the logits'
gradient (batch x sequence x vocabulary) filled with zeros and added in the
backward. Whoever does need such a gradient asks for
``differentiable_outputs="all"``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from deepcompile.errors import UserError


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(v) for v in value)
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    return value


def _loss_only(out: Any) -> Any:
    """``out`` with everything but its ``loss`` detached, if it is a mapping that has one: a dict
    or a Hugging Face ModelOutput. Anything else as it is."""
    if not isinstance(out, Mapping | dict) or out.get("loss") is None:
        return out
    if type(out) is not dict and not dataclasses.is_dataclass(out):
        return out
    fields = {k: v if k == "loss" else _detached(v) for k, v in out.items()}
    return type(out)(**fields)


def make_entry(model: nn.Module, differentiable_outputs: str = "loss") -> Callable[..., Any]:
    """The function to give torch.compile: ``loss`` (see above) or ``all`` outputs have
    gradients."""
    if differentiable_outputs not in ("loss", "all"):
        raise UserError(
            f"[capture] differentiable_outputs {differentiable_outputs!r}: unknown. Use loss "
            "or all."
        )
    if getattr(model, "loss_type", "") is None and hasattr(model, "loss_function"):
        # transformers would fall back to this with a warning that breaks the graph.
        model.loss_type = "ForCausalLM"
    only_loss = differentiable_outputs == "loss"

    def entry(*args: Any, **kwargs: Any) -> Any:
        out = model(*args, **kwargs)
        return _loss_only(out) if only_loss else out

    # Dynamo counts compilations by code object. With one of its own, an engine does not use up
    # another's, after which Dynamo would run it uncompiled.
    entry.__code__ = entry.__code__.replace()
    return entry
