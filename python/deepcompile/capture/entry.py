# SPDX-License-Identifier: Apache-2.0
"""The function that is compiled: the model's forward, with only the loss differentiable.

A model that returns its logits beside the loss would otherwise have the logits'
gradient (batch x sequence x vocabulary) filled with zeros and added in the
backward. Whoever does need such a gradient asks for
``differentiable_outputs="all"``. ``loss_only`` goes further: the logits are no
output, so that nobody holds their memory until the next forward.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from deepcompile.errors import UserError

_LOSS_ALONE = "__loss_alone__"


class LossOutput(dict):
    """A model's output of which only the loss was kept: by name, by key or as element 0."""

    def __init__(self, loss: torch.Tensor):
        super().__init__(loss=loss)

    @property
    def loss(self) -> torch.Tensor:
        return self["loss"]

    def __getitem__(self, key: Any) -> torch.Tensor:
        return super().__getitem__("loss") if key in ("loss", 0) else self._absent(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what copy, pickle and the like look for
            raise AttributeError(name)
        return self._absent(name)

    def _absent(self, name: Any) -> NoReturn:
        raise UserError(
            f"[engine] forward: {name!r} was not kept, as compile.loss_only is true: set it to "
            "false, or read it from a forward of the model in evaluation mode (engine.eval())"
        )


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(_detached(v) for v in value)
    if type(value) is dict:
        return {k: _detached(v) for k, v in value.items()}
    return value


def _has_loss(out: Any) -> bool:
    """Whether ``out`` is a mapping with a loss: a dict or a Hugging Face ModelOutput."""
    if not isinstance(out, Mapping | dict) or out.get("loss") is None:
        return False
    return type(out) is dict or dataclasses.is_dataclass(out)


def _loss_differentiable(out: Any) -> Any:
    """``out`` with everything but its ``loss`` detached, if it has one."""
    if not _has_loss(out):
        return out
    fields = {k: v if k == "loss" else _detached(v) for k, v in out.items()}
    return type(out)(**fields)


def output_of(result: Any) -> Any:
    """What the caller of the entry gets for ``result``, the entry's own."""
    if type(result) is dict and _LOSS_ALONE in result:
        return LossOutput(result[_LOSS_ALONE])
    return result


def make_entry(
    model: nn.Module, differentiable_outputs: str = "loss", loss_only: bool = False
) -> Callable[..., Any]:
    """The function to give torch.compile: ``loss`` (see above) or ``all`` outputs have
    gradients. ``loss_only``: in training, where the model returns a loss, nothing else is
    returned; pass the result through ``output_of``."""
    if differentiable_outputs not in ("loss", "all"):
        raise UserError(
            f"[capture] differentiable_outputs {differentiable_outputs!r}: unknown. Use loss "
            "or all."
        )
    if getattr(model, "loss_type", "") is None and hasattr(model, "loss_function"):
        # transformers would fall back to this with a warning that breaks the graph.
        model.loss_type = "ForCausalLM"
    differentiable_loss = differentiable_outputs == "loss"

    def entry(*args: Any, **kwargs: Any) -> Any:
        out = model(*args, **kwargs)
        if loss_only and model.training and torch.is_grad_enabled() and _has_loss(out):
            return {_LOSS_ALONE: out["loss"]}
        return _loss_differentiable(out) if differentiable_loss else out

    # Dynamo counts compilations by code object. With one of its own, an engine does not use up
    # another's, after which Dynamo would run it uncompiled.
    entry.__code__ = entry.__code__.replace()
    return entry


def argument_names(model: nn.Module) -> list[str]:
    """Names of what the model's forward takes by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code
        return []
    return [parameter.name for parameter in parameters if parameter.kind in kinds]
