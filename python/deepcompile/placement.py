# SPDX-License-Identifier: Apache-2.0
"""A model's tensors on their way into a runtime: on the device, in the compute type, equal on all
ranks, one after another.

Parameters on the meta device are made by their own module (reset_parameters) or by Hugging Face's
_init_weights, in the order of the modules. Whatever was there or was made, rank 0's values win;
what is real on rank 0 is not made elsewhere. So a model that no rank could hold is built on the
meta device, or loaded by rank 0 into its host's memory and built on the meta device by the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .distributed import Ranks
from .errors import UserError
from .params import MemberRef, ParamTable


def _fail(name: str, cause: str) -> UserError:
    return UserError(f"[initialize] {name}: {cause}")


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t for k, t in (module._parameters | module._buffers).items() if t is not None}


def _hf_initialiser(model: nn.Module) -> Any:
    """Hugging Face's per-module initialiser of `model`, or None."""
    for module in model.modules():
        if callable(getattr(module, "_init_weights", None)):
            return module._init_weights
    return None


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _keeps_type(module: nn.Module, key: str) -> bool:
    """Buffers that are not saved (rotary tables, for one) keep the precision their module chose."""
    return key in module._non_persistent_buffers_set


class Arrival:
    """A model whose parameters get their values one by one; see `into`.

    Making one is collective. It casts floating parameters to `dtype` (None: leaves them) where they
    are. Raises UserError if another rank built a different model.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, dtype: torch.dtype | None):
        self._model, self._ranks, self._dtype = model, ranks, dtype
        self._hf_init = _hf_initialiser(model)
        self._real_on_first = self._compare()
        self._made_in: dict[int, torch.dtype] = {}
        """Element type in which a meta parameter is initialised, by its id."""
        for parameter in model.parameters():
            if parameter.is_meta:
                self._made_in[id(parameter)] = parameter.dtype
            parameter.data = self._cast(parameter.data)
        for module in model.modules():
            if type(module)._apply is not nn.Module._apply:  # it moves more than parameters
                module._apply(lambda t: t if t.is_meta else t.to(ranks.device), recurse=False)
        self._waiting = [
            (name, module)
            for name, module in model.named_modules()
            if any(t.is_meta for t in _own_tensors(module).values())
        ]
        self._new: dict[int, nn.Parameter] = {}
        """What took the place of a meta parameter, by the old one's id."""
        self._old: list[nn.Parameter] = []
        """Those, so that nothing else gets their ids."""

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._dtype if tensor.is_floating_point() else None)

    def into(self, table: ParamTable, add: Callable[[int], None], source: Any) -> None:
        """Give each of the table's params its values and `add` it, which takes its memory: of large
        parameters, no more than one module's are there at a time. `source`: an optimizer, whose
        parameters become the table's. Collective."""
        for index, spec in enumerate(table.params):
            for at in range(len(spec.members)):
                self._bring(table, MemberRef(index, at))
            add(index)
        while self._waiting:
            self._make_next()
        self._move_buffers()
        for group in source.param_groups:
            group["params"] = [self._new.get(id(p), p) for p in group["params"]]

    def _bring(self, table: ParamTable, ref: MemberRef) -> None:
        parameter = table.tensor(ref)
        if parameter.is_meta:
            while id(parameter) not in self._new:
                self._make_next()
            parameter = self._new[id(parameter)]
            table.replace(ref, parameter)
        parameter.data = parameter.data.to(self._ranks.device)
        self._ranks.broadcast_tensor(parameter.data)

    def _make_next(self) -> None:
        """Memory and values for the tensors of the next module that has some on the meta device."""
        name, module = self._waiting.pop(0)
        old = {k: p for k, p in module._parameters.items() if p is not None and p.is_meta}
        made_before = {k: self._new[id(p)] for k, p in old.items() if id(p) in self._new}  # tied
        buffers = [k for k, b in module._buffers.items() if b is not None and b.is_meta]
        if old.keys() - made_before.keys() or buffers:
            self._empty(module, old, buffers)
            if not all(_joined(name, key) in self._real_on_first for key in [*old, *buffers]):
                self._initialise(name, module)
        for key, parameter in old.items():
            if key in made_before:
                setattr(module, key, made_before[key])
                continue
            made = self._new[id(parameter)] = module._parameters[key]
            made.data = self._cast(made.data)
            self._old.append(parameter)

    def _empty(self, module: nn.Module, old: dict[str, nn.Parameter], buffers: list[str]) -> None:
        device = self._ranks.device
        for key, parameter in old.items():
            dtype = self._made_in[id(parameter)]
            empty = torch.empty_like(parameter, dtype=dtype, device=device, requires_grad=False)
            setattr(module, key, nn.Parameter(empty, parameter.requires_grad))
        for key in buffers:
            module._buffers[key] = torch.empty_like(module._buffers[key], device=device)

    def _initialise(self, name: str, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None)
        if self._hf_init is None and not callable(reset):
            raise _fail(
                f"{name or 'the model'} ({type(module).__name__})",
                "is on the meta device and has no reset_parameters(); add one, or build the model "
                "with real tensors",
            )
        with torch.no_grad():
            for tensor in _own_tensors(module).values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
            if callable(reset):
                reset()
            if self._hf_init is not None:
                self._hf_init(module)
            for key, tensor in _own_tensors(module).items():
                if tensor.is_floating_point() and tensor.isnan().any():
                    raise _fail(
                        _joined(name, key),
                        f"{type(module).__name__} was built on the meta device and does not "
                        "initialise it; build the model with real tensors",
                    )

    def _move_buffers(self) -> None:
        for module in self._model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    moved = buffer.to(self._ranks.device)
                    module._buffers[key] = moved if _keeps_type(module, key) else self._cast(moved)
        with torch.no_grad():
            for buffer in self._model.buffers():
                dense = buffer.contiguous()
                self._ranks.broadcast_tensor(dense)
                if dense is not buffer:
                    buffer.copy_(dense)

    def _compare(self) -> set[str]:
        """Names of what is real on rank 0. UserError if another rank built a different model."""
        mine, real = [], set()
        for prefix, module in self._model.named_modules(remove_duplicate=False):
            for key, tensor in _own_tensors(module).items():
                name = _joined(prefix, key)
                cast = tensor.is_floating_point() and not _keeps_type(module, key)
                dtype = (self._dtype if cast else None) or tensor.dtype
                mine.append((name, tuple(tensor.shape), str(dtype)))
                if not tensor.is_meta:
                    real.add(name)
        modes = {name: module.training for name, module in self._model.named_modules()}
        everyone = self._ranks.gather((mine, real, modes))
        for rank, (theirs, *_) in enumerate(everyone):
            if theirs != mine:
                raise self._differs(rank, theirs, mine)
        _, real_on_first, first_modes = everyone[0]
        for name, module in self._model.named_modules():
            # from_pretrained leaves another one than building the model.
            module.training = first_modes.get(name, module.training)
        return real_on_first

    def _differs(self, rank: int, theirs: list, mine: list) -> UserError:
        me, remedy = self._ranks.rank, "build the same model on every rank"
        for a, b in zip(theirs, mine, strict=False):
            if a != b:
                return _fail("model", f"rank {rank} has {a}, rank {me} has {b}; {remedy}")
        counts = f"rank {rank} has {len(theirs)} tensors, rank {me} has {len(mine)}"
        return _fail("model", f"{counts}; {remedy}")
