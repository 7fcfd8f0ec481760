# SPDX-License-Identifier: Apache-2.0
"""Models whose layers are alike: a few of them are traced, and the rest follows (depth.py).

Dynamo and AOTAutograd take time for each layer that they see. For its compiled calls a model's list
of layers is therefore a shorter one, put in its place and taken out again; the graph that comes of
it is made deep before it is planned. Parameters are read by the runtime, so that the layers left
out run with their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.exc import BackendCompilerFailed

from deepcompile.capture.depth import NotRegular, deepen
from deepcompile.capture.entry import argument_names
from deepcompile.capture.graph import GraphIR
from deepcompile.errors import UserError
from deepcompile.params import ParamTable

FEW_LAYERS = 4
"""Traced in place of all. Enough for two equal layers in a row in the forward and in the backward,
between a first and a last one that differ."""
KNOWN = ("llama", "mistral", "mixtral", "qwen2", "qwen3")
"""Hugging Face's model types whose layers compute the same whatever their number: tests compare
their graphs with those of all layers."""
PLAIN = {"input_ids", "attention_mask", "position_ids", "labels", "use_cache"}
"""Arguments of these models that ask nothing of single layers."""
_ASKS = ("output_hidden_states", "output_attentions", "output_router_logits")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def layer_list(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """(owner, its name for it, list) of the model's longest list of modules; None if there is none
    or two are as long."""
    found = [
        (owner, key, child)
        for owner in model.modules()
        for key, child in owner.named_children()
        if isinstance(child, nn.ModuleList)
    ]
    longest = max((len(layers) for _, _, layers in found), default=0)
    found = [each for each in found if len(each[2]) == longest]
    return found[0] if len(found) == 1 and longest else None


def layers_alike(layers: nn.ModuleList) -> bool:
    """Whether they differ in nothing but their number."""
    return len({_fingerprint(layer) for layer in layers}) == 1


def _fingerprint(layer: nn.Module) -> str:
    """Modules, their plain attributes, hooks, and the forms of their tensors."""
    lines = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | float | str | None) and "idx" not in key
        }
        own = "forward" in vars(module)
        hooks = [len(getattr(module, kind)) for kind in _HOOKS]
        forms = [
            (n, tuple(p.shape), p.dtype, p.requires_grad)
            for n, p in module.named_parameters(recurse=False)
        ]
        forms += [(n, tuple(b.shape), b.dtype) for n, b in module.named_buffers(recurse=False)]
        lines.append(f"{name} {type(module)} {sorted(plain.items())} {own} {hooks} {forms}")
    return "\n".join(lines)


def _why_not(model: nn.Module, wanted: str, found: Any) -> str | None:
    """Why all layers of ``model`` are traced; None: a few are."""
    if wanted == "off":
        return "compile.equal_layers is off"
    if found is None:
        return "the model has no list of layers, or several of one length"
    layers = found[2]
    if len(layers) <= FEW_LAYERS:
        return f"the model has {len(layers)} layers"
    if any(getattr(m, kind) for layer in layers for m in layer.modules() for kind in _HOOKS):
        return "a layer has hooks of the user's"
    if not layers_alike(layers):
        return "the layers are not all alike"
    if wanted == "on":
        return None
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN or not type(layers[0]).__module__.startswith("transformers.models."):
        return f"whether layers of {type(model).__name__} depend on their number is not known"
    return None


class EqualLayers:
    """What is traced of one model's layers in its engine's compiled calls."""

    def __init__(self, model: nn.Module, wanted: str):
        """``wanted``: ``auto``, ``on`` or ``off``. Looks at the model as the user made it, so
        before the engine's own hooks, and adds one to each layer that is traced. Raises UserError
        if ``on`` cannot be."""
        found = layer_list(model)
        self._wanted, self._name, self._running = wanted, type(model).__name__, False
        self.why = _why_not(model, wanted, found)
        """Why all layers are traced; None: FEW_LAYERS are."""
        if self.why is not None:
            self._refuse_if_asked()
            return
        self._owner, self._key, layers = found
        self._depth, self._few = len(layers), nn.ModuleList(list(layers)[:FEW_LAYERS])
        self._prefix = next(n for n, m in model.named_modules() if m is layers) + "."
        self._names = argument_names(model)
        self._config = getattr(model, "config", None)
        for layer in self._few:
            self._watch(layer)

    def _refuse_if_asked(self) -> None:
        if self._wanted == "on":
            raise UserError(
                f"[engine] compile.equal_layers 'on': {self._name}: {self.why}. Set it to auto."
            )

    def _watch(self, layer: nn.Module) -> None:
        def before(_module: nn.Module, _args: tuple) -> None:
            if self._running and not torch.compiler.is_compiling():
                raise NotRegular("a layer runs uncompiled")

        skip_code(before.__code__)  # where Dynamo skipped the layer, it must not compile this
        layer.register_forward_pre_hook(before)

    def _holds(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call asks for nothing of single layers."""
        if self._wanted == "on":
            return True
        given = {*self._names[: len(args)], *kwargs}
        asks = any(getattr(self._config, name, False) for name in _ASKS)
        return len(args) <= len(self._names) and given <= PLAIN and not asks

    def call(self, compiled: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """``compiled(*args, **kwargs)``, with few layers if they stand for all."""
        if self.why is None and self._holds(args, kwargs):
            try:
                with self._applied():
                    return compiled(*args, **kwargs)
            except (NotRegular, BackendCompilerFailed) as error:
                self._give_up(getattr(error, "inner_exception", error), error)
        return compiled(*args, **kwargs)

    @contextmanager
    def _applied(self) -> Iterator[None]:
        modules = self._owner._modules
        whole = modules[self._key]
        modules[self._key], self._running = self._few, True
        try:
            yield
        finally:
            modules[self._key], self._running = whole, False

    def deep(self, ir: GraphIR, table: ParamTable) -> GraphIR:
        """What a graph stands for that is captured now. Raises NotRegular."""
        if not self._running or not self._reads_layers(ir, table):
            return ir
        return deepen(ir, table, table, self._depth - FEW_LAYERS)

    def _reads_layers(self, ir: GraphIR, table: ParamTable) -> bool:
        return any(table.member(ref).name.startswith(self._prefix) for ref in ir.members_used())

    def _give_up(self, cause: BaseException, error: Exception) -> None:
        """All layers are traced from now on, if that is why a call failed; else the error."""
        if not isinstance(cause, NotRegular):
            raise error
        self.why = str(cause)
        self._refuse_if_asked()

    def report(self) -> dict[str, Any]:
        """For Engine.compile_report(): whether a few layers are traced for all, and why."""
        used = self.why is None
        why = f"{FEW_LAYERS} of {self._depth} equal layers are traced" if used else self.why
        return {"used": used, "why": why}
