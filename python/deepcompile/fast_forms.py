# SPDX-License-Identifier: Apache-2.0
"""The fast forms of Hugging Face models, and for which calls they hold.

transformers looks up how to attend and how to run experts by a name in the model's configuration
at each call. The engine writes another name there around its own compiled calls and puts the old
one back, so that the model, whatever else shares its configuration, and other engines go on as
before.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .capture import attention
from .capture.entry import argument_names
from .config import CompileConfig
from .errors import UserError

log = logging.getLogger("deepcompile")

GROUPED, BATCHED = "grouped_mm", "batched_mm"
_CPU = torch.device("cpu")
_ALIGNED_BYTES = 16
"""Rows of the grouped matmul's operands begin at multiples of this."""


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """Modules whose experts transformers dispatches by their configuration."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
        and hasattr(getattr(module, "config", None), "_experts_implementation")
    ]


def _weights(experts: list[nn.Module]) -> list[torch.Tensor]:
    return [p for module in experts for p in module.parameters(recurse=False) if p.dim() == 3]


def why_not_grouped(experts: list[nn.Module], device: torch.device) -> str | None:
    """Why the experts' weights cannot go through torch's grouped matmul in a graph compiled for
    ``device``."""
    if not hasattr(torch.nn.functional, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no grouped matmul"
    for weight in _weights(experts):
        if weight.dtype != torch.bfloat16:
            name = str(weight.dtype).removeprefix("torch.")
            return f"the experts are {name}, and the grouped matmul is compiled for bfloat16 only"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8,):
            return f"{torch.cuda.get_device_name(device)} has no grouped matmul"
        if any(size * weight.element_size() % _ALIGNED_BYTES for size in weight.shape[1:]):
            rows = "x".join(map(str, weight.shape))
            return f"experts of {rows} have rows that are no multiple of {_ALIGNED_BYTES} bytes"
    return None


def choose_experts(
    model: nn.Module, wanted: str, device: torch.device = _CPU
) -> tuple[str | None, str]:
    """(implementation to use on ``device``, or None to keep the model's own; why)."""
    experts = expert_modules(model)
    if wanted == "model":
        return None, "compile.experts is model"
    if not experts:
        if wanted == "auto":
            return None, "the model has no experts that transformers dispatches"
        raise UserError(
            f"[engine] compile.experts {wanted!r}: {type(model).__name__} has no experts that "
            "transformers dispatches. Remove the key."
        )
    why_not = why_not_grouped(experts, device)
    if wanted == GROUPED and why_not is not None:
        raise UserError(
            f"[engine] compile.experts 'grouped_mm': {why_not}. Set bf16.enabled on a GPU that "
            "has it, or use auto."
        )
    if wanted != "auto":
        return wanted, f"compile.experts is {wanted}"
    own = {module.config._experts_implementation for module in experts}
    if not own <= {GROUPED, "eager"}:
        return None, f"the model was given {', '.join(sorted(map(str, own)))}"
    if why_not is None:
        return GROUPED, "the device and the experts' type have it"
    return BATCHED, f"{why_not}; each token's experts are copied, which takes memory"


class FastForms:
    """What one model is switched to in its engine's compiled calls."""

    def __init__(self, model: nn.Module, settings: CompileConfig, device: torch.device):
        """Decides for ``model`` on ``device`` without reading its parameters' values. Raises
        UserError where the configuration asks for what the model does not have."""
        self._wanted = settings.causal_attention
        self._names = argument_names(model)
        if self._wanted == "off" or not settings.deepcompile:
            self._why = "compile.causal_attention is off, or compile.deepcompile false"
        else:
            self._why = attention.why_not(model, device)
        if self._wanted == "on" and settings.deepcompile and self._why is not None:
            raise UserError(
                f"[engine] compile.causal_attention 'on': {type(model).__name__} keeps its own "
                f"attention: {self._why}. Set it to auto, or change the model."
            )
        self._attention = [] if self._why is not None else attention.sdpa_configs(model)
        self._experts, self._experts_why = choose_experts(model, settings.experts, device)
        configs = {id(m.config): m.config for m in expert_modules(model)}
        self._given = [(c, c._experts_implementation) for c in configs.values() if self._experts]
        self._loss_only = settings.loss_only
        self._calls = 0
        self._own: Counter[str] = Counter()

    @contextmanager
    def applied(self, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """For one compiled call of the model with these arguments."""
        with ExitStack() as stack:
            if self._attention and self._has_no_mask(args, kwargs):
                stack.enter_context(attention.implementation(self._attention, attention.NAME))
            if self._given:
                stack.enter_context(self._other_experts())
            yield

    def _has_no_mask(self, args: tuple, kwargs: Mapping[str, Any]) -> bool:
        self._calls += 1
        batch = kwargs
        if args:
            positional = dict(zip(self._names, args, strict=False))
            batch = positional | dict(kwargs)
        name = attention.needs_mask(batch) if len(args) <= len(self._names) else "*args"
        if name is None:
            return True
        if self._wanted == "on":
            raise UserError(
                f"[engine] forward: {name} was given, and compile.causal_attention is on: leave "
                "it out (deepcompile.data.without_full_masks drops masks that mask nothing), or "
                "set the key to auto"
            )
        if not self._own[name]:
            log.info(
                "[engine] forward: %s was given, so attention has a mask: slower than without", name
            )
        self._own[name] += 1
        return False

    @contextmanager
    def _other_experts(self) -> Iterator[None]:
        """Where the model still has what it was given when the engine was made."""
        given = [(c, name) for c, name in self._given if c._experts_implementation == name]
        try:
            for config, _ in given:
                config._experts_implementation = {"": self._experts}
            yield
        finally:
            for config, name in given:
                config._experts_implementation = {"": name}

    def report(self) -> dict[str, Any]:
        """For Engine.compile_report(): what is used and why, and how often a batch's arguments
        ruled it out, by argument."""
        used = self._why is None
        return {
            "causal_attention": {
                "used": used,
                "why": "where a batch has no mask of its own" if used else self._why,
                "forwards": self._calls,
                "with_own_mask": dict(self._own),
            },
            "experts": {"implementation": self._experts or "model", "why": self._experts_why},
            "loss_only": self._loss_only,
        }
