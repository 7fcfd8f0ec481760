# SPDX-License-Identifier: Apache-2.0
"""The compiled forwards of one engine: one for each set of parameters that require gradients.

A captured graph makes the gradients that were asked for when it was captured, and hands them to
the runtime past autograd. Freezing a layer later, or a hook on a parameter, would go unnoticed:
Dynamo does not look at a parameter's requires_grad again, and autograd never comes by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .capture import CaptureBackend, CaptureOptions, make_backend, make_entry
from .config import CompileConfig
from .errors import UserError
from .params import ParamTable


def check_arguments(backend: str, kwargs: Mapping[str, Any]) -> None:
    """UserError for what Engine.compile() does not take."""
    if backend not in ("inductor", "eager"):
        raise UserError(f"[engine] compile: backend {backend!r}; use inductor or eager")
    for key in kwargs:
        if key not in ("dynamic", "fullgraph", "options"):
            raise UserError(
                f"[engine] compile: compile_kwargs[{key!r}]; use dynamic, fullgraph or options"
            )


def make_capture(
    settings: CompileConfig,
    table: ParamTable,
    planner: Any,
    deep: Any,
    world: int,
    backend: str,
    kwargs: Mapping[str, Any],
) -> CaptureBackend:
    """What captures an engine's graphs and hands them to its planner. ``deep``: see
    CaptureOptions; ``backend`` and ``kwargs``: Engine.compile()'s."""
    options = CaptureOptions(
        backend=backend,
        region_bytes=settings.region_bytes,
        region_host=settings.region_host,
        checkpoint_marks=settings.checkpoint_marks,
        inductor_options=dict(kwargs.get("options") or {}),
        cache_dir=settings.cache_dir,
        deep=deep,
    )
    return make_backend(table, options, planner, world=world)


class Variants:
    """``capture`` is torch.compile's backend, ``kwargs`` its arguments beside it."""

    def __init__(
        self,
        model: nn.Module,
        table: ParamTable,
        settings: CompileConfig,
        capture: Callable[..., Any],
        kwargs: Mapping[str, Any],
    ):
        self._entry = model, settings.differentiable_outputs, settings.loss_only
        self._capture = capture
        self._compile = {
            "dynamic": kwargs.get("dynamic"),
            "fullgraph": bool(kwargs.get("fullgraph", False)),
        }
        refs = [ref for ref in table.refs() if table.spec(ref).trainable]
        self._tensors = [table.tensor(ref) for ref in refs]
        self._names = [table.member(ref).name for ref in refs]
        self._state = (True,) * len(refs)
        self.first = self._build()
        """With all of them trained; evaluations use it whatever is trained."""
        self._known = {self._state: self.first}

    def _build(self) -> Callable[..., Any]:
        """The model's forward, compiled with a Dynamo cache of its own: frames behind a graph
        break are found again by their code and by the backend, so each has a backend too."""
        capture = self._capture

        def backend(gm: Any, inputs: Any, **kwargs: Any) -> Any:
            return capture(gm, inputs, **kwargs)

        return torch.compile(make_entry(*self._entry), backend=backend, **self._compile)

    def now(self) -> tuple[Callable[..., Any], bool]:
        """The forward for what requires gradients now, and whether it is a new one."""
        if not torch.is_grad_enabled():
            return self.first, False
        self._state = self._trained()
        new = self._state not in self._known
        if new:
            self._known[self._state] = self._build()
        return self._known[self._state], new

    def _trained(self) -> tuple[bool, ...]:
        return tuple([tensor.requires_grad for tensor in self._tensors])

    def check_unchanged(self) -> None:
        """UserError if other parameters require gradients than in the last forward."""
        if self._trained() != self._state:
            raise UserError(
                "[engine] backward: parameters were frozen or unfrozen since the forward, whose "
                "gradients are made as they were; do it between steps"
            )

    def frozen(self) -> list[str]:
        """Names of those that were trainable at initialize() and are not now."""
        return [n for n, on in zip(self._names, self._state, strict=True) if not on]

    def check_hooks(self) -> None:
        """UserError if someone waits for a parameter's gradient. The engine's own hook is one of
        those that come after it was accumulated."""
        for name, tensor in zip(self._names, self._tensors, strict=True):
            if tensor._backward_hooks or len(tensor._post_accumulate_grad_hooks or ()) > 1:
                raise UserError(
                    f"[engine] {name}: has a gradient hook, which a compiled step would not call, "
                    "as it takes gradients where they are made. Remove the hook, or train without "
                    "engine.compile()"
                )
